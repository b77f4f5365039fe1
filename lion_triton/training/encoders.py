"""The stage that fine-tunes a trained run's encoders, and nothing else, on degraded shapes; and how well they do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float32
from torch import Tensor, nn
from torch.utils.data import Dataset

from lion_triton.config import EncoderTraining, VAETraining, check_encoder
from lion_triton.data.clouds import Clouds, TrainingStream, draw, in_turn
from lion_triton.data.degraded import VoxelGrid
from lion_triton.data.sources import load_sources
from lion_triton.generation.encoders import (
    EncoderRun,
    Place,
    degrade,
    from_given,
    load_tuned,
    part_name,
    tuned_modules,
    use_encoders,
)
from lion_triton.generation.inputs import Model, open_model
from lion_triton.generation.latents import Condition, decode, diffuse_denoise, encode, likeliest
from lion_triton.generation.prompts import own_prompts
from lion_triton.kernels import chamfer_distance
from lion_triton.models.files import write_text
from lion_triton.models.lion import LION
from lion_triton.pictures import draw_grid
from lion_triton.progress import progress_bar
from lion_triton.runs import Run, load_model, set_damaged_aside
from lion_triton.sample import SampleArguments, resolved
from lion_triton.training import report
from lion_triton.training.batches import Batch, read
from lion_triton.training.context import Context
from lion_triton.training.loop import fit
from lion_triton.training.objectives import vae_loss

STREAM = 11  # of random numbers, and the next one; those of ``data``, ``evaluation`` and ``surface`` are 0 to 10
STRETCH = 64.0
JUDGED = 64  # held-out shapes in the figures at the end
STRENGTH = 0.2  # of the variations among these
BATCH = 32


class EncoderObjective(nn.Module):
    """The VAE's loss where it is given one cloud and has to decode another; only the encoders are its parameters.

    The published point encoder moves a point by 0.01 of what its network says: enough where the latent points are the
    cloud's own, too little to fill in half a shape in a few hundred steps. So while it is trained its last layer is in
    units STRETCH times as large; a power of 2, so that nothing is rounded.
    """

    def __init__(self, lion: LION, weights: VAETraining, training: EncoderTraining) -> None:
        super().__init__()
        self.weights, self.training_config = weights, training
        vae = lion.vae.requires_grad_(False)
        for name, module in tuned_modules(vae).items():
            self.add_module(name, module.requires_grad_(True))
        self._vae = [vae]  # in a list, so that the decoder is no part of this module
        self._scale_output(1 / STRETCH)
        vae.config = replace(vae.config, encoder_scale=STRETCH * vae.config.encoder_scale)

    def _scale_output(self, factor: float) -> None:
        (vae,) = self._vae
        with torch.no_grad():
            for parameter in vae.point_encoder.out.parameters():
                parameter[:3] *= factor  # of the coordinates' mean

    def own_state(self) -> dict[str, Tensor]:
        """The encoders' weights in the units of the run's VAE."""
        self._scale_output(STRETCH)
        state = {name: x.clone() for name, x in self.state_dict().items()}
        self._scale_output(1 / STRETCH)
        return state

    def forward(self, batch: Mapping[str, Tensor], key: Tensor, number: Tensor) -> dict[str, Tensor]:
        """``batch``: given (B, N, 3), points (B, N, 3) of the clean shapes."""
        (vae,), weights = self._vae, self.weights
        loss = vae_loss(
            vae,
            batch["given"],
            key,
            target=batch["points"],
            kl_coefficient=weights.kl_end,
            lambda_z=weights.lambda_z,
            lambda_h=weights.lambda_h,
            reconstruction=self.training_config.reconstruction,
            occupancy_weight=weights.occupancy_weight,
        )
        return {f.name: getattr(loss, f.name) for f in fields(loss)}


class DegradedStream(Dataset[tuple[Tensor, Tensor]]):
    """The clouds of a stream, each with what is given of its shape; the stream's seed and the number decide both."""

    def __init__(self, stream: TrainingStream, training: EncoderTraining) -> None:
        self.stream, self.training = stream, training

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, i: int) -> tuple[Float32[Tensor, "N 3"], Float32[Tensor, "N 3"]]:
        stream = self.stream
        points, _, shape = stream[i]
        rng = np.random.default_rng((stream.seed, STREAM, i))
        given, _ = degrade(stream.clouds[shape], stream.num_points, self.training, rng)
        return points, torch.from_numpy(stream.normalization.apply(given))


def train_encoders(run: Run, training: EncoderTraining, accelerator: Accelerator) -> None:
    """Fine-tune the encoders of a trained run for ``training.input``; the same call continues a stopped one.

    Writes RUN/encoders/INPUT/: config.json, metrics.jsonl, tensorboard/, samples/ and checkpoints/ as a run's own, and
    at the end figures.json and overview.png of held-out shapes. Batches and noise depend on the run's seed and the step
    alone, so that a continued training equals an unbroken one.

    Raises:
        ValueError: options out of range, no trained priors, other settings than before, a damaged checkpoint, a loss
            that is not finite.
    """
    check_encoder(training)
    if training.batch_size % accelerator.num_processes:
        processes = accelerator.num_processes
        raise ValueError(
            f"encoder.batch-size: expected a multiple of the {processes} processes, got {training.batch_size}"
        )
    newest = run.checkpoint()
    name = None if newest is None else newest.name
    lion, sources = load_model(run, name), load_sources(run.config.data, JUDGED)
    part = part_name(training.input)
    started = EncoderRun.open(run, part) is not None
    accelerator.wait_for_everyone()  # all have looked
    if not started and accelerator.is_main_process:
        EncoderRun.create(run, part, name, training=training, place=Place.of(sources.train))
    accelerator.wait_for_everyone()
    encoders = EncoderRun.open(run, part)
    assert encoders is not None
    encoders.check_same_settings(training, "encoder.")
    if encoders.finished:
        accelerator.print(f"{encoders.folder} is trained to the end, in {training.steps} steps")
        return
    with accelerator.main_process_first():
        checkpoint = set_damaged_aside(encoders.run)
    if checkpoint is not None:
        load_tuned(lion.vae, checkpoint.model, encoders)
        accelerator.print(f"continuing {encoders.folder}: {checkpoint.step} steps are done")
    context = Context(encoders.run, sources, accelerator, lion.to(accelerator.device))
    data, size = run.config.data, training.batch_size
    total = training.steps * size
    stream = TrainingStream(sources.train, run.normalization, data.num_points, total, run.config.seed, data.draw_from)

    def batches(start: int) -> Iterator[Batch]:
        numbers = [context.share(range(step * size, (step + 1) * size)) for step in range(start, training.steps)]
        for points, given in read(DegradedStream(stream, training), numbers, data.workers):
            yield {"points": points, "given": given}

    def clouds(step: int) -> list[str]:
        return [sources.train.names[stream.shape(i)] for i in range(step * size, (step + 1) * size)]

    objective = EncoderObjective(lion, run.config.vae, training)
    with context.stop.listening():
        fit(
            context,
            "encoder",
            objective,
            training,
            batches,
            clouds,
            checkpoint,
            title="stage 3, encoders",
            state=objective.own_state,
        )
    if accelerator.is_main_process:
        _finish(open_model(run.folder, name), encoders, sources.held_out)


@dataclass(frozen=True)
class _Judged:
    """Held-out shapes, twice with other points, and what is given of them, in the model's units."""

    shapes: Float32[Tensor, "K N 3"]
    again: Float32[Tensor, "K N 3"]
    given: Float32[Tensor, "K N 3"]
    grids: list[VoxelGrid] | None
    labels: Tensor | None
    clip: Tensor | None

    @classmethod
    def of(cls, clouds: Clouds, model: Model, training: EncoderTraining) -> _Judged:
        normalization, count = model.run.normalization, model.run.config.data.num_points
        chosen = in_turn(clouds.labels)[:JUDGED]
        shapes, again, given, grids = [], [], [], []
        for i in chosen:
            rng = np.random.default_rng((model.run.config.seed, STREAM + 1, i))
            points, grid = degrade(clouds[i], count, training, rng)
            shapes.append(draw(normalization.apply(clouds[i]), count, rng))
            again.append(draw(normalization.apply(clouds[i]), count, rng))
            given.append(normalization.apply(points))
            if grid is not None:
                grids.append(grid.moved(*normalization.center_and_scale(points.astype(np.float32))))
        whole, other, degraded = (torch.from_numpy(np.stack(x)) for x in (shapes, again, given))
        labels = torch.from_numpy(clouds.labels[chosen]) if model.conditional else None
        clip = _likeliest_embeddings(model, whole) if model.by_words else None
        return cls(whole, other, degraded, grids or None, labels, clip)

    def condition(self, part: slice, device: torch.device) -> Condition:
        """What the priors are told of some of the shapes."""
        labels, clip = (None if x is None else x[part].to(device) for x in (self.labels, self.clip))
        return Condition(labels, clip)

    def figures(self, model: Model, clouds: list[Float32[Tensor, "K N 3"]]) -> dict[str, float]:
        """Of draws of clouds made of what is given; distances in data units where these are known."""
        invert = model.run.normalization.invert
        target, made = invert(self.shapes), [invert(x) for x in clouds]
        found = {"chamfer": float(np.mean([chamfer_distance(x, target).mean().item() for x in made]))}
        if len(made) > 1:
            found["diversity"] = chamfer_distance(made[0], made[1]).mean().item()
        if self.grids is None:
            found["from_given"] = float(np.mean([from_given(invert(self.given.numpy()), x.numpy()) for x in made]))
        else:
            pairs = [(grid, cloud) for x in clouds for grid, cloud in zip(self.grids, x.numpy(), strict=True)]
            found["voxel_iou"] = float(np.mean([grid.iou(cloud) for grid, cloud in pairs]))
        return found


@torch.no_grad()
def _likeliest_embeddings(model: Model, shapes: Float32[Tensor, "K N 3"]) -> Float32[Tensor, "K 512"]:
    """Of those that the run keeps, for a shape each, as ``vary`` takes them."""
    own = own_prompts(model.run)
    with model.autocast():
        z = encode(model.lion, shapes.to(model.device)).z
        chosen = likeliest(model.lion, z, [model.condition(None, prompt) for prompt in own])
    return torch.from_numpy(own.embeddings[chosen.cpu().numpy()]).float()


def _finish(model: Model, encoders: EncoderRun, held_out: Clouds) -> None:
    """Judge what is made of degraded held-out shapes, with the run's own encoders and with the tuned ones, and draw it.

    model: that of the run; it gets the tuned encoders.
    """
    training, normalization = encoders.training, model.run.normalization
    judged = _Judged.of(held_out, model, training)
    rows, results = {"given": judged.given}, {"given": judged.figures(model, [judged.given])}
    results["shape"] = judged.figures(model, [judged.again])  # what so many points of the very shape have
    for which in ("untuned", "tuned"):
        if which == "tuned":
            use_encoders(model.lion.vae, encoders)
        rebuilt, *varied = _make(model, judged, which)
        results[f"{which}_rebuilt"] = judged.figures(model, [rebuilt])
        results[f"{which}_varied"] = judged.figures(model, varied)
        rows |= {f"{which}, rebuilt": rebuilt, f"{which}, varied": varied[0]}
    rows["shape"] = judged.shapes
    record = {"input": training.input, "held_out_shapes": len(judged.shapes), "strength": STRENGTH, **results}
    write_text(encoders.folder / "figures.json", json.dumps(record, indent=2) + "\n")
    shown = [(title, normalization.invert(x[: report.SHOWN].numpy())) for title, x in rows.items()]
    draw_grid(shown, encoders.folder / "overview.png")
    print(f"{len(judged.shapes)} held-out shapes, input {training.input}; varied: strength {STRENGTH}")
    for title, figures in results.items():
        words = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())
        print(f"  {title.replace('_', ', '):17} {words}")
    print(f"picture: {encoders.folder / 'overview.png'}")


@torch.no_grad()
def _make(model: Model, judged: _Judged, title: str) -> list[Float32[Tensor, "K N 3"]]:
    """Of what is given: the reconstructions, and two draws of variations."""
    settings = resolved(model.run, SampleArguments(model.run.folder, sampler="ddim"))
    made: list[list[Tensor]] = [[], [], []]
    generator = torch.Generator().manual_seed(model.run.config.seed)
    parts = range(0, len(judged.given), BATCH)
    with progress_bar(f"varying, {title}", 2 * len(parts)) as begin, model.autocast():
        for start in parts:
            part = slice(start, start + BATCH)
            latents, told = (
                encode(model.lion, judged.given[part].to(model.device), start),
                judged.condition(part, model.device),
            )
            made[0].append(decode(model.lion, latents).cpu())
            for row in made[1:]:
                found = diffuse_denoise(model.lion, latents, settings, told, STRENGTH, "nothing", generator, begin())
                row.append(decode(model.lion, found).cpu())
    return [torch.cat(row) for row in made]
