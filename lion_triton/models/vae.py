"""LION's hierarchical variational auto-encoder: cloud -> shape latent z0, latent points h0 -> cloud.

Shapes: B clouds, N points, Z shape-latent channels, H = 3 + D_h latent-point channels.
Zeng et al. 2022, section 3. ``log_sigma`` is a log standard deviation throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lion_triton.kernels.noise import Key
from lion_triton.models.plan import PointPlan, SetAbstractionGeometry, plan_points
from lion_triton.models.unet import Convolutions, DownLevel, PointEncoder, UNet, UNetConfig, published_unet


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE.

    The point encoder's mean is ``encoder_scale * network + x`` and the decoder's output is
    ``decoder_scale * network + h_xyz``, so that the VAE starts near the identity; the point latent's
    log standard deviation is the network's minus ``log_sigma_offset``.

    ``occupancy_resolution`` > 0 adds a small head that tells from z0 alone which voxels of the cloud are occupied.
    It serves training only: without it a short training leaves the shape's details to h0 (not in the published VAE).
    """

    shape_encoder: tuple[DownLevel, ...]
    point_encoder: UNetConfig
    decoder: UNetConfig
    shape_dim: int = 128
    feature_dim: int = 1
    encoder_scale: float = 0.01
    decoder_scale: float = 0.01
    log_sigma_offset: float = 6.0
    occupancy_resolution: int = 0

    @property
    def point_dim(self) -> int:
        """H: the channels of a latent point."""
        return 3 + self.feature_dim


def published_vae() -> VAEConfig:
    """The VAE of the published LION (22.40M parameters)."""
    return VAEConfig(
        shape_encoder=(
            DownLevel(Convolutions(2, 32, 32), SetAbstractionGeometry(1024, 0.1, 32), (32, 32)),
            DownLevel(Convolutions(1, 32, 16, 4), SetAbstractionGeometry(256, 0.2, 32), (32, 64)),
        ),
        point_encoder=published_unet(),
        decoder=published_unet(),
    )


class Latents(NamedTuple):
    """A cloud's latents, in the order that ``decode`` takes them."""

    h: Float[Tensor, "B N H"]
    z: Float[Tensor, "B Z"]


class VAE(nn.Module):
    """Encoders q(z0|x), q(h0|x,z0) and decoder p(x|h0,z0)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        unet = config.point_encoder
        self.shape_encoder = PointEncoder(config.shape_encoder, 3, unet.dropout, unet.attention)
        self.shape_head = nn.Linear(self.shape_encoder.out_channels, 2 * config.shape_dim)
        self.point_encoder = UNet(config.point_encoder, 3, 2 * config.point_dim, config.shape_dim)
        self.decoder = UNet(config.decoder, config.point_dim, 3, config.shape_dim)
        voxels = config.occupancy_resolution**3
        self.occupancy_head = (
            nn.Sequential(nn.Linear(config.shape_dim, 256), nn.SiLU(), nn.Linear(256, voxels)) if voxels else None
        )

    def plan(self, points: Float[Tensor, "B N 3"]) -> PointPlan:
        """The plan that both encoders can share."""
        return plan_points(points, self.config.point_encoder.geometry)

    def encode_shape(
        self, points: Float[Tensor, "B N 3"], plan: PointPlan | None = None, *, key: Key | None = None
    ) -> tuple[Float[Tensor, "B Z"], Float[Tensor, "B Z"]]:
        """``(mu, log_sigma)`` of q(z0|x). ``key``, here and below: of the dropout in training, a fresh one if None."""
        mu, log_sigma = self.shape_head(self.shape_encoder(points, plan, key)).float().chunk(2, dim=-1)
        return mu, log_sigma

    def encode_points(
        self,
        points: Float[Tensor, "B N 3"],
        z: Float[Tensor, "B Z"],
        plan: PointPlan | None = None,
        *,
        key: Key | None = None,
    ) -> tuple[Float[Tensor, "B N H"], Float[Tensor, "B N H"]]:
        """``(mu, log_sigma)`` of q(h0|x,z0); xyz first, then the features."""
        out = self.point_encoder(points, z, plan=plan, key=key).float()
        features = self.config.feature_dim
        mu, log_sigma, feature_mu, feature_log_sigma = out.split([3, 3, features, features], dim=-1)
        mu = torch.cat([self.config.encoder_scale * mu + points, feature_mu], dim=-1)
        return mu, torch.cat([log_sigma, feature_log_sigma], dim=-1) - self.config.log_sigma_offset

    def decode(
        self,
        h: Float[Tensor, "B N H"],
        z: Float[Tensor, "B Z"],
        plan: PointPlan | None = None,
        *,
        key: Key | None = None,
    ) -> Float[Tensor, "B N 3"]:
        """The mean of p(x|h0,z0); one output point for each latent point."""
        return self.config.decoder_scale * self.decoder(h, z, plan=plan, key=key).float() + h[..., :3]
