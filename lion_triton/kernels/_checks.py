"""Argument checks and dispatch shared by every op of this package."""

from __future__ import annotations

import os
from importlib.util import find_spec
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "reference"]

_TRITON_INSTALLED = find_spec("triton") is not None
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_float(name: str, x: Tensor) -> None:
    """Raise ``ValueError`` unless ``x`` has a floating dtype that the ops take."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATS:
        raise ValueError(f"{name}: expected float32, float64, bfloat16 or float16, got {x.dtype}")


def check_points(name: str, x: Tensor) -> None:
    """Raise ``ValueError`` unless ``x`` is a floating, non-empty cloud batch (B, N, 3)."""
    check_float(name, x)
    if x.ndim != 3 or x.shape[-1] != 3 or x.shape[1] == 0:
        raise ValueError(f"{name}: expected shape (B, N, 3) with N >= 1, got {tuple(x.shape)}")


def check_clouds(**clouds: Tensor) -> None:
    """Raise ``ValueError`` unless two cloud batches share batch size, device and dtype."""
    for name, cloud in clouds.items():
        check_points(name, cloud)
    check_same(**clouds)
    (first, a), (second, b) = clouds.items()
    if a.dtype != b.dtype:
        raise ValueError(f"{second}: expected the dtype of {first} ({a.dtype}), got {b.dtype}")


def check_integer(name: str, value: Any, least: int) -> int:
    """A Python (or NumPy) integer of at least ``least`` as Python's; anything else raises ``ValueError``."""
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
    return value if isinstance(value, int) else int(value)


def check_same(**tensors: Tensor) -> None:
    """Raise ``ValueError`` unless all tensors share one device and one batch size (dimension 0)."""
    (first, a), *rest = tensors.items()
    for name, b in rest:
        check_device(name, b, first, a)
        if a.shape[0] != b.shape[0]:
            raise ValueError(f"{name}: expected the batch size of {first} ({a.shape[0]}), got {b.shape[0]}")


def check_device(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Raise ``ValueError`` unless ``x`` is where ``like`` is."""
    if x.device != like.device:
        raise ValueError(f"{name}: expected the device of {like_name} ({like.device}), got {x.device}")


def check_finite(**clouds: Tensor) -> None:
    """Raise ``ValueError`` unless all values are finite: ``check_finite(points=points)``.

    The ops do not look: on a GPU it means waiting for the device. Given NaN or infinity they return some index in
    bounds and distances that may be NaN. Tensors (B, ...) of any floating dtype.
    """
    for name, cloud in clouds.items():
        check_float(name, cloud)
        if cloud.ndim < 2:
            raise ValueError(f"{name}: expected shape (B, ...) with at least 2 dimensions, got {tuple(cloud.shape)}")
        bad = (~cloud.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if bad:
            more = f" ({len(bad)} clouds in all)" if len(bad) > 1 else ""
            raise ValueError(f"{name}: expected finite coordinates, got NaN or infinity in cloud {bad[0]}{more}")


def interpreting() -> bool:
    """True when Triton's interpreter runs kernels on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_gpu(x: Tensor) -> bool:
    """Where ``auto`` means Triton."""
    return x.is_cuda


def use_triton(impl: Impl, x: Tensor) -> bool:
    """Decide which implementation runs.

    ``auto`` is Triton on a GPU, and the reference elsewhere or where Triton is not installed. An explicit ``triton``
    never falls back: it needs a GPU tensor, or TRITON_INTERPRET=1 for a CPU tensor.
    """
    if impl == "reference":
        return False
    if impl == "auto":
        return on_gpu(x) and _TRITON_INSTALLED
    if impl != "triton":
        raise ValueError(f'impl: expected "auto", "triton" or "reference", got {impl!r}')
    if not _TRITON_INSTALLED:
        raise ValueError('impl: "triton" needs Triton, which is not installed')
    if not x.is_cuda and not interpreting():
        raise ValueError(f'impl="triton" needs a GPU tensor or TRITON_INTERPRET=1, got a tensor on {x.device}')
    return True


def upcast(x: Tensor) -> Tensor:
    """Float32, or float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def sums_dtype(x: Tensor) -> torch.dtype:
    """Of results that are sums over a floating ``x``: that of ``upcast(x)``."""
    return torch.promote_types(x.dtype, torch.float32)


def check_groups(num_groups: int, C: int) -> int:
    """A number of groups that C channels can be cut into; anything else raises ``ValueError``."""
    if not isinstance(num_groups, Integral) or num_groups < 1 or C % num_groups:
        raise ValueError(f"num_groups: expected a divisor of C = {C}, got {num_groups!r}")
    return int(num_groups)


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor, like: str = "x") -> None:
    """Raise ``ValueError`` unless a tensor has this shape, a floating dtype and the device of x, called ``like``."""
    check_float(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected the device of {like} ({x.device}), got {tensor.device}")
