"""Adaptive group norm, channels last: offset, group norm, a style's scale and shift, SiLU, dropout, in one op.

Forward, per cloud and with the statistics of a group over its n = P C / G elements:

    u    = x + offset
    xhat = (u - mean) rstd,   mean = sum u / n,   rstd = (sum (u - mean)^2 / n + eps)^(-1/2)
    z    = scale xhat + shift
    y    = drop(silu(z))   or   drop(z)

The offset is what a linear map before the norm would add, its bias or more: taken here it costs no pass of its own.
A group norm's own weight and bias are folded into scale and shift: ``weight scale`` and ``bias scale + shift``.

Backward, with dz the gradient of z, s1 = sum_P dz and s2 = sum_P dz xhat per cloud and channel:

    dscale  = s2,   dshift = s1
    dx      = rstd (scale dz - m1 - xhat m2),   m_i = group sum of scale s_i, over n
    doffset = sum_P dx = rstd (scale s1 - P m1 - m2 sum_P xhat)

Legend: B clouds, P positions (all dimensions between the first and the last), C channels, G groups.
The variance is biased and two-pass, never E[x^2] - E[x]^2: that form, which torch's own channels-last group
norm uses on a CPU, loses all digits once the mean is a few thousand standard deviations.
Statistics and arithmetic are float32 (float64 in the reference of float64 x). Deterministic, backward too.
Dropout's mask is that of ``dropout.py``: made from a key, never stored, made again in the backward.

By Triton, x and y of s bytes an element. Where a cloud's groups fit into a program, one launch forward (2 s B P C
bytes, all from one read) and one backward (3 s B P C). Else forward 3 s B P C bytes in two launches (statistics, then
the rest), or 2 s B P C where whatever made x has its moments; backward 5 s B P C bytes in three launches (sums, their
sums over chunks, dx). There a program has one chunk of a cloud's rows. It keeps one running mean and squared deviation
(Welford) per place in its block, so that its loop needs no reduction; those, and then the chunks', are combined by
Chan, Golub and LeVeque's formula, each in a fixed order.
Source: Wu and He, "Group Normalization", ECCV 2018, eq. 1 to 7, with LION's style modulation.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lion_triton.kernels import _adagn_kernels as kernels
from lion_triton.kernels._checks import Impl, check_float, check_groups, check_shape, use_triton
from lion_triton.kernels._groups import (
    RowChunks,
    as_dtype_of,
    at_once,
    bundle_of_groups,
    center_groups,
    cloud_buffers,
    group_mean,
    per_cloud,
)
from lion_triton.kernels._op import Gradients, Needs, gradient, op
from lion_triton.kernels._triton import launch, triton
from lion_triton.kernels.dropout import keep_mask_reference, keep_threshold
from lion_triton.kernels.noise import Key, check_key, full_key

Activation = Literal["silu"] | None

# Chosen by machine code (128-bit accesses, no spill), not by timing: bytes of x per thread and step of a program's
# loop, forward; elements, backward, where x and dy are loaded.
_BYTES_PER_THREAD, _ELEMENTS_PER_THREAD = 32, 8
# Elements that a program of one launch may hold, forward and backward (x and dy).
_HELD, _HELD_BACKWARD, _HELD_WARPS = 16384, 8192, 8
_PARTIALS = 1024  # values that a program combines at once


def adagn_reference(
    x: Float[Tensor, "B *P C"],
    scale: Float[Tensor, "B C"],
    shift: Float[Tensor, "B C"],
    num_groups: int,
    eps: float = 1e-5,
    act: Activation = None,
    *,
    offset: Float[Tensor, "B C"] | None = None,
    dropout: float = 0.0,
    key: Key | None = None,
) -> Float[Tensor, "B *P C"]:
    """Plain PyTorch form of :func:`adagn`, weight and bias already in scale and shift."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    offset = None if offset is None else offset.to(dtype)
    silu, dropout = act == "silu", float(dropout)
    return _adagn_reference_op(x, scale.to(dtype), shift.to(dtype), offset, key, num_groups, eps, silu, dropout)[0]


def adagn(
    x: Float[Tensor, "B *P C"],
    scale: Float[Tensor, "B C"] | None,
    shift: Float[Tensor, "B C"] | None,
    weight: Float[Tensor, " C"] | None,
    bias: Float[Tensor, " C"] | None,
    num_groups: int,
    eps: float = 1e-5,
    act: Activation = None,
    *,
    offset: Float[Tensor, "B C"] | Float[Tensor, " C"] | None = None,
    dropout: float = 0.0,
    key: Key | None = None,
    moments: Float[Tensor, "B parts 2 C"] | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "B *P C"]:
    """``drop(act((group_norm(x + offset) * weight + bias) * scale + shift))`` with group statistics per cloud.

    x: (B, ..., C) with any number of position dimensions, none included; any floating dtype, which is also
        the dtype of the result. Group g is channels g C/G to (g + 1) C/G - 1, over all positions.
    scale, shift: (B, C), the style; both None is plain group norm.
    weight, bias: (C,); both None is a group norm without them. eps is added to the variance. act: "silu" or None.
    offset: (B, C), or (C,) for all clouds: added to x first. None is 0.
    dropout: probability of a zero in the result, the others scaled by 1 / (1 - dropout); 0 is none. Its mask is that
        of :func:`dropout`, from ``key``.
    moments: float32 means and sums of squared deviations of x (without offset) by channel, over parts of P / parts
        positions each, if they are known. Triton then need not read x for them; gradients are the same.
    Differentiable, once, in x, scale, shift, weight, bias, offset. Deterministic, gradients too. Triton computes
    float64 in float32.
    ValueError: shapes, dtypes or devices that do not fit; C not a multiple of num_groups; only one of a pair; an
    unknown act; dropout without a key.
    """
    check_float("x", x)
    if x.ndim < 2 or 0 in x.shape[1:]:
        raise ValueError(f"x: expected a non-empty shape (B, ..., C), got {tuple(x.shape)}")
    B, C = x.shape[0], x.shape[-1]
    num_groups = check_groups(num_groups, C)
    _check_pair(x, (B, C), scale=scale, shift=shift)
    _check_pair(x, (C,), weight=weight, bias=bias)
    if act not in ("silu", None):
        raise ValueError(f'act: expected "silu" or None, got {act!r}')
    if offset is not None:
        check_float("offset", offset)
        check_shape("offset", offset, (C,) if offset.ndim == 1 else (B, C), x)
        offset = offset.expand(B, C)
    keep_threshold(dropout)
    if dropout and key is None:
        raise ValueError("key: expected a noise key for dropout, got None")
    if key is not None:
        check_key(key, x)
    if moments is not None:
        _check_moments(moments, x)
    scale, shift = fold_affine(scale, shift, weight, bias, x)
    if not use_triton(impl, x):
        return adagn_reference(x, scale, shift, num_groups, eps, act, offset=offset, dropout=dropout, key=key)
    silu = act == "silu"
    return _adagn_op(x.contiguous(), scale, shift, offset, key, moments, num_groups, eps, silu, float(dropout))[0]


def fold_affine(
    scale: Tensor | None, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None, x: Tensor
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
    """``weight scale`` and ``bias scale + shift``, what of them there is, in float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    B, C = x.shape[0], x.shape[-1]
    if scale is None or shift is None:
        if weight is None or bias is None:
            return x.new_ones((), dtype=dtype).expand(B, C), x.new_zeros((), dtype=dtype).expand(B, C)
        return weight.to(dtype).expand(B, C), bias.to(dtype).expand(B, C)
    scale, shift = scale.to(dtype), shift.to(dtype)
    if weight is None or bias is None:
        return scale, shift
    return weight.to(dtype) * scale, torch.addcmul(shift, bias.to(dtype), scale)


def _empty_reference(x: Tensor, scale: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *(scale.new_empty(scale.shape) for _ in range(3))


# The references are ops of their own, which walk the batch a few clouds at a time, in buffers that are used again: on
# a CPU fresh pages cost more than arithmetic. Autograd's own backward of the same formulas takes twice as long.


@op(fake=_empty_reference)
def _adagn_reference_op(
    x: Tensor,  # (B, *P, C)
    scale: Tensor,  # (B, C)
    shift: Tensor,  # (B, C)
    offset: Tensor | None,  # (B, C)
    key: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y; per cloud and channel what to subtract from x, by how much its mean differs from the group's, and rstd."""
    X = _positions(x)  # (B, P, C)
    y = X.new_empty(X.shape)
    center, deviation, rstd = (torch.empty_like(scale) for _ in range(3))
    for clouds, (buffer, squares) in cloud_buffers(X, scale.dtype, 2):
        z = y[clouds] if y.dtype == buffer.dtype else buffer
        part = None if offset is None else offset[clouds]
        center[clouds], deviation[clouds], rstd[clouds] = center_groups(X[clouds], part, num_groups, eps, z, squares)
        torch.addcmul(shift[clouds, None], z, (rstd * scale)[clouds, None], out=z)
        if silu:
            F.silu(z, inplace=True)
        if y.dtype != buffer.dtype:
            y[clouds] = z
    if dropout:
        assert key is not None
        y = (y.to(scale.dtype) * _keep(y, dropout, key, scale.dtype)).to(y.dtype)
    return y.view(x.shape), center, deviation, rstd


@op(fake=lambda grad, x, scale, *_: (x.new_empty(x.shape), *(scale.new_empty(scale.shape) for _ in range(3))))
def _adagn_reference_bwd_op(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    key: Tensor | None,
    center: Tensor,
    deviation: Tensor,
    rstd: Tensor,
    num_groups: int,
    silu: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, scale, shift and offset."""
    X, dy = _positions(x), _positions(grad)  # (B, P, C)
    dx, P = torch.empty_like(X), X.shape[1]
    a = rstd * scale
    s1, s2, doffset = (torch.empty_like(scale) for _ in range(3))
    if dropout:
        assert key is not None
        dy = dy.to(scale.dtype) * _keep(dy, dropout, key, scale.dtype)
    for clouds, (centered, buffer, z, product) in cloud_buffers(X, scale.dtype, 4):
        torch.sub(as_dtype_of(centered, X[clouds]), center[clouds, None], out=centered)
        dz = as_dtype_of(buffer, dy[clouds])
        if silu:
            torch.addcmul(shift[clouds, None], centered, a[clouds, None], out=z)
            dz = torch.ops.aten.silu_backward.grad_input(dz, z, grad_input=z)
        s1[clouds] = dz.sum(1)  # (b, C)
        out = dx[clouds] if dx.dtype == z.dtype else product
        s2[clouds] = torch.mul(centered, dz, out=out).sum(1) * rstd[clouds]
        m1 = group_mean((scale * s1)[clouds] / P, num_groups)
        m2 = group_mean((scale * s2)[clouds] / P, num_groups) * rstd[clouds]
        doffset[clouds] = P * rstd[clouds] * (m1 + m2 * deviation[clouds])
        torch.addcmul((-rstd[clouds] * m1)[:, None], dz, a[clouds, None], out=out)
        out.addcmul_(centered, (-rstd[clouds] * m2)[:, None])
        if dx.dtype != z.dtype:
            dx[clouds] = out
    return dx.view(x.shape), s2, s1, a * s1 - doffset


@gradient(
    _adagn_reference_op,
    save=lambda x, scale, shift, offset, key, num_groups, eps, silu, dropout, out: (
        *(x, scale, shift, key),
        *out[1:],
        *(num_groups, silu, dropout),
    ),
)
def _adagn_reference_backward(needs: Needs, grad: Tensor, *saved: Any) -> Gradients:
    dx, dscale, dshift, doffset = _adagn_reference_bwd_op(grad, *saved)
    return dx, dscale, dshift, doffset if needs[3] else None


def _keep(like: Tensor, dropout: float, key: Tensor, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies by."""
    threshold, scale = keep_threshold(dropout)
    return keep_mask_reference(key, like.shape, threshold).to(dtype).mul_(scale)


def _positions(x: Tensor) -> Tensor:
    """(B, ..., C) to (B, P, C)."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def _check_pair(x: Tensor, shape: tuple[int, ...], **pair: Tensor | None) -> None:
    (first, a), (second, b) = pair.items()
    if (a is None) != (b is None):
        given, missing = (second, first) if a is None else (first, second)
        raise ValueError(f"{missing}: expected a tensor because {given} is one, got None")
    if a is not None and b is not None:
        check_shape(first, a, shape, x)
        check_shape(second, b, shape, x)


def _check_moments(moments: Tensor, x: Tensor) -> None:
    check_float("moments", moments)
    (B, *positions, C), parts = x.shape, moments.shape[1] if moments.ndim == 4 else 1
    check_shape("moments", moments, (B, parts, 2, C), x)
    if parts == 0 or math.prod(positions) % parts or moments.dtype != torch.float32:
        raise ValueError(
            f"moments: expected float32 and parts of equal size of {math.prod(positions)} positions, "
            f"got {moments.dtype} and {parts} parts"
        )


# Launching and registration


class _Held:
    """Whole groups of a cloud in one program, if they fit."""

    def __init__(self, x: Tensor, num_groups: int, most: int) -> None:
        self.B, self.P, self.C = len(x), math.prod(x.shape[1:-1]), x.shape[-1]
        channels = bundle_of_groups(x, num_groups)
        cg, groups, width = channels.values()
        rows = triton.next_power_of_2(self.P)
        self.fits = rows * groups * width <= most
        self.sizes = (self.P, self.C, num_groups)
        self.grid = (self.B * triton.cdiv(num_groups, groups),)
        vectors = cg == width and groups * width % 8 == 0 and self.C % 8 == 0
        warps = min(max(rows * groups * width // 512, 1), _HELD_WARPS)
        self.block = {**channels, "ROWS": rows, "VECTORS": vectors, "num_warps": warps}


def _empty_forward(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    offset: Tensor | None,
    key: Tensor | None,
    moments: Tensor | None,
    num_groups: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], 2, num_groups), dtype=torch.float32)


@op(fake=_empty_forward)
def _adagn_op(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    offset: Tensor | None,
    key: Tensor | None,
    moments: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """y, and mean and rstd (B, 2, G)."""
    x = x.contiguous()
    y, stats = _empty_forward(x, scale, shift, offset, key, moments, num_groups)
    style, strides = per_cloud(scale, shift, offset)
    tensors = (x, *style, full_key(key) if key is not None and dropout else None)
    drop = keep_threshold(dropout)
    held = _Held(x, num_groups, _HELD)
    if held.fits:
        sizes = (*strides, eps, *held.sizes, *drop)
        launch(kernels.adagn_held_kernel, held.grid, *tensors, stats, y, *sizes, SILU=silu, **held.block)
        return y, stats
    cut = RowChunks(x, num_groups, _BYTES_PER_THREAD // x.element_size())
    sizes = (*cut.sizes, cut.chunk_rows)
    if moments is None:
        partials = x.new_empty((cut.B, cut.chunks, 2, num_groups), dtype=torch.float32)
        launch(kernels.adagn_stats_kernel, cut.grid, x, style[2], partials, strides[2], *sizes, **cut.rows)
    else:
        partials, parts = None, moments.shape[1]
        launch(
            kernels.adagn_moments_kernel,
            (cut.B,),
            moments.contiguous(),
            style[2],
            stats,
            strides[2],
            eps,
            *cut.sizes[:3],
            parts,
            cut.P // parts,
            CHUNKS=at_once(2 * cut.channels["GROUPS"] * cut.channels["WIDTH"], parts),
            **cut.channels,
        )
    launch(
        kernels.adagn_fwd_kernel,
        cut.grid,
        *tensors,
        partials,
        stats,
        y,
        *strides,
        eps,
        *sizes,
        *drop,
        CHUNKS=max(_PARTIALS // cut.rows["GROUPS"], 1),
        SILU=silu,
        VECTORS=cut.vectors,
        **cut.rows,
    )
    return y, stats


def _empty_backward(
    dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, offset: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def empty(like: Tensor | None) -> Tensor:
        return x.new_empty(0) if like is None else like.new_empty(like.shape)

    return empty(x), empty(scale), empty(shift), empty(offset)


@op(fake=_empty_backward)
def _adagn_bwd_op(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    offset: Tensor | None,
    key: Tensor | None,
    stats: Tensor,
    silu: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, scale, shift and offset (empty without one)."""
    dy, x = dy.contiguous(), x.contiguous()
    out = dx, dscale, dshift, doffset = _empty_backward(dy, x, scale, shift, offset)
    gradients = (dscale, dshift, None if offset is None else doffset)
    num_groups = stats.shape[2]
    style, strides = per_cloud(scale, shift, offset)
    tensors = (dy, x, *style, full_key(key) if key is not None and dropout else None, stats)
    drop = keep_threshold(dropout)
    held = _Held(x, num_groups, _HELD_BACKWARD)
    if held.fits:
        sizes = (*strides, *held.sizes, *drop)
        launch(kernels.adagn_held_bwd_kernel, held.grid, *tensors, dx, *gradients, *sizes, SILU=silu, **held.block)
        return out
    cut = RowChunks(x, num_groups, _ELEMENTS_PER_THREAD)
    partials = x.new_empty((cut.B, cut.chunks, 3, cut.C), dtype=torch.float32)
    means = torch.empty_like(stats)
    sizes = (*strides, *cut.sizes, cut.chunk_rows, *drop)
    flags = {"SILU": silu, "VECTORS": cut.vectors, **cut.rows}
    launch(kernels.adagn_bwd_sums_kernel, cut.grid, *tensors, partials, *sizes, **flags)
    launch(
        kernels.adagn_bwd_combine_kernel,
        (cut.B,),
        style[0],
        stats,
        partials,
        means,
        *gradients,
        strides[0],
        *cut.sizes,
        CHUNKS=max(_PARTIALS // (cut.rows["GROUPS"] * cut.rows["WIDTH"]), 1),
        **cut.channels,
    )
    launch(kernels.adagn_bwd_kernel, cut.grid, *tensors, means, dx, *sizes, **flags)
    return out


@gradient(
    _adagn_op,
    save=lambda x, scale, shift, offset, key, moments, num_groups, eps, silu, dropout, out: (
        *(x, scale, shift, offset, key, out[1]),
        *(silu, dropout),
    ),
)
def _adagn_backward(needs: Needs, dy: Tensor, *saved: Any) -> Gradients:
    dx, dscale, dshift, doffset = _adagn_bwd_op(dy, *saved)
    return dx, dscale, dshift, doffset if needs[3] else None
