"""``StructuralLosses`` of PointFlow and its followers: ``nn_distance`` and ``match_cost``.

The matching is that of PyTorchEMD; its cost is the sum of match times distance, which is NOT squared.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from lion_triton.kernels._checks import check_clouds, upcast
from lion_triton.kernels._op import Gradients, Needs, gradient, op
from lion_triton.kernels._points import block_size, squared_distances
from lion_triton.kernels.compat._clouds import check_tensors
from lion_triton.kernels.compat.chamfer3d import chamfer_3DFunction
from lion_triton.kernels.emd import _approx_match

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
    return _match_cost_op(upcast(seta), upcast(setb))[0]


def _empty_results(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape[0]), x.new_empty(x.shape), y.new_empty(y.shape)


@op(fake=_empty_results)
def _match_cost_op(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The costs and their gradients, as keeping the match takes N M floats a pair."""
    (B, N, _), M = x.shape, y.shape[1]
    cost, dx, dy = _empty_results(x, y)
    clouds = max(1, block_size(x) // (N * M))
    for i in range(0, B, clouds):
        b = slice(i, i + clouds)
        sqdist = squared_distances(x[b], y[b])
        match, distance = _approx_match(sqdist), sqdist.sqrt()
        cost[b] = (match * distance).sum((1, 2))
        pull = match / distance.clamp(min=1e-10)  # 0 at distance 0, as in the originals
        for axis in range(3):
            difference = (x[b, :, None, axis] - y[b, None, :, axis]).mul_(pull)
            dx[b, :, axis], dy[b, :, axis] = difference.sum(2), -difference.sum(1)
    return cost, dx, dy


@gradient(_match_cost_op, save=lambda x, y, out: out[1:])
def _match_cost_backward(needs: Needs, grad: Tensor, dx: Tensor, dy: Tensor) -> Gradients:
    return dx * grad[:, None, None], dy * grad[:, None, None]
