"""How a LION generates a batch of clouds: both priors' reverse chains, one after the other, then the decoder."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lion_triton.capture import Captured, why_uncaptured
from lion_triton.diffusion import Chain, Steps, probability_flow
from lion_triton.kernels import normal_noise
from lion_triton.models.vae import Latents

if TYPE_CHECKING:
    from lion_triton.models.lion import LION

Progress = Callable[[int, int], None]  # (steps done, steps in all)
NewKey = Callable[[], Tensor]  # a fresh noise key


class Sampling:
    """Sampling of B clouds of P points. On a GPU a step of each prior, and the decoder, are CUDA graphs.

    Args:
        labels, clip: conditions of the first batch; ``run`` copies those of a later one to the same place.
        clip_x0, guidance: see ``LION.sample``.
    """

    def __init__(
        self,
        lion: LION,
        num_samples: int,
        num_points: int,
        labels: Tensor | None,
        clip: Tensor | None,
        clip_x0: float | None,
        guidance: float,
    ) -> None:
        device, vae, T = lion.z_mean.device, lion.config.vae, lion.schedule.num_train_timesteps
        self.lion = lion
        self.labels, self.clip = (None if x is None else x.clone() for x in (labels, clip))
        z = torch.empty(num_samples, vae.shape_dim, device=device)
        h = torch.empty(num_samples, num_points, vae.point_dim, device=device)
        self.shapes = Chain(lion.shape_denoiser(self.labels, self.clip, guidance), z, T, clip_x0)
        self.points = Chain(lion.point_denoiser(self.shapes.x, self.labels, self.clip, guidance), h, T, clip_x0)
        enabled = not why_uncaptured(device)
        self._step_shapes = Captured(self.shapes.step, "a denoising step of the shape prior", enabled)
        self._step_points = Captured(self.points.step, "a denoising step of the point prior", enabled)
        self._decoded = Captured(self._decode, "the decoder", enabled)

    def run(
        self,
        steps: Steps | None,
        new_key: NewKey,
        labels: Tensor | None,
        clip: Tensor | None,
        progress: Progress | None,
    ) -> Tensor:
        """Clouds (B, P, 3) in the model's units; ``steps`` None takes the probability-flow ODE instead."""
        for place, x in ((self.labels, labels), (self.clip, clip)):
            if place is not None and x is not None:
                place.copy_(x)
        for part, (chain, step) in enumerate(((self.shapes, self._step_shapes), (self.points, self._step_points))):
            noise = normal_noise(chain.x.shape, new_key())
            if steps is None:
                chain.x.copy_(probability_flow(chain.eps_model, noise, self.lion.schedule))
                continue
            chain.start(noise, steps, new_key())
            count = len(steps.times)
            for i in range(1, count + 1):
                step()
                if progress is not None:
                    progress(part * count + i, 2 * count)
        return self._decoded().clone()

    def _decode(self) -> Tensor:
        return self.lion.decode(*self.lion.unstandardize(Latents(self.points.x, self.shapes.x)))


class Samplings:
    """The samplings that a LION keeps for batches of the same kind, with their graphs.

    They read the weights where they were: once weights have moved, all are made anew. A copy of the LION, which has
    weights of its own, starts with none.
    """

    KEPT = 4  # each holds the memory of its graphs

    def __init__(self) -> None:
        self._weights: Hashable = None
        self._kept: dict[Hashable, Sampling] = {}

    def __deepcopy__(self, memo: object) -> Samplings:
        return Samplings()

    def __reduce__(self) -> tuple[type[Samplings], tuple[()]]:
        return Samplings, ()

    def get(
        self,
        lion: LION,
        num_samples: int,
        num_points: int,
        labels: Tensor | None,
        clip: Tensor | None,
        clip_x0: float | None,
        guidance: float,
    ) -> Sampling:
        device = lion.z_mean.device
        if why_uncaptured(device):
            return Sampling(lion, num_samples, num_points, labels, clip, clip_x0, guidance)
        weights = tuple(x.data_ptr() for x in (*lion.parameters(), *lion.buffers()))
        if weights != self._weights:
            self._weights, self._kept = weights, {}
        precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        modes = (lion.vae.training, lion.shape_prior.training, lion.point_prior.training)
        kind = (num_samples, num_points, labels is None, clip is None, clip_x0, guidance, precision, modes)
        sampling = self._kept.pop(kind, None)
        if sampling is None:
            sampling = Sampling(lion, num_samples, num_points, labels, clip, clip_x0, guidance)
        self._kept[kind] = sampling  # last, as the latest used
        while len(self._kept) > self.KEPT:
            del self._kept[next(iter(self._kept))]
        return sampling
