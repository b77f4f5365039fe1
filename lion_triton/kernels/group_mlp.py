"""A set abstraction of two layers in one op: neighbours gathered, normalised, multiplied, normalised, their maximum.

    x1[m, k] = F[i(m, k)] + W o(m, k)                    ``neighborhood.py``
    h        = silu(z1),   z1 = a1 (x1 - c1) + t1        ``adagn.py``: a, c and t per cloud and channel
    x2       = V h
    y[m]     = max_k silu(z2),   z2 = a2 (x2 - c2) + t2  ``adagn_max_neighbors.py``

Nothing with a row for each neighbour is written but, in the backward, the gradient of x1: what has K rows to a centre
is made again in each pass, from the points' features, which fit into a cache. Passes forward: moments of x1, moments of
x2, maxima. Backward, with dx2 as of ``adagn_max_neighbors.py``:

    dh = V^T dx2,   dz1 = silu'(z1) dh,   dV = sum dx2 h^T,   dx1 = a1 dz1 - rstd (m1 + xhat m2)

one pass for the sums of dz1 that m1 and m2 are made of, one for dV, one for dx1, do and dW; dF is the transposed
gather.

Legend: B clouds, N points, M centres, K neighbours, C hidden and C2 output channels. Statistics are those of
``adagn.py``: mean and squared deviations of a tile, combined by Chan's formula, never E[x^2] - E[x]^2. Factors of V
have the dtype of features, all else is float32. Bytes, features of s bytes: a pass reads s C B N and 16 B M K; forward
three, and (2 s + 1) C2 B M; backward three, 2 s C B M K for dx1, and the sort of the transposed gather. Deterministic,
backward too. The reference is the composition of the ops; so is Triton without matrix units, and where a program cannot
hold V.
Source: Qi et al., "PointNet++", NeurIPS 2017, as LION computes it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lion_triton.kernels._checks import Impl, check_float, check_groups, check_shape, use_triton
from lion_triton.kernels._dot import by_matrix_units, dot, factors_like, precise_dot
from lion_triton.kernels._groups import RowChunks, act, act_backward, load, locate, per_cloud
from lion_triton.kernels._op import Gradients, Needs, gradient, op
from lion_triton.kernels._triton import launch, tl, triton, warp_size
from lion_triton.kernels.adagn import adagn
from lion_triton.kernels.adagn_max_neighbors import (
    adagn_max_neighbors,
    empty_maxima,
    launch_statistics,
    means_of_maxima,
    normalization,
    store_means,
)
from lion_triton.kernels.gather import row_index
from lion_triton.kernels.neighborhood import check_group_offsets, group_offsets
from lion_triton.kernels.rows import take_rows_backward

# Chosen by machine code, not by timing: rows of a tile (with more, products are made by groups of four warps, which
# have too few registers); channels at most, and hidden ones where there is a backward, by warp size (AMD's GPUs spill
# with more); threads of a program; hidden channels up to which four warps do, as more would make the same products;
# rows of dV that one program sums up; about how many programs there are where each has a part of a sum, and partial
# sums that one combines at once.
_ROWS, _MOST_CHANNELS, _MOST_DIFFERENTIATED = 32, 128, {32: 128, 64: 32}
_THREADS, _FEW_CHANNELS, _MATRIX_ROWS, _PROGRAMS, _PARTIALS = 256, 64, 64, 512, 1024


class Style(NamedTuple):
    """Of an adaptive group norm, as ``adagn`` takes it without weight and bias."""

    scale: Float[Tensor, "B C"]
    shift: Float[Tensor, "B C"]
    offset: Float[Tensor, "B C"] | None = None


def group_mlp_max_reference(
    features: Float[Tensor, "B N C"],
    idx: Int[Tensor, "B M K"],
    offsets: Float[Tensor, "B M K 3"],
    weight: Float[Tensor, "C 3"],
    style: Style,
    matrix: Float[Tensor, "C2 C"],
    style2: Style,
    num_groups: int,
    eps: float = 1e-5,
    impl: Impl = "reference",
) -> Float[Tensor, "B M C2"]:
    """:func:`group_mlp_max` by ops that write what they make; ``impl`` is theirs."""
    x = group_offsets(features, idx, offsets, weight, impl=impl)
    h = adagn(x, *style[:2], None, None, num_groups, eps, "silu", offset=style.offset, impl=impl)
    return adagn_max_neighbors(F.linear(h, matrix), *style2[:2], num_groups, eps, offset=style2.offset, impl=impl)


def group_mlp_max(
    features: Float[Tensor, "B N C"],
    idx: Int[Tensor, "B M K"],
    offsets: Float[Tensor, "B M K 3"],
    weight: Float[Tensor, "C 3"],
    style: Style,
    matrix: Float[Tensor, "C2 C"],
    style2: Style,
    num_groups: int,
    eps: float = 1e-5,
    *,
    impl: Impl = "auto",
) -> Float[Tensor, "B M C2"]:
    """``adagn_max_neighbors(linear(adagn(group_offsets(features, ...))))``, with as little as possible per neighbour.

    features, idx, offsets, weight: as of ``group_offsets``. style, style2: of the two norms, as of ``adagn``. matrix:
    (C2, C), that of the layer between them. Returns (B, M, C2) in the dtype of features. Differentiable, once, in all
    but idx. Deterministic, gradients too. Triton takes 16 bits, and float32 where PyTorch may multiply it by TF32; all
    else is the composition.
    ValueError: shapes, dtypes, devices or indices that do not fit; C or C2 not a multiple of num_groups.
    """
    check_group_offsets(features, idx, offsets, weight)
    check_float("matrix", matrix)
    B, C, C2 = len(features), features.shape[2], max(*matrix.shape[:1], 1)
    check_shape("matrix", matrix, (C2, C), features, like="features")
    for name, of, channels in (("style", style, C), ("style2", style2, C2)):
        num_groups = check_groups(num_groups, channels)
        parts: Any = zip(Style._fields, of, strict=True)
        for part, tensor in parts:
            if tensor is not None or part != "offset":
                check_shape(f"{name}.{part}", tensor, (B, channels), features, like="features")
    matrix = matrix.to(features.dtype)
    tensors = (features, offsets, weight, matrix, *style, *style2)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    fits = max(C, C2) <= _MOST_CHANNELS and idx.shape[2] <= _ROWS and 0 not in idx.shape
    fused = use_triton(impl, features) and fits and by_matrix_units(features, "matmul")
    if not fused or (differentiated and _MOST_DIFFERENTIATED[warp_size()] < C):
        return group_mlp_max_reference(features, idx, offsets, weight, style, matrix, style2, num_groups, eps, impl)
    arguments: Any = (features, idx, offsets, weight, *style, matrix, *style2, num_groups, float(eps))
    return _group_mlp_max_op(*arguments)[0]


# Kernels. A tile is CENTERS centres of a cloud with NEIGHBORS places each, of which K are taken.


@triton.jit
def _locate_tile(cloud, begin, end, M, K, CENTERS: tl.constexpr, NEIGHBORS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of a tile, counted over the batch, and presence of each."""
    i = tl.arange(0, CENTERS * NEIGHBORS)
    m, k = begin + i // NEIGHBORS, i % NEIGHBORS
    return (cloud * M + m) * K + k, (m < end) & (k < K)


@triton.jit
def _gathered(x_ptr, index_ptr, offsets_ptr, weight_ptr, r, live, c, C):  # type: ignore[no-untyped-def]
    """x1. The offsets' part is a product of matrices, though of three columns, because the compiler takes that for too
    much to be made again in each layout in which the products behind it need x1 and h: there are not enough registers
    for that."""
    row = tl.load(index_ptr + r, mask=live, other=0).to(tl.int64)
    x = load(x_ptr + row[:, None] * C + c[None, :], live[:, None] & (c < C)[None, :])
    return precise_dot(_axes(offsets_ptr, r, live), tl.trans(_axes(weight_ptr, c, c < C)), x)


@triton.jit
def _axes(ptr, row, present):  # type: ignore[no-untyped-def]
    """Rows of three columns, and thirteen of zeros: a product takes 16 at least."""
    axis = tl.arange(0, 16)
    return load(ptr + row[:, None] * 3 + axis[None, :], present[:, None] & (axis < 3)[None, :])


@triton.jit
def _affine(pointers, cloud, channel, channels):  # type: ignore[no-untyped-def]
    """Slope and intercept of a norm by channel, and what its statistics call the centre.

    Two vectors for a tile, not four: each costs a thread as many registers as half of its accumulators.
    """
    stats_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride = pointers
    center, rstd, scale, shift = normalization(
        stats_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, cloud, channel, channel < channels, channels
    )
    slope = rstd * scale
    return slope, shift - slope * center, center


@triton.jit
def _statistics_gradient(means_ptr, center, cloud, channel, channels):  # type: ignore[no-untyped-def]
    """k and l of the k x + l that the statistics add to every row of a gradient."""
    means_ptr += cloud * 2 * channels + channel
    m1, m2 = load(means_ptr, channel < channels), load(means_ptr + channels, channel < channels)
    return -m2, m2 * center - m1


@triton.jit
def _matrix(matrix_ptr, o, c, C2, C):  # type: ignore[no-untyped-def]
    """V, of o and c as rows and columns or the other way round."""
    return tl.load(matrix_ptr + o * C + c, mask=(o < C2) & (c < C), other=0.0)


@triton.jit
def _activated(x, slope, intercept):  # type: ignore[no-untyped-def]
    return act(slope[None, :] * x + intercept[None, :], True)


@triton.jit
def _moments_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    index_ptr,
    offsets_ptr,
    weight_ptr,
    stats_ptr,
    scale_ptr,
    shift_ptr,
    matrix_ptr,
    partial_ptr,
    scale_stride,
    shift_stride,
    N,
    M,
    K,
    C,
    C2,
    chunks,
    chunk_centers,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CENTERS: tl.constexpr,
    NEIGHBORS: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Mean and squared deviations of x2, or of x1 without a matrix, in a chunk of centres, by channel."""
    cloud = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * chunk_centers
    end = tl.minimum(first + chunk_centers, M)
    c = tl.arange(0, CHANNELS)
    o, channels = tl.arange(0, COLUMNS), C
    if matrix_ptr is not None:
        channels = C2
        matrix = _matrix(matrix_ptr, o[None, :], c[:, None], C2, C)
        slope, intercept, _ = _affine((stats_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride), cloud, c, C)
    mean = tl.zeros((COLUMNS,), tl.float32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    count = 0.0
    for begin in range(first, end, CENTERS):
        r, live = _locate_tile(cloud, begin, end, M, K, CENTERS, NEIGHBORS)
        x = _gathered(x_ptr + cloud * N * C, index_ptr, offsets_ptr, weight_ptr, r, live, c, C)
        if matrix_ptr is not None:
            h = _activated(x, slope, intercept)
            x = dot(h, matrix, tl.zeros((CENTERS * NEIGHBORS, COLUMNS), tl.float32), FACTOR, PRECISION)
        n = (tl.minimum(end - begin, CENTERS) * K).to(tl.float32)
        # Relative to the first row, so that equal values have exactly their mean, however one divides.
        start = tl.sum(tl.where((tl.arange(0, CENTERS * NEIGHBORS) == 0)[:, None], x, 0.0), 0)
        tile_mean = start + tl.sum(tl.where(live[:, None], x - start[None, :], 0.0), 0) / n
        error = tl.where(live[:, None], x - tile_mean[None, :], 0.0)
        share = n / (count + n)
        delta = tile_mean - mean
        mean = tl.where(count > 0, mean + delta * share, tile_mean)
        squares += tl.sum(error * error, 0) + delta * delta * (count * share)
        count += n
    partial_ptr += tl.program_id(0).to(tl.int64) * 2 * channels + o
    tl.store(partial_ptr, mean, mask=o < channels)
    tl.store(partial_ptr + channels, squares, mask=o < channels)


@triton.jit
def _maxima_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    index_ptr,
    offsets_ptr,
    weight_ptr,
    stats_ptr,
    scale_ptr,
    shift_ptr,
    matrix_ptr,
    stats2_ptr,
    scale2_ptr,
    shift2_ptr,
    y_ptr,
    raw_ptr,
    which_ptr,
    scale_stride,
    shift_stride,
    scale2_stride,
    shift2_stride,
    N,
    M,
    K,
    C,
    C2,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CENTERS: tl.constexpr,
    NEIGHBORS: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Maxima of a tile, the x2 of each, and which neighbour has it, the first one."""
    tiles = tl.cdiv(M, CENTERS)
    cloud = (tl.program_id(0) // tiles).to(tl.int64)
    begin = tl.program_id(0) % tiles * CENTERS
    c, o = tl.arange(0, CHANNELS), tl.arange(0, COLUMNS)
    matrix = _matrix(matrix_ptr, o[None, :], c[:, None], C2, C)
    norm = (stats_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride)
    norm2 = (stats2_ptr, scale2_ptr, shift2_ptr, scale2_stride, shift2_stride)
    slope, intercept, _ = _affine(norm, cloud, c, C)
    slope2, intercept2, _ = _affine(norm2, cloud, o, C2)
    r, live = _locate_tile(cloud, begin, M, M, K, CENTERS, NEIGHBORS)
    x = _gathered(x_ptr + cloud * N * C, index_ptr, offsets_ptr, weight_ptr, r, live, c, C)
    h = _activated(x, slope, intercept)
    x = dot(h, matrix, tl.zeros((CENTERS * NEIGHBORS, COLUMNS), tl.float32), FACTOR, PRECISION)
    y = tl.where(live[:, None], _activated(x, slope2, intercept2), float("-inf"))

    y = tl.reshape(y, (CENTERS, NEIGHBORS, COLUMNS))
    k = tl.arange(0, NEIGHBORS)[None, :, None]
    # A NaN counts as more than all others.
    best = tl.max(tl.where(y != y, float("inf"), y), 1)
    which = tl.min(tl.where((y == best[:, None, :]) | (y != y), k, NEIGHBORS - 1), 1)
    chosen = k == which[:, None, :]
    best = tl.sum(tl.where(chosen, y, 0.0), 1)
    raw = tl.sum(tl.where(chosen, tl.reshape(x, (CENTERS, NEIGHBORS, COLUMNS)), 0.0), 1)
    m = begin + tl.arange(0, CENTERS)
    at, mask = (cloud * M + m)[:, None] * C2 + o[None, :], (m < M)[:, None] & (o < C2)[None, :]
    tl.store(y_ptr + at, best.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(raw_ptr + at, raw.to(raw_ptr.dtype.element_ty), mask=mask)
    tl.store(which_ptr + at, which.to(which_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tile_gradients(  # type: ignore[no-untyped-def]
    points,
    maxima,
    cloud,
    begin,
    end,
    matrix_ptr,
    matrix,
    norm,
    statistics2,
    c,
    o,
    M,
    K,
    C,
    C2,
    CENTERS: tl.constexpr,
    NEIGHBORS: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of a tile: its rows, their presence, x1, h, the gradients of x2 and of z1."""
    x_ptr, index_ptr, offsets_ptr, weight_ptr = points
    of_maxima_ptr, which_ptr = maxima
    slope, intercept = norm
    r, live = _locate_tile(cloud, begin, end, M, K, CENTERS, NEIGHBORS)
    x = _gathered(x_ptr, index_ptr, offsets_ptr, weight_ptr, r, live, c, C)
    h = _activated(x, slope, intercept)
    x2 = dot(h, matrix, tl.zeros((CENTERS * NEIGHBORS, o.shape[0]), tl.float32), FACTOR, PRECISION)

    i = tl.arange(0, CENTERS * NEIGHBORS)
    first = (cloud * M + begin) * C2
    at = (i // NEIGHBORS)[:, None] * C2 + o[None, :]  # int32, of a tile
    mask = live[:, None] & (o < C2)[None, :]
    which = tl.load(which_ptr + first + at, mask=mask, other=0).to(tl.int32)
    of_maximum = load(of_maxima_ptr + first + at, mask & (which == (i % NEIGHBORS)[:, None]))
    k2, l2 = statistics2
    dx2 = tl.where(live[:, None], of_maximum + k2[None, :] * x2 + l2[None, :], 0.0)

    # Read again, and not transposed: that would be held in registers all along.
    matrix = _matrix(matrix_ptr, o[:, None], c[None, :], C2, C)
    dh = dot(dx2, matrix, tl.zeros(x.shape, tl.float32), FACTOR, PRECISION)
    return r, live, x, h, dx2, act_backward(dh, x, slope, intercept, True)


@triton.jit
def _bwd_sums_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    index_ptr,
    offsets_ptr,
    weight_ptr,
    stats_ptr,
    scale_ptr,
    shift_ptr,
    matrix_ptr,
    stats2_ptr,
    of_maxima_ptr,
    which_ptr,
    means2_ptr,
    partial_ptr,
    dmatrix_ptr,
    scale_stride,
    shift_stride,
    N,
    M,
    K,
    C,
    C2,
    chunks,
    chunk_centers,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CENTERS: tl.constexpr,
    NEIGHBORS: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of a chunk of centres: sums of dz1 and of dz1 (x1 - c1), (B, chunks, 2, C), or its part of some rows of dV.

    For both at once there are not enough registers.
    """
    cloud = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * chunk_centers
    end = tl.minimum(first + chunk_centers, M)
    c, o = tl.arange(0, CHANNELS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    matrix = _matrix(matrix_ptr, o[None, :], c[:, None], C2, C)
    norm = (stats_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride)
    slope, intercept, center = _affine(norm, cloud, c, C)
    center2 = load(stats2_ptr + cloud * 3 * C2 + o, o < C2)
    statistics2 = _statistics_gradient(means2_ptr, center2, cloud, o, C2)
    points, maxima = (x_ptr + cloud * N * C, index_ptr, offsets_ptr, weight_ptr), (of_maxima_ptr, which_ptr)
    s1 = tl.zeros((CHANNELS,), tl.float32)
    s2 = tl.zeros((CHANNELS,), tl.float32)
    dmatrix = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    for begin in range(first, end, CENTERS):
        _, _, x, h, dx2, dz = _tile_gradients(
            points,
            maxima,
            cloud,
            begin,
            end,
            matrix_ptr,
            matrix,
            (slope, intercept),
            statistics2,
            c,
            o,
            M,
            K,
            C,
            C2,
            CENTERS,
            NEIGHBORS,
            FACTOR,
            PRECISION,
        )
        if partial_ptr is not None:
            s1 += tl.sum(dz, 0)
            s2 += tl.sum(dz * (x - center[None, :]), 0)
        else:
            dmatrix = dot(tl.trans(dx2), h, dmatrix, FACTOR, PRECISION)
    chunk = tl.program_id(0).to(tl.int64)
    if partial_ptr is not None:
        partial_ptr += chunk * 2 * C + c
        tl.store(partial_ptr, s1, mask=c < C)
        tl.store(partial_ptr + C, s2, mask=c < C)
    else:
        at = chunk * C2 * C + o[:, None] * C + c[None, :]
        tl.store(dmatrix_ptr + at, dmatrix, mask=(o < C2)[:, None] & (c < C)[None, :])


@triton.jit
def _bwd_means_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,
    stats_ptr,
    scale_ptr,
    means_ptr,
    dscale_ptr,
    dshift_ptr,
    doffset_ptr,
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
    """Of one cloud: what the statistics subtract from every row of dx1, and the gradients of its norm."""
    cloud = tl.program_id(0).to(tl.int64)
    _, c, in_c = locate(0, C, CG, GROUPS, WIDTH)
    sums1 = tl.zeros((CHUNKS, GROUPS * WIDTH), tl.float32)
    sums2 = tl.zeros((CHUNKS, GROUPS * WIDTH), tl.float32)
    for begin in range(0, chunks, CHUNKS):
        chunk = begin + tl.arange(0, CHUNKS)
        mask = (chunk < chunks)[:, None] & in_c[None, :]
        ptr = partial_ptr + (cloud * chunks + chunk)[:, None] * 2 * C + c[None, :]
        sums1 += load(ptr, mask)
        sums2 += load(ptr + C, mask)
    stats_ptr += cloud * 3 * C + c
    dev, rstd = load(stats_ptr + C, in_c), load(stats_ptr + 2 * C, in_c)
    scale = load(scale_ptr + cloud * scale_stride + c, in_c)
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
def _bwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    index_ptr,
    offsets_ptr,
    weight_ptr,
    stats_ptr,
    scale_ptr,
    shift_ptr,
    matrix_ptr,
    stats2_ptr,
    of_maxima_ptr,
    which_ptr,
    means2_ptr,
    means_ptr,
    dx_ptr,
    doffsets_ptr,
    partial_ptr,
    scale_stride,
    shift_stride,
    N,
    M,
    K,
    C,
    C2,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CENTERS: tl.constexpr,
    NEIGHBORS: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of a tile: dx1, the gradient of the offsets, and its part of that of their weight, (tiles, 3, C)."""
    tiles = tl.cdiv(M, CENTERS)
    cloud = (tl.program_id(0) // tiles).to(tl.int64)
    begin = tl.program_id(0) % tiles * CENTERS
    c, o = tl.arange(0, CHANNELS), tl.arange(0, COLUMNS)
    matrix = _matrix(matrix_ptr, o[None, :], c[:, None], C2, C)
    norm = (stats_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride)
    slope, intercept, center = _affine(norm, cloud, c, C)
    center2 = load(stats2_ptr + cloud * 3 * C2 + o, o < C2)
    statistics2 = _statistics_gradient(means2_ptr, center2, cloud, o, C2)
    points, maxima = (x_ptr + cloud * N * C, index_ptr, offsets_ptr, weight_ptr), (of_maxima_ptr, which_ptr)
    k1, l1 = _statistics_gradient(means_ptr, center, cloud, c, C)
    r, live, x, _, _, dz = _tile_gradients(
        points,
        maxima,
        cloud,
        begin,
        M,
        matrix_ptr,
        matrix,
        (slope, intercept),
        statistics2,
        c,
        o,
        M,
        K,
        C,
        C2,
        CENTERS,
        NEIGHBORS,
        FACTOR,
        PRECISION,
    )
    dx = slope[None, :] * dz + k1[None, :] * x + l1[None, :]
    tl.store(
        dx_ptr + r[:, None] * C + c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=live[:, None] & (c < C)[None, :]
    )
    dx = tl.where(live[:, None], dx, 0.0)
    partial_ptr += tl.program_id(0).to(tl.int64) * 3 * C + c
    for axis in tl.static_range(3):
        tl.store(partial_ptr + axis * C, tl.sum(dx * load(offsets_ptr + r * 3 + axis, live)[:, None], 0), mask=c < C)
        if doffsets_ptr is not None:
            doffset = tl.sum(dx * load(weight_ptr + c * 3 + axis, c < C)[None, :], 1)
            tl.store(doffsets_ptr + r * 3 + axis, doffset.to(doffsets_ptr.dtype.element_ty), mask=live)


# Launching and registration


class _Tiles:
    """How centres with neighbours are cut up."""

    def __init__(self, x: Tensor, index: Tensor, matrix: Tensor) -> None:
        (self.B, self.M, self.K), (C2, C) = index.shape, matrix.shape
        neighbors = triton.next_power_of_2(self.K)
        centers = max(min(_ROWS // neighbors, triton.next_power_of_2(self.M)), triton.cdiv(16, neighbors))
        self.chunk_centers = triton.cdiv(triton.cdiv(self.B * self.M, _PROGRAMS), centers) * centers
        self.chunks = triton.cdiv(self.M, self.chunk_centers)
        self.grid, self.chunk_grid = (self.B * triton.cdiv(self.M, centers),), (self.B * self.chunks,)
        self.sizes = (x.shape[1], self.M, self.K, C, C2)
        self.chunk_sizes = (*self.sizes, self.chunks, self.chunk_centers)
        self.block = {
            "CHANNELS": max(triton.next_power_of_2(C), 16),
            "COLUMNS": max(triton.next_power_of_2(C2), 16),
            "CENTERS": centers,
            "NEIGHBORS": neighbors,
            "num_warps": 4 if C <= _FEW_CHANNELS else _THREADS // warp_size(),
            "num_stages": 1,
            **factors_like(x, "matmul"),
        }


def _empty_forward(x: Tensor, index: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    (B, M, K), C, matrix = index.shape, x.shape[2], rest[5]
    y, which, stats2 = empty_maxima(x, (B, M, K, matrix.shape[0]), torch.float32)
    return y, which, stats2, x.new_empty(y.shape), stats2.new_empty((B, 3, C))


@op(fake=_empty_forward)
def _group_mlp_max_op(
    x: Tensor,
    index: Tensor,
    offsets: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    offset: Tensor | None,
    matrix: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    offset2: Tensor | None,
    num_groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Maxima, which neighbour has each, the second norm's statistics, x2 of each maximum, the first's statistics."""
    y, which, stats2, raw, stats = _empty_forward(x, index, offsets, weight, scale, shift, offset, matrix)
    tiles, matrix = _Tiles(x, index, matrix), matrix.contiguous()
    points = (x.contiguous(), index.contiguous(), offsets.contiguous(), weight.contiguous())
    style, strides = per_cloud(scale, shift)
    style2, strides2 = per_cloud(scale2, shift2)
    for last, into, shared in ((None, stats, offset), (matrix, stats2, offset2)):
        block = tiles.block if last is not None else {**tiles.block, "COLUMNS": tiles.block["CHANNELS"]}
        partials = stats.new_empty((tiles.B, tiles.chunks, 2, into.shape[2]))
        tensors = (*points, stats, *style, last, partials)
        launch(_moments_kernel, tiles.chunk_grid, *tensors, *strides, *tiles.chunk_sizes, **block)
        channels = RowChunks(into, num_groups, 1).channels
        rows = tiles.chunk_centers * tiles.K
        launch_statistics(partials, shared, into, eps, tiles.M * tiles.K, num_groups, rows, channels)
    tensors = (*points, stats, *style, matrix, stats2, *style2, y, raw, which)
    launch(_maxima_kernel, tiles.grid, *tensors, *strides, *strides2, *tiles.sizes, **tiles.block)
    return y, which, stats2, raw, stats


def _empty_backward(grad: Tensor, x: Tensor, index: Tensor, offsets: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    def empty(like: Tensor | None) -> Tensor:
        return x.new_empty(0) if like is None else like.new_empty(like.shape)

    moved = rest[-1]
    return x.new_empty((index.numel(), x.shape[2])), *map(empty, (offsets if moved else None, *rest[:8]))


@op(fake=_empty_backward)
def _group_mlp_max_bwd_op(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    offsets: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    offset: Tensor | None,
    matrix: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    offset2: Tensor | None,
    which: Tensor,
    stats2: Tensor,
    raw: Tensor,
    stats: Tensor,
    num_groups: int,
    moved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x1 (B M K, C), offsets (empty unless ``moved``), and all that follow (empty without one)."""
    grad, matrix = grad.contiguous(), matrix.contiguous()
    dx, doffsets, _, dscale, dshift, doffset, _, dscale2, dshift2, doffset2 = _empty_backward(
        grad, x, index, offsets, weight, scale, shift, offset, matrix, scale2, shift2, offset2, moved
    )
    of_second = (dscale2, dshift2, None if offset2 is None else doffset2)
    tiles = _Tiles(x, index, matrix)
    of_maxima = torch.empty_like(raw, dtype=torch.float32)
    means2 = means_of_maxima(grad, raw, stats2, scale2, shift2, of_second, tiles.K, num_groups, of_maxima)

    points = (x.contiguous(), index.contiguous(), offsets.contiguous(), weight.contiguous())
    style, strides = per_cloud(scale, shift)
    tensors = (*points, stats, *style, matrix, stats2, of_maxima, which, means2)
    partials = stats.new_empty((tiles.B, tiles.chunks, 2, x.shape[2]))
    of_matrix = stats.new_empty((*tiles.chunk_grid, *matrix.shape))
    sizes = (*strides, *tiles.chunk_sizes)
    columns = min(tiles.block["COLUMNS"], _MATRIX_ROWS)
    of_blocks = (*tiles.chunk_grid, triton.cdiv(len(matrix), columns))
    launch(_bwd_sums_kernel, tiles.chunk_grid, *tensors, partials, None, *sizes, **tiles.block)
    launch(_bwd_sums_kernel, of_blocks, *tensors, None, of_matrix, *sizes, **{**tiles.block, "COLUMNS": columns})

    means, channels = torch.empty_like(stats[:, :2]), RowChunks(stats, num_groups, 1).channels
    at_once = max(_PARTIALS // (channels["GROUPS"] * channels["WIDTH"]), 1)
    sizes = (strides[0], tiles.M * tiles.K, x.shape[2], num_groups, tiles.chunks)
    tensors_of_means = (partials, stats, style[0], means, dscale, dshift, None if offset is None else doffset)
    launch(_bwd_means_kernel, (tiles.B,), *tensors_of_means, *sizes, CHUNKS=at_once, **channels)
    of_weight = stats.new_empty((*tiles.grid, 3, x.shape[2]))
    out = (means, dx, doffsets if moved else None, of_weight)
    launch(_bwd_kernel, tiles.grid, *tensors, *out, *strides, *tiles.sizes, **tiles.block)
    dweight = of_weight.sum(0).T.to(weight.dtype, copy=True, memory_format=torch.contiguous_format)
    dmatrix = of_matrix.sum(0).to(matrix.dtype)
    return dx, doffsets, dweight, dscale, dshift, doffset, dmatrix, dscale2, dshift2, doffset2


@gradient(
    _group_mlp_max_op,
    save=lambda *arguments_and_out: (*arguments_and_out[:11], *arguments_and_out[-1][1:], arguments_and_out[11]),
)
def _group_mlp_max_backward(needs: Needs, grad: Tensor, x: Tensor, index: Tensor, *saved: Any) -> Gradients:
    arguments: Any = (grad, x, index, *saved, needs[2])
    of_rows, *gradients = _group_mlp_max_bwd_op(*arguments)
    rows = row_index(index, x.shape[1]).reshape(-1, 1)
    dx = take_rows_backward(of_rows, rows, None, x[..., 0].numel()).view(x.shape) if needs[0] else None
    return dx, None, *(d if needed else None for d, needed in zip(gradients, needs[2:], strict=False))
