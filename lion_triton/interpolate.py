"""Generate what lies between two shapes: ``python -m lion_triton.interpolate RUN A B [--frames 9]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from jaxtyping import Float32
from torch import Tensor

from lion_triton.cli import run_cli
from lion_triton.config import SamplingConfig, check_seed
from lion_triton.generation.inputs import (
    Given,
    Model,
    check_points,
    described,
    distances,
    known_label,
    open_model,
    read_given_or_seed,
    reconstruct,
)
from lion_triton.generation.latents import Noise, between, decode, from_noise, match, seed_noise, to_noise
from lion_triton.generation.output import check_finite, check_out, default_out, record_of, write_results
from lion_triton.generation.prompts import Prompt, PromptArguments, own_prompts, read_prompts
from lion_triton.pictures import grid
from lion_triton.progress import Begin, progress_bar
from lion_triton.runs import Run, open_run
from lion_triton.sample import SampleArguments, by_distilled, resolved

BATCH = 16  # frames at a time
COLUMNS = 9  # of the picture


@dataclass(frozen=True)
class InterpolateArguments(PromptArguments):
    """Generate what lies between two shapes: both are taken to the noise that the model makes them of, and the shapes
    of the noises between are generated, each point on its way from one to the other.

    A and B are each a file (obj, ply, off, stl, glb, gltf, npy, npz, h5, pcd, pts, xyz, csv, txt), FILE:3 for one
    of several clouds, procedural:3 for one of the embedded shapes, or a number: the seed of a shape that the model
    generates, as lion_triton.sample does with --num-samples 1.
    Writes OUT/clouds.npz, OUT/ply/*.ply, OUT/grid.png, OUT/animation.gif and OUT/samples.json.

    Attributes:
        run: a run folder, a folder of save_pretrained, or the name of a model that comes with the package.
        a: the shape A to begin with.
        b: the shape B to end with.
        frames: clouds to generate, A and B included.
        label: class of both; default: that of a file that knows it, otherwise the likeliest; of a seed, the first.
            Runs trained with --clip take one text, image or embedding of both or one of each instead; default: that of
            the likeliest training shape; of a seed, the first.
        sampler: which deterministic sampler; default the run's, or ddim.
        steps: network evaluations per prior; default as the run's configuration. Between two seeds, DDIM takes the
            priors that are distilled for so many steps, where the run has such.
        num_points: points per cloud; default as in training.
        seed: decides which points of A and B are taken, and which latents of them.
        checkpoint: one of the run's, as step-00001000, or best, on its validation shapes; default the newest.
        out: folder for the results; default RUN/samples/<the options>.
    """

    run: tyro.conf.Positional[Path]
    a: tyro.conf.Positional[str]
    b: tyro.conf.Positional[str]
    frames: int = 9
    label: Annotated[str | None, tyro.conf.arg(name="class")] = None
    sampler: Literal["ddim", "ode"] | None = None
    steps: int | None = None
    num_points: int | None = None
    seed: int = 0
    checkpoint: str | None = None
    out: Path | None = None


@dataclass(frozen=True)
class End:
    """One end of the way: a noise, what it is denoised as, and the shape that it was made of, if any."""

    noise: Noise  # of one cloud
    label: int | None
    prompt: Prompt | None
    given: Given | None = None


@dataclass(frozen=True)
class Interpolation:
    """The frames in data units, and where they were written."""

    points: Float32[np.ndarray, "F P 3"]
    folder: Path


def interpolate(args: InterpolateArguments) -> Interpolation:
    """Run the command; see :class:`InterpolateArguments`.

    Raises:
        ValueError: no trained run, no such shape, options out of range.
    """
    if args.frames < 2:
        raise ValueError(f"frames: expected at least 2, got {args.frames}")
    check_seed(args.seed)
    run = open_run(args.run)
    num_points, label = check_points(run, args.num_points), known_label(run, args.label)
    words = [args.a, "to", args.b, args.label, *args.words, args.sampler, args.checkpoint]
    numbers = {"frames": args.frames, "steps": args.steps, "points": args.num_points, "seed": args.seed}
    out = args.out or default_out(run, words, numbers)
    check_out(out)
    a, b = (read_given_or_seed(o, text, run, num_points, args.seed) for o, text in (("a", args.a), ("b", args.b)))
    prompts = read_prompts(run, args, most=2)
    shapes = sum(isinstance(x, Given) for x in (a, b))
    settings = deterministic(run, args.sampler, args.steps)

    model = open_model(args.run, args.checkpoint)
    distilled = shapes == 0 and by_distilled(model.lion, settings)
    if distilled:  # which no noise is known of that leads to a given shape
        model = model.few_step(settings)
    with progress_bar("interpolating", shapes + num_batches(args.frames)) as begin:
        asked = [None if prompts is None else prompts[i] for i in (0, -1)]
        start, end = ends_of(model, a, b, num_points, label, settings, begin, asked)
        clouds = frames(model, start, end, args.frames, settings, begin)
    points = model.run.normalization.invert(clouds.numpy())
    check_finite(points)
    given = []
    for shape, cloud in ((start.given, points[0]), (end.given, points[-1])):
        if shape is not None:
            ours, rebuilt = distances(model, shape, np.stack((cloud, reconstruct(model, shape))))
            name = model.called(shape.label, shape.prompt)
            given.append(shape.record | {"class": name, "chamfer": ours, "reconstruction_chamfer": rebuilt})
            print(f"{shape.name} ({name}): Chamfer distance {ours:.2g} as it comes back, {rebuilt:.2g} rebuilt")
    args = replace(args, checkpoint=model.checkpoint)
    record = record_of("interpolate", args, args.checkpoint, settings) | {"distilled": distilled, "given": given}
    if prompts is not None:
        record |= prompts.record
    nearest = [start.label if i < args.frames / 2 else end.label for i in range(args.frames)]
    labels = np.array([-1 if label is None else label for label in nearest])
    columns = -(-args.frames // -(-args.frames // COLUMNS))  # rows of equal length, or nearly
    more = None if prompts is None else prompts.arrays

    def draw(path: Path) -> None:
        grid(points, path, columns)

    write_results(out, points, labels, run.classes, record, more=more, draw=draw, moving=True)
    return Interpolation(points, out)


def deterministic(run: Run, sampler: Literal["ddim", "ode"] | None, steps: int | None) -> SamplingConfig:
    """How to sample without randomness: as asked for, or as the run does, by DDIM where that is not deterministic.

    Raises:
        ValueError: options that this run cannot be sampled with.
    """
    own = run.config.sampling.sampler
    chosen = sampler or ("ddim" if own == "ddpm" else own)
    eta = 0.0 if chosen == "ddim" else None
    return resolved(run, SampleArguments(run.folder, sampler=chosen, steps=steps, eta=eta))


def ends_of(
    model: Model,
    a: Given | int,
    b: Given | int,
    num_points: int,
    label: int | None,
    settings: SamplingConfig,
    begin: Begin,
    prompts: Sequence[Prompt | None] = (None, None),
) -> tuple[End, End]:
    """The ends at two shapes or at what two seeds generate, of class ``label`` and as ``prompts`` say where they are
    given.

    Shapes are otherwise of their own or the likeliest class and prompt, seeds of the first, as in
    ``lion_triton.sample``. Two shapes' points are put in the order in which they move least.
    """
    a, b = (
        described(model, shape, label, prompt) if isinstance(shape, Given) else shape
        for shape, prompt in zip((a, b), prompts, strict=True)
    )
    if isinstance(a, Given) and isinstance(b, Given):
        b = replace(b, points=b.points[match(a.points, b.points)])
    ends = zip((a, b), prompts, strict=True)
    start, end = (end_of(model, shape, num_points, label, settings, begin, prompt) for shape, prompt in ends)
    return start, end


def end_of(
    model: Model,
    shape: Given | int,
    num_points: int,
    label: int | None,
    settings: SamplingConfig,
    begin: Begin,
    prompt: Prompt | None = None,
) -> End:
    """One end; ``num_points``, ``label`` and ``prompt`` are a seed's. Only a shape is a part of the bar."""
    if isinstance(shape, int):
        label = 0 if label is None and model.conditional else label
        prompt = own_prompts(model.run)[0] if prompt is None and model.by_words else prompt
        assert settings.sampler != "ddpm"
        return End(seed_noise(model.lion, shape, num_points, settings.sampler), label, prompt)
    condition = model.condition(shape.label, shape.prompt)
    with model.autocast():
        noise = to_noise(model.lion, shape.encode(model), settings, condition, begin())
        return End(noise, shape.label, shape.prompt, shape)


def frames(
    model: Model, a: End, b: End, count: int, settings: SamplingConfig, begin: Begin
) -> Float32[Tensor, "F P 3"]:
    """``count`` clouds in the model's units from a to b, on the CPU.

    The first and the last are made alone, as ``lion_triton.sample`` makes one: other batches may round otherwise.
    """
    inner = torch.linspace(0, 1, count, device=model.device)[1:-1]
    first, last = (model.condition(end.label, end.prompt) for end in (a, b))
    batches = [(a.noise, first)]
    for weight in inner.split(BATCH) if len(inner) else ():
        condition = first.repeated(len(weight)).towards(last.repeated(len(weight)), weight)
        batches.append((between(a.noise, b.noise, weight), condition))
    batches.append((b.noise, last))
    clouds = []
    with model.autocast():
        for noise, condition in batches:
            latents = from_noise(model.lion, noise, settings, condition, begin())
            clouds.append(decode(model.lion, latents).cpu())
    return torch.cat(clouds)


def num_batches(count: int) -> int:
    """Of :func:`frames`."""
    return 2 + -(-(count - 2) // BATCH)


def main(args: list[str] | None = None) -> None:
    """The command line."""
    args = sys.argv[1:] if args is None else args
    run_cli(lambda: interpolate(tyro.cli(InterpolateArguments, args=args, prog="python -m lion_triton.interpolate")))


if __name__ == "__main__":
    main()
