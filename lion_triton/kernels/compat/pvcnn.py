"""PVCNN's ``modules.functional``: channels first, coordinates (B, 3, N), int32 indices.

Channels of coordinates beyond the third are ignored, as in LION's copy. Results are contiguous and in the dtype of
the features; any floating dtype. Differentiable in the features and deterministic, backward too; no gradient to
coordinates, except through ``furthest_point_sample``, which selects points. ValueError: arguments that do not fit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from lion_triton import kernels
from lion_triton.kernels.compat._clouds import as_int, check_tensors

__all__ = [
    "avg_voxelize",
    "ball_query",
    "furthest_point_sample",
    "gather",
    "grouping",
    "huber_loss",
    "kl_loss",
    "logits_mask",
    "nearest_neighbor_interpolate",
    "trilinear_devoxelize",
]


def avg_voxelize(
    features: Float[Tensor, "B C N"], coords: Int[Tensor, "B 3 N"], resolution: int
) -> Float[Tensor, "B C R R R"]:
    """Mean of the features (B, C, N) of the points in each voxel, 0 in empty ones: (B, C, R, R, R).

    coords: (B, 3, N) in [0, R - 1]; truncated if they are not integers; outside, they act as if clamped.
    """
    resolution = as_int("resolution", resolution)
    check_tensors(coords=coords)
    points, rows = _points("coords", coords.int()).float(), _rows("features", features)
    if 0 in rows.shape or resolution == 1:  # one voxel: the mean of all
        mean = rows.mean(1, dtype=torch.promote_types(rows.dtype, torch.float32)) if rows.shape[1] else rows.sum(1)
        return mean.to(rows.dtype)[..., None, None, None].expand(-1, -1, *[resolution] * 3).contiguous()
    return kernels.avg_voxelize(rows, points, resolution).permute(0, 4, 1, 2, 3).contiguous()


def trilinear_devoxelize(
    features: Float[Tensor, "B C R R R"], coords: Float[Tensor, "B 3 N"], resolution: int, is_training: bool = True
) -> Float[Tensor, "B C N"]:
    """Trilinear interpolation of voxels (B, C, R, R, R) at the points: (B, C, N).

    coords: (B, 3, N) in [0, R - 1], unrounded. The backward works whatever ``is_training`` says.
    """
    resolution = as_int("resolution", resolution)
    check_tensors(features=features)
    B, C = features.shape[:2]
    points = _points("coords", coords)
    if features.shape[2:].numel() != resolution**3:
        raise ValueError(f"features: expected (B, C, R, R, R) with R = {resolution}, got {tuple(features.shape)}")
    if C == 0 or resolution == 1:
        return features.reshape(B, C, resolution**3)[..., :1].expand(-1, -1, points.shape[1]).contiguous()
    voxels = features.reshape(B, C, resolution, resolution, resolution).permute(0, 2, 3, 4, 1)
    return kernels.trilinear_devoxelize(voxels, points).mT.contiguous()


def ball_query(
    centers_coords: Float[Tensor, "B 3 M"], points_coords: Float[Tensor, "B 3 N"], radius: float, num_neighbors: int
) -> Int32[Tensor, "B M U"]:
    """Indices (B, M, U) of the first U points, in index order, closer to each centre than the radius.

    Missing ones repeat the first; a centre without any has index 0. Not differentiable.
    """
    centers = _points("centers_coords", centers_coords)
    num_neighbors = as_int("num_neighbors", num_neighbors)
    return kernels.ball_query(centers, _points("points_coords", points_coords), float(radius), num_neighbors)


def grouping(features: Float[Tensor, "B C N"], indices: Int[Tensor, "B M U"]) -> Float[Tensor, "B C M U"]:
    """Features (B, C, N) at indices (B, M, U): (B, C, M, U)."""
    check_tensors(indices=indices)
    rows = _rows("features", features)
    if rows.shape[2] == 0:
        return features.new_empty(len(features), 0, *indices.shape[1:])
    return kernels.group(rows, indices.int()).permute(0, 3, 1, 2).contiguous()


def gather(features: Float[Tensor, "B C N"], indices: Int[Tensor, "B M"]) -> Float[Tensor, "B C M"]:
    """Features (B, C, N) at indices (B, M): (B, C, M)."""
    check_tensors(indices=indices)
    return grouping(features, indices[..., None])[..., 0]


def furthest_point_sample(
    coords: Float[Tensor, "B 3 N"],
    num_samples: int,
    normals: Float[Tensor, "B C N"] | None = None,
    return_indices: bool = False,
) -> Any:
    """Coordinates (B, 3, M) of points, each the furthest from those chosen before it, starting at point 0.

    Ties go to the lowest index; beyond N samples, point 0 repeats. Differentiable in coords as a selection.
    normals: further channels of the points, an argument of LION's copy: then returns (coordinates, normals).
    return_indices: an argument of SeaLion's copy: the indices, int32 (B, M), come last in what is returned.
    """
    points, num_samples = _points("coords", coords), as_int("num_samples", num_samples)
    if normals is not None and normals.shape[-1] != points.shape[1]:
        raise ValueError(f"normals: expected the N of coords ({points.shape[1]}), got {normals.shape[-1]}")
    idx = kernels.furthest_point_sample(points, min(num_samples, points.shape[1]))
    idx = F.pad(idx, (0, num_samples - idx.shape[1]))
    results = [gather(points.mT, idx)]
    if normals is not None:
        results.append(gather(normals, idx))
    if return_indices:
        results.append(idx)
    return results[0] if len(results) == 1 else tuple(results)


def nearest_neighbor_interpolate(
    points_coords: Float[Tensor, "B 3 N"],
    centers_coords: Float[Tensor, "B 3 M"],
    centers_features: Float[Tensor, "B C M"],
) -> Float[Tensor, "B C N"]:
    """Features (B, C, M) of the three nearest centres, weighted by inverse squared distance: (B, C, N)."""
    points, centers = _points("points_coords", points_coords), _points("centers_coords", centers_coords)
    features = _rows("centers_features", centers_features)
    if features.shape[1] != centers.shape[1]:
        raise ValueError(
            f"centers_features: expected the M of centers_coords ({centers.shape[1]}), got {features.shape[1]}"
        )
    if features.shape[2] == 0:
        return features.new_empty(len(features), 0, points.shape[1])
    weights, idx = kernels.three_nn(points, centers)
    return kernels.three_interpolate(features, weights, idx).mT.contiguous()


def logits_mask(
    coords: Float[Tensor, "B 3 N"], logits: Float[Tensor, "B 2 N"], num_points_per_object: int
) -> tuple[Float[Tensor, "B 3 M"], Float[Tensor, "B 3"], Bool[Tensor, "B N"]]:
    """A random sample of the points whose second logit is larger, relative to their mean.

    Returns the sample (B, 3, M), the mean (B, 3) and the mask (B, N). Without replacement where a cloud has M such
    points, else as evenly as possible; zeros where it has none. Draws from PyTorch's generator of the device.
    """
    check_tensors(coords=coords, logits=logits)
    B, N, M = len(coords), coords.shape[-1], as_int("num_points_per_object", num_points_per_object)
    mask = logits[:, 0] < logits[:, 1]
    count = mask.sum(1, keepdim=True)
    masked = torch.where(mask[:, None], coords, 0)
    mean = masked.sum(-1) / count.clamp(min=1)
    # The masked points first, in random order; sample m is the m-th of them, starting over where there are few.
    order = torch.where(mask, torch.rand(B, N, device=coords.device), 2).argsort(1)
    turn = torch.rand(B, M, device=coords.device).argsort(1)
    idx = order.gather(1, turn % count.clamp(min=1))
    return gather(masked - mean[..., None], idx), mean, mask


def kl_loss(x: Float[Tensor, "B C ..."], y: Float[Tensor, "B C ..."]) -> Float[Tensor, ""]:
    """Mean KL divergence of softmax(y) from softmax(x) over dimension 1. No gradient to x."""
    log_p, log_q = F.log_softmax(x.detach(), 1), F.log_softmax(y, 1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1).mean()


def huber_loss(error: Float[Tensor, "..."], delta: float) -> Float[Tensor, ""]:
    """Mean of error^2 / 2 where |error| <= delta > 0, and of delta (|error| - delta / 2) elsewhere."""
    return F.huber_loss(error, torch.zeros_like(error), delta=delta)


def _points(name: str, coords: Tensor) -> Tensor:
    """(B, 3 or more, N) to (B, N, 3)."""
    check_tensors(**{name: coords})
    if coords.ndim != 3 or coords.shape[1] < 3:
        raise ValueError(f"{name}: expected shape (B, 3, N), got {tuple(coords.shape)}")
    return coords[:, :3].mT


def _rows(name: str, features: Tensor) -> Tensor:
    """(B, C, N) to (B, N, C)."""
    check_tensors(**{name: features})
    if features.ndim != 3:
        raise ValueError(f"{name}: expected shape (B, C, N), got {tuple(features.shape)}")
    return features.mT
