"""What a run shows for itself: pictures, the final figures, and the dry run's estimates."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn

from lion_triton import metrics
from lion_triton.capture import WARM_UPS, Captured, why_uncaptured
from lion_triton.config import PriorTraining, TrainConfig, VAETraining
from lion_triton.data.sources import Sources
from lion_triton.devices import autocast, best_device, resolve_precision
from lion_triton.kernels import pairwise_chamfer
from lion_triton.models.attention import softmax_operator
from lion_triton.models.files import write_text
from lion_triton.models.lion import LION, posterior
from lion_triton.models.priors import CLIP_DIM, TransformerConfig
from lion_triton.progress import ProgressBar
from lion_triton.reconstruction import Reconstruction
from lion_triton.runs import Run, Stage
from lion_triton.training.objectives import PriorObjective, VAEObjective

SHOWN = 8  # clouds in a row of a picture


def one_nna(sets: dict[str, np.ndarray], references: np.ndarray) -> dict[str, float]:
    """1-NNA by Chamfer distance of each set of clouds against the references, all in the same units."""
    device = best_device()
    b = torch.from_numpy(references).to(device)
    within_references = pairwise_chamfer(b, b)
    figures = {}
    for name, clouds in ProgressBar(sets.items(), desc="comparing", unit="set", leave=False):
        a = torch.from_numpy(clouds).to(device)
        figures[name] = metrics.nearest_neighbor_accuracy(
            pairwise_chamfer(a, a), pairwise_chamfer(a, b), within_references
        )
    return figures


def surfaces(sets: dict[str, np.ndarray], references: np.ndarray) -> dict[str, float]:
    """``thickness_<name>`` and ``unevenness_<name>`` of each set of clouds, over those of the references."""
    figures = {}
    for measure, of in {"thickness": metrics.thickness, "unevenness": metrics.unevenness}.items():
        of_references = of(torch.from_numpy(references))
        for name, clouds in sets.items():
            figures[f"{measure}_{name}"] = metrics.ratio_of_medians(of(torch.from_numpy(clouds)), of_references)
    return figures


def gaussian_clouds(clouds: np.ndarray, seed: int = 0) -> np.ndarray:
    """The trivial generator: clouds of as many points drawn from one Gaussian with the points' mean and covariance."""
    flat = clouds.reshape(-1, 3).astype(np.float64)
    rng = np.random.default_rng(seed)
    return rng.multivariate_normal(flat.mean(0), np.cov(flat.T), clouds.shape[:2]).astype(np.float32)


def final(
    run: Run, rebuilt: Reconstruction, samples: np.ndarray, references: np.ndarray, fresh: np.ndarray | None
) -> None:
    """Print the run's figures and write them to ``RUN/figures.json``. All clouds in the same units."""
    count = len(references)
    sets = {"generated": samples, "gaussian": gaussian_clouds(references)}
    if fresh is not None:
        sets["fresh"] = fresh
    accuracies = one_nna(sets, references)
    figures: dict[str, float] = {
        "reconstruction_chamfer": rebuilt.chamfer,
        "kl_z_nats": rebuilt.kl_z,
        "active_z_dimensions": rebuilt.active_dimensions,
        **{f"1nna_cd_{name}": value for name, value in accuracies.items()},
        **surfaces(sets, references),
    }
    stages: tuple[Stage, ...] = ("vae", "priors")
    best = {stage: found.name for stage in stages if (found := run.best(stage)) is not None}
    record = {"held_out_shapes": count, "points": int(references.shape[1]), **figures, "best_checkpoints": best}
    write_text(run.folder / "figures.json", json.dumps(record, indent=2) + "\n")

    unit = "data units" if run.normalization.kind == "global" else f"units of the normalised {run.normalization.kind}"
    dims = run.config.model.vae.shape_dim
    print(f"\nOn {count} held-out shapes of {references.shape[1]} points:")
    print(f"  reconstruction Chamfer distance   {figures['reconstruction_chamfer']:.5f} ({unit}, squared)")
    used = f"{rebuilt.active_dimensions} of {dims} dimensions used"
    print(f"  KL of the shape latent z0         {rebuilt.kl_z:.1f} nats, {used}")
    print("  1-NNA by Chamfer distance (0.5 is best: nobody can tell generated from held-out; 1.0 is worst)")
    print(f"    generated shapes                {figures['1nna_cd_generated']:.3f}")
    if fresh is not None:
        print(f"    fresh shapes of the generator   {figures['1nna_cd_fresh']:.3f}")
    print(f"    Gaussian clouds                 {figures['1nna_cd_gaussian']:.3f}")
    for measure, of in {"thickness": "surfaces", "unevenness": "points"}.items():
        floor = "" if fresh is None else f", fresh shapes {figures[f'{measure}_fresh']:.2f}"
        value = figures[f"{measure}_generated"]
        print(f"  {f'{measure} of {of}':<34}{value:.2f} (held-out shapes 1{floor})")
    if rebuilt.kl_z < 1.0:
        print("  The shape latent has collapsed (KL below 1 nat): lower vae.lambda-z or raise vae.lambda-h.")
    print(f"  pictures: {run.samples / 'overview.png'} and beside it; figures: {run.folder / 'figures.json'}")


def dry_run(config: TrainConfig, sources: Sources) -> None:
    """Print what the run would cost: data, parameters, memory and time, the latter two measured on small steps."""
    device = best_device()
    lion = LION(config.model).to(device)
    precision = resolve_precision(config.mixed_precision, device)
    print(f"preset {config.preset} on {device} ({torch.get_num_threads()} CPU threads), precision {precision}")
    print(
        f"data: {len(sources.train)} training shapes, {len(sources.held_out)} held out, {config.data.num_points} points"
    )
    parts = {"VAE": lion.vae, "shape prior": lion.shape_prior, "point prior": lion.point_prior}
    for name, module in parts.items():
        print(f"  {name:<12} {sum(p.numel() for p in module.parameters()) / 1e6:8.2f} M parameters")
    attention = _softmax_operator(config, device, precision)
    if attention:
        print(f"softmax attention by {attention}")
    total = 0.0
    for stage, training in _stages(config).items():
        cost = _measure(lion, config, stage, device)
        seconds = cost.seconds_per_cloud * training.batch_size
        weights = parts["VAE"] if stage == "vae" else nn.ModuleList([lion.shape_prior, lion.point_prior])
        # Weights, gradients, two moments of Adam; the priors also have their average.
        copies = 4 if stage == "vae" else 5
        size: float = copies * sum(p.numel() * p.element_size() for p in weights.parameters())
        size += cost.activation_bytes_per_cloud * training.batch_size
        if stage == "priors":
            size += sum(p.numel() * p.element_size() for p in lion.vae.parameters())
            point = config.data.num_points * 2 * config.model.vae.point_dim
            size += 4 * config.priors.cached_draws * len(sources.train) * (config.model.vae.shape_dim + point)
        total += seconds * training.steps
        print(
            f"stage {stage}: {training.steps} steps of {training.batch_size} shapes, about {seconds:.2f} s each, "
            f"{duration(seconds * training.steps)} in all; about {size / 2**30:.1f} GiB"
        )
    print(f"time in all: about {duration(total)} on this machine, pictures and final figures not counted")


@dataclass(frozen=True)
class _Cost:
    seconds_per_cloud: float
    activation_bytes_per_cloud: float


def _stages(config: TrainConfig) -> dict[Stage, VAETraining | PriorTraining]:
    return {"vae": config.vae, "priors": config.priors}


def predicted_seconds(lion: LION, config: TrainConfig) -> float:
    """How long the steps of both stages will take on the device of ``lion``, measured on a few of them."""
    device = lion.z_mean.device
    costs = {stage: _measure(lion, config, stage, device).seconds_per_cloud for stage in _stages(config)}
    return sum(costs[stage] * training.batch_size * training.steps for stage, training in _stages(config).items())


def _measure(lion: LION, config: TrainConfig, stage: Stage, device: torch.device) -> _Cost:
    """Time one training step, after those to warm up, and add up what it keeps for its backward pass."""
    size = min(config.vae.batch_size, config.priors.batch_size, 32 if device.type == "cuda" else 4)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    key, number = torch.tensor([0, 0], device=device), torch.tensor(0, device=device)
    batch = {"points": torch.randn(size, config.data.num_points, 3, device=device)}
    objective: nn.Module = VAEObjective(lion, config.vae)
    if stage == "priors":
        objective = PriorObjective(lion, config.priors)
        if config.priors.cached_draws:
            with autocast(config.mixed_precision, device):
                latents = posterior(lion.vae, batch["points"], key)
            batch = {f.name: getattr(latents, f.name) for f in fields(latents)}
        if config.model.shape_prior.num_classes:
            batch["labels"] = torch.zeros(size, dtype=torch.int64, device=device)
        if config.model.shape_prior.clip:
            batch["clip"] = torch.ones(size, CLIP_DIM, device=device)

    def step() -> None:
        lion.zero_grad()
        with autocast(config.mixed_precision, device):
            loss = objective(batch, key, number)["loss"]
        loss.backward()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        step()
    captured = Captured(step, f"the step of stage {stage}", not why_uncaptured(device))
    elapsed = 0.0
    for _ in range(WARM_UPS + 2 if captured.enabled else 1):
        start = time.perf_counter()
        captured()
        if device.type == "cuda":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
    lion.zero_grad()
    weights = sum(p.numel() * p.element_size() for p in lion.parameters())
    return _Cost(elapsed / size, max(sum(kept.values()) - weights, 0) / size)


def _softmax_operator(config: TrainConfig, device: torch.device, precision: str) -> str:
    """Whose kernels compute the model's softmax attention, "" if it has none."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    network, vae = config.model.point_prior.network, config.model.vae
    for unet in (network, vae.point_encoder, vae.decoder):
        if isinstance(unet, TransformerConfig):
            heads, dim, points = unet.heads, unet.width // unet.heads, config.data.num_points
        elif unet.attention == "softmax":
            heads, dim, points = unet.middle_heads, unet.middle_head_dim, unet.down[-1].sample.centers
        else:
            continue
        qkv = torch.empty(1, points, 3, heads, dim, device=device, dtype=dtype, requires_grad=True)
        return softmax_operator(*qkv.unbind(2))
    return ""


def duration(seconds: float) -> str:
    """Seconds as "45 s", "12 min", "3.5 h" or "4.0 days"."""
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.{0 if size < 3600 else 1}f} {unit}"
    return f"{seconds / 86_400:.1f} days"
