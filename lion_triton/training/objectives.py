"""What the two stages of training minimise.

Stage 1 maximises the ELBO of the hierarchical VAE, stated per cloud (a sum over its N points), so that the
weights mean the same at every batch size:

    loss = reconstruction + c (lambda_z KL(q(z0|x) || N) + lambda_h KL(q(h0|x,z0) || N)),  c annealed from ~0 to 1

The published recipe sums the reconstruction over the whole batch but averages the KLs over it; at its batch
of 32 that is lambda_z = lambda_h = 1/32 here, with c up to 0.5. Stage 2 minimises the denoising error of both
priors on latents drawn from the frozen posteriors (Zeng et al. 2022, section 3.1).

A VAE with an occupancy head (not in the published one) adds that head's cross-entropy to the loss of stage 1: it
keeps the details of the shape in z0, where a short training would leave them to h0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from lion_triton.config import PriorTraining, ReconstructionWeights, VAETraining
from lion_triton.diffusion import diffusion_loss
from lion_triton.kernels import (
    approx_emd,
    avg_voxelize,
    chamfer_distance,
    gaussian_kl,
    normal_noise,
    voxel_coords,
)
from lion_triton.kernels.noise import Key, full_key, key_of_parts, later_key
from lion_triton.models.lion import LION, Posterior, posterior
from lion_triton.models.vae import VAE


def reconstruction_loss(
    x: Float[Tensor, "B N 3"], target: Float[Tensor, "B N 3"], weights: ReconstructionWeights
) -> Float[Tensor, " B"]:
    """The weighted sum of the terms whose weight is above 0, per cloud."""
    terms = []
    if weights.l1:
        terms.append(weights.l1 * (x - target).abs().flatten(1).sum(1))
    if weights.l2:
        terms.append(weights.l2 * (x - target).square().flatten(1).sum(1))
    if weights.chamfer:
        terms.append(weights.chamfer * chamfer_distance(x, target) * x.shape[1])
    if weights.emd:
        terms.append(weights.emd * approx_emd(x, target) * x.shape[1])
    if not terms:
        raise ValueError("reconstruction: expected at least one weight above 0, all are 0")
    return torch.stack(terms).sum(0)


@dataclass(frozen=True)
class VAELoss:
    """The ELBO's terms, each the mean over the batch of a value per cloud; KLs in nats, not yet weighted."""

    loss: Tensor
    reconstruction: Tensor
    kl_z: Tensor
    kl_h_xyz: Tensor
    kl_h_feature: Tensor
    occupancy: Tensor


def occupancy_loss(
    logits: Float[Tensor, "B R3"], points: Float[Tensor, "B N 3"], resolution: int
) -> Float[Tensor, " B"]:
    """Binary cross-entropy, in nats per cloud, of which of the R^3 voxels (see ``voxel_coords``) hold a point."""
    ones = torch.ones_like(points[..., :1])
    occupied = avg_voxelize(ones, voxel_coords(points, resolution), resolution).flatten(1)
    return binary_cross_entropy_with_logits(logits.float(), occupied, reduction="none").sum(1)


def vae_loss(
    vae: VAE,
    points: Float[Tensor, "B N 3"],
    key: Key,
    *,
    kl_coefficient: float | Tensor,
    lambda_z: float,
    lambda_h: float,
    reconstruction: ReconstructionWeights,
    occupancy_weight: float = 0.0,
) -> VAELoss:
    """Negative ELBO of one batch; the noise of both posteriors, and dropout, are drawn from ``key``."""
    plan = vae.plan(points)
    z_mu, z_log_sigma = vae.encode_shape(points, plan, key=network_key(key, 1))
    z = z_mu + z_log_sigma.exp() * normal_noise(z_mu.shape, key)
    h_mu, h_log_sigma = vae.encode_points(points, z, plan, key=network_key(key, 2))
    h = h_mu + h_log_sigma.exp() * normal_noise(h_mu.shape, later_key(key, 1))

    error = reconstruction_loss(vae.decode(h, z, key=network_key(key, 3)), points, reconstruction).mean()
    kl_z = gaussian_kl(z_mu, z_log_sigma).mean()
    kl_h_xyz = gaussian_kl(h_mu[..., :3], h_log_sigma[..., :3]).mean()
    kl_h_feature = gaussian_kl(h_mu[..., 3:], h_log_sigma[..., 3:]).mean()
    loss = error + kl_coefficient * (lambda_z * kl_z + lambda_h * (kl_h_xyz + kl_h_feature))
    occupancy = torch.zeros_like(loss)
    if vae.occupancy_head is not None:
        occupancy = occupancy_loss(vae.occupancy_head(z), points, vae.config.occupancy_resolution).mean()
        loss = loss + occupancy_weight * occupancy
    return VAELoss(loss, error, kl_z, kl_h_xyz, kl_h_feature, occupancy)


@dataclass(frozen=True)
class PriorLoss:
    """Denoising errors, each the mean over the batch; ``loss`` is their sum."""

    loss: Tensor
    shape: Tensor
    point: Tensor


def prior_loss(
    lion: LION,
    latents: Posterior,
    key: Key,
    labels: Int[Tensor, " B"] | None = None,
    clip: Float[Tensor, "B 512"] | None = None,
    *,
    shape_draws: int = 1,
    batch_size: int | None = None,
    drop_condition: float = 0.0,
) -> PriorLoss:
    """Weighted eps-MSE of both priors on latents drawn from the posterior.

    Times are uniform on 1..T and stratified over the batch: one offset, evenly spaced, so that a batch sees early and
    late times in equal parts and its loss varies less (low-discrepancy sampling, Kingma et al. 2021, VDM, appendix I).
    ``shape_draws``: times and noises drawn per shape latent; the point prior gets one per cloud.
    ``batch_size``: of the whole batch, of which ``latents`` are the clouds from the key's third number on; None: of
    ``latents``, all that there are.
    ``drop_condition``: the probability that neither is told a cloud's class or embedding (Ho & Salimans 2022,
    algorithm 1).
    """
    config, schedule = lion.config.diffusion, lion.schedule
    batch, device = latents.z.shape[0], latents.z.device
    batch_size = batch_size or batch
    draws_key = key_of_parts(key, shape_draws)
    # Uniform, from the key like all else in a step; one for all of a batch.
    offsets = torch.special.ndtr(normal_noise((2,), key[:2]))
    numbers = full_key(key)[2] + torch.arange(batch, device=device)

    def times(numbers: Tensor, count: int, offset: Tensor) -> Tensor:
        return stratified(numbers, count, schedule.num_train_timesteps, offset) + 1

    t_point = times(numbers, batch_size, offsets[0])
    # Each latent's draws lie far apart.
    draws = numbers[:, None] + batch_size * torch.arange(shape_draws, device=device)
    t_shape = times(draws.flatten(), batch_size * shape_draws, offsets[1])

    if drop_condition:
        dropped = torch.special.ndtr(normal_noise((batch,), network_key(key, 3))) < drop_condition
        labels = None if labels is None else labels.masked_fill(dropped, -1)
        clip = None if clip is None else clip.masked_fill(dropped.unsqueeze(-1), 0)

    z = (latents.z - lion.z_mean) / lion.z_std
    h_mu = (latents.h_mu - lion.h_mean) / lion.h_std
    h_log_sigma = latents.h_log_sigma - lion.h_std.log()
    common = (config.prediction, config.weight, config.variance)

    def repeat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.repeat_interleave(shape_draws, 0)

    def denoise_shape(z_t: Tensor, t: Tensor) -> Tensor:
        return lion.shape_prior(z_t, t, repeat(clip), repeat(labels), key=network_key(draws_key, 1))

    z_draws = z.repeat_interleave(shape_draws, 0)
    shape = diffusion_loss(denoise_shape, z_draws, t_shape, schedule, later_key(draws_key, 1), *common).mean()
    point = diffusion_loss(
        lambda h_t, t: lion.point_prior(h_t, t, z, clip, labels, key=network_key(key, 2)),
        (h_mu, h_log_sigma),
        t_point,
        schedule,
        later_key(key, 2),
        *common,
    ).mean()
    return PriorLoss(shape + point, shape, point)


def stratified(numbers: Int[Tensor, " B"], count: int, among: int, offset: Float[Tensor, ""]) -> Int[Tensor, " B"]:
    """Whole numbers in 0..among - 1 for those of ``numbers`` among ``count``, evenly spaced: of ``offset`` uniform in
    [0, 1) all are as likely."""
    return ((numbers + offset) / count * among).long().clamp_max(among - 1)


def latents_of(vae: VAE, batch: Mapping[str, Tensor], key: Key) -> tuple[Posterior, Key]:
    """The latents in a batch, or those of its points; and the first key that they leave free."""
    if "points" in batch:
        return posterior(vae, batch["points"], key), later_key(key, 1)
    return Posterior(*(batch[f.name] for f in fields(Posterior))), key


def network_key(key: Key, number: int) -> Key:
    """Of the dropout of one of a step's networks: far from the keys of noise, of other steps and other networks."""
    return later_key(key, number << 52)


def kl_coefficient(training: VAETraining, number: Tensor) -> Tensor:
    """c of the step after ``number`` (int64 scalar) steps: float32 scalar."""
    progress = (number.double() / max(training.kl_anneal * training.steps, 1)).clamp_max(1)
    return (training.kl_start + (training.kl_end - training.kl_start) * progress).float()


class VAEObjective(nn.Module):
    """Stage 1's loss as one module, so that it can be distributed."""

    def __init__(self, lion: LION, training: VAETraining) -> None:
        super().__init__()
        self.vae, self.training_config = lion.vae, training

    def forward(self, batch: Mapping[str, Tensor], key: Tensor, number: Tensor) -> dict[str, Tensor]:
        """``batch``: points (B, N, 3). ``number`` (int64 scalar): steps before this one."""
        training = self.training_config
        coefficient = kl_coefficient(training, number)
        loss = vae_loss(
            self.vae,
            batch["points"],
            key,
            kl_coefficient=coefficient,
            lambda_z=training.lambda_z,
            lambda_h=training.lambda_h,
            reconstruction=training.reconstruction,
            occupancy_weight=training.occupancy_weight,
        )
        return {f.name: getattr(loss, f.name) for f in fields(loss)} | {"kl_coefficient": coefficient}


class PriorObjective(nn.Module):
    """Stage 2's loss as one module; only the priors are its parameters."""

    def __init__(self, lion: LION, training: PriorTraining) -> None:
        super().__init__()
        self.shape_prior, self.point_prior, self.training_config = lion.shape_prior, lion.point_prior, training
        self._lion = [lion]  # in a list, so that the VAE is no part of this module

    def forward(self, batch: Mapping[str, Tensor], key: Tensor, number: Tensor) -> dict[str, Tensor]:
        """``batch``: points (B, N, 3) to encode, or the fields of their ``Posterior``; labels (B,) of a model with
        classes, clip (B, 512) of one conditioned on CLIP."""
        (lion,) = self._lion
        latents, key = latents_of(lion.vae, batch, key)
        training = self.training_config
        loss = prior_loss(
            lion,
            latents,
            key,
            batch.get("labels"),
            batch.get("clip"),
            shape_draws=training.shape_draws,
            batch_size=training.batch_size,
            drop_condition=training.drop_condition,
        )
        return {f.name: getattr(loss, f.name) for f in fields(loss)}
