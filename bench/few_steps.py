"""Few steps of DDIM: what a run's own priors make with each spacing of the times, and what distilled ones make.

    python -m bench.few_steps RUN [--steps 1 2 4 8 16 50]

Prints one row per way to sample, with the figures of ``lion_triton.evaluate RUN``: as many samples as held-out shapes,
of the same classes, seed and points; 1-NNA by Chamfer distance, thickness and unevenness. For runs on embedded shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
import tyro
from torch import Tensor, nn

from lion_triton import metrics
from lion_triton.cli import run_cli
from lion_triton.data.sources import load_sources
from lion_triton.devices import best_device
from lion_triton.diffusion import Spacing
from lion_triton.evaluation.model import ScoredRun
from lion_triton.evaluation.sets import REFERENCES, CloudSet, Preparation
from lion_triton.models import LION
from lion_triton.runs import load_model, open_run
from lion_triton.sample import SampleArguments


def ways(lion: LION, steps: tuple[int, ...]) -> Iterator[tuple[str, int, LION]]:
    """Name, number of steps, and the LION that takes them."""
    own = copy.copy(lion)
    own._modules = lion._modules | {"distilled": nn.ModuleDict()}
    for spacing in get_args(Spacing):
        own.spacing = spacing
        for count in steps:
            yield f"DDIM, {spacing}", count, own
    for count in lion.distilled_steps:
        yield "distilled", count, lion


def main(run: tyro.conf.Positional[Path], steps: tuple[int, ...] = (1, 2, 4, 8, 16, 50), seed: int = 0) -> None:
    """Print the table."""
    opened, device = open_run(run), best_device()
    held_out = load_sources(opened.config.data, opened.config.evaluate_shapes).held_out
    points = opened.config.data.num_points
    drawn = Preparation(None, seed)(CloudSet("reference", "", held_out), points, REFERENCES)
    references = torch.from_numpy(drawn).to(device)
    within, measures = metrics.pairwise_distances(references, references), metrics.Measures.of(references)

    def figures(samples: Tensor) -> dict[str, float]:
        distances = metrics.Distances(
            metrics.pairwise_distances(samples, samples), metrics.pairwise_distances(samples, references), within
        )
        return metrics.Comparison({"cd": distances}, metrics.Measures.of(samples), measures).figures()

    scored = ScoredRun.load(opened, None, device)
    print("| priors | steps | 1-NNA | thickness | unevenness |\n|---|---|---|---|---|")
    for name, count, lion in ways(load_model(opened).to(device), steps):
        options = SampleArguments(opened.folder, len(held_out), points, "ddim", count, 0.0, seed=seed)
        made, _ = replace(scored, lion=lion).sample(options, held_out, f"{name}, {count} steps")
        found = figures(torch.from_numpy(made).to(device))
        surfaces = f"{found['thickness']:.2f} | {found['unevenness']:.2f}"
        print(f"| {name} | {count} | {found['1nna_cd']:.3f} | {surfaces} |", flush=True)


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main))
