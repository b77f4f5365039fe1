"""Adaptive group norm, channels last: group norm, then a style's scale and shift, then SiLU, in one op.

Forward, per cloud and with the statistics of a group over its n = P C / G elements:

    xhat = (x - mean) rstd,   mean = sum x / n,   rstd = (sum (x - mean)^2 / n + eps)^(-1/2)
    z    = (weight xhat + bias) scale + shift  =  a (x - mean) + c
    y    = silu(z) = z sigmoid(z)   or   z

Backward, with dz the gradient of z, s1 = sum_P dz and s2 = sum_P dz xhat per cloud and channel:

    dscale = weight s2 + bias s1            dweight = sum_B scale s2
    dshift = s1                             dbias   = sum_B scale s1
    dx     = rstd (weight scale dz - m1 - xhat m2),   m_i = group sum of weight scale s_i, over n

Legend: B clouds, P positions (all dimensions between the first and the last), C channels, G groups.
The variance is biased and two-pass, never E[x^2] - E[x]^2: that form, which torch's own channels-last group
norm uses on a CPU, loses all digits once the mean is a few thousand standard deviations.
Statistics and arithmetic are float32 (float64 in the reference of float64 x). Deterministic, backward too.

By Triton, x and y of s bytes an element: forward 3 s B P C bytes in two launches (statistics, then the rest), about
6 and 12 operations an element; backward 5 s B P C bytes in three launches (s1 and s2, their sums over chunks, dx)
and a sum over clouds. A program has one chunk of a cloud's rows. It keeps one running mean and squared deviation
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
from torch.autograd.function import once_differentiable

from lion_triton.kernels._checks import Impl, check_float, use_triton
from lion_triton.kernels._triton import tl, triton

Activation = Literal["silu"] | None

# Chosen by machine code (128-bit accesses, no spill), not by timing: warps up to 1024 channels; bytes of x per
# thread and step of a program's loop, forward; elements, backward, where x and dy are loaded.
_WARPS, _BYTES_PER_THREAD, _ELEMENTS_PER_THREAD = 4, 32, 8
# Chunks for about as many programs as a GPU runs at once, but of no less than so many elements, and not too many to
# be combined by every program. The bits of a cloud's result may therefore depend on the size of its batch.
_PROGRAMS, _LEAST_CHUNK, _MOST_CHUNKS = 1024, 4096, 128
_PARTIALS = 1024  # values that a program combines at once


def adagn_reference(
    x: Float[Tensor, "B *P C"],
    scale: Float[Tensor, "B C"] | None,
    shift: Float[Tensor, "B C"] | None,
    weight: Float[Tensor, " C"],
    bias: Float[Tensor, " C"],
    num_groups: int,
    eps: float = 1e-5,
    act: Activation = None,
) -> Float[Tensor, "B *P C"]:
    """Plain PyTorch form of :func:`adagn`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if scale is None or shift is None:
        scale, shift = torch.ones_like(weight)[None], torch.zeros_like(bias)[None]
    scale, shift = scale.to(dtype).expand(len(x), -1), shift.to(dtype).expand(len(x), -1)
    return _AdaGN.apply(x, scale, shift, weight.to(dtype), bias.to(dtype), num_groups, eps, act)


def adagn(
    x: Float[Tensor, "B *P C"],
    scale: Float[Tensor, "B C"] | None,
    shift: Float[Tensor, "B C"] | None,
    weight: Float[Tensor, " C"],
    bias: Float[Tensor, " C"],
    num_groups: int,
    eps: float = 1e-5,
    act: Activation = None,
    *,
    impl: Impl = "auto",
) -> Float[Tensor, "B *P C"]:
    """``act((group_norm(x) * weight + bias) * scale + shift)`` with group statistics per cloud.

    x: (B, ..., C) with any number of position dimensions, none included; any floating dtype, which is also
        the dtype of the result. Group g is channels g C/G to (g + 1) C/G - 1, over all positions.
    scale, shift: (B, C), the style; both None is plain group norm.
    weight, bias: (C,). eps is added to the variance. act: "silu" or None.
    Differentiable, once, in all five tensors. Deterministic, gradients too. Triton computes float64 in float32.
    ValueError: shapes, dtypes or devices that do not fit; C not a
    multiple of num_groups; only one of scale and shift; an unknown act.
    """
    check_float("x", x)
    if x.ndim < 2 or 0 in x.shape[1:]:
        raise ValueError(f"x: expected a non-empty shape (B, ..., C), got {tuple(x.shape)}")
    B, C = x.shape[0], x.shape[-1]
    if num_groups < 1 or C % num_groups:
        raise ValueError(f"num_groups: expected a divisor of C = {C}, got {num_groups}")
    if (scale is None) != (shift is None):
        given, missing = ("shift", "scale") if scale is None else ("scale", "shift")
        raise ValueError(f"{missing}: expected a tensor because {given} is one, got None")
    if scale is not None and shift is not None:
        _check_shape("scale", scale, (B, C), x)
        _check_shape("shift", shift, (B, C), x)
    _check_shape("weight", weight, (C,), x)
    _check_shape("bias", bias, (C,), x)
    if act not in ("silu", None):
        raise ValueError(f'act: expected "silu" or None, got {act!r}')
    if not use_triton(impl, x):
        return adagn_reference(x, scale, shift, weight, bias, num_groups, eps, act)
    return _adagn_op(x.contiguous(), scale, shift, weight, bias, num_groups, eps, act == "silu")[0]


class _AdaGN(torch.autograd.Function):
    """One temporary forward, two backward, all passes in place: on a CPU, fresh pages cost more than arithmetic.

    Autograd's own backward of the same formulas took about twice as long. Saved are x and coefficients per cloud
    and channel, neither xhat nor z.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (B, *P, C)
        scale: Tensor,  # (B, C)
        shift: Tensor,  # (B, C)
        weight: Tensor,  # (C,)
        bias: Tensor,  # (C,)
        num_groups: int,
        eps: float,
        act: Activation,
    ) -> Tensor:
        X = _positions(x, scale.dtype)  # (B, P, C)
        mean = _group_mean(X.sum(1), num_groups, X.shape[1])  # (B, C)
        z = X - mean[:, None]
        var = _group_mean(z.square_().sum(1), num_groups, X.shape[1])
        rstd = (var + eps).rsqrt()
        a = rstd * weight * scale
        c = torch.addcmul(shift, bias, scale)
        torch.sub(X, mean[:, None], out=z)
        torch.addcmul(c[:, None], z, a[:, None], out=z)
        if act == "silu":
            F.silu(z, inplace=True)
        ctx.save_for_backward(x, mean, rstd, a, c, scale, weight, bias)
        ctx.num_groups, ctx.act = num_groups, act
        return z.view(x.shape).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, a, c, scale, weight, bias = ctx.saved_tensors
        X, dz = _positions(x, scale.dtype), _positions(grads[0], scale.dtype)  # (B, P, C)
        dx = X - mean[:, None]
        if ctx.act == "silu":
            z = torch.addcmul(c[:, None], dx, a[:, None])
            dz = torch.ops.aten.silu_backward.grad_input(dz, z, grad_input=z)
        s1 = dz.sum(1)  # (B, C)
        s2 = dx.mul_(dz).sum(1) * rstd
        m1 = _group_mean(weight * scale * s1, ctx.num_groups, X.shape[1])
        m2 = _group_mean(weight * scale * s2, ctx.num_groups, X.shape[1])
        # dx = a dz + k x + l
        k = -rstd.square() * m2
        l = -rstd * m1 - mean * k
        torch.mul(dz, a[:, None], out=dx).addcmul_(X, k[:, None]).add_(l[:, None])
        dscale, dshift = weight * s2 + bias * s1, s1
        dweight, dbias = (scale * s2).sum(0), (scale * s1).sum(0)
        return dx.view(x.shape).to(x.dtype), dscale, dshift, dweight, dbias, None, None, None


def _positions(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, ..., C) to (B, P, C) in ``dtype``."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]).to(dtype)


def _group_mean(sums: Tensor, num_groups: int, num_positions: int) -> Tensor:
    """Mean over positions and the channels of a group, from sums (B, C) over positions; repeated to (B, C)."""
    groups = sums.unflatten(-1, (num_groups, -1))
    return (groups.mean(-1, keepdim=True) / num_positions).expand_as(groups).reshape(sums.shape)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    check_float(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected the device of x ({x.device}), got {tensor.device}")


# Kernels. A program's channels are GROUPS times WIDTH places, powers of two, of which a group takes the first CG.


@triton.jit
def _locate(C, CG: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Group and channel of each place, and whether it has one."""
    place = tl.arange(0, GROUPS * WIDTH)
    group = place // WIDTH
    if CG == WIDTH:  # the mask of whole vectors
        return group, place, place < C
    c = group * CG + place % WIDTH
    return group, c, (place % WIDTH < CG) & (c < C)


@triton.jit
def _chunk(P, chunks, chunk_rows):  # type: ignore[no-untyped-def]
    """Cloud of this program, and its first row and the row behind its last one in it."""
    pid = tl.program_id(0)
    first = (pid % chunks).to(tl.int64) * chunk_rows
    return (pid // chunks).to(tl.int64), first, tl.minimum(first + chunk_rows, P)


@triton.jit
def _load(ptr, mask):  # type: ignore[no-untyped-def]
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _affine(scale_ptr, shift_ptr, weight_ptr, bias_ptr, scale_stride, shift_stride, cloud, c, mask):  # type: ignore[no-untyped-def]
    """scale, shift, weight and bias of the channels."""
    weight, bias = _load(weight_ptr + c, mask), _load(bias_ptr + c, mask)
    if scale_ptr is not None:
        scale = _load(scale_ptr + cloud * scale_stride + c, mask)
        shift = _load(shift_ptr + cloud * shift_stride + c, mask)
    else:
        shift = tl.zeros_like(weight)
        scale = shift + 1.0
    return scale, shift, weight, bias


@triton.jit
def _by_group(x, GROUPS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.sum(tl.reshape(x, (GROUPS, WIDTH)), 1)


@triton.jit
def _by_channel(x, GROUPS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.reshape(tl.broadcast_to(x[:, None], (GROUPS, WIDTH)), (GROUPS * WIDTH,))


@triton.jit
def _adagn_stats_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    partial_ptr,
    P,
    C,
    G,
    chunks,
    chunk_rows,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Mean and sum of squared deviations of a chunk's groups, (B, chunks, 2, G)."""
    cloud, first, end = _chunk(P, chunks, chunk_rows)
    _, c, in_c = _locate(C, CG, GROUPS, WIDTH)
    row = tl.arange(0, ROWS)
    offset = row[:, None] * C + c[None, :]
    mean = tl.zeros((ROWS, GROUPS * WIDTH), tl.float32)
    squares = tl.zeros((ROWS, GROUPS * WIDTH), tl.float32)
    step = 0.0
    for begin in range(first, end, ROWS):
        step += 1.0
        mask = (begin + row < end)[:, None] & in_c[None, :]
        x = _load(x_ptr + (cloud * P + begin) * C + offset, mask)
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * (1.0 / step)
        squares += delta * (x - mean)

    count = ((end - first - row + ROWS - 1) // ROWS).to(tl.float32)  # of values, by row of the block
    count = tl.where(in_c[None, :], tl.maximum(count, 0.0)[:, None], 0.0)
    # Not the fast division, whose mean of equal values may not be that value.
    group_mean = tl.div_rn(_by_group(tl.sum(count * mean, 0), GROUPS, WIDTH), ((end - first) * CG).to(tl.float32))
    error = mean - _by_channel(group_mean, GROUPS, WIDTH)[None, :]
    group_squares = _by_group(tl.sum(squares + count * error * error, 0), GROUPS, WIDTH)
    g = tl.arange(0, GROUPS)
    out_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * G + g
    tl.store(out_ptr, group_mean, mask=g < G)
    tl.store(out_ptr + G, group_squares, mask=g < G)


@triton.jit
def _combine(partial_ptr, P, G, chunks, chunk_rows, CG: tl.constexpr, GROUPS: tl.constexpr, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean and variance of a cloud's groups from those of its chunks."""
    g = tl.arange(0, GROUPS)
    mean = _load(partial_ptr + g, g < G)  # of the first chunk: from there equal means stay exact, however one divides
    squares = tl.zeros((GROUPS,), tl.float32)
    count = 0.0
    for begin in range(0, chunks, CHUNKS):
        chunk = begin + tl.arange(0, CHUNKS)
        rows = tl.minimum(P - chunk.to(tl.int64) * chunk_rows, chunk_rows)
        n = tl.where(chunk < chunks, rows, 0).to(tl.float32)[:, None]
        mask = (chunk < chunks)[:, None] & (g < G)[None, :]
        ptr = partial_ptr + chunk[:, None] * 2 * G + g[None, :]
        means = _load(ptr, mask)
        block_count = tl.sum(n)
        block_mean = mean + tl.sum(n * (means - mean[None, :]), 0) / block_count
        error = means - block_mean[None, :]
        block_squares = tl.sum(_load(ptr + G, mask) + n * CG * error * error, 0)
        share = block_count / (count + block_count)
        delta = block_mean - mean
        mean += delta * share
        squares += block_squares + delta * delta * (count * share * CG)
        count += block_count
    return mean, squares / (count * CG)


@triton.jit
def _adagn_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    scale_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    partial_ptr,
    stats_ptr,
    y_ptr,
    scale_stride,
    shift_stride,
    eps,
    P,
    C,
    G,
    chunks,
    chunk_rows,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    SILU: tl.constexpr,
):
    cloud, first, end = _chunk(P, chunks, chunk_rows)
    mean, var = _combine(partial_ptr + cloud * chunks * 2 * G, P, G, chunks, chunk_rows, CG, GROUPS, CHUNKS)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    if first == 0:  # for the backward
        g = tl.arange(0, GROUPS)
        tl.store(stats_ptr + cloud * 2 * G + g, mean, mask=g < G)
        tl.store(stats_ptr + cloud * 2 * G + G + g, rstd, mask=g < G)

    _, c, in_c = _locate(C, CG, GROUPS, WIDTH)
    scale, shift, weight, bias = _affine(
        scale_ptr, shift_ptr, weight_ptr, bias_ptr, scale_stride, shift_stride, cloud, c, in_c
    )
    mean = _by_channel(mean, GROUPS, WIDTH)
    slope = _by_channel(rstd, GROUPS, WIDTH) * weight * scale
    shift += bias * scale
    row = tl.arange(0, ROWS)
    offset = row[:, None] * C + c[None, :]
    for begin in range(first, end, ROWS):
        mask = (begin + row < end)[:, None] & in_c[None, :]
        base = (cloud * P + begin) * C
        z = slope[None, :] * (_load(x_ptr + base + offset, mask) - mean[None, :]) + shift[None, :]
        if SILU:
            z *= tl.sigmoid(z)
        tl.store(y_ptr + base + offset, z.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dz(dy, x, slope, shift, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gradient of z = slope x + shift, x already relative to its mean."""
    if SILU:
        z = slope[None, :] * x + shift[None, :]
        sigmoid = tl.sigmoid(z)
        dy *= sigmoid * (1.0 + z * (1.0 - sigmoid))
    return dy


@triton.jit
def _adagn_bwd_sums_kernel(  # type: ignore[no-untyped-def]
    dy_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    stats_ptr,
    partial_ptr,
    scale_stride,
    shift_stride,
    P,
    C,
    G,
    chunks,
    chunk_rows,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
):
    """s1 and s2 of a chunk, (B, chunks, 2, C)."""
    cloud, first, end = _chunk(P, chunks, chunk_rows)
    group, c, in_c = _locate(C, CG, GROUPS, WIDTH)
    scale, shift, weight, bias = _affine(
        scale_ptr, shift_ptr, weight_ptr, bias_ptr, scale_stride, shift_stride, cloud, c, in_c
    )
    mean = _load(stats_ptr + cloud * 2 * G + group, in_c)
    rstd = _load(stats_ptr + cloud * 2 * G + G + group, in_c)
    slope = rstd * weight * scale
    shift += bias * scale
    row = tl.arange(0, ROWS)
    offset = row[:, None] * C + c[None, :]
    s1 = tl.zeros((ROWS, GROUPS * WIDTH), tl.float32)
    s2 = tl.zeros((ROWS, GROUPS * WIDTH), tl.float32)
    for begin in range(first, end, ROWS):
        mask = (begin + row < end)[:, None] & in_c[None, :]
        base = (cloud * P + begin) * C
        x = _load(x_ptr + base + offset, mask) - mean[None, :]
        dz = _dz(_load(dy_ptr + base + offset, mask), x, slope, shift, SILU)
        s1 += dz
        s2 += dz * x
    out_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * C + c
    tl.store(out_ptr, tl.sum(s1, 0), mask=in_c)
    tl.store(out_ptr + C, tl.sum(s2, 0) * rstd, mask=in_c)


@triton.jit
def _adagn_bwd_combine_kernel(  # type: ignore[no-untyped-def]
    scale_ptr,
    weight_ptr,
    bias_ptr,
    partial_ptr,
    means_ptr,
    dscale_ptr,
    dshift_ptr,
    daffine_ptr,
    scale_stride,
    P,
    C,
    G,
    chunks,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Of one cloud: m1 and m2 (B, 2, G), dscale and dshift (B, C), its part of dweight and dbias (B, 2, C)."""
    cloud = tl.program_id(0).to(tl.int64)
    _, c, in_c = _locate(C, CG, GROUPS, WIDTH)
    sums1 = tl.zeros((CHUNKS, GROUPS * WIDTH), tl.float32)
    sums2 = tl.zeros((CHUNKS, GROUPS * WIDTH), tl.float32)
    for begin in range(0, chunks, CHUNKS):
        chunk = begin + tl.arange(0, CHUNKS)
        mask = (chunk < chunks)[:, None] & in_c[None, :]
        ptr = partial_ptr + (cloud * chunks + chunk)[:, None] * 2 * C + c[None, :]
        sums1 += _load(ptr, mask)
        sums2 += _load(ptr + C, mask)
    s1, s2 = tl.sum(sums1, 0), tl.sum(sums2, 0)
    scale, _, weight, bias = _affine(scale_ptr, scale_ptr, weight_ptr, bias_ptr, scale_stride, 0, cloud, c, in_c)
    if dscale_ptr is not None:
        tl.store(dscale_ptr + cloud * C + c, (weight * s2 + bias * s1).to(dscale_ptr.dtype.element_ty), mask=in_c)
        tl.store(dshift_ptr + cloud * C + c, s1.to(dshift_ptr.dtype.element_ty), mask=in_c)
    tl.store(daffine_ptr + cloud * 2 * C + c, scale * s2, mask=in_c)
    tl.store(daffine_ptr + cloud * 2 * C + C + c, scale * s1, mask=in_c)
    g = tl.arange(0, GROUPS)
    n = tl.full((), CG, tl.float32) * P  # P may be a constant: 1
    means_ptr += cloud * 2 * G + g
    tl.store(means_ptr, _by_group(weight * scale * s1, GROUPS, WIDTH) / n, mask=g < G)
    tl.store(means_ptr + G, _by_group(weight * scale * s2, GROUPS, WIDTH) / n, mask=g < G)


@triton.jit
def _adagn_bwd_kernel(  # type: ignore[no-untyped-def]
    dy_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    stats_ptr,
    means_ptr,
    dx_ptr,
    scale_stride,
    shift_stride,
    P,
    C,
    G,
    chunks,
    chunk_rows,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
):
    cloud, first, end = _chunk(P, chunks, chunk_rows)
    group, c, in_c = _locate(C, CG, GROUPS, WIDTH)
    scale, shift, weight, bias = _affine(
        scale_ptr, shift_ptr, weight_ptr, bias_ptr, scale_stride, shift_stride, cloud, c, in_c
    )
    group += cloud * 2 * G
    mean, rstd = _load(stats_ptr + group, in_c), _load(stats_ptr + G + group, in_c)
    m1, m2 = rstd * _load(means_ptr + group, in_c), rstd * rstd * _load(means_ptr + G + group, in_c)
    slope = rstd * weight * scale
    shift += bias * scale
    row = tl.arange(0, ROWS)
    offset = row[:, None] * C + c[None, :]
    for begin in range(first, end, ROWS):
        mask = (begin + row < end)[:, None] & in_c[None, :]
        base = (cloud * P + begin) * C
        x = _load(x_ptr + base + offset, mask) - mean[None, :]
        dz = _dz(_load(dy_ptr + base + offset, mask), x, slope, shift, SILU)
        dx = slope[None, :] * dz - m1[None, :] - m2[None, :] * x
        tl.store(dx_ptr + base + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)


# Launching and registration


class _Layout:
    """How the kernels cut up x: sizes, what a program holds, chunks."""

    def __init__(self, x: Tensor, num_groups: int, per_thread: int) -> None:
        self.B, self.P, self.C = len(x), math.prod(x.shape[1:-1]), x.shape[-1]
        width = triton.next_power_of_2(self.C // num_groups)
        groups = triton.next_power_of_2(num_groups)
        places = groups * width
        warps = min(max(places // 256, _WARPS), 16)
        rows = max(32 * warps * per_thread // places, 1)
        least = max(_LEAST_CHUNK, x.numel() // _PROGRAMS) // places
        steps = triton.cdiv(max(least, triton.cdiv(self.P, _MOST_CHUNKS)), rows)
        self.chunk_rows = max(steps, 1) * rows
        self.chunks = triton.cdiv(self.P, self.chunk_rows)
        self.channels = {"CG": self.C // num_groups, "GROUPS": groups, "WIDTH": width, "num_warps": warps}
        self.rows = {"ROWS": rows, **self.channels}
        self.sizes = (self.P, self.C, num_groups, self.chunks)
        self.grid = (self.B * self.chunks,)


def _style(scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Both with unit stride over channels, and their strides over clouds: halves of one tensor are not copied."""
    if scale is None or shift is None:
        return None, None, 0, 0
    scale, shift = (t if t.stride(1) == 1 else t.contiguous() for t in (scale, shift))
    return scale, shift, scale.stride(0), shift.stride(0)


@torch.library.custom_op("lion_triton::adagn", mutates_args=())
def _adagn_op(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """y, and mean and rstd (B, 2, G)."""
    x = x.contiguous()
    cut = _Layout(x, num_groups, _BYTES_PER_THREAD // x.element_size())
    y, stats = _empty_forward(x, scale, shift, weight, bias, num_groups, eps, silu)
    scale, shift, *strides = _style(scale, shift)
    partials = torch.empty((cut.B, cut.chunks, 2, num_groups), dtype=torch.float32, device=x.device)
    if cut.B:
        with torch.cuda.device_of(x):
            _adagn_stats_kernel[cut.grid](x, partials, *cut.sizes, cut.chunk_rows, **cut.rows)
            _adagn_fwd_kernel[cut.grid](
                x,
                scale,
                shift,
                weight.contiguous(),
                bias.contiguous(),
                partials,
                stats,
                y,
                *strides,
                eps,
                *cut.sizes,
                cut.chunk_rows,
                CHUNKS=max(_PARTIALS // cut.rows["GROUPS"], 1),
                SILU=silu,
                **cut.rows,
            )
    return y, stats


@_adagn_op.register_fake
def _empty_forward(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, torch.empty((x.shape[0], 2, num_groups), dtype=torch.float32, device=x.device)


@torch.library.custom_op("lion_triton::adagn_bwd", mutates_args=())
def _adagn_bwd_op(
    dy: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    stats: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, scale and shift (both empty without a style), weight and bias."""
    dy, x, weight, bias = (t.contiguous() for t in (dy, x, weight, bias))
    cut = _Layout(x, stats.shape[2], _ELEMENTS_PER_THREAD)
    dx, dscale, dshift, *_ = _empty_backward(dy, x, scale, shift, weight, bias, stats, silu)
    scale, shift, *strides = _style(scale, shift)
    partials = torch.empty((cut.B, cut.chunks, 2, cut.C), dtype=torch.float32, device=x.device)
    daffine, means = torch.empty_like(partials[:, 0]), torch.empty_like(stats)
    tensors = (dy, x, scale, shift, weight, bias, stats)
    if cut.B:
        with torch.cuda.device_of(x):
            _adagn_bwd_sums_kernel[cut.grid](
                *tensors, partials, *strides, *cut.sizes, cut.chunk_rows, SILU=silu, **cut.rows
            )
            _adagn_bwd_combine_kernel[(cut.B,)](
                scale,
                weight,
                bias,
                partials,
                means,
                None if scale is None else dscale,
                dshift,
                daffine,
                strides[0],
                *cut.sizes,
                CHUNKS=max(_PARTIALS // (cut.rows["GROUPS"] * cut.rows["WIDTH"]), 1),
                **cut.channels,
            )
            _adagn_bwd_kernel[cut.grid](
                *tensors, means, dx, *strides, *cut.sizes, cut.chunk_rows, SILU=silu, **cut.rows
            )
    dweight, dbias = daffine.sum(0)
    return dx, dscale, dshift, dweight.to(weight.dtype, copy=True), dbias.to(bias.dtype, copy=True)


@_adagn_bwd_op.register_fake
def _empty_backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    stats: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def empty(like: Tensor | None) -> Tensor:
        return x.new_empty(0) if like is None else torch.empty(like.shape, dtype=like.dtype, device=like.device)

    return empty(x), empty(scale), empty(shift), empty(weight), empty(bias)


def _adagn_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, _, ctx.silu = inputs
    ctx.save_for_backward(*tensors, output[1])


def _adagn_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, shift, weight, bias, stats = ctx.saved_tensors
    dx, dscale, dshift, dweight, dbias = _adagn_bwd_op(dy, x, scale, shift, weight, bias, stats, ctx.silu)
    if scale is None:
        return dx, None, None, dweight, dbias, None, None, None
    return dx, dscale, dshift, dweight, dbias, None, None, None


_adagn_op.register_autograd(_adagn_backward, setup_context=_adagn_setup)
