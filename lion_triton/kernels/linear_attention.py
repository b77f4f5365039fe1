"""Attention that is linear in the number of points, as published with LION: the softmax is over the points.

    P = softmax_N(K)   per head and channel,   context = P^T V,   out = Q context          Q is not scaled
    dQ = dout context^T,   dcontext = Q^T dout,   dV = P dcontext
    dK = P (V dcontext^T - s),   s_d = sum_e context_de dcontext_de

P is never written: the maximum and the sum of exponentials of each channel, which one pass over K and V finds together
with the context (the running rescaling of Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018),
make it again in the backward.

Legend: B clouds, N points, H heads, D channels of one. Sums are float32 (float64 in the reference of float64); factors
of products have the dtype of the features. Features of s bytes: forward two launches, 4 s B N H D bytes; backward two,
8 s B N H D. Deterministic, backward too.
Source: the attention of LION's networks; Shen et al., "Efficient Attention", WACV 2021.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lion_triton.kernels._checks import Impl, check_float, use_triton
from lion_triton.kernels._dot import by_matrix_units, dot, factors_like
from lion_triton.kernels._groups import load
from lion_triton.kernels._op import Gradients, Needs, gradient, op
from lion_triton.kernels._triton import launch, tl, triton

_WARPS, _ROWS, _MOST_CHANNELS = 4, 64, 64  # chosen by machine code, not by timing: points at a time, channels of a head


def linear_attention_reference(qkv: Float[Tensor, "B N 3 H D"]) -> Float[Tensor, "B N H D"]:
    """Plain PyTorch form of :func:`linear_attention`."""
    q, k, v = qkv.unbind(2)
    k = k.softmax(dim=1, dtype=torch.promote_types(k.dtype, torch.float32)).to(v.dtype)
    context = torch.einsum("bnhd,bnhe->bhde", k, v)
    return torch.einsum("bhde,bnhd->bnhe", context, q)


def linear_attention(qkv: Float[Tensor, "B N 3 H D"], *, impl: Impl = "auto") -> Float[Tensor, "B N H D"]:
    """``q (softmax_N(k)^T v)`` per head, of q, k and v side by side.

    qkv: (B, N, 3, H, D) with H, D >= 1, any floating dtype, which is also that of the result. Differentiable (once, by
    Triton); deterministic, backward too. Triton takes 16 bits, and float32 where PyTorch may multiply it by TF32; all
    else is the reference's. ValueError: a shape or dtype that does not fit.
    """
    check_float("qkv", qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3 or 0 in qkv.shape[3:]:
        raise ValueError(f"qkv: expected shape (B, N, 3, H, D) with H, D >= 1, got {tuple(qkv.shape)}")
    if not use_triton(impl, qkv) or qkv.shape[4] > _MOST_CHANNELS or not by_matrix_units(qkv, "matmul"):
        return linear_attention_reference(qkv)
    return _linear_attention_op(qkv)[0]


# Kernels. A program has one head of one cloud.


@triton.jit
def _locate(N, H, D, begin, step, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offsets of a block of a head in a tensor whose points are ``step`` H D apart, and presence."""
    cloud, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    n, d = begin + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = ((cloud * N + n)[:, None] * step * H + head) * D + d[None, :]
    return at, (n < N)[:, None] & (d < D)[None, :]


@triton.jit
def _locate_matrix(D, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same of a (D, D) matrix of a head."""
    d = tl.arange(0, WIDTH)
    at = (tl.program_id(0).to(tl.int64) * D + d[:, None]) * D + d[None, :]
    return at, (d < D)[:, None] & (d < D)[None, :]


@triton.jit
def _context_kernel(  # type: ignore[no-untyped-def]
    k_ptr,
    v_ptr,
    context_ptr,
    softmax_ptr,
    N,
    H,
    D,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The context, and maximum and sum of each channel's exponentials, (B, H, 2, D)."""
    top = tl.full((WIDTH,), float("-inf"), tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    context = tl.zeros((WIDTH, WIDTH), tl.float32)
    for begin in range(0, N, ROWS):
        at, mask = _locate(N, H, D, begin, 3, ROWS, WIDTH)
        k = tl.where((begin + tl.arange(0, ROWS) < N)[:, None], load(k_ptr + at, mask), float("-inf"))
        higher = tl.maximum(top, tl.max(k, 0))
        shrink = tl.exp(top - higher)
        p = tl.exp(k - higher[None, :])
        total = total * shrink + tl.sum(p, 0)
        context = dot(tl.trans(p), load(v_ptr + at, mask), context * shrink[:, None], FACTOR, PRECISION)
        top = higher
    at, mask = _locate_matrix(D, WIDTH)
    tl.store(context_ptr + at, context / total[:, None], mask=mask)
    d = tl.arange(0, WIDTH)
    softmax_ptr += tl.program_id(0).to(tl.int64) * 2 * D + d
    tl.store(softmax_ptr, top, mask=d < D)
    tl.store(softmax_ptr + D, total, mask=d < D)


@triton.jit
def _out_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    context_ptr,
    out_ptr,
    N,
    H,
    D,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    at, mask = _locate(N, H, D, tl.program_id(1) * ROWS, 3, ROWS, WIDTH)
    at_matrix, in_matrix = _locate_matrix(D, WIDTH)
    context = load(context_ptr + at_matrix, in_matrix)
    out = dot(load(q_ptr + at, mask), context, tl.zeros((ROWS, WIDTH), tl.float32), FACTOR, PRECISION)
    at, mask = _locate(N, H, D, tl.program_id(1) * ROWS, 1, ROWS, WIDTH)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _context_bwd_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    grad_ptr,
    dcontext_ptr,
    N,
    H,
    D,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dcontext = tl.zeros((WIDTH, WIDTH), tl.float32)
    for begin in range(0, N, ROWS):
        at, mask = _locate(N, H, D, begin, 3, ROWS, WIDTH)
        at_grad, _ = _locate(N, H, D, begin, 1, ROWS, WIDTH)
        dcontext = dot(tl.trans(load(q_ptr + at, mask)), load(grad_ptr + at_grad, mask), dcontext, FACTOR, PRECISION)
    at, mask = _locate_matrix(D, WIDTH)
    tl.store(dcontext_ptr + at, dcontext, mask=mask)


@triton.jit
def _qkv_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    k_ptr,
    v_ptr,
    context_ptr,
    softmax_ptr,
    dcontext_ptr,
    dqkv_ptr,
    N,
    H,
    D,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    at_matrix, in_matrix = _locate_matrix(D, WIDTH)
    context, dcontext = load(context_ptr + at_matrix, in_matrix), load(dcontext_ptr + at_matrix, in_matrix)
    at, mask = _locate(N, H, D, tl.program_id(1) * ROWS, 1, ROWS, WIDTH)
    nothing = tl.zeros((ROWS, WIDTH), tl.float32)
    dq = dot(load(grad_ptr + at, mask), tl.trans(context), nothing, FACTOR, PRECISION)

    at, mask = _locate(N, H, D, tl.program_id(1) * ROWS, 3, ROWS, WIDTH)
    d = tl.arange(0, WIDTH)
    softmax_ptr += tl.program_id(0).to(tl.int64) * 2 * D + d
    top, total = load(softmax_ptr, d < D), tl.load(softmax_ptr + D, mask=d < D, other=1.0)
    p = tl.exp(load(k_ptr + at, mask) - top[None, :]) / total[None, :]
    dv = dot(p, dcontext, nothing, FACTOR, PRECISION)
    dp = dot(load(v_ptr + at, mask), tl.trans(dcontext), nothing, FACTOR, PRECISION)
    dk = p * (dp - tl.sum(context * dcontext, 1)[None, :])
    tl.store(dqkv_ptr + at, dq.to(dqkv_ptr.dtype.element_ty), mask=mask)
    tl.store(dqkv_ptr + H * D + at, dk.to(dqkv_ptr.dtype.element_ty), mask=mask)
    tl.store(dqkv_ptr + 2 * H * D + at, dv.to(dqkv_ptr.dtype.element_ty), mask=mask)


# Launching and registration


def _launch(kernel: object, x: Tensor, blocks: bool, *tensors: Tensor) -> None:
    """By heads, or by blocks of points of each, of qkv or of something like it."""
    (B, N), (H, D) = x.shape[:2], x.shape[-2:]
    width = max(triton.next_power_of_2(D), 16)
    meta = {"ROWS": _ROWS, "WIDTH": width, "num_warps": _WARPS, **factors_like(x, "matmul")}
    launch(kernel, (B * H, triton.cdiv(N, _ROWS)) if blocks else (B * H,), *tensors, N, H, D, **meta)


def _empty_forward(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, N, _, H, D = qkv.shape
    context, softmax = (qkv.new_empty((B, H, rows, D), dtype=torch.float32) for rows in (D, 2))
    return qkv.new_empty((B, N, H, D)), context, softmax


@op(fake=_empty_forward)
def _linear_attention_op(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the context, and what the softmax is made of."""
    q, k, v = qkv.contiguous().unbind(2)
    out, context, softmax = _empty_forward(qkv)
    _launch(_context_kernel, q, False, k, v, context, softmax)
    _launch(_out_kernel, q, True, q, context, out)
    return out, context, softmax


@op(fake=lambda grad, qkv, *_: qkv.new_empty(qkv.shape))
def _linear_attention_bwd_op(grad: Tensor, qkv: Tensor, context: Tensor, softmax: Tensor) -> Tensor:
    grad, (q, k, v) = grad.contiguous(), qkv.contiguous().unbind(2)
    dcontext, dqkv = torch.empty_like(context), qkv.new_empty(qkv.shape)
    _launch(_context_bwd_kernel, q, False, q, grad, dcontext)
    _launch(_qkv_bwd_kernel, q, True, grad, k, v, context, softmax, dcontext, dqkv)
    return dqkv


@gradient(_linear_attention_op, save=lambda qkv, out: (qkv, *out[1:]))
def _linear_attention_backward(needs: Needs, grad: Tensor, *saved: Tensor) -> Gradients:
    return (_linear_attention_bwd_op(grad, *saved),)
