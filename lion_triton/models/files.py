"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
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
    """Write safetensors; what the disk has to say against it is an ``OSError``."""
    on_cpu = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    try:
        write_whole(path, lambda partial: safetensors.torch.save_file(on_cpu, partial))
    except SafetensorError as error:  # is no OSError, though it has one's number in its words
        found = re.search(r"os error (\d+)", str(error))
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) if found else error from error
