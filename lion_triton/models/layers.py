"""Building blocks of the point-voxel networks, channels last.

Shapes: B clouds, N points, C channels, M centres, K neighbours, R voxels per side, S style channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lion_triton.kernels import VoxelPlan, adagn, avg_voxelize, group, three_interpolate, trilinear_devoxelize
from lion_triton.models.attention import Attention
from lion_triton.models.plan import LevelPlan

GROUPS = 8  # of every group normalisation in LION


def sinusoidal_embedding(t: Float[Tensor, " B"], dim: int) -> Float[Tensor, "B dim"]:
    """``[sin, cos]`` of t exp(-ln(10000) i / (dim/2 - 1)), i = 0..dim/2-1; float32."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class AdaGN(nn.Module):
    """Group normalisation over all positions of a cloud, scaled and shifted by its style.

    ``y = GroupNorm(x) * scale + shift`` with ``[scale, shift] = Linear(style)``; plain group normalisation
    where ``style_dim`` is 0. A SiLU may be fused behind it.
    """

    def __init__(self, channels: int, style_dim: int, *, silu: bool = False) -> None:
        super().__init__()
        self.silu = silu
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.style = nn.Linear(style_dim, 2 * channels) if style_dim else None
        if self.style is not None:
            bound = math.sqrt(3 * 0.1 / (2 * channels))  # uniform with variance 0.1 / fan_out
            nn.init.uniform_(self.style.weight, -bound, bound)
            with torch.no_grad():
                self.style.bias.copy_(torch.cat([torch.ones(channels), torch.zeros(channels)]))

    def forward(self, x: Float[Tensor, "B ... C"], style: Float[Tensor, "B S"] | None) -> Tensor:
        scale = shift = None
        if self.style is not None:
            scale, shift = self.style(style).chunk(2, dim=-1)
        return adagn(x, scale, shift, self.weight, self.bias, GROUPS, act="silu" if self.silu else None)


class MLP(nn.Module):
    """(Linear, AdaGN, SiLU) for each width, shared by all positions: (B, ..., C_in) to (B, ..., widths[-1]).

    ``residual`` adds its input to every layer that is as wide as it.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], style_dim: int, *, residual: bool = False) -> None:
        super().__init__()
        self.residual = residual
        sizes = [in_channels, *widths]
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.norms = nn.ModuleList(AdaGN(width, style_dim, silu=True) for width in widths)

    def forward(self, x: Tensor, style: Tensor | None) -> Tensor:
        for linear, norm in zip(self.linears, self.norms, strict=True):
            y = norm(linear(x), style)
            x = x + y if self.residual and y.shape == x.shape else y
        return x


class SqueezeExcite(nn.Module):
    """x * sigmoid(W2 relu(W1 mean(x))), the mean over all positions; no biases."""

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // reduction, bias=False)
        self.excite = nn.Linear(channels // reduction, channels, bias=False)

    def forward(self, x: Float[Tensor, "B ... C"]) -> Float[Tensor, "B ... C"]:
        mean = x.flatten(1, -2).mean(dim=1) if x.ndim > 2 else x
        gate = self.excite(self.squeeze(mean).relu()).sigmoid()
        return x * gate.view(gate.shape[0], *[1] * (x.ndim - 2), -1)


class PVConv(nn.Module):
    """Point-voxel convolution: 3-D convolutions on a voxel grid plus a linear map on the points.

    Attention, if any, follows the sum without a residual connection, as in the published networks.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        resolution: int,
        style_dim: int,
        *,
        dropout: float = 0.1,
        attention: Attention | None = None,
    ) -> None:
        super().__init__()
        self.resolution = resolution
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, padding=1)
        self.norm1 = AdaGN(out_channels, style_dim, silu=True)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1)
        self.norm2 = AdaGN(out_channels, style_dim)
        self.squeeze_excite = SqueezeExcite(out_channels)
        self.point_linear = nn.Linear(in_channels, out_channels)
        self.point_norm = AdaGN(out_channels, style_dim, silu=True)
        self.attention = attention

    def forward(self, x: Float[Tensor, "B N C"], plan: VoxelPlan, style: Tensor | None) -> Float[Tensor, "B N C2"]:
        voxels = avg_voxelize(x, plan.coords, self.resolution, plan=plan)
        voxels = self.dropout(self.norm1(_conv(self.conv1, voxels), style))
        voxels = self.squeeze_excite(self.norm2(_conv(self.conv2, voxels), style))
        points = self.point_norm(self.point_linear(x), style)
        out = trilinear_devoxelize(voxels, plan.coords, plan=plan) + points
        return out if self.attention is None else self.attention(out)


def _conv(conv: nn.Conv3d, voxels: Float[Tensor, "B R R R C"]) -> Float[Tensor, "B R R R C2"]:
    """Convolve a channels-last grid; the permuted view already is torch.channels_last_3d."""
    return conv(voxels.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)


class SetAbstraction(nn.Module):
    """PointNet++ down-sampling: MLP over (centre, neighbour) of [xyz - centre, features], max over neighbours."""

    def __init__(self, in_channels: int, widths: Sequence[int], style_dim: int) -> None:
        super().__init__()
        self.mlp = MLP(in_channels + 3, widths, style_dim)

    def forward(self, x: Float[Tensor, "B N C"], plan: LevelPlan, style: Tensor | None) -> Float[Tensor, "B M C2"]:
        assert plan.neighbors is not None and plan.offsets is not None
        grouped = group(x, plan.neighbors)
        return self.mlp(torch.cat([plan.offsets.to(x.dtype), grouped], dim=-1), style).amax(dim=2)


class FeaturePropagation(nn.Module):
    """PointNet++ up-sampling: interpolate the centres' features, append the skip, MLP."""

    def __init__(self, in_channels: int, widths: Sequence[int], style_dim: int, *, residual: bool = False) -> None:
        super().__init__()
        self.mlp = MLP(in_channels, widths, style_dim, residual=residual)

    def forward(
        self, x: Float[Tensor, "B M C"], skip: Float[Tensor, "B N C2"], plan: LevelPlan, style: Tensor | None
    ) -> Float[Tensor, "B N C3"]:
        assert plan.interpolation_weights is not None and plan.interpolation_index is not None
        x = three_interpolate(x, plan.interpolation_weights, plan.interpolation_index)
        return self.mlp(torch.cat([x, skip.to(x.dtype)], dim=-1), style)
