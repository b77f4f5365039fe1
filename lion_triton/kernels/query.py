"""Neighbours that a network gathers by: the first K points in a ball, and the three nearest centres.

    ball_query   the first K points, in index order, with |point - centre|^2 < radius^2
    three_nn     the three nearest centres, w_k = (1 / d_k) / sum_j (1 / d_j), d clamped to [1e-10, 1e10]

Equal distances go to the lowest index. About 20 operations a pair of points.

Legend: B clouds, N points, M centres, K neighbours. Distances are float32 (in the references float64 where the input
is), indices int32. No gradients.
Source: Qi et al., "PointNet++", NeurIPS 2017.
"""

from __future__ import annotations

from numbers import Real

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from lion_triton.kernels._checks import Impl, check_clouds, check_integer, sums_dtype, upcast, use_triton
from lion_triton.kernels._op import op
from lion_triton.kernels._points import (
    argmin,
    load_points,
    load_scalars,
    point_sqdist,
    points_at_a_time,
    points_per_program,
    sqdist_blocks,
)
from lion_triton.kernels._triton import cdiv, launch, tl, triton

_THREE_BLOCKS, _THREE_WARPS = (256, 128), 4  # three distances and indices a point: 512 spill
_BALL_BLOCKS = (64, 32)  # one warp: it stops when all its centres are full


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
            nearest = argmin(sqdist)[..., None]
            idx[b, i, k : k + 1] = nearest
            weights[b, i, k : k + 1] = sqdist.gather(2, nearest).clamp_(1e-10, 1e10).reciprocal_()
            sqdist.scatter_(2, nearest, torch.inf)
    return weights / weights.sum(-1, keepdim=True), idx


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
    ahead = load_scalars(points_ptr, 3 * UNROLL)
    j = tl.zeros((), tl.int32)
    while (j < N) & (tl.min(count) < k):
        q = ahead
        ahead = load_scalars(points_ptr + tl.minimum(j + UNROLL, N - UNROLL).to(tl.int64) * 3, 3 * UNROLL)
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
    ahead = load_scalars(centers_ptr, 3 * UNROLL)
    for j in range(0, M, UNROLL):
        q = ahead
        ahead = load_scalars(centers_ptr + tl.minimum(j + UNROLL, M - UNROLL).to(tl.int64) * 3, 3 * UNROLL)
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


def _empty_ball(centers: Tensor, points: Tensor, radius: float, k: int) -> Tensor:
    return points.new_empty((*centers.shape[:2], k), dtype=torch.int32)


@op(fake=_empty_ball)
def _ball_query_op(centers: Tensor, points: Tensor, radius: float, k: int) -> Tensor:
    idx = _empty_ball(centers, points, radius, k)
    B, M = centers.shape[:2]
    block = points_per_program(B * M, _BALL_BLOCKS)
    blocks = cdiv(M, block)
    launch(
        _ball_query_kernel,
        (B * blocks,),
        centers.contiguous(),
        points.contiguous(),
        idx,
        radius * radius,
        M,
        points.shape[1],
        k,
        blocks,
        BLOCK=block,
        UNROLL=points_at_a_time(points),
        num_warps=1,
    )
    return idx


def _empty_three(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    return points.new_empty(points.shape, dtype=sums_dtype(points)), points.new_empty(points.shape, dtype=torch.int32)


@op(fake=_empty_three)
def _three_nn_op(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    weights, idx = _empty_three(points, centers)
    B, N = points.shape[:2]
    block = points_per_program(B * N, _THREE_BLOCKS)
    blocks = cdiv(N, block)
    launch(
        _three_nn_kernel,
        (B * blocks,),
        points.contiguous(),
        centers.contiguous(),
        weights,
        idx,
        N,
        centers.shape[1],
        blocks,
        BLOCK=block,
        UNROLL=points_at_a_time(centers),
        num_warps=_THREE_WARPS,
    )
    return weights, idx


# Public functions


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
    k = check_integer("k", k, least=1)
    if not use_triton(impl, points):
        return ball_query_reference(centers, points, radius, k)
    return _ball_query_op(centers, points, float(radius), k)


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
