"""Triton where it is installed. It ships for Linux only, and every op has a reference that does without."""

from __future__ import annotations

from typing import Any

import torch


class _Missing:
    """Stands for Triton where it is missing: kernels can still be defined, and raise when launched."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # or inspect.unwrap would follow __wrapped__ for ever
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __getitem__(self, grid: Any) -> Any:
        raise RuntimeError('impl="triton" needs Triton, which is not installed: use impl="reference"')


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = _Missing()


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


@torch.compiler.assume_constant_result
def warp_size() -> int:
    """Threads of a warp of the GPU that kernels are compiled for; 32 where they are interpreted."""
    if triton.knobs.runtime.interpret:
        return 32
    return int(triton.runtime.driver.active.get_current_target().warp_size)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run a kernel on the device of its first argument; where there is nothing to do, nothing is run."""
    if 0 not in grid:
        with torch.cuda.device_of(args[0]):
            kernel[grid](*args, **meta)


__all__ = ["cdiv", "launch", "tl", "triton", "warp_size"]
