"""emd_mean, chamfer_dist, structural_losses, emd_auction, and the thresholds of fscore."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import minimum_spanning_tree
from torch import Tensor

from lion_triton.kernels import approx_emd, auction_emd
from lion_triton.kernels.compat import chamfer3d, chamfer_dist, emd, emd_auction, emd_mean, structural_losses
from tests.kernels.compat.cases import DEVICE, assert_close, assert_equal, assert_same_gradients, double, leaf, rand


class TestEmdMean:
    def test_is_the_sum_over_n(self) -> None:
        x, y = rand(2, 12, 3, seed=0), rand(2, 6, 3, seed=1)
        sums = emd.earth_mover_distance(x, y, transpose=False).cpu()
        for cost in (
            emd_mean.earth_mover_distance(x.mT, y.mT),
            emd_mean.earth_mover_distance(x, y, transpose=False),
            emd_mean.earth_mover_distance_nograd(x.mT, y.mT),
            approx_emd(x, y),
        ):
            assert_close(cost, sums / 12, 1e-6)
        assert_close(emd_mean.earth_mover_distance(x[0].mT, y[0].mT), sums[:1] / 12, 1e-6)
        assert_close(emd_mean.EarthMoverDistance()(x, y), (sums / 12).mean(), 1e-6)
        assert_close(emd_mean.EarthMoverDistance()(x, y, transpose=True), (sums / 12).mean(), 1e-6)

    def test_gradients(self) -> None:
        x, y = leaf(rand(2, 8, 3, seed=2)), rand(2, 8, 3, seed=3)
        emd_mean.EarthMoverDistance()(x, y).backward()
        z = leaf(x)
        approx_emd(z, y).mean().backward()
        assert x.grad is not None and z.grad is not None
        assert_equal(x.grad, z.grad.cpu())
        assert not emd_mean.earth_mover_distance_nograd(leaf(x).mT, y.mT).requires_grad


def test_fscore_of_the_copies_with_another_default() -> None:
    dist = torch.tensor([[0.00005, 0.0005]], device=DEVICE)
    assert chamfer3d.fscore(dist, dist)[0].tolist() == [1]
    assert chamfer3d.fscore_1e4(dist, dist)[0].tolist() == [0.5]
    assert chamfer3d.fscore_1e4(dist, dist, 0.001)[0].tolist() == [1]


class TestChamferDist:
    @pytest.mark.parametrize(("B", "N", "M"), [(2, 9, 14), (1, 1, 3), (3, 5, 1)])
    def test_values_and_gradients(self, B: int, N: int, M: int) -> None:
        x, y = leaf(rand(B, N, 3, seed=0)), leaf(rand(B, M, 3, seed=1))
        a, b = double(x), double(y)
        sqdist = (a[:, :, None] - b[:, None]).square().sum(-1)
        d1, d2 = sqdist.amin(2), sqdist.amin(1)
        outputs = [
            *chamfer_dist.ChamferFunction.apply(x, y),
            *chamfer_dist.ChamferDistance()(x, y),
            chamfer_dist.ChamferDistanceL1()(x, y),
            chamfer_dist.ChamferDistanceL2()(x, y),
            *chamfer_dist.ChamferDistanceL2_split()(x, y),
            chamfer_dist.ChamferDistanceL1_PM()(x, y),
        ]
        l1, l2 = (d1.sqrt().mean() + d2.sqrt().mean()) / 2, d1.mean() + d2.mean()
        expected = [d1, d2, d1, d2, l1, l2, d1.mean(), d2.mean(), d1.sqrt().mean()]
        assert_same_gradients(outputs, expected, [x, y], [a, b])

    def test_ignore_zeros_in_single_clouds_only(self) -> None:
        x, y = rand(2, 6, 3, seed=2), rand(2, 5, 3, seed=3)
        x[:, 2:4] = 0
        y[:, 1] = torch.tensor([1.0, -1, 0], device=DEVICE)  # adds up to 0, as the original asks
        loss = chamfer_dist.ChamferDistanceL2(ignore_zeros=True)
        plain = chamfer_dist.ChamferDistanceL2()
        assert_equal(loss(x, y), plain(x, y).cpu())
        kept_x, kept_y = x[:1, [0, 1, 4, 5]], y[:1, [0, 2, 3, 4]]
        assert_equal(loss(x[:1], y[:1]), plain(kept_x, kept_y).cpu())
        assert not torch.equal(plain(x[:1], y[:1]), plain(kept_x, kept_y))

    def test_coincident_points_have_a_gradient(self) -> None:
        x = leaf(rand(1, 4, 3, seed=4))
        chamfer_dist.ChamferDistanceL1()(x, x.detach()).backward()
        assert x.grad is not None and not x.grad.any()


def naive_match(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    N, M = len(x), len(y)
    left, right = np.full(N, max(1.0, M / N)), np.full(M, max(1.0, N / M))
    sqdist = np.square(x[:, None] - y[None]).sum(-1)
    match = np.zeros((N, M))
    for level in (*(-(4.0**j) for j in range(7, -2, -1)), 0.0):
        kernel = np.exp(level * sqdist)
        offer = left / (kernel @ right + 1e-9)
        arriving = right * (offer @ kernel)
        taken = right * np.minimum(right / (arriving + 1e-9), 1)
        flow = offer[:, None] * kernel * taken
        match += flow
        left, right = np.maximum(left - flow.sum(1), 0), np.maximum(right - arriving, 0)
    return match


class TestStructuralLosses:
    @pytest.mark.parametrize(("N", "M"), [(8, 8), (12, 6), (5, 15), (1, 1)])
    def test_match_cost_is_of_distances_that_are_not_squared(self, N: int, M: int) -> None:
        x, y = leaf(0.5 * rand(2, N, 3, seed=0)), leaf(0.5 * rand(2, M, 3, seed=1))
        a, b = double(x), double(y)
        matches = torch.stack(
            [torch.from_numpy(naive_match(*(t.detach().numpy() for t in pair))) for pair in zip(a, b, strict=True)]
        )
        expected = (matches * torch.cdist(a, b)).sum((1, 2))
        assert_same_gradients([structural_losses.match_cost(x, y)], [expected], [x, y], [a, b], 1e-3)

    def test_nn_distance(self) -> None:
        x, y = leaf(rand(2, 9, 3, seed=2)), leaf(rand(2, 7, 3, seed=3))
        a, b = double(x), double(y)
        sqdist = (a[:, :, None] - b[:, None]).square().sum(-1)
        outputs = list(structural_losses.nn_distance(x, y))
        assert_same_gradients(outputs, [sqdist.amin(2), sqdist.amin(1)], [x, y], [a, b])

    def test_of_a_cloud_to_itself(self) -> None:
        x = leaf(rand(1, 6, 3, seed=4))
        structural_losses.match_cost(x, x.detach()).sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()


def brute_penalty(points: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray, float]:
    """One element: SciPy's tree, and leaves taken off round by round."""
    S = len(points)
    tree = minimum_spanning_tree(np.sqrt(np.square(points[:, None] - points[None]).sum(-1))).toarray()
    edges = {(i, j): tree[i, j] for i in range(S) for j in range(S) if tree[i, j] > 0}
    mean = sum(edges.values()) / (S - 1)
    dist, assignment = np.zeros(S), np.full(S, -1)
    while edges:
        degree = np.bincount(np.array(list(edges)).flatten(), minlength=S)
        gone = []
        for i, j in edges:
            leaves = [p for p in (i, j) if degree[p] == 1]
            if leaves:
                leaf_, other = max(leaves), i + j - max(leaves)
                gone.append((i, j))
                if edges[i, j] > alpha * mean:
                    dist[leaf_], assignment[leaf_] = edges[i, j], other
        for edge in gone:
            del edges[edge]
    return dist, assignment, mean


class TestAuctionAndCompany:
    def test_emd_module(self) -> None:
        x, y = leaf(rand(2, 9, 3, seed=0).sigmoid()), leaf(rand(2, 9, 3, seed=1).sigmoid())
        dist, assignment = emd_auction.emdModule()(x, y, 0.01, 30)
        expected = auction_emd(x, y, 0.01, 30)
        assert torch.equal(dist, expected[0]) and torch.equal(assignment, expected[1])
        dist.sum().backward()
        assert x.grad is not None and x.grad.any()
        assert y.grad is None  # as in the original
        assert emd_auction.emdFunction.apply(x, y, np.float32(0.01), np.int64(30))[1].dtype == torch.int32

    @pytest.mark.parametrize(("size", "elements", "alpha"), [(2, 1, 1.5), (9, 2, 1.2), (32, 3, 1.5)])
    def test_expansion_penalty(self, size: int, elements: int, alpha: float) -> None:
        xyz = leaf(rand(2, size * elements, 3, seed=size))
        dist, assignment, mean = emd_auction.expansionPenaltyModule()(xyz, size, alpha)
        assert assignment.dtype == torch.int32 and dist.dtype == torch.float32
        points = xyz.detach().cpu().double().view(2, elements, size, 3)
        means = np.zeros((2, elements))
        for b in range(2):
            for e in range(elements):
                part = slice(e * size, (e + 1) * size)
                expected, partner, means[b, e] = brute_penalty(points[b, e].numpy(), alpha)
                assert_close(dist[b, part], torch.from_numpy(expected))
                assert assignment[b, part].tolist() == [p if p < 0 else p + e * size for p in partner]
        assert_close(mean, torch.from_numpy(means.mean(1)))
        cotangent = rand(2, size * elements, seed=3)
        dist.backward(cotangent)
        chosen = assignment.long().clamp(min=0)
        pull = 2 * cotangent[..., None] * (xyz - xyz.take_along_dim(chosen[..., None], 1))  # of the square
        assert xyz.grad is not None
        assert_close(xyz.grad, pull.detach().masked_fill((assignment < 0)[..., None], 0).cpu())
        if size > 2:
            assert (assignment >= 0).any()

    def test_minimum_density_sample(self) -> None:
        xyz, length = rand(2, 20, 3, seed=4), torch.tensor([0.3, 1.0], device=DEVICE)
        idx = emd_auction.minimum_density_sample(xyz, 8, length)
        assert idx.dtype == torch.int32
        for b in range(2):
            points, density, chosen = xyz[b].cpu().double(), torch.zeros(20).double(), [0]
            for _ in range(7):
                density += torch.exp(-(points - points[chosen[-1]]).square().sum(-1) / (5 * length[b].item() ** 2))
                density[chosen] = torch.inf
                chosen.append(int(density.argmin()))
            assert idx[b].tolist() == chosen
        assert emd_auction.minimum_density_sample(xyz[:, :2], 4, length).tolist() == [[0, 1, 0, 0]] * 2
        features = rand(2, 5, 20, seed=5)
        assert_equal(emd_auction.gather_operation(features, idx), features.take_along_dim(idx.long()[:, None], 2).cpu())

    def test_points_from_8192_on_count_twice(self) -> None:
        xyz = torch.zeros(1, 8193, 3, device=DEVICE)
        xyz[0, 8191:, 0] = torch.tensor([1.0, -1.2], device=DEVICE)  # the last is farther, and less dense but for that
        assert emd_auction.minimum_density_sample(xyz, 2, torch.ones(1, device=DEVICE)).tolist() == [[0, 8191]]
        assert emd_auction.minimum_density_sample(xyz[:, 2:], 2, torch.ones(1, device=DEVICE)).tolist() == [[0, 8190]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: emd_mean.earth_mover_distance([[0.0]], x), "xyz1: expected a tensor, got list"),
        (lambda x: chamfer_dist.ChamferDistanceL1()(x, None), "xyz2: expected a tensor, got NoneType"),
        (lambda x: structural_losses.match_cost(x, x[..., :2]), r"setb: expected shape \(B, N, 3\)"),
        (lambda x: emd_auction.emdModule()(x, x[:, :2], 0.1, 3), r"y: expected as many points as x \(4\), got 2"),
        (lambda x: emd_auction.expansionPenaltyModule()(x, 3, 1.5), r"xyz: expected \(B, N, 3\) with N a multiple"),
        (lambda x: chamfer3d.fscore(0.5, x), "dist1: expected a tensor, got float"),
    ],
)
def test_bad_input(call: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 4, 3, device=DEVICE))


def test_no_clouds_have_no_penalty() -> None:
    dist, assignment, mean = emd_auction.expansionPenaltyModule()(torch.zeros(0, 6, 3, device=DEVICE), 3, 1.5)
    assert dist.shape == assignment.shape == (0, 6) and mean.shape == (0,)


def test_sampling_by_a_density_of_no_width() -> None:
    """Every point once, though the square of the length is 0."""
    idx = emd_auction.minimum_density_sample(torch.ones(1, 6, 3, device=DEVICE), 6, torch.full((1,), 1e-30).to(DEVICE))
    assert idx.sort(1).values[0].tolist() == list(range(6))
