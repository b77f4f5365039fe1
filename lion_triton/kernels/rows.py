"""Rows times a sparse matrix: the one gather behind every scatter, gather and interpolation of this package.

    product     y[r] = sum_{e in row r} weight[e] x[column[e]]    dx = transpose(matrix) dy
    take_rows   y[r] = sum_k weight[r, k] x[index[r, k]]          dx[i] = sum_{r, k: index[r, k] = i} weight[r, k] dy[r]
                                                                  dweight[r, k] = dy[r] . x[index[r, k]]

Nothing is ever scattered: the transpose of a matrix lists, for each row of its result, what adds up there, so that
every output row is written once, its terms are added in a fixed order and two runs agree bit for bit. For
``product`` the caller holds the transpose (a plan); ``take_rows`` makes it in its backward by a stable sort.

Legend: n rows of x, E entries, K entries per row, C channels. Sums are float32 (float64 in the reference of float64
input), rounded once. Bytes of a pass: s C (E + rows) for features of s bytes, and 8 E + 4 rows for the matrix;
operations: 2 E C. A transpose moves 20 E + 4 n bytes after its sort, with a bisection per row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lion_triton.kernels._checks import Impl, upcast, use_triton
from lion_triton.kernels._op import Gradients, Needs, gradient, op
from lion_triton.kernels._triton import launch, tl, triton

# Chosen by machine code, not by timing: 32 bytes of features a thread are two 128-bit accesses per entry, and four
# entries are in flight together (eight at once the compiler puts one behind the other). Rows of unequal length wait
# for the longest of their program, so more rows would cost more than they save. Channels that are no multiple of 16
# make scalar accesses, each with registers of its own, hence fewer a thread.
_WARPS, _BYTES_PER_THREAD, _SCALARS_PER_THREAD = 4, 32, 4
_UNROLL, _MOST_CHANNELS = 4, 256
_TRANSPOSE_BLOCK = 512


class SparseRows(NamedTuple):
    """A sparse matrix by rows: row r has the entries ``start[r]`` to ``start[r + 1] - 1``.

    With as many entries in every row, ``start`` is None and the others are (rows, K). No ``weight`` means ones.
    """

    column: Int[Tensor, " ..."]
    start: Int[Tensor, " rows_plus_1"] | None = None
    weight: Float[Tensor, " ..."] | None = None

    @property
    def num_rows(self) -> int:
        return self.column.shape[0] if self.start is None else self.start.shape[0] - 1


def product_reference(x: Float[Tensor, "n C"], matrix: SparseRows, transpose: SparseRows) -> Float[Tensor, "rows C"]:
    """Plain PyTorch form of :func:`product`."""
    rows = upcast(x)
    return _product_reference_op(rows, *_weights_like(rows, matrix), *_weights_like(rows, transpose)).to(x.dtype)


def take_rows_reference(
    x: Float[Tensor, "n C"], index: Int[Tensor, "rows K"], weight: Float[Tensor, "rows K"] | None = None
) -> Float[Tensor, "rows C"]:
    """Plain PyTorch form of :func:`take_rows`."""
    if weight is None and index.shape[1] == 1:
        return _take_rows_reference_op(x, index, None)
    dtype = upcast(x).dtype if weight is None else torch.promote_types(upcast(x).dtype, weight.dtype)
    return _take_rows_reference_op(x.to(dtype), index, None if weight is None else weight.to(dtype)).to(x.dtype)


def product(
    x: Float[Tensor, "n C"], matrix: SparseRows, transpose: SparseRows, *, impl: Impl = "auto"
) -> Float[Tensor, "rows C"]:
    """``matrix @ x``, in the dtype of x; differentiable in x alone, any number of times.

    matrix: (rows, n); transpose: the same matrix, transposed. Neither is checked: they come from a plan.
    """
    if not use_triton(impl, x):
        return product_reference(x, matrix, transpose)
    return _product_op(x, *matrix, *transpose)


def take_rows(
    x: Float[Tensor, "n C"],
    index: Int[Tensor, "rows K"],
    weight: Float[Tensor, "rows K"] | None = None,
    *,
    impl: Impl = "auto",
) -> Float[Tensor, "rows C"]:
    """Sum of K (weighted) rows of x, in the dtype of x; differentiable in x and weight (once, by Triton).

    index: in [0, n), unchecked.
    """
    if not use_triton(impl, x):
        return take_rows_reference(x, index, weight)
    return _take_rows_op(x, index, weight)


def take_rows_backward(
    grad: Float[Tensor, "rows C"], index: Int[Tensor, "rows K"], weight: Float[Tensor, "rows K"] | None, num_rows: int
) -> Float[Tensor, "n C"]:
    """By Triton, the gradient of x in ``take_rows(x, index, weight)``, of ``num_rows`` rows."""
    return _take_rows_bwd_op(grad, index, weight, num_rows)


def sort_by_target(index: Int[Tensor, " E"], num_rows: int) -> tuple[Int[Tensor, " E"], Int[Tensor, " rows_plus_1"]]:
    """The entries in order of the row they point at (stable), and where each row's run starts. No host sync."""
    # On a CPU counting is 10 to 20 times faster than a bisection per row.
    count = torch.zeros(num_rows + 1, dtype=index.dtype, device=index.device)
    count.index_add_(0, index + 1, torch.ones_like(index))
    return index.argsort(stable=True), count.cumsum(0, dtype=index.dtype)


def transpose(
    index: Int[Tensor, "rows K"], weight: Float[Tensor, "rows K"] | None, num_columns: int, *, impl: Impl = "auto"
) -> SparseRows:
    """The transpose of a matrix with K entries in every row; a row's entries are in the order of the matrix's rows.

    One stable sort, and with Triton one launch. No host sync; no gradient.
    """
    if not use_triton(impl, index):
        return _transpose_reference(index, weight, num_columns)
    return _launch_transpose(index, weight, num_columns)


# References


@op(fake=lambda x, column, start, *_: x.new_empty((SparseRows(column, start).num_rows, x.shape[1])))
def _product_reference_op(
    x: Tensor,
    column: Tensor,
    start: Tensor | None,
    weight: Tensor | None,
    column_t: Tensor,
    start_t: Tensor | None,
    weight_t: Tensor | None,
) -> Tensor:
    return bags(x, column, start, weight)


@gradient(_product_reference_op, save=lambda x, *matrices_and_out: matrices_and_out[:-1], once=False)
def _product_reference_backward(needs: Needs, grad: Tensor, *matrices: Any) -> Gradients:
    return (_product_reference_op(grad, *matrices[3:], *matrices[:3]),)


@op(fake=lambda x, index, weight: x.new_empty((index.shape[0], x.shape[1])))
def _take_rows_reference_op(x: Tensor, index: Tensor, weight: Tensor | None) -> Tensor:
    return x.index_select(0, index[:, 0]) if weight is None and index.shape[1] == 1 else bags(x, index, None, weight)


@op(fake=lambda grad, index, weight, num_rows: grad.new_empty((num_rows, grad.shape[1])))
def _take_rows_reference_bwd_op(grad: Tensor, index: Tensor, weight: Tensor | None, num_rows: int) -> Tensor:
    # 2 to 3 times faster on a CPU than the scatter that autograd makes.
    return bags(grad, *_transpose_reference(index, weight, num_rows))


@gradient(_take_rows_reference_op, save=lambda x, index, weight, out: (x, index, weight), once=False)
def _take_rows_reference_backward(
    needs: Needs, grad: Tensor, x: Tensor, index: Tensor, weight: Tensor | None
) -> Gradients:
    dx = _take_rows_reference_bwd_op(grad, index, weight, x.shape[0]) if needs[0] else None
    dweight = torch.stack([(x[i] * grad).sum(-1) for i in index.unbind(1)], 1) if needs[2] else None
    return dx, None, dweight


@gradient(
    _take_rows_reference_bwd_op, save=lambda grad, index, weight, num_rows, out: (grad, index, weight), once=False
)
def _take_rows_reference_bwd_backward(
    needs: Needs, grad: Tensor, cotangent: Tensor, index: Tensor, weight: Tensor | None
) -> Gradients:
    d = _take_rows_reference_op(grad, index, weight) if needs[0] else None
    dweight = torch.stack([(grad[i] * cotangent).sum(-1) for i in index.unbind(1)], 1) if needs[2] else None
    return d, None, dweight


def bags(x: Tensor, column: Tensor, start: Tensor | None, weight: Tensor | None) -> Tensor:
    """Sums of the (weighted) rows of x that each row of a sparse matrix names."""
    # On a CPU 10 to 100 times faster than gathering (rows, K, C) and summing.
    last = start is not None
    return F.embedding_bag(column, x, start, mode="sum", per_sample_weights=weight, include_last_offset=last)


def _transpose_reference(index: Tensor, weight: Tensor | None, num_columns: int) -> SparseRows:
    order, start = sort_by_target(index.flatten(), num_columns)
    column = (order if index.shape[1] == 1 else order // index.shape[1]).to(_row_dtype(index))
    return SparseRows(column, start, None if weight is None else weight.flatten().index_select(0, order))


def _row_dtype(index: Tensor) -> torch.dtype:
    """Of the transpose's columns, which count the rows of ``index`` and not what it points at."""
    return index.dtype if index.shape[0] < 2**31 else torch.int64


def _weights_like(x: Tensor, matrix: SparseRows) -> SparseRows:
    return matrix if matrix.weight is None else matrix._replace(weight=matrix.weight.to(x.dtype))


# Kernels


@triton.jit
def _product_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    column_ptr,
    start_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    C,
    PER_ROW: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_rows = r < num_rows
    in_channels = (c < C)[None, :]
    if start_ptr is not None:
        first = tl.load(start_ptr + r, mask=in_rows, other=0)
        count = tl.load(start_ptr + r + 1, mask=in_rows, other=0) - first
        longest = tl.max(count)
    else:
        first = r * PER_ROW
        count = tl.where(in_rows, PER_ROW, 0)
        longest = PER_ROW
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for begin in range(0, longest, UNROLL):
        for i in tl.static_range(UNROLL):  # independent loads, added in order
            k = begin + i
            live = k < count
            column = tl.load(column_ptr + first + k, mask=live, other=0).to(tl.int64)
            value = tl.load(x_ptr + column[:, None] * C + c[None, :], mask=live[:, None] & in_channels, other=0.0)
            value = value.to(tl.float32)
            if weight_ptr is not None:
                value *= tl.load(weight_ptr + first + k, mask=live, other=0.0).to(tl.float32)[:, None]
            total += value
    out = out_ptr + r[:, None] * C + c[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=in_rows[:, None] & in_channels)


@triton.jit
def _transpose_kernel(  # type: ignore[no-untyped-def]
    target_ptr,
    order_ptr,
    weight_ptr,
    column_t_ptr,
    start_t_ptr,
    weight_t_ptr,
    num_entries,
    num_columns,
    bits,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Entry i, of those sorted by target, and the start of row i."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_entry = i < num_entries
    order = tl.load(order_ptr + i, mask=is_entry, other=0)
    tl.store(column_t_ptr + i, (order // PER_ROW).to(column_t_ptr.dtype.element_ty), mask=is_entry)
    if weight_ptr is not None:
        tl.store(weight_t_ptr + i, tl.load(weight_ptr + order, mask=is_entry, other=0.0), mask=is_entry)

    is_row = i <= num_columns
    start = tl.zeros((BLOCK,), tl.int64)  # how many targets are below i, highest bit first
    step = tl.full((), 1, tl.int64) << bits
    for _ in range(bits):
        step = step >> 1
        more = start + step
        fits = is_row & (more <= num_entries)
        below = tl.load(target_ptr + more - 1, mask=fits, other=0) < i
        start = tl.where(fits & below, more, start)
    tl.store(start_t_ptr + i, start.to(start_t_ptr.dtype.element_ty), mask=is_row)


@triton.jit
def _row_dots_kernel(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, index_ptr, out_ptr, num_rows, C, PER_ROW: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """out[r, k] = y[r] . x[index[r, k]]"""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = r < num_rows
    for k in range(PER_ROW):
        column = tl.load(index_ptr + r * PER_ROW + k, mask=in_rows, other=0).to(tl.int64)
        total = tl.zeros((ROWS, CHANNELS), tl.float32)
        for first in range(0, C, CHANNELS):
            c = first + tl.arange(0, CHANNELS)
            mask = in_rows[:, None] & (c < C)[None, :]
            x = tl.load(x_ptr + column[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + r[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
            total += x * y
        dot = tl.sum(total, 1)
        tl.store(out_ptr + r * PER_ROW + k, dot.to(out_ptr.dtype.element_ty), mask=in_rows)


# Launching and registration


def block_of_rows(num_rows: int, C: int, x: Tensor) -> tuple[int, int, tuple[int, int]]:
    """Rows and channels of a program that gathers rows of C channels like those of x, and the grid of all."""
    per_thread = _SCALARS_PER_THREAD if C % 16 else _BYTES_PER_THREAD // x.element_size()
    channels = min(max(triton.next_power_of_2(C), 4), _MOST_CHANNELS)
    rows = 32 * _WARPS * per_thread // channels
    return rows, channels, (triton.cdiv(num_rows, rows), triton.cdiv(C, channels))


def _launch_product(x: Tensor, matrix: SparseRows) -> Tensor:
    C = x.shape[1]
    out = x.new_empty((matrix.num_rows, C))
    per_row = matrix.column.shape[1] if matrix.start is None else 0
    dense = (None if t is None else t.contiguous() for t in matrix)
    rows, channels, grid = block_of_rows(matrix.num_rows, C, x)
    launch(
        _product_kernel,
        grid,
        x.contiguous(),
        *dense,
        out,
        matrix.num_rows,
        C,
        PER_ROW=per_row,
        UNROLL=min(_UNROLL, triton.next_power_of_2(per_row)) if per_row else _UNROLL,
        ROWS=rows,
        CHANNELS=channels,
        num_warps=_WARPS,
    )
    return out


def _launch_transpose(index: Tensor, weight: Tensor | None, num_columns: int) -> SparseRows:
    entries = index.numel()
    target, order = index.flatten().sort(stable=True)
    column = index.new_empty(entries, dtype=_row_dtype(index))
    start = index.new_empty(num_columns + 1, dtype=torch.int32 if entries < 2**31 else torch.int64)
    weight_t = None if weight is None else weight.new_empty(entries)
    if entries == 0:
        return SparseRows(column, start.zero_(), weight_t)
    launch(
        _transpose_kernel,
        (triton.cdiv(max(entries, num_columns + 1), _TRANSPOSE_BLOCK),),
        target,
        order,
        None if weight is None else weight.contiguous(),
        column,
        start,
        weight_t,
        entries,
        num_columns,
        entries.bit_length(),
        PER_ROW=index.shape[1],
        BLOCK=_TRANSPOSE_BLOCK,
    )
    return SparseRows(column, start, weight_t)


@op(fake=lambda x, column, start, *_: x.new_empty((SparseRows(column, start).num_rows, x.shape[1])))
def _product_op(
    x: Tensor,
    column: Tensor,
    start: Tensor | None,
    weight: Tensor | None,
    column_t: Tensor,
    start_t: Tensor | None,
    weight_t: Tensor | None,
) -> Tensor:
    return _launch_product(x, SparseRows(column, start, weight))


@gradient(_product_op, save=lambda x, *matrices_and_out: matrices_and_out[:-1], once=False)
def _product_backward(needs: Needs, grad: Tensor, *matrices: Any) -> Gradients:
    return (_product_op(grad, *matrices[3:], *matrices[:3]),)


@op(fake=lambda x, index, weight: x.new_empty((index.shape[0], x.shape[1])))
def _take_rows_op(x: Tensor, index: Tensor, weight: Tensor | None) -> Tensor:
    return _launch_product(x, SparseRows(index, None, weight))


@op(fake=lambda grad, index, weight, num_rows: grad.new_empty((num_rows, grad.shape[1])))
def _take_rows_bwd_op(grad: Tensor, index: Tensor, weight: Tensor | None, num_rows: int) -> Tensor:
    return _launch_product(grad, _launch_transpose(index, weight, num_rows))


@op(fake=lambda x, y, index, like: like.new_empty(index.shape))
def _row_dots_op(x: Tensor, y: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """``out[r, k] = y[r] . x[index[r, k]]`` in the dtype of ``like``."""
    out = like.new_empty(index.shape)
    rows, channels, grid = block_of_rows(index.shape[0], x.shape[1], x)
    launch(
        _row_dots_kernel,
        grid[:1],
        x.contiguous(),
        y.contiguous(),
        index.contiguous(),
        out,
        *y.shape,
        PER_ROW=index.shape[1],
        ROWS=rows,
        CHANNELS=channels,
        num_warps=_WARPS,
    )
    return out


@gradient(
    _take_rows_op,
    save=lambda x, index, weight, out: (None if weight is None else x, index, weight, x.shape[0]),
)
def _take_rows_backward(
    needs: Needs, grad: Tensor, x: Tensor | None, index: Tensor, weight: Tensor | None, num_rows: int
) -> Gradients:
    dx = _take_rows_bwd_op(grad, index, weight, num_rows) if needs[0] else None
    dweight = _row_dots_op(x, grad, index, weight) if x is not None and weight is not None and needs[2] else None
    return dx, None, dweight
