"""What every part of a training run needs to know."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from torch import Tensor

from lion_triton.config import TrainConfig
from lion_triton.data.clouds import Clouds, fixed_batch, in_turn
from lion_triton.data.embeddings import load_embeddings
from lion_triton.data.sources import VALIDATION_SHAPES, Sources, load_sources
from lion_triton.models.lion import LION
from lion_triton.runs import Run, Stage
from lion_triton.training.stopping import Stop

FEWEST = 2  # validation shapes that say anything


def training_sources(config: TrainConfig) -> Sources:
    """The run's clouds and, where its priors are conditioned on CLIP, the embeddings of those for training.

    Raises:
        ValueError: see ``load_sources`` and ``load_embeddings``.
    """
    sources = load_sources(config.data, config.evaluate_shapes)
    if not config.model.shape_prior.clip:
        return sources
    return replace(sources, embeddings=load_embeddings(config.data, sources.train))


@dataclass
class Context:
    """One process's part in a run: where it computes, what it trains, what it trains on."""

    run: Run
    sources: Sources
    accelerator: Accelerator
    lion: LION
    stop: Stop = field(default_factory=Stop)

    @property
    def config(self) -> TrainConfig:
        return self.run.config

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def key(self, stage: Stage, batch_size: int) -> Tensor:
        """The first noise key of a stage, for this process's part of a batch: noise is the sample's, whoever has it."""
        seed = (2 * self.config.seed + (stage == "priors")) * 4096
        return torch.tensor([seed, 0, self.share(range(batch_size)).start], device=self.device)

    def share(self, numbers: range) -> range:
        """This process's part of a global batch."""
        size = len(numbers) // self.accelerator.num_processes
        first = numbers.start + size * self.accelerator.process_index
        return range(first, first + size)

    def held_out(self, count: int) -> Tensor:
        """The first ``count`` held-out clouds, normalised; classes in turn where they are known."""
        return self._fixed(self.sources.held_out, count)[0]

    @property
    def watched(self) -> bool:
        """Whether the stages are measured on validation shapes while they train."""
        return self.config.validate_every > 0 and len(self.sources.validation) >= FEWEST

    def validation(self) -> tuple[Tensor, Tensor]:
        """The clouds that checkpoints are compared by, likewise, and their labels; on the device."""
        points, labels = self._fixed(self.sources.validation, VALIDATION_SHAPES)
        return points.to(self.device), labels.to(self.device)

    def _fixed(self, clouds: Clouds, count: int) -> tuple[Tensor, Tensor]:
        order, config = in_turn(clouds.labels)[:count], self.config.data
        points = fixed_batch(clouds, order, config.num_points, self.config.seed, self.run.normalization)
        return points, torch.from_numpy(clouds.labels[order])
