"""Point Transformer's ``pointops``: clouds one behind the other, told apart by offsets.

``offset`` (B,) int holds where each cloud ends. Points are (n, 3), features (n, C), indices int32 into all points.
Deterministic, backward too; offsets are read on the host. ValueError: arguments that do not fit.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from lion_triton import kernels
from lion_triton.kernels.compat._clouds import as_int, check_tensors, furthest_points, pack_clouds, pad_clouds

__all__ = [
    "aggregation",
    "furthestsampling",
    "grouping",
    "interpolation",
    "interpolation2",
    "knnquery",
    "queryandgroup",
    "subtraction",
]


def furthestsampling(
    xyz: Float[Tensor, "n 3"], offset: Int[Tensor, " B"], new_offset: Int[Tensor, " B"]
) -> Int32[Tensor, " m"]:
    """Indices (m,) of points, in each cloud each the furthest from those before it, starting at its first.

    new_offset: (B,), where the samples of each cloud end. Ties go to the lowest index; beyond a cloud's points its
    first repeats. No gradient.
    """
    check_tensors(xyz=xyz, offset=offset, new_offset=new_offset)
    sizes, samples = _sizes("offset", offset, len(xyz)), _sizes("new_offset", new_offset, None, len(offset))
    if not samples or max(samples) == 0:
        return torch.zeros(0, dtype=torch.int32, device=xyz.device)
    lengths = torch.tensor(sizes, device=xyz.device)
    idx = furthest_points(pad_clouds(xyz.detach(), sizes), max(samples), lengths)
    return pack_clouds(idx + (lengths.cumsum(0) - lengths)[:, None], samples).int()


def knnquery(
    nsample: int,
    xyz: Float[Tensor, "n 3"],
    new_xyz: Float[Tensor, "m 3"] | None,
    offset: Int[Tensor, " B"],
    new_offset: Int[Tensor, " B"],
) -> tuple[Int32[Tensor, "m K"], Float[Tensor, "m K"]]:
    """Indices and distances (not squared) of the nsample points of xyz nearest to each of new_xyz, in its own cloud.

    new_xyz: None for xyz. Nearest first. Where a cloud has fewer points, its first point at distance 1e5 fills up, as
    in the original. No gradient.
    """
    new_xyz = xyz if new_xyz is None else new_xyz
    check_tensors(xyz=xyz, new_xyz=new_xyz, offset=offset, new_offset=new_offset)
    k = as_int("nsample", nsample)
    sizes = _sizes("offset", offset, len(xyz))
    queries = _sizes("new_offset", new_offset, len(new_xyz), len(offset))
    lengths = torch.tensor(sizes, device=xyz.device)
    padded, padded_queries = pad_clouds(xyz.detach(), sizes), pad_clouds(new_xyz.detach(), queries)
    sqdist, idx = kernels.knn(padded_queries, padded, k, lengths=lengths if min(sizes) < max(sizes) else None)
    missing = idx < 0
    idx = idx.clamp(min=0) + (lengths.cumsum(0) - lengths)[:, None, None]
    distances = sqdist.sqrt().masked_fill(missing, 1e5)
    return pack_clouds(idx, queries).int(), pack_clouds(distances, queries)


def grouping(input: Float[Tensor, "n C"], idx: Int[Tensor, "m K"]) -> Float[Tensor, "m K C"]:
    """Rows of the input (n, C) at indices (m, K): (m, K, C). Differentiable in the input."""
    check_tensors(input=input, idx=idx)
    return kernels.group(input[None], idx[None])[0]


def queryandgroup(
    nsample: int,
    xyz: Float[Tensor, "n 3"],
    new_xyz: Float[Tensor, "m 3"] | None,
    feat: Float[Tensor, "n C"],
    idx: Int[Tensor, "m K"] | None,
    offset: Int[Tensor, " B"],
    new_offset: Int[Tensor, " B"],
    use_xyz: bool = True,
) -> Float[Tensor, "m K C"]:
    """Features of the nearest points, behind their coordinates relative to new_xyz with ``use_xyz``: (m, K, 3 + C).

    idx: of :func:`knnquery`, if it is known. Differentiable in coordinates and features.
    """
    new_xyz = xyz if new_xyz is None else new_xyz
    if idx is None:
        idx, _ = knnquery(nsample, xyz, new_xyz, offset, new_offset)
    grouped = grouping(feat, idx)
    return torch.cat([grouping(xyz, idx) - new_xyz[:, None], grouped], -1) if use_xyz else grouped


def subtraction(
    input1: Float[Tensor, "n C"], input2: Float[Tensor, "n C"], idx: Int[Tensor, "n K"]
) -> Float[Tensor, "n K C"]:
    """``input1[i] - input2[idx[i, k]]``. Differentiable in both."""
    check_tensors(input1=input1)
    return input1[:, None] - grouping(input2, idx)


def aggregation(
    input: Float[Tensor, "n C"],
    position: Float[Tensor, "n K C"],
    weight: Float[Tensor, "n K G"],
    idx: Int[Tensor, "n K"],
) -> Float[Tensor, "n C"]:
    """Sum over k of ``(input[idx[i, k], c] + position[i, k, c]) weight[i, k, c % G]``. Differentiable in all three."""
    check_tensors(position=position, weight=weight)
    C, G = position.shape[2], weight.shape[2]
    if C % G:
        raise ValueError(f"weight: expected channels that divide those of position ({C}), got {G}")
    return ((grouping(input, idx) + position) * weight.repeat(1, 1, C // G)).sum(1)


def interpolation(
    xyz: Float[Tensor, "m 3"],
    new_xyz: Float[Tensor, "n 3"],
    feat: Float[Tensor, "m C"],
    offset: Int[Tensor, " B"],
    new_offset: Int[Tensor, " B"],
    k: int = 3,
) -> Float[Tensor, "n C"]:
    """Features of the k nearest points, weighted by inverse distance (not squared). Differentiable in the features."""
    idx, distance = knnquery(k, xyz, new_xyz, offset, new_offset)
    inverse = 1 / (distance + 1e-8)
    weight = inverse / inverse.sum(1, keepdim=True)
    return (grouping(feat, idx) * weight[..., None]).sum(1)


interpolation2 = interpolation


def _sizes(name: str, offset: Tensor, total: int | None, clouds: int | None = None) -> list[int]:
    """How many points each cloud has; read on the host."""
    ends = [0, *offset.tolist()]
    sizes = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    if clouds is not None and len(sizes) != clouds:
        raise ValueError(f"{name}: expected an offset for each of {clouds} clouds, got {len(sizes)}")
    if not sizes or min(sizes) < 0 or (total is not None and ends[-1] != total):
        upto = "" if total is None else f" up to {total}"
        raise ValueError(f"{name}: expected rising offsets{upto}, got {ends[1:]}")
    return sizes
