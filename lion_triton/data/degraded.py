"""Shapes of which less is known than a clean cloud: coarse voxels, noisy points, a part.

What an encoder is fine-tuned on, and what a voxel grid in a file means. Lengths are in the units of the cloud.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Bool, Float, Int64
from scipy.spatial import cKDTree

InputKind = Literal["voxels", "noisy", "partial"]
MOST_KEPT = 0.9  # share of a cloud in a part of it
WITHIN = 0.5 - 1e-6  # from a voxel's centre, in voxels
NEAR_VOXELS = 27  # occupied voxels nearest to one, of which its plane is fitted

Array = np.ndarray


@dataclass(frozen=True)
class VoxelGrid:
    """Which voxels a surface goes through.

    Voxel (i, j, k) is the cube from ``offset + scale * (i, j, k)`` to ``offset + scale * (i + 1, j + 1, k + 1)``:
    the axes are x, y, z.
    """

    voxels: Bool[Array, "X Y Z"]
    offset: Float[Array, " 3"]
    scale: float

    @classmethod
    def around(cls, points: Float[Array, "P 3"], resolution: int, rng: np.random.Generator) -> VoxelGrid:
        """The voxels that hold a point, in a grid of which ``resolution`` voxels (at least 2) just reach over the
        cloud's longest side, at a random place on it."""
        low, high = points.min(axis=0), points.max(axis=0)
        scale = float((high - low).max()) / (resolution - 1) or 1.0
        offset = low - rng.random(3) * scale
        voxels = np.zeros((resolution,) * 3, dtype=bool)
        grid = cls(voxels, offset, scale)
        voxels[tuple(np.minimum(grid.index(points), resolution - 1).T)] = True
        return grid

    @classmethod
    def load(cls, path: Path, center: Float[Array, " 3"], longest_side: float) -> VoxelGrid:
        """The grid in an .npz: ``voxels``, boolean (X, Y, Z), and for its place in space ``offset`` (3,) and ``scale``.

        Without a place the occupied voxels are put where a shape of this centre and longest side would have them.

        Raises:
            ValueError: anything else.
        """
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in ("voxels", "offset", "scale") if name in arrays.files}
        voxels = found.pop("voxels")
        if voxels.dtype != bool or voxels.ndim != 3:
            raise ValueError(f"expected voxels as a boolean array (X, Y, Z), got {voxels.dtype} {voxels.shape}")
        if not voxels.any():
            raise ValueError("expected occupied voxels, got none")
        if not found:
            occupied = np.argwhere(voxels)
            low, high = occupied.min(axis=0), occupied.max(axis=0) + 1
            scale = longest_side / max((high - low).max() - 1, 1)
            return cls(voxels, center - scale * (low + high) / 2, scale)
        if found.keys() != {"offset", "scale"}:
            raise ValueError("expected both offset and scale, or neither")
        offset, size = (np.asarray(found[name], dtype=np.float64) for name in ("offset", "scale"))
        if offset.shape != (3,) or not np.isfinite(offset).all():
            raise ValueError(f"expected an offset of three finite numbers, got {offset.tolist()}")
        if size.shape != () or not 0 < size < np.inf:
            raise ValueError(f"expected one finite scale above 0, got {size.tolist()}")
        return cls(voxels, offset, float(size))

    def save(self, path: Path | str) -> None:
        """Write the .npz that ``load`` reads."""
        np.savez_compressed(path, voxels=self.voxels, offset=self.offset, scale=self.scale)

    def moved(self, center: Float[Array, " 3"], scale: float) -> VoxelGrid:
        """The grid around points from which ``center`` is subtracted and which are then divided by ``scale``."""
        return VoxelGrid(self.voxels, (self.offset - center) / scale, self.scale / scale)

    @property
    def extent(self) -> int:
        """Voxels along the longest side of the occupied ones."""
        return int(max(np.ptp(axis) for axis in np.nonzero(self.voxels))) + 1

    def index(self, points: Float[Array, "P 3"]) -> Int64[Array, "P 3"]:
        """The voxel of each point, in the grid or outside."""
        return np.floor((points - self.offset) / self.scale).astype(np.int64)

    def sample(self, count: int, rng: np.random.Generator) -> Float[Array, "count 3"]:
        """Points where the surface seems to go through the occupied voxels, as evenly shared among them as can be:
        moved from the inner half of each onto the plane that fits the voxels around it, as far as that lies within."""
        centers = np.argwhere(self.voxels) + 0.5
        chosen = rng.permutation(len(centers))[np.arange(count) % len(centers)]
        own, (middles, normals) = centers[chosen], (x[chosen] for x in _planes(centers))
        inner = rng.random((count, 3)) / 2 - 0.25
        away = ((own + inner - middles) * normals).sum(axis=1, keepdims=True)
        return self.offset + self.scale * (own + (inner - away * normals).clip(-WITHIN, WITHIN))

    def iou(self, points: Float[Array, "P 3"]) -> float:
        """Intersection over union of the occupied voxels and those that hold one of these points."""
        held = np.unique(self.index(points), axis=0)
        inside = held[((held >= 0) & (held < self.voxels.shape)).all(axis=1)]
        both = int(self.voxels[tuple(inside.T)].sum())
        return both / (int(self.voxels.sum()) + len(held) - both)


def _planes(centers: Float[Array, "M 3"]) -> tuple[Float[Array, "M 3"], Float[Array, "M 3"]]:
    """A point and the unit normal of the plane that fits the centres around each one, by least squares with Gaussian
    weights of the width of a voxel (moving least squares)."""
    near = cKDTree(centers).query(centers, k=range(1, min(NEAR_VOXELS, len(centers)) + 1))
    weights = np.exp(-np.square(near[0]))
    weights /= weights.sum(axis=1, keepdims=True)
    middles = np.einsum("mk,mki->mi", weights, centers[near[1]])
    away = centers[near[1]] - middles[:, None]
    moments = np.einsum("mk,mki,mkj->mij", weights, away, away)
    return middles, np.linalg.eigh(moments)[1][:, :, 0]


def holds_voxels(path: Path) -> bool:
    """Whether this is an .npz with an array ``voxels``."""
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return "voxels" in arrays.files
    except (ValueError, OSError, BadZipFile):
        return False  # and whoever reads it says so


def add_noise(points: Float[Array, "P 3"], largest: float, rng: np.random.Generator) -> Float[Array, "P 3"]:
    """With Gaussian or uniform noise, one as likely as the other, of a standard deviation up to ``largest`` times the
    cloud's longest side."""
    std = rng.random() * largest * np.ptp(points, axis=0).max()
    if rng.random() < 0.5:
        return points + std * rng.standard_normal(points.shape)
    return points + std * np.sqrt(3) * rng.uniform(-1, 1, points.shape)


def cut(points: Float[Array, "P 3"], least: float, rng: np.random.Generator) -> Float[Array, "K 3"]:
    """What lies on one side of a plane of random direction: a share from ``least`` to MOST_KEPT of the points."""
    along = points @ rng.standard_normal(3)
    kept = max(1, round(rng.uniform(least, MOST_KEPT) * len(points)))
    return points[np.sort(np.argpartition(along, kept - 1)[:kept])]
