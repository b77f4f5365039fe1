"""Finding shapes in folders and archives, and naming them by where they lie."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from jaxtyping import Float
from numpy import ndarray

from lion_triton.data.containers import ARCHIVE_SUFFIXES, Container, is_unsafe
from lion_triton.data.meshes import CLASS_NAMES, SHAPE_SUFFIXES
from lion_triton.data.sweethome3d import CATALOGUE, Furniture, read_catalogue
from lion_triton.errors import one_line

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
GENERIC_NAMES = frozenset({"model", "models", "model_normalized", "scene"})  # the folder above says which one
MAX_ARCHIVE_DEPTH = 2
SHOWN = 12  # categories or suffixes in a line


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


@dataclass(frozen=True)
class Found:
    """What there is in a source; `unread` counts the files in formats that are not read, by suffix."""

    items: list[Item]
    failures: list[Failure]
    unread: Counter[str]

    def __str__(self) -> str:
        categories = Counter(item.category for item in self.items)
        splits = Counter(item.split for item in self.items if item.split)
        said = ", ".join(f"{split} {splits[split]}" for split in SPLITS if splits[split])
        lines = [
            f"found {len(self.items)} files; categories: {_counts(categories)}",
            f"split: folders say it of {splits.total()} files{f' ({said})' if said else ''}",
        ]
        if self.unread:
            lines.append(f"in formats that are not read: {_counts(self.unread)}")
        return "\n".join(lines)


def _counts(counter: Counter[str]) -> str:
    shown = [f"{name} {count}" for name, count in sorted(counter.items())]
    more = [f"and {len(shown) - SHOWN} more"] if len(shown) > SHOWN else []
    return ", ".join(shown[:SHOWN] + more)


@dataclass(frozen=True)
class _File:
    """A shape's file, and the names of the folders that lead to it, of which the first is the source."""

    container: Container
    name: str
    path: str
    folders: tuple[str, ...]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem


def find_shapes(source: Path) -> Found:
    """Everything below a folder or zip archive that looks like a shape, in order of path.

    The category is the first folder below `source`, or `source` itself for what lies directly in it; a ShapeNet
    synset anywhere above the file comes first. A folder called train, val or test, or by another of `SPLIT_NAMES`, is
    the split, wherever it stands; the category of such files is the first folder that is not the same for all of
    them, splits left aside. Further folders go into the id. An archive counts as a folder of the same name. In a
    Sweet Home 3D library the catalogue decides instead. Two files may get the same category and id. Raises
    ValueError when `source` is neither folder nor archive.
    """
    if not source.exists():
        raise ValueError(f"source: {source} does not exist")
    if not source.is_dir() and source.suffix.lower() not in ARCHIVE_SUFFIXES:
        raise ValueError(f"source: expected a folder, a .zip or a .sh3f file, got {source}")
    name = source.resolve().name if source.is_dir() else source.stem
    unread: Counter[str] = Counter()
    found = list(_find(Container(source), "", (name,), unread))
    places = iter(_places([file for file in found if isinstance(file, _File)]))
    everything = [Item(i.container, i.name, i.path, *next(places)) if isinstance(i, _File) else i for i in found]
    items = [item for item in everything if isinstance(item, Item)]
    return Found(items, [failure for failure in everything if isinstance(failure, Failure)], unread)


def _find(
    container: Container, label: str, above: tuple[str, ...], unread: Counter[str]
) -> Iterator[Item | Failure | _File]:
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
        suffix = file.suffix.lower()
        if not container.is_folder and is_unsafe(name):
            yield Failure(path, "refused, its name leads out of the archive")
            continue
        below = file.parts[:-1]
        folders = (*above, *below[below[:1] == above[-1:] :])  # chairs.zip often holds one folder, chairs
        if suffix in SHAPE_SUFFIXES and file.name != CLASS_NAMES:
            yield _File(container, name, path, folders)
        elif suffix in ARCHIVE_SUFFIXES:
            if container.archive_depth >= MAX_ARCHIVE_DEPTH:
                yield Failure(path, f"refused, archives are read {MAX_ARCHIVE_DEPTH} deep")
            else:
                yield from _find(container.archive(name), f"{path}/", (*folders, file.stem), unread)
        else:
            unread[suffix or "without suffix"] += 1


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


def _places(files: list[_File]) -> list[tuple[str, str, str | None]]:
    """Category, id and split of every file."""
    tops = {file.folders[1].lower() for file in files if len(file.folders) > 1}
    # Beside airplanes and buses, trains are trains.
    vehicles = len(tops - SPLIT_NAMES.keys()) > 1 and not any(SPLIT_NAMES.get(top) in ("val", "test") for top in tops)
    levels = []
    for file in files:
        below = enumerate(file.folders[1:], 1)
        found = [level for level, name in below if name.lower() in SPLIT_NAMES and not (vehicles and level == 1)]
        levels.append(found[0] if found else None)
    rests = [_without(file.folders, level) for file, level in zip(files, levels, strict=True)]
    divided = [level is not None and _synset(rest) is None for rest, level in zip(rests, levels, strict=True)]
    kinds = _kinds(rests, [file.stem for file in files], divided)
    varies = _first_that_varies([kind for kind, yes in zip(kinds, divided, strict=True) if yes])
    places = []
    for file, rest, kind, split in zip(files, rests, kinds, levels, strict=True):
        synset = _synset(rest)
        if synset is not None:
            level = synset
        elif split is None:
            level = min(1, len(rest) - 1)
        elif varies is not None:
            level = min(varies, len(rest) - 1)
        else:  # one category: the folder that is divided, or the last of those in the split
            level = split - 1 if split > 1 else len(kind) - 1
        names = [*rest[level + 1 :], file.stem]
        while len(names) > 1 and names[-1].lower() in GENERIC_NAMES:
            names.pop()
        says = None if split is None else SPLIT_NAMES[file.folders[split].lower()]
        places.append((safe_name(rest[level]), safe_name("-".join(names)), says))
    return places


def _without(folders: tuple[str, ...], level: int | None) -> tuple[str, ...]:
    return folders if level is None else folders[:level] + folders[level + 1 :]


def _synset(folders: tuple[str, ...]) -> int | None:
    return next((level for level, name in enumerate(folders) if re.fullmatch(r"0\d{7}", name)), None)


def _kinds(folders: list[tuple[str, ...]], stems: list[str], divided: list[bool]) -> list[tuple[str, ...]]:
    """The folders without those that hold one shape and name it: all of them where every file has the same name."""
    compared = {stem for stem, yes in zip(stems, divided, strict=True) if yes}
    same = divided.count(True) > 1 and len(compared) == 1
    kinds = []
    for kind, stem in zip(folders, stems, strict=True):
        while len(kind) > 2 and (same or stem.lower() in GENERIC_NAMES or stem == kind[-1]):
            stem, kind = kind[-1], kind[:-1]
            if stem.lower() not in GENERIC_NAMES:
                break
        kinds.append(kind)
    return kinds


def _first_that_varies(kinds: list[tuple[str, ...]]) -> int | None:
    """The first level below the source at which the folders differ."""
    for level in range(1, max(map(len, kinds), default=0)):
        if len({kind[level] for kind in kinds if len(kind) > level}) > 1:
            return level
    return None


def split_in_name(stem: str) -> str | None:
    """The split that a file's name says, as ply_data_train0.h5 does; None where it says none or several."""
    said = {SPLIT_NAMES[word] for word in re.findall("[a-z]+", stem.lower()) if word in SPLIT_NAMES}
    return said.pop() if len(said) == 1 else None


def normals_path(cloud: Path) -> Path:
    """Where the normals of the cloud `<category>/<split>/<id>.npy` are kept, if they are: rows as there."""
    return cloud.parent / "normals" / cloud.name


def safe_name(text: str) -> str:
    """`text` as a file name for any system: no separators, spaces or leading dots, at most 200 bytes."""
    name = re.sub(r"[^\w.-]+", "-", text).strip("-.") or "unnamed"
    if len(name.encode()) > 200:
        name = f"{name.encode()[:180].decode(errors='ignore')}-{hash_of(name):016x}"
    return name


def embeddings_path(cloud: Path) -> Path:
    """Where the CLIP embeddings of the cloud `<category>/<split>/<id>.npy` are kept."""
    return cloud.parent / "clip" / cloud.name


def hash_of(text: str) -> int:
    """64 bits that depend on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
