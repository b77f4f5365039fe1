"""How clouds pass through the VAE."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lion_triton import metrics
from lion_triton.data.clouds import Normalization
from lion_triton.devices import autocast
from lion_triton.kernels import chamfer_distance, normal_noise
from lion_triton.models.lion import LION

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
