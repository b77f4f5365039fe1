"""Loading the published LION checkpoints: their tensors' names and shapes to ours.

The authors' files hold ``vae_state_dict`` and ``dae_state_dict``; in the latter ``0.`` is the shape prior and
``1.`` the point prior. Only tensors are read (``weights_only``): a checkpoint cannot run code here.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lion_triton.models.lion import LION, LIONConfig
from lion_triton.models.unet import DownLevel, UNetConfig

Names = Iterator[tuple[str, str]]  # (ours, theirs)
# What stands before each adaptive group norm of a network, and the norm, as they are called there, in running order.
Norms = Iterator[tuple[str, str]]


def load_published(checkpoint: str | Path | Mapping[str, Any]) -> LION:
    """Build a LION with the weights of a published checkpoint (path, or the dictionary itself).

    The CLIP-conditional variant is recognised by its tensors.

    Raises:
        ValueError: if the file is no such checkpoint, or would run code when unpickled; or, in one message,
            with every missing, extra or misshapen tensor by name.
    """
    if not isinstance(checkpoint, Mapping):
        checkpoint = _read(Path(checkpoint))
    missing = [key for key in ("vae_state_dict", "dae_state_dict") if key not in checkpoint]
    if missing:
        raise ValueError(f"checkpoint: expected vae_state_dict and dae_state_dict, {' and '.join(missing)} missing")
    theirs = {f"vae.{k}": v for k, v in checkpoint["vae_state_dict"].items()}
    theirs |= {f"dae.{k}": v for k, v in checkpoint["dae_state_dict"].items()}

    config = LIONConfig()
    if any("clip" in name for name in theirs):
        config = replace(
            config,
            shape_prior=replace(config.shape_prior, clip=True),
            point_prior=replace(config.point_prior, clip=True),
        )
    with torch.device("meta"):
        lion = LION(config)
    wanted = {ours: value.shape for ours, value in lion.state_dict().items()}
    parts = {ours: [name] for ours, name in _names(lion)}
    for network, norms, styled in _modulations(lion):
        for what, names in _modulation(norms, styled).items():
            parts[f"{network}.modulation.{what}"] = names
    renamed, problems = {}, []
    for ours, names in parts.items():
        problems += [f"missing {name}" for name in names if name not in theirs]
        shapes = _part_shapes(lion, ours, wanted[ours])
        values = []
        for name, shape in zip(names, shapes, strict=True):
            if name in theirs:
                # 1x1 convolutions there are Linear here: trailing ones are the only difference allowed.
                value = theirs[name]
                while value.ndim > len(shape) and value.shape[-1] == 1:
                    value = value[..., 0]
                values.append(value.float())
                if value.shape != shape:
                    problems.append(f"misshapen {name} (expected {tuple(shape)}, got {tuple(theirs[name].shape)})")
        if not problems:
            renamed[ours] = _joined(ours, values)
    taken = {name for names in parts.values() for name in names}
    problems += [f"extra {name}" for name in theirs.keys() - taken]
    if problems:
        raise ValueError("checkpoint: " + "; ".join(sorted(problems)))
    lion = LION(config)
    lion.load_state_dict(renamed, strict=False)  # our own buffers (latent statistics) stay the identity
    return lion.eval()


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"checkpoint: {path} does not exist") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"checkpoint: {path} is not a checkpoint of plain tensors ({line})") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint: expected a dictionary in {path}, got {type(content).__name__}")
    return content


def _joined(ours: str, values: list[Tensor]) -> Tensor:
    """One tensor of ours of its parts: those of a style hold a scale and a shift each, here all scales come first."""
    if ".style." not in ours:
        return values[0] if len(values) == 1 else torch.cat(values)
    return torch.cat([torch.cat(halves) for halves in zip(*(value.chunk(2) for value in values), strict=True)])


def _part_shapes(lion: LION, ours: str, shape: torch.Size) -> list[torch.Size]:
    network, _, what = ours.partition(".modulation.")
    if not what:
        return [shape]
    rows = 2 if what.startswith("style.") else 1
    channels = lion.get_submodule(f"{network}.modulation").channels
    assert isinstance(channels, list)
    return [torch.Size((rows * c, *shape[1:])) for c in channels]


def _modulation(norms: Norms, styled: bool) -> dict[str, list[str]]:
    """Their names for the parts of each tensor of a network's ``Modulation``."""
    before, after = zip(*norms, strict=True)
    norm = [f"{name}.norm" if styled else name for name in after]
    parts = {"offset": [f"{name}.bias" for name in before]}
    parts |= {what: [f"{name}.{what}" for name in norm] for what in ("weight", "bias")}
    if styled:
        parts |= {f"style.{what}": [f"{name}.emd.{what}" for name in after] for what in ("weight", "bias")}
    return parts


def _modulations(lion: LION) -> Iterator[tuple[str, Norms, bool]]:
    """Each network, its norms and whether they have a style."""
    vae, prior = lion.config.vae, lion.config.point_prior.network
    assert isinstance(prior, UNetConfig)
    yield "vae.shape_encoder", _encoder_norms(vae.shape_encoder, "vae.style_encoder.layers"), False
    yield "vae.point_encoder", _unet_norms(vae.point_encoder, "vae.encoder.layers"), True
    yield "vae.decoder", _unet_norms(vae.decoder, "vae.decoder.layers"), True
    yield "point_prior.network", _unet_norms(prior, "dae.1"), True


def _names(lion: LION) -> Names:
    """Our name and theirs for every tensor of the published model."""
    vae = lion.config.vae
    yield from _affine("vae.shape_head", "vae.style_encoder.mlp")
    yield from _encoder(vae.shape_encoder, "vae.shape_encoder", "vae.style_encoder.layers")
    yield from _unet(vae.point_encoder, "vae.point_encoder", "vae.encoder.layers")
    yield from _unet(vae.decoder, "vae.decoder", "vae.decoder.layers")

    ours, theirs = "shape_prior", "dae.0"
    yield from _affine(f"{ours}.input", f"{theirs}.input_layer")
    yield from _affine(f"{ours}.output", f"{theirs}.output_layer")
    for i in range(2):
        yield from _affine(f"{ours}.time_mlp.{i}", f"{theirs}.temb_layer.{i}")
    for i in range(lion.config.shape_prior.blocks):
        block, module = f"{ours}.blocks.{i}", f"{theirs}.all_modules.{i}"
        yield from _affine(f"{block}.linear1", f"{module}.conv1")
        yield from _affine(f"{block}.linear2", f"{module}.conv2")
        yield from _squeeze_excite(f"{block}.squeeze_excite", f"{module}.SE")

    prior = lion.config.point_prior
    assert isinstance(prior.network, UNetConfig)
    yield from _unet(prior.network, "point_prior.network", "dae.1")
    for i in (0, 2):
        yield from _affine(f"point_prior.network.time_mlp.{i}", f"dae.1.embedf.{i}")
    if prior.clip:
        yield from _affine(f"{ours}.clip_projection", f"{theirs}.clip_feat_mapping")
        yield from _affine("point_prior.clip_projection", "dae.1.clip_forge_mapping")
        yield from _affine("point_prior.clip_style", "dae.1.style_clip")


def _affine(ours: str, theirs: str, *, bias: bool = True) -> Names:
    yield f"{ours}.weight", f"{theirs}.weight"
    if bias:
        yield f"{ours}.bias", f"{theirs}.bias"


def _squeeze_excite(ours: str, theirs: str) -> Names:
    yield from _affine(f"{ours}.squeeze", f"{theirs}.fc.0", bias=False)
    yield from _affine(f"{ours}.excite", f"{theirs}.fc.2", bias=False)


def _pvconv(ours: str, theirs: str, attention: bool) -> Names:
    yield from _affine(f"{ours}.conv1", f"{theirs}.voxel_layers.0", bias=False)
    yield from _affine(f"{ours}.conv2", f"{theirs}.voxel_layers.4", bias=False)
    yield from _squeeze_excite(f"{ours}.squeeze_excite", f"{theirs}.voxel_layers.6")
    yield from _affine(f"{ours}.point_linear", f"{theirs}.point_features.layers.0", bias=False)
    if attention:
        yield from _attention(f"{ours}.attention", f"{theirs}.attn")


def _pvconv_norms(theirs: str) -> Norms:
    yield f"{theirs}.voxel_layers.0", f"{theirs}.voxel_layers.1"
    yield f"{theirs}.voxel_layers.4", f"{theirs}.voxel_layers.5"
    yield f"{theirs}.point_features.layers.0", f"{theirs}.point_features.layers.1"


def _mlp(ours: str, theirs: str, depth: int) -> Names:
    """Of an MLP whose first layer has a place of its own here."""
    yield from _affine(f"{ours}.linear", f"{theirs}.layers.0", bias=False)
    for i in range(1, depth):  # theirs: linear, norm, activation for each
        yield from _affine(f"{ours}.mlp.linears.{i - 1}", f"{theirs}.layers.{3 * i}", bias=False)


def _mlp_norms(theirs: str, depth: int) -> Norms:
    for i in range(depth):
        yield f"{theirs}.layers.{3 * i}", f"{theirs}.layers.{3 * i + 1}"


def _attention(ours: str, theirs: str) -> Names:
    yield from _affine(f"{ours}.qkv", f"{theirs}.to_qkv", bias=False)
    yield from _affine(f"{ours}.out", f"{theirs}.to_out")


def _encoder(levels: Sequence[DownLevel], ours: str, theirs: str) -> Names:
    for level, down in enumerate(levels):
        run = down.convolutions
        for i in range(run.blocks):
            attention = i == 0 and run.attention_heads > 0
            yield from _pvconv(f"{ours}.convolutions.{level}.blocks.{i}", f"{theirs}.{level}.{i}", attention)
        last = f"{theirs}.{level}.{run.blocks}.mlps.0"
        yield from _mlp(f"{ours}.set_abstractions.{level}", last, len(down.widths))


def _encoder_norms(levels: Sequence[DownLevel], theirs: str) -> Norms:
    for level, down in enumerate(levels):
        for i in range(down.convolutions.blocks):
            yield from _pvconv_norms(f"{theirs}.{level}.{i}")
        yield from _mlp_norms(f"{theirs}.{level}.{down.convolutions.blocks}.mlps.0", len(down.widths))


def _abstraction(level: int, down: DownLevel, theirs: str) -> str:
    """Their name of a level's set abstraction: a level without convolutions is not nested there."""
    blocks = down.convolutions.blocks
    return f"{theirs}.sa_layers.{level}" + (f".{blocks}" if blocks else "") + ".mlps.0"


def _unet(config: UNetConfig, ours: str, theirs: str) -> Names:
    for level, down in enumerate(config.down):
        run, module = down.convolutions, f"{theirs}.sa_layers.{level}"
        for i in range(run.blocks):
            attention = i == 0 and run.attention_heads > 0
            yield from _pvconv(f"{ours}.down_convolutions.{level}.blocks.{i}", f"{module}.{i}", attention)
        yield from _mlp(f"{ours}.set_abstractions.{level}", _abstraction(level, down, theirs), len(down.widths))
    yield from _attention(f"{ours}.middle", f"{theirs}.global_att")
    for level, up in enumerate(config.up):
        module = f"{theirs}.fp_layers.{level}"
        yield from _mlp(f"{ours}.propagations.{level}", f"{module}.0.mlp", len(up.widths))
        for i in range(up.convolutions.blocks):
            yield from _pvconv(f"{ours}.up_convolutions.{level}.blocks.{i}", f"{module}.{i + 1}", False)
    yield from _affine(f"{ours}.head.linears.0", f"{theirs}.classifier.0.layers.0", bias=False)
    yield from _affine(f"{ours}.out", f"{theirs}.classifier.2")


def _unet_norms(config: UNetConfig, theirs: str) -> Norms:
    for level, down in enumerate(config.down):
        for i in range(down.convolutions.blocks):
            yield from _pvconv_norms(f"{theirs}.sa_layers.{level}.{i}")
        yield from _mlp_norms(_abstraction(level, down, theirs), len(down.widths))
    for level, up in enumerate(config.up):
        module = f"{theirs}.fp_layers.{level}"
        yield from _mlp_norms(f"{module}.0.mlp", len(up.widths))
        for i in range(up.convolutions.blocks):
            yield from _pvconv_norms(f"{module}.{i + 1}")
    yield from _mlp_norms(f"{theirs}.classifier.0", 1)
