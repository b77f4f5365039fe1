"""``extensions.chamfer_dist`` of GRNet, PoinTr and the line of Point-MAE: Chamfer distances as losses.

Their "L1" is the mean of the distances, "L2" of their squares; both over all points of all clouds. With
``ignore_zeros``, points whose coordinates add up to 0 are left out, where there is one cloud only (a batch keeps
them, as in the originals). ValueError: shapes, dtypes or devices that do not fit.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lion_triton.kernels.compat._clouds import check_tensors
from lion_triton.kernels.compat.chamfer3d import chamfer_3DFunction

__all__ = [
    "ChamferDistance",
    "ChamferDistanceL1",
    "ChamferDistanceL1_PM",
    "ChamferDistanceL2",
    "ChamferDistanceL2_split",
    "ChamferFunction",
]

BothWays = tuple[Float[Tensor, "B N"], Float[Tensor, "B M"]]


class ChamferFunction:
    """Called as the original is: ``ChamferFunction.apply(xyz1, xyz2)``, squared distances (B, N) and (B, M)."""

    @staticmethod
    def apply(xyz1: Float[Tensor, "B N 3"], xyz2: Float[Tensor, "B M 3"]) -> BothWays:
        return chamfer_3DFunction.apply(xyz1, xyz2)[:2]


class ChamferDistance(nn.Module):
    """Squared distances of each point to the nearest one of the other cloud, (B, N) and (B, M); GRNet's first form.

    Of one cloud with ``ignore_zeros``, distances of the points that are left.
    """

    def __init__(self, ignore_zeros: bool = False) -> None:
        super().__init__()
        self.ignore_zeros = ignore_zeros

    def _distances(self, xyz1: Float[Tensor, "B N 3"], xyz2: Float[Tensor, "B M 3"]) -> BothWays:
        check_tensors(xyz1=xyz1, xyz2=xyz2)
        if self.ignore_zeros and len(xyz1) == 1:
            xyz1, xyz2 = (xyz[xyz.sum(2) != 0][None] for xyz in (xyz1, xyz2))
        return ChamferFunction.apply(xyz1, xyz2)

    def forward(self, xyz1: Float[Tensor, "B N 3"], xyz2: Float[Tensor, "B M 3"]) -> BothWays | Tensor:
        return self._distances(xyz1, xyz2)


class ChamferDistanceL2(ChamferDistance):
    """Mean squared distance one way and the other, added."""

    def forward(self, xyz1: Float[Tensor, "B N 3"], xyz2: Float[Tensor, "B M 3"]) -> Float[Tensor, ""]:
        dist1, dist2 = self._distances(xyz1, xyz2)
        return dist1.mean() + dist2.mean()


class ChamferDistanceL2_split(ChamferDistance):
    """Mean squared distance one way and the other, as a pair."""

    def forward(self, xyz1: Float[Tensor, "B N 3"], xyz2: Float[Tensor, "B M 3"]) -> tuple[Tensor, Tensor]:
        dist1, dist2 = self._distances(xyz1, xyz2)
        return dist1.mean(), dist2.mean()


class ChamferDistanceL1(ChamferDistance):
    """Half the sum of the mean distances one way and the other.

    The gradient of a distance that is 0 is 0, where the original's is not a number.
    """

    def forward(self, xyz1: Float[Tensor, "B N 3"], xyz2: Float[Tensor, "B M 3"]) -> Float[Tensor, ""]:
        dist1, dist2 = (_root(dist).mean() for dist in self._distances(xyz1, xyz2))
        return (dist1 + dist2) / 2


class ChamferDistanceL1_PM(ChamferDistance):
    """Mean distance from xyz1 to xyz2."""

    def forward(self, xyz1: Float[Tensor, "B N 3"], xyz2: Float[Tensor, "B M 3"]) -> Float[Tensor, ""]:
        return _root(self._distances(xyz1, xyz2)[0]).mean()


def _root(sqdist: Tensor) -> Tensor:
    positive = sqdist > 0
    return torch.where(positive, torch.where(positive, sqdist, 1).sqrt(), 0)
