"""``earth_mover_distance`` as most copies of PyTorchEMD have it: divided by the number of points.

    earth_mover_distance, earth_mover_distance_nograd    PVD, DiT-3D, PSF, LION and others: (B,), a mean over the points
    EarthMoverDistance                                   Point-MAE's line, an ``nn.Module`` that the copies call
                                                         ``earth_mover_distance``: a mean over points and clouds

PyTorchEMD's own sum is ``lion_triton.kernels.compat.emd``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lion_triton import kernels
from lion_triton.kernels.compat._clouds import check_tensors

__all__ = ["EarthMoverDistance", "earth_mover_distance", "earth_mover_distance_nograd"]


def earth_mover_distance(
    xyz1: Float[Tensor, "B 3 N"], xyz2: Float[Tensor, "B 3 M"], transpose: bool = True
) -> Float[Tensor, " B"]:
    """The mean over the points of xyz1 of match x squared distance: :func:`lion_triton.kernels.approx_emd`.

    xyz1: (B, 3, N), xyz2: (B, 3, M), or (B, N, 3), (B, M, 3) with ``transpose=False``; a single cloud may omit B.
    Returns (B,) float32 (float64 for float64). Differentiable at fixed match, once; deterministic.
    ValueError: shapes, dtypes or devices that do not fit.
    """
    check_tensors(xyz1=xyz1, xyz2=xyz2)
    clouds = [xyz[None] if xyz.ndim == 2 else xyz for xyz in (xyz1, xyz2)]
    return kernels.approx_emd(*(xyz.mT if transpose else xyz for xyz in clouds))


@torch.no_grad()
def earth_mover_distance_nograd(
    xyz1: Float[Tensor, "B 3 N"], xyz2: Float[Tensor, "B 3 M"], transpose: bool = True
) -> Float[Tensor, " B"]:
    """:func:`earth_mover_distance` without gradients."""
    return earth_mover_distance(xyz1, xyz2, transpose)


class EarthMoverDistance(nn.Module):
    """:func:`earth_mover_distance` of (B, N, 3) and (B, M, 3), and the mean over the clouds: a scalar.

    ``transpose`` is there for its name: as in the original, it changes nothing.
    """

    def forward(
        self, xyz1: Float[Tensor, "B N 3"], xyz2: Float[Tensor, "B M 3"], transpose: bool = False
    ) -> Float[Tensor, ""]:
        return earth_mover_distance(xyz1, xyz2, transpose=False).mean()
