"""Generate shapes with a trained run: ``python -m lion_triton.sample RUN [--num-samples 16] [--class chair]``.

Of a run that is conditioned on CLIP also by words or pictures: ``--text "a narrow chair" "a table"``, ``--image FILE``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from jaxtyping import Float16, Float32, Int64

from lion_triton.cli import run_cli
from lion_triton.config import SamplingConfig, check_sampling, check_seed
from lion_triton.data.find import safe_name
from lion_triton.devices import autocast, best_device
from lion_triton.generation.inputs import check_points, known_label
from lion_triton.generation.output import check_finite, check_out, record_of, write_results
from lion_triton.generation.prompts import PromptArguments, own_prompts, read_prompts
from lion_triton.kernels.noise import new_key
from lion_triton.models.lion import LION, default_steps, keys_per_batch
from lion_triton.processes import ALONE, Processes
from lion_triton.progress import BAR, ProgressBar
from lion_triton.runs import Run, load_model, note_best, open_run


@dataclass(frozen=True)
class SampleArguments(PromptArguments):
    """Generate clouds with a run's averaged weights.

    Writes OUT/clouds.npz (points (S, P, 3) in data units, labels), OUT/ply/*.ply, OUT/grid.png and OUT/samples.json.

    Attributes:
        run: a run folder, a folder of save_pretrained, or the name of a model that comes with the package.
        num_samples: clouds to generate, of each text, image and embedding if any is given.
        num_points: points per cloud; default as in training.
        sampler: default as the run's configuration.
        steps: network evaluations per prior; default as the run's configuration. DDIM with eta 0 takes the priors that
            are distilled for so many steps, where the run has such.
        eta: DDIM's stochasticity, 0 to 1.
        guidance: w of classifier-free guidance by class or words, 0 for none; for runs whose training dropped
            conditions, see --priors.drop-condition.
        label: class of every cloud; default: classes in turn. Class-conditional runs only.
        seed: the same seed and options give the same clouds on the same machine.
        batch_size: clouds generated at a time; another one gives other clouds.
        checkpoint: one of the run's, as step-00001000, or best, on its validation shapes; default the newest.
        out: folder for the results; default RUN/samples/<the options>.
    """

    run: tyro.conf.Positional[Path]
    num_samples: int = 16
    num_points: int | None = None
    sampler: Literal["ddpm", "ddim", "ode"] | None = None
    steps: int | None = None
    eta: float | None = None
    guidance: float | None = None
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


def sample(args: SampleArguments, lion: LION | None = None, processes: Processes = ALONE) -> Samples:
    """Run the command; see :class:`SampleArguments`. ``lion``: the run's model, where it is loaded already.

    ``processes`` that share the work get the clouds that one alone would make; the main one writes them.

    Raises:
        ValueError: no run, no trained priors, a damaged checkpoint, an unknown class, options out of range.
    """
    run = open_run(args.run)
    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    check_seed(args.seed)
    labels = class_labels(run, args)
    out = args.out or run.samples / _default_name(args)
    check_out(out)
    settings = resolved(run, args)  # before anything is loaded
    check_points(run, args.num_points)
    prompts = read_prompts(run, args)
    asked, newest = args.checkpoint, processes.agreed(run.checkpoint(args.checkpoint))
    if newest is not None:  # by its name: a run that goes on has another newest one when these are done
        args = replace(args, checkpoint=newest.name)
    if lion is None:
        note_best(run, asked)
        lion = load_model(run, args.checkpoint).to(best_device())
    record = record_of("sample", args, args.checkpoint, settings) | {"distilled": by_distilled(lion, settings)}
    more, draw, clip = {}, None, None
    if prompts is not None:
        labels, clip = np.tile(labels, len(prompts)), prompts.embeddings.repeat(args.num_samples, axis=0)
        record |= prompts.record
        more, draw = prompts.arrays, prompts.draw
    points = run.normalization.invert(generate(run, lion, args, labels, clip, processes=processes))
    check_finite(points)
    if processes.main:
        write_results(out, points, labels, run.classes, record, more=more, draw=draw and partial(draw, points))
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
    given = {name: getattr(args, name) for name in ("eta", "guidance") if getattr(args, name) is not None}
    found = replace(settings, sampler=sampler, steps=steps, **given)
    check_sampling(found, run.config)
    return found


def generate(
    run: Run,
    lion: LION,
    args: SampleArguments,
    labels: Int64[np.ndarray, " S"],
    clip: Float16[np.ndarray, "S 512"] | None = None,
    title: str = "sampling",
    processes: Processes = ALONE,
) -> Float32[np.ndarray, "S P 3"]:
    """One cloud for each of the labels in the model's units, with a progress bar called ``title``.

    clip: CLIP embedding of each cloud; None: of the run's training shapes in turn, if it is conditioned on CLIP.
    Processes take whole batches in turn: a cloud's last bits may depend on the size of the batch that it is made in.
    """
    settings, device, total = resolved(run, args), lion.z_mean.device, len(labels)
    if clip is None and run.config.model.shape_prior.clip:
        own = own_prompts(run)
        clip = own.embeddings[np.arange(total) % len(own)]
    generator = torch.Generator().manual_seed(args.seed)
    batches = [range(total)[i : i + args.batch_size] for i in range(0, total, args.batch_size)]
    if len(batches) < processes.count:
        print(f"{len(batches)} of {processes.count} processes have a batch of {args.batch_size} clouds to generate")
    mine = sum(len(batch) for number, batch in enumerate(batches) if processes.mine(number))
    clouds = []
    with ProgressBar(total=mine, desc=title, bar_format=BAR) as bar:
        for number, batch in enumerate(batches):
            if not processes.mine(number):
                for _ in range(keys_per_batch(settings.sampler)):
                    new_key(device, generator)
                continue

            def advance(done: int, total: int, start: float = bar.n, count: int = len(batch)) -> None:
                bar.update(start + count * done / total - bar.n)

            with autocast(run.config.mixed_precision, device):
                made = lion.sample(
                    len(batch),
                    steps=settings.steps,
                    sampler=settings.sampler,
                    eta=settings.eta,
                    num_points=run.config.data.num_points if args.num_points is None else args.num_points,
                    generator=generator,
                    labels=_tensor(labels[batch.start : batch.stop], device),
                    clip=None if clip is None else torch.from_numpy(clip[batch.start : batch.stop]).float().to(device),
                    clip_x0=settings.clip_x0,
                    guidance=settings.guidance,
                    callback=advance,
                )
            clouds.append(made.float().cpu().numpy())
    return np.concatenate(processes.gathered(clouds))


def by_distilled(lion: LION, settings: SamplingConfig) -> bool:
    """Whether distilled priors sample like this; said of a model that has such."""
    distilled = lion.few_step(settings.steps, settings.sampler, settings.eta, settings.guidance) is not lion
    if distilled:
        print(f"steps: {settings.steps}, by the priors distilled for so many")
    elif lion.distilled:
        guidances = sorted(set(lion.distilled_steps.values()))
        options = f"--steps {' or '.join(lion.distilled)}"
        options += " --sampler ddim" * (settings.sampler != "ddim") + " --eta 0" * (settings.eta != 0)
        if settings.guidance not in guidances:
            options += f" --guidance {' or '.join(f'{w:g}' for w in guidances)}"
        taken = f"steps: {settings.steps} of {settings.sampler}, by the priors as trained"
        print(f"{taken}; faster by distilled ones: {options}")
    return distilled


def _tensor(labels: np.ndarray, device: torch.device) -> torch.Tensor | None:
    return None if (labels < 0).any() else torch.from_numpy(labels).to(device)


def class_labels(run: Run, args: SampleArguments) -> np.ndarray:
    """The class of each cloud (S,): the one asked for, or all in turn; -1 in a run without classes."""
    label = known_label(run, args.label)
    if label is not None:
        return np.full(args.num_samples, label)
    conditional = run.config.model.shape_prior.num_classes > 0
    return np.arange(args.num_samples) % len(run.classes) if conditional else np.full(args.num_samples, -1)


def _default_name(args: SampleArguments) -> str:
    given = {name: getattr(args, name) for name in ("steps", "eta", "guidance")}
    given = {"n": args.num_samples, "points": args.num_points, **given}
    words = [
        args.checkpoint,
        args.label,
        *args.words,
        args.sampler,
        *(f"{k}{v}" for k, v in given.items() if v is not None),
        f"seed{args.seed}",
    ]
    return safe_name("-".join(word for word in words if word))


def main(args: list[str] | None = None) -> None:
    """The command line."""
    args = sys.argv[1:] if args is None else args

    def command() -> None:
        sample(tyro.cli(SampleArguments, args=args, prog="python -m lion_triton.sample"), processes=Processes.join())

    run_cli(command)


if __name__ == "__main__":
    main()
