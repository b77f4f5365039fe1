"""The K nearest neighbours of each point, in any number of dimensions, of clouds that may be ragged.

    knn        i_1(p), ..., i_K(p): the K points of y with the least d(p, q) = |x_p - y_q|^2, nearest first
    backward   dx_p = 2 sum_k (x_p - y_i_k(p)) dd_pk,   dy_q = -2 sum_{p, k: i_k(p) = q} (x_p - y_q) dd_pk

Squared distances are sums of squared differences, one coordinate after the other: |x|^2 + |y|^2 - 2 x.y would lose all
digits of small ones. Equal distances go to the lowest index. Nobody ever holds a matrix of all distances.

On a CPU candidates come from a k-d tree (SciPy, float64) in few dimensions and from a blocked matrix product in many, a
few more than are asked for. Their distances are then taken again as above; rows whose K-th is not surely nearer than
every point that is no candidate, by a bound on all rounding, ask for more candidates, in float64, and in the end
compare all points. So indices and distances are those of the reference, bit for bit.

The kernel gives each thread one point of x and walks y, eight points at a time, the same for all threads. What is
nearer than the K-th nearest so far goes into a list of the thread's own, in memory; when one of a program's lists is
full, all are cut to K, by finding the K-th distance bit by bit; only at the end they are sorted. A list is four times
as long as K, so lists fill up less and less often, about log_4(M / K) times. Per pair of points: 3 instructions for
each dimension, and about 10. Memory: 8 bytes for each entry of a list. The backward visits the entries in order of the
row they point at, so two runs agree bit for bit.

Legend: B clouds, N and M points, D dimensions, K neighbours. Distances are float32 (in the reference float64 where the
input is), indices int32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int32, Int64
from scipy.spatial import cKDTree
from torch import Tensor, get_num_threads

from lion_triton.kernels._checks import Impl, check_float, check_integer, check_same, sums_dtype, upcast, use_triton
from lion_triton.kernels._op import Gradients, Needs, gradient, op
from lion_triton.kernels._points import block_size
from lion_triton.kernels._triton import cdiv, launch, tl, triton
from lion_triton.kernels.gather import group_reference
from lion_triton.kernels.rows import transpose

_MOST_NEIGHBORS, _MOST_DIMENSIONS = 64, 128  # of the kernel
# Points of x per program of one warp, points of y at a time, list entries cut at a time: by machine code, not timing.
_BLOCK, _UNROLL, _CUT = 32, 8, 128
_PULL_ELEMENTS, _PULL_CHANNELS = 512, 128  # of a program of the backward
# On a CPU, by timing on one core: a tree pays in few dimensions, and for clouds of some size.
_TREE_DIMENSIONS, _TREE_POINTS = 8, 256
_PRODUCT_BLOCK, _CANDIDATE_ROWS = 1 << 18, 2048  # distances, and rows of candidates, at a time

Search = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


# References


def knn_reference(
    x: Float[Tensor, "B N D"], y: Float[Tensor, "B M D"], k: int, lengths: Int[Tensor, " B"] | None = None
) -> tuple[Float[Tensor, "B N K"], Int32[Tensor, "B N K"]]:
    """Plain PyTorch form of :func:`knn`."""
    return _by_cloud(_search, x, y, k, lengths)


def _by_cloud(search: Search, x: Tensor, y: Tensor, k: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Distances and indices by the search of single clouds."""
    sqdist = upcast(x).new_full((*x.shape[:2], k), torch.inf)
    idx = torch.full_like(sqdist, -1, dtype=torch.int32)
    for b, size in enumerate([y.shape[1]] * len(y) if lengths is None else lengths.tolist()):
        most = min(k, size)
        if most and x.shape[1]:
            found = search(upcast(x[b].detach()), upcast(y[b, :size].detach()), most)
            sqdist[b, :, :most], idx[b, :, :most] = found
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        sqdist = pair_distances(x, y, idx)
    return sqdist, idx


def pair_distances(
    x: Float[Tensor, "B N D"], y: Float[Tensor, "B M D"], idx: Int[Tensor, "B N K"]
) -> Float[Tensor, "B N K"]:
    """Squared distances of the pairs, by the same operations in the same order as everywhere; infinity at index -1."""
    x, y, missing = upcast(x), upcast(y), idx < 0
    if y.shape[1] == 0:
        return x.new_full(idx.shape, torch.inf)
    difference = x[:, :, None] - group_reference(y, idx.clamp(min=0))
    difference = difference.masked_fill(missing[..., None], 0)  # padding that is NaN enters no gradient
    return _sum_of_squares(difference.unbind(-1)).masked_fill(missing, torch.inf)


def _sum_of_squares(differences: Iterable[Tensor]) -> Tensor:
    """One after the other: everywhere the same bits."""
    return reduce(torch.add, (difference * difference for difference in differences))


def _search(x: Float[Tensor, "N D"], y: Float[Tensor, "M D"], k: int) -> tuple[Tensor, Tensor]:
    """Distances and indices of the k <= M nearest points of one cloud, all of them compared."""
    axes, rows = y.T.contiguous(), max(1, block_size(x) // len(y))
    found = []
    for block in x.split(rows):
        sqdist = _sum_of_squares(a[:, None] - b for a, b in zip(block.T, axes, strict=True))
        order = smallest(sqdist, k)
        found.append((sqdist.gather(1, order), order.int()))
    return _rows(found)


def _rows(blocks: Iterable[tuple[Tensor, ...]]) -> Any:
    """Blocks of rows, each a tuple, put together."""
    return tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))


def smallest(distances: Float[Tensor, "... M"], k: int) -> Int64[Tensor, "... K"]:
    """Indices of the k least distances (>= 0) of each row, in order, equal ones by index; NaN counts as infinity."""
    distances = torch.where(distances.isnan(), torch.inf, distances)
    if distances.dtype != torch.float32:
        return distances.sort(dim=-1, stable=True).indices[..., :k]
    # topk breaks ties as it likes. Floats >= 0 order as their bits do: bits and index in one number know no ties.
    keys = distances.view(torch.int32).long() << 32 | torch.arange(distances.shape[-1], device=distances.device)
    return keys.topk(k, largest=False, sorted=True).values & 0xFFFFFFFF


# On a CPU: the same by fewer comparisons


def _search_cpu(x: Float[Tensor, "N D"], y: Float[Tensor, "M D"], k: int) -> tuple[Tensor, Tensor]:
    (M, D), extra = y.shape, k // 8 + 2
    if k + extra >= M or not (x.isfinite().all() and y.isfinite().all()):
        return _search(x, y, k)
    candidates = _candidates_by_tree if D <= _TREE_DIMENSIONS and M >= _TREE_POINTS else _candidates_by_product
    sqdist, idx, sure = _nearest_of(x, y, k, *candidates(x, y, k + extra, x.dtype))
    for more in (4 * k + 32, M):
        rows = (~sure).nonzero().flatten()
        if len(rows) and more < M:
            sqdist[rows], idx[rows], sure[rows] = _nearest_of(
                x[rows], y, k, *candidates(x[rows], y, more, torch.float64)
            )
        elif len(rows):
            sqdist[rows], idx[rows] = _search(x[rows], y, k)
            break
    return sqdist, idx


def _nearest_of(
    x: Float[Tensor, "N D"],
    y: Float[Tensor, "M D"],
    k: int,
    candidates: Int64[Tensor, "N C"],
    bound: Float[Tensor, " N"],
) -> tuple[Float[Tensor, "N K"], Int32[Tensor, "N K"], Bool[Tensor, " N"]]:
    """The k nearest candidates, and whether they are surely the k nearest points.

    All others are at least ``bound`` away: a squared distance before rounding, in float64.
    """
    info, D = torch.finfo(x.dtype), x.shape[1]
    bound = bound * (1 - 2 * (D + 4) * info.eps) - D * info.tiny  # the least that its rounded form can be
    axes, found = y.T.contiguous(), []
    for a, near, least in zip(*(t.split(_CANDIDATE_ROWS) for t in (x, candidates, bound)), strict=True):
        near = near.sort(-1).values  # then equal distances are in order of the index
        sqdist = _sum_of_squares(p[:, None] - q[near] for p, q in zip(a.T, axes, strict=True))
        order = smallest(sqdist, k)
        sqdist = sqdist.gather(1, order)
        found.append((sqdist, near.gather(1, order).int(), sqdist[:, -1] < least))
    return _rows(found)


def _candidates_by_tree(
    x: Float[Tensor, "N D"], y: Float[Tensor, "M D"], count: int, dtype: torch.dtype
) -> tuple[Int64[Tensor, "N C"], Float[Tensor, " N"]]:
    """Candidates, and the least squared distance of all other points (float64)."""
    points = x.double().numpy()
    order = cKDTree(points, leafsize=64).indices  # asked in this order, points that lie together follow each other
    query: Any = cKDTree(y.double().numpy()).query
    distances, near = query(points[order], [*range(1, count + 1)], workers=get_num_threads())
    back = torch.from_numpy(order).argsort()
    return torch.from_numpy(near)[back], torch.from_numpy(distances[:, -1])[back].square()


def _candidates_by_product(
    x: Float[Tensor, "N D"], y: Float[Tensor, "M D"], count: int, dtype: torch.dtype
) -> tuple[Int64[Tensor, "N C"], Float[Tensor, " N"]]:
    """As by the tree, by |x|^2 + |y|^2 - 2 x.y about the centre of y, less the most that its rounding can make."""
    center = y.mean(0, dtype=dtype)
    x, y = x.to(dtype) - center, y.to(dtype) - center
    squares_x, squares_y = x.square().sum(1), y.square().sum(1)
    # NumPy's product: PyTorch's may be told to round to bfloat16.
    columns = torch.cat([-2 * y, squares_y[:, None]], 1).T.contiguous().numpy()
    rows = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    found = []
    for block in rows.split(max(1, _PRODUCT_BLOCK // len(y))):
        sqdist = torch.from_numpy(block.numpy() @ columns)  # without |x|^2, which changes no order
        near, idx = sqdist.topk(count, largest=False, sorted=False)
        found.append((idx, near.amax(1)))
    candidates, farthest = _rows(found)
    error = 2 * (x.shape[1] + 8) * torch.finfo(dtype).eps * (squares_x + squares_y.max()).double()
    return candidates, farthest.double() + squares_x.double() - error


# Kernels


@triton.jit
def _cut(  # type: ignore[no-untyped-def]
    list_ptr, count_ptr, limit_ptr, K, BLOCK: tl.constexpr, ROWS: tl.constexpr, LIST: tl.constexpr
):
    """Cut a program's lists to their K nearest, in the order they have; ``limit`` is the K-th distance of each.

    That is not a number where a list has fewer than K.
    """
    tl.debug_barrier()  # lists and counts were written by other threads
    slot = tl.arange(0, LIST)[None, :]
    for r in range(0, BLOCK, ROWS):
        row = r + tl.arange(0, ROWS)
        count = tl.load(count_ptr + row)
        filled = slot < count[:, None]
        lists = list_ptr + row[:, None] * LIST
        key = tl.load(lists + slot, mask=filled, other=0x7FFFFFFFFFFFFFFF)
        bits = (key >> 32).to(tl.int32)
        kth = tl.zeros((ROWS,), tl.int32)  # the largest number that fewer than K are below
        for i in range(31):
            larger = kth + (1 << (30 - i))
            below = tl.sum((bits < larger[:, None]).to(tl.int32), 1)
            kth = tl.where(below < K, larger, kth)
        nearer = bits < kth[:, None]
        equal = (bits == kth[:, None]) & filled
        room = K - tl.sum(nearer.to(tl.int32), 1)
        keep = (nearer & filled) | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= room[:, None]))
        place = tl.cumsum(keep.to(tl.int32), 1) - 1
        tl.debug_barrier()  # or a thread might overwrite what another has not yet read
        tl.store(lists + place, key, mask=keep)
        tl.store(limit_ptr + row, tl.where(count >= K, kth.to(tl.float32, bitcast=True), float("nan")))
    tl.debug_barrier()


@triton.jit
def _write_sorted(  # type: ignore[no-untyped-def]
    list_ptr, count_ptr, out_ptr, idx_ptr, first, N, K,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, LIST: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Distances and indices of lists of K at most, nearest first. MOST: at least K."""
    slot = tl.arange(0, MOST)[None, :]
    for r in range(0, BLOCK, ROWS):
        row = r + tl.arange(0, ROWS)
        count = tl.minimum(tl.load(count_ptr + row), K)[:, None]
        lists = list_ptr + row[:, None] * LIST
        key = tl.load(lists + slot, mask=slot < count, other=0)
        rank = tl.zeros((ROWS, MOST), tl.int32)
        for i in range(K):
            rank += (tl.load(lists + i, mask=i < count, other=0x7FFFFFFFFFFFFFFF) < key).to(tl.int32)
        inside = (first + row < N)[:, None] & (slot < K)
        found = slot < count
        out = (first + row).to(tl.int64)[:, None] * K + tl.where(found, rank, slot)
        near = tl.where(found, (key >> 32).to(tl.int32).to(tl.float32, bitcast=True), float("inf"))
        tl.store(out_ptr + out, near.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(idx_ptr + out, tl.where(found, (key & 0xFFFFFFFF).to(tl.int32), -1), mask=inside)


@triton.jit
def _knn_kernel(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, lengths_ptr, list_ptr, count_ptr, limit_ptr, out_ptr, idx_ptr, N, M, D, K, blocks,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr, ROWS: tl.constexpr, LIST: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """x: (B, D, N), y: (B, M, D). Lists, counts and limits are scratch, a row for each of a program's points."""
    program = tl.program_id(0).to(tl.int64)
    cloud = program // blocks
    first = (program % blocks * BLOCK).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    x_ptr += cloud * N * D + tl.minimum(first + lane, N - 1)
    y_ptr += cloud * M * D
    list_ptr += program * BLOCK * LIST
    count_ptr += program * BLOCK
    limit_ptr += program * BLOCK
    step = tl.full((), N, tl.int64)
    size = M
    if lengths_ptr is not None:
        size = tl.load(lengths_ptr + cloud).to(tl.int32)
    count = tl.zeros((BLOCK,), tl.int32)
    limit = tl.full((BLOCK,), float("nan"), tl.float32)
    for j in range(0, size, UNROLL):
        sqdist = ()
        for _u in tl.static_range(UNROLL):
            sqdist = sqdist + (tl.zeros((BLOCK,), tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
        for d in range(D):
            px = tl.load(x_ptr + d * step)
            so_far = sqdist
            sqdist = ()
            for u in tl.static_range(UNROLL):
                diff = px - tl.load(y_ptr + tl.minimum(j + u, size - 1).to(tl.int64) * D + d)
                sqdist = sqdist + (tl.fma(diff, diff, so_far[u]),)  # type: ignore[assignment]  # noqa: RUF005
        for u in tl.static_range(UNROLL):
            near = tl.where(sqdist[u] == sqdist[u], sqdist[u], float("inf"))
            hit = tl.where(near >= limit, False, j + u < size)  # so everything is a hit where the limit is not a number
            # Floats >= 0 order as their bits do: bits and index in one number know no ties.
            key = (near.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (j + u)
            tl.store(list_ptr + lane * LIST + count, key, mask=hit)
            count += hit.to(tl.int32)
        if tl.max(count, 0) > LIST - UNROLL:
            tl.store(count_ptr + lane, count)
            _cut(list_ptr, count_ptr, limit_ptr, K, BLOCK, ROWS, LIST)
            limit = tl.load(limit_ptr + lane)
            count = tl.minimum(count, K)
    tl.store(count_ptr + lane, count)
    _cut(list_ptr, count_ptr, limit_ptr, K, BLOCK, ROWS, LIST)
    out = cloud * N * K
    _write_sorted(list_ptr, count_ptr, out_ptr + out, idx_ptr + out, first, N, K, BLOCK, ROWS, LIST, MOST)


@triton.jit
def _pull_kernel(  # type: ignore[no-untyped-def]
    own_ptr, other_ptr, column_ptr, start_ptr, weight_ptr, out_ptr, num_rows, D, K,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Every row is pulled by the rows of ``other`` in its run of entries: K of them, without ``start``; -1 is none."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    live = r < num_rows
    inside = live[:, None] & (c < D)[None, :]
    if start_ptr is not None:
        first = tl.load(start_ptr + r, mask=live, other=0)
        count = tl.load(start_ptr + r + 1, mask=live, other=0) - first
    else:
        first = r * K
        count = tl.where(live, K, 0)
    own = tl.load(own_ptr + r[:, None] * D + c[None, :], mask=inside, other=0.0)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for k in range(0, tl.max(count)):
        column = tl.load(column_ptr + first + k, mask=k < count, other=-1).to(tl.int64)
        pulls = inside & (column >= 0)[:, None]
        weight = tl.load(weight_ptr + first + k, mask=(k < count) & (column >= 0), other=0.0)
        other = tl.load(other_ptr + column[:, None] * D + c[None, :], mask=pulls, other=0.0)
        total += tl.where(pulls, 2.0 * weight[:, None] * (own - other), 0.0)
    tl.store(out_ptr + r[:, None] * D + c[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


# Launching and registration


def _empty_knn(x: Tensor, y: Tensor, k: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = *x.shape[:2], k
    return x.new_empty(shape, dtype=sums_dtype(x)), x.new_empty(shape, dtype=torch.int32)


@op(fake=_empty_knn)
def _knn_op(x: Tensor, y: Tensor, k: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    (B, N, D), M = x.shape, y.shape[1]
    sqdist, idx = _empty_knn(x, y, k, lengths)
    blocks, most = cdiv(N, _BLOCK), max(16, triton.next_power_of_2(k))
    points = B * blocks * _BLOCK
    launch(
        _knn_kernel,
        (B * blocks,),
        x.float().mT.contiguous(),
        y.float().contiguous(),
        None if lengths is None else lengths.contiguous(),
        x.new_empty((points, 4 * most), dtype=torch.int64),
        x.new_empty(points, dtype=torch.int32),
        x.new_empty(points, dtype=torch.float32),
        *(sqdist, idx, N, M, D, k, blocks),
        BLOCK=_BLOCK,
        UNROLL=_UNROLL,
        ROWS=min(_BLOCK, max(1, _CUT // (4 * most))),
        LIST=4 * most,
        MOST=most,
        num_warps=1,
    )
    return sqdist, idx


def _pull(own: Tensor, other: Tensor, column: Tensor, start: Tensor | None, weight: Tensor, k: int) -> Tensor:
    """Rows of ``own`` (rows, D) as they are pulled, in its dtype."""
    out = torch.empty_like(own)
    channels = min(_PULL_CHANNELS, triton.next_power_of_2(own.shape[1]))
    rows = _PULL_ELEMENTS // channels
    launch(
        _pull_kernel,
        (cdiv(len(own), rows), cdiv(own.shape[1], channels)),
        *(own.float(), other.float(), column, start, weight, out, *own.shape, k),
        ROWS=rows,
        CHANNELS=channels,
    )
    return out


@op(fake=lambda grad, x, y, idx: (x.new_empty(x.shape), y.new_empty(y.shape)))
def _knn_bwd_op(grad: Tensor, x: Tensor, y: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    (B, _, D), M, k = x.shape, y.shape[1], idx.shape[2]
    weight = grad.float().contiguous().view(-1, k)
    own, other = x.reshape(-1, D).contiguous(), y.reshape(-1, D).contiguous()
    first = torch.arange(B, dtype=torch.int64, device=idx.device) * M
    rows = torch.where(idx < 0, -1, idx + first[:, None, None]).view(-1, k)
    dx = _pull(own, other, rows, None, weight, k)
    # Missing neighbours get a row of their own, behind all others.
    into = transpose(torch.where(rows < 0, B * M, rows), weight, B * M + 1, impl="triton")
    assert into.start is not None and into.weight is not None
    dy = _pull(other, own, into.column, into.start, into.weight, k)
    return dx.view(x.shape), dy.view(y.shape)


@gradient(_knn_op, save=lambda x, y, k, lengths, out: (x, y, out[1]))
def _knn_backward(needs: Needs, grad: Tensor, x: Tensor, y: Tensor, idx: Tensor) -> Gradients:
    return _knn_bwd_op(grad, x, y, idx)


# Public function


def knn(
    x: Float[Tensor, "B N D"],
    y: Float[Tensor, "B M D"],
    k: int,
    *,
    lengths: Int[Tensor, " B"] | None = None,
    impl: Impl = "auto",
) -> tuple[Float[Tensor, "B N K"], Int32[Tensor, "B N K"]]:
    """For each point of x its k nearest points of y, nearest first: squared distances and indices.

    x: (B, N, D), y: (B, M, D), of one dtype, D >= 1. k: >= 1, may exceed M. lengths: (B,) int32 or int64 in [0, M]
    (unchecked), how many points of each cloud of y count; the rest is never read.
    Returns (B, N, k) float32 (float64 for float64) and (B, N, k) int32; ties go to the lowest index; where a cloud has
    fewer than k points, distance infinity and index -1. The distances are differentiable in x and y (once, by
    Triton) through the chosen pairs. Deterministic, backward too. Triton computes float64 input in float32, for k up
    to 64 and D up to 128; "auto" takes the reference beyond.
    ValueError: shapes, dtypes or devices that do not fit; k < 1; k or D beyond the kernel with impl="triton".
    """
    for name, cloud in (("x", x), ("y", y)):
        check_float(name, cloud)
        if cloud.ndim != 3 or cloud.shape[2] == 0:
            raise ValueError(f"{name}: expected shape (B, N, D) with D >= 1, got {tuple(cloud.shape)}")
    check_same(x=x, y=y)
    for what, a, b in (("dtype", x.dtype, y.dtype), ("number of dimensions", x.shape[2], y.shape[2])):
        if a != b:
            raise ValueError(f"y: expected the {what} of x ({a}), got {b}")
    k = check_integer("k", k, least=1)
    if lengths is not None:
        if not isinstance(lengths, Tensor):
            raise ValueError(f"lengths: expected a tensor, got {type(lengths).__name__}")
        if lengths.ndim != 1 or lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"lengths: expected shape (B,) of int32 or int64, got {tuple(lengths.shape)} of {lengths.dtype}"
            )
        check_same(x=x, lengths=lengths)
    fits = k <= _MOST_NEIGHBORS and x.shape[2] <= _MOST_DIMENSIONS
    if use_triton(impl, x) and (fits or impl == "triton"):
        if not fits:
            most = f"k <= {_MOST_NEIGHBORS} and D <= {_MOST_DIMENSIONS}"
            raise ValueError(f'impl: "triton" takes {most}, got k = {k} and D = {x.shape[2]}')
        return _knn_op(x, y, k, lengths)
    if impl == "auto" and x.device.type == "cpu":
        return _by_cloud(_search_cpu, x, y, k, lengths)
    return knn_reference(x, y, k, lengths)
