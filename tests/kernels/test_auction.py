from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lion_triton.kernels import auction_emd
from lion_triton.kernels._checks import Impl
from lion_triton.kernels.auction import _auction_assignment_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
both = pytest.mark.parametrize("impl", ["reference", "triton"])


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)


def naive(x: Tensor, y: Tensor, eps: float, iters: int) -> list[int]:
    """The auction of one cloud, bid by bid."""
    cost = torch.cdist(x.double(), y.double()).tolist()
    N = len(cost)
    price, owner, partner = [0.0] * N, [-1] * N, [-1] * N
    for i in range(iters):
        bids: dict[int, tuple[float, int]] = {}
        for k in range(N):
            if partner[k] < 0:
                value = [-cost[k][l] - price[l] for l in range(N)]
                choice = value.index(max(value))
                others = [v for l, v in enumerate(value) if l != choice]
                bid = price[choice] + value[choice] - max(others, default=-float("inf")) + eps
                if i == iters - 1:
                    partner[k] = choice
                elif choice not in bids or bid > bids[choice][0]:
                    bids[choice] = bid, k
        for choice, (bid, k) in bids.items():
            if owner[choice] >= 0:
                partner[owner[choice]] = -1
            price[choice], owner[choice], partner[k] = bid, k, choice
    return partner


@pytest.mark.parametrize(
    ("B", "N", "iters"), [(1, 1, 3), (2, 7, 40), (1, 13, 1), (1, 13, 2), (2, 19, 12)], ids=lambda v: str(v)
)
@both
def test_against_bid_by_bid(B: int, N: int, iters: int, impl: Impl) -> None:
    x, y = rand(B, 3, N, seed=0).mT.requires_grad_(), rand(B, N, 3, seed=1).requires_grad_()
    sqdist, assignment = auction_emd(x, y, 0.01, iters, impl=impl)
    assert sqdist.dtype == torch.float32 and assignment.dtype == torch.int32
    assert assignment.tolist() == [naive(a, b, 0.01, iters) for a, b in zip(x.cpu(), y.cpu(), strict=True)]
    a, b = (t.detach().cpu().double().requires_grad_() for t in (x, y))
    expected = (a - b.take_along_dim(assignment.cpu().long()[..., None], 1)).square().sum(-1)
    torch.testing.assert_close(sqdist.detach().cpu().double(), expected.detach(), rtol=1e-5, atol=1e-7)
    cotangent = rand(B, N, seed=2)
    sqdist.backward(cotangent)
    expected.backward(cotangent.cpu().double())
    for actual, value in ((x.grad, a.grad), (y.grad, b.grad)):
        assert actual is not None and value is not None
        torch.testing.assert_close(actual.cpu().double(), value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("eps", [0.05, 0.005])
def test_is_as_near_to_the_exact_assignment_as_it_must_be(eps: float) -> None:
    x, y = rand(2, 150, 3, seed=3), rand(2, 150, 3, seed=4)
    _, assignment = auction_emd(x, y, eps, 5000, impl="reference")
    for a, b, partner in zip(x.cpu().double(), y.cpu().double(), assignment.cpu().long(), strict=True):
        cost = torch.cdist(a, b)
        rows, columns = linear_sum_assignment(cost.numpy())
        assert partner.sort().values.tolist() == list(range(150))
        gap = (cost[torch.arange(150), partner].sum() - cost[rows, columns].sum()).item() / 150
        assert 0 <= gap <= eps


def test_equal_clouds_and_equal_points() -> None:
    x = rand(1, 9, 3, seed=5)
    assert auction_emd(x, x, 0.01, 50, impl="triton")[1].tolist() == [list(range(9))]
    same = torch.zeros(1, 5, 3, device=DEVICE)
    for impl in ("reference", "triton"):
        assert sorted(auction_emd(same, same, 0.01, 50, impl=impl)[1][0].tolist()) == list(range(5))


def test_the_last_round_leaves_nobody_alone() -> None:
    """All want the same point, in one round only."""
    y = torch.tensor([[[0.0, 0, 0], [9, 0, 0], [9, 9, 0]]], device=DEVICE)
    for impl in ("reference", "triton"):
        assert auction_emd(y[:, :1].repeat(1, 3, 1), y, 0.01, 1, impl=impl)[1].tolist() == [[0, 0, 0]]


def test_twice_the_same_bits_and_compile() -> None:
    x, y = rand(1, 9, 3, seed=6).requires_grad_(), rand(1, 9, 3, seed=7)
    compiled = torch.compile(
        lambda x, y: auction_emd(x, y, 0.01, 9, impl="triton"), fullgraph=True, backend="aot_eager"
    )
    runs = [auction_emd(x, y, 0.01, 9, impl="triton") for _ in range(2)] + [compiled(x, y)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    torch.library.opcheck(_auction_assignment_op.overload, (x.detach(), y, 0.01, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((rand(1, 4, 3, seed=0), rand(1, 5, 3, seed=0), 0.01, 5), r"y: expected as many points as x \(4\), got 5"),
        ((rand(1, 4, 3, seed=0), rand(1, 4, 3, seed=0), 0, 5), "eps: expected a number > 0, got 0"),
        ((rand(1, 4, 3, seed=0), rand(1, 4, 3, seed=0), 0.01, 0), "iters: expected an integer >= 1, got 0"),
        ((rand(1, 4, 2, seed=0), rand(1, 4, 3, seed=0), 0.01, 5), r"x: expected shape \(B, N, 3\)"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        auction_emd(*arguments)
