"""CLIP embeddings of shapes, on which priors are conditioned: of one view of each or of several.

    <category>/<split>/clip/<id>.npy   beside the cloud <category>/<split>/<id>.npy: (V, 512), by ``prepare --clip``
    FILE.npz                           ``embeddings`` (R, 512) or (R, V, 512), ``ids`` (R,): the shape of each row, as
                                       <class>/<id>, of which rows of the same shape are views; ``model``: which CLIP
    FILE.npy                           (S, 512) or (S, V, 512): of the embedded shapes 0, 1, ...

All as floating-point numbers; lengths do not matter, as every embedding is scaled to length 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int64
from torch import Tensor

from lion_triton.data.clouds import Clouds, map_clouds
from lion_triton.data.find import embeddings_path
from lion_triton.data.sources import DataConfig
from lion_triton.errors import one_line
from lion_triton.models.priors import CLIP_DIM

ROUNDING = 1e-3  # what float16 may make of a length of 1


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Embeddings of S shapes, of length 1.

    Attributes:
        rows: the views of all shapes, one shape after the other.
        starts: where each shape's begin, and where the last one's end.
        ids: the shapes' names.
        model: which CLIP they are of, as ``transformers`` takes it; None where nobody says.
    """

    rows: Float16[np.ndarray, "R 512"]
    starts: Int64[np.ndarray, " S+1"]
    ids: tuple[str, ...]
    model: str | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def row_names(self) -> list[str]:
        """The shape's name of each row."""
        return [name for name, views in zip(self.ids, np.diff(self.starts), strict=True) for _ in range(views)]

    def draw(self, seed: int, numbers: Iterable[int], shapes: Iterable[int]) -> Float32[Tensor, "B 512"]:
        """One view for each sample of a run: of its shape, at random by the seed and the sample's number."""
        chosen = []
        for number, shape in zip(numbers, shapes, strict=True):
            first, end = self.starts[shape : shape + 2]
            chosen.append(np.random.default_rng((seed, 3, number)).integers(first, end))
        return torch.from_numpy(self.rows[chosen].astype(np.float32))

    def some(self, count: int) -> Embeddings:
        """One view of each of ``count`` shapes, of all if there are fewer: always the same ones, in random order."""
        rng = np.random.default_rng(0)
        shapes = rng.permutation(len(self))[:count]
        rows = self.rows[rng.integers(self.starts[shapes], self.starts[shapes + 1])]
        return Embeddings(rows, np.arange(len(shapes) + 1), tuple(self.ids[i] for i in shapes), self.model)

    @classmethod
    def of(cls, views: Iterable[Float[np.ndarray, "V 512"]], ids: Iterable[str], model: str | None) -> Embeddings:
        """Of the shapes' views, one array for each."""
        arrays = list(views)
        starts = np.cumsum([0, *map(len, arrays)])
        return cls(np.concatenate(arrays).astype(np.float16), starts, tuple(ids), model)


def load_embeddings(config: DataConfig, clouds: Clouds) -> Embeddings:
    """Those of the clouds: in the file ``config.embeddings``, or where none is given beside the clouds.

    Raises:
        ValueError: none of a cloud, or anything but finite numbers (V, 512) other than zero.
    """
    if config.embeddings is not None:
        path = Path(config.embeddings)
        if path.suffix == ".npy" and config.source != "procedural":
            raise ValueError("data.embeddings: a .npy file goes by number: of shapes in folders give a .npz with ids")
        found = read_embeddings("data.embeddings", path)
        return (_by_number if path.suffix == ".npy" else _by_name)(found, path, clouds)
    if not isinstance(clouds.source, tuple):
        raise ValueError("data.embeddings: the embedded shapes have none: give a file, as docs/words.md says")
    paths = [embeddings_path(path) for path in clouds.source]
    missing = sum(not path.is_file() for path in paths)
    if missing:
        raise ValueError(
            f"data.source: {missing} of {len(clouds)} clouds in {config.source} have no CLIP embeddings beside them: "
            "prepare the shapes anew with --clip, or give --data.embeddings FILE"
        )

    def views_of(i: int) -> Float32[np.ndarray, "V 512"]:
        return _read_npy("data.source", paths[i]).reshape(-1, CLIP_DIM)

    views = map_clouds(views_of, len(paths), "reading embeddings")
    return Embeddings.of(views, clouds.names, _model_of(Path(config.source)))


def read_embeddings(option: str, path: Path) -> Embeddings:
    """Those in a file; a shape's name in a .npy file is its number.

    Raises:
        ValueError: naming ``option``: no such file, or one of another form.
    """
    if not path.is_file():
        raise ValueError(f"{option}: {path} is no file")
    if path.suffix == ".npy":
        array = _read_npy(option, path)
        return Embeddings.of(array, map(str, range(len(array))), None)
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in ("embeddings", "ids", "model") if name in file.files}
    except Exception as error:  # whatever a damaged file makes NumPy raise
        raise ValueError(f"{option}: {path} is not a readable .npz or .npy ({one_line(error)})") from None
    if not {"embeddings", "ids"} <= held.keys():
        raise ValueError(f"{option}: expected arrays called embeddings and ids, {path} holds others")
    array, ids = _unit(option, path, held["embeddings"]), held["ids"]
    if ids.dtype.kind != "U" or ids.shape != array.shape[:1]:
        raise ValueError(
            f"{option}: expected one name in ids for each of {len(array)} rows, got {ids.dtype} {ids.shape}"
        )
    of: dict[str, list[np.ndarray]] = {}
    for name, views in zip(ids.tolist(), array, strict=True):
        of.setdefault(name, []).append(views)
    return Embeddings.of(map(np.concatenate, of.values()), of, str(held["model"]) if "model" in held else None)


def write_embeddings(embeddings: Embeddings, path: Path) -> None:
    """Write what ``read_embeddings`` reads, whole or not at all."""
    ids = np.repeat(np.array(embeddings.ids), np.diff(embeddings.starts))
    arrays = {"embeddings": embeddings.rows, "ids": ids}
    if embeddings.model is not None:
        arrays["model"] = np.array(embeddings.model)
    partial = path.with_name(f".{path.stem}.partial.npz")
    try:
        np.savez(partial, **arrays)  # type: ignore[arg-type]
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _by_number(found: Embeddings, path: Path, clouds: Clouds) -> Embeddings:
    if len(found) != len(clouds):
        raise ValueError(f"data.embeddings: expected those of {len(clouds)} training shapes, {path} holds {len(found)}")
    return Embeddings(found.rows, found.starts, clouds.names, found.model)


def _by_name(found: Embeddings, path: Path, clouds: Clouds) -> Embeddings:
    index = {name: i for i, name in enumerate(found.ids)}
    missing = [name for name in clouds.names if name not in index]
    if missing:
        raise ValueError(
            f"data.embeddings: {path} holds none of {len(missing)} of {len(clouds)} training shapes, as {missing[0]}"
        )
    ends = found.starts[1:]
    views = (found.rows[found.starts[i] : ends[i]] for i in map(index.__getitem__, clouds.names))
    return Embeddings.of(views, clouds.names, found.model)


def _model_of(folder: Path) -> str | None:
    """What the index of a prepared folder says."""
    try:
        return str(json.loads((folder / "index.json").read_text())["clip"]["model"])
    except (OSError, ValueError, KeyError, TypeError):  # a folder that something else made
        return None


def _read_npy(option: str, path: Path) -> Float32[np.ndarray, "S V 512"]:
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # whatever a damaged file makes NumPy raise
        raise ValueError(f"{option}: {path} is not a readable .npy of numbers ({one_line(error)})") from None
    return _unit(option, path, array)


def _unit(option: str, path: Path, array: np.ndarray) -> Float32[np.ndarray, "S V 512"]:
    """Embeddings of one shape or several, of one view or several, of length 1: scaled where they have another."""
    if array.dtype.kind != "f" or array.ndim not in (1, 2, 3) or array.shape[-1] != CLIP_DIM or array.size == 0:
        wanted = f"(..., {CLIP_DIM}), as of CLIP ViT-B/32"
        raise ValueError(f"{option}: expected floating-point {wanted}, got {array.dtype} {array.shape} in {path}")
    array = array.astype(np.float32)
    array = array.reshape(-1, 1, CLIP_DIM) if array.ndim < 3 else array
    length = np.linalg.norm(array, axis=-1, keepdims=True)
    if not (np.isfinite(length) & (length > 0)).all():
        raise ValueError(f"{option}: expected finite embeddings other than zero, {path} holds others")
    return array / np.where(np.abs(length - 1) < ROUNDING, 1, length)
