"""The clouds of a run: for training, held out, and (procedural only) fresh ones of the same generator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lion_triton.config import DataConfig
from lion_triton.data.clouds import Clouds, folder_clouds, procedural_clouds

PROCEDURAL_POINTS = 2048  # stored per procedural shape; training draws from them
PROCEDURAL_SEEDS = {"train": 0, "held_out": 1, "fresh": 2}


@dataclass(frozen=True)
class Sources:
    """``fresh`` is a second held-out set, drawn from the data's own generator: the floor of every comparison."""

    train: Clouds
    held_out: Clouds
    fresh: Clouds | None


def load_sources(config: DataConfig, evaluate_shapes: int) -> Sources:
    """Open what ``config`` names.

    Raises:
        ValueError: unknown categories, or a folder without shapes.
    """
    if config.source == "procedural":
        if config.categories:
            raise ValueError(f"categories: the procedural shapes take none, got {', '.join(config.categories)}")
        made = {
            name: procedural_clouds(
                config.num_shapes if name == "train" else evaluate_shapes,
                max(PROCEDURAL_POINTS, config.num_points),
                seed,
            )
            for name, seed in PROCEDURAL_SEEDS.items()
        }
        return Sources(made["train"], made["held_out"], made["fresh"])
    root, categories = Path(config.source), config.categories or None
    train = folder_clouds(root, "train", categories)
    try:
        held_out = folder_clouds(root, "val", categories)
    except ValueError:  # some copies of ShapeNet come without it
        held_out = folder_clouds(root, "test", categories)
    return Sources(train, held_out, None)
