"""The point-voxel networks: the conditioned U-Net (encoder, decoder, point denoiser) and the shape encoder's trunk.

Shapes: B clouds, N points, F input channels (the first three are the coordinates), S style channels,
E time-embedding channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from lion_triton.kernels.noise import Key
from lion_triton.models.attention import Attention, AttentionKind
from lion_triton.models.layers import (
    MLP,
    FeaturePropagation,
    PointMoments,
    PVConv,
    SetAbstraction,
    sinusoidal_embedding,
)
from lion_triton.models.modulation import Modulation, Norm, NormPlace, dropout_key, keep_apart
from lion_triton.models.plan import LevelGeometry, PointPlan, SetAbstractionGeometry, plan_points
from lion_triton.models.precision import compute_dtype


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
    ``moments``: the largest radius, in units of the input's coordinates, of the neighbourhoods whose moments every
    point is told (``local_moments``); 0 for none.
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
    moments: float = 0.0

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
        self, in_channels: int, shared_channels: int, config: Convolutions, dropout: float, attention: AttentionKind
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
                    shared_channels=shared_channels if i == 0 else 0,
                    dropout=dropout,
                    attention=attend,
                )
            )

    def names(self, name: str) -> list[str]:
        """What its blocks are called in a network that calls it so."""
        return [f"{name}.blocks.{i}" for i in range(len(self.blocks))]

    def forward(
        self, x: Tensor, plan: PointPlan, level: int, norms: Iterator[list[Norm]], shared: Tensor | None = None
    ) -> Tensor:
        """Takes of ``norms`` those of its blocks."""
        for i, block in enumerate(self.blocks):
            x = block(x, plan.levels[level].voxels[self.resolution], next(norms), shared if i == 0 else None)
        return x


def _modulation(network: nn.Module, blocks: Sequence[str], style_dim: int) -> Modulation:
    """Of the norms of these blocks, which stand apart in the network's state dictionary."""
    keep_apart(network)
    norms: list[list[NormPlace]] = [network.get_submodule(block).norms for block in blocks]  # type: ignore[misc]
    return Modulation([[norm.inside(block) for norm in of] for block, of in zip(blocks, norms, strict=True)], style_dim)


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
        common = (config.dropout, config.attention)

        self.down_convolutions, self.set_abstractions = nn.ModuleList(), nn.ModuleList()
        channels = in_channels
        skips = [in_channels - 3]
        blocks: list[str] = []  # names of what has norms, as it runs
        for i, down in enumerate(config.down):
            shared = time_dim if i > 0 else 0  # the first block of a level takes the time
            convolutions = ConvolutionRun(channels, shared, down.convolutions, *common)
            channels = convolutions.out_channels
            abstraction = SetAbstraction(channels, 0 if convolutions.blocks else shared, down.widths)
            self.down_convolutions.append(convolutions)
            self.set_abstractions.append(abstraction)
            blocks += [*convolutions.names(f"down_convolutions.{i}"), f"set_abstractions.{i}"]
            if config.skip == "convolved":
                skips[-1] = channels
            channels = down.widths[-1]
            skips.append(channels)
        skips.pop()  # the coarsest features go through the middle, not around it

        self.middle = Attention(channels, config.middle_heads, config.middle_head_dim, config.attention)

        self.propagations, self.up_convolutions = nn.ModuleList(), nn.ModuleList()
        for i, (up, skip) in enumerate(zip(config.up, reversed(skips), strict=True)):
            propagation = FeaturePropagation(channels, time_dim, skip, up.widths, residual=config.residual)
            convolutions = ConvolutionRun(up.widths[-1], 0, up.convolutions, *common)
            self.propagations.append(propagation)
            self.up_convolutions.append(convolutions)
            blocks += [f"propagations.{i}", *convolutions.names(f"up_convolutions.{i}")]
            channels = convolutions.out_channels

        # Added where the points first and last have features of their own.
        first, last = config.down[0].convolutions, config.up[-1]
        told = (first.channels if first.blocks else in_channels, last.widths[-1])
        self.moments = PointMoments(config.moments, told) if config.moments else None

        self.head = MLP(channels, (config.head_width,), dropout=config.dropout)
        self.out = nn.Linear(config.head_width, out_channels)
        self.modulation = _modulation(self, [*blocks, "head"], style_dim)

    def forward(
        self,
        x: Float[Tensor, "B N F"],
        style: Float[Tensor, "B S"],
        t: Float[Tensor, " B"] | None = None,
        plan: PointPlan | None = None,
        key: Key | None = None,
    ) -> Float[Tensor, "B N C"]:
        """Run the network; ``plan`` defaults to the plan of x's first three channels, ``key`` to a fresh one.

        The key decides what is dropped out in training. Under autocast the result has autocast's dtype.
        """
        if plan is None:
            plan = plan_points(x[..., :3], self.config.geometry)
        key = dropout_key(self, self.config.dropout, key, x.device)
        with compute_dtype(self, x.device) as dtype:
            norms = self.modulation(style.to(dtype), len(x), key)
            time = None
            if self.time_dim:
                assert t is not None
                time = self.time_mlp(sinusoidal_embedding(t, self.time_dim).to(dtype))
            return self._run(x.to(dtype), plan, norms, time)

    def _run(self, x: Tensor, plan: PointPlan, norms: Iterator[list[Norm]], time: Tensor | None) -> Tensor:
        skips = []
        first = last = None
        if self.moments is not None:
            first, last = self.moments(plan.levels[0].points, x.dtype)
        for level, (convolve, abstract) in enumerate(zip(self.down_convolutions, self.set_abstractions, strict=True)):
            skip, shared = (x, time) if level > 0 else (x[..., 3:], None)
            x = convolve(x, plan, level, norms, shared)
            if level == 0 and first is not None:
                x = x + first
            skips.append(x if self.config.skip == "convolved" else skip)
            x = abstract(x, plan.levels[level], next(norms), None if convolve.blocks else shared)

        x = self.middle(x)

        for propagate, convolve in zip(self.propagations, self.up_convolutions, strict=True):
            level = len(skips) - 1
            x = propagate(x, skips.pop(), plan.levels[level], next(norms), time)
            if level == 0 and last is not None:
                x = x + last
            x = convolve(x, plan, level, norms)

        return self.out(self.head(x, next(norms)))


class PointEncoder(nn.Module):
    """The way down of a U-Net without style or time, pooled: a cloud to one feature vector."""

    def __init__(self, levels: Sequence[DownLevel], in_channels: int, dropout: float, attention: AttentionKind) -> None:
        super().__init__()
        self.geometry = tuple(LevelGeometry(_resolutions(level.convolutions), level.sample) for level in levels)
        self.convolutions, self.set_abstractions = nn.ModuleList(), nn.ModuleList()
        self.dropout = dropout
        blocks: list[str] = []  # names of what has norms, as it runs
        for i, level in enumerate(levels):
            run = ConvolutionRun(in_channels, 0, level.convolutions, dropout, attention)
            abstraction = SetAbstraction(run.out_channels, 0, level.widths)
            self.convolutions.append(run)
            self.set_abstractions.append(abstraction)
            blocks += [*run.names(f"convolutions.{i}"), f"set_abstractions.{i}"]
            in_channels = level.widths[-1]
        self.out_channels = in_channels
        self.modulation = _modulation(self, blocks, 0)

    def forward(
        self, x: Float[Tensor, "B N F"], plan: PointPlan | None = None, key: Key | None = None
    ) -> Float[Tensor, "B C"]:
        """Features of the whole cloud; the maximum over the coarsest centres. ``key`` as of :class:`UNet`."""
        if plan is None or not plan.serves(self.geometry):
            plan = plan_points(x[..., :3], self.geometry)
        key = dropout_key(self, self.dropout, key, x.device)
        with compute_dtype(self, x.device) as dtype:
            norms = self.modulation(None, len(x), key)
            x = x.to(dtype)
            for level, (convolve, abstract) in enumerate(zip(self.convolutions, self.set_abstractions, strict=True)):
                x = abstract(convolve(x, plan, level, norms), plan.levels[level], next(norms))
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
