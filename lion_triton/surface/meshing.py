"""From clouds in any units to watertight meshes in the same units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import trimesh
from jaxtyping import Float
from torch import Tensor

from lion_triton.surface.extraction import indicator_to_mesh
from lion_triton.surface.network import SurfaceNetwork
from lion_triton.surface.normals import estimate_normals
from lion_triton.surface.poisson import PoissonSolver

RESOLUTION = 96  # nodes per side, unless asked otherwise
MARGIN = 1.2  # side of the solver's cube, where a cloud's longest side is 1


@dataclass(frozen=True)
class Frame:
    """The units of :mod:`lion_triton.surface.network`, one per cloud: (p - center) / half."""

    center: Float[Tensor, "B 1 3"]
    half: Float[Tensor, "B 1 1"]

    @classmethod
    def of(cls, points: Float[Tensor, "B N 3"]) -> Frame:
        """The frame of clouds; one without extent keeps its units."""
        low, high = points.amin(1, keepdim=True), points.amax(1, keepdim=True)
        half = (high - low).amax(-1, keepdim=True) / 2
        return cls((low + high) / 2, torch.where(half > 0, half, 1))

    def enter(self, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N 3"]:
        return (points - self.center) / self.half


def to_cube(points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N 3"]:
    """From the frame's units to the solver's unit cube."""
    return points / (2 * MARGIN) + 0.5


class Mesher:
    """Makes meshes of clouds, one by one.

    Args:
        network: predicts denoised points with normals; None: the cloud's own points with estimated normals.
        resolution, sigma: of the Poisson solver.
        device: where network and solver run.
    """

    def __init__(
        self, network: SurfaceNetwork | None, resolution: int, sigma: float, device: torch.device | str = "cpu"
    ) -> None:
        self.network = None if network is None else network.to(device).eval()
        self.solver = PoissonSolver(resolution, sigma).to(device)
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, cloud: Float[np.ndarray, "P 3"]) -> trimesh.Trimesh:
        """The mesh of one cloud, in its units, float32 vertices.

        With a network P must be the number of points that it was trained on.
        ValueError: a cloud of which no solid can be made.
        """
        points = torch.from_numpy(np.asarray(cloud, np.float32))[None]
        if (points == points[:, :1]).all():
            raise ValueError("cloud: expected points apart from each other, got all at one place")
        frame = Frame.of(points)
        points = frame.enter(points).to(self.device)
        if self.network is None:
            normals = estimate_normals(points, min(10, points.shape[1]))
        else:
            points, normals = (x.flatten(1, 2) for x in self.network(points))
        indicator = self.solver(to_cube(points), normals)
        if self.network is None and indicator[:, 0].mean() > 0:  # parts outweigh each other, or sides disagree
            indicator = -indicator
        mesh = indicator_to_mesh(indicator[0].cpu().numpy())
        vertices = (mesh.vertices - 0.5) * (2 * MARGIN * frame.half.item()) + frame.center[0].numpy()
        mesh.vertices = vertices.astype(np.float32)
        return mesh
