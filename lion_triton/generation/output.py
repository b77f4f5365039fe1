"""The folder of results: clouds.npz, ply/, grid.png, of motion animation.gif, and a record that repeats them.

Written whole or not at all; only a folder that holds an earlier command's results is replaced.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import trimesh
from jaxtyping import Float32, Int64

from lion_triton import __version__
from lion_triton.config import SamplingConfig
from lion_triton.data.find import safe_name
from lion_triton.pictures import animate, grid
from lion_triton.runs import Run

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RECORD = "samples.json"
RESULTS = {"clouds.npz", "ply", "glb", "grid.png", "animation.gif"}  # beside a record
SHOWN = 64  # clouds in the picture


def default_out(run: Run, words: Sequence[str | None], numbers: Mapping[str, object]) -> Path:
    """RUN/samples/<the words and numbers that were given>."""
    parts = [*filter(None, words), *(f"{name}{value}" for name, value in numbers.items() if value is not None)]
    return run.samples / safe_name("-".join(parts))


def check_out(out: Path, record: str = RECORD) -> None:
    """Raise ``ValueError`` if the folder exists and is no earlier command's, which holds a file ``record``, or holds
    what no command wrote, which would be lost; or if it cannot be made."""
    if out.exists() and not (out / record).is_file():
        what = Path(record).stem
        raise ValueError(f"out: {out} exists and holds no {what} of an earlier command: give another --out")
    foreign = sorted(p.name for p in out.glob("[!.]*") if p.name not in RESULTS | {record})
    if foreign:
        raise ValueError(f"out: {out} holds {foreign[0]}, which no command made and would be lost: give another --out")
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"out: {existing} is no folder that can be written to: give another --out")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of ``out`` when all is written and is gone where that fails."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():  # out of its place whole: half of it would be nobody's results
            os.replace(out, old)
        os.replace(partial, out)
    finally:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)


def check_finite(points: np.ndarray) -> None:
    """Raise ``ValueError`` if a generated point is not finite."""
    if not np.isfinite(points).all():
        raise ValueError("samples: the model generated points that are not finite: train longer or sample otherwise")


def write_results(
    out: Path,
    points: Float32[np.ndarray, "S P 3"],
    labels: Int64[np.ndarray, " S"],
    classes: Sequence[str],
    record: Mapping[str, Any],
    *,
    more: Mapping[str, np.ndarray] | None = None,
    draw: Callable[[Path], None] | None = None,
    moving: bool = False,
) -> None:
    """Write the clouds and what was made of them to ``out``, and say where.

    more: further arrays for clouds.npz. draw: draws grid.png, instead of the first clouds in rows of eight. moving: the
    clouds are frames of an animation.
    """
    with whole_folder(out) as partial:
        arrays: dict[str, Any] = {"points": points, "labels": labels, "classes": np.array(classes), **(more or {})}
        np.savez(partial / "clouds.npz", **arrays)
        (partial / "ply").mkdir()
        for i, cloud in enumerate(points):
            trimesh.PointCloud(cloud).export(partial / "ply" / f"{i:04d}.ply")
        if draw is None:
            grid(points[:SHOWN], partial / "grid.png")
        else:
            draw(partial / "grid.png")
        if moving:
            animate(points, partial / "animation.gif")
        text = json.dumps({"lion_triton": __version__, **record}, indent=2)
        (partial / RECORD).write_text(text + "\n")
    print(f"{len(points)} clouds of {points.shape[1]} points: {out / 'clouds.npz'}, {out / 'ply'}")
    print(f"picture: {out / 'grid.png'}" + (f", animation: {out / 'animation.gif'}" if moving else ""))


def record_of(
    program: str, args: DataclassInstance, checkpoint: str | None, settings: SamplingConfig
) -> dict[str, Any]:
    """What repeats a command: its options, the checkpoint by its name, and how it sampled."""
    options = json.loads(json.dumps(asdict(args), default=str))
    return {
        "program": f"lion_triton.{program}",
        "checkpoint": checkpoint,
        "options": options,
        "sampling": asdict(settings),
    }
