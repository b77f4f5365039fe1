from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from lion_triton.kernels import neighbors
from lion_triton.kernels.neighbors import (
    ball_query,
    chamfer_distance,
    group,
    nearest_neighbor,
    three_interpolate,
    three_nn,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(2, 7, 5), (1, 1, 1), (3, 1, 4), (2, 131, 1), (2, 131, 257), (1, 64, 65)]
sizes = pytest.mark.parametrize(("B", "N", "M"), SIZES, ids=lambda n: str(n))


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)


def randint(high: int, *shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(high, shape, generator=generator, dtype=torch.int32).to(DEVICE)


def naive_sqdist(x: Tensor, y: Tensor) -> np.ndarray:
    out = np.empty((len(x), x.shape[1], y.shape[1]))
    for b, (p, q) in enumerate(zip(x.detach().cpu().numpy(), y.detach().cpu().numpy(), strict=True)):
        for n in range(len(p)):
            out[b, n] = ((p[n] - q) ** 2).sum(1)
    return out


def assert_equal(actual: Tensor | None, expected: Any) -> None:
    assert actual is not None
    torch.testing.assert_close(actual.cpu(), torch.as_tensor(expected), rtol=0, atol=0)


def assert_close(actual: Tensor | None, expected: Any, rtol: float = 1e-12) -> None:
    assert actual is not None
    torch.testing.assert_close(actual.cpu(), torch.as_tensor(expected).cpu(), rtol=rtol, atol=rtol)


class TestNearestNeighbor:
    @sizes
    def test_values_and_gradients(self, B: int, N: int, M: int) -> None:
        x, y = rand(B, N, 3, seed=0).requires_grad_(), rand(B, M, 3, seed=1).requires_grad_()
        sqdist, idx = nearest_neighbor(x, y)
        naive = naive_sqdist(x, y)
        assert idx.dtype == torch.int32
        assert_equal(idx, naive.argmin(2).astype(np.int32))
        assert_close(sqdist, naive.min(2))

        cotangent = rand(B, N, seed=2)
        sqdist.backward(cotangent)
        grad_x, grad_y = np.zeros((B, N, 3)), np.zeros((B, M, 3))
        for b in range(B):
            for n in range(N):
                m = naive[b, n].argmin()
                pull = 2 * cotangent[b, n].item() * (x[b, n] - y[b, m]).detach().cpu().numpy()
                grad_x[b, n] += pull
                grad_y[b, m] -= pull
        assert_close(x.grad, grad_x)
        assert_close(y.grad, grad_y)

    def test_ties_take_the_lowest_index(self) -> None:
        x = torch.zeros(1, 1, 3, device=DEVICE)
        y = torch.tensor([[[2, 0, 0], [0, -1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]]], dtype=torch.float32)
        assert nearest_neighbor(x, y.to(DEVICE))[1].tolist() == [[1]]
        assert nearest_neighbor(x, torch.ones(1, 100, 3, device=DEVICE))[1].tolist() == [[0]]

    def test_small_distances_far_from_the_origin_keep_their_digits(self) -> None:
        x = rand(1, 50, 3, seed=0, dtype=torch.float32) + 1000
        y = x.roll(3, 1) + rand(1, 50, 3, seed=1, dtype=torch.float32) * 0.01
        sqdist, idx = nearest_neighbor(x, y)
        naive = naive_sqdist(x.double(), y.double())
        assert_equal(idx, naive.argmin(2).astype(np.int32))
        torch.testing.assert_close(sqdist.cpu().double(), torch.from_numpy(naive.min(2)), rtol=1e-6, atol=0)

    def test_a_cloud_with_itself(self) -> None:
        x = rand(2, 33, 3, seed=0, dtype=torch.float32).requires_grad_()
        sqdist, idx = nearest_neighbor(x, x)
        sqdist.sum().backward()
        assert_equal(sqdist.detach(), torch.zeros(2, 33))
        assert_equal(idx, torch.arange(33, dtype=torch.int32).expand(2, 33))
        assert_equal(x.grad, torch.zeros(2, 33, 3))

    def test_gradcheck(self) -> None:
        x, y = rand(2, 5, 3, seed=0).requires_grad_(), rand(2, 4, 3, seed=1).requires_grad_()
        torch.autograd.gradcheck(lambda x, y: nearest_neighbor(x, y)[0], (x, y))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_precision_is_computed_in_float32(self, dtype: torch.dtype) -> None:
        x, y = rand(2, 20, 3, seed=0).to(dtype), rand(2, 30, 3, seed=1).to(dtype)
        sqdist, idx = nearest_neighbor(x, y)
        expected, expected_idx = nearest_neighbor(x.float(), y.float())
        assert_equal(sqdist, expected.cpu())
        assert_equal(idx, expected_idx.cpu())


class TestChamferDistance:
    @sizes
    def test_values(self, B: int, N: int, M: int) -> None:
        x, y = rand(B, N, 3, seed=0), rand(B, M, 3, seed=1)
        naive = naive_sqdist(x, y)
        expected = naive.min(2).mean(1) + naive.min(1).mean(1)
        assert_close(chamfer_distance(x, y), expected)
        single = chamfer_distance(x.float(), y.float())
        assert single.dtype == torch.float32
        assert_close(single.double(), expected, rtol=1e-5)

    def test_gradcheck(self) -> None:
        x, y = rand(2, 5, 3, seed=0).requires_grad_(), rand(2, 4, 3, seed=1).requires_grad_()
        torch.autograd.gradcheck(chamfer_distance, (x, y))


class TestBallQuery:
    @sizes
    @pytest.mark.parametrize(("radius", "k"), [(0.5, 4), (1.5, 16), (100.0, 1), (100.0, 300)])
    def test_values(self, B: int, N: int, M: int, radius: float, k: int) -> None:
        centers, points = rand(B, M, 3, seed=0), rand(B, N, 3, seed=1)
        expected = np.zeros((B, M, k), np.int32)
        for b, rows in enumerate(naive_sqdist(centers, points)):
            for m, row in enumerate(rows):
                hits = [n for n in range(N) if row[n] < radius**2][:k]
                expected[b, m] = (hits + hits[:1] * k)[:k] if hits else 0
        idx = ball_query(centers, points, radius, k)
        assert idx.dtype == torch.int32
        assert_equal(idx, expected)

    def test_the_sphere_itself_is_outside(self) -> None:
        points = torch.tensor([[[0.5, 0, 0], [0.25, 0, 0], [0, -0.5, 0], [0, 0, 0.375]]], device=DEVICE)
        assert ball_query(torch.zeros(1, 1, 3, device=DEVICE), points, 0.5, 3).tolist() == [[[1, 3, 1]]]

    def test_no_hit_and_coincident_points(self) -> None:
        points = torch.ones(1, 9, 3, device=DEVICE)
        centers = torch.tensor([[[5.0, 5, 5], [1, 1, 1], [-5, 0, 0]]], device=DEVICE)
        idx = ball_query(centers, points, 0.1, 4)
        assert idx.tolist() == [[[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 0, 0]]]

    def test_points_that_are_not_numbers_are_no_hits(self) -> None:
        points = torch.tensor([[[torch.nan, 0, 0], [0.1, 0, 0]]], device=DEVICE)
        assert ball_query(torch.zeros(1, 1, 3, device=DEVICE), points, 1.0, 2).tolist() == [[[1, 1]]]


class TestThreeNN:
    @sizes
    def test_values(self, B: int, N: int, M: int) -> None:
        points, centers = rand(B, N, 3, seed=0), rand(B, M, 3, seed=1)
        naive = naive_sqdist(points, centers)
        k = min(3, M)
        expected_idx = np.zeros((B, N, 3), np.int32)
        expected_idx[..., :k] = naive.argsort(2, kind="stable")[..., :k]
        inverse = 1 / np.clip(np.sort(naive, 2)[..., :k], 1e-10, 1e10)
        expected = np.zeros((B, N, 3))
        expected[..., :k] = inverse / inverse.sum(2, keepdims=True)

        weights, idx = three_nn(points, centers)
        assert idx.dtype == torch.int32
        assert_equal(idx, expected_idx)
        assert_close(weights, expected)
        assert not three_nn(points.requires_grad_(), centers)[0].requires_grad

    def test_ties_take_the_lowest_index(self) -> None:
        centers = torch.tensor([[[3.0, 0, 0], [0, 1, 0], [0, -1, 0], [1, 0, 0], [0, 0, 1]]], device=DEVICE)
        weights, idx = three_nn(torch.zeros(1, 1, 3, device=DEVICE), centers)
        assert idx.tolist() == [[[1, 2, 3]]]
        assert_close(weights, torch.full((1, 1, 3), 1 / 3), rtol=1e-6)

    def test_distances_are_clamped(self) -> None:
        points = torch.zeros(1, 1, 3, device=DEVICE, dtype=torch.float64)
        centers = torch.tensor([[[0.0, 0, 0], [1e-5, 0, 0], [2e-6, 0, 0]]], device=DEVICE, dtype=torch.float64)
        # 0 and 4e-12 count as 1e-10, which the third one is.
        assert_close(three_nn(points, centers)[0], torch.full((1, 1, 3), 1 / 3, dtype=torch.float64))
        far = torch.tensor([[[2e5, 0, 0], [3e5, 0, 0], [4e5, 0, 0]]], device=DEVICE, dtype=torch.float64)
        assert_close(three_nn(points, far)[0], torch.full((1, 1, 3), 1 / 3, dtype=torch.float64))

    def test_coincident_points(self) -> None:
        weights, idx = three_nn(torch.ones(1, 2, 3, device=DEVICE), torch.ones(1, 5, 3, device=DEVICE))
        assert idx.tolist() == [[[0, 1, 2]] * 2]
        assert_close(weights, torch.full((1, 2, 3), 1 / 3), rtol=1e-6)


def naive_group(features: Tensor, idx: Tensor) -> Tensor:
    batch = torch.arange(len(idx), device=idx.device)[:, None, None]
    return features[batch, idx.long()]


class TestGroup:
    @pytest.mark.parametrize("idx_dtype", [torch.int32, torch.int64], ids=str)
    @pytest.mark.parametrize(("B", "N", "M", "K", "C"), [(2, 7, 5, 3, 4), (1, 1, 1, 1, 1), (3, 5, 17, 33, 6)])
    def test_values_and_gradients(self, B: int, N: int, M: int, K: int, C: int, idx_dtype: torch.dtype) -> None:
        features, idx = rand(B, N, C, seed=0).requires_grad_(), randint(N, B, M, K, seed=1).to(idx_dtype)
        out, expected = group(features, idx), naive_group(features, idx)
        assert_equal(out, expected.cpu())
        cotangent = rand(*out.shape, seed=2)
        (grad,) = torch.autograd.grad(out, features, cotangent)
        (expected_grad,) = torch.autograd.grad(expected, features, cotangent)
        assert_close(grad, expected_grad)

    def test_gradcheck(self) -> None:
        features, idx = rand(2, 5, 3, seed=0).requires_grad_(), randint(5, 2, 4, 6, seed=1)
        torch.autograd.gradcheck(group, (features, idx))
        torch.autograd.gradgradcheck(group, (features, idx))

    def test_bfloat16_gradients_are_summed_in_float32(self) -> None:
        features = rand(1, 2, 4, seed=0).bfloat16().requires_grad_()
        idx = torch.zeros(1, 512, 8, dtype=torch.int32, device=DEVICE)
        cotangent = rand(1, 512, 8, 4, seed=1).abs().bfloat16()
        group(features, idx).backward(cotangent)
        expected = torch.stack((cotangent.double().sum((1, 2)), torch.zeros(1, 4, device=DEVICE)), 1)
        assert features.grad is not None
        # Rounded once: an error of at most half a unit in the last of 8 places.
        torch.testing.assert_close(features.grad.double(), expected.double(), rtol=2**-8, atol=0)

    def test_backward_is_deterministic(self) -> None:
        features = rand(2, 11, 8, seed=0, dtype=torch.float32).requires_grad_()
        idx, cotangent = randint(11, 2, 50, 16, seed=1), rand(2, 50, 16, 8, seed=2, dtype=torch.float32)
        grads = [torch.autograd.grad(group(features, idx), features, cotangent)[0] for _ in range(2)]
        assert torch.equal(*grads)


class TestThreeInterpolate:
    @pytest.mark.parametrize(("B", "N", "M", "C"), [(2, 7, 5, 4), (1, 1, 1, 1), (3, 65, 4, 6)])
    def test_values_and_gradients(self, B: int, N: int, M: int, C: int) -> None:
        features, weights = rand(B, M, C, seed=0).requires_grad_(), rand(B, N, 3, seed=1).requires_grad_()
        idx = randint(M, B, N, 3, seed=2)
        out = three_interpolate(features, weights, idx)
        expected = (naive_group(features, idx) * weights[..., None]).sum(2)
        assert_close(out, expected)
        cotangent = rand(*out.shape, seed=3)
        grads = torch.autograd.grad(out, (features, weights), cotangent)
        expected_grads = torch.autograd.grad(expected, (features, weights), cotangent)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert_close(grad, expected_grad)

    def test_gradcheck(self) -> None:
        features, weights = rand(2, 5, 3, seed=0).requires_grad_(), rand(2, 7, 3, seed=1).requires_grad_()
        torch.autograd.gradcheck(three_interpolate, (features, weights, randint(5, 2, 7, 3, seed=2)))

    def test_bfloat16_features_with_float32_weights(self) -> None:
        features, weights = rand(2, 5, 8, seed=0).bfloat16(), rand(2, 7, 3, seed=1).float()
        idx = randint(5, 2, 7, 3, seed=2)
        out = three_interpolate(features, weights, idx)
        assert_equal(out, three_interpolate(features.float(), weights, idx).bfloat16().cpu())

    def test_with_three_nn_it_reproduces_centres(self) -> None:
        points, features = rand(2, 20, 3, seed=0), rand(2, 20, 8, seed=1)
        weights, idx = three_nn(points, points)
        assert_close(three_interpolate(features, weights, idx), features, rtol=1e-6)


OPS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "nearest_neighbor": (nearest_neighbor, (rand(2, 9, 3, seed=0), rand(2, 11, 3, seed=1))),
    "chamfer_distance": (chamfer_distance, (rand(2, 9, 3, seed=0), rand(2, 11, 3, seed=1))),
    "ball_query": (ball_query, (rand(2, 9, 3, seed=0), rand(2, 11, 3, seed=1), 1.0, 4)),
    "three_nn": (three_nn, (rand(2, 9, 3, seed=0), rand(2, 11, 3, seed=1))),
    "group": (group, (rand(2, 9, 5, seed=0), randint(9, 2, 4, 3, seed=1))),
    "three_interpolate": (
        three_interpolate,
        (rand(2, 9, 5, seed=0), rand(2, 4, 3, seed=1), randint(9, 2, 4, 3, seed=2)),
    ),
}
each_op = pytest.mark.parametrize(("op", "args"), OPS.values(), ids=OPS)


@each_op
def test_strides_do_not_matter(op: Callable[..., Any], args: tuple[Any, ...]) -> None:
    strided = tuple(a.mT.contiguous().mT if isinstance(a, Tensor) else a for a in args)
    assert not any(a.is_contiguous() for a in strided if isinstance(a, Tensor))
    torch.testing.assert_close(op(*strided), op(*args), rtol=0, atol=0)


@each_op
@pytest.mark.parametrize("size", [1, 30, 250], ids=["one-row", "rows", "clouds"])
def test_block_size_does_not_matter(
    op: Callable[..., Any], args: tuple[Any, ...], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = op(*args)
    monkeypatch.setattr(neighbors, "block_size", lambda x: size)
    torch.testing.assert_close(op(*args), whole, rtol=0, atol=0)


@each_op
def test_no_triton_kernel_yet(op: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with pytest.raises(NotImplementedError, match="no Triton kernel yet"):
        op(*args, impl="triton")
    with pytest.raises(ValueError, match="impl: expected"):
        op(*args, impl="cuda")


X, Y, IDX = torch.zeros(2, 4, 3), torch.zeros(2, 5, 3), torch.zeros(2, 4, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nearest_neighbor(X[0], Y), r"x: expected shape \(B, N, 3\) with N >= 1, got \(4, 3\)"),
        (lambda: nearest_neighbor(X, Y[:, :0]), r"y: expected shape .* got \(2, 0, 3\)"),
        (lambda: nearest_neighbor(X.int(), Y), "x: expected float32.* got torch.int32"),
        (lambda: nearest_neighbor(X, Y[:1]), r"y: expected the batch size of x \(2\), got 1"),
        (lambda: nearest_neighbor(X, Y.double()), r"y: expected the dtype of x \(torch.float32\)"),
        (lambda: chamfer_distance(X, Y.long()), "y: expected float32"),
        (lambda: ball_query(X, Y, 0.0, 3), "radius: expected a number > 0, got 0.0"),
        (lambda: ball_query(X, Y, float("nan"), 3), "radius: expected a number > 0, got nan"),
        (lambda: ball_query(X, Y, 0.1, 0), "k: expected an integer >= 1, got 0"),
        (lambda: ball_query(X, Y, 0.1, cast(Any, 2.5)), "k: expected an integer >= 1, got 2.5"),
        (lambda: three_nn(X, Y[..., :2]), r"centers: expected shape .* got \(2, 5, 2\)"),
        (lambda: group(X[0], IDX), r"features: expected shape \(B, N, C\) with N, C >= 1, got \(4, 3\)"),
        (lambda: group(X, IDX.float()), "idx: expected int32 or int64, got torch.float32"),
        (lambda: group(X, IDX[0]), r"idx: expected shape \(B, M, K\), got \(4, 3\)"),
        (lambda: group(X, IDX[:1]), r"idx: expected the batch size of features \(2\), got 1"),
        (lambda: group(X, IDX + 4), r"idx: expected values in \[0, 4\), got 4 to 4"),
        (lambda: group(X, IDX - 1), r"idx: expected values in \[0, 4\), got -1 to -1"),
        (lambda: three_interpolate(X, Y, IDX), "weights, idx: expected the same shape"),
        (lambda: three_interpolate(X, X.int(), IDX), "weights: expected float32"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
