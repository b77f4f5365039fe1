"""Encoders that take a degraded shape for the whole one, beside a run's own: RUN/encoders/{voxels,noisy,partial}.

The idea is the paper's (Zeng et al. 2022, section 3.1): for another kind of input only the encoders are fine-tuned, so
that decoder and priors serve it as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from lion_triton.config import EncoderTraining
from lion_triton.data.clouds import Clouds, draw
from lion_triton.data.degraded import InputKind, VoxelGrid, add_noise, cut
from lion_triton.kernels import nearest_neighbor, pairwise_chamfer
from lion_triton.models.vae import VAE
from lion_triton.parts import Part
from lion_triton.runs import Run, load_checkpoint, load_state

TYPICAL_SHAPES = 256  # enough for their mean place


@dataclass(frozen=True)
class Place:
    """Where the data's shapes are on average, in its units: the centre of their boxes, and the boxes' longest side."""

    center: tuple[float, float, float]
    longest_side: float

    @classmethod
    def of(cls, clouds: Clouds) -> Place:
        chosen = (clouds[i] for i in range(0, len(clouds), max(1, len(clouds) // TYPICAL_SHAPES)))
        lows, highs = zip(*((cloud.min(axis=0), cloud.max(axis=0)) for cloud in chosen), strict=True)
        low, high = np.stack(lows).astype(np.float64), np.stack(highs).astype(np.float64)
        x, y, z = ((low + high) / 2).mean(axis=0).tolist()
        return cls((x, y, z), float((high - low).max(axis=1).mean()))


@dataclass(frozen=True)
class EncoderRun(Part):
    """Encoders for one kind of input."""

    training: EncoderTraining
    place: Place

    @property
    def figures(self) -> dict[str, Any]:
        """Those of held-out shapes that its training ended with; none before."""
        path = self.folder / "figures.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return found


def part_name(kind: InputKind) -> str:
    """Of the encoders for such inputs."""
    return f"encoders/{kind}"


def trained_encoders(run: Run, kind: InputKind) -> EncoderRun:
    """Raises ``ValueError`` where the run has none for such inputs, or their training is not finished."""
    encoders = EncoderRun.open(run, part_name(kind))
    command = f"train {run.folder} --stage encoder --encoder.input {kind}"
    if run.pretrained and encoders is None:
        raise ValueError(f"run: {run.folder} has no encoders for the input {kind}, and only a run can get them")
    if encoders is None or encoders.run.checkpoint() is None:
        raise ValueError(f"run: {run.folder} has no encoders for the input {kind} yet: {command}")
    if not encoders.trained:
        raise ValueError(f"run: the encoders of {encoders.folder} are not trained to the end: {command} goes on")
    return encoders


def use_encoders(vae: VAE, encoders: EncoderRun) -> None:
    """Give the VAE the encoders of the newest checkpoint, in place of its own.

    Raises:
        ValueError: a damaged checkpoint, or one of another architecture.
    """
    checkpoint = load_checkpoint(encoders.run, with_optimizer=False)
    assert checkpoint is not None
    load_tuned(vae, checkpoint.model, encoders)


def load_tuned(vae: VAE, state: Mapping[str, Tensor], encoders: EncoderRun) -> None:
    """Load the encoders' weights, or say in one line that they do not fit."""
    load_state(nn.ModuleDict(tuned_modules(vae)), state, encoders.run)


def tuned_modules(vae: VAE) -> dict[str, nn.Module]:
    """Both encoders of a VAE, in parts and by their names."""
    return {name: getattr(vae, name) for name in ("shape_encoder", "shape_head", "point_encoder")}


def degrade(
    cloud: Float32[np.ndarray, "P 3"], num_points: int, training: EncoderTraining, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "N 3"], VoxelGrid | None]:
    """``num_points`` points as the encoders are given of a shape, and the grid if they come of one."""
    if training.input == "voxels":
        grid = VoxelGrid.around(cloud, training.resolution, rng)
        return grid.sample(num_points, rng), grid
    given = add_noise(cloud, training.noise, rng) if training.input == "noisy" else cut(cloud, training.kept, rng)
    return draw(given, num_points, rng), None


def from_given(given: Float32[np.ndarray, "S N 3"], clouds: Float32[np.ndarray, "S P 3"]) -> float:
    """Mean squared distance from a given point to the nearest one of the cloud that was made of it."""
    return nearest_neighbor(torch.tensor(given), torch.from_numpy(clouds))[0].mean().item()


def diversity(clouds: Float32[np.ndarray, "S N 3"]) -> float:
    """Mean Chamfer distance between two of these clouds; 0 of one alone."""
    x = torch.from_numpy(clouds)
    return float(pairwise_chamfer(x, x).sum() / max(len(x) * (len(x) - 1), 1))
