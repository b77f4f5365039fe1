"""What a training run is made of, and the presets.

A preset is a function that returns a whole :class:`TrainConfig`; the command line may override its leaves.
The networks' own sizes live beside the networks, in ``lion_triton.models``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

import dacite
import tyro

from lion_triton.data.degraded import MOST_KEPT, InputKind
from lion_triton.data.sources import DataConfig
from lion_triton.models.attention import AttentionKind
from lion_triton.models.lion import DiffusionConfig, LIONConfig
from lion_triton.models.plan import SetAbstractionGeometry
from lion_triton.models.priors import PointPriorConfig, ShapePriorConfig, TransformerConfig
from lion_triton.models.unet import Convolutions, DownLevel, UNetConfig, UpLevel, published_unet
from lion_triton.models.vae import VAEConfig, published_vae


@dataclass(frozen=True)
class ReconstructionWeights:
    """Weights of the reconstruction terms; each is a sum over the cloud's points (L1, L2: and coordinates).

    Attributes:
        l1: of the absolute differences.
        l2: of their squares.
        chamfer: of the Chamfer distance, squared.
        emd: of the earth mover's distance, by approximate matching.
    """

    l1: float = 1.0
    l2: float = 0.0
    chamfer: float = 0.0
    emd: float = 0.0


@dataclass(frozen=True)
class Optimization:
    """How the weights of a stage are learned, by Adam.

    Attributes:
        steps: updates of the weights.
        batch_size: clouds in each.
        learning_rate: at the start.
        learning_rate_decay: by a cosine to 0 at the last step, or not at all.
        betas: decay of the averages of gradients and of their squares.
        max_grad_norm: cut all gradients together to this length; default: never.
    """

    steps: int = 100_000
    batch_size: int = 32
    learning_rate: float = 1e-3
    learning_rate_decay: Literal["constant", "cosine"] = "constant"
    betas: tuple[float, float] = (0.9, 0.99)
    max_grad_norm: float | None = None


@dataclass(frozen=True)
class VAETraining(Optimization):
    """Stage 1: the hierarchical VAE. Weights are per cloud, see ``lion_triton.training.objectives``.

    Attributes:
        lambda_z: weight of the KL of the shape latent.
        lambda_h: weight of the KL of the latent points.
        kl_start: what both are multiplied by at the first step.
        kl_end: the same once they have risen.
        kl_anneal: share of the steps in which they rise, linearly.
        occupancy_weight: of the occupancy head's cross-entropy, in a VAE that has one.
    """

    reconstruction: ReconstructionWeights = field(default_factory=ReconstructionWeights)
    lambda_z: float = 1 / 32
    lambda_h: float = 1 / 32
    kl_start: float = 1e-7
    kl_end: float = 0.5
    kl_anneal: float = 0.5
    occupancy_weight: float = 0.0


@dataclass(frozen=True)
class PriorTraining(Optimization):
    """Stage 2: both priors together on the frozen VAE's latents.

    Attributes:
        ema_decay: of the averaged weights, which sample.
        standardize: scale the latents to unit variance first; the published priors take them as they are.
        cached_draws: encode so many random draws of points of every shape once, and train on these; 0: encode anew in
            every step, as published.
        shape_draws: noisy copies of each shape latent per step; its denoiser is far cheaper than that of the points, so
            a short run can afford several.
        drop_condition: share of the clouds whose class or embedding is withheld, so that the priors can be guided by
            it (classifier-free guidance).
    """

    batch_size: int = 160
    learning_rate: float = 2e-4
    ema_decay: float = 0.9999
    standardize: bool = False
    cached_draws: int = 0
    shape_draws: int = 1
    drop_condition: float = 0.0


@dataclass(frozen=True)
class DistillTraining:
    """The stage that makes priors for few steps out of a run's, in rounds of which each learns from the one before.

    Attributes:
        teacher_steps: of DDIM, by the run's own priors, for the first round to learn from.
        guidance: w of classifier-free guidance of these, which all rounds learn; default as the run samples.
        counts: steps of DDIM that each round's priors take, each a divisor of the one before, the first one of
            the teacher's, see --distill.teacher-steps.
        steps: of training in each round.
        batch_size: clouds in each.
        learning_rate: at the start of each round, from where it falls to 0 by a cosine. All else is as in the training
            of the priors.
    """

    teacher_steps: int = 64
    guidance: float | None = None
    counts: tuple[int, ...] = (8, 4, 2, 1)
    steps: int = 10_000
    batch_size: int = 32
    learning_rate: float = 2e-4


@dataclass(frozen=True)
class EncoderTraining(Optimization):
    """The stage ``encoder``: the encoders of a trained run learn to take degraded shapes for whole ones.

    Attributes:
        input: what they are given: a coarse grid of voxels, noisy points, or a part of a shape.
        resolution: voxels along a shape's longest side.
        noise: largest standard deviation of the noise, in shares of a shape's longest side.
        kept: least share of its points in a part of a shape.
        reconstruction: of the clean shape. Its points go with none of those given, so the terms compare sets; the KLs
            weigh what they weigh in the run's own stage 1.
    """

    input: InputKind = "voxels"
    resolution: int = 16
    noise: float = 0.05
    kept: float = 0.5
    steps: int = 300
    batch_size: int = 16
    learning_rate: float = 2e-3
    learning_rate_decay: Literal["constant", "cosine"] = "cosine"
    reconstruction: ReconstructionWeights = field(
        default_factory=lambda: ReconstructionWeights(l1=0.0, chamfer=20.0, emd=2.0)
    )


@dataclass(frozen=True)
class SamplingConfig:
    """How the run samples for its pictures and its final figures; also the default of ``lion_triton.sample``.

    Attributes:
        sampler: ancestral (ddpm), DDIM, or the probability-flow ODE.
        steps: network evaluations per prior; default: 50 of ddim, as many as the schedule has of ddpm. Not of ode.
        eta: DDIM's stochasticity, 0 to 1.
        clip_x0: clamp each prediction of the clean latents, which have unit variance, to so much either way; default:
            do not.
        guidance: w of classifier-free guidance by class or CLIP embedding, 0 for none.
    """

    sampler: Literal["ddpm", "ddim", "ode"] = "ddpm"
    steps: int | None = None
    eta: float = 0.0
    clip_x0: float | None = None
    guidance: float = 0.0


@dataclass(frozen=True)
class TrainConfig:
    """A whole training run.

    Attributes:
        seed: decides initial weights, batches, noise and times.
        mixed_precision: ``auto`` is bf16 where the hardware has it natively, else float32.
        compile: torch.compile the networks' repeated blocks; ``auto``: on a GPU, if the run will last so long that this
            pays back, decided when it begins.
        init_from: a run, a folder of ``save_pretrained`` or a published checkpoint (.pt) whose weights a new run starts
            from: the VAE's, the priors' (averaged), or both, whichever fit.
        on_nonfinite: stop at a step whose loss or gradient is not finite, or skip its update (and stop after ten in a
            row).
        log_every: steps from one line of metrics to the next.
        picture_every: steps from one picture to the next; one also ends each stage.
        checkpoint_every: steps from one checkpoint to the next; one also ends each stage.
        validate_every: steps from one measurement on validation shapes to the next, by which the best checkpoint is
            chosen and kept; 0 for none. One also ends each stage.
        patience: end a stage after so many measurements in a row that were no better than an earlier one; of the VAE
            the priors are then trained on the best. Default: never.
        evaluate_shapes: clouds in the final figures (generated, and held-out).
    """

    preset: tyro.conf.Suppress[str]
    data: DataConfig
    model: tyro.conf.Suppress[LIONConfig]  # presets decide the networks, not the command line
    vae: VAETraining
    priors: PriorTraining
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    distill: DistillTraining = field(default_factory=DistillTraining)
    seed: int = 0
    init_from: str | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    log_every: int = 50
    picture_every: int = 5_000
    checkpoint_every: int = 5_000
    validate_every: int = 5_000
    patience: int | None = None
    evaluate_shapes: int = 200


def quickstart(voxels: int = 8) -> TrainConfig:
    """A small LION on the embedded furniture: minutes on two CPU cores.

    ``voxels``: a side of the grid that the point prior's points are convolved in before the coarse level.
    """
    # Much of a short training's success is the number of its steps: one coarse level, few channels in the convolutions.
    encoder_level = SetAbstractionGeometry(centers=64, radius=0.6, neighbors=12)
    coarse_level = SetAbstractionGeometry(centers=32, radius=0.8, neighbors=8)
    vae_unet = UNetConfig(
        down=(DownLevel(Convolutions(1, 32, 8), coarse_level, (64,)),),
        up=(UpLevel((64, 64, 64), Convolutions(1, 32, 8)),),
        middle_heads=4,
        head_width=64,
        dropout=0.0,
        skip="convolved",
        residual=True,
    )
    prior_unet = UNetConfig(
        down=(DownLevel(Convolutions(1, 32, voxels), coarse_level, (64,)),),
        up=(UpLevel((128, 128, 128, 128), Convolutions(1, 32, 8)),),
        middle_heads=4,
        head_width=128,
        dropout=0.0,
        skip="convolved",
        residual=True,
        moments=1.0,
    )
    classes = 5
    return TrainConfig(
        preset="quickstart",
        data=DataConfig(num_points=512, num_shapes=2000),
        model=LIONConfig(
            vae=VAEConfig(
                shape_encoder=(DownLevel(Convolutions(1, 32, 8), encoder_level, (64, 128)),),
                point_encoder=vae_unet,
                decoder=vae_unet,
                shape_dim=32,
                decoder_scale=0.1,
                occupancy_resolution=8,
            ),
            shape_prior=ShapePriorConfig(width=256, blocks=3, dropout=0.0, time_dim=64, num_classes=classes),
            point_prior=PointPriorConfig(prior_unet, num_classes=classes, class_dim=16),
            diffusion=DiffusionConfig(schedule="cosine", prediction="v"),
        ),
        vae=VAETraining(
            steps=300,
            learning_rate=2e-3,
            learning_rate_decay="cosine",
            lambda_z=0.01,
            lambda_h=0.01,
            occupancy_weight=0.2,
            kl_end=1.0,
        ),
        priors=PriorTraining(
            steps=1600,
            batch_size=32,
            learning_rate=2e-3,
            learning_rate_decay="cosine",
            max_grad_norm=1.0,
            ema_decay=0.995,
            standardize=True,
            cached_draws=4,
            shape_draws=8,
        ),
        sampling=SamplingConfig(sampler="ddim", steps=50, clip_x0=5.0),
        distill=DistillTraining(steps=300, learning_rate=1e-3),
        log_every=10,
        picture_every=1000,
        checkpoint_every=500,
        validate_every=250,
    )


def procedural() -> TrainConfig:
    """The quickstart's networks on twice as many points of more shapes, for longer: the shipped model ``furniture``."""
    base = quickstart(voxels=16)  # as the shipped weights were trained with
    return replace(
        base,
        preset="procedural",
        data=replace(base.data, num_points=1024, num_shapes=8000),
        vae=replace(base.vae, steps=900),
        priors=replace(base.priors, steps=16_000, batch_size=16, ema_decay=0.999, cached_draws=1, drop_condition=0.1),
        distill=replace(base.distill, counts=(8, 4), steps=900, batch_size=16),
        picture_every=5000,
        validate_every=300,
    )


def lion() -> TrainConfig:
    """The published single-category model and recipe, at the published ratio of reconstruction and KL."""
    return TrainConfig(
        preset="lion",
        data=DataConfig(source="ShapeNetCore.v2.PC15k", categories=("chair",), draw_from=10_000, workers=8),
        model=LIONConfig(),
        # 8000 epochs of batch 128 and 24,000 of batch 160 over the 4612 training chairs.
        vae=VAETraining(steps=290_000, batch_size=128),
        priors=PriorTraining(steps=690_000),
    )


def lion_all() -> TrainConfig:
    """The published recipe over all categories: clouds normalised by their boxes, class-conditional priors."""
    base = lion()
    classes = 55
    return replace(
        base,
        preset="lion_all",
        data=replace(base.data, categories=(), normalization="box"),
        model=LIONConfig(
            shape_prior=ShapePriorConfig(num_classes=classes),
            point_prior=PointPriorConfig(published_unet(deep_width=128), num_classes=classes),
        ),
    )


def furniture() -> TrainConfig:
    """Real meshes made ready by ``lion_triton.prepare``: the published networks, hours on one GPU."""
    base = lion()
    return replace(
        base,
        preset="furniture",
        data=DataConfig(source="data/furniture", normalization="box", workers=8),
        model=LIONConfig(
            vae=published_vae(),
            shape_prior=ShapePriorConfig(width=1024),
            diffusion=DiffusionConfig(schedule="cosine", prediction="v"),
        ),
        vae=replace(base.vae, steps=20_000, batch_size=32, lambda_z=0.01, lambda_h=0.02, kl_end=1.0),
        priors=replace(base.priors, steps=60_000, batch_size=32, ema_decay=0.999, standardize=True),
        sampling=SamplingConfig(sampler="ddim", steps=100),
        validate_every=1000,
    )


def furniture_small() -> TrainConfig:
    """The same data, by category where there are 30 objects or more, in under an hour on two CPU cores."""
    base = procedural()
    first = ("bathroom", "bedroom", "characters", "doors-and-windows", "exterior")
    categories = (*first, "kitchen", "lights", "living-room", "miscellaneous", "office")
    return replace(
        base,
        preset="furniture_small",
        data=replace(furniture().data, categories=categories, num_points=1024, workers=0),
        vae=replace(base.vae, steps=600),
        # Few shapes: many draws of their points, and fewer steps than would make the priors learn the shapes by heart.
        priors=replace(base.priors, steps=5000, cached_draws=8),
        picture_every=1000,
        validate_every=250,
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "quickstart": quickstart,
    "procedural": procedural,
    "furniture": furniture,
    "furniture_small": furniture_small,
    "lion": lion,
    "lion_all": lion_all,
}


def with_networks(config: TrainConfig, attention: AttentionKind | None, denoiser: str | None) -> TrainConfig:
    """The same run with another kind of attention in every U-Net, or another network as point denoiser."""
    model = config.model
    prior = model.point_prior
    if denoiser == "transformer" and not isinstance(prior.network, TransformerConfig):
        # Comparable in cost to the U-Net it replaces: small where that is small.
        small = prior.network.head_width < 128 or model.vae.shape_dim < 128
        prior = replace(prior, network=TransformerConfig(128, 3, 4) if small else TransformerConfig(384, 12, 6))
    if attention is not None:
        if isinstance(prior.network, UNetConfig):
            prior = replace(prior, network=replace(prior.network, attention=attention))
        vae = model.vae
        model = replace(
            model,
            vae=replace(
                vae,
                point_encoder=replace(vae.point_encoder, attention=attention),
                decoder=replace(vae.decoder, attention=attention),
            ),
        )
    return replace(config, model=replace(model, point_prior=prior))


def with_clip(config: TrainConfig) -> TrainConfig:
    """The same run with both priors conditioned on CLIP embeddings of the shapes and on no classes: words say these."""
    model = config.model
    shape_prior = replace(model.shape_prior, num_classes=0, clip=True)
    point_prior = replace(model.point_prior, num_classes=0, clip=True)
    return replace(config, model=replace(model, shape_prior=shape_prior, point_prior=point_prior))


def with_classes(config: TrainConfig, count: int) -> TrainConfig:
    """The same run for data of ``count`` classes, if its priors are class-conditional at all."""
    model = config.model
    if not model.shape_prior.num_classes:
        return config
    shape_prior = replace(model.shape_prior, num_classes=count)
    point_prior = replace(model.point_prior, num_classes=count)
    return replace(config, model=replace(model, shape_prior=shape_prior, point_prior=point_prior))


def check(config: TrainConfig) -> None:
    """Refuse what could only fail later, perhaps hours into the run.

    Raises:
        ValueError: one line, naming the option.
    """
    training: dict[str, VAETraining | PriorTraining] = {"vae": config.vae, "priors": config.priors}
    check_seed(config.seed)
    at_least = {"data.workers": (config.data.workers, 0)}
    at_least |= {f"{stage}.steps": (t.steps, 1) for stage, t in training.items()}
    at_least |= {f"{stage}.batch-size": (t.batch_size, 1) for stage, t in training.items()}
    at_least |= {name.replace("_", "-"): (getattr(config, name), 1) for name in ("log_every", "picture_every")}
    at_least |= {"checkpoint-every": (config.checkpoint_every, 1), "evaluate-shapes": (config.evaluate_shapes, 2)}
    at_least |= {"priors.cached-draws": (config.priors.cached_draws, 0)}
    at_least |= {"validate-every": (config.validate_every, 0)}
    if config.patience is not None:
        at_least |= {"patience": (config.patience, 1)}
    at_least |= {"priors.shape-draws": (config.priors.shape_draws, 1), "data.num-shapes": (config.data.num_shapes, 1)}
    for name, (value, least) in at_least.items():
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if config.patience is not None and not config.validate_every:
        raise ValueError(f"patience: counts measurements, of which validate-every 0 makes none, got {config.patience}")
    for stage, t in training.items():
        if not t.learning_rate > 0:
            raise ValueError(f"{stage}.learning-rate: expected a number above 0, got {t.learning_rate}")

    needed = fewest_points(config.model)
    if config.data.num_points < needed:
        raise ValueError(f"data.num-points: this model needs at least {needed}, got {config.data.num_points}")
    if config.model.shape_prior.clip != config.model.point_prior.clip:
        raise ValueError("clip: expected both priors to be conditioned on CLIP, or neither")
    if config.data.embeddings is not None and not config.model.shape_prior.clip:
        raise ValueError(f"data.embeddings: is for a run with --clip, got {config.data.embeddings}")
    if not 0 <= config.priors.drop_condition < 1:
        raise ValueError(f"priors.drop-condition: expected a number in [0, 1), got {config.priors.drop_condition}")
    reconstruction = config.vae.reconstruction
    if max(reconstruction.l1, reconstruction.l2, reconstruction.chamfer, reconstruction.emd) <= 0:
        raise ValueError("vae.reconstruction: expected a weight above 0, all are 0")

    check_sampling(config.sampling, config, "sampling.")


def check_seed(seed: int, option: str = "seed") -> None:
    """Raise ``ValueError`` for what some generator of random numbers does not take."""
    if not 0 <= seed < 2**31:
        raise ValueError(f"{option}: expected 0 to 2^31 - 1, got {seed}")


def check_encoder(training: EncoderTraining) -> None:
    """Refuse what the stage ``encoder`` cannot be trained with.

    Raises:
        ValueError: one line, naming the option.
    """
    for name, least in (("steps", 1), ("batch_size", 1), ("resolution", 2)):
        value = getattr(training, name)
        if value < least:
            raise ValueError(f"encoder.{name.replace('_', '-')}: expected at least {least}, got {value}")
    for name in ("learning_rate", "noise"):
        value = getattr(training, name)
        if not 0 < value < math.inf:
            raise ValueError(f"encoder.{name.replace('_', '-')}: expected a number above 0, got {value}")
    if not 0 < training.kept <= MOST_KEPT:
        raise ValueError(f"encoder.kept: expected a share above 0 and up to {MOST_KEPT}, got {training.kept}")
    terms = training.reconstruction
    if max(terms.chamfer, terms.emd) <= 0 or terms.l1 or terms.l2:
        raise ValueError("encoder.reconstruction: expected chamfer or emd above 0, and l1 and l2 0")


def check_distill(distill: DistillTraining, config: TrainConfig) -> None:
    """Refuse what the model of this run cannot be distilled with.

    Raises:
        ValueError: one line, naming the option.
    """
    diffusion = config.model.diffusion
    if diffusion.prediction != "v":
        why = "eps says nothing of x_0 at the noise where few steps begin"
        raise ValueError(f"stage: distill needs a model that predicts v, as {why}; this one predicts eps")
    for name in ("steps", "batch_size"):
        if getattr(distill, name) < 1:
            raise ValueError(f"distill.{name.replace('_', '-')}: expected at least 1, got {getattr(distill, name)}")
    if not distill.learning_rate > 0:
        raise ValueError(f"distill.learning-rate: expected a number above 0, got {distill.learning_rate}")
    if distill.guidance is not None:
        check_sampling(replace(config.sampling, guidance=distill.guidance), config, "distill.")
    T = diffusion.num_train_timesteps
    if not 1 <= distill.teacher_steps <= T:
        raise ValueError(f"distill.teacher-steps: expected 1 to {T}, got {distill.teacher_steps}")
    before = (distill.teacher_steps, *distill.counts)
    if not distill.counts or any(n < 1 or m % n or m == n for m, n in zip(before, distill.counts, strict=False)):
        got = " ".join(map(str, distill.counts)) or "none"
        what = f"divisors of distill.teacher-steps, {distill.teacher_steps}, each of the one before it"
        raise ValueError(f"distill.counts: expected {what}, got {got}")


def check_sampling(sampling: SamplingConfig, config: TrainConfig, prefix: str = "") -> None:
    """Refuse what this run's model cannot be sampled with; ``prefix`` comes before the option's name.

    Raises:
        ValueError: one line, naming the option.
    """
    diffusion = config.model.diffusion
    if sampling.steps is not None and not 1 <= sampling.steps <= diffusion.num_train_timesteps:
        raise ValueError(f"{prefix}steps: expected 1 to {diffusion.num_train_timesteps}, got {sampling.steps}")
    if not 0 <= sampling.eta <= 1:
        raise ValueError(f"{prefix}eta: expected a number in [0, 1], got {sampling.eta}")
    if sampling.clip_x0 is not None and not sampling.clip_x0 > 0:
        raise ValueError(f"{prefix}clip-x0: expected a number above 0, got {sampling.clip_x0}")
    if not 0 <= sampling.guidance < math.inf:
        raise ValueError(f"{prefix}guidance: expected a number from 0, got {sampling.guidance}")
    prior = config.model.shape_prior
    if sampling.guidance and not ((prior.num_classes or prior.clip) and config.priors.drop_condition):
        what = "a model with classes or CLIP, trained with priors.drop-condition above 0"
        raise ValueError(f"{prefix}guidance: needs {what}, got {sampling.guidance:g} for another")
    if sampling.sampler == "ode" and (diffusion.prediction, diffusion.schedule) != ("eps", "linear"):
        raise ValueError(f"{prefix}sampler: ode needs a linear schedule and prediction of eps, this model has others")


def fewest_points(model: LIONConfig) -> int:
    """How many points a cloud must have for the networks."""
    networks = [model.vae.point_encoder, model.vae.decoder, model.point_prior.network]
    centers = [n.down[0].sample.centers for n in networks if isinstance(n, UNetConfig)]
    return max([*centers, model.vae.shape_encoder[0].sample.centers])


def from_json(data: dict[str, Any]) -> TrainConfig:
    """Rebuild a config from ``dataclasses.asdict`` after a trip through JSON."""
    if isinstance(data.get("compile"), bool):  # as written up to version 0.1: whole networks, on a GPU
        data = {**data, "compile": "off"}
    return dacite.from_dict(TrainConfig, data, dacite.Config(cast=[tuple], strict=True))


def differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Where two configs differ, one line each: ``vae.steps: 350, was 400``."""
    if type(a) is type(b) and is_dataclass(a):
        return [
            line
            for f in fields(a)
            for line in differences(getattr(a, f.name), getattr(b, f.name), f"{prefix}{f.name}.")
        ]
    return [] if a == b else [f"{prefix.rstrip('.')}: {a}, was {b}"]
