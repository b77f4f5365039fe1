"""What all adaptive group norms of a network take besides their inputs, made at once.

Shapes: B clouds, S style channels, C channels of one norm, D channels of all norms together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from lion_triton.kernels import adagn

GROUPS = 8  # of every group normalisation in LION


class Norm(NamedTuple):
    """One adaptive group norm: ``scale group_norm(x + offset) + shift``, then what :func:`normalize` is told."""

    offset: Float[Tensor, "B C"]
    scale: Float[Tensor, "B C"]
    shift: Float[Tensor, "B C"]
    key: Int64[Tensor, " 2"] | None  # of its dropout


def normalize(x: Float[Tensor, "B ... C"], norm: Norm, *, dropout: float = 0.0) -> Float[Tensor, "B ... C"]:
    """The norm, SiLU, and dropout where there is a key for it."""
    offset, scale, shift, key = norm
    drop = dropout if key is not None else 0.0
    return adagn(x, scale, shift, None, None, GROUPS, act="silu", offset=offset, dropout=drop, key=key)


def layer_keys(count: int) -> Int64[Tensor, "count 2"]:
    """What to add to a step's key for the dropout of each layer: far from all keys that count up from the step's."""
    return torch.arange(1, count + 1)[:, None] * torch.tensor([0, 2**40])


class Modulation(nn.Module):
    """Offsets, scales and shifts of all adaptive group norms of a network, by one matrix product from its style.

    A norm's own affine map and the style's make ``scale = weight s`` and ``shift = bias s + t`` with
    ``[s, t] = Linear(style)``; plain group norm where ``style_dim`` is 0. Its offset is the bias of the linear map or
    convolution before it, which has none of its own. All are float32.

    Args:
        blocks: the channels of the norms of each block, in the order in which the network runs.
        style_dim: S.
    """

    def __init__(self, blocks: Sequence[Sequence[int]], style_dim: int) -> None:
        super().__init__()
        self.blocks = [tuple(block) for block in blocks]
        self.channels = [c for block in blocks for c in block]
        total = sum(self.channels)
        self.offset = nn.Parameter(torch.zeros(total))
        self.weight = nn.Parameter(torch.ones(total))
        self.bias = nn.Parameter(torch.zeros(total))
        self.style = nn.Linear(style_dim, 2 * total) if style_dim else None
        if self.style is not None:
            with torch.no_grad():
                for half in self.style.weight.chunk(2):
                    for rows, c in zip(half.split(self.channels), self.channels, strict=True):
                        bound = math.sqrt(3 * 0.1 / (2 * c))  # uniform with variance 0.1 / fan_out of a norm alone
                        rows.uniform_(-bound, bound)
                self.style.bias.copy_(torch.cat([torch.ones(total), torch.zeros(total)]))
        self.keys: Tensor
        self.register_buffer("keys", layer_keys(len(self.channels)), persistent=False)

    def forward(
        self, style: Float[Tensor, "B S"] | None, num_clouds: int, key: Int64[Tensor, " 2"] | None = None
    ) -> Iterator[list[Norm]]:
        """The norms of each block, in order. key: of this call's dropout; None for none."""
        if self.style is None:
            scale, shift = self.weight.expand(num_clouds, -1), self.bias.expand(num_clouds, -1)
        else:
            s, t = self.style(style).chunk(2, dim=-1)
            scale, shift = self.weight * s, self.bias * s + t
        parts = (x.split(self.channels, dim=1) for x in (self.offset.expand(num_clouds, -1), scale, shift))
        keys = [None] * len(self.channels) if key is None else (key + self.keys).unbind()
        norms = iter([Norm(*values) for values in zip(*parts, keys, strict=True)])
        return iter([list(islice(norms, len(block))) for block in self.blocks])
