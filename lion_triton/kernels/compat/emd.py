"""PyTorchEMD's ``emd``: approximate earth mover's distance, summed over the points.

Most copies of it divide by the number of points: those are ``lion_triton.kernels.compat.emd_mean``.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from lion_triton import kernels
from lion_triton.kernels.compat import emd_mean
from lion_triton.kernels.compat._clouds import check_tensors

__all__ = ["EarthMoverDistanceFunction", "earth_mover_distance"]


class EarthMoverDistanceFunction:
    """Called as the original is: ``EarthMoverDistanceFunction.apply(xyz1, xyz2)``, (B, N, 3) and (B, M, 3)."""

    @staticmethod
    def apply(xyz1: Float[Tensor, "B N 3"], xyz2: Float[Tensor, "B M 3"]) -> Float[Tensor, " B"]:
        return kernels.approx_emd(xyz1, xyz2) * xyz1.shape[1]


def earth_mover_distance(
    xyz1: Float[Tensor, "B 3 N"], xyz2: Float[Tensor, "B 3 M"], transpose: bool = True
) -> Float[Tensor, " B"]:
    """The sum of match x squared distance over the approximate matching of two clouds.

    xyz1: (B, 3, N), xyz2: (B, 3, M), or (B, N, 3), (B, M, 3) with ``transpose=False``; a single cloud may omit B.
    Returns (B,) float32 (float64 for float64): N times :func:`lion_triton.kernels.approx_emd`. Differentiable at fixed
    match, once; deterministic.
    ValueError: shapes, dtypes or devices that do not fit.
    """
    check_tensors(xyz1=xyz1)
    return emd_mean.earth_mover_distance(xyz1, xyz2, transpose) * xyz1.shape[-1 if transpose else -2]
