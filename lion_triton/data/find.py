"""Finding shapes in folders and archives, and naming them by where they lie."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from jaxtyping import Float
from numpy import ndarray

from lion_triton.data.containers import ARCHIVE_SUFFIXES, Container, is_unsafe
from lion_triton.data.meshes import SHAPE_SUFFIXES
from lion_triton.data.sweethome3d import CATALOGUE, Furniture, read_catalogue

SPLITS = ("train", "val", "test")
GENERIC_NAMES = frozenset({"model", "models", "model_normalized", "scene"})  # the folder above says which one
MAX_ARCHIVE_DEPTH = 2


@dataclass(frozen=True)
class Item:
    """A shape that was found: `file` in `container`, called `path` to people.

    `split` is None where no folder says it; `details` is what a catalogue adds to the index, `rotation` and
    `size` what it asks for (see `Furniture`); `catalogued` shapes have y up by that.
    """

    container: Container
    file: str
    path: str
    category: str
    id: str
    split: str | None = None
    catalogued: bool = False
    details: dict[str, str] = field(default_factory=dict)
    rotation: Float[ndarray, "3 3"] | None = None
    size: Float[ndarray, " 3"] | None = None


@dataclass(frozen=True)
class Failure:
    path: str
    reason: str


def find_shapes(source: Path) -> Iterator[Item | Failure]:
    """Everything below a folder or zip archive that looks like a shape, in order of path.

    The category is the first folder below `source`, or `source` itself for what lies directly in it; a
    ShapeNet synset anywhere above the file comes first. A folder train, val or test right below the category
    is the split; further folders go into the id. An archive counts as a folder of the same name. In a Sweet
    Home 3D library the catalogue decides instead. Two files may get the same category and id. Raises ValueError
    when `source` is neither folder nor archive.
    """
    if not source.exists():
        raise ValueError(f"source: {source} does not exist")
    if not source.is_dir() and source.suffix.lower() not in ARCHIVE_SUFFIXES:
        raise ValueError(f"source: expected a folder, a .zip or a .sh3f file, got {source}")
    name = source.resolve().name if source.is_dir() else source.stem
    yield from _find(Container(source), "", (name,))


def _find(container: Container, label: str, above: tuple[str, ...]) -> Iterator[Item | Failure]:
    """Shapes in a folder or archive; `label` starts their paths, `above` names the folders that lead here."""
    try:
        names = container.names()
        furniture = list(read_catalogue(container)) if CATALOGUE in names else None
    except Exception as error:
        if container.is_folder:
            raise
        yield Failure(label.rstrip("/") or container.path.name, f"archive cannot be read: {one_line(error)}")
        return
    if furniture is not None:
        yield from (_item_of(entry, label) for entry in furniture)
        return
    for name in names:
        path, file = label + name, PurePosixPath(name)
        if not container.is_folder and is_unsafe(name):
            yield Failure(path, "refused, its name leads out of the archive")
            continue
        if any(part.startswith(".") or part == "__MACOSX" for part in file.parts):
            continue
        below = file.parts[:-1]
        folders = (*above, *below[below[:1] == above[-1:] :])  # chairs.zip often holds one folder, chairs
        if file.suffix.lower() in SHAPE_SUFFIXES:
            yield Item(container, name, path, *_place(folders, file.stem))
        elif file.suffix.lower() in ARCHIVE_SUFFIXES:
            if container.archive_depth >= MAX_ARCHIVE_DEPTH:
                yield Failure(path, f"refused, archives are read {MAX_ARCHIVE_DEPTH} deep")
            else:
                yield from _find(container.archive(name), f"{path}/", (*folders, file.stem))


def _item_of(found: Furniture | tuple[str, str], label: str) -> Item | Failure:
    if not isinstance(found, Furniture):
        return Failure(label + found[0], found[1])
    details = {
        "name": found.name,
        "category_name": found.category,
        "creator": found.creator,
        "licence": found.licence,
    }
    return Item(
        found.container,
        found.file,
        label + found.path,
        safe_name(found.category).lower(),
        safe_name(found.id),
        catalogued=True,
        details={key: value for key, value in details.items() if value},
        rotation=found.rotation,
        size=found.size,
    )


def _place(folders: tuple[str, ...], stem: str) -> tuple[str, str, str | None]:
    """Category, id and split of a file in `folders`, of which the first is the source."""
    synsets = [level for level, name in enumerate(folders) if re.fullmatch(r"0\d{7}", name)]
    level = synsets[0] if synsets else int(len(folders) > 1 and folders[1] not in SPLITS)
    names = [*folders[level + 1 :], stem]
    split = names.pop(0) if len(names) > 1 and names[0] in SPLITS else None
    while len(names) > 1 and names[-1].lower() in GENERIC_NAMES:
        names.pop()
    return safe_name(folders[level]), safe_name("-".join(names)), split


def safe_name(text: str) -> str:
    """`text` as a file name for any system: no separators, spaces or leading dots, at most 200 bytes."""
    name = re.sub(r"[^\w.-]+", "-", text).strip("-.") or "unnamed"
    if len(name.encode()) > 200:
        name = f"{name.encode()[:180].decode(errors='ignore')}-{hash_of(name):016x}"
    return name


def hash_of(text: str) -> int:
    """64 bits that depend on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def one_line(error: Exception) -> str:
    """The error's first line; with the error's kind, unless it is a ValueError, which explains itself."""
    text = (str(error).splitlines() or [""])[0][:200]
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
