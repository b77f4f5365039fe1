"""Which device a program runs on, in which precision, and with what memory."""

from __future__ import annotations

import ctypes
import sys
from contextlib import AbstractContextManager, nullcontext

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def best_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` becomes ``bf16`` where the hardware computes with it natively, else ``no`` (float32)."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    # Older PyTorch cannot say; emulated bf16 would be slower than float32.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "no"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """A context in which networks compute in ``precision``; coordinates and statistics stay float32."""
    precision = resolve_precision(precision, device)
    if precision == "no":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


def keep_freed_memory() -> None:
    """Have the C library keep what PyTorch frees on a CPU, up to 2 GB, for its next tensors.

    By default every large tensor is new memory of the system, which is cleared page by page when it is first written:
    a sixth of the time of a training step of the preset ``procedural``. Nothing happens where the library is not
    glibc, or does not take such thresholds.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
