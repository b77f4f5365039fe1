"""What a run shows for itself: pictures, the final figures, and the dry run's estimates."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lion_triton import metrics
from lion_triton.config import TrainConfig
from lion_triton.data.clouds import Normalization
from lion_triton.data.sources import Sources
from lion_triton.devices import autocast, best_device, resolve_precision
from lion_triton.kernels import chamfer_distance, normal_noise, pairwise_chamfer
from lion_triton.models.lion import LION
from lion_triton.objectives import posterior, prior_loss, vae_loss
from lion_triton.runs import Run, write_text

SHOWN = 8  # clouds in a row of a picture
ACTIVE_NATS = 0.01  # a latent dimension below this says nothing


@dataclass(frozen=True)
class Reconstruction:
    """How well held-out clouds pass through the VAE, in data units where the normalisation can be inverted."""

    points: np.ndarray  # (K, N, 3)
    chamfer: float  # mean over clouds, of squared distances
    kl_z: float  # nats, mean over clouds
    active_dimensions: int  # of z0, with more than ACTIVE_NATS on average


@torch.no_grad()
def reconstruct(
    lion: LION,
    clouds: Tensor,
    normalization: Normalization,
    precision: str,
    *,
    progress: metrics.Progress | None = None,
) -> Reconstruction:
    """Encode and decode normalised clouds (K, N, 3), with latents sampled as in training.

    progress: called with the number of clouds finished since its last call.
    """
    device = lion.z_mean.device
    outputs, kls = [], []
    keys = (torch.tensor([0, offset], device=device) for offset in itertools.count())
    for batch in clouds.split(32):
        with autocast(precision, device):
            batch = batch.to(device)
            plan = lion.vae.plan(batch)
            z_mu, z_log_sigma = lion.vae.encode_shape(batch, plan)
            z = z_mu + z_log_sigma.exp() * normal_noise(z_mu.shape, next(keys))
            h_mu, h_log_sigma = lion.vae.encode_points(batch, z, plan)
            h = h_mu + h_log_sigma.exp() * normal_noise(h_mu.shape, next(keys))
            outputs.append(lion.decode(h, z).float().cpu())
        kls.append((0.5 * (z_mu.square() + (2 * z_log_sigma).exp() - 1) - z_log_sigma).cpu())
        if progress is not None:
            progress(len(batch))
    points = torch.from_numpy(normalization.invert(torch.cat(outputs).numpy()))
    target = torch.from_numpy(normalization.invert(clouds.numpy()))
    per_dimension = torch.cat(kls).mean(0)
    return Reconstruction(
        points.numpy(),
        chamfer_distance(points, target).mean().item(),
        per_dimension.sum().item(),
        int((per_dimension > ACTIVE_NATS).sum()),
    )


def one_nna(sets: dict[str, np.ndarray], references: np.ndarray) -> dict[str, float]:
    """1-NNA by Chamfer distance of each set of clouds against the references, all in the same units."""
    b = torch.from_numpy(references)
    within_references = pairwise_chamfer(b, b)
    figures = {}
    for name, clouds in tqdm(sets.items(), desc="comparing", unit="set", leave=False, disable=None):
        a = torch.from_numpy(clouds)
        figures[name] = metrics.nearest_neighbor_accuracy(
            pairwise_chamfer(a, a), pairwise_chamfer(a, b), within_references
        )
    return figures


def thicknesses(sets: dict[str, np.ndarray], references: np.ndarray) -> dict[str, float]:
    """``metrics.thickness_ratio`` of each set of clouds to the references."""
    of = {name: metrics.thickness(torch.from_numpy(clouds)) for name, clouds in {**sets, "": references}.items()}
    return {name: metrics.thickness_ratio(of[name], of[""]) for name in sets}


def gaussian_clouds(clouds: np.ndarray, seed: int = 0) -> np.ndarray:
    """The trivial generator: clouds of as many points drawn from one Gaussian with the points' mean and covariance."""
    flat = clouds.reshape(-1, 3).astype(np.float64)
    rng = np.random.default_rng(seed)
    return rng.multivariate_normal(flat.mean(0), np.cov(flat.T), clouds.shape[:2]).astype(np.float32)


def in_turn(labels: np.ndarray) -> list[int]:
    """All indices, the classes in turn, each class in its own order: the first few show every class."""
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members))
    return [int(i) for i in np.lexsort((labels, rank))]


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
        **{f"thickness_{name}": value for name, value in thicknesses(sets, references).items()},
    }
    record = {"held_out_shapes": count, "points": int(references.shape[1]), **figures}
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
    floor = "" if fresh is None else f", fresh shapes {figures['thickness_fresh']:.2f}"
    print(f"  thickness of surfaces             {figures['thickness_generated']:.2f} (held-out shapes 1{floor})")
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
    total = 0.0
    for stage, training in (("vae", config.vae), ("priors", config.priors)):
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
            f"{_duration(seconds * training.steps)} in all; about {size / 2**30:.1f} GiB"
        )
    print(f"time in all: about {_duration(total)} on this machine, pictures and final figures not counted")


@dataclass(frozen=True)
class _Cost:
    seconds_per_cloud: float
    activation_bytes_per_cloud: float


def _measure(lion: LION, config: TrainConfig, stage: str, device: torch.device) -> _Cost:
    """Time one training step, after one to warm up, and add up what it keeps for its backward pass."""
    batch = min(config.vae.batch_size, config.priors.batch_size, 32 if device.type == "cuda" else 4)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    labels = torch.zeros(batch, dtype=torch.int64, device=device) if config.model.shape_prior.num_classes else None
    key = torch.tensor([0, 0], device=device)
    points = torch.randn(batch, config.data.num_points, 3, device=device)
    elapsed, latents = 0.0, None
    for _ in range(2):
        kept.clear()
        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast(config.mixed_precision, device):
            if stage == "vae":
                training = config.vae
                loss = vae_loss(
                    lion.vae,
                    points,
                    key,
                    kl_coefficient=1.0,
                    lambda_z=training.lambda_z,
                    lambda_h=training.lambda_h,
                    reconstruction=training.reconstruction,
                    occupancy_weight=training.occupancy_weight,
                ).loss
            else:
                if latents is None or not config.priors.cached_draws:
                    latents = posterior(lion.vae, points, key)
                loss = prior_loss(lion, latents, key, labels, shape_draws=config.priors.shape_draws).loss
        loss.backward()
        lion.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
    weights = sum(p.numel() * p.element_size() for p in lion.parameters())
    return _Cost(elapsed / batch, max(sum(kept.values()) - weights, 0) / batch)


def _duration(seconds: float) -> str:
    """Seconds as "45 s", "12 min", "3.5 h" or "4.0 days"."""
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.{0 if size < 3600 else 1}f} {unit}"
    return f"{seconds / 86_400:.1f} days"
