"""What a run that is conditioned on CLIP is asked for: texts, pictures, or their embeddings."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16, Float32
from PIL import Image, UnidentifiedImageError

from lion_triton.clip import CLIP
from lion_triton.data.embeddings import read_embeddings
from lion_triton.devices import best_device
from lion_triton.pictures import draw_grid
from lion_triton.runs import Run

COLUMNS, ROWS = 8, 8  # of clouds in the picture


@dataclass(frozen=True, kw_only=True)
class PromptArguments:
    """The options by which every command that generates is told what.

    Attributes:
        text: what to generate, in words; one text or more. Of runs trained with --clip only, as the next three;
            default: embeddings of the run's training shapes.
        image: a picture of what to generate; one file or more.
        clip_embedding: CLIP embeddings of what to generate: a .npy (512,) or (G, 512), or a .npz of embeddings and ids.
        clip_model: the CLIP that embeds text and image, a folder or an id on a hub; default: the one of the run's data.
    """

    text: tuple[str, ...] = ()
    image: tuple[Path, ...] = ()
    clip_embedding: Path | None = None
    clip_model: str | None = None

    @property
    def given(self) -> dict[str, object]:
        """Those that are given, by their names on a command line."""
        return {f.name.replace("_", "-"): x for f in fields(PromptArguments) if (x := getattr(self, f.name))}

    @property
    def words(self) -> list[str]:
        """What a folder of results is named by."""
        return [*self.text, *map(str, self.image), *(() if self.clip_embedding is None else [str(self.clip_embedding)])]


@dataclass(frozen=True, eq=False)
class Prompt:
    """A text, or the name of a picture or of an embedding; and the embedding."""

    name: str
    embedding: Float16[np.ndarray, " 512"]


@dataclass(frozen=True, eq=False)
class Prompts:
    """G prompts, and the CLIP that made their embeddings if any."""

    names: tuple[str, ...]
    embeddings: Float16[np.ndarray, "G 512"]
    model: str | None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Prompt:
        return Prompt(self.names[index], self.embeddings[index])

    def __iter__(self) -> Iterator[Prompt]:
        return map(Prompt, self.names, self.embeddings)

    @property
    def record(self) -> dict[str, Any]:
        """What a command's record says of them."""
        return {"prompts": list(self.names), "clip": self.model}

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What clouds.npz holds of them, which ``read_prompts`` reads again."""
        return {"embeddings": self.embeddings, "ids": np.array(self.names)}

    def draw(self, clouds: Float32[np.ndarray, "S P 3"], path: Path) -> None:
        """The picture of as many clouds for each, each in rows of its own that bear its name."""
        rows = []
        for name, own in zip(self.names, np.split(clouds, len(self)), strict=True):
            label = textwrap.fill(name, 20, max_lines=2, placeholder=" …")
            shown = own[: COLUMNS * max(1, ROWS // len(self))]
            rows += [(label, shown[i : i + COLUMNS]) for i in range(0, len(shown), COLUMNS)]
        draw_grid(rows, path)


def read_prompts(run: Run, args: PromptArguments, most: int | None = None) -> Prompts | None:
    """What was asked for, embedded by the run's own CLIP or by another; None for nothing.

    most: how many the command takes.

    Raises:
        ValueError: the run is not conditioned on CLIP, no CLIP is at hand, a file cannot be read, too many.
    """
    if not args.given:
        return None
    option, value = next(iter(args.given.items()))
    if not run.config.model.shape_prior.clip:
        raise ValueError(f"{option}: this run was trained without --clip, got {value}")
    pictures = [_open(path) for path in args.image]
    found = None if args.clip_embedding is None else read_embeddings("clip-embedding", args.clip_embedding)
    count = len(args.text) + len(args.image) + (0 if found is None else len(found.rows))
    if most is not None and count > most:
        raise ValueError(f"{option}: expected at most {most} texts, images and embeddings together, got {count}")
    parts, names, name = [], [*args.text, *(path.name for path in args.image)], None
    if names:
        clip = _open_clip(option, run, args.clip_model)
        name = clip.name
        parts += [clip.texts(args.text).numpy().astype(np.float16)] if args.text else []
        parts += [clip.images(pictures).numpy().astype(np.float16)] if pictures else []
    elif args.clip_model is not None:
        raise ValueError("clip-model: is for --text and --image, got none of these")
    if found is not None:
        parts.append(found.rows)
        names += found.row_names
    return Prompts(tuple(names), np.concatenate(parts), name)


def own_prompts(run: Run) -> Prompts:
    """Of the run's training shapes: what it is asked for where nobody says anything.

    Raises:
        ValueError: it keeps none.
    """
    if not run.embeddings.is_file():
        raise ValueError(f"run: {run.folder} is conditioned on CLIP and keeps no embeddings: give --text")
    found = read_embeddings("run", run.embeddings)
    return Prompts(tuple(found.row_names), found.rows, run.clip)


def _open_clip(option: str, run: Run, model: str | None) -> CLIP:
    """The CLIP called ``model``, or the one that the run's embeddings are of."""
    name = model or run.clip
    if name is None:
        raise ValueError(f"{option}: the run does not say which CLIP its embeddings are of: give --clip-model")
    clip = CLIP(name, best_device())
    if run.clip not in (None, clip.name):
        print(f"clip-model: the run's embeddings are of {run.clip}: another model's mean something else")
    return clip


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image: {path} is not a picture that can be read ({type(error).__name__})") from None
