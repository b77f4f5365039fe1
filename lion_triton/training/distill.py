"""The stage that makes priors for few steps out of a run's: progressive distillation (Salimans and Ho 2022).

Each round trains priors that do in one step of DDIM what its teacher does in several, from the teacher's weights: that
of the first is the run's own (averaged) priors, then that of each is the round before, which takes twice as many steps
unless the configuration says otherwise. For noised latents x_t of training shapes the teacher takes its steps, and the
student is to predict the x~ with which one step ends at the same place (``diffusion.merged_steps``). The error is that
of v, which weighs the error of x_0 by SNR + 1 (ibid., section 4). The shape prior and the point prior learn side by
side, the latter given the shape latent of the posterior, as in stage 2.

    RUN/distilled/config.json              the checkpoint that the rounds began from, and how they are trained
    RUN/distilled/steps-<n>.safetensors    both priors of a round, averaged
    RUN/distilled/metrics.jsonl, tensorboard/
    RUN/distilled/checkpoints/             of the round that is under way

A file appears when its round is done.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import dacite
import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor, nn

from lion_triton import __version__
from lion_triton.config import DistillTraining, check_distill, differences
from lion_triton.diffusion import MergedSteps, Model, merged_steps, merged_v
from lion_triton.errors import one_line
from lion_triton.kernels import normal_noise, posterior_q_sample, q_sample
from lion_triton.kernels.noise import later_key
from lion_triton.models.files import save_tensors, write_text
from lion_triton.models.hub import CONFIG, DISTILLED
from lion_triton.models.lion import LION, Posterior
from lion_triton.pictures import draw_grid
from lion_triton.runs import Run, commit, load_checkpoint, load_model, set_damaged_aside
from lion_triton.sample import SampleArguments, class_labels, generate
from lion_triton.training import report
from lion_triton.training.context import Context, training_sources
from lion_triton.training.loop import fit
from lion_triton.training.objectives import latents_of, stratified
from lion_triton.training.stages import encode_all, names_of, prior_batches, training_stream
from lion_triton.training.step import KEYS_PER_STEP, Average

FIRST_STREAM = 2  # added to the run's seed, and the round to that: the order of shapes. Those before are the stages'


class DistillObjective(nn.Module):
    """One round's loss as one module; only the student's priors are its parameters.

    Args:
        student, teacher: LIONs with one VAE and the same latent statistics. Of the teacher the denoisers are called, as
            samplers call them.
        merged: the student's steps.
        clip_x0, guidance: of the teacher's predictions, as in sampling.
        shape_draws: as in ``PriorTraining``.
    """

    times: Tensor
    coefficients: Tensor

    def __init__(
        self,
        student: LION,
        teacher: LION,
        merged: MergedSteps,
        clip_x0: float | None = None,
        guidance: float = 0.0,
        shape_draws: int = 1,
    ) -> None:
        super().__init__()
        self.shape_prior, self.point_prior = student.shape_prior, student.point_prior
        self.clip_x0, self.guidance, self.shape_draws = clip_x0, guidance, shape_draws
        self._teacher = [teacher]  # in a list, so that it is no part of this module
        self.register_buffer("times", merged.times, persistent=False)
        self.register_buffer("coefficients", merged.coefficients.float(), persistent=False)

    def train(self, mode: bool = True) -> DistillObjective:
        """Without dropout always: what is to be learned is a function, with no noise to overfit to."""
        return super().train(False)

    def forward(self, batch: Mapping[str, Tensor], key: Tensor, number: Tensor) -> dict[str, Tensor]:
        """``batch``: as that of ``PriorObjective``, with "clip" (B, 512) of a model that is conditioned on it.

        Returns the errors of v of both priors, and their sum as "loss"."""
        (teacher,) = self._teacher
        latents, key = latents_of(teacher.vae, batch, key)
        offsets = torch.special.ndtr(normal_noise((2,), key[:2]))  # as in ``prior_loss``
        z = ((latents.z - teacher.z_mean) / teacher.z_std).repeat(self.shape_draws, 1)
        h = (latents.h_mu - teacher.h_mean) / teacher.h_std, latents.h_log_sigma - teacher.h_std.log()
        z_key, h_key = later_key(key, 1), later_key(key, 2)
        labels, clip, given = batch.get("labels"), batch.get("clip"), z[: len(h[0])]
        many_labels = None if labels is None else labels.repeat(self.shape_draws)
        many_clips = None if clip is None else clip.repeat(self.shape_draws, 1)
        shape = self._error(
            lambda z_t, t: self.shape_prior(z_t, t, many_clips, many_labels),
            teacher.shape_denoiser(many_labels, many_clips, self.guidance),
            lambda alpha, sigma: q_sample(z, alpha, sigma, z_key),
            stratified(torch.arange(len(z), device=z.device), len(z), len(self.times), offsets[1]),
        )
        point = self._error(
            lambda h_t, t: self.point_prior(h_t, t, given, clip, labels),
            teacher.point_denoiser(given, labels, clip, self.guidance),
            lambda alpha, sigma: posterior_q_sample(*h, alpha, sigma, h_key),
            stratified(torch.arange(len(given), device=z.device), len(given), len(self.times), offsets[0]),
        )
        return {"loss": shape + point, "shape": shape, "point": point}

    def _error(
        self, student: Model, teacher: Model, noised: Callable[[Tensor, Tensor], Tensor], index: Int[Tensor, " B"]
    ) -> Tensor:
        """Mean square of v's. ``noised``: the x_t of (alpha, sigma); ``index``: from which of the student's steps."""
        times, coefficients = self.times[index], self.coefficients[index]
        x_t = noised(coefficients[:, 0, 0], coefficients[:, 0, 1])
        v = merged_v(teacher, x_t, times, coefficients, self.clip_x0)
        return (student(x_t, times[:, 0]) - v).square().mean()


def distill(run: Run, training: DistillTraining, accelerator: Accelerator) -> LION:
    """Distil a trained run's priors, round by round; the same call goes on with a stopped one, and changes no bit.

    In one process. Returns the run's LION with all that is kept.

    Raises:
        ValueError: no trained priors, a model that predicts eps, other settings or another checkpoint than before, a
            damaged file, a loss that is not finite.
    """
    check_distill(training, run.config)
    checkpoint, folder = trained_priors(run), run.folder / DISTILLED
    begin(folder, training, checkpoint)
    lion = load_model(run, checkpoint).to(accelerator.device)
    if {str(steps) for steps in training.counts} <= set(lion.distilled):
        print(f"{folder}: all rounds are done")
        return lion
    train_rounds(run, training, accelerator, lion)
    draw(run, lion, folder / "overview.png")
    print(f"priors for {' and '.join(lion.distilled)} steps: {folder}; --steps of every command takes them")
    print(f"picture: {folder / 'overview.png'}")
    return lion


def trained_priors(run: Run) -> str:
    """The name of the run's newest checkpoint.

    Raises:
        ValueError: its priors are not trained to the end.
    """
    if run.pretrained:
        raise ValueError(f"stage: {run.folder} is a folder of save_pretrained: distil its run, and save that again")
    newest = run.checkpoint()
    checkpoint = None if newest is None else load_checkpoint(run, newest.name, with_optimizer=False)
    end = ("priors", run.config.priors.steps)
    if newest is None or checkpoint is None or (checkpoint.stage, checkpoint.step) != end:
        raise ValueError(f"stage: {run.folder} has no trained priors yet; run --stage priors first")
    return newest.name


def begin(folder: Path, training: DistillTraining, checkpoint: str) -> None:
    """Write ``config.json``, or see that what it says is the same.

    Raises:
        ValueError: it is not, or damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        folder.mkdir(exist_ok=True)
        content = {"lion_triton": __version__, "commit": commit(), "checkpoint": checkpoint}
        write_text(path, json.dumps(content | {"training": asdict(training)}, indent=2) + "\n")
        return
    try:
        content = json.loads(path.read_text())
        before = dacite.from_dict(DistillTraining, content["training"], dacite.Config(cast=[tuple], strict=True))
        lines = differences(training, before, "distill.")
        if content["checkpoint"] != checkpoint:
            lines = [f"checkpoint: {checkpoint}, was {content['checkpoint']}"]
    except Exception as error:  # whatever a damaged or foreign file makes the parsers raise
        raise ValueError(f"stage: {path} is damaged or of another version ({one_line(error)})") from None
    if lines:
        raise ValueError(f"stage: {folder} was started with another {lines[0]}: remove it to start anew")


def train_rounds(run: Run, training: DistillTraining, accelerator: Accelerator, lion: LION) -> None:
    """All rounds that are not done; ``lion`` has those that are, and gets the others."""
    sources = training_sources(run.config)
    if run.classes != sources.train.classes:
        raise ValueError(f"data.source: {run.folder} was trained with the classes {', '.join(run.classes)}, got others")
    part = replace(run, folder=run.folder / DISTILLED)
    context = Context(part, sources, accelerator, lion.requires_grad_(False))
    draws = run.config.priors.cached_draws
    teachers = (training.teacher_steps, *training.counts)
    with context.stop.listening():
        cache = encode_all(context, draws) if draws else None
        for number, (before, steps) in enumerate(zip(teachers, training.counts, strict=False)):
            if str(steps) not in lion.distilled:
                train_round(context, training, number, before // steps, cache)


def train_round(
    context: Context, training: DistillTraining, number: int, substeps: int, cache: Posterior | None
) -> None:
    """Add the priors of round ``number`` to the context's LION, and write their file. ``substeps``: of their teacher,
    in each of their steps."""
    part, config, lion, steps = context.run, context.config, context.lion, training.counts[number]
    settings = replace(
        config.priors,
        steps=training.steps,
        batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        learning_rate_decay="cosine",
    )
    guidance = config.sampling.guidance if training.guidance is None else training.guidance
    teacher = lion.few_step(training.counts[number - 1], guidance=guidance) if number else lion
    student = lion.add_distilled(steps, teacher, guidance)
    merged = merged_steps(lion.schedule, steps, substeps, student.spacing)
    objective = DistillObjective(student, teacher, merged, config.sampling.clip_x0, guidance, settings.shape_draws)
    objective.to(context.device).requires_grad_(True)
    average = Average(objective, settings.ema_decay)
    before = number * training.steps
    checkpoint, newest = set_damaged_aside(part), part.checkpoint()
    if checkpoint is not None and newest is not None:
        if newest.name == f"step-{before + checkpoint.step:08d}":
            objective.load_state_dict(checkpoint.model)
            print(f"continuing the priors for {steps} steps: {checkpoint.step} steps are done")
        else:  # of a round before, whose file is there
            checkpoint = None
    stream = training_stream(context, settings, config.seed + FIRST_STREAM + number)
    fit(
        context,
        "distill",
        objective,
        settings,
        lambda start: prior_batches(context, settings, stream, cache, start),
        names_of(context, stream, settings),
        checkpoint,
        title=f"priors for {steps} steps",
        before=before,
        # The noise goes on where that of stage 2 ends.
        key=later_key(context.key("priors", settings.batch_size), KEYS_PER_STEP * (config.priors.steps + before)),
        average=average,
        state=objective.state_dict,
    )
    objective.load_state_dict(average.state_dict())
    objective.requires_grad_(False)
    save_tensors(lion.distilled[str(steps)].state_dict(), part.folder / file_name(steps))
    shutil.rmtree(part.folder / "checkpoints")


def file_name(steps: int) -> str:
    return f"steps-{steps}.safetensors"


def draw(run: Run, lion: LION, path: Path) -> None:
    """What the run's own way of sampling makes of some noise, and what few steps make of it."""
    rows = []
    for steps in (None, *lion.distilled_steps):
        options = SampleArguments(run.folder, num_samples=report.SHOWN)
        if steps is not None:
            options = replace(options, sampler="ddim", eta=0.0, steps=steps, guidance=lion.distilled_steps[steps])
        clouds = generate(run, lion, options, class_labels(run, options))
        title = "as trained" if steps is None else f"{steps} steps" if steps > 1 else "1 step"
        rows.append((title, run.normalization.invert(clouds)))
    draw_grid(rows, path)
