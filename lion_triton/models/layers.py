"""Building blocks of the point-voxel networks, channels last.

Every linear map and convolution in front of an adaptive group norm lacks a bias: the norm adds it (``modulation.py``).
What is the same for all points of a cloud is not concatenated to them: ``W [x; t] = W_x x + W_t t``, and the norm adds
``W_t t``, too.

Shapes: B clouds, N points, C channels, M centres, K neighbours, R voxels per side, E channels shared by all points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lion_triton.kernels import (
    VoxelPlan,
    adagn_devoxelize,
    adagn_max_neighbors,
    group_mlp_max,
    group_offsets,
    local_moments,
    three_interpolate,
)
from lion_triton.kernels.moments import MOMENTS
from lion_triton.kernels.voxel_conv import conv3d, voxelize_conv3d_moments
from lion_triton.models.attention import Attention
from lion_triton.models.modulation import GROUPS, Norm, NormPlace, normalize
from lion_triton.models.plan import LevelPlan

SCALES = 3  # radii of a point's moments


def sinusoidal_embedding(t: Float[Tensor, " B"], dim: int) -> Float[Tensor, "B dim"]:
    """``[sin, cos]`` of t exp(-ln(10000) i / (dim/2 - 1)), i = 0..dim/2-1; float32."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _shared(norm: Norm, weight: Float[Tensor, "C E"], shared: Float[Tensor, "B E"] | None) -> Norm:
    """The norm with what the points share, multiplied, in its offset."""
    return norm if shared is None else norm._replace(offset=norm.offset + F.linear(shared, weight))


class MLP(nn.Module):
    """(Linear, norm, SiLU) for each width, shared by all positions: (B, ..., C_in) to (B, ..., widths[-1]).

    ``residual`` adds its input to every layer that is as wide as it; ``dropout`` follows the last.
    """

    def __init__(
        self, in_channels: int, widths: Sequence[int], *, residual: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.residual, self.dropout = residual, dropout
        self.norms = [NormPlace(f"linears.{i}", f"norms.{i}", width) for i, width in enumerate(widths)]
        sizes = [in_channels, *widths]
        self.linears = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in zip(sizes[:-1], widths, strict=True))

    @property
    def first_weight(self) -> Float[Tensor, "C_out C_in"]:
        return self.linears[0].weight  # type: ignore[return-value]

    def forward(self, x: Tensor, norms: Sequence[Norm], done: int = 0) -> Tensor:
        """Through the layers behind the first ``done``, with the norms of all."""
        for i in range(done, len(self.linears)):
            last = i == len(self.linears) - 1
            y = normalize(self.linears[i](x), norms[i], dropout=self.dropout if last else 0.0)
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

    Attention, if any, follows the sum without a residual connection, as in the published networks. The dropout is
    between the convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        resolution: int,
        *,
        shared_channels: int = 0,
        dropout: float = 0.1,
        attention: Attention | None = None,
    ) -> None:
        super().__init__()
        self.resolution, self.dropout = resolution, dropout
        places = (("conv1", "norm1"), ("conv2", "norm2"), ("point_linear", "point_norm"))
        self.norms = [NormPlace(layer, name, out_channels) for layer, name in places]
        whole = in_channels + shared_channels
        self.conv1 = _convolution(whole, out_channels)
        self.conv2 = _convolution(out_channels, out_channels)
        self.squeeze_excite = SqueezeExcite(out_channels)
        for linear in self.squeeze_excite.children():
            linear.full_precision = True  # type: ignore[assignment]  # works on statistics
        self.point_linear = nn.Linear(whole, out_channels, bias=False)
        self.attention = attention

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        plan: VoxelPlan,
        norms: Sequence[Norm],
        shared: Float[Tensor, "B E"] | None = None,
    ) -> Float[Tensor, "B N C2"]:
        first, second, branch = norms
        # Into the grid it is concatenated: what the points share is not in empty voxels.
        whole = x if shared is None else torch.cat([x, shared[:, None].expand(-1, x.shape[1], -1)], dim=-1)
        voxels, moments = voxelize_conv3d_moments(whole, plan.coords, self.conv1.weight, self.resolution, plan=plan)
        voxels = conv3d(normalize(voxels, first, dropout=self.dropout, moments=moments), self.conv2.weight)

        weight = self.point_linear.weight
        if shared is not None:
            weight, of_shared = weight.split([x.shape[2], shared.shape[1]], dim=1)
            branch = _shared(branch, of_shared, shared)
        points = normalize(F.linear(x, weight), branch)

        offset, scale, shift, _ = second
        squeeze, excite = self.squeeze_excite.squeeze.weight, self.squeeze_excite.excite.weight
        out = adagn_devoxelize(
            voxels, plan.coords, scale, shift, GROUPS, squeeze, excite, offset=offset, points=points, plan=plan
        )
        return out if self.attention is None else self.attention(out)


def _convolution(in_channels: int, out_channels: int) -> nn.Conv3d:
    """In the memory format of channels-last grids, so that no call has to change it."""
    conv = nn.Conv3d(in_channels, out_channels, 3, padding=1, bias=False)
    return conv.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


class SetAbstraction(nn.Module):
    """PointNet++ down-sampling: MLP over (centre, neighbour) of [xyz - centre, features], max over neighbours.

    The first layer multiplies the features before they are gathered, once per point.
    """

    def __init__(self, in_channels: int, shared_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.parts = [3, in_channels, shared_channels]
        self.mlp = MLP(sum(self.parts), widths)
        self.norms = [place.inside("mlp") for place in self.mlp.norms]

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        plan: LevelPlan,
        norms: Sequence[Norm],
        shared: Float[Tensor, "B E"] | None = None,
    ) -> Float[Tensor, "B M C2"]:
        assert plan.neighbors is not None and plan.offsets is not None
        of_offsets, of_features, of_shared = self.mlp.first_weight.split(self.parts, dim=1)
        norm, neighborhoods = _shared(norms[0], of_shared, shared), (plan.neighbors, plan.offsets, of_offsets)
        x = F.linear(x, of_features)
        if len(self.mlp.linears) == 2:
            matrix: Tensor = self.mlp.linears[1].weight  # type: ignore[assignment]
            return group_mlp_max(x, *neighborhoods, norm.style(), matrix, norms[1].style(), GROUPS)
        y = group_offsets(x, *neighborhoods)
        for linear, following in zip(list(self.mlp.linears)[1:], norms[1:], strict=True):
            y, norm = linear(normalize(y, norm)), following
        offset, scale, shift, _ = norm
        return adagn_max_neighbors(y, scale, shift, GROUPS, offset=offset)


class PointMoments(nn.Module):
    """What a cloud looks like around each of its points (``local_moments``), for features of each of ``channels``.

    Voxels and coarse centres see where a surface is; how far a point lies off it, these do. Zero before training.
    """

    WIDTHS = (64, 32)
    units: Tensor

    def __init__(self, radius: float, channels: Sequence[int]) -> None:
        super().__init__()
        self.radius = radius
        # Of a plane in all directions C is r^2 / 8 in its directions: what is told is in units of that spread.
        units = torch.tensor([1.0] + [8**0.5] * 3 + [8.0] * 6)
        self.register_buffer("units", units, persistent=False)
        first, last = self.WIDTHS
        self.embed = nn.Sequential(nn.Linear(SCALES * MOMENTS, first), nn.SiLU(), nn.Linear(first, last), nn.SiLU())
        self.outputs = nn.ModuleList(nn.Linear(last, width, bias=False) for width in channels)
        for linear in self.outputs:
            nn.init.zeros_(linear.weight)  # type: ignore[arg-type]

    def forward(self, points: Float[Tensor, "B N 3"], dtype: torch.dtype) -> list[Float[Tensor, "B N C"]]:
        moments = local_moments(points, self.radius, SCALES) * self.units
        embedded = self.embed(moments.flatten(2).to(dtype))
        return [linear(embedded) for linear in self.outputs]


class FeaturePropagation(nn.Module):
    """PointNet++ up-sampling: interpolate the centres' features, append the skip, MLP.

    The first layer multiplies the features before they are interpolated, once per centre; what all points share needs
    no interpolation, as its weights sum to 1. ``residual`` is that of the layers behind the first.
    """

    def __init__(
        self, in_channels: int, shared_channels: int, skip_channels: int, widths: Sequence[int], *, residual: bool
    ) -> None:
        super().__init__()
        self.parts = [in_channels, shared_channels, skip_channels]
        self.mlp = MLP(sum(self.parts), widths, residual=residual)
        self.norms = [place.inside("mlp") for place in self.mlp.norms]

    def forward(
        self,
        x: Float[Tensor, "B M C"],
        skip: Float[Tensor, "B N C2"],
        plan: LevelPlan,
        norms: Sequence[Norm],
        shared: Float[Tensor, "B E"] | None = None,
    ) -> Float[Tensor, "B N C3"]:
        assert plan.interpolation_weights is not None and plan.interpolation_index is not None
        of_features, of_shared, of_skip = self.mlp.first_weight.split(self.parts, dim=1)
        y = three_interpolate(F.linear(x, of_features), plan.interpolation_weights, plan.interpolation_index)
        if skip.shape[2]:
            y = torch.addmm(y.flatten(0, 1), skip.flatten(0, 1), of_skip.T).view(y.shape)
        return self.mlp(normalize(y, _shared(norms[0], of_shared, shared)), norms, done=1)
