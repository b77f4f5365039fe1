from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lion_triton.kernels.compat import pvcnn
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


def coordinates(B: int, N: int, R: int, seed: int) -> Tensor:
    """(B, 3, N) in [0, R - 1], some of them on the last voxel."""
    return ((rand(B, 3, N, seed=seed) * R / 3 + R / 2).clamp(0, R - 1)).contiguous()


def test_avg_voxelize() -> None:
    B, C, N, R = 2, 5, 40, 3
    features = leaf(rand(B, C, N, seed=0))
    coords = randint(0, R, B, 3, N, seed=1).int()
    coords[:, :, :10] = 0
    coords[1, 0] = 2  # voxels of cloud 1 with another x are empty
    out = pvcnn.avg_voxelize(features, coords, R)
    assert out.shape == (B, C, R, R, R) and out.is_contiguous()

    points = double(features)
    one_hot = torch.zeros(B, N, R, R, R, dtype=torch.float64)
    for b in range(B):
        for n in range(N):
            one_hot[(b, n, *coords[b, :, n].tolist())] = 1
    expected = torch.einsum("bcn,bnxyz->bcxyz", points, one_hot) / one_hot.sum(1, keepdim=True).clamp(min=1)
    assert_same_gradients([out], [expected], [features], [points])
    # The original truncates what is not an integer, and LION's copy passes further channels.
    further = torch.cat((coords + 0.9, rand(B, 2, N, seed=2)), 1)
    assert_equal(pvcnn.avg_voxelize(features, further, R), out.detach().cpu())


def test_trilinear_devoxelize() -> None:
    B, C, N, R = 2, 4, 30, 4
    features, coords = leaf(rand(B, C, R, R, R, seed=3)), coordinates(B, N, R, seed=4)
    out = pvcnn.trilinear_devoxelize(features, coords, R)
    assert out.shape == (B, C, N) and out.is_contiguous()

    voxels, where = double(features), coords.cpu().double()
    grid = torch.arange(R, dtype=torch.float64)
    hats = (1 - (where[..., None] - grid).abs()).clamp(min=0)  # (B, 3, N, R): linear interpolation along each axis
    expected = torch.einsum("bcxyz,bnx,bny,bnz->bcn", voxels, *hats.unbind(1))
    assert_same_gradients([out], [expected], [features], [voxels])
    for other in (
        pvcnn.trilinear_devoxelize(features.flatten(2), coords, R, False),
        pvcnn.trilinear_devoxelize(features, torch.cat((coords, coords), 1), R, is_training=True),
    ):
        assert_equal(other, out.detach().cpu())
    with pytest.raises(ValueError, match="features: expected"):
        pvcnn.trilinear_devoxelize(features, coords, R + 1)


def test_ball_query() -> None:
    centers, points = rand(2, 3, 6, seed=5), rand(2, 3, 25, seed=6)
    centers[0, :, 0] = 100  # no point is near
    idx = pvcnn.ball_query(centers, points, 1.0, 4)
    assert idx.dtype == torch.int32 and idx.shape == (2, 6, 4)
    for b in range(2):
        for m in range(6):
            near = (centers[b, :, m, None] - points[b]).square().sum(0) < 1
            hits = near.nonzero().flatten().tolist()[:4]
            assert idx[b, m].tolist() == hits + [hits[0] if hits else 0] * (4 - len(hits))


def test_grouping_and_gather() -> None:
    features, indices = leaf(rand(2, 5, 7, seed=7)), randint(0, 7, 2, 4, 3, seed=8)
    columns = double(features)
    expected = torch.stack([columns[b][:, indices[b].cpu()] for b in range(2)])
    for dtype in (torch.int32, torch.int64):
        out = pvcnn.grouping(features, indices.to(dtype))
        assert out.is_contiguous()
        assert_equal(out.double(), expected.detach())
        picked = pvcnn.gather(features, indices[..., 1].to(dtype))
        assert picked.is_contiguous()
        assert_equal(picked.double(), expected[..., 1].detach())
    assert_same_gradients([out, picked], [expected, expected[..., 1]], [features], [columns])


def test_furthest_point_sample() -> None:
    coords, normals = leaf(rand(2, 3, 20, seed=9)), leaf(rand(2, 4, 20, seed=10))
    chosen = []
    for cloud in double(coords).detach():
        picks = [0]
        for _ in range(7):
            nearest = (cloud[:, :, None] - cloud[:, None, picks]).square().sum(0).amin(1)
            picks.append(int(nearest.argmax()))
        chosen.append(picks)
    a, b = double(coords), double(normals)
    idx = torch.tensor(chosen)[:, None]
    expected = [a.take_along_dim(idx, 2), b.take_along_dim(idx, 2)]

    assert_equal(pvcnn.furthest_point_sample(coords, 8).double(), expected[0].detach())
    centers, center_normals = pvcnn.furthest_point_sample(coords, 8, normals)
    assert_same_gradients([centers, center_normals], expected, [coords, normals], [a, b])
    more = pvcnn.furthest_point_sample(coords, 23)
    assert isinstance(more, Tensor)
    assert_equal(more[..., 20:], coords[..., :1].expand(2, 3, 3).detach().cpu())


@pytest.mark.parametrize("M", [1, 2, 9])
def test_nearest_neighbor_interpolate(M: int) -> None:
    points, centers, features = rand(2, 3, 15, seed=11), rand(2, 3, M, seed=12), leaf(rand(2, 6, M, seed=13))
    out = pvcnn.nearest_neighbor_interpolate(points, centers, features)
    assert out.shape == (2, 6, 15) and out.is_contiguous()
    columns = double(features)
    sqdist = (points.cpu().double()[..., None] - centers.cpu().double()[:, :, None]).square().sum(1)
    near, idx = sqdist.sort(-1)
    weights = 1 / near[..., :3]
    weights = weights / weights.sum(-1, keepdim=True)
    grouped = torch.stack([columns[b][:, idx[b, :, :3]] for b in range(2)])
    assert_same_gradients([out], [(grouped * weights[:, None]).sum(-1)], [features], [columns])


class TestLogitsMask:
    def sample(self, wanted: list[int], M: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        coords = leaf(rand(len(wanted), 3, 12, seed=14))
        logits = torch.zeros(len(wanted), 2, 12, device=DEVICE)
        for b, count in enumerate(wanted):
            logits[b, 1, 12 - count :] = 1
        return coords, *pvcnn.logits_mask(coords, logits, M)

    def test_selects_evenly(self) -> None:
        wanted = [9, 5, 2, 1, 0]
        coords, selected, mean, mask = self.sample(wanted, 5)
        assert mask.dtype == torch.bool and mask.sum(1).tolist() == wanted
        for b, count in enumerate(wanted):
            points = coords[b, :, 12 - count :].detach()
            center = points.mean(1) if count else torch.zeros(3, device=DEVICE)
            assert_close(mean[b], center.cpu())
            if not count:
                assert_equal(selected[b], torch.zeros(3, 5))
                continue
            gaps = (selected[b].detach() + center[:, None])[:, :, None] - points[:, None]
            picks = gaps.abs().sum(0).argmin(1)
            assert gaps.abs().sum(0).amin(1).max() < 1e-5
            times = picks.bincount(minlength=count)
            assert times.max() - times.min() <= 1 and times.sum() == 5

    def test_gradient_is_that_of_a_selection(self) -> None:
        coords, selected, _, mask = self.sample([4], 8)
        selected.sum().backward()  # each of the 4 twice, relative to their mean: 2 - 8 / 4 = 0
        assert_close(coords.grad, torch.zeros(1, 3, 12))
        coords.grad = None
        (selected, _, _) = pvcnn.logits_mask(coords, torch.stack((~mask, mask), 1).float(), 8)
        (selected * torch.arange(8, device=DEVICE)).sum().backward()
        assert coords.grad is not None and coords.grad[..., :8].count_nonzero() == 0 < coords.grad.count_nonzero()

    def test_is_random(self) -> None:
        coords, logits = (
            rand(1, 3, 12, seed=15),
            torch.tensor([0.0, 1.0], device=DEVICE)[None, :, None].expand(1, 2, 12),
        )
        draws = [pvcnn.logits_mask(coords, logits, 12)[0] for _ in range(2)]
        assert not torch.equal(*draws)
        assert_equal(draws[0].sort(-1).values, draws[1].sort(-1).values.cpu())


def test_losses() -> None:
    x, y = leaf(rand(3, 5, 2, seed=16)), leaf(rand(3, 5, 2, seed=17))
    p, q = (t.detach().exp() / t.detach().exp().sum(1, keepdim=True) for t in (double(x), double(y)))
    loss = pvcnn.kl_loss(x, y)
    assert_close(loss, (p * (p / q).log()).sum(1).mean())
    loss.backward()
    assert x.grad is None
    assert_close(y.grad, (q - p) / 6)

    def huber(error: Tensor, delta: float) -> Tensor:
        size = error.abs()
        return torch.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).mean()

    e, d = leaf(rand(40, seed=18)), double(rand(40, seed=18))
    assert_same_gradients([pvcnn.huber_loss(e, 0.7)], [huber(d, 0.7)], [e], [d])


BAD: list[Callable[[], object]] = [
    lambda: pvcnn.avg_voxelize(rand(1, 4, 5, seed=0), randint(0, 2, 1, 2, 5, seed=0), 2),
    lambda: pvcnn.avg_voxelize(rand(4, 5, seed=0), randint(0, 2, 1, 3, 5, seed=0), 2),
    lambda: pvcnn.ball_query(rand(1, 2, 5, seed=0), rand(1, 3, 5, seed=0), 1.0, 2),
    lambda: pvcnn.furthest_point_sample(rand(1, 3, 5, seed=0), 0),
    lambda: pvcnn.grouping(rand(1, 3, seed=0), randint(0, 2, 1, 2, 5, seed=0)),
]


@pytest.mark.parametrize("call", BAD, ids=range(len(BAD)))
def test_bad_input(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="expected") as error:
        call()
    assert "\n" not in str(error.value)


def test_features_of_other_clouds_are_refused() -> None:
    points, centers = torch.rand(2, 3, 6), torch.rand(2, 3, 4)
    with pytest.raises(ValueError, match=r"^centers_features: expected the M of centers_coords \(4\), got 5$"):
        pvcnn.nearest_neighbor_interpolate(points, centers, torch.rand(2, 7, 5))
    with pytest.raises(ValueError, match=r"^normals: expected the N of coords \(6\), got 5$"):
        pvcnn.furthest_point_sample(points, 3, torch.rand(2, 3, 5))


def test_one_voxel_holds_the_mean_of_all() -> None:
    features, coords = leaf(rand(2, 4, 7, seed=20)), torch.zeros(2, 3, 7, device=DEVICE)
    a = double(features)
    voxels = pvcnn.avg_voxelize(features, coords.int(), 1)
    assert voxels.shape == (2, 4, 1, 1, 1) and voxels.is_contiguous()
    back = pvcnn.trilinear_devoxelize(voxels, coords, 1)
    mean = a.mean(2, keepdim=True)
    assert_same_gradients([voxels, back], [mean[..., None, None], mean.expand(-1, -1, 7)], [features], [a])


def test_features_without_channels() -> None:
    none, coords = rand(2, 0, 7, seed=0), rand(2, 3, 7, seed=1)
    centers = coords[:, :, :4]
    assert pvcnn.avg_voxelize(none, torch.zeros(2, 3, 7, device=DEVICE).int(), 3).shape == (2, 0, 3, 3, 3)
    assert pvcnn.trilinear_devoxelize(rand(2, 0, 3, 3, 3, seed=0), coords.clamp(0, 2), 3).shape == (2, 0, 7)
    assert pvcnn.grouping(none, randint(0, 7, 2, 4, 5, seed=2)).shape == (2, 0, 4, 5)
    assert pvcnn.gather(none, randint(0, 7, 2, 4, seed=2)).shape == (2, 0, 4)
    assert pvcnn.nearest_neighbor_interpolate(coords, centers, rand(2, 0, 4, seed=3)).shape == (2, 0, 7)


def test_indices_of_samples() -> None:
    coords, normals = rand(2, 3, 9, seed=21), rand(2, 2, 9, seed=22)
    centers, idx = pvcnn.furthest_point_sample(coords, 4, return_indices=True)
    assert idx.dtype == torch.int32
    assert_equal(centers, coords.take_along_dim(idx.long()[:, None], 2).cpu())
    both = pvcnn.furthest_point_sample(coords, 4, normals, True)
    assert_equal(both[1], normals.take_along_dim(idx.long()[:, None], 2).cpu())
    assert_equal(both[2], idx.cpu())


@pytest.mark.parametrize("integer", [np.int64, np.int32, torch.tensor], ids=["int64", "int32", "tensor"])
def test_integers_of_other_kinds(integer: Callable[[int], Any]) -> None:
    coords, features = rand(1, 3, 9, seed=23).abs().clamp(max=2), rand(1, 2, 9, seed=24)
    for op, arguments, number in (
        (pvcnn.furthest_point_sample, (coords,), 4),
        (pvcnn.ball_query, (coords, coords, 1.0), 3),
        (pvcnn.avg_voxelize, (features, coords.int()), 3),
        (pvcnn.trilinear_devoxelize, (rand(1, 2, 3, 3, 3, seed=25), coords), 3),
    ):
        assert torch.equal(op(*arguments, integer(number)), op(*arguments, number))
    with pytest.raises(ValueError, match="^num_samples: expected an integer, got 2.5$"):
        pvcnn.furthest_point_sample(coords, 2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^features: expected a tensor, got list$"):
        pvcnn.grouping([[[1.0]]], randint(0, 1, 1, 1, 1, seed=0))  # type: ignore[arg-type]
