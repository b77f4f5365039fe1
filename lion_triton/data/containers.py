"""Folders and zip archives as one thing: named files that are read whole into memory.

Archives are never unpacked to disk, so no entry's name can lead a write astray.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

ARCHIVE_SUFFIXES = frozenset({".zip", ".sh3f"})
MAX_ENTRY_BYTES = 2**30
MAX_EXPANSION = 100  # times its size that anything compressed may grow: shapes shrink to a fifth or so
SMALL_BYTES = 2**20  # what may grow to no more than this can do so from nothing
UTF8_NAME = 0x800  # the flag of entries whose names are said to be UTF-8


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
        """Names of all files, sorted, relative to the container, with forward slashes; without what systems hide
        (`.git/`, `._chair.obj`, `__MACOSX/`)."""
        names = _walk(self.path) if self.is_folder else _archive(self).names()
        return sorted(name for name in names if not _is_hidden(name))

    def read(self, name: str) -> bytes:
        """The file's bytes; ValueError when there is no such regular file, or when an archive's entry is refused."""
        if self.is_folder:
            if not (self.path / name).is_file():
                raise ValueError(f"{name} is not a regular file")
            return (self.path / name).read_bytes()
        return _archive(self).read(name)

    def read_sibling(self, name: str, reference: str) -> bytes:
        """The bytes of the file that the file `name` refers to, by a path relative to its own folder;
        ValueError when that leads out of the container."""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), reference.replace("\\", "/")))
        if is_unsafe(target):
            raise ValueError(f"refers to {reference[:100]!r}, outside its folder or archive")
        return self.read(target)


class Archive:
    """A zip file's entries by the names that people see: with `\\` as `/`, and in UTF-8 where they are valid UTF-8
    though nothing says so, as macOS writes them."""

    def __init__(self, file: zipfile.ZipFile) -> None:
        self.file = file
        seen = ((_seen_name(info), info) for info in file.infolist())
        self.entries = {name: info for name, info in seen if not name.endswith("/")}
        assert file.fp is not None
        self.size = file.fp.seek(0, os.SEEK_END)

    def names(self) -> list[str]:
        return list(self.entries)

    def read(self, name: str) -> bytes:
        """An entry's bytes; ValueError when it is missing, locked, a link, not deflated, or grows beyond
        `MAX_ENTRY_BYTES` or `MAX_EXPANSION`."""
        info = self.entries.get(name)
        if info is None:
            raise ValueError(f"{name} is not in the archive")
        if info.header_offset + info.compress_size > self.size:  # so many bytes would be reserved
            raise ValueError(f"{name} declares more bytes than the archive has")
        # zipfile stops reading at the declared size, so the declaration is a bound even when it lies.
        if info.file_size > MAX_ENTRY_BYTES:
            raise ValueError(f"{name} declares {info.file_size / 2**30:.1f} GiB, more than the limit of 1 GiB")
        if info.file_size > max(MAX_EXPANSION * info.compress_size, SMALL_BYTES):
            raise ValueError(f"{name} would grow to more than {MAX_EXPANSION} times its size")
        if info.flag_bits & 1:
            raise ValueError(f"{name} is locked with a password")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise ValueError(f"{name} is a link")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others may ask for gigabytes first
            raise ValueError(f"{name} is compressed by method {info.compress_type}; only deflated archives are read")
        return self.file.read(info)


def _seen_name(info: zipfile.ZipInfo) -> str:
    name = info.filename
    if not info.flag_bits & UTF8_NAME:
        with suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")


def is_unsafe(name: str) -> bool:
    """Whether a path is absolute or climbs out of where it starts, on any operating system."""
    return bool(re.match(r"[/\\]|[A-Za-z]:", name)) or ".." in re.split(r"[/\\]", name)


def _is_hidden(name: str) -> bool:
    parts = name.split("/")
    return any(part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in parts)


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
def _archive(container: Container) -> Archive:
    # Kept open: reading the directory of a big archive anew for each shape would take longer than the shapes.
    if not container.inside:
        return Archive(zipfile.ZipFile(container.path))
    *above, name = container.inside
    return Archive(zipfile.ZipFile(io.BytesIO(Container(container.path, tuple(above)).read(name))))


def close_archives() -> None:
    """Forget the archives that reading left open; later reads see what is on disk then."""
    _archive.cache_clear()
