"""The folder RUN/surface, in which a run keeps its surface network: config.json, and checkpoints as a run's own."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import dacite

from lion_triton import __version__
from lion_triton.config import differences
from lion_triton.runs import Run, commit, load_checkpoint, write_text
from lion_triton.surface.config import SurfaceConfig, SurfaceTraining
from lion_triton.surface.network import SurfaceNetwork


@dataclass(frozen=True)
class SurfaceRun:
    """What ``config.json`` says; ``run`` is the run itself with RUN/surface as its folder, for its checkpoints."""

    run: Run
    config: SurfaceConfig
    training: SurfaceTraining

    @property
    def folder(self) -> Path:
        return self.run.folder


def create_surface(run: Run, config: SurfaceConfig, training: SurfaceTraining, vae: str) -> SurfaceRun:
    """Make the folder; ``vae`` names the checkpoint whose VAE the network learns from."""
    folder = run.folder / "surface"
    folder.mkdir(exist_ok=True)
    content = {
        "lion_triton": __version__,
        "commit": commit(),
        "vae": vae,
        "config": asdict(config),
        "training": asdict(training),
    }
    write_text(folder / "config.json", json.dumps(content, indent=2) + "\n")
    return SurfaceRun(replace(run, folder=folder), config, training)


def open_surface(run: Run) -> SurfaceRun | None:
    """The run's, or None if it has none yet.

    Raises:
        ValueError: a ``config.json`` that is damaged or of another version's form.
    """
    path = run.folder / "surface" / "config.json"
    if not path.is_file():
        return None
    strict = dacite.Config(cast=[tuple], strict=True)
    try:
        content = json.loads(path.read_text())
        config = dacite.from_dict(SurfaceConfig, content["config"], strict)
        training = dacite.from_dict(SurfaceTraining, content["training"], strict)
    except Exception as error:  # whatever a damaged or foreign file makes the parsers raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"run: {path} is damaged or of another version ({reason})") from None
    return SurfaceRun(replace(run, folder=path.parent), config, training)


def check_same_surface(surface: SurfaceRun, training: SurfaceTraining) -> None:
    """Refuse to continue with other settings.

    Raises:
        ValueError: naming the first difference.
    """
    free = {"log_every": 1, "checkpoint_every": 1}
    lines = differences(replace(training, **free), replace(surface.training, **free), "surface.")
    if lines:
        raise ValueError(
            f"stage: {surface.folder} was started with other settings ({lines[0]}): remove it to start anew"
        )


def load_surface(run: Run) -> tuple[SurfaceNetwork, SurfaceTraining, str]:
    """The run's surface network at its newest checkpoint, how it is trained, and the checkpoint's name.

    Raises:
        ValueError: no checkpoint yet, a damaged one, or one of another architecture.
    """
    surface = open_surface(run)
    newest = None if surface is None else surface.run.checkpoint()
    if surface is None or newest is None:
        raise ValueError(
            f"run: {run.folder} has no surface network yet: train it with --stage surface, or give --normals estimated"
        )
    checkpoint = load_checkpoint(surface.run, newest.name, with_optimizer=False)
    assert checkpoint is not None
    network = SurfaceNetwork(surface.config)
    load_network(network, surface, dict(checkpoint.model))
    return network.eval(), surface.training, newest.name


def load_network(network: SurfaceNetwork, surface: SurfaceRun, state: dict[str, object]) -> None:
    """Load weights, or say in one line that they do not fit."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"run: the checkpoint of {surface.folder} is of another architecture ({reason})") from None
