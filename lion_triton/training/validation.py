"""What a stage is for, measured while it trains on shapes that it does not learn from.

Shapes, times, noises and keys are the same in every measurement, so that a curve moves by what the weights do: a trend
shows long before it is as large as what other shapes would have changed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from lion_triton.config import Optimization, VAETraining
from lion_triton.data.clouds import Normalization
from lion_triton.devices import autocast
from lion_triton.diffusion import diffusion_loss
from lion_triton.kernels import chamfer_distance, normal_noise, pairwise_chamfer
from lion_triton.models.lion import LION, Posterior, posterior
from lion_triton.models.priors import CLIP_DIM
from lion_triton.runs import Stage
from lion_triton.sample import SampleArguments, generate
from lion_triton.training import report
from lion_triton.training.context import Context
from lion_triton.training.curve import PARTS, PREFIX, Curve
from lion_triton.training.log import Log
from lion_triton.training.objectives import VAEObjective

PERTURBATION = 0.1  # of the latents' standard deviations: generated ones are off by about so much, see surface.config
SAMPLE_EVERY, SAMPLE_STEPS = 10, 25  # measurements; steps of DDIM

Measure = Callable[[bool], dict[str, float]]  # its argument: whether to generate shapes, too


@torch.no_grad()
def vae_figures(
    objective: VAEObjective, lion: LION, clouds: Float[Tensor, "K N 3"], normalization: Normalization
) -> dict[str, float]:
    """Of a VAE, on normalised clouds: its losses with the KL coefficient that the stage ends with, and how far what it
    decodes lies from shapes.

    ``chamfer``: distance of reconstructions to their clouds, in data units, squared. ``chamfer_perturbed`` and
    ``chamfer_normal``: distance to the nearest of the clouds of what is decoded from latents with a little noise, a
    tenth of each channel's standard deviation, and from latents of the standard normal prior.
    """
    device = clouds.device
    key, steps = torch.tensor([0, 0], device=device), torch.tensor(objective.training_config.steps, device=device)
    losses = objective.forward({"points": clouds}, key, steps)
    latents = lion.encode(clouds, generator=torch.Generator().manual_seed(0))
    noise = [normal_noise(x.shape, key + i) for i, x in enumerate(latents, 1)]
    perturbed = [x + PERTURBATION * x.flatten(0, -2).std(0) * e for x, e in zip(latents, noise, strict=True)]
    shapes = normalization.invert(clouds)
    rebuilt, near, normal = (normalization.invert(lion.decode(h, z).float()) for h, z in (latents, perturbed, noise))
    figures = {name: losses[name] for name in ("loss", "reconstruction", "kl_z", "kl_h_xyz", "kl_h_feature")} | {
        "chamfer": chamfer_distance(rebuilt, shapes).mean(),
        "chamfer_perturbed": pairwise_chamfer(near, shapes).min(1).values.mean(),
        "chamfer_normal": pairwise_chamfer(normal, shapes).min(1).values.mean(),
    }
    return {name: value.item() for name, value in figures.items()}


@torch.no_grad()
def prior_figures(lion: LION, latents: Posterior, labels: Int[Tensor, " K"] | None) -> dict[str, float]:
    """Of both priors: the denoising errors that they are trained on.

    ``shape`` and ``point``: means over clouds and times, ``loss`` their sum. ``shape_1`` to ``shape_4`` and ``point_1``
    to ``point_4``: over the times of one quarter of the schedule, the least noise first; in each every cloud has one
    time, evenly spaced from cloud to cloud. Priors that are conditioned on CLIP are told no words.
    """
    config, schedule, device = lion.config.diffusion, lion.schedule, latents.z.device
    common = (config.prediction, config.weight, config.variance)
    z = (latents.z - lion.z_mean) / lion.z_std
    h = (latents.h_mu - lion.h_mean) / lion.h_std, latents.h_log_sigma - lion.h_std.log()
    clip = z.new_zeros(len(z), CLIP_DIM) if lion.config.shape_prior.clip else None
    fractions = (torch.arange(len(z), device=device) + 0.5) / len(z)
    figures = dict[str, float]()
    for number, part in enumerate(PARTS):
        t = ((number + fractions) / len(PARTS) * schedule.num_train_timesteps).long() + 1
        keys = [torch.tensor([1, 2 * number + i], device=device) for i in range(2)]
        shape = diffusion_loss(lambda x, t: lion.shape_prior(x, t, clip, labels), z, t, schedule, keys[0], *common)
        point = diffusion_loss(lambda x, t: lion.point_prior(x, t, z, clip, labels), h, t, schedule, keys[1], *common)
        figures |= {f"shape_{part}": shape.mean().item(), f"point_{part}": point.mean().item()}
    means = {name: sum(figures[f"{name}_{part}"] for part in PARTS) / len(PARTS) for name in ("shape", "point")}
    return {"loss": means["shape"] + means["point"], **means, **figures}


def sample_figures(context: Context, clouds: Float[Tensor, "K N 3"], labels: Int[Tensor, " K"]) -> dict[str, float]:
    """1-NNA by Chamfer distance, thickness and unevenness of as many generated clouds of the same classes, against
    ``clouds``."""
    run = context.run
    args = SampleArguments(run.folder, num_samples=len(clouds), sampler="ddim", steps=SAMPLE_STEPS)
    known = labels if run.config.model.shape_prior.num_classes else torch.full_like(labels, -1)
    made = generate(run, context.lion, args, known.cpu().numpy(), title="measuring")
    sets, references = {"generated": run.normalization.invert(made)}, run.normalization.invert(clouds.cpu().numpy())
    surfaces = report.surfaces(sets, references)
    return {
        "1nna_cd": report.one_nna(sets, references)["generated"],
        **{measure: surfaces[f"{measure}_generated"] for measure in ("thickness", "unevenness")},
    }


def vae_measure(context: Context, objective: VAEObjective) -> Measure | None:
    """``vae_figures`` of the run's validation shapes; None of a run that is not watched."""
    if not context.watched:
        return None
    shapes, _ = context.validation()

    def measure(_: bool) -> dict[str, float]:
        with autocast(context.config.mixed_precision, context.device):
            return vae_figures(objective, context.lion, shapes, context.run.normalization)

    return measure


def prior_measure(context: Context, averaged_weights: Callable[[], AbstractContextManager[None]]) -> Measure | None:
    """``prior_figures`` of the run's validation shapes, and now and then ``sample_figures``; None of a run that is not
    watched, or whose priors know nothing without words. ``averaged_weights``: within it the priors have these."""
    lion = context.lion
    if not context.watched or (lion.config.shape_prior.clip and not context.config.priors.drop_condition):
        return None
    shapes, labels = context.validation()
    with autocast(context.config.mixed_precision, context.device):
        latents = posterior(lion.vae, shapes, torch.tensor([2, 0], device=context.device))

    def measure(sampled: bool) -> dict[str, float]:
        with averaged_weights():
            with autocast(context.config.mixed_precision, context.device):
                figures = prior_figures(lion, latents, labels if lion.config.shape_prior.num_classes else None)
            return figures | (sample_figures(context, shapes, labels) if sampled else {})

    return measure


class Watch:
    """Measures a stage every so many steps, tells what is the best so far, and when patience is at its end.

    All processes call it, one measures, and all know the same.
    """

    def __init__(
        self,
        context: Context,
        stage: Stage,
        training: Optimization,
        start: int,
        measure: Measure,
    ) -> None:
        self.context, self.steps, self.measure = context, training.steps, measure
        settled = 0
        if isinstance(training, VAETraining) and training.kl_start != training.kl_end:
            settled = round(training.kl_anneal * training.steps)
        self.curve = Curve.read(context.run, stage, start, settled)

    def missed(self, start: int) -> bool:
        """Whether it should have been measured after ``start`` steps, where the run was stopped."""
        due = start % self.context.config.validate_every == 0 or start == self.steps
        return due and start > 0 and start not in self.curve.steps

    def __call__(self, done: int, total_step: int, log: Log | None) -> None:
        """Measure after ``done`` steps of the stage."""
        curve, accelerator = self.curve, self.context.accelerator
        found: list[Any] = [None]
        if accelerator.is_main_process:
            found = [self.measure((len(curve.steps) + 1) % SAMPLE_EVERY == 0 or done == self.steps)]
        (figures,) = broadcast_object_list(found)
        verdict = curve.verdict()
        curve.add(done, figures)
        if log is not None:
            log.write(curve.stage, done, total_step, {f"{PREFIX}{name}": x for name, x in figures.items()})
            if curve.verdict() != verdict and done < self.steps:
                tqdm.write(curve.line())

    @property
    def ended(self) -> bool:
        """Whether the last measurements, as many as patience has, were no better than one before them."""
        patience = self.context.config.patience
        return patience is not None and self.curve.age >= patience

    def draw(self) -> None:
        if self.curve.steps:
            self.curve.draw(self.context.run.folder / f"validation-{self.curve.stage}.png")
