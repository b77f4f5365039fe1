"""Polygons to triangles that cover the same surface.

A face is a ring of corners: convex or not, with holes that a slit joins to its outline, planar or nearly so.
"""

from __future__ import annotations

import mapbox_earcut
import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from lion_triton.data.shape import Shape

SLIVER = 1e-9  # an area below this share of a face's squared size is rounding
CROSSING = 1e-4  # triangles whose area exceeds the face's by more than this share: it crosses itself


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
    sane = (np.abs(points) <= np.finfo(np.float32).max).all(axis=1)
    if not sane.all():
        raise ValueError(f"face {np.searchsorted(np.cumsum(counts), np.argmin(sane), side='right')} is not finite")
    triangles, crossing = triangulate(points, counts)
    return Shape(points[triangles], crossing)


def triangulate(points: Float64[ndarray, "C 3"], counts: Int64[ndarray, " F"]) -> tuple[Int64[ndarray, "T 3"], int]:
    """Triangles, as indices into `points`, the corners of face after face, of at least three each; and how many faces
    cross themselves, so that no triangles are theirs alone."""
    starts = np.cumsum(counts) - counts
    face = np.repeat(np.arange(len(counts)), counts - 2)
    number = np.arange(len(face)) - np.repeat(np.cumsum(counts - 2) - (counts - 2), counts - 2)
    fan = np.stack([starts[face], starts[face] + number + 1, starts[face] + number + 2], axis=1)
    polygons = np.flatnonzero(counts > 3)
    unsure = polygons[~_fans_cover(points, counts[polygons], starts[polygons])]
    if not len(unsure):
        return fan, 0
    kept, made, crossing = np.ones(len(face), dtype=bool), [], 0
    first_triangle = np.cumsum(counts - 2) - (counts - 2)
    for i in unsure:
        ring = _cut(points[starts[i] : starts[i] + counts[i]])
        if ring is None:
            crossing += 1
        else:
            kept[first_triangle[i] : first_triangle[i] + counts[i] - 2] = False
            made.append(ring + starts[i])
    return np.concatenate([fan[kept], *made]), crossing


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


def _cut(ring: Float64[ndarray, "n 3"]) -> Int64[ndarray, "T 3"] | None:
    """Triangles that cover a polygon, as indices into it; None if it crosses itself."""
    rays = ring - ring[0]
    normal = np.cross(rays[1:-1], rays[2:]).sum(axis=0)
    # Dropping an axis, unlike turning, leaves equal coordinates equal: slits stay closed.
    flat = np.delete(rays, np.abs(normal).argmax(), axis=1)
    area = np.abs(normal).max()
    triangles = mapbox_earcut.triangulate_float64(flat, np.array([len(flat)], dtype=np.uint32)).reshape(-1, 3)
    one, other = flat[triangles[:, 1]] - flat[triangles[:, 0]], flat[triangles[:, 2]] - flat[triangles[:, 0]]
    covered = np.abs(one[:, 0] * other[:, 1] - one[:, 1] * other[:, 0]).sum()
    rounding = SLIVER * np.square(rays).sum(axis=1).max()
    return triangles.astype(np.int64) if abs(covered - area) <= CROSSING * area + rounding else None
