"""The two stages of training: the VAE, then both priors on its latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from lion_triton.data.clouds import TrainingStream, fixed_batch
from lion_triton.devices import autocast
from lion_triton.kernels import normal_noise
from lion_triton.models.lion import Posterior, posterior
from lion_triton.pictures import draw_grid
from lion_triton.runs import Checkpoint
from lion_triton.sample import SampleArguments, class_labels, generate
from lion_triton.training import report
from lion_triton.training.loop import Context, fit
from lion_triton.training.objectives import PriorObjective, VAEObjective

STATISTICS_SHAPES = 512  # enough for the means and standard deviations of the latents
KEYS_PER_STEP = 4  # noise keys that one step may use


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
