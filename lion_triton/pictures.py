"""Pictures of point clouds and meshes: a table of them on white paper, as a PNG file.

Every point becomes a ball, seen by an orthographic camera from the upper right front (y is up, +z is the
front). Balls are painted from far to near. Three things shade a ball: its roundness, the slope of the surface
around it (a plane through the nearest points), and how much of the sky the other points leave open. A mesh is shaded
by its own slopes and by how much of the sky its vertices leave each other.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree
from torch import Tensor
from trimesh import Trimesh

Array: TypeAlias = np.ndarray
Clouds: TypeAlias = Float[Array, "K N 3"] | Float[Tensor, "K N 3"]
Panel: TypeAlias = tuple[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]  # title, curves by name: x and y

CELL, LABEL, TITLE = 240, 40, 36  # pixels: a cloud's square, the strip for row labels, the strip for titles
SUPERSAMPLE = 2
INK = "#3b4252"
BALL = 0.57  # radius in spacings: a ball reaches its neighbours, so that a surface looks closed
LOW, HIGH = np.array((0.46, 0.45, 0.82)), np.array((0.98, 0.72, 0.64))  # of the lowest and highest point


def _unit(x: float, y: float, z: float) -> Float[Array, " 3"]:
    return np.array((x, y, z)) / math.sqrt(x * x + y * y + z * z)


TOWARDS = _unit(0.55, 0.42, 0.80)  # the camera
RIGHT = _unit(TOWARDS[2], 0.0, -TOWARDS[0])
VIEW = np.stack((RIGHT, np.cross(TOWARDS, RIGHT), TOWARDS))  # rows: right, up, towards
LIGHT = _unit(-0.35, 0.80, 0.50)  # in the camera's frame


def draw_grid(
    rows: Sequence[tuple[str, Clouds]], path: str | os.PathLike[str], *, titles: Sequence[str] | None = None
) -> None:
    """Draw rows of clouds, each with its label at the left, to the PNG file ``path``.

    Args:
        rows: ``(label, clouds (K, N, 3))`` per row, y up; K and N may differ from row to row. Each cloud is
            centred; one scale per row fits its largest cloud, so that sizes within a row compare.
        path: written whole or not at all; its folder is made if missing.
        titles: one title per column, drawn above the first row.

    Raises ``ValueError`` for no rows, another shape, a coordinate that is not finite, or a wrong number of
    titles.
    """
    if not rows:
        raise ValueError("rows: expected at least one row, got none")
    table = [_as_array(f"rows[{i}] ({label!r})", clouds) for i, (label, clouds) in enumerate(rows)]
    columns = max(len(clouds) for clouds in table)
    if titles is not None and len(titles) != columns:
        raise ValueError(f"titles: expected one per column ({columns}), got {len(titles)}")
    _write([_cells(clouds) for clouds in table], path, [label for label, _ in rows], titles or ())


def grid(clouds: Clouds, path: str | os.PathLike[str], columns: int = 8) -> None:
    """Draw many clouds (K, N, 3) at one scale, ``columns`` to a row, to the PNG file ``path``.

    Everything else is as in ``draw_grid``.
    """
    if columns < 1:
        raise ValueError(f"columns: expected an integer >= 1, got {columns}")
    cells = _cells(_as_array("clouds", clouds))
    _write([cells[i : i + columns] for i in range(0, len(cells), columns)], path, (), ())


def thumbnails(clouds: Sequence[Float[Array, "N 3"]]) -> list[bytes]:
    """Draw each cloud alone, all at one scale: PNG files of CELL x CELL pixels in few colours, some 10 kB each.

    The clouds may differ in number of points. Everything else is as in ``draw_grid``.
    """
    arrays = [_as_array(f"clouds[{i}]", np.asarray(cloud)[None])[0] for i, cloud in enumerate(clouds)]
    pictures = []
    for cell in _cells(arrays):
        file = io.BytesIO()
        Image.fromarray(cell).quantize(64, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
            file, format="PNG", optimize=True
        )
        pictures.append(file.getvalue())
    return pictures


def animate(frames: Clouds, path: str | os.PathLike[str], *, seconds_per_frame: float = 0.15) -> None:
    """Draw clouds (K, N, 3) one after the other, there and back for ever, to the GIF file ``path``.

    All at one scale, in the palette of all together. Everything else is as in ``draw_grid``.
    """
    cells = _cells(_as_array("frames", frames))
    palette = Image.fromarray(np.concatenate(cells)).quantize(128, Image.Quantize.MEDIANCUT)
    pictures = [Image.fromarray(cell).quantize(palette=palette, dither=Image.Dither.NONE) for cell in cells]
    file, duration = io.BytesIO(), round(1000 * seconds_per_frame)
    there_and_back = [*pictures, *pictures[-2:0:-1]]
    there_and_back[0].save(
        file, format="GIF", save_all=True, append_images=there_and_back[1:], duration=duration, loop=0
    )
    _replace(path, lambda unfinished: unfinished.write_bytes(file.getvalue()))


def draw_curves(panels: Sequence[Panel], path: str | os.PathLike[str], *, title: str, mark: float) -> None:
    """Draw curves over steps side by side to the PNG file ``path``, with a line at the step ``mark`` in every panel.

    A panel whose numbers are all positive and lie far apart gets a logarithmic axis; what is not finite is left out.
    """
    figure = Figure(figsize=(3.6 * len(panels), 3.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, size=9, color=INK, parse_math=False)
    for axes, (name, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, (x, y) in curves.items():
            axes.plot(x, y, marker=".", label=label)
        values = [v for _, y in curves.values() for v in y if math.isfinite(v)]
        if values and min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
        axes.axvline(mark, color=INK, linewidth=0.8, linestyle="--")
        axes.set_title(name, size=9, color=INK)
        axes.set_xlabel("step", size=8)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=7)
    _replace(path, lambda unfinished: figure.savefig(unfinished, format="png"))


def views(cloud: Float[Array, "N 3"], count: int) -> UInt8[Array, "count CELL CELL 3"]:
    """The cloud in grey from ``count`` sides: turned about y by equal steps, else as in ``draw_grid``."""
    grey = []
    for turn in 2 * math.pi * np.arange(count) / count:
        cos, sin = math.cos(turn), math.sin(turn)
        turned = np.asarray(cloud, float) @ np.array(((cos, 0, -sin), (0, 1, 0), (sin, 0, cos)))
        grey.append(_render(turned, _scale([turned])).mean(-1))
    return np.rint(grey).astype(np.uint8)[..., None].repeat(3, -1)


def mesh_grid(meshes: Sequence[Trimesh], path: str | os.PathLike[str], columns: int = 8) -> None:
    """Draw meshes at one scale, ``columns`` to a row, to the PNG file ``path``; everything else as in ``grid``.

    Raises ``ValueError`` for no meshes, one without faces, or a vertex that is not finite.
    """
    if columns < 1:
        raise ValueError(f"columns: expected an integer >= 1, got {columns}")
    if not meshes:
        raise ValueError("meshes: expected at least one, got none")
    for i, mesh in enumerate(meshes):
        if not len(mesh.faces) or not np.isfinite(mesh.vertices).all():
            raise ValueError(f"meshes: expected faces and finite vertices, mesh {i} has none or others")
    scale = _scale([np.asarray(mesh.vertices) for mesh in meshes])
    cells = [_render_mesh(mesh, scale) for mesh in meshes]
    _write([cells[i : i + columns] for i in range(0, len(cells), columns)], path, (), ())


def _as_array(name: str, clouds: Clouds) -> Float[Array, "K N 3"]:
    """Clouds as checked float64."""
    array = (
        clouds.detach().to("cpu", torch.float64).numpy() if isinstance(clouds, Tensor) else np.asarray(clouds, float)
    )
    if array.ndim != 3 or array.shape[-1] != 3 or array.size == 0:
        raise ValueError(f"{name}: expected shape (K, N, 3) with K, N >= 1, got {array.shape}")
    bad = np.flatnonzero(~np.isfinite(array).all((1, 2)))
    if len(bad):
        raise ValueError(f"{name}: expected finite coordinates, got NaN or infinity in cloud {bad[0]}")
    return array


def _project(cloud: Float[Array, "N 3"]) -> tuple[Float[Array, "N 3"], Float[Array, "N 3"]]:
    """Points, and the feet of their perpendiculars on the floor, in the camera's frame, centred."""
    foot = np.stack((cloud[:, 0], np.full(len(cloud), cloud[:, 1].min()), cloud[:, 2]), 1)
    both = np.stack((cloud, foot)) @ VIEW.T
    center = (both.max((0, 1)) + both.min((0, 1))) / 2
    return both[0] - center, both[1] - center


def _cells(clouds: Float[Array, "K N 3"] | Sequence[Float[Array, "N 3"]]) -> list[UInt8[Array, "CELL CELL 3"]]:
    """The clouds at the one scale that fits every one into its cell with a margin."""
    scale = _scale(clouds)
    return [_render(cloud, scale) for cloud in clouds]


def _scale(clouds: Float[Array, "K N 3"] | Sequence[Float[Array, "N 3"]]) -> float:
    """Pixels per unit."""
    extent = max(float(np.abs(part[:, :2]).max()) for cloud in clouds for part in _project(cloud))
    return 0.42 * CELL / max(extent, 1e-9)


def _render(cloud: Float[Array, "N 3"], scale: float) -> UInt8[Array, "CELL CELL 3"]:
    """One cell, top row first; ``scale`` is in pixels per unit."""
    points, foot = (part * scale for part in _project(cloud))
    points, foot, height = (part[np.argsort(points[:, 2])] for part in (points, foot, cloud[:, 1]))

    spacing, neighbours = _spacing(points)
    radius = float(np.clip(BALL * spacing, 1.0, CELL / 24))
    colour, sky = _shade(points, neighbours, height, radius)

    # The ball's pixels and their shading, then for every pixel of the cell the last ball painted on it.
    image = _paper(foot, radius)
    size, reach = len(image), radius * SUPERSAMPLE
    steps = np.arange(-math.ceil(reach), math.ceil(reach) + 1)
    dx, dy = (d[np.hypot(*np.meshgrid(steps, steps)) <= reach] for d in np.meshgrid(steps, steps))
    facing = np.stack((dx, dy, np.sqrt(reach**2 - dx**2 - dy**2)), 1) / reach @ LIGHT
    roundness, gloss = 0.8 + 0.45 * facing.clip(-0.3, 1), 0.22 * facing.clip(0, 1) ** 24
    column, row = (np.rint(points[:, :2] * SUPERSAMPLE).astype(int) + size // 2).T
    place = (row * size + column)[:, None] + (dy * size + dx)  # of balls within the cell, see _scale and radius
    painted = np.full(size * size, -1)
    painted[place] = np.arange(place.size).reshape(place.shape)

    hit = painted >= 0
    ball, pixel = np.divmod(painted[hit], len(dx))
    image[hit.reshape(size, size)] = colour[ball] * roundness[pixel, None] + (gloss[pixel] * sky[ball])[:, None]
    return _develop(image)


def _paper(foot: Float[Array, "N 3"], radius: float) -> Float[Array, "S S 3"]:
    """A cell, SUPERSAMPLE times as large and bottom row first, with the shadows of balls above their feet."""
    shadow = np.zeros((CELL, CELL))
    column, row = (foot[:, :2] + CELL / 2).astype(int).clip(0, CELL - 1).T
    shadow[row, column] = 1
    shadow = 1 - np.exp(-((2 * radius) ** 2) * gaussian_filter(shadow, CELL / 40))
    paper = (1 - 0.18 * shadow).astype(np.float32)[:, None, :, None, None]
    size = CELL * SUPERSAMPLE
    return np.broadcast_to(paper, (CELL, SUPERSAMPLE, CELL, SUPERSAMPLE, 3)).reshape(size, size, 3)  # a copy


def _develop(image: Float[Array, "S S 3"]) -> UInt8[Array, "CELL CELL 3"]:
    np.clip(image, 0, 1, out=image)
    parts = [image[i::SUPERSAMPLE, j::SUPERSAMPLE] for i in range(SUPERSAMPLE) for j in range(SUPERSAMPLE)]
    return np.rint(255 * np.mean(parts, axis=0)[::-1]).astype(np.uint8)


def balls(cloud: Float[Array, "N 3"]) -> tuple[float, UInt8[Array, "N 3"]]:
    """The radius, in the cloud's units, and the shaded colours of the balls that its points are drawn as."""
    points = cloud @ VIEW.T
    spacing, neighbours = _spacing(points)
    radius = BALL * spacing or 0.1 * float(np.ptp(cloud, axis=0).max()) or 0.1  # of coincident points, too
    colour, _ = _shade(points, neighbours, cloud[:, 1], radius)
    return radius, np.rint(255 * colour.clip(0, 1)).astype(np.uint8)


def _spacing(points: Float[Array, "N 3"]) -> tuple[float, Int[Array, "N K"]]:
    """The median distance to the fifth neighbour, and the neighbours of each point, itself first."""
    distance, neighbours = cKDTree(points).query(points, k=min(12, len(points)))
    spacing = float(np.median(np.reshape(distance, (len(points), -1))[:, :6][:, -1]))
    return spacing, neighbours.reshape(len(points), -1)


def _shade(
    points: Float[Array, "N 3"], neighbours: Int[Array, "N K"], height: Float[Array, " N"], radius: float
) -> tuple[Float[Array, "N 3"], Float[Array, " N"]]:
    """The colour of each ball of points in the camera's frame, and how much of the sky it sees."""
    patch = points[neighbours]
    patch = patch - patch.mean(1, keepdims=True)
    normal = np.linalg.eigh(np.swapaxes(patch, 1, 2) @ patch)[1][..., 0]
    normal *= np.where(normal[:, 2:] < 0, -1, 1)  # towards the camera
    slope = np.clip(normal @ LIGHT, 0, 1)
    sky = _open_sky(points, 2.2 * radius)
    return _colour(height, sky, slope), sky


def _colour(height: Float[Array, " N"], sky: Float[Array, " N"], slope: Float[Array, " N"]) -> Float[Array, "N 3"]:
    """From violet at the bottom to pink at the top, darker where little sky is seen and where light falls aslant."""
    rise = (height - height.min()) / max(float(np.ptp(height)), 1e-9)
    return (LOW + (HIGH - LOW) * rise[:, None]) * ((0.4 + 0.6 * sky) * (0.65 + 0.45 * slope))[:, None]


def _render_mesh(mesh: Trimesh, scale: float) -> UInt8[Array, "CELL CELL 3"]:
    """One cell, top row first; ``scale`` is in pixels per unit."""
    vertices = np.asarray(mesh.vertices, float)
    points, foot = (part * scale for part in _project(vertices))
    normals = np.asarray(mesh.vertex_normals) @ VIEW.T
    slope = np.clip(normals @ LIGHT, 0, 1)
    colour = _colour(vertices[:, 1], _open_sky(points, CELL / 60), slope)
    colour += 0.12 * (slope**24)[:, None]  # gloss

    # Every pixel that a triangle's box covers, then those whose centre lies in the triangle.
    image = _paper(foot, 1.0)
    size = len(image)
    corners = points[mesh.faces] * SUPERSAMPLE + [size / 2, size / 2, 0]
    first = np.ceil(corners[..., :2].min(1)).astype(int).clip(0, size)
    spread = (np.floor(corners[..., :2].max(1)).astype(int).clip(-1, size - 1) - first + 1).clip(0)
    count = spread.prod(1)
    face = np.arange(len(count)).repeat(count)
    inner = np.arange(len(face)) - (count.cumsum() - count).repeat(count)
    pixel = first[face] + np.stack((inner % spread[face, 0], inner // spread[face, 0]), 1)
    a, b, c = (corners[:, i, :2][face] - pixel for i in range(3))
    parts = np.stack([u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0] for u, v in ((b, c), (c, a), (a, b))], 1)
    total = parts.sum(1)
    covered = (parts >= 0).all(1) & (total > 0)  # positive: faces that look at the camera
    face, pixel, share = face[covered], pixel[covered], (parts[covered] / total[covered, None])
    depth = (share * corners[face, :, 2]).sum(1)
    order = depth.argsort(kind="stable")
    face, share = face[order], share[order]
    x, y = pixel[order].T
    image[y, x] = (share[..., None] * colour[mesh.faces[face]]).sum(1)  # the nearest is the last
    return _develop(image)


def _open_sky(points: Float[Array, "N 3"], blur: float, num_directions: int = 32) -> Float[Array, " N"]:
    """The share of the sky that each point sees, weighted by the sine of the elevation.

    Along each of a fan of directions the points are binned in squares of side ``blur``; those of a square
    that lie well below its topmost are in the shade.
    """
    height = 1 - 0.95 * (np.arange(num_directions) + 0.5) / num_directions
    turn = np.arange(num_directions) * math.pi * (3 - math.sqrt(5))  # the golden angle
    across = np.sqrt(1 - height**2)
    seen = np.zeros(len(points))
    world = points @ VIEW
    for direction in np.stack((across * np.cos(turn), height, across * np.sin(turn)), 1):
        side = _unit(direction[1], -direction[0], 0.0)
        plane = np.stack((side, np.cross(direction, side)), 1)
        square = np.floor(world @ plane / blur).astype(int)
        square -= square.min(0)
        key = square[:, 0] * (square[:, 1].max() + 1) + square[:, 1]
        depth = world @ direction
        topmost = np.full(key.max() + 1, -np.inf)
        np.maximum.at(topmost, key, depth)
        seen += direction[1] * (depth > topmost[key] - 1.5 * blur)
    return seen / height.sum()


def _write(
    cells: Sequence[Sequence[Array]],
    path: str | os.PathLike[str],
    labels: Sequence[str],
    titles: Sequence[str],
) -> None:
    """Put the cells of each row side by side, add the texts and write the file in one step."""
    left, top = LABEL if labels else 0, TITLE if titles else 0
    columns = max(len(row) for row in cells)
    height, width = top + CELL * len(cells), left + CELL * columns
    page = np.full((height, width, 3), 255, np.uint8)
    for r, row in enumerate(cells):
        for c, cell in enumerate(row):
            page[top + r * CELL : top + (r + 1) * CELL, left + c * CELL : left + (c + 1) * CELL] = cell
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    FigureCanvasAgg(figure)
    figure.figimage(page)
    for r, label in enumerate(labels):
        middle = 1 - (top + (r + 0.5) * CELL) / height
        where = 0.5 * LABEL / width, middle
        figure.text(*where, label, rotation=90, size=13, color=INK, ha="center", va="center", parse_math=False)
    for c, title in enumerate(titles):
        middle = (left + (c + 0.5) * CELL) / width
        figure.text(
            middle, 1 - 0.5 * TITLE / height, title, size=13, color=INK, ha="center", va="center", parse_math=False
        )

    _replace(path, lambda unfinished: figure.savefig(unfinished, format="png"))


def _replace(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Have a file written beside ``path`` and, when it is whole, take its place."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        write(unfinished)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
