"""What all adaptive group norms of a network take besides their inputs, made at once.

Shapes: B clouds, S style channels, C channels of one norm, D channels of all norms together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from lion_triton.kernels import Style, adagn
from lion_triton.kernels.noise import Key, later_keys, new_key

GROUPS = 8  # of every group normalisation in LION


class Norm(NamedTuple):
    """One adaptive group norm: ``scale group_norm(x + offset) + shift``, then what :func:`normalize` is told."""

    offset: Float[Tensor, "B C"]
    scale: Float[Tensor, "B C"]
    shift: Float[Tensor, "B C"]
    key: Key | None  # of its dropout

    def style(self) -> Style:  # no property: torch.compile of PyTorch 2.10 does not see those of a tuple
        return Style(self.scale, self.shift, self.offset)


class NormPlace(NamedTuple):
    """Where a norm stands in its network: the names of the layer before it and of the norm itself, and its channels."""

    layer: str
    name: str
    channels: int

    def inside(self, block: str) -> NormPlace:
        return self._replace(layer=f"{block}.{self.layer}", name=f"{block}.{self.name}")


def normalize(
    x: Float[Tensor, "B ... C"],
    norm: Norm,
    *,
    dropout: float = 0.0,
    moments: Float[Tensor, "B parts 2 C"] | None = None,
) -> Float[Tensor, "B ... C"]:
    """The norm, SiLU, and dropout where there is a key for it. moments: of x, as ``adagn`` takes them."""
    offset, scale, shift, key = norm
    drop = dropout if key is not None else 0.0
    options: Any = {"act": "silu", "offset": offset, "dropout": drop, "key": key, "moments": moments}
    return adagn(x, scale, shift, None, None, GROUPS, **options)


def layer_offsets(count: int) -> Int64[Tensor, " count"]:
    """How much later than a step's key that of each layer's dropout is: far from all keys that count up from the
    step's."""
    return torch.arange(1, count + 1) * 2**40


def dropout_key(network: nn.Module, dropout: float, key: Key | None, device: torch.device) -> Key | None:
    """The key that a network drops out by, a fresh one if it was given none; None where it drops nothing out."""
    if not network.training or not dropout:
        return None
    return new_key(device) if key is None else key


class Modulation(nn.Module):
    """Offsets, scales and shifts of all adaptive group norms of a network, by one matrix product from its style.

    A norm's own affine map and the style's make ``scale = weight s`` and ``shift = bias s + t`` with
    ``[s, t] = Linear(style)``; plain group norm where ``style_dim`` is 0. Its offset is the bias of the linear map or
    convolution before it, which has none of its own. All are float32.

    Args:
        blocks: the norms of each block, in the order in which the network runs.
        style_dim: S.
    """

    def __init__(self, blocks: Sequence[Sequence[NormPlace]], style_dim: int) -> None:
        super().__init__()
        self.blocks = [len(block) for block in blocks]
        self.places = [place for block in blocks for place in block]
        self.channels = [place.channels for place in self.places]
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
        self.key_offsets: Tensor
        self.register_buffer("key_offsets", layer_offsets(len(self.channels)), persistent=False)

    def forward(
        self, style: Float[Tensor, "B S"] | None, num_clouds: int, key: Key | None = None
    ) -> Iterator[list[Norm]]:
        """The norms of each block, in order. key: of this call's dropout; None for none."""
        if self.style is None:
            scale, shift = self.weight.expand(num_clouds, -1), self.bias.expand(num_clouds, -1)
        else:
            s, t = self.style(style).chunk(2, dim=-1)
            scale, shift = self.weight * s, self.bias * s + t
        parts = (x.split(self.channels, dim=1) for x in (self.offset.expand(num_clouds, -1), scale, shift))
        keys = [None] * len(self.channels) if key is None else later_keys(key, self.key_offsets).unbind()
        norms = iter([Norm(*values) for values in zip(*parts, keys, strict=True)])
        return iter([list(islice(norms, count)) for count in self.blocks])


def keep_apart(network: nn.Module) -> None:
    """In state dictionaries a network's norms stand apart, each where it is used, however they are computed.

    ``modulation`` appears there as ``<layer>.bias`` (its offset), ``<norm>.weight``, ``<norm>.bias``,
    ``<norm>.style.weight`` and ``<norm>.style.bias`` of every norm: a checkpoint says what the network is.
    """
    network._register_state_dict_hook(_take_apart)
    network.register_load_state_dict_pre_hook(_put_together)


def _parts(modulation: Modulation) -> Iterator[tuple[str, list[str]]]:
    """Each tensor, and what its parts are called."""
    yield "offset", [f"{place.layer}.bias" for place in modulation.places]
    whats = ["weight", "bias"] + (["style.weight", "style.bias"] if modulation.style is not None else [])
    for what in whats:
        yield what, [f"{place.name}.{what}" for place in modulation.places]


def _take_apart(network: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    modulation = network.modulation
    assert isinstance(modulation, Modulation)
    for what, names in _parts(modulation):
        # A style's rows are all scales, then all shifts; a part of it has its own of both.
        halves = state.pop(f"{prefix}modulation.{what}").chunk(2 if what.startswith("style.") else 1)
        for name, *rows in zip(names, *(half.split(modulation.channels) for half in halves), strict=True):
            state[prefix + name] = torch.cat(rows)


def _put_together(network: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    modulation = network.modulation
    assert isinstance(modulation, Modulation)
    for what, names in _parts(modulation):
        if all(prefix + name in state for name in names):
            parts = [state.pop(prefix + name) for name in names]
            halves = zip(*(part.chunk(2 if what.startswith("style.") else 1) for part in parts), strict=True)
            state[f"{prefix}modulation.{what}"] = torch.cat([part for half in halves for part in half])
