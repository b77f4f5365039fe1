"""KNN_CUDA's ``knn_cuda.KNN``: nearest neighbours without gradients, distances with their root taken."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from lion_triton import kernels
from lion_triton.kernels.compat._clouds import as_int, check_tensors

__all__ = ["KNN"]


class KNN(nn.Module):
    """The k points of ``ref`` nearest to each point of ``query``.

    k: 1 to the number of points of ref. Clouds are (B, D, N) and the results (B, k, Nq); with ``transpose_mode``
    clouds are (B, N, D) and the results (B, Nq, k). Any D. Returns distances, float32 and not squared, and indices,
    int64, nearest first, ties to the lowest index. No gradient.
    ValueError: shapes, dtypes or devices that do not fit, k beyond the number of points.
    """

    def __init__(self, k: Any, transpose_mode: bool = False) -> None:
        super().__init__()
        self.k = as_int("k", k)
        self._t = transpose_mode

    @torch.no_grad()
    def forward(
        self, ref: Float[Tensor, "B D N"], query: Float[Tensor, "B D Nq"]
    ) -> tuple[Float[Tensor, "B k Nq"], Int64[Tensor, "B k Nq"]]:
        check_tensors(ref=ref, query=query)
        for name, cloud in (("ref", ref), ("query", query)):
            if cloud.ndim != 3:
                raise ValueError(f"{name}: expected 3 dimensions, got {tuple(cloud.shape)}")
        points, queries = (cloud.float() if self._t else cloud.float().mT for cloud in (ref, query))
        if self.k > points.shape[1]:
            raise ValueError(f"k: expected at most the number of points of ref ({points.shape[1]}), got {self.k}")
        sqdist, idx = kernels.knn(queries, points, self.k)
        distances, idx = sqdist.sqrt(), idx.long()
        return (distances, idx) if self._t else (distances.mT.contiguous(), idx.mT.contiguous())
