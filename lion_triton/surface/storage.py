"""The folder RUN/surface, in which a run keeps its surface network: config.json, and checkpoints as a run's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lion_triton.parts import create_part, open_part
from lion_triton.runs import Run, load_checkpoint, load_state
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
    return SurfaceRun(create_part(run, "surface", vae, config=config, training=training), config, training)


def open_surface(run: Run) -> SurfaceRun | None:
    """The run's, or None if it has none yet.

    Raises:
        ValueError: a ``config.json`` that is damaged or of another version's form.
    """
    found = open_part(run, "surface", config=SurfaceConfig, training=SurfaceTraining)
    return None if found is None else SurfaceRun(found[0], **found[1])


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
    load_state(network, checkpoint.model, surface.run)
    return network.eval(), surface.training, newest.name
