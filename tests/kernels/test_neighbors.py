from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from lion_triton.kernels import _points, gather, nearest
from lion_triton.kernels._checks import Impl, interpreting
from lion_triton.kernels.gather import group, three_interpolate
from lion_triton.kernels.nearest import chamfer_distance, nearest_neighbor
from lion_triton.kernels.query import ball_query, three_nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(2, 7, 5), (1, 1, 1), (3, 1, 4), (2, 131, 1), (2, 131, 257), (1, 64, 65)]
sizes = pytest.mark.parametrize(("B", "N", "M"), SIZES, ids=lambda n: str(n))
both = pytest.mark.parametrize("impl", ["reference", "triton"])


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
        sqdist, idx = nearest_neighbor(x, y, impl="reference")
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

    @both
    @pytest.mark.parametrize("far", [0, 1, 6, 8, 20])
    def test_ties_take_the_lowest_index(self, impl: Impl, far: int) -> None:
        x = torch.zeros(1, 1, 3, device=DEVICE)
        y = torch.tensor([[[2, 0, 0]] * far + [[0, -1, 0], [1, 0, 0], [0, 0, 1], [2, 0, 0], [0, 1, 0]]]).float()
        assert nearest_neighbor(x, y.to(DEVICE), impl=impl)[1].tolist() == [[far]]
        assert nearest_neighbor(x, torch.ones(1, 30, 3, device=DEVICE), impl=impl)[1].tolist() == [[0]]

    @both
    def test_small_distances_far_from_the_origin_keep_their_digits(self, impl: Impl) -> None:
        x = rand(1, 50, 3, seed=0, dtype=torch.float32) + 1000
        y = x.roll(3, 1) + rand(1, 50, 3, seed=1, dtype=torch.float32) * 0.01
        sqdist, idx = nearest_neighbor(x, y, impl=impl)
        naive = naive_sqdist(x.double(), y.double())
        assert_equal(idx, naive.argmin(2).astype(np.int32))
        torch.testing.assert_close(sqdist.cpu().double(), torch.from_numpy(naive.min(2)), rtol=1e-6, atol=0)

    @both
    def test_a_cloud_with_itself(self, impl: Impl) -> None:
        x = rand(2, 33, 3, seed=0, dtype=torch.float32).requires_grad_()
        sqdist, idx = nearest_neighbor(x, x, impl=impl)
        sqdist.sum().backward()
        assert_equal(sqdist.detach(), torch.zeros(2, 33))
        assert_equal(idx, torch.arange(33, dtype=torch.int32).expand(2, 33))
        assert_equal(x.grad, torch.zeros(2, 33, 3))

    def test_gradcheck(self) -> None:
        x, y = rand(2, 5, 3, seed=0).requires_grad_(), rand(2, 4, 3, seed=1).requires_grad_()
        torch.autograd.gradcheck(lambda x, y: nearest_neighbor(x, y, impl="reference")[0], (x, y))

    @both
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_precision_is_computed_in_float32(self, impl: Impl, dtype: torch.dtype) -> None:
        x, y = rand(2, 20, 3, seed=0).to(dtype), rand(2, 30, 3, seed=1).to(dtype)
        sqdist, idx = nearest_neighbor(x, y, impl=impl)
        expected, expected_idx = nearest_neighbor(x.float(), y.float(), impl=impl)
        assert_equal(sqdist, expected.cpu())
        assert_equal(idx, expected_idx.cpu())

    def test_only_the_distance_has_a_gradient(self) -> None:
        x, y = rand(1, 4, 3, seed=0).requires_grad_(), rand(1, 5, 3, seed=1)
        sqdist, idx = nearest_neighbor(x, y, impl="triton")
        assert sqdist.requires_grad and not idx.requires_grad
        sqdist.sum().backward()
        assert x.grad is not None and y.grad is None


class TestChamferDistance:
    @sizes
    def test_values(self, B: int, N: int, M: int) -> None:
        x, y = rand(B, N, 3, seed=0), rand(B, M, 3, seed=1)
        naive = naive_sqdist(x, y)
        expected = naive.min(2).mean(1) + naive.min(1).mean(1)
        assert_close(chamfer_distance(x, y, impl="reference"), expected)
        single = chamfer_distance(x.float(), y.float(), impl="reference")
        assert single.dtype == torch.float32
        assert_close(single.double(), expected, rtol=1e-5)

    def test_gradcheck(self) -> None:
        x, y = rand(2, 5, 3, seed=0).requires_grad_(), rand(2, 4, 3, seed=1).requires_grad_()
        torch.autograd.gradcheck(lambda x, y: chamfer_distance(x, y, impl="reference"), (x, y))


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
        idx = ball_query(centers, points, radius, k, impl="reference")
        assert idx.dtype == torch.int32
        assert_equal(idx, expected)

    @both
    def test_the_sphere_itself_is_outside(self, impl: Impl) -> None:
        points = torch.tensor([[[0.5, 0, 0], [0.25, 0, 0], [0, -0.5, 0], [0, 0, 0.375]]], device=DEVICE)
        idx = ball_query(torch.zeros(1, 1, 3, device=DEVICE), points, 0.5, 3, impl=impl)
        assert idx.tolist() == [[[1, 3, 1]]]

    @both
    def test_no_hit_and_coincident_points(self, impl: Impl) -> None:
        points = torch.ones(1, 9, 3, device=DEVICE)
        centers = torch.tensor([[[5.0, 5, 5], [1, 1, 1], [-5, 0, 0]]], device=DEVICE)
        idx = ball_query(centers, points, 0.1, 4, impl=impl)
        assert idx.tolist() == [[[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 0, 0]]]

    @both
    def test_points_that_are_not_numbers_are_no_hits(self, impl: Impl) -> None:
        points = torch.tensor([[[torch.nan, 0, 0], [0.1, 0, 0]]], device=DEVICE)
        idx = ball_query(torch.zeros(1, 1, 3, device=DEVICE), points, 1.0, 2, impl=impl)
        assert idx.tolist() == [[[1, 1]]]


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

        weights, idx = three_nn(points, centers, impl="reference")
        assert idx.dtype == torch.int32
        assert_equal(idx, expected_idx)
        assert_close(weights, expected)

    @both
    def test_no_gradient(self, impl: Impl) -> None:
        points, centers = rand(1, 4, 3, seed=0).requires_grad_(), rand(1, 5, 3, seed=1)
        assert not three_nn(points, centers, impl=impl)[0].requires_grad

    @both
    def test_ties_take_the_lowest_index(self, impl: Impl) -> None:
        centers = torch.tensor([[[3.0, 0, 0], [0, 1, 0], [0, -1, 0], [1, 0, 0], [0, 0, 1]]], device=DEVICE)
        weights, idx = three_nn(torch.zeros(1, 1, 3, device=DEVICE), centers, impl=impl)
        assert idx.tolist() == [[[1, 2, 3]]]
        assert_close(weights, torch.full((1, 1, 3), 1 / 3), rtol=1e-6)

    @both
    def test_distances_are_clamped(self, impl: Impl) -> None:
        points = torch.zeros(1, 1, 3, device=DEVICE, dtype=torch.float64)
        centers = torch.tensor([[[0.0, 0, 0], [1e-5, 0, 0], [2e-6, 0, 0]]], device=DEVICE, dtype=torch.float64)
        # 0 and 4e-12 count as 1e-10, which the third one is.
        third = torch.full((1, 1, 3), 1 / 3, dtype=torch.float64)
        assert_close(three_nn(points, centers, impl=impl)[0], third, rtol=1e-6)
        far = torch.tensor([[[2e5, 0, 0], [3e5, 0, 0], [4e5, 0, 0]]], device=DEVICE, dtype=torch.float64)
        assert_close(three_nn(points, far, impl=impl)[0], third, rtol=1e-6)

    @both
    @pytest.mark.parametrize("M", [5, 30])
    def test_coincident_points(self, impl: Impl, M: int) -> None:
        weights, idx = three_nn(torch.ones(1, 2, 3, device=DEVICE), torch.ones(1, M, 3, device=DEVICE), impl=impl)
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
        out, expected = group(features, idx, impl="reference"), naive_group(features, idx)
        assert_equal(out, expected.cpu())
        cotangent = rand(*out.shape, seed=2)
        (grad,) = torch.autograd.grad(out, features, cotangent)
        (expected_grad,) = torch.autograd.grad(expected, features, cotangent)
        assert_close(grad, expected_grad)

    def test_gradcheck(self) -> None:
        features, idx = rand(2, 5, 3, seed=0).requires_grad_(), randint(5, 2, 4, 6, seed=1)
        torch.autograd.gradcheck(gather.group_reference, (features, idx))
        torch.autograd.gradgradcheck(gather.group_reference, (features, idx))

    @both
    def test_bfloat16_gradients_are_summed_in_float32(self, impl: Impl) -> None:
        features = rand(1, 2, 4, seed=0).bfloat16().requires_grad_()
        idx = torch.zeros(1, 64, 8, dtype=torch.int32, device=DEVICE)
        cotangent = rand(1, 64, 8, 4, seed=1).abs().bfloat16()
        group(features, idx, impl=impl).backward(cotangent)
        expected = torch.stack((cotangent.double().sum((1, 2)), torch.zeros(1, 4, device=DEVICE)), 1)
        assert features.grad is not None
        # Rounded once: an error of at most half a unit in the last of 8 places (a whole one in the interpreter).
        torch.testing.assert_close(features.grad.double(), expected.double(), rtol=2.0**-7, atol=0)


class TestThreeInterpolate:
    @pytest.mark.parametrize(("B", "N", "M", "C"), [(2, 7, 5, 4), (1, 1, 1, 1), (3, 65, 4, 6)])
    def test_values_and_gradients(self, B: int, N: int, M: int, C: int) -> None:
        features, weights = rand(B, M, C, seed=0).requires_grad_(), rand(B, N, 3, seed=1).requires_grad_()
        idx = randint(M, B, N, 3, seed=2)
        out = three_interpolate(features, weights, idx, impl="reference")
        expected = (naive_group(features, idx) * weights[..., None]).sum(2)
        assert_close(out, expected)
        cotangent = rand(*out.shape, seed=3)
        grads = torch.autograd.grad(out, (features, weights), cotangent)
        expected_grads = torch.autograd.grad(expected, (features, weights), cotangent)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert_close(grad, expected_grad)

    def test_gradcheck(self) -> None:
        features, weights = rand(2, 5, 3, seed=0).requires_grad_(), rand(2, 7, 3, seed=1).requires_grad_()
        torch.autograd.gradcheck(gather.three_interpolate_reference, (features, weights, randint(5, 2, 7, 3, seed=2)))

    @both
    def test_bfloat16_features_with_float32_weights(self, impl: Impl) -> None:
        features, weights = rand(2, 5, 8, seed=0).bfloat16(), rand(2, 7, 3, seed=1).float()
        idx = randint(5, 2, 7, 3, seed=2)
        out = three_interpolate(features, weights, idx, impl=impl)
        expected = three_interpolate(features.float(), weights, idx, impl=impl)
        torch.testing.assert_close(out.float(), expected, rtol=2.0**-7, atol=0)

    @both
    def test_with_three_nn_it_reproduces_centres(self, impl: Impl) -> None:
        points, features = rand(2, 20, 3, seed=0), rand(2, 20, 8, seed=1)
        weights, idx = three_nn(points, points, impl=impl)
        assert_close(three_interpolate(features, weights, idx, impl=impl), features, rtol=1e-6)


class Op(NamedTuple):
    function: Callable[..., Any]
    make: Callable[[int, int, int], tuple[Any, ...]]  # arguments for B clouds of N points and of M points


def clouds(B: int, N: int, M: int) -> tuple[Tensor, Tensor]:
    return rand(B, N, 3, seed=0, dtype=torch.float32), rand(B, M, 3, seed=1, dtype=torch.float32)


OPS = {
    "nearest_neighbor": Op(nearest_neighbor, clouds),
    "chamfer_distance": Op(chamfer_distance, clouds),
    "ball_query": Op(ball_query, lambda *sizes: (*clouds(*sizes), 1.2, 4)),
    "ball_query-all": Op(ball_query, lambda *sizes: (*clouds(*sizes), 100.0, 20)),
    "three_nn": Op(three_nn, clouds),
    "group": Op(group, lambda B, N, M: (rand(B, N, 5, seed=0).float(), randint(N, B, M, 4, seed=1))),
    "three_interpolate": Op(
        three_interpolate,
        lambda B, N, M: (rand(B, M, 5, seed=0).float(), rand(B, N, 3, seed=1).float(), randint(M, B, N, 3, seed=2)),
    ),
}
each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
each_search = pytest.mark.parametrize("op", list(OPS.values())[:5], ids=list(OPS)[:5])


def run(op: Op, args: tuple[Any, ...], impl: Impl) -> list[Tensor]:
    """The outputs, then the gradient of every differentiable input for one random cotangent."""
    args = tuple(a.detach().requires_grad_(a.is_floating_point()) if isinstance(a, Tensor) else a for a in args)
    out = op.function(*args, impl=impl)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    results = [o.detach() for o in outputs]
    if outputs[0].requires_grad:
        cotangent = rand(*outputs[0].shape, seed=3).to(outputs[0])
        inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        results += torch.autograd.grad(outputs[0], inputs, cotangent)
    return results


def to(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def assert_as_good_as_reference(op: Op, args: tuple[Any, ...]) -> None:
    """Indices equal; the rest at most twice as far from float64 as the reference of the same dtype."""
    exact = run(op, to(args, torch.float64), "reference")
    ours, reference = run(op, args, "triton"), run(op, args, "reference")
    assert len(ours) == len(reference) == len(exact)
    for x, y, z in zip(ours, reference, exact, strict=True):
        assert x.dtype == y.dtype
        assert x.is_contiguous()
        if not x.is_floating_point():
            assert_equal(x, z.cpu())
            continue
        assert x.shape == z.shape
        # The second term is for a reference that is right by chance.
        allowed = 2 * (y - z).abs().max() + 1e-6 * z.abs().max()
        if interpreting() and x.dtype == torch.bfloat16:
            # The interpreter truncates where a GPU rounds: a whole unit in the last place, not half.
            allowed = 2.0**-7 * z.abs().max()
        assert (x - z).abs().max() <= allowed


# One point; fewer than come at a time; as many, one more; one past a block (128 points, or 32 centres).
KERNEL_SIZES = [(1, 1, 1), (2, 1, 7), (2, 13, 2), (2, 8, 8), (2, 9, 31), (1, 129, 9), (1, 33, 17)]


@each_op
@pytest.mark.parametrize(("B", "N", "M"), KERNEL_SIZES, ids=lambda n: str(n))
def test_triton(op: Op, B: int, N: int, M: int) -> None:
    assert_as_good_as_reference(op, op.make(B, N, M))
    if op.function is chamfer_distance:
        assert_as_good_as_reference(op, op.make(B, M, N))


@each_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(op: Op, dtype: torch.dtype) -> None:
    args = to(op.make(2, 11, 9), dtype)
    if dtype != torch.float64:
        assert_as_good_as_reference(op, args)
        return
    for x, y in zip(run(op, args, "triton"), run(op, args, "reference"), strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)  # the kernels compute in float32


@pytest.mark.parametrize("op", [OPS["nearest_neighbor"], OPS["chamfer_distance"]])
def test_many_points_with_one_neighbor(op: Op) -> None:
    x, y = clouds(2, 40, 5)
    y[:, 1:] += 100  # all of x are nearest to one point; the others have no neighbours
    assert_as_good_as_reference(op, (x, y))


@pytest.mark.parametrize("op", [OPS["nearest_neighbor"], OPS["chamfer_distance"]])
@pytest.mark.parametrize("name", ["_BLOCKS", "index_dtype"])
def test_large_clouds(op: Op, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only large ones use, small: several points a thread; rows counted in int64."""
    args = op.make(2, 130, 9)
    expected = run(op, args, "triton")
    monkeypatch.setattr(nearest, name, (512,) if name == "_BLOCKS" else lambda num_rows: torch.int64)
    for x, y in zip(run(op, args, "triton"), expected, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=1e-6, atol=0)


def test_blocks() -> None:
    sizes = (1, 2**15, 2**16, 2**17, 2**30)
    assert [_points.points_per_program(n, nearest._BLOCKS) for n in sizes] == [128, 128, 256, 512, 512]


@each_op
def test_repeats_bit_for_bit(op: Op) -> None:
    args = op.make(2, 33, 9)
    for x, y in zip(run(op, args, "triton"), run(op, args, "triton"), strict=True):
        assert torch.equal(x, y)


@each_search
@pytest.mark.parametrize("nan", [0, 1, 2], ids=["x", "y", "all"])
def test_not_a_number_stays_in_bounds(op: Op, nan: int) -> None:
    args = op.make(1, 10, 9)
    for cloud in args[:2] if nan == 2 else [args[nan]]:
        cloud[:, 0 if nan < 2 else slice(None)] = torch.nan
    out = op.function(*args, impl="triton")
    if op.function is chamfer_distance:
        assert out.isnan().all()
    else:
        idx = out if isinstance(out, Tensor) else out[1]
        assert idx.min() >= 0
        assert idx.max() < args[1].shape[1]
    if op.function in (nearest_neighbor, three_nn) and nan != 1:
        assert out[0][:, 0].isnan().all()


@each_op
@both
def test_strides_do_not_matter(op: Op, impl: Impl) -> None:
    args = op.make(2, 9, 11)
    strided = tuple(a.mT.contiguous().mT if isinstance(a, Tensor) else a for a in args)
    assert not any(a.is_contiguous() for a in strided if isinstance(a, Tensor))
    # The kernels see a copy; of the reference's sums a GPU may choose the order by the strides.
    rtol, atol = (0, 0) if impl == "triton" or DEVICE == "cpu" else (1e-6, 1e-6)
    for x, y in zip(run(op, strided, impl), run(op, args, impl), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


@each_op
@both
def test_empty_batch(op: Op, impl: Impl) -> None:
    args = tuple(a[:0] if isinstance(a, Tensor) else a for a in op.make(1, 4, 5))
    assert all(x.numel() == 0 for x in run(op, args, impl))


@each_op
def test_compiles_whole(op: Op) -> None:
    # aot_eager: inductor would spend its time in the C++ compiler.
    compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager")
    args = op.make(2, 9, 3)
    for x, y in zip(run(op._replace(function=compiled), args, "triton"), run(op, args, "triton"), strict=True):
        assert torch.equal(x, y)


OPCHECK: dict[str, Callable[[Tensor, Tensor], tuple[Any, ...]]] = {
    "nearest_neighbor": lambda x, y: (x.requires_grad_(), y.requires_grad_()),
    "chamfer_distance": lambda x, y: (x.requires_grad_(), y.requires_grad_()),
    "nearest_neighbor_bwd": lambda x, y: (x[..., 0], x, y, randint(4, 2, 3, seed=2)),
    "chamfer_distance_bwd": lambda x, y: (x[:, 0, 0], x, y, randint(14, 14, seed=2)),
    "ball_query": lambda x, y: (x, y, 1.0, 2),
    "three_nn": lambda x, y: (x, y),
}


@pytest.mark.parametrize("name", OPCHECK)
def test_opcheck(name: str) -> None:
    op, args = getattr(torch.ops.lion_triton, name).default, OPCHECK[name](*clouds(2, 3, 4))
    if any(isinstance(a, Tensor) and a.requires_grad for a in args):
        torch.library.opcheck(op, args)
    else:  # never differentiated
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@each_op
@pytest.mark.parametrize("size", [1, 30, 250], ids=["one-row", "rows", "clouds"])
def test_reference_block_size_does_not_matter(op: Op, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    args = op.make(2, 9, 11)
    whole = op.function(*args, impl="reference")
    monkeypatch.setattr(_points, "block_size", lambda x: size)
    torch.testing.assert_close(op.function(*args, impl="reference"), whole, rtol=0, atol=0)


@both
def test_numbers_of_numpy(impl: Impl) -> None:
    x, y = clouds(2, 9, 11)
    k, radius = np.int64(4), np.float32(1.5)
    assert torch.equal(
        ball_query(x, y, cast(Any, radius), cast(Any, k), impl=impl), ball_query(x, y, 1.5, 4, impl=impl)
    )


@each_op
def test_unknown_impl(op: Op) -> None:
    with pytest.raises(ValueError, match="impl: expected"):
        op.function(*op.make(1, 4, 5), impl="cuda")


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
        (lambda: nearest_neighbor(cast(Any, [[0.0]]), Y), "x: expected a tensor, got list"),
        (lambda: group(X, cast(Any, [0])), "idx: expected int32 or int64, got list"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
