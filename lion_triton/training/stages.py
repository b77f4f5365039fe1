"""The two stages of training: the VAE, then both priors on its latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch
from torch import Tensor

from lion_triton.config import PriorTraining, VAETraining
from lion_triton.data.clouds import TrainingStream, fixed_batch
from lion_triton.devices import autocast
from lion_triton.kernels import normal_noise
from lion_triton.models.lion import Posterior, posterior
from lion_triton.pictures import draw_grid
from lion_triton.progress import ProgressBar
from lion_triton.reconstruction import reconstruct
from lion_triton.runs import Checkpoint, load_checkpoint, load_state
from lion_triton.sample import SampleArguments, class_labels, generate
from lion_triton.training import report
from lion_triton.training.batches import Batch, read
from lion_triton.training.context import Context
from lion_triton.training.loop import fit
from lion_triton.training.objectives import PriorObjective, VAEObjective
from lion_triton.training.step import Average
from lion_triton.training.validation import prior_measure, vae_measure

STATISTICS_SHAPES = 512  # enough for the means and standard deviations of the latents


def fit_vae(context: Context, checkpoint: Checkpoint | None) -> None:
    """Stage 1: the hierarchical VAE."""
    config = context.config
    training = config.vae
    stream = training_stream(context, training, config.seed)

    def batches(start: int) -> Iterator[Batch]:
        for points, _, _ in read(stream, _samples(context, training, start), config.data.workers):
            yield {"points": points}

    held_out = context.held_out(report.SHOWN)

    def picture(total_step: int) -> None:
        rebuilt = reconstruct(context.lion, held_out, context.run.normalization, config.mixed_precision)
        rows = [
            ("held out", context.run.normalization.invert(held_out.numpy())),
            ("reconstruction", rebuilt.points),
        ]
        draw_grid(rows, context.run.samples / f"step-{total_step:08d}-vae.png")

    context.lion.vae.requires_grad_(True)
    objective = VAEObjective(context.lion, training)
    fit(
        context,
        "vae",
        objective,
        training,
        batches,
        names_of(context, stream, training),
        checkpoint,
        title="stage 1, VAE",
        picture=picture,
        measure=vae_measure(context, objective),
    )


def fit_priors(context: Context, checkpoint: Checkpoint | None) -> None:
    """Stage 2: both priors on the latents of the frozen VAE."""
    config, lion = context.config, context.lion
    training = config.priors
    continued = checkpoint is not None and checkpoint.stage == "priors"
    if not continued:
        _take_best_vae(context)
    lion.vae.requires_grad_(False).eval()
    stream = training_stream(context, training, config.seed + 1)
    cache = encode_all(context, training.cached_draws) if training.cached_draws else None
    if training.standardize and not continued:
        latents = cache or encode_all(context, 1, STATISTICS_SHAPES)
        noise = normal_noise(latents.h_mu.shape, torch.tensor([config.seed, 0]))
        h = latents.h_mu + latents.h_log_sigma.exp() * noise
        lion.set_latent_statistics(h.flatten(0, 1), latents.z.flatten(0, 1))

    def batches(start: int) -> Iterator[Batch]:
        return prior_batches(context, training, stream, cache, start)

    objective = PriorObjective(lion, training)
    average = Average(objective, training.ema_decay)

    @contextmanager
    def averaged_weights() -> Iterator[None]:
        current = {k: v.clone() for k, v in objective.state_dict().items()}
        objective.load_state_dict(average.state_dict())
        try:
            yield
        finally:
            objective.load_state_dict(current)

    def picture(total_step: int) -> None:
        args = SampleArguments(context.run.folder, num_samples=report.SHOWN)
        with averaged_weights():
            clouds = generate(context.run, lion, args, class_labels(context.run, args))
        rows = [("generated", context.run.normalization.invert(clouds))]
        draw_grid(rows, context.run.samples / f"step-{total_step:08d}-generated.png")

    fit(
        context,
        "priors",
        objective,
        training,
        batches,
        names_of(context, stream, training),
        checkpoint,
        title="stage 2, priors",
        before=config.vae.steps,
        average=average,
        picture=picture,
        measure=prior_measure(context, averaged_weights),
    )


def _take_best_vae(context: Context) -> None:
    """If stage 1 ran out of patience, its best VAE, as the last is known to be no better."""
    run = context.run
    last, best = load_checkpoint(run, with_optimizer=False), run.best("vae")
    if last is not None and last.stage == "vae" and last.ended and best is not None:
        context.accelerator.print(f"the priors are trained on the best VAE, of {best.name}")
        found = load_checkpoint(run, best.name, with_optimizer=False)
        assert found is not None
        load_state(context.lion, found.model, run)


def prior_batches(
    context: Context, training: PriorTraining, stream: TrainingStream, cache: Posterior | None, start: int = 0
) -> Iterator[Batch]:
    """What the priors are trained on from step ``start`` on: rows of ``cache``, or clouds where that is None."""
    samples = _samples(context, training, start)
    labels = torch.from_numpy(context.sources.train.labels)
    conditional, embeddings = context.config.model.shape_prior.num_classes > 0, context.sources.embeddings

    def conditions(numbers: range, index: Tensor) -> Batch:
        found = {"labels": labels[index]} if conditional else {}
        if embeddings is not None:
            found["clip"] = embeddings.draw(stream.seed, numbers, index.tolist())
        return found

    if cache is None:
        read_batches = read(stream, samples, context.config.data.workers)
        for numbers, (points, _, index) in zip(samples, read_batches, strict=True):
            yield {"points": points, **conditions(numbers, index)}
        return
    for numbers in samples:
        index = torch.tensor([stream.shape(i) for i in numbers])
        draw = torch.tensor([i // len(context.sources.train) % training.cached_draws for i in numbers])
        latents = {f.name: getattr(cache, f.name)[draw, index] for f in fields(cache)}
        yield {**latents, **conditions(numbers, index)}


def training_stream(context: Context, training: VAETraining | PriorTraining, seed: int) -> TrainingStream:
    """The samples of a whole stage; ``seed`` decides their order and their points."""
    data, total = context.config.data, training.steps * training.batch_size
    return TrainingStream(
        context.sources.train, context.run.normalization, data.num_points, total, seed, data.draw_from
    )


def _samples(context: Context, training: VAETraining | PriorTraining, start: int) -> list[range]:
    """The numbers of this process's samples in every step from ``start`` on."""
    size = training.batch_size
    return [context.share(range(step * size, (step + 1) * size)) for step in range(start, training.steps)]


def names_of(
    context: Context, stream: TrainingStream, training: VAETraining | PriorTraining
) -> Callable[[int], list[str]]:
    """From a step, counted from 0, to the names of its clouds."""
    size, names = training.batch_size, context.sources.train.names
    return lambda step: [names[stream.shape(i)] for i in range(step * size, (step + 1) * size)]


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
    with ProgressBar(total=draws * count, desc="encoding", unit="cloud", leave=False) as bar:
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
