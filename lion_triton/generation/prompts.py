"""What a run that is conditioned on CLIP is asked for: texts, pictures, or their embeddings."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Float32
from PIL import Image, UnidentifiedImageError

from lion_triton.clip import CLIP
from lion_triton.data.embeddings import read_embeddings
from lion_triton.devices import best_device
from lion_triton.pictures import draw_grid
from lion_triton.runs import Run

COLUMNS, ROWS = 8, 8  # of clouds in the picture


@dataclass(frozen=True, eq=False)
class Prompts:
    """G texts, pictures or embeddings as the user named them, their embeddings, and the CLIP that made these if any."""

    names: tuple[str, ...]
    embeddings: Float16[np.ndarray, "G 512"]
    model: str | None

    def __len__(self) -> int:
        return len(self.names)

    def draw(self, clouds: Float32[np.ndarray, "S P 3"], path: Path) -> None:
        """The picture of as many clouds for each, each in rows of its own that bear its name."""
        rows = []
        for name, own in zip(self.names, np.split(clouds, len(self)), strict=True):
            label = textwrap.fill(name, 24, max_lines=2, placeholder=" …")
            shown = own[: COLUMNS * max(1, ROWS // len(self))]
            rows += [(label, shown[i : i + COLUMNS]) for i in range(0, len(shown), COLUMNS)]
        draw_grid(rows, path)


def read_prompts(
    run: Run, texts: Sequence[str], images: Sequence[Path], embedding: Path | None, model: str | None
) -> Prompts | None:
    """What was asked for, embedded by the run's own CLIP or by ``model``; None for nothing.

    Raises:
        ValueError: the run is not conditioned on CLIP, no CLIP is at hand, or a file cannot be read.
    """
    given = {"text": texts, "image": images, "clip-embedding": embedding, "clip-model": model}
    option = next((name for name, value in given.items() if value), None)
    if option is None:
        return None
    if not run.config.model.shape_prior.clip:
        raise ValueError(f"{option}: this run was trained without --clip, got {given[option]}")
    pictures = [_open(path) for path in images]
    found = None if embedding is None else read_embeddings("clip-embedding", embedding)
    parts, names, name = [], [*texts, *map(str, images)], None
    if names:
        name = model or run.clip
        if name is None:
            raise ValueError(f"{option}: the run does not say which CLIP its embeddings are of: give --clip-model")
        clip = CLIP(name, best_device())
        if run.clip not in (None, clip.name):
            print(f"clip-model: the run's embeddings are of {run.clip}: another model's mean something else")
        name = clip.name
        parts += [clip.texts(texts).numpy().astype(np.float16)] if texts else []
        parts += [clip.images(pictures).numpy().astype(np.float16)] if pictures else []
    elif model is not None:
        raise ValueError("clip-model: is for --text and --image, got none of these")
    if found is not None:
        parts.append(found.rows)
        names += [name for name, views in zip(found.ids, np.diff(found.starts), strict=True) for _ in range(views)]
    return Prompts(tuple(names), np.concatenate(parts), name)


def own_embeddings(run: Run, count: int) -> Float16[np.ndarray, "count 512"]:
    """Embeddings of the run's training shapes, one after the other: what it is sampled with where nobody says anything.

    Raises:
        ValueError: it keeps none.
    """
    if not run.embeddings.is_file():
        raise ValueError(f"run: {run.folder} is conditioned on CLIP and keeps no embeddings: sample it with --text")
    rows = read_embeddings("run", run.embeddings).rows
    return rows[np.arange(count) % len(rows)]


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image: {path} is not a picture that can be read ({type(error).__name__})") from None
