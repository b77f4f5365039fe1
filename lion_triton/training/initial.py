"""The weights that a new run starts from, where it does not start from random ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lion_triton.models.lion import LION, LIONConfig
from lion_triton.models.published import load_published
from lion_triton.runs import Run, load_checkpoint, load_model, open_run

# The latents' statistics belong to the priors, which know standardised latents alone.
PARTS = {"VAE": ("vae.",), "priors": ("shape_prior.", "point_prior.", "z_mean", "z_std", "h_mean", "h_std")}
OPTIONAL = ".moments."  # of a network, and without effect before they are trained
CLASS_EMBEDDINGS = ("shape_prior.class_embedding.weight", "point_prior.class_embedding.weight")


@dataclass(frozen=True)
class Initial:
    """What fits of another model's weights.

    Attributes:
        state: the tensors of the parts that fit.
        parts: their names, of ``PARTS``.
        lines: what to tell of it.
    """

    state: Mapping[str, Tensor]
    parts: tuple[str, ...]
    lines: tuple[str, ...]

    def load(self, lion: LION) -> None:
        lion.load_state_dict(self.state, strict=False)


def initial_weights(name: str, model: LIONConfig, classes: tuple[str, ...], normalization: str) -> Initial:
    """The weights of a run (averaged), a folder of ``save_pretrained`` or a published checkpoint, for a new run.

    A part (the VAE; both priors) is taken whole or not at all, except for the rows of classes: each class takes that of
    the same name, and one that is new there the mean of all. Moments (``UNetConfig``) may be new.

    Args:
        name: a run folder, a folder of ``save_pretrained``, the name of a shipped model, or the file of a published
            checkpoint.
        model, classes, normalization: of the new run; ``normalization`` as "global".

    Raises:
        ValueError: none of these, or neither part fits, with every tensor that does not by its name.
    """
    theirs, run = _read(name)
    lines = []
    if run is not None and run.normalization.kind != normalization:
        lines.append(f"init-from: {name} knows clouds normalised as {run.normalization.kind}, not {normalization}")
    with torch.device("meta"):
        wanted = {key: value.shape for key, value in LION(model).state_dict().items()}
    if run is not None and run.classes != classes:
        theirs = _with_classes(theirs, wanted, run.classes, classes)
    state: dict[str, Tensor] = {}
    problems: dict[str, list[str]] = {}
    for part, prefixes in PARTS.items():
        needed = {key: shape for key, shape in wanted.items() if key.startswith(prefixes)}
        found = {key: value for key, value in theirs.items() if key.startswith(prefixes)}
        problems[part] = [] if found else [f"{name} has none"]
        if found:
            missing = {key for key in needed.keys() - found.keys() if OPTIONAL not in key}
            problems[part] += [f"{key} is missing" for key in missing]
            problems[part] += [f"{key} is unknown here" for key in found.keys() - needed.keys()]
            problems[part] += [
                f"{key} is {tuple(found[key].shape)}, expected {tuple(shape)}"
                for key, shape in needed.items()
                if key in found and found[key].shape != shape
            ]
        if not problems[part]:
            state |= found
    parts = tuple(part for part in PARTS if not problems[part])
    reasons = {part: "; ".join(sorted(lines)) for part, lines in problems.items()}
    if not parts:
        raise ValueError(
            f"init-from: {name} fits neither the VAE ({reasons['VAE']}) nor the priors ({reasons['priors']}) here"
        )
    others = [f"only these: of the {part}, {reasons[part]}" for part in PARTS if part not in parts]
    lines.append(f"starting from the weights of {name}: {' and '.join(parts)}{''.join(f', {o}' for o in others)}")
    return Initial(state, parts, tuple(lines))


def _read(name: str) -> tuple[dict[str, Tensor], Run | None]:
    """Tensors by our names, and what is known of the run."""
    try:
        if Path(name).is_file():
            return load_published(name).state_dict(), None
        run = open_run(Path(name))
        checkpoint = None if run.pretrained else load_checkpoint(run, with_optimizer=False)
        if checkpoint is not None and checkpoint.stage == "vae":
            return {key: value for key, value in checkpoint.model.items() if key.startswith("vae.")}, run
        return load_model(run).state_dict(), run
    except ValueError as error:
        raise ValueError(f"init-from: {str(error).partition(': ')[2]}") from None


def _with_classes(
    state: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], theirs: tuple[str, ...], ours: tuple[str, ...]
) -> dict[str, Tensor]:
    """The same with rows for our classes in the embeddings of classes, where both sides have such."""
    state = dict(state)
    for key in CLASS_EMBEDDINGS:
        if key in state and key in wanted and len(state[key]) == len(theirs):
            rows = dict(zip(theirs, state[key], strict=True))
            state[key] = torch.stack([rows.get(name, state[key].mean(0)) for name in ours])
    return state
