"""Turn a folder or a zip archive of meshes or clouds into the training format.

    python -m lion_triton.prepare SOURCE --out DIR

writes `DIR/<category>/{train,val,test}/<id>.npy`, each (P, 3) float32 with y up, in the units of the source
(Sweet Home 3D libraries: metres), and `DIR/index.json`, which says where each object came from, and the origin of
those that lie too far out for float32. With `--normals` meshes also get `DIR/<category>/<split>/normals/<id>.npy`,
(P, 3) float16: row for row the outward unit normals of the points. With `--clip` objects also get
`DIR/<category>/<split>/clip/<id>.npy`, (V, 512) float16: CLIP embeddings of length 1 of V views of the object.
"""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections import Counter, deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tyro
from jaxtyping import Float16, Float32, UInt8
from numpy import ndarray

from lion_triton.cli import run_cli
from lion_triton.data.containers import close_archives
from lion_triton.data.find import (
    SPLITS,
    Failure,
    Found,
    Item,
    embeddings_path,
    find_shapes,
    hash_of,
    normals_path,
    safe_name,
    split_in_name,
)
from lion_triton.data.meshes import SHAPE_SUFFIXES, Z_UP_TO_Y_UP, Part, read_parts
from lion_triton.data.shape import Shape
from lion_triton.errors import one_line
from lion_triton.progress import ProgressBar

if TYPE_CHECKING:
    from lion_triton.clip import CLIP

SERIAL_BELOW = 32  # starting worker processes takes longer than this many ordinary shapes
SHOWN_FAILURES = 20
VIEWS, VIEW_POINTS = 8, 8192  # pictures of an object, and its points in each: more are not seen any more
BACKLOG = 64  # files that workers may be ahead, as their pictures are held until CLIP has seen them


@dataclass(frozen=True)
class PrepareConfig:
    """Turn meshes (obj, ply, off, stl, glb, gltf) or clouds (npy, npz, h5, ply, pcd, xyz, txt, pts, csv) into the
    point clouds that training reads: OUT/<category>/{train,val,test}/<id>.npy and OUT/index.json."""

    source: tyro.conf.Positional[Path]
    """Folder, .zip or .sh3f; its folders name the categories and splits, archives count as folders."""
    out: Path
    """Folder to make."""
    points: int = 15000
    """Points to draw from each object."""
    up: Literal["y", "z"] = "y"
    """Axis that points up in the source; Sweet Home 3D libraries know their own."""
    val: float = 0.05
    """Fraction of objects for validation, where no folder train, val or test decides."""
    test: float = 0.15
    """Fraction of objects for testing, likewise."""
    seed: int = 0
    """Seed of the drawn points; the split does not depend on it."""
    normals: bool = False
    """Keep the normals of meshes, from which the stage `surface` learns."""
    clip: bool = False
    """Also store CLIP embeddings of views of each object, for training with --clip."""
    clip_model: str | None = None
    """The CLIP that makes them: a folder that `transformers` saved one in, or an id on a hub; default
    openai/clip-vit-base-patch32."""

    def __post_init__(self) -> None:
        if self.points < 1:
            raise ValueError(f"points: expected at least 1, got {self.points}")
        if not (self.val >= 0 and self.test >= 0 and self.val + self.test <= 1):
            raise ValueError(f"val, test: expected fractions that sum to at most 1, got {self.val}, {self.test}")
        if self.clip_model is not None and not self.clip:
            raise ValueError(f"clip-model: is for --clip, got {self.clip_model}")


@dataclass(frozen=True)
class Summary:
    """What became of a source. `objects` are the index's entries; `str()` is a table for people."""

    config: PrepareConfig
    objects: list[dict[str, Any]]
    failures: list[Failure]

    def __str__(self) -> str:
        counts = Counter((row["category"], row["split"]) for row in self.objects)
        names = sorted({row["category"] for row in self.objects})
        table = [(name, [counts[name, split] for split in SPLITS]) for name in names]
        table.append(("total", [sum(row["split"] == split for row in self.objects) for split in SPLITS]))
        width = max(len(name) for name in (*names, "category"))
        lines = [f"{'category':{width}}" + "".join(f"{head:>8}" for head in (*SPLITS, "total"))]
        lines += [f"{name:{width}}" + "".join(f"{n:8}" for n in (*row, sum(row))) for name, row in table]
        lines.append(f"in {self.config.out}: objects {len(self.objects)}, failures {len(self.failures)}")
        short = [row["points"] for row in self.objects if row["points"] < self.config.points]
        if short:
            lines.append(f"kept whole, with fewer than {self.config.points} points (from {min(short)}): {len(short)}")
        crossing = [row["crossing_faces"] for row in self.objects if "crossing_faces" in row]
        if crossing:
            counted = f"{sum(crossing)}, in {len(crossing)} objects"
            lines.append(f"faces that cross themselves, of which the triangles are a guess: {counted}")
        without = sum("points_in_file" in row for row in self.objects) if self.config.normals else 0
        if without:
            lines.append(f"clouds, which have no faces and so no normals: {without}")
        far = sum("origin" in row for row in self.objects)
        if far:
            lines.append(f"too far out for float32, moved by the origin in index.json: {far}")
        lines += [f"  {failure.path}: {failure.reason}" for failure in self.failures[:SHOWN_FAILURES]]
        if len(self.failures) > SHOWN_FAILURES:
            lines.append(f"  and {len(self.failures) - SHOWN_FAILURES} more, named in index.json")
        return _printable("\n".join(lines))


def _printable(text: object) -> str:
    return str(text).encode(errors="backslashreplace").decode()  # file names need not be Unicode


def prepare(config: PrepareConfig) -> Summary:
    """Prepare `config.source`, print the summary and return it.

    An object's points depend on its file, category, id and the seed, its split on category and id alone:
    other files that come or go change neither. Clouds of fewer than `config.points` points are kept whole. A
    file that cannot be used is named in the summary and stops nothing else. `config.out` must be absent or
    empty, and appears only when all is done. Raises ValueError or OSError with one line.
    """
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise ValueError(f"out: {config.out} exists and is not an empty folder")
    clip = _load_clip(config)  # before anything is read, as it may be missing
    out = config.out.resolve()
    unfinished = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        found = find_shapes(config.source)
        if not found.items and not found.failures:
            known = ", ".join(sorted(SHAPE_SUFFIXES))
            raise ValueError(f"source: no shapes in {config.source} (looked for {known})")
        print(_printable(found), file=sys.stderr)
        unfinished.mkdir(parents=True)
        summary = _write_all(found, config, unfinished, clip)
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    except BrokenProcessPool as error:
        raise OSError("a worker process was killed, probably for lack of memory; nothing was kept") from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(f"out: no space left on disk for {config.out}; nothing was kept") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        close_archives()
    print(summary)
    return summary


def _load_clip(config: PrepareConfig) -> CLIP | None:
    if not config.clip:
        return None
    from lion_triton.clip import CLIP  # PyTorch, which nothing else here needs
    from lion_triton.devices import best_device

    return CLIP(config.clip_model, best_device())


def _write_all(found: Found, config: PrepareConfig, folder: Path, clip: CLIP | None) -> Summary:
    failures = list(found.failures)
    objects: list[dict[str, Any]] = []
    taken: dict[str, str] = {}
    with closing(_prepare_all(found.items, config)) as results:
        bar = ProgressBar(results, "preparing", len(found.items), unit="file")
        for result in (result for file in bar for result in file):
            if isinstance(result, Failure):
                failures.append(result)
                continue
            row, points, normals, pictures = result
            # Two names that differ in case alone are one file on some systems.
            key = f"{row['category']}/{row['split']}/{row['id']}".casefold()
            if key in taken:
                failures.append(Failure(row["path"], f"its id {row['id']} is already that of {taken[key]}"))
                continue
            taken[key] = row["path"]
            for split in SPLITS:
                (folder / row["category"] / split).mkdir(parents=True, exist_ok=True)
            path = folder / row["category"] / row["split"] / f"{row['id']}.npy"
            _save(path, points)
            if normals is not None:
                _save(normals_path(path), normals)
            if clip is not None and pictures is not None:
                _save(embeddings_path(path), clip.images(list(pictures)).numpy().astype(np.float16))
            objects.append(row)
    objects.sort(key=lambda row: (row["category"], row["id"]))
    failures.sort(key=lambda failure: failure.path)
    if not objects:
        first = f"{failures[0].path}: {failures[0].reason}"
        raise ValueError(f"source: no shape in {config.source} can be used; of {len(failures)} the first: {first}")
    index = {
        "source": str(config.source),
        "points": config.points,
        "seed": config.seed,
        **({} if clip is None else {"clip": {"model": clip.name, "views": VIEWS}}),
        "objects": objects,
        "failures": [asdict(failure) for failure in failures],
        "unread": dict(sorted(found.unread.items())),
    }
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    return Summary(config, objects, failures)


def _save(path: Path, array: ndarray) -> None:
    buffer = io.BytesIO()  # numpy writing to the disk itself would hide that the disk is full
    np.save(buffer, array)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(buffer.getvalue())


# An entry of the index, its points, with --normals those of a mesh, and with --clip its pictures.
Prepared = tuple[
    dict[str, Any], Float32[ndarray, "P 3"], Float16[ndarray, "P 3"] | None, UInt8[ndarray, "V H W 3"] | None
]


def _prepare_all(items: list[Item], config: PrepareConfig) -> Generator[list[Prepared | Failure], None, None]:
    work = partial(_prepare_file, config=config)
    if len(items) < SERIAL_BELOW:
        yield from map(work, items)
        return
    pool = _workers()
    try:
        ahead = deque[Future[list[Prepared | Failure]]]()
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) > BACKLOG:
                yield ahead.popleft().result()
        yield from (future.result() for future in ahead)
    finally:
        pool.shutdown(cancel_futures=True)


def _workers() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        min(os.cpu_count() or 1, 8),
        multiprocessing.get_context("spawn"),  # not forked: whoever calls prepare() may have threads
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),  # Ctrl-C goes to every process, and the main one ends the others
    )


def _prepare_file(item: Item, config: PrepareConfig) -> list[Prepared | Failure]:
    """The file's shapes: one, or those of a set, with what failed among them."""
    results: list[Prepared | Failure] = []
    try:
        for part in read_parts(item.container, item.file):
            results.append(_prepare_one(_part_of(item, part), part.shape, config))
    except Exception as error:  # whatever a parser makes of a bad file, the others must go on
        results.append(Failure(item.path, one_line(error)))
    return results


def _part_of(item: Item, part: Part) -> Item:
    """The item of one shape of a set; of a file with one shape, the file's."""
    if part.number is None:
        return item
    return replace(
        item,
        path=f"{item.path}[{part.number}]",
        id=f"{item.id}-{part.number}",
        category=item.category if part.category is None else safe_name(part.category),
        split=item.split or split_in_name(Path(item.file).stem),
    )


def _prepare_one(item: Item, shape: Shape, config: PrepareConfig) -> Prepared | Failure:
    key = f"{item.category}/{item.id}"
    try:
        shape.check()
        if item.catalogued:
            up = "y, by the catalogue"
        elif config.up == "z":
            up, shape = "z, turned to y", shape.turned(Z_UP_TO_Y_UP)
        else:
            up = "y"
        if item.rotation is not None:
            shape = shape.turned(item.rotation)
        if item.size is not None:
            shape = shape.fitted(item.size)
        origin = shape.origin()
        if origin is not None:
            shape = shape.moved(-origin)
        seed = hash_of(f"{config.seed}/{key}")
        points = shape.sample(config.points, seed)
        with_normals = config.normals and shape.is_mesh
        normals = shape.sample_normals(config.points, seed).astype(np.float16) if with_normals else None
        pictures = _pictures(points) if config.clip else None
    except Exception as error:
        return Failure(item.path, one_line(error))
    row = {
        "id": item.id,
        "name": item.id,
        "category": item.category,
        "split": item.split or split_of(key, config),
        "path": item.path,
        "up": up,
        "faces" if shape.is_mesh else "points_in_file": len(shape.coordinates),
        "points": len(points),
    }
    if shape.crossing_faces:
        row["crossing_faces"] = shape.crossing_faces
    if origin is not None:
        row["origin"] = origin.tolist()
    return row | item.details, points, normals, pictures


def _pictures(points: Float32[ndarray, "P 3"]) -> UInt8[ndarray, "V H W 3"]:
    from lion_triton.pictures import views  # PyTorch and matplotlib, which nothing else here needs

    chosen = np.random.default_rng(0).permutation(len(points))[:VIEW_POINTS]  # clouds keep their order where few
    return views(points[chosen], VIEWS)


def split_of(key: str, config: PrepareConfig) -> str:
    """train, val or test for the object `<category>/<id>`, whatever other objects there are."""
    position = hash_of(key) / 2**64
    return "test" if position < config.test else "val" if position < config.test + config.val else "train"


def main(args: list[str] | None = None) -> None:
    """The command line."""
    args = sys.argv[1:] if args is None else args
    run_cli(lambda: prepare(tyro.cli(PrepareConfig, args=args, prog="python -m lion_triton.prepare")))


if __name__ == "__main__":
    main()
