"""What the element-wise ops of diffusion share: how a kernel finds its elements, how it is launched, what is checked.

One program makes one block of one cloud. Elements are counted over the whole batch, as the noise counts its own, which
may begin before the tensor's first cloud (``noise.py`` on the key's third number). Sums
over a cloud are partial sums per program, then a sum over programs in a fixed order: results repeat bit for bit.

Legend: B clouds, M elements per cloud (whatever the shape behind B).
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from lion_triton.kernels._checks import check_device, check_float, sums_dtype
from lion_triton.kernels._triton import cdiv, launch, tl, triton

# Elements of a cloud that counts as small; counters (of four elements) per program, and warps, of small and others. One
# counter a thread for shape latents, two for clouds: by machine code (no spill, 128-bit accesses), not by timing.
_SMALL, _SMALL_BLOCK, _BLOCK = 128, (32, 1), (256, 4)


@triton.jit
def locate(before, M, chunks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Cloud, first noise counter, where the 4 * BLOCK elements from there are, and which of them are the cloud's.

    Noise counters run over the whole batch, of which ``before`` clouds come before this tensor's: a cloud whose M is no
    multiple of four may start and end inside a counter.
    """
    pid = tl.program_id(0)
    cloud = (pid // chunks).to(tl.int64)
    begin = cloud * M
    start = before * M
    first = (start + begin) // 4 + (pid % chunks).to(tl.int64) * BLOCK
    i = first * 4 - start + tl.arange(0, 4 * BLOCK)
    return cloud, first, i, (i >= begin) & (i < begin + M)


@triton.jit
def load(ptr, i, mask):  # type: ignore[no-untyped-def]
    return tl.load(ptr + i, mask=mask, other=0.0).to(tl.float32)


def _config(x: Tensor) -> tuple[int, int, int, int]:
    """Elements per cloud, programs per cloud, noise counters per program, warps."""
    M = prod(x.shape[1:])
    block, warps = _SMALL_BLOCK if M <= _SMALL else _BLOCK
    # A cloud that starts inside a counter may reach three elements further.
    chunks = cdiv(M if M % 4 == 0 else M + 3, 4 * block)
    return M, chunks, block, warps


def launch_elements(kernel: Any, x: Tensor, *tensors: Tensor | None) -> None:
    M, chunks, block, warps = _config(x)
    dense = [None if t is None else t.contiguous() for t in tensors]
    launch(kernel, (x.shape[0] * chunks,), *dense, M, chunks, BLOCK=block, num_warps=warps)


def empty_partials(x: Tensor, *count: int) -> Tensor:
    """Room for a sum, or ``count`` of them, of every program; ``.sum(1)`` adds a cloud's in a fixed order."""
    return x.new_empty((x.shape[0], _config(x)[1], *count), dtype=torch.float32)


def empty_like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def empty_sums(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[:1], dtype=sums_dtype(x))


def check_batch(name: str, x: Tensor) -> None:
    check_float(name, x)
    if x.ndim == 0 or 0 in x.shape[1:]:
        raise ValueError(f"{name}: expected shape (B, ...) with at least one element a cloud, got {tuple(x.shape)}")


def check_like(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    check_float(name, x)
    if x.shape != like.shape:
        raise ValueError(f"{name}: expected the shape of {like_name} {tuple(like.shape)}, got {tuple(x.shape)}")
    check_device(name, x, like_name, like)


def check_scalars(like_name: str, like: Tensor, **scalars: Tensor) -> None:
    shape = like.shape[:1]
    for name, x in scalars.items():
        check_float(name, x)
        if x.shape != shape:
            raise ValueError(f"{name}: expected one value per cloud, shape ({len(like)},), got {tuple(x.shape)}")
        check_device(name, x, like_name, like)
