"""Generate shapes with a trained run: ``python -m lion_triton.sample RUN [--num-samples 16] [--class chair]``."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import trimesh
import tyro
from jaxtyping import Float32
from tqdm import tqdm

from lion_triton import __version__
from lion_triton.cli import run_cli
from lion_triton.config import SamplingConfig, check_sampling
from lion_triton.devices import autocast, best_device
from lion_triton.models.lion import LION, default_steps
from lion_triton.pictures import grid
from lion_triton.runs import Run, load_model, open_run


@dataclass(frozen=True)
class SampleArguments:
    """Generate clouds with a run's averaged weights.

    Writes OUT/clouds.npz (points (S, P, 3) in data units, labels), OUT/ply/*.ply, OUT/grid.png and OUT/samples.json.

    Attributes:
        run: the run folder.
        num_samples: clouds to generate.
        num_points: points per cloud; default as in training.
        sampler: default as the run's configuration.
        steps: network evaluations per prior; default as the run's configuration.
        eta: DDIM's stochasticity, 0 to 1.
        label: class of every cloud; default: classes in turn. Class-conditional runs only.
        seed: the same seed and options give the same clouds on the same machine.
        batch_size: clouds generated at a time; another one gives other clouds.
        checkpoint: one of the run's, as step-00001000; default the newest.
        out: folder for the results; default RUN/samples/<the options>.
    """

    run: tyro.conf.Positional[Path]
    num_samples: int = 16
    num_points: int | None = None
    sampler: Literal["ddpm", "ddim", "ode"] | None = None
    steps: int | None = None
    eta: float | None = None
    label: Annotated[str | None, tyro.conf.arg(name="class")] = None
    seed: int = 0
    batch_size: int = 64
    checkpoint: str | None = None
    out: Path | None = None


@dataclass(frozen=True)
class Samples:
    """Generated clouds in data units and where they were written."""

    points: np.ndarray  # (S, P, 3) float32
    labels: np.ndarray  # (S,) int64, -1 without classes
    folder: Path


def sample(args: SampleArguments, lion: LION | None = None) -> Samples:
    """Run the command; see :class:`SampleArguments`. ``lion``: the run's model, where it is loaded already.

    Raises:
        ValueError: no run, no trained priors, a damaged checkpoint, an unknown class, options out of range.
    """
    run = open_run(args.run)
    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    labels = class_labels(run, args)
    out = args.out or run.samples / _default_name(args)
    if out.exists() and not (out / "samples.json").is_file():
        raise ValueError(f"out: {out} exists and holds no samples of an earlier command: give another --out")
    resolved(run, args)  # before anything is loaded
    newest = run.checkpoint(args.checkpoint)
    if newest is not None:  # by its name: a run that goes on has another newest one when these are done
        args = replace(args, checkpoint=newest.name)
    if lion is None:
        lion = load_model(run, args.checkpoint).to(best_device())
    points = run.normalization.invert(generate(run, lion, args, labels))
    if not np.isfinite(points).all():
        raise ValueError("samples: the model generated points that are not finite: train longer or sample otherwise")
    _write(run, args, points, labels, out)
    print(f"{len(points)} clouds of {points.shape[1]} points: {out / 'clouds.npz'}, {out / 'ply'}")
    print(f"picture: {out / 'grid.png'}")
    return Samples(points, labels, out)


def resolved(run: Run, args: SampleArguments) -> SamplingConfig:
    """How ``generate`` samples: the options, and the run's configuration where they are silent.

    Raises:
        ValueError: options that this run cannot be sampled with.
    """
    settings = run.config.sampling
    sampler = args.sampler or settings.sampler
    if args.eta is not None and sampler != "ddim":
        raise ValueError(f"eta: is the stochasticity of ddim, got {args.eta:g} for {sampler}")
    # The run's number of steps belongs to the run's sampler.
    steps = settings.steps if args.steps is None and sampler == settings.sampler else args.steps
    if steps is None and sampler != "ode":
        steps = default_steps(sampler, run.config.model.diffusion.num_train_timesteps)
    found = SamplingConfig(sampler, steps, settings.eta if args.eta is None else args.eta, settings.clip_x0)
    check_sampling(found, run.config.model.diffusion)
    return found


def generate(
    run: Run, lion: LION, args: SampleArguments, labels: np.ndarray, title: str = "sampling"
) -> Float32[np.ndarray, "S P 3"]:
    """Clouds in the model's units, with a progress bar called ``title``."""
    settings, device = resolved(run, args), lion.z_mean.device
    generator = torch.Generator().manual_seed(args.seed)
    clouds = []
    # All clouds of a batch are ready together: while it runs the bar tells the part that is done.
    shape = "{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}]"
    with tqdm(total=args.num_samples, desc=title, bar_format=shape, disable=None) as bar:
        for start in range(0, args.num_samples, args.batch_size):
            count = min(args.batch_size, args.num_samples - start)

            def advance(done: int, total: int, start: int = start, count: int = count) -> None:
                bar.update(start + count * done / total - bar.n)

            with autocast(run.config.mixed_precision, device):
                batch = lion.sample(
                    count,
                    steps=settings.steps,
                    sampler=settings.sampler,
                    eta=settings.eta,
                    num_points=run.config.data.num_points if args.num_points is None else args.num_points,
                    generator=generator,
                    labels=_tensor(labels[start : start + count], device),
                    clip_x0=settings.clip_x0,
                    callback=advance,
                )
            clouds.append(batch.float().cpu().numpy())
    return np.concatenate(clouds)


def _tensor(labels: np.ndarray, device: torch.device) -> torch.Tensor | None:
    return None if (labels < 0).any() else torch.from_numpy(labels).to(device)


def class_labels(run: Run, args: SampleArguments) -> np.ndarray:
    """The class of each cloud (S,): the one asked for, or all in turn; -1 in a run without classes."""
    conditional = run.config.model.shape_prior.num_classes > 0
    if args.label is None:
        return np.arange(args.num_samples) % len(run.classes) if conditional else np.full(args.num_samples, -1)
    if not conditional:
        raise ValueError(f"class: this run was trained without classes, got {args.label}")
    if args.label not in run.classes:
        raise ValueError(f"class: expected one of {', '.join(run.classes)}, got {args.label}")
    return np.full(args.num_samples, run.classes.index(args.label))


def _default_name(args: SampleArguments) -> str:
    given = {"n": args.num_samples, "points": args.num_points, "steps": args.steps, "eta": args.eta}
    words = [
        args.checkpoint,
        args.label,
        args.sampler,
        *(f"{k}{v}" for k, v in given.items() if v is not None),
        f"seed{args.seed}",
    ]
    return "-".join(word for word in words if word)


def _write(run: Run, args: SampleArguments, points: np.ndarray, labels: np.ndarray, out: Path) -> None:
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "ply").mkdir(parents=True)
    try:
        np.savez(partial / "clouds.npz", points=points, labels=labels, classes=np.array(run.classes))
        for i, cloud in enumerate(points):
            trimesh.PointCloud(cloud).export(partial / "ply" / f"{i:04d}.ply")
        grid(points[:64], partial / "grid.png")
        options = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()}
        record = {
            "lion_triton": __version__,
            "checkpoint": args.checkpoint,
            "options": options,
            "sampling": asdict(resolved(run, args)),
        }
        (partial / "samples.json").write_text(json.dumps(record, indent=2) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(args: list[str] | None = None) -> None:
    """The command line."""
    args = sys.argv[1:] if args is None else args
    run_cli(lambda: sample(tyro.cli(SampleArguments, args=args, prog="python -m lion_triton.sample")))


if __name__ == "__main__":
    main()
