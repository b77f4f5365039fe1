"""From points to surfaces: normals, a differentiable Poisson solver, marching cubes, and the network that denoises."""

from lion_triton.surface.config import SurfaceConfig, SurfaceTraining, surface_config
from lion_triton.surface.extraction import indicator_to_mesh
from lion_triton.surface.meshing import Mesher
from lion_triton.surface.network import SurfaceNetwork
from lion_triton.surface.normals import estimate_normals
from lion_triton.surface.poisson import PoissonSolver, poisson_indicator

__all__ = [
    "Mesher",
    "PoissonSolver",
    "SurfaceConfig",
    "SurfaceNetwork",
    "SurfaceTraining",
    "estimate_normals",
    "indicator_to_mesh",
    "poisson_indicator",
    "surface_config",
]
