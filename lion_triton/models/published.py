"""Loading the published LION checkpoints: their tensors' names and shapes to ours.

The authors' files hold ``vae_state_dict`` and ``dae_state_dict``; in the latter ``0.`` is the shape prior and
``1.`` the point prior. Only tensors are read (``weights_only``): a checkpoint cannot run code here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lion_triton.models.lion import LION, LIONConfig
from lion_triton.models.unet import DownLevel, UNetConfig

Names = Iterator[tuple[str, str]]  # (ours, theirs)


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
    theirs = {f"vae.{name}": tensor for name, tensor in _tensors(checkpoint, "vae_state_dict")}
    theirs |= {f"dae.{name}": tensor for name, tensor in _tensors(checkpoint, "dae_state_dict")}

    config = LIONConfig()
    if any("clip" in name for name in theirs):
        config = replace(
            config,
            shape_prior=replace(config.shape_prior, clip=True),
            point_prior=replace(config.point_prior, clip=True),
        )
    with torch.device("meta"):
        lion = LION(config)
    names = dict(_names(lion))
    wanted = lion.state_dict()
    renamed, problems = {}, []
    for ours, name in names.items():
        if name not in theirs:
            problems.append(f"missing {name}")
            continue
        value, shape = theirs[name], wanted[ours].shape
        # 1x1 convolutions there are Linear here: trailing ones are the only difference allowed.
        flat = value.flatten(len(shape)) if value.ndim > len(shape) else value
        squeezed = flat[..., 0] if flat.ndim == len(shape) + 1 and flat.shape[-1] == 1 else flat
        if squeezed.shape != shape:
            problems.append(f"misshapen {name} (expected {tuple(shape)}, got {tuple(value.shape)})")
            continue
        renamed[ours] = squeezed.float()
    problems += [f"extra {name}" for name in theirs.keys() - set(names.values())]
    if problems:
        raise ValueError("checkpoint: " + "; ".join(sorted(problems)))
    lion = LION(config)
    lion.load_state_dict(renamed, strict=False)  # our own buffers (latent statistics) stay the identity
    return lion.eval()


def read_tensors(path: Path, what: str) -> Any:
    """What ``torch.save`` wrote: tensors, numbers, text, and lists and dictionaries of them.

    Raises:
        ValueError: in one line of at most 300 characters that begins with ``what`` and names the object, if the file
            holds any other, which only running code could make.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{what}: {path} does not exist") from None
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        foreign = re.search(r"GLOBAL (\S{1,100})", str(error))
        reason = f"it holds {foreign[1]}, and only tensors are read" if foreign else "torch.save did not write it so"
        name = str(path) if len(str(path)) <= 100 else f"...{str(path)[-100:]}"
        raise ValueError(f"{what}: {name} is not a checkpoint of plain tensors: {reason}") from None


def _read(path: Path) -> Mapping[str, Any]:
    content = read_tensors(path, "checkpoint")
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint: expected a dictionary in {path}, got {type(content).__name__}")
    return content


def _tensors(checkpoint: Mapping[str, Any], part: str) -> Iterator[tuple[str, Tensor]]:
    """The part's tensors by their own names, which parallel training begins with ``module.``."""
    tensors = checkpoint[part]
    if not isinstance(tensors, Mapping):
        raise ValueError(f"checkpoint: expected a dictionary as {part}, got {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"checkpoint: expected tensors in {part}, got {type(tensor).__name__} as {name!s:.100}")
        yield name.removeprefix("module."), tensor


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


def _norm(ours: str, theirs: str, styled: bool) -> Names:
    yield from _affine(ours, f"{theirs}.norm" if styled else theirs)
    if styled:
        yield from _affine(f"{ours}.style", f"{theirs}.emd")


def _mlp(ours: str, theirs: str, depth: int, styled: bool) -> Names:
    for i in range(depth):  # theirs: linear, norm, activation for each
        yield from _affine(f"{ours}.linears.{i}", f"{theirs}.layers.{3 * i}")
        yield from _norm(f"{ours}.norms.{i}", f"{theirs}.layers.{3 * i + 1}", styled)


def _pvconv(ours: str, theirs: str, styled: bool, attention: bool) -> Names:
    yield from _affine(f"{ours}.conv1", f"{theirs}.voxel_layers.0")
    yield from _norm(f"{ours}.norm1", f"{theirs}.voxel_layers.1", styled)
    yield from _affine(f"{ours}.conv2", f"{theirs}.voxel_layers.4")
    yield from _norm(f"{ours}.norm2", f"{theirs}.voxel_layers.5", styled)
    yield from _squeeze_excite(f"{ours}.squeeze_excite", f"{theirs}.voxel_layers.6")
    yield from _affine(f"{ours}.point_linear", f"{theirs}.point_features.layers.0")
    yield from _norm(f"{ours}.point_norm", f"{theirs}.point_features.layers.1", styled)
    if attention:
        yield from _attention(f"{ours}.attention", f"{theirs}.attn")


def _attention(ours: str, theirs: str) -> Names:
    yield from _affine(f"{ours}.qkv", f"{theirs}.to_qkv", bias=False)
    yield from _affine(f"{ours}.out", f"{theirs}.to_out")


def _encoder(levels: Sequence[DownLevel], ours: str, theirs: str) -> Names:
    for level, down in enumerate(levels):
        run = down.convolutions
        for i in range(run.blocks):
            attention = i == 0 and run.attention_heads > 0
            yield from _pvconv(f"{ours}.convolutions.{level}.blocks.{i}", f"{theirs}.{level}.{i}", False, attention)
        last = f"{theirs}.{level}.{run.blocks}.mlps.0"
        yield from _mlp(f"{ours}.set_abstractions.{level}.mlp", last, len(down.widths), False)


def _unet(config: UNetConfig, ours: str, theirs: str) -> Names:
    for level, down in enumerate(config.down):
        run, module = down.convolutions, f"{theirs}.sa_layers.{level}"
        for i in range(run.blocks):
            attention = i == 0 and run.attention_heads > 0
            yield from _pvconv(f"{ours}.down_convolutions.{level}.blocks.{i}", f"{module}.{i}", True, attention)
        # A level without convolutions is not nested there.
        last = f"{module}.{run.blocks}" if run.blocks else module
        yield from _mlp(f"{ours}.set_abstractions.{level}.mlp", f"{last}.mlps.0", len(down.widths), True)
    yield from _attention(f"{ours}.middle", f"{theirs}.global_att")
    for level, up in enumerate(config.up):
        module = f"{theirs}.fp_layers.{level}"
        yield from _mlp(f"{ours}.propagations.{level}.mlp", f"{module}.0.mlp", len(up.widths), True)
        for i in range(up.convolutions.blocks):
            block = f"{ours}.up_convolutions.{level}.blocks.{i}"
            yield from _pvconv(block, f"{module}.{i + 1}", True, False)
    yield from _mlp(f"{ours}.head", f"{theirs}.classifier.0", 1, True)
    yield from _affine(f"{ours}.out", f"{theirs}.classifier.2")
