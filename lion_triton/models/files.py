"""Files that are written whole or not at all, and how it is seen that they still are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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


def write_text(path: Path, text: str) -> None:
    """The same with a text."""
    write_whole(path, lambda partial: partial.write_text(text))


def partial_of(path: Path) -> Path:
    """The name of a file until it is complete; a process that was killed leaves one behind."""
    return path.with_name(f".{path.name}.partial")


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write safetensors, readable by whom the user's files are readable (``safetensors`` itself: by the user alone)."""
    on_cpu = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_whole(path, lambda partial: partial.write_bytes(safetensors.torch.save(on_cpu)))


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(path: Path) -> dict[str, Any]:
    """By which a file is known again: ``bytes`` and ``sha256``."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
