"""Earth mover's distance between point clouds: approximate (soft matching by annealing) and exact (assignment).

approx_emd    Every x_k holds the mass L_k = max(1, M/N), every y_l takes R_l = max(1, N/M), d_kl = |x_k - y_l|^2.
    For level = -4^7, -4^6, ..., -4^-1, 0, with e_kl = exp(level d_kl):
        l_k = L_k / (sum_l e_kl R_l + 1e-9)                 offer of x_k per unit of kernel
        s_l = R_l sum_k e_kl l_k                            arrives at y_l, which may be more than it takes
        r_l = R_l min(R_l / (s_l + 1e-9), 1)
        match_kl += l_k e_kl r_l
        L_k = max(L_k - sum_l l_k e_kl r_l, 0),   R_l = max(R_l - s_l, 0)
    cost = 1/N sum_kl match_kl d_kl
exact_emd     min over permutations p of 1/N sum_k |x_k - y_p(k)|^2

Backward, of both at fixed match (the published convention: the match is a constant):
    dx_k = 2/N sum_l match_kl (x_k - y_l) dcost,   dy_l = -2/N sum_k match_kl (x_k - y_l) dcost

Costs are means of SQUARED distances; the two differ, and both differ from the square root's mean: say which.
The approximate cost is not symmetric (x offers, y takes): exchanging the clouds moves it by several per cent, and
of a cloud to itself it is small but not 0.

The kernels go through all pairs of points in 21 launches and keep neither match nor distances: a pass over
the rows for the first offers; then for each level a pass over the columns (what arrives and is taken, what is still
wanted) and one over the rows, which finishes the level (what is left, the cost) and makes the offers of the next.
There e_kl is the fourth root of this level's, so one exponential serves both. A program holds a block of points in
registers and walks the other cloud one point at a time; sums are added tile by tile, in a fixed order. The gradients
are sums of the same terms at the same distances, so they are made on the way (where asked for), not by a backward
pass, which would take every exponential again; the backward only scales them.
Operations per pair of points (sm_90): 10 instructions in a column pass and 15 in a row pass, 250 in all with 19
exponentials; with its gradient 5 and 3 more in a pass. Bytes: a pass reads the other cloud once per block and a few
floats per point; scratch is 4 (3 N + 2 M) bytes per pair of clouds, with the gradients 12 N and 12 M more.
Rounding: exp(a) is exp2(a log2(e)), and the fourth power makes errors about half as large again as the reference's
(mean over clouds; what is left to match is a difference of nearly equal sums, so single clouds may err several times
as much: up to 2e-5 of the cost was seen, of 17 points). The reference floors e_kl at exp(-80), here it may vanish:
neither moves a digit.

Legend: B clouds, N points of x, M points of y, P pairs of clouds. Float32 (float64 where the input is, but float32
inside the kernels).
Source: Fan, Su and Guibas, "A Point Set Generation Network for 3D Object Reconstruction from a Single Image",
CVPR 2017 (approximate matching).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor

from lion_triton.kernels._checks import Impl, check_clouds, check_finite, sums_dtype, upcast, use_triton
from lion_triton.kernels._op import Gradients, Needs, gradient, op
from lion_triton.kernels._points import block_size, load_points, squared_distances
from lion_triton.kernels._triton import cdiv, launch, tl, triton
from lion_triton.kernels.gather import group_reference

_LEVELS = (*(-(4.0**j) for j in range(7, -2, -1)), 0.0)

# Points per program of one warp: 2 a thread where there are few points, else 8, or 4 with a gradient, whose sums take
# registers too. Then points of the other cloud per partial sum, and per turn of the loop: beyond 4 the code of a turn
# outgrows the instruction cache next to the cores. Chosen by machine code, not by timing.
_FEW_POINTS, _SMALL_BLOCK, _GRAD_BLOCK, _BLOCK = 1 << 17, 64, 128, 256
_TILE, _UNROLL = 64, 4


# References


def approx_emd_reference(x: Float[Tensor, "B N 3"], y: Float[Tensor, "B M 3"]) -> Float[Tensor, " B"]:
    """Plain PyTorch form of :func:`approx_emd`."""
    return _approx_emd_reference_op(upcast(x), upcast(y), *_needs(x, y))[0]


def _needs(x: Tensor, y: Tensor) -> tuple[bool, bool]:
    """Which clouds will ask for a gradient."""
    enabled = torch.is_grad_enabled()
    return enabled and x.requires_grad, enabled and y.requires_grad


def _empty_results(x: Tensor, y: Tensor, need_x: bool, need_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = sums_dtype(x)
    dx, dy = (c.new_empty(c.shape if need else 0, dtype=dtype) for c, need in ((x, need_x), (y, need_y)))
    return x.new_empty(x.shape[0], dtype=dtype), dx, dy


@op(fake=_empty_results)
def _approx_emd_reference_op(x: Tensor, y: Tensor, need_x: bool, need_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The costs, and with them their gradients, empty where not needed: to keep the match takes B N M floats."""
    (B, N, _), M = x.shape, y.shape[1]
    cost, dx, dy = _empty_results(x, y, need_x, need_y)
    clouds = max(1, block_size(x) // (N * M))
    for i in range(0, B, clouds):
        b = slice(i, i + clouds)
        sqdist = squared_distances(x[b], y[b])
        match = _approx_match(sqdist)
        cost[b] = sqdist.mul_(match).sum((1, 2)) / N
        for axis in range(3) if need_x or need_y else ():
            pull = torch.sub(x[b, :, None, axis], y[b, None, :, axis], out=sqdist).mul_(match)
            if need_x:
                dx[b, :, axis] = pull.sum(2) * (2 / N)
            if need_y:
                dy[b, :, axis] = pull.sum(1) * (-2 / N)
    return cost, dx, dy


def _approx_match(sqdist: Float[Tensor, "B N M"]) -> Float[Tensor, "B N M"]:
    B, N, M = sqdist.shape
    left = sqdist.new_full((B, N, 1), max(1.0, M / N))
    right = sqdist.new_full((B, 1, M), max(1.0, N / M))
    match, kernel, weighted = torch.zeros_like(sqdist), torch.empty_like(sqdist), torch.empty_like(sqdist)
    for level in _LEVELS:
        # exp2, as CPUs take it four times as fast as exp. 2^-115, exp(-80), moves no digit of anything, and nearer 0
        # they fall to denormal numbers (5 times slower).
        torch.mul(sqdist, level * math.log2(math.e), out=kernel).clamp_(min=-115).exp2_()
        # Sums, not matrix products: those TF32 and autocast would round.
        offer = left / (torch.mul(kernel, right, out=weighted).sum(2, keepdim=True) + 1e-9)
        arriving = right * kernel.mul_(offer).sum(1, keepdim=True)
        taken = right * (right / (arriving + 1e-9)).clamp(max=1)
        right = (right - arriving).clamp(min=0)
        flow = kernel.mul_(taken)
        left = (left - flow.sum(2, keepdim=True)).clamp(min=0)
        match += flow
    return match


# Kernels. One program makes one block of points of one pair of clouds.


@triton.jit
def _add(ptr, value, inside):  # type: ignore[no-untyped-def]
    tl.store(ptr, tl.load(ptr, mask=inside, other=0.0) + value, mask=inside)


@triton.jit(do_not_specialize=["first", "repeat", "count"])
def _match_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    left_ptr,
    right_ptr,
    offer_ptr,
    taken_ptr,
    cost_ptr,
    grad_ptr,
    N,
    M,
    first,
    repeat,
    count,
    scale,
    FINISH: tl.constexpr,
    START: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Finish a level with e_kl = exp2(scale d_kl)^FINISH, start one with exp2(scale d_kl)^START; either may be None."""
    blocks = tl.cdiv(N, BLOCK)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = k < N
    x0, x1, x2 = load_points(x_ptr, (first + pair) // repeat * N + k, mask=inside, other=0.0)
    y_ptr += (first + pair) % count * M * 3
    right_ptr += pair * M
    taken_ptr += pair * M
    zero = tl.zeros((BLOCK,), tl.float32)
    flow, cost, reach = zero, zero, zero
    g0, g1, g2 = zero, zero, zero
    for start in range(0, M, TILE):
        tile_flow, tile_cost, tile_reach = zero, zero, zero
        for l in tl.range(start, tl.minimum(start + TILE, M), loop_unroll_factor=UNROLL):
            d0 = x0 - tl.load(y_ptr + 3 * l)
            d1 = x1 - tl.load(y_ptr + 3 * l + 1)
            d2 = x2 - tl.load(y_ptr + 3 * l + 2)
            sqdist = d0 * d0 + d1 * d1 + d2 * d2
            e = tl.exp2(scale * sqdist)
            if FINISH is not None:
                match = tl.load(taken_ptr + l)
                if FINISH == 1:
                    match = match * e
                elif FINISH == 4:
                    square = e * e
                    match = match * (square * square)
                tile_flow += match
                tile_cost += match * sqdist
                if grad_ptr is not None:
                    g0 += match * d0
                    g1 += match * d1
                    g2 += match * d2
            if START is not None:
                wanted = tl.load(right_ptr + l)
                if START == 1:
                    wanted = wanted * e
                tile_reach += wanted
        flow += tile_flow
        cost += tile_cost
        reach += tile_reach
    row = pair * N + k
    left = tl.load(left_ptr + row, mask=inside, other=0.0)
    if FINISH is not None:
        offer = tl.load(offer_ptr + row, mask=inside, other=0.0)
        left = tl.maximum(left - offer * flow, 0.0)
        tl.store(left_ptr + row, left, mask=inside)
        _add(cost_ptr + row, offer * cost, inside)
        if grad_ptr is not None:
            grad_ptr += pair * 3 * N + k
            _add(grad_ptr, offer * g0, inside)
            _add(grad_ptr + N, offer * g1, inside)
            _add(grad_ptr + 2 * N, offer * g2, inside)
    if START is not None:
        tl.store(offer_ptr + row, tl.div_rn(left, reach + 1e-9), mask=inside)


@triton.jit(do_not_specialize=["first", "repeat", "count"])
def _match_columns_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    right_ptr,
    offer_ptr,
    taken_ptr,
    grad_ptr,
    N,
    M,
    first,
    repeat,
    count,
    scale,
    POWER: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """What arrives and is taken in a level with e_kl = exp2(scale d_kl)^POWER."""
    blocks = tl.cdiv(M, BLOCK)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    l = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = l < M
    y0, y1, y2 = load_points(y_ptr, (first + pair) % count * M + l, mask=inside, other=0.0)
    x_ptr += (first + pair) // repeat * N * 3
    offer_ptr += pair * N
    zero = tl.zeros((BLOCK,), tl.float32)
    arriving = zero
    g0, g1, g2 = zero, zero, zero
    for start in range(0, N, TILE):
        tile_arriving = zero
        for k in tl.range(start, tl.minimum(start + TILE, N), loop_unroll_factor=UNROLL):
            d0 = y0 - tl.load(x_ptr + 3 * k)
            d1 = y1 - tl.load(x_ptr + 3 * k + 1)
            d2 = y2 - tl.load(x_ptr + 3 * k + 2)
            flow = tl.load(offer_ptr + k)
            if POWER == 1:
                flow = flow * tl.exp2(scale * (d0 * d0 + d1 * d1 + d2 * d2))
            tile_arriving += flow
            if grad_ptr is not None:
                g0 += flow * d0
                g1 += flow * d1
                g2 += flow * d2
        arriving += tile_arriving
    column = pair * M + l
    right = tl.load(right_ptr + column, mask=inside, other=0.0)
    arriving *= right
    taken = right * tl.minimum(tl.div_rn(right, arriving + 1e-9), 1.0)
    tl.store(taken_ptr + column, taken, mask=inside)
    tl.store(right_ptr + column, tl.maximum(right - arriving, 0.0), mask=inside)
    if grad_ptr is not None:
        grad_ptr += pair * 3 * M + l
        _add(grad_ptr, taken * g0, inside)
        _add(grad_ptr + M, taken * g1, inside)
        _add(grad_ptr + 2 * M, taken * g2, inside)


# Launching and registration


def match_costs(
    x: Float[Tensor, "S N 3"],
    y: Float[Tensor, "R M 3"],
    *,
    first: int,
    pairs: int,
    repeat: int,
    need_x: bool = False,
    need_y: bool = False,
) -> tuple[Float[Tensor, " P"], Float[Tensor, "P N 3"] | None, Float[Tensor, "P M 3"] | None]:
    """Costs of P pairs of clouds, by the kernels, and where needed their gradients to x and to y.

    x, y: float32, contiguous. Pair p is x[(first + p) // repeat] and y[(first + p) % R].
    """
    N, M = x.shape[1], y.shape[1]
    left, right = x.new_full((pairs, N), max(1.0, M / N)), x.new_full((pairs, M), max(1.0, N / M))
    offer, taken, costs = torch.empty_like(left), torch.empty_like(right), torch.zeros_like(left)
    grad_x = x.new_zeros(pairs, 3, N) if need_x else None
    grad_y = x.new_zeros(pairs, 3, M) if need_y else None

    def run(kernel: Any, points: int, tensors: tuple[Tensor | None, ...], level: float, **powers: Any) -> None:
        few = pairs * points < _FEW_POINTS
        block = _SMALL_BLOCK if few else _BLOCK if tensors[-1] is None else _GRAD_BLOCK
        launch(
            kernel,
            (pairs * cdiv(points, block),),
            *(*tensors, N, M, first, repeat, len(y), level * math.log2(math.e)),
            **powers,
            BLOCK=block,
            TILE=_TILE,
            UNROLL=_UNROLL,
            num_warps=1,
        )

    def rows(level: float, finish: int | None, start: int | None) -> None:
        tensors = (x, y, left, right, offer, taken, costs, grad_x)
        run(_match_rows_kernel, N, tensors, level, FINISH=finish, START=start)

    def columns(level: float, power: int) -> None:
        run(_match_columns_kernel, M, (x, y, right, offer, taken, grad_y), level, POWER=power)

    *levels, _ = _LEVELS
    rows(levels[0], finish=None, start=1)
    for level, following in zip(levels, levels[1:], strict=False):
        columns(level, power=1)
        rows(following, finish=4, start=1)
    columns(levels[-1], power=1)
    rows(levels[-1], finish=1, start=0)
    columns(0.0, power=0)
    rows(0.0, finish=0, start=None)
    dx, dy = (None if grad is None else (grad.mT * (2 / N)).contiguous() for grad in (grad_x, grad_y))
    return costs.sum(1) / N, dx, dy


@op(fake=_empty_results)
def _approx_emd_op(x: Tensor, y: Tensor, need_x: bool, need_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    """By the kernels what ``_approx_emd_reference_op`` returns."""
    p, q = x.float().contiguous(), y.float().contiguous()
    cost, dx, dy = match_costs(p, q, first=0, pairs=len(x), repeat=1, need_x=need_x, need_y=need_y)
    dx, dy = (cost.new_empty(0) if grad is None else grad for grad in (dx, dy))
    return cost.to(sums_dtype(x)), dx.to(sums_dtype(x)), dy.to(sums_dtype(x))


def _approx_emd_backward(needs: Needs, grad: Tensor, dx: Tensor, dy: Tensor, dtype: torch.dtype) -> Gradients:
    grads = zip((dx, dy), needs, strict=False)
    return tuple((saved * grad[:, None, None]).to(dtype) if need else None for saved, need in grads)


for _op in (_approx_emd_op, _approx_emd_reference_op):
    gradient(_op, save=lambda x, y, need_x, need_y, out: (*out[1:], x.dtype))(_approx_emd_backward)


# Public functions


def approx_emd(x: Float[Tensor, "B N 3"], y: Float[Tensor, "B M 3"], *, impl: Impl = "auto") -> Float[Tensor, " B"]:
    """Approximate earth mover's distance: the cost of a soft matching, over N.

    x: (B, N, 3), y: (B, M, 3), of one dtype. Returns (B,) float32 (float64 for float64), in squared units of the
    coordinates: the sum of match x squared distance, divided by the number of points of x. Not symmetric. For
    N != M the masses are max(1, M/N) and max(1, N/M), unrounded (the published code divides integers, the same
    where one count divides the other). Differentiable in x and y at fixed match, once. Deterministic. Triton computes
    in float32 whatever the dtype, the gradient with the cost.
    Source: Fan et al. 2017. ValueError: shapes, dtypes or devices that do not fit.
    """
    check_clouds(x=x, y=y)
    if not use_triton(impl, x):
        return approx_emd_reference(x, y)
    return _approx_emd_op(x, y, *_needs(x, y))[0]


def exact_emd(x: Float[Tensor, "B N 3"], y: Float[Tensor, "B N 3"]) -> Float[Tensor, " B"]:
    """Earth mover's distance by optimal assignment: the mean SQUARED distance between assigned points.

    x, y: (B, N, 3), of one dtype, finite. Returns (B,) float32 (float64 for float64), in squared units of the
    coordinates. The assignment is found on the CPU in float64 (a few seconds per cloud of 2048 points);
    differentiable in x and y at fixed assignment. Deterministic.
    ValueError: shapes, dtypes or devices that do not fit; N differs; values that are not finite.
    """
    check_clouds(x=x, y=y)
    check_equal_sizes(x=x, y=y)
    check_finite(x=x, y=y)
    x, y = upcast(x), upcast(y)
    target = torch.empty(x.shape[:2], dtype=torch.int64)
    for b, (cloud_x, cloud_y) in enumerate(zip(to_numpy(x), to_numpy(y), strict=True)):
        target[b] = torch.from_numpy(assign(cloud_x, cloud_y))
    assigned = group_reference(y, target[..., None].to(y.device)).squeeze(2)
    return (x - assigned).square().sum(-1).mean(-1)


def assign(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Index of the point of y (N, 3) that the optimal assignment gives to each point of x (N, 3)."""
    return linear_sum_assignment(cdist(x, y, "sqeuclidean"))[1]


def to_numpy(clouds: Float[Tensor, "B N 3"]) -> np.ndarray:
    """Float64 on the CPU, as SciPy takes them."""
    return clouds.detach().double().cpu().numpy()


def check_equal_sizes(**clouds: Tensor) -> None:
    """Raise ``ValueError`` unless both clouds have as many points."""
    (first, a), (second, b) = clouds.items()
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{second}: expected as many points as {first} ({a.shape[1]}), got {b.shape[1]}")
