"""The folder RUN/surface, in which a run keeps its surface network: see ``lion_triton.parts``."""

from __future__ import annotations

from dataclasses import dataclass

from lion_triton.parts import Part
from lion_triton.runs import Run, load_checkpoint, load_state
from lion_triton.surface.config import SurfaceConfig, SurfaceTraining
from lion_triton.surface.network import SurfaceNetwork

FOLDER = "surface"


@dataclass(frozen=True)
class SurfaceRun(Part):
    """A surface network."""

    training: SurfaceTraining
    config: SurfaceConfig


def load_surface(run: Run, option: str = "run") -> tuple[SurfaceNetwork, SurfaceTraining, str]:
    """The run's surface network at its newest checkpoint, how it is trained, and the checkpoint's name.

    option: what errors call the run.

    Raises:
        ValueError: no checkpoint yet, a damaged one, or one of another architecture.
    """
    surface = SurfaceRun.open(run, FOLDER)
    newest = None if surface is None else surface.run.checkpoint()
    if surface is None or newest is None:
        how = "train it with --stage surface, or give --normals estimated"
        if run.pretrained:  # which no stage can be trained of
            how = "mesh the clouds that sample makes, with the --network of a run that knows such shapes"
        raise ValueError(f"{option}: {run.folder} has no surface network yet: {how}")
    checkpoint = load_checkpoint(surface.run, newest.name, with_optimizer=False)
    assert checkpoint is not None
    network = SurfaceNetwork(surface.config)
    load_state(network, checkpoint.model, surface.run)
    return network.eval(), surface.training, newest.name
