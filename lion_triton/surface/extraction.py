"""Indicator grids to watertight triangle meshes."""

from __future__ import annotations

import numpy as np
import trimesh
from jaxtyping import Float
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from skimage.measure import marching_cubes

LEAST_SHARE = 0.003  # of the area of all parts, that a part must have to be kept
NUDGE = 1e-3  # indicators closer to the surface's than this are moved there


def indicator_to_mesh(indicator: Float[np.ndarray, "R R R"], *, least_share: float = LEAST_SHARE) -> trimesh.Trimesh:
    """The surface where ``indicator`` is 0, as a mesh that is watertight and faces outwards (to where it is below 0).

    Node (i, j, k) lies at (i, j, k) / R, as ``poisson_indicator`` has it. Beyond the grid all is outside, so that a
    solid that reaches the border is closed there. Of the surface's connected parts two kinds are left out: voids
    within a solid, which nobody sees, and crumbs, of less than ``least_share`` of the area of all parts.

    Marching cubes is the topologically consistent kind of Lewiner et al. 2003, as scikit-image has it.
    ValueError: another shape, values that are not finite, no surface at all.
    """
    if indicator.ndim != 3 or len(set(indicator.shape)) != 1 or len(indicator) < 2:
        raise ValueError(f"indicator: expected shape (R, R, R) with R >= 2, got {indicator.shape}")
    if not np.isfinite(indicator).all():
        raise ValueError("indicator: expected finite values, got NaN or infinity")
    # A vertex in a node itself would be made once per edge that ends there: coincident, the surface pinched.
    field = np.where(np.abs(indicator) < NUDGE, np.where(indicator < 0, -NUDGE, NUDGE), indicator)
    field = np.pad(field, 1, constant_values=-0.5)
    if not (field > 0).any():
        raise ValueError("indicator: expected a value above 0, the inside of a solid, got none")
    vertices, faces, _, _ = marching_cubes(field.astype(np.float32), 0.0, gradient_direction="ascent")
    vertices = (vertices.astype(np.float64) - 1) / len(indicator)

    edges = coo_matrix((np.ones(len(faces) * 2), (faces[:, :2].ravel(), faces[:, 1:].ravel())), (len(vertices),) * 2)
    part = connected_components(edges, directed=False)[1][faces[:, 0]]
    corners = vertices[faces]
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    volume = np.bincount(part, (corners[:, 0] * cross).sum(1) / 6)
    area = np.bincount(part, np.linalg.norm(cross, axis=1) / 2)
    kept = (volume > 0) & (area >= least_share * area.sum())
    if not kept.any():
        raise ValueError("indicator: expected a solid, got crumbs alone")
    mesh = trimesh.Trimesh(vertices, faces[kept[part]], process=False)
    mesh.remove_unreferenced_vertices()
    return mesh
