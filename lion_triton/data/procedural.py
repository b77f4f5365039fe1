"""Procedural furniture: an endless labelled data set that needs no download.

A shape is a list of parts, a part is a closed (or, for lamp shades, open) loft, and a loft is a stack of
cross-sections joined by triangles: boxes, legs, bent tubes, cushions and turned bodies are all lofts. Points
are drawn uniformly on the triangles, and those that another part hides are not drawn at all.

Axes as in ShapeNet: y up, front towards +z. Parts are built in metres.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int
from numpy.random import Generator

from lion_triton.progress import ProgressBar

CLASSES: tuple[str, ...] = ("chair", "table", "sofa", "lamp", "shelf")

Array = np.ndarray
Span = tuple[float, float]
Point = tuple[float, float, float]
T = TypeVar("T")

SIDES = (-1.0, 1.0)
CORNERS = ((-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0))


def furniture(num_shapes: int, num_points: int, seed: int) -> tuple[Float[Array, "S P 3"], Int[Array, " S"]]:
    """Make ``num_shapes`` pieces of furniture as point clouds with labels.

    Shape ``i`` is of class ``CLASSES[i % 5]`` and comes from a random generator of its own, seeded with
    ``(seed, i)``: it does not depend on ``num_shapes``, and a second call repeats it bit for bit. Training
    and held-out sets are simply different seeds.

    The points (float32) are uniform on the visible surface, in random order, so that any prefix of a cloud is
    a uniform sample too. Each cloud's bounding box is centred at the origin and its longest side is 1; y is
    up and +z is the front. Labels are int64. Raises ``ValueError`` for a count below 1 or a negative seed.
    """
    _at_least(1, num_shapes=num_shapes, num_points=num_points)
    clouds = np.empty((num_shapes, num_points, 3), np.float32)
    # With a bar where it lasts: two milliseconds a shape.
    for i, cloud in enumerate(ProgressBar(clouds, "making furniture", unit="shape", leave=False, delay=1)):
        cloud[:] = oriented_furniture(i, num_points, seed)[0]
    return clouds, np.arange(num_shapes, dtype=np.int64) % len(CLASSES)


def oriented_furniture(index: int, num_points: int, seed: int) -> tuple[Float[Array, "P 3"], Float[Array, "P 3"]]:
    """Piece ``index`` of :func:`furniture` as points and the outward unit normals there, both float32.

    The points are those that ``furniture`` draws of it. Raises ``ValueError`` as that does.
    """
    _at_least(0, index=index, seed=seed)
    _at_least(1, num_points=num_points)
    rng = np.random.default_rng((seed, index))
    points, normals = sample_oriented(build(CLASSES[index % len(CLASSES)], rng), num_points, rng)
    low, high = points.min(0), points.max(0)
    # A cloud of one point has no extent; it becomes the origin.
    points = (points - (low + high) / 2) / max(np.max(high - low), 1e-9)
    return points.astype(np.float32), normals.astype(np.float32)


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name}: expected an integer >= {least}, got {value}")


def build(name: str, rng: Generator) -> list[Part]:
    """Build one random piece of furniture of class ``name`` (one of ``CLASSES``), in metres."""
    if name not in CLASSES:
        raise ValueError(f"name: expected one of {', '.join(CLASSES)}, got {name!r}")
    return {"chair": _chair, "table": _table, "sofa": _sofa, "lamp": _lamp, "shelf": _shelf}[name](rng)


# ------------------------------------------------------------------------------------------------ surfaces


@dataclass(frozen=True)
class Part:
    """Triangles (F, 3, 3) facing outwards; ``solid`` is (low, high) where the part is an upright box."""

    triangles: Array
    solid: tuple[Point, Point] | None = None


def sample_surface(parts: Sequence[Part], num_points: int, rng: Generator) -> Float[Array, "P 3"]:
    """The points of :func:`sample_oriented` without their normals."""
    return sample_oriented(parts, num_points, rng)[0]


def sample_oriented(
    parts: Sequence[Part], num_points: int, rng: Generator
) -> tuple[Float[Array, "P 3"], Float[Array, "P 3"]]:
    """Draw points uniformly by area from the parts' visible surface, in random order, with outward unit normals.

    The draw is stratified along the list of triangles, so that every part gets its share of points. A point
    is hidden where the place just outside its triangle lies in a solid box: inside another part, or where
    two parts touch.
    """
    triangles = np.concatenate([part.triangles for part in parts])
    corner, edges = triangles[:, 0], triangles[:, 1:] - triangles[:, :1]
    normals = np.cross(edges[:, 0], edges[:, 1])
    double_area = np.sqrt((normals * normals).sum(1))
    normals /= np.maximum(double_area, 1e-12)[:, None]
    cumulative = np.cumsum(double_area)
    boxes = np.array([part.solid for part in parts if part.solid is not None]).reshape(-1, 2, 3)
    center, half = boxes.mean(1), (boxes[:, 1] - boxes[:, 0]) / 2

    count = num_points + num_points // 2
    while True:
        strata = (np.arange(count) + rng.random(count)) * (cumulative[-1] / count)
        face = np.minimum(np.searchsorted(cumulative, strata, side="right"), len(triangles) - 1)
        uv = rng.random((count, 2))
        uv = np.where(uv.sum(1, keepdims=True) > 1, 1 - uv, uv)
        points = corner[face] + uv[:, :1] * edges[face, 0] + uv[:, 1:] * edges[face, 1]
        outside = points + 1e-4 * normals[face]
        hidden = np.ones((count, len(boxes)), bool)
        for axis in range(3):
            hidden &= np.abs(outside[:, axis, None] - center[:, axis]) < half[:, axis]
        visible = np.flatnonzero(~hidden.any(1))
        if len(visible) >= num_points:
            even = np.arange(num_points) * len(visible) // num_points
            drawn = rng.permutation(visible[even])
            return points[drawn], normals[face[drawn]]
        count *= 2


@lru_cache(maxsize=64)
def _loft_faces(sections: int, sides: int, capped: bool) -> Array:
    """Vertex indices (F, 3) of a loft whose vertices are numbered section by section."""
    faces = []
    for s in range(sections - 1):
        for k in range(sides):
            a, b = s * sides + k, s * sides + (k + 1) % sides
            faces += [(a, b, b + sides), (a, b + sides, a + sides)]
    if capped:
        last = (sections - 1) * sides
        faces += [(0, k + 1, k) for k in range(1, sides - 1)]
        faces += [(last, last + k, last + k + 1) for k in range(1, sides - 1)]
    return np.array(faces)


@lru_cache(maxsize=8)
def _circle(sides: int) -> tuple[Array, Array]:
    """Cosines and sines of a regular polygon; four sides are an axis-aligned square of half-width 1."""
    angle = 2 * math.pi * (np.arange(sides) + 0.5) / sides
    radius = math.sqrt(2) if sides == 4 else 1.0
    return radius * np.cos(angle), radius * np.sin(angle)


def loft(sections: Float[Array, "S K 3"], capped: bool = True) -> Part:
    """Join cross-sections of K corners each, anticlockwise when seen from the far end of the stack."""
    faces = _loft_faces(sections.shape[0], sections.shape[1], capped)
    return Part(sections.reshape(-1, 3)[faces])


def box(x: Span, y: Span, z: Span, bevel: float = 0.0) -> Part:
    """An upright box; a bevel narrows its top and bottom, as on a cushion."""
    inset = (bevel, 0.0, 0.0, bevel) if bevel else (0.0, 0.0)
    height = (y[0], y[0] + bevel, y[1] - bevel, y[1]) if bevel else y
    sections = [
        ((x[0] + i, h, z[1] - i), (x[1] - i, h, z[1] - i), (x[1] - i, h, z[0] + i), (x[0] + i, h, z[0] + i))
        for i, h in zip(inset, height, strict=True)
    ]
    return replace(loft(np.array(sections)), solid=((x[0], y[0], z[0]), (x[1], y[1], z[1])))


def rod(path: Sequence[Point] | Array, radius: float | Sequence[float], sides: int = 12, capped: bool = True) -> Part:
    """A tube along a path that lies in a plane; the radius may differ from point to point."""
    points = np.asarray(path, float)
    tangent = np.gradient(points, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    least = np.abs(tangent).max(0).argmin()  # the axis that the path follows least
    normal = np.eye(3)[least] - tangent * tangent[:, [least]]
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    cos, sin = _circle(sides)
    ring = normal[:, None] * cos[:, None] + np.cross(tangent, normal)[:, None] * sin[:, None]
    return loft(points[:, None] + np.reshape(radius, (-1, 1, 1)) * ring, capped)


def lathe(profile: Sequence[tuple[float, float]], x: float = 0.0, depth: float = 1.0, capped: bool = True) -> Part:
    """Turn a profile of (radius, height), from bottom to top, about the upright axis through (x, 0, 0).

    ``depth`` stretches it along z, for ovals.
    """
    cos, sin = _circle(24)
    radius, height = np.array(profile).T[:, :, None]
    ring = (x + radius * cos, height + 0 * cos, -depth * radius * sin)
    return loft(np.stack(ring, -1), capped)


def lean(parts: Sequence[Part], y: float, slope: float) -> list[Part]:
    """Lean parts backwards above height ``y`` by a shear."""
    leaning = []
    for part in parts:
        triangles = part.triangles.copy()
        triangles[..., 2] -= slope * np.maximum(triangles[..., 1] - y, 0)
        leaning.append(Part(triangles, part.solid if slope == 0 else None))
    return leaning


def pick(rng: Generator, *choices: T) -> T:
    """One of the choices, equally likely; name one twice to double its chance."""
    return choices[rng.integers(len(choices))]


def span(a: float, b: float) -> Span:
    """The interval between two numbers given in either order."""
    return (a, b) if a < b else (b, a)


def _around(count: int, radius: float) -> list[tuple[float, float]]:
    """Points (x, z) evenly spaced on a circle, the first a little off the front."""
    angles = 2 * math.pi * (np.arange(count) + 0.25) / count
    return [(radius * math.sin(a), radius * math.cos(a)) for a in angles]


def _legs(rng: Generator, style: str, x: float, z: float, top: float, thick: float) -> list[Part]:
    """Square or round legs under the four corners (+-x, +-z), from the height ``top`` to the floor."""
    sides = pick(rng, 4, 12)
    foot = 1.0 if style == "straight" else rng.uniform(0.55, 0.75)
    out = rng.uniform(0.12, 0.28) * top if style == "splayed" else 0.0
    radii = (thick / 2, foot * thick / 2)
    return [rod([(a * x, top, b * z), (a * (x + out), 0, b * (z + out))], radii, sides) for a, b in CORNERS]


# ------------------------------------------------------------------------------------------------ classes


def _chair(rng: Generator) -> list[Part]:
    u = rng.uniform
    if rng.random() < 0.04:
        return _stool(rng)
    width, depth = u(0.42, 0.62), u(0.42, 0.58)
    height, thick, leg = u(0.40, 0.52), u(0.04, 0.09), u(0.04, 0.06)
    under = height - thick
    rounded = rng.random() < 0.25
    if rounded:
        width, inset = depth, 0.32
        parts = [lathe([(width / 2, under), (width / 2, height)])]
    else:
        inset = u(0.40, 0.44)
        bevel = pick(rng, 0.0, 0.3 * thick)
        parts = [box((-width / 2, width / 2), (under, height), (-depth / 2, depth / 2), bevel)]

    base = pick(rng, "straight", "straight", "tapered", "splayed", "splayed", "sled", "star", "disc")
    x, z = inset * width, inset * depth
    if base == "sled":
        for s in SIDES:
            parts.append(rod([(s * x, under, z), (s * x, leg / 2, z)], leg / 2))
            parts.append(rod([(s * x, under, -z), (s * x, leg / 2, -z)], leg / 2))
            parts.append(rod([(s * x, leg / 2, -z - leg), (s * x, leg / 2, z + leg)], leg / 2))
    elif base in ("star", "disc"):
        reach = u(0.24, 0.32)
        parts.append(rod([(0, 0.03, 0), (0, under, 0)], u(0.025, 0.04)))
        if base == "disc":
            parts.append(lathe([(reach, 0), (reach, 0.02), (0.05, 0.05)]))
        else:
            for a, b in _around(pick(rng, 4, 5), reach):
                parts.append(rod([(0, 0.1, 0), (a, 0.03, b)], (0.032, 0.022)))
    else:
        parts += _legs(rng, base, x, z, under, leg)
        if base != "splayed" and rng.random() < 0.35:
            y = u(0.12, 0.2)
            parts += [rod([(s * x, y, -z), (s * x, y, z)], 0.4 * leg) for s in SIDES]
            parts.append(rod([(-x, y, 0), (x, y, 0)], 0.4 * leg))

    slope = u(0.0, 0.28)
    back = _round_back if rounded else pick(rng, _round_back, _flat_back, _flat_back)
    parts += lean(back(rng, rounded, width, depth, height), height, slope)
    if rng.random() < 0.4:
        parts += _chair_arms(rng, rounded, width, depth, height, slope)
    return parts


def _stool(rng: Generator) -> list[Part]:
    """A bar stool: high, round and narrow, so that nobody takes it for a table."""
    u = rng.uniform
    height, thick, radius, ring = u(0.62, 0.78), u(0.05, 0.09), u(0.16, 0.2), u(0.2, 0.3)
    top, foot = 0.6 * radius, 0.6 * radius + u(0.04, 0.1)
    legs = [rod([(a * top, height - thick, b * top), (a * foot, 0, b * foot)], 0.022) for a, b in CORNERS]
    at_ring = foot + (top - foot) * ring / (height - thick)
    rungs = [rod([(-at_ring, ring, s * at_ring), (at_ring, ring, s * at_ring)], 0.018) for s in SIDES]
    rungs += [rod([(s * at_ring, ring, -at_ring), (s * at_ring, ring, at_ring)], 0.018) for s in SIDES]
    return [lathe([(radius, height - thick), (radius, height)]), *legs, *rungs]


def _flat_back(rng: Generator, rounded: bool, width: float, depth: float, height: float) -> list[Part]:
    """An upright back over the rear edge of a square seat: a panel, or two posts with something between."""
    u = rng.uniform
    tall, thick, post = u(0.34, 0.6), u(0.035, 0.055), u(0.04, 0.055)
    top, half, inner = height + tall, width / 2, width / 2 - post
    z = (-depth / 2, -depth / 2 + thick)
    style = pick(rng, "panel", "slats", "rungs", "frame")
    if style == "panel":
        return [box((-half, half), (height, top), z, pick(rng, 0.0, 0.012))]
    parts = [box(span(s * half, s * inner), (height, top), z) for s in SIDES]
    if style == "frame":
        parts.append(box((-inner, inner), (top - tall * u(0.4, 0.7), top), z))
    elif style == "rungs":
        count, rung = pick(rng, 2, 3, 4), u(0.045, 0.07)
        for y in np.linspace(top - rung, height + 0.35 * tall / count, count):
            parts.append(box((-inner, inner), (y, y + rung), z))
    else:
        count, rail = pick(rng, 2, 3, 4, 5), u(0.05, 0.09)
        slat = min(0.07, inner / count) / 2
        parts.append(box((-inner, inner), (top - rail, top), z))
        for x in np.linspace(-inner, inner, count + 2)[1:-1]:
            parts.append(box((x - slat, x + slat), (height, top - rail), z))
    return parts


def _round_back(rng: Generator, rounded: bool, width: float, depth: float, height: float) -> list[Part]:
    """An upright back in the round: a bow with spindles, or a shell bent about the sitter."""
    u = rng.uniform
    tall, thick, post = u(0.34, 0.6), u(0.035, 0.055), u(0.02, 0.027)
    top, half = height + tall, width / 2
    if rng.random() < 0.5:
        reach = 0.7 * half if rounded else half - post
        z = -depth / 2 + post + 0.1 * depth * rounded
        rise = min(reach, tall)
        bow = [(-reach * math.cos(a), top - rise * (1 - math.sin(a)), z) for a in np.linspace(0, math.pi, 15)]
        parts = [rod([(-reach, height, z), *bow, (reach, height, z)], post)]
        for x in np.linspace(-reach, reach, pick(rng, 4, 5, 6))[1:-1]:
            y = top - rise * (1 - math.sqrt(1 - (x / reach) ** 2))
            parts.append(rod([(x, height, z), (x, y, z)], 0.016))
        return parts

    angle = u(0.9, 1.5) if rounded else u(0.45, 0.8)
    outer = half if rounded else half / math.sin(angle)
    low = height + pick(rng, 0.0, u(0.08, 0.16))
    corner = np.array([(outer - thick, low), (outer, low), (outer, top), (outer - thick, top)])
    turn = np.linspace(-angle, angle, 13)[:, None]
    radius, level = corner[:, 0], corner[:, 1]
    shell = (radius * np.sin(turn), level + 0 * turn, outer - depth / 2 - radius * np.cos(turn))
    parts = [loft(np.stack(shell, -1))]
    if low > height:
        middle = outer - thick / 2
        for s in SIDES:
            x, z = middle * math.sin(0.6 * s * angle), outer - depth / 2 - middle * math.cos(0.6 * angle)
            parts.append(rod([(x, height - 0.02, z), (x, low, z)], post))
    return parts


def _chair_arms(rng: Generator, rounded: bool, width: float, depth: float, height: float, slope: float) -> list[Part]:
    u = rng.uniform
    rise, half = u(0.18, 0.26), u(0.02, 0.03)
    x, y = width / 2 - half, height + rise
    front = 0.2 * depth if rounded else depth * u(0.2, 0.42)
    back = -depth / 2 - slope * rise  # where the leaning back is at the height of the rest
    style = "bent" if rounded else pick(rng, "bar", "panel", "bent")
    parts = []
    for s in SIDES:
        if style == "bar":
            rest = (s * x - 1.3 * half, s * x + 1.3 * half)
            parts.append(box(rest, (y - half, y + half), (back, front + half)))
            parts.append(rod([(s * x, height, front), (s * x, y - half, front)], half, 4))
        elif style == "panel":
            parts.append(box((s * x - half, s * x + half), (height - 0.05, y), (0.01 - depth / 2, front)))
        else:
            bend = [(s * x, height, front), (s * x, y - 0.05, front), (s * x, y, front - 0.06)]
            end = [(s * x, y, 0.06 - front), (s * x, height, -front)] if rounded else [(s * x, y, back)]
            parts.append(rod(bend + end, half))
    return parts


def _table(rng: Generator) -> list[Part]:
    u = rng.uniform
    kind = pick(rng, "low", "dining", "dining", "bar")
    height = {"low": u(0.38, 0.5), "dining": u(0.68, 0.8), "bar": u(0.9, 1.1)}[kind]
    shape = pick(rng, "rectangle", "rectangle", "rectangle", "round", "oval")
    low, high = {"low": (0.7, 1.2), "dining": (0.8, 1.7), "bar": (0.6, 0.9)}[kind]
    width = u(low, min(high, 1.2) if shape == "round" else high)
    depth = width if shape == "round" else max(0.4, width * u(0.45, 0.9))
    size = max(width, depth, height)
    thick, leg = size * u(0.03, 0.06), size * u(0.04, 0.065)
    under = height - thick
    if shape == "rectangle":
        top = box((-width / 2, width / 2), (under, height), (-depth / 2, depth / 2))
    else:
        top = lathe([(width / 2, under), (width / 2, height)], depth=depth / width)

    bases = [_legged, _legged, _legged, _trestle]
    bases += [_pedestal] if kind != "low" else []
    bases += [_pedestal] if shape != "rectangle" and kind != "low" else []
    bases += [_panels] if shape == "rectangle" else []
    bases += [_drawers] if shape == "rectangle" and kind == "dining" and width > 1 else []
    return [top, *pick(rng, *bases)(rng, shape, width, depth, under, leg)]


def _legged(rng: Generator, shape: str, width: float, depth: float, under: float, leg: float) -> list[Part]:
    """Four legs, perhaps with an apron under the top or a board near the floor."""
    u = rng.uniform
    style = pick(rng, "straight", "straight", "tapered", "splayed")
    corner, board = (0.5 if shape == "rectangle" else 0.36), 0.8 * leg
    x, z = corner * width - u(0.5, 1.2) * leg, corner * depth - u(0.5, 1.2) * leg
    parts = _legs(rng, style, x, z, under, leg)
    if style == "splayed":
        return parts
    if shape == "rectangle" and rng.random() < 0.5:
        y = (under - u(1.2, 2.0) * leg, under)
        for s in SIDES:
            parts.append(box((-x, x), y, (s * z - leg / 4, s * z + leg / 4)))
            parts.append(box((s * x - leg / 4, s * x + leg / 4), y, (-z, z)))
    if rng.random() < 0.4:
        low = u(0.15, 0.4) * under
        if shape == "rectangle":
            parts.append(box((-x, x), (low, low + board), (-z, z)))
        else:
            parts.append(lathe([(1.2 * x, low), (1.2 * x, low + board)], depth=z / x))
    return parts


def _pedestal(rng: Generator, shape: str, width: float, depth: float, under: float, leg: float) -> list[Part]:
    """A column on a disc or on four feet."""
    u = rng.uniform
    foot, column, swell = u(0.26, 0.36), u(0.5, 1.0) * leg, pick(rng, 1.0, 1.0, u(1.3, 1.8))
    parts = [lathe([(column, 0.02), (column * swell, 0.35 * under), (column, 0.7 * under), (column, under)])]
    if rng.random() < 0.5:
        reach, flat = foot * width, 0.6 * leg
        parts.append(lathe([(reach, 0), (reach, flat), (1.2 * column, 2 * flat)], depth=depth / width))
    else:
        for a, b in CORNERS:
            tip = (a * 0.8 * foot * width, 0.35 * leg, b * 0.8 * foot * depth)
            parts.append(rod([(0, 0.18 * under + 0.35 * leg, 0), tip], (0.5 * leg, 0.35 * leg)))
    return parts


def _trestle(rng: Generator, shape: str, width: float, depth: float, under: float, leg: float) -> list[Part]:
    """Two ends, each an X or an upside-down T, with a beam between them."""
    x, z = 0.33 * width, 0.36 * depth
    crossed = rng.random() < 0.5
    parts = [rod([(-x, under / 2, 0), (x, under / 2, 0)], 0.4 * leg, 4)]
    for s in SIDES:
        if crossed:
            parts += [rod([(s * x, 0, -b * z), (s * x, under, b * z)], leg / 2, 4) for b in SIDES]
        else:
            beam = (s * x - leg / 2, s * x + leg / 2)
            parts.append(box(beam, (leg, under), (-0.8 * leg, 0.8 * leg)))
            parts.append(box(beam, (0, leg), (-z, z)))
    return parts


def _panels(rng: Generator, shape: str, width: float, depth: float, under: float, leg: float) -> list[Part]:
    """Two upright panels, perhaps with a board between them."""
    u = rng.uniform
    x, thick, low = width * (0.5 - pick(rng, 0.0, u(0.04, 0.12))), 0.8 * leg, u(0.15, 0.45) * under
    parts = [box(span(s * x, s * (x - thick)), (0, under), (-0.46 * depth, 0.46 * depth)) for s in SIDES]
    if rng.random() < 0.6:
        parts.append(box((thick - x, x - thick), (low, low + thick), (-0.42 * depth, 0.42 * depth)))
    return parts


def _drawers(rng: Generator, shape: str, width: float, depth: float, under: float, leg: float) -> list[Part]:
    """A desk: blocks of drawers at one or both sides, on the floor or between legs."""
    u = rng.uniform
    block, low = u(0.25, 0.33) * width, pick(rng, 0.0, u(0.1, 0.5)) * under
    sides = pick(rng, (-1.0,), (1.0,), SIDES)
    x, z = (width - leg) / 2, (depth - leg) / 2
    legs = _legs(rng, "straight", x, z, under, leg)
    parts = [part for part, (a, _) in zip(legs, CORNERS, strict=True) if low > 0 or a not in sides]
    count = 1 if low > 0.3 * under else pick(rng, 2, 3)
    step = (under - low) / count
    for s in sides:
        outer, inner = s * width / 2, s * (width / 2 - block)
        parts.append(box(span(outer, inner), (low, under), (0.02 - depth / 2, depth / 2 - 0.02)))
        for y in low + step * np.arange(count):
            face = span(outer - 0.03 * s, inner + 0.03 * s)
            parts.append(box(face, (y + 0.1 * step, y + 0.9 * step), (depth / 2 - 0.02, depth / 2 + 0.015)))
    return parts


def _sofa(rng: Generator) -> list[Part]:
    u = rng.uniform
    count = pick(rng, 1, 2, 2, 3, 3, 4)
    seat, depth, back = u(0.52, 0.72), u(0.78, 1.0), u(0.18, 0.28)
    height, cushion = u(0.38, 0.48), u(0.11, 0.18)
    foot, puff, gap = pick(rng, 0.0, u(0.07, 0.16)), u(0.02, 0.04), 0.015
    half, front, rear = count * seat / 2, depth / 2, -depth / 2
    low, top = height - cushion, height + u(0.32, 0.55)
    seats = [(k * seat - half + gap, (k + 1) * seat - half - gap) for k in range(count)]
    chaise = pick(rng, -1.0, 1.0, 0.0, 0.0, 0.0, 0.0) if count > 1 else 0.0  # the side of the long seat
    reach = abs(chaise) * u(0.45, 0.75)

    parts = [box((-half, half), (foot, low), (rear, front))]
    if chaise:
        parts.append(box(span(chaise * half, chaise * (half - seat)), (foot, low), (front, front + reach)))
    for x in seats:
        long = chaise * (x[0] + x[1]) > 2 * half - 1.5 * seat
        parts.append(box(x, (low, height), (rear + back, front + 0.01 + reach * long), puff))

    if rng.random() < 0.6:
        behind = [box((-half, half), (low, top - 0.08), (rear, rear + back / 2))]
        behind += [box(x, (height, top), (rear + back / 2, rear + back), puff) for x in seats]
    else:
        behind = [box((-half, half), (low, top), (rear, rear + back))]
    parts += lean(behind, height, pick(rng, 0.0, u(0.08, 0.22)))

    # High arms would make a cube of an armchair.
    style = pick(rng, "box", "box", "roll", "slope", "none", "high" if count > 1 else "box")
    arm = 0.0 if style == "none" else u(0.12, 0.24)
    rest = top if style == "high" else min(height + u(0.14, 0.3), top - 0.03)
    for s in SIDES if arm else ():
        x = span(s * half, s * (half + arm))
        if style == "slope":
            ends = ((rear, (rest + top) / 2), (0.0, rest), (front, height + 0.08))
            sections = [[(x[0], foot, z), (x[1], foot, z), (x[1], y, z), (x[0], y, z)] for z, y in ends]
            parts.append(loft(np.array(sections)))
        else:
            parts.append(box(x, (foot, rest), (rear, front)))
        if style == "roll":
            middle, y = (x[0] + x[1]) / 2, rest - 0.02
            parts.append(rod([(middle, y, rear), (middle, y, front + 0.02)], 0.62 * arm, 16))

    if foot:
        radius, sides = u(0.03, 0.05), pick(rng, 4, 12)
        x_foot, z_foot = half + arm - 0.09, front - 0.09
        spots = [(a * x_foot, b * z_foot) for a, b in CORNERS]
        if chaise:
            spots += [(chaise * x, z_foot + reach) for x in (half - 0.09, half - seat + 0.09)]
        parts += [rod([(x, foot, z), (x, 0, z)], (radius, 0.8 * radius), sides) for x, z in spots]
    return parts


def _lamp(rng: Generator) -> list[Part]:
    kinds = (_floor_lamp, _floor_lamp, _table_lamp, _table_lamp, _desk_lamp, _arc_lamp, _pendant)
    return pick(rng, *kinds)(rng)


def _floor_lamp(rng: Generator) -> list[Part]:
    u = rng.uniform
    height, pole = u(1.25, 1.7), u(0.022, 0.032)
    shade = _shade(rng, height, u(0.17, 0.27))
    if rng.random() < 0.65:
        return [_foot(rng, u(0.14, 0.22), 0.04), rod([(0, 0.02, 0), (0, height - 0.1, 0)], pole), shade]
    apex, feet = u(0.55, 0.75) * height, _around(3, u(0.26, 0.36))
    legs = [rod([(0, apex + 0.03, 0), (x, 0, z)], (1.1 * pole, 0.8 * pole)) for x, z in feet]
    return [rod([(0, apex, 0), (0, height - 0.1, 0)], pole), *legs, shade]


# Profiles of a table lamp's body: (share of the largest radius, share of the height).
_BODIES: tuple[tuple[tuple[float, float], ...], ...] = (
    ((0.8, 0), (1.0, 0.1), (1.0, 0.45), (0.7, 0.65), (0.3, 0.8), (0.2, 1)),
    ((0.3, 0), (0.66, 0.12), (0.92, 0.3), (1.0, 0.5), (0.92, 0.7), (0.66, 0.88), (0.3, 1)),
    ((0.5, 0), (0.7, 0.2), (1.0, 0.6), (0.85, 0.8), (0.4, 0.95), (0.35, 1)),
    ((1.0, 0), (1.0, 0.1), (0.4, 0.14), (0.4, 0.9), (0.55, 0.94), (0.55, 1)),
    ((1.0, 0), (0.25, 1)),
)


def _table_lamp(rng: Generator) -> list[Part]:
    u = rng.uniform
    height, radius, neck = u(0.42, 0.7), u(0.08, 0.14), 0.022
    body = u(0.5, 0.65) * height
    profile = [(max(r * radius, neck), y * body) for r, y in pick(rng, *_BODIES)]
    stem = rod([(0, body, 0), (0, height - 0.05, 0)], neck)
    return [lathe(profile), stem, _shade(rng, height, u(0.13, 0.2), 0.32 * height)]


def _desk_lamp(rng: Generator) -> list[Part]:
    """Two arms that fold in an upright plane, the plane turned about the foot."""
    u = rng.uniform
    lower, upper, radius = u(0.25, 0.4), u(0.22, 0.36), u(0.014, 0.02)
    rise, tilt, head, turn = u(0.1, 0.8), u(0.0, 0.6), u(0.1, 0.16), u(-0.9, 0.9)
    elbow = np.array((-u(0.05, 0.2), lower))
    wrist = elbow + upper * np.array((math.cos(rise), math.sin(rise)))
    mouth = wrist + head * np.array((math.sin(tilt), -math.cos(tilt)))

    def place(*path: Array | Span) -> list[Point]:
        return [(a * math.sin(turn), b, a * math.cos(turn)) for a, b in path]

    return [
        _foot(rng, u(0.09, 0.13), 0.03),
        rod(place((0, 0.02), elbow), radius),
        rod(place(elbow, wrist), radius),
        rod(place(wrist + np.array((0, 0.03)), wrist, mouth), (0.03, 0.04, u(0.07, 0.11)), 20, capped=False),
    ]


def _arc_lamp(rng: Generator) -> list[Part]:
    u = rng.uniform
    height, pole, straight, radius = u(1.4, 1.8), u(0.022, 0.03), u(0.35, 0.6), u(0.16, 0.24)
    reach = u(0.25, 0.48) * pick(rng, *SIDES)
    bow, stem = (1 - straight) * height, straight * height
    angles = np.linspace(math.pi, math.pi * u(0.12, 0.25), 20)
    arch = [(reach * (1 + math.cos(a)), stem + bow * math.sin(a), 0.0) for a in angles]
    x, y, _ = arch[-1]
    return [
        _foot(rng, u(0.16, 0.24), 0.05),
        rod([(0, 0.03, 0), *arch], pole),
        rod([(x, y, 0), (x, y - 0.05, 0)], pole),
        _bowl(x, y - 0.05, radius, 0.8 * radius),
    ]


def _pendant(rng: Generator) -> list[Part]:
    """A lamp that hangs from the ceiling: canopy, cord and shade."""
    cord, radius = rng.uniform(0.35, 0.75), rng.uniform(0.16, 0.28)
    canopy = lathe([(0.07, cord), (0.07, cord + 0.03)])
    return [canopy, rod([(0, 0, 0), (0, cord, 0)], 0.016), _shade(rng, 0.05, radius)]


def _foot(rng: Generator, radius: float, thick: float) -> Part:
    """The foot of a lamp: a square plate, a disc or a dome."""
    style = pick(rng, "square", "disc", "dome")
    if style == "square":
        return box((-radius, radius), (0, thick), (-radius, radius))
    if style == "disc":
        return lathe([(radius, 0), (radius, thick)])
    return lathe([(radius, 0), (radius, 0.3 * thick), (0.2 * radius, 1.6 * thick)])


def _shade(rng: Generator, top: float, radius: float, height: float | None = None) -> Part:
    """A lamp shade of the given largest radius that ends at the height ``top``; a ball only if of any height."""
    style = pick(rng, "cone", "cone", "drum", "dome", *(("ball",) if height is None else ()))
    height = rng.uniform(0.9, 1.5) * radius if height is None else height
    if style == "ball":
        r, angles = 0.8 * radius, np.linspace(0.05, math.pi - 0.05, 13)
        return lathe([(r * math.sin(a), top - r - r * math.cos(a)) for a in angles])
    if style == "dome":
        return _bowl(0.0, top, radius, 0.8 * height)
    ratio = 1.0 if style == "drum" else rng.uniform(0.4, 0.75)
    return lathe([(radius, top - height), (ratio * radius, top)], capped=False)


def _bowl(x: float, top: float, radius: float, height: float) -> Part:
    """An upside-down bowl, open below."""
    angles = np.linspace(0, 1.45, 8)
    profile = [(radius * math.cos(a), top - height * (1 - math.sin(a))) for a in angles]
    return lathe(profile, x, capped=False)


def _shelf(rng: Generator) -> list[Part]:
    return pick(rng, _bookcase, _bookcase, _bookcase, _bookcase, _rack, _rack, _stairs)(rng)


def _bookcase(rng: Generator) -> list[Part]:
    """Boards between two side panels, with dividers, a back, doors at the bottom or feet."""
    u = rng.uniform
    width, height, depth = u(0.5, 1.5), u(0.75, 1.9), u(0.25, 0.48)
    thick = max(width, height) * u(0.03, 0.045)
    rows = int(np.clip(round(height / u(0.28, 0.5)), 2, 6))
    half, inner, front, rear = width / 2, width / 2 - thick, depth / 2, -depth / 2
    foot, overhang = pick(rng, 0.0, 0.0, u(0.05, 0.12)), pick(rng, 0.0, 0.03)
    top = height - thick
    levels = foot + (top - foot) * np.linspace(0, 1, rows + 1) ** u(0.7, 1.1)  # mostly wider at the bottom
    parts = [box(span(s * half, s * inner), (foot, top), (rear, front)) for s in SIDES]
    parts += [box((-inner, inner), (y, y + thick), (rear, front)) for y in levels[:-1]]
    parts.append(box((-half - overhang, half + overhang), (top, height), (rear, front + overhang)))
    if rng.random() < 0.5:
        parts.append(box((-inner, inner), (foot, top), (rear, rear + 0.015)))
    if foot:
        parts += _legs(rng, pick(rng, "straight", "tapered"), half - thick, front - thick, foot, 1.5 * thick)

    doors = pick(rng, 0, 0, 1) if rows > 2 else 0
    columns = pick(rng, 1, 1, 2, 2, 3) if width > 0.75 else pick(rng, 1, 1, 1, 2)
    staggered = columns == 2 and rng.random() < 0.4
    for k in range(doors, rows):
        for c in range(1, columns):
            x = width * ((1 / 3, 2 / 3)[k % 2] if staggered else c / columns) - half
            y = (levels[k] + thick, levels[k + 1])
            parts.append(box((x - thick / 2, x + thick / 2), y, (rear, front)))
    for s in SIDES if doors else ():
        door, knob = span(0.008 * s, s * (half - 0.01)), (foot + levels[1]) / 2
        parts.append(box(door, (foot + 0.01, levels[1]), (front, front + 0.02)))
        parts.append(rod([(0.06 * s, knob, front + 0.02), (0.06 * s, knob, front + 0.06)], 0.02))
    return parts


def _rack(rng: Generator) -> list[Part]:
    """Boards between four posts; the front posts are upright or lean back like a ladder."""
    u = rng.uniform
    width, height, depth = u(0.5, 1.4), u(0.75, 1.8), u(0.28, 0.46)
    thick = max(width, height) * u(0.03, 0.045)
    post, rows = 1.2 * thick, int(np.clip(round(height / u(0.3, 0.48)), 2, 5))
    half, inner, rear = width / 2, width / 2 - post, -depth / 2
    ladder = pick(rng, 0.0, u(0.4, 0.8)) * (depth - 2.5 * post)  # how much narrower the top is
    parts = []
    for y in np.linspace(u(0.06, 0.2), height - thick, rows + 1):
        front, board = depth / 2 - ladder * y / height, (y, y + thick)
        parts.append(box((-inner, inner), board, (rear, front)))
        for s in SIDES:
            parts.append(box(span(s * inner, s * (half - post / 4)), board, (rear + post, front - post)))
    for s in SIDES:
        x, z0, z1 = s * (half - post / 2), rear + post / 2, (depth - post) / 2
        parts.append(rod([(x, 0, z0), (x, height, z0)], post / 2, 4))
        parts.append(rod([(x, 0, z1), (x, height, z1 - ladder)], post / 2, 4))
    return parts


def _stairs(rng: Generator) -> list[Part]:
    """Open cells in columns that rise to one side."""
    u = rng.uniform
    columns, rise, side = pick(rng, 2, 3, 4), pick(rng, 0, 1), pick(rng, *SIDES)
    wide, high, depth = u(0.26, 0.46), u(0.26, 0.46), u(0.22, 0.46)
    thick = u(0.03, 0.045) * max(columns * wide, (columns + rise) * high)
    z = (-depth / 2, depth / 2)
    parts = []
    for c in range(columns + 1):
        x, rows = (c - columns / 2) * wide, columns + rise - c
        wall = min(rows + 1, columns + rise)  # a wall is as high as the column on its higher side
        parts.append(box(span(side * x, side * (x + thick)), (0, wall * high + thick), z))
        for k in range(rows + 1) if c < columns else ():
            parts.append(box(span(side * (x + thick), side * (x + wide)), (k * high, k * high + thick), z))
    return parts
