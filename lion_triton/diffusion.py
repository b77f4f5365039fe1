"""Gaussian diffusion: schedules, losses, samplers and the variational bound.

``abar_t = prod_{s<=t} (1 - beta_s)``, ``alpha_t = sqrt(abar_t)``, ``sigma_t = sqrt(1 - abar_t)``,
``x_t = alpha_t x_0 + sigma_t eps``; t is in 1..T, never 0..T-1. ``rho_t^2`` is the variance of the reverse
step: ``beta_t`` ("fixed_large") or the posterior's ``beta~_t`` ("fixed_small").

A ``key`` is an int64 tensor (seed, offset) or (seed, offset, first), see ``normal_noise``: one key, one noise, bit for
bit. Samplers give step i, counted from 1, the key of offset + i, so that ``key`` itself stays free for x_T.

Sources: DDPM (Ho et al. 2020, arXiv 2006.11239), DDIM (Song, Meng & Ermon 2021, 2010.02502), IDDPM (Nichol
& Dhariwal 2021, 2102.09672), v (Salimans & Ho 2022, 2202.00512), SDE (Song et al. 2021, 2011.13456).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from lion_triton.kernels import ancestral_step, noise_mse, posterior_q_sample, q_sample
from lion_triton.kernels._checks import check_integer
from lion_triton.kernels.noise import Key, full_key, later_key, later_keys

ScheduleKind = Literal["linear", "warmup_constant", "cosine"]
Variance = Literal["fixed_large", "fixed_small"]
Prediction = Literal["eps", "v"]
WeightKind = Literal["uniform", "variational"]
Spacing = Literal["uniform", "quadratic", "trailing"]

Data = Float[Tensor, "B ..."]
PerCloud = Float[Tensor, " B"]
Times = Int64[Tensor, " B"]
Residuals = Float[Tensor, "S B ..."]
Model = Callable[[Tensor, Tensor], Tensor]  # (x_t (B, ...), t (B,)) -> like x_t
Callback = Callable[[int, int, Tensor], None]  # (step from 1, t that it left, the sample it made)


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name}: expected one of {', '.join(get_args(choices))}, got {value!r}")


def _over(scalars: Tensor, x: Tensor) -> Tensor:
    """``scalars`` (B,) shaped to broadcast over ``x`` (B, ...)."""
    return scalars.reshape(-1, *[1] * (x.ndim - 1))


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _transitions(log_abar_t: Tensor, log_abar_s: Tensor) -> tuple[Tensor, Tensor]:
    """``beta`` and ``beta~`` of the transitions s -> t, s < t: DDPM eq. 7, for any pair IDDPM section 4."""
    beta = -torch.expm1(log_abar_t - log_abar_s)
    return beta, beta * torch.expm1(log_abar_s) / torch.expm1(log_abar_t)


class Schedule(nn.Module):
    """The variance schedule ``beta_1 .. beta_T`` and what follows from it.

    ``linear``: ``beta_start`` to ``beta_end`` (DDPM section 4). ``warmup_constant``: linear over the first
    tenth of the steps, then ``beta_end`` (PVD's airplane recipe). ``cosine``: IDDPM eq. 17, betas clipped at
    0.999, ``beta_start`` and ``beta_end`` unused. Raises ``ValueError`` for T < 1, betas outside (0, 1) or an
    ``abar_T`` that is 0 in float32.

    Buffers, rounded once from float64 to float32 and not saved: ``betas``, ``alphas_cumprod``,
    ``posterior_variance`` (0 at t = 1), each (T,) with t at index t - 1. Never cast them to half precision.

    Methods take ``t`` (B,) int64 in 1..T on the buffers' device and return float32 (B,). They do not check
    ``t``, which would stall a GPU, but t = 0 gives NaN.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    posterior_variance: Tensor
    _table: Tensor

    def __init__(
        self,
        kind: ScheduleKind = "linear",
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
    ) -> None:
        super().__init__()
        _check_choice("kind", kind, ScheduleKind)
        self.num_train_timesteps = T = check_integer("num_train_timesteps", num_train_timesteps, least=1)
        for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
            if not isinstance(value, Real) or not 0 < value < 1:
                raise ValueError(f"{name}: expected a number in (0, 1), got {value}")
        self.kind, self.beta_start, self.beta_end = kind, beta_start, beta_end

        if kind == "cosine":
            f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
        else:
            warmup = T if kind == "linear" else T // 10
            betas = np.concatenate([np.linspace(beta_start, beta_end, warmup), np.full(T - warmup, beta_end)])

        # Index t, abar_0 = 1; float64 on the CPU wherever the module is. Samplers start from it, because
        # 1 - abar and ratios of neighbouring abar in float32 would lose most digits of beta.
        self.log_abar = torch.from_numpy(np.concatenate([[0.0], np.cumsum(np.log1p(-betas))]))
        log_t, log_s = self.log_abar[1:], self.log_abar[:-1]
        if log_t[-1].exp() < torch.finfo(torch.float32).tiny:  # x_0 would be 0 / 0, a weight of v infinite
            raise ValueError(f"beta_end: expected betas that leave some of x_0 at T = {T} in float32, got {beta_end}")
        beta, beta_tilde = _transitions(log_t, log_s)
        # No model can have variance 0: t = 1 takes that of t = 2, as DDPM's own code does.
        small = beta_tilde.clone()
        small[0] = beta_tilde[1] if T > 1 else beta[0]
        sigma2 = -torch.expm1(log_t)
        rows = {
            "alpha": (log_t / 2).exp(),
            "sigma": sigma2.sqrt(),
            "fixed_large": beta,
            "fixed_small": small,
            "weight_fixed_large": beta / (2 * (1 - beta) * sigma2),
            "weight_fixed_small": beta**2 / (2 * small * (1 - beta) * sigma2),
            "posterior_x_0": (log_s / 2).exp() * beta / sigma2,
            "posterior_x_t": (1 - beta).sqrt() * -torch.expm1(log_s) / sigma2,
            "posterior_variance": beta_tilde,
        }
        self._row = {name: i for i, name in enumerate(rows)}
        table = nn.functional.pad(torch.stack(list(rows.values())), (1, 0), value=math.nan)
        self.register_buffer("betas", beta.float(), persistent=False)
        self.register_buffer("alphas_cumprod", log_t.exp().float(), persistent=False)
        self.register_buffer("posterior_variance", beta_tilde.float(), persistent=False)
        self.register_buffer("_table", table.float(), persistent=False)

    def _lookup(self, name: str, t: Tensor) -> Tensor:
        return self._table[self._row[name]][t]

    def alpha(self, t: Times) -> PerCloud:
        """``sqrt(abar_t)``, the factor of x_0 (DDPM eq. 4)."""
        return self._lookup("alpha", t)

    def sigma(self, t: Times) -> PerCloud:
        """``sqrt(1 - abar_t)``, the factor of the noise (DDPM eq. 4)."""
        return self._lookup("sigma", t)

    def weight(self, t: Times, kind: WeightKind = "uniform", variance: Variance = "fixed_large") -> PerCloud:
        """Weight of the squared error of eps: 1, or beta_t^2 / (2 rho_t^2 (1 - beta_t) (1 - abar_t)).

        The latter (DDPM eq. 12) times the error summed over elements is the t-th term of the bound in nats,
        up to a constant. ``fixed_small`` at t = 1, where ``beta~`` is 0, takes ``rho_1^2 = beta~_2``.
        """
        _check_choice("kind", kind, WeightKind)
        _check_choice("variance", variance, Variance)
        return torch.ones_like(t).float() if kind == "uniform" else self._lookup(f"weight_{variance}", t)

    def predict_x0(self, x_t: Data, eps: Data, t: Times) -> Data:
        """``(x_t - sigma_t eps) / alpha_t`` (DDPM eq. 15)."""
        return (x_t - _over(self.sigma(t), x_t) * eps) / _over(self.alpha(t), x_t)

    def posterior(self, x_0: Data, x_t: Data, t: Times) -> tuple[Data, PerCloud]:
        """Mean (B, ...) and variance (B,) of ``q(x_{t-1} | x_t, x_0)`` (DDPM eq. 6 and 7)."""
        coef_0, coef_t = self._lookup("posterior_x_0", t), self._lookup("posterior_x_t", t)
        return _over(coef_0, x_0) * x_0 + _over(coef_t, x_t) * x_t, self._lookup("posterior_variance", t)


def to_eps(prediction: Data, x_t: Data, t: Times, schedule: Schedule, kind: Prediction = "eps") -> Data:
    """The eps that a network's output stands for.

    ``v = alpha_t eps - sigma_t x_0`` gives ``eps = alpha_t v + sigma_t x_t`` (v, appendix D), in float32
    (float64 if an input is) whatever the network's dtype. ``eps`` is returned untouched.
    """
    _check_choice("kind", kind, Prediction)
    if kind == "eps":
        return prediction
    alpha, sigma = _over(schedule.alpha(t), x_t), _over(schedule.sigma(t), x_t)
    return alpha * _at_least_float32(prediction) + sigma * _at_least_float32(x_t)


def loss_weight(
    t: Times, schedule: Schedule, prediction: Prediction, kind: WeightKind, variance: Variance = "fixed_large"
) -> PerCloud:
    """Weight of the squared error **of eps**: uniform in what the network predicts, or that of the bound.

    Two v differ by 1 / alpha_t times the difference of their eps, so 1 / alpha_t^2 makes it the error of v.
    """
    _check_choice("prediction", prediction, Prediction)
    return schedule.alpha(t) ** -2 if (prediction, kind) == ("v", "uniform") else schedule.weight(t, kind, variance)


def diffusion_loss(
    model: Model,
    x_0: Data | tuple[Data, Data],
    t: Times,
    schedule: Schedule,
    key: Key,
    prediction: Prediction = "eps",
    weight_kind: WeightKind = "uniform",
    variance: Variance = "fixed_large",
) -> PerCloud:
    """Weighted squared error, mean over each cloud's elements (DDPM eq. 12 and 14; ``loss_weight``).

    ``x_0``: data, or ``(mu, log_sigma)`` of the Gaussian to draw x_0 from. ``model(x_t, t)`` returns what
    ``prediction`` says. The noise is a function of ``key`` and never stored: the loss makes it again.
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if isinstance(x_0, tuple):
        x_t = posterior_q_sample(*x_0, alpha, sigma, key)
    else:
        x_t = q_sample(x_0, alpha, sigma, key)
    eps = to_eps(model(x_t, t), x_t, t, schedule, prediction)
    return noise_mse(eps, key, loss_weight(t, schedule, prediction, weight_kind, variance))


def timesteps(num_train_timesteps: int, steps: int, spacing: Spacing = "uniform") -> Int64[Tensor, " steps"]:
    """``steps`` strictly decreasing times from T to 1, both visited; ``steps`` = 1 gives T alone.

    ``uniform``: equally spaced. ``quadratic``: t - 1 grows with the square of the rank, but by at least one
    (DDIM appendix D.2, stretched to both ends). ``trailing``: from T to T / steps, so that the step to 0 is as long as
    the others (Lin et al. 2024, 2305.08891, section 3.3), and every second time of 2N is one of N. Raises
    ``ValueError`` unless 1 <= steps <= T.
    """
    _check_choice("spacing", spacing, Spacing)
    num_train_timesteps = check_integer("num_train_timesteps", num_train_timesteps, least=1)
    if not isinstance(steps, Integral) or not 1 <= steps <= num_train_timesteps:
        raise ValueError(f"steps: expected 1 to {num_train_timesteps} (the training steps), got {steps}")
    if steps == 1:
        return torch.tensor([num_train_timesteps])
    rank = np.arange(steps)
    if spacing == "trailing":
        curve = num_train_timesteps * (rank + 1) / steps
    else:
        curve = 1 + (num_train_timesteps - 1) * (rank / (steps - 1)) ** (1 if spacing == "uniform" else 2)
    # The curve is convex: where it is above the line rank + 1 it climbs by more than 1, so nothing repeats.
    times = np.maximum(np.floor(curve + 0.5).astype(np.int64), rank + 1)
    return torch.from_numpy(times[::-1].copy())


@dataclass(frozen=True)
class Steps:
    """The reverse steps of a sampler, first to last."""

    times: Int64[Tensor, " S"]  # t that each starts from
    coefficients: Float[Tensor, "S 5"]  # coef_x, coef_eps and rho of ``ancestral_step``, alpha_t, sigma_t; float64


def _steps(schedule: Schedule, times: Tensor, eta: float, variance: Variance) -> Steps:
    """DDIM eq. 12 over ``times``, noise scale eq. 16; at eta = 1 its mean is DDPM's (eq. 7 and 11)."""
    log_t = schedule.log_abar[times]
    log_s = torch.cat([log_t[1:], torch.zeros_like(log_t[:1])])
    beta, beta_tilde = _transitions(log_t, log_s)
    sigma = (-torch.expm1(log_t)).sqrt()
    coef_x = ((log_s - log_t) / 2).exp()
    coef_eps = coef_x * sigma - (-torch.expm1(log_s) - eta**2 * beta_tilde).sqrt()
    rho = beta.sqrt() if variance == "fixed_large" else eta * beta_tilde.sqrt()
    rho[-1] = 0  # the last step is noise-free
    return Steps(times, torch.stack([coef_x, coef_eps, rho, (log_t / 2).exp(), sigma], 1))


def ddpm_steps(schedule: Schedule, steps: int | None = None, variance: Variance = "fixed_large") -> Steps:
    """The steps of ``ddpm``. Raises ``ValueError`` for what it does not take."""
    _check_choice("variance", variance, Variance)
    T = schedule.num_train_timesteps
    return _steps(schedule, timesteps(T, T if steps is None else steps), 1.0, variance)


def ddim_steps(schedule: Schedule, steps: int = 50, eta: float = 0.0, spacing: Spacing = "uniform") -> Steps:
    """The steps of ``ddim``. Raises ``ValueError`` for what it does not take."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: expected a number in [0, 1], got {eta}")
    return _steps(schedule, timesteps(schedule.num_train_timesteps, steps, spacing), eta, "fixed_small")


@dataclass(frozen=True)
class MergedSteps:
    """S stretches of K steps of DDIM, each of which is to become one step."""

    times: Int64[Tensor, "S K"]  # of each stretch's steps, first to last; the last stretch ends at 0
    coefficients: Float[Tensor, "S K 3"]  # alpha, sigma, and the share of this prediction of x_0; float64


def merged_steps(schedule: Schedule, steps: int, substeps: int = 2, spacing: Spacing = "trailing") -> MergedSteps:
    """Of DDIM with ``steps * substeps`` steps; if ``spacing`` is "trailing" stretches begin at the times of ``steps``.

    With ``r = alpha / sigma`` a step of DDIM adds ``(r_s - r_t) x_0(t)`` to ``x / sigma``. So one step over a stretch
    ends where its K steps do if it predicts their mean x~, each weighted by its part of the way in r; and x~ lies
    within the bounds that they are clamped to. With K = 2 it is that of v, algorithm 2, its fractions cleared. The mean
    of k + 1 predictions is that of k moved to the last by a share of ``(r_{k+1} - r_k) / (r_{k+1} - r_0)``.
    """
    times = timesteps(schedule.num_train_timesteps, steps * substeps, spacing).view(steps, substeps)
    log = schedule.log_abar[times]
    alpha, sigma = (log / 2).exp(), (-torch.expm1(log)).sqrt()
    ratio = alpha / sigma
    ends = torch.cat([ratio.flatten()[1:], torch.full((1,), math.inf)]).view_as(ratio)  # sigma_0 = 0
    share = 1 - (ratio - ratio[:, :1]) / (ends - ratio[:, :1])
    return MergedSteps(times, torch.stack([alpha, sigma, share], -1))


@torch.no_grad()
def merged_v(
    eps_model: Model,
    x_t: Data,
    times: Int64[Tensor, "B K"],
    coefficients: Float[Tensor, "B K 3"],
    clip: float | None = None,
) -> Data:
    """The v of x~ at x_t: what a step is to predict that ends where the K of ``eps_model`` do (see ``merged_steps``).

    A row of times and coefficients for each cloud. ``clip``: clamp every prediction of x_0, as ``Chain`` does in the
    steps that are to be merged. Float32 (float64 if x_t is), no gradient.
    """
    x_t = _at_least_float32(x_t)
    alpha_t, sigma_t = (_over(c, x_t) for c in coefficients[:, 0, :2].to(x_t).unbind(1))
    mean = torch.zeros_like(x_t)
    for k in range(times.shape[1]):
        alpha, sigma, share = (_over(c, x_t) for c in coefficients[:, k].to(x_t).unbind(1))
        # One step by the mean so far ends where the k steps so far do.
        x = x_t if k == 0 else alpha * mean + sigma / sigma_t * (x_t - alpha_t * mean)
        x_0 = (x - sigma * eps_model(x, times[:, k]).to(x.dtype)) / alpha
        mean = torch.lerp(mean, x_0 if clip is None else x_0.clamp(-clip, clip), share)
    return (alpha_t * x_t - mean) / sigma_t


class Chain:
    """A reverse chain over a batch, whose every step is the same function of tensors that stay where they are.

    The sample, the step's number, the key and the steps themselves are all on the device and the host reads none of
    them: ``step`` never waits for the device, and once captured in a CUDA graph it serves every sampler, key and
    number of steps up to T.

    Args:
        eps_model: ``eps_model(x_t, t)`` takes t (B,) int64 in 1..T and returns eps.
        like: a batch, for its shape, dtype and device.
        num_train_timesteps: T.
        clip: clamp the predicted x_0 to [-clip, clip] and replace eps by what it implies.

    ``x`` (B, ...) is the sample, float32 (float64 if ``like`` is).
    """

    def __init__(self, eps_model: Model, like: Data, num_train_timesteps: int, clip: float | None = None) -> None:
        if clip is not None and not clip > 0:
            raise ValueError(f"clip: expected a positive number or None, got {clip}")
        self.eps_model, self.clip = eps_model, clip
        self.x = torch.empty_like(_at_least_float32(like))
        self.times = torch.ones(num_train_timesteps, dtype=torch.int64, device=like.device)
        self.coefficients = self.x.new_zeros(num_train_timesteps, 5)
        self.key = torch.zeros(3, dtype=torch.int64, device=like.device)
        self.done = torch.zeros(1, dtype=torch.int64, device=like.device)

    @torch.no_grad()
    def start(self, x_T: Data, steps: Steps, key: Key) -> None:
        """Make ``x_T`` the sample and these the next steps; step i, from 1, makes its noise of (seed, offset + i)."""
        count = len(steps.times)
        self.x.copy_(x_T)
        self.times[:count].copy_(steps.times)
        self.coefficients[:count].copy_(steps.coefficients)
        self.key.copy_(full_key(key))
        self.done.zero_()

    @torch.no_grad()
    def step(self) -> None:
        """One reverse step of ``x``, in place."""
        x, size = self.x, self.x.shape[0]
        t = self.times.index_select(0, self.done).repeat(size)
        coef_x, coef_eps, rho, alpha, sigma = self.coefficients.index_select(0, self.done).T.repeat(1, size)
        self.done += 1
        eps = self.eps_model(x, t).to(x.dtype)
        if self.clip is not None:
            alpha, sigma = _over(alpha, x), _over(sigma, x)
            x_0 = ((x - sigma * eps) / alpha).clamp(-self.clip, self.clip)
            eps = (x - alpha * x_0) / sigma
        x.copy_(ancestral_step(x, eps, coef_x, coef_eps, rho, later_key(self.key, self.done[0])))


def _sample(
    eps_model: Model,
    x_T: Tensor,
    schedule: Schedule,
    key: Tensor,
    steps: Steps,
    clip: float | None,
    callback: Callback | None,
    residuals: Tensor | None = None,
) -> Tensor:
    chain = Chain(eps_model, x_T, schedule.num_train_timesteps, clip)
    chain.start(x_T, steps, key)
    for i, t in enumerate(steps.times.tolist(), 1):
        chain.step()
        if residuals is not None:
            chain.x.copy_(chain.x + residuals[i - 1])
        if callback is not None:
            callback(i, t, chain.x.clone())
    return chain.x


def ddpm(
    eps_model: Model,
    x_T: Data,
    schedule: Schedule,
    key: Key,
    *,
    steps: int | None = None,
    variance: Variance = "fixed_large",
    clip: float | None = None,
    callback: Callback | None = None,
) -> Data:
    """Ancestral sampling (DDPM algorithm 2); fewer ``steps`` than T respace the chain (IDDPM section 4).

    ``eps_model`` and ``clip`` as in ``Chain``. Float32 (float64 if x_T is), no gradient, no noise in the last step.
    """
    return _sample(eps_model, x_T, schedule, key, ddpm_steps(schedule, steps, variance), clip, callback)


def ddim(
    eps_model: Model,
    x_T: Data,
    schedule: Schedule,
    key: Key,
    *,
    steps: int = 50,
    eta: float = 0.0,
    spacing: Spacing = "uniform",
    clip: float | None = None,
    residuals: Residuals | None = None,
    callback: Callback | None = None,
) -> Data:
    """DDIM sampling (DDIM eq. 12 and 16): ``eta`` 0 is deterministic, 1 is ``ddpm`` with "fixed_small".

    Times from ``timesteps``; ``residuals``, those of a ``Trajectory``, are added after each step; all else as in
    ``ddpm``. Raises ``ValueError`` for residuals of another shape.
    """
    chosen = ddim_steps(schedule, steps, eta, spacing)
    if residuals is not None and residuals.shape != (steps, *x_T.shape):
        expected, got = (tuple(shape) for shape in ((steps, *x_T.shape), residuals.shape))
        raise ValueError(f"residuals: expected shape {expected}, got {got}")
    return _sample(eps_model, x_T, schedule, key, chosen, clip, callback, residuals)


@torch.no_grad()
def probability_flow(
    eps_model: Model, x_T: Data, schedule: Schedule, *, tolerance: float = 1e-5, inverse: bool = False
) -> Data:
    """Solve the VP-SDE's probability-flow ODE (SDE eq. 11 and 13) from s = 1 to 1e-5 by SciPy's RK45.

    ``dx/ds = -beta(s)/2 (x - eps / std(s))``, ``beta(s) = T (beta_start + s (beta_end - beta_start))``, by
    default 0.1 to 20, ``std(s)^2 = 1 - exp(-integral of beta)``. ``eps_model(x, t)`` must take a **real** t =
    T s, float32 (B,). Linear schedules only (``ValueError``). ``tolerance`` is both rtol and atol; the state
    is float64 on the CPU with one error norm for the whole batch, so clouds share their steps. ``inverse``: from s =
    1e-5 to 1, which gives the x_T of the x_0 that is handed over as ``x_T``.
    """
    if schedule.kind != "linear":
        raise ValueError(f"schedule: expected kind linear, got {schedule.kind}")
    T, dtype = schedule.num_train_timesteps, _at_least_float32(x_T).dtype
    low, slope = T * schedule.beta_start, T * (schedule.beta_end - schedule.beta_start)

    def derivative(s: float, flat: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(flat).reshape(x_T.shape)
        t = torch.full(x_T.shape[:1], T * s, dtype=torch.float32, device=x_T.device)
        eps = eps_model(x.to(dtype).to(x_T.device), t).cpu().double()
        std = math.sqrt(-math.expm1(-(low * s + slope * s * s / 2)))
        return (-0.5 * (low + slope * s) * (x - eps / std)).flatten().numpy()

    start = x_T.cpu().double().flatten().numpy()
    span = (1e-5, 1.0) if inverse else (1.0, 1e-5)
    end = solve_ivp(derivative, span, start, "RK45", [span[1]], rtol=tolerance, atol=tolerance)
    if not end.success:
        raise RuntimeError(f"probability_flow: {end.message}")
    return torch.from_numpy(end.y[:, -1]).reshape(x_T.shape).to(dtype).to(x_T.device)


@dataclass(frozen=True)
class Bound:
    """Parts of an upper bound on ``-log p(x_0)`` in nats per cloud, each (B,) (DDPM eq. 5)."""

    prior: Tensor  # L_T = KL(q(x_T | x_0) || N(0, I))
    diffusion: Tensor  # sum over t > 1 of KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))
    reconstruction: Tensor  # L_0 = -log p(x_0 | x_1) of a Gaussian density, so it can be negative

    @property
    def total(self) -> Tensor:
        return self.prior + self.diffusion + self.reconstruction


@torch.no_grad()
def variational_bound(
    eps_model: Model,
    x_0: Data,
    schedule: Schedule,
    key: Key,
    *,
    variance: Variance = "fixed_large",
    timesteps: Int64[Tensor, " S"] | None = None,
) -> Bound:
    """The bound for reverse steps of fixed variance ``rho_t^2`` (DDPM eq. 5 to 8; see ``Schedule.weight``).

    One noise per t, that of (seed, offset + t). ``timesteps`` None sums all t in 2..T: T calls of the
    network. Times drawn uniformly from 2..T give an unbiased estimate, T - 1 times the mean of their terms;
    other times raise ``ValueError``.
    """
    _check_choice("variance", variance, Variance)
    T = schedule.num_train_timesteps
    chosen = list(range(2, T + 1)) if timesteps is None else timesteps.tolist()
    if timesteps is not None and not (chosen and min(chosen) >= 2 and max(chosen) <= T):
        raise ValueError(f"timesteps: expected one or more times in 2..{T}, got {chosen}")
    x_0, log_abar = _at_least_float32(x_0), schedule.log_abar
    keys = later_keys(key, torch.arange(1, T + 1, device=key.device))
    dims = math.prod(x_0.shape[1:])

    def mean_term(t: int) -> Tensor:
        # Both Gaussians' means are affine in eps, which leaves w(t) ||eps - eps_theta||^2, at t = 1 too.
        times = torch.full(x_0.shape[:1], t, device=x_0.device)
        x_t = q_sample(x_0, schedule.alpha(times), schedule.sigma(times), keys[t - 1])
        weight = schedule.weight(times, "variational", variance)
        return dims * noise_mse(eps_model(x_t, times), keys[t - 1], weight)

    beta, beta_tilde = _transitions(log_abar[2:], log_abar[1:-1])
    ratio = beta_tilde / (beta if variance == "fixed_large" else beta_tilde)
    mismatch = ((ratio - 1 - ratio.log()) * dims / 2).tolist()
    terms = [mean_term(t) + mismatch[t - 2] for t in chosen]
    rho_1 = schedule._lookup(variance, torch.ones_like(key[:1]))
    reconstruction = mean_term(1) + dims / 2 * torch.log(2 * math.pi * rho_1)
    diffusion = (T - 1) * torch.stack(terms).mean(0) if terms else torch.zeros_like(reconstruction)
    abar_T = log_abar[-1].exp()  # float64, because abar_T and log sigma_T^2 all but cancel
    constant = -(abar_T + torch.log1p(-abar_T)).item() * dims / 2
    prior = abar_T.item() / 2 * (x_0**2).flatten(1).sum(1) + constant
    return Bound(prior, diffusion, reconstruction)


def slerp(a: Data, b: Data, weight: PerCloud) -> Data:
    """Spherical interpolation (Shoemake 1985): ``(sin((1 - w) theta) a + sin(w theta) b) / sin(theta)``.

    ``a`` and ``b`` are (B, ...), or (1, ...) for all of ``weight`` (B,) in [0, 1]; theta is the angle between a cloud's
    two vectors of all its elements. Between two draws of Gaussian noise all of the arc is as likely as its ends, where
    the straight line passes points too near the origin. Weights 0 and 1 give a and b bit for bit; parallel and opposite
    vectors are joined by the straight line. Float32 (float64 if an input is).
    """
    a, b = _at_least_float32(a), _at_least_float32(b)
    unit_a, unit_b = (x / _over(x.flatten(1).norm(dim=1).clamp_min(1e-12), x) for x in (a, b))
    # As accurate near 0 and pi as between, which the arc cosine of the scalar product is not.
    theta = 2 * torch.atan2((unit_a - unit_b).flatten(1).norm(dim=1), (unit_a + unit_b).flatten(1).norm(dim=1))
    weight = weight.to(theta)
    curved = theta.sin() > 1e-6
    sin = torch.where(curved, theta.sin(), torch.ones_like(theta))
    of_a = torch.where(curved, ((1 - weight) * theta).sin() / sin, 1 - weight)
    of_b = torch.where(curved, (weight * theta).sin() / sin, weight)
    return _over(of_a, a) * a + _over(of_b, b) * b


@dataclass(frozen=True)
class Trajectory:
    """How a deterministic sampler comes to a sample: the noise it starts from, and what is added after each step.

    ``residuals`` are what DDIM's steps miss on the way to the sample that this is the inverse of; None: nothing.
    Float64, in which the difference of two float32 numbers is exact: the way back ends bit for bit where it began.
    """

    noise: Data
    residuals: Residuals | None = None

    def towards(self, other: Trajectory, weight: PerCloud) -> Trajectory:
        """What lies between: noises on the arc (see ``slerp``), residuals on the line."""
        noise, residuals = slerp(self.noise, other.noise, weight), None
        ends = [(self.residuals, 1 - weight), (other.residuals, weight)]
        shares = [_over(share, noise).to(r) * r for r, share in ends if r is not None]
        if shares:
            residuals = sum(shares[1:], shares[0])
        return Trajectory(noise, residuals)


@torch.no_grad()
def ddim_inverse(
    eps_model: Model,
    x_0: Data,
    schedule: Schedule,
    *,
    steps: int = 50,
    spacing: Spacing = "uniform",
    clip: float | None = None,
    iterations: int = 3,
    callback: Callback | None = None,
) -> Trajectory:
    """The noise and the residuals from which ``ddim`` with ``eta`` 0 and the same steps, spacing and clip makes x_0.

    A step of DDIM gives x_s from x_t; its inverse is the solution of ``step(x_t) = x_s``. It is sought by
    ``iterations`` evaluations of the network per step, from x_s (DDIM section 4.3) on. Each but the last adds to x_t
    what is missing of x_s, divided by the slope of a step where the data are standard normal, so that there the second
    is exact. Where a sample comes no nearer, as networks that choose points make it happen, it goes on from the nearest
    with half of that. What is still missing at the nearest is the step's residual.

    ``callback`` gets (step from 1, t that it reached, the sample there). Float32 (float64 if x_0 is), no gradient.
    Raises ``ValueError`` for fewer than one iteration.
    """
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, got {iterations}")
    chosen, x = ddim_steps(schedule, steps, 0.0, spacing), _at_least_float32(x_0)
    coef_x, coef_eps, _, _, sigma = chosen.coefficients.T
    slopes = (coef_x - coef_eps * sigma).tolist()  # where the data are standard normal: eps is sigma_t x_t
    chain, residuals = Chain(eps_model, x, schedule.num_train_timesteps, clip), []
    key = torch.zeros(2, dtype=torch.int64, device=x.device)  # of noise that eta 0 multiplies by 0
    for i in reversed(range(steps)):
        step = Steps(chosen.times[i : i + 1], chosen.coefficients[i : i + 1])
        x_s, best, residual = x, x, torch.zeros_like(x, dtype=torch.float64)
        least, share = residual.new_full((len(x),), torch.inf), residual.new_ones(len(x))
        for _ in range(iterations):
            chain.start(x, step, key)
            chain.step()
            missing = x_s - chain.x.double()
            norm = missing.flatten(1).norm(dim=1)
            better, enough = norm < least, norm < (1 - share / 4) * least
            best, residual = (torch.where(_over(better, x), new, old) for new, old in ((x, best), (missing, residual)))
            least, share = torch.where(better, norm, least), torch.where(enough, share, share / 2)
            x = (best + _over(share, x) * residual / slopes[i]).to(x.dtype)
        x = best
        residuals.append(residual)
        if callback is not None:
            callback(steps - i, int(chosen.times[i]), x)
    return Trajectory(x, torch.stack(residuals[::-1]))


def diffuse_denoise(
    eps_model: Model,
    x_0: Data,
    schedule: Schedule,
    key: Key,
    *,
    strength: float,
    steps: int = 50,
    eta: float = 0.0,
    clip: float | None = None,
    callback: Callback | None = None,
) -> Data:
    """Noise x_0 to the time t = ``strength`` T, and denoise it by DDIM (SDEdit, Meng et al. 2022, 2108.01073).

    ``strength`` in [0, 1] is also the share of ``steps`` that are taken, at least one; of strength 0, or so little
    that t is 0, x_0 comes back as it is. The larger it is, the less of x_0 is left: at 1 about nothing. The noise is
    that of ``key``. All else as in ``ddim``.
    """
    for name, value in (("strength", strength), ("eta", eta)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    start = round(strength * schedule.num_train_timesteps)
    if start == 0:
        return _at_least_float32(x_0)
    times = torch.full(x_0.shape[:1], start, device=x_0.device)
    x_t = q_sample(_at_least_float32(x_0), schedule.alpha(times), schedule.sigma(times), key)
    ts = timesteps(start, min(start, max(1, round(strength * steps))))
    return _sample(eps_model, x_t, schedule, key, _steps(schedule, ts, eta, "fixed_small"), clip, callback)
