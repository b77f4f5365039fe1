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
from lion_triton.kernels.emd import approx_emd, exact_emd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GOLDEN = np.load(Path(__file__).parents[1] / "data" / "lion_metrics.npz")
sizes = pytest.mark.parametrize(("B", "N", "M"), [(2, 7, 7), (1, 1, 1), (2, 12, 4), (2, 5, 13), (3, 64, 64)])


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
    @sizes
    def test_values_and_gradients(self, B: int, N: int, M: int) -> None:
        x, y = rand(B, N, 3, seed=0).requires_grad_(), rand(B, M, 3, seed=1).requires_grad_()
        clouds = zip(x.detach().cpu().numpy(), y.detach().cpu().numpy(), strict=True)
        match = torch.from_numpy(np.stack([naive_match(p, q) for p, q in clouds])).to(DEVICE)
        expected = (match * (x[:, :, None] - y[:, None]).square().sum(-1)).sum((1, 2)) / N
        cost = approx_emd(x, y)
        torch.testing.assert_close(cost, expected, rtol=1e-9, atol=0)

        cotangent = rand(B, seed=2)
        grads = torch.autograd.grad(cost, (x, y), cotangent)
        expected_grads = torch.autograd.grad(expected, (x, y), cotangent)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize(("first", "second"), [("refs", "samples"), ("refs", "refs"), ("samples", "samples")])
    def test_golden(self, first: str, second: str) -> None:
        short = {"refs": "ref", "samples": "sample"}
        expected = torch.from_numpy(GOLDEN[f"emd_approx_{short[first]}_{short[second]}"])[:5].to(DEVICE)
        x, y = (torch.from_numpy(GOLDEN[name]).to(DEVICE) for name in (first, second))
        x, y = x[:5].repeat_interleave(len(y), 0), y.repeat(5, 1, 1)
        double = approx_emd(x.double(), y.double()).view_as(expected)
        torch.testing.assert_close(double, expected, rtol=1e-10, atol=0)
        single = approx_emd(x, y)
        assert single.dtype == torch.float32
        # atol: of a cloud to itself the cost is about 1e-6, and rounding shows.
        torch.testing.assert_close(single.double().view_as(expected), expected, rtol=1e-4, atol=1e-9)

    def test_all_mass_is_matched(self) -> None:
        x, y = rand(1, 40, 3, seed=0), rand(1, 40, 3, seed=1)
        match = emd._approx_match(emd.squared_distances(x, y))
        ones = torch.ones(1, 40, dtype=torch.float64, device=DEVICE)
        torch.testing.assert_close(match.sum(1), ones, rtol=1e-4, atol=0)
        torch.testing.assert_close(match.sum(2), ones, rtol=1e-4, atol=0)

    def test_coincident_points(self) -> None:
        x = torch.ones(1, 6, 3, device=DEVICE, requires_grad=True)
        cost = approx_emd(x, torch.ones(1, 6, 3, device=DEVICE))
        (grad,) = torch.autograd.grad(cost.sum(), x)
        assert cost.item() == 0
        assert torch.equal(grad, torch.zeros_like(x))

    def test_autocast_does_not_matter(self) -> None:
        x, y = rand(2, 30, 3, seed=0).float(), rand(2, 30, 3, seed=1).float()
        with torch.autocast(DEVICE, torch.bfloat16):
            inside = approx_emd(x, y)
        assert torch.equal(inside, approx_emd(x, y))

    def test_far_apart_clouds_match_at_the_last_level(self) -> None:
        x = torch.zeros(1, 4, 3, device=DEVICE)
        torch.testing.assert_close(approx_emd(x, x + 100), torch.full((1,), 3e4, device=DEVICE))

    def test_batching_and_strides_do_not_matter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, y = rand(5, 20, 3, seed=0), rand(5, 20, 3, seed=1)
        expected = approx_emd(x, y)
        torch.testing.assert_close(approx_emd(x.mT.contiguous().mT, y), expected, rtol=1e-12, atol=0)
        monkeypatch.setattr(emd, "block_size", lambda x: 2 * 20 * 20)
        torch.testing.assert_close(approx_emd(x, y), expected, rtol=1e-12, atol=0)

    def test_no_triton_kernel_yet(self) -> None:
        with pytest.raises(NotImplementedError, match="no Triton kernel yet"):
            approx_emd(rand(1, 4, 3, seed=0), rand(1, 4, 3, seed=0), impl="triton")


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
        (lambda: exact_emd(X, X * torch.inf), "y: expected finite coordinates, got NaN or infinity in 2 of 2 clouds"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
