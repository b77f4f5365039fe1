from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from lion_triton import kernels
from lion_triton.kernels.compat import pytorch3d
from lion_triton.kernels.compat.pytorch3d import (
    ball_query,
    chamfer_distance,
    knn_gather,
    knn_points,
    masked_gather,
    sample_farthest_points,
)
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


class Case(NamedTuple):
    """Clouds (N, P1, D) and (N, P2, D), with padding that holds NaN, or points like all others."""

    p1: Tensor
    p2: Tensor
    lengths1: list[int] | None
    lengths2: list[int] | None

    def lengths(self) -> dict[str, Tensor | None]:
        return {
            name: None if lengths is None else torch.tensor(lengths, device=DEVICE)
            for name, lengths in (("lengths1", self.lengths1), ("lengths2", self.lengths2))
        }

    def cloud(self, n: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a[n, : self.lengths1[n] if self.lengths1 else None], b[n, : self.lengths2[n] if self.lengths2 else None]


def make(
    P1: int, P2: int, D: int, lengths1: list[int] | None, lengths2: list[int] | None, padding: str = "nan"
) -> Case:
    N = len(lengths1 or lengths2 or [0, 0])
    p1, p2 = rand(N, P1, D, seed=P1 + D), rand(N, P2, D, seed=100 + P2 + D)
    for points, lengths in ((p1, lengths1), (p2, lengths2)):
        for n, length in enumerate(lengths or ()):
            if padding == "nan":
                points[n, length:] = torch.nan
    return Case(leaf(p1), leaf(p2), lengths1, lengths2)


CASES = {
    "whole": (9, 14, 3, None, None),
    "one-point": (1, 1, 3, None, None),
    "one-dimension": (6, 5, 1, None, None),
    "five-dimensions": (6, 5, 5, None, None),
    "full-lengths": (9, 14, 3, [9, 9], [14, 14]),
    "ragged": (9, 14, 3, [9, 4, 1], [6, 14, 2]),
    "ragged-points": (9, 14, 3, [9, 4, 1], [6, 14, 2], "points"),
    "ragged-centers": (9, 14, 4, [9, 4, 1], None),
    "empty": (4, 5, 3, [0, 4, 3, 2], [5, 0, 2, 5]),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def distances(a: Tensor, b: Tensor, norm: int) -> Tensor:
    return (a[:, None] - b[None]).abs().pow(norm).sum(-1)


def brute_knn(case: Case, p1: Tensor, p2: Tensor, K: int, norm: int) -> tuple[Tensor, Tensor]:
    N, P1, _ = p1.shape
    dists, idx = torch.zeros(N, P1, K, dtype=p1.dtype), torch.zeros(N, P1, K, dtype=torch.int64)
    rows = []
    for n in range(N):
        a, b = case.cloud(n, p1, p2)
        near, order = distances(a, b, norm).sort(1)
        k = min(K, len(b))
        idx[n, : len(a), :k] = order[:, :k]
        rows.append(torch.nn.functional.pad(near[:, :k], (0, K - k, 0, P1 - len(a))))
    dists = torch.stack(rows)
    return dists, idx


class TestKnnPoints:
    @cases
    @pytest.mark.parametrize(("K", "norm"), [(1, 2), (1, 1), (4, 2), (4, 1), (70, 2)])
    def test_against_brute_force(self, case: Any, K: int, norm: int) -> None:
        case = make(*case)
        p1, p2 = double(case.p1), double(case.p2)
        expected, order = brute_knn(case, p1, p2, K, norm)
        dists, idx, knn = knn_points(case.p1, case.p2, **case.lengths(), norm=norm, K=K)
        assert knn is None and dists.dtype == torch.float32
        assert_equal(idx, order)
        assert_same_gradients([dists], [expected], [case.p1, case.p2], [p1, p2])

    @cases
    def test_neighbours(self, case: Any) -> None:
        case = make(*case)
        result = knn_points(case.p1, case.p2, **case.lengths(), K=3, return_nn=True)
        assert result.knn is not None and result.knn.shape == (*result.idx.shape, case.p1.shape[2])
        for n in range(len(case.p1)):
            for i, k in itertools.product(range(case.p1.shape[1]), range(3)):
                length = case.lengths2[n] if case.lengths2 else case.p2.shape[1]
                expected = case.p2[n, result.idx[n, i, k]] if k < length else torch.zeros_like(case.p2[n, 0])
                assert torch.equal(result.knn[n, i, k], expected)

    def test_unsorted_is_in_order_of_the_index(self) -> None:
        case = make(9, 14, 3, [9, 4, 1], [6, 14, 2])
        by_distance = knn_points(case.p1, case.p2, **case.lengths(), K=4)
        by_index = knn_points(case.p1, case.p2, **case.lengths(), K=4, return_sorted=False)
        assert not torch.equal(by_distance.idx, by_index.idx)
        assert (by_index.idx[1].diff(dim=-1)[:4] > 0).all()
        padding = torch.arange(4, device=DEVICE) >= torch.tensor([[6], [14], [2]], device=DEVICE)
        order = by_index.dists.masked_fill(padding[:, None], torch.inf).argsort(-1)
        assert_equal(by_index.idx.gather(2, order), by_distance.idx.cpu())
        assert_equal(by_index.dists.gather(2, order), by_distance.dists.detach().cpu())

    @pytest.mark.parametrize("norm", [1, 2])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_ties_take_the_lowest_index(self, norm: int, dtype: torch.dtype) -> None:
        p2 = torch.tensor([[[2, 0, 0], [0, -1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]]], dtype=dtype)
        p1 = torch.zeros(1, 1, 3, dtype=dtype, device=DEVICE)
        assert knn_points(p1, p2.to(DEVICE), K=6, norm=norm).idx.tolist() == [[[3, 5, 1, 2, 4, 0]]]
        assert knn_points(p1, torch.ones_like(p2).to(DEVICE).repeat(1, 50, 1), K=40).idx.tolist() == [[[*range(40)]]]
        assert knn_points(p1, torch.ones_like(p2).to(DEVICE), norm=norm).idx.tolist() == [[[0]]]

    def test_gradient_of_norm_1_is_0_where_coordinates_agree(self) -> None:
        p1 = leaf(torch.ones(1, 1, 3, device=DEVICE))
        p2 = leaf(torch.tensor([[[1.0, 2.0, 0.5]]], device=DEVICE))
        knn_points(p1, p2, norm=1).dists.sum().backward()
        assert p1.grad is not None and p1.grad.tolist() == [[[0, -1, 1]]]
        assert p2.grad is not None and p2.grad.tolist() == [[[0, 1, -1]]]

    def test_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        p1, p2 = rand(3, 310, 3, seed=0), rand(3, 500, 3, seed=1)
        blocks = []

        def spy(dists: Tensor, k: int) -> Tensor:
            blocks.append(dists.numel())
            return dists.argsort(-1)[..., :k]

        expected = knn_points(p1, p2, K=3, norm=1)
        monkeypatch.setattr(pytorch3d, "smallest", spy)
        assert_equal(knn_points(p1, p2, K=3, norm=1).idx, expected.idx.cpu())
        if DEVICE == "cpu":
            assert len(blocks) == 6 and max(blocks) <= 2**17
        assert sum(blocks) == 3 * 310 * 500
        full = distances(p1[2].double(), p2[2].double(), 1).argsort(1)[:, :3]
        assert_equal(expected.idx[2], full.cpu())

    def test_values_are_those_that_were_compared(self) -> None:
        # The same squares in another order: sums that differ in their last digits only.
        p2 = rand(9, seed=0)[rand(60, 9, seed=1).argsort(1)][None]
        dists = knn_points(torch.zeros_like(p2[:, :1]), p2, K=60).dists
        assert dists.unique().numel() > 3
        assert (dists.diff(dim=-1) >= 0).all()

    def test_dtypes(self) -> None:
        p1, p2 = leaf(rand(2, 9, 4, seed=2).double()), leaf(rand(2, 7, 4, seed=3).double())
        a, b = double(p1), double(p2)
        result = knn_points(p1, p2, K=2)
        expected, order = brute_knn(Case(a, b, None, None), a, b, 2, 2)
        assert result.dists.dtype == torch.float64
        assert_equal(result.idx, order)
        assert_close(result.dists, expected, 1e-14)
        result.dists.sum().backward()
        assert p1.grad is not None and p1.grad.dtype == torch.float64
        for dtype in (torch.float16, torch.bfloat16):
            half = knn_points(p1.detach().to(dtype), p2.detach().to(dtype), K=2)
            single = knn_points(p1.detach().to(dtype).float(), p2.detach().to(dtype).float(), K=2)
            assert_equal(half.dists, single.dists.cpu())

    def test_integers_and_lengths_of_other_kinds(self) -> None:
        p1, p2, lengths = rand(2, 4, 3, seed=0), rand(2, 6, 3, seed=1), torch.tensor([6, 2], device=DEVICE)
        expected = knn_points(p1, p2, lengths2=lengths, K=2)
        for K in (np.int64(2), torch.tensor(2)):
            other = knn_points(p1, p2, lengths2=[6, 2], K=K)  # type: ignore[arg-type]
            assert torch.equal(other.idx, expected.idx) and torch.equal(other.dists, expected.dists)
        samples = sample_farthest_points(p2, K=np.int32(3))[1]  # type: ignore[arg-type]
        assert torch.equal(samples, sample_farthest_points(p2, K=3)[1])

    def test_no_points(self) -> None:
        p1, p2 = rand(2, 4, 3, seed=0), rand(2, 0, 3, seed=1)
        for K in (1, 2):
            result = knn_points(p1, p2, K=K, return_nn=True)
            assert result.knn is not None and result.knn.shape == (2, 4, K, 3)
            assert not any(t.count_nonzero() for t in result)
            assert knn_points(p2, p1, K=K).idx.shape == (2, 0, K)
            assert knn_points(p1[:0], p1[:0], K=K).idx.shape == (0, 4, K)

    def test_ops_behind_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[str] = []
        for name in ("nearest_neighbor", "knn"):
            real = getattr(kernels, name)
            watched = lambda *a, real=real, name=name, **k: (calls.append(name), real(*a, **k))[1]  # noqa: E731
            monkeypatch.setattr(kernels, name, watched)
        nearest = "nearest_neighbor" if DEVICE == "cuda" else "knn"
        for case, norm, K, expected in (
            *[("whole", 2, 1, nearest), ("full-lengths", 2, 1, nearest), ("whole", 1, 1, None), ("whole", 2, 2, "knn")],
            *[("ragged", 2, 1, "knn"), ("five-dimensions", 2, 1, "knn")],
        ):
            calls.clear()
            points = make(*CASES[case])
            knn_points(points.p1, points.p2, **points.lengths(), norm=norm, K=K)
            assert calls == [expected] * (expected is not None)


class TestGather:
    def test_knn_gather(self) -> None:
        x, idx = leaf(rand(2, 6, 5, seed=0)), randint(0, 6, 2, 4, 3, seed=1)
        a = double(x)
        mask = torch.tensor([[1, 1, 1], [1, 1, 0]])[:, None, :, None]
        expected = torch.stack([a[n, idx[n].cpu()] for n in range(2)])
        lengths = torch.tensor([6, 2], device=DEVICE)
        assert_same_gradients([knn_gather(x, idx), knn_gather(x, idx, lengths)], [expected, expected * mask], [x], [a])
        assert_equal(knn_gather(x, idx.repeat(1, 1, 3))[:, :, 6:], torch.zeros(2, 4, 3, 5))  # K > M
        whole = (x.detach() * 100).long()
        assert_equal(knn_gather(whole, idx, lengths), (knn_gather(whole.float(), idx, lengths)).long().cpu())

    def test_masked_gather(self) -> None:
        x, idx = leaf(rand(2, 6, 5, seed=2)), randint(-1, 6, 2, 4, 3, seed=3)
        a = double(x)
        expected = torch.stack([a[n, idx[n].clamp(min=0).cpu()] for n in range(2)]) * (idx >= 0).cpu()[..., None]
        assert -1 in idx
        outputs = [masked_gather(x, idx), masked_gather(x, idx[:, 1])]
        assert_same_gradients(outputs, [expected, expected[:, 1]], [x], [a])


class TestBallQuery:
    @cases
    @pytest.mark.parametrize(("K", "radius"), [(1, 1.0), (3, 1.5), (20, 1.5), (2, 0.01), (20, 100.0)])
    def test_against_brute_force(self, case: Any, K: int, radius: float) -> None:
        case = make(*case)
        p1, p2 = double(case.p1), double(case.p2)
        rows, idx = [], torch.full((*p1.shape[:2], K), -1)
        for n in range(len(p1)):
            a, b = case.cloud(n, p1, p2)
            sqdist = distances(a, b, 2)
            for i in range(p1.shape[1]):
                hits = (sqdist[i] < radius**2).nonzero().flatten()[:K] if i < len(a) else torch.zeros(0).long()
                idx[n, i, : len(hits)] = hits
                near = sqdist[i, hits] if i < len(a) else p1.new_zeros(0)
                rows.append(torch.nn.functional.pad(near, (0, K - len(hits))))
        dists = torch.stack(rows).view(*p1.shape[:2], K)
        result = ball_query(case.p1, case.p2, **case.lengths(), K=K, radius=radius)
        assert_equal(result.idx, idx)
        padding = (idx < 0)[..., None]
        knn = torch.stack([p2[n, idx[n].clamp(min=0)] for n in range(len(p2))]).masked_fill(padding, 0)
        assert result.knn is not None
        assert_same_gradients([result.dists, result.knn], [dists, knn], [case.p1, case.p2], [p1, p2])
        same = ball_query(
            case.p1, case.p2, **case.lengths(), K=K, radius=radius, return_nn=False, skip_points_outside_cube=True
        )
        assert same.knn is None and torch.equal(same.idx, result.idx)

    def test_the_radius_itself_is_outside(self) -> None:
        p2 = torch.tensor([[[0.1, 0, 0], [0, 0, 0.0999], [0, 0.1, 0]]], device=DEVICE)
        assert ball_query(torch.zeros_like(p2[:, :1]), p2, K=2, radius=0.1).idx.tolist() == [[[1, -1]]]

    def test_integers_and_lengths_of_other_kinds(self) -> None:
        p1, p2, lengths = rand(2, 4, 3, seed=0), rand(2, 6, 3, seed=1), torch.tensor([6, 2], device=DEVICE)
        expected = knn_points(p1, p2, lengths2=lengths, K=2)
        for K in (np.int64(2), torch.tensor(2)):
            other = knn_points(p1, p2, lengths2=[6, 2], K=K)  # type: ignore[arg-type]
            assert torch.equal(other.idx, expected.idx) and torch.equal(other.dists, expected.dists)
        samples = sample_farthest_points(p2, K=np.int32(3))[1]  # type: ignore[arg-type]
        assert torch.equal(samples, sample_farthest_points(p2, K=3)[1])

    def test_no_points(self) -> None:
        p1, p2 = rand(2, 4, 3, seed=0), rand(2, 0, 3, seed=1)
        result = ball_query(p1, p2, K=3)
        assert result.knn is not None and result.knn.shape == (2, 4, 3, 3)
        assert (result.idx == -1).all() and not result.dists.count_nonzero()


def brute_farthest(points: Tensor, count: int, start: int = 0) -> list[int]:
    picks = [start]
    while len(picks) < count:
        nearest = distances(points, points[picks], 2).amin(1)
        picks.append(int(nearest.argmax()))
    return picks


class TestSampleFarthestPoints:
    @pytest.mark.parametrize("D", [2, 3])
    @pytest.mark.parametrize("lengths", [None, [20, 20, 20], [20, 7, 1]])
    @pytest.mark.parametrize("K", [1, 6, 25, [3, 9, 2], [0, 1, 30]], ids=str)
    def test_against_brute_force(self, K: Any, lengths: list[int] | None, D: int) -> None:
        points = rand(3, 20, D, seed=D)
        for n, length in enumerate(lengths or ()):
            points[n, length:] = torch.nan
        points = leaf(points)
        per_cloud = [K] * 3 if isinstance(K, int) else K
        idx = torch.full((3, max(per_cloud)), -1)
        for n in range(3):
            length = lengths[n] if lengths else 20
            picks = brute_farthest(points[n, :length].detach().cpu(), max(1, min(per_cloud[n], length)))
            idx[n, : len(picks)] = torch.tensor(picks)
        on_device = None if lengths is None else torch.tensor(lengths, device=DEVICE)
        a = double(points)
        expected = torch.stack([a[n, idx[n].clamp(min=0)] for n in range(3)]).masked_fill((idx < 0)[..., None], 0)
        outputs = []
        for k in (K,) if isinstance(K, int) else (K, torch.tensor(K, device=DEVICE)):
            selected, chosen = sample_farthest_points(points, on_device, k)
            assert_equal(chosen, idx)
            outputs.append(selected)
        assert_same_gradients(outputs, [expected] * len(outputs), [points], [a])

    def test_random_start(self) -> None:
        points, lengths = rand(40, 9, 3, seed=4), torch.tensor([9, 3] * 20, device=DEVICE)
        torch.manual_seed(1)
        _, idx = sample_farthest_points(points, lengths, 4, random_start_point=True)
        starts = idx[:, 0].tolist()
        assert set(starts[::2]) >= {0, 8, 4} and set(starts[1::2]) == {0, 1, 2}
        for n, start in enumerate(starts):
            length = int(lengths[n])
            picks = brute_farthest(points[n, :length].cpu(), min(4, length), start)
            assert idx[n].tolist() == picks + [-1] * (4 - len(picks))
        assert sample_farthest_points(points, None, 4, True)[1][:, 0].unique().numel() == 9

    @pytest.mark.parametrize("D", [2, 3])
    def test_coincident_points(self, D: int) -> None:
        assert sample_farthest_points(torch.ones(1, 6, D, device=DEVICE), K=4)[1].tolist() == [[0, 0, 0, 0]]

    def test_is_float32_as_the_original(self) -> None:
        points = leaf(rand(2, 9, 3, seed=5).double())
        selected, idx = sample_farthest_points(points, K=2)
        assert selected.dtype == torch.float32 and idx.dtype == torch.int64
        selected.sum().backward()
        assert points.grad is not None and points.grad.dtype == torch.float64

    def test_kernel_takes_whole_clouds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []
        real = kernels.furthest_point_sample
        monkeypatch.setattr(kernels, "furthest_point_sample", lambda *a: (calls.append(1), real(*a))[1])
        points = rand(2, 9, 3, seed=6)
        sample_farthest_points(points, torch.tensor([9, 9], device=DEVICE), [3, 4])
        assert len(calls) == 1
        sample_farthest_points(points, torch.tensor([9, 8], device=DEVICE), 3)
        sample_farthest_points(points, None, 3, random_start_point=True)
        sample_farthest_points(points[..., :2], None, 3)
        assert len(calls) == 4
        sample_farthest_points(torch.cat([points, points], -1), None, 3)
        assert len(calls) == 4

    def test_no_clouds(self) -> None:
        for D in (2, 3):
            assert sample_farthest_points(rand(0, 9, D, seed=0), K=4)[0].shape == (0, 4, D)


class Pointclouds(NamedTuple):
    """What chamfer_distance uses of PyTorch3D's class of that name."""

    points: Tensor
    lengths: Tensor
    normals: Tensor | None = None

    def points_padded(self) -> Tensor:
        return self.points

    def num_points_per_cloud(self) -> Tensor:
        return self.lengths

    def normals_padded(self) -> Tensor | None:
        return self.normals


REDUCTIONS = [(b, p) for b in ("mean", "sum", None) for p in ("mean", "sum", "max")] + [(None, None)]


def brute_chamfer(
    case: Case,
    clouds: tuple[Tensor, Tensor],
    normals: tuple[Tensor, Tensor] | None,
    weights: Tensor | None,
    batch_reduction: str | None,
    point_reduction: str | None,
    norm: int,
    single_directional: bool,
    abs_cosine: bool,
) -> list[Tensor]:
    """Every tensor that chamfer_distance returns, from whole distance matrices of one cloud at a time."""
    N = len(clouds[0])
    weight = torch.ones(N, dtype=torch.float64) if weights is None else weights
    terms: list[list[Tensor]] = [[], [], [], []]  # x to y, y to x, normals of both
    for n in range(N):
        a, b = case.cloud(n, *clouds)
        matrix = distances(a, b, norm)
        for way, dists in enumerate((matrix, matrix.T)):
            size = clouds[way].shape[1] - len(dists)
            near = dists.amin(1) if dists.numel() else dists.sum(1)
            terms[way].append(weight[n] * torch.nn.functional.pad(near, (0, size)))
            if normals is None:
                continue
            u, v = case.cloud(n, *normals)[way], case.cloud(n, *normals)[1 - way]
            v = v[dists.argmin(1)] if dists.numel() else torch.zeros_like(u)
            cosine = (u * v).sum(1) / (u.norm(dim=1) * v.norm(dim=1)).clamp(min=1e-12)
            off = 1 - (cosine.abs() if abs_cosine else cosine)
            terms[2 + way].append(weight[n] * torch.nn.functional.pad(off, (0, size)))
    per_point = [torch.stack(t) for t in terms if t]
    if single_directional:
        per_point = per_point[::2]
    if point_reduction is None:
        return per_point
    lengths = [case.lengths1 or [clouds[0].shape[1]] * N, case.lengths2 or [clouds[1].shape[1]] * N]
    reduced = []
    for i, t in enumerate(per_point):
        count = torch.tensor(lengths[0 if single_directional else i % 2]).clamp(min=1)
        reduced.append(
            t.amax(1) if point_reduction == "max" else t.sum(1) / (count if point_reduction == "mean" else 1)
        )
    if not single_directional:
        pairs = [reduced[i : i + 2] for i in range(0, len(reduced), 2)]
        reduced = [torch.maximum(*pair) if point_reduction == "max" else pair[0] + pair[1] for pair in pairs]
    if batch_reduction == "mean":
        return [t.sum() / (N if weights is None else weights.sum()) for t in reduced]
    return [t.sum() for t in reduced] if batch_reduction == "sum" else reduced


def tensors(result: tuple[Any, Any]) -> list[Tensor]:
    return [t for part in result if part is not None for t in (part if isinstance(part, tuple) else (part,))]


class TestChamferDistance:
    @pytest.mark.parametrize("name", ["whole", "five-dimensions", "ragged", "ragged-points", "empty"])
    @pytest.mark.parametrize("reductions", REDUCTIONS, ids=lambda r: f"{r[0]}-{r[1]}")
    def test_against_brute_force(self, name: str, reductions: tuple[str | None, str | None]) -> None:
        # Each pair of reductions meets each kind of cloud; the other options take turns.
        turn = list(CASES).index(name) + REDUCTIONS.index(reductions)
        for option in range(turn, turn + 3):
            case = make(*CASES[name])
            N = len(case.p1)
            options: dict[str, Any] = {
                "norm": 1 + option % 2,
                "single_directional": option % 3 == 0,
                "abs_cosine": option % 4 < 2,
                "batch_reduction": reductions[0],
                "point_reduction": reductions[1],
            }
            weights = rand(N, seed=8).abs() * (torch.arange(N, device=DEVICE) != 1) if option % 3 else None
            normals = option % 5 < 3 and reductions[1] != "max"
            x_normals, y_normals = (
                leaf(torch.where(p.isnan(), p, rand(*p.shape, seed=9 + i))) for i, p in enumerate((case.p1, case.p2))
            )
            lengths = case.lengths()
            result = chamfer_distance(
                case.p1,
                case.p2,
                x_lengths=lengths["lengths1"],
                y_lengths=lengths["lengths2"],
                x_normals=x_normals if normals else None,
                y_normals=y_normals if normals else None,
                weights=weights,
                **options,
            )
            assert (result[1] is not None) == normals
            pair = reductions[1] is None and not options["single_directional"]
            assert isinstance(result[0], tuple if pair else Tensor)
            leaves = [case.p1, case.p2] + [x_normals, y_normals] * normals
            expected_leaves = [double(t) for t in leaves]
            a, b, *u = expected_leaves
            w = None if weights is None else weights.cpu().double()
            expected = brute_chamfer(case, (a, b), (u[0], u[1]) if u else None, w, **options)
            assert_same_gradients(tensors(result), expected, leaves, expected_leaves)

    def test_defaults(self) -> None:
        x, y = rand(2, 9, 3, seed=0), rand(2, 5, 3, seed=1)
        loss, loss_normals = chamfer_distance(x, y)
        assert loss_normals is None and loss.shape == ()
        assert_close(loss, kernels.chamfer_distance(x, y).mean().cpu())
        assert chamfer_distance(x, y, x_normals=x)[1] is None  # one cloud's normals alone count for nothing

    def test_opposite_normals_are_the_same_but_without_abs_cosine(self) -> None:
        x, normals = rand(2, 9, 3, seed=2), rand(2, 9, 3, seed=3)
        for abs_cosine, expected in ((True, 0.0), (False, 4.0)):
            _, loss = chamfer_distance(x, x, x_normals=normals, y_normals=-2 * normals, abs_cosine=abs_cosine)
            assert_close(loss, torch.tensor(expected))

    def test_objects(self) -> None:
        case = make(9, 14, 3, [9, 4, 1], [6, 14, 2])
        normals = rand(3, 9, 3, seed=4), rand(3, 14, 3, seed=5)
        lengths = [torch.tensor(lengths, device=DEVICE) for lengths in ([9, 4, 1], [6, 14, 2])]
        clouds = [Pointclouds(*of_one) for of_one in zip((case.p1, case.p2), lengths, normals, strict=True)]
        expected = chamfer_distance(case.p1, case.p2, *lengths, *normals)
        assert_equal(torch.stack(chamfer_distance(*clouds)), torch.stack(expected).detach().cpu())
        # Lengths and normals of a cloud are its own, whatever the arguments say.
        assert_equal(torch.stack(chamfer_distance(*clouds, x_lengths=lengths[1])), torch.stack(expected).detach().cpu())
        bare = [c._replace(normals=None) for c in clouds]
        loss, loss_normals = chamfer_distance(*bare)
        assert loss_normals is None
        assert_equal(loss, expected[0].detach().cpu())
        with pytest.raises(ValueError, match="normals"):
            chamfer_distance(*clouds, point_reduction="max")

    def test_no_clouds_and_no_points(self) -> None:
        none = rand(0, 0, 3, seed=0)
        for reduction in ("mean", "sum", "max"):
            assert chamfer_distance(none, none, point_reduction=reduction)[0].item() == 0
            empty = rand(2, 0, 3, seed=0)
            assert chamfer_distance(empty, rand(2, 4, 3, seed=1), point_reduction=reduction)[0].item() == 0

    @pytest.mark.parametrize(
        ("reductions", "shape"), [(("mean", "mean"), ()), (("sum", "sum"), ()), ((None, "mean"), (2, 2))]
    )
    def test_zero_weights(self, reductions: tuple[str | None, str | None], shape: tuple[int, ...]) -> None:
        x, y = leaf(rand(2, 9, 3, seed=2)), leaf(rand(2, 5, 3, seed=3))
        both = chamfer_distance(x, y, None, None, None, None, torch.zeros(2, device=DEVICE), *reductions)
        for loss in both:
            assert loss.requires_grad
            assert_equal(loss, torch.zeros(shape))
        (both[0].sum() + both[1].sum()).backward()
        for cloud in (x, y):
            assert_equal(cloud.grad, torch.zeros(cloud.shape))
        pair, _ = chamfer_distance(
            x, y, weights=torch.zeros(2, device=DEVICE), batch_reduction=None, point_reduction=None
        )
        assert [p.shape for p in pair] == [(2, 2), (2, 2)]

    def test_gradient_of_weights(self) -> None:
        x, y, weights = rand(2, 9, 3, seed=2), rand(2, 5, 3, seed=3), leaf(torch.ones(2, device=DEVICE))
        chamfer_distance(x, y, weights=weights, batch_reduction="sum")[0].backward()
        assert_close(weights.grad, kernels.chamfer_distance(x, y).cpu())

    def test_float64(self) -> None:
        x, y = rand(2, 9, 5, seed=2).double(), rand(2, 6, 5, seed=3).double()
        expected = sum(
            distances(x[n], y[n], 2).amin(1).mean() + distances(x[n], y[n], 2).amin(0).mean() for n in range(2)
        )
        assert_close(chamfer_distance(x, y)[0], torch.as_tensor(expected).cpu() / 2, 1e-14)

    def test_twice_the_same_bits(self) -> None:
        grads = []
        for _ in range(2):
            case = make(9, 14, 3, [9, 4, 1], [6, 14, 2])
            lengths = case.lengths().values()
            chamfer_distance(case.p1, case.p2, *lengths)[0].backward()
            grads.append((case.p1.grad, case.p2.grad))
        for first, second in zip(*grads, strict=True):
            assert first is not None and second is not None and torch.equal(first, second)


X, Y, LONG = rand(2, 4, 3, seed=0), rand(2, 5, 3, seed=1), torch.tensor([1, 6], device=DEVICE)
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "knn-norm": (lambda: knn_points(X, Y, norm=3), "1 or 2 norm"),
    "knn-K": (lambda: knn_points(X, Y, K=0), "K: expected"),
    "knn-batch": (lambda: knn_points(X, Y[:1]), "p2: expected the batch size of p1"),
    "knn-dimensions": (lambda: knn_points(X, Y[..., :2]), "p2: expected the number of dimensions"),
    "knn-dtype": (lambda: knn_points(X, Y.double()), "p2: expected the dtype"),
    "knn-integers": (lambda: knn_points(X.long(), Y.long()), "p1: expected a floating dtype"),
    "knn-shape": (lambda: knn_points(X[0], Y[0]), "p1: expected shape"),
    "knn-lengths": (lambda: knn_points(X, Y, lengths2=LONG), "lengths2: expected values in \\[0, 5\\], got 1 to 6"),
    "knn-negative-lengths": (lambda: knn_points(X, Y, lengths1=LONG - 3), "lengths1: expected values"),
    "knn-lengths-shape": (lambda: knn_points(X, Y, LONG[:1]), "lengths1: Expected lengths to be of shape"),
    "gather-batch": (lambda: knn_gather(X[:1], LONG.view(2, 1, 1)), "idx: expected the batch size"),
    "masked-gather-batch": (lambda: masked_gather(X[:1], LONG.view(2, 1, 1)), "idx: expected the batch size"),
    "masked-gather-shape": (lambda: masked_gather(X, LONG), "idx: expected shape"),
    "ball-K": (lambda: ball_query(X, Y, K=0), "K: expected"),
    "ball-batch": (lambda: ball_query(X, Y[:1]), "p2: expected the batch size"),
    "farthest-K": (lambda: sample_farthest_points(X, K=0), "K: expected"),
    "farthest-K-shape": (lambda: sample_farthest_points(X, K=[1]), "K: expected one number for each"),
    "farthest-lengths": (lambda: sample_farthest_points(X, LONG, 2), "lengths: expected values"),
    "farthest-lengths-shape": (lambda: sample_farthest_points(X, LONG[:1], 2), "Expected lengths"),
    "farthest-shape": (lambda: sample_farthest_points(X[:, :0], K=1), "points: expected shape"),
    "knn-list": (lambda: knn_points([[0.0]], Y), "p1: expected a tensor, got list"),
    "gather-list": (lambda: knn_gather(X, [[0]]), "idx: expected a tensor, got list"),
    "masked-list": (lambda: masked_gather([[0.0]], LONG), "points: expected a tensor, got list"),
    "farthest-list": (lambda: sample_farthest_points([[0.0]]), "points: expected a tensor, got list"),
    "normals-size": (lambda: pytorch3d.estimate_pointcloud_normals(X, 50), "neighborhood_size: expected less than"),
    "align-size": (lambda: pytorch3d.corresponding_points_alignment(X, X[:, :1]), "Y: expected as many points as X"),
    "chamfer-norm": (lambda: chamfer_distance(X, Y, norm=0), "1 or 2 norm"),
    "chamfer-batch-reduction": (
        lambda: chamfer_distance(X, Y, batch_reduction="max"),
        "batch_reduction must be one of",
    ),
    "chamfer-point-reduction": (
        lambda: chamfer_distance(X, Y, point_reduction="min"),
        "point_reduction must be one of",
    ),
    "chamfer-no-point-reduction": (lambda: chamfer_distance(X, Y, point_reduction=None), "batch_reduction: expected"),
    "chamfer-max-normals": (lambda: chamfer_distance(X, Y, y_normals=Y, point_reduction="max"), "takes no normals"),
    "chamfer-type": (lambda: chamfer_distance([1, 1], [1, 1]), "x: expected Pointclouds objects or torch.Tensor"),
    "chamfer-shape": (lambda: chamfer_distance(X, Y[None]), "y: Expected points to be of shape"),
    "chamfer-normals": (lambda: chamfer_distance(X, Y, x_normals=X[None]), "x_normals: Expected normals"),
    "chamfer-lengths": (lambda: chamfer_distance(X, Y, y_lengths=LONG), "y_lengths: expected values"),
    "chamfer-batch": (lambda: chamfer_distance(X, Y[:1]), "y: expected the batch size of x"),
    "chamfer-weights": (lambda: chamfer_distance(X, Y, weights=LONG[:1].float()), "weights: expected shape"),
    "chamfer-negative": (lambda: chamfer_distance(X, Y, weights=-LONG.float()), "weights: expected values >= 0"),
}


class TestNormals:
    @pytest.mark.parametrize("lengths", [None, [40, 25]])
    def test_against_each_neighbourhood(self, lengths: list[int] | None) -> None:
        points = leaf(rand(2, 40, 3, seed=0) * torch.tensor([1.0, 0.7, 0.1], device=DEVICE))
        cloud: Any = points
        if lengths is not None:
            cloud = Pointclouds(points, torch.tensor(lengths, device=DEVICE), None)
        variances, axes = pytorch3d.estimate_pointcloud_local_coord_frames(cloud, 9)
        normals = pytorch3d.estimate_pointcloud_normals(cloud, 9)
        assert torch.equal(normals, axes[..., 0])
        for b in range(2):
            size = lengths[b] if lengths else 40
            a = points[b, :size].detach().cpu().double()
            near = a[torch.cdist(a, a).argsort(1)[:, :9]]
            difference = near - near.mean(1, keepdim=True)
            expected, vectors = torch.linalg.eigh(difference.mT @ difference / 9)
            assert_close(variances[b, :size], expected, 1e-4)
            frames = axes[b, :size].detach().cpu().double()
            assert_close(frames.mT @ frames, torch.eye(3).double().expand(size, 3, 3), 1e-4)
            assert_close((frames * vectors).sum(1).abs(), torch.ones(size, 3), 1e-3)  # the same axes but for the sign
            assert_close(torch.linalg.cross(frames[..., 0], frames[..., 2]), frames[..., 1], 1e-4)
            for axis in (0, 2):
                ahead = ((near - a[:, None]) * frames[:, None, :, axis]).sum(-1) > 0
                assert (ahead.sum(1) >= 4).all()  # of eight others
        normals.square().sum().backward()

    def test_signs_are_left_alone(self) -> None:
        points = rand(1, 30, 3, seed=1)
        plain = pytorch3d.estimate_pointcloud_normals(points, 8, disambiguate_directions=False)
        assert_close((plain * pytorch3d.estimate_pointcloud_normals(points, 8)).sum(-1).abs(), torch.ones(1, 30), 1e-4)


class TestAlignment:
    def make(self, D: int, scale: float, mirror: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        X = rand(2, 12, D, seed=D)
        R = torch.linalg.qr(rand(2, D, D, seed=1).cpu().double())[0]
        R[:, :, 0] *= torch.det(R).sign()[:, None] * (-1 if mirror else 1)
        T = rand(2, D, seed=2)
        return X, scale * X @ R.float().to(DEVICE) + T[:, None], R, T.cpu().double()

    @pytest.mark.parametrize(("D", "scale", "mirror"), [(3, 1.0, False), (2, 2.5, False), (3, 0.5, True)])
    def test_recovers_a_similarity(self, D: int, scale: float, mirror: bool) -> None:
        X, Y, R, T = self.make(D, scale, mirror)
        found = pytorch3d.corresponding_points_alignment(X, Y, estimate_scale=scale != 1, allow_reflection=mirror)
        assert_close(found.R, R, 1e-4)
        assert_close(found.T, T, 1e-4)
        assert_close(found.s, torch.full((2,), scale), 1e-4)
        if mirror:
            assert (torch.det(pytorch3d.corresponding_points_alignment(X, Y).R) > 0).all()

    def test_weights_and_padding(self) -> None:
        X, Y, R, T = self.make(3, 1.0, False)
        Y[:, 8:] = 100  # outliers
        weights = torch.ones(2, 12, device=DEVICE)
        weights[:, 8:] = 0
        lengths = torch.tensor([8, 8], device=DEVICE)
        for found in (
            pytorch3d.corresponding_points_alignment(X, Y, weights),
            pytorch3d.corresponding_points_alignment(X, Y, list(weights)),
            pytorch3d.corresponding_points_alignment(Pointclouds(X, lengths, None), Pointclouds(Y, lengths, None)),
        ):
            assert_close(found.R, R, 1e-4)
            assert_close(found.T, T, 1e-4)

    def test_is_the_best_of_all_rotations(self) -> None:
        X, Y = rand(1, 10, 3, seed=5).cpu().double(), rand(1, 10, 3, seed=6).cpu().double()
        found = pytorch3d.corresponding_points_alignment(X, Y, estimate_scale=True)

        def cost(R: Tensor, T: Tensor, s: Tensor) -> float:
            return (s[:, None, None] * X @ R + T[:, None] - Y).square().sum().item()

        best = cost(*found)
        for i in range(20):
            turn = torch.linalg.matrix_exp(0.05 * (lambda a: a - a.mT)(rand(1, 3, 3, seed=i).cpu().double()))
            moved = found.T + 0.05 * rand(1, 3, seed=50 + i).cpu().double()
            assert cost(found.R @ turn, moved, found.s * (1 + 0.01 * (i % 3 - 1))) >= best


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
