"""``StructuralLosses`` of PointFlow and its followers: ``nn_distance`` and ``match_cost``.

The matching is that of PyTorchEMD; its cost is the sum of match times distance, which is NOT squared.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from lion_triton.kernels._checks import upcast
from lion_triton.kernels.compat._clouds import check_tensors
from lion_triton.kernels.compat.chamfer3d import chamfer_3DFunction
from lion_triton.kernels.emd import _approx_match
from lion_triton.kernels.neighbors import block_size, check_clouds, squared_distances

__all__ = ["match_cost", "nn_distance"]


def nn_distance(
    seta: Float[Tensor, "B N 3"], setb: Float[Tensor, "B M 3"]
) -> tuple[Float[Tensor, "B N"], Float[Tensor, "B M"]]:
    """Squared distances of each point to the nearest one of the other cloud; differentiable, deterministic.

    seta: (B, N, 3), setb: (B, M, 3). Returns (B, N) and (B, M), float32 (float64 for float64).
    ValueError: shapes, dtypes or devices that do not fit.
    """
    check_tensors(seta=seta, setb=setb)
    return chamfer_3DFunction.apply(seta, setb)[:2]


def match_cost(seta: Float[Tensor, "B N 3"], setb: Float[Tensor, "B M 3"]) -> Float[Tensor, " B"]:
    """The sum of match x distance (not squared) over the approximate matching of two clouds.

    seta: (B, N, 3), setb: (B, M, 3). Returns (B,) float32 (float64 for float64). Differentiable at fixed match, once;
    deterministic. PyTorch operations on every device, a few clouds at a time, as the match of a pair takes N M floats.
    ValueError: shapes, dtypes or devices that do not fit.
    """
    check_tensors(seta=seta, setb=setb)
    check_clouds(seta=seta, setb=setb)
    return _MatchCost.apply(upcast(seta), upcast(setb))


class _MatchCost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        (B, N, _), M = x.shape, y.shape[1]
        cost, grad_x, grad_y = x.new_empty(B), torch.empty_like(x), torch.empty_like(y)
        clouds = max(1, block_size(x) // (N * M))
        for i in range(0, B, clouds):
            b = slice(i, i + clouds)
            sqdist = squared_distances(x[b], y[b])
            match, distance = _approx_match(sqdist.clone()), sqdist.sqrt()
            cost[b] = (match * distance).sum((1, 2))
            if any(ctx.needs_input_grad):
                pull = match / distance.clamp(min=1e-10)  # 0 / 1e-10 at distance 0, as in the originals
                for axis in range(3):
                    difference = (x[b, :, None, axis] - y[b, None, :, axis]).mul_(pull)
                    grad_x[b, :, axis], grad_y[b, :, axis] = difference.sum(2), -difference.sum(1)
        ctx.save_for_backward(grad_x, grad_y)
        return cost

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        grad_x, grad_y = ctx.saved_tensors
        grad = grads[0][:, None, None]
        return grad_x * grad, grad_y * grad
