"""Folders and zip archives as one thing: named files that are read whole into memory.

Archives are never unpacked to disk, so no entry's name can lead a write astray.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

ARCHIVE_SUFFIXES = frozenset({".zip", ".sh3f"})
MAX_ENTRY_BYTES = 2**30


@dataclass(frozen=True)
class Container:
    """A folder, or a zip archive at `path`, or the archive reached from there by the entry names `inside`."""

    path: Path
    inside: tuple[str, ...] = ()

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    @property
    def archive_depth(self) -> int:
        """How many archives, one in the other, lead here."""
        return 0 if self.is_folder else 1 + len(self.inside)

    def archive(self, name: str) -> Container:
        """The archive called `name` in this container."""
        return Container(self.path / name) if self.is_folder else Container(self.path, (*self.inside, name))

    def names(self) -> list[str]:
        """Names of all files, sorted, relative to the container, with forward slashes; no hidden folders."""
        if self.is_folder:
            return sorted(_walk(self.path))
        return sorted({info.filename for info in _archive(self).infolist() if not info.is_dir()})

    def read(self, name: str) -> bytes:
        """The file's bytes; ValueError when there is no such regular file, or when an archive declares more
        than `MAX_ENTRY_BYTES` for it."""
        if self.is_folder:
            if not (self.path / name).is_file():
                raise ValueError(f"{name} is not a regular file")
            return (self.path / name).read_bytes()
        return read_entry(_archive(self), name)

    def read_sibling(self, name: str, reference: str) -> bytes:
        """The bytes of the file that the file `name` refers to, by a path relative to its own folder;
        ValueError when that leads out of the container."""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), reference))
        if is_unsafe(target):
            raise ValueError(f"refers to {reference!r}, outside its folder or archive")
        return self.read(target)


def is_unsafe(name: str) -> bool:
    """Whether a path is absolute or climbs out of where it starts, on any operating system."""
    return bool(re.match(r"[/\\]|[A-Za-z]:", name)) or ".." in re.split(r"[/\\]", name)


def read_entry(archive: zipfile.ZipFile, name: str) -> bytes:
    """An entry's bytes; ValueError when it is missing or declares more than `MAX_ENTRY_BYTES`."""
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise ValueError(f"{name} is not in the archive") from None
    # zipfile stops reading at the declared size, so the declaration is a bound even when it lies.
    if info.file_size > MAX_ENTRY_BYTES:
        raise ValueError(f"{name} declares {info.file_size / 2**30:.1f} GiB, more than the limit of 1 GiB")
    return archive.read(info)


def _walk(root: Path) -> Iterator[str]:
    def fail(error: OSError) -> NoReturn:
        raise error

    seen = set()
    for folder, below, files in os.walk(root, onerror=fail, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        real = os.path.realpath(folder)
        if real in seen:  # a link back to a folder already listed
            below.clear()
            continue
        seen.add(real)
        yield from (Path(folder, name).relative_to(root).as_posix() for name in files)


@lru_cache(maxsize=4)
def _archive(container: Container) -> zipfile.ZipFile:
    # Kept open: reading the directory of a big archive anew for each shape would take longer than the shapes.
    if not container.inside:
        return zipfile.ZipFile(container.path)
    *above, name = container.inside
    return zipfile.ZipFile(io.BytesIO(Container(container.path, tuple(above)).read(name)))


def close_archives() -> None:
    """Forget the archives that reading left open; later reads see what is on disk then."""
    _archive.cache_clear()
