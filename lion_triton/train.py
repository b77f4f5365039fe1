"""Train LION: ``python -m lion_triton.train [PRESET] [--data.source FOLDER] [--out RUN] ...``

One command runs both stages (the VAE, then the two priors on its frozen latents), draws pictures on the way
and ends with figures and a picture of what was learned. The same command again continues where it stopped: batches,
noise and times depend on the seed and the step alone, so a continued run equals an unbroken one.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from accelerate import Accelerator

from lion_triton.capture import why_uncaptured
from lion_triton.cli import run_cli
from lion_triton.config import PRESETS, TrainConfig, check, with_classes, with_networks
from lion_triton.data.clouds import Normalization, check_all, fixed_batch
from lion_triton.data.sources import load_sources
from lion_triton.devices import best_device, resolve_precision
from lion_triton.models.attention import AttentionKind
from lion_triton.models.lion import LION
from lion_triton.pictures import draw_grid
from lion_triton.runs import check_same_run, create_run, load_checkpoint, load_model, load_state, open_run
from lion_triton.sample import SampleArguments, sample
from lion_triton.training import report
from lion_triton.training.context import Context
from lion_triton.training.stages import fit_priors, fit_vae


@dataclass(frozen=True)
class Arguments:
    """Train LION on point clouds: the VAE, then both priors.

    Attributes:
        out: run folder; default runs/PRESET.
        stage: both stages, or one of them.
        attention: kind of attention in the U-Nets, instead of the preset's.
        denoiser: a transformer as the point prior, instead of the preset's U-Net.
        strict: refuse clouds with fewer points than data.num-points instead of repeating points.
        dry_run: print sizes, parameters, expected time and memory, and stop.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    out: Path | None = None
    stage: Literal["all", "vae", "priors"] = "all"
    attention: AttentionKind | None = None
    denoiser: Literal["transformer"] | None = None
    strict: bool = False
    dry_run: bool = False


def train(args: Arguments) -> None:
    """Run the command; see :class:`Arguments`.

    Raises:
        ValueError: bad data, a run folder of another configuration, a damaged checkpoint, a loss that is not finite.
    """
    config = with_networks(args.config, args.attention, args.denoiser)
    check(config)
    folder = args.out or Path("runs") / config.preset
    sources = load_sources(config.data, config.evaluate_shapes)
    config = with_classes(config, len(sources.train.classes))
    if args.dry_run:
        report.dry_run(config, sources)
        return
    device = best_device()
    accelerator = Accelerator(
        mixed_precision=resolve_precision(config.mixed_precision, device), cpu=device.type == "cpu"
    )
    for name, batch_size in (("vae", config.vae.batch_size), ("priors", config.priors.batch_size)):
        if batch_size % accelerator.num_processes:
            raise ValueError(
                f"{name}.batch-size: expected a multiple of the {accelerator.num_processes} processes, got {batch_size}"
            )

    continued = (folder / "config.json").exists()
    for clouds in (sources.train, sources.held_out):
        short = check_all(clouds, config.data.num_points, args.strict, read=not continued)
        if short:
            accelerator.print(
                f"{short} of {len(clouds)} clouds have fewer than {config.data.num_points} points: points repeat"
            )
    accelerator.wait_for_everyone()
    if not continued and args.stage == "priors":
        raise ValueError(f"stage: {folder} has no trained VAE yet; run --stage vae first")
    if not continued and accelerator.is_main_process:
        normalization = Normalization.fit(sources.train, config.data.normalization)
        create_run(folder, config, sources.train.classes, normalization)
    accelerator.wait_for_everyone()
    run = open_run(folder)
    check_same_run(run, config)
    if run.classes != sources.train.classes:
        raise ValueError(f"data.source: {folder} was started with the classes {', '.join(run.classes)}, got others")
    run = replace(run, config=config)
    checkpoint = load_checkpoint(run)
    if args.stage == "priors" and (
        checkpoint is None or (checkpoint.stage == "vae" and checkpoint.step < config.vae.steps)
    ):
        raise ValueError(f"stage: {folder} has no trained VAE yet; run --stage vae first")

    torch.manual_seed(config.seed)
    lion = LION(config.model)
    if checkpoint is not None:
        load_state(lion, checkpoint.model, run)
        accelerator.print(f"continuing {folder}: {checkpoint.step} steps of stage {checkpoint.stage} are done")
    lion.to(accelerator.device)
    if config.compile and accelerator.device.type == "cuda":
        for network in (
            lion.vae.shape_encoder,
            lion.vae.point_encoder,
            lion.vae.decoder,
            lion.point_prior.network,
        ):
            network.compile()

    reason = why_uncaptured(accelerator.device, accelerator.num_processes)
    if reason:
        accelerator.print(f"steps run launch by launch, not as CUDA graphs: {reason}")
    context = Context(run, sources, accelerator, lion)
    if args.stage != "priors" and (checkpoint is None or checkpoint.stage == "vae"):
        fit_vae(context, checkpoint)
    if args.stage != "vae":
        fit_priors(context, checkpoint)
        if accelerator.is_main_process:
            finish(context)


def finish(context: Context) -> None:
    """Sample with the averaged weights, and show what was learned in a picture and in figures."""
    config, run, count = context.config, context.run, context.config.evaluate_shapes
    lion = load_model(run).to(context.device)
    held_out = context.held_out(count)
    samples = sample(SampleArguments(run.folder, num_samples=len(held_out), out=run.samples / "final"))
    rebuilt = report.reconstruct(lion, held_out, run.normalization, config.mixed_precision)
    references = run.normalization.invert(held_out.numpy())
    shown = report.SHOWN
    rows = [("held out", references[:shown]), ("reconstruction", rebuilt.points[:shown])]
    rows.append(("generated", samples.points[:shown]))
    draw_grid(rows, run.samples / "overview.png")
    fresh = None
    if context.sources.fresh is not None:
        clouds = fixed_batch(
            context.sources.fresh,
            range(len(held_out)),
            config.data.num_points,
            config.seed,
            run.normalization,
        )
        fresh = run.normalization.invert(clouds.numpy())
    report.final(run, rebuilt, samples.points, references, fresh)


def parse(args: list[str]) -> Arguments:
    """``[PRESET] [options]``; the preset decides the defaults of all options."""
    name = "quickstart"
    if args and not args[0].startswith("-"):
        name, *args = args
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name}")
    return tyro.cli(
        Arguments,
        default=Arguments(PRESETS[name]()),
        args=args,
        prog=f"python -m lion_triton.train {name}",
        config=(tyro.conf.AvoidSubcommands,),
    )


def main(args: list[str] | None = None) -> None:
    """The command line."""
    run_cli(lambda: train(parse(sys.argv[1:] if args is None else args)))


if __name__ == "__main__":
    main()
