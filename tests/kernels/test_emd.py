from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from lion_triton.kernels import emd
from lion_triton.kernels._checks import Impl
from lion_triton.kernels.emd import approx_emd, approx_emd_reference, exact_emd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GOLDEN = np.load(Path(__file__).parents[1] / "data" / "lion_metrics.npz")
BOTH = pytest.mark.parametrize("impl", ["reference", "triton"])


def rand(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(DEVICE)


def naive_match(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The approximate match, point by point."""
    N, M = len(x), len(y)
    left, right = np.full(N, max(1.0, M / N)), np.full(M, max(1.0, N / M))
    match = np.zeros((N, M))
    for level in [-(4.0**j) for j in range(7, -2, -1)] + [0.0]:
        kernel = np.exp(level * ((x[:, None] - y) ** 2).sum(2))
        offer = np.array([left[k] / (1e-9 + sum(kernel[k, l] * right[l] for l in range(M))) for k in range(N)])
        taken = np.zeros(M)
        for l in range(M):
            arriving = right[l] * sum(kernel[k, l] * offer[k] for k in range(N))
            taken[l] = right[l] * min(right[l] / (arriving + 1e-9), 1)
            right[l] = max(right[l] - arriving, 0)
        flow = offer[:, None] * kernel * taken
        left = np.maximum(left - flow.sum(1), 0)
        match += flow
    return match


class TestApproxEMD:
    @BOTH
    @pytest.mark.parametrize(("B", "N", "M"), [(2, 7, 7), (1, 1, 1), (1, 12, 4), (1, 5, 9)])
    def test_values_and_gradients(self, B: int, N: int, M: int, impl: Impl) -> None:
        x, y = rand(B, N, 3, seed=0).requires_grad_(), rand(B, M, 3, seed=1).requires_grad_()
        clouds = zip(x.detach().cpu().numpy(), y.detach().cpu().numpy(), strict=True)
        match = torch.from_numpy(np.stack([naive_match(p, q) for p, q in clouds])).to(DEVICE)
        expected = (match * (x[:, :, None] - y[:, None]).square().sum(-1)).sum((1, 2)) / N
        cost = approx_emd(x, y, impl=impl)
        rtol, atol = (1e-9, 1e-12) if impl == "reference" else (1e-5, 1e-6)  # the kernels compute in float32
        torch.testing.assert_close(cost, expected, rtol=rtol, atol=0)

        cotangent = rand(B, seed=2)
        grads = torch.autograd.grad(cost, (x, y), cotangent)
        expected_grads = torch.autograd.grad(expected, (x, y), cotangent)
        torch.testing.assert_close(grads, expected_grads, rtol=rtol, atol=atol)

    def test_gradcheck(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """At a fixed match, which is what the gradient is of."""
        x, y = (rand(2, n, 3, seed=n).requires_grad_() for n in (7, 5))
        match = emd._approx_match(emd.squared_distances(x.detach(), y.detach()))
        monkeypatch.setattr(emd, "_approx_match", lambda _: match)
        torch.autograd.gradcheck(approx_emd_reference, (x, y))

    @pytest.mark.parametrize(("first", "second"), [("refs", "samples"), ("refs", "refs"), ("samples", "samples")])
    def test_golden(self, first: str, second: str) -> None:
        short = {"refs": "ref", "samples": "sample"}
        expected = torch.from_numpy(GOLDEN[f"emd_approx_{short[first]}_{short[second]}"])[:5].to(DEVICE)
        x, y = (torch.from_numpy(GOLDEN[name]).to(DEVICE) for name in (first, second))
        x, y = x[:5].repeat_interleave(len(y), 0), y.repeat(5, 1, 1)
        double = approx_emd_reference(x.double(), y.double()).view_as(expected)
        torch.testing.assert_close(double, expected, rtol=1e-10, atol=0)
        single = approx_emd(x, y)
        assert single.dtype == torch.float32
        # atol: of a cloud to itself the cost is about 1e-6, and rounding shows (1e-9 by the kernels).
        torch.testing.assert_close(
            single.double().view_as(expected), expected, rtol=1e-4, atol=1e-9 if DEVICE == "cpu" else 1e-8
        )

    def test_all_mass_is_matched(self) -> None:
        x, y = rand(1, 40, 3, seed=0), rand(1, 40, 3, seed=1)
        match = emd._approx_match(emd.squared_distances(x, y))
        ones = torch.ones(1, 40, dtype=torch.float64, device=DEVICE)
        torch.testing.assert_close(match.sum(1), ones, rtol=1e-4, atol=0)
        torch.testing.assert_close(match.sum(2), ones, rtol=1e-4, atol=0)

    @BOTH
    def test_coincident_points(self, impl: Impl) -> None:
        x = torch.ones(1, 6, 3, device=DEVICE, requires_grad=True)
        cost = approx_emd(x, torch.ones(1, 6, 3, device=DEVICE), impl=impl)
        (grad,) = torch.autograd.grad(cost.sum(), x)
        assert cost.item() == 0
        assert torch.equal(grad, torch.zeros_like(x))

    @BOTH
    def test_autocast_does_not_matter(self, impl: Impl) -> None:
        x, y = rand(1, 3, 3, seed=0).float(), rand(1, 3, 3, seed=1).float()
        with torch.autocast(DEVICE, torch.bfloat16):
            inside = approx_emd(x, y, impl=impl)
        assert torch.equal(inside, approx_emd(x, y, impl=impl))

    @BOTH
    def test_far_apart_clouds_match_at_the_last_level(self, impl: Impl) -> None:
        x = torch.zeros(1, 4, 3, device=DEVICE)
        torch.testing.assert_close(approx_emd(x, x + 100, impl=impl), torch.full((1,), 3e4, device=DEVICE))

    def test_batching_and_strides_do_not_matter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, y = rand(5, 20, 3, seed=0), rand(5, 20, 3, seed=1)
        expected = approx_emd_reference(x, y)
        torch.testing.assert_close(approx_emd_reference(x.mT.contiguous().mT, y), expected, rtol=1e-12, atol=0)
        monkeypatch.setattr(emd, "block_size", lambda x: 2 * 20 * 20)
        torch.testing.assert_close(approx_emd_reference(x, y), expected, rtol=1e-12, atol=0)


def make_clouds(B: int, N: int, M: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return rand(B, N, 3, seed=0).to(dtype), rand(B, M, 3, seed=1).to(dtype)


CLOUD = rand(1, 9, 3, seed=0).float()
# Blocks are 64 points, tiles are 64 and turns of the loop 4.
CASES = {
    "one-point": make_clouds(2, 1, 1),
    "one-x": make_clouds(2, 1, 7),
    "one-y": make_clouds(2, 7, 1),
    "prime": make_clouds(2, 7, 5),
    "past-a-block-of-x": make_clouds(1, 67, 2),
    "past-a-block-of-y": make_clouds(1, 2, 67),
    "coincident": (CLOUD[:, :3].repeat(1, 2, 1), CLOUD[:, 1:3].repeat(1, 2, 1)),
    "itself": (CLOUD, CLOUD),
    "itself-permuted": (CLOUD, CLOUD.flip(1)),
    "itself-with-duplicates": (CLOUD[:, :5], CLOUD[:, :5].repeat(1, 2, 1)),
    "a-little-apart": (4 * CLOUD[:, :4], 4 * CLOUD[:, 4:] + 3),
    "far-apart": (CLOUD[:, :5], CLOUD[:, 4:] + 100),
    "far-from-the-origin": (CLOUD[:, :5] + 10, CLOUD[:, 3:] + 10),
    "two-scales": (CLOUD[:, :4], torch.cat([1e-3 * CLOUD[:, 2:6], 30 * CLOUD[:, 4:7]], 1)),
}


def run(x: Tensor, y: Tensor, impl: Impl) -> list[Tensor]:
    """The cost, then the gradients for one random cotangent."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    cost = approx_emd(x, y, impl=impl)
    return [cost.detach(), *torch.autograd.grad(cost, (x, y), rand(len(x), seed=2).to(cost.dtype))]


def assert_as_good_as_reference(x: Tensor, y: Tensor) -> None:
    """Cost and gradients at most twice as far from float64 as the reference of the same dtype."""
    ours, reference, exact = run(x, y, "triton"), run(x, y, "reference"), run(x.double(), y.double(), "reference")
    for p, q, r in zip(ours, reference, exact, strict=True):
        assert p.shape == r.shape
        assert p.dtype == q.dtype
        # What is left to match is a difference, which amplifies rounding: over many clouds the kernels err 1.0 to 1.5
        # times as much as the reference, on one either may be right by chance. Where the exact cost is 0, a
        # remainder of 1e-7 of the mass shows.
        assert (p - r).abs().max() <= 2 * (q - r).abs().max() + 5e-6 * r.abs().max() + 1e-9


class TestKernels:
    @pytest.mark.parametrize("case", CASES)
    def test_as_good_as_reference(self, case: str) -> None:
        assert_as_good_as_reference(*CASES[case])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_dtypes(self, dtype: torch.dtype) -> None:
        x, y = make_clouds(1, 5, 4, dtype)
        for p, q in zip(run(x, y, "triton"), run(x, y, "reference"), strict=True):
            assert p.dtype == q.dtype
            rtol = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(p.dtype, 1e-5)
            torch.testing.assert_close(p, q, rtol=rtol, atol=1e-5)

    def test_non_contiguous(self) -> None:
        x, y = make_clouds(1, 5, 3)
        ours = run(x.mT.contiguous().mT, y.repeat(1, 2, 2)[:, ::2, :3].flip(1), "triton")
        expected = run(x, y.repeat(1, 2, 1)[:, ::2].flip(1), "triton")
        assert all(torch.equal(p, q) for p, q in zip(ours, expected, strict=True))

    def test_neither_blocks_nor_runs_matter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, y = make_clouds(1, 66, 1)
        small, again = run(x, y, "triton"), run(x, y, "triton")
        monkeypatch.setattr(emd, "_FEW_POINTS", 0)
        large = run(x, y, "triton")
        without_gradient = approx_emd(x, y, impl="triton")
        for p, *others in zip(small, again, large, strict=True):
            assert all(torch.equal(p, q) for q in others)
        assert torch.equal(small[0], without_gradient)

    @pytest.mark.parametrize("wanted", ["x", "y"])
    def test_one_gradient(self, wanted: str) -> None:
        x, y = make_clouds(1, 3, 2)
        _, dx, dy = run(x, y, "triton")
        leaf, other, expected = (x, y, dx) if wanted == "x" else (y, x, dy)
        leaf.requires_grad_()
        approx_emd(x, y, impl="triton").backward(rand(1, seed=2).float())
        torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=0)
        assert other.grad is None

    def test_no_clouds(self) -> None:
        x, y = make_clouds(2, 5, 6)
        cost, dx, dy = run(x[:0], y[:0], "triton")
        assert cost.shape == (0,)
        assert dx.shape == (0, 5, 3)
        assert dy.shape == (0, 6, 3)

    def test_compiles_whole(self) -> None:
        x, y = make_clouds(2, 2, 3)
        x.requires_grad_()
        # aot_eager: inductor would spend its time in the C++ compiler.
        compiled = torch.compile(approx_emd, fullgraph=True, backend="aot_eager")
        costs = [op(x, y, impl="triton") for op in (compiled, approx_emd)]
        assert torch.equal(*costs)
        assert torch.equal(*(torch.autograd.grad(cost.square().sum(), x)[0] for cost in costs))

    def test_opcheck(self) -> None:
        x, y = make_clouds(2, 1, 2)
        for op in (torch.ops.lion_triton.approx_emd, torch.ops.lion_triton.approx_emd_reference):
            torch.library.opcheck(op.default, (x.requires_grad_(), y, True, False))


class TestExactEMD:
    @pytest.mark.parametrize("N", [1, 2, 6])
    def test_values_and_gradients(self, N: int) -> None:
        x, y = rand(2, N, 3, seed=0).requires_grad_(), rand(2, N, 3, seed=1).requires_grad_()
        cost = exact_emd(x, y)
        orders = [list(order) for order in permutations(range(N))]
        costs = torch.stack([(x - y[:, order]).square().sum(-1).mean(-1) for order in orders])
        expected = costs.min(0).values
        torch.testing.assert_close(cost, expected, rtol=1e-12, atol=0)
        cotangent = rand(2, seed=2)
        torch.testing.assert_close(
            torch.autograd.grad(cost, (x, y), cotangent),
            torch.autograd.grad(expected, (x, y), cotangent),
            rtol=1e-12,
            atol=1e-15,
        )

    def test_gradcheck(self) -> None:
        x, y = rand(2, 5, 3, seed=0).requires_grad_(), rand(2, 5, 3, seed=1).requires_grad_()
        torch.autograd.gradcheck(exact_emd, (x, y))

    def test_permuted_cloud_is_at_distance_zero(self) -> None:
        x = rand(2, 50, 3, seed=0).float()
        cost = exact_emd(x, x.flip(1))
        assert cost.dtype == torch.float32
        assert cost.tolist() == [0, 0]

    def test_squares_decide_the_assignment(self) -> None:
        x = torch.tensor([[[0, 0.5, 0], [1, 0, 0]]], device=DEVICE)
        y = torch.tensor([[[1.0, 0, 0], [2, 0.5, 0]]], device=DEVICE)
        # Straight: distances 1.118 and 1.118. Crossed: 2 and 0, a smaller sum, but a larger one of squares.
        torch.testing.assert_close(exact_emd(x, y), torch.tensor([1.25], device=DEVICE))

    def test_never_above_the_approximate_one(self) -> None:
        x, y = rand(3, 100, 3, seed=0), rand(3, 100, 3, seed=1)
        assert (exact_emd(x, y) < approx_emd(x, y)).all()


X, Y = torch.zeros(2, 4, 3), torch.zeros(2, 5, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: approx_emd(X[0], Y), r"x: expected shape \(B, N, 3\) with N >= 1, got \(4, 3\)"),
        (lambda: approx_emd(X.int(), Y), "x: expected float32"),
        (lambda: approx_emd(X, Y[:1]), r"y: expected the batch size of x \(2\), got 1"),
        (lambda: approx_emd(X, Y, impl=cast(Any, "cuda")), "impl: expected"),
        (lambda: exact_emd(X, Y), r"y: expected as many points as x \(4\), got 5"),
        (lambda: exact_emd(X, X.long()), "y: expected float32"),
        (
            lambda: exact_emd(X, X * torch.inf),
            "y: expected finite coordinates, got NaN or infinity in cloud 0 \\(2 clouds",
        ),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_second_derivative_is_refused() -> None:
    x, y = (torch.rand(1, 3, 3, device=DEVICE, requires_grad=True) for _ in range(2))
    (grad,) = torch.autograd.grad(approx_emd(x, y, impl="triton").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.square().sum(), x)
