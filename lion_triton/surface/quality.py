"""How near a mesh is to a true surface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import trimesh
from jaxtyping import Float
from scipy.spatial import cKDTree

POINTS = 8192  # drawn of a mesh


@dataclass(frozen=True)
class MeshQuality:
    """``chamfer`` as in ``lion_triton.kernels``: the mean squared distance there plus that back, in squared units.

    ``normal_consistency``: the mean |cos| of the angle between the normals of nearest points, there and back averaged
    (Mescheder et al., "Occupancy Networks", CVPR 2019).
    """

    watertight: bool
    chamfer: float
    normal_consistency: float

    @staticmethod
    def mean(judged: Sequence[MeshQuality]) -> dict[str, float]:
        """The mean of every figure; of ``watertight`` that is a share."""
        rows = [asdict(quality) for quality in judged]
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def mesh_quality(
    mesh: trimesh.Trimesh, points: Float[np.ndarray, "P 3"], normals: Float[np.ndarray, "P 3"], seed: int = 0
) -> MeshQuality:
    """Compare points drawn evenly on the mesh with points (and unit normals) of the true surface, in the same units."""
    drawn, face = trimesh.sample.sample_surface(mesh, POINTS, seed=seed)
    there, to_points = cKDTree(points).query(drawn)
    back, to_drawn = cKDTree(drawn).query(points)
    own = mesh.face_normals[face]
    cosines = (np.abs((own * normals[to_points]).sum(1)).mean() + np.abs((own[to_drawn] * normals).sum(1)).mean()) / 2
    chamfer = np.square(there).mean() + np.square(back).mean()
    return MeshQuality(bool(mesh.is_watertight), float(chamfer), float(cosines))
