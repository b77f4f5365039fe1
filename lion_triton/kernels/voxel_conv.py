"""3 x 3 x 3 convolutions of channels-last grids, and the one behind the mean of the points in each voxel.

    conv3d            Y[v] = sum_{k in {-1, 0, 1}^3} W_k X[v + k]        X is 0 outside of the grid
    voxelize_conv3d   the same of X = avg_voxelize(F)

N points leave most of a grid empty: at LION's sizes at most 1/16 to 1/2 of it is not 0, and of a surface half of that.
What is left out is zeros:

    Y[v] = sum_{k: v + k has points} W_k X[v + k]
    dX[u] = sum_k W_k^T dY[u - k],   dF[p] = dX[u] / n_u,   u the voxel of p, which has n_u points
    dW_k = sum_u dY[u - k] X[u]^T = sum_p dY[u - k] F[p]^T / n_u

By Triton X and dX exist for the voxels with points alone. Forward a program has the outputs of a cube of voxels, and
leaves out each k that leads all of them to empty ones; it also makes their moments, for the group norm behind. The
backward goes over the points, in the order of their cells. Features of s bytes: forward two launches, s B (2 C N + C2
R^3) bytes and 8 B R^3 for indices; backward two, and a sum over parts for dW, s B (3 C N + 2 C2 R^3).

On a CPU it multiplies the rows of the V voxels with points by the whole kernel at once, P[u, k] = W_k X[u], and each
voxel adds up what those around it have for it. Sums over neighbours are products with a sparse matrix, which a plan
holds with its transpose: every output row is written once, its terms are added in a fixed order, and two runs agree bit
for bit. Arithmetic is float32 (float64 of float64), rounded once. P exists for a few clouds at a time.

Legend: B clouds, N points, V voxels with points, R voxels per side, C and C2 channels. 54 V C C2 operations forward, in
place of 54 B R^3 C C2, and twice as many backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lion_triton.kernels._checks import Impl, check_shape, sums_dtype, use_triton
from lion_triton.kernels._dot import by_matrix_units, dot, factors_like
from lion_triton.kernels._op import Gradients, Needs, gradient, op
from lion_triton.kernels._triton import launch, tl, triton
from lion_triton.kernels.rows import bags, block_of_rows, product_reference
from lion_triton.kernels.voxel import (
    VoxelPlan,
    avg_voxelize,
    cells_of,
    check_averaged,
    matrices_of,
    mostly_empty,
    near_voxel,
    voxelize_kernel,
)

# Chosen by machine code, not by timing: voxels along a side of a program's cube, points of 16 bits at a time, channels
# of a factor; about how many programs make the weight's gradient, and of how many points each at least.
_WARPS, _SIDE, _POINTS, _CHANNELS = 4, 4, 64, 64
_PROGRAMS, _LEAST_POINTS = 512, 4096
_PRODUCTS = 1 << 21  # elements of P at a time
_MATRIX_UNITS, _ONEDNN = torch.cpu._is_amx_tile_supported(), torch.backends.mkldnn.is_available()


def conv3d(voxels: Float[Tensor, "B R R R C"], weight: Float[Tensor, "C2 C 3 3 3"]) -> Float[Tensor, "B R R R C2"]:
    """PyTorch's convolution, with a border of zeros. A weight in torch.channels_last_3d is not copied."""
    # Of one small float32 grid PyTorch asks its own loops, which take 2 to 3 times as long and give channels first.
    alone = len(voxels) == 1 and voxels.device.type == "cpu" and voxels.dtype == weight.dtype == torch.float32
    if alone and _ONEDNN and not torch.is_grad_enabled():
        return _onednn_conv3d_op(voxels, weight)
    return F.conv3d(voxels.permute(0, 4, 1, 2, 3), weight, padding=1).permute(0, 2, 3, 4, 1)


def voxelize_conv3d_reference(
    features: Float[Tensor, "B N C"],
    coords: Float[Tensor, "B N 3"],
    weight: Float[Tensor, "C2 C 3 3 3"],
    resolution: int,
    plan: VoxelPlan | None = None,
    impl: Impl = "reference",
) -> Float[Tensor, "B R R R C2"]:
    """:func:`voxelize_conv3d` by way of the whole grid; ``impl`` is that of ``avg_voxelize``."""
    return conv3d(avg_voxelize(features, coords, resolution, plan=plan, impl=impl), weight)


def voxelize_conv3d(
    features: Float[Tensor, "B N C"],
    coords: Float[Tensor, "B N 3"],
    weight: Float[Tensor, "C2 C 3 3 3"],
    resolution: int,
    *,
    plan: VoxelPlan | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "B R R R C2"]:
    """``conv3d(avg_voxelize(features, coords, R), weight)``, without the empty voxels where that is faster.

    features, coords, resolution, plan, impl: as of ``avg_voxelize``. weight: cast to the dtype of features.
    Differentiable in features and weight; without the empty voxels once. Deterministic, gradients too. Triton computes
    float64 in float32, and float32 as precisely as PyTorch's setting for cuDNN's convolutions says.
    ValueError: that of ``avg_voxelize``; a weight of another shape.
    """
    return voxelize_conv3d_moments(features, coords, weight, resolution, plan=plan, impl=impl)[0]


def voxelize_conv3d_moments(
    features: Float[Tensor, "B N C"],
    coords: Float[Tensor, "B N 3"],
    weight: Float[Tensor, "C2 C 3 3 3"],
    resolution: int,
    *,
    plan: VoxelPlan | None = None,
    impl: Impl = "auto",
) -> tuple[Float[Tensor, "B R R R C2"], Float[Tensor, "B parts 2 C2"] | None]:
    """:func:`voxelize_conv3d`, and the moments of what it returns where it has them, as ``adagn`` takes them."""
    resolution = check_averaged(features, coords, resolution, plan)
    check_shape("weight", weight, (*weight.shape[:1], features.shape[2], 3, 3, 3), features, "features")
    weight = weight.to(features.dtype)
    if use_triton(impl, features):
        if not _cubes(features, resolution):
            return voxelize_conv3d_reference(features, coords, weight, resolution, plan, impl), None
        out: tuple[Tensor, ...] = _voxelize_conv3d_op(
            features, *cells_of(plan, coords, resolution), weight.permute(0, 2, 3, 4, 1).flatten(1, 3), resolution
        )
        return out[0], out[1]
    if impl != "auto" or not _pays(features, resolution):
        return voxelize_conv3d_reference(features, coords, weight, resolution, plan, impl), None
    occupied = matrices_of(plan, coords, resolution, features).occupied
    assert occupied is not None
    rows = product_reference(features.flatten(0, 1), occupied.mean, occupied.mean_t)
    where: Any = [*occupied.steps[:2], *occupied.steps_t[:2], occupied.first]
    spread: Tensor = _spread_op(rows, weight.permute(2, 3, 4, 0, 1).flatten(0, 3), where, resolution)
    return spread, None


def _cubes(features: Tensor, resolution: int) -> bool:
    """Whether Triton leaves out the empty voxels: where they are half of all at least."""
    sparse = resolution % _SIDE == 0 and resolution**3 >= 2 * features.shape[1]
    return sparse and by_matrix_units(features, "conv")


def _pays(features: Tensor, resolution: int) -> bool:
    """On a CPU, as measured, forward and backward: the passes over P cost as much for few channels as for many,
    convolutions less; and those of 16 bits take half the time."""
    (_, N, C), half = features.shape, features.element_size() == 2
    if not mostly_empty(features, resolution) or (half and (_MATRIX_UNITS or resolution**3 < 4 * N)):
        return False
    return C * resolution**3 >= (128 if half else 64) * N


@op(fake=lambda voxels, weight: voxels.new_empty((*voxels.shape[:4], weight.shape[0])))
def _onednn_conv3d_op(voxels: Tensor, weight: Tensor) -> Tensor:
    ones = (1, 1, 1)
    y = torch.mkldnn_convolution(voxels.permute(0, 4, 1, 2, 3), weight, None, ones, ones, ones, 1)
    return y.permute(0, 2, 3, 4, 1).contiguous()


def _shares(first: Tensor, start_t: Tensor, resolution: int, width: int) -> Iterator[tuple[slice, slice, slice]]:
    """A few clouds at a time: which, their voxels with points, and their entries in both matrices."""
    voxels, entries = first.tolist(), start_t[:: resolution**3].tolist()
    most = max((end - begin for begin, end in pairwise(voxels)), default=1)
    size = max(1, _PRODUCTS // (most * width))
    for begin in range(0, len(voxels) - 1, size):
        end = min(begin + size, len(voxels) - 1)
        yield slice(begin, end), slice(voxels[begin], voxels[end]), slice(entries[begin], entries[end])


def _block(x: Tensor, column: Tensor, start: Tensor, first: int, rows: slice, entries: slice) -> Tensor:
    """Some rows of a sparse matrix, whose columns count from ``first``, times x."""
    return bags(x, column[entries] - first, start[rows.start : rows.stop + 1] - entries.start, None)


def _empty_grid(rows: Tensor, kernel: Tensor, where: list[Tensor], resolution: int) -> Tensor:
    return rows.new_empty((len(where[-1]) - 1, *[resolution] * 3, kernel.shape[0] // 27))


@op(fake=_empty_grid)
def _spread_op(rows: Tensor, kernel: Tensor, where: list[Tensor], resolution: int) -> Tensor:
    """The convolved grid of the rows of voxels with points.

    kernel: (27 C2, C). where: columns and starts of ``Occupied.steps`` and of ``steps_t``, and ``first``.
    """
    out, dtype = _empty_grid(rows, kernel, where, resolution), sums_dtype(rows)
    _, _, column_t, start_t, first = where
    kernel = kernel.to(dtype)
    with torch.autocast("cpu", enabled=False):
        for clouds, some, entries in _shares(first, start_t, resolution, len(kernel)):
            products = (rows[some].to(dtype) @ kernel.t()).view(-1, out.shape[-1])
            grid = slice(clouds.start * resolution**3, clouds.stop * resolution**3)
            sums = _block(products, column_t, start_t, 27 * some.start, grid, entries)
            out[clouds].copy_(sums.view_as(out[clouds]))
    return out


@op(fake=lambda grad, rows, kernel, *_: (rows.new_empty(rows.shape), kernel.new_empty(kernel.shape)))
def _spread_bwd_op(
    grad: Tensor, rows: Tensor, kernel: Tensor, where: list[Tensor], resolution: int
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and kernel."""
    column, start, _, start_t, first = where
    drows, dtype = rows.new_empty(rows.shape), sums_dtype(rows)
    dkernel = kernel.new_zeros(kernel.shape, dtype=dtype)
    with torch.autocast("cpu", enabled=False):
        for clouds, some, entries in _shares(first, start_t, resolution, len(kernel)):
            around = slice(27 * some.start, 27 * some.stop)
            near = _block(grad[clouds].flatten(0, 3), column, start, clouds.start * resolution**3, around, entries)
            near = near.to(dtype).view(-1, len(kernel))
            drows[some] = near @ kernel.to(dtype)
            dkernel.addmm_(near.t(), rows[some].to(dtype))
    return drows, dkernel.to(kernel.dtype)


@gradient(_spread_op, save=lambda *arguments_and_out: arguments_and_out[:-1])
def _spread_backward(needs: Needs, grad: Tensor, *saved: Any) -> Gradients:
    return _spread_bwd_op(grad, *saved)


# Kernels


@triton.jit
def _conv_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    first_ptr,
    weight_ptr,
    out_ptr,
    moments_ptr,
    R,
    C,
    C2,
    SIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of a cube of voxels: outputs, and the mean and squared deviations of each of their channels."""
    side = R // SIDE
    cloud = (tl.program_id(0) // (side * side * side)).to(tl.int64)
    cube = tl.program_id(0) % (side * side * side)
    i = tl.arange(0, SIDE * SIDE * SIDE)
    x = cube // (side * side) * SIDE + i // (SIDE * SIDE)
    y = cube // side % side * SIDE + i // SIDE % SIDE
    z = cube % side * SIDE + i % SIDE
    o = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first_ptr += cloud * R * R * R
    total = tl.zeros((SIDE * SIDE * SIDE, COLUMNS), tl.float32)
    for k in range(27):
        dx, dy, dz = x + k // 9 - 1, y + k // 3 % 3 - 1, z + k % 3 - 1
        inside = (dx >= 0) & (dx < R) & (dy >= 0) & (dy < R) & (dz >= 0) & (dz < R)
        row = tl.load(first_ptr + (dx * R + dy) * R + dz, mask=inside, other=-1)
        if tl.max(row) >= 0:
            at = row.to(tl.int64)[:, None] * C
            for begin in range(0, C, CHANNELS):
                c = begin + tl.arange(0, CHANNELS)
                values = tl.load(x_ptr + at + c[None, :], mask=(row >= 0)[:, None] & (c < C)[None, :], other=0.0)
                at_weight = (o * 27 + k)[None, :] * C + c[:, None]
                weight = tl.load(weight_ptr + at_weight, mask=(o < C2)[None, :] & (c < C)[:, None], other=0.0)
                total = dot(values, weight, total, FACTOR, PRECISION)
    v = ((cloud * R + x) * R + y) * R + z
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + v[:, None] * C2 + o[None, :], out, mask=(o < C2)[None, :])

    rounded = out.to(tl.float32)
    mean = tl.sum(rounded, 0) / (SIDE * SIDE * SIDE)  # a power of two
    error = rounded - mean[None, :]
    moments_ptr += tl.program_id(0).to(tl.int64) * 2 * C2 + o
    tl.store(moments_ptr, mean, mask=o < C2)
    tl.store(moments_ptr + C2, tl.sum(error * error, 0), mask=o < C2)


@triton.jit
def _points_of(coords_ptr, order_ptr, first_ptr, count_ptr, i, live, N, R):  # type: ignore[no-untyped-def]
    """Of the points i in the order of their cells: which, their clouds, the voxels nearest to them, 1 / its points."""
    p = tl.load(order_ptr + i, mask=live, other=0).to(tl.int64)
    cloud = p // N
    x, y, z = near_voxel(coords_ptr, p, live, R)
    first = tl.load(first_ptr + ((cloud * R + x) * R + y) * R + z, mask=live, other=0)
    count = tl.load(count_ptr + first, mask=live, other=1).to(tl.float32)
    return p, cloud, x, y, z, 1.0 / count


@triton.jit
def _before(cloud, x, y, z, k, live, R):  # type: ignore[no-untyped-def]
    """Voxel u - k, and whether there is one."""
    x, y, z = x - k // 9 + 1, y - k // 3 % 3 + 1, z - k % 3 + 1
    inside = live & (x >= 0) & (x < R) & (y >= 0) & (y < R) & (z >= 0) & (z < R)
    return ((cloud * R + x) * R + y) * R + z, inside


@triton.jit
def _conv_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    coords_ptr,
    order_ptr,
    first_ptr,
    count_ptr,
    weight_ptr,
    dx_ptr,
    num_points,
    N,
    R,
    C,
    C2,
    POINTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of the points' features."""
    i = tl.program_id(0) * POINTS + tl.arange(0, POINTS)
    live = i < num_points
    p, cloud, x, y, z, share = _points_of(coords_ptr, order_ptr, first_ptr, count_ptr, i, live, N, R)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((POINTS, COLUMNS), tl.float32)
    for step in range(27 * tl.cdiv(C2, CHANNELS)):  # one loop, whose loads run ahead
        k, o = step % 27, step // 27 * CHANNELS + tl.arange(0, CHANNELS)
        v, inside = _before(cloud, x, y, z, k, live, R)
        mask = inside[:, None] & (o < C2)[None, :]
        grad = tl.load(grad_ptr + v[:, None] * C2 + o[None, :], mask=mask, other=0.0)
        at_weight = (o * 27 + k)[:, None] * C + c[None, :]
        weight = tl.load(weight_ptr + at_weight, mask=(o < C2)[:, None] & (c < C)[None, :], other=0.0)
        total = dot(grad, weight, total, FACTOR, PRECISION)
    out = (total * share[:, None]).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + p[:, None] * C + c[None, :], out, mask=live[:, None] & (c < C)[None, :])


@triton.jit
def _conv_bwd_weight_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    x_ptr,
    coords_ptr,
    order_ptr,
    first_ptr,
    count_ptr,
    partial_ptr,
    num_points,
    N,
    R,
    C,
    C2,
    part_points,
    POINTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of the weight's gradient for one k, from a part of the points: (parts, C2, 27, C)."""
    k, part = tl.program_id(0), tl.program_id(1)
    blocks = tl.cdiv(C, COLUMNS)
    o = tl.program_id(2) // blocks * CHANNELS + tl.arange(0, CHANNELS)
    c = tl.program_id(2) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.minimum((part + 1) * part_points, num_points)
    total = tl.zeros((CHANNELS, COLUMNS), tl.float32)
    for begin in range(part * part_points, end, POINTS):
        i = begin + tl.arange(0, POINTS)
        live = i < end
        p, cloud, x, y, z, share = _points_of(coords_ptr, order_ptr, first_ptr, count_ptr, i, live, N, R)
        v, inside = _before(cloud, x, y, z, k, live, R)
        mask = inside[None, :] & (o < C2)[:, None]
        grad = tl.load(grad_ptr + v[None, :] * C2 + o[:, None], mask=mask, other=0.0)
        values = tl.load(x_ptr + p[:, None] * C + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        total = dot(grad, values.to(tl.float32) * share[:, None], total, FACTOR, PRECISION)
    partial_ptr += part.to(tl.int64) * C2 * 27 * C + (o * 27 + k)[:, None] * C + c[None, :]
    tl.store(partial_ptr, total, mask=(o < C2)[:, None] & (c < C)[None, :])


# Launching and registration


def _width(C: int) -> int:
    """Channels of a factor at a time; a product takes 16 at least."""
    return min(max(triton.next_power_of_2(C), 16), _CHANNELS)


def _empty_convolved(
    features: Tensor, coords: Tensor, order: Tensor, start: Tensor, weight: Tensor, resolution: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, N, _), C2 = features.shape, weight.shape[0]
    grid, cubes = (B, resolution, resolution, resolution), (resolution // _SIDE) ** 3
    moments = features.new_empty((B, cubes, 2, C2), dtype=torch.float32)
    first, count = (features.new_empty(size, dtype=torch.int32) for size in (grid, B * N))
    return features.new_empty((*grid, C2)), moments, first, count


@op(fake=_empty_convolved)
def _voxelize_conv3d_op(
    features: Tensor, coords: Tensor, order: Tensor, start: Tensor, weight: Tensor, resolution: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Y, its moments by cubes, the first point in each voxel or -1, and how many points its voxel has, for those.

    weight: (C2, 27, C).
    """
    weight = weight.contiguous()
    out, moments, first, count = _empty_convolved(features, coords, order, start, weight, resolution)
    (C2, _, C), means = weight.shape, torch.empty_like(features, memory_format=torch.contiguous_format)
    tensors = (features.contiguous(), coords.contiguous(), order, start, means, count, first)
    rows, channels, grid = block_of_rows(first.numel(), C, features)
    blocks = {"ROWS": rows, "CHANNELS": channels, "num_warps": _WARPS}
    launch(voxelize_kernel, grid, *tensors, first.numel(), C, resolution, **blocks)
    # All outputs of a voxel at once; of float32 there are too many.
    most = 2 * _CHANNELS if features.element_size() == 2 else _CHANNELS
    columns = max(_width(C2), min(triton.next_power_of_2(C2), most))
    launch(
        _conv_kernel,
        (len(features) * moments.shape[1], triton.cdiv(C2, columns)),
        means,
        first,
        weight,
        out,
        moments,
        resolution,
        C,
        C2,
        SIDE=_SIDE,
        CHANNELS=_width(C),
        COLUMNS=columns,
        num_warps=_WARPS,
        num_stages=1,
        **factors_like(features, "conv"),
    )
    return out, moments, first, count


def _empty_conv_bwd(grad: Tensor, features: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    weight, moved = rest[-2:]
    return features.new_empty(features.shape if moved else (0,)), weight.new_empty(weight.shape)


@op(fake=_empty_conv_bwd)
def _voxelize_conv3d_bwd_op(
    grad: Tensor,
    features: Tensor,
    coords: Tensor,
    order: Tensor,
    first: Tensor,
    count: Tensor,
    weight: Tensor,
    moved: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of features (empty unless ``moved``) and weight."""
    grad, features, weight = grad.contiguous(), features.contiguous(), weight.contiguous()
    (B, N, C), C2, R = features.shape, weight.shape[0], grad.shape[1]
    dfeatures = _empty_conv_bwd(grad, features, weight, moved)[0]
    where, sizes = (coords.contiguous(), order, first, count), (B * N, N, R, C, C2)
    half = features.element_size() == 2
    points = _POINTS if half else _POINTS // 2
    blocks = {
        "POINTS": points,
        "CHANNELS": _width(C2),
        "COLUMNS": _width(C),
        "num_warps": _WARPS,
        "num_stages": 2 if half else 1,
        **factors_like(features, "conv"),
    }
    tiles = triton.cdiv(C, _width(C))
    if moved:
        grid = (triton.cdiv(B * N, points), tiles)
        launch(_conv_bwd_kernel, grid, grad, *where, weight, dfeatures, *sizes, **blocks)
    tiles *= triton.cdiv(C2, _width(C2))
    parts = max(min(_PROGRAMS // (27 * tiles), B * N // _LEAST_POINTS), 1)
    part_points = triton.cdiv(triton.cdiv(B * N, points), parts) * points
    partials = features.new_empty((parts, *weight.shape), dtype=torch.float32)
    launch(
        _conv_bwd_weight_kernel,
        (27, parts, tiles),
        grad,
        features,
        *where,
        partials,
        *sizes,
        part_points,
        **blocks,
    )
    dweight = partials.sum(0) if parts > 1 else partials[0]
    return dfeatures, dweight.to(weight.dtype, copy=parts == 1)


@gradient(
    _voxelize_conv3d_op,
    save=lambda features, coords, order, start, weight, resolution, out: (
        *(features, coords, order),
        *out[2:],
        weight,
    ),
)
def _voxelize_conv3d_backward(needs: Needs, grad: Tensor, *saved: Any) -> Gradients:
    arguments: Any = (grad, *saved, needs[0])
    dfeatures, dweight = _voxelize_conv3d_bwd_op(*arguments)
    return dfeatures if needs[0] else None, None, None, None, dweight
