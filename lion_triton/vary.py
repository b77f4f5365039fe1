"""Generate variations of a shape: ``python -m lion_triton.vary RUN SHAPE [--strength 0.2] [--num-samples 8]``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from jaxtyping import Float32

from lion_triton.cli import run_cli
from lion_triton.config import SamplingConfig, check_seed
from lion_triton.data.degraded import InputKind, holds_voxels
from lion_triton.generation.encoders import diversity, from_given, trained_encoders, use_encoders
from lion_triton.generation.inputs import (
    Given,
    Model,
    check_points,
    described,
    distances,
    known_label,
    open_model,
    read_given,
    read_voxels,
    reconstruct,
)
from lion_triton.generation.latents import Keep, decode, diffuse_denoise
from lion_triton.generation.output import check_finite, check_out, default_out, record_of, write_results
from lion_triton.generation.prompts import PromptArguments, read_prompts
from lion_triton.models.lion import Latents
from lion_triton.pictures import draw_grid
from lion_triton.progress import progress_bar
from lion_triton.runs import open_run
from lion_triton.sample import SampleArguments, resolved

BATCH = 16  # clouds at a time
COLUMNS, ROWS = 8, 4  # of variations in the picture
WORDS = {
    "diversity": "Chamfer distance between two variations {:.2g}",
    "voxel_iou": "IoU of their voxels with those given {:.2f}",
    "voxel_iou_of_true_shapes": "as many points of true shapes have {:.2f}",
    "from_given": "squared distance from a point given to the nearest {:.2g}",
}


@dataclass(frozen=True)
class VaryArguments(PromptArguments):
    """Generate variations of a shape by diffuse-denoise: its latents are noised to a share of the schedule and denoised
    again.

    SHAPE is a file (obj, ply, off, stl, glb, gltf, npy, npz, h5, pcd, pts, xyz, csv, txt), FILE:3 for one of
    several clouds, or procedural:3 for one of the embedded shapes. If the run has encoders for such inputs (train RUN
    with --stage encoder) it may also be a coarse grid, an npz with a boolean array voxels (X, Y, Z), or by --input a
    noisy cloud or a part.
    Writes OUT/clouds.npz (with the shape and its reconstruction), OUT/ply/*.ply, OUT/grid.png and OUT/samples.json.

    Attributes:
        run: a run folder, a folder of save_pretrained, or the name of a model that comes with the package.
        shape: the SHAPE to vary.
        strength: share of the schedule, 0 (the reconstruction) to 1 (a new shape).
        num_samples: variations to generate.
        input: what SHAPE is, if not a whole and clean shape; an npz with an array voxels need not be called so.
        keep: the latent that stays as it is: the shape's (other points of the same shape) or the points' (of another).
        label: class of the shape; default: as the file says, otherwise the likeliest. A run trained with --clip takes
            one text, image or embedding instead; default: that of the likeliest training shape.
        steps: network evaluations per prior for the whole schedule; default as the run's configuration.
        eta: DDIM's stochasticity, 0 to 1; default as the run's configuration.
        num_points: points per cloud; default as in training.
        seed: decides the noise, which points of the shape are taken, and which latents of it.
        checkpoint: one of the run's, as step-00001000, or best, on its validation shapes; default the newest.
        out: folder for the results; default RUN/samples/<the options>.
    """

    run: tyro.conf.Positional[Path]
    shape: tyro.conf.Positional[str]
    strength: float = 0.2
    num_samples: int = 8
    input: InputKind | None = None
    keep: Keep = "nothing"
    label: Annotated[str | None, tyro.conf.arg(name="class")] = None
    steps: int | None = None
    eta: float | None = None
    num_points: int | None = None
    seed: int = 0
    checkpoint: str | None = None
    out: Path | None = None


@dataclass(frozen=True)
class Variations:
    """The clouds in data units, and where they were written."""

    points: Float32[np.ndarray, "S P 3"]
    folder: Path


def vary(args: VaryArguments) -> Variations:
    """Run the command; see :class:`VaryArguments`.

    Raises:
        ValueError: no trained run, no such shape, options out of range.
    """
    if not 0 <= args.strength <= 1:
        raise ValueError(f"strength: expected a number in [0, 1], got {args.strength:g}")
    if args.num_samples < 1:
        raise ValueError(f"num-samples: expected at least 1, got {args.num_samples}")
    check_seed(args.seed)
    run = open_run(args.run)
    label = known_label(run, args.label)
    settings = resolved(run, SampleArguments(run.folder, sampler="ddim", steps=args.steps, eta=args.eta))
    kept = f"keep-{args.keep}" if args.keep != "nothing" else None
    kind = kind_of(args)
    encoders = None if kind is None else trained_encoders(run, kind)
    words = [args.shape, "varied", kind, args.label, *args.words, kept, args.checkpoint]
    numbers = {"strength": args.strength, "n": args.num_samples, "steps": args.steps, "eta": args.eta}
    out = args.out or default_out(run, words, numbers | {"points": args.num_points, "seed": args.seed})
    check_out(out)
    count, prompts = check_points(run, args.num_points), read_prompts(run, args, most=1)
    if encoders is not None and kind == "voxels":
        given = read_voxels("shape", Path(args.shape), encoders, count, args.seed)
    else:
        given = read_given("shape", args.shape, run, count, args.seed)

    model = open_model(args.run, args.checkpoint)
    if encoders is not None:
        use_encoders(model.lion.vae, encoders)
    given = described(model, given, label, None if prompts is None else prompts[0])
    clouds = variations(model, given, settings, args)
    points = run.normalization.invert(clouds)
    check_finite(points)
    rebuilt, shape = reconstruct(model, given), run.normalization.invert(given.points)
    of_reconstruction, *others = distances(model, given, np.stack((rebuilt, *points)))
    name, mean = model.called(given.label, given.prompt), float(np.mean(others))
    print(f"{given.name} ({name}): Chamfer distance {of_reconstruction:.2g} rebuilt, {mean:.2g} varied")
    args = replace(args, checkpoint=model.checkpoint)
    record = record_of("vary", args, args.checkpoint, settings) | {
        "given": given.record | {"class": name, "reconstruction_chamfer": of_reconstruction},
        "chamfer": others,
    }
    if encoders is not None:
        figures = {"diversity": diversity(points[: COLUMNS * ROWS])}
        if given.grid is not None:
            figures["voxel_iou"] = float(np.mean([given.grid.iou(cloud) for cloud in clouds]))
            if count == run.config.data.num_points and "shape" in encoders.figures:
                figures["voxel_iou_of_true_shapes"] = encoders.figures["shape"]["voxel_iou"]
        else:
            figures["from_given"] = from_given(np.broadcast_to(shape, points.shape), points)
        record |= {"input": kind, **figures}
        print("; ".join(WORDS[key].format(value) for key, value in figures.items()))

    def draw(path: Path) -> None:
        rows = [("given, rebuilt", np.stack((shape, rebuilt)))]
        shown = points[: COLUMNS * ROWS]
        rows += [(f"strength {args.strength:g}", shown[i : i + COLUMNS]) for i in range(0, len(shown), COLUMNS)]
        draw_grid(rows, path)

    labels = np.full(len(points), -1 if given.label is None else given.label)
    more = {"given": shape, "reconstruction": rebuilt}
    if prompts is not None:
        record |= prompts.record
        more |= prompts.arrays
    write_results(out, points, labels, run.classes, record, more=more, draw=draw)
    return Variations(points, out)


def kind_of(args: VaryArguments) -> InputKind | None:
    """What SHAPE is: as ``args.input`` says or, of voxels, as their file does; None of a whole, clean shape."""
    voxels = holds_voxels(Path(args.shape))
    if args.input == "voxels" and not voxels:
        raise ValueError(f"shape: expected an .npz with a boolean array voxels, got {args.shape}")
    if voxels and args.input not in (None, "voxels"):
        raise ValueError(f"input: {args.shape} holds voxels, got {args.input}")
    return "voxels" if voxels else args.input


def variations(
    model: Model, given: Given, settings: SamplingConfig, args: VaryArguments
) -> Float32[np.ndarray, "S P 3"]:
    """Clouds in the model's units."""
    generator, clouds = torch.Generator().manual_seed(args.seed), []
    with progress_bar("varying", -(-args.num_samples // BATCH)) as begin, model.autocast():
        h, z = given.encode(model)
        condition = model.condition(given.label, given.prompt)
        for start in range(0, args.num_samples, BATCH):
            count = min(BATCH, args.num_samples - start)
            found = diffuse_denoise(
                model.lion,
                Latents(h.expand(count, -1, -1), z.expand(count, -1)),
                settings,
                condition.repeated(count),
                args.strength,
                args.keep,
                generator,
                begin(),
            )
            clouds.append(decode(model.lion, found).cpu().numpy())
    return np.concatenate(clouds)


def main(args: list[str] | None = None) -> None:
    """The command line."""
    args = sys.argv[1:] if args is None else args
    run_cli(lambda: vary(tyro.cli(VaryArguments, args=args, prog="python -m lion_triton.vary")))


if __name__ == "__main__":
    main()
