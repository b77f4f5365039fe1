"""Points to voxels and back: mean of the points in each voxel, trilinear gather at the points.

    avg_voxelize          V[v] = 1/n_v  sum_{p: near(p) = v} F[p]           0 where n_v = 0
    trilinear_devoxelize  F[p] = sum_{c in {0,1}^3} w_c(p) V[corner_c(p)]

with near(p) = round-half-even(coords), corner_c = floor(coords) + c and w_c the product over the axes of
frac = coords - floor(coords) where c = 1 and of 1 - frac where c = 0. Along an axis whose fraction is 0 the
upper corner is the lower one (with weight 0), so that coordinate R - 1 stays inside the grid.

Both ops are products with a sparse matrix that only the coordinates determine; the backward of each is the
product with the transpose. A plan holds both matrices and both transposes, compressed by rows, so that every
one of the four passes is the same gather, y[r] = sum_{e in row r} weight[e] x[column[e]]: each output row is
written once, its terms are added in a fixed order, and two runs agree bit for bit with any number of threads.

Legend: B clouds, N points, C channels, R voxels per side; voxel (x, y, z) has index (x R + y) R + z.
Coordinates, plans and accumulation are float32 (float64 where the input is). No gradient to coordinates.
Source: PVConv of Liu et al., "Point-Voxel CNN", NeurIPS 2019, as LION computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32
from torch import Tensor

from lion_triton.kernels._checks import Impl, check_float, check_points, check_same, reference_only, upcast


class SparseRows(NamedTuple):
    """A sparse matrix compressed by rows: row r has the entries ``start[r]`` to ``start[r + 1] - 1``."""

    column: Int32[Tensor, " entries"]
    start: Int32[Tensor, " rows_plus_1"]
    weight: Float[Tensor, " entries"]


@dataclass(frozen=True)
class VoxelPlan:
    """What avg_voxelize and trilinear_devoxelize need of one set of coordinates at one resolution.

    Rows and columns run over the whole batch: point n of cloud b is ``b N + n`` and voxel v of cloud b is
    ``b R^3 + v``. Points have one entry each in ``near`` (weight: 1 / number of points in that voxel) and
    eight in ``corners`` (order 4 dx + 2 dy + dz); the entries of a voxel are in order of the points.
    """

    coords: Float[Tensor, "B N 3"]
    resolution: int
    near: SparseRows  # points x voxels: the transpose of averaging
    near_t: SparseRows  # voxels x points: averaging
    corners: SparseRows  # points x voxels: trilinear gather
    corners_t: SparseRows  # voxels x points: its transpose


def voxel_coords(points: Float[Tensor, "B N 3"], resolution: int) -> Float[Tensor, "B N 3"]:
    """Voxel coordinates of each cloud: centred on its mean point, scaled to fit whatever its rotation.

    ``clamp(((p - mean) / (2 max |p - mean|) + 0.5) R, 0, R - 1)``; where all points coincide, 0.5 R clamped.
    Float32 (float64 for float64 points), detached. ValueError: not (B, N, 3) with N >= 1; resolution < 1.
    """
    check_points("points", points)
    _check_resolution(resolution)
    p = upcast(points.detach())
    # Relative to the first point, coincident points are exactly 0 whatever the rounding of their mean.
    p = p - p[:, :1]
    p = p - p.mean(1, keepdim=True)
    radius = p.norm(dim=-1).amax(1)[:, None, None]
    p = p / torch.where(radius > 0, 2 * radius, 1)
    return ((p + 0.5) * resolution).clamp(0, resolution - 1)


def plan_voxels(coords: Float[Tensor, "B N 3"], resolution: int) -> VoxelPlan:
    """Plan of ``coords``, to be shared by every op on the same coordinates.

    Coordinates outside [0, R - 1] act as if clamped; a NaN gives NaN where it is gathered. Two stable sorts,
    no synchronisation with a GPU. ValueError: coords not (B, N, 3) with N >= 1; resolution < 1; B R^3 or
    8 B N beyond int32.
    """
    check_points("coords", coords)
    _check_resolution(resolution)
    B, N, _ = coords.shape
    R = resolution
    num_voxels = B * R**3
    if max(num_voxels, 8 * B * N) >= 2**31:
        raise ValueError(f"coords: expected B R^3 and 8 B N below 2^31, got B = {B}, N = {N}, R = {R}")
    coords = upcast(coords.detach())
    # Points last, not axes or corners: elementwise work on rows of 2 or 8 is several times slower on a CPU.
    inside = coords.clamp(0, R - 1).flatten(0, 1).t().contiguous()  # (3, B N)
    cloud = torch.arange(B, dtype=torch.int32, device=coords.device).repeat_interleave(N)  # (B N)

    # The integer clamps are for NaN, which converts to no particular integer.
    x, y, z = inside.round().int().clamp_(0, R - 1)
    voxel = ((cloud * R + x) * R + y) * R + z
    count = voxel.new_zeros(num_voxels).index_add_(0, voxel, torch.ones_like(voxel))
    near = _rows(voxel, count.index_select(0, voxel).to(coords.dtype).reciprocal_(), 1)

    floor = inside.floor()
    frac = inside - floor
    low = floor.int().clamp_(0, R - 1)
    x, y, z = torch.stack((low, low + (frac > 0)), 1)  # (2, B N) each: lower and upper corner
    wx, wy, wz = torch.stack((1 - frac, frac), 1)
    voxel = ((cloud * R + x)[:, None, None] * R + y[:, None]) * R + z  # (2, 2, 2, B N)
    weight = (wx[:, None, None] * wy[:, None]) * wz
    corners = _rows(voxel.view(8, -1).t().flatten(), weight.view(8, -1).t().flatten(), 8)

    near_t = _transpose(near, 1, num_voxels)
    corners_t = _transpose(corners, 8, num_voxels)
    return VoxelPlan(coords, R, near, near_t, corners, corners_t)


def avg_voxelize_reference(
    features: Float[Tensor, "B N C"],
    coords: Float[Tensor, "B N 3"],
    resolution: int,
    plan: VoxelPlan | None = None,
) -> Float[Tensor, "B R R R C"]:
    """Plain PyTorch form of :func:`avg_voxelize`."""
    if plan is None:
        plan = plan_voxels(coords.to(torch.promote_types(coords.dtype, features.dtype)), resolution)
    B, _, C = features.shape
    return _product(features, plan.near_t, plan.near).view(B, resolution, resolution, resolution, C)


def trilinear_devoxelize_reference(
    voxels: Float[Tensor, "B R R R C"], coords: Float[Tensor, "B N 3"], plan: VoxelPlan | None = None
) -> Float[Tensor, "B N C"]:
    """Plain PyTorch form of :func:`trilinear_devoxelize`."""
    if plan is None:
        plan = plan_voxels(coords.to(torch.promote_types(coords.dtype, voxels.dtype)), voxels.shape[1])
    B, N, _ = plan.coords.shape
    return _product(voxels, plan.corners, plan.corners_t).view(B, N, voxels.shape[-1])


def avg_voxelize(
    features: Float[Tensor, "B N C"],
    coords: Float[Tensor, "B N 3"],
    resolution: int,
    *,
    plan: VoxelPlan | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "B R R R C"]:
    """Mean of the features of the points in each voxel, 0 in empty voxels.

    features: (B, N, C), any floating dtype; summed in float32 (float64 for float64), returned in their dtype.
    coords: (B, N, 3) in [0, R - 1] (values outside act as if clamped); a point counts in the voxel nearest to
        it, ties to even. No gradient.
    plan: ``plan_voxels(coords, resolution)``; made here if not given. Must be of these very coordinates.
    Returns (B, R, R, R, C), axes in the order of the coordinates. Deterministic, backward too.
    Source: PVConv (module docstring). ValueError: shapes, dtypes, devices or a plan that do not fit.
    """
    check_float("features", features)
    if features.ndim != 3 or features.shape[-1] == 0:
        raise ValueError(f"features: expected shape (B, N, C) with C >= 1, got {tuple(features.shape)}")
    check_points("coords", coords)
    check_same(features=features, coords=coords)
    if features.shape[1] != coords.shape[1]:
        raise ValueError(f"features: expected the N of coords ({coords.shape[1]}), got {features.shape[1]}")
    _check_resolution(resolution)
    _check_plan(plan, coords, resolution)
    reference_only("avg_voxelize", impl, features)
    return avg_voxelize_reference(features, coords, resolution, plan)


def trilinear_devoxelize(
    voxels: Float[Tensor, "B R R R C"],
    coords: Float[Tensor, "B N 3"],
    *,
    plan: VoxelPlan | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "B N C"]:
    """Voxel features at the points, interpolated linearly along each axis between voxel centres.

    voxels: (B, R, R, R, C), any floating dtype; summed in float32 (float64 for float64), returned in theirs.
    coords: (B, N, 3) in [0, R - 1] (values outside act as if clamped), unrounded. No gradient.
    plan: ``plan_voxels(coords, R)``; made here if not given. Must be of these very coordinates.
    Returns (B, N, C). Deterministic, backward too.
    Source: PVConv (module docstring). ValueError: shapes, dtypes, devices or a plan that do not fit.
    """
    check_float("voxels", voxels)
    if voxels.ndim != 5 or len(set(voxels.shape[1:4])) != 1 or 0 in voxels.shape[1:]:
        raise ValueError(f"voxels: expected shape (B, R, R, R, C) with R, C >= 1, got {tuple(voxels.shape)}")
    check_points("coords", coords)
    check_same(voxels=voxels, coords=coords)
    _check_plan(plan, coords, voxels.shape[1])
    reference_only("trilinear_devoxelize", impl, voxels)
    return trilinear_devoxelize_reference(voxels, coords, plan)


class _SparseProduct(torch.autograd.Function):
    """``matrix @ x`` for x (columns, C). The last three arguments are the transpose, used by the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, column: Tensor, start: Tensor, weight: Tensor, *transpose: Tensor) -> Tensor:
        ctx.save_for_backward(column, start, weight, *transpose)
        # On a CPU 10 to 100 times faster than gathering (rows, 8, C) and summing, and than the scatters
        # that autograd makes of it.
        return F.embedding_bag(column, x, start, mode="sum", per_sample_weights=weight, include_last_offset=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        column, start, weight, *transpose = ctx.saved_tensors
        grad = _SparseProduct.apply(grads[0], *transpose, column, start, weight)
        return grad, None, None, None, None, None, None


def _product(x: Tensor, matrix: SparseRows, transpose: SparseRows) -> Tensor:
    """``matrix @ x`` over the rows of x (..., C), summed in float32 or float64, returned in x's dtype."""
    rows = upcast(x).reshape(-1, x.shape[-1])
    matrix, transpose = (m._replace(weight=m.weight.to(rows.dtype)) for m in (matrix, transpose))
    return _SparseProduct.apply(rows, *matrix, *transpose).to(x.dtype)


def _rows(column: Tensor, weight: Tensor, per_row: int) -> SparseRows:
    """A matrix with ``per_row`` entries in every row."""
    start = torch.arange(0, column.numel() + 1, per_row, dtype=torch.int32, device=column.device)
    return SparseRows(column, start, weight)


def _transpose(matrix: SparseRows, per_row: int, num_columns: int) -> SparseRows:
    """Transpose of a matrix with ``per_row`` entries in every row."""
    order = torch.argsort(matrix.column, stable=True)
    count = matrix.column.new_zeros(num_columns + 1)
    count.index_add_(0, matrix.column + 1, torch.ones_like(matrix.column))
    start = count.cumsum(0, dtype=torch.int32)
    return SparseRows((order // per_row).int(), start, matrix.weight.index_select(0, order))


def _check_resolution(resolution: int) -> None:
    if not isinstance(resolution, int) or resolution < 1:
        raise ValueError(f"resolution: expected an integer >= 1, got {resolution!r}")


def _check_plan(plan: VoxelPlan | None, coords: Tensor, resolution: int) -> None:
    if plan is None:
        return
    if plan.resolution != resolution:
        raise ValueError(f"plan: expected resolution {resolution}, got {plan.resolution}")
    if plan.coords.shape != coords.shape:
        raise ValueError(f"plan: expected {tuple(coords.shape)} coords, got {tuple(plan.coords.shape)}")
    check_same(coords=coords, plan=plan.coords)
