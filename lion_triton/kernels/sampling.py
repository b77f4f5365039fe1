"""Furthest point sampling.

    i_0 = 0,   i_{m+1} = argmax_n min_{j <= m} |p_n - p_{i_j}|^2

One running minimum per point, updated with the last centre only; equal distances go to the lowest index. When
every point coincides with a chosen one all distances are 0, and index 0 repeats.

Legend: B clouds, N points, M samples. Distances are float32 (float64 where the input is).
Source: Qi et al., "PointNet++", NeurIPS 2017; Gonzalez, "Clustering to minimize the maximum intercluster
distance", 1985.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from lion_triton.kernels._checks import Impl, check_points, reference_only, upcast


def furthest_point_sample_reference(points: Float[Tensor, "B N 3"], num_samples: int) -> Int32[Tensor, "B M"]:
    """Plain PyTorch form of :func:`furthest_point_sample`."""
    axes = upcast(points.detach()).permute(2, 0, 1).contiguous()  # (3, B, N)
    B, N = axes.shape[1:]
    chosen = torch.zeros(num_samples, B, 1, dtype=torch.int64, device=points.device)
    nearest = axes.new_full((B, N), torch.inf)  # squared distance to the nearest chosen point
    diff = torch.empty_like(axes)
    dx, dy, dz = diff
    # The loop runs thousands of tiny steps: every operation writes into memory that exists.
    for m in range(1, num_samples):
        torch.sub(axes, axes.gather(2, chosen[m - 1].expand(3, B, 1)), out=diff)
        sqdist = dx.square_().addcmul_(dy, dy).addcmul_(dz, dz)
        torch.minimum(nearest, sqdist, out=nearest)
        if points.device.type == "cpu":  # NumPy's is vectorised: 10 times faster than PyTorch's
            nearest.numpy().argmax(1, out=chosen[m, :, 0].numpy())
        else:
            torch.argmax(nearest, 1, keepdim=True, out=chosen[m])
    return chosen[..., 0].T.int().contiguous()


def furthest_point_sample(
    points: Float[Tensor, "B N 3"], num_samples: int, *, impl: Impl = "auto"
) -> Int32[Tensor, "B M"]:
    """Indices of points, each the one furthest from all chosen before it, starting at point 0.

    points: (B, N, 3), any floating dtype. num_samples: 1 to N. Returns (B, num_samples) int32, in the order
    chosen; ties go to the lowest index. Not differentiable, deterministic.
    Source: module docstring. ValueError: points not (B, N, 3) with N >= 1; num_samples outside [1, N].
    """
    check_points("points", points)
    N = points.shape[1]
    if not isinstance(num_samples, int) or not 1 <= num_samples <= N:
        raise ValueError(f"num_samples: expected an integer from 1 to the number of points ({N}), got {num_samples!r}")
    reference_only("furthest_point_sample", impl, points)
    return furthest_point_sample_reference(points, num_samples)
