"""Train LION: ``python -m lion_triton.train [PRESET] [--data.source FOLDER] [--out RUN] ...``

One command runs both stages (the VAE, then the two priors on its frozen latents), draws pictures on the way
and ends with figures and a picture of what was learned. The same command again continues where it stopped: batches,
noise and times depend on the seed and the step alone, so a continued run equals an unbroken one.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from lion_triton import report
from lion_triton.cli import run_cli
from lion_triton.config import PRESETS, PriorTraining, TrainConfig, VAETraining, check, with_classes, with_networks
from lion_triton.data.clouds import Normalization, TrainingStream, check_all, fixed_batch
from lion_triton.data.sources import Sources, load_sources
from lion_triton.devices import autocast, best_device, resolve_precision
from lion_triton.kernels import normal_noise
from lion_triton.models.attention import AttentionKind
from lion_triton.models.lion import LION
from lion_triton.objectives import Posterior, posterior, prior_loss, vae_loss
from lion_triton.pictures import draw_grid
from lion_triton.runs import (
    Checkpoint,
    Run,
    Stage,
    check_same_run,
    create_run,
    load_checkpoint,
    load_model,
    load_state,
    open_run,
    save_checkpoint,
    write_text,
)
from lion_triton.sample import SampleArguments, class_labels, generate, sample

STATISTICS_SHAPES = 512  # enough for the means and standard deviations of the latents
KEYS_PER_STEP = 4  # noise keys that one step may use


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


class VAEObjective(nn.Module):
    """Stage 1's loss as one module, so that it can be distributed."""

    def __init__(self, lion: LION, training: VAETraining) -> None:
        super().__init__()
        self.vae, self.training_config = lion.vae, training

    def forward(self, points: Tensor, key: Tensor, kl_coefficient: float) -> dict[str, Tensor]:
        training = self.training_config
        loss = vae_loss(
            self.vae,
            points,
            key,
            kl_coefficient=kl_coefficient,
            lambda_z=training.lambda_z,
            lambda_h=training.lambda_h,
            reconstruction=training.reconstruction,
            occupancy_weight=training.occupancy_weight,
        )
        return {f.name: getattr(loss, f.name) for f in fields(loss)}


class PriorObjective(nn.Module):
    """Stage 2's loss as one module; only the priors are its parameters."""

    def __init__(self, lion: LION, training: PriorTraining) -> None:
        super().__init__()
        self.shape_prior, self.point_prior, self.training_config = lion.shape_prior, lion.point_prior, training
        self._lion = [lion]  # in a list, so that the VAE is no part of this module

    def forward(self, latents: Posterior, key: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        loss = prior_loss(self._lion[0], latents, key, labels, shape_draws=self.training_config.shape_draws)
        return {f.name: getattr(loss, f.name) for f in fields(loss)}


@dataclass
class Context:
    """One process's part in a run: where it computes, what it trains, what it trains on."""

    run: Run
    sources: Sources
    accelerator: Accelerator
    lion: LION

    @property
    def config(self) -> TrainConfig:
        return self.run.config

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def key(self, stage: Stage, number: int) -> Tensor:
        """The noise key ``number`` of a stage; every process draws other noise."""
        seed = (2 * self.config.seed + (stage == "priors")) * 4096 + self.accelerator.process_index
        return torch.tensor([seed, number], device=self.device)

    def share(self, numbers: range) -> range:
        """This process's part of a global batch."""
        size = len(numbers) // self.accelerator.num_processes
        first = numbers.start + size * self.accelerator.process_index
        return range(first, first + size)

    def labels(self, labels: Tensor) -> Tensor | None:
        return labels.to(self.device) if self.config.model.shape_prior.num_classes else None

    def held_out(self, count: int) -> Tensor:
        """The first ``count`` held-out clouds, normalised; classes in turn where they are known."""
        clouds, config = self.sources.held_out, self.config.data
        order = report.in_turn(clouds.labels)[:count]
        return fixed_batch(clouds, order, config.num_points, self.config.seed, self.run.normalization)


class Log:
    """metrics.jsonl and TensorBoard; a continued run drops what it will write again."""

    def __init__(self, run: Run, total_step: int) -> None:
        self.path = run.metrics
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if _total_step(line) <= total_step]
        write_text(self.path, "".join(f"{line}\n" for line in kept))
        self.board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=total_step + 1)

    def write(self, stage: Stage, step: int, total_step: int, values: dict[str, float]) -> None:
        record = {"total_step": total_step, "stage": stage, "step": step, **values}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in values.items():
            self.board.add_scalar(f"{stage}/{name}", value, total_step)


def _total_step(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for one that a killed process left unfinished."""
    try:
        return json.loads(line)["total_step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def fit(
    context: Context,
    stage: Stage,
    objective: nn.Module,
    training: VAETraining | PriorTraining,
    inputs: Callable[[int], Iterator[tuple[Any, ...]]],
    picture: Callable[[int], None],
    checkpoint: Checkpoint | None,
    ema: AveragedModel | None = None,
) -> None:
    """Train ``objective`` to the end of its stage, from ``checkpoint`` if that is one of this stage.

    ``inputs(start)`` yields the objective's arguments for step ``start``, ``start + 1``, ... and nothing but the
    step's number decides them.
    """
    config, accelerator = context.config, context.accelerator
    optimizer = torch.optim.Adam(objective.parameters(), lr=training.learning_rate, betas=training.betas)
    module = objective
    objective, optimizer = accelerator.prepare(objective, optimizer)
    start = 0
    if checkpoint is not None and checkpoint.stage == stage:
        optimizer.load_state_dict(checkpoint.optimizer)
        start = checkpoint.step
    before = config.vae.steps if stage == "priors" else 0
    log = Log(context.run, before + start) if accelerator.is_main_process else None

    def save(step: int) -> None:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            averaged = {} if ema is None else ema.module.state_dict()
            state = Checkpoint(stage, step, context.lion.state_dict(), averaged, optimizer.state_dict())
            save_checkpoint(context.run, before + step, state)
        accelerator.wait_for_everyone()

    module.train()

    def finite(losses: dict[str, Tensor], step: int) -> None:
        if not math.isfinite(losses["loss"].item()):
            raise ValueError(
                f"loss: not finite at step {step} of stage {stage}; a smaller {stage}.learning-rate may help; the last "
                f"checkpoint is kept in {context.run.folder}"
            )

    bar = tqdm(
        total=training.steps,
        initial=start,
        desc={"vae": "stage 1, VAE", "priors": "stage 2, priors"}[stage],
        unit="step",
        disable=None if accelerator.is_main_process else True,
    )
    clock, clock_step = time.perf_counter(), start
    with bar, stop_requests() as stop, nullcontext() if log is None else closing(log.board):
        for step, arguments in zip(range(start, training.steps), inputs(start), strict=False):
            decay = 0.5 * (1 + math.cos(math.pi * step / training.steps))
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate * (decay if training.learning_rate_decay == "cosine" else 1)
            # Dropout: other masks in every step and process, the same when the run is continued.
            torch.manual_seed((config.seed << 32) + (accelerator.process_index << 26) + before + step)
            losses = objective(*arguments)
            accelerator.backward(losses["loss"])
            limit = training.max_grad_norm if training.max_grad_norm is not None else math.inf
            grad_norm = accelerator.clip_grad_norm_(objective.parameters(), limit)
            optimizer.step()
            optimizer.zero_grad()
            if ema is not None:
                ema.update_parameters(module)
            bar.update()
            done = step + 1

            if done % config.log_every == 0 or done == training.steps:
                finite(losses, done)
                values = {name: value.item() for name, value in losses.items()} | {"grad_norm": float(grad_norm)}
                if stage == "vae":
                    values["kl_coefficient"] = arguments[-1]
                elapsed = time.perf_counter() - clock
                values["shapes_per_second"] = (done - clock_step) * training.batch_size / elapsed
                bar.set_postfix_str(f"loss {values['loss']:.4g}, {values['shapes_per_second']:.0f} shapes/s")
                if log is not None:
                    log.write(stage, done, before + done, values)
            stopping = stop(accelerator)
            if stopping or done % config.checkpoint_every == 0 or done == training.steps:
                finite(losses, done)
                save(done)
            if stopping:
                accelerator.print(f"\nstopped after step {done} of stage {stage}; the same command continues")
                raise KeyboardInterrupt
            if done % config.picture_every == 0 or done == training.steps:
                if accelerator.is_main_process:
                    module.eval()
                    picture(before + done)
                    module.train()
                accelerator.wait_for_everyone()
            if done % config.log_every == 0:
                clock, clock_step = time.perf_counter(), done
        if stop(accelerator):  # asked for while the last step was being saved
            raise KeyboardInterrupt
    accelerator.free_memory()


def fit_vae(context: Context, checkpoint: Checkpoint | None) -> None:
    """Stage 1: the hierarchical VAE."""
    config = context.config
    training = config.vae
    stream = TrainingStream(
        context.sources.train,
        context.run.normalization,
        config.data.num_points,
        training.steps * training.batch_size,
        config.seed,
        config.data.draw_from,
    )

    def inputs(start: int) -> Iterator[tuple[Any, ...]]:
        for step, (points, _, _) in enumerate(load(context, stream, start, training.batch_size), start):
            progress = min(step / max(training.kl_anneal * training.steps, 1), 1.0)
            coefficient = training.kl_start + (training.kl_end - training.kl_start) * progress
            yield points.to(context.device), context.key("vae", KEYS_PER_STEP * step), coefficient

    held_out = context.held_out(report.SHOWN)

    def picture(total_step: int) -> None:
        rebuilt = report.reconstruct(context.lion, held_out, context.run.normalization, config.mixed_precision)
        rows = [
            ("held out", context.run.normalization.invert(held_out.numpy())),
            ("reconstruction", rebuilt.points),
        ]
        draw_grid(rows, context.run.samples / f"step-{total_step:08d}-vae.png")

    context.lion.vae.requires_grad_(True)
    fit(context, "vae", VAEObjective(context.lion, training), training, inputs, picture, checkpoint)


def fit_priors(context: Context, checkpoint: Checkpoint | None) -> None:
    """Stage 2: both priors on the latents of the frozen VAE."""
    config, lion = context.config, context.lion
    training = config.priors
    lion.vae.requires_grad_(False).eval()
    stream = TrainingStream(
        context.sources.train,
        context.run.normalization,
        config.data.num_points,
        training.steps * training.batch_size,
        config.seed + 1,
        config.data.draw_from,
    )
    cache = encode_all(context, training.cached_draws) if training.cached_draws else None
    continued = checkpoint is not None and checkpoint.stage == "priors"
    if training.standardize and not continued:
        latents = cache or encode_all(context, 1, STATISTICS_SHAPES)
        noise = normal_noise(latents.h_mu.shape, torch.tensor([config.seed, 0]))
        h = latents.h_mu + latents.h_log_sigma.exp() * noise
        lion.set_latent_statistics(h.flatten(0, 1), latents.z.flatten(0, 1))
    labels = torch.from_numpy(context.sources.train.labels)

    def inputs(start: int) -> Iterator[tuple[Any, ...]]:
        if cache is not None:
            shapes = len(context.sources.train)
            for step in range(start, training.steps):
                numbers = context.share(range(step * training.batch_size, (step + 1) * training.batch_size))
                index = torch.tensor([stream.shape(i) for i in numbers])
                draw = torch.tensor([i // shapes % training.cached_draws for i in numbers])
                latents = Posterior(*(getattr(cache, f.name)[draw, index].to(context.device) for f in fields(cache)))
                yield latents, context.key("priors", KEYS_PER_STEP * step), context.labels(labels[index])
            return
        for step, (points, label, _) in enumerate(load(context, stream, start, training.batch_size), start):
            key = context.key("priors", KEYS_PER_STEP * step)
            with autocast(config.mixed_precision, context.device):
                latents = posterior(lion.vae, points.to(context.device), key)
            yield latents, key + torch.tensor([0, 1], device=context.device), context.labels(label)

    objective = PriorObjective(lion, training)
    # Of the priors alone: a copy of the objective would hold the VAE, too.
    priors = nn.ModuleDict({"shape_prior": lion.shape_prior, "point_prior": lion.point_prior})
    ema = AveragedModel(priors, multi_avg_fn=_warm_average(training.ema_decay))
    if continued:
        assert checkpoint is not None
        ema.module.load_state_dict(dict(checkpoint.ema))
        ema.n_averaged.fill_(checkpoint.step)

    def picture(total_step: int) -> None:
        current = {k: v.clone() for k, v in objective.state_dict().items()}
        objective.load_state_dict(ema.module.state_dict())
        args = SampleArguments(context.run.folder, num_samples=report.SHOWN)
        clouds = generate(context.run, lion, args, class_labels(context.run, args))
        objective.load_state_dict(current)
        rows = [("generated", context.run.normalization.invert(clouds))]
        draw_grid(rows, context.run.samples / f"step-{total_step:08d}-generated.png")

    fit(context, "priors", objective, training, inputs, picture, checkpoint, ema)


def load(context: Context, stream: TrainingStream, start: int, batch_size: int) -> DataLoader[Any]:
    """This process's part of every global batch from step ``start`` on."""
    steps = range(start, len(stream) // batch_size)
    # Ranges, not lists: the published recipe has hundreds of millions of sample numbers.
    batches: Any = [context.share(range(step * batch_size, (step + 1) * batch_size)) for step in steps]
    return DataLoader(stream, batch_sampler=batches, num_workers=context.config.data.workers)


@torch.no_grad()
def encode_all(context: Context, draws: int, shapes: int | None = None) -> Posterior:
    """The posteriors of ``draws`` random draws of points from each training shape: tensors (draws, S, ...), CPU.

    Of ``shapes`` evenly spaced shapes only, if given. The same in every process.
    """
    config, clouds = context.config, context.sources.train
    every = max(1, len(clouds) // shapes) if shapes else 1
    chosen = range(0, len(clouds), every)
    count = len(chosen)
    chunks = [chosen[i : i + 64] for i in range(0, count, 64)]
    seed = 2 * config.seed + 1
    rows = []
    with tqdm(total=draws * count, desc="encoding", unit="cloud", leave=False, disable=None) as bar:
        for draw in range(draws):
            parts = []
            for number, chunk in enumerate(chunks, draw * len(chunks)):
                drawn = config.seed + 2 + draw
                points = fixed_batch(clouds, chunk, config.data.num_points, drawn, context.run.normalization)
                # Offsets below 0 are free: the steps' keys count up from 0.
                key = torch.tensor([seed * 4096, -1 - number], device=context.device)
                with autocast(config.mixed_precision, context.device):
                    part = posterior(context.lion.vae, points.to(context.device), key)
                parts.append([getattr(part, f.name).cpu() for f in fields(part)])
                bar.update(len(chunk))
            rows.append([torch.cat(tensors) for tensors in zip(*parts, strict=True)])
    return Posterior(*(torch.stack(tensors) for tensors in zip(*rows, strict=True)))


def _warm_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """EMA whose decay rises with the number of steps k as (1 + k) / (10 + k), so that a short run forgets its start."""

    def update(averaged: Any, current: Any, count: Any) -> None:
        k = int(count)  # AveragedModel's own count, which a continued run restores
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + k) / (10 + k)))

    return update


@contextmanager
def stop_requests() -> Iterator[Callable[[Accelerator], bool]]:
    """Ctrl-C or SIGTERM lets the step finish and asks for a checkpoint instead of breaking off.

    Yields a function that says whether to stop; all processes get the same answer.
    """
    requested = False

    def request(*_: object) -> None:
        nonlocal requested
        requested = True

    previous = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:

        def stop(accelerator: Accelerator) -> bool:
            if accelerator.num_processes == 1:
                return requested
            anyone = accelerator.reduce(torch.tensor(float(requested), device=accelerator.device), "max")
            return bool(anyone.item() > 0)

        yield stop
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


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
