"""A run folder with random weights, made in no time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from lion_triton.config import quickstart
from lion_triton.data.clouds import Normalization
from lion_triton.data.procedural import CLASSES
from lion_triton.models.lion import LION
from lion_triton.runs import Checkpoint, Run, create_run, save_checkpoint
from lion_triton.surface import SurfaceNetwork, SurfaceTraining
from lion_triton.training.surface import train_surface

POINTS = 130
TRAINING = SurfaceTraining(steps=4, batch_size=2, resolution=16, sigma=0.03, dense_points=512)


def random_run(folder: Path, stage: str = "priors") -> Run:
    config = quickstart()
    config = replace(
        config,
        data=replace(config.data, num_points=POINTS, num_shapes=10),
        sampling=replace(config.sampling, steps=2),
        evaluate_shapes=2,
        mixed_precision="no",
        log_every=1,
        checkpoint_every=2,
    )
    run = create_run(folder, config, CLASSES, Normalization("global", (0.0, 0.0, 0.0), 0.25))
    torch.manual_seed(0)
    lion = LION(config.model)
    priors = {k: v for k, v in lion.state_dict().items() if "prior" in k}
    state = Checkpoint(stage, 4, lion.state_dict(), priors if stage == "priors" else {}, {})  # type: ignore[arg-type]
    save_checkpoint(run, 304 if stage == "priors" else 4, state)
    return run


def trained(run: Run, training: SurfaceTraining = TRAINING) -> SurfaceNetwork:
    return train_surface(run, training, Accelerator(cpu=True))
