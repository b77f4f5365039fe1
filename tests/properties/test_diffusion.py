"""Schedules, conversions and samplers against plain float64 forms."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lion_triton import diffusion
from lion_triton.kernels import normal_noise
from lion_triton.kernels.noise import later_key
from tests.properties.strategies import Draw, agree, dtype_of, noise_key, one_of, property_of, size, spoiled, tensor

MODEST = ("normal", "grid", "coincident", "tiny")


def schedule_of(draw: Draw) -> diffusion.Schedule:
    kind, T = one_of(draw, "linear", "warmup_constant", "cosine"), one_of(draw, 1, 2, 10, 50, 1000)
    return diffusion.Schedule(kind, T, one_of(draw, 1e-6, 1e-4), one_of(draw, 0.02, 0.5) if T < 100 else 0.02)


def data_of(draw: Draw, *, clouds: int | None = None, dtype: torch.dtype | None = None, kinds: Any = MODEST) -> Tensor:
    shape = (size(draw, 0, 3) if clouds is None else clouds, size(draw, 1, 5), 3)
    return tensor(draw, *shape, dtype=dtype or dtype_of(draw), kinds=kinds)


def model(x: Tensor, t: Tensor) -> Tensor:
    """Tame, and different at every time."""
    return (x * (t.to(x.dtype) / 1000).cos()[:, None, None]).tanh()


@property_of(12)
def test_schedule(draw: Draw) -> str:
    """abar is the product of 1 - beta, and what follows from it; or the arguments are refused."""
    arguments = spoiled(draw, ["linear", size(draw, 1, 1000), 1e-4, one_of(draw, 1e-4, 0.02, 0.999)])

    def tables(*arguments: Any) -> Any:
        schedule = diffusion.Schedule(*arguments)
        return schedule.betas, schedule.alphas_cumprod, schedule.posterior_variance

    def plain(kind: str, T: Any, start: Any, end: Any) -> Any:
        if (
            kind != "linear"
            or not isinstance(T, int)
            or T < 1
            or not all(isinstance(v, (int, float)) and 0 < v < 1 for v in (start, end))
        ):
            raise ValueError("refused")
        betas = torch.linspace(start, end, T, dtype=torch.float64)
        abar = (1 - betas).cumprod(0)
        if abar[-1] < torch.finfo(torch.float32).tiny:
            raise ValueError("nothing is left")
        before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        return betas.float(), abar.float(), (betas * (1 - before) / (1 - abar)).float()

    return agree(tables, plain, arguments)


@property_of(8)
def test_predictions(draw: Draw) -> str:
    """x_t made of x_0 and eps gives both back, by eps and by v."""
    schedule = schedule_of(draw)
    near_one = ("normal", "grid", "coincident")  # of very different sizes, one is lost in the other
    x_0, T = data_of(draw, dtype=torch.float32, kinds=near_one), schedule.num_train_timesteps
    eps = tensor(draw, *x_0.shape, dtype=torch.float32, kinds=near_one)
    t = torch.tensor([size(draw, 1, T) for _ in x_0], dtype=torch.int64)

    def column(x: Tensor, like: Tensor) -> Tensor:
        return x.to(like.dtype)[:, None, None]

    def ours(x_0: Any, eps: Any) -> Any:
        alpha, sigma = column(schedule.alpha(t), x_0), column(schedule.sigma(t), x_0)
        x_t, v = alpha * x_0 + sigma * eps, alpha * eps - sigma * x_0
        back = diffusion.to_eps(v, x_t, t, schedule, "v")
        mean, variance = schedule.posterior(x_0, x_t, t)
        weights = [diffusion.loss_weight(t, schedule, p, k) for p in ("eps", "v") for k in ("uniform", "variational")]
        assert all(w.isfinite().all() and (w > 0).all() and w.dtype == torch.float32 for w in weights)
        assert variance.isfinite().all() and (variance >= 0).all()
        return back, (schedule.predict_x0(x_t, eps, t) - x_0) * alpha + x_0, mean

    def plain(x_0: Any, eps: Any) -> Any:
        log_t, log_s = schedule.log_abar[t], schedule.log_abar[t - 1]
        abar_t, abar_s = (column(log.exp(), x_0.double()) for log in (log_t, log_s))
        sigma2_t, sigma2_s = (column(-torch.expm1(log), x_0.double()) for log in (log_t, log_s))
        x_t = abar_t.sqrt() * x_0 + sigma2_t.sqrt() * eps
        beta = column(-torch.expm1(log_t - log_s), x_0.double())
        mean = (abar_s.sqrt() * beta * x_0 + (1 - beta).sqrt() * sigma2_s * x_t) / sigma2_t
        return eps * 1, x_0 * 1, mean.to(x_0.dtype)

    return agree(ours, plain, [x_0, eps], loose=30)


@property_of(6)
def test_timesteps(draw: Draw) -> str:
    """From T to 1, or as long a step from 0 as the others are, strictly falling; what cannot be is refused."""
    spacing = one_of(draw, "uniform", "quadratic", "trailing")
    arguments = spoiled(draw, [one_of(draw, 1, 2, 10, 1000), size(draw, 0, 1002), spacing])

    def plain(T: Any, steps: Any, spacing: Any) -> Tensor:
        times = diffusion.timesteps(T, steps, spacing)
        assert len(times) == steps and times.dtype == torch.int64 and times[0] == T
        last = T / steps if spacing == "trailing" else 1
        assert steps == 1 or (abs(times[-1] - last) <= 0.5 and (times.diff() < 0).all())
        return times

    return agree(diffusion.timesteps, plain, arguments)


def sampled(draw: Draw, name: str) -> str:
    """A sampler of our own schedule against its formula in float64, with the very noise."""
    schedule, key = schedule_of(draw), noise_key(draw)
    T = schedule.num_train_timesteps
    steps, clip = min(T, size(draw, 1, 6)), one_of(draw, None, 0.5)
    eta = 1.0 if name == "ddpm" else one_of(draw, 0.0, 0.5, 1.0)
    variance = one_of(draw, "fixed_large", "fixed_small") if name == "ddpm" else "fixed_small"

    def ours(x: Any) -> Any:
        x = x.detach()
        if name == "ddpm":
            return diffusion.ddpm(model, x, schedule, key, steps=steps, variance=variance, clip=clip)
        return diffusion.ddim(model, x, schedule, key, steps=steps, eta=eta, clip=clip)

    def plain(x: Any) -> Any:
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        x, ts = x.detach().to(dtype), diffusion.timesteps(T, steps).tolist()
        for i, (t, s) in enumerate(zip(ts, [*ts[1:], 0], strict=True)):
            log_t, log_s = schedule.log_abar[t], schedule.log_abar[s]
            abar_t, abar_s = log_t.exp().item(), log_s.exp().item()
            sigma2_t, sigma2_s, beta = (-torch.expm1(v).item() for v in (log_t, log_s, log_t - log_s))
            eps = model(x, torch.full((len(x),), t))
            x_0 = (x - math.sqrt(sigma2_t) * eps) / math.sqrt(abar_t)
            if clip is not None:
                x_0 = x_0.clamp(-clip, clip)
                eps = (x - math.sqrt(abar_t) * x_0) / math.sqrt(sigma2_t)
            beta_tilde = beta * sigma2_s / sigma2_t
            rho = math.sqrt(beta) if variance == "fixed_large" else eta * math.sqrt(beta_tilde)
            along = math.sqrt(max(sigma2_s - eta**2 * beta_tilde, 0))
            noise = normal_noise(x.shape, later_key(key, i + 1)) * (rho if s else 0)
            x = math.sqrt(abar_s) * x_0 + along * eps + noise
        return x.to(dtype)

    return agree(ours, plain, [data_of(draw)], loose=1000)  # a thousand roundings where abar is 1e-3 at its least


@property_of(5)
def test_ddpm(draw: Draw) -> str:
    return sampled(draw, "ddpm")


@property_of(5)
def test_ddim(draw: Draw) -> str:
    return sampled(draw, "ddim")


@property_of(5)
def test_ddim_inverse(draw: Draw) -> str:
    """It brings back what it started from, however near it comes."""
    schedule = diffusion.Schedule("linear", 50)
    steps, iterations = size(draw, 2, 8), size(draw, 1, 3)

    def there_and_back(x: Any) -> Any:
        def still(x: Tensor, t: Tensor) -> Tensor:
            return torch.zeros_like(x)

        found = diffusion.ddim_inverse(still, x.detach(), schedule, steps=steps, iterations=iterations)
        key = torch.zeros(2, dtype=torch.int64)
        return diffusion.ddim(still, found.noise, schedule, key, steps=steps, residuals=found.residuals)

    return agree(there_and_back, lambda x: x.detach().to(torch.promote_types(x.dtype, torch.float32)), [data_of(draw)])


@property_of(5)
def test_diffuse_denoise(draw: Draw) -> str:
    """Finite, of the right dtype, repeatable, untouched at strength 0; or refused."""
    schedule, key = diffusion.Schedule("linear", 20), noise_key(draw)
    x, strength = data_of(draw), one_of(draw, 0.0, 0.01, 0.5, 1.0, -0.1, 1.1, float("nan"))

    def op(x: Any) -> Any:
        return diffusion.diffuse_denoise(model, x.detach(), schedule, key, strength=strength, steps=4)

    def plain(x: Any) -> Any:
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        return x if 0 <= strength < 0.025 else op(x)

    return agree(op, plain, [x])


@property_of(5)
def test_slerp(draw: Draw) -> str:
    """Between unit vectors it stays on the sphere, and its ends are the vectors."""
    a = data_of(draw, dtype=one_of(draw, torch.float32, torch.float64), kinds=("normal", "grid", "coincident", "huge"))
    b = tensor(draw, *a.shape, dtype=a.dtype, kinds=("normal", "grid", "coincident", "huge"))
    weight = torch.tensor([one_of(draw, 0.0, 0.25, 0.5, 1.0) for _ in a])

    def ours(a: Any, b: Any) -> Any:
        return diffusion.slerp(a.detach(), b.detach(), weight)

    def plain(a: Any, b: Any) -> Any:
        x, y, w = a.detach().double().flatten(1), b.detach().double().flatten(1), weight.double()[:, None]
        u, v = (z / z.norm(dim=1, keepdim=True).clamp_min(1e-12) for z in (x, y))
        theta = 2 * torch.atan2((u - v).norm(dim=1, keepdim=True), (u + v).norm(dim=1, keepdim=True))
        straight = theta.sin() <= 1e-6
        sin = theta.sin().masked_fill(straight, 1)
        of_x = torch.where(straight, 1 - w, ((1 - w) * theta).sin() / sin)
        of_y = torch.where(straight, w, (w * theta).sin() / sin)
        return (of_x * x + of_y * y).view(a.shape).to(a.dtype)

    return agree(ours, plain, [a, b], loose=10)


@property_of(5)
def test_diffusion_loss(draw: Draw) -> str:
    """The mean of the weighted squared error, of data and of a Gaussian's mean with no spread."""
    schedule, key, x_0 = schedule_of(draw), noise_key(draw), data_of(draw, dtype=torch.float32)
    t = torch.tensor([size(draw, 1, schedule.num_train_timesteps) for _ in x_0], dtype=torch.int64)

    def plain(x_0: Any) -> Tensor:
        noise = normal_noise(x_0.shape, key).double()
        alpha, sigma = (f(t).double()[:, None, None] for f in (schedule.alpha, schedule.sigma))
        error = noise - model(alpha * x_0.double() + sigma * noise, t)
        return error.square().flatten(1).mean(1).to(x_0.dtype)

    whole = agree(partial(diffusion.diffusion_loss, model, t=t, schedule=schedule, key=key), plain, [x_0], loose=10)
    still = torch.full_like(x_0, -100)
    loss = diffusion.diffusion_loss(model, (x_0, still), t, schedule, key)
    torch.testing.assert_close(loss, diffusion.diffusion_loss(model, x_0, t, schedule, key))
    return whole


@property_of(4)
def test_variational_bound(draw: Draw) -> str:
    """All times together are the mean of each alone; finite and per cloud; other times are refused."""
    schedule, key = diffusion.Schedule("linear", size(draw, 2, 6)), noise_key(draw)
    T, x_0 = schedule.num_train_timesteps, data_of(draw)
    refused = one_of(draw, None, None, [1], [T + 1], [])

    def bound(x_0: Any) -> Any:
        times = None if refused is None else torch.tensor(refused, dtype=torch.int64)
        b = diffusion.variational_bound(model, x_0.detach(), schedule, key, timesteps=times)
        return b.prior, b.diffusion, b.reconstruction

    def plain(x_0: Any) -> Any:
        if refused is not None:
            raise ValueError("refused")
        x_0 = x_0.detach()
        alone = [
            diffusion.variational_bound(model, x_0, schedule, key, timesteps=torch.tensor([t])) for t in range(2, T + 1)
        ]
        return alone[0].prior, torch.stack([b.diffusion for b in alone]).mean(0), alone[0].reconstruction

    return agree(bound, plain, [x_0])


@property_of(4)
def test_probability_flow(draw: Draw) -> str:
    """Where the data are standard normal, eps = sigma x, nothing moves; other schedules are refused."""
    schedule = diffusion.Schedule(one_of(draw, "linear", "linear", "cosine"), 1000)
    inverse = one_of(draw, False, True)

    def perfect(x: Tensor, t: Tensor) -> Tensor:
        s = t.double() / 1000
        integral = 0.1 * s + (20 - 0.1) * s * s / 2
        return (x.double() * (-torch.expm1(-integral)).sqrt()[:, None, None]).to(x.dtype)

    def plain(x: Any) -> Any:
        if schedule.kind != "linear":
            raise ValueError("refused")
        return x.detach().to(torch.promote_types(x.dtype, torch.float32))

    def op(x: Any) -> Any:
        return diffusion.probability_flow(perfect, x.detach(), schedule, inverse=inverse)

    return agree(op, plain, [data_of(draw)], loose=30)
