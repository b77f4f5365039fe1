"""The run folder: what a training run leaves behind, and how it is read again.

    RUN/config.json                        version, commit, the whole configuration, classes, normalisation, CLIP
    RUN/embeddings.npz                     of a run with --clip: CLIP embeddings of some training shapes
    RUN/metrics.jsonl                      one line per logged step
    RUN/tensorboard/                       the same as curves
    RUN/samples/*.png                      pictures
    RUN/checkpoints/step-<n>/              the newest two and the best of each stage: model.safetensors,
                                           ema.safetensors (priors), optimizer.pt, and state.json with every file's
                                           size and SHA-256, and the loss on validation shapes where it was measured
    RUN/validation-<stage>.png             what was measured on validation shapes
    RUN/surface/, RUN/encoders/*/          networks trained later, see ``lion_triton.parts``
    RUN/distilled/                         priors for few steps, see ``lion_triton.models.hub``
    RUN/checkpoints/damaged-step-<n>/      one that was found damaged when the run was continued
    RUN/nonfinite.json                     which tensors were not finite, where that ended the run

A checkpoint folder appears under its name only when it is complete, and is gone from there before it is deleted, so an
interrupted run never leaves half of one.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lion_triton import __version__
from lion_triton.config import DistillTraining, TrainConfig, differences, from_json
from lion_triton.data.clouds import Normalization
from lion_triton.errors import one_line
from lion_triton.models import hub
from lion_triton.models.files import fingerprint, partial_of, save_tensors, sha256, write_text
from lion_triton.models.hub import (
    CONFIG,
    DISTILLED,
    EMBEDDINGS,
    WEIGHTS,
    distilled_files,
    find_run,
    read_distilled,
    shipped_models,
)
from lion_triton.models.lion import LION

Stage = Literal["vae", "priors", "surface", "encoder", "distill"]
KEPT_CHECKPOINTS = 2
BEST = "best"  # instead of a checkpoint's name


@dataclass(frozen=True)
class Run:
    """A run folder and what its ``config.json`` says; ``clip``: which CLIP its embeddings are of, where known."""

    folder: Path
    config: TrainConfig
    classes: tuple[str, ...]
    normalization: Normalization
    clip: str | None = None

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def embeddings(self) -> Path:
        """CLIP embeddings of some of its training shapes, in a run with ``--clip``."""
        return self.folder / EMBEDDINGS

    @property
    def results(self) -> Path:
        """Where commands write: the folder itself, or runs/NAME for a shipped model."""
        return Path("runs") / self.folder.name if self.folder.parent == hub.SHIPPED else self.folder

    @property
    def samples(self) -> Path:
        return self.results / "samples"

    @property
    def pretrained(self) -> bool:
        """Whether this is a folder of ``save_pretrained``: as a run's, but with one file of weights, no checkpoints."""
        return (self.folder / WEIGHTS).is_file()

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted((self.folder / "checkpoints").glob("step-*"))

    def checkpoint(self, name: str | None = None) -> Path | None:
        """The checkpoint called ``name``, the newest, or that which is the ``"best"``; None before the first.

        Raises:
            ValueError: if none is called ``name``, or none can be the best.
        """
        folders = {folder.name: folder for folder in self.checkpoints()}
        if name is None:
            return next(reversed(folders.values()), None)
        if name == BEST:
            best = self.best("priors") or self.best("vae")
            if best is None:
                if self.pretrained:
                    raise ValueError(f"checkpoint: {self.folder} has one set of weights and no checkpoints, got best")
                raise ValueError(f"checkpoint: none of {self.folder} is known as the best, as none was measured")
            return best
        if name not in folders:
            raise ValueError(f"checkpoint: expected one of {', '.join(folders) or 'none yet'}, got {name}")
        return folders[name]

    def best(self, stage: Stage) -> Path | None:
        """The checkpoint of a stage with the lowest loss on validation shapes, the first of equals; None if none was
        measured."""
        losses = {folder: _measured(folder, stage) for folder in self.checkpoints()}
        known = {folder: loss for folder, loss in losses.items() if loss is not None}
        return min(known, key=known.__getitem__, default=None)


@dataclass(frozen=True)
class Checkpoint:
    """Progress of a run: ``step`` steps of ``stage`` are done. ``ema`` is empty in stage 1.

    ``loss``: on validation shapes, where it was measured. ``ended``: the stage has run out of patience here.
    """

    stage: Stage
    step: int
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    loss: float | None = None
    ended: bool = False


def create_run(
    folder: Path,
    config: TrainConfig,
    classes: tuple[str, ...],
    normalization: Normalization,
    clip: str | None = None,
) -> Run:
    """Make the run folder and write its ``config.json``.

    Raises:
        ValueError: if the folder holds something else than a run.
    """
    path = folder / CONFIG
    ours = {partial_of(path)}  # of a process that was killed
    if folder.is_file() or (folder.is_dir() and set(folder.iterdir()) - ours):
        raise ValueError(f"out: {folder} exists and is not a run folder")
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "lion_triton": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "config": asdict(config),
        "classes": list(classes),
        "normalization": normalization.to_json(),
        "clip": clip,
    }
    write_text(path, json.dumps(content, indent=2) + "\n")
    return Run(folder, config, classes, normalization, clip)


def change_config(run: Run, config: TrainConfig, note: str) -> None:
    """Write another configuration to ``config.json``, and add ``note`` to the changes there."""
    path = run.folder / CONFIG
    content = json.loads(path.read_text())
    content["config"] = asdict(config)
    content.setdefault("changes", []).append(note)
    write_text(path, json.dumps(content, indent=2) + "\n")


def open_run(name: Path, option: str = "run") -> Run:
    """Read a run folder, a folder of ``LION.save_pretrained``, or the shipped model of that name.

    option: what errors call it.

    Raises:
        ValueError: if it is none, or its ``config.json`` is damaged or of another version's form.
    """
    folder = find_run(name)
    path = folder / CONFIG
    if not path.is_file():
        known = f", nor a shipped model: {shipped_models()}"
        raise ValueError(f"{option}: {folder} is not a run folder (it has no config.json){known}")
    try:
        content = json.loads(path.read_text())
        config = from_json(content["config"])
        classes = tuple(content["classes"])
        normalization = Normalization.from_json(content["normalization"])
    except Exception as error:  # whatever a damaged or foreign file makes the parsers raise
        raise ValueError(f"{option}: {path} is damaged or of another version ({one_line(error)})") from None
    return Run(folder, config, classes, normalization, content.get("clip"))


def check_same_run(run: Run, config: TrainConfig) -> None:
    """Refuse to continue a run with another configuration.

    Raises:
        ValueError: naming the first differences; first of all the architecture's.
    """
    ours, theirs = (_without_free_options(c) for c in (config, run.config))
    lines = differences(config.model, run.config.model, "model.") or differences(ours, theirs)
    if lines:
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        what = "another architecture" if lines[0].startswith("model.") else "other settings"
        raise ValueError(
            f"out: {run.folder} was started with {what} ({'; '.join(lines[:3])}{more}): give another --out"
        )


def _without_free_options(config: TrainConfig) -> TrainConfig:
    """The same for all configurations that differ in nothing but what may change when a run is continued."""
    free: dict[str, Any] = {"compile": "auto", "on_nonfinite": "stop", "patience": None, "distill": DistillTraining()}
    free |= dict.fromkeys(("log_every", "picture_every", "checkpoint_every", "validate_every"), 1)
    free["data"] = replace(config.data, workers=0)
    free |= {"vae": replace(config.vae, steps=1), "priors": replace(config.priors, steps=1)}  # see training.longer
    return replace(config, **free)


def save_checkpoint(run: Run, total_step: int, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, whole or not at all, and drop all but the newest two and the best of each stage."""
    parent = run.folder / "checkpoints"
    target = parent / f"step-{total_step:08d}"
    partial = parent / f".partial-{os.getpid()}"
    for old in parent.glob(".partial-*"):  # of a process that was killed
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_tensors(checkpoint.model, partial / "model.safetensors")
        if checkpoint.ema:
            save_tensors(checkpoint.ema, partial / "ema.safetensors")
        _save_pickle(dict(checkpoint.optimizer), partial / "optimizer.pt")
        files = {p.name: fingerprint(p) for p in sorted(partial.iterdir())}
        state = {name: getattr(checkpoint, name) for name in ("stage", "step", "loss", "ended")} | {"files": files}
        (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        if target.exists():
            _remove(target)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    best = {run.best("vae"), run.best("priors")}
    for old in run.checkpoints()[:-KEPT_CHECKPOINTS]:
        if old not in best:
            _remove(old)
    return target


def _measured(folder: Path, stage: Stage) -> float | None:
    """The loss of a checkpoint on validation shapes; None of another stage, or where it was not measured."""
    try:
        state = json.loads((folder / "state.json").read_text())
        return float(state["loss"]) if state["stage"] == stage else None
    except (OSError, ValueError, KeyError, TypeError):  # loading it says what is wrong
        return None


def vae_trained(checkpoint: Checkpoint, config: TrainConfig) -> bool:
    """Whether stage 1 is over."""
    return checkpoint.stage != "vae" or checkpoint.step == config.vae.steps or checkpoint.ended


def note_best(run: Run, name: str | None) -> None:
    """Say so where the newest checkpoint is taken and another one is the best."""
    newest, best = run.checkpoint(), run.best("priors")
    if name is None and newest is not None and best not in (None, newest):
        assert best is not None
        print(f"checkpoint: the newest, {newest.name}; the best on validation shapes is {best.name}: --checkpoint best")


def _remove(checkpoint: Path) -> None:
    """Under its name it is there whole, or not at all."""
    removed = checkpoint.with_name(f".partial-{checkpoint.name}")
    os.replace(checkpoint, removed)
    shutil.rmtree(removed)


def set_damaged_aside(run: Run) -> Checkpoint | None:
    """The newest checkpoint that is whole; None before the first. Each newer one is named and renamed.

    Raises:
        ValueError: there are some, but none is whole.
    """
    for folder in reversed(run.checkpoints()):
        try:
            return load_checkpoint(run, folder.name)
        except ValueError as error:
            if folder == run.checkpoints()[0]:  # rather than to begin anew without a word
                raise ValueError(f"{error}; there is none before it: remove it to begin anew") from None
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
            print(f"{error}: left aside as {aside}, the one before it is used")
    return None


def load_checkpoint(run: Run, name: str | None = None, *, with_optimizer: bool = True) -> Checkpoint | None:
    """The newest checkpoint, or the one called ``name``; None before the first. Sampling can do without the optimizer.

    Raises:
        ValueError: if none is called ``name``; if it is damaged or truncated, or its optimizer file would run code;
            nothing is skipped silently.
    """
    folder = run.checkpoint(name)
    if folder is None:
        return None
    try:
        state = json.loads((folder / "state.json").read_text())
        stage, step, files = state["stage"], int(state["step"]), dict(state["files"])
        measured = state.get("loss"), bool(state.get("ended"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder / "state.json", error) from None
    for name, expected in files.items():
        path = folder / name
        if name == "optimizer.pt" and not with_optimizer:
            continue
        if not path.is_file():
            raise _damaged(path, "missing")
        if path.stat().st_size != expected["bytes"]:
            raise _damaged(path, f"{path.stat().st_size} bytes, expected {expected['bytes']}")
        if sha256(path) != expected["sha256"]:
            raise _damaged(path, "its SHA-256 differs from state.json")
    try:
        model = safetensors.torch.load_file(folder / "model.safetensors")
        ema = safetensors.torch.load_file(folder / "ema.safetensors") if "ema.safetensors" in files else {}
    except (SafetensorError, OSError) as error:
        raise _damaged(folder / "model.safetensors", error) from None
    if not with_optimizer:
        return Checkpoint(stage, step, model, ema, {}, *measured)
    try:
        optimizer = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise _damaged(folder / "optimizer.pt", error) from None
    return Checkpoint(stage, step, model, ema, optimizer, *measured)


def load_model(run: Run, name: str | None = None) -> LION:
    """The run's LION in evaluation mode, its priors with the averaged (EMA) weights, with what was distilled from them.

    name: of a checkpoint; None: the newest.

    Raises:
        ValueError: no checkpoint yet, or none called ``name``, a damaged one, or one of another architecture.
    """
    if run.pretrained:
        run.checkpoint(name)  # of which there are none to name
        return LION.from_pretrained(run.folder)
    folder = run.checkpoint(name)
    checkpoint = load_checkpoint(run, name, with_optimizer=False)
    if folder is None or checkpoint is None:
        raise ValueError(f"run: {run.folder} has no checkpoint yet")
    if checkpoint.stage == "vae":
        raise ValueError(f"run: {run.folder} has no trained priors yet (stage 1, step {checkpoint.step})")
    lion = LION(run.config.model)
    load_state(lion, {**checkpoint.model, **checkpoint.ema, **read_distilled(run.folder, folder.name)}, run)
    lion.remember(run.folder)
    return lion.eval()


def weights_sha256(run: Run, name: str | None = None) -> dict[str, str]:
    """SHA-256 of each file of weights: of the checkpoint called ``name`` or the newest, as written down beside it, and
    of what was distilled from that."""
    folder = run.checkpoint(name)
    if folder is None:
        return {WEIGHTS: sha256(run.folder / WEIGHTS)}
    files = json.loads((folder / "state.json").read_text())["files"]
    distilled = {f"{DISTILLED}/{p.name}": sha256(p) for p in distilled_files(run.folder, folder.name).values()}
    return {name: file["sha256"] for name, file in files.items() if name.endswith(".safetensors")} | distilled


def load_state(module: nn.Module, state: Mapping[str, Tensor], run: Run) -> None:
    """Load weights of the run, or of a part of it, or say in one line which do not fit."""
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        line = one_line(error)
        raise ValueError(f"run: the checkpoint of {run.folder} is of another architecture ({line})") from None


def append_text(path: Path, text: str) -> None:
    """Add to a file, whole or not at all."""
    data = text.encode()
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.truncate(path, size)
            raise OSError(error.errno, error.strerror, str(path)) from None


def _save_pickle(content: dict[str, Any], path: Path) -> None:
    try:
        torch.save(content, path)
    except RuntimeError as error:  # how torch.save reports a failed write; a full disk is by far the likeliest cause
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def _damaged(path: Path, reason: str | Exception) -> ValueError:
    return ValueError(f"checkpoint: {path} is damaged ({reason if isinstance(reason, str) else one_line(reason)})")


def commit() -> str | None:
    """The commit of the checkout this package runs from, with "+" if it has changes; None if it is installed."""
    here = Path(__file__).parent
    try:
        # Installed into an environment inside somebody else's checkout, this file is not that checkout's.
        own = ["git", "-C", str(here), "ls-files", "--error-unmatch", __file__]
        subprocess.run(own, capture_output=True, timeout=10, check=True)
        head = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        status = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain", "-uno"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")
