"""Furniture libraries of Sweet Home 3D (`.sh3f`): zip archives of models and a properties file."""

from __future__ import annotations

import posixpath
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from lion_triton.data.containers import Container
from lion_triton.data.meshes import MESH_SUFFIXES

CATALOGUE = "PluginFurnitureCatalog.properties"  # others, as ..._fr.properties, translate it


@dataclass(frozen=True)
class Furniture:
    """One entry of a catalogue. Rotate the model by `rotation`, then stretch its bounding box to `size`
    (width x, height y, depth z, in metres): y is then up. None where the catalogue is silent."""

    container: Container
    file: str
    path: str  # of `file` or the archive that holds it, in the library
    id: str
    name: str
    category: str
    creator: str
    licence: str
    rotation: Float[ndarray, "3 3"] | None
    size: Float[ndarray, " 3"] | None


def parse_properties(text: str) -> dict[str, str]:
    """A Java properties file, already decoded (they are ISO-8859-1): comments, continued lines, and escapes
    including UTF-16 ones; of equal keys the last counts."""
    entries, logical = {}, ""
    for line in [*re.split(r"\r\n?|\n", text), ""]:
        line = line.lstrip(" \t\f")
        if not logical and line[:1] in ("", "#", "!"):
            continue
        logical += line
        if (len(line) - len(line.rstrip("\\"))) % 2:
            logical = logical[:-1]
            continue
        parts = re.fullmatch(r"((?:\\.|[^\\ \t\f=:])*)[ \t\f]*[=:]?[ \t\f]*(.*)", logical, re.DOTALL)
        if parts:
            entries[_unescape(parts[1])] = _unescape(parts[2])
        logical = ""
    return entries


def _unescape(text: str) -> str:
    def character(match: re.Match[str]) -> str:
        code = match[1]
        return chr(int(code[1:], 16)) if len(code) > 1 else {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}.get(code, code)

    text = re.sub(r"\\(u[0-9a-fA-F]{4}|.)", character, text, flags=re.DOTALL)
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # joins surrogate pairs


def read_catalogue(container: Container) -> Iterator[Furniture | tuple[str, str]]:
    """The library's entries in order; instead of one that cannot be used, its model's path and the reason."""
    properties = parse_properties(container.read(CATALOGUE).decode("latin-1"))
    licence = properties.get("license", "").strip()
    names = frozenset(container.names())
    entries: defaultdict[int, dict[str, str]] = defaultdict(dict)
    for key, value in properties.items():
        if match := re.fullmatch(r"(\w+)#(\d+)", key):
            entries[int(match[2])][match[1]] = value.strip()
    for _, entry in sorted(entries.items()):
        if "model" in entry:
            try:
                yield _furniture(container, names, {"license": licence} | entry)
            except (ValueError, zipfile.BadZipFile) as error:
                yield entry["model"].lstrip("/"), str(error)


def _furniture(container: Container, names: frozenset[str], entry: dict[str, str]) -> Furniture:
    file = entry["model"].lstrip("/")
    if file not in names:
        raise ValueError("the catalogue names this model, the archive has none")
    identity = entry.get("id") or posixpath.splitext(file)[0]
    if file.lower().endswith(".zip"):
        container = container.archive(file)
        shapes = [name for name in container.names() if posixpath.splitext(name)[1].lower() in MESH_SUFFIXES]
        if not shapes:
            raise ValueError("holds no model in a format that is read")
        file = shapes[0]
    rotation = _numbers(entry, "modelRotation", 9)
    sides = [_numbers(entry, side, 1) for side in ("width", "height", "depth")]
    known = [side for side in sides if side is not None]
    return Furniture(
        container,
        file,
        path=entry["model"].lstrip("/"),
        id=identity,
        name=entry.get("name") or identity,
        category=entry.get("category", "").strip() or "Miscellaneous",
        creator=entry.get("creator", ""),
        licence=entry["license"],
        rotation=None if rotation is None else rotation.reshape(3, 3),
        size=np.concatenate(known) / 100 if len(known) == 3 else None,
    )


def _numbers(entry: dict[str, str], key: str, count: int) -> Float[ndarray, " n"] | None:
    """The entry's numbers under `key`, None if it has none; ValueError unless it has `count` finite ones."""
    words = entry.get(key, "").split()
    try:
        numbers = np.array(words, dtype=np.float64)
    except ValueError:
        numbers = np.array([np.nan])
    if words and (len(numbers) != count or not np.isfinite(numbers).all()):
        raise ValueError(f"catalogue: {key}: expected {count} numbers, got {' '.join(words)!r}")
    return numbers if words else None
