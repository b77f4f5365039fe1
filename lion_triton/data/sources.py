"""The clouds of a run: for training, to choose by, held out, and (procedural only) fresh ones of the same generator."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lion_triton.data.clouds import Clouds, folder_clouds, procedural_clouds

if TYPE_CHECKING:
    from lion_triton.data.embeddings import Embeddings

PROCEDURAL_POINTS = 2048  # stored per procedural shape; training draws from them
PROCEDURAL_SEEDS = {"train": 0, "held_out": 1, "fresh": 2, "validation": 3}
VALIDATION_SHAPES = 32


@dataclass(frozen=True)
class DataConfig:
    """Where the clouds come from and how they are fed.

    Attributes:
        source: ``procedural`` (the embedded furniture), or a folder ``<category>/{train,val,test}/<id>.npy``.
        categories: names of the categories to use; empty for all.
        num_shapes: training shapes of the procedural source.
        num_points: points per cloud in training.
        draw_from: draw them from the first so many points of a cloud only (LION: 10,000 of 15,000).
        normalization: ``global`` (one mean and std for the whole set), or per shape ``box`` or ``sphere``.
        workers: processes that read clouds.
        embeddings: of a run with --clip: a file of CLIP embeddings by the shapes' names or numbers, instead of those
            beside the clouds.
    """

    source: str = "procedural"
    categories: tuple[str, ...] = ()
    num_shapes: int = 2000
    num_points: int = 2048
    draw_from: int | None = None
    normalization: Literal["global", "box", "sphere"] = "global"
    workers: int = 0
    embeddings: str | None = None


@dataclass(frozen=True)
class Sources:
    """``validation`` is what checkpoints are compared by, and no figure is of: it may be empty. ``fresh`` is a second
    held-out set, drawn from the data's own generator: the floor of every comparison.

    ``embeddings``: of the training shapes, for priors that are conditioned on CLIP.
    """

    train: Clouds
    validation: Clouds
    held_out: Clouds
    fresh: Clouds | None
    embeddings: Embeddings | None = None


def load_sources(config: DataConfig, evaluate_shapes: int) -> Sources:
    """Open what ``config`` names.

    Of a folder with val and test the latter is held out. Where it has but one of them that is, and where it has neither
    every tenth training shape; then up to 32 of these, no more than half, become the validation shapes.

    Raises:
        ValueError: unknown categories, or a folder without shapes.
    """
    if config.source == "procedural":
        if config.categories:
            raise ValueError(f"categories: the procedural shapes take none, got {', '.join(config.categories)}")
        made = {
            name: procedural_clouds(
                {"train": config.num_shapes, "validation": VALIDATION_SHAPES}.get(name, evaluate_shapes),
                max(PROCEDURAL_POINTS, config.num_points),
                seed,
            )
            for name, seed in PROCEDURAL_SEEDS.items()
        }
        return Sources(made["train"], made["validation"], made["held_out"], made["fresh"])
    root, categories = Path(config.source), config.categories or None
    train = folder_clouds(root, "train", categories, option="data.source")
    others = []
    for split in ("val", "test"):  # some copies of ShapeNet, and small collections, come without val
        with suppress(ValueError):
            others.append(folder_clouds(root, split, categories))
    if len(others) == 2:
        return Sources(train, others[0], others[1], None)
    if others:
        return Sources(train, *_divide(others[0]), None)
    if len(train) < 2:
        raise ValueError(
            f"data.source: expected at least 2 shapes in {root}, one of them to hold out, got {len(train)}"
        )
    print(f"{root} has no val or test shapes: every tenth training shape is held out")
    held_out = range(0, len(train), 10)
    kept = [i for i in range(len(train)) if i not in held_out]
    return Sources(train.subset(kept), *_divide(train.subset(held_out)), None)


def _divide(clouds: Clouds) -> tuple[Clouds, Clouds]:
    """Validation shapes, evenly spaced among all, and the others."""
    count = min(VALIDATION_SHAPES, len(clouds) // 2)
    chosen = [len(clouds) * (2 * i + 1) // (2 * count) for i in range(count)]
    return clouds.subset(chosen), clouds.subset([i for i in range(len(clouds)) if i not in chosen])
