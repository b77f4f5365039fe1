"""The folder of an evaluation's results: checked before anything is computed, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

JSON, PAGE, SAMPLES = "evaluation.json", "evaluation.html", "samples.npz"
ROOM = 4 << 20  # bytes: a page with its pictures takes about so much


def check(folder: Path, names: Sequence[str]) -> None:
    """Raise ``ValueError`` unless files of these names can be written to the folder, which may not exist yet.

    Files of an earlier evaluation are replaced, any others of these names are not; samples that this evaluation would
    not replace are another one's.
    """
    dangling = any(path.is_symlink() and not path.exists() for path in (folder, *folder.parents))
    if folder.is_file() or dangling or any((folder / name).is_dir() for name in names):
        raise ValueError(f"out: {folder} cannot hold {', '.join(names)}: give another --out")
    taken = [name for name in names if (folder / name).exists()]
    if taken and not _is_evaluation(folder / JSON):
        raise ValueError(f"out: {folder / taken[0]} exists and is no evaluation: give another --out")
    if SAMPLES not in names and (folder / SAMPLES).exists():
        raise ValueError(f"out: {folder} holds the samples of another evaluation: give another --out")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(ROOM))
    except OSError as error:
        raise ValueError(f"out: {existing} cannot be written to ({error.strerror}): give another --out") from None


def _is_evaluation(path: Path) -> bool:
    try:
        return "lion_triton" in json.loads(path.read_text())
    except (OSError, ValueError, TypeError):
        return False


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files; each replaces an old one only when all are on the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    partial = {name: folder / f".{name}.partial-{os.getpid()}" for name in files}
    try:
        for name, content in files.items():
            partial[name].write_bytes(content)
        for name, path in partial.items():
            os.replace(path, folder / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
        for path in missing:
            if not any(path.iterdir()):
                path.rmdir()
