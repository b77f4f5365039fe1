"""``pointnet2_utils``: what pointnet2_ops computes, odd cases too.

No gradient to coordinates, except where they are gathered or grouped as features; weights of an interpolation get
none. Deterministic, backward too. ValueError: arguments that do not fit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn

from lion_triton import kernels
from lion_triton.kernels.compat import pvcnn
from lion_triton.kernels.compat._clouds import as_int, check_tensors, furthest_points

__all__ = [
    "GroupAll",
    "QueryAndGroup",
    "ball_query",
    "furthest_point_sample",
    "gather_operation",
    "grouping_operation",
    "three_interpolate",
    "three_nn",
]

_SMALLEST = 1e-3  # squared distance from the origin of points that are never sampled


def furthest_point_sample(xyz: Float[Tensor, "B N 3"], npoint: int) -> Int32[Tensor, "B M"]:
    """Indices (B, npoint) of points (B, N, 3), each the furthest from those before it, starting at point 0.

    As in pointnet2_ops, points with |p|^2 <= 1e-3 are never sampled, unless it is point 0 (padding with zeros is passed
    over). When all others coincide with sampled ones, the first that may be sampled follows; npoint may exceed N.
    Ties go to the lowest index. (The copies of PointRCNN and OpenPCDet have no such rule: ``compat.pvcnn``'s
    function and ``furthest_point_sampling_wrapper`` are theirs.)
    """
    check_tensors(xyz=xyz)
    npoint, xyz = as_int("npoint", npoint), xyz.detach()
    if npoint < 1:
        raise ValueError(f"npoint: expected an integer >= 1, got {npoint}")
    if xyz.ndim != 3 or xyz.shape[2] != 3 or xyz.shape[1] == 0:
        raise ValueError(f"xyz: expected shape (B, N, 3) with N >= 1, got {tuple(xyz.shape)}")
    eligible = xyz.float().square().sum(-1) > _SMALLEST
    # A copy of point 0 is sampled only when nothing is left, and then it is point 0 that is.
    idx = furthest_points(torch.where(eligible[..., None], xyz, xyz[:, :1]), npoint)
    first = eligible.int().argmax(1, keepdim=True)  # 0 where none is
    return torch.cat([idx[:, :1], torch.where(idx[:, 1:] == 0, first, idx[:, 1:])], 1).int()


def gather_operation(features: Float[Tensor, "B C N"], idx: Int[Tensor, "B M"]) -> Float[Tensor, "B C M"]:
    """Features (B, C, N) at indices (B, M): (B, C, M). Differentiable in the features."""
    return pvcnn.gather(features, idx)


def grouping_operation(features: Float[Tensor, "B C N"], idx: Int[Tensor, "B M U"]) -> Float[Tensor, "B C M U"]:
    """Features (B, C, N) at indices (B, M, U): (B, C, M, U). Differentiable in the features."""
    return pvcnn.grouping(features, idx)


def three_nn(
    unknown: Float[Tensor, "B N 3"], known: Float[Tensor, "B M 3"]
) -> tuple[Float[Tensor, "B N 3"], Int32[Tensor, "B N 3"]]:
    """Distances (not squared) and indices of the three points of ``known`` nearest to each of ``unknown``, no gradient.

    With fewer than three the missing ones have index 0 and distance infinity.
    """
    check_tensors(unknown=unknown, known=known)
    sqdist, idx = kernels.knn(unknown.detach(), known.detach(), 3)
    return sqdist.sqrt(), idx.clamp(min=0)


def three_interpolate(
    features: Float[Tensor, "B C M"], idx: Int[Tensor, "B N 3"], weight: Float[Tensor, "B N 3"]
) -> Float[Tensor, "B C N"]:
    """Weighted sums of three columns of the features (B, C, M): (B, C, N). Differentiable in the features."""
    check_tensors(features=features, idx=idx, weight=weight)
    return kernels.three_interpolate(features.mT, weight.detach(), idx.int()).mT.contiguous()


def ball_query(
    radius: float, nsample: int, xyz: Float[Tensor, "B N 3"], new_xyz: Float[Tensor, "B M 3"]
) -> Int32[Tensor, "B M U"]:
    """Indices (B, M, nsample) of the first points of xyz, in index order, closer to each of new_xyz than the radius.

    Missing ones repeat the first; a centre without any has index 0.
    """
    check_tensors(xyz=xyz, new_xyz=new_xyz)
    return kernels.ball_query(new_xyz.detach(), xyz.detach(), float(radius), as_int("nsample", nsample))


class QueryAndGroup(nn.Module):
    """The neighbours of each centre within a ball, relative to it, with their features.

    use_xyz: coordinates in front of the features. The others are VoteNet's: ``ret_grouped_xyz`` returns the relative
    coordinates (B, 3, M, U) too; ``normalize_xyz`` divides them by the radius; ``sample_uniformly`` fills slots beyond
    a ball's points with random ones of them, not with the first; ``ret_unique_cnt`` returns how many there are, (B, M)
    float32. Random numbers come from PyTorch's generator of the device.
    """

    def __init__(
        self,
        radius: float,
        nsample: int,
        use_xyz: bool = True,
        ret_grouped_xyz: bool = False,
        normalize_xyz: bool = False,
        sample_uniformly: bool = False,
        ret_unique_cnt: bool = False,
    ) -> None:
        super().__init__()
        if ret_unique_cnt and not sample_uniformly:
            raise ValueError("ret_unique_cnt: expected sample_uniformly=True with it")
        self.radius, self.nsample, self.use_xyz = radius, nsample, use_xyz
        self.ret_grouped_xyz, self.normalize_xyz = ret_grouped_xyz, normalize_xyz
        self.sample_uniformly, self.ret_unique_cnt = sample_uniformly, ret_unique_cnt

    def forward(
        self, xyz: Float[Tensor, "B N 3"], new_xyz: Float[Tensor, "B M 3"], features: Tensor | None = None
    ) -> Any:
        """features: (B, C, N) or None. Returns (B, 3 + C, M, U), then what else was asked for."""
        if features is None and not self.use_xyz:
            raise ValueError("features: expected a tensor, as use_xyz is False, got None")
        idx = ball_query(self.radius, self.nsample, xyz, new_xyz)
        # Distinct ones come first, in rising order.
        distinct = F.pad(idx[..., 1:] > idx[..., :-1], (1, 0), value=True).cumprod(-1).sum(-1, keepdim=True)
        if self.sample_uniformly:
            slot = torch.arange(idx.shape[2], device=idx.device)
            again = (torch.rand(idx.shape, device=idx.device) * distinct).long()
            idx = idx.gather(2, torch.where(slot < distinct, slot, torch.minimum(again, distinct - 1)))
        grouped_xyz = grouping_operation(xyz.mT, idx) - new_xyz.mT[..., None]
        if self.normalize_xyz:
            grouped_xyz = grouped_xyz / self.radius
        results = [
            _with_coordinates(grouped_xyz, None if features is None else grouping_operation(features, idx), self)
        ]
        if self.ret_grouped_xyz:
            results.append(grouped_xyz)
        if self.ret_unique_cnt:
            results.append(distinct[..., 0].float())
        return results[0] if len(results) == 1 else tuple(results)


class GroupAll(nn.Module):
    """All points as one group, with their features: (B, 3 + C, 1, N); with ``ret_grouped_xyz`` coordinates too."""

    def __init__(self, use_xyz: bool = True, ret_grouped_xyz: bool = False) -> None:
        super().__init__()
        self.use_xyz, self.ret_grouped_xyz = use_xyz, ret_grouped_xyz

    def forward(self, xyz: Float[Tensor, "B N 3"], new_xyz: Any, features: Tensor | None = None) -> Any:
        """new_xyz is ignored."""
        check_tensors(xyz=xyz)
        grouped_xyz = xyz.mT[:, :, None]
        grouped = _with_coordinates(grouped_xyz, None if features is None else features[:, :, None], self)
        return (grouped, grouped_xyz) if self.ret_grouped_xyz else grouped


def _with_coordinates(grouped_xyz: Tensor, grouped: Tensor | None, grouper: QueryAndGroup | GroupAll) -> Tensor:
    if grouped is None:
        return grouped_xyz
    return torch.cat([grouped_xyz, grouped], 1) if grouper.use_xyz else grouped
