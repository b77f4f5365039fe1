"""The losses of diffusion, each one pass over memory: noise is made where it is used.

Legend: B clouds, M elements per cloud (whatever the shape behind B), b a cloud, i an element; ``noise`` is
``normal_noise(shape, key)``; g is the incoming gradient.

    noise_mse     weight_b mean_i (noise - pred)^2                        Ho et al. 2020, eqs. 14 and 12
                  dpred = 2 weight_b g_b / M (pred - noise), dweight_b = g_b mean_i (noise - pred)^2
    gaussian_kl   sum_i (mu^2 + exp(2 log_sigma) - 1) / 2 - log_sigma     KL(N(mu, sigma^2) || N(0, 1))
                  dmu = g_b mu, dlog_sigma = g_b (exp(2 log_sigma) - 1)

Nothing but the results is stored; backward makes the noise again from the key. Arithmetic is float32 whatever the
input, with one rounding on store; in the references float64 for float64 input, but their noise is float32 always.

Cost per element, of s bytes: memory traffic, and instructions per lane in float32 (sm_90 machine code; 44 of them for
the noise):

                   forward       backward
    noise_mse        s,  59      2 s,  54
    gaussian_kl    2 s,  24      4 s,  21
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from lion_triton.kernels._checks import Impl, sums_dtype, upcast, use_triton
from lion_triton.kernels._elements import (
    check_batch,
    check_like,
    check_scalars,
    empty_like,
    empty_partials,
    empty_sums,
    launch_elements,
    load,
    locate,
)
from lion_triton.kernels._op import Gradients, Needs, gradient, op
from lion_triton.kernels._triton import tl, triton
from lion_triton.kernels.noise import Key, check_key, first_sample, full_key, noise_block, normal_noise_reference

# noise_mse: its op is without the weight, which autograd handles


def noise_mse_reference(pred: Tensor, key: Tensor, weight: Tensor | None = None) -> Tensor:
    """Specification of ``noise_mse``; differentiable in ``pred`` and ``weight``."""
    x = upcast(pred)
    mse = (normal_noise_reference(x.shape, key).to(x.dtype) - x).square().unsqueeze(1).flatten(1).mean(1)
    return mse if weight is None else weight.to(mse.dtype) * mse


@triton.jit
def _noise_mse_fwd_kernel(pred_ptr, key_ptr, partial_ptr, M, chunks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    _, first, i, mask = locate(first_sample(key_ptr), M, chunks, BLOCK)
    error = tl.where(mask, noise_block(key_ptr, first, 0, BLOCK) - load(pred_ptr, i, mask), 0.0)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(error * error) / M)


@triton.jit
def _noise_mse_bwd_kernel(grad_ptr, pred_ptr, key_ptr, dpred_ptr, M, chunks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    cloud, first, i, mask = locate(first_sample(key_ptr), M, chunks, BLOCK)
    error = load(pred_ptr, i, mask) - noise_block(key_ptr, first, 0, BLOCK)
    dpred = tl.load(grad_ptr + cloud).to(tl.float32) * 2.0 / M * error
    tl.store(dpred_ptr + i, dpred.to(dpred_ptr.dtype.element_ty), mask=mask)


@op(fake=empty_sums)
def _noise_mse_op(pred: Tensor, key: Tensor) -> Tensor:
    partials = empty_partials(pred)
    launch_elements(_noise_mse_fwd_kernel, pred, pred, full_key(key), partials)
    return partials.sum(1).to(sums_dtype(pred))


@op(fake=lambda grad, pred, key: empty_like(pred))
def _noise_mse_bwd_op(grad: Tensor, pred: Tensor, key: Tensor) -> Tensor:
    dpred = empty_like(pred)
    launch_elements(_noise_mse_bwd_kernel, pred, grad, pred, full_key(key), dpred)
    return dpred


@gradient(_noise_mse_op, save=lambda pred, key, out: (pred, key))
def _noise_mse_backward(needs: Needs, grad: Tensor, pred: Tensor, key: Tensor) -> Gradients:
    return (_noise_mse_bwd_op(grad, pred, key),)


def noise_mse(
    pred: Float[Tensor, "B ..."],
    key: Key,
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
    check_batch("pred", pred)
    if weight is not None:
        check_scalars("pred", pred, weight=weight)
    check_key(key, pred)
    if not use_triton(impl, pred):
        return noise_mse_reference(pred, key, weight)
    mse = _noise_mse_op(pred, key)
    return mse if weight is None else weight.to(mse.dtype) * mse


# gaussian_kl


def gaussian_kl_reference(mu: Tensor, log_sigma: Tensor) -> Tensor:
    """Specification of ``gaussian_kl``; differentiable in both inputs."""
    m = upcast(mu)
    s = log_sigma.to(m.dtype)
    return (0.5 * (m * m + (2.0 * s).exp() - 1.0) - s).unsqueeze(1).flatten(1).sum(1)


@triton.jit
def _gaussian_kl_fwd_kernel(mu_ptr, log_sigma_ptr, partial_ptr, M, chunks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    _, _, i, mask = locate(0, M, chunks, BLOCK)
    mu = load(mu_ptr, i, mask)
    log_sigma = load(log_sigma_ptr, i, mask)  # zeros beyond the cloud have a KL of zero
    tl.store(
        partial_ptr + tl.program_id(0),
        tl.sum(0.5 * (mu * mu + tl.exp(2.0 * log_sigma) - 1.0) - log_sigma),
    )


@triton.jit
def _gaussian_kl_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, mu_ptr, log_sigma_ptr, dmu_ptr, dlog_sigma_ptr, M, chunks, BLOCK: tl.constexpr
):
    cloud, _, i, mask = locate(0, M, chunks, BLOCK)
    grad = tl.load(grad_ptr + cloud).to(tl.float32)
    dmu = grad * load(mu_ptr, i, mask)
    dlog_sigma = grad * (tl.exp(2.0 * load(log_sigma_ptr, i, mask)) - 1.0)
    tl.store(dmu_ptr + i, dmu.to(dmu_ptr.dtype.element_ty), mask=mask)
    tl.store(dlog_sigma_ptr + i, dlog_sigma.to(dlog_sigma_ptr.dtype.element_ty), mask=mask)


@op(fake=empty_sums)
def _gaussian_kl_op(mu: Tensor, log_sigma: Tensor) -> Tensor:
    partials = empty_partials(mu)
    launch_elements(_gaussian_kl_fwd_kernel, mu, mu, log_sigma, partials)
    return partials.sum(1).to(sums_dtype(mu))


@op(fake=lambda grad, mu, log_sigma: (empty_like(mu), empty_like(log_sigma)))
def _gaussian_kl_bwd_op(grad: Tensor, mu: Tensor, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
    dmu, dlog_sigma = empty_like(mu), empty_like(log_sigma)
    launch_elements(_gaussian_kl_bwd_kernel, mu, grad, mu, log_sigma, dmu, dlog_sigma)
    return dmu, dlog_sigma


@gradient(_gaussian_kl_op, save=lambda mu, log_sigma, out: (mu, log_sigma))
def _gaussian_kl_backward(needs: Needs, grad: Tensor, mu: Tensor, log_sigma: Tensor) -> Gradients:
    return _gaussian_kl_bwd_op(grad, mu, log_sigma)


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
    check_batch("mu", mu)
    check_like("log_sigma", log_sigma, "mu", mu)
    if not use_triton(impl, mu):
        return gaussian_kl_reference(mu, log_sigma)
    return _gaussian_kl_op(mu, log_sigma)
