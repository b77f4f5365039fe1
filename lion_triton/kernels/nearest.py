"""Nearest neighbours between two point clouds, and the Chamfer distance.

    nearest_neighbor   i(p) = argmin_q |x_p - y_q|^2,  d(p) = |x_p - y_i(p)|^2
                       backward  dx_p = 2 (x_p - y_i(p)) dd_p,   dy_q = -2 sum_{p: i(p) = q} (x_p - y_q) dd_p
    chamfer_distance   mean_p min_q |x_p - y_q|^2 + mean_q min_p |x_p - y_q|^2

Equal distances go to the lowest index. The backward never scatters: it visits the entries in order of the row they
point at (stable sort) and sums each row's run, so two runs agree bit for bit.

8 operations a pair of points at best and 12 (N + M) bytes a cloud, so arithmetic decides; both directions of Chamfer
are one launch.

Legend: B clouds, N points of x, M points of y. Distances are float32 (in the references float64 where the input is),
indices int32.
Source: Fan et al., "A Point Set Generation Network", CVPR 2017 (Chamfer distance).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from lion_triton.kernels._checks import Impl, check_clouds, sums_dtype, upcast, use_triton
from lion_triton.kernels._op import Gradients, Needs, gradient, op
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
from lion_triton.kernels.gather import group_reference, index_dtype
from lion_triton.kernels.rows import transpose

_BLOCKS, _WARPS = (512, 256, 128), 4  # points of x per program
_PULL_BLOCK, _PULL_LANES = 64, 4  # rows per program of the backward, and entries that a row adds at a time


def nearest_neighbor_reference(
    x: Float[Tensor, "B N 3"], y: Float[Tensor, "B M 3"]
) -> tuple[Float[Tensor, "B N"], Int32[Tensor, "B N"]]:
    """Plain PyTorch form of :func:`nearest_neighbor`."""
    x, y = upcast(x), upcast(y)
    idx = torch.empty(x.shape[:2], dtype=torch.int32, device=x.device)
    for b, i, sqdist in sqdist_blocks(x, y):
        idx[b, i] = argmin(sqdist)
    nearest = group_reference(y, idx[..., None]).squeeze(2)
    return (x - nearest).square().sum(-1), idx


def chamfer_distance_reference(x: Float[Tensor, "B N 3"], y: Float[Tensor, "B M 3"]) -> Float[Tensor, " B"]:
    """Plain PyTorch form of :func:`chamfer_distance`."""
    return nearest_neighbor_reference(x, y)[0].mean(1) + nearest_neighbor_reference(y, x)[0].mean(1)


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
    ahead = load_scalars(y_ptr, 3 * UNROLL)
    for j in range(0, other_size, UNROLL):
        q = ahead  # the next group is on its way while this one is compared
        ahead = load_scalars(y_ptr + tl.minimum(j + UNROLL, other_size - UNROLL).to(tl.int64) * 3, 3 * UNROLL)
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


# Launching and registration


def _launch_nearest(
    x: Tensor, y: Tensor, block: int, *, sqdist: Tensor | None = None, idx: Tensor, partials: Tensor | None = None
) -> None:
    (B, N), M = x.shape[:2], y.shape[1]
    x_blocks = cdiv(N, block)
    blocks = x_blocks if partials is None else partials.shape[1]
    launch(
        _nearest_kernel,
        (B * blocks,),
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
        UNROLL=points_at_a_time(y) if partials is None else points_at_a_time(x, y),
        num_warps=_WARPS,
    )


def _launch_nearest_bwd(grad: Tensor, x: Tensor, y: Tensor, partner: Tensor, per_cloud: bool) -> Tensor:
    """Gradients of the rows of x and, behind them, of y."""
    rows = torch.cat((x.flatten(0, 1), y.flatten(0, 1)))
    out = rows.new_empty(rows.shape)
    source, start, _ = transpose(partner[:, None], None, len(rows), impl="triton")
    launch(
        _nearest_bwd_kernel,
        (cdiv(len(rows), _PULL_BLOCK),),
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


def _empty_rows(grad: Tensor, x: Tensor, y: Tensor, idx: Tensor) -> Tensor:
    return x.new_empty((x.shape[0] * (x.shape[1] + y.shape[1]), 3))


def _split(rows: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x_rows = x.shape[0] * x.shape[1]
    dx, dy = rows.split((x_rows, rows.shape[0] - x_rows))
    return dx.view(x.shape), dy.view(y.shape)


# nearest_neighbor


def _empty_nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:2], dtype=sums_dtype(x)), x.new_empty(x.shape[:2], dtype=torch.int32)


@op(fake=_empty_nearest)
def _nearest_neighbor_op(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    sqdist, idx = _empty_nearest(x, y)
    _launch_nearest(x, y, points_per_program(idx.numel(), _BLOCKS), sqdist=sqdist, idx=idx)
    return sqdist, idx


@op(fake=_empty_rows)
def _nearest_neighbor_bwd_op(grad: Tensor, x: Tensor, y: Tensor, idx: Tensor) -> Tensor:
    x_rows = idx.numel()
    dtype = index_dtype(x_rows + y.shape[0] * y.shape[1])
    first = torch.arange(x_rows, x_rows + y.shape[0] * y.shape[1], y.shape[1], dtype=dtype, device=x.device)
    return _launch_nearest_bwd(grad, x, y, (idx + first[:, None]).flatten(), per_cloud=False)


@gradient(_nearest_neighbor_op, save=lambda x, y, out: (x, y, out[1]))
def _nearest_neighbor_backward(needs: Needs, grad: Tensor, x: Tensor, y: Tensor, idx: Tensor) -> Gradients:
    return _split(_nearest_neighbor_bwd_op(grad, x, y, idx), x, y)


# chamfer_distance


def _empty_partner(x: Tensor, y: Tensor) -> Tensor:
    """Room for every point's partner (see the kernel)."""
    rows = x.shape[0] * (x.shape[1] + y.shape[1])
    return x.new_empty(rows, dtype=index_dtype(rows))


@op(fake=lambda x, y: (x.new_empty(x.shape[0], dtype=sums_dtype(x)), _empty_partner(x, y)))
def _chamfer_distance_op(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    partner = _empty_partner(x, y)
    block = points_per_program(len(partner), _BLOCKS)
    blocks = cdiv(x.shape[1], block) + cdiv(y.shape[1], block)
    partials = x.new_empty((x.shape[0], blocks), dtype=torch.float32)
    _launch_nearest(x, y, block, idx=partner, partials=partials)
    return partials.sum(1).to(sums_dtype(x)), partner


@op(fake=_empty_rows)
def _chamfer_distance_bwd_op(grad: Tensor, x: Tensor, y: Tensor, partner: Tensor) -> Tensor:
    return _launch_nearest_bwd(grad, x, y, partner, per_cloud=True)


@gradient(_chamfer_distance_op, save=lambda x, y, out: (x, y, out[1]))
def _chamfer_distance_backward(needs: Needs, grad: Tensor, x: Tensor, y: Tensor, partner: Tensor) -> Gradients:
    return _split(_chamfer_distance_bwd_op(grad, x, y, partner), x, y)


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
    return _chamfer_distance_op(x, y)[0]
