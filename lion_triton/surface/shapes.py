"""Shapes whose surface is known: dense points with normals, for training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32

from lion_triton.data.clouds import Clouds
from lion_triton.data.find import normals_path
from lion_triton.data.procedural import oriented_furniture
from lion_triton.data.sources import PROCEDURAL_SEEDS, Sources
from lion_triton.runs import Run

Oriented = tuple[Float32[np.ndarray, "P 3"], Float32[np.ndarray, "P 3"]]  # points in data units, outward unit normals


@dataclass(frozen=True)
class OrientedShapes:
    """``count`` shapes; ``draw(i, num_points, seed)`` draws of shape i, in random order."""

    count: int
    draw: Callable[[int, int, int], Oriented]


def training_shapes(run: Run, sources: Sources) -> OrientedShapes:
    """The shapes that a run trains on; ``sources``: its own.

    Raises:
        ValueError: a folder without normals beside its clouds.
    """
    return _shapes(run, "train", sources.train)


def held_out_shapes(run: Run, sources: Sources) -> OrientedShapes:
    """Those that it does not. Raises as :func:`training_shapes`."""
    return _shapes(run, "held_out", sources.held_out)


def _shapes(run: Run, part: Literal["train", "held_out"], clouds: Clouds) -> OrientedShapes:
    if run.config.data.source == "procedural":
        return OrientedShapes(len(clouds), partial(_draw_procedural, PROCEDURAL_SEEDS[part]))
    assert isinstance(clouds.source, tuple)
    missing = sum(not normals_path(path).is_file() for path in clouds.source)
    if missing:
        raise ValueError(
            f"data.source: {missing} of {len(clouds)} clouds in {run.config.data.source} have no normals beside them: "
            "prepare the meshes anew with --normals"
        )
    return OrientedShapes(len(clouds), partial(_draw_stored, clouds))


def _draw_procedural(source: int, i: int, num_points: int, seed: int) -> Oriented:
    # Of so many points the generator that makes the shape always draws the same; seed decides which come first.
    points, normals = oriented_furniture(i, num_points, source)
    order = np.random.default_rng((seed, i)).permutation(num_points)
    return points[order], normals[order]


def _draw_stored(clouds: Clouds, i: int, num_points: int, seed: int) -> Oriented:
    cloud, path = clouds[i], clouds.source[i]
    assert isinstance(path, Path)
    normals = np.load(normals_path(path), allow_pickle=False).astype(np.float32)
    if normals.shape != cloud.shape:
        raise ValueError(f"{normals_path(path)}: expected shape {cloud.shape} as of its cloud, got {normals.shape}")
    drawn = np.random.default_rng((seed, i)).choice(len(cloud), num_points, replace=len(cloud) < num_points)
    return cloud[drawn], normals[drawn]
