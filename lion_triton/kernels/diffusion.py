"""The element-wise ops of diffusion, each one pass over memory: noise is made where it is used.

Legend: B clouds, M elements per cloud (whatever the shape behind B), b a cloud, i an element. ``noise`` is
``normal_noise(shape, key)`` and ``noise_1`` an independent draw from the same key (stream 1 of ``noise.py``).

    q_sample            x_t = alpha_b x_0 + sigma_b noise                       Ho et al. 2020, eq. 4
    posterior_q_sample  x_t = alpha_b (mu + exp(log_sigma) noise_1) + sigma_b noise
    noise_mse           weight_b mean_i (noise - pred)^2                        ibid., eqs. 14 and 12
    ancestral_step      coef_x_b x_t - coef_eps_b eps + rho_b noise             ibid., algorithm 2
    gaussian_kl         sum_i (mu^2 + exp(2 log_sigma) - 1) / 2 - log_sigma     KL(N(mu, sigma^2) || N(0, 1))

Backward, with g the incoming gradient:

    q_sample            dx_0 = alpha g, dalpha_b = sum_i g x_0, dsigma_b = sum_i g noise; the same for
                        posterior_q_sample, with x_0 its latent, dmu = dx_0,
                        dlog_sigma = dx_0 exp(log_sigma) noise_1
    noise_mse           dpred = 2 weight_b g_b / M (pred - noise), dweight_b = g_b mean_i (noise - pred)^2
    ancestral_step      dx_t = coef_x g, deps = -coef_eps g
    gaussian_kl         dmu = g_b mu, dlog_sigma = g_b (exp(2 log_sigma) - 1)

No op stores its noise; backward makes it again from the key. Arithmetic is float32 whatever the input, with
one rounding on store. Sums over a cloud are partial sums per program, then a sum over programs in a fixed
order, so that results repeat bit for bit.

Cost per element, of s bytes: memory traffic, and instructions per lane in float32 (sm_90 machine code;
44 of them for each noise, so that on paper the instructions and not the bytes are the floor in bfloat16):

                            forward               backward
    q_sample                2 s,   55             2 s,   11    (3 s,  64 with gradients of alpha and sigma)
    posterior_q_sample      3 s,  100             4 s,   62    (5 s, 115)
    noise_mse                 s,   59             2 s,   54
    ancestral_step          3 s,   57             3 s,   13
    gaussian_kl             2 s,   24             4 s,   21

The references compute in float32 too, or in float64 for float64 input; their noise is float32 always.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lion_triton.kernels._checks import Impl, check_float, check_same, sums_dtype, upcast, use_triton
from lion_triton.kernels._op import Gradients, Needs, gradient, op
from lion_triton.kernels._triton import launch, tl, triton
from lion_triton.kernels.noise import check_key, noise_block, normal_noise_reference

# Elements per cloud up to which a row holds; counters (of four elements) per program; warps. One counter a
# thread for shape latents, two for clouds: chosen by machine code (no spill, 128-bit accesses), not by timing.
_LAUNCH = ((128, 32, 1), (2**63, 256, 4))


# References


def _per_cloud(scalars: Tensor, x: Tensor) -> Tensor:
    return scalars.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def q_sample_reference(x_0: Tensor, alpha: Tensor, sigma: Tensor, key: Tensor) -> Tensor:
    """Specification of ``q_sample``; differentiable in ``x_0``, ``alpha`` and ``sigma``."""
    x = upcast(x_0)
    noise = normal_noise_reference(x.shape, key).to(x.dtype)
    return (_per_cloud(alpha, x) * x + _per_cloud(sigma, x) * noise).to(x_0.dtype)


def posterior_q_sample_reference(mu: Tensor, log_sigma: Tensor, alpha: Tensor, sigma: Tensor, key: Tensor) -> Tensor:
    """Specification of ``posterior_q_sample``; differentiable in all four floating inputs."""
    x = upcast(mu)
    noise_1 = normal_noise_reference(x.shape, key, stream=1).to(x.dtype)
    x_0 = x + log_sigma.to(x.dtype).exp() * noise_1
    return q_sample_reference(x_0, alpha, sigma, key).to(mu.dtype)


def noise_mse_reference(pred: Tensor, key: Tensor, weight: Tensor | None = None) -> Tensor:
    """Specification of ``noise_mse``; differentiable in ``pred`` and ``weight``."""
    x = upcast(pred)
    mse = (normal_noise_reference(x.shape, key).to(x.dtype) - x).square().unsqueeze(1).flatten(1).mean(1)
    return mse if weight is None else weight.to(mse.dtype) * mse


def ancestral_step_reference(
    x_t: Tensor, eps: Tensor, coef_x: Tensor, coef_eps: Tensor, rho: Tensor, key: Tensor
) -> Tensor:
    """Specification of ``ancestral_step``; differentiable in every floating input."""
    x = upcast(x_t)
    noise = normal_noise_reference(x.shape, key).to(x.dtype)
    mean = _per_cloud(coef_x, x) * x - _per_cloud(coef_eps, x) * eps.to(x.dtype)
    return (mean + _per_cloud(rho, x) * noise).to(x_t.dtype)


def gaussian_kl_reference(mu: Tensor, log_sigma: Tensor) -> Tensor:
    """Specification of ``gaussian_kl``; differentiable in both inputs."""
    m = upcast(mu)
    s = log_sigma.to(m.dtype)
    return (0.5 * (m * m + (2.0 * s).exp() - 1.0) - s).unsqueeze(1).flatten(1).sum(1)


# Kernels. One program makes one block of one cloud.


@triton.jit
def _locate(M, chunks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Cloud, first noise counter, the 4 * BLOCK elements from there, and which of them are the cloud's.

    Noise counters run over the whole batch: a cloud whose M is no multiple of four may start and end
    inside a counter.
    """
    pid = tl.program_id(0)
    cloud = (pid // chunks).to(tl.int64)
    begin = cloud * M
    first = begin // 4 + (pid % chunks).to(tl.int64) * BLOCK
    i = first * 4 + tl.arange(0, 4 * BLOCK)
    return cloud, first, i, (i >= begin) & (i < begin + M)


@triton.jit
def _load(ptr, i, mask):  # type: ignore[no-untyped-def]
    return tl.load(ptr + i, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _q_sample_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, log_sigma_ptr, alpha_ptr, sigma_ptr, key_ptr, out_ptr, M, chunks, BLOCK: tl.constexpr
):
    cloud, first, i, mask = _locate(M, chunks, BLOCK)
    x = _load(x_ptr, i, mask)
    if log_sigma_ptr is not None:
        x += tl.exp(_load(log_sigma_ptr, i, mask)) * noise_block(key_ptr, first, 1, BLOCK)
    alpha = tl.load(alpha_ptr + cloud).to(tl.float32)
    sigma = tl.load(sigma_ptr + cloud).to(tl.float32)
    x_t = alpha * x + sigma * noise_block(key_ptr, first, 0, BLOCK)
    tl.store(out_ptr + i, x_t.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _q_sample_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    x_ptr,
    log_sigma_ptr,
    alpha_ptr,
    key_ptr,
    dx_ptr,
    dlog_sigma_ptr,
    partial_ptr,
    M,
    chunks,
    BLOCK: tl.constexpr,
):
    cloud, first, i, mask = _locate(M, chunks, BLOCK)
    grad = _load(grad_ptr, i, mask)
    dx = tl.load(alpha_ptr + cloud).to(tl.float32) * grad
    tl.store(dx_ptr + i, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if log_sigma_ptr is not None:
        spread = tl.exp(_load(log_sigma_ptr, i, mask)) * noise_block(key_ptr, first, 1, BLOCK)
        tl.store(dlog_sigma_ptr + i, (dx * spread).to(dlog_sigma_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        x = _load(x_ptr, i, mask)
        if log_sigma_ptr is not None:
            x += spread
        pid = tl.program_id(0)
        tl.store(partial_ptr + 2 * pid, tl.sum(grad * x))
        tl.store(partial_ptr + 2 * pid + 1, tl.sum(grad * noise_block(key_ptr, first, 0, BLOCK)))


@triton.jit
def _noise_mse_fwd_kernel(pred_ptr, key_ptr, partial_ptr, M, chunks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    _, first, i, mask = _locate(M, chunks, BLOCK)
    error = tl.where(mask, noise_block(key_ptr, first, 0, BLOCK) - _load(pred_ptr, i, mask), 0.0)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(error * error) / M)


@triton.jit
def _noise_mse_bwd_kernel(grad_ptr, pred_ptr, key_ptr, dpred_ptr, M, chunks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    cloud, first, i, mask = _locate(M, chunks, BLOCK)
    error = _load(pred_ptr, i, mask) - noise_block(key_ptr, first, 0, BLOCK)
    dpred = tl.load(grad_ptr + cloud).to(tl.float32) * 2.0 / M * error
    tl.store(dpred_ptr + i, dpred.to(dpred_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _ancestral_step_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, eps_ptr, coef_x_ptr, coef_eps_ptr, rho_ptr, key_ptr, out_ptr, M, chunks, BLOCK: tl.constexpr
):
    cloud, first, i, mask = _locate(M, chunks, BLOCK)
    coef_x = tl.load(coef_x_ptr + cloud).to(tl.float32)
    coef_eps = tl.load(coef_eps_ptr + cloud).to(tl.float32)
    rho = tl.load(rho_ptr + cloud).to(tl.float32)
    mean = coef_x * _load(x_ptr, i, mask) - coef_eps * _load(eps_ptr, i, mask)
    out = mean + rho * noise_block(key_ptr, first, 0, BLOCK)
    tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _ancestral_step_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, coef_x_ptr, coef_eps_ptr, dx_ptr, deps_ptr, M, chunks, BLOCK: tl.constexpr
):
    cloud, _, i, mask = _locate(M, chunks, BLOCK)
    grad = _load(grad_ptr, i, mask)
    dx = tl.load(coef_x_ptr + cloud).to(tl.float32) * grad
    deps = -tl.load(coef_eps_ptr + cloud).to(tl.float32) * grad
    tl.store(dx_ptr + i, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(deps_ptr + i, deps.to(deps_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gaussian_kl_fwd_kernel(mu_ptr, log_sigma_ptr, partial_ptr, M, chunks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    _, _, i, mask = _locate(M, chunks, BLOCK)
    mu = _load(mu_ptr, i, mask)
    log_sigma = _load(log_sigma_ptr, i, mask)  # zeros beyond the cloud have a KL of zero
    tl.store(
        partial_ptr + tl.program_id(0),
        tl.sum(0.5 * (mu * mu + tl.exp(2.0 * log_sigma) - 1.0) - log_sigma),
    )


@triton.jit
def _gaussian_kl_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, mu_ptr, log_sigma_ptr, dmu_ptr, dlog_sigma_ptr, M, chunks, BLOCK: tl.constexpr
):
    cloud, _, i, mask = _locate(M, chunks, BLOCK)
    grad = tl.load(grad_ptr + cloud).to(tl.float32)
    dmu = grad * _load(mu_ptr, i, mask)
    dlog_sigma = grad * (tl.exp(2.0 * _load(log_sigma_ptr, i, mask)) - 1.0)
    tl.store(dmu_ptr + i, dmu.to(dmu_ptr.dtype.element_ty), mask=mask)
    tl.store(dlog_sigma_ptr + i, dlog_sigma.to(dlog_sigma_ptr.dtype.element_ty), mask=mask)


# Launching and registration


def _config(x: Tensor) -> tuple[int, int, int, int]:
    """Elements per cloud, programs per cloud, noise counters per program, warps."""
    M = prod(x.shape[1:])
    block, warps = next((block, warps) for most, block, warps in _LAUNCH if most >= M)
    # A cloud that starts inside a counter may reach three elements further.
    chunks = triton.cdiv(M if M % 4 == 0 else M + 3, 4 * block)
    return M, chunks, block, warps


def _launch(kernel: Any, x: Tensor, *tensors: Tensor | None) -> None:
    M, chunks, block, warps = _config(x)
    dense = [None if t is None else t.contiguous() for t in tensors]
    launch(kernel, (x.shape[0] * chunks,), *dense, M, chunks, BLOCK=block, num_warps=warps)


def _partials(x: Tensor, count: int) -> Tensor:
    """Room for ``count`` sums of every program; ``.sum(1)`` adds a cloud's in a fixed order."""
    return x.new_empty((x.shape[0], _config(x)[1], count), dtype=torch.float32)


def _like(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _sums_like(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[:1], dtype=sums_dtype(x))


# q_sample and posterior_q_sample


@op(fake=_like)
def _q_sample_op(x_0: Tensor, log_sigma: Tensor | None, alpha: Tensor, sigma: Tensor, key: Tensor) -> Tensor:
    out = _like(x_0)
    _launch(_q_sample_fwd_kernel, x_0, x_0, log_sigma, alpha, sigma, key, out)
    return out


def _empty_q_sample_gradients(
    grad: Tensor, x_0: Tensor, log_sigma: Tensor | None, alpha: Tensor, key: Tensor, scalars: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _like(x_0),
        x_0.new_empty(0) if log_sigma is None else _like(log_sigma),
        alpha.new_empty((alpha.shape[0] if scalars else 0, 2), dtype=torch.float32),
    )


@op(fake=_empty_q_sample_gradients)
def _q_sample_bwd_op(
    grad: Tensor, x_0: Tensor, log_sigma: Tensor | None, alpha: Tensor, key: Tensor, scalars: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx_0, dlog_sigma (empty without ``log_sigma``), [dalpha, dsigma] (B, 2) (empty unless ``scalars``)."""
    dx, dlog_sigma, dscalars = _empty_q_sample_gradients(grad, x_0, log_sigma, alpha, key, scalars)
    given = None if log_sigma is None else dlog_sigma
    partials = _partials(x_0, 2) if scalars else None
    _launch(_q_sample_bwd_kernel, x_0, grad, x_0, log_sigma, alpha, key, dx, given, partials)
    return dx, dlog_sigma, dscalars if partials is None else partials.sum(1)


@gradient(_q_sample_op, save=lambda x_0, log_sigma, alpha, sigma, key, out: (x_0, log_sigma, alpha, key))
def _q_sample_backward(
    needs: Needs, grad: Tensor, x_0: Tensor, log_sigma: Tensor | None, alpha: Tensor, key: Tensor
) -> Gradients:
    scalars = needs[2] or needs[3]
    dx, dlog_sigma, dscalars = _q_sample_bwd_op(grad, x_0, log_sigma, alpha, key, scalars)
    return dx, None if log_sigma is None else dlog_sigma, *(dscalars.unbind(1) if scalars else ())


# noise_mse, without its weight, which autograd handles


@op(fake=_sums_like)
def _noise_mse_op(pred: Tensor, key: Tensor) -> Tensor:
    partials = _partials(pred, 1)
    _launch(_noise_mse_fwd_kernel, pred, pred, key, partials)
    return partials.sum((1, 2)).to(sums_dtype(pred))


@op(fake=lambda grad, pred, key: _like(pred))
def _noise_mse_bwd_op(grad: Tensor, pred: Tensor, key: Tensor) -> Tensor:
    dpred = _like(pred)
    _launch(_noise_mse_bwd_kernel, pred, grad, pred, key, dpred)
    return dpred


@gradient(_noise_mse_op, save=lambda pred, key, out: (pred, key))
def _noise_mse_backward(needs: Needs, grad: Tensor, pred: Tensor, key: Tensor) -> Gradients:
    return (_noise_mse_bwd_op(grad, pred, key),)


# ancestral_step, whose backward needs no noise


@op(fake=_like)
def _ancestral_step_op(x_t: Tensor, eps: Tensor, coef_x: Tensor, coef_eps: Tensor, rho: Tensor, key: Tensor) -> Tensor:
    out = _like(x_t)
    _launch(_ancestral_step_fwd_kernel, x_t, x_t, eps, coef_x, coef_eps, rho, key, out)
    return out


@op(fake=lambda grad, coef_x, coef_eps, eps_dtype: (_like(grad), grad.new_empty(grad.shape, dtype=eps_dtype)))
def _ancestral_step_bwd_op(
    grad: Tensor, coef_x: Tensor, coef_eps: Tensor, eps_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    dx_t, deps = _like(grad), grad.new_empty(grad.shape, dtype=eps_dtype)
    _launch(_ancestral_step_bwd_kernel, grad, grad, coef_x, coef_eps, dx_t, deps)
    return dx_t, deps


@gradient(_ancestral_step_op, save=lambda x_t, eps, coef_x, coef_eps, rho, key, out: (coef_x, coef_eps, eps.dtype))
def _ancestral_step_backward(
    needs: Needs, grad: Tensor, coef_x: Tensor, coef_eps: Tensor, eps_dtype: torch.dtype
) -> Gradients:
    return _ancestral_step_bwd_op(grad, coef_x, coef_eps, eps_dtype)


# gaussian_kl


@op(fake=_sums_like)
def _gaussian_kl_op(mu: Tensor, log_sigma: Tensor) -> Tensor:
    partials = _partials(mu, 1)
    _launch(_gaussian_kl_fwd_kernel, mu, mu, log_sigma, partials)
    return partials.sum((1, 2)).to(sums_dtype(mu))


@op(fake=lambda grad, mu, log_sigma: (_like(mu), _like(log_sigma)))
def _gaussian_kl_bwd_op(grad: Tensor, mu: Tensor, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
    dmu, dlog_sigma = _like(mu), _like(log_sigma)
    _launch(_gaussian_kl_bwd_kernel, mu, grad, mu, log_sigma, dmu, dlog_sigma)
    return dmu, dlog_sigma


@gradient(_gaussian_kl_op, save=lambda mu, log_sigma, out: (mu, log_sigma))
def _gaussian_kl_backward(needs: Needs, grad: Tensor, mu: Tensor, log_sigma: Tensor) -> Gradients:
    return _gaussian_kl_bwd_op(grad, mu, log_sigma)


# Public functions


def _check_batch(name: str, x: Tensor) -> None:
    check_float(name, x)
    if x.ndim == 0 or 0 in x.shape[1:]:
        raise ValueError(f"{name}: expected shape (B, ...) with at least one element a cloud, got {tuple(x.shape)}")


def _check_like(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    check_float(name, x)
    if x.shape != like.shape:
        raise ValueError(f"{name}: expected the shape of {like_name} {tuple(like.shape)}, got {tuple(x.shape)}")
    check_same(**{like_name: like, name: x})


def _check_scalars(like_name: str, like: Tensor, **scalars: Tensor) -> None:
    for name, x in scalars.items():
        check_float(name, x)
        if x.shape != like.shape[:1]:
            raise ValueError(f"{name}: expected one value per cloud, shape ({len(like)},), got {tuple(x.shape)}")
        check_same(**{like_name: like, name: x})


def q_sample(
    x_0: Float[Tensor, "B ..."],
    alpha: Float[Tensor, " B"],
    sigma: Float[Tensor, " B"],
    key: Int64[Tensor, " 2"],
    *,
    impl: Impl = "auto",
) -> Float[Tensor, "B ..."]:
    """Diffuse ``x_0``: ``alpha x_0 + sigma noise`` with ``noise = normal_noise(x_0.shape, key)``.

    Ho et al. 2020, equation 4, with alpha = sqrt(abar_t) and sigma = sqrt(1 - abar_t).

    Args:
        x_0: clean batch, any shape behind B. alpha, sigma: one value per cloud. key: see ``normal_noise``.
        impl: "auto" (Triton on a GPU, the reference elsewhere), "triton" or "reference".

    Returns:
        x_t, shape and dtype of ``x_0``. Differentiable in ``x_0``, ``alpha``, ``sigma`` (once, by Triton).
        Deterministic, gradients too. Triton computes float64 input in float32.

    Raises:
        ValueError: clouds without elements; ``alpha``, ``sigma`` or ``key`` of another shape, dtype or device.
    """
    _check_batch("x_0", x_0)
    _check_scalars("x_0", x_0, alpha=alpha, sigma=sigma)
    check_key(key, x_0)
    if not use_triton(impl, x_0):
        return q_sample_reference(x_0, alpha, sigma, key)
    return _q_sample_op(x_0, None, alpha, sigma, key)


def posterior_q_sample(
    mu: Float[Tensor, "B ..."],
    log_sigma: Float[Tensor, "B ..."],
    alpha: Float[Tensor, " B"],
    sigma: Float[Tensor, " B"],
    key: Int64[Tensor, " 2"],
    *,
    impl: Impl = "auto",
) -> Float[Tensor, "B ..."]:
    """Sample a latent from N(mu, exp(log_sigma)^2) and diffuse it, in one pass.

    ``alpha (mu + exp(log_sigma) noise_1) + sigma noise``: ``noise`` is ``normal_noise(mu.shape, key)``, the
    target that ``noise_mse(pred, key)`` compares with; ``noise_1`` is an independent draw from the same key.

    Args:
        mu, log_sigma: mean and log standard deviation, one shape. alpha, sigma: one value per cloud.
        key: see ``normal_noise``. impl: as for ``q_sample``.

    Returns:
        x_t, shape and dtype of ``mu``. Differentiable in all four floating inputs (once, by Triton).
        Deterministic, gradients too. Triton computes float64 input in float32.

    Raises:
        ValueError: clouds without elements; another argument of another shape, dtype or device.
    """
    _check_batch("mu", mu)
    _check_like("log_sigma", log_sigma, "mu", mu)
    _check_scalars("mu", mu, alpha=alpha, sigma=sigma)
    check_key(key, mu)
    if not use_triton(impl, mu):
        return posterior_q_sample_reference(mu, log_sigma, alpha, sigma, key)
    return _q_sample_op(mu, log_sigma, alpha, sigma, key)


def noise_mse(
    pred: Float[Tensor, "B ..."],
    key: Int64[Tensor, " 2"],
    weight: Float[Tensor, " B"] | None = None,
    *,
    impl: Impl = "auto",
) -> Float[Tensor, " B"]:
    """Denoising loss: ``weight`` times the mean over a cloud's elements of ``(noise - pred)^2``.

    ``noise = normal_noise(pred.shape, key)``: pass the key that made x_t. Ho et al. 2020, equation 14
    (``weight=None``, which is 1) and equation 12 (the variational weight).

    Args:
        pred: predicted noise, any shape behind B. weight: w(t), one value per cloud.
        key: see ``normal_noise``. impl: as for ``q_sample``.

    Returns:
        (B,) float32 (float64 for float64 ``pred``). Differentiable in ``pred`` (once, by Triton) and
        ``weight``. Deterministic, gradients too. Triton computes float64 input in float32.

    Raises:
        ValueError: clouds without elements; ``weight`` or ``key`` of another shape, dtype or device.
    """
    _check_batch("pred", pred)
    if weight is not None:
        _check_scalars("pred", pred, weight=weight)
    check_key(key, pred)
    if not use_triton(impl, pred):
        return noise_mse_reference(pred, key, weight)
    mse = _noise_mse_op(pred, key)
    return mse if weight is None else weight.to(mse.dtype) * mse


def ancestral_step(
    x_t: Float[Tensor, "B ..."],
    eps: Float[Tensor, "B ..."],
    coef_x: Float[Tensor, " B"],
    coef_eps: Float[Tensor, " B"],
    rho: Float[Tensor, " B"],
    key: Int64[Tensor, " 2"],
    *,
    impl: Impl = "auto",
) -> Float[Tensor, "B ..."]:
    """One step of a sampler: ``coef_x x_t - coef_eps eps + rho noise``.

    Ho et al. 2020, algorithm 2, with coef_x = 1 / sqrt(1 - beta_t), coef_eps = coef_x beta_t / sigma_t and
    rho = 0 at the last step; DDIM is the same step with other coefficients.

    Args:
        x_t, eps: state and predicted noise, one shape; their dtypes may differ.
        coef_x, coef_eps, rho: one value per cloud. key: see ``normal_noise``; a new one for every step.
        impl: as for ``q_sample``.

    Returns:
        x_{t-1}, shape and dtype of ``x_t``. Differentiable in ``x_t`` and ``eps``; the coefficients are
        constants and get no gradient. Deterministic. Triton computes float64 input in float32.

    Raises:
        ValueError: clouds without elements; another argument of another shape, dtype or device.
    """
    _check_batch("x_t", x_t)
    _check_like("eps", eps, "x_t", x_t)
    _check_scalars("x_t", x_t, coef_x=coef_x, coef_eps=coef_eps, rho=rho)
    check_key(key, x_t)
    step = _ancestral_step_op if use_triton(impl, x_t) else ancestral_step_reference
    return step(x_t, eps, coef_x.detach(), coef_eps.detach(), rho.detach(), key)


def gaussian_kl(
    mu: Float[Tensor, "B ..."], log_sigma: Float[Tensor, "B ..."], *, impl: Impl = "auto"
) -> Float[Tensor, " B"]:
    """KL divergence from N(mu, exp(log_sigma)^2) to N(0, I) in nats, summed over a cloud's elements.

    Args:
        mu, log_sigma: mean and log standard deviation, one shape. impl: as for ``q_sample``.

    Returns:
        (B,) float32 (float64 for float64 ``mu``). Differentiable in both (once, by Triton). Deterministic,
        gradients too. Triton computes float64 input in float32.

    Raises:
        ValueError: clouds without elements; ``log_sigma`` of another shape, dtype or device.
    """
    _check_batch("mu", mu)
    _check_like("log_sigma", log_sigma, "mu", mu)
    if not use_triton(impl, mu):
        return gaussian_kl_reference(mu, log_sigma)
    return _gaussian_kl_op(mu, log_sigma)
