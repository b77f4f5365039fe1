"""Matrix products inside of kernels: sums in float32, factors in the dtype of the features."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lion_triton.kernels._triton import tl, triton

Setting = Literal["conv", "matmul"]  # which of PyTorch's says whether factors of float32 may be rounded to TF32

# NumPy, by which the interpreter multiplies, does not know of bfloat16, nor of matrix units.
_INTERPRETED = triton.knobs.runtime.interpret
is_hip = tl.target_info.is_hip


@torch.compiler.assume_constant_result
def _tf32(setting: Setting) -> bool:
    backend: Any = torch.backends.cudnn.conv if setting == "conv" else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return bool(backend.fp32_precision == "tf32")


def by_matrix_units(x: Tensor, setting: Setting) -> bool:
    """Whether products of features like x may be made inside of a kernel: without matrix units they take too many
    registers, and PyTorch's own are better."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return _INTERPRETED or half or (x.dtype == torch.float32 and _tf32(setting))


def factors_like(x: Tensor, setting: Setting) -> dict[str, Any]:
    """How a kernel multiplies features like x."""
    dtype = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(x.dtype, tl.float32)
    return {"FACTOR": tl.float32 if _INTERPRETED else dtype, "PRECISION": "tf32" if _tf32(setting) else "ieee"}


@triton.jit
def dot(a, b, total, FACTOR: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """``total + a @ b``."""
    return tl.dot(a.to(FACTOR), b.to(FACTOR), total, input_precision=PRECISION)


@triton.jit
def precise_dot(a, b, total):  # type: ignore[no-untyped-def]
    """``total + a @ b`` of float32 factors to its precision, by products of TF32 where there are such."""
    PRECISION: tl.constexpr = "ieee" if is_hip() else "tf32x3"
    return tl.dot(a, b, total, input_precision=PRECISION)
