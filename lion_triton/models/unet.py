"""The point-voxel networks: the conditioned U-Net (encoder, decoder, point denoiser) and the shape encoder's trunk.

Shapes: B clouds, N points, F input channels (the first three are the coordinates), S style channels,
E time-embedding channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lion_triton.models.attention import Attention, AttentionKind
from lion_triton.models.layers import MLP, FeaturePropagation, PVConv, SetAbstraction, sinusoidal_embedding
from lion_triton.models.plan import LevelGeometry, PointPlan, SetAbstractionGeometry, plan_points


@dataclass(frozen=True)
class Convolutions:
    """A run of PVConvs at one level: how many, their channels, voxels per side; attention after the first."""

    blocks: int
    channels: int = 0
    resolution: int = 0
    attention_heads: int = 0
    attention_head_dim: int = 32


@dataclass(frozen=True)
class DownLevel:
    """One level on the way down: convolutions, then set abstraction with an MLP of these widths."""

    convolutions: Convolutions
    sample: SetAbstractionGeometry
    widths: tuple[int, ...]


@dataclass(frozen=True)
class UpLevel:
    """One level on the way up: feature propagation with an MLP of these widths, then convolutions."""

    widths: tuple[int, ...]
    convolutions: Convolutions


@dataclass(frozen=True)
class UNetConfig:
    """A point-voxel U-Net. ``up`` mirrors ``down``, coarsest level first.

    The published networks have the defaults below, which a small network can improve upon:

    ``skip``: what goes around the coarser levels. ``input``, a level's input features (at the finest level those
    without the coordinates, so what is known of a point must come back through its three nearest centres), or
    ``convolved``, what the level's convolutions made of them.
    ``residual``: feature propagation's MLPs add their input to every layer that is as wide as it.
    """

    down: tuple[DownLevel, ...]
    up: tuple[UpLevel, ...]
    middle_heads: int = 8
    middle_head_dim: int = 32
    head_width: int = 128
    dropout: float = 0.1
    attention: AttentionKind = "linear"
    skip: Literal["input", "convolved"] = "input"
    residual: bool = False

    def __post_init__(self) -> None:
        if len(self.up) != len(self.down) or not self.down:
            raise ValueError(f"up: expected one level for each of the {len(self.down)} of down, got {len(self.up)}")

    @property
    def geometry(self) -> tuple[LevelGeometry, ...]:
        up = self.up[::-1]
        return tuple(
            LevelGeometry(_resolutions(d.convolutions, u.convolutions), d.sample)
            for d, u in zip(self.down, up, strict=True)
        )


def _resolutions(*runs: Convolutions) -> tuple[int, ...]:
    return tuple(sorted({run.resolution for run in runs if run.blocks}))


class ConvolutionRun(nn.Module):
    """The PVConvs of one level, in sequence."""

    def __init__(
        self, in_channels: int, config: Convolutions, style_dim: int, dropout: float, attention: AttentionKind
    ) -> None:
        super().__init__()
        self.resolution = config.resolution
        self.out_channels = config.channels if config.blocks else in_channels
        self.blocks = nn.ModuleList()
        for i in range(config.blocks):
            attend = None
            if i == 0 and config.attention_heads:
                attend = Attention(config.channels, config.attention_heads, config.attention_head_dim, attention)
            self.blocks.append(
                PVConv(
                    in_channels if i == 0 else config.channels,
                    config.channels,
                    config.resolution,
                    style_dim,
                    dropout=dropout,
                    attention=attend,
                )
            )

    def forward(self, x: Tensor, plan: PointPlan, level: int, style: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(x, plan.levels[level].voxels[self.resolution], style)
        return x


class UNet(nn.Module):
    """Point-voxel U-Net, conditioned on a style by AdaGN and, if ``time_dim`` > 0, on a diffusion time.

    Args:
        config: levels and widths.
        in_channels: F, coordinates included.
        out_channels: channels of the output, per point.
        style_dim: S.
        time_dim: E, 0 for a network without time.
    """

    def __init__(
        self, config: UNetConfig, in_channels: int, out_channels: int, style_dim: int, time_dim: int = 0
    ) -> None:
        super().__init__()
        self.config, self.time_dim = config, time_dim
        if time_dim:
            self.time_mlp = nn.Sequential(
                nn.Linear(time_dim, time_dim), nn.LeakyReLU(0.1), nn.Linear(time_dim, time_dim)
            )
        common = (style_dim, config.dropout, config.attention)

        self.down_convolutions, self.set_abstractions = nn.ModuleList(), nn.ModuleList()
        channels = in_channels
        skips = [in_channels - 3]
        for i, down in enumerate(config.down):
            convolutions = ConvolutionRun(channels + time_dim * (i > 0), down.convolutions, *common)
            self.down_convolutions.append(convolutions)
            self.set_abstractions.append(SetAbstraction(convolutions.out_channels, down.widths, style_dim))
            if config.skip == "convolved":
                skips[-1] = convolutions.out_channels
            channels = down.widths[-1]
            skips.append(channels)
        skips.pop()  # the coarsest features go through the middle, not around it

        self.middle = Attention(channels, config.middle_heads, config.middle_head_dim, config.attention)

        self.propagations, self.up_convolutions = nn.ModuleList(), nn.ModuleList()
        for up, skip in zip(config.up, reversed(skips), strict=True):
            self.propagations.append(
                FeaturePropagation(channels + time_dim + skip, up.widths, style_dim, residual=config.residual)
            )
            convolutions = ConvolutionRun(up.widths[-1], up.convolutions, *common)
            self.up_convolutions.append(convolutions)
            channels = convolutions.out_channels

        self.head = MLP(channels, (config.head_width,), style_dim)
        self.head_dropout = nn.Dropout(config.dropout)
        self.out = nn.Linear(config.head_width, out_channels)

    def forward(
        self,
        x: Float[Tensor, "B N F"],
        style: Float[Tensor, "B S"],
        t: Float[Tensor, " B"] | None = None,
        plan: PointPlan | None = None,
    ) -> Float[Tensor, "B N C"]:
        """Run the network; ``plan`` defaults to the plan of x's first three channels."""
        if plan is None:
            plan = plan_points(x[..., :3], self.config.geometry)
        time = None
        if self.time_dim:
            assert t is not None
            time = self.time_mlp(sinusoidal_embedding(t, self.time_dim).to(self.out.weight.dtype))

        skips = []
        for level, (convolve, abstract) in enumerate(zip(self.down_convolutions, self.set_abstractions, strict=True)):
            skip = x if level > 0 else x[..., 3:]
            if level > 0:
                x = _append(x, time)
            x = convolve(x, plan, level, style)
            skips.append(x if self.config.skip == "convolved" else skip)
            x = abstract(x, plan.levels[level], style)

        x = self.middle(x)

        for propagate, convolve in zip(self.propagations, self.up_convolutions, strict=True):
            level = len(skips) - 1
            x = propagate(_append(x, time), skips.pop(), plan.levels[level], style)
            x = convolve(x, plan, level, style)

        return self.out(self.head_dropout(self.head(x, style)))


def _append(x: Float[Tensor, "B N C"], time: Float[Tensor, "B E"] | None) -> Tensor:
    if time is None:
        return x
    return torch.cat([x, time.to(x.dtype).unsqueeze(1).expand(-1, x.shape[1], -1)], dim=-1)


class PointEncoder(nn.Module):
    """The way down of a U-Net without style or time, pooled: a cloud to one feature vector."""

    def __init__(self, levels: Sequence[DownLevel], in_channels: int, dropout: float, attention: AttentionKind) -> None:
        super().__init__()
        self.geometry = tuple(LevelGeometry(_resolutions(level.convolutions), level.sample) for level in levels)
        self.convolutions, self.set_abstractions = nn.ModuleList(), nn.ModuleList()
        for level in levels:
            run = ConvolutionRun(in_channels, level.convolutions, 0, dropout, attention)
            self.convolutions.append(run)
            self.set_abstractions.append(SetAbstraction(run.out_channels, level.widths, 0))
            in_channels = level.widths[-1]
        self.out_channels = in_channels

    def forward(self, x: Float[Tensor, "B N F"], plan: PointPlan | None = None) -> Float[Tensor, "B C"]:
        """Features of the whole cloud; the maximum over the coarsest centres."""
        if plan is None or not plan.serves(self.geometry):
            plan = plan_points(x[..., :3], self.geometry)
        for level, (convolve, abstract) in enumerate(zip(self.convolutions, self.set_abstractions, strict=True)):
            x = abstract(convolve(x, plan, level, None), plan.levels[level], None)
        return x.amax(dim=1)


def published_unet(deep_width: int = 256, attention: AttentionKind = "linear") -> UNetConfig:
    """The U-Net of the published LION; ``deep_width`` is 256 in the VAE and 128 in the point denoiser."""
    return UNetConfig(
        down=(
            DownLevel(Convolutions(2, 32, 32), SetAbstractionGeometry(1024, 0.1, 32), (32, 64)),
            DownLevel(Convolutions(1, 64, 16, 4), SetAbstractionGeometry(256, 0.2, 32), (64, 128)),
            DownLevel(Convolutions(1, 128, 8), SetAbstractionGeometry(64, 0.4, 32), (128, deep_width)),
            DownLevel(Convolutions(0), SetAbstractionGeometry(16, 0.8, 32), (128, 128, 128)),
        ),
        up=(
            UpLevel((128, 128), Convolutions(3, 128, 8)),
            UpLevel((128, 128), Convolutions(3, 128, 8)),
            UpLevel((128, 128), Convolutions(2, 128, 16)),
            UpLevel((128, 128, 64), Convolutions(2, 64, 32)),
        ),
        attention=attention,
    )
