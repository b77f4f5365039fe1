"""Earth mover's distance between point clouds: approximate (soft matching by annealing) and exact (assignment).

approx_emd    Every x_k holds the mass L_k = max(1, M/N), every y_l takes R_l = max(1, N/M), d_kl = |x_k - y_l|^2.
    For level = -4^7, -4^6, ..., -4^-1, 0, with e_kl = exp(level d_kl):
        l_k = L_k / (sum_l e_kl R_l + 1e-9)                 offer of x_k per unit of kernel
        s_l = R_l sum_k e_kl l_k                            arrives at y_l, which may be more than it takes
        r_l = R_l min(R_l / (s_l + 1e-9), 1)
        match_kl += l_k e_kl r_l
        L_k = max(L_k - sum_l l_k e_kl r_l, 0),   R_l = max(R_l - s_l, 0)
    cost = 1/N sum_kl match_kl d_kl
exact_emd     min over permutations p of 1/N sum_k |x_k - y_p(k)|^2

Backward, of both at fixed match (the published convention: the match is a constant):
    dx_k = 2/N sum_l match_kl (x_k - y_l) dcost,   dy_l = -2/N sum_k match_kl (x_k - y_l) dcost

Costs are means of SQUARED distances; the two differ, and both differ from the square root's mean: say which.
The approximate cost is not symmetric (x offers, y takes): exchanging the clouds moves it by several per cent, and
of a cloud to itself it is small but not 0.

Legend: B clouds, N points of x, M points of y. Float32 (float64 where the input is).
Source: Fan, Su and Guibas, "A Point Set Generation Network for 3D Object Reconstruction from a Single Image",
CVPR 2017 (approximate matching).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lion_triton.kernels._checks import Impl, reference_only, upcast
from lion_triton.kernels.neighbors import (
    block_size,
    check_clouds,
    group_reference,
    squared_distances,
)

_LEVELS = (*(-(4.0**j) for j in range(7, -2, -1)), 0.0)


def approx_emd_reference(x: Float[Tensor, "B N 3"], y: Float[Tensor, "B M 3"]) -> Float[Tensor, " B"]:
    """Plain PyTorch form of :func:`approx_emd`."""
    return _ApproxCost.apply(upcast(x), upcast(y))


def approx_emd(x: Float[Tensor, "B N 3"], y: Float[Tensor, "B M 3"], *, impl: Impl = "auto") -> Float[Tensor, " B"]:
    """Approximate earth mover's distance: the cost of a soft matching, over N.

    x: (B, N, 3), y: (B, M, 3), of one dtype. Returns (B,) float32 (float64 for float64), in squared units of the
    coordinates: the sum of match x squared distance, divided by the number of points of x. Not symmetric. For
    N != M the masses are max(1, M/N) and max(1, N/M), unrounded (the published code divides integers, the same
    where one count divides the other). Differentiable in x and y at fixed match, once. Deterministic.
    Source: Fan et al. 2017. ValueError: shapes, dtypes or devices that do not fit.
    """
    check_clouds(x=x, y=y)
    reference_only("approx_emd", impl, x)
    return approx_emd_reference(x, y)


def exact_emd(x: Float[Tensor, "B N 3"], y: Float[Tensor, "B N 3"]) -> Float[Tensor, " B"]:
    """Earth mover's distance by optimal assignment: the mean SQUARED distance between assigned points.

    x, y: (B, N, 3), of one dtype, finite. Returns (B,) float32 (float64 for float64), in squared units of the
    coordinates. The assignment is found on the CPU in float64 (about a second per cloud of 2048 points);
    differentiable in x and y at fixed assignment. Deterministic.
    ValueError: shapes, dtypes or devices that do not fit; N differs; values that are not finite.
    """
    check_clouds(x=x, y=y)
    check_equal_sizes(x=x, y=y)
    check_finite(x=x, y=y)
    x, y = upcast(x), upcast(y)
    target = torch.empty(x.shape[:2], dtype=torch.int64)
    for b, (cloud_x, cloud_y) in enumerate(zip(to_numpy(x), to_numpy(y), strict=True)):
        target[b] = torch.from_numpy(assign(cloud_x, cloud_y))
    assigned = group_reference(y, target[..., None].to(y.device)).squeeze(2)
    return (x - assigned).square().sum(-1).mean(-1)


def assign(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Index of the point of y (N, 3) that the optimal assignment gives to each point of x (N, 3)."""
    return linear_sum_assignment(cdist(x, y, "sqeuclidean"))[1]


def to_numpy(clouds: Float[Tensor, "B N 3"]) -> np.ndarray:
    """Float64 on the CPU, as SciPy takes them."""
    return clouds.detach().double().cpu().numpy()


class _ApproxCost(torch.autograd.Function):
    """Cost of the approximate match; its gradients are made with it, as keeping the match takes B N M floats."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        (B, N, _), M = x.shape, y.shape[1]
        cost, grad_x, grad_y = x.new_empty(B), torch.empty_like(x), torch.empty_like(y)
        clouds = max(1, block_size(x) // (N * M))
        for i in range(0, B, clouds):
            b = slice(i, i + clouds)
            sqdist = squared_distances(x[b], y[b])
            match = _approx_match(sqdist)
            cost[b] = sqdist.mul_(match).sum((1, 2)) / N
            for axis in range(3) if any(ctx.needs_input_grad) else ():
                pull = torch.sub(x[b, :, None, axis], y[b, None, :, axis], out=sqdist).mul_(match)
                grad_x[b, :, axis] = pull.sum(2) * (2 / N)
                grad_y[b, :, axis] = pull.sum(1) * (-2 / N)
        ctx.save_for_backward(grad_x, grad_y)
        return cost

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        grad_x, grad_y = ctx.saved_tensors
        grad = grads[0][:, None, None]
        return grad_x * grad, grad_y * grad


def _approx_match(sqdist: Float[Tensor, "B N M"]) -> Float[Tensor, "B N M"]:
    B, N, M = sqdist.shape
    left = sqdist.new_full((B, N, 1), max(1.0, M / N))
    right = sqdist.new_full((B, 1, M), max(1.0, N / M))
    match, kernel, weighted = torch.zeros_like(sqdist), torch.empty_like(sqdist), torch.empty_like(sqdist)
    for level in _LEVELS:
        # exp(-80) moves no digit of anything, and nearer 0 CPUs fall to denormal numbers (5 times slower).
        torch.mul(sqdist, level, out=kernel).clamp_(min=-80).exp_()
        # Sums, not matrix products: those TF32 and autocast would round.
        offer = left / (torch.mul(kernel, right, out=weighted).sum(2, keepdim=True) + 1e-9)
        arriving = right * kernel.mul_(offer).sum(1, keepdim=True)
        taken = right * (right / (arriving + 1e-9)).clamp(max=1)
        right = (right - arriving).clamp(min=0)
        flow = kernel.mul_(taken)
        left = (left - flow.sum(2, keepdim=True)).clamp(min=0)
        match += flow
    return match


def check_equal_sizes(**clouds: Tensor) -> None:
    """Raise ``ValueError`` unless both clouds have as many points."""
    (first, a), (second, b) = clouds.items()
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{second}: expected as many points as {first} ({a.shape[1]}), got {b.shape[1]}")


def check_finite(**clouds: Tensor) -> None:
    """Raise ``ValueError`` unless all coordinates are finite."""
    for name, cloud in clouds.items():
        bad = int((~cloud.isfinite()).any(2).any(1).sum())
        if bad:
            raise ValueError(
                f"{name}: expected finite coordinates, got NaN or infinity in {bad} of {len(cloud)} clouds"
            )
