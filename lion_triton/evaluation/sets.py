"""Sets of clouds of any kind, and how they become comparable: which of their points, in which units."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
from jaxtyping import Float32, Int64
from torch import Tensor

from lion_triton.data.clouds import Clouds, Normalization, folder_clouds, procedural_clouds
from lion_triton.data.clouds import Split as Subset
from lion_triton.data.containers import Container
from lion_triton.data.meshes import SHAPE_SUFFIXES, read_shape
from lion_triton.data.sources import PROCEDURAL_POINTS, PROCEDURAL_SEEDS
from lion_triton.errors import one_line
from lion_triton.models.published import read_tensors

SPLIT_POINTS, FIRST, LAST = 15_000, 10_000, 5_000  # of ShapeNetCore.v2.PC15k, and the splits of its points
TENSOR_SUFFIXES = frozenset({".pt", ".pth"})
LARGEST = 1e9  # coordinates beyond have squared distances that float32 cannot hold

# Streams of random numbers; those of ``data`` are 0 to 2.
SAMPLES, REFERENCES, TRAINING, FLOOR, SCREEN, FEWER, FRESH, SHAPES = range(3, 11)

Array = np.ndarray
T = TypeVar("T")
Split = Literal["first10k", "last5k"]
OTHER_SPLIT: dict[Split, Split] = {"first10k": "last5k", "last5k": "first10k"}


@dataclass(frozen=True)
class CloudSet:
    """A set of clouds: the option that gave it, where it came from, and the clouds."""

    option: str
    what: str
    clouds: Clouds
    # Of the authors' files: a bare tensor is in the units of their networks, and a dictionary of references says how
    # to leave them.
    bare: bool = False
    mean_std: tuple[Float32[Array, "#N 3"], float] | None = None
    generated: bool = False  # procedural shapes, of which there are as many more as one likes

    def __len__(self) -> int:
        return len(self.clouds)

    def __getitem__(self, i: int) -> Float32[Array, "P 3"]:
        """Cloud i.

        Raises:
            ValueError: it cannot be read, or a coordinate is not finite or beyond LARGEST.
        """
        cloud = self._named(self.clouds.__getitem__, i)
        size = float(np.abs(cloud).max())
        if size > LARGEST:
            raise ValueError(f"{self.option}: expected coordinates up to {LARGEST:g}, got {size:g} in cloud {i}")
        return cloud

    def __iter__(self) -> Iterator[Float32[Array, "P 3"]]:
        return (self[i] for i in range(len(self)))

    def num_points(self) -> list[int]:
        """Of each cloud; of clouds on disk only headers are read. Raises what reading them raises."""
        return [self._named(self.clouds.num_points, i) for i in range(len(self))]

    def _named(self, read: Callable[[int], T], i: int) -> T:
        """What ``read`` gives for cloud i; an error names the option and the cloud."""
        try:
            return read(i)
        except ValueError as error:
            raise ValueError(f"{self.option}: cloud {i}, {error}") from None


def open_clouds(option: str, path: str, subset: Subset, categories: Sequence[str] = (), count: int = 0) -> CloudSet:
    """The clouds at ``path``: a folder <category>/<subset>/<id>.npy, of which ``categories`` can be chosen; a folder
    of clouds, a .npy, .npz or .pt of (S, P, 3), or "procedural": ``count`` of those, others for each option.

    Raises:
        ValueError: nothing there, or no set of clouds; a cloud in memory that is not finite, by its index.
    """
    if path == "procedural" and option != "samples":
        kind = {"training": "train", "fresh": "fresh"}.get(option, "held_out")
        _no_categories(option, categories, "the procedural shapes are")
        clouds = procedural_clouds(count, PROCEDURAL_POINTS, PROCEDURAL_SEEDS[kind])
        return CloudSet(option, f"procedural shapes, {kind.replace('_', '-')}", clouds, generated=True)
    where = Path(path)
    if (where / "clouds.npz").is_file():  # of lion_triton.sample
        where = where / "clouds.npz"
    if where.is_file():
        _no_categories(option, categories, f"{where} is")
        if where.suffix.lower() in TENSOR_SUFFIXES:
            return _read_tensors(option, where)
        return CloudSet(option, str(where), _read_file(option, where))
    if not where.is_dir():
        raise ValueError(f"{option}: {where} does not exist")
    files = sorted(f.name for f in where.iterdir() if f.suffix.lower() in SHAPE_SUFFIXES and f.name[0] != ".")
    if files:
        _no_categories(option, categories, f"{where} is")
        return CloudSet(option, str(where), _read_folder(option, where, files))
    return CloudSet(option, f"{where}, {subset}", folder_clouds(where, subset, categories or None, option=option))


def in_units_of(samples: CloudSet, references: CloudSet) -> CloudSet:
    """The samples as LION's own evaluation compares them: a bare tensor of its networks' output is put into the units
    of the data by the mean and standard deviation beside the references."""
    if not samples.bare or references.mean_std is None:
        return samples
    mean, std = references.mean_std
    clouds = [(cloud * std + mean).astype(np.float32) for cloud in samples]
    what = f"{samples.what}, times the standard deviation of {references.what} plus its mean"
    return CloudSet(samples.option, what, in_memory(samples.option, clouds, samples.clouds.names))


def _read_tensors(option: str, path: Path) -> CloudSet:
    """A file of ``torch.save`` as LION and PVD write them: samples as one tensor (S, P, 3 or more), or references as
    ``ref``, normalised, with their ``mean`` and ``std``."""
    content = read_tensors(path, option)
    found = content.get("ref") if isinstance(content, Mapping) else content
    if not isinstance(found, Tensor) or not found.dtype.is_floating_point or found.ndim != 3 or found.shape[2] < 3:
        got = f"{str(found.dtype)[6:]} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        if isinstance(content, Mapping) and "ref" not in content:
            got = f"a dictionary of {', '.join(map(str, content))[:100]}"
        raise ValueError(f"{option}: expected a tensor (S, P, 3), or one as ref, in {path}, got {got}")
    clouds = found[..., :3].float().numpy()
    mean_std = None
    if isinstance(content, Mapping):
        try:
            mean, std = (np.broadcast_to(content[key].float().numpy(), clouds.shape) for key in ("mean", "std"))
        except (KeyError, AttributeError, ValueError):
            raise ValueError(f"{option}: expected mean and std that fit ref {clouds.shape} in {path}") from None
        if (mean == mean[:1, :1]).all() and (std == std[:1, :1, :1]).all():  # one for all shapes
            mean_std = mean[0, :1], float(std[0, 0, 0])
        clouds = clouds * std + mean
    read = in_memory(option, list(clouds), [str(i) for i in range(len(clouds))])
    return CloudSet(option, str(path), read, found is content, mean_std)


def _no_categories(option: str, categories: Sequence[str], what: str) -> None:
    """Samples and training shapes may be a file where the references are a folder."""
    if categories and option == "reference":
        raise ValueError(
            f"categories: are chosen of a folder <category>/<subset>/<id>.npy, {what} none; got {', '.join(categories)}"
        )


def _read_file(option: str, path: Path) -> Clouds:
    """A .npy file, or a .npz file with an array ``points`` or a single one: (S, P, 3)."""
    if path.suffix.lower() in SHAPE_SUFFIXES - {".npy", ".npz"}:
        raise ValueError(f"{option}: expected a .npy, .npz or .pt of clouds, or a folder of clouds, got {path}")
    names: list[str] = []
    array: Array | None
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, Array):
            array = loaded
        else:
            with loaded:  # arrays beside the points may be anything, and are not read
                names = loaded.files
                chosen = ["points"] if "points" in names else names
                array = loaded[chosen[0]] if len(chosen) == 1 else None
    except Exception as error:  # a damaged file makes NumPy's parsers raise nearly anything
        # Whatever is no NumPy file it takes for a pickle.
        reason = "it holds no plain numbers" if "pickle" in str(error) else one_line(error)
        raise ValueError(f"{option}: {path} is not a readable .npy or .npz of clouds ({reason})") from None
    if array is None:
        found = ", ".join(names) or "none"
        raise ValueError(f"{option}: expected one array or one called points in {path}, got {found}")
    if array.dtype.kind not in "fiu" or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(f"{option}: expected numbers of shape (S, P, 3) in {path}, got {array.dtype} {array.shape}")
    return in_memory(option, list(array), [str(i) for i in range(len(array))])


def _read_folder(option: str, folder: Path, files: Sequence[str]) -> Clouds:
    """A folder with one cloud per file."""
    clouds = []
    for i, file in enumerate(files):
        try:
            shape = read_shape(Container(folder), file)
        except Exception as error:  # whatever a parser makes of a bad file
            raise ValueError(f"{option}: cloud {i}, {folder / file}: {one_line(error)}") from None
        if shape.is_mesh:
            raise ValueError(
                f"{option}: {folder / file} is a mesh: python -m lion_triton.prepare makes clouds of meshes"
            )
        clouds.append(shape.coordinates)
    return in_memory(option, clouds, files)


def spread(count: int, total: int) -> Int64[Array, " count"]:
    """``count`` indices evenly spread over ``total``: a folder's clouds come class by class, these are of all."""
    return np.arange(count) * total // count


def fingerprint(cloud: Float32[Array, "P 3"]) -> bytes:
    """Equal for clouds of the same points in the same order, and no others."""
    return hashlib.sha256(cloud.tobytes()).digest()


def fit_box(cloud: Float32[Array, "P 3"]) -> Float32[Array, "P 3"]:
    """The cloud with its bounding box in [-0.5, 0.5], as ``--norm-box`` has it."""
    return Normalization("box").apply(cloud) / np.float32(2)


def in_memory(option: str, clouds: Sequence[Array], names: Sequence[str]) -> Clouds:
    """Clouds (P_i, 3) as float32, all of them finite.

    Raises:
        ValueError: naming the first that is not.
    """
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is reported as such
        arrays = tuple(np.ascontiguousarray(cloud, dtype=np.float32) for cloud in clouds)
    bad = [i for i, cloud in enumerate(arrays) if not np.isfinite(cloud).all()]
    if bad:
        more = f" ({len(bad)} clouds in all)" if len(bad) > 1 else ""
        raise ValueError(f"{option}: expected finite coordinates, got NaN or infinity in cloud {bad[0]}{more}")
    labels = np.zeros(len(arrays), dtype=np.int64)
    return Clouds(cast(Any, arrays), labels, ("",), tuple(names))  # a tuple: the arrays may differ in length


@dataclass(frozen=True)
class Preparation:
    """Draws the points that are compared, and puts them in the units they are compared in."""

    split: Split | None  # None: of all points
    seed: int
    normalization: Normalization | None = None  # the run's, where that gives each cloud its own units
    norm_box: bool = False

    def part(self, points: int) -> slice:
        """The points to draw from, of a cloud of so many."""
        if self.split is None or points < SPLIT_POINTS:
            return slice(None)
        return slice(FIRST) if self.split == "first10k" else slice(points - LAST, points)

    def available(self, points: int) -> int:
        return len(range(points)[self.part(points)])

    def draw(
        self, cloud: Float32[Array, "P 3"], num_points: int, rng: np.random.Generator, *, again: bool = False
    ) -> Float32[Array, "num_points 3"]:
        """Points drawn without replacement, or with it where there are too few; all, as they are, if just so many.

        again: of the points that this generator would not draw otherwise, of which there must be as many.
        """
        part = cloud[self.part(len(cloud))]
        if again:
            part = np.delete(part, rng.choice(len(part), num_points, replace=False), axis=0)
        if len(part) != num_points:
            part = part.take(rng.choice(len(part), num_points, replace=len(part) < num_points), axis=0)
        if self.normalization is not None:
            center, scale = self.normalization.center_and_scale(cloud)
            part = ((part - center) / scale).astype(np.float32)
        # By the box of the points that are compared.
        return fit_box(part) if self.norm_box else part

    def rng(self, stream: int, i: int) -> np.random.Generator:
        """What decides the points of cloud i: the seed, the stream and i, not what was drawn before."""
        return np.random.default_rng((self.seed, stream, i))

    def __call__(
        self,
        source: CloudSet,
        num_points: int,
        stream: int,
        indices: Iterable[int] | None = None,
        *,
        again: bool = False,
    ) -> Float32[Array, "K num_points 3"]:
        """The clouds ``indices``, or all; see ``draw``. Raises what reading them raises."""
        chosen = range(len(source)) if indices is None else indices
        return np.stack([self.draw(source[i], num_points, self.rng(stream, i), again=again) for i in chosen])
