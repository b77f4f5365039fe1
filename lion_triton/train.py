"""Train LION: ``python -m lion_triton.train [PRESET|RUN] [--data.source FOLDER] [--out RUN] ...``

One command runs both stages (the VAE, then the two priors on its frozen latents), draws pictures on the way
and ends with figures and a picture of what was learned. The same command again continues where it stopped: batches,
noise and times depend on the seed and the step alone, so a continued run equals an unbroken one.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator

from lion_triton.capture import why_uncaptured
from lion_triton.cli import run_cli
from lion_triton.config import (
    PRESETS,
    EncoderTraining,
    TrainConfig,
    check,
    differences,
    with_classes,
    with_clip,
    with_networks,
)
from lion_triton.data.clouds import Normalization, check_all, fixed_batch
from lion_triton.data.embeddings import write_embeddings
from lion_triton.data.sources import Sources
from lion_triton.devices import best_device, resolve_precision
from lion_triton.models.attention import AttentionKind
from lion_triton.models.hub import CONFIG, SHIPPED
from lion_triton.models.lion import LION
from lion_triton.pictures import draw_grid
from lion_triton.processes import Processes
from lion_triton.reconstruction import reconstruct
from lion_triton.runs import (
    Run,
    check_same_run,
    create_run,
    load_model,
    load_state,
    open_run,
    set_damaged_aside,
    vae_trained,
)
from lion_triton.sample import SampleArguments, class_labels, generate, sample
from lion_triton.surface import SurfaceTraining
from lion_triton.training import report
from lion_triton.training.compiling import check_compiler, compile_bar, compile_blocks, whether_to_compile
from lion_triton.training.context import Context, training_sources
from lion_triton.training.distill import distill
from lion_triton.training.encoders import train_encoders
from lion_triton.training.initial import Initial, initial_weights
from lion_triton.training.longer import change_steps
from lion_triton.training.stages import fit_priors, fit_vae
from lion_triton.training.stopping import Stop
from lion_triton.training.surface import train_surface

SHIPPED_MODEL, SHIPPED_STEPS = "furniture", 8  # distilled: in a blink
LATER_STAGES = ("surface", "encoder", "distill")  # of a run that is trained
KEPT_EMBEDDINGS = 256  # shapes whose embeddings a run keeps, to sample with where no words are given


@dataclass(frozen=True)
class Arguments:
    """Train LION on point clouds: the VAE, then both priors.

    The first word is a preset (quickstart, procedural, furniture, furniture_small, lion, lion_all) or the folder of a
    run to go on with; none stands for quickstart. What follows are its options, with their defaults.

    Attributes:
        out: run folder; default runs/PRESET.
        stage: both stages, or one of them; or, of a run that is trained, the network that ``mesh`` takes (surface), the
            encoders of coarse, noisy or partial shapes that ``vary`` takes (encoder), or priors for few steps (distill;
            apart from --distill.* all is as the run was trained).
        encoder: of --stage encoder, in which the encoders learn to take degraded shapes for whole ones.
        attention: kind of attention in the U-Nets, instead of the preset's.
        denoiser: a transformer as the point prior, instead of the preset's U-Net.
        clip: condition the priors on CLIP embeddings of the shapes, instead of on classes: those that prepare --clip
            made, or those of --data.embeddings.
        strict: refuse clouds with fewer points than --data.num-points instead of repeating points.
        dry_run: print sizes, parameters, expected time and memory of the VAE and the priors, and stop.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    out: Path | None = None
    stage: Literal["all", "vae", "priors", "surface", "encoder", "distill"] = "all"
    encoder: EncoderTraining = field(default_factory=EncoderTraining)
    attention: AttentionKind | None = None
    denoiser: Literal["transformer"] | None = None
    clip: bool = False
    strict: bool = False
    dry_run: bool = False


def train(args: Arguments) -> None:
    """Run the command; see :class:`Arguments`.

    Raises:
        ValueError: bad data, a run folder of another configuration, damaged checkpoints, a loss that is not finite,
            options of another stage.
    """
    for line in differences(args.encoder, EncoderTraining(), "encoder."):
        if args.stage != "encoder":
            option = line.partition(":")[0].replace("_", "-")
            raise ValueError(f"{option}: expected the stage encoder, got {args.stage}")
    processes = Processes.join()  # before the data are read, which may take one of them longer
    if args.stage in LATER_STAGES:
        train_part(args, processes)
        return
    config = with_networks(args.config, args.attention, args.denoiser)
    config = with_clip(config) if args.clip else config
    check(config)
    folder = run_folder(args)
    if folder.is_file():
        raise ValueError(f"out: expected a folder, got the file {folder}")
    if args.stage == "priors" and config.init_from is None and not (folder / "config.json").exists():
        raise no_vae(folder)
    sources = training_sources(config)
    config = with_classes(config, len(sources.train.classes))
    initial = None
    if config.init_from is not None and not any((folder / "checkpoints").glob("step-*")):
        initial = initial_weights(config.init_from, config.model, sources.train.classes, config.data.normalization)
    if args.dry_run:
        report.dry_run(config, sources)
        return
    accelerator = start_processes(config)
    stop = Stop()
    with stop.listening():
        train_stages(args, config, sources, initial, accelerator, stop)


def train_part(args: Arguments, processes: Processes) -> None:
    """A stage that adds something to a run that is trained."""
    run = open_run(run_folder(args))
    run = replace(run, config=with_free_options(run.config, args.config))
    check(run.config)
    for name, given in (("dry-run", args.dry_run), ("strict", args.strict)):
        if given:
            raise ValueError(f"{name}: expected the stages vae, priors or all, got {args.stage}")
    if args.stage != "encoder" and processes.count > 1:
        raise ValueError(f"stage: {args.stage} trains in one process, got {processes.count}")
    if args.stage == "distill" and run.config.preset != args.config.preset:  # whose settings of distill these are
        raise ValueError(f"preset: {run.folder} is a run of {run.config.preset}, got {args.config.preset}")
    accelerator = start_processes(run.config)
    if args.stage == "surface":
        train_surface(run, SurfaceTraining(), accelerator)
    elif args.stage == "encoder":
        train_encoders(run, args.encoder, accelerator)
    else:
        distill(run, args.config.distill, accelerator)


def with_free_options(config: TrainConfig, asked: TrainConfig) -> TrainConfig:
    """A run's configuration with those options of ``asked`` that a later stage is free to choose."""
    free = {name: getattr(asked, name) for name in ("log_every", "checkpoint_every", "on_nonfinite")}
    return replace(config, **free)


def check_later_stage(args: Arguments, default: TrainConfig) -> None:
    """Refuse options that a later stage has from its run, where they say otherwise.

    default: what ``args.config`` was before any option was given.

    Raises:
        ValueError: naming the first of them, or that there is no run.
    """
    run = open_run(run_folder(args))
    kept, asked = with_free_options(run.config, args.config), args.config
    if args.stage == "distill":
        kept = replace(kept, distill=asked.distill)
    given = {line.partition(": ")[0] for line in differences(asked, default)}
    for line in differences(asked, kept):
        name, _, values = line.partition(": ")
        if name in given:
            got, was = values.rsplit(", was ", 1)
            option = name.replace("_", "-")
            raise ValueError(f"{option}: the stage {args.stage} has it from {run.folder}, expected {was}, got {got}")
    others = {
        "clip": args.clip and with_clip(kept) != kept,
        "attention": with_networks(kept, args.attention, None) != kept,
        "denoiser": with_networks(kept, None, args.denoiser) != kept,
    }
    for name, differs in others.items():
        if differs:
            raise ValueError(f"{name}: the stage {args.stage} has its networks from {run.folder}, which has others")


def train_stages(
    args: Arguments,
    config: TrainConfig,
    sources: Sources,
    initial: Initial | None,
    accelerator: Accelerator,
    stop: Stop,
) -> None:
    """Both stages, or the one asked for, from where the run is; a new one from the weights of ``initial``."""
    folder = run_folder(args)
    initial_vae = initial is not None and "VAE" in initial.parts
    if args.stage == "priors" and not initial_vae and not (folder / "config.json").exists():
        raise no_vae(folder)
    run = open_or_create(folder, args.strict, config, sources, accelerator)
    with accelerator.main_process_first():
        checkpoint = set_damaged_aside(run)
    change_steps(run, checkpoint, accelerator)
    trained = checkpoint is not None and vae_trained(checkpoint, config)
    if args.stage == "priors" and not trained and not initial_vae:
        raise no_vae(run.folder)

    torch.manual_seed(config.seed)
    lion = LION(config.model)
    if checkpoint is not None:
        load_state(lion, checkpoint.model, run)
        accelerator.print(f"continuing {run.folder}: {checkpoint.step} steps of stage {checkpoint.stage} are done")
    elif initial is not None:
        initial.load(lion)
        accelerator.print("\n".join(initial.lines))
        if initial_vae and args.stage != "priors" and config.vae.kl_start != config.vae.kl_end:
            accelerator.print(
                f"its KL coefficient rises from {config.vae.kl_start:g} again; --vae.kl-start {config.vae.kl_end:g} "
                "leaves it where it ends"
            )
    lion.to(accelerator.device)
    compiling: AbstractContextManager[None] = nullcontext()
    if run.config.compile == "on":
        check_compiler(accelerator.device)  # of a run that may have begun on another machine
        compile_blocks(lion)
        compiling = compile_bar(lion)
    reason = why_uncaptured(accelerator.device, accelerator.num_processes)
    if reason:
        accelerator.print(f"steps run launch by launch, not as CUDA graphs: {reason}")

    context = Context(run, sources, accelerator, lion, stop)
    if config.validate_every and not context.watched:
        accelerator.print(
            f"no checkpoint will be known as the best: {config.data.source} has too few validation shapes"
        )
    with compiling:
        if args.stage != "priors" and (checkpoint is None or checkpoint.stage == "vae"):
            fit_vae(context, checkpoint)
        if args.stage != "vae":
            fit_priors(context, checkpoint)
            if accelerator.is_main_process:
                finish(context)


def run_folder(args: Arguments) -> Path:
    return args.out or Path("runs") / args.config.preset


def start_processes(config: TrainConfig) -> Accelerator:
    """This process's device and precision, and the others it trains with.

    Raises:
        ValueError: batches that cannot be shared evenly, or a device that cannot do what is asked for.
    """
    device = best_device()
    precision = resolve_precision(config.mixed_precision, device)
    accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
    processes = accelerator.num_processes
    for name, size in (("vae", config.vae.batch_size), ("priors", config.priors.batch_size)):
        if size % processes:
            raise ValueError(f"{name}.batch-size: expected a multiple of the {processes} processes, got {size}")
    if config.compile == "on":
        check_compiler(device)
    return accelerator


def open_or_create(folder: Path, strict: bool, config: TrainConfig, sources: Sources, accelerator: Accelerator) -> Run:
    """The run folder, made if there is none yet, once every cloud has been looked at.

    Raises:
        ValueError: bad clouds, or a folder that holds another run.
    """
    continued = (folder / "config.json").exists()
    points = config.data.num_points
    for clouds in (sources.train, sources.validation, sources.held_out):
        short = check_all(clouds, points, strict, read=not continued)
        if short:
            accelerator.print(f"{short} of {len(clouds)} clouds have fewer than {points} points: points repeat")
    accelerator.wait_for_everyone()
    if not continued and accelerator.is_main_process:
        normalization = Normalization.fit(sources.train, config.data.normalization)
        decided = replace(config, compile=whether_to_compile(config, accelerator.device))
        clip = None if sources.embeddings is None else sources.embeddings.model
        create_run(folder, decided, sources.train.classes, normalization, clip)
    accelerator.wait_for_everyone()
    run = open_run(folder)
    if run.pretrained:
        raise ValueError(f"out: {folder} is of save_pretrained, with no training to continue: give another --out")
    check_same_run(run, config)
    if run.classes != sources.train.classes:
        raise ValueError(f"data.source: {folder} was started with the classes {', '.join(run.classes)}, got others")
    if sources.embeddings is not None and accelerator.is_main_process and not run.embeddings.exists():
        write_embeddings(sources.embeddings.some(KEPT_EMBEDDINGS), run.embeddings)
    # What auto became when the run began, so that a continued run equals an unbroken one.
    compiled = run.config.compile if config.compile == "auto" else config.compile
    return replace(run, config=replace(config, compile=compiled))


def no_vae(folder: Path) -> ValueError:
    return ValueError(f"stage: {folder} has no trained VAE yet; run --stage vae first")


def finish(context: Context) -> None:
    """Sample with the averaged weights, and show what was learned in a picture and in figures."""
    config, run, count = context.config, context.run, context.config.evaluate_shapes
    lion = load_model(run).to(context.device)
    if config.compile == "on":
        compile_blocks(lion)  # as they are compiled already
    held_out = context.held_out(count)
    samples = sample(SampleArguments(run.folder, num_samples=len(held_out), out=run.samples / "final"), lion)
    rebuilt = reconstruct(lion, held_out, run.normalization, config.mixed_precision)
    references = run.normalization.invert(held_out.numpy())
    shown = report.SHOWN
    rows = [("held out", references[:shown]), ("reconstruction", rebuilt.points[:shown])]
    rows.append(("generated", samples.points[:shown]))
    if config.preset == "quickstart":
        rows.append(("shipped model", shipped_clouds(shown)))
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


def shipped_clouds(count: int) -> np.ndarray:
    """What the model that comes with the package, trained for far longer on more such shapes, makes: (count, P, 3)."""
    run = open_run(SHIPPED / SHIPPED_MODEL)  # whatever is called so in this folder
    args = SampleArguments(run.folder, num_samples=count, steps=SHIPPED_STEPS)
    clouds = generate(run, load_model(run).to(best_device()), args, class_labels(run, args), title="shipped model")
    return run.normalization.invert(clouds)


def parse(args: list[str]) -> Arguments:
    """``[PRESET|RUN] [options]``; the preset, or the configuration of the run, decides the defaults of all options.

    Raises:
        ValueError: no such preset or run, or options that a later stage has from its run.
    """
    name = "quickstart"
    if args and not args[0].startswith("-"):
        name, *args = args
    if name in PRESETS:
        default = Arguments(PRESETS[name]())
    elif (Path(name) / CONFIG).is_file():
        default = Arguments(open_run(Path(name)).config, out=Path(name))
    else:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, or a run folder, got {name}")
    parsed = tyro.cli(
        Arguments,
        default=default,
        args=args,
        prog=f"python -m lion_triton.train {name}",
        config=(tyro.conf.AvoidSubcommands,),
    )
    if parsed.stage in LATER_STAGES:
        check_later_stage(parsed, default.config)
    return parsed


def main(args: list[str] | None = None) -> None:
    """The command line."""
    run_cli(lambda: train(parse(sys.argv[1:] if args is None else args)))


if __name__ == "__main__":
    main()
