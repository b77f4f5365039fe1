"""The tail of a set abstraction in one op: adaptive group norm, SiLU, and the maximum over a centre's neighbours.

The activated neighbourhoods, K times as large as the result, are never made:

    u  = x + offset,   dev = mean_P u - mean,   z = a (u - mean) + shift,   a = scale rstd       (``adagn.py``)
    y[m] = max_k silu(z[m, k]),   per channel

Backward: only the first neighbour with the maximum has a gradient from above, dz[m] = silu'(z) dy[m], so that all sums
run over centres; what the statistics add goes to every row. Per cloud and channel, P = M K, n = P C / G:

    dscale  = s2 = sum_M dz xhat,   dshift = s1 = sum_M dz
    dx      = a dz [k is the one] - rstd (m1 + xhat m2),   m_i = group sum of scale s_i, over n
    doffset = a s1 - P rstd (m1 + m2 rstd dev)

Legend: B clouds, M centres, K neighbours, C channels, G groups. Statistics are those of ``adagn.py``; arithmetic is
float32 (float64 in the reference of float64 x), and the maximum is that of unrounded values. By Triton, x of s bytes:
forward three launches, 2 s B P C bytes (statistics, then the rest) and (2 s + 1) B M C, for y, and for the backward the
x of each maximum and its neighbour's index; backward two launches, 2 s B P C and (4 s + 1) B M C. Deterministic,
backward too.
Source: Qi et al., "PointNet++", NeurIPS 2017, as LION computes it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lion_triton.kernels._checks import Impl, check_float, check_groups, check_shape, sums_dtype, use_triton
from lion_triton.kernels._groups import (
    RowChunks,
    act,
    act_backward,
    as_dtype_of,
    at_once,
    bundle_of_groups,
    by_channel,
    center_groups,
    cloud_buffers,
    combine_moments,
    group_mean,
    group_sums,
    load,
    load_offset,
    locate,
    moments_kernel,
    per_cloud,
    store_sums,
)
from lion_triton.kernels._op import Gradients, Needs, gradient, op
from lion_triton.kernels._triton import launch, tl, triton
from lion_triton.kernels.rows import block_of_rows

# Chosen by machine code, not by timing: bytes of x per thread and step of the statistics; values that a
# program of the sums over maxima holds at once.
_WARPS, _BYTES_PER_THREAD, _SUMMED = 4, 32, 1024


def adagn_max_neighbors_reference(
    x: Float[Tensor, "B M K C"],
    scale: Float[Tensor, "B C"],
    shift: Float[Tensor, "B C"],
    num_groups: int,
    eps: float = 1e-5,
    *,
    offset: Float[Tensor, "B C"] | None = None,
) -> Float[Tensor, "B M C"]:
    """Plain PyTorch form of :func:`adagn_max_neighbors`."""
    dtype = sums_dtype(x)
    offset = None if offset is None else offset.to(dtype)
    return _adagn_max_neighbors_reference_op(x, scale.to(dtype), shift.to(dtype), offset, num_groups, float(eps))[0]


def adagn_max_neighbors(
    x: Float[Tensor, "B M K C"],
    scale: Float[Tensor, "B C"],
    shift: Float[Tensor, "B C"],
    num_groups: int,
    eps: float = 1e-5,
    *,
    offset: Float[Tensor, "B C"] | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "B M C"]:
    """``adagn(x, scale, shift, act="silu", offset=offset).amax(2)``, without the activated neighbourhoods.

    x: (B, M, K, C), M, K >= 1, any floating dtype, which is also that of the result.
    scale, shift, num_groups, eps, offset: as of ``adagn`` without weight and bias.
    The gradient of a maximum goes to the first neighbour that has it. NaN if one is. Differentiable, once, in x, scale,
    shift, offset. Deterministic, gradients too. Triton computes float64 in float32.
    ValueError: shapes, dtypes or devices that do not fit; C not a multiple of num_groups.
    """
    check_float("x", x)
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x: expected shape (B, M, K, C) with M, K, C >= 1, got {tuple(x.shape)}")
    B, C = len(x), x.shape[3]
    num_groups = check_groups(num_groups, C)
    style: dict[str, Any] = {"scale": scale, "shift": shift, "offset": offset}
    for name, tensor in style.items():
        if tensor is not None or name != "offset":
            check_shape(name, tensor, (B, C), x)
    if not use_triton(impl, x):
        return adagn_max_neighbors_reference(x, scale, shift, num_groups, eps, offset=offset)
    return _adagn_max_neighbors_op(x, scale, shift, offset, num_groups, float(eps))[0]


# The reference's op, a few clouds at a time in the same buffers, like that of ``adagn.py``


def empty_maxima(x: Tensor, size: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of maxima of a (B, M, K, C), the neighbour that has each, in the smallest dtype that can count them, and a
    cloud's statistics."""
    B, M, K, C = size
    index = torch.uint8 if K <= 2**8 else torch.int16 if K <= 2**15 else torch.int32
    stats = x.new_empty((B, 3, C), dtype=dtype)  # what to subtract from x, dev, rstd
    return x.new_empty((B, M, C)), x.new_empty((B, M, C), dtype=index), stats


def _empty_maxima(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    B, M, K, C = x.shape
    return empty_maxima(x, (B, M, K, C), dtype)


@op(fake=lambda x, *_: _empty_maxima(x, sums_dtype(x)))
def _adagn_max_neighbors_reference_op(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    offset: Tensor | None,
    num_groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Maxima, which neighbour has each, and the statistics."""
    y, index, stats = _empty_maxima(x, sums_dtype(x))
    for clouds, (z, squares) in cloud_buffers(x.flatten(1, 2), stats.dtype, 2):
        part = None if offset is None else offset[clouds]
        for i, values in enumerate(center_groups(x[clouds].flatten(1, 2), part, num_groups, eps, z, squares)):
            stats[clouds, i] = values
        torch.addcmul(shift[clouds, None], z, (scale[clouds] * stats[clouds, 2])[:, None], out=z)
        y[clouds], index[clouds] = F.silu(z, inplace=True).view(x[clouds].shape).max(2)
    return y, index, stats


@op(fake=lambda grad, x, scale, *_: (x.new_empty(x.shape), *(scale.new_empty(scale.shape) for _ in range(3))))
def _adagn_max_neighbors_reference_bwd_op(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, index: Tensor, stats: Tensor, num_groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, scale, shift and offset."""
    P, (center, dev, rstd), at = x.shape[1] * x.shape[2], stats.unbind(1), index.long()[:, :, None]
    a = scale * rstd
    raw = x.gather(2, at).squeeze(2).to(a.dtype) - center[:, None]
    z = torch.addcmul(shift[:, None], raw, a[:, None])
    dz = torch.ops.aten.silu_backward(grad.to(a.dtype), z)
    dshift, dscale = dz.sum(1), (dz * raw).sum(1) * rstd
    m1, m2 = (rstd * group_mean(scale * s, num_groups) / P for s in (dshift, dscale))
    k, l = -rstd * m2, rstd * m2 * center - m1
    of_maxima = torch.addcmul(-m1[:, None], raw, k[:, None]).addcmul_(dz, a[:, None])[:, :, None]
    dx = x.new_empty(x.shape)
    for clouds, (buffer,) in cloud_buffers(x.flatten(1, 2), a.dtype, 1):
        part = as_dtype_of(buffer, x[clouds].flatten(1, 2))
        out = dx[clouds].flatten(1, 2) if dx.dtype == buffer.dtype else buffer
        torch.addcmul(l[clouds, None], part, k[clouds, None], out=out)
        out.view(x[clouds].shape).scatter_(2, at[clouds], of_maxima[clouds])
        if dx.dtype != buffer.dtype:
            dx[clouds] = out.view(x[clouds].shape)
    return dx, dscale, dshift, a * dshift - P * (m1 + rstd * m2 * dev)


@gradient(
    _adagn_max_neighbors_reference_op,
    save=lambda x, scale, shift, offset, num_groups, eps, out: (x, scale, shift, *out[1:], num_groups),
)
def _adagn_max_neighbors_reference_backward(needs: Needs, grad: Tensor, *saved: Any) -> Gradients:
    dx, dscale, dshift, doffset = _adagn_max_neighbors_reference_bwd_op(grad, *saved)
    return dx, dscale, dshift, doffset if needs[3] else None


# Kernels


@triton.jit
def statistics_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,
    offset_ptr,
    stats_ptr,
    offset_stride,
    eps,
    P,
    C,
    G,
    chunks,
    chunk_rows,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Of one cloud, by channel: what to subtract from x, dev and rstd, (B, 3, C)."""
    cloud = tl.program_id(0).to(tl.int64)
    _, c, in_c = locate(0, C, CG, GROUPS, WIDTH)
    offset = load_offset(offset_ptr, offset_stride, cloud, c, in_c)
    partial_ptr += cloud * chunks * 2 * C
    dev, group, rstd = combine_moments(
        partial_ptr, offset, eps, P, C, chunks, chunk_rows, c, in_c, CG, GROUPS, WIDTH, CHUNKS
    )
    stats_ptr += cloud * 3 * C + c
    tl.store(stats_ptr, group - offset, mask=in_c)
    tl.store(stats_ptr + C, dev, mask=in_c)
    tl.store(stats_ptr + 2 * C, rstd, mask=in_c)


@triton.jit
def _locate_centers(M, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a block of one cloud: the cloud, the centres counted over the batch, the channels, and presence of each."""
    blocks = tl.cdiv(M, ROWS)
    cloud = (tl.program_id(0) // blocks).to(tl.int64)
    m = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return cloud, cloud * M + m, c, c < C, (m < M)[:, None] & (c < C)[None, :]


@triton.jit
def normalization(stats_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, cloud, c, in_c, C):  # type: ignore[no-untyped-def]
    """By channel: what to subtract from x, rstd, scale and shift."""
    stats_ptr += cloud * 3 * C + c
    return (
        load(stats_ptr, in_c),
        load(stats_ptr + 2 * C, in_c),
        load(scale_ptr + cloud * scale_stride + c, in_c),
        load(shift_ptr + cloud * shift_stride + c, in_c),
    )


@triton.jit
def _maxima_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    stats_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    raw_ptr,
    index_ptr,
    scale_stride,
    shift_stride,
    M,
    K,
    C,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    cloud, m, c, in_c, mask = _locate_centers(M, C, ROWS, CHANNELS)
    center, rstd, scale, shift = normalization(
        stats_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, cloud, c, in_c, C
    )
    slope = rstd * scale
    best = tl.full((ROWS, CHANNELS), float("-inf"), tl.float32)
    raw = tl.zeros((ROWS, CHANNELS), tl.float32)
    index = tl.zeros((ROWS, CHANNELS), tl.int32)
    for k in range(0, K):
        x = load(x_ptr + (m * K + k)[:, None] * C + c[None, :], mask)
        y = act(slope[None, :] * (x - center[None, :]) + shift[None, :], True)
        better = (y > best) | (y != y)
        best = tl.where(better, y, best)
        raw = tl.where(better, x, raw)
        index = tl.where(better, k, index)
    at = m[:, None] * C + c[None, :]
    tl.store(y_ptr + at, best.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(raw_ptr + at, raw.to(raw_ptr.dtype.element_ty), mask=mask)
    tl.store(index_ptr + at, index.to(index_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_means(  # type: ignore[no-untyped-def]
    means_ptr,
    gradients,
    s1,
    s2,
    dev,
    rstd,
    scale,
    cloud,
    c,
    in_c,
    P,
    C,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """From the sums of dz and of dz (u - mean): what all rows subtract, and the gradients of the norm's arguments."""
    s2 *= rstd
    n = tl.full((), CG, tl.float32) * P  # P may be a constant: 1
    m1, m2 = group_sums(s1, s2, scale, n, GROUPS, WIDTH)
    m1 = rstd * by_channel(m1, GROUPS, WIDTH)
    m2 = rstd * rstd * by_channel(m2, GROUPS, WIDTH)
    means_ptr += cloud * 2 * C + c
    tl.store(means_ptr, m1, mask=in_c)
    tl.store(means_ptr + C, m2, mask=in_c)
    doffset = rstd * scale * s1 - P * (m1 + m2 * dev)
    dscale_ptr, dshift_ptr, doffset_ptr = gradients
    store_sums(dscale_ptr, dshift_ptr, doffset_ptr, cloud * C + c, in_c, s1, s2, doffset)


@triton.jit
def maxima_sums_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    raw_ptr,
    stats_ptr,
    scale_ptr,
    shift_ptr,
    means_ptr,
    dscale_ptr,
    dshift_ptr,
    doffset_ptr,
    of_maxima_ptr,
    scale_stride,
    shift_stride,
    M,
    P,
    C,
    G,
    CG: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Of some groups of a cloud: rstd m1 and rstd^2 m2, (B, 2, C), and the gradients of scale, shift and offset; at
    wish a dz of each maximum, (B, M, C)."""
    bundles = tl.cdiv(G, GROUPS)
    cloud = (tl.program_id(0) // bundles).to(tl.int64)
    _, c, in_c = locate(tl.program_id(0) % bundles * GROUPS, C, CG, GROUPS, WIDTH)
    center, rstd, scale, shift = normalization(
        stats_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, cloud, c, in_c, C
    )
    slope = rstd * scale
    sums1 = tl.zeros((ROWS, GROUPS * WIDTH), tl.float32)
    sums2 = tl.zeros((ROWS, GROUPS * WIDTH), tl.float32)
    for begin in range(0, M, ROWS):
        m = begin + tl.arange(0, ROWS)
        mask = (m < M)[:, None] & in_c[None, :]
        at = (cloud * M + m)[:, None] * C + c[None, :]
        x = tl.where(mask, load(raw_ptr + at, mask) - center[None, :], 0.0)
        dz = act_backward(load(grad_ptr + at, mask), x, slope, shift, True)
        if of_maxima_ptr is not None:
            tl.store(of_maxima_ptr + at, slope[None, :] * dz, mask=mask)
        sums1 += dz
        sums2 += dz * x
    dev = load(stats_ptr + cloud * 3 * C + C + c, in_c)
    gradients = (dscale_ptr, dshift_ptr, doffset_ptr)
    store_means(
        means_ptr,
        gradients,
        tl.sum(sums1, 0),
        tl.sum(sums2, 0),
        dev,
        rstd,
        scale,
        cloud,
        c,
        in_c,
        P,
        C,
        CG,
        GROUPS,
        WIDTH,
    )


@triton.jit
def _maxima_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    x_ptr,
    raw_ptr,
    index_ptr,
    stats_ptr,
    scale_ptr,
    shift_ptr,
    means_ptr,
    dx_ptr,
    scale_stride,
    shift_stride,
    M,
    K,
    C,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    cloud, m, c, in_c, mask = _locate_centers(M, C, ROWS, CHANNELS)
    center, rstd, scale, shift = normalization(
        stats_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, cloud, c, in_c, C
    )
    slope = rstd * scale
    means_ptr += cloud * 2 * C + c
    m1, m2 = load(means_ptr, in_c), load(means_ptr + C, in_c)
    at = m[:, None] * C + c[None, :]
    raw = load(raw_ptr + at, mask) - center[None, :]
    of_maximum = slope[None, :] * act_backward(load(grad_ptr + at, mask), raw, slope, shift, True)
    index = tl.load(index_ptr + at, mask=mask, other=0).to(tl.int32)
    for k in range(0, K):
        at = (m * K + k)[:, None] * C + c[None, :]
        x = load(x_ptr + at, mask) - center[None, :]
        dx = tl.where(index == k, of_maximum, 0.0) - m1[None, :] - m2[None, :] * x
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


# Launching and registration


def _launch_centers(kernel: Any, x: Tensor, *args: Any) -> None:
    """By blocks of centres of one cloud; the sizes follow the arguments."""
    B, M, K, C = x.shape
    rows, channels, grid = block_of_rows(M, C, x)
    blocks = {"ROWS": rows, "CHANNELS": channels, "num_warps": _WARPS}
    launch(kernel, (B * grid[0], grid[1]), *args, M, K, C, **blocks)


def launch_statistics(
    partials: Float[Tensor, "B chunks 2 C"],
    offset: Tensor | None,
    stats: Float[Tensor, "B 3 C"],
    eps: float,
    P: int,
    num_groups: int,
    chunk_rows: int,
    channels: dict[str, int],
) -> None:
    """Fills ``stats`` from the moments of a cloud's chunks of so many rows."""
    (B, chunks, _, C), ((offset,), (stride,)) = partials.shape, per_cloud(offset)
    at = at_once(2 * channels["GROUPS"] * channels["WIDTH"], chunks)  # half of them, or it spills
    sizes = (stride, eps, P, C, num_groups, chunks, chunk_rows)
    launch(statistics_kernel, (B,), partials, offset, stats, *sizes, CHUNKS=at, **channels)


def _empty_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, index, stats = _empty_maxima(x, torch.float32)
    return y, index, stats, x.new_empty(y.shape)


@op(fake=_empty_forward)
def _adagn_max_neighbors_op(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    offset: Tensor | None,
    num_groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maxima, which neighbour has each, the statistics, and x of each maximum."""
    x = x.contiguous()
    y, index, stats, raw = _empty_forward(x)
    cut = RowChunks(x, num_groups, _BYTES_PER_THREAD // x.element_size())
    partials = stats.new_empty((cut.B, cut.chunks, 2, cut.C))
    launch(moments_kernel, cut.grid, x, partials, *cut.sizes, cut.chunk_rows, **cut.rows)
    launch_statistics(partials, offset, stats, eps, cut.P, num_groups, cut.chunk_rows, cut.channels)
    style, strides = per_cloud(scale, shift)
    _launch_centers(_maxima_kernel, x, x, stats, *style, y, raw, index, *strides)
    return y, index, stats, raw


def means_of_maxima(
    grad: Tensor,
    raw: Tensor,
    stats: Tensor,
    scale: Tensor,
    shift: Tensor,
    gradients: tuple[Tensor | None, ...],
    K: int,
    num_groups: int,
    of_maxima: Tensor | None = None,
) -> Tensor:
    """What the statistics subtract from every row of the gradient, (B, 2, C).

    Fills ``gradients``, those of scale, shift and offset, and ``of_maxima``, what the maxima's own rows add.
    """
    B, M, C = raw.shape
    style, strides = per_cloud(scale, shift)
    means = stats.new_empty((B, 2, C))
    channels = bundle_of_groups(raw, num_groups)
    grid = (B * triton.cdiv(num_groups, channels["GROUPS"]),)
    rows = max(_SUMMED // (channels["GROUPS"] * channels["WIDTH"]), 1)
    sizes = (*strides, M, M * K, C, num_groups)
    blocks = {**channels, "ROWS": rows, "num_warps": _WARPS}
    launch(maxima_sums_kernel, grid, grad, raw, stats, *style, means, *gradients, of_maxima, *sizes, **blocks)
    return means


def _empty_backward(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, offset: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    doffset = x.new_empty(0) if offset is None else offset.new_empty(offset.shape)
    return x.new_empty(x.shape), scale.new_empty(scale.shape), shift.new_empty(shift.shape), doffset


@op(fake=_empty_backward)
def _adagn_max_neighbors_bwd_op(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    offset: Tensor | None,
    index: Tensor,
    stats: Tensor,
    raw: Tensor,
    num_groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, scale, shift and offset (empty without one)."""
    grad, x = grad.contiguous(), x.contiguous()
    out = _empty_backward(grad, x, scale, shift, offset)
    gradients = (*out[1:3], None if offset is None else out[3])
    style, strides = per_cloud(scale, shift)
    means = means_of_maxima(grad, raw, stats, scale, shift, gradients, x.shape[2], num_groups)
    _launch_centers(_maxima_bwd_kernel, x, grad, x, raw, index, stats, *style, means, out[0], *strides)
    return out


@gradient(
    _adagn_max_neighbors_op,
    save=lambda x, scale, shift, offset, num_groups, eps, out: (x, scale, shift, offset, *out[1:], num_groups),
)
def _adagn_max_neighbors_backward(needs: Needs, grad: Tensor, *saved: Any) -> Gradients:
    dx, dscale, dshift, doffset = _adagn_max_neighbors_bwd_op(grad, *saved)
    return dx, dscale, dshift, doffset if needs[3] else None
