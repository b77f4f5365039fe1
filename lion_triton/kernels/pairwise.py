"""Distances between all pairs of two sets of clouds, for evaluation; no gradients.

    pairwise_chamfer   out[s, r] = mean_n min_m |a_sn - b_rm|^2 + mean_m min_n |a_sn - b_rm|^2
    pairwise_emd       out[s, r] = approx_emd(a_s, b_r) or exact_emd(a_s, b_r)

On a CPU the Chamfer distances come from one k-d tree per cloud (SciPy, float64), built once and asked by all
its partners; the reference compares all points and is the check. Exact assignment runs in processes, since
SciPy holds the interpreter's lock while it solves, and approximate matching in threads, a pair each. All use
``torch.get_num_threads()`` cores.

The Chamfer kernel makes one direction and stores no distances: a program holds a block of a_s in registers, walks b_r
one point at a time and writes the sum of its points' least squared distances; the blocks' sums are added in a fixed
order. Operations per direction and pair of points: 7.6 instructions (sm_90). Bytes per direction and pair of clouds:
12 M read (from the cache) and 4 written per block. The matching's kernels are in ``emd.py``. Both go through the pairs
in chunks of at most ``_PAIRS``, for which they make at most ``_SCRATCH`` bytes (or what one pair needs, and in the
Chamfer distance, which takes whole rows of the matrix, what one row needs: 4 R bytes per block).

Legend: S and R clouds, N and M points.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain, repeat
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.spatial import cKDTree
from torch import Tensor

from lion_triton.kernels._checks import Impl, check_finite, check_points, upcast, use_triton
from lion_triton.kernels._points import block_size, load_points, sqdist_blocks
from lion_triton.kernels._triton import cdiv, launch, tl, triton
from lion_triton.kernels.emd import approx_emd_reference, assign, check_equal_sizes, match_costs, to_numpy

Progress = Callable[[int], Any]
# On a CPU small clouds are compared by matrix products, large ones by trees, which look at few distances. Two cores,
# per pair: 0.14 ms against 0.35 at 512 points, 2.2 ms against 1.1 at 2048.
_SMALL_PAIR = 1024 * 1024
_PRODUCT_ROWS, _PRODUCT_COLUMNS = 64, 4096  # at a time: 2 MB of distances, which stay in the cache
_CLOUDS = 64  # partners of one cloud per call of a batched op
_SCRATCH, _PAIRS = 1 << 28, 1 << 16  # a chunk of the kernels' pairs: bytes made on the way, and how many
# Points of a block (8 a thread of one warp), and of the other cloud per turn of the loop: by machine code, not timing.
# No tiles are skipped by bounding boxes: of furniture of 2048 points, blocks of 256 in Morton order would still visit
# three quarters of the tiles of 32, in k-d order more than half.
_BLOCK, _UNROLL = 256, 4


def pairwise_chamfer_reference(
    a: Float[Tensor, "S N 3"], b: Float[Tensor, "R M 3"], progress: Progress | None = None
) -> Float[Tensor, "S R"]:
    """Plain PyTorch form of :func:`pairwise_chamfer`."""
    x, y = upcast(a.detach()), upcast(b.detach())

    def distances(s: int, partners: range) -> Iterator[float]:
        for group in y[partners.start :].split(_CLOUDS):
            cloud = x[s].expand(len(group), -1, -1)
            yield from (_mean_min(cloud, group) + _mean_min(group, cloud)).tolist()

    return _all_pairs(distances, a, b, a is b, progress)


def pairwise_chamfer(
    a: Float[Tensor, "S N 3"],
    b: Float[Tensor, "R M 3"],
    *,
    progress: Progress | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "S R"]:
    """Chamfer distance (squared, both means added) of every cloud of ``a`` to every cloud of ``b``.

    a: (S, N, 3), b: (R, M, 3), of one dtype, finite. If ``a is b`` each pair is computed once and the diagonal
    is 0. progress: called with the number of pairs finished since its last call, as ``tqdm.update`` takes it;
    they add up to S R. Returns (S, R) float32 (float64 for float64, but computed in float32 by Triton) on the device
    of a. No gradient. ValueError: shapes, dtypes, devices or values that do not fit.
    """
    _check_sets(a, b)
    if use_triton(impl, a):
        return _pairwise_chamfer_triton(a, b, progress)
    if impl == "auto" and a.device.type == "cpu":
        small = a.shape[1] * b.shape[1] <= _SMALL_PAIR
        return (_pairwise_chamfer_products if small else _pairwise_chamfer_trees)(a, b, progress)
    return pairwise_chamfer_reference(a, b, progress)


def pairwise_emd(
    a: Float[Tensor, "S N 3"],
    b: Float[Tensor, "R M 3"],
    *,
    method: Literal["approx", "exact"] = "approx",
    progress: Progress | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "S R"]:
    """Earth mover's distance (mean squared) of every cloud of ``a`` to every cloud of ``b``.

    a: (S, N, 3), b: (R, M, 3), of one dtype, finite. method: "approx" is :func:`approx_emd`, which is not symmetric
    (clouds of a are its x), "exact" is :func:`exact_emd`, for N = M: by SciPy on the CPU whatever the device, and
    with ``a is b`` each pair once. On macOS and Windows a script that asks for "exact" needs the usual
    ``if __name__ == "__main__"``, as its workers import it.
    progress: called with the number of pairs finished since its last call, as ``tqdm.update`` takes it; they add
    up to S R. Returns (S, R) float32 (float64 for float64, but computed in float32 by Triton) on the device of a. No
    gradient. ValueError: shapes, dtypes, devices or values that do not fit; method="exact" with impl="triton".
    """
    _check_sets(a, b)
    if method not in ("approx", "exact"):
        raise ValueError(f'method: expected "approx" or "exact", got {method!r}')
    if (method, impl) == ("exact", "triton"):
        raise ValueError('impl: method="exact" has no kernel, expected "auto" or "reference", got "triton"')
    kernels = use_triton(impl, a)
    if method == "exact":
        check_equal_sizes(a=a, b=b)
        return _pairwise_exact(a, b, progress)
    if kernels:
        return _pairwise_emd_triton(a, b, progress)

    return _pairwise_approx(a.detach(), b.detach(), progress)


@triton.jit(do_not_specialize=["count"])
def _pairwise_nearest_kernel(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, out_ptr, N, M, count, BLOCK: tl.constexpr, UNROLL: tl.constexpr
):
    """Sum over a block of points of x[pair // count] of the least squared distance to y[pair % count]."""
    blocks = tl.cdiv(N, BLOCK)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    x0, x1, x2 = load_points(x_ptr, pair // count * N + i, mask=inside, other=0.0)
    y_ptr += pair % count * M * 3
    nearest = tl.full((BLOCK,), float("inf"), tl.float32)
    for l in tl.range(0, M, loop_unroll_factor=UNROLL):
        d0 = x0 - tl.load(y_ptr + 3 * l)
        d1 = x1 - tl.load(y_ptr + 3 * l + 1)
        d2 = x2 - tl.load(y_ptr + 3 * l + 2)
        nearest = tl.minimum(nearest, d0 * d0 + d1 * d1 + d2 * d2)
    tl.store(out_ptr + tl.program_id(0), tl.sum(tl.where(inside, nearest, 0.0)))


def _mean_nearest(x: Float[Tensor, "S N 3"], y: Float[Tensor, "R M 3"]) -> Float[Tensor, "S R"]:
    """Mean over each cloud of x of the squared distance to each cloud of y, by the kernel; float32, contiguous."""
    (S, N, _), (R, M, _) = x.shape, y.shape
    blocks = cdiv(N, _BLOCK)
    sums = x.new_empty(S, R, blocks)
    launch(_pairwise_nearest_kernel, (S * R * blocks,), x, y, sums, N, M, R, BLOCK=_BLOCK, UNROLL=_UNROLL, num_warps=1)
    return sums.sum(2) / N


def _pairwise_chamfer_triton(a: Tensor, b: Tensor, progress: Progress | None) -> Tensor:
    x, y = (clouds.detach().float().contiguous() for clouds in (a, b))
    S, R = len(a), len(b)
    out = x.new_empty(S, R)
    clouds = max(1, _pairs_at_once(4 * cdiv(max(a.shape[1], b.shape[1]), _BLOCK)) // max(1, R))
    for s in range(0, S, clouds):
        group = x[s : s + clouds]
        out[s : s + clouds] = _mean_nearest(group, y)
        if a is not b:
            out[s : s + clouds] += _mean_nearest(y, group).T
        _report(progress, len(group) * R, a)
    if a is b:
        out = out + out.T
    return out.to(upcast(a).dtype)


def _pairwise_emd_triton(a: Tensor, b: Tensor, progress: Progress | None) -> Tensor:
    x, y = (clouds.detach().float().contiguous() for clouds in (a, b))
    S, R = len(a), len(b)
    out = x.new_empty(S * R)
    at_once = _pairs_at_once(4 * (3 * a.shape[1] + 2 * b.shape[1]))
    for first in range(0, S * R, at_once):
        pairs = min(at_once, S * R - first)
        out[first : first + pairs], *_ = match_costs(x, y, first=first, pairs=pairs, repeat=R)
        _report(progress, pairs, a)
    return out.view(S, R).to(upcast(a).dtype)


def _pairs_at_once(scratch: int) -> int:
    """Pairs in a chunk of which each needs ``scratch`` bytes."""
    return max(1, min(_PAIRS, _SCRATCH // scratch))


def _report(progress: Progress | None, pairs: int, x: Tensor) -> None:
    if progress is not None:
        if x.is_cuda:
            torch.cuda.synchronize(x.device)  # or it would tell what is launched, not what is finished
        progress(pairs)


def _pairwise_chamfer_trees(a: Tensor, b: Tensor, progress: Progress | None) -> Tensor:
    trees_a = [cKDTree(cloud) for cloud in to_numpy(a)]
    trees_b = trees_a if a is b else [cKDTree(cloud) for cloud in to_numpy(b)]

    def chamfer(tree_a: cKDTree, tree_b: cKDTree) -> float:
        # Asked in the order of its own leaves, a cloud's neighbours lie together in the other tree too.
        to_a, _ = tree_a.query(tree_b.data[tree_b.indices])
        to_b, _ = tree_b.query(tree_a.data[tree_a.indices])
        return float(np.square(to_a).mean() + np.square(to_b).mean())

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return _all_pairs(
            lambda s, partners: pool.map(chamfer, repeat(trees_a[s]), trees_b[partners.start :]),
            *(a, b, a is b, progress),
        )


def _pairwise_chamfer_products(a: Tensor, b: Tensor, progress: Progress | None) -> Tensor:
    """|x|^2 + |y|^2 - 2 x.y for all pairs of points at once, as products of (N, 5) and (5, M) matrices.

    In float64, where the cancellation that rules this form out in float32 costs nothing that matters.
    """
    x, y = a.detach().double(), b.detach().double()
    square_x, square_y = x.square().sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
    left = torch.cat([x, square_x, torch.ones_like(square_x)], -1)  # (S, N, 5)
    right = torch.cat([-2 * y, torch.ones_like(square_y), square_y], -1).permute(2, 0, 1).contiguous()  # (5, R, M)
    together = max(1, _PRODUCT_COLUMNS // b.shape[1])

    def distances(cloud: Tensor, group: Tensor) -> list[float]:
        to_y, to_x = x.new_zeros(group.shape[1]), x.new_full(group.shape[1:], torch.inf)
        for rows in cloud.split(_PRODUCT_ROWS):
            sqdist = (rows @ group.flatten(1)).view(len(rows), *group.shape[1:])
            to_y += sqdist.amin(2).clamp_min_(0).sum(0)
            to_x = torch.minimum(to_x, sqdist.amin(0))
        return (to_y / a.shape[1] + to_x.clamp_min_(0).mean(1)).tolist()

    def groups(partners: range) -> tuple[Tensor, ...]:
        return right[:, partners.start :].split(together, dim=1)

    with _threads_of_one() as every:
        return _all_pairs(
            lambda s, partners: chain.from_iterable(every(distances, repeat(left[s]), groups(partners))),
            *(a, b, a is b, progress),
        )


@contextmanager
def _threads_of_one() -> Iterator[Callable[..., Iterable[list[float]]]]:
    """A ``map`` by as many threads as PyTorch has, each of which computes alone: several on one piece spend their time
    meeting each other."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield map
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)  # what the workers set, the last of them late, is every new thread's


def _pairwise_approx(a: Tensor, b: Tensor, progress: Progress | None) -> Tensor:
    groups = b.split(max(1, block_size(a) // (a.shape[1] * b.shape[1])))

    def costs(cloud: Tensor, group: Tensor) -> list[float]:
        return approx_emd_reference(cloud.expand(len(group), -1, -1), group).tolist()

    with _threads_of_one() if a.device.type == "cpu" else nullcontext(map) as every:
        return _all_pairs(lambda s, _: chain.from_iterable(every(costs, repeat(a[s]), groups)), a, b, False, progress)


def _pairwise_exact(a: Tensor, b: Tensor, progress: Progress | None) -> Tensor:
    clouds_a, clouds_b = to_numpy(a), to_numpy(b)
    workers = min(torch.get_num_threads(), len(a) * len(b))
    with ExitStack() as stack:
        run: Any = map
        if workers > 1:
            # Forked workers start at once and need no __main__ guard; they touch NumPy and SciPy only.
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
            run = stack.enter_context(ProcessPoolExecutor(workers, context)).map
        return _all_pairs(
            lambda s, partners: run(_assignment_cost, repeat(clouds_a[s]), clouds_b[partners.start :]),
            *(a, b, a is b, progress),
        )


def _assignment_cost(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.square(x - y[assign(x, y)]).sum(1).mean())


def _all_pairs(
    distances: Callable[[int, range], Iterable[float]],
    a: Tensor,
    b: Tensor,
    symmetric: bool,
    progress: Progress | None,
) -> Tensor:
    """The matrix, row by row, from ``distances(s, partners)``, the distances of cloud s to its partners."""
    S, R = len(a), len(b)
    out = np.zeros((S, R))
    for s in range(S):
        partners = range(s + 1 if symmetric else 0, R)
        for r, distance in zip(partners, distances(s, partners), strict=True):
            out[s, r] = distance
            if progress is not None:
                progress(2 if symmetric else 1)
        if symmetric and progress is not None:
            progress(1)  # the diagonal
    if symmetric:
        out += out.T.copy()
    return torch.from_numpy(out).to(a.device, upcast(a).dtype)


def _mean_min(x: Float[Tensor, "B N 3"], y: Float[Tensor, "B M 3"]) -> Float[Tensor, " B"]:
    """Mean over x of the squared distance to y."""
    nearest = x.new_empty(x.shape[:2])
    for b, i, sqdist in sqdist_blocks(x, y):
        nearest[b, i] = sqdist.amin(2)
    return nearest.mean(1)


def _check_sets(a: Tensor, b: Tensor) -> None:
    check_points("a", a)
    check_points("b", b)
    if a.device != b.device:
        raise ValueError(f"b: expected the device of a ({a.device}), got {b.device}")
    if a.dtype != b.dtype:
        raise ValueError(f"b: expected the dtype of a ({a.dtype}), got {b.dtype}")
    check_finite(a=a, b=b)
