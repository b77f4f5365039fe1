"""What a surface network is made of and how it is trained.

The network's lengths are of a cloud's own frame: its bounding box is centred at the origin, its longest side is 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lion_triton.config import Optimization
from lion_triton.models.plan import SetAbstractionGeometry
from lion_triton.models.unet import Convolutions, DownLevel, UNetConfig, UpLevel


@dataclass(frozen=True)
class SurfaceConfig:
    """Sizes of the network.

    Attributes:
        num_points: N, points of the clouds it is trained on and given.
        unet: its trunk.
        points_per_point: K, points made of each; the first is the point itself, denoised.
        reach: length of an offset that the trunk's output of 1 stands for.
    """

    num_points: int
    unet: UNetConfig
    points_per_point: int = 8
    reach: float = 0.1


def surface_config(num_points: int) -> SurfaceConfig:
    """A small network, whose neighbourhoods hold about as many points whatever ``num_points``."""
    spacing = (512 / num_points) ** 0.5
    fine = SetAbstractionGeometry(max(num_points // 2, 1), 0.25 * spacing, 16)
    coarse = SetAbstractionGeometry(max(num_points // 8, 1), 0.5 * spacing, 16)
    unet = UNetConfig(
        down=(
            DownLevel(Convolutions(1, 32, 16), fine, (64, 64)),
            DownLevel(Convolutions(1, 32, 8), coarse, (128,)),
        ),
        up=(
            UpLevel((64, 32), Convolutions(1, 32, 8)),
            UpLevel((64, 32), Convolutions(1, 32, 16)),
        ),
        middle_heads=2,
        dropout=0.0,
        skip="convolved",
        residual=True,
    )
    return SurfaceConfig(num_points, unet)


@dataclass(frozen=True)
class SurfaceTraining(Optimization):
    """How a surface network is trained; lengths are shares of the solver's cube.

    Attributes:
        resolution: nodes per side of the grids that are compared.
        sigma: blur of the Poisson solver, here and when meshes are made.
        jitter: noise added to the latent points, in units of their standard deviation: up to so much, for each cloud
            another share of it. Generated latents are off by about 0.12 (the quickstart's, judged by how far points lie
            off the plane of their neighbours); a network that knows the VAE's noise alone takes theirs for shape.
        dense_points: drawn of each true surface.
        band: standard deviation of the distances from the surface of the places where grids are compared once more.
        indicator, near, normals, points: weights of the loss's terms, see ``lion_triton.training.surface``.
    """

    steps: int = 600
    batch_size: int = 8
    learning_rate: float = 2e-3
    learning_rate_decay: Literal["constant", "cosine"] = "cosine"
    max_grad_norm: float | None = 1.0
    resolution: int = 64
    sigma: float = 0.005
    jitter: float = 0.15
    dense_points: int = 8192
    band: float = 0.02
    indicator: float = 5.0
    near: float = 4.0
    normals: float = 1.0
    points: float = 100.0
