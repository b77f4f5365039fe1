"""The drop-in modules against brute force in float64, in their own layouts and dtypes.

A specification gets what ``agree`` gives it: the arguments themselves, and once more in float64.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lion_triton import kernels
from lion_triton.kernels.compat import (
    chamfer3d,
    chamfer_dist,
    emd,
    emd_auction,
    emd_mean,
    knn_cuda,
    pointnet2,
    pointops,
    pvcnn,
    pytorch3d,
    structural_losses,
    torch_cluster,
)
from tests.properties.strategies import Draw, agree, dtype_of, index, one_of, property_of, size, spoiled, tensor

FAR = ("normal", "grid", "coincident", "huge")


def refuse_unless(condition: bool) -> None:
    if not condition:
        raise ValueError("refused")


def is_cloud(*clouds: Any, dims: int | None = 3) -> None:
    """Refuse what is not a pair (or one) of batches (B, N, D) that fit."""
    for x in clouds:
        refuse_unless(isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 3)
        refuse_unless(x.shape[2] == dims if dims else x.shape[2] > 0)
        refuse_unless(len(x) == len(clouds[0]) and x.dtype == clouds[0].dtype and x.shape[2] == clouds[0].shape[2])


def wide(x: Tensor) -> Tensor:
    """As distances are returned: float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def pair(draw: Draw, dims: int = 3, least: int = 1, kinds: Any = FAR) -> list[Any]:
    batch, dtype = size(draw, 0, 3), dtype_of(draw)
    return [tensor(draw, batch, size(draw, least, 16), dims, dtype=dtype, kinds=kinds) for _ in "xy"]


def sqdist(x: Tensor, y: Tensor) -> Tensor:
    """(B, N, M), differentiable."""
    return (wide(x)[:, :, None] - wide(y)[:, None]).square().sum(-1)


def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    is_cloud(x, y)
    refuse_unless(x.shape[1] > 0 and y.shape[1] > 0)
    found = sqdist(x.detach(), y.detach()).argmin(2, keepdim=True)
    return sqdist(x, y).gather(2, found)[..., 0], found[..., 0].int()


def any_nearest(arguments: list[Any], got: list[Tensor], exact: list[Tensor]) -> bool:
    """Other indices where distances are the same, but for rounding."""
    return all(
        bool(((a.double() - b).abs() <= 1e-5 * b + 1e-37).all())
        for a, b in zip(got, exact, strict=True)
        if a.is_floating_point()
    )


def both_ways(x: Any, y: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (d1, i1), (d2, i2) = nearest(x, y), nearest(y, x)
    return d1, d2, i1, i2


@property_of(5)
def test_chamfer_3DDist(draw: Draw) -> str:
    return agree(chamfer3d.chamfer_3DDist(), both_ways, spoiled(draw, pair(draw)), ties=any_nearest)


@property_of(4)
def test_fscore(draw: Draw) -> str:
    B = size(draw, 0, 3)
    d1, d2 = (tensor(draw, B, size(draw, 1, 9), kinds=("grid", "normal", "huge")).abs() for _ in "xy")

    def plain(d1: Any, d2: Any, threshold: float) -> Any:
        p, q = ((d < threshold).double().mean(1) for d in (d1, d2))
        return [x.float() for x in (torch.where(p + q > 0, 2 * p * q / (p + q), 0), p, q)]

    return agree(chamfer3d.fscore, plain, [d1, d2, one_of(draw, 1e-3, 0.5, 3.0)])


@property_of(5)
def test_chamfer_dist(draw: Draw) -> str:
    x, y = pair(draw)
    x, y = (c if len(c) else c.new_zeros(1, *c.shape[1:]) for c in (x, y))  # means over no clouds are NaN, as theirs
    name = one_of(draw, "ChamferDistanceL1", "ChamferDistanceL2", "ChamferDistanceL1_PM", "ChamferDistanceL2_split")

    def root(d: Tensor) -> Tensor:
        return torch.where(d > 0, torch.where(d > 0, d, 1).sqrt(), 0)

    def plain(x: Any, y: Any) -> Any:
        d1, d2, _, _ = both_ways(x, y)
        return {
            "ChamferDistanceL1": lambda: (root(d1).mean() + root(d2).mean()) / 2,
            "ChamferDistanceL2": lambda: d1.mean() + d2.mean(),
            "ChamferDistanceL1_PM": lambda: root(d1).mean(),
            "ChamferDistanceL2_split": lambda: (d1.mean(), d2.mean()),
        }[name]()

    # Gradients go to whichever of several nearest points was taken: of grids and coincident points, any.
    return agree(lambda x, y: getattr(chamfer_dist, name)()(x.detach(), y.detach()), plain_of(plain), [x, y])


def plain_of(plain: Any) -> Any:
    """Without gradients."""
    return lambda *arguments: plain(*(x.detach() if isinstance(x, Tensor) else x for x in arguments))


@property_of(4)
def test_earth_mover_distance(draw: Draw) -> str:
    arguments, transpose = pair(draw), one_of(draw, True, False)
    of_sum, single = one_of(draw, True, False), one_of(draw, True, False)
    if transpose:
        arguments = [x.mT for x in arguments]
    if single and len(arguments[0]):
        arguments = [x[0] for x in arguments]

    def plain(x: Any, y: Any) -> Tensor:
        refuse_unless(isinstance(x, Tensor) and isinstance(y, Tensor) and min(x.ndim, y.ndim) >= 2)
        x, y = (c[None] if c.ndim == 2 else c for c in (x, y))
        x, y = (c.mT if transpose else c for c in (x, y))
        cost = kernels.approx_emd(x, y, impl="reference")
        return cost * x.shape[1] if of_sum else cost

    module = emd if of_sum else emd_mean
    return agree(partial(module.earth_mover_distance, transpose=transpose), plain, spoiled(draw, arguments))


@property_of(4)
def test_auction(draw: Draw) -> str:
    x, _ = pair(draw)
    y = tensor(draw, *x.shape, dtype=x.dtype, kinds=FAR)

    def plain(x: Any, y: Any, eps: Any, iters: Any) -> Any:
        is_cloud(x, y)
        refuse_unless(x.shape == y.shape and x.shape[1] > 0 and isinstance(eps, float) and 0 < eps < float("inf"))
        refuse_unless(isinstance(iters, int) and iters >= 1)
        return kernels.auction_emd(x, y.detach(), eps, iters, impl="reference")

    def any_bids(arguments: list[Any], got: list[Tensor], exact: list[Tensor]) -> bool:
        return bool((got[1] >= 0).all() and (got[1] < arguments[1].shape[1]).all())

    return agree(emd_auction.emdModule(), plain, [x, y, one_of(draw, 0.05, 0.5), size(draw, 1, 5)], ties=any_bids)


@property_of(4)
def test_expansion_penalty(draw: Draw) -> str:
    """Lengths of edges to the points that are named; nothing else is a number above 0."""
    elements, per, dtype = size(draw, 1, 3), size(draw, 2, 6), dtype_of(draw)
    x = tensor(draw, size(draw, 0, 3), elements * per, 3, dtype=dtype, kinds=FAR)
    (xyz,) = spoiled(draw, [x])

    def ours(xyz: Any) -> Any:
        return emd_auction.expansionPenaltyModule()(xyz.detach() if isinstance(xyz, Tensor) else xyz, per, 1.5)

    def plain(xyz: Any) -> Any:
        refuse_unless(isinstance(xyz, Tensor) and xyz.ndim == 3 and xyz.shape[2] == 3 and xyz.shape[1] % per == 0)
        _, assignment, mean = ours(xyz)
        rows = xyz.detach().float().take_along_dim(assignment.long().clamp(min=0)[..., None], 1)
        length = (xyz.detach().float() - rows).square().sum(-1).sqrt()
        return torch.where(assignment >= 0, length, 0), assignment, mean

    return agree(ours, plain, [xyz], ties=any_nearest)


@property_of(4)
def test_minimum_density_sample(draw: Draw) -> str:
    B, N = size(draw, 0, 3), size(draw, 1, 12)
    x, npoint = tensor(draw, B, N, 3, dtype=dtype_of(draw)), size(draw, 1, 15)
    length = tensor(draw, B, kinds=("normal", "tiny")).abs() + one_of(draw, 0, 0.1)

    def in_bounds(x: Any, npoint: Any, length: Any) -> Tensor:
        idx = emd_auction.minimum_density_sample(x.detach(), npoint, length.detach())
        assert idx.shape == (B, npoint) and not idx[:, 0].any() and (idx >= 0).all() and (idx < N).all()
        first = idx[:, :N].sort(1).values
        assert (first[:, 1:] > first[:, :-1]).all() or npoint > N, "a point was sampled twice"
        return idx

    return agree(in_bounds, in_bounds, [x, npoint, length], ties=lambda *_: True)


@property_of(5)
def test_knn_cuda(draw: Draw) -> str:
    dims, transpose_mode, k = size(draw, 1, 5), one_of(draw, True, False), size(draw, 1, 8)
    arguments = pair(draw, dims)
    if not transpose_mode:
        arguments = [x.mT for x in arguments]

    def plain(ref: Any, query: Any) -> Any:
        refuse_unless(all(isinstance(x, Tensor) and x.ndim == 3 and not x.is_complex() for x in (ref, query)))
        x, y = (c.float() if transpose_mode else c.float().mT for c in (query.detach(), ref.detach()))
        is_cloud(x, y, dims=None)
        refuse_unless(k <= y.shape[1])
        d, idx = sqdist(x.double(), y.double()).sort(dim=2, stable=True)
        d, idx = d[..., :k].sqrt().float(), idx[..., :k]
        return (d, idx) if transpose_mode else (d.mT, idx.mT)

    return agree(knn_cuda.KNN(k, transpose_mode), plain, spoiled(draw, arguments), ties=any_nearest)


@property_of(5)
def test_match_cost(draw: Draw) -> str:
    """No dearer than every point's mass at the greatest distance, no cheaper than at the least."""

    def ours(x: Any, y: Any) -> Any:
        cost = structural_losses.match_cost(x, y)
        if len(x):
            mass = max(x.shape[1], y.shape[1])
            d = sqdist(x.detach().double(), y.detach().double()).sqrt().flatten(1)
            assert (cost <= d.amax(1) * mass * 1.01 + 1e-30).all()
            assert (cost >= 0).all()
        return cost

    def plain(x: Any, y: Any) -> Any:
        is_cloud(x, y)
        refuse_unless(x.shape[1] > 0 and y.shape[1] > 0)
        # What comes of one cloud is what comes of it in a batch.
        costs = [structural_losses.match_cost(a[None], b[None]) for a, b in zip(x, y, strict=True)]
        return torch.cat([*costs, wide(x).sum((1, 2))[:0]])

    return agree(ours, plain, spoiled(draw, pair(draw)))


@property_of(4)
def test_nn_distance(draw: Draw) -> str:
    def plain(x: Any, y: Any) -> Any:
        return both_ways(x, y)[:2]

    def ours(x: Any, y: Any) -> Any:
        return structural_losses.nn_distance(*(c.detach() if isinstance(c, Tensor) else c for c in (x, y)))

    return agree(ours, plain_of(plain), spoiled(draw, pair(draw)))


# pointnet2 and pvcnn: channels first


@property_of(5)
def test_grouping(draw: Draw) -> str:
    B, C, N, M = size(draw, 0, 3), size(draw, 0, 5), size(draw, 1, 9), size(draw, 0, 9)
    arguments = [tensor(draw, B, C, N, dtype=dtype_of(draw)), index(draw, N, B, M, 2)]

    def plain(features: Any, idx: Any) -> Tensor:
        refuse_unless(isinstance(features, Tensor) and features.is_floating_point() and features.ndim == 3)
        refuse_unless(isinstance(idx, Tensor) and idx.ndim == 3 and len(idx) == len(features))
        flat = idx.long().flatten(1)[:, None].expand(-1, features.shape[1], -1)
        refuse_unless(features.shape[2] > 0 and 0 <= int(idx.sum() * 0) <= 0)
        return features.gather(2, flat).view(*features.shape[:2], *idx.shape[1:])

    return agree(one_of(draw, pvcnn.grouping, pointnet2.grouping_operation), plain, arguments)


@property_of(5)
def test_three_interpolate(draw: Draw) -> str:
    B, C, N, M = size(draw, 0, 3), size(draw, 1, 5), size(draw, 1, 9), size(draw, 0, 9)
    features, weight = tensor(draw, B, C, N, dtype=dtype_of(draw)), tensor(draw, B, M, 3)

    def plain(features: Any, idx: Any, weight: Any) -> Tensor:
        flat = idx.long().flatten(1)[:, None].expand(-1, features.shape[1], -1)
        rows = features.to(torch.promote_types(features.dtype, torch.float32)).gather(2, flat)
        rows = rows.view(*features.shape[:2], *idx.shape[1:])
        return (rows * weight.detach()[:, None]).sum(-1).to(features.dtype)

    return agree(pointnet2.three_interpolate, plain, [features, index(draw, N, B, M, 3), weight], loose=4)


@property_of(5)
def test_three_nn(draw: Draw) -> str:
    def plain(x: Any, y: Any) -> Any:
        is_cloud(x, y)
        d, idx = sqdist(x.detach(), y.detach()).sort(dim=2, stable=True)
        missing = max(0, 3 - y.shape[1])
        pad = torch.nn.functional.pad
        return pad(d[..., :3].sqrt(), (0, missing), value=torch.inf), pad(idx[..., :3], (0, missing)).int()

    def ties(arguments: list[Any], got: list[Tensor], exact: list[Tensor]) -> bool:
        return any_nearest(arguments, *([x[:1][0].nan_to_num(posinf=0), x[1]] for x in (got, exact)))

    return agree(pointnet2.three_nn, plain, spoiled(draw, pair(draw)), ties=ties)


@property_of(5)
def test_ball_query(draw: Draw) -> str:
    """The first points in the ball, then the first of them again; 0 where there are none."""
    centers, points = pair(draw, kinds=("normal", "grid", "coincident"))
    radius, k, ours = one_of(draw, 0.5, 1.0, 2.5), size(draw, 1, 6), one_of(draw, "pvcnn", "pointnet2")

    def plain(centers: Any, points: Any) -> Tensor:
        is_cloud(centers, points)
        hit = sqdist(centers.detach(), points.detach()) < radius**2
        order = torch.where(hit, torch.arange(points.shape[1]), points.shape[1]).sort(2).values[..., :k]
        order = torch.nn.functional.pad(order, (0, k - order.shape[2]), value=points.shape[1])
        first = order[..., :1].where(order[..., :1] < points.shape[1], 0)
        return torch.where(order < points.shape[1], order, first).int()

    def op(centers: Any, points: Any) -> Tensor:
        if ours == "pvcnn":
            return pvcnn.ball_query(centers.mT, points.mT, radius, k)
        return pointnet2.ball_query(radius, k, points, centers)

    def on_the_edge(arguments: list[Any], got: list[Tensor], exact: list[Tensor]) -> bool:
        return bool(((sqdist(*(x.double() for x in arguments)) - radius**2).abs() < 1e-5).any())

    return agree(op, plain, [centers, points], ties=on_the_edge)


@property_of(5)
def test_furthest_point_sample(draw: Draw) -> str:
    (x, _), count = pair(draw), size(draw, 1, 20)

    def samples(x: Any) -> Any:
        points, idx = pvcnn.furthest_point_sample(x.mT, count, return_indices=True)
        return points.mT, idx

    def plain(x: Any) -> Any:
        idx = torch.zeros(len(x), count, dtype=torch.int64)
        near = torch.full(x.shape[:2], torch.inf, dtype=wide(x).dtype)
        for m in range(1, min(count, x.shape[1])):
            last = wide(x.detach()).take_along_dim(idx[:, m - 1, None, None], 1)
            near = torch.minimum(near, (wide(x.detach()) - last).square().sum(-1))
            idx[:, m] = near.argmax(1)
        return x.take_along_dim(idx[..., None], 1), idx.int()

    return agree(samples, plain, [x], ties=lambda *_: True)  # the op's own property says what is as far


@property_of(5)
def test_voxels_channels_first(draw: Draw) -> str:
    B, C, N, R = size(draw, 0, 3), size(draw, 1, 4), size(draw, 1, 9), size(draw, 1, 4)
    features, coords = tensor(draw, B, C, N, dtype=dtype_of(draw)), index(draw, R, B, 3, N)

    def plain(features: Any, coords: Any, R: Any) -> Tensor:
        wide_features = features.to(torch.promote_types(features.dtype, torch.float32))
        cell = ((coords[:, 0] * R + coords[:, 1]) * R + coords[:, 2]).long()  # (B, N)
        member = torch.nn.functional.one_hot(cell, R**3).to(wide_features.dtype)  # (B, N, R^3)
        mean = wide_features @ member / member.sum(1).clamp(min=1)[:, None]
        return mean.view(*features.shape[:2], R, R, R).to(features.dtype)

    return agree(pvcnn.avg_voxelize, plain, [features, coords, R])


# pytorch3d


def lengths_of(draw: Draw, cloud: Tensor) -> Tensor | None:
    return index(draw, cloud.shape[1] + 1, len(cloud)) if one_of(draw, False, True) else None


@property_of(6)
def test_knn_points(draw: Draw) -> str:
    x, y = pair(draw, size(draw, 1, 4), least=0)
    lx, ly, K, norm = lengths_of(draw, x), lengths_of(draw, y), size(draw, 1, 6), one_of(draw, 1, 2)

    def ours(x: Any, y: Any, lx: Any, ly: Any) -> Any:
        found = pytorch3d.knn_points(x, y, lx, ly, norm, K)
        return found.dists, found.idx

    def plain(x: Any, y: Any, lx: Any, ly: Any) -> Any:
        is_cloud(x, y, dims=None)
        nx = torch.full((len(x),), x.shape[1]) if lx is None else lx
        ny = torch.full((len(y),), y.shape[1]) if ly is None else ly
        difference = wide(x)[:, :, None] - wide(y)[:, None]
        d = difference.square().sum(-1) if norm == 2 else difference.abs().sum(-1)
        beyond = torch.arange(y.shape[1]) >= ny[:, None]
        idx = d.detach().masked_fill(beyond[:, None], torch.inf).sort(dim=2, stable=True).indices[..., :K]
        k = idx.shape[2]
        missing = (torch.arange(k) >= ny[:, None])[:, None] | (torch.arange(x.shape[1]) >= nx[:, None])[..., None]
        found = d.gather(2, idx).masked_fill(missing, 0)
        pad = torch.nn.functional.pad
        return pad(found, (0, K - k)), pad(idx.masked_fill(missing, 0), (0, K - k))

    return agree(ours, plain, [*spoiled(draw, [x, y]), lx, ly], ties=any_nearest, same_refusals=lx is ly is None)


@property_of(6)
def test_chamfer_distance(draw: Draw) -> str:
    x, y = pair(draw, size(draw, 1, 4))
    point = one_of(draw, "mean", "sum", "max", None)
    batch = None if point is None else one_of(draw, "mean", "sum", None)
    norm, single = one_of(draw, 1, 2), one_of(draw, False, True)

    def ours(x: Any, y: Any) -> Any:
        given = {"point_reduction": point, "batch_reduction": batch, "norm": norm, "single_directional": single}
        return pytorch3d.chamfer_distance(x, y, **given)[0]

    def plain(x: Any, y: Any) -> Any:
        is_cloud(x, y, dims=None)
        difference = wide(x)[:, :, None] - wide(y)[:, None]
        d = difference.square().sum(-1) if norm == 2 else difference.abs().sum(-1)
        zeros = [wide(c).sum(2) * 0 for c in (x, y)]
        ways = [d.amin(a) if d.shape[a] else zero for a, zero in zip((2, 1), zeros, strict=True)]
        ways = ways[:1] if single else ways
        if point is None:
            return ways[0] if single else ways
        reduce = {"mean": lambda w: w.mean(1) if w.shape[1] else w.sum(1), "sum": lambda w: w.sum(1)}
        reduce["max"] = lambda w: w.amax(1) if w.shape[1] else w.sum(1)
        terms = [reduce[point](w) for w in ways]
        total = terms[0] if single else torch.maximum(*terms) if point == "max" else terms[0] + terms[1]
        return total if batch is None else total.sum() if batch == "sum" else total.sum() / max(len(x), 1)

    def detached(f: Any) -> Any:  # with ties gradients may go to any of the nearest
        return lambda x, y: f(*(c.detach() if isinstance(c, Tensor) else c for c in (x, y)))

    return agree(detached(ours), detached(plain), spoiled(draw, [x, y]), loose=3)


@property_of(5)
def test_pytorch3d_ball_query(draw: Draw) -> str:
    x, y = pair(draw, size(draw, 1, 4), least=0, kinds=("normal", "grid", "coincident"))
    K, radius = size(draw, 1, 6), one_of(draw, 0.5, 1.0, 2.5)

    def ours(x: Any, y: Any) -> Any:
        found = pytorch3d.ball_query(x, y, K=K, radius=radius)
        return found.dists, found.knn, found.idx

    def plain(x: Any, y: Any) -> Any:
        is_cloud(x, y, dims=None)
        M, d = y.shape[1], sqdist(x, y)
        order = torch.where(d.detach() < radius**2, torch.arange(M), M).sort(2).values[..., :K]
        order = torch.nn.functional.pad(order, (0, K - order.shape[2]), value=M)
        found, safe = order < M, order.clamp(max=max(M - 1, 0))
        if M == 0:
            return (
                wide(x).sum(2)[..., None].expand(-1, -1, K) * 0,
                wide(x)[:, :, None].expand(-1, -1, K, -1) * 0,
                order - 1,
            )
        rows = wide(y).take_along_dim(safe.flatten(1)[..., None], 1).view(*order.shape, y.shape[2])
        return d.gather(2, safe) * found, rows * found[..., None], torch.where(found, order, -1)

    def on_the_edge(arguments: list[Any], got: list[Tensor], exact: list[Tensor]) -> bool:
        return bool(((sqdist(*(x.double() for x in arguments)) - radius**2).abs() < 1e-5).any())

    return agree(ours, plain, spoiled(draw, [x, y]), ties=on_the_edge)


@property_of(5)
def test_sample_farthest_points(draw: Draw) -> str:
    """Samples are points, indices -1 and zeros beyond a cloud, and no point comes twice before all came."""
    (x, _), K = pair(draw, size(draw, 1, 5), kinds=("normal", "huge")), size(draw, 1, 20)
    lengths = lengths_of(draw, x)

    def ours(x: Any, lengths: Any, K: Any) -> Any:
        return pytorch3d.sample_farthest_points(x, lengths, K)

    def plain(x: Any, lengths: Any, K: Any) -> Any:
        refuse_unless(isinstance(x, Tensor) and x.ndim == 3 and 0 not in x.shape[1:] and isinstance(K, int) and K >= 1)
        refuse_unless(not x.is_complex())
        _, idx = ours(x.detach(), lengths, K)
        n = torch.full((len(x),), x.shape[1]) if lengths is None else lengths
        found = torch.arange(K) < n.clamp(min=1)[:, None]
        assert torch.equal(idx >= 0, found) and (idx[found] < n.clamp(min=1)[:, None].expand_as(idx)[found]).all()
        return x.float().take_along_dim(idx.clamp(min=0)[..., None], 1) * found[..., None], idx

    changed = spoiled(draw, [x, K])
    arguments = [changed[0], lengths, changed[1]]
    return agree(ours, plain, arguments, ties=lambda *_: True, same_refusals=lengths is None and changed[0] is x)


# Ragged clouds


def sizes_of(draw: Draw, least: int = 0) -> list[int]:
    return [size(draw, least, 8) for _ in range(size(draw, 1, 3))]


@property_of(5)
def test_torch_cluster_knn(draw: Draw) -> str:
    sizes, dims, k, dtype = sizes_of(draw), size(draw, 1, 4), size(draw, 1, 5), dtype_of(draw)
    queries = [size(draw, 0, 5) for _ in sizes]
    x, y = (tensor(draw, sum(n), dims, dtype=dtype, kinds=FAR) for n in (sizes, queries))
    batches = [torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in (sizes, queries)]

    def ours(x: Any, y: Any, bx: Any, by: Any) -> Any:
        rows, columns = torch_cluster.knn(x, y, k, bx, by)
        return rows, (wide(y.detach())[rows] - wide(x.detach())[columns]).square().sum(1), columns

    def plain(x: Any, y: Any, bx: Any, by: Any) -> Any:
        rows, columns = [], []
        for q in range(len(y)):
            own = (bx == by[q]).nonzero()[:, 0]
            d = (wide(x.detach())[own] - wide(y.detach())[q]).square().sum(1)
            best = own[d.sort(stable=True).indices[:k]]
            rows += [q] * len(best)
            columns += best.tolist()
        rows, columns = (torch.tensor(v, dtype=torch.int64) for v in (rows, columns))
        return rows, (wide(y.detach())[rows] - wide(x.detach())[columns]).square().sum(1), columns

    return agree(ours, plain, [x, y, *batches], ties=any_nearest)


@property_of(5)
def test_torch_cluster_radius(draw: Draw) -> str:
    sizes, dims, most = sizes_of(draw), size(draw, 1, 3), size(draw, 1, 5)
    x = tensor(draw, sum(sizes), dims, dtype=dtype_of(draw), kinds=("grid", "normal"))
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))

    def ours(x: Any, batch: Any) -> Any:
        return torch_cluster.radius(x, x, 1.5, batch, batch, most)

    def plain(x: Any, batch: Any) -> Any:
        near = (wide(x.detach())[:, None] - wide(x.detach())).square().sum(-1) < 1.5**2
        near &= batch[:, None] == batch
        return (near & (near.cumsum(1) <= most)).nonzero().T

    def on_the_edge(arguments: list[Any], got: list[Tensor], exact: list[Tensor]) -> bool:
        d = (arguments[0].double()[:, None] - arguments[0].double()).square().sum(-1)
        return bool(((d - 1.5**2).abs() < 1e-5).any())

    return agree(ours, plain, [x, batch], ties=on_the_edge)


@property_of(5)
def test_torch_cluster_fps(draw: Draw) -> str:
    """As many of each cloud as the ratio says, none twice."""
    sizes, ratio = sizes_of(draw), one_of(draw, None, 0.1, 0.5, 1.0)
    x = tensor(draw, sum(sizes), size(draw, 1, 4), dtype=dtype_of(draw), kinds=("normal", "huge"))
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    start = one_of(draw, False, True)
    idx = torch_cluster.fps(x, batch, ratio, start)
    counts = [-(-n * round(10 * (ratio or 0.5)) // 10) for n in sizes]
    assert idx.dtype == torch.int64 and batch[idx].bincount(minlength=len(sizes)).tolist() == counts
    if len(x.unique(dim=0)) == len(x):
        assert len(idx.unique()) == len(idx)
    return "equal"


@property_of(5)
def test_pointops_knnquery(draw: Draw) -> str:
    sizes, k = sizes_of(draw, 1), size(draw, 1, 5)
    x = tensor(draw, sum(sizes), 3, dtype=one_of(draw, torch.float32, torch.float64), kinds=FAR)
    offset = torch.tensor(sizes).cumsum(0).int()

    def ours(x: Any, offset: Any) -> Any:
        idx, d = pointops.knnquery(k, x, None, offset, offset)
        return d, idx

    def plain(x: Any, offset: Any) -> Any:
        ends = offset.tolist()
        found, distances = [], []
        for first, end in zip([0, *ends], ends, strict=False):
            d = (x.detach()[first:end, None] - x.detach()[None, first:end]).square().sum(-1).sqrt()
            best, order = d.sort(dim=1, stable=True)
            extra = max(0, k - (end - first))
            distances.append(torch.nn.functional.pad(best[:, :k], (0, extra), value=1e5))
            found.append(torch.nn.functional.pad(order[:, :k], (0, extra)) + first)
        return torch.cat(distances), torch.cat(found).int()

    return agree(ours, plain, [x, offset], ties=any_nearest)
