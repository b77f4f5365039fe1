"""Noise between noises, samplers run backwards, and part of the way: against Gaussians done by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lion_triton.diffusion import (
    Model,
    Schedule,
    Trajectory,
    ddim,
    ddim_inverse,
    diffuse_denoise,
    probability_flow,
    slerp,
    timesteps,
)
from lion_triton.kernels.diffusion import q_sample

KINDS = ["linear", "warmup_constant", "cosine"]
KEY = torch.tensor([7, 100])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(schedule: Schedule, mean: float, std: float) -> Model:
    """The true eps where data are N(mean, std^2), in float64."""

    def eps(x: Tensor, t: Tensor) -> Tensor:
        abar = schedule.log_abar[t].exp().reshape(-1, *[1] * (x.ndim - 1))
        return (1 - abar).sqrt() * (x - abar.sqrt() * mean) / (abar * std**2 + 1 - abar)

    return eps


def curved(schedule: Schedule) -> Model:
    """The true eps where data are half N(-0.8, 0.5^2), half N(0.8, 0.5^2): no straight line in x."""
    modes = exact(schedule, -0.8, 0.5), exact(schedule, 0.8, 0.5)

    def eps(x: Tensor, t: Tensor) -> Tensor:
        abar = schedule.log_abar[t].exp().reshape(-1, *[1] * (x.ndim - 1))
        share = torch.sigmoid(1.6 * abar.sqrt() * x / (0.25 * abar + 1 - abar))  # of the second, given x
        return (1 - share) * modes[0](x, t) + share * modes[1](x, t)

    return eps


def test_slerp_is_the_textbook_formula_for_each_cloud() -> None:
    a, b, weight = noise(4, 5, 3), noise(4, 5, 3, seed=1), torch.tensor([0.1, 0.5, 0.7, 0.95], dtype=torch.float64)
    for i, found in enumerate(slerp(a, b, weight)):
        theta = math.acos(float((a[i] * b[i]).sum() / a[i].norm() / b[i].norm()))
        of_a, of_b = math.sin((1 - weight[i]) * theta) / math.sin(theta), math.sin(weight[i] * theta) / math.sin(theta)
        torch.testing.assert_close(found, of_a * a[i] + of_b * b[i])


def test_slerp_keeps_the_norm_and_gives_its_ends_bit_for_bit() -> None:
    a, b = noise(1, 6, 4).float(), noise(1, 6, 4, seed=1).float()
    b = b / b.norm() * a.norm()
    found = slerp(a, b, torch.linspace(0, 1, 9))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.flatten(1).norm(dim=1), a.norm().expand(9))
    assert torch.equal(found[:1], a)
    assert torch.equal(found[-1:], b)
    step = (found[1:] - found[:-1]).flatten(1).norm(dim=1)
    torch.testing.assert_close(step, step[:1].expand(8))  # along the arc at one speed


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, 1 + 1e-9])
def test_slerp_of_parallel_and_opposite_vectors_is_the_line(factor: float) -> None:
    a = noise(1, 3)
    torch.testing.assert_close(slerp(a, factor * a, torch.tensor([0.25]))[0], (0.75 + 0.25 * factor) * a[0])
    assert slerp(0 * a, a, torch.tensor([0.5])).isfinite().all()


def jumping(schedule: Schedule) -> Model:
    """Another eps wherever a cloud's mean is above 0: no x_t leads to some of the x_s."""
    smooth = curved(schedule)

    def eps(x: Tensor, t: Tensor) -> Tensor:
        above = (x.flatten(1).mean(1) > 0).reshape(-1, *[1] * (x.ndim - 1))
        return smooth(x, t) + 0.3 * above

    return eps


@pytest.mark.parametrize(
    ("kind", "spacing", "clip"),
    [("linear", "uniform", 4.0), ("warmup_constant", "quadratic", 4.0), ("cosine", "uniform", None)],
)
def test_ddim_run_backwards_leads_back(kind: str, spacing: str, clip: float | None) -> None:
    schedule = Schedule(kind, 200)  # type: ignore[arg-type]
    x_0, options = 0.3 + 0.7 * noise(3, 5), {"steps": 20, "spacing": spacing, "clip": clip}
    for model, iterations in ((exact(schedule, 0.3, 0.7), 12), (curved(schedule), 30)):
        found = ddim_inverse(model, x_0, schedule, iterations=iterations, **options)  # type: ignore[arg-type]
        assert found.noise.dtype == torch.float64
        torch.testing.assert_close(ddim(model, found.noise, schedule, KEY, **options), x_0, rtol=1e-7, atol=1e-7)  # type: ignore[arg-type]


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("network", [curved, jumping])
def test_residuals_lead_back_bit_for_bit(network: Callable[[Schedule], Model], iterations: int) -> None:
    schedule, x_0 = Schedule("cosine", 200), noise(6, 5, 3).float()
    model = network(schedule)
    found = ddim_inverse(model, x_0, schedule, steps=20, iterations=iterations)
    assert found.residuals is not None and found.residuals.shape == (20, 6, 5, 3)
    assert torch.equal(ddim(model, found.noise, schedule, KEY, steps=20, residuals=found.residuals), x_0)
    without = ddim(model, found.noise, schedule, KEY, steps=20)
    assert (without - x_0).abs().max() > 0.003


def test_between_two_trajectories_lie_their_ends() -> None:
    one, other = (Trajectory(noise(1, 5, seed=i), noise(4, 1, 5, seed=i + 2)) for i in (0, 1))
    weight = torch.tensor([0.0, 0.25, 1.0])
    way = one.towards(other, weight)
    assert torch.equal(way.noise, slerp(one.noise, other.noise, weight))
    assert way.residuals is not None and one.residuals is not None and other.residuals is not None
    torch.testing.assert_close(way.residuals[:, :1], one.residuals, rtol=0, atol=0)
    torch.testing.assert_close(way.residuals[:, 1:2], 0.75 * one.residuals + 0.25 * other.residuals)
    torch.testing.assert_close(way.residuals[:, 2:], other.residuals, rtol=0, atol=0)
    bare = Trajectory(other.noise)  # as of a seed, where nothing is missed
    half = torch.tensor([0.5])
    for a, b in ((one, bare), (bare, one)):
        found = a.towards(b, half).residuals
        assert found is not None
        torch.testing.assert_close(found, 0.5 * one.residuals)
    assert bare.towards(bare, half).residuals is None


def test_each_iteration_leads_nearer_and_two_suffice_for_standard_normal_data() -> None:
    schedule = Schedule("cosine", 200)
    x_0 = noise(3, 5)

    def missing(model: Model, iterations: int) -> float:
        residuals = ddim_inverse(model, x_0, schedule, steps=20, iterations=iterations).residuals
        assert residuals is not None
        return float(residuals.abs().max())

    assert missing(exact(schedule, 0.0, 1.0), 2) < 1e-12
    errors = [missing(curved(schedule), n) for n in (1, 2, 3, 5, 8)]
    assert all(after < 0.6 * before for before, after in zip(errors, errors[1:], strict=False))


def test_a_network_too_steep_for_whole_steps_is_inverted_by_halves() -> None:
    schedule = Schedule("cosine", 200)
    x_0 = 0.5 * noise(6, 5)

    def steep(x: Tensor, t: Tensor) -> Tensor:
        return exact(schedule, 0.0, 1.0)(x, t) - torch.tanh(40 * x) * (t < 100)[:, None]

    x_T = ddim_inverse(steep, x_0, schedule, steps=20, iterations=80).noise
    torch.testing.assert_close(ddim(steep, x_T, schedule, KEY, steps=20), x_0, rtol=1e-5, atol=1e-5)


def test_ddim_inverse_reports_the_times_that_it_reaches() -> None:
    schedule = Schedule("linear", 50)
    seen: list[tuple[int, int]] = []
    x_0, calls = noise(2, 3), 0

    def model(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return exact(schedule, 0.0, 1.0)(x, t)

    found = ddim_inverse(model, x_0, schedule, steps=5, iterations=2, callback=lambda i, t, x: seen.append((i, t)))
    assert seen == list(enumerate(timesteps(50, 5).tolist()[::-1], 1))
    assert calls == 10
    assert not torch.equal(found.noise, x_0)
    with pytest.raises(ValueError, match=r"iterations: expected at least 1, got 0"):
        ddim_inverse(model, x_0, schedule, iterations=0)
    with pytest.raises(ValueError, match=r"residuals: expected shape \(4, 2, 3\), got \(5, 2, 3\)"):
        ddim(model, found.noise, schedule, KEY, steps=4, residuals=found.residuals)


def test_the_probability_flow_leads_there_and_back() -> None:
    schedule = Schedule("linear", 1000)
    x_0 = 0.3 + 0.7 * noise(3, 5)

    def eps(x: Tensor, t: Tensor) -> Tensor:
        s = t.double().reshape(-1, 1) / 1000
        abar = (-(0.1 * s + 0.5 * 19.9 * s * s)).exp()
        return (1 - abar).sqrt() * (x - abar.sqrt() * 0.3) / (abar * 0.49 + 1 - abar)

    x_T = probability_flow(eps, x_0, schedule, tolerance=1e-9, inverse=True)
    # The flow maps one Gaussian to the other: what lies so many deviations from the mean stays there.
    torch.testing.assert_close(x_T, (x_0 - 0.3) / 0.7, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(probability_flow(eps, x_T, schedule, tolerance=1e-9), x_0, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_diffuse_denoise_goes_part_of_the_way(kind: str) -> None:
    """Where data are standard normal, denoising in fine steps leaves a noisy sample as it is."""
    schedule = Schedule(kind, 400)  # type: ignore[arg-type]
    x_0, times = noise(2, 500), []
    gaussian = exact(schedule, 0.0, 1.0)

    def model(x: Tensor, t: Tensor) -> Tensor:
        times.append(int(t[0]))
        return gaussian(x, t)

    found = diffuse_denoise(model, x_0, schedule, KEY, strength=0.25, steps=400)
    assert times == list(range(100, 0, -1))
    t = torch.tensor([100, 100])
    expected = q_sample(x_0, schedule.alpha(t), schedule.sigma(t), KEY)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert torch.equal(found, diffuse_denoise(model, x_0, schedule, KEY, strength=0.25, steps=400))
    assert not torch.equal(found, diffuse_denoise(model, x_0, schedule, KEY, strength=0.25, steps=400, eta=1.0))


@pytest.mark.parametrize(("strength", "steps", "taken"), [(0.2, 50, 10), (0.2, 2, 1), (1.0, 7, 7), (0.001, 50, 1)])
def test_strength_is_the_share_of_the_steps_too(strength: float, steps: int, taken: int) -> None:
    schedule = Schedule("cosine", 1000)
    times: list[int] = []
    options = {"strength": strength, "steps": steps}
    diffuse_denoise(lambda x, t: times.append(int(t[0])) or x, noise(1, 4), schedule, KEY, **options)  # type: ignore[arg-type, func-returns-value]
    assert len(times) == taken
    assert times[0] == round(1000 * strength)
    assert taken == 1 or times[-1] == 1


def test_strength_0_changes_nothing_and_wrong_options_are_named() -> None:
    schedule, x_0 = Schedule("cosine", 100), noise(2, 3)

    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("called")

    assert torch.equal(diffuse_denoise(never, x_0, schedule, KEY, strength=0.0), x_0)
    assert torch.equal(diffuse_denoise(never, x_0, schedule, KEY, strength=0.004), x_0)
    for option in ({"strength": 1.5}, {"strength": math.nan}, {"strength": 0.5, "eta": 2.0}):
        with pytest.raises(ValueError, match=rf"{list(option)[-1]}: expected a number in \[0, 1\]"):
            diffuse_denoise(never, x_0, schedule, KEY, **option)
