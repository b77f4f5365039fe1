"""Geometry once, features many times.

Everything of a network's forward pass that depends on coordinates alone: voxel indices and trilinear
weights per resolution, furthest-point centres, ball-query neighbours, three-nearest-centre weights. It
is computed once per forward and shared by every block that works at the same level.

Indices and interpolation weights carry no gradient; the neighbours' offsets do, as they are features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lion_triton.kernels import (
    VoxelPlan,
    ball_query,
    furthest_point_sample,
    group,
    plan_voxels,
    three_nn,
    voxel_coords,
)


@dataclass(frozen=True)
class SetAbstractionGeometry:
    """How a level is sampled down: centres, ball radius (in the coordinates' unit), neighbours per centre."""

    centers: int
    radius: float
    neighbors: int


@dataclass(frozen=True)
class LevelGeometry:
    """What one level needs: voxel resolutions, and how it is sampled down to the next level, if it is."""

    resolutions: tuple[int, ...]
    down: SetAbstractionGeometry | None


@dataclass(frozen=True)
class LevelPlan:
    """One level of a :class:`PointPlan`; the last four are None at a level that is not sampled down."""

    points: Float[Tensor, "B N 3"]
    voxels: dict[int, VoxelPlan]
    neighbors: Int[Tensor, "B M K"] | None
    offsets: Float[Tensor, "B M K 3"] | None
    interpolation_weights: Float[Tensor, "B N 3"] | None
    interpolation_index: Int[Tensor, "B N 3"] | None


@dataclass(frozen=True)
class PointPlan:
    """The geometry of one batch of clouds, level by level from fine to coarse."""

    geometry: tuple[LevelGeometry, ...]
    levels: tuple[LevelPlan, ...]

    def serves(self, geometry: Sequence[LevelGeometry]) -> bool:
        """True if this plan's first levels are exactly the ones asked for."""
        return self.geometry[: len(geometry)] == tuple(geometry)


@torch.compiler.disable  # thousands of small steps: nothing to gain there, and much to compile
def plan_points(points: Float[Tensor, "B N 3"], geometry: Sequence[LevelGeometry]) -> PointPlan:
    """Compute the plan of ``points`` (float32 coordinates).

    The plan has one level more than are sampled down: the coarsest centres are its last level.

    Raises:
        ValueError: if a level has fewer points than the centres to be chosen from it.
    """
    points = (points if points.dtype == torch.float64 else points.float()).contiguous()
    levels: list[LevelPlan] = []
    for level in geometry:
        fixed = points.detach()
        voxels = {r: plan_voxels(voxel_coords(fixed, r), r) for r in level.resolutions}
        if level.down is None:
            levels.append(LevelPlan(points, voxels, None, None, None, None))
            return PointPlan(tuple(geometry), tuple(levels))
        if level.down.centers > points.shape[1]:
            raise ValueError(
                f"points: this network needs at least {level.down.centers} points per cloud at level "
                f"{len(levels)}, got {points.shape[1]}"
            )
        chosen = furthest_point_sample(fixed, level.down.centers)
        centers = group(points, chosen.unsqueeze(-1)).squeeze(2)
        neighbors = ball_query(centers.detach(), fixed, level.down.radius, level.down.neighbors)
        offsets = group(points, neighbors) - centers.unsqueeze(2)
        weights, index = three_nn(fixed, centers.detach())
        levels.append(LevelPlan(points, voxels, neighbors, offsets, weights, index))
        points = centers
    levels.append(LevelPlan(points, {}, None, None, None, None))
    return PointPlan(tuple(geometry), tuple(levels))
