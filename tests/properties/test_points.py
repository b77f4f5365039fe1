"""Ops on points: Triton and the reference find the same neighbours, samples and distances."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lion_triton import kernels
from tests.properties.strategies import (
    KINDS,
    Draw,
    agree,
    both,
    dtype_of,
    index,
    one_of,
    property_of,
    size,
    spoiled,
    tensor,
)


def clouds(
    draw: Draw, least: int = 1, same_size: bool = False, dims: int = 3, kinds: Sequence[str] = KINDS
) -> list[Tensor]:
    """Two batches of clouds of one dtype, with none up to three clouds."""
    batch, n, m, dtype = size(draw, 0, 3), size(draw, least, 40), size(draw, least, 40), dtype_of(draw)
    return [tensor(draw, batch, k, dims, dtype=dtype, kinds=kinds) for k in (n, n if same_size else m)]


def distances(x: Tensor, y: Tensor, idx: Tensor) -> Tensor:
    """Squared distances of the points of x (B, N, D) to those of y that idx (B, N, K) names, in float64."""
    rows = y.float().double().take_along_dim(idx.long().clamp(min=0).flatten(1)[..., None], 1)
    return (x.float().double()[:, :, None] - rows.view(*idx.shape, y.shape[2])).square().sum(-1)


def close(a: Tensor, b: Tensor, scale: Tensor) -> bool:
    """But for rounding of float32, whose squares of tiny values are 0."""
    return bool(((a - b).abs() <= 1e-5 * scale.float().double().square().amax() + 1e-37).all()) if a.numel() else True


def as_near(arguments: list[Any], got: list[Tensor], exact: list[Tensor]) -> bool:
    """Other indices of points that are as far away, but for rounding."""
    x, y = arguments[:2]
    a, b = (distances(x, y, r[-1].view(*r[-1].shape[:2], -1)) for r in (got, exact))
    return bool(((a - b).abs() <= 1e-5 * b + 1e-37).all())


@property_of(5)
def test_nearest_neighbor(draw: Draw) -> str:
    return both(draw, kernels.nearest_neighbor, clouds(draw), ties=as_near)


@property_of(5)
def test_chamfer_distance(draw: Draw) -> str:
    # Seen from far away, any point is as near as another, and gets the gradient.
    tame = one_of(draw, True, False)
    arguments = clouds(draw, kinds=("normal", "grid") if tame else KINDS)
    return both(draw, kernels.chamfer_distance, arguments, compare="all" if tame else "results")


@property_of(5)
def test_knn(draw: Draw) -> str:
    x, y = clouds(draw, least=0, dims=size(draw, 1, 5))
    lengths = index(draw, y.shape[1] + 1, len(x)) if one_of(draw, False, True) else None

    def op(x: Any, y: Any, k: Any, lengths: Any, impl: Any) -> Any:
        return kernels.knn(x, y, k, lengths=lengths, impl=impl)

    # Of other lengths only the shape and the dtype are checked, not what they say.
    arguments = [*spoiled(draw, [x, y, size(draw, 1, 12)]), lengths]
    return agree(partial(op, impl="triton"), partial(op, impl="reference"), arguments, ties=as_near)


@property_of(4)
def test_knn_on_a_cpu(draw: Draw) -> str:
    """Trees and products find what comparing all points finds."""
    arguments = spoiled(draw, [*clouds(draw, least=0, dims=one_of(draw, 1, 3, 20)), size(draw, 1, 12)])
    return agree(kernels.knn, partial(kernels.knn, impl="reference"), arguments, ties=as_near)


@property_of(5)
def test_ball_query(draw: Draw) -> str:
    arguments = [*clouds(draw), one_of(draw, 0.5, 1, 1e-30, 1e15, 1e30), size(draw, 1, 12)]

    def as_near_the_edge(arguments: list[Any], got: list[Tensor], exact: list[Tensor]) -> bool:
        """Some point lies on the sphere, but for rounding."""
        x, y, radius, _ = arguments
        every = torch.arange(y.shape[1], device=y.device).expand(*x.shape[:2], -1)
        sqdist = distances(x, y, every)
        return bool(((sqdist - radius**2).abs() <= 1e-5 * radius**2 + 1e-37).any())

    return both(draw, kernels.ball_query, arguments, ties=as_near_the_edge)


@property_of(5)
def test_three_nn(draw: Draw) -> str:
    return both(draw, kernels.three_nn, clouds(draw), ties=as_near, loose=10)


@property_of(5)
def test_local_moments(draw: Draw) -> str:
    arguments = [clouds(draw)[0], one_of(draw, 0.5, 1, 1e-15, 1e15, 1e30), size(draw, 1, 4)]
    return both(draw, kernels.local_moments, arguments)


@property_of(5)
def test_furthest_point_sample(draw: Draw) -> str:
    x, _ = clouds(draw)

    def as_far(arguments: list[Any], got: list[Tensor], exact: list[Tensor]) -> bool:
        """Each sample is as far from those before it as any point, but for rounding."""
        points, idx = arguments[0].float().double(), got[0].long()
        every = (points[:, :, None] - points.take_along_dim(idx[..., None], 1)[:, None]).square().sum(-1)  # (B, N, M)
        nearest = every.cummin(2).values[..., :-1]
        chosen = nearest.take_along_dim(idx[:, None, 1:], 1)[:, 0]
        return bool((chosen >= nearest.amax(1) * (1 - 1e-5) - 1e-37).all()) and not idx[:, 0].any()

    return both(draw, kernels.furthest_point_sample, [x, size(draw, 1, x.shape[1])], ties=as_far)


@property_of(4)
def test_approx_emd(draw: Draw) -> str:
    return both(draw, kernels.approx_emd, clouds(draw), loose=10)


@property_of(4)
def test_auction_emd(draw: Draw) -> str:
    arguments: list[Any] = [*clouds(draw, same_size=True), one_of(draw, 0.05, 0.5), size(draw, 1, 6)]

    def in_bounds(arguments: list[Any], got: list[Tensor], exact: list[Tensor]) -> bool:
        """Bids that differ in the last digit may change all that follows; the distances are those of the pairs."""
        x, y = arguments[:2]
        if got[1].min() < 0 or got[1].max() >= y.shape[1]:
            return False
        return close(got[0].double(), distances(x, y, got[1][..., None])[..., 0], torch.cat([x, y], 1))

    return both(draw, kernels.auction_emd, arguments, ties=in_bounds)


@property_of(4)
def test_exact_emd(draw: Draw) -> str:
    """No dearer than any other assignment that is tried, and that of one cloud to itself is free."""
    arguments = spoiled(draw, clouds(draw, same_size=one_of(draw, True, True, False)))

    def plain(x: Any, y: Any) -> Tensor:
        cost = kernels.exact_emd(x, y)
        for shift in range(3):
            other = (kernels._checks.upcast(x) - kernels._checks.upcast(y).roll(shift, 1)).square().sum(-1).mean(-1)
            assert (cost <= other * (1 + 1e-4)).all()
        assert not kernels.exact_emd(x, x.detach().clone()).any()
        return cost

    return agree(kernels.exact_emd, plain, arguments)


@property_of(5)
def test_pairwise_chamfer(draw: Draw) -> str:
    a, b = sets(draw)
    return both(draw, kernels.pairwise_chamfer, [a, b])


@property_of(5)
def test_pairwise_chamfer_on_a_cpu(draw: Draw) -> str:
    arguments = spoiled(draw, sets(draw))
    return agree(kernels.pairwise_chamfer, partial(kernels.pairwise_chamfer, impl="reference"), arguments)


@property_of(5)
def test_pairwise_emd(draw: Draw) -> str:
    return both(draw, kernels.pairwise_emd, sets(draw), loose=10)


@property_of(5)
def test_pairwise_emd_is_that_of_each_pair(draw: Draw) -> str:
    method, a, b = one_of(draw, "approx", "exact"), *sets(draw)
    emd = kernels.approx_emd if method == "approx" else kernels.exact_emd

    def plain(a: Any, b: Any) -> Tensor:
        kernels.pairwise_chamfer(a, b)  # refuses what all pairwise distances refuse
        out = kernels._checks.upcast(a).new_zeros(len(a), len(b))
        for s, x in enumerate(a):
            for r, y in enumerate(b):
                out[s, r] = emd(x[None], y[None])
        return out.detach()

    return agree(partial(kernels.pairwise_emd, method=method), plain, spoiled(draw, [a, b]), same_refusals=False)


def sets(draw: Draw) -> list[Tensor]:
    dtype, n = dtype_of(draw), size(draw, 1, 20)
    m = one_of(draw, n, n, size(draw, 1, 20))
    return [tensor(draw, size(draw, 0, 3), k, 3, dtype=dtype) for k in (n, m)]


@property_of(4)
def test_voxel_coords(draw: Draw) -> str:
    x, _ = clouds(draw)
    return both(draw, kernels.voxel_coords, [x, size(draw, 1, 9)])


@property_of(4)
def test_check_finite(draw: Draw) -> str:
    """Refuses just what is not finite."""
    (x,) = spoiled(draw, clouds(draw)[:1])
    if isinstance(x, Tensor) and x.is_floating_point() and x.numel() and one_of(draw, False, True):
        x = x.clone(memory_format=torch.contiguous_format)
        x.view(-1)[size(draw, 0, x.numel() - 1)] = one_of(draw, torch.nan, torch.inf, -torch.inf)

    def plain(x: Any) -> None:
        if x.ndim < 2 or not x.is_floating_point() or not x.isfinite().all():
            raise ValueError("not finite")

    if not isinstance(x, Tensor):
        return agree(lambda x: kernels.check_finite(points=x), lambda x: plain(torch.tensor(0)), [x])
    return agree(lambda x: kernels.check_finite(points=x), plain, [x])
