"""Diffusion maths: against diffusers, against Gaussians done by hand, and against its own definitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from lion_triton import diffusion
from lion_triton.diffusion import (
    Schedule,
    ddim,
    ddpm,
    diffusion_loss,
    probability_flow,
    timesteps,
    to_eps,
    variational_bound,
)
from lion_triton.kernels.noise import normal_noise

KINDS = ["linear", "warmup_constant", "cosine"]
VARIANCES = ["fixed_large", "fixed_small"]
KEY = torch.tensor([7, 100])
SHAPE = (3, 5, 4)


def betas64(kind: str, T: int) -> Tensor:
    """Textbook betas, written independently."""
    if kind == "cosine":
        f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
        return torch.tensor([min(1 - f[t] / f[t - 1], 0.999) for t in range(1, T + 1)], dtype=torch.float64)
    warmup = T if kind == "linear" else int(0.1 * T)
    ramp = [1e-4 + (0.02 - 1e-4) * i / max(warmup - 1, 1) for i in range(warmup)]
    return torch.tensor(ramp + [0.02] * (T - warmup), dtype=torch.float64)


def abar64(kind: str, T: int) -> Tensor:
    return (1 - betas64(kind, T)).cumprod(0)


def column(scalars: Tensor) -> Tensor:
    return scalars[:, None, None]


def key_plus(i: int) -> Tensor:
    return KEY + torch.tensor([0, i])


def noise64(i: int) -> Tensor:
    return normal_noise(SHAPE, key_plus(i)).double()


def random64(seed: int) -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def toy_model(x: Tensor, t: Tensor) -> Tensor:
    """Nonlinear in x and t; double precision if x is."""
    return torch.sin(2 * x) * column(0.5 + torch.sin(t.to(x.dtype))) + 0.3 * torch.cos(x)


def gaussian_model(schedule: Schedule, mean: float, std: float) -> Callable[[Tensor, Tensor], Tensor]:
    """E[eps | x_t] for x_0 ~ N(mean, std^2)."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (a.reshape(-1, *[1] * (x.ndim - 1)) for a in (schedule.alpha(t), schedule.sigma(t)))
        return sigma * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    return model


def diffusers_scheduler(cls: type, kind: str, T: int, **options: Any) -> Any:
    """A diffusers scheduler whose abar are ours in float64, so that trajectories can be compared closely."""
    scheduler = cls(num_train_timesteps=T, **{"clip_sample": False, **options})
    scheduler.alphas_cumprod = abar64(kind, T)
    return scheduler


# Schedule


@pytest.mark.parametrize("T", [1, 7, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_schedule_buffers_are_float64_values_rounded_once(kind: str, T: int) -> None:
    schedule, beta, abar = Schedule(kind, T), betas64(kind, T), abar64(kind, T)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    t = torch.arange(1, T + 1)
    for got, expected in (
        (schedule.betas, beta),
        (schedule.alphas_cumprod, abar),
        (schedule.posterior_variance, (1 - previous) / (1 - abar) * beta),
        (schedule.alpha(t), abar.sqrt()),
        (schedule.sigma(t), (1 - abar).sqrt()),
    ):
        assert got.dtype == torch.float32
        assert got.shape == (T,)
        torch.testing.assert_close(got.double(), expected, rtol=6.1e-8, atol=0)
    assert schedule.posterior_variance[0] == 0
    assert not schedule.state_dict()


@pytest.mark.parametrize(("kind", "name"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_schedule_matches_diffusers(kind: str, name: str) -> None:
    schedule, theirs = Schedule(kind), DDPMScheduler(beta_schedule=name)
    torch.testing.assert_close(schedule.betas, theirs.betas, rtol=1e-6, atol=0)
    # Theirs is a float32 product of 1000 factors.
    torch.testing.assert_close(schedule.alphas_cumprod, theirs.alphas_cumprod, rtol=3e-5, atol=0)


def test_schedule_arguments_move_the_betas() -> None:
    betas = Schedule("warmup_constant", 50, 0.01, 0.05).betas
    torch.testing.assert_close(betas[:5], torch.linspace(0.01, 0.05, 5))
    assert (betas[5:] == 0.05).all()


def test_zero_based_times_give_nan() -> None:
    schedule, t = Schedule(), torch.tensor([0, 1])
    for values in (schedule.alpha(t), schedule.sigma(t), schedule.weight(t, "variational")):
        assert values.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Schedule("cubic"), "kind: expected one of linear, warmup_constant, cosine, got 'cubic'"),
        (lambda: Schedule(num_train_timesteps=0), "num_train_timesteps: expected an integer >= 1, got 0"),
        (
            lambda: Schedule(beta_end=0.9),
            "beta_end: expected betas that leave some of x_0 at T = 1000",
        ),
        (lambda: Schedule(beta_start=0.0), r"beta_start: expected a number in \(0, 1\), got 0.0"),
        (lambda: Schedule(beta_end=1.0), r"beta_end: expected a number in \(0, 1\), got 1.0"),
        (
            lambda: Schedule().weight(torch.tensor([1]), "simple"),
            "kind: expected one of uniform, variational",
        ),
        (
            lambda: Schedule().weight(torch.tensor([1]), variance="learned"),
            "variance: expected one of fixed_",
        ),
        (lambda: timesteps(10, 0), r"steps: expected 1 to 10 \(the training steps\), got 0"),
        (lambda: timesteps(10, 11), r"steps: expected 1 to 10 \(the training steps\), got 11"),
        (lambda: timesteps(10, 5, "cubic"), "spacing: expected one of uniform, quadratic, trailing, got 'cubic'"),
        (lambda: to_eps(KEY, KEY, KEY, Schedule(), "x_0"), "kind: expected one of eps, v, got 'x_0'"),
        (
            lambda: ddim(toy_model, random64(0), Schedule(), KEY, eta=1.5),
            r"eta: expected a number in \[0, 1\]",
        ),
        (lambda: ddpm(toy_model, random64(0), Schedule(), KEY, clip=0.0), "clip: expected a positive number"),
        (lambda: ddpm(toy_model, random64(0), Schedule(), KEY, variance="beta"), "variance: expected one of"),
        (
            lambda: diffusion_loss(toy_model, random64(0), torch.ones(3).long(), Schedule(), KEY, "x_0"),
            "kind: expected one of eps, v, got 'x_0'",
        ),
        (
            lambda: probability_flow(toy_model, random64(0), Schedule("cosine")),
            "schedule: expected kind linear, got cosine",
        ),
        (
            lambda: variational_bound(toy_model, random64(0), Schedule(), KEY, timesteps=torch.tensor([1])),
            r"timesteps: expected one or more times in 2\.\.1000, got \[1\]",
        ),
    ],
)
def test_errors_are_one_line(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


# Posterior, conversions, weights


def test_posterior_is_bayes_rule_integrated_numerically() -> None:
    schedule = Schedule("cosine", 20)
    beta, abar = betas64("cosine", 20), abar64("cosine", 20)
    x_0, x_t = 0.8, -0.3
    grid = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    for t in (2, 7, 20):
        prior = Normal(abar[t - 2].sqrt() * x_0, (1 - abar[t - 2]).sqrt()).log_prob(grid)
        likelihood = Normal((1 - beta[t - 1]).sqrt() * grid, beta[t - 1].sqrt()).log_prob(torch.tensor(x_t))
        p = (prior + likelihood).softmax(0)
        mean = (p * grid).sum()
        mean_got, variance_got = schedule.posterior(torch.tensor([x_0]), torch.tensor([x_t]), torch.tensor([t]))
        torch.testing.assert_close(mean_got.double(), mean[None], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(variance_got.double(), (p * (grid - mean) ** 2).sum()[None], rtol=1e-6, atol=0)


def test_posterior_at_t_1_is_x_0() -> None:
    x_0, t = random64(0), torch.ones(3, dtype=torch.int64)
    mean, variance = Schedule().posterior(x_0, random64(1), t)
    torch.testing.assert_close(mean, x_0, rtol=0, atol=0)
    assert (variance == 0).all()


def test_v_prediction_matches_diffusers() -> None:
    schedule, t = Schedule(), torch.tensor([1, 500, 1000])
    x_0, eps = random64(0), random64(1)
    theirs = diffusers_scheduler(DDPMScheduler, "linear", 1000)
    v, x_t = theirs.get_velocity(x_0, eps, t - 1), theirs.add_noise(x_0, eps, t - 1)
    torch.testing.assert_close(to_eps(v, x_t, t, schedule, "v"), eps, rtol=0, atol=1e-6)
    alpha = column(schedule.alpha(t))  # dividing by it blows up the rounding of sigma
    torch.testing.assert_close(alpha * schedule.predict_x0(x_t, eps, t), alpha * x_0, rtol=0, atol=1e-6)
    assert to_eps(v.bfloat16(), x_t.bfloat16(), t, schedule, "v").dtype == torch.float32


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_variational_weight_is_the_kl_mean_term(kind: str, variance: str) -> None:
    """w(t) ||eps - eps'||^2 = ||mu~(x_0) - mu~(x_0')||^2 / (2 rho^2), with the x_0 that each eps implies."""
    T = 12
    schedule, beta, abar = Schedule(kind, T), betas64(kind, T), abar64(kind, T)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    t = torch.arange(1, T + 1)
    rho2 = beta if variance == "fixed_large" else (1 - previous) / (1 - abar) * beta
    rho2[0] = rho2[0] if variance == "fixed_large" else rho2[1]
    generator = torch.Generator().manual_seed(0)
    x_t, eps, other = torch.randn(3, T, 6, dtype=torch.float64, generator=generator)
    x_0, x_0_other = ((x_t - (1 - abar).sqrt()[:, None] * e) / abar.sqrt()[:, None] for e in (eps, other))
    means = (previous.sqrt() * beta / (1 - abar))[:, None] * (x_0 - x_0_other)
    expected = (means**2).sum(1) / (2 * rho2)
    got = schedule.weight(t, "variational", variance).double() * ((eps - other) ** 2).sum(1)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert (schedule.weight(t) == 1).all()


# Loss


@pytest.mark.parametrize("weight_kind", ["uniform", "variational"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("given", ["data", "posterior"])
def test_loss_and_its_gradient(given: str, prediction: str, weight_kind: str) -> None:
    """Against the definition; the uniform loss of a v-network is the mean squared error of v."""
    schedule, t = Schedule(), torch.tensor([3, 400, 1000])
    abar, noise = abar64("linear", 1000)[t - 1], noise64(0)
    alpha, sigma = column(abar.sqrt()), column((1 - abar).sqrt())
    x_0, mu, log_sigma = random64(0), random64(1), random64(2)
    if given == "posterior":
        # The op's own latent: at alpha = 1, sigma = 0 it returns it unchanged.
        one, zero = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        x_0 = diffusion.posterior_q_sample(mu, log_sigma, one, zero, KEY)
        latent_noise = (x_0 - mu) / log_sigma.exp()
        assert abs((latent_noise * noise).mean()) < 0.5
        assert not torch.allclose(latent_noise, noise)
    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    got = diffusion_loss(
        lambda x, t: scale * toy_model(x, t),
        x_0 if given == "data" else (mu, log_sigma),
        t,
        schedule,
        KEY,
        prediction,
        weight_kind,
    )
    x_t = alpha * x_0 + sigma * noise
    output = scale * toy_model(x_t, t)
    if prediction == "v" and weight_kind == "uniform":
        error, weight = alpha * noise - sigma * x_0 - output, torch.ones(3, dtype=torch.float64)
    else:
        error = noise - (output if prediction == "eps" else alpha * output + sigma * x_t)
        beta = betas64("linear", 1000)[t - 1]
        weight = torch.ones(3).double() if weight_kind == "uniform" else beta / (2 * (1 - beta) * (1 - abar))
    expected = weight * (error**2).flatten(1).mean(1)
    # A v error at t = T is a 1 / alpha_T = 158 times larger view of an eps error.
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=0)
    cotangent = torch.tensor([0.3, -1.1, 0.7], dtype=torch.float64)
    (grad,) = torch.autograd.grad(got, scale, cotangent)
    (grad_expected,) = torch.autograd.grad(expected, scale, cotangent)
    torch.testing.assert_close(grad, grad_expected, rtol=2e-5, atol=0)


# Times


@settings(deadline=None)  # a loaded machine is no failure
@given(st.data(), st.integers(1, 2000), st.sampled_from(["uniform", "quadratic"]))
def test_timesteps_visit_both_ends_and_decrease(data: st.DataObject, T: int, spacing: str) -> None:
    steps = data.draw(st.integers(1, T))
    t = timesteps(T, steps, spacing)
    assert t.dtype == torch.int64
    assert t.shape == (steps,)
    assert t[0] == T
    assert t[-1] == 1 or steps == 1
    assert (t.diff() < 0).all()
    if spacing == "uniform" and steps > 1:
        assert t.diff().max() - t.diff().min() <= 1
    if spacing == "quadratic":
        assert (t <= timesteps(T, steps)).all()


def test_timesteps_by_hand() -> None:
    assert timesteps(1000, 5).tolist() == [1000, 750, 501, 251, 1]  # 1 + 999 i/4, halves up
    assert timesteps(101, 6, "quadratic").tolist() == [101, 65, 37, 17, 5, 1]  # 1 + 100 (i/5)^2
    assert timesteps(20, 10, "quadratic").tolist() == [20, 16, 12, 9, 7, 5, 4, 3, 2, 1]
    assert timesteps(4, 4, "quadratic").tolist() == [4, 3, 2, 1]


# Samplers against diffusers


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(("kind", "T", "steps"), [("linear", 1000, 7), ("cosine", 20, None)])
def test_ddpm_matches_diffusers(
    kind: str, T: int, steps: int | None, variance: str, clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = diffusers_scheduler(
        DDPMScheduler,
        kind,
        T,
        variance_type=variance,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1,
    )
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    times = timesteps(T, steps or T).tolist()
    scheduler.set_timesteps(timesteps=[t - 1 for t in times])
    trajectory: list[Tensor] = []
    x = random64(3)
    ddpm(
        toy_model, x, Schedule(kind, T), KEY, steps=steps, variance=variance, clip=clip,
        callback=lambda i, t, x: trajectory.append(x),
    )  # fmt: skip
    assert len(trajectory) == len(times)
    for i, t in enumerate(times):
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, i=i, **__: noise64(i + 1))
        x = scheduler.step(toy_model(x, torch.full((3,), t)), t - 1, x).prev_sample
        torch.testing.assert_close(trajectory[i], x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_matches_diffusers(eta: float, spacing: str, clip: float | None) -> None:
    T, steps = 1000, 6
    scheduler = diffusers_scheduler(
        DDIMScheduler, "linear", T, clip_sample=clip is not None, clip_sample_range=clip or 1
    )
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    times = timesteps(T, steps, spacing).tolist()
    trajectory: list[Tensor] = []
    x = random64(4)
    ddim(
        toy_model, x, Schedule(), KEY, steps=steps, eta=eta, spacing=spacing, clip=clip,
        callback=lambda i, t, x: trajectory.append(x),
    )  # fmt: skip
    for i, (t, s) in enumerate(zip(times, [*times[1:], 0], strict=True)):
        scheduler.num_inference_steps = Fraction(T, t - s)  # it steps back by T // num_inference_steps
        eps = toy_model(x, torch.full((3,), t))
        x = scheduler.step(
            eps, t - 1, x, eta=eta, variance_noise=noise64(i + 1), use_clipped_model_output=clip is not None
        ).prev_sample
        torch.testing.assert_close(trajectory[i], x, rtol=1e-9, atol=1e-9)


def test_ddim_of_a_v_network_matches_diffusers() -> None:
    T, schedule = 10, Schedule("cosine", 10)
    scheduler = diffusers_scheduler(DDIMScheduler, "cosine", T, prediction_type="v_prediction")
    scheduler.set_timesteps(T)
    x = random64(5)
    got = ddim(lambda x, t: to_eps(toy_model(x, t), x, t, schedule, "v"), x, schedule, KEY, steps=T)
    for t in range(T, 0, -1):
        x = scheduler.step(toy_model(x, torch.full((3,), t)), t - 1, x).prev_sample
    torch.testing.assert_close(got, x, rtol=0, atol=1e-5)


# Samplers against their own definitions


def samplers() -> list[Any]:
    return [
        pytest.param(lambda *a, **k: ddpm(*a, steps=9, **k), id="ddpm-large"),
        pytest.param(lambda *a, **k: ddpm(*a, steps=9, variance="fixed_small", **k), id="ddpm-small"),
        pytest.param(lambda *a, **k: ddim(*a, steps=9, eta=1.0, **k), id="ddim-1"),
        pytest.param(lambda *a, **k: ddim(*a, steps=9, eta=0.4, spacing="quadratic", **k), id="ddim-0.4"),
    ]


@pytest.mark.parametrize("sample", samplers())
def test_steps_keys_and_noise_free_end(sample: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    step, rhos, keys = diffusion.ancestral_step, [], []

    def spy(x: Tensor, eps: Tensor, coef_x: Tensor, coef_eps: Tensor, rho: Tensor, key: Tensor) -> Tensor:
        rhos.append(rho)
        keys.append(key.tolist())
        return step(x, eps, coef_x, coef_eps, rho, key)

    monkeypatch.setattr(diffusion, "ancestral_step", spy)
    schedule, seen = Schedule(), []
    out = sample(toy_model, random64(6), schedule, KEY, callback=lambda i, t, x: seen.append((i, t, x)))
    assert keys == [[7, 100 + i, 0] for i in range(1, 10)]  # never the key itself, which may have made x_T
    assert [i for i, _, _ in seen] == list(range(1, 10))
    assert (seen[0][1], seen[-1][1]) == (1000, 1)
    assert all((rho > 0).all() for rho in rhos[:-1])
    assert (rhos[-1] == 0).all()
    x_1 = seen[-2][2]
    ones = torch.ones(3, dtype=torch.int64)
    torch.testing.assert_close(out, schedule.predict_x0(x_1, toy_model(x_1, ones), ones), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sample", samplers())
def test_samples_are_a_function_of_the_key(sample: Callable[..., Tensor]) -> None:
    x_T = random64(7).float().requires_grad_()
    first = sample(toy_model, x_T, Schedule(), KEY)
    assert first.dtype == torch.float32
    assert not first.requires_grad
    assert torch.equal(first, sample(toy_model, x_T, Schedule(), KEY))
    for other in (torch.tensor([8, 100]), torch.tensor([7, 101])):
        assert not torch.allclose(first, sample(toy_model, x_T, Schedule(), other))
    assert torch.allclose(first, sample(lambda x, t: toy_model(x, t).double(), x_T, Schedule(), KEY))


def test_deterministic_ddim_ignores_the_key() -> None:
    x_T = random64(8)
    assert torch.equal(ddim(toy_model, x_T, Schedule(), KEY), ddim(toy_model, x_T, Schedule(), KEY + 5))


def test_ddim_with_eta_1_has_the_posterior_variance_and_is_ddpm(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, x_T = Schedule("linear", 40), random64(9)
    reference = ddpm(toy_model, x_T, schedule, KEY, variance="fixed_small")
    step, rho2 = diffusion.ancestral_step, []
    monkeypatch.setattr(diffusion, "ancestral_step", lambda *args: (rho2.append(args[4][0] ** 2), step(*args))[1])
    torch.testing.assert_close(ddim(toy_model, x_T, schedule, KEY, steps=40, eta=1.0), reference)
    torch.testing.assert_close(torch.stack(rho2).float(), schedule.posterior_variance.flip(0), rtol=2e-7, atol=0)


def test_clip_bounds_the_sample() -> None:
    out = ddpm(lambda x, t: torch.zeros_like(x), 10 * random64(10), Schedule(), KEY, steps=5, clip=0.5)
    torch.testing.assert_close(out.abs().max(), torch.tensor(0.5, dtype=torch.float64))


@pytest.mark.parametrize(("T", "steps"), [(1, 1), (50, 1)])
def test_one_step_goes_straight_to_x_0(T: int, steps: int) -> None:
    schedule, x_T, t = Schedule("linear", T), random64(13), torch.full((3,), T)
    expected = schedule.predict_x0(x_T, toy_model(x_T, t), t)
    for x in (
        ddpm(toy_model, x_T, schedule, KEY, steps=steps),
        ddim(toy_model, x_T, schedule, KEY, steps=steps, eta=1.0),
    ):
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)
    if T == 1:
        bound = variational_bound(toy_model, x_T, schedule, KEY)
        assert (bound.diffusion == 0).all()
        assert bound.total.isfinite().all()


class _NoHostRead(TorchDispatchMode):
    """Fails on any op that moves a tensor's value to Python."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func)
        assert "nonzero" not in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clip", [None, 1.0])
def test_sampling_never_reads_a_tensor_on_the_host(clip: float | None) -> None:
    schedule = Schedule("linear", 6)  # whose own tables are looked at when it is made, on the host
    with _NoHostRead():
        ddpm(toy_model, random64(11), schedule, KEY, clip=clip)
        ddim(toy_model, random64(11), schedule, KEY, steps=3, eta=0.5, clip=clip)
        with pytest.raises(AssertionError):
            KEY[0].item()


# Gaussian data, where everything is known


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_ddim_transports_the_gaussian(kind: str) -> None:
    """The map is x_T -> mean + slope (x_T - alpha_T mean); the slope misses std by O(1 / steps)."""
    mean, std, schedule = 0.7, 0.4, Schedule(kind)
    model = gaussian_model(schedule, mean, std)
    points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    alpha_T, error = schedule.alpha(torch.tensor([1000])).item(), {}
    for steps in (500, 1000):
        at_0, at_1 = ddim(model, points, schedule, KEY, steps=steps).flatten().tolist()
        assert at_0 == pytest.approx(mean - (at_1 - at_0) * alpha_T * mean, abs=1e-6)
        error[steps] = (at_1 - at_0) / std - 1
    assert 1.9 < error[500] / error[1000] < 2.1
    assert abs(2 * error[1000] - error[500]) < 5e-4  # extrapolated to infinitely many steps


@pytest.mark.parametrize("sampler", ["ddpm-large", "ddpm-small", "ddpm-200", "ddim-1"])
def test_stochastic_sampling_recovers_the_gaussian(sampler: str) -> None:
    mean, std, schedule, n = 0.7, 0.4, Schedule(), 8192
    model, x_T = gaussian_model(schedule, mean, std), normal_noise((8, n // 8), KEY)
    x = {
        "ddpm-large": lambda: ddpm(model, x_T, schedule, KEY),
        "ddpm-small": lambda: ddpm(model, x_T, schedule, KEY, variance="fixed_small"),
        "ddpm-200": lambda: ddpm(model, x_T, schedule, KEY, steps=200),
        "ddim-1": lambda: ddim(model, x_T, schedule, KEY, steps=500, eta=1.0),
    }[sampler]()
    error = std / math.sqrt(n)  # standard error of the mean; that of std is smaller by sqrt(2)
    # The chain's own bias: q(x_T) has another mean, and a step's Gaussian is exact only in the limit.
    assert abs(x.mean().item() - mean) < 4 * error + 0.002
    assert abs(x.std().item() - std) < 4 * error / math.sqrt(2) + 0.01 * std


def test_probability_flow_is_the_gaussian_transport() -> None:
    """With eps linear in x the ODE keeps (x - alpha mean) / sqrt(alpha^2 std^2 + sigma^2) constant."""
    mean, std, times = 0.7, 0.4, []

    def alpha_and_variance(s: Tensor) -> tuple[Tensor, Tensor]:
        abar = torch.exp(-(0.1 * s + 9.95 * s * s))
        return abar.sqrt(), abar * std**2 + 1 - abar

    def model(x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.float32
        assert t.shape == (4,)
        times.append(t[0].item())
        s = t.double() / 1000
        alpha, variance = alpha_and_variance(s)
        return ((1 - alpha**2).sqrt() / variance)[:, None] * (x - alpha[:, None] * mean)

    x_T = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3)
    got = probability_flow(model, x_T, Schedule())
    assert got.dtype == torch.float64
    (alpha_1, variance_1), (alpha_0, variance_0) = (
        alpha_and_variance(torch.tensor(s, dtype=torch.float64)) for s in (1.0, 1e-5)
    )
    expected = alpha_0 * mean + (variance_0 / variance_1).sqrt() * (x_T - alpha_1 * mean)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert max(times) == 1000
    assert min(times) == pytest.approx(0.01)
    assert probability_flow(lambda x, t: model(x.double(), t), x_T.float(), Schedule()).dtype == torch.float32


# Variational bound


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_bound_is_the_sum_of_its_divergences(kind: str, variance: str) -> None:
    """Each part from means and variances of the Gaussians themselves, the same noise injected."""
    T, x_0 = 5, random64(12)
    beta, abar = betas64(kind, T), abar64(kind, T)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    posterior_variance = (1 - previous) / (1 - abar) * beta
    rho = (beta if variance == "fixed_large" else posterior_variance).sqrt()
    rho[0] = rho[0] if variance == "fixed_large" else rho[1]
    q_T = Normal(abar[-1].sqrt() * x_0, (1 - abar[-1]).sqrt())
    terms = []
    for i in range(T):
        noise = noise64(i + 1)
        x_t = abar[i].sqrt() * x_0 + (1 - abar[i]).sqrt() * noise
        eps = toy_model(x_t, torch.full((3,), i + 1))
        p = Normal((x_t - beta[i] / (1 - abar[i]).sqrt() * eps) / (1 - beta[i]).sqrt(), rho[i])
        if i == 0:
            terms.append(-p.log_prob(x_0))
            continue
        mean = (previous[i].sqrt() * beta[i] * x_0 + (1 - beta[i]).sqrt() * (1 - previous[i]) * x_t) / (1 - abar[i])
        terms.append(kl_divergence(Normal(mean, posterior_variance[i].sqrt()), p))
    terms = [term.flatten(1).sum(1) for term in terms]

    schedule = Schedule(kind, T)
    bound = variational_bound(toy_model, x_0, schedule, KEY, variance=variance)
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(bound.reconstruction, terms[0], **close)
    torch.testing.assert_close(bound.diffusion, sum(terms[1:]), **close)
    torch.testing.assert_close(bound.prior, kl_divergence(q_T, Normal(0.0, 1.0)).flatten(1).sum(1).double(), **close)
    torch.testing.assert_close(bound.total, bound.prior + bound.diffusion + bound.reconstruction)

    # A uniformly drawn time gives the exact sum on average.
    estimates = [
        variational_bound(toy_model, x_0, schedule, KEY, variance=variance, timesteps=torch.tensor([t]))
        for t in range(2, T + 1)
    ]
    torch.testing.assert_close(torch.stack([e.diffusion for e in estimates]).mean(0), bound.diffusion)
    torch.testing.assert_close(estimates[0].reconstruction, bound.reconstruction)
    pair = variational_bound(toy_model, x_0, schedule, KEY, variance=variance, timesteps=torch.tensor([2, 5]))
    torch.testing.assert_close(pair.diffusion, (estimates[0].diffusion + estimates[3].diffusion) / 2)


def expected_bound(kind: str, variance: str, mean: float, std: float) -> float:
    """The bound in nats per element, averaged over x_0 and noise, of the ideal network on N(mean, std^2)."""
    beta, abar = betas64(kind, 1000), abar64(kind, 1000)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    tilde = (1 - previous) / (1 - abar) * beta
    rho2 = beta.clone() if variance == "fixed_large" else tilde.clone()
    rho2[0] = rho2[0] if variance == "fixed_large" else rho2[1]
    eps_variance = abar * std**2 / (abar * std**2 + 1 - abar)  # of eps given x_t
    means = beta**2 / (2 * rho2 * (1 - beta) * (1 - abar)) * eps_variance
    ratio = (tilde / rho2)[1:]
    mismatch = (ratio - 1 - ratio.log()).sum() / 2
    prior = (abar[-1] * (mean**2 + std**2 - 1) - torch.log1p(-abar[-1])) / 2
    return (means.sum() + mismatch + prior + torch.log(2 * math.pi * rho2[0]) / 2).item()


@pytest.mark.parametrize("kind", KINDS)
def test_bound_is_tight_where_it_must_be(kind: str) -> None:
    """Unit variance and rho^2 = beta make every reverse step exact: only the mean of q(x_T) costs."""
    entropy = 0.5 * math.log(2 * math.pi * math.e)
    lost = 0.7**2 * abar64(kind, 1000)[-1].item() / 2
    assert expected_bound(kind, "fixed_large", 0.7, 1.0) == pytest.approx(entropy + lost, abs=1e-9)


@pytest.mark.parametrize(("variance", "std"), [("fixed_large", 1.0), ("fixed_large", 0.4), ("fixed_small", 0.4)])
def test_bound_exceeds_the_entropy_of_gaussian_data(variance: str, std: float) -> None:
    mean, schedule = 0.7, Schedule()
    expected = expected_bound("linear", variance, mean, std)
    entropy = 0.5 * math.log(2 * math.pi * math.e * std**2)
    gap = expected - entropy
    # "fixed_small" suits data of zero variance: its cost, mostly at the first steps, is known and not small.
    assert 0 < gap < (0.003 if variance == "fixed_large" else 0.6)
    x_0 = mean + std * normal_noise((256, 16), torch.tensor([1, 1]))
    bound = variational_bound(gaussian_model(schedule, mean, std), x_0, schedule, KEY, variance=variance)
    nats = bound.total.double().numpy() / 16
    assert bound.total.dtype == torch.float32
    error = float(np.std(nats) / math.sqrt(len(nats)))
    assert error < 0.03
    assert abs(float(np.mean(nats)) - expected) < 4 * error
