"""Noising, and the step back: each one pass over memory, the noise is made where it is used.

Legend: B clouds, M elements per cloud (whatever the shape behind B), b a cloud, i an element. ``noise`` is
``normal_noise(shape, key)`` and ``noise_1`` an independent draw from the same key (stream 1 of ``noise.py``).

    q_sample            x_t = alpha_b x_0 + sigma_b noise                       Ho et al. 2020, eq. 4
    posterior_q_sample  x_t = alpha_b (mu + exp(log_sigma) noise_1) + sigma_b noise
    ancestral_step      coef_x_b x_t - coef_eps_b eps + rho_b noise             ibid., algorithm 2

Backward, with g the incoming gradient:

    q_sample            dx_0 = alpha g, dalpha_b = sum_i g x_0, dsigma_b = sum_i g noise; the same for
                        posterior_q_sample, with x_0 its latent, dmu = dx_0,
                        dlog_sigma = dx_0 exp(log_sigma) noise_1
    ancestral_step      dx_t = coef_x g, deps = -coef_eps g

No op stores its noise; backward makes it again from the key. Arithmetic is float32 whatever the input, with one
rounding on store; in the references float64 for float64 input, but their noise is float32 always.

Cost per element, of s bytes: memory traffic, and instructions per lane in float32 (sm_90 machine code;
44 of them for each noise, so that on paper the instructions and not the bytes are the floor in bfloat16):

                            forward               backward
    q_sample                2 s,   55             2 s,   11    (3 s,  64 with gradients of alpha and sigma)
    posterior_q_sample      3 s,  100             4 s,   62    (5 s, 115)
    ancestral_step          3 s,   57             3 s,   13
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lion_triton.kernels._checks import Impl, upcast, use_triton
from lion_triton.kernels._elements import (
    check_batch,
    check_like,
    check_scalars,
    empty_like,
    empty_partials,
    launch_elements,
    load,
    locate,
)
from lion_triton.kernels._op import Gradients, Needs, gradient, op
from lion_triton.kernels._triton import tl, triton
from lion_triton.kernels.noise import Key, check_key, first_sample, full_key, noise_block, normal_noise_reference

# q_sample and posterior_q_sample


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


@triton.jit
def _q_sample_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, log_sigma_ptr, alpha_ptr, sigma_ptr, key_ptr, out_ptr, M, chunks, BLOCK: tl.constexpr
):
    cloud, first, i, mask = locate(first_sample(key_ptr), M, chunks, BLOCK)
    x = load(x_ptr, i, mask)
    if log_sigma_ptr is not None:
        x += tl.exp(load(log_sigma_ptr, i, mask)) * noise_block(key_ptr, first, 1, BLOCK)
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
    cloud, first, i, mask = locate(first_sample(key_ptr), M, chunks, BLOCK)
    grad = load(grad_ptr, i, mask)
    dx = tl.load(alpha_ptr + cloud).to(tl.float32) * grad
    tl.store(dx_ptr + i, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if log_sigma_ptr is not None:
        spread = tl.exp(load(log_sigma_ptr, i, mask)) * noise_block(key_ptr, first, 1, BLOCK)
        tl.store(dlog_sigma_ptr + i, (dx * spread).to(dlog_sigma_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        x = load(x_ptr, i, mask)
        if log_sigma_ptr is not None:
            x += spread
        pid = tl.program_id(0)
        tl.store(partial_ptr + 2 * pid, tl.sum(grad * x))
        tl.store(partial_ptr + 2 * pid + 1, tl.sum(grad * noise_block(key_ptr, first, 0, BLOCK)))


@op(fake=empty_like)
def _q_sample_op(x_0: Tensor, log_sigma: Tensor | None, alpha: Tensor, sigma: Tensor, key: Tensor) -> Tensor:
    out = empty_like(x_0)
    launch_elements(_q_sample_fwd_kernel, x_0, x_0, log_sigma, alpha, sigma, full_key(key), out)
    return out


def _empty_q_sample_gradients(
    grad: Tensor, x_0: Tensor, log_sigma: Tensor | None, alpha: Tensor, key: Tensor, scalars: bool
) -> list[Tensor]:
    likes = [x_0] if log_sigma is None else [x_0, log_sigma]
    sums = [alpha.new_empty((alpha.shape[0], 2), dtype=torch.float32)] if scalars else []
    return [*map(empty_like, likes), *sums]


@op(fake=_empty_q_sample_gradients)
def _q_sample_bwd_op(
    grad: Tensor, x_0: Tensor, log_sigma: Tensor | None, alpha: Tensor, key: Tensor, scalars: bool
) -> list[Tensor]:
    """dx_0, dlog_sigma if there is a ``log_sigma``, and [dalpha, dsigma] (B, 2) if ``scalars``."""
    dx, dlog_sigma = empty_like(x_0), None if log_sigma is None else empty_like(log_sigma)
    partials = empty_partials(x_0, 2) if scalars else None
    launch_elements(_q_sample_bwd_kernel, x_0, grad, x_0, log_sigma, alpha, full_key(key), dx, dlog_sigma, partials)
    found = (dx, dlog_sigma, None if partials is None else partials.sum(1))
    return [x for x in found if x is not None]


@gradient(_q_sample_op, save=lambda x_0, log_sigma, alpha, sigma, key, out: (x_0, log_sigma, alpha, key))
def _q_sample_backward(
    needs: Needs, grad: Tensor, x_0: Tensor, log_sigma: Tensor | None, alpha: Tensor, key: Tensor
) -> Gradients:
    scalars = needs[2] or needs[3]
    dx, *others = _q_sample_bwd_op(grad, x_0, log_sigma, alpha, key, scalars)
    dlog_sigma = None if log_sigma is None else others[0]
    return dx, dlog_sigma, *(others[-1].unbind(1) if scalars else ())


def q_sample(
    x_0: Float[Tensor, "B ..."],
    alpha: Float[Tensor, " B"],
    sigma: Float[Tensor, " B"],
    key: Key,
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
    check_batch("x_0", x_0)
    check_scalars("x_0", x_0, alpha=alpha, sigma=sigma)
    check_key(key, x_0)
    if not use_triton(impl, x_0):
        return q_sample_reference(x_0, alpha, sigma, key)
    return _q_sample_op(x_0, None, alpha, sigma, key)


def posterior_q_sample(
    mu: Float[Tensor, "B ..."],
    log_sigma: Float[Tensor, "B ..."],
    alpha: Float[Tensor, " B"],
    sigma: Float[Tensor, " B"],
    key: Key,
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
    check_batch("mu", mu)
    check_like("log_sigma", log_sigma, "mu", mu)
    check_scalars("mu", mu, alpha=alpha, sigma=sigma)
    check_key(key, mu)
    if not use_triton(impl, mu):
        return posterior_q_sample_reference(mu, log_sigma, alpha, sigma, key)
    return _q_sample_op(mu, log_sigma, alpha, sigma, key)


# ancestral_step, whose backward needs no noise


def ancestral_step_reference(
    x_t: Tensor, eps: Tensor, coef_x: Tensor, coef_eps: Tensor, rho: Tensor, key: Tensor
) -> Tensor:
    """Specification of ``ancestral_step``; differentiable in every floating input."""
    x = upcast(x_t)
    noise = normal_noise_reference(x.shape, key).to(x.dtype)
    mean = _per_cloud(coef_x, x) * x - _per_cloud(coef_eps, x) * eps.to(x.dtype)
    return (mean + _per_cloud(rho, x) * noise).to(x_t.dtype)


@triton.jit
def _ancestral_step_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, eps_ptr, coef_x_ptr, coef_eps_ptr, rho_ptr, key_ptr, out_ptr, M, chunks, BLOCK: tl.constexpr
):
    cloud, first, i, mask = locate(first_sample(key_ptr), M, chunks, BLOCK)
    coef_x = tl.load(coef_x_ptr + cloud).to(tl.float32)
    coef_eps = tl.load(coef_eps_ptr + cloud).to(tl.float32)
    rho = tl.load(rho_ptr + cloud).to(tl.float32)
    mean = coef_x * load(x_ptr, i, mask) - coef_eps * load(eps_ptr, i, mask)
    out = mean + rho * noise_block(key_ptr, first, 0, BLOCK)
    tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _ancestral_step_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, coef_x_ptr, coef_eps_ptr, dx_ptr, deps_ptr, M, chunks, BLOCK: tl.constexpr
):
    cloud, _, i, mask = locate(0, M, chunks, BLOCK)
    grad = load(grad_ptr, i, mask)
    dx = tl.load(coef_x_ptr + cloud).to(tl.float32) * grad
    deps = -tl.load(coef_eps_ptr + cloud).to(tl.float32) * grad
    tl.store(dx_ptr + i, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(deps_ptr + i, deps.to(deps_ptr.dtype.element_ty), mask=mask)


@op(fake=empty_like)
def _ancestral_step_op(x_t: Tensor, eps: Tensor, coef_x: Tensor, coef_eps: Tensor, rho: Tensor, key: Tensor) -> Tensor:
    out = empty_like(x_t)
    launch_elements(_ancestral_step_fwd_kernel, x_t, x_t, eps, coef_x, coef_eps, rho, full_key(key), out)
    return out


@op(fake=lambda grad, coef_x, coef_eps, eps_dtype: (empty_like(grad), grad.new_empty(grad.shape, dtype=eps_dtype)))
def _ancestral_step_bwd_op(
    grad: Tensor, coef_x: Tensor, coef_eps: Tensor, eps_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    dx_t, deps = empty_like(grad), grad.new_empty(grad.shape, dtype=eps_dtype)
    launch_elements(_ancestral_step_bwd_kernel, grad, grad, coef_x, coef_eps, dx_t, deps)
    return dx_t, deps


@gradient(_ancestral_step_op, save=lambda x_t, eps, coef_x, coef_eps, rho, key, out: (coef_x, coef_eps, eps.dtype))
def _ancestral_step_backward(
    needs: Needs, grad: Tensor, coef_x: Tensor, coef_eps: Tensor, eps_dtype: torch.dtype
) -> Gradients:
    return _ancestral_step_bwd_op(grad, coef_x, coef_eps, eps_dtype)


def ancestral_step(
    x_t: Float[Tensor, "B ..."],
    eps: Float[Tensor, "B ..."],
    coef_x: Float[Tensor, " B"],
    coef_eps: Float[Tensor, " B"],
    rho: Float[Tensor, " B"],
    key: Key,
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
    check_batch("x_t", x_t)
    check_like("eps", eps, "x_t", x_t)
    check_scalars("x_t", x_t, coef_x=coef_x, coef_eps=coef_eps, rho=rho)
    check_key(key, x_t)
    step = _ancestral_step_op if use_triton(impl, x_t) else ancestral_step_reference
    return step(x_t, eps, coef_x.detach(), coef_eps.detach(), rho.detach(), key)
