"""A LION's latents as editing needs them: taken to noise and back, between two noises, varied, classified.

Shapes: B clouds, N points. All latents here are standardised (``LION.standardize``), as the priors take them.
Interpolation in the priors' Gaussian space and diffuse-denoise: Zeng et al. 2022, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor

from lion_triton import diffusion
from lion_triton.config import SamplingConfig
from lion_triton.kernels import normal_noise
from lion_triton.kernels.noise import new_key
from lion_triton.models.lion import LION, Latents
from lion_triton.progress import Progress

Keep = Literal["nothing", "shape", "points"]

JUDGING_TIMES = 64  # of the schedule, at which a latent's denoising errors are compared


@dataclass(frozen=True)
class Condition:
    """What the priors are told of each cloud: its class, its CLIP embedding; None of what they do not know.

    On the way to ``other``, at ``weight`` (B,) in [0, 1], the predictions for both are blended.
    """

    labels: Int[Tensor, " B"] | None = None
    clip: Float[Tensor, "B 512"] | None = None
    other: Condition | None = None
    weight: Float[Tensor, " B"] | None = None

    def repeated(self, count: int) -> Condition:
        """Of one cloud, for ``count`` clouds."""
        labels, clip = (x if x is None else x.expand(count, *x.shape[1:]) for x in (self.labels, self.clip))
        return Condition(labels, clip)

    def towards(self, other: Condition, weight: Float[Tensor, " B"]) -> Condition:
        """On the way to ``other``; the same where it says the same."""
        pairs = (self.labels, other.labels), (self.clip, other.clip)
        same = all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)
        return self if same else replace(self, other=other, weight=weight)

    def shape(self, lion: LION, guidance: float) -> diffusion.Model:
        return self._blend(lambda told: lion.shape_denoiser(told.labels, told.clip, guidance))

    def points(self, lion: LION, z: Float[Tensor, "B Z"], guidance: float) -> diffusion.Model:
        return self._blend(lambda told: lion.point_denoiser(z, told.labels, told.clip, guidance))

    def _blend(self, denoiser: Callable[[Condition], diffusion.Model]) -> diffusion.Model:
        one, weight = denoiser(self), self.weight
        if self.other is None or weight is None:
            return one
        other = denoiser(self.other)

        def blended(x: Tensor, t: Tensor) -> Tensor:
            return torch.lerp(one(x, t), other(x, t), weight.reshape(-1, *[1] * (x.ndim - 1)))

        return blended


@dataclass(frozen=True)
class Noise:
    """What the deterministic sampler makes latents of: for h and for z a noise and, if it was found by the sampler run
    backwards, what each step misses."""

    h: diffusion.Trajectory
    z: diffusion.Trajectory


def encode(lion: LION, points: Float[Tensor, "B N 3"], seed: int = 0) -> Latents:
    """Latents of clouds in the model's units, drawn from the posteriors: the priors have seen no means of these."""
    return lion.standardize(lion.encode(points, generator=torch.Generator().manual_seed(seed)))


def decode(lion: LION, latents: Latents) -> Float32[Tensor, "B N 3"]:
    """The clouds of latents, in the model's units."""
    return lion.decode(*lion.unstandardize(latents)).float()


def seed_noise(lion: LION, seed: int, num_points: int, sampler: Literal["ddim", "ode"]) -> Noise:
    """The noise from which ``LION.sample`` makes its cloud when it makes one, by this sampler, with a generator of this
    seed."""
    generator, device = torch.Generator().manual_seed(seed), lion.z_mean.device
    z = normal_noise((1, lion.config.vae.shape_dim), new_key(device, generator))
    if sampler == "ddim":
        new_key(device, generator)  # of the steps, which make no noise
    h = normal_noise((1, num_points, lion.config.vae.point_dim), new_key(device, generator))
    return Noise(diffusion.Trajectory(h), diffusion.Trajectory(z))


def to_noise(
    lion: LION, latents: Latents, settings: SamplingConfig, condition: Condition, progress: Progress | None = None
) -> Noise:
    """The noise from which :func:`from_noise` makes these latents: the deterministic sampler run backwards."""
    advance = _parts(progress, 2, settings.steps)
    z = _inverse(condition.shape(lion, settings.guidance), latents.z, lion, settings, advance(0))
    h = _inverse(condition.points(lion, latents.z, settings.guidance), latents.h, lion, settings, advance(1))
    return Noise(h, z)


def from_noise(
    lion: LION,
    noise: Noise,
    settings: SamplingConfig,
    condition: Condition,
    progress: Progress | None = None,
    watch: Callable[[Float[Tensor, "B N H"]], None] | None = None,
) -> Latents:
    """The latents that the deterministic sampler ("ddim" with eta 0, or "ode") makes of a noise.

    watch: called with h after every step of DDIM.
    """
    advance = _parts(progress, 2, settings.steps)
    z = _solve(condition.shape(lion, settings.guidance), noise.z, lion, settings, advance(0))

    def advance_and_watch(step: int, t: int, h: Tensor) -> None:
        advance(1)(step, t, h)
        if watch is not None:
            watch(h)

    return Latents(_solve(condition.points(lion, z, settings.guidance), noise.h, lion, settings, advance_and_watch), z)


def between(a: Noise, b: Noise, weight: Float[Tensor, " B"]) -> Noise:
    """On the way from a to b (one cloud each) at ``weight`` (B,) in [0, 1], z and h each on its own."""
    return Noise(a.h.towards(b.h, weight), a.z.towards(b.z, weight))


def diffuse_denoise(
    lion: LION,
    latents: Latents,
    settings: SamplingConfig,
    condition: Condition,
    strength: float,
    keep: Keep,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Latents:
    """Both latents noised to the share ``strength`` of the schedule and denoised again by DDIM, h given the new z;
    ``keep`` names the one that stays as it is."""
    steps = _ddim_steps(settings)
    advance = _parts(progress, 2, max(1, round(strength * steps)))

    def renew(eps_model: diffusion.Model, x: Tensor, part: int) -> Tensor:
        return diffusion.diffuse_denoise(
            eps_model,
            x,
            lion.schedule,
            new_key(x.device, generator),
            strength=strength,
            steps=steps,
            eta=settings.eta,
            clip=settings.clip_x0,
            callback=advance(part),
        )

    z = latents.z if keep == "shape" else renew(condition.shape(lion, settings.guidance), latents.z, 0)
    h = latents.h if keep == "points" else renew(condition.points(lion, z, settings.guidance), latents.h, 1)
    return Latents(h, z)


@torch.no_grad()
def likeliest(lion: LION, z: Float[Tensor, "B Z"], conditions: Sequence[Condition]) -> Int[Tensor, " B"]:
    """Which of the conditions (each of one cloud) lets the shape prior denoise z best (Li et al. 2023, arXiv
    2303.16203), its own training loss compared at the same times and noises for all."""
    d, device = lion.config.diffusion, z.device
    T, count = d.num_train_timesteps, JUDGING_TIMES
    t = ((torch.arange(count, device=device) + 0.5) / count * T).long() + 1
    key = torch.zeros(2, dtype=torch.int64, device=device)

    def error(one: Tensor, condition: Condition) -> Tensor:
        told = condition.repeated(count)
        return diffusion.diffusion_loss(
            lambda z_t, t: lion.shape_prior(z_t, t, told.clip, told.labels),
            one.expand(count, -1),
            t,
            lion.schedule,
            key,
            d.prediction,
            d.weight,
            d.variance,
        ).mean()

    errors = [torch.stack([error(one, condition) for condition in conditions]) for one in z]
    return torch.stack(errors).argmin(1)


def match(a: Float[np.ndarray, "N 3"], b: Float[np.ndarray, "N 3"]) -> Int[np.ndarray, " N"]:
    """The order of b's points in which the sum of squared distances to a's is least: a[i] goes with b[order[i]]."""
    return np.asarray(linear_sum_assignment(cdist(a, b, "sqeuclidean"))[1])


def _solve(
    eps_model: diffusion.Model,
    start: diffusion.Trajectory,
    lion: LION,
    settings: SamplingConfig,
    callback: diffusion.Callback,
) -> Tensor:
    """What a deterministic sampler makes of a noise."""
    if settings.sampler == "ode":
        return diffusion.probability_flow(eps_model, start.noise, lion.schedule)
    return diffusion.ddim(
        eps_model,
        start.noise,
        lion.schedule,
        torch.zeros(2, dtype=torch.int64, device=start.noise.device),  # of noise that eta 0 multiplies by 0
        steps=_ddim_steps(settings),
        spacing=lion.spacing,
        clip=settings.clip_x0,
        residuals=start.residuals,
        callback=callback,
    )


def _inverse(
    eps_model: diffusion.Model, x: Tensor, lion: LION, settings: SamplingConfig, callback: diffusion.Callback
) -> diffusion.Trajectory:
    """That of which :func:`_solve` makes x."""
    if settings.sampler == "ode":
        return diffusion.Trajectory(diffusion.probability_flow(eps_model, x, lion.schedule, inverse=True))
    return diffusion.ddim_inverse(
        eps_model,
        x,
        lion.schedule,
        steps=_ddim_steps(settings),
        spacing=lion.spacing,
        clip=settings.clip_x0,
        callback=callback,
    )


def _ddim_steps(settings: SamplingConfig) -> int:
    if settings.sampler == "ddpm" or settings.steps is None:
        raise ValueError(f"sampler: expected ddim and a number of steps, got {settings.sampler}, {settings.steps}")
    return settings.steps


def _parts(progress: Progress | None, parts: int, steps: int | None) -> Callable[[int], diffusion.Callback]:
    """Callbacks for samplers of so many steps each that follow one another: together they report to ``progress``."""

    def callback(part: int) -> diffusion.Callback:
        def report(step: int, *_: object) -> None:
            if progress is not None and steps is not None:
                progress(part * steps + step, parts * steps)

        return report

    return callback
