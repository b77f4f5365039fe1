"""A shape as plain coordinates: a mesh's triangles or a cloud's points."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64
from numpy import ndarray

from lion_triton.data.orientation import inward_faces

ROUNDING = 1e-5  # of its longest side: what float32 may take from a shape before it gets an origin of its own


@dataclass(frozen=True)
class Shape:
    """`coordinates`: the corners of a mesh's triangles (F, 3, 3), or a cloud's points (P, 3), float64.

    `crossing_faces`: how many faces of the file are no simple polygons, so that their triangles are a guess.
    """

    coordinates: Float64[ndarray, "*n 3"]
    crossing_faces: int = 0

    @property
    def is_mesh(self) -> bool:
        return self.coordinates.ndim == 3

    def turned(self, rotation: Float[ndarray, "3 3"]) -> Shape:
        """Every point p becomes rotation @ p."""
        return replace(self, coordinates=self.coordinates @ rotation.T)

    def moved(self, by: Float[ndarray, " 3"]) -> Shape:
        """Every point p becomes p + by."""
        return replace(self, coordinates=self.coordinates + by)

    def fitted(self, size: Float[ndarray, " 3"]) -> Shape:
        """Bounding box stretched to `size` along x, y, z, centred at the origin; a flat axis stays flat."""
        low, high = self.box()
        extent = high - low
        scale = np.where(extent > 0, size / np.where(extent > 0, extent, 1.0), 1.0)
        return replace(self, coordinates=(self.coordinates - (low + high) / 2) * scale)

    def box(self) -> tuple[Float64[ndarray, " 3"], Float64[ndarray, " 3"]]:
        """Lowest and highest corner of the bounding box."""
        axes = self.coordinates.reshape(-1, 3).T
        return np.array([axis.min() for axis in axes]), np.array([axis.max() for axis in axes])

    def check(self) -> None:
        """ValueError unless there is something to draw points from and all of it is finite as float32."""
        kind = "face" if self.is_mesh else "point"
        if len(self.coordinates) == 0:
            raise ValueError(f"no {kind}s")
        finite = np.abs(self.coordinates) <= np.finfo(np.float32).max
        if not finite.all():
            number = int(np.argmin(finite.reshape(len(finite), -1).all(axis=1)))
            raise ValueError(f"{kind} {number} is not finite")
        if self.is_mesh and not self._areas().sum() > 0:
            raise ValueError("the surface has no area")

    def origin(self) -> Float64[ndarray, " 3"] | None:
        """A point in the shape's middle, for shapes so far out that float32 would round their coordinates by more
        than `ROUNDING` of their size; None for others."""
        low, high = self.box()
        farthest, side = np.maximum(-low, high).max(), (high - low).max()
        if side > 0 and np.spacing(np.float32(farthest)) > ROUNDING * side:
            return np.round((low + high) / 2)
        return None

    def sample(self, count: int, seed: int) -> Float32[ndarray, "P 3"]:
        """`count` points as float32, in random order, determined by the shape and `seed`.

        Mesh: independent, uniform over the surface's area. Cloud: drawn without replacement; a cloud of fewer
        than `count` points is returned whole and in its own order.
        """
        if self.is_mesh:
            points, _ = self._sample_surface(count, np.random.default_rng(seed))
        elif len(self.coordinates) >= count:
            chosen = np.random.default_rng(seed).choice(len(self.coordinates), count, replace=False)
            points = self.coordinates[chosen]
        else:
            points = self.coordinates
        return np.ascontiguousarray(points, dtype=np.float32)

    def sample_normals(self, count: int, seed: int) -> Float32[ndarray, "P 3"]:
        """Of a mesh: for each of the points that `sample` draws, the unit normal of the triangle that it lies on,
        outward where there is an outside (see `inward_faces`)."""
        _, faces = self._sample_surface(count, np.random.default_rng(seed))
        first, second, third = self.coordinates[faces].transpose(1, 0, 2)
        normals = np.cross(second - first, third - first)
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        normals[inward_faces(self.coordinates)[faces]] *= -1
        return normals.astype(np.float32)

    def _areas(self) -> Float64[ndarray, " F"]:
        """Twice the area of each triangle."""
        first, second, third = (self.coordinates[:, i] for i in range(3))
        return np.linalg.norm(np.cross(second - first, third - first), axis=1)

    def _sample_surface(
        self, count: int, rng: np.random.Generator
    ) -> tuple[Float64[ndarray, "count 3"], Int64[ndarray, " count"]]:
        """Points that are independent and uniform over the triangles' area, and the triangle of each."""
        upto = np.cumsum(self._areas())
        faces = np.searchsorted(upto, rng.random(count) * upto[-1])
        first, second, third = self.coordinates[faces].transpose(1, 0, 2)
        u, v = rng.random((count, 2, 1)).transpose(1, 0, 2)
        over = u + v > 1  # in the other half of the parallelogram
        points = first + np.where(over, 1 - u, u) * (second - first) + np.where(over, 1 - v, v) * (third - first)
        return points, faces
