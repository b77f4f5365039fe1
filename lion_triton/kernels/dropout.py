"""Dropout whose mask is a function of a key: never stored, made again in the backward, the same on every device.

    y[i] = x[i] / q  where bits(key, i) >= threshold,  0 elsewhere;     dx by the same formula from dy

``i`` counts the elements of the whole batch in row-major order (``noise.py`` on the key's third number). Each has 16
bits of ``philox`` (``noise.py``): element i is half i % 8 of the four words of counter i // 8. The probability is p to
the nearest 2^-16, ``threshold = round(2^16 p)``, and ``q = 1 - threshold 2^-16`` is exactly the share that is kept, so
that the expectation is that of x. ``adagn`` drops out in its own pass by the same bits.

Arithmetic is float32 (float64 in the reference of float64 x), rounded once. 2 s bytes an element of s bytes, forward
and backward, and about 10 integer instructions.
Source: Srivastava et al., "Dropout", JMLR 2014; Salmon et al. 2011 for the bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lion_triton.kernels._checks import Impl, check_float, upcast, use_triton
from lion_triton.kernels._op import Gradients, Needs, gradient, op
from lion_triton.kernels._triton import cdiv, launch, tl, triton
from lion_triton.kernels.noise import (
    Key,
    check_key,
    counted_reference,
    first_sample,
    full_key,
    philox,
    philox_words_reference,
)

_COUNTERS, _WARPS = 128, 4  # of a program: 1024 elements


def keep_threshold(p: float) -> tuple[int, float]:
    """Of dropout's probability: the threshold of the 16 bits, and 1 / (share kept)."""
    if not isinstance(p, (int, float)) or not 0 <= p < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {p!r}")
    threshold = min(round(p * 65536), 65535)
    return threshold, 65536 / (65536 - threshold)


def keep_mask_reference(key: Key, shape: Sequence[int], threshold: int) -> Bool[Tensor, " ..."]:
    """Which elements stay."""

    def block(counters: Tensor) -> Tensor:
        halves = torch.stack(philox_words_reference(key, counters, 0), -1).int().view(torch.int16)  # low half first
        return (halves ^ -32768) >= threshold - 32768  # as unsigned numbers

    return counted_reference(shape, key, 8, block)


def dropout_reference(x: Float[Tensor, " ..."], p: float, key: Key) -> Float[Tensor, " ..."]:
    """Plain PyTorch form of :func:`dropout`."""
    threshold, scale = keep_threshold(p)
    keep = keep_mask_reference(key, x.shape, threshold)
    return (upcast(x) * keep * scale).to(x.dtype)


@triton.jit
def _halves(counter, key_ptr):  # type: ignore[no-untyped-def]
    """Eight blocks of 16 bits of each counter, in the order of their elements."""
    seed, offset = tl.load(key_ptr), tl.load(key_ptr + 1)
    x0, x1, x2, x3 = philox(
        counter.to(tl.uint32),
        (counter >> 32).to(tl.uint32),
        offset.to(tl.uint32),
        (offset >> 32).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    return x0 & 0xFFFF, x0 >> 16, x1 & 0xFFFF, x1 >> 16, x2 & 0xFFFF, x2 >> 16, x3 & 0xFFFF, x3 >> 16


@triton.jit
def keep_elements(key_ptr, counter, threshold):  # type: ignore[no-untyped-def]
    """Mask (..., 8 n) of the elements 8 * counter and up; ``counter`` is an int64 block (..., n)."""
    h0, h1, h2, h3, h4, h5, h6, h7 = _halves(counter, key_ptr)
    even = tl.interleave(tl.interleave(h0, h4), tl.interleave(h2, h6))
    odd = tl.interleave(tl.interleave(h1, h5), tl.interleave(h3, h7))
    return tl.interleave(even, odd).to(tl.int32) >= threshold


@triton.jit
def keep_element(key_ptr, i, threshold):  # type: ignore[no-untyped-def]
    """Mask of the elements ``i``, an int64 block in any order; eight times the work of ``keep_elements``."""
    counter, lane = i >> 3, (i & 7).to(tl.int32)
    h0, h1, h2, h3, h4, h5, h6, h7 = _halves(counter, key_ptr)
    low = tl.where(lane < 2, tl.where(lane == 0, h0, h1), tl.where(lane == 2, h2, h3))
    high = tl.where(lane < 6, tl.where(lane == 4, h4, h5), tl.where(lane == 6, h6, h7))
    return tl.where(lane < 4, low, high).to(tl.int32) >= threshold


@triton.jit(do_not_specialize=["threshold"])
def _dropout_kernel(  # type: ignore[no-untyped-def]
    x_ptr, key_ptr, y_ptr, numel, per_row, threshold, scale, COUNTERS: tl.constexpr
):
    start = first_sample(key_ptr) * per_row
    first = start // 8 + tl.program_id(0).to(tl.int64) * COUNTERS
    i = first * 8 - start + tl.arange(0, 8 * COUNTERS)
    mask = (i >= 0) & (i < numel)
    keep = keep_elements(key_ptr, first + tl.arange(0, COUNTERS), threshold)
    x = tl.load(x_ptr + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, tl.where(keep, x * scale, 0.0).to(y_ptr.dtype.element_ty), mask=mask)


@op(fake=lambda x, key, p: x.new_empty(x.shape))
def _dropout_op(x: Tensor, key: Tensor, p: float) -> Tensor:
    y = x.new_empty(x.shape)
    numel, per_row = x.numel(), prod(x.shape[1:])
    # Rows that start inside a counter may reach seven elements further.
    grid = (cdiv(numel + (7 if numel and per_row % 8 else 0), 8 * _COUNTERS),)
    sizes = (numel, per_row, *keep_threshold(p))
    launch(_dropout_kernel, grid, x.contiguous(), full_key(key), y, *sizes, COUNTERS=_COUNTERS, num_warps=_WARPS)
    return y


@gradient(_dropout_op, save=lambda x, key, p, out: (key, p), once=False)
def _dropout_backward(needs: Needs, grad: Tensor, key: Tensor, p: float) -> Gradients:
    return (_dropout_op(grad, key, p),)


def dropout(x: Float[Tensor, " ..."], p: float, key: Key, *, impl: Impl = "auto") -> Float[Tensor, " ..."]:
    """Zero each element with probability ``p`` and scale the others by 1 / (1 - p); a function of the key alone.

    x: any shape, any floating dtype, which is also the result's. p: in [0, 1), to the nearest 2^-16; 0 returns x.
    key: int64 tensor (seed, offset) or (seed, offset, first), see ``normal_noise``; not one that noise is made from.
    Differentiable in x, any number of times. Deterministic. Triton computes float64 in float32.
    ValueError: p or key of another kind.
    """
    check_float("x", x)
    keep_threshold(p)
    check_key(key, x)
    if p == 0:
        return x
    if not use_triton(impl, x):
        return dropout_reference(x, p, key)
    return _dropout_op(x, key, float(p))
