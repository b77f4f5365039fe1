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

Legend: B clouds, N points, M centres or points of the second cloud, K neighbours, C channels.
Coordinates and distances are float32 (float64 where the input is), indices int32.
Sources: Qi et al., "PointNet++", NeurIPS 2017 (ball_query, three_nn, three_interpolate); Fan et al., "A Point Set
Generation Network", CVPR 2017 (Chamfer distance).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32
from torch import Tensor

from lion_triton.kernels._checks import Impl, check_float, check_points, check_same, reference_only, upcast


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
        keys = (sqdist < radius**2).int().mul_(-N).add_(order + N)  # hits first, in index order
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
    rows = _GatherRows.apply(features.flatten(0, 1), _row_index(idx, features.shape[1]).flatten())
    return rows.view(*idx.shape, features.shape[2])


def three_interpolate_reference(
    features: Float[Tensor, "B M C"], weights: Float[Tensor, "B N 3"], idx: Int[Tensor, "B N 3"]
) -> Float[Tensor, "B N C"]:
    """Plain PyTorch form of :func:`three_interpolate`."""
    dtype = torch.promote_types(upcast(features).dtype, weights.dtype)
    index = _row_index(idx, features.shape[1])
    rows = features.to(dtype).flatten(0, 1)
    out = _WeightedRows.apply(rows, index.flatten(0, 1), weights.to(dtype).flatten(0, 1))
    return out.to(features.dtype).view(*idx.shape[:2], features.shape[2])


def nearest_neighbor(
    x: Float[Tensor, "B N 3"], y: Float[Tensor, "B M 3"], *, impl: Impl = "auto"
) -> tuple[Float[Tensor, "B N"], Int32[Tensor, "B N"]]:
    """For each point of x the squared distance to its nearest point of y and that point's index.

    x: (B, N, 3), y: (B, M, 3), of one dtype. Returns (B, N) float32 (float64 for float64) and (B, N) int32;
    ties go to the lowest index. The distance is differentiable in x and y through the chosen pairs.
    Deterministic, backward too. ValueError: shapes, dtypes or devices that do not fit.
    """
    check_clouds(x=x, y=y)
    reference_only("nearest_neighbor", impl, x)
    return nearest_neighbor_reference(x, y)


def chamfer_distance(
    x: Float[Tensor, "B N 3"], y: Float[Tensor, "B M 3"], *, impl: Impl = "auto"
) -> Float[Tensor, " B"]:
    """Mean over x of the squared distance to y, plus mean over y of the squared distance to x, per cloud.

    x: (B, N, 3), y: (B, M, 3), of one dtype. Returns (B,) float32 (float64 for float64), in squared units of
    the coordinates. Differentiable in x and y through the nearest pairs. Deterministic, backward too.
    Source: Fan et al. 2017. ValueError: shapes, dtypes or devices that do not fit.
    """
    check_clouds(x=x, y=y)
    reference_only("chamfer_distance", impl, x)
    return chamfer_distance_reference(x, y)


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
    Source: Qi et al. 2017. ValueError: shapes, dtypes or devices that do not fit; radius <= 0; k < 1.
    """
    check_clouds(centers=centers, points=points)
    if not radius > 0:
        raise ValueError(f"radius: expected a number > 0, got {radius!r}")
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected an integer >= 1, got {k!r}")
    reference_only("ball_query", impl, points)
    return ball_query_reference(centers, points, radius, k)


def three_nn(
    points: Float[Tensor, "B N 3"], centers: Float[Tensor, "B M 3"], *, impl: Impl = "auto"
) -> tuple[Float[Tensor, "B N 3"], Int32[Tensor, "B N 3"]]:
    """The three centres nearest to each point and their interpolation weights.

    points: (B, N, 3), centers: (B, M, 3), of one dtype. Returns weights (B, N, 3) float32 (float64 for
    float64), which sum to 1, and indices (B, N, 3) int32, nearest first, ties to the lowest index. With fewer
    than three centres the missing ones have index 0 and weight 0. No gradient to coordinates; deterministic.
    Source: Qi et al. 2017, eq. 2 with p = 2. ValueError: shapes, dtypes or devices that do not fit.
    """
    check_clouds(points=points, centers=centers)
    reference_only("three_nn", impl, points)
    return three_nn_reference(points, centers)


def group(
    features: Float[Tensor, "B N C"], idx: Int[Tensor, "B M K"], *, impl: Impl = "auto"
) -> Float[Tensor, "B M K C"]:
    """Rows of ``features`` at ``idx``: ``out[b, m, k] = features[b, idx[b, m, k]]``.

    features: (B, N, C), any floating dtype. idx: (B, M, K) int32 or int64 in [0, N) (checked on a CPU only).
    Returns (B, M, K, C) in the dtype of features. Differentiable in features (summed in float32 or float64);
    deterministic, backward too. ValueError: shapes, dtypes, devices or indices that do not fit.
    """
    _check_gather(features, idx)
    reference_only("group", impl, features)
    return group_reference(features, idx)


def three_interpolate(
    features: Float[Tensor, "B M C"],
    weights: Float[Tensor, "B N 3"],
    idx: Int[Tensor, "B N 3"],
    *,
    impl: Impl = "auto",
) -> Float[Tensor, "B N C"]:
    """Weighted sum of three rows: ``out[b, n] = sum_k weights[b, n, k] features[b, idx[b, n, k]]``.

    features: (B, M, C), any floating dtype. weights, idx: (B, N, 3) of :func:`three_nn`; idx int32 or int64 in
    [0, M) (checked on a CPU only). Summed in float32 (float64), returned as (B, N, C) in the dtype of features.
    Differentiable in features and weights; deterministic, backward too.
    Source: Qi et al. 2017, eq. 2. ValueError: shapes, dtypes, devices or indices that do not fit.
    """
    _check_gather(features, idx)
    check_float("weights", weights)
    check_same(features=features, weights=weights)
    if weights.shape != idx.shape or idx.shape[-1] != 3:
        shapes = f"{tuple(weights.shape)} and {tuple(idx.shape)}"
        raise ValueError(f"weights, idx: expected the same shape (B, N, 3), got {shapes}")
    reference_only("three_interpolate", impl, features)
    return three_interpolate_reference(features, weights, idx)


class _GatherRows(torch.autograd.Function):
    """``rows[index]``. The backward is 2 to 3 times faster on a CPU than the scatter that autograd makes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        order, start = _by_target(index, ctx.num_rows)
        grad = grads[0].contiguous()
        return F.embedding_bag(order, grad, start, mode="sum", include_last_offset=True), None


class _WeightedRows(torch.autograd.Function):
    """``(weights[..., None] * rows[index]).sum(1)`` for index and weights (P, K), without the gathered rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, index, weights)
        return F.embedding_bag(index, rows, mode="sum", per_sample_weights=weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, index, weights = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_rows = grad_weights = None
        if ctx.needs_input_grad[0]:
            order, start = _by_target(index.flatten(), rows.shape[0])
            entry_weights, source = weights.flatten()[order], order // index.shape[1]
            grad_rows = F.embedding_bag(
                source, grad, start, mode="sum", per_sample_weights=entry_weights, include_last_offset=True
            )
        if ctx.needs_input_grad[2]:
            grad_weights = torch.stack([(rows[i] * grad).sum(-1) for i in index.unbind(1)], 1)
        return grad_rows, None, grad_weights


def _by_target(index: Int[Tensor, " E"], num_rows: int) -> tuple[Int[Tensor, " E"], Int[Tensor, " rows_plus_1"]]:
    """The entries sorted by the row they point at, and where each row's run starts."""
    start = index.new_zeros(num_rows + 1)
    start.index_add_(0, index + 1, torch.ones_like(index))
    return index.argsort(stable=True), start.cumsum(0)


def _row_index(idx: Int[Tensor, "B ..."], num_points: int) -> Int[Tensor, "B ..."]:
    """Indices into the rows of all clouds, (B N)."""
    cloud = torch.arange(0, idx.shape[0] * num_points, num_points, device=idx.device)
    return idx + cloud.view(-1, 1, 1)


def _argmin(x: Tensor) -> Tensor:
    """Index of the least value along the last dimension, the first of equal ones."""
    if x.device.type == "cpu":  # NumPy's is vectorised: 10 times faster than PyTorch's
        return torch.from_numpy(x.numpy().argmin(-1))
    return x.argmin(-1)


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
    if idx.device.type == "cpu" and idx.numel():
        low, high = (v.item() for v in idx.aminmax())
        if low < 0 or high >= features.shape[1]:
            raise ValueError(f"idx: expected values in [0, {features.shape[1]}), got {low} to {high}")
