"""Points to voxels and back: mean of the points in each voxel, trilinear gather at the points.

    avg_voxelize          V[v] = 1/n_v  sum_{p: near(p) = v} F[p]           0 where n_v = 0
    trilinear_devoxelize  F[p] = sum_{c in {0,1}^3} w_c(p) V[corner_c(p)]

with near(p) = round-half-even(coords), corner_c = floor(coords) + c and w_c the product over the axes of
frac = coords - floor(coords) where c = 1 and of 1 - frac where c = 0. Along an axis whose fraction is 0 the
upper corner is the lower one (with weight 0), so that coordinate R - 1 stays inside the grid.

Both ops are products with a sparse matrix that only the coordinates determine; the backward of each is the product
with the transpose. Each output row is written once, its terms are added in a fixed order, and two runs agree bit for
bit with any number of threads. What a plan holds:

- Triton: the points in the order of their cells, ``floor(coords)``: one sort of N keys a cloud. Both near(p) and the
  corners of p lie in {0,1}^3 above its cell, so that a voxel receives from the points of the eight cells below it,
  whichever of the two it is; indices and weights are made from the coordinates where they are used.
- The reference: both matrices and both transposes, for ``rows.product``; on a CPU, where most voxels are empty, also
  which are not.

Legend: B clouds, N points, C channels, R voxels per side; voxel (x, y, z) has index (x R + y) R + z.
Coordinates and plans are float32 (float64 where the input is). No gradient to coordinates. Bytes, features of s
bytes: s C B (N + R^3) to average and as many backward; s C B (8 N + N) to gather, s C B (8 N + R^3) backward. By
Triton a plan is two launches for up to 4096 points: one program sorts a cloud; then a bisection per cell.
Source: PVConv of Liu et al., "Point-Voxel CNN", NeurIPS 2019, as LION computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lion_triton.kernels._checks import (
    Impl,
    check_float,
    check_integer,
    check_points,
    check_same,
    upcast,
    use_triton,
)
from lion_triton.kernels._op import Gradients, Needs, gradient, op
from lion_triton.kernels._triton import launch, tl, triton
from lion_triton.kernels.rows import SparseRows, block_of_rows, product_reference, sort_by_target, transpose

_WARPS, _CELLS = 4, 256  # cells per program of the bisection
_MOST_SORTED = 4096  # points of a cloud that one program sorts


class Cells(NamedTuple):
    """The points of all clouds in order of the cell that holds them (stable), and where each cell's run starts."""

    order: Int[Tensor, " B*N"]
    start: Int[Tensor, " B*R^3+1"]


class Occupied(NamedTuple):
    """The V voxels with points, of the whole batch in order, and the 27 around each: for ``voxel_conv.py``.

    Row ``27 u + k`` of ``steps`` has the voxel u - k, with k of {-1, 0, 1}^3 in order; nothing if there is none.
    """

    first: Int[Tensor, " B+1"]  # where each cloud's begin
    mean: SparseRows  # V x points: averaging
    mean_t: SparseRows  # points x V
    steps: SparseRows  # 27 V x voxels
    steps_t: SparseRows  # voxels x 27 V


class Matrices(NamedTuple):
    """Averaging and gathering as sparse matrices, with their transposes.

    Points have one entry each in ``near`` (weight: 1 / number of points in that voxel) and eight in ``corners`` (order
    4 dx + 2 dy + dz); the entries of a voxel are in order of the points.
    """

    near: SparseRows  # points x voxels: the transpose of averaging
    near_t: SparseRows  # voxels x points: averaging
    corners: SparseRows  # points x voxels: trilinear gather
    corners_t: SparseRows | None  # voxels x points: its transpose; None in a plan that was made without gradients
    occupied: Occupied | None  # None unless ``mostly_empty``


@dataclass(frozen=True, eq=False)
class VoxelPlan:
    """What avg_voxelize and trilinear_devoxelize need of one set of coordinates at one resolution.

    Rows and columns run over the whole batch: point n of cloud b is ``b N + n`` and voxel v of cloud b is
    ``b R^3 + v``. ``cells`` is what Triton takes, ``matrices`` what the reference does; the other is None.
    """

    coords: Float[Tensor, "B N 3"]
    resolution: int
    cells: Cells | None = None
    matrices: Matrices | None = None


def voxel_coords(points: Float[Tensor, "B N 3"], resolution: int, *, impl: Impl = "auto") -> Float[Tensor, "B N 3"]:
    """Voxel coordinates of each cloud: centred on its mean point, scaled to fit whatever its rotation.

    ``clamp(((p - mean) / (2 max |p - mean|) + 0.5) R, 0, R - 1)``; where all points coincide, 0.5 R clamped.
    Float32 (float64 for float64 points), detached; Triton computes float64 in float32.
    ValueError: not (B, N, 3) with N >= 1; resolution < 1.
    """
    check_points("points", points)
    resolution = check_integer("resolution", resolution, 1)
    p = upcast(points.detach())
    return _voxel_coords_op(p, resolution) if use_triton(impl, points) else voxel_coords_reference(p, resolution)


def voxel_coords_reference(points: Float[Tensor, "B N 3"], resolution: int) -> Float[Tensor, "B N 3"]:
    """Plain PyTorch form of :func:`voxel_coords`."""
    # Relative to the first point, coincident points are exactly 0 whatever the rounding of their mean.
    p = points - points[:, :1]
    p = p - p.mean(1, keepdim=True)
    radius = p.norm(dim=-1).amax(1)[:, None, None]
    p = p / torch.where(radius > 0, 2 * radius, 1)
    return ((p + 0.5) * resolution).clamp(0, resolution - 1)


def plan_voxels(coords: Float[Tensor, "B N 3"], resolution: int, *, impl: Impl = "auto") -> VoxelPlan:
    """Plan of ``coords``, to be shared by every op on the same coordinates.

    Coordinates outside [0, R - 1] act as if clamped; a NaN gives NaN where it is gathered. No synchronisation with a
    GPU. Computed in float32, or by the reference in float64 for float64 coords.
    ValueError: coords not (B, N, 3) with N >= 1; resolution < 1; B R^3 or 8 B N beyond int32.
    """
    check_points("coords", coords)
    resolution = check_integer("resolution", resolution, 1)
    B, N, _ = coords.shape
    if max(B * resolution**3, 8 * B * N) >= 2**31:
        raise ValueError(f"coords: expected B R^3 and 8 B N below 2^31, got B = {B}, N = {N}, R = {resolution}")
    coords = upcast(coords.detach())
    if not use_triton(impl, coords):
        return plan_voxels_reference(coords, resolution)
    return VoxelPlan(coords, resolution, cells=Cells(*_cells_op(coords, resolution)))


def cells_reference(coords: Float[Tensor, "B N 3"], resolution: int) -> Cells:
    """Plain PyTorch form of a plan's cells."""
    B, N, _ = coords.shape
    x, y, z = coords.clamp(0, resolution - 1).floor().nan_to_num(0).int().flatten(0, 1).unbind(1)
    cloud = torch.arange(B, dtype=torch.int32, device=coords.device).repeat_interleave(N)
    order, start = sort_by_target(((cloud * resolution + x) * resolution + y) * resolution + z, B * resolution**3)
    return Cells(order.int(), start)


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
    # In inference nobody asks for the transpose, whose sort of 8 N entries is most of a plan's time.
    corners_t = _transposed(corners, B * R**3) if torch.is_grad_enabled() else None
    near_rows = SparseRows(near, None, weight[:, None])
    occupied = _occupied(near_rows, near_t, B, R) if mostly_empty(coords, R) else None
    return VoxelPlan(coords, R, matrices=Matrices(near_rows, near_t, corners, corners_t, occupied))


def mostly_empty(clouds: Float[Tensor, "B N _"], resolution: int) -> bool:
    """Whether a plan lists the occupied voxels: on a CPU, where they are half of all at most, and int32 counts them."""
    B, N, _ = clouds.shape
    return clouds.device.type == "cpu" and resolution**3 >= 2 * N and 27 * B * N < 2**31


def _occupied(near: SparseRows, near_t: SparseRows, B: int, R: int) -> Occupied:
    assert near_t.start is not None
    full = near_t.start.diff() > 0
    voxel = full.nonzero()[:, 0].int()
    before = F.pad(full.cumsum(0, dtype=torch.int32), (1, 0))
    mean = near_t._replace(start=F.pad(near_t.start[1:].index_select(0, voxel), (1, 0)))
    mean_t = near._replace(column=before.index_select(0, near.column[:, 0])[:, None])

    minus_k = 1 - torch.arange(3, dtype=torch.int32)
    axes = [(voxel // stride % R)[:, None] + minus_k for stride in (R * R, R, 1)]  # (V, 3) each
    x, y, z = ((axis >= 0) & (axis < R) for axis in axes)
    inside = (x[:, :, None, None] & y[:, None, :, None] & z[:, None, None]).flatten()
    entry = inside.nonzero()[:, 0]
    step = ((minus_k[:, None, None] * R + minus_k[:, None]) * R + minus_k).flatten()
    target = (voxel[:, None] + step).flatten().index_select(0, entry)
    order, start = sort_by_target(target, B * R**3)
    steps = SparseRows(target, F.pad(inside.cumsum(0, dtype=torch.int32), (1, 0)))
    steps_t = SparseRows(entry.int().index_select(0, order), start)
    return Occupied(before[:: R**3], mean, mean_t, steps, steps_t)


def _transposed(matrix: SparseRows, num_columns: int) -> SparseRows:
    return transpose(matrix.column, matrix.weight, num_columns, impl="reference")


def avg_voxelize_reference(
    features: Float[Tensor, "B N C"],
    coords: Float[Tensor, "B N 3"],
    resolution: int,
    plan: VoxelPlan | None = None,
) -> Float[Tensor, "B R R R C"]:
    """Plain PyTorch form of :func:`avg_voxelize`."""
    matrices = matrices_of(plan, coords, resolution, features)
    voxels = product_reference(features.flatten(0, 1), matrices.near_t, matrices.near)
    return voxels.view(len(features), *[resolution] * 3, features.shape[-1])


def trilinear_devoxelize_reference(
    voxels: Float[Tensor, "B R R R C"], coords: Float[Tensor, "B N 3"], plan: VoxelPlan | None = None
) -> Float[Tensor, "B N C"]:
    """Plain PyTorch form of :func:`trilinear_devoxelize`."""
    features = product_reference(voxels.flatten(0, 3), *corners_of(plan, coords, voxels.shape[1], voxels))
    return features.view(*coords.shape[:2], voxels.shape[-1])


def matrices_of(plan: VoxelPlan | None, coords: Tensor, resolution: int, features: Tensor) -> Matrices:
    """A plan's matrices, made here in the precision of the features if it has none."""
    if plan is None or plan.matrices is None:
        dtype = torch.promote_types(coords.dtype, features.dtype)
        plan = plan_voxels(coords.to(dtype), resolution, impl="reference")
    assert plan.matrices is not None
    return plan.matrices


def corners_of(
    plan: VoxelPlan | None, coords: Tensor, resolution: int, voxels: Tensor
) -> tuple[SparseRows, SparseRows]:
    """A plan's trilinear gather and its transpose; where that is not there and not needed, anything in its place."""
    matrices = matrices_of(plan, coords, resolution, voxels)
    if matrices.corners_t is not None:
        return matrices.corners, matrices.corners_t
    if torch.is_grad_enabled() and voxels.requires_grad:
        return matrices.corners, _transposed(matrices.corners, voxels[..., 0].numel())
    return matrices.corners, matrices.corners


def cells_of(plan: VoxelPlan | None, coords: Tensor, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates, order and start of a plan, the cells made here if it has none."""
    if plan is None or plan.cells is None:
        plan = plan_voxels(coords, resolution, impl="triton")
    assert plan.cells is not None
    return plan.coords, *plan.cells


# Kernels of a plan


@triton.jit
def _voxel_coords_kernel(points_ptr, coords_ptr, N, R, POINTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One cloud. Three passes: mean, radius, coordinates."""
    cloud = tl.program_id(0).to(tl.int64) * N * 3
    first_x = tl.load(points_ptr + cloud).to(tl.float32)
    first_y = tl.load(points_ptr + cloud + 1).to(tl.float32)
    first_z = tl.load(points_ptr + cloud + 2).to(tl.float32)
    i = tl.arange(0, POINTS)
    sum_x = tl.zeros((POINTS,), tl.float32)
    sum_y = tl.zeros((POINTS,), tl.float32)
    sum_z = tl.zeros((POINTS,), tl.float32)
    for begin in range(0, N, POINTS):
        mask = begin + i < N
        x, y, z = _relative(points_ptr + cloud + (begin + i) * 3, mask, first_x, first_y, first_z)
        sum_x += tl.where(mask, x, 0.0)
        sum_y += tl.where(mask, y, 0.0)
        sum_z += tl.where(mask, z, 0.0)
    mean_x, mean_y, mean_z = tl.sum(sum_x) / N, tl.sum(sum_y) / N, tl.sum(sum_z) / N
    square = tl.zeros((POINTS,), tl.float32)
    for begin in range(0, N, POINTS):
        mask = begin + i < N
        x, y, z = _relative(points_ptr + cloud + (begin + i) * 3, mask, first_x, first_y, first_z)
        x, y, z = x - mean_x, y - mean_y, z - mean_z
        square = tl.maximum(square, tl.where(mask, x * x + y * y + z * z, 0.0))
    radius = tl.sqrt_rn(tl.max(square))
    size = tl.where(radius > 0, 2 * radius, 1.0)
    for begin in range(0, N, POINTS):
        mask = begin + i < N
        x, y, z = _relative(points_ptr + cloud + (begin + i) * 3, mask, first_x, first_y, first_z)
        out_ptr = coords_ptr + cloud + (begin + i) * 3
        _store_coord(out_ptr, x - mean_x, size, R, mask)
        _store_coord(out_ptr + 1, y - mean_y, size, R, mask)
        _store_coord(out_ptr + 2, z - mean_z, size, R, mask)


@triton.jit
def _relative(ptr, mask, x, y, z):  # type: ignore[no-untyped-def]
    return (
        tl.load(ptr, mask=mask, other=0.0).to(tl.float32) - x,
        tl.load(ptr + 1, mask=mask, other=0.0).to(tl.float32) - y,
        tl.load(ptr + 2, mask=mask, other=0.0).to(tl.float32) - z,
    )


@triton.jit
def _store_coord(ptr, x, size, R, mask):  # type: ignore[no-untyped-def]
    c = (tl.div_rn(x, size) + 0.5) * R
    c = tl.where(c < 0, 0.0, c)  # lets a NaN through, which minimum and maximum do not
    c = tl.where(c > R - 1, R - 1, c)
    tl.store(ptr, c.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _locate(coords_ptr, p, mask, R):  # type: ignore[no-untyped-def]
    """Lower corner, fraction and nearest voxel along one axis."""
    x = tl.load(coords_ptr + p * 3, mask=mask, other=0.0).to(tl.float32)
    x = tl.where(x < 0, 0.0, x)  # lets a NaN through, which minimum and maximum do not
    x = tl.where(x > R - 1, R - 1, x)
    floor = tl.floor(x)
    fraction = x - floor
    low = tl.where(x == x, floor, 0.0).to(tl.int32)
    up = (fraction > 0.5) | ((fraction == 0.5) & (low % 2 == 1))
    return low, fraction, low + up.to(tl.int32)


@triton.jit
def near_voxel(coords_ptr, p, mask, R):  # type: ignore[no-untyped-def]
    """Coordinates of the voxel nearest to each point."""
    _, _, x = _locate(coords_ptr, p, mask, R)
    _, _, y = _locate(coords_ptr + 1, p, mask, R)
    _, _, z = _locate(coords_ptr + 2, p, mask, R)
    return x, y, z


@triton.jit
def _cell(coords_ptr, p, mask, R):  # type: ignore[no-untyped-def]
    x, _, _ = _locate(coords_ptr, p, mask, R)
    y, _, _ = _locate(coords_ptr + 1, p, mask, R)
    z, _, _ = _locate(coords_ptr + 2, p, mask, R)
    return (x * R + y) * R + z


@triton.jit
def _cells_kernel(coords_ptr, cell_ptr, N, R, num_points, POINTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The cell of each point, over the whole batch."""
    p = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    cloud = (p // N).to(tl.int32)
    tl.store(cell_ptr + p, cloud * R * R * R + _cell(coords_ptr, p, p < num_points, R), mask=p < num_points)


@triton.jit
def _sort_cells_kernel(coords_ptr, cell_ptr, order_ptr, N, R, POINTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The points of one cloud by cell, and those cells."""
    cloud = tl.program_id(0)
    i = tl.arange(0, POINTS)
    first = cloud.to(tl.int64) * N
    cell = _cell(coords_ptr, first + i, i < N, R)
    # One number of both: sorted by cell, and by point within a cell.
    key = tl.sort(tl.where(i < N, cell * POINTS + i, 2147483647))
    tl.store(cell_ptr + first + i, cloud * R * R * R + key // POINTS, mask=i < N)
    tl.store(order_ptr + first + i, cloud * N + key % POINTS, mask=i < N)


@triton.jit
def _starts_kernel(cell_ptr, start_ptr, num_points, num_cells, bits, CELLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many of the sorted cells are below each, by bisection, highest bit first."""
    i = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    start = tl.zeros((CELLS,), tl.int32)
    step = tl.full((), 1, tl.int32) << bits
    for _ in range(bits):
        step = step >> 1
        more = start + step
        fits = (i <= num_cells) & (more <= num_points)
        below = tl.load(cell_ptr + more - 1, mask=fits, other=0) < i
        start = tl.where(fits & below, more, start)
    tl.store(start_ptr + i, start, mask=i <= num_cells)


# Kernels of the ops. A voxel's points lie in the eight cells below it: four runs, of two cells each along z.


@triton.jit
def _run(start_ptr, v, in_rows, R, dx, dy):  # type: ignore[no-untyped-def]
    """Begin and length of the run of points in cells (x - dx, y - dy, z - 1) and (x - dx, y - dy, z) of voxel v."""
    z, y, x = v % R, v // R % R, v // (R * R) % R
    inside = in_rows & (x >= dx) & (y >= dy)
    row = v - (dx * R + dy) * R
    begin = tl.load(start_ptr + row - (z > 0).to(tl.int64), mask=inside, other=0)
    return begin, tl.where(inside, tl.load(start_ptr + row + 1, mask=inside, other=0) - begin, 0)


@triton.jit
def voxelize_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    coords_ptr,
    order_ptr,
    start_ptr,
    out_ptr,
    count_ptr,
    first_ptr,
    num_voxels,
    C,
    R,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Mean and count of each voxel's points; with ``first_ptr``, which gets the first of them or -1, both stand in the
    row of that point, and those of empty voxels nowhere."""
    v = (
        tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    )  # a column: Triton fails to compile the like of a vector
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_rows, in_channels = v < num_voxels, (c < C)[None, :]
    vz, vy, vx = (v % R).to(tl.int32), (v // R % R).to(tl.int32), (v // (R * R) % R).to(tl.int32)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    count = tl.zeros((ROWS, 1), tl.int32)
    first = tl.full((ROWS, 1), -1, tl.int32)
    for run in range(4):
        begin, length = _run(start_ptr, v, in_rows, R, run // 2, run % 2)
        for k in range(0, tl.max(length)):
            live = k < length
            p = tl.load(order_ptr + begin + k, mask=live, other=0)
            x, y, z = near_voxel(coords_ptr, p, live, R)
            here = live & (x == vx) & (y == vy) & (z == vz)
            value = tl.load(x_ptr + p.to(tl.int64) * C + c[None, :], mask=here & in_channels, other=0.0)
            total += value.to(tl.float32)
            count += here.to(tl.int32)
            first = tl.where(here & (first < 0), p, first)
    mean = total / tl.maximum(count, 1).to(tl.float32)
    row = v
    if first_ptr is not None:
        tl.store(first_ptr + v, first, mask=in_rows & (tl.program_id(1) == 0))
        row = first.to(tl.int64)
        in_rows = in_rows & (count > 0)
    out = out_ptr + row * C + c[None, :]
    tl.store(out, mean.to(out_ptr.dtype.element_ty), mask=in_rows & in_channels)
    tl.store(count_ptr + row, count, mask=in_rows & (tl.program_id(1) == 0))


@triton.jit
def _voxelize_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, coords_ptr, count_ptr, out_ptr, N, num_points, C, R, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    p = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_rows, in_channels = p < num_points, (c < C)[None, :]
    x, y, z = near_voxel(coords_ptr, p, in_rows, R)
    v = p // N * R * R * R + (x * R + y) * R + z
    count = tl.load(count_ptr + v, mask=in_rows, other=1).to(tl.float32)
    mask = in_rows[:, None] & in_channels
    grad = tl.load(grad_ptr + v[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32) / count[:, None]
    tl.store(out_ptr + p[:, None] * C + c[None, :], grad.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gather_corners(v_ptr, coords_ptr, p, c, in_rows, in_channels, N, C, R):  # type: ignore[no-untyped-def]
    """Trilinear gather at points p of channels c, float32."""
    x, fx, _ = _locate(coords_ptr, p, in_rows, R)
    y, fy, _ = _locate(coords_ptr + 1, p, in_rows, R)
    z, fz, _ = _locate(coords_ptr + 2, p, in_rows, R)
    first = p // N * R * R * R
    total = tl.zeros((p.shape[0], c.shape[0]), tl.float32)
    for corner in tl.static_range(8):
        vx, wx = _corner(x, fx, corner // 4)
        vy, wy = _corner(y, fy, corner // 2 % 2)
        vz, wz = _corner(z, fz, corner % 2)
        v = first + (vx * R + vy) * R + vz
        value = tl.load(v_ptr + v[:, None] * C + c[None, :], mask=in_rows[:, None] & in_channels, other=0.0)
        total += (wx * wy * wz)[:, None] * value.to(tl.float32)
    return total


@triton.jit
def _corner(low, fraction, UPPER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Voxel and weight along one axis of a corner."""
    if UPPER:
        return low + (fraction > 0).to(tl.int32), fraction
    return low, 1 - fraction


@triton.jit
def scatter_corners(x_ptr, coords_ptr, order_ptr, start_ptr, v, c, in_rows, in_channels, C, R):  # type: ignore[no-untyped-def]
    """The transpose of the trilinear gather: what voxels v, a column, receive in channels c, float32."""
    vz, vy, vx = (v % R).to(tl.int32), (v // R % R).to(tl.int32), (v // (R * R) % R).to(tl.int32)
    total = tl.zeros((v.shape[0], c.shape[0]), tl.float32)
    for run in range(4):
        begin, length = _run(start_ptr, v, in_rows, R, run // 2, run % 2)
        for k in range(0, tl.max(length)):
            live = k < length
            p = tl.load(order_ptr + begin + k, mask=live, other=0)
            weight = _hat(coords_ptr, p, live, R, vx) * _hat(coords_ptr + 1, p, live, R, vy)
            weight *= _hat(coords_ptr + 2, p, live, R, vz)
            value = tl.load(x_ptr + p.to(tl.int64) * C + c[None, :], mask=live & in_channels, other=0.0)
            total += weight * value.to(tl.float32)
    return total


@triton.jit
def _hat(coords_ptr, p, mask, R, v):  # type: ignore[no-untyped-def]
    """Weight of voxel v at point p along one axis."""
    low, fraction, _ = _locate(coords_ptr, p, mask, R)
    return tl.where(v == low, 1 - fraction, fraction)


@triton.jit
def _devoxelize_kernel(  # type: ignore[no-untyped-def]
    v_ptr, coords_ptr, out_ptr, N, num_points, C, R, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    p = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_rows, in_channels = p < num_points, (c < C)[None, :]
    total = gather_corners(v_ptr, coords_ptr, p, c, in_rows, in_channels, N, C, R)
    tl.store(
        out_ptr + p[:, None] * C + c[None, :], total.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & in_channels
    )


@triton.jit
def _devoxelize_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, coords_ptr, order_ptr, start_ptr, out_ptr, num_voxels, C, R, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    v = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_rows, in_channels = v < num_voxels, (c < C)[None, :]
    total = scatter_corners(grad_ptr, coords_ptr, order_ptr, start_ptr, v, c, in_rows, in_channels, C, R)
    tl.store(out_ptr + v * C + c[None, :], total.to(out_ptr.dtype.element_ty), mask=in_rows & in_channels)


# Launching and registration


@op(fake=lambda points, resolution: points.new_empty(points.shape))
def _voxel_coords_op(points: Tensor, resolution: int) -> Tensor:
    coords = points.new_empty(points.shape)
    B, N, _ = points.shape
    block = min(triton.next_power_of_2(N), 1024)
    launch(_voxel_coords_kernel, (B,), points.contiguous(), coords, N, resolution, POINTS=block, num_warps=_WARPS)
    return coords


def _empty_cells(coords: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    B, N, _ = coords.shape
    return coords.new_empty(B * N, dtype=torch.int32), coords.new_empty(B * resolution**3 + 1, dtype=torch.int32)


@op(fake=_empty_cells)
def _cells_op(coords: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """Order and start, see ``Cells``."""
    B, N, _ = coords.shape
    num_cells = B * resolution**3
    order, start = _empty_cells(coords, resolution)
    cell, coords = torch.empty_like(order), coords.contiguous()
    block = triton.next_power_of_2(N)
    if block <= _MOST_SORTED and resolution**3 * block < 2**31:
        warps = min(max(block // 256, 1), 8)
        launch(_sort_cells_kernel, (B,), coords, cell, order, N, resolution, POINTS=block, num_warps=warps)
    else:
        grid = (triton.cdiv(B * N, _CELLS),)
        launch(_cells_kernel, grid, coords, cell, N, resolution, B * N, POINTS=_CELLS, num_warps=_WARPS)
        cell, by_cell = cell.sort(stable=True)
        order = by_cell.int()
    grid, bits = (triton.cdiv(num_cells + 1, _CELLS),), (B * N).bit_length()
    launch(_starts_kernel, grid, cell, start, B * N, num_cells, bits, CELLS=_CELLS, num_warps=_WARPS)
    return order, start


def _empty_voxels(
    features: Tensor, coords: Tensor, order: Tensor, start: Tensor, resolution: int
) -> tuple[Tensor, Tensor]:
    B, _, C = features.shape
    grid = (B, resolution, resolution, resolution)
    return features.new_empty((*grid, C)), features.new_empty(grid, dtype=torch.int32)


@op(fake=_empty_voxels)
def _avg_voxelize_op(
    features: Tensor, coords: Tensor, order: Tensor, start: Tensor, resolution: int
) -> tuple[Tensor, Tensor]:
    """Means, and how many points each voxel has."""
    voxels, count = _empty_voxels(features, coords, order, start, resolution)
    C = features.shape[2]
    rows, channels, grid = block_of_rows(count.numel(), C, features)
    launch(
        voxelize_kernel,
        grid,
        features.contiguous(),
        coords.contiguous(),
        order,
        start,
        voxels,
        count,
        None,
        count.numel(),
        C,
        resolution,
        ROWS=rows,
        CHANNELS=channels,
        num_warps=_WARPS,
    )
    return voxels, count


@op(fake=lambda grad, coords, count: grad.new_empty((*coords.shape[:2], grad.shape[4])))
def _avg_voxelize_bwd_op(grad: Tensor, coords: Tensor, count: Tensor) -> Tensor:
    B, N, _ = coords.shape
    R, C = grad.shape[3:]
    out = grad.new_empty((B, N, C))
    rows, channels, grid = block_of_rows(B * N, C, grad)
    sizes = (N, B * N, C, R)
    blocks = {"ROWS": rows, "CHANNELS": channels, "num_warps": _WARPS}
    launch(_voxelize_bwd_kernel, grid, grad.contiguous(), coords.contiguous(), count, out, *sizes, **blocks)
    return out


@gradient(_avg_voxelize_op, save=lambda features, coords, order, start, resolution, out: (coords, out[1]))
def _avg_voxelize_backward(needs: Needs, grad: Tensor, coords: Tensor, count: Tensor) -> Gradients:
    return (_avg_voxelize_bwd_op(grad, coords, count),)


@op(fake=lambda voxels, coords, *_: voxels.new_empty((*coords.shape[:2], voxels.shape[4])))
def _trilinear_devoxelize_op(voxels: Tensor, coords: Tensor, order: Tensor, start: Tensor) -> Tensor:
    B, N, _ = coords.shape
    R, C = voxels.shape[3:]
    out = voxels.new_empty((B, N, C))
    rows, channels, grid = block_of_rows(B * N, C, voxels)
    sizes = (N, B * N, C, R)
    blocks = {"ROWS": rows, "CHANNELS": channels, "num_warps": _WARPS}
    launch(_devoxelize_kernel, grid, voxels.contiguous(), coords.contiguous(), out, *sizes, **blocks)
    return out


def _empty_devoxelize_bwd(grad: Tensor, coords: Tensor, order: Tensor, start: Tensor, resolution: int) -> Tensor:
    return grad.new_empty((grad.shape[0], resolution, resolution, resolution, grad.shape[2]))


@op(fake=_empty_devoxelize_bwd)
def _trilinear_devoxelize_bwd_op(grad: Tensor, coords: Tensor, order: Tensor, start: Tensor, resolution: int) -> Tensor:
    out = _empty_devoxelize_bwd(grad, coords, order, start, resolution)
    num_voxels, C = out[..., 0].numel(), grad.shape[2]
    rows, channels, grid = block_of_rows(num_voxels, C, grad)
    blocks = {"ROWS": rows, "CHANNELS": channels, "num_warps": _WARPS}
    tensors = (grad.contiguous(), coords.contiguous(), order, start, out)
    launch(_devoxelize_bwd_kernel, grid, *tensors, num_voxels, C, resolution, **blocks)
    return out


@gradient(
    _trilinear_devoxelize_op,
    save=lambda voxels, coords, order, start, out: (coords, order, start, voxels.shape[1]),
)
def _trilinear_devoxelize_backward(needs: Needs, grad: Tensor, *saved: Any) -> Gradients:
    return (_trilinear_devoxelize_bwd_op(grad, *saved),)


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
    Differentiable in the features (once, by Triton).
    Source: PVConv (module docstring). ValueError: shapes, dtypes, devices or a plan that do not fit.
    """
    resolution = check_averaged(features, coords, resolution, plan)
    if not use_triton(impl, features):
        return avg_voxelize_reference(features, coords, resolution, plan)
    return _avg_voxelize_op(features, *cells_of(plan, coords, resolution), resolution)[0]


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
    Returns (B, N, C). Differentiable in the voxels (once, by Triton). Deterministic, backward too.
    Source: PVConv (module docstring). ValueError: shapes, dtypes, devices or a plan that do not fit.
    """
    check_voxels(voxels)
    check_points("coords", coords)
    check_same(voxels=voxels, coords=coords)
    check_plan(plan, coords, voxels.shape[1])
    if not use_triton(impl, voxels):
        return trilinear_devoxelize_reference(voxels, coords, plan)
    return _trilinear_devoxelize_op(voxels, *cells_of(plan, coords, voxels.shape[1]))


def check_averaged(features: Tensor, coords: Tensor, resolution: int, plan: VoxelPlan | None) -> int:
    """The resolution as a Python integer; ``ValueError`` unless the arguments of ``avg_voxelize`` fit."""
    check_float("features", features)
    if features.ndim != 3 or features.shape[-1] == 0:
        raise ValueError(f"features: expected shape (B, N, C) with C >= 1, got {tuple(features.shape)}")
    check_points("coords", coords)
    check_same(features=features, coords=coords)
    if features.shape[1] != coords.shape[1]:
        raise ValueError(f"features: expected the N of coords ({coords.shape[1]}), got {features.shape[1]}")
    resolution = check_integer("resolution", resolution, 1)
    check_plan(plan, coords, resolution)
    return resolution


def check_voxels(voxels: Tensor) -> None:
    """Raise ``ValueError`` unless ``voxels`` is a floating batch of cubic grids (B, R, R, R, C)."""
    check_float("voxels", voxels)
    if voxels.ndim != 5 or len(set(voxels.shape[1:4])) != 1 or voxels.shape[1] == 0 or voxels.shape[4] == 0:
        raise ValueError(f"voxels: expected shape (B, R, R, R, C) with R >= 1 and C >= 1, got {tuple(voxels.shape)}")


def check_plan(plan: VoxelPlan | None, coords: Tensor, resolution: int) -> None:
    """Raise ``ValueError`` unless a plan, if there is one, is of such coordinates at this resolution."""
    if plan is None:
        return
    if plan.resolution != resolution:
        raise ValueError(f"plan: expected resolution {resolution}, got {plan.resolution}")
    if plan.coords.shape != coords.shape:
        raise ValueError(f"plan: expected {tuple(coords.shape)} coords, got {tuple(plan.coords.shape)}")
    check_same(coords=coords, plan=plan.coords)
