"""The two denoisers: the shape prior over z0, and the point prior over h0 given z0.

Shapes: B clouds, N points, Z shape-latent channels, H latent-point channels. ``t`` is the diffusion time in
1..T, integer or real. What a denoiser's output means (eps or v) is the diffusion's business, not its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lion_triton.kernels import dropout
from lion_triton.kernels.noise import Key, later_keys
from lion_triton.models.attention import softmax_attention
from lion_triton.models.layers import SqueezeExcite, sinusoidal_embedding
from lion_triton.models.modulation import dropout_key, layer_offsets
from lion_triton.models.precision import compute_dtype
from lion_triton.models.unet import UNet, UNetConfig, published_unet

CLIP_DIM = 512  # of the image and text embeddings of CLIP ViT-B/32


@dataclass(frozen=True)
class ShapePriorConfig:
    """Residual MLP over the shape latent. ``num_classes`` 0: no classes; ``clip``: conditioned on CLIP."""

    width: int = 2048
    blocks: int = 8
    dropout: float = 0.3
    time_dim: int = 128
    num_classes: int = 0
    clip: bool = False


class _ShapeBlock(nn.Module):
    """x + SE(relu(W2 drop(relu(W1 [x + time, condition]))))."""

    def __init__(self, width: int, condition_dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.linear1 = nn.Linear(width + condition_dim, width)
        self.linear2 = nn.Linear(width, width)
        self.squeeze_excite = SqueezeExcite(width)

    def forward(self, x: Tensor, time: Tensor, condition: Tensor | None, key: Tensor | None) -> Tensor:
        hidden = x + time
        if condition is not None:
            hidden = torch.cat([hidden, condition], dim=-1)
        hidden = self.linear1(hidden).relu()
        if key is not None:
            hidden = dropout(hidden, self.dropout, key)
        return x + self.squeeze_excite(self.linear2(hidden).relu())


class ShapePrior(nn.Module):
    """The denoiser of the shape latent, eps(z_t, t): residual MLP blocks without normalisation.

    A class embedding is added to the time embedding; a CLIP embedding is projected and concatenated to
    the hidden state of every block (as published). The label -1 stands for no class and an embedding of zeros for no
    description: they add nothing.
    """

    def __init__(self, config: ShapePriorConfig, shape_dim: int) -> None:
        super().__init__()
        self.config = config
        width, hidden = config.width, config.width // 4
        self.input = nn.Linear(shape_dim, width)
        self.time_mlp = nn.Sequential(nn.Linear(config.time_dim, hidden), nn.Linear(hidden, width))
        self.class_embedding = nn.Embedding(config.num_classes, width) if config.num_classes else None
        self.clip_projection = _clip_projection(width) if config.clip else None
        condition_dim = width if config.clip else 0
        self.blocks = nn.ModuleList(_ShapeBlock(width, condition_dim, config.dropout) for _ in range(config.blocks))
        self.output = nn.Linear(width, shape_dim)
        self.key_offsets: Tensor
        self.register_buffer("key_offsets", layer_offsets(config.blocks), persistent=False)

    def forward(
        self,
        z_t: Float[Tensor, "B Z"],
        t: Float[Tensor, " B"],
        clip: Float[Tensor, "B 512"] | None = None,
        label: Int[Tensor, " B"] | None = None,
        *,
        key: Key | None = None,
    ) -> Float[Tensor, "B Z"]:
        """Predict from a noisy shape latent; ``clip`` or ``label`` exactly where the config asks for it.

        ``key``: of the dropout in training, a fresh one if None.
        """
        _check_conditions(clip, self.clip_projection is not None, label, self.class_embedding is not None)
        key = dropout_key(self, self.config.dropout, key, z_t.device)
        keys: Sequence[Tensor | None] = [None] * len(self.blocks)
        if key is not None:
            keys = later_keys(key, self.key_offsets).unbind()
        with compute_dtype(self, z_t.device) as dtype:
            time = self.time_mlp(sinusoidal_embedding(t, self.config.time_dim).to(dtype))
            if self.class_embedding is not None:
                time = time + _of_class(self.class_embedding, label).to(dtype)
            condition = None
            if self.clip_projection is not None and clip is not None:
                condition = _project_clip(self.clip_projection, clip.to(dtype))
            x = self.input(z_t.to(dtype))
            for block, block_key in zip(self.blocks, keys, strict=True):
                x = block(x, time, condition, block_key)
            return self.output(x).float()


@dataclass(frozen=True)
class TransformerConfig:
    """Transformer over the latent points: softmax attention, time and style by adaLN-zero."""

    width: int = 256
    blocks: int = 8
    heads: int = 4
    mlp_ratio: int = 4


@dataclass(frozen=True)
class PointPriorConfig:
    """The denoiser of the latent points: ``network`` is a U-Net (published) or a transformer.

    ``class_dim`` is the size of the class embedding that is concatenated to the style, ``clip_dim`` the size
    to which a CLIP embedding is projected; both are used only with ``num_classes`` > 0 or ``clip``.
    """

    network: UNetConfig | TransformerConfig
    time_dim: int = 64
    num_classes: int = 0
    class_dim: int = 64
    clip: bool = False
    clip_dim: int = 64


def published_point_prior() -> PointPriorConfig:
    """The point denoiser of the published LION (11.42M parameters)."""
    return PointPriorConfig(published_unet(deep_width=128))


class PointPrior(nn.Module):
    """The denoiser of the latent points given the shape latent, eps(h_t, z0, t).

    The style is z0, with a class embedding concatenated to it, or a projected CLIP embedding concatenated
    and the whole mapped back to Z channels (as published). The label -1 stands for no class, an embedding of zeros for
    no description: zeros in the place of what they are projected to.
    """

    def __init__(self, config: PointPriorConfig, point_dim: int, shape_dim: int) -> None:
        super().__init__()
        self.config = config
        style_dim = shape_dim
        self.class_embedding = nn.Embedding(config.num_classes, config.class_dim) if config.num_classes else None
        if self.class_embedding is not None:
            style_dim += config.class_dim
        self.clip_projection = _clip_projection(config.clip_dim) if config.clip else None
        if self.clip_projection is not None:
            self.clip_style = nn.Linear(style_dim + config.clip_dim, style_dim)
        self.network: UNet | PointTransformer
        if isinstance(config.network, UNetConfig):
            self.network = UNet(config.network, point_dim, point_dim, style_dim, config.time_dim)
        else:
            self.network = PointTransformer(config.network, point_dim, style_dim, config.time_dim)

    def forward(
        self,
        h_t: Float[Tensor, "B N H"],
        t: Float[Tensor, " B"],
        z: Float[Tensor, "B Z"],
        clip: Float[Tensor, "B 512"] | None = None,
        label: Int[Tensor, " B"] | None = None,
        *,
        key: Key | None = None,
    ) -> Float[Tensor, "B N H"]:
        """Predict from noisy latent points; ``clip`` or ``label`` exactly where the config asks for it.

        ``key``: of the dropout in training, a fresh one if None; the transformer has none.
        """
        _check_conditions(clip, self.clip_projection is not None, label, self.class_embedding is not None)
        style = z
        if self.class_embedding is not None:
            style = torch.cat([style, _of_class(self.class_embedding, label).to(style.dtype)], dim=-1)
        if self.clip_projection is not None and clip is not None:
            style = self.clip_style(torch.cat([style, _project_clip(self.clip_projection, clip)], dim=-1))
        return self.network(h_t, style, t, key=key).float()


def _of_class(embedding: nn.Embedding, label: Tensor | None) -> Float[Tensor, "B E"]:
    """The embeddings of the labels, zeros for the label -1."""
    assert label is not None
    return embedding(label.clamp_min(0)) * (label >= 0).unsqueeze(-1)


def _clip_projection(width: int) -> nn.Linear:
    """Its first weights suit embeddings of length 1, whose entries are far smaller than those of hidden states."""
    projection = nn.Linear(CLIP_DIM, width)
    with torch.no_grad():
        projection.weight *= CLIP_DIM**0.5
    return projection


def _project_clip(projection: nn.Linear, clip: Float[Tensor, "B 512"]) -> Float[Tensor, "B W"]:
    """The projections of the embeddings, zeros for an embedding of zeros."""
    return projection(clip) * clip.any(-1, keepdim=True)


def _check_conditions(clip: Tensor | None, takes_clip: bool, label: Tensor | None, takes_label: bool) -> None:
    for name, value, wanted in (("clip", clip, takes_clip), ("label", label, takes_label)):
        if wanted and value is None:
            raise ValueError(f"{name}: this prior is conditioned on it, got None")
        if not wanted and value is not None:
            raise ValueError(f"{name}: this prior is not conditioned on it, got a tensor")


class _TransformerBlock(nn.Module):
    """Pre-norm attention and MLP, each scaled, shifted and gated by the condition (adaLN-zero)."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(mlp_ratio * width, width),
        )
        self.modulation = _zero(nn.Linear(width, 6 * width))

    def forward(self, x: Float[Tensor, "B N W"], condition: Float[Tensor, "B W"]) -> Float[Tensor, "B N W"]:
        parts = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        qkv = self.qkv(self.norm1(x) * (1 + scale1) + shift1).unflatten(-1, (3, self.heads, -1))
        x = x + gate1 * self.attention_out(softmax_attention(*qkv.unbind(dim=2)).flatten(2))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PointTransformer(nn.Module):
    """A transformer over the latent points (Peebles & Xie 2023, DiT, with points as tokens)."""

    def __init__(self, config: TransformerConfig, point_dim: int, style_dim: int, time_dim: int) -> None:
        super().__init__()
        self.time_dim = time_dim
        width = config.width
        self.input = nn.Linear(point_dim, width)
        self.condition = nn.Sequential(nn.Linear(time_dim + style_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            _TransformerBlock(width, config.heads, config.mlp_ratio) for _ in range(config.blocks)
        )
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = _zero(nn.Linear(width, 2 * width))
        self.output = _zero(nn.Linear(width, point_dim))

    def forward(
        self,
        h_t: Float[Tensor, "B N H"],
        style: Float[Tensor, "B S"],
        t: Float[Tensor, " B"],
        *,
        key: Key | None = None,
    ) -> Float[Tensor, "B N H"]:
        with compute_dtype(self, h_t.device) as dtype:
            time = sinusoidal_embedding(t, self.time_dim).to(dtype)
            condition = nn.functional.silu(self.condition(torch.cat([time, style.to(dtype)], dim=-1)))
            x = self.input(h_t.to(dtype))
            for block in self.blocks:
                x = block(x, condition)
            shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, dim=-1)
            return self.output(self.norm(x) * (1 + scale) + shift)


def _zero(linear: nn.Linear) -> nn.Linear:
    """Start at zero, so that every block is the identity at first."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
