"""Points to voxels and back: mean of the points in each voxel, trilinear gather at the points.

    avg_voxelize          V[v] = 1/n_v  sum_{p: near(p) = v} F[p]           0 where n_v = 0
    trilinear_devoxelize  F[p] = sum_{c in {0,1}^3} w_c(p) V[corner_c(p)]

with near(p) = round-half-even(coords), corner_c = floor(coords) + c and w_c the product over the axes of
frac = coords - floor(coords) where c = 1 and of 1 - frac where c = 0. Along an axis whose fraction is 0 the
upper corner is the lower one (with weight 0), so that coordinate R - 1 stays inside the grid.

Both ops are products with a sparse matrix that only the coordinates determine; the backward of each is the
product with the transpose. A plan holds both matrices and both transposes, so that every one of the four passes
is the gather of ``rows.product``: each output row is written once, its terms are added in a fixed order, and two
runs agree bit for bit with any number of threads.

Legend: B clouds, N points, C channels, R voxels per side; voxel (x, y, z) has index (x R + y) R + z.
Coordinates and plans are float32 (float64 where the input is). No gradient to coordinates. Bytes, features of s
bytes: s C B (N + R^3) to average and as many backward; s C B (8 N + N) to gather, s C B (8 N + R^3) backward. By
Triton a plan is two stable sorts (B N and 8 B N int32 keys) and four launches: points to voxels, corners and
weights (12 + 68 bytes a point), each transpose (``rows.py``), and the weights of averaging.
Source: PVConv of Liu et al., "Point-Voxel CNN", NeurIPS 2019, as LION computes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lion_triton.kernels._checks import Impl, check_float, check_points, check_same, upcast, use_triton
from lion_triton.kernels._triton import tl, triton
from lion_triton.kernels.rows import SparseRows, product, product_reference, transpose

_POINTS, _WARPS = 256, 4  # per program of the two kernels that make a plan


@dataclass(frozen=True, eq=False)
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
    Float32 (float64 for float64 points), detached. ValueError: not (B, N, 3) with N >= 1; resolution < 2.
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


def plan_voxels(coords: Float[Tensor, "B N 3"], resolution: int, *, impl: Impl = "auto") -> VoxelPlan:
    """Plan of ``coords``, to be shared by every op on the same coordinates.

    Coordinates outside [0, R - 1] act as if clamped; a NaN gives NaN where it is gathered. Two stable sorts,
    no synchronisation with a GPU. Computed in float32, or in float64 for float64 coords, whatever ``impl``.
    ValueError: coords not (B, N, 3) with N >= 1; resolution < 2; B R^3 or 8 B N beyond int32.
    """
    check_points("coords", coords)
    _check_resolution(resolution)
    B, N, _ = coords.shape
    if max(B * resolution**3, 8 * B * N) >= 2**31:
        raise ValueError(f"coords: expected B R^3 and 8 B N below 2^31, got B = {B}, N = {N}, R = {resolution}")
    coords = upcast(coords.detach())
    if not use_triton(impl, coords):
        return plan_voxels_reference(coords, resolution)
    near, near_weight, corners, corner_weight, *transposes = _plan_op(coords, resolution)
    return VoxelPlan(
        coords,
        resolution,
        SparseRows(near, None, near_weight),
        SparseRows(*transposes[:3]),
        SparseRows(corners, None, corner_weight),
        SparseRows(*transposes[3:]),
    )


def plan_voxels_reference(coords: Float[Tensor, "B N 3"], resolution: int) -> VoxelPlan:
    """Plain PyTorch form of :func:`plan_voxels`, for float32 or float64 coords."""
    B, N, _ = coords.shape
    R = resolution
    # Points last, not axes or corners: elementwise work on rows of 2 or 8 is several times slower on a CPU.
    inside = coords.clamp(0, R - 1).flatten(0, 1).t().contiguous()  # (3, B N)
    cloud = torch.arange(B, dtype=torch.int32, device=coords.device).repeat_interleave(N)  # (B N)

    # The integer clamps are for NaN, which converts to no particular integer.
    x, y, z = inside.round().int().clamp_(0, R - 1)
    near = (((cloud * R + x) * R + y) * R + z)[:, None]
    near_t = transpose(near, None, B * R**3, impl="reference")
    assert near_t.start is not None
    weight = near_t.start.diff().index_select(0, near[:, 0]).to(coords.dtype).reciprocal_()
    near_t = near_t._replace(weight=weight.index_select(0, near_t.column))

    floor = inside.floor()
    frac = inside - floor
    low = floor.int().clamp_(0, R - 1)
    x, y, z = torch.stack((low, low + (frac > 0)), 1)  # (2, B N) each: lower and upper corner
    wx, wy, wz = torch.stack((1 - frac, frac), 1)
    corner = ((cloud * R + x)[:, None, None] * R + y[:, None]) * R + z  # (2, 2, 2, B N)
    corner_weight = (wx[:, None, None] * wy[:, None]) * wz
    corners = SparseRows(corner.view(8, -1).t().contiguous(), None, corner_weight.view(8, -1).t().contiguous())
    corners_t = transpose(corners.column, corners.weight, B * R**3, impl="reference")
    return VoxelPlan(coords, R, SparseRows(near, None, weight[:, None]), near_t, corners, corners_t)


def avg_voxelize_reference(
    features: Float[Tensor, "B N C"],
    coords: Float[Tensor, "B N 3"],
    resolution: int,
    plan: VoxelPlan | None = None,
) -> Float[Tensor, "B R R R C"]:
    """Plain PyTorch form of :func:`avg_voxelize`."""
    if plan is None:
        dtype = torch.promote_types(coords.dtype, features.dtype)
        plan = plan_voxels(coords.to(dtype), resolution, impl="reference")
    voxels = product_reference(features.flatten(0, 1), plan.near_t, plan.near)
    return voxels.view(len(features), *[resolution] * 3, features.shape[-1])


def trilinear_devoxelize_reference(
    voxels: Float[Tensor, "B R R R C"], coords: Float[Tensor, "B N 3"], plan: VoxelPlan | None = None
) -> Float[Tensor, "B N C"]:
    """Plain PyTorch form of :func:`trilinear_devoxelize`."""
    if plan is None:
        dtype = torch.promote_types(coords.dtype, voxels.dtype)
        plan = plan_voxels(coords.to(dtype), voxels.shape[1], impl="reference")
    features = product_reference(voxels.flatten(0, 3), plan.corners, plan.corners_t)
    return features.view(*coords.shape[:2], voxels.shape[-1])


@triton.jit
def _locate(coords_ptr, p, mask, R):  # type: ignore[no-untyped-def]
    """Lower corner, fraction and nearest voxel along one axis."""
    x = tl.load(coords_ptr + p * 3, mask=mask, other=0.0)
    x = tl.where(x < 0, 0.0, x)  # lets a NaN through, which minimum and maximum do not
    x = tl.where(x > R - 1, R - 1, x)
    floor = tl.floor(x)
    fraction = x - floor
    low = tl.where(x == x, floor, 0.0).to(tl.int32)
    up = (fraction > 0.5) | ((fraction == 0.5) & (low % 2 == 1))
    return low, fraction, low + up.to(tl.int32)


@triton.jit
def _corner(low, fraction, upper):  # type: ignore[no-untyped-def]
    """Voxel and weight along one axis of the lower or upper corners, (points, 8)."""
    fraction = fraction[:, None]
    voxel = low[:, None] + (upper & (fraction > 0)).to(tl.int32)
    return voxel, tl.where(upper, fraction, 1 - fraction)


@triton.jit
def _voxel_locate_kernel(  # type: ignore[no-untyped-def]
    coords_ptr, near_ptr, corners_ptr, weight_ptr, N, num_points, R, POINTS: tl.constexpr
):
    p = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    mask = p < num_points
    cloud = (p // N).to(tl.int32)
    x, fx, near_x = _locate(coords_ptr, p, mask, R)
    y, fy, near_y = _locate(coords_ptr + 1, p, mask, R)
    z, fz, near_z = _locate(coords_ptr + 2, p, mask, R)
    tl.store(near_ptr + p, ((cloud * R + near_x) * R + near_y) * R + near_z, mask=mask)

    corner = tl.arange(0, 8)[None, :]
    x, wx = _corner(x, fx, corner >= 4)
    y, wy = _corner(y, fy, corner % 4 >= 2)
    z, wz = _corner(z, fz, corner % 2 == 1)
    out = p[:, None] * 8 + corner
    tl.store(corners_ptr + out, ((cloud[:, None] * R + x) * R + y) * R + z, mask=mask[:, None])
    tl.store(weight_ptr + out, wx * wy * wz, mask=mask[:, None])


@triton.jit
def _voxel_mean_kernel(  # type: ignore[no-untyped-def]
    near_ptr, column_t_ptr, start_t_ptr, weight_ptr, weight_t_ptr, num_points, POINTS: tl.constexpr
):
    """1 / count of the voxel of point i, and of entry i of the transpose."""
    i = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    mask = i < num_points
    start_ptr = start_t_ptr + tl.load(near_ptr + i, mask=mask, other=0)
    count = tl.load(start_ptr + 1, mask=mask, other=1) - tl.load(start_ptr, mask=mask, other=0)
    tl.store(weight_ptr + i, 1.0 / count.to(weight_ptr.dtype.element_ty), mask=mask)
    start_ptr = start_t_ptr + tl.load(near_ptr + tl.load(column_t_ptr + i, mask=mask, other=0), mask=mask, other=0)
    count = tl.load(start_ptr + 1, mask=mask, other=1) - tl.load(start_ptr, mask=mask, other=0)
    tl.store(weight_t_ptr + i, 1.0 / count.to(weight_t_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("lion_triton::plan_voxels", mutates_args=())
def _plan_op(coords: Tensor, resolution: int) -> list[Tensor]:
    """Column and weight of near and of corners; column, start and weight of their transposes."""
    near, near_weight, corners, corner_weight, *_ = _empty_plan(coords, resolution)
    B, N, _ = coords.shape
    num_voxels, grid = B * resolution**3, (triton.cdiv(B * N, _POINTS),)
    near_weight_t = torch.empty_like(near_weight[:, 0])
    with torch.cuda.device_of(coords):
        if B:
            _voxel_locate_kernel[grid](
                coords.contiguous(),
                near,
                corners,
                corner_weight,
                N,
                B * N,
                resolution,
                POINTS=_POINTS,
                num_warps=_WARPS,
            )
        near_t = transpose(near, None, num_voxels, impl="triton")
        corners_t = transpose(corners, corner_weight, num_voxels, impl="triton")
        if B:
            _voxel_mean_kernel[grid](
                near,
                near_t.column,
                near_t.start,
                near_weight,
                near_weight_t,
                B * N,
                POINTS=_POINTS,
                num_warps=_WARPS,
            )
    return [near, near_weight, corners, corner_weight, *near_t._replace(weight=near_weight_t), *corners_t]


@_plan_op.register_fake
def _empty_plan(coords: Tensor, resolution: int) -> list[Tensor]:
    points = coords.shape[0] * coords.shape[1]
    rows = coords.shape[0] * resolution**3 + 1

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=coords.device)

    def matrix(*shape: int) -> tuple[Tensor, Tensor]:
        return empty(*shape), empty(*shape, dtype=coords.dtype)

    near_t, corners_t = matrix(points), matrix(8 * points)
    return [
        *matrix(points, 1),
        *matrix(points, 8),
        *(near_t[0], empty(rows), near_t[1]),
        *(corners_t[0], empty(rows), corners_t[1]),
    ]


def avg_voxelize(
    features: Float[Tensor, "B N C"],
    coords: Float[Tensor, "B N 3"],
    resolution: int,
    *,
    plan: VoxelPlan | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "B R R R C"]:
    """Mean of the features of the points in each voxel, 0 in empty voxels.

    features: (B, N, C), any floating dtype; summed in float32 (float64 by the reference of float64), returned in
        their dtype.
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
    if not use_triton(impl, features):
        return avg_voxelize_reference(features, coords, resolution, plan)
    plan = plan or plan_voxels(coords, resolution, impl="triton")
    voxels = product(features.flatten(0, 1), plan.near_t, plan.near, impl="triton")
    return voxels.view(len(features), *[resolution] * 3, features.shape[-1])


def trilinear_devoxelize(
    voxels: Float[Tensor, "B R R R C"],
    coords: Float[Tensor, "B N 3"],
    *,
    plan: VoxelPlan | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "B N C"]:
    """Voxel features at the points, interpolated linearly along each axis between voxel centres.

    voxels: (B, R, R, R, C), any floating dtype; summed in float32 (float64 by the reference of float64), returned
        in their dtype.
    coords: (B, N, 3) in [0, R - 1] (values outside act as if clamped), unrounded. No gradient.
    plan: ``plan_voxels(coords, R)``; made here if not given. Must be of these very coordinates.
    Returns (B, N, C). Deterministic, backward too.
    Source: PVConv (module docstring). ValueError: shapes, dtypes, devices or a plan that do not fit.
    """
    check_float("voxels", voxels)
    if voxels.ndim != 5 or len(set(voxels.shape[1:4])) != 1 or voxels.shape[1] < 2 or voxels.shape[4] == 0:
        raise ValueError(f"voxels: expected shape (B, R, R, R, C) with R >= 2 and C >= 1, got {tuple(voxels.shape)}")
    check_points("coords", coords)
    check_same(voxels=voxels, coords=coords)
    _check_plan(plan, coords, voxels.shape[1])
    if not use_triton(impl, voxels):
        return trilinear_devoxelize_reference(voxels, coords, plan)
    plan = plan or plan_voxels(coords, voxels.shape[1], impl="triton")
    features = product(voxels.flatten(0, 3), plan.corners, plan.corners_t, impl="triton")
    return features.view(*coords.shape[:2], voxels.shape[-1])


def _check_resolution(resolution: int) -> None:
    if not isinstance(resolution, int) or resolution < 2:
        raise ValueError(f"resolution: expected an integer >= 2, got {resolution!r}")


def _check_plan(plan: VoxelPlan | None, coords: Tensor, resolution: int) -> None:
    if plan is None:
        return
    if plan.resolution != resolution:
        raise ValueError(f"plan: expected resolution {resolution}, got {plan.resolution}")
    if plan.coords.shape != coords.shape:
        raise ValueError(f"plan: expected {tuple(coords.shape)} coords, got {tuple(plan.coords.shape)}")
    check_same(coords=coords, plan=plan.coords)
