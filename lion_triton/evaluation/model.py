"""A run that is scored: its samples, and what only a model has, reconstructions and the bound of its priors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from lion_triton import metrics
from lion_triton.data.clouds import Clouds
from lion_triton.devices import resolve_precision
from lion_triton.evaluation.phases import Bar
from lion_triton.evaluation.sets import Array, spread
from lion_triton.models.lion import LION, Posterior, posterior
from lion_triton.processes import ALONE, Processes
from lion_triton.reconstruction import reconstruct
from lion_triton.runs import Run, load_model, weights_sha256
from lion_triton.sample import SampleArguments, by_distilled, class_labels, generate, resolved


@dataclass(frozen=True)
class ScoredRun:
    """A run with the weights of one of its checkpoints; ``checkpoint`` is the folder that they are in."""

    run: Run
    lion: LION
    checkpoint: Path
    weights_sha256: dict[str, str]

    @classmethod
    def load(cls, run: Run, checkpoint: str | None, device: torch.device, processes: Processes = ALONE) -> ScoredRun:
        """The weights of the checkpoint, or of the newest; all that is needed of its folder, as a run that goes on
        will remove it. The same for all ``processes``.

        Raises:
            ValueError: see ``runs.load_model``.
        """
        newest = processes.agreed(run.checkpoint(checkpoint))
        name = None if newest is None else newest.name
        lion = load_model(run, name)
        return cls(run, lion.to(device), newest or run.folder, weights_sha256(run, name))

    @property
    def conditional(self) -> bool:
        return self.run.config.model.shape_prior.num_classes > 0

    @property
    def clip(self) -> bool:
        """Whether its priors are conditioned on CLIP."""
        return self.run.config.model.shape_prior.clip

    def labels(self, clouds: Clouds) -> Int64[Array, " S"] | None:
        """The run's class of each cloud, if it knows all of their names."""
        if not self.conditional or not set(clouds.classes) <= set(self.run.classes):
            return None
        index = np.array([self.run.classes.index(name) for name in clouds.classes])
        return index[clouds.labels]

    def network_units(self, points: Float32[Array, "S N 3"]) -> Float32[Tensor, "S N 3"]:
        """Points as ``Preparation`` makes them without a box, as the networks take them."""
        normalization = self.run.normalization  # per cloud: done already, with mean 0 and scale 1 stored
        return torch.from_numpy(((points - np.array(normalization.mean)) / normalization.scale).astype(np.float32))

    def sample(
        self, options: SampleArguments, references: Clouds, title: str, processes: Processes = ALONE
    ) -> tuple[Float32[Array, "S N 3"], dict[str, Any]]:
        """Clouds in the units of ``Preparation`` without a box, and how they were made; classes as the references'."""
        labels, known = class_labels(self.run, options), self.labels(references)
        if known is not None:
            labels = known[spread(options.num_samples, len(known))]
        settings = resolved(self.run, options)
        distilled = by_distilled(self.lion, settings)
        clouds = generate(self.run, self.lion, options, labels, title=title, processes=processes)
        points = self.run.normalization.invert(clouds)
        return points, {
            **asdict(settings),
            "distilled": distilled,
            "seed": options.seed,
            "batch_size": options.batch_size,
            "classes": "none" if not self.conditional else "in turn" if known is None else "those of the references",
            **({"clip": "embeddings of training shapes"} if self.clip else {}),
            "precision": resolve_precision(self.run.config.mixed_precision, self.lion.z_mean.device),
            "checkpoint": str(self.checkpoint),
            "weights_sha256": self.weights_sha256,
        }

    def scores(
        self,
        references: Clouds,
        points: Float32[Array, "R N 3"],
        emd: metrics.EMD | None,
        seed: int,
        bar: Bar,
    ) -> dict[str, Float64[Array, " R"]]:
        """Reconstruction of each reference (``points``, as ``Preparation`` makes them without a box), and the bound of
        the priors on its latents; without the latter where the run's classes are not those of the references, and one
        NaN where the VAE does not return numbers."""
        normalised, device = self.network_units(points), self.lion.z_mean.device
        with bar("reconstructions", 2 * len(points), "cloud") as shown:
            rebuilt = reconstruct(
                self.lion, normalised, self.run.normalization, self.run.config.mixed_precision, progress=shown.update
            )
            if not np.isfinite(rebuilt.points).all():
                return {"reconstruction_cd": np.array([math.nan])}
            x, y = (torch.from_numpy(clouds).to(device) for clouds in (rebuilt.points, points))
            rebuilds = metrics.reconstructions(x, y, emd, progress=shown.update)
        scores = {name: of.cpu().numpy() for name, of in rebuilds.items()}
        if not self.bounded(references):
            return scores
        parts = []
        with bar("bound of the priors", 3 * len(points), "cloud") as shown:
            for i, batch in enumerate(normalised.split(32)):
                parts.append(posterior(self.lion.vae, batch.to(device), torch.tensor([seed, -1 - i], device=device)))
                shown.update(len(batch))
            latents = Posterior(*(torch.cat([getattr(p, f) for p in parts]) for f in ("z", "h_mu", "h_log_sigma")))
            labels = self.labels(references)
            bounds = metrics.prior_bounds(
                self.lion,
                latents,
                torch.tensor([seed, 0], device=device),
                None if labels is None else torch.from_numpy(labels).to(device),
                progress=shown.update,
            )
        return scores | {f"bound_{name}": of.numpy() for name, of in bounds.items()}

    def bounded(self, references: Clouds) -> bool:
        """Whether the priors can be asked about these references: class-conditional ones must know their classes, and
        ones that are conditioned on CLIP would need their embeddings."""
        return not self.clip and (not self.conditional or self.labels(references) is not None)
