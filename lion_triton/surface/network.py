"""The network between a noisy cloud and the Poisson solver: for each point several, denoised and with normals.

Source: Peng et al., "Shape As Points", NeurIPS 2021, section 3.2, on a point-voxel U-Net instead of their ConvONet.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lion_triton.models.unet import UNet
from lion_triton.surface.config import SurfaceConfig


class SurfaceNetwork(nn.Module):
    """Points to K times as many points with outward normals, whose lengths weigh them."""

    def __init__(self, config: SurfaceConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = UNet(config.unet, 3, 6 * config.points_per_point, 0)

    def forward(self, points: Float[Tensor, "B N 3"]) -> tuple[Float[Tensor, "B N K 3"], Float[Tensor, "B N K 3"]]:
        """Points, float32, and normals of about unit length. Point (i, 0) is point i without its noise."""
        no_style = points.new_zeros(points.shape[0], 0)
        out = self.unet(points, no_style).float().unflatten(-1, (self.config.points_per_point, 6))
        # The others start from the first: what is learned of a point is learned for all that are made of it.
        first, others = out[:, :, :1], out[:, :, 1:]
        offsets, normals = torch.cat((first, first + others), 2).split(3, -1)
        return points[:, :, None] + self.config.reach * offsets, normals
