"""How good are generated clouds? MMD, COV and 1-NNA by Chamfer distance and EMD, and JSD.

Notation: S samples (generated), R references, in one and the same unit. D_xy is the matrix of distances between
two sets. Conventions are those of the field since Achlioptas et al. 2018 and Yang et al. 2019 (PointFlow).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lion_triton.kernels import pairwise_chamfer, pairwise_emd


def minimum_matching_distance(sample_to_reference: Float[Tensor, "S R"]) -> float:
    """MMD: the mean over references of the distance to their nearest sample; lower is better."""
    return sample_to_reference.min(dim=0).values.double().mean().item()


def coverage(sample_to_reference: Float[Tensor, "S R"]) -> float:
    """COV: the fraction of references that are the nearest reference of some sample; higher is better."""
    nearest = sample_to_reference.min(dim=1).indices
    return nearest.unique().numel() / sample_to_reference.shape[1]


def nearest_neighbor_accuracy(
    sample_to_sample: Float[Tensor, "S S"],
    sample_to_reference: Float[Tensor, "S R"],
    reference_to_reference: Float[Tensor, "R R"],
) -> float:
    """1-NNA: leave-one-out accuracy of a nearest-neighbour classifier, sample or reference; 0.5 is best.

    A cloud's neighbours are looked for down its column, as published; the approximate EMD is not symmetric.
    """
    samples = len(sample_to_sample)
    top = torch.cat([sample_to_sample, sample_to_reference], dim=1)
    bottom = torch.cat([sample_to_reference.T, reference_to_reference], dim=1)
    distances = torch.cat([top, bottom]).clone()
    distances.fill_diagonal_(torch.inf)
    is_sample = torch.arange(len(distances), device=distances.device) < samples
    nearest = distances.min(dim=0).indices
    return (is_sample[nearest] == is_sample).double().mean().item()


def jensen_shannon_divergence(
    samples: Float[Tensor, "S N 3"], references: Float[Tensor, "R M 3"], resolution: int = 28
) -> float:
    """JSD in bits between where the points of both sets lie: on a grid of resolution^3 over [-0.5, 0.5]^3, without
    the grid points outside the sphere of radius 0.5; a point counts for its nearest grid point."""
    axis = np.linspace(-0.5, 0.5, resolution, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    grid = grid[np.linalg.norm(grid, axis=1) <= 0.5]
    p, q = (_occupancy(clouds, grid) for clouds in (samples, references))
    middle = (p + q) / 2
    return float(_entropy(middle) - (_entropy(p) + _entropy(q)) / 2)


def _occupancy(clouds: Tensor, grid: np.ndarray) -> np.ndarray:
    from scipy.spatial import cKDTree

    _, nearest = cKDTree(grid).query(clouds.reshape(-1, 3).cpu().numpy(), workers=-1)
    counts = np.bincount(nearest, minlength=len(grid)).astype(np.float64)
    return counts / counts.sum()


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


def evaluate(
    samples: Float[Tensor, "S N 3"],
    references: Float[Tensor, "R M 3"],
    emd: Literal["approx", "exact"] | None = "approx",
) -> dict[str, float]:
    """All figures of a set of samples against a set of references in the same (data) units.

    Returns:
        ``mmd_cd, cov_cd, 1nna_cd``, the same with ``emd`` unless that is None, and ``jsd``.
    """
    results: dict[str, float] = {}
    for name in ("cd",) if emd is None else ("cd", "emd"):

        def matrix(a: Tensor, b: Tensor, name: str = name) -> Tensor:
            if name == "cd":
                return pairwise_chamfer(a, b)
            assert emd is not None
            return pairwise_emd(a, b, method=emd)

        cross = matrix(references, samples).T  # references first, as published: the approximate EMD is not symmetric
        results[f"mmd_{name}"] = minimum_matching_distance(cross)
        results[f"cov_{name}"] = coverage(cross)
        results[f"1nna_{name}"] = nearest_neighbor_accuracy(
            matrix(samples, samples), cross, matrix(references, references)
        )
    results["jsd"] = jensen_shannon_divergence(samples, references)
    return results
