"""ChamferDistancePytorch's ``chamfer3D.dist_chamfer_3D`` and ``fscore``: nearest neighbours both ways."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from lion_triton import kernels
from lion_triton.kernels.compat._clouds import check_tensors

__all__ = [
    "chamfer_3DDist",
    "chamfer_3DDist_nograd",
    "chamfer_3DFunction",
    "chamfer_3DFunction_noGrad",
    "fscore",
    "fscore_1e4",
]

BothWays = tuple[Float[Tensor, "B N"], Float[Tensor, "B M"], Int32[Tensor, "B N"], Int32[Tensor, "B M"]]


class chamfer_3DFunction:
    """Called as the original is: ``chamfer_3DFunction.apply(xyz1, xyz2)``; see :class:`chamfer_3DDist`."""

    @staticmethod
    def apply(xyz1: Float[Tensor, "B N 3"], xyz2: Float[Tensor, "B M 3"]) -> BothWays:
        check_tensors(xyz1=xyz1, xyz2=xyz2)
        dist1, idx1 = kernels.nearest_neighbor(xyz1, xyz2)
        dist2, idx2 = kernels.nearest_neighbor(xyz2, xyz1)
        return dist1, dist2, idx1, idx2


class chamfer_3DFunction_noGrad:
    """``apply`` of :class:`chamfer_3DFunction` without gradients (a name of LION's copy)."""

    @staticmethod
    @torch.no_grad()
    def apply(xyz1: Float[Tensor, "B N 3"], xyz2: Float[Tensor, "B M 3"]) -> BothWays:
        return chamfer_3DFunction.apply(xyz1, xyz2)


class chamfer_3DDist(nn.Module):
    """Squared distances between each point and its nearest point in the other cloud.

    input1: (B, N, 3), input2: (B, M, 3), of one dtype. Returns dist1 (B, N), dist2 (B, M), float32 (float64 for
    float64), and idx1 (B, N), idx2 (B, M), int32, ties to the lowest index. Differentiable in both inputs through
    the nearest pairs; deterministic, backward too. ValueError: shapes, dtypes or devices that do not fit.
    """

    def forward(self, input1: Float[Tensor, "B N 3"], input2: Float[Tensor, "B M 3"]) -> BothWays:
        return chamfer_3DFunction.apply(input1, input2)


class chamfer_3DDist_nograd(nn.Module):
    """:class:`chamfer_3DDist` without gradients (a name of LION's copy)."""

    def forward(self, input1: Float[Tensor, "B N 3"], input2: Float[Tensor, "B M 3"]) -> BothWays:
        return chamfer_3DFunction_noGrad.apply(input1, input2)


def fscore(
    dist1: Float[Tensor, "B N"], dist2: Float[Tensor, "B M"], threshold: float = 0.001
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"], Float[Tensor, " B"]]:
    """F-score, and the fractions of the points of each cloud that the other one reaches.

    dist1: (B, N), dist2: (B, M), squared distances of :class:`chamfer_3DDist`; threshold: in the same units.
    Returns (F, P1, P2), float32, each (B,): P the fraction of distances below the threshold, F the harmonic mean
    of both, 0 where both are 0. Not differentiable.
    """
    check_tensors(dist1=dist1, dist2=dist2)
    precision1 = (dist1 < threshold).float().mean(1)
    precision2 = (dist2 < threshold).float().mean(1)
    total = precision1 + precision2
    score = 2 * precision1 * precision2 / torch.where(total > 0, total, 1)
    return score, precision1, precision2


def fscore_1e4(
    dist1: Float[Tensor, "B N"], dist2: Float[Tensor, "B M"], threshold: float = 0.0001
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"], Float[Tensor, " B"]]:
    """:func:`fscore` with the default threshold of the copies in VRCNet, MVP_Benchmark, SVDFormer and others."""
    return fscore(dist1, dist2, threshold)
