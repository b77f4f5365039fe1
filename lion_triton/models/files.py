"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` write a file, which appears under its name when it is complete."""
    partial = partial_of(path)
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """The name of a file until it is complete; a process that was killed leaves one behind."""
    return path.with_name(f".{path.name}.partial")


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write safetensors, readable by whom the user's files are readable (``safetensors`` itself: by the user alone)."""
    on_cpu = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_whole(path, lambda partial: partial.write_bytes(safetensors.torch.save(on_cpu)))
