"""The head of a set abstraction: neighbours gathered with their offsets.

    y[m, k] = F[i(m, k)] + W o(m, k)    dF[n] = sum_{m,k: i(m,k) = n} dy[m, k],   do = W^T dy,
                                        dW = sum_{m,k} dy[m, k] o(m, k)^T

A linear map of [offset, features] multiplies before it gathers: the features once per point, not once per neighbour,
while the offsets, small differences of coordinates, are multiplied as they are, in float32.

Legend: B clouds, N points, M centres, K neighbours, C channels. Sums are float32 (float64 in the reference of float64
features), rounded once. Bytes of features of s bytes: s C B (N + M K) and 16 B M K to gather, 2 s C B M K backward.
Deterministic, backward too.
Source: Qi et al., "PointNet++", NeurIPS 2017, as LION computes it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lion_triton.kernels._checks import Impl, check_float, check_same, upcast, use_triton
from lion_triton.kernels._op import Gradients, Needs, gradient, op
from lion_triton.kernels._triton import launch, tl, triton
from lion_triton.kernels.gather import check_gather, row_index
from lion_triton.kernels.rows import block_of_rows, take_rows_backward, take_rows_reference

_WARPS, _SUMMED = 4, 512  # rows that a program of the backward sums up


def group_offsets_reference(
    features: Float[Tensor, "B N C"],
    idx: Int[Tensor, "B M K"],
    offsets: Float[Tensor, "B M K 3"],
    weight: Float[Tensor, "C 3"],
) -> Float[Tensor, "B M K C"]:
    """Plain PyTorch form of :func:`group_offsets`."""
    rows = upcast(take_rows_reference(features.flatten(0, 1), row_index(idx, features.shape[1]).reshape(-1, 1)))
    y = rows.addmm_(offsets.flatten(0, 2).to(rows.dtype), weight.to(rows.dtype).T)
    return y.view(*idx.shape, features.shape[2]).to(features.dtype)


def group_offsets(
    features: Float[Tensor, "B N C"],
    idx: Int[Tensor, "B M K"],
    offsets: Float[Tensor, "B M K 3"],
    weight: Float[Tensor, "C 3"],
    *,
    impl: Impl = "auto",
) -> Float[Tensor, "B M K C"]:
    """Rows of ``features`` at ``idx``, plus a linear map of the neighbours' offsets.

    features: (B, N, C), any floating dtype, already multiplied. idx: (B, M, K) int32 or int64 in [0, N), as of
    ``group``. offsets: (B, M, K, 3), neighbour minus centre. weight: (C, 3). Returns (B, M, K, C) in the dtype of
    features. Differentiable in features, offsets and weight (once, by Triton); deterministic, backward too. Triton
    computes float64 in float32. ValueError: shapes, dtypes, devices or indices that do not fit.
    """
    check_group_offsets(features, idx, offsets, weight)
    if not use_triton(impl, features):
        return group_offsets_reference(features, idx, offsets, weight)
    index = row_index(idx, features.shape[1]).reshape(-1, 1)
    y = _group_offsets_op(features.flatten(0, 1), index, offsets.flatten(0, 2), weight)
    return y.view(*idx.shape, features.shape[2])


def check_group_offsets(features: Tensor, idx: Tensor, offsets: Tensor, weight: Tensor) -> None:
    """Raise ``ValueError`` unless the arguments of :func:`group_offsets` fit."""
    check_gather(features, idx)
    check_float("offsets", offsets)
    check_float("weight", weight)
    check_same(features=features, offsets=offsets)
    if offsets.shape != (*idx.shape, 3):
        raise ValueError(f"offsets: expected shape {(*idx.shape, 3)}, got {tuple(offsets.shape)}")
    if weight.shape != (features.shape[2], 3):
        raise ValueError(f"weight: expected shape {(features.shape[2], 3)}, got {tuple(weight.shape)}")


# Kernels


@triton.jit
def _group_offsets_kernel(  # type: ignore[no-untyped-def]
    x_ptr, index_ptr, offsets_ptr, weight_ptr, out_ptr, num_rows, C, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    in_rows, in_channels = r < num_rows, c < C
    mask = in_rows[:, None] & in_channels[None, :]
    row = tl.load(index_ptr + r, mask=in_rows, other=0).to(tl.int64)
    y = tl.load(x_ptr + row[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    for axis in tl.static_range(3):
        offset = tl.load(offsets_ptr + r * 3 + axis, mask=in_rows, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + c * 3 + axis, mask=in_channels, other=0.0).to(tl.float32)
        y += offset[:, None] * weight[None, :]
    tl.store(out_ptr + r[:, None] * C + c[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _group_offsets_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    offsets_ptr,
    weight_ptr,
    doffsets_ptr,
    partial_ptr,
    num_rows,
    C,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The offsets' gradient, and a program's part of the weight's, (programs, 3, C). CHANNELS holds all of C."""
    c = tl.arange(0, CHANNELS)
    in_channels = c < C
    wx = tl.load(weight_ptr + c * 3, mask=in_channels, other=0.0).to(tl.float32)
    wy = tl.load(weight_ptr + c * 3 + 1, mask=in_channels, other=0.0).to(tl.float32)
    wz = tl.load(weight_ptr + c * 3 + 2, mask=in_channels, other=0.0).to(tl.float32)
    sx = tl.zeros((ROWS, CHANNELS), tl.float32)
    sy = tl.zeros((ROWS, CHANNELS), tl.float32)
    sz = tl.zeros((ROWS, CHANNELS), tl.float32)
    for step in range(STEPS):
        r = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        in_rows = r < num_rows
        mask = in_rows[:, None] & in_channels[None, :]
        grad = tl.load(grad_ptr + r[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if doffsets_ptr is not None:
            out = doffsets_ptr + r * 3
            tl.store(out, tl.sum(grad * wx[None, :], 1).to(out.dtype.element_ty), mask=in_rows)
            tl.store(out + 1, tl.sum(grad * wy[None, :], 1).to(out.dtype.element_ty), mask=in_rows)
            tl.store(out + 2, tl.sum(grad * wz[None, :], 1).to(out.dtype.element_ty), mask=in_rows)
        offsets = offsets_ptr + r * 3
        sx += grad * tl.load(offsets, mask=in_rows, other=0.0).to(tl.float32)[:, None]
        sy += grad * tl.load(offsets + 1, mask=in_rows, other=0.0).to(tl.float32)[:, None]
        sz += grad * tl.load(offsets + 2, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    partial_ptr += tl.program_id(0).to(tl.int64) * 3 * C + c
    tl.store(partial_ptr, tl.sum(sx, 0), mask=in_channels)
    tl.store(partial_ptr + C, tl.sum(sy, 0), mask=in_channels)
    tl.store(partial_ptr + 2 * C, tl.sum(sz, 0), mask=in_channels)


# Launching and registration


@op(fake=lambda x, index, offsets, weight: x.new_empty((index.shape[0], x.shape[1])))
def _group_offsets_op(x: Tensor, index: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    num_rows, C = index.shape[0], x.shape[1]
    out = x.new_empty((num_rows, C))
    rows, channels, grid = block_of_rows(num_rows, C, x)
    tensors = (x.contiguous(), index.contiguous(), offsets.contiguous(), weight.contiguous(), out)
    blocks = {"ROWS": rows, "CHANNELS": channels, "num_warps": _WARPS}
    launch(_group_offsets_kernel, grid, *tensors, num_rows, C, **blocks)
    return out


def _empty_offsets_bwd(grad: Tensor, offsets: Tensor, weight: Tensor, moved: bool) -> tuple[Tensor, Tensor]:
    return offsets.new_empty(offsets.shape if moved else (0, 3)), weight.new_empty(weight.shape)


@op(fake=_empty_offsets_bwd)
def _group_offsets_bwd_op(grad: Tensor, offsets: Tensor, weight: Tensor, moved: bool) -> tuple[Tensor, Tensor]:
    """Gradients of offsets (empty unless ``moved``) and of weight."""
    doffsets, _ = _empty_offsets_bwd(grad, offsets, weight, moved)
    num_rows, C = grad.shape
    channels = max(triton.next_power_of_2(C), 4)
    rows = max(1024 // channels, 1)
    steps = max(_SUMMED // rows, 1)
    grid = (triton.cdiv(num_rows, rows * steps),)
    partials = grad.new_empty((*grid, 3, C), dtype=torch.float32)
    tensors = (grad.contiguous(), offsets.contiguous(), weight.contiguous(), doffsets if moved else None, partials)
    blocks = {"STEPS": steps, "ROWS": rows, "CHANNELS": channels, "num_warps": _WARPS}
    launch(_group_offsets_bwd_kernel, grid, *tensors, num_rows, C, **blocks)
    return doffsets, partials.sum(0).T.to(weight.dtype, copy=True, memory_format=torch.contiguous_format)


@gradient(
    _group_offsets_op,
    save=lambda x, index, offsets, weight, out: (index, offsets, weight, x.shape[0]),
)
def _group_offsets_backward(
    needs: Needs, grad: Tensor, index: Tensor, offsets: Tensor, weight: Tensor, num_rows: int
) -> Gradients:
    dx = take_rows_backward(grad, index, None, num_rows) if needs[0] else None
    if not needs[2] and not needs[3]:
        return (dx,)
    doffsets, dweight = _group_offsets_bwd_op(grad, offsets, weight, needs[2])
    return dx, None, doffsets if needs[2] else None, dweight
