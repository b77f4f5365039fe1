"""PyTorch3D's point-cloud ops of version 0.7.9, with their complete signatures.

    chamfer_distance                                              pytorch3d.loss
    knn_points, knn_gather, ball_query, sample_farthest_points    pytorch3d.ops
    estimate_pointcloud_normals, estimate_pointcloud_local_coord_frames, corresponding_points_alignment    pytorch3d.ops
    masked_gather                                                 pytorch3d.ops.utils

Clouds are (N, P, D) with any D >= 1; ``lengths`` (N,) says how many points of each cloud count, the rest is padding
and never read into a result or a gradient. Nearest neighbours by squared distance and furthest points in up to three
dimensions go to this package's ops. Everything else is plain PyTorch in blocks: never a whole (P1, P2) matrix of large
clouds.

The gradient of distances is that of the chosen pairs, and their values are those that were compared, bit for bit.
Ties go to the lowest index. Deterministic, backward too. float32 and float64; half precision is computed and returned
in float32. ValueError: arguments that do not fit.

Legend: N clouds, P1 and P2 points, D dimensions, K neighbours or samples, U channels. Indices are int64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor

from lion_triton import kernels
from lion_triton.kernels.compat._clouds import as_int, check_tensors, furthest_points
from lion_triton.kernels.knn import smallest

__all__ = [
    "_KNN",
    "SimilarityTransform",
    "ball_query",
    "chamfer_distance",
    "corresponding_points_alignment",
    "estimate_pointcloud_local_coord_frames",
    "estimate_pointcloud_normals",
    "knn_gather",
    "knn_points",
    "masked_gather",
    "sample_farthest_points",
]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class _KNN(NamedTuple):
    """Neighbours in p2 of each point of p1; ``knn`` is None unless it was asked for."""

    dists: Float[Tensor, "N P1 K"]
    idx: Int64[Tensor, "N P1 K"]
    knn: Float[Tensor, "N P1 K D"] | None


def chamfer_distance(
    x: Any,
    y: Any,
    x_lengths: Int[Tensor, " N"] | None = None,
    y_lengths: Int[Tensor, " N"] | None = None,
    x_normals: Float[Tensor, "N P1 D"] | None = None,
    y_normals: Float[Tensor, "N P2 D"] | None = None,
    weights: Float[Tensor, " N"] | None = None,
    batch_reduction: str | None = "mean",
    point_reduction: str | None = "mean",
    norm: int = 2,
    single_directional: bool = False,
    abs_cosine: bool = True,
) -> tuple[Any, Any]:
    """Distance of each point to the nearest one of the other cloud, reduced over points, directions and clouds.

    x, y: (N, P1, D) and (N, P2, D), or objects with ``points_padded()``, ``num_points_per_cloud()`` and
        ``normals_padded()``, whose lengths and normals then count.
    x_normals, y_normals: unit or not; if both are given, 1 - |cosine| between the normals of the nearest pairs is
        reduced alike (1 - cosine without ``abs_cosine``).
    weights: (N,), >= 0, of the clouds.
    point_reduction: "mean", "sum" or "max" (Hausdorff; without normals) over the points of each cloud, or None.
    batch_reduction: "mean" (over the weights), "sum" or None; None if point_reduction is.
    norm: 2 for squared distances, 1 for sums of magnitudes.
    single_directional: from x to y only; else both directions are added (the larger one taken by "max").
    Returns (loss, loss of the normals or None): scalars; (N,) without batch reduction; without point reduction
    (N, P1) and (N, P2) as a pair, 0 at the padding. The distance to an empty cloud is 0. With weights that are all
    zero both are zeros that carry a gradient, (N, N) without batch reduction, as in the original.
    """
    if batch_reduction not in ("mean", "sum", None):
        raise ValueError(f'batch_reduction must be one of "mean", "sum" or None, got {batch_reduction!r}')
    if point_reduction not in ("mean", "sum", "max", None):
        raise ValueError(f'point_reduction must be one of "mean", "sum", "max" or None, got {point_reduction!r}')
    if point_reduction is None and batch_reduction is not None:
        raise ValueError(f"batch_reduction: expected None, as point_reduction is None, got {batch_reduction!r}")
    _check_norm(norm)
    has_normals = x_normals is not None or y_normals is not None
    x, x_lengths, x_normals = _unpack("x", x, x_lengths, x_normals)
    y, y_lengths, y_normals = _unpack("y", y, y_lengths, y_normals)
    if point_reduction == "max" and (has_normals or (x_normals is not None and y_normals is not None)):
        raise ValueError('point_reduction: "max" takes no normals')
    x, y = _check_pair("x", x, "y", y)
    total: Tensor | int = max(len(x), 1)
    if weights is not None:
        if weights.numel() != len(x):
            raise ValueError(f"weights: expected shape ({len(x)},), got {tuple(weights.shape)}")
        if not (weights >= 0).all():
            raise ValueError("weights: expected values >= 0")
        weights, total = weights.view(-1, 1), weights.sum()

    directions = [(x, y, x_lengths, y_lengths, x_normals, y_normals)]
    if not single_directional:
        directions.append((y, x, y_lengths, x_lengths, y_normals, x_normals))
    if weights is not None and total == 0:
        total = 1
        zeros = [weights * cloud[:, :0].sum((1, 2)) for cloud, *_ in directions]
        terms = [(zero, None if point_reduction == "max" else zero) for zero in zeros]
    else:
        terms = [_one_way(*clouds, weights, point_reduction, norm, abs_cosine) for clouds in directions]

    def combine(*both: Any) -> Any:
        if both[0] is None:
            return None
        if point_reduction is None:
            return both[0] if single_directional else both
        loss = reduce(torch.maximum if point_reduction == "max" else torch.add, both)
        if batch_reduction is None:
            return loss
        return loss.sum() if batch_reduction == "sum" else loss.sum() / total

    losses, losses_normals = zip(*terms, strict=True)
    return combine(*losses), combine(*losses_normals)


def knn_points(
    p1: Float[Tensor, "N P1 D"],
    p2: Float[Tensor, "N P2 D"],
    lengths1: Int[Tensor, " N"] | None = None,
    lengths2: Int[Tensor, " N"] | None = None,
    norm: int = 2,
    K: int = 1,
    version: int = -1,
    return_nn: bool = False,
    return_sorted: bool = True,
) -> _KNN:
    """The K points of p2 nearest to each point of p1: squared distances (norm 1: sums of magnitudes) and indices.

    Nearest first; in order of the index without ``return_sorted``. K: >= 1, may exceed P2. Slots beyond the points
    of p2, and rows of padding in p1, have distance 0 and index 0. ``version`` is ignored.
    return_nn: also ``knn_gather(p2, idx, lengths2)``. Distances are differentiable in p1 and p2, knn in p2.
    """
    _check_norm(norm)
    K = _count("K", K)
    p1, p2 = _check_pair("p1", p1, "p2", p2)
    lengths1, lengths2 = _check_lengths("lengths1", lengths1, p1), _check_lengths("lengths2", lengths2, p2)
    whole = lengths1 is None and lengths2 is None and p1.numel() > 0 and p2.numel() > 0
    if whole and norm == 2 and K == 1 and p1.shape[2] == 3 and p1.is_cuda:
        sqdist, nearest = kernels.nearest_neighbor(p1, p2)
        dists, idx = sqdist[..., None], nearest[..., None].long()
    else:
        if lengths1 is not None:  # padding may hold anything, and enters no gradient
            p1 = p1.masked_fill(_padding(lengths1, p1.shape[1])[..., None], 0)
        if norm == 2:
            dists, nearest = kernels.knn(p1, p2, K, lengths=lengths2)
            idx = nearest.long()
        else:
            k = min(K, p2.shape[1])
            idx = _search(p1, p2, lengths2, norm, k, lambda dists: smallest(dists, k))
            if lengths2 is not None:
                idx = idx.masked_fill(_padding(lengths2, k)[:, None], -1)
            idx = _pad(idx, K)
            dists = _distances(p1, p2, idx, norm)
        if not return_sorted:  # in order of the index, what is missing last
            order = torch.where(idx < 0, p2.shape[1], idx).argsort(-1)
            dists, idx = dists.gather(-1, order), idx.gather(-1, order)
        missing = idx < 0
        if lengths1 is not None:
            missing |= _padding(lengths1, idx.shape[1])[..., None]
        dists, idx = dists.masked_fill(missing, 0), idx.masked_fill(missing, 0)
    return _KNN(dists, idx, knn_gather(p2, idx, lengths2) if return_nn else None)


def knn_gather(
    x: Float[Tensor, "N M U"], idx: Int64[Tensor, "N L K"], lengths: Int[Tensor, " N"] | None = None
) -> Float[Tensor, "N L K U"]:
    """``out[n, l, k] = x[n, idx[n, l, k]]`` for k < lengths[n], 0 beyond. Differentiable in x; any dtype."""
    check_tensors(x=x, idx=idx)
    if len(x) != len(idx):
        raise ValueError(f"idx: expected the batch size of x ({len(x)}), got {len(idx)}")
    lengths = _check_lengths("lengths", lengths, x)
    K = idx.shape[2]
    missing = None if lengths is None and x.shape[1] >= K else _padding(_full(lengths, x), K)
    rows = _rows(x, idx)
    return rows if missing is None else rows.masked_fill(missing[:, None, :, None], 0)


def ball_query(
    p1: Float[Tensor, "N P1 D"],
    p2: Float[Tensor, "N P2 D"],
    lengths1: Int[Tensor, " N"] | None = None,
    lengths2: Int[Tensor, " N"] | None = None,
    K: int = 500,
    radius: float = 0.2,
    return_nn: bool = True,
    skip_points_outside_cube: bool = False,
) -> _KNN:
    """The first K points of p2, in index order, closer to each point of p1 than the radius: squared distances, indices.

    Missing ones have distance 0, index -1 and, with return_nn, neighbour 0. ``skip_points_outside_cube`` is a way to
    the same result, and ignored. Distances are differentiable in p1 and p2, knn in p2.
    """
    K = _count("K", K)
    p1, p2 = _check_pair("p1", p1, "p2", p2)
    lengths1, lengths2 = _check_lengths("lengths1", lengths1, p1), _check_lengths("lengths2", lengths2, p2)
    P2 = p2.shape[1]
    k = min(K, P2)
    sqradius = torch.tensor(radius, dtype=p1.dtype).square().item()
    order = torch.arange(P2, dtype=torch.int32, device=p2.device)

    def first_hits(sqdist: Tensor) -> Tensor:
        keys = torch.where(sqdist < sqradius, order, P2)
        hits = keys.topk(k, largest=False, sorted=True).values
        return torch.where(hits < P2, hits, -1)

    idx = _pad(_search(p1, p2, lengths2, 2, k, first_hits), K)
    if lengths1 is not None:
        idx = idx.masked_fill(_padding(lengths1, idx.shape[1])[..., None], -1)
    return _KNN(_distances(p1, p2, idx, 2), idx, masked_gather(p2, idx) if return_nn else None)


def sample_farthest_points(
    points: Float[Tensor, "N P D"],
    lengths: Int[Tensor, " N"] | None = None,
    K: int | list[int] | Int[Tensor, " N"] = 50,
    random_start_point: bool = False,
) -> tuple[Float[Tensor, "N K D"], Int64[Tensor, "N K"]]:
    """K points of each cloud, each the furthest from those before it, starting at point 0 or at a random one.

    K: one number, or one for each cloud. Returns the points, float32 whatever the dtype of ``points``, and their
    indices; beyond a cloud's K or its length, points are 0 and indices -1 (the first sample is always there).
    Points are differentiable as a selection. The random start is drawn by PyTorch's generator of the device.
    """
    check_tensors(points=points)
    if points.ndim != 3 or 0 in points.shape[1:]:
        raise ValueError(f"points: expected shape (N, P, D) with P, D >= 1, got {tuple(points.shape)}")
    points = points.float()
    lengths = _check_lengths("lengths", lengths, points)
    N = len(points)
    K = K if isinstance(K, (list, tuple, Tensor)) else as_int("K", K)
    counts = torch.as_tensor(K, dtype=torch.int64, device=points.device)
    if counts.ndim and counts.shape != (N,):
        raise ValueError(f"K: expected one number for each of {N} clouds, got {tuple(counts.shape)}")
    most = _count("K", counts.max() if counts.numel() else 1)

    start = None
    if random_start_point:
        start = (torch.rand(N, device=points.device) * _full(lengths, points)).long()
    idx = furthest_points(points.detach(), most, lengths, start)
    counts = torch.minimum(counts, _full(lengths, points)).clamp(min=1)
    idx = idx.masked_fill(_padding(counts, most), -1)
    return masked_gather(points, idx), idx


class SimilarityTransform(NamedTuple):
    """``Y = s X R + T``, the points being rows."""

    R: Float[Tensor, "N D D"]
    T: Float[Tensor, "N D"]
    s: Float[Tensor, " N"]


def corresponding_points_alignment(
    X: Any,
    Y: Any,
    weights: Float[Tensor, "N P"] | list[Float[Tensor, " P"]] | None = None,
    estimate_scale: bool = False,
    allow_reflection: bool = False,
    eps: float = 1e-9,
) -> SimilarityTransform:
    """The rotation, shift and scale that bring points X nearest to points Y of the same index, by least squares.

    X, Y: (N, P, D), or objects with ``points_padded()`` and ``num_points_per_cloud()`` of equal lengths. weights:
    (N, P), or a list of one (P,) each, of the pairs. estimate_scale: else s = 1. allow_reflection: R may mirror. eps:
    the least sum of weights and the least variance of X that are divided by. Differentiable.
    Source: Umeyama, "Least-squares estimation of transformation parameters between two point patterns", 1991.
    """
    X, lengths, _ = _unpack("X", X, None, None)
    Y, lengths_y, _ = _unpack("Y", Y, None, None)
    X, Y = _check_pair("X", X, "Y", Y)
    if X.shape != Y.shape or not torch.equal(_full(lengths, X), _full(lengths_y, Y)):
        raise ValueError(f"Y: expected as many points as X {tuple(X.shape)}, got {tuple(Y.shape)}")
    N, P, _ = X.shape
    if weights is None:
        weights = X.new_ones(N, P)
    pair_weights = torch.nn.utils.rnn.pad_sequence(list(weights), batch_first=True)
    if pair_weights.shape != (N, P):
        raise ValueError(f"weights: expected shape ({N}, {P}), got {tuple(pair_weights.shape)}")
    weight = pair_weights.to(X.dtype).masked_fill(_padding(_full(lengths, X), P), 0)[..., None]
    total = weight.sum(1, keepdim=True).clamp(min=eps)
    mean_x, mean_y = ((weight * cloud).sum(1, keepdim=True) / total for cloud in (X, Y))
    x, y = X - mean_x, Y - mean_y
    covariance = (weight * x).mT @ y / total
    U, S, Vh = torch.linalg.svd(covariance)
    signs = torch.ones_like(S)
    if not allow_reflection:
        signs = torch.cat([signs[:, :-1], torch.det(U @ Vh).detach().sign()[:, None]], 1)
    R = (U * signs[:, None]) @ Vh
    s = X.new_ones(N)
    if estimate_scale:
        variance = (weight * x.square()).sum((1, 2)) / total[:, 0, 0]
        s = (S * signs).sum(1) / variance.clamp(min=eps)
    return SimilarityTransform(R, mean_y[:, 0] - s[:, None] * (mean_x @ R)[:, 0], s)


def estimate_pointcloud_normals(
    pointclouds: Any,
    neighborhood_size: int = 50,
    disambiguate_directions: bool = True,
    *,
    use_symeig_workaround: bool = True,
) -> Float[Tensor, "N P 3"]:
    """Unit normals (N, P, 3): the first axes of :func:`estimate_pointcloud_local_coord_frames`."""
    frames = estimate_pointcloud_local_coord_frames(pointclouds, neighborhood_size, disambiguate_directions)[1]
    return frames[..., 0]


def estimate_pointcloud_local_coord_frames(
    pointclouds: Any,
    neighborhood_size: int = 50,
    disambiguate_directions: bool = True,
    *,
    use_symeig_workaround: bool = True,
) -> tuple[Float[Tensor, "N P 3"], Float[Tensor, "N P 3 3"]]:
    """Principal axes of each point's neighbours, and how far these spread along them.

    pointclouds: (N, P, 3), or an object with ``points_padded()`` and ``num_points_per_cloud()``. neighborhood_size: how
    many points, itself included, and fewer than every cloud has. disambiguate_directions: the first and the last axis
    point to where most neighbours are (SHOT), the one between is the first x the last; else signs are any.
    Returns variances (N, P, 3), rising, and axes (N, P, 3, 3), the columns, of which the first is the normal; padding
    holds anything. Differentiable. ``use_symeig_workaround`` is ignored.
    Source: Tombari et al., "Unique signatures of histograms for local surface description", ECCV 2010.
    """
    points, lengths, _ = _unpack("pointclouds", pointclouds, None, None)
    if points.shape[2] != 3:
        raise ValueError(f"pointclouds: expected shape (N, P, 3), got {tuple(points.shape)}")
    K = _count("neighborhood_size", neighborhood_size)
    fewest = int(_full(lengths, points).min()) if len(points) else K + 1
    if fewest <= K:
        raise ValueError(f"neighborhood_size: expected less than the points of every cloud ({fewest}), got {K}")
    points = points if points.dtype == torch.float64 else points.float()
    if lengths is not None:  # padding may hold anything
        points = points.masked_fill(_padding(lengths, points.shape[1])[..., None], 0)
    centered = points - points.sum(1, keepdim=True) / _full(lengths, points)[:, None, None]
    near = knn_points(centered, centered, lengths, lengths, K=K, return_nn=True).knn
    assert near is not None
    difference = near - near.mean(2, keepdim=True)
    variances, axes = torch.linalg.eigh(difference.mT @ difference / K)
    if disambiguate_directions:
        offsets = near - centered[:, :, None]
        normal, tangent = (_to_the_most(axes[..., i], offsets) for i in (0, 2))
        axes = torch.stack([normal, torch.linalg.cross(normal, tangent), tangent], -1)
    return variances, axes


def _to_the_most(axis: Float[Tensor, "N P 3"], offsets: Float[Tensor, "N P K 3"]) -> Float[Tensor, "N P 3"]:
    """The axis or its opposite, so that half of the offsets at least have a part along it."""
    ahead = ((offsets * axis[:, :, None]).sum(-1) > 0).sum(-1, keepdim=True)
    return torch.where(2 * ahead >= offsets.shape[2], axis, -axis)


def masked_gather(points: Float[Tensor, "N P D"], idx: Int64[Tensor, "N ..."]) -> Float[Tensor, "N ... D"]:
    """``points[n, idx[n, ...]]``, 0 where idx is -1; idx (N, K) or (N, P1, K). Differentiable in points."""
    check_tensors(points=points, idx=idx)
    if len(points) != len(idx):
        raise ValueError(f"idx: expected the batch size of points ({len(points)}), got {len(idx)}")
    if idx.ndim not in (2, 3):
        raise ValueError(f"idx: expected shape (N, K) or (N, P1, K), got {tuple(idx.shape)}")
    rows = _rows(points, idx.clamp(min=0).unsqueeze(1) if idx.ndim == 2 else idx.clamp(min=0))
    return rows.view(*idx.shape, points.shape[2]).masked_fill((idx < 0)[..., None], 0)


def _one_way(
    x: Tensor,
    y: Tensor,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
    x_normals: Tensor | None,
    y_normals: Tensor | None,
    weights: Tensor | None,
    point_reduction: str | None,
    norm: int,
    abs_cosine: bool,
) -> tuple[Tensor, Tensor | None]:
    """Distances from x to y and of their normals, reduced over the points of x; before that, 0 at padding."""
    nearest = knn_points(x, y, x_lengths, y_lengths, norm)
    lengths = _full(x_lengths, x)

    def reduced(terms: Tensor) -> Tensor:
        terms = terms if weights is None else terms * weights
        if point_reduction is None:
            return terms
        if point_reduction == "max" and terms.shape[1]:
            return terms.max(1).values
        return terms.sum(1) / lengths.clamp(min=1) if point_reduction == "mean" else terms.sum(1)

    loss = reduced(nearest.dists[..., 0])
    if x_normals is None or y_normals is None:
        return loss, None
    padding = _padding(lengths, x.shape[1])
    x_normals = x_normals.masked_fill(padding[..., None], 0)
    cosine = F.cosine_similarity(x_normals, knn_gather(y_normals, nearest.idx, y_lengths)[:, :, 0], 2, 1e-6)
    return loss, reduced((1 - (cosine.abs() if abs_cosine else cosine)).masked_fill(padding, 0))


def _search(
    p1: Tensor, p2: Tensor, lengths2: Tensor | None, norm: int, k: int, pick: Callable[[Tensor], Tensor]
) -> Int64[Tensor, "N P1 k"]:
    """``pick`` (rows to k indices) of the distances from p1 to p2, block by block; padding is at infinity."""
    p1, p2 = p1.detach(), p2.detach()
    idx = torch.empty(*p1.shape[:2], k, dtype=torch.int64, device=p1.device)
    padding = None if lengths2 is None else _padding(lengths2, p2.shape[1])[:, None]
    for n, i in _blocks(p1, p2) if idx.numel() else ():
        x, y = p1[n, i].unsqueeze(2).unbind(-1), p2[n].unsqueeze(1).unbind(-1)
        dists = _distance((a - b for a, b in zip(x, y, strict=True)), norm)
        idx[n, i] = pick(dists if padding is None else dists.masked_fill_(padding[n], torch.inf)).long()
    return idx


def _blocks(p1: Tensor, p2: Tensor) -> Iterator[tuple[slice, slice]]:
    """Clouds and rows of p1 whose distances to p2 are held at a time: few for a CPU's cache, many for a GPU."""
    (N, P1, _), P2 = p1.shape, p2.shape[1]
    size = 1 << (17 if p1.device.type == "cpu" else 24)
    rows, clouds = max(1, size // P2), max(1, size // (P1 * P2))
    for n in range(0, N, clouds):
        for i in range(0, P1, rows):
            yield slice(n, n + clouds), slice(i, i + rows)


def _distance(differences: Iterable[Tensor], norm: int) -> Tensor:
    """Sum over the coordinates of squares (norm 2) or magnitudes, one after the other: everywhere the same bits."""
    return reduce(torch.add, (d.square() if norm == 2 else d.abs() for d in differences))


def _distances(p1: Tensor, p2: Tensor, idx: Tensor, norm: int) -> Float[Tensor, "N P1 K"]:
    """Distances of the pairs, 0 where idx is -1; padding that holds NaN or infinity enters no gradient."""
    difference = p1[:, :, None] - _rows(p2, idx.clamp(min=0))
    difference = torch.where((idx < 0)[..., None], 0, difference)
    return _distance(difference.unbind(-1), norm)


def _rows(x: Tensor, idx: Int64[Tensor, "N L K"]) -> Tensor:
    """``x[n, idx[n, l, k]]`` (N, L, K, U), by the op whose backward adds in a fixed order; 0 if x has no points."""
    shape = *idx.shape, x.shape[2]
    if 0 in (*shape, x.shape[1]):
        return x.new_zeros(shape)
    if x.dtype in _FLOATS:
        return kernels.group(x, idx)
    return x.take_along_dim(idx.flatten(1)[..., None], 1).view(shape)


def _padding(lengths: Tensor, size: int) -> Tensor:
    """(N, size): True from each length on."""
    return torch.arange(size, device=lengths.device) >= lengths[:, None]


def _full(lengths: Tensor | None, points: Tensor) -> Int64[Tensor, " N"]:
    if lengths is not None:
        return lengths
    return torch.full(points.shape[:1], points.shape[1], dtype=torch.int64, device=points.device)


def _pad(idx: Tensor, K: int) -> Tensor:
    """Indices (N, P1, k) with -1 up to K."""
    return F.pad(idx, (0, K - idx.shape[2]), value=-1)


def _unpack(
    name: str, points: Any, lengths: Tensor | None, normals: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if hasattr(points, "points_padded") and hasattr(points, "num_points_per_cloud"):
        points, lengths, normals = points.points_padded(), points.num_points_per_cloud(), points.normals_padded()
    elif not isinstance(points, Tensor):
        kind = type(points).__name__
        raise ValueError(f"{name}: expected Pointclouds objects or torch.Tensor of shape (N, P, D), got {kind}")
    if points.ndim != 3:
        raise ValueError(f"{name}: Expected points to be of shape (N, P, D), got {tuple(points.shape)}")
    if normals is not None and normals.ndim != 3:
        raise ValueError(f"{name}_normals: Expected normals to be of shape (N, P, D), got {tuple(normals.shape)}")
    return points, _check_lengths(f"{name}_lengths", lengths, points), normals


def _check_pair(name1: str, p1: Tensor, name2: str, p2: Tensor) -> tuple[Tensor, Tensor]:
    """Two cloud batches that fit each other, float32 or float64."""
    check_tensors(**{name1: p1, name2: p2})
    for name, p in ((name1, p1), (name2, p2)):
        if p.ndim != 3 or p.shape[2] == 0:
            raise ValueError(f"{name}: expected shape (N, P, D) with D >= 1, got {tuple(p.shape)}")
        if p.dtype not in _FLOATS:
            raise ValueError(f"{name}: expected a floating dtype, got {p.dtype}")
    for what, a, b in (
        ("batch size", len(p1), len(p2)),
        ("number of dimensions", p1.shape[2], p2.shape[2]),
        ("dtype", p1.dtype, p2.dtype),
        ("device", p1.device, p2.device),
    ):
        if a != b:
            raise ValueError(f"{name2}: expected the {what} of {name1} ({a}), got {b}")
    return (p1, p2) if p1.dtype == torch.float64 else (p1.float(), p2.float())


def _check_lengths(name: str, lengths: Tensor | None, points: Tensor) -> Int64[Tensor, " N"] | None:
    """The lengths, or None where every cloud is full."""
    if lengths is None or not len(points):
        return None
    lengths = torch.as_tensor(lengths)
    if lengths.shape != points.shape[:1]:
        raise ValueError(f"{name}: Expected lengths to be of shape ({len(points)},), got {tuple(lengths.shape)}")
    low, high = (int(v) for v in lengths.aminmax())
    if low < 0 or high > points.shape[1]:
        raise ValueError(f"{name}: expected values in [0, {points.shape[1]}], got {low} to {high}")
    return None if low == points.shape[1] else lengths.to(points.device, torch.int64)


def _check_norm(norm: int) -> None:
    if norm not in (1, 2):
        raise ValueError(f"norm: Support for 1 or 2 norm., got {norm!r}")


def _count(name: str, value: Any) -> int:
    count = as_int(name, value)
    if count < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {count}")
    return count
