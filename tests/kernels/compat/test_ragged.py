"""knn_cuda, pointops and torch_cluster against brute force, cloud by cloud."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lion_triton.kernels.compat import knn_cuda, pointops, torch_cluster
from lion_triton.kernels.compat._clouds import as_int
from tests.kernels.compat.cases import (
    DEVICE,
    assert_close,
    assert_equal,
    assert_same_gradients,
    double,
    leaf,
    rand,
    randint,
)

SIZES, QUERIES = [7, 1, 12], [3, 2, 4]


def offsets(sizes: list[int]) -> Tensor:
    return torch.tensor(sizes, device=DEVICE).cumsum(0).int()


def batch(sizes: list[int]) -> Tensor:
    return torch.arange(len(sizes), device=DEVICE).repeat_interleave(torch.tensor(sizes, device=DEVICE))


def clouds(x: Tensor, sizes: list[int]) -> list[tuple[int, Tensor]]:
    """First index and points, float64, of each cloud."""
    starts = [0, *np.cumsum(sizes)[:-1].tolist()]
    return list(zip(starts, x.detach().cpu().double().split(sizes), strict=True))


def furthest(points: Tensor, count: int) -> list[int]:
    chosen = [0]
    nearest = torch.full((len(points),), torch.inf).double()
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(-1))
        chosen.append(int(nearest.argmax()))
    return chosen


class TestKnnCuda:
    @pytest.mark.parametrize("D", [1, 3, 20])
    def test_both_layouts(self, D: int) -> None:
        ref, query = rand(2, 11, D, seed=0), rand(2, 6, D, seed=1)
        expected = torch.cdist(query.cpu().double(), ref.cpu().double()).sort(2)
        dist, idx = knn_cuda.KNN(4, transpose_mode=True)(ref, query)
        assert dist.dtype == torch.float32 and idx.dtype == torch.int64
        assert_close(dist, expected.values[..., :4])
        assert_equal(idx, expected.indices[..., :4])
        first = knn_cuda.KNN(np.int64(4))(ref.mT, query.mT)
        assert_equal(first[0], dist.mT.cpu())
        assert_equal(first[1], idx.mT.cpu())
        assert not knn_cuda.KNN(2)(leaf(ref.mT), query.mT)[0].requires_grad


class TestPointops:
    def test_furthestsampling(self) -> None:
        xyz, samples = rand(20, 3, seed=0), [3, 2, 5]
        idx = pointops.furthestsampling(xyz, offsets(SIZES), offsets(samples))
        expected = [
            start + k
            for (start, points), m in zip(clouds(xyz, SIZES), samples, strict=True)
            for k in furthest(points, m)
        ]
        assert idx.dtype == torch.int32 and idx.tolist() == expected

    def test_knnquery(self) -> None:
        xyz, new_xyz = rand(20, 3, seed=1), rand(9, 3, seed=2)
        idx, dist = pointops.knnquery(3, xyz, new_xyz, offsets(SIZES), offsets(QUERIES))
        assert idx.dtype == torch.int32 and dist.dtype == torch.float32
        rows = []
        for (start, points), (_, queries) in zip(clouds(xyz, SIZES), clouds(new_xyz, QUERIES), strict=True):
            near = torch.cdist(queries, points).sort(1)
            missing = max(0, 3 - len(points))
            rows += [[start + i for i in row[:3]] + [start] * missing for row in near.indices.tolist()]
            assert_close(dist[len(rows) - len(queries) : len(rows), : 3 - missing], near.values[:, :3])
        assert idx.tolist() == rows
        assert (dist[3:5, 1:] == 1e5).all()
        assert torch.equal(
            pointops.knnquery(2, xyz, None, offsets(SIZES), offsets(SIZES))[0][:, 0].cpu(), torch.arange(20).int()
        )

    def test_interpolation_grouping_and_company(self) -> None:
        xyz, new_xyz = leaf(rand(20, 3, seed=3)), leaf(rand(9, 3, seed=4))
        feat, position, weight = leaf(rand(20, 4, seed=5)), leaf(rand(9, 3, 4, seed=6)), leaf(rand(9, 3, 2, seed=7))
        other = leaf(rand(9, 4, seed=8))
        idx, dist = pointops.knnquery(3, xyz, new_xyz, offsets(SIZES), offsets(QUERIES))
        a, c, f, p, w, o = (double(t) for t in (xyz, new_xyz, feat, position, weight, other))
        at = idx.cpu().long()
        inverse = 1 / (dist.cpu().double() + 1e-8)
        shares = inverse / inverse.sum(1, keepdim=True)
        outputs = [
            pointops.interpolation(xyz, new_xyz, feat, offsets(SIZES), offsets(QUERIES)),
            pointops.interpolation2(xyz, new_xyz, feat, offsets(SIZES), offsets(QUERIES)),
            pointops.grouping(feat, idx),
            pointops.queryandgroup(3, xyz, new_xyz, feat, None, offsets(SIZES), offsets(QUERIES)),
            pointops.queryandgroup(3, xyz, new_xyz, feat, idx, offsets(SIZES), offsets(QUERIES), use_xyz=False),
            pointops.subtraction(other, feat, idx),
            pointops.aggregation(feat, position, weight, idx),
        ]
        blend = (f[at] * shares[..., None]).sum(1)
        expected = [
            *(blend, blend, f[at], torch.cat([a[at] - c[:, None], f[at]], -1), f[at], o[:, None] - f[at]),
            ((f[at] + p) * torch.cat([w, w], -1)).sum(1),
        ]
        leaves = [xyz, new_xyz, feat, position, weight, other]
        assert_same_gradients(outputs, expected, leaves, [a, c, f, p, w, o])


class TestTorchCluster:
    def test_fps(self) -> None:
        for D in (3, 5):
            x = rand(20, D, seed=0)
            idx = torch_cluster.fps(x, batch(SIZES), ratio=0.4, random_start=False)
            expected = [
                start + k
                for (start, points) in clouds(x, SIZES)
                for k in furthest(points, math.ceil(0.4 * len(points)))
            ]
            assert idx.dtype == torch.int64 and idx.tolist() == expected
            assert torch_cluster.fps(x, ptr=[0, 7, 8, 20], ratio=0.4, random_start=False).tolist() == expected
        assert len(torch_cluster.fps(x)) == 10
        ratios = torch.tensor([1.0, 1.0, 0.25], device=DEVICE)
        assert len(torch_cluster.fps(x, batch(SIZES), ratio=ratios)) == 7 + 1 + 3
        torch.manual_seed(0)
        starts = {int(torch_cluster.fps(x, ratio=0.1)[0]) for _ in range(20)}
        assert len(starts) > 5

    @pytest.mark.parametrize("cosine", [False, True])
    def test_knn(self, cosine: bool) -> None:
        x, y = rand(20, 4, seed=1), rand(9, 4, seed=2)
        pairs = torch_cluster.knn(x, y, 3, batch(SIZES), batch(QUERIES), cosine=cosine)
        expected = []
        row = 0
        for (start, points), (_, queries) in zip(clouds(x, SIZES), clouds(y, QUERIES), strict=True):
            for query in queries:
                far = 1 - torch.cosine_similarity(query, points, -1) if cosine else (query - points).square().sum(-1)
                expected += [(row, start + k) for k in far.argsort()[:3].tolist()]
                row += 1
        assert pairs.dtype == torch.int64
        assert pairs.T.tolist() == [list(pair) for pair in expected]

    @pytest.mark.parametrize(("r", "most"), [(1.5, 32), (2.5, 3)])
    def test_radius(self, r: float, most: int) -> None:
        x, y = rand(20, 3, seed=3), rand(9, 3, seed=4)
        pairs = torch_cluster.radius(x, y, r, batch(SIZES), batch(QUERIES), max_num_neighbors=most)
        expected = []
        row = 0
        for (start, points), (_, queries) in zip(clouds(x, SIZES), clouds(y, QUERIES), strict=True):
            for query in queries:
                hits = ((query - points).norm(dim=-1) < r).nonzero().flatten().tolist()[:most]
                expected += [[row, start + k] for k in hits]
                row += 1
        assert pairs.T.tolist() == expected and len(expected) > 5

    def test_graphs(self) -> None:
        x = rand(20, 3, seed=5)
        for make, argument in ((torch_cluster.knn_graph, 2), (torch_cluster.radius_graph, 1.5)):
            edges = make(x, argument, batch(SIZES))
            looped = make(x, argument, batch(SIZES), loop=True)
            assert (edges[0] != edges[1]).all() and (looped[0] == looped[1]).sum() == 20
            assert torch.equal(edges.flip(0), make(x, argument, batch(SIZES), flow="target_to_source"))
            assert (batch(SIZES)[edges[0]] == batch(SIZES)[edges[1]]).all()
        assert torch_cluster.knn_graph(x, 2).shape == (2, 40)
        few = torch_cluster.radius_graph(x, 9.0, max_num_neighbors=4)
        assert torch.bincount(few[1], minlength=20).tolist() == [4] * 20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: knn_cuda.KNN(5)(x.mT[None], x.mT[None]), r"k: expected at most .* \(4\), got 5"),
        (lambda x: knn_cuda.KNN(1)(x, x), "ref: expected 3 dimensions"),
        (lambda x: knn_cuda.KNN(1.5), "k: expected an integer, got 1.5"),
        (lambda x: pointops.knnquery(1, x, x, [4], [4]), "offset: expected a tensor, got list"),
        (lambda x: pointops.knnquery(1, x, x, offsets([3]), offsets([4])), r"offset: expected rising offsets up to 4"),
        (
            lambda x: pointops.furthestsampling(x, offsets([4]), offsets([1, 1])),
            "new_offset: expected an offset for each",
        ),
        (lambda x: torch_cluster.knn(x, x, 1, randint(0, 2, 3, seed=0)), r"batch_x: expected shape \(4,\), got \(3,\)"),
        (lambda x: torch_cluster.fps(x, torch.tensor([1, 0, 0, 1])), "batch: expected the clouds in rising order"),
        (lambda x: torch_cluster.knn_graph(x, 1, flow="up"), "flow: expected"),
    ],
)
def test_bad_input(call: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(4, 3, device=DEVICE))


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor([3], dtype=torch.int32)])
def test_integers(value: Any) -> None:
    assert type(as_int("k", value)) is int and as_int("k", value) == 3


@pytest.mark.parametrize("value", [3.0, np.float32(3), "3", None, torch.tensor(3.0), torch.tensor([3, 4]), [3]])
def test_what_is_no_integer_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match="^k: expected an integer, got "):
        as_int("k", value)


def test_no_clouds_have_no_neighbours() -> None:
    none, batch_of_none = torch.zeros(0, 3, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    for edges in (
        torch_cluster.knn(none, none, 2, batch_of_none, batch_of_none),
        torch_cluster.radius(none, none, 0.5, batch_of_none, batch_of_none),
        torch_cluster.knn_graph(none, 2, batch_of_none),
    ):
        assert edges.shape == (2, 0) and edges.dtype == torch.int64
