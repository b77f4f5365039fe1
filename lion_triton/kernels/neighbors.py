"""Neighbours in point clouds: nearest, first K in a ball, three nearest; gathering and interpolating by them.

    nearest_neighbor   i(p) = argmin_q |x_p - y_q|^2,  d(p) = |x_p - y_i(p)|^2
                       backward  dx_p = 2 (x_p - y_i(p)) dd_p,   dy_q = -2 sum_{p: i(p) = q} (x_p - y_q) dd_p
    chamfer_distance   mean_p min_q |x_p - y_q|^2 + mean_q min_p |x_p - y_q|^2
    ball_query         the first K points, in index order, with |point - centre|^2 < radius^2
    three_nn           the three nearest centres, w_k = (1 / d_k) / sum_j (1 / d_j), d clamped to [1e-10, 1e10]
    group              G[m, k] = F[i(m, k)]                 backward  dF[n] = sum_{m,k: i(m,k) = n} dG[m, k]
    three_interpolate  O[n] = sum_k w_k(n) F[i_k(n)]        backward  dF[m] = sum_{n,k: i_k(n) = m} w_k(n) dO[n]
                                                                      dw_k(n) = dO[n] . F[i_k(n)]

Squared distances are sums of squared differences, ((dx^2 + dy^2) + dz^2): |x|^2 + |y|^2 - 2 x.y would lose
all digits of small ones. Equal distances go to the lowest index. A backward never scatters: it visits the
entries in order of the row they point at (stable sort) and sums each row's run, so two runs agree bit for bit.

The kernels hold a block of one cloud in registers and walk the other one point at a time, the same for all
threads; no distance matrix, no tiles, no exchange between threads. Nearest neighbour: 8 operations a pair of
points at best and 12 (N + M) bytes a cloud, so arithmetic decides; both directions of Chamfer are one launch.
Three nearest and ball query: about 20 operations a pair.

Legend: B clouds, N points, M centres or points of the second cloud, K neighbours, C channels.
Coordinates and distances are float32 (in the references float64 where the input is), indices int32.
Sources: Qi et al., "PointNet++", NeurIPS 2017 (ball_query, three_nn, three_interpolate); Fan et al., "A Point Set
Generation Network", CVPR 2017 (Chamfer distance).
"""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from lion_triton.kernels._checks import Impl, check_float, check_points, check_same, upcast, use_triton
from lion_triton.kernels._triton import tl, triton
from lion_triton.kernels.rows import take_rows, transpose

# Points in registers per program: the first that makes _PROGRAMS programs, about two for each multiprocessor of a
# large card. The other cloud comes eight points at a time. Chosen by machine code, not by timing.
_BLOCKS, _WARPS = (512, 256, 128), 4
_THREE_BLOCKS = (256, 128)  # three distances and indices a point: 512 spill
_BALL_BLOCKS = (64, 32)  # one warp: it stops when all its centres are full
_PROGRAMS = 256
_UNROLL = 8
_PULL_BLOCK, _PULL_LANES = 64, 4  # rows per program of the backward, and entries that a row adds at a time


# References


def squared_distances(x: Float[Tensor, "B N 3"], y: Float[Tensor, "B M 3"]) -> Float[Tensor, "B N M"]:
    """All squared distances, in memory, without gradient. Unchecked; for whole clouds see sqdist_blocks."""
    x, y = x.detach(), y.detach().mT.contiguous()
    sqdist = (x[:, :, 0, None] - y[:, 0, None]).square_()
    for axis in (1, 2):
        diff = x[:, :, axis, None] - y[:, axis, None]
        sqdist.addcmul_(diff, diff)
    return sqdist


def sqdist_blocks(
    x: Float[Tensor, "B N 3"], y: Float[Tensor, "B M 3"]
) -> Iterator[tuple[slice, slice, Float[Tensor, "b n M"]]]:
    """Squared distances block by block: (clouds, points of x, their distances to all of y)."""
    (B, N, _), M = x.shape, y.shape[1]
    size = block_size(x)
    rows = min(N, max(1, size // M))
    clouds = max(1, size // (N * M))
    for b in range(0, B, clouds):
        for i in range(0, N, rows):
            block = slice(b, b + clouds), slice(i, i + rows)
            yield *block, squared_distances(x[block], y[block[0]])


def block_size(x: Tensor) -> int:
    """Distances per block: half a megabyte stays in a CPU's cache (5 times faster), a GPU wants many."""
    return 1 << 17 if x.device.type == "cpu" else 1 << 25


def nearest_neighbor_reference(
    x: Float[Tensor, "B N 3"], y: Float[Tensor, "B M 3"]
) -> tuple[Float[Tensor, "B N"], Int32[Tensor, "B N"]]:
    """Plain PyTorch form of :func:`nearest_neighbor`."""
    x, y = upcast(x), upcast(y)
    idx = torch.empty(x.shape[:2], dtype=torch.int32, device=x.device)
    for b, i, sqdist in sqdist_blocks(x, y):
        idx[b, i] = _argmin(sqdist)
    nearest = group_reference(y, idx[..., None]).squeeze(2)
    return (x - nearest).square().sum(-1), idx


def chamfer_distance_reference(x: Float[Tensor, "B N 3"], y: Float[Tensor, "B M 3"]) -> Float[Tensor, " B"]:
    """Plain PyTorch form of :func:`chamfer_distance`."""
    return nearest_neighbor_reference(x, y)[0].mean(1) + nearest_neighbor_reference(y, x)[0].mean(1)


def ball_query_reference(
    centers: Float[Tensor, "B M 3"], points: Float[Tensor, "B N 3"], radius: float, k: int
) -> Int32[Tensor, "B M K"]:
    """Plain PyTorch form of :func:`ball_query`."""
    centers, points = upcast(centers), upcast(points)
    (B, M, _), N = centers.shape, points.shape[1]
    idx = torch.empty(B, M, k, dtype=torch.int32, device=points.device)
    order = torch.arange(N, dtype=torch.int32, device=points.device)
    for b, i, sqdist in sqdist_blocks(centers, points):
        keys = (sqdist < radius * radius).int().mul_(-N).add_(order + N)  # hits first, in index order
        hits = keys.topk(min(k, N), largest=False).values
        first = torch.where(hits[..., :1] < N, hits[..., :1], 0)
        idx[b, i] = first
        idx[b, i, :N] = torch.where(hits < N, hits, first)
    return idx


def three_nn_reference(
    points: Float[Tensor, "B N 3"], centers: Float[Tensor, "B M 3"]
) -> tuple[Float[Tensor, "B N 3"], Int32[Tensor, "B N 3"]]:
    """Plain PyTorch form of :func:`three_nn`."""
    points, centers = upcast(points), upcast(centers)
    weights = points.new_zeros(points.shape)
    idx = torch.zeros(points.shape, dtype=torch.int32, device=points.device)
    for b, i, sqdist in sqdist_blocks(points, centers):
        for k in range(min(3, centers.shape[1])):
            nearest = _argmin(sqdist)[..., None]
            idx[b, i, k : k + 1] = nearest
            weights[b, i, k : k + 1] = sqdist.gather(2, nearest).clamp_(1e-10, 1e10).reciprocal_()
            sqdist.scatter_(2, nearest, torch.inf)
    return weights / weights.sum(-1, keepdim=True), idx


def group_reference(features: Float[Tensor, "B N C"], idx: Int[Tensor, "B M K"]) -> Float[Tensor, "B M K C"]:
    """Plain PyTorch form of :func:`group`."""
    return _group(features, idx, "reference")


def three_interpolate_reference(
    features: Float[Tensor, "B M C"], weights: Float[Tensor, "B N 3"], idx: Int[Tensor, "B N 3"]
) -> Float[Tensor, "B N C"]:
    """Plain PyTorch form of :func:`three_interpolate`."""
    return _three_interpolate(features, weights, idx, "reference")


def _argmin(x: Tensor) -> Tensor:
    """Index of the least value along the last dimension, the first of equal ones."""
    if x.device.type == "cpu":  # NumPy's is vectorised: 10 times faster than PyTorch's
        return torch.from_numpy(x.numpy().argmin(-1))
    return x.argmin(-1)


# Gathers, in both forms rows of all clouds at once


def _group(features: Tensor, idx: Tensor, impl: Impl) -> Tensor:
    rows = take_rows(features.flatten(0, 1), _row_index(idx, features.shape[1]).reshape(-1, 1), impl=impl)
    return rows.view(*idx.shape, features.shape[2])


def _three_interpolate(features: Tensor, weights: Tensor, idx: Tensor, impl: Impl) -> Tensor:
    index = _row_index(idx, features.shape[1]).flatten(0, 1)
    rows = take_rows(features.flatten(0, 1), index, weights.flatten(0, 1), impl=impl)
    return rows.view(*idx.shape[:2], features.shape[2])


def _row_index(idx: Int[Tensor, "B ..."], num_points: int) -> Int[Tensor, "B ..."]:
    """Indices into the rows of all clouds, (B N)."""
    num_rows = idx.shape[0] * num_points
    dtype = _index_dtype(num_rows)
    cloud = torch.arange(0, num_rows, num_points, dtype=dtype, device=idx.device)
    return idx.to(dtype) + cloud.view(-1, 1, 1)


def _index_dtype(num_rows: int) -> torch.dtype:
    """Int32 where it can count the rows: half the bytes to load and to sort."""
    return torch.int32 if num_rows < 2**31 else torch.int64


# Kernels


@triton.jit
def _load_scalars(ptr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    scalars = ()
    for i in tl.static_range(COUNT):
        scalars = scalars + (tl.load(ptr + i).to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return scalars


@triton.jit
def load_points(ptr, row, mask=None, other=None):  # type: ignore[no-untyped-def]
    """The coordinates of the points at ``row``, an integer or a block of them."""
    p = ptr + row.to(tl.int64) * 3
    x = tl.load(p, mask=mask, other=other).to(tl.float32)
    y = tl.load(p + 1, mask=mask, other=other).to(tl.float32)
    z = tl.load(p + 2, mask=mask, other=other).to(tl.float32)
    return x, y, z


@triton.jit
def point_sqdist(px, py, pz, qx, qy, qz):  # type: ignore[no-untyped-def]
    dx = px - qx
    dy = py - qy
    dz = pz - qz
    return tl.fma(dz, dz, tl.fma(dy, dy, dx * dx))  # left to the compiler, equal points might round differently


@triton.jit
def _nearest_kernel(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, sqdist_ptr, idx_ptr, partial_ptr, B, N, M, x_blocks, blocks, BLOCK: tl.constexpr, UNROLL: tl.constexpr
):
    """From x to y, distance and index; or, with ``partial_ptr``, both ways: parts of the mean distances, and every
    point's partner as a row of all x and, behind them, all y. UNROLL: at most M, and then at most N too.
    """
    pid = tl.program_id(0)
    cloud = (pid // blocks).to(tl.int64)
    block = pid % blocks
    row, other_row, size, other_size = cloud * N, cloud * M, N, M  # first rows
    if partial_ptr is not None:
        back = block >= x_blocks
        if back:
            x_ptr, y_ptr = y_ptr, x_ptr
        block -= tl.where(back, x_blocks, 0)
        row, other_row = tl.where(back, other_row, row), tl.where(back, row, other_row)
        size, other_size = tl.where(back, M, N), tl.where(back, N, M)
    n = block * BLOCK + tl.arange(0, BLOCK)
    live = n < size
    px, py, pz = load_points(x_ptr, row + tl.minimum(n, size - 1))
    y_ptr += other_row * 3

    # Only the group of UNROLL points with the nearest one is remembered: 1 + 3 / UNROLL operations a pair, not 3.
    best = tl.full((BLOCK,), float("inf"), tl.float32)
    idx = tl.zeros((BLOCK,), tl.int32)
    ahead = _load_scalars(y_ptr, 3 * UNROLL)
    for j in range(0, other_size, UNROLL):
        q = ahead  # the next group is on its way while this one is compared
        ahead = _load_scalars(y_ptr + tl.minimum(j + UNROLL, other_size - UNROLL).to(tl.int64) * 3, 3 * UNROLL)
        least = point_sqdist(px, py, pz, q[0], q[1], q[2])
        for u in tl.static_range(1, UNROLL):
            least = tl.minimum(least, point_sqdist(px, py, pz, q[3 * u], q[3 * u + 1], q[3 * u + 2]))
        closer = least < best
        best = tl.where(closer, least, best)
        idx = tl.where(closer, tl.minimum(j, other_size - UNROLL), idx)  # the last group may begin earlier
    group = idx
    qx, qy, qz = load_points(y_ptr, group)
    best = point_sqdist(px, py, pz, qx, qy, qz)  # not a number stays one
    for u in tl.static_range(1, UNROLL):
        qx, qy, qz = load_points(y_ptr, group + u)
        sqdist = point_sqdist(px, py, pz, qx, qy, qz)
        closer = sqdist < best
        best = tl.where(closer, sqdist, best)
        idx = tl.where(closer, group + u, idx)

    if partial_ptr is None:
        tl.store(sqdist_ptr + row + n, best.to(sqdist_ptr.dtype.element_ty), mask=live)
        tl.store(idx_ptr + row + n, idx, mask=live)
    else:
        x_rows = tl.full((), B, tl.int64) * N
        partner = other_row + tl.where(back, 0, x_rows) + idx
        row += tl.where(back, x_rows, 0)
        tl.store(idx_ptr + row + n, partner.to(idx_ptr.dtype.element_ty), mask=live)
        tl.store(partial_ptr + pid, tl.sum(tl.where(live, best, 0.0)) / size)


@triton.jit
def _pull_weight(grad_ptr, row, live, B, N, M, PER_CLOUD: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the gradient of a squared distance is multiplied with: 2 and its own gradient."""
    if PER_CLOUD:
        x_rows = tl.full((), B, tl.int64) * N
        in_x = row < x_rows
        size = tl.where(in_x, N, M)
        cloud = tl.where(in_x, row, row - x_rows) // size
        return tl.load(grad_ptr + cloud, mask=live, other=0.0).to(tl.float32) * 2.0 / size
    return tl.load(grad_ptr + row, mask=live, other=0.0).to(tl.float32) * 2.0


@triton.jit
def _nearest_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    points_ptr,
    partner_ptr,
    source_ptr,
    start_ptr,
    out_ptr,
    num_rows,
    num_partners,
    B,
    N,
    M,
    PER_CLOUD: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Every row is pulled by its partner, if it has one, and by the rows whose partner it is (``source``, sorted)."""
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = r < num_rows
    row = tl.minimum(r, num_rows - 1)
    px, py, pz = load_points(points_ptr, row)
    first = tl.load(start_ptr + r, mask=live, other=0)
    count = tl.load(start_ptr + r + 1, mask=live, other=0) - first
    gx = tl.zeros((BLOCK, LANES), tl.float32)
    gy = tl.zeros((BLOCK, LANES), tl.float32)
    gz = tl.zeros((BLOCK, LANES), tl.float32)
    for k in range(0, tl.max(count), LANES):
        lane = k + tl.arange(0, LANES)[None, :]
        pulls = lane < count[:, None]
        source = tl.load(source_ptr + first[:, None] + lane, mask=pulls, other=0).to(tl.int64)
        qx, qy, qz = load_points(points_ptr, source)
        weight = _pull_weight(grad_ptr, source, pulls, B, N, M, PER_CLOUD)
        gx += weight * (px[:, None] - qx)
        gy += weight * (py[:, None] - qy)
        gz += weight * (pz[:, None] - qz)
    has_partner = live & (r < num_partners)
    qx, qy, qz = load_points(points_ptr, tl.load(partner_ptr + r, mask=has_partner, other=0))
    weight = _pull_weight(grad_ptr, row, has_partner, B, N, M, PER_CLOUD)
    out_type: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + r * 3, (tl.sum(gx, 1) + weight * (px - qx)).to(out_type), mask=live)
    tl.store(out_ptr + r * 3 + 1, (tl.sum(gy, 1) + weight * (py - qy)).to(out_type), mask=live)
    tl.store(out_ptr + r * 3 + 2, (tl.sum(gz, 1) + weight * (pz - qz)).to(out_type), mask=live)


@triton.jit
def _ball_query_kernel(  # type: ignore[no-untyped-def]
    centers_ptr, points_ptr, idx_ptr, sq_radius, M, N, k, blocks, BLOCK: tl.constexpr, UNROLL: tl.constexpr
):
    """Each thread keeps its centre's count, which is the slot of the next hit. UNROLL: at most N."""
    cloud = (tl.program_id(0) // blocks).to(tl.int64)
    m = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    live = m < M
    px, py, pz = load_points(centers_ptr, cloud * M + tl.minimum(m, M - 1))
    points_ptr += cloud * N * 3
    slots = idx_ptr + (cloud * M + m) * k
    count = tl.where(live, 0, k)
    ahead = _load_scalars(points_ptr, 3 * UNROLL)
    j = tl.zeros((), tl.int32)
    while (j < N) & (tl.min(count) < k):
        q = ahead
        ahead = _load_scalars(points_ptr + tl.minimum(j + UNROLL, N - UNROLL).to(tl.int64) * 3, 3 * UNROLL)
        for u in tl.static_range(UNROLL):
            n = tl.minimum(j, N - UNROLL) + u
            limit = tl.where(n >= j, sq_radius, 0.0)  # the last group may begin with points that have been
            hit = (point_sqdist(px, py, pz, q[3 * u], q[3 * u + 1], q[3 * u + 2]) < limit) & (count < k)
            tl.store(slots + count, n, mask=hit)
            count += hit.to(tl.int32)
        j += UNROLL
    tl.debug_barrier()  # the first slot may have been written by another thread
    first = tl.load(slots, mask=live & (count > 0), other=0)
    for i in range(k):
        tl.store(slots + i, first, mask=live & (i >= count))


@triton.jit
def _three_nn_kernel(  # type: ignore[no-untyped-def]
    points_ptr, centers_ptr, weights_ptr, idx_ptr, N, M, blocks, BLOCK: tl.constexpr, UNROLL: tl.constexpr
):
    """UNROLL: at most M."""
    cloud = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    live = n < N
    px, py, pz = load_points(points_ptr, cloud * N + tl.minimum(n, N - 1))
    centers_ptr += cloud * M * 3
    d0 = tl.full((BLOCK,), float("inf"), tl.float32)
    d1, d2 = d0, d0
    i0 = tl.zeros((BLOCK,), tl.int32)
    i1, i2 = i0, i0
    ahead = _load_scalars(centers_ptr, 3 * UNROLL)
    for j in range(0, M, UNROLL):
        q = ahead
        ahead = _load_scalars(centers_ptr + tl.minimum(j + UNROLL, M - UNROLL).to(tl.int64) * 3, 3 * UNROLL)
        for u in tl.static_range(UNROLL):
            m = tl.minimum(j, M - UNROLL) + u
            qx = tl.where(m >= j, q[3 * u], float("inf"))  # the last group may begin with centres that have been
            d = point_sqdist(px, py, pz, qx, q[3 * u + 1], q[3 * u + 2])
            i2 = tl.where(d < d1, i1, tl.where(d < d2, m, i2))
            i1 = tl.where(d < d0, i0, tl.where(d < d1, m, i1))
            i0 = tl.where(d < d0, m, i0)
            d2 = tl.minimum(d2, tl.maximum(d1, d))
            d1 = tl.minimum(d1, tl.maximum(d0, d))
            d0 = tl.minimum(d0, d)
    w0 = _inverse(px, py, pz, centers_ptr, i0)
    w1 = tl.where(M > 1, _inverse(px, py, pz, centers_ptr, i1), 0.0)
    w2 = tl.where(M > 2, _inverse(px, py, pz, centers_ptr, i2), 0.0)
    total = w0 + w1 + w2
    slots = (cloud * N + n) * 3
    weights_type: tl.constexpr = weights_ptr.dtype.element_ty
    tl.store(weights_ptr + slots, (w0 / total).to(weights_type), mask=live)
    tl.store(weights_ptr + slots + 1, (w1 / total).to(weights_type), mask=live)
    tl.store(weights_ptr + slots + 2, (w2 / total).to(weights_type), mask=live)
    tl.store(idx_ptr + slots, i0, mask=live)
    tl.store(idx_ptr + slots + 1, i1, mask=live)
    tl.store(idx_ptr + slots + 2, i2, mask=live)


@triton.jit
def _inverse(px, py, pz, centers_ptr, idx):  # type: ignore[no-untyped-def]
    """Inverse distance to the chosen centre: not a number where the point is not, as in the reference."""
    qx, qy, qz = load_points(centers_ptr, idx)
    d = point_sqdist(px, py, pz, qx, qy, qz)
    return 1.0 / tl.where(d < 1e-10, 1e-10, tl.where(d > 1e10, 1e10, d))


# Launching and registration


def _empty(*shape: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _sums_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _block(num_points: int, blocks: tuple[int, ...] = _BLOCKS) -> int:
    """Points per program."""
    return next((block for block in blocks if num_points >= _PROGRAMS * block), blocks[-1])


def _unroll(*clouds: Tensor) -> int:
    """Points at a time of the clouds that are walked."""
    return _UNROLL if min(c.shape[1] for c in clouds) >= _UNROLL else 1


def _launch_nearest(
    x: Tensor, y: Tensor, block: int, *, sqdist: Tensor | None = None, idx: Tensor, partials: Tensor | None = None
) -> None:
    (B, N), M = x.shape[:2], y.shape[1]
    x_blocks = triton.cdiv(N, block)
    blocks = x_blocks if partials is None else partials.shape[1]
    if B:
        with torch.cuda.device_of(x):
            _nearest_kernel[(B * blocks,)](
                x.contiguous(),
                y.contiguous(),
                sqdist,
                idx,
                partials,
                B,
                N,
                M,
                x_blocks,
                blocks,
                BLOCK=block,
                UNROLL=_unroll(y) if partials is None else _unroll(x, y),
                num_warps=_WARPS,
            )


def _launch_nearest_bwd(grad: Tensor, x: Tensor, y: Tensor, partner: Tensor, per_cloud: bool) -> Tensor:
    """Gradients of the rows of x and, behind them, of y."""
    rows = torch.cat((x.flatten(0, 1), y.flatten(0, 1)))
    out = torch.empty_like(rows)
    if len(rows):
        source, start, _ = transpose(partner[:, None], None, len(rows), impl="triton")
        with torch.cuda.device_of(x):
            _nearest_bwd_kernel[(triton.cdiv(len(rows), _PULL_BLOCK),)](
                grad.contiguous(),
                rows,
                partner,
                source,
                start,
                out,
                len(rows),
                len(partner),
                *x.shape[:2],
                y.shape[1],
                PER_CLOUD=per_cloud,
                BLOCK=_PULL_BLOCK,
                LANES=_PULL_LANES,
                num_warps=_WARPS,
            )
    return out


def _split(rows: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x_rows = x.shape[0] * x.shape[1]
    return rows[:x_rows].view(x.shape), rows[x_rows:].view(y.shape)


# nearest_neighbor


@torch.library.custom_op("lion_triton::nearest_neighbor", mutates_args=())
def _nearest_neighbor_op(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    sqdist = _empty(*x.shape[:2], dtype=_sums_dtype(x), like=x)
    idx = _empty(*x.shape[:2], dtype=torch.int32, like=x)
    _launch_nearest(x, y, _block(idx.numel()), sqdist=sqdist, idx=idx)
    return sqdist, idx


@_nearest_neighbor_op.register_fake
def _(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return (
        _empty(*x.shape[:2], dtype=_sums_dtype(x), like=x),
        _empty(*x.shape[:2], dtype=torch.int32, like=x),
    )


@torch.library.custom_op("lion_triton::nearest_neighbor_bwd", mutates_args=())
def _nearest_neighbor_bwd_op(grad: Tensor, x: Tensor, y: Tensor, idx: Tensor) -> Tensor:
    x_rows = idx.numel()
    dtype = _index_dtype(x_rows + y.shape[0] * y.shape[1])
    first = torch.arange(x_rows, x_rows + y.shape[0] * y.shape[1], y.shape[1], dtype=dtype, device=x.device)
    return _launch_nearest_bwd(grad, x, y, (idx + first[:, None]).flatten(), per_cloud=False)


@_nearest_neighbor_bwd_op.register_fake
def _(grad: Tensor, x: Tensor, y: Tensor, idx: Tensor) -> Tensor:
    return _empty(x.shape[0] * (x.shape[1] + y.shape[1]), 3, dtype=x.dtype, like=x)


def _nearest_neighbor_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _nearest_neighbor_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor]:
    x, y, idx = ctx.saved_tensors
    return _split(_nearest_neighbor_bwd_op(grad, x, y, idx), x, y)


_nearest_neighbor_op.register_autograd(_nearest_neighbor_backward, setup_context=_nearest_neighbor_setup)


# chamfer_distance


@torch.library.custom_op("lion_triton::chamfer_distance", mutates_args=())
def _chamfer_op(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The distance, and every point's partner (see the kernel)."""
    (B, N), M = x.shape[:2], y.shape[1]
    block = _block(B * (N + M))
    partner = _empty(B * (N + M), dtype=_index_dtype(B * (N + M)), like=x)
    partials = _empty(B, triton.cdiv(N, block) + triton.cdiv(M, block), dtype=torch.float32, like=x)
    _launch_nearest(x, y, block, idx=partner, partials=partials)
    return partials.sum(1).to(_sums_dtype(x)), partner


@_chamfer_op.register_fake
def _(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] * (x.shape[1] + y.shape[1])
    return _empty(x.shape[0], dtype=_sums_dtype(x), like=x), _empty(rows, dtype=_index_dtype(rows), like=x)


@torch.library.custom_op("lion_triton::chamfer_distance_bwd", mutates_args=())
def _chamfer_bwd_op(grad: Tensor, x: Tensor, y: Tensor, partner: Tensor) -> Tensor:
    return _launch_nearest_bwd(grad, x, y, partner, per_cloud=True)


@_chamfer_bwd_op.register_fake
def _(grad: Tensor, x: Tensor, y: Tensor, partner: Tensor) -> Tensor:
    return _empty(partner.shape[0], 3, dtype=x.dtype, like=x)


def _chamfer_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _chamfer_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor]:
    x, y, partner = ctx.saved_tensors
    return _split(_chamfer_bwd_op(grad, x, y, partner), x, y)


_chamfer_op.register_autograd(_chamfer_backward, setup_context=_chamfer_setup)


# ball_query and three_nn, without gradients


@torch.library.custom_op("lion_triton::ball_query", mutates_args=())
def _ball_query_op(centers: Tensor, points: Tensor, radius: float, k: int) -> Tensor:
    (B, M), N = centers.shape[:2], points.shape[1]
    idx = _empty(B, M, k, dtype=torch.int32, like=points)
    block = _block(B * M, _BALL_BLOCKS)
    blocks = triton.cdiv(M, block)
    if B:
        with torch.cuda.device_of(points):
            _ball_query_kernel[(B * blocks,)](
                centers.contiguous(),
                points.contiguous(),
                idx,
                radius * radius,
                M,
                N,
                k,
                blocks,
                BLOCK=block,
                UNROLL=_unroll(points),
                num_warps=1,
            )
    return idx


@_ball_query_op.register_fake
def _(centers: Tensor, points: Tensor, radius: float, k: int) -> Tensor:
    return _empty(*centers.shape[:2], k, dtype=torch.int32, like=points)


@torch.library.custom_op("lion_triton::three_nn", mutates_args=())
def _three_nn_op(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    B, N = points.shape[:2]
    weights = _empty(B, N, 3, dtype=_sums_dtype(points), like=points)
    idx = _empty(B, N, 3, dtype=torch.int32, like=points)
    block = _block(B * N, _THREE_BLOCKS)
    blocks = triton.cdiv(N, block)
    if B:
        with torch.cuda.device_of(points):
            _three_nn_kernel[(B * blocks,)](
                points.contiguous(),
                centers.contiguous(),
                weights,
                idx,
                N,
                centers.shape[1],
                blocks,
                BLOCK=block,
                UNROLL=_unroll(centers),
                num_warps=_WARPS,
            )
    return weights, idx


@_three_nn_op.register_fake
def _(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    B, N = points.shape[:2]
    return _empty(B, N, 3, dtype=_sums_dtype(points), like=points), _empty(B, N, 3, dtype=torch.int32, like=points)


# Public functions


def nearest_neighbor(
    x: Float[Tensor, "B N 3"], y: Float[Tensor, "B M 3"], *, impl: Impl = "auto"
) -> tuple[Float[Tensor, "B N"], Int32[Tensor, "B N"]]:
    """For each point of x the squared distance to its nearest point of y and that point's index.

    x: (B, N, 3), y: (B, M, 3), of one dtype. Returns (B, N) float32 (float64 for float64) and (B, N) int32;
    ties go to the lowest index. The distance is differentiable in x and y (once, by Triton) through the chosen
    pairs, the index is not. Deterministic, backward too. Triton computes float64 input in float32.
    ValueError: shapes, dtypes or devices that do not fit.
    """
    check_clouds(x=x, y=y)
    if not use_triton(impl, x):
        return nearest_neighbor_reference(x, y)
    return _nearest_neighbor_op(x, y)


def chamfer_distance(
    x: Float[Tensor, "B N 3"], y: Float[Tensor, "B M 3"], *, impl: Impl = "auto"
) -> Float[Tensor, " B"]:
    """Mean over x of the squared distance to y, plus mean over y of the squared distance to x, per cloud.

    x: (B, N, 3), y: (B, M, 3), of one dtype. Returns (B,) float32 (float64 for float64), in squared units of
    the coordinates. Differentiable in x and y (once, by Triton) through the nearest pairs. Deterministic,
    backward too. Triton computes float64 input in float32.
    Source: Fan et al. 2017. ValueError: shapes, dtypes or devices that do not fit.
    """
    check_clouds(x=x, y=y)
    if not use_triton(impl, x):
        return chamfer_distance_reference(x, y)
    return _chamfer_op(x, y)[0]


def ball_query(
    centers: Float[Tensor, "B M 3"],
    points: Float[Tensor, "B N 3"],
    radius: float,
    k: int,
    *,
    impl: Impl = "auto",
) -> Int32[Tensor, "B M K"]:
    """Indices of the first k points, in index order, closer to each centre than ``radius``.

    centers: (B, M, 3), points: (B, N, 3), of one dtype. radius: > 0, in units of the coordinates; a point at
    exactly that distance is outside. k: >= 1, may exceed N.
    Returns (B, M, k) int32. Slots beyond the last hit repeat the first one; a centre without any hit (it is
    none of the points) has index 0 in all slots, as in the published op. Not differentiable, deterministic.
    Triton computes float64 input in float32.
    Source: Qi et al. 2017. ValueError: shapes, dtypes or devices that do not fit; radius <= 0; k < 1.
    """
    check_clouds(centers=centers, points=points)
    if not isinstance(radius, Real) or not radius > 0:
        raise ValueError(f"radius: expected a number > 0, got {radius!r}")
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected an integer >= 1, got {k!r}")
    if not use_triton(impl, points):
        return ball_query_reference(centers, points, radius, k)
    return _ball_query_op(centers, points, radius, k)


def three_nn(
    points: Float[Tensor, "B N 3"], centers: Float[Tensor, "B M 3"], *, impl: Impl = "auto"
) -> tuple[Float[Tensor, "B N 3"], Int32[Tensor, "B N 3"]]:
    """The three centres nearest to each point and their interpolation weights.

    points: (B, N, 3), centers: (B, M, 3), of one dtype. Returns weights (B, N, 3) float32 (float64 for
    float64), which sum to 1, and indices (B, N, 3) int32, nearest first, ties to the lowest index. With fewer
    than three centres the missing ones have index 0 and weight 0. No gradient to coordinates; deterministic.
    Triton computes float64 input in float32.
    Source: Qi et al. 2017, eq. 2 with p = 2. ValueError: shapes, dtypes or devices that do not fit.
    """
    check_clouds(points=points, centers=centers)
    if not use_triton(impl, points):
        return three_nn_reference(points, centers)
    return _three_nn_op(points.detach(), centers.detach())


def group(
    features: Float[Tensor, "B N C"], idx: Int[Tensor, "B M K"], *, impl: Impl = "auto"
) -> Float[Tensor, "B M K C"]:
    """Rows of ``features`` at ``idx``: ``out[b, m, k] = features[b, idx[b, m, k]]``.

    features: (B, N, C), any floating dtype. idx: (B, M, K) int32 or int64 in [0, N) (checked on a CPU only, and not
    under torch.compile). Returns (B, M, K, C) in the dtype of features. Differentiable in features (once, by Triton;
    summed in float32, or float64 in the reference); deterministic, backward too.
    ValueError: shapes, dtypes, devices or indices that do not fit.
    """
    _check_gather(features, idx)
    return _group(features, idx, impl)


def three_interpolate(
    features: Float[Tensor, "B M C"],
    weights: Float[Tensor, "B N 3"],
    idx: Int[Tensor, "B N 3"],
    *,
    impl: Impl = "auto",
) -> Float[Tensor, "B N C"]:
    """Weighted sum of three rows: ``out[b, n] = sum_k weights[b, n, k] features[b, idx[b, n, k]]``.

    features: (B, M, C), any floating dtype. weights, idx: (B, N, 3) of :func:`three_nn`; idx int32 or int64 in
    [0, M) (checked on a CPU only, and not under torch.compile). Summed in float32 (float64 in the reference),
    returned as (B, N, C) in the dtype of features. Differentiable in features and weights (once, by Triton);
    deterministic, backward too.
    Source: Qi et al. 2017, eq. 2. ValueError: shapes, dtypes, devices or indices that do not fit.
    """
    _check_gather(features, idx)
    check_float("weights", weights)
    check_same(features=features, weights=weights)
    if weights.shape != idx.shape or idx.shape[-1] != 3:
        shapes = f"{tuple(weights.shape)} and {tuple(idx.shape)}"
        raise ValueError(f"weights, idx: expected the same shape (B, N, 3), got {shapes}")
    return _three_interpolate(features, weights, idx, impl)


def check_clouds(**clouds: Tensor) -> None:
    """Raise ``ValueError`` unless two cloud batches share batch size, device and dtype."""
    for name, cloud in clouds.items():
        check_points(name, cloud)
    check_same(**clouds)
    (first, a), (second, b) = clouds.items()
    if a.dtype != b.dtype:
        raise ValueError(f"{second}: expected the dtype of {first} ({a.dtype}), got {b.dtype}")


def _check_gather(features: Tensor, idx: Tensor) -> None:
    check_float("features", features)
    if features.ndim != 3 or 0 in features.shape[1:]:
        raise ValueError(f"features: expected shape (B, N, C) with N, C >= 1, got {tuple(features.shape)}")
    if not isinstance(idx, Tensor) or idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"idx: expected int32 or int64, got {getattr(idx, 'dtype', type(idx).__name__)}")
    if idx.ndim != 3:
        raise ValueError(f"idx: expected shape (B, M, K), got {tuple(idx.shape)}")
    check_same(features=features, idx=idx)
    if idx.device.type == "cpu" and idx.numel() and not torch.compiler.is_compiling():
        low, high = (v.item() for v in idx.aminmax())
        if low < 0 or high >= features.shape[1]:
            raise ValueError(f"idx: expected values in [0, {features.shape[1]}), got {low} to {high}")
