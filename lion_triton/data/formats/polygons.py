"""Polygons to triangles that cover the same surface.

A face is a ring of corners: convex or not, with holes that a slit joins to its outline, planar or nearly so.
"""

from __future__ import annotations

import manifold3d
import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from lion_triton.data.shape import Shape

SLIVER = 1e-9  # an area below this share of a face's squared size is rounding
CROSSING = 1e-4  # if triangles between its corners miss a face's area by more than this share, it crosses itself
MOST_CORNERS = 5000  # of a face that is no fan: time grows with their square
MOST_CROSSING = 200  # of one that crosses itself, as often as the square of that: another stays a fan


def polygon_shape(
    vertices: Float64[ndarray, "V 3"], counts: Int64[ndarray, " F"], corners: Int64[ndarray, " C"]
) -> Shape:
    """The surface of F faces of `counts` corners each, whose vertices follow one another in `corners`; those of fewer
    than three have none. ValueError when a corner is no vertex, or not finite as float32."""
    if len(corners) and not 0 <= corners.min() <= corners.max() < len(vertices):
        number = corners.min() if corners.min() < 0 else corners.max()
        raise ValueError(f"a face refers to vertex {number} of {len(vertices)}, counted from 0")
    if len(counts) and counts.min() < 3:
        corners, counts = corners[np.repeat(counts >= 3, counts)], counts[counts >= 3]
    points = vertices[corners]
    sane = np.abs(points) <= np.finfo(np.float32).max
    if not sane.all():
        corner = np.argmin(sane.all(axis=1))
        raise ValueError(f"face {np.searchsorted(np.cumsum(counts), corner, side='right')} is not finite")
    return Shape(*triangulate(points, counts))


def triangulate(points: Float64[ndarray, "C 3"], counts: Int64[ndarray, " F"]) -> tuple[Float64[ndarray, "T 3 3"], int]:
    """The triangles of faces whose corners follow one another in `points`, at least three each; and how many of the
    faces cross themselves. ValueError for outlines of too many corners."""
    starts = np.cumsum(counts) - counts
    face = np.repeat(np.arange(len(counts)), counts - 2)
    first = np.cumsum(counts - 2) - (counts - 2)  # of each face's triangles
    second = starts[face] + np.arange(len(face)) - first[face] + 1
    fan = np.stack([starts[face], second, second + 1], axis=1)
    polygons = np.flatnonzero(counts > 3)
    unsure = polygons[~_fans_cover(points, counts[polygons], starts[polygons])]
    kept, made, crossing = np.ones(len(face), dtype=bool), [], 0
    for i in unsure:
        if counts[i] > MOST_CORNERS:
            raise ValueError(f"face {i} has {counts[i]} corners; of more than {MOST_CORNERS} only convex ones are read")
        ring = points[starts[i] : starts[i] + counts[i]]
        triangles, crosses = _cut(ring)
        crossing += crosses
        if len(triangles):
            kept[first[i] : first[i] + counts[i] - 2] = False
            made.append(triangles)
    return np.concatenate([points[fan[kept]], *made]), crossing


def _fans_cover(points: Float64[ndarray, "C 3"], counts: Int64[ndarray, " F"], starts: Int64[ndarray, " F"]) -> ndarray:
    """Of each face, whether the triangles around its first corner cover it once and nothing else: as they do when all
    turn the same way, and together less than once around."""
    covers = np.ones(len(counts), dtype=bool)
    for count in np.unique(counts):  # faces of equal counts are one array
        chosen = np.flatnonzero(counts == count)
        rays = points[starts[chosen, None] + np.arange(1, count)] - points[starts[chosen], None]
        areas = np.cross(rays[:, :-1], rays[:, 1:])  # twice the area, along the normal
        normal = areas.sum(axis=1, keepdims=True)
        length = np.linalg.norm(normal, axis=2, keepdims=True)
        signed = (areas * (normal / np.where(length > 0, length, 1.0))).sum(axis=2)
        sliver = SLIVER * np.square(rays).sum(axis=2).max(axis=1)
        turned = np.arctan2(signed, (rays[:, :-1] * rays[:, 1:]).sum(axis=2)).sum(axis=1)
        folded = np.linalg.norm(areas, axis=2).sum(axis=1) > sliver  # its halves may cancel: then the normal is none
        fine = (signed >= -sliver[:, None]).all(axis=1) & (turned < 2 * np.pi - 1e-6)
        covers[chosen] = fine & ((length[:, 0, 0] > sliver) | ~folded)
    return covers


def _cut(ring: Float64[ndarray, "n 3"]) -> tuple[Float64[ndarray, "T 3 3"], bool]:
    """Triangles that cover a polygon, and whether it crosses itself.

    They cover one that crosses itself by the rule of even and odd: no triangles at all if that leaves nothing.
    """
    rays = ring - ring[0]
    size = np.abs(rays).max() or 1.0
    rays /= size
    normal = np.cross(rays[1:-1], rays[2:]).sum(axis=0)
    area = np.linalg.norm(normal)
    if area > SLIVER:
        up = normal / area
    else:  # its parts cancel: the plane that fits best
        up = np.linalg.svd(rays - rays.mean(axis=0), full_matrices=False)[2][2]
    across = np.cross(up, np.eye(3)[np.abs(up).argmin()])
    across /= np.linalg.norm(across)
    axes = np.stack([across, np.cross(up, across)])
    flat = rays @ axes.T  # at most about 1, of which the library keeps eight digits
    triangles = manifold3d.triangulate([flat], allow_convex=False)
    one, other = flat[triangles[:, 1]] - flat[triangles[:, 0]], flat[triangles[:, 2]] - flat[triangles[:, 0]]
    covered = np.abs(one[:, 0] * other[:, 1] - one[:, 1] * other[:, 0]).sum()
    if abs(covered - area) <= CROSSING * area + SLIVER:
        return ring[triangles], False
    few = len(ring) <= MOST_CROSSING
    outlines = manifold3d.CrossSection([flat] if few else [], manifold3d.FillRule.EvenOdd).to_polygons()
    if not outlines:
        return np.empty((0, 3, 3)), True
    # Its corners, and where its edges cross: each on the nearest edge, which need not lie in the plane.
    along = np.roll(flat, -1, axis=0) - flat
    offsets = np.concatenate(outlines)[:, None] - flat
    lengths = np.square(along).sum(axis=1)
    at = np.clip((offsets * along).sum(axis=2) / np.where(lengths > 0, lengths, 1.0), 0.0, 1.0)
    edge = np.square(offsets - at[..., None] * along).sum(axis=2).argmin(axis=1)
    at = np.take_along_axis(at, edge[:, None], axis=1)
    corners = ring[edge] + at * (np.roll(ring, -1, axis=0) - ring)[edge]
    return corners[manifold3d.triangulate(outlines)], True
