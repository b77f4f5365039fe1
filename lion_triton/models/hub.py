"""A LION in a folder or on a hub: ``from_pretrained``, ``save_pretrained``, ``push_to_hub``.

    FOLDER/config.json         as that of a run: configuration, classes, normalisation; also figures and licences
    FOLDER/model.safetensors   the weights, those of the priors averaged; also of priors distilled for few steps
    FOLDER/picture.png         what it generates, where its run drew that
    FOLDER/embeddings.npz      CLIP embeddings of some training shapes, of a model that is conditioned on them
    FOLDER/surface/            its surface network, and FOLDER/encoders/*/ its tuned encoders: those of a run that are
                               trained to the end, as they lie there, without what only training needs
    FOLDER/README.md           the model card, written from the above

Reading takes JSON and tensors and runs no code. Of a run folder (``lion_triton.runs``) the newest checkpoint is read,
and what was distilled from it:

    RUN/distilled/config.json             from which checkpoint, and how
    RUN/distilled/steps-4.safetensors     both priors for 4 steps; likewise for other numbers of steps
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import dacite
import safetensors.torch
import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, snapshot_download
from safetensors import SafetensorError
from torch import Tensor

from lion_triton import __version__
from lion_triton.models.card import model_card
from lion_triton.models.files import fingerprint, save_tensors, write_text, write_whole

CONFIG, WEIGHTS, PICTURE, EMBEDDINGS = "config.json", "model.safetensors", "picture.png", "embeddings.npz"
DISTILLED = "distilled"
PARTS = ("surface", "encoders/*")  # see ``lion_triton.parts``
UNKNOWN = "unknown"  # in place of the data, of a model without a run
SHIPPED = Path(__file__).parents[1] / "pretrained"  # models that come with the package, each a folder like these
P = TypeVar("P", bound="Pretrained")


def find_run(name: Path) -> Path:
    """The folder that ``name`` stands for: itself, or where there is none the shipped model of that name."""
    return SHIPPED / name if not name.exists() and (SHIPPED / name / CONFIG).is_file() else name


def shipped_models() -> str:
    """Their names, in a line."""
    return ", ".join(sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}")))


class Pretrained(PyTorchModelHubMixin):
    """The part of ``LION`` that is about folders and hubs.

    ``about`` is what ``config.json`` says, ``picture`` a PNG file of what the model generates, ``embeddings`` a file of
    some training shapes' CLIP embeddings, ``parts`` where the files of further networks lie, by their names; all of the
    folder that it was read from.
    """

    config_type: ClassVar[type]  # a dataclass, the only argument of ``__init__``
    about: dict[str, Any] | None = None
    picture: bytes | None = None
    embeddings: bytes | None = None
    parts: Mapping[str, Path] = MappingProxyType({})
    _saved_dtype: torch.dtype | None = None

    @classmethod
    def from_pretrained(cls: type[P], folder_or_id: str | Path, **download: Any) -> P:  # type: ignore[override]
        """Read a model, in evaluation mode, on the CPU.

        Args:
            folder_or_id: a folder written by ``save_pretrained``, a run folder, the name of a model that comes with the
                package, or else the id of a model on a hub, as "name/model". Only for an id a network is used.
            download: options of ``huggingface_hub.snapshot_download`` for an id, as ``revision`` and ``token``.

        Raises:
            ValueError: neither folder nor id, no trained priors yet, damaged or foreign files.
        """
        folder = find_run(Path(folder_or_id))
        if not folder.is_dir():
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder_or_id)):
                what = "a run folder, a folder written by save_pretrained, the name of a shipped model"
                what += f" ({shipped_models()}), or an id as name/model"
                raise ValueError(f"folder_or_id: expected {what}, got {folder_or_id}")
            files = [CONFIG, WEIGHTS, PICTURE, EMBEDDINGS, *(f"{part.removesuffix('/*')}/*" for part in PARTS)]
            folder = Path(snapshot_download(str(folder_or_id), allow_patterns=files, **download))
        about = read_about(folder)
        try:
            options = dacite.Config(cast=[tuple], strict=True)
            model: Any = cls(dacite.from_dict(cls.config_type, about["config"]["model"], options))
            model.load_state_dict(read_weights(folder))
        except (KeyError, TypeError, RuntimeError, dacite.DaciteError) as error:
            raise _unfit(folder, error) from None
        model.remember(folder)
        return model.eval()

    def remember(self, folder: Path) -> None:
        """Keep what the folder of a model or of a run says of it, for ``save_pretrained``."""
        model: Any = self
        self.about = read_about(folder)
        if not model.distilled:
            self.about.pop(DISTILLED, None)
        elif DISTILLED in self.about:
            self.about[DISTILLED]["steps"] = list(model.distilled_steps)
        drawn = next((p for p in (folder / PICTURE, folder / "samples" / "overview.png") if p.is_file()), None)
        self.picture = None if drawn is None else drawn.read_bytes()
        path = folder / EMBEDDINGS
        self.embeddings = path.read_bytes() if path.is_file() else None
        parts = finished_parts(folder)
        self.about.pop("parts", None)
        if parts:
            self.about["parts"] = {name: about for name, (about, _) in parts.items()}
        self.parts = {str(p.relative_to(folder)): p.resolve() for _, files in parts.values() for p in files}

    def save_pretrained(
        self, save_directory: str | Path, *, dtype: torch.dtype | None = None, **options: Any
    ) -> str | None:
        """Write the model to a folder.

        Args:
            dtype: of the weights in the files; default: their own. Statistics of the latents keep theirs, and reading
                gives float32 again. bfloat16 halves the files.
            options: those of ``huggingface_hub.PyTorchModelHubMixin``.

        Raises:
            ValueError: the folder is a run's, whose ``config.json`` would be replaced.
        """
        self._saved_dtype = dtype
        if (Path(save_directory) / "checkpoints").exists():
            raise ValueError(f"save_directory: {save_directory} is a run folder: give another")
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        model: Any = self
        about = self.about or _unknown(model.config)
        weights = {name for name, _ in model.named_parameters()}
        tensors = {
            name: tensor.to(dtype=self._saved_dtype if name in weights else None)
            for name, tensor in model.state_dict().items()
        }
        save_tensors(tensors, save_directory / WEIGHTS)
        about = about | {"lion_triton": __version__, "weights": fingerprint(save_directory / WEIGHTS)}
        write_text(save_directory / CONFIG, json.dumps(about, indent=2) + "\n")
        for name, content in ((PICTURE, self.picture), (EMBEDDINGS, self.embeddings)):
            if content is not None:
                write_whole(save_directory / name, partial(Path.write_bytes, data=content))
        self._save_parts(save_directory)
        (save_directory / "README.md").unlink(missing_ok=True)  # the mixin writes one where there is none

    def _save_parts(self, folder: Path) -> None:
        """Copy the further networks, in place of those that another model left there."""
        for name in {*finished_parts(folder), *(self.about or {}).get("parts", ())}:
            if (folder / name / CONFIG).resolve() not in self.parts.values():
                shutil.rmtree(folder / name, ignore_errors=True)
        dtype = self._saved_dtype
        for name, source in self.parts.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if dtype is not None and path.suffix == ".safetensors":
                tensors = _read_tensors("folder_or_id", source)
                save_tensors({k: x.to(dtype) if x.is_floating_point() else x for k, x in tensors.items()}, path)
            elif path.resolve() != source:
                write_whole(path, partial(shutil.copyfile, source))
        if dtype is not None:
            for state in (folder / name for name in self.parts if name.endswith("/state.json")):
                content = json.loads(state.read_text())
                content["files"] |= {p.name: fingerprint(p) for p in state.parent.glob("*.safetensors")}
                write_text(state, json.dumps(content, indent=2) + "\n")

    def generate_model_card(self, data_licence: str | None = None) -> ModelCard:
        """The card; ``data_licence`` overrides what the index of the run's data says. To give it, pass
        ``model_card_kwargs={"data_licence": ...}`` to ``save_pretrained`` or ``push_to_hub``."""
        model: Any = self
        return model_card(self.about or _unknown(model.config), self.picture is not None, data_licence)


def read_about(folder: Path) -> dict[str, Any]:
    """What ``config.json`` says, and what a run folder holds beside it: figures, and the licences of its data.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    about = _read_json(folder / CONFIG)
    if about is None:
        raise ValueError(f"folder_or_id: {folder} holds no {CONFIG} of a model or a run")
    further = {"figures": folder / "figures.json", "evaluation": folder / "evaluation" / "evaluation.json"}
    further[DISTILLED] = folder / DISTILLED / CONFIG
    for name, path in further.items():
        found = _read_json(path)
        if found is not None:
            about[name] = _essence(found) if name == "evaluation" else found
    source = about.get("config", {}).get("data", {}).get("source")
    index = _read_json(Path(source) / "index.json") if source else None
    if index is not None:
        about["data_licences"] = sorted({row["licence"] for row in index.get("objects", []) if row.get("licence")})
    return about


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder of ``save_pretrained``, or those of a run's newest checkpoint, its priors' averaged.

    Raises:
        ValueError: there are none, or none of trained priors yet; a damaged file.
    """
    paths, distilled = [folder / WEIGHTS], dict[str, Tensor]()
    if paths[0].is_file():
        _check_weights(paths[0])
    else:
        checkpoints = sorted((folder / "checkpoints").glob("step-*"))
        if not checkpoints or not (checkpoints[-1] / "ema.safetensors").is_file():
            raise ValueError(f"folder_or_id: {folder} has no trained priors yet")
        paths = [checkpoints[-1] / WEIGHTS, checkpoints[-1] / "ema.safetensors"]
        distilled = read_distilled(folder, checkpoints[-1].name)
    weights: dict[str, Tensor] = {}
    for path in paths:
        weights |= _read_tensors("folder_or_id", path)
    return weights | distilled


def _check_weights(path: Path) -> None:
    """Raise ``ValueError`` if this is not the file that ``config.json`` beside it was written for, where that says
    which it is."""
    expected = (_read_json(path.with_name(CONFIG)) or {}).get("weights")
    if expected is not None and fingerprint(path) != expected:
        raise ValueError(f"folder_or_id: {path} is damaged, or of another model (its SHA-256 is not in {CONFIG})")


def finished_parts(folder: Path) -> dict[str, tuple[dict[str, Any], list[Path]]]:
    """The networks in RUN/surface and RUN/encoders/* that are trained to the end, by these names: how they were trained
    and their figures, and the files that using them takes.

    Raises:
        ValueError: a damaged file.
    """
    found = {}
    for part in sorted(path for pattern in PARTS for path in folder.glob(pattern)):
        about, figures = _read_json(part / CONFIG), _read_json(part / "figures.json")
        training = (about or {}).get("training", {})
        last = last_checkpoint(part, training.get("steps", 0))
        if last is not None:
            files = [part / CONFIG, part / "figures.json", last / "state.json", *sorted(last.glob("*.safetensors"))]
            what = {"training": training, "figures": figures or {}}
            found[part.relative_to(folder).as_posix()] = what, [path for path in files if path.is_file()]
    return found


def last_checkpoint(part: Path, steps: int) -> Path | None:
    """That of a network which is trained to the end, for so many steps; None before."""
    path = part / "checkpoints" / f"step-{steps:08d}"
    return path if path.is_dir() else None


def distilled_files(folder: Path, checkpoint: str) -> dict[int, Path]:
    """The files of priors that were distilled from a run's checkpoint, by their number of steps.

    Raises:
        ValueError: a damaged ``config.json``.
    """
    about = _read_json(folder / DISTILLED / CONFIG)
    if about is None or about.get("checkpoint") != checkpoint:
        return {}
    return {int(p.stem.removeprefix("steps-")): p for p in (folder / DISTILLED).glob("steps-*.safetensors")}


def read_distilled(folder: Path, checkpoint: str) -> dict[str, Tensor]:
    """The weights of :func:`distilled_files`, by the names that ``LION.load_state_dict`` takes. Says so where there are
    some, but of another checkpoint.

    Raises:
        ValueError: a damaged file.
    """
    files = distilled_files(folder, checkpoint)
    if not files and any((folder / DISTILLED).glob("steps-*.safetensors")):
        print(f"{folder / DISTILLED} is of another checkpoint than {checkpoint}: not used")
    return {
        f"{DISTILLED}.{steps}.{name}": tensor
        for steps, path in files.items()
        for name, tensor in _read_tensors(DISTILLED, path).items()
    }


def _read_tensors(option: str, path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{option}: {path} is damaged ({' '.join(str(error).split())})") from None


def _essence(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Of an evaluation's record its figures and their protocol, not every sample."""
    kept = ("command", "figures", "normalization", "split", "emd", "samples", "references")
    return {name: evaluation[name] for name in kept if name in evaluation}


def _unknown(config: Any) -> dict[str, Any]:
    """``about`` of a model of which nothing but its own configuration is known; in its own units."""
    classes = [str(i) for i in range(config.shape_prior.num_classes)] or [""]
    return {
        "config": {"preset": "", "data": {"source": UNKNOWN}, "model": asdict(config), "vae": {}, "priors": {}},
        "classes": classes,
        "normalization": {"kind": "global", "mean": [0.0, 0.0, 0.0], "scale": 1.0},
    }


def _unfit(folder: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200]
    return ValueError(f"folder_or_id: {folder} is damaged or of another architecture or version ({reason})")


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"folder_or_id: {path} is damaged ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"folder_or_id: {path} is damaged (no JSON object)")
    return content
