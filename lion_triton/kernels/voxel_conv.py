"""3 x 3 x 3 convolutions of channels-last grids, and the one behind the mean of the points in each voxel.

    conv3d            Y[v] = sum_{k in {-1, 0, 1}^3} W_k X[v + k]        X is 0 outside of the grid
    voxelize_conv3d   the same of X = avg_voxelize(F)

N points leave most of a grid empty: at LION's sizes at most 1/16 to 1/2 of it is not 0, and of a surface half of that.
On a CPU voxelize_conv3d multiplies the rows of the V voxels with points alone, by the whole kernel at once, and each
voxel adds up what those around it have for it. What is left out is zeros:

    P[u, k] = W_k X[u],   Y[v] = sum_{(u, k): u - k = v} P[u, k]
    dX[u] = sum_k W_k^T dY[u - k],   dW_k = sum_u dY[u - k] X[u]^T

Sums over neighbours are products with a sparse matrix, which a plan holds with its transpose: every output row is
written once, its terms are added in a fixed order, and two runs agree bit for bit. Arithmetic is float32 (float64 of
float64), rounded once. P exists for a few clouds at a time.

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

from lion_triton.kernels._checks import Impl, sums_dtype, use_triton
from lion_triton.kernels._op import Gradients, Needs, gradient, op
from lion_triton.kernels.adagn import check_shape
from lion_triton.kernels.rows import bags, product_reference
from lion_triton.kernels.voxel import VoxelPlan, avg_voxelize, check_averaged, matrices_of, mostly_empty

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
    """``conv3d(avg_voxelize(features, coords, R), weight)``, on a CPU without the empty voxels where that is faster.

    features, coords, resolution, plan, impl: as of ``avg_voxelize``. weight: cast to the dtype of features.
    Differentiable in features and weight; without the empty voxels once.
    ValueError: that of ``avg_voxelize``; a weight of another shape.
    """
    resolution = check_averaged(features, coords, resolution, plan)
    check_shape("weight", weight, (*weight.shape[:1], features.shape[2], 3, 3, 3), features, "features")
    weight = weight.to(features.dtype)
    if impl != "auto" or use_triton(impl, features) or not _pays(features, resolution):
        return voxelize_conv3d_reference(features, coords, weight, resolution, plan, impl)
    occupied = matrices_of(plan, coords, resolution, features).occupied
    assert occupied is not None
    rows = product_reference(features.flatten(0, 1), occupied.mean, occupied.mean_t)
    where: Any = [*occupied.steps[:2], *occupied.steps_t[:2], occupied.first]
    spread: Tensor = _spread_op(rows, weight.permute(2, 3, 4, 0, 1).flatten(0, 3), where, resolution)
    return spread


def _pays(features: Tensor, resolution: int) -> bool:
    """As measured, forward and backward: the passes over P cost as much for few channels as for many, convolutions
    less; and those of 16 bits take half the time."""
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
