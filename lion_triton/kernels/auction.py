"""Earth mover's distance by an auction: every point of x bids for the point of y that suits it best.

    Prices p_l start at 0. In each round every x_k that has no y_l yet
        takes  v_kl = -|x_k - y_l| - p_l,   its best l, and the second best value w
        bids   p_l + (v_kl - w) + eps
    and every y_l goes to the highest bid for it (of equal ones to the lowest k), which becomes its price; whoever had
    it is without one again. In the last round all that are left get the y_l that they would bid for, whoever has it.
    sqdist_k = |x_k - y_a(k)|^2
    backward, at fixed assignment: dx_k = 2 (x_k - y_a(k)) dsqdist_k,   dy_a(k) = -2 (x_k - y_a(k)) dsqdist_k

An auction that ends before the last round gives a one-to-one assignment whose sum of distances (not squared) is above
the least by N eps at most. The smaller eps, the better and the more rounds it takes.

The kernels: a program per point without a partner compares all y, a block at a time, and enters its bid by an atomic
maximum of integers (bid and point in one number: the same whatever the order); then a program per block of points hands
out. Two launches a round, and programs of points that have a partner end at once, so a round costs what is left to do:
12 operations and 16 bytes (from the cache) for each point left and point of y. Nothing waits for the device.

Legend: B clouds of N points. Distances and prices are float32 (in the reference float64 where the input is), indices
int32. Source: Bertsekas, "The auction algorithm", 1988; as used by Liu et al., "Morphing and sampling network for dense
point cloud completion", AAAI 2020.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from lion_triton.kernels._checks import Impl, check_clouds, check_integer, upcast, use_triton
from lion_triton.kernels._op import op
from lion_triton.kernels._triton import cdiv, launch, tl, triton
from lion_triton.kernels.gather import group

_BLOCK = 256  # points of y at a time, and points of x per program that hands out


def auction_assignment_reference(
    x: Float[Tensor, "B N 3"], y: Float[Tensor, "B N 3"], eps: float, iters: int
) -> Int32[Tensor, "B N"]:
    """Plain PyTorch form of the assignment of :func:`auction_emd`."""
    found = [_auction(a, b, eps, iters) for a, b in zip(upcast(x.detach()), upcast(y.detach()), strict=True)]
    return torch.stack(found) if found else torch.empty(x.shape[:2], dtype=torch.int32, device=x.device)


def _auction(x: Float[Tensor, "N 3"], y: Float[Tensor, "N 3"], eps: float, iters: int) -> Int32[Tensor, " N"]:
    N = len(x)
    partner, owner = (torch.full((N,), -1, dtype=torch.int64, device=x.device) for _ in range(2))
    price = x.new_zeros(N)
    left = torch.arange(N, device=x.device)
    for i in range(iters):
        value = -(sum((a[left, None] - b).square() for a, b in zip(x.T, y.T, strict=True)) ** 0.5) - price
        best, choice = value.max(1)  # the first of equal ones
        if i == iters - 1:
            partner[left] = choice
            break
        second = value.scatter_(1, choice[:, None], -torch.inf).amax(1)
        bid = price[choice] + (best - second + eps)
        # The highest bid for each point of y, by sorting: the point, then the bid downwards, stable.
        order = bid.argsort(descending=True, stable=True)
        order = order[choice[order].argsort(stable=True)]
        wanted = choice[order]
        wins = torch.ones_like(wanted, dtype=torch.bool)
        wins[1:] = wanted[1:] != wanted[:-1]
        winner, taken = left[order[wins]], wanted[wins]
        price[taken] = bid[order[wins]]
        before = owner[taken]
        partner[before[before >= 0]] = -1
        owner[taken], partner[winner] = winner, taken
        left = (partner < 0).nonzero().flatten()
        if not len(left):
            break
    return partner.int()


@triton.jit
def _bid_kernel(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, partner_ptr, price_ptr, choice_ptr, highest_ptr, eps, N, BLOCK: tl.constexpr
):
    """The bid of one point of x that has no partner. ``highest`` holds a bid's bits, then its point, counted down."""
    point = tl.program_id(0).to(tl.int64)
    if tl.load(partner_ptr + point) < 0:
        begin = point // N * N
        x0 = tl.load(x_ptr + 3 * point)
        x1 = tl.load(x_ptr + 3 * point + 1)
        x2 = tl.load(x_ptr + 3 * point + 2)
        y_ptr += 3 * begin
        price_ptr += begin
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        second = best
        choice = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, N, BLOCK):
            l = first + tl.arange(0, BLOCK)
            live = l < N
            d0 = tl.load(y_ptr + 3 * l, mask=live, other=0.0) - x0
            d1 = tl.load(y_ptr + 3 * l + 1, mask=live, other=0.0) - x1
            d2 = tl.load(y_ptr + 3 * l + 2, mask=live, other=0.0) - x2
            price = tl.load(price_ptr + l, mask=live, other=float("inf"))
            value = -tl.sqrt_rn(d0 * d0 + d1 * d1 + d2 * d2) - price
            better = value > best
            second = tl.maximum(second, tl.minimum(value, best))
            choice = tl.where(better, l, choice)
            best = tl.where(better, value, best)
        most = tl.max(best, 0)
        chosen = tl.min(tl.where(best == most, choice, N - 1), 0)  # of equal ones the first
        second = tl.max(tl.where((best == most) & (choice == chosen), second, best), 0)
        bid = tl.load(price_ptr + chosen) + (most - second + eps)
        tl.store(choice_ptr + point, chosen)
        key = (bid.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (0x7FFFFFFF - (point - begin))
        tl.atomic_max(highest_ptr + begin + chosen, key, sem="relaxed")


@triton.jit
def _hand_out_kernel(  # type: ignore[no-untyped-def]
    partner_ptr, owner_ptr, price_ptr, choice_ptr, highest_ptr, total, N, LAST: tl.constexpr, BLOCK: tl.constexpr
):
    """Who loses its partner here may look as if it had bid: its old choice went to another, so it gets nothing."""
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = k < total
    begin = k // N * N
    waits = live & (tl.load(partner_ptr + k, mask=live, other=0) < 0)
    choice = tl.load(choice_ptr + k, mask=waits, other=0)
    if LAST:
        tl.store(partner_ptr + k, choice, mask=waits)
    else:
        wanted = begin + choice
        key = tl.load(highest_ptr + wanted, mask=waits, other=-1)
        wins = waits & (key >= 0) & ((key & 0xFFFFFFFF) == 0x7FFFFFFF - (k - begin))
        before = tl.load(owner_ptr + wanted, mask=wins, other=-1)
        tl.store(partner_ptr + begin + before, -1, mask=wins & (before >= 0))
        tl.store(owner_ptr + wanted, (k - begin).to(tl.int32), mask=wins)
        tl.store(partner_ptr + k, choice, mask=wins)
        tl.store(price_ptr + wanted, (key >> 32).to(tl.int32).to(tl.float32, bitcast=True), mask=wins)
        tl.store(highest_ptr + wanted, -1, mask=wins)


@op(fake=lambda x, y, eps, iters: x.new_empty(x.shape[:2], dtype=torch.int32))
def _auction_assignment_op(x: Tensor, y: Tensor, eps: float, iters: int) -> Tensor:
    B, N = x.shape[:2]
    x, y = x.float().contiguous(), y.float().contiguous()
    partner = torch.full((B, N), -1, dtype=torch.int32, device=x.device)
    owner, choice = torch.full_like(partner, -1), torch.zeros_like(partner)
    price = x.new_zeros(B, N)
    highest = torch.full((B, N), -1, dtype=torch.int64, device=x.device)
    for i in range(iters):
        launch(_bid_kernel, (B * N,), x, y, partner, price, choice, highest, eps, N, BLOCK=_BLOCK)
        state = partner, owner, price, choice, highest
        launch(_hand_out_kernel, (cdiv(B * N, _BLOCK),), *state, B * N, N, LAST=i == iters - 1, BLOCK=_BLOCK)
    return partner


def auction_emd(
    x: Float[Tensor, "B N 3"], y: Float[Tensor, "B N 3"], eps: float, iters: int, *, impl: Impl = "auto"
) -> tuple[Float[Tensor, "B N"], Int32[Tensor, "B N"]]:
    """Squared distance of each point of x to the point of y that an auction assigns to it, and that point's index.

    x, y: (B, N, 3), of one dtype and size. eps: > 0, the least step of a bid, in units of the coordinates: 0.002 to
    0.05 for clouds as large as 1. iters: >= 1 rounds; with too few some points of y are assigned twice, others never.
    Returns (B, N) float32 (float64 for float64) and (B, N) int32. The distances are differentiable in x and y (once,
    by Triton) at fixed assignment. Deterministic, backward too. Triton computes float64 input in float32.
    Source: module docstring. ValueError: shapes, dtypes or devices that do not fit; eps <= 0; iters < 1.
    """
    check_clouds(x=x, y=y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"y: expected as many points as x ({x.shape[1]}), got {y.shape[1]}")
    if not isinstance(eps, Real) or not 0 < eps < math.inf:
        raise ValueError(f"eps: expected a number > 0, got {eps!r}")
    iters = check_integer("iters", iters, least=1)
    if use_triton(impl, x):
        assignment = _auction_assignment_op(x.detach(), y.detach(), float(eps), iters)
    else:
        assignment = auction_assignment_reference(x, y, float(eps), iters)
    # As an op of its own, the assignment is a constant to autograd.
    partners = group(upcast(y), assignment[..., None], impl=impl).squeeze(2)
    return (upcast(x) - partners).square().sum(-1), assignment
