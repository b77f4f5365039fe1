"""Latents to noise and back, between noises, varied, classified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lion_triton.config import SamplingConfig
from lion_triton.diffusion import Schedule, Trajectory
from lion_triton.generation.latents import (
    Condition,
    between,
    decode,
    diffuse_denoise,
    encode,
    from_noise,
    likeliest,
    match,
    seed_noise,
    to_noise,
)
from lion_triton.models.lion import LION, DiffusionConfig, Latents
from tests.tiny import POINTS, tiny_config, tiny_lion

DDIM = SamplingConfig("ddim", 8)
LABEL = torch.tensor([2])
TOLD = Condition(LABEL)


@pytest.fixture(scope="module")
def lion() -> LION:
    return tiny_lion(tiny_config())


@pytest.fixture(scope="module")
def latents(lion: LION) -> Latents:
    return encode(lion, torch.randn(1, POINTS, 3, generator=torch.Generator().manual_seed(2)))


def equal(a: Latents, b: Latents) -> bool:
    return torch.equal(a.h, b.h) and torch.equal(a.z, b.z)


def apart(a: Latents, b: Latents) -> float:
    """Root mean square; where the networks choose neighbours, single points may jump."""
    return max(float((x - y).square().mean().sqrt()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("sampler", ["ddim", "ode"])
def test_a_seed_is_the_cloud_that_sample_makes_of_it(sampler: Any) -> None:
    lion = tiny_lion(tiny_config(diffusion=DiffusionConfig() if sampler == "ode" else None))
    if sampler == "ode":
        lion.shape_prior, lion.point_prior = Flowing(), Flowing()  # type: ignore[assignment]
    settings = SamplingConfig("ddim", 3, clip_x0=5.0) if sampler == "ddim" else SamplingConfig("ode", None)
    options = {"sampler": sampler, "steps": settings.steps, "clip_x0": settings.clip_x0, "labels": LABEL}
    expected = lion.sample(1, num_points=20, generator=torch.Generator().manual_seed(5), **options)
    noise = seed_noise(lion, 5, 20, sampler)
    assert torch.equal(decode(lion, from_noise(lion, noise, settings, TOLD)), expected)


@pytest.mark.parametrize("planted", [False, True], ids=["", "jump"])
def test_latents_come_back_from_noise(lion: LION, latents: Latents, planted: bool) -> None:
    prior = lion.point_prior
    if planted:
        lion.point_prior = Jumping(prior)  # type: ignore[assignment]
    try:
        noise = to_noise(lion, latents, DDIM, TOLD)
        back = from_noise(lion, noise, DDIM, TOLD)
        without = from_noise(lion, replace(noise, h=Trajectory(noise.h.noise)), DDIM, TOLD)
        other = from_noise(lion, noise, DDIM, Condition(torch.tensor([3])))
    finally:
        lion.point_prior = prior
    assert apart(back, latents) < 1e-6
    torch.testing.assert_close(decode(lion, back), decode(lion, latents), rtol=0, atol=1e-4)
    assert apart(without, latents) > (0.02 if planted else 1e-4)
    assert apart(other, latents) > 0.02
    assert apart(Latents(noise.h.noise, noise.z.noise), latents) > 0.2


class Jumping(nn.Module):
    """Says otherwise than a prior of all coordinates above 0: none below or above leads to some."""

    def __init__(self, prior: nn.Module) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, x_t: Tensor, *more: Any) -> Tensor:
        return self.prior(x_t, *more) + 2.0 * (x_t > 0)


def test_latents_come_back_from_the_noise_of_the_probability_flow() -> None:
    lion = tiny_lion(tiny_config(classes=0, diffusion=DiffusionConfig()))
    lion.shape_prior, lion.point_prior = Flowing(), Flowing()  # type: ignore[assignment]
    settings, latents = SamplingConfig("ode", None), encode(lion, torch.randn(1, 20, 3))
    noise = to_noise(lion, latents, settings, Condition())
    assert apart(from_noise(lion, noise, settings, Condition()), latents) < 1e-3
    torch.testing.assert_close(noise.z.noise, (latents.z - 0.2) / 0.5, atol=0.02, rtol=0.02)
    torch.testing.assert_close(noise.h.noise, (latents.h - 0.2) / 0.5, atol=0.02, rtol=0.02)


class Flowing(nn.Module):
    """The true eps at real times of the linear schedule where all latents are N(0.2, 0.5^2)."""

    def forward(self, x_t: Tensor, t: Tensor, *_: object) -> Tensor:
        s = t.reshape(-1, *[1] * (x_t.ndim - 1)) / 1000
        abar = (-(0.1 * s + 9.95 * s * s)).exp()
        return (1 - abar).sqrt() * (x_t - abar.sqrt() * 0.2) / (0.25 * abar + 1 - abar)


def test_between_two_noises_lie_their_ends(lion: LION) -> None:
    a, b = (seed_noise(lion, seed, 20, "ddim") for seed in (1, 2))
    way = between(a, b, torch.tensor([0.0, 0.5, 1.0]))
    for found, one, other in ((way.h, a.h, b.h), (way.z, a.z, b.z)):
        assert torch.equal(found.noise[:1], one.noise)
        assert torch.equal(found.noise[2:], other.noise)
        assert 0.8 < float(found.noise[1].norm() / one.noise.norm()) < 1.2
        assert found.residuals is None


def test_between_classes_predictions_are_blended(lion: LION) -> None:
    noise = seed_noise(lion, 1, 20, "ddim")
    three = Latents(noise.h.noise.expand(3, -1, -1), noise.z.noise.expand(3, -1))
    ours, theirs = torch.full((3,), 1), torch.full((3,), 4)
    condition = Condition(ours).towards(Condition(theirs), torch.tensor([0.0, 0.25, 1.0]))
    t = torch.full((3,), 500)
    for model in (lambda c: c.shape(lion, 0)(three.z, t), lambda c: c.points(lion, three.z, 0)(three.h, t)):
        found, a, b = (model(c) for c in (condition, Condition(ours), Condition(theirs)))
        torch.testing.assert_close(found[0], a[0])
        torch.testing.assert_close(found[1], 0.75 * a[1] + 0.25 * b[1])
        torch.testing.assert_close(found[2], b[2])
        assert not torch.allclose(a, b)


@pytest.fixture
def vary(lion: LION, latents: Latents) -> Callable[..., Latents]:
    def made(strength: float, keep: Any = "nothing", seed: int = 0) -> Latents:
        generator = torch.Generator().manual_seed(seed)
        return diffuse_denoise(lion, latents, DDIM, TOLD, strength, keep, generator)

    return made


def test_variations_keep_what_they_are_told_to_keep(vary: Callable[..., Latents], latents: Latents) -> None:
    assert equal(vary(0.0), latents)
    both, shape, points = vary(0.5), vary(0.5, "shape"), vary(0.5, "points")
    assert torch.equal(shape.z, latents.z)
    assert torch.equal(points.h, latents.h)
    for moved, kept in ((both.h, latents.h), (both.z, latents.z), (shape.h, latents.h), (points.z, latents.z)):
        assert (moved - kept).abs().mean() > 0.05
    assert equal(vary(0.5), both)
    assert not torch.equal(vary(0.5, seed=1).z, both.z)


def test_variations_go_further_with_strength(vary: Callable[..., Latents], latents: Latents) -> None:
    distances = [sum(apart(vary(strength, seed=i), latents) for i in range(4)) for strength in (0, 0.1, 0.3, 0.9)]
    assert distances == sorted(distances)


def test_progress_counts_up_to_all_steps(lion: LION, latents: Latents) -> None:
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))

    to_noise(lion, latents, DDIM, TOLD, progress)
    assert seen == [(i, 16) for i in range(1, 17)]
    seen.clear()
    watched: list[Tensor] = []
    noise = seed_noise(lion, 1, 20, "ddim")
    last = from_noise(lion, noise, DDIM, TOLD, progress, watched.append)
    assert seen == [(i, 16) for i in range(1, 17)]
    assert len(watched) == 8
    assert torch.equal(watched[-1], last.h)
    seen.clear()
    diffuse_denoise(lion, latents, DDIM, TOLD, 0.5, "nothing", torch.Generator(), progress)
    assert seen == [(i, 8) for i in range(1, 9)]


def test_only_ddim_can_vary(lion: LION, latents: Latents) -> None:
    for settings in (SamplingConfig("ode", None), replace(DDIM, sampler="ddpm")):
        with pytest.raises(ValueError, match=r"sampler: expected ddim"):
            diffuse_denoise(lion, latents, settings, TOLD, 0.5, "nothing", torch.Generator())


class Ideal(nn.Module):
    """The true v where the latents of class i are N(mean_i, 0.3^2)."""

    def __init__(self, means: Tensor, schedule: Schedule) -> None:
        super().__init__()
        self.means, self.schedule = means, schedule

    def forward(self, z_t: Tensor, t: Tensor, clip: None = None, label: Tensor | None = None) -> Tensor:
        alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        mean = self.means[label]
        eps = sigma * (z_t - alpha * mean) / (alpha**2 * 0.09 + sigma**2)
        return (eps - sigma * z_t) / alpha


def test_the_likeliest_is_the_one_that_denoises_best() -> None:
    lion = tiny_lion(tiny_config(classes=5))
    means = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    lion.shape_prior = Ideal(means, lion.schedule)  # type: ignore[assignment]
    truth = torch.arange(20) % 5
    z = means[truth] + 0.3 * torch.randn(20, 8, generator=torch.Generator().manual_seed(4))
    classes = [Condition(torch.tensor([i])) for i in range(5)]
    assert (likeliest(lion, z, classes) == truth).all()
    assert (likeliest(lion, z[:2], classes[1::-1]) == torch.tensor([1, 0])).all()


def test_points_are_matched_so_that_they_move_least() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(50, 3))
    shuffled = rng.permutation(50)
    assert (match(a, a[shuffled] + 1.0)[shuffled.argsort()] >= 0).all()
    np.testing.assert_array_equal(a[shuffled][match(a, a[shuffled])], a)
    b = rng.normal(size=(50, 3))
    order = match(a, b)
    assert sorted(order) == list(range(50))
    assert np.square(a - b[order]).sum() < np.square(a - b).sum()
