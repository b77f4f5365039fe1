"""Furthest point sampling.

    i_0 = 0,   i_{m+1} = argmax_n min_{j <= m} |p_n - p_{i_j}|^2

One running minimum per point, updated with the last centre only; equal distances go to the lowest index. When
every point coincides with a chosen one all distances are 0, and index 0 repeats.

One launch, one program per cloud: coordinates and running distances stay in registers up to 4096 points, and beyond
that the distances in a buffer; per sample N distances (8 N operations) and a reduction over the program. The cloud is
read once (12 N bytes) or, where it does not fit, once per sample (20 N bytes with the buffer).

Legend: B clouds, N points, M samples. Distances are float32 (in the reference float64 where the input is).
Source: Qi et al., "PointNet++", NeurIPS 2017; Gonzalez, "Clustering to minimize the maximum intercluster
distance", 1985.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from lion_triton.kernels._checks import Impl, check_integer, check_points, upcast, use_triton
from lion_triton.kernels._op import op
from lion_triton.kernels._points import load_points, point_sqdist
from lion_triton.kernels._triton import launch, tl, triton

# Most points in registers, and points per warp: eight a thread. Chosen by machine code, not by timing.
_MOST_POINTS, _POINTS_PER_WARP = 4096, 256


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


@triton.jit
def _furthest_kernel(points_ptr, idx_ptr, N, M, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """BLOCK: at least N. The minimum passes over what is not a number, so that only points of the cloud are chosen."""
    cloud = tl.program_id(0).to(tl.int64)
    points_ptr += cloud * N * 3
    idx_ptr += cloud * M
    n = tl.arange(0, BLOCK)
    live = n < N
    x, y, z = load_points(points_ptr, n, mask=live, other=0.0)
    nearest = tl.where(live, float("inf"), -1.0)
    chosen = tl.zeros((), tl.int32)
    tl.store(idx_ptr, chosen)
    for m in range(1, M):
        cx, cy, cz = load_points(points_ptr, chosen)
        nearest = tl.minimum(nearest, point_sqdist(x, y, z, cx, cy, cz))
        chosen = tl.argmax(nearest, 0)  # the first of equal ones
        tl.store(idx_ptr + m, chosen)


@triton.jit
def _furthest_large_kernel(points_ptr, nearest_ptr, idx_ptr, N, M, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Any N, a block at a time. The reductions are barriers between writing ``nearest`` and reading it again."""
    cloud = tl.program_id(0).to(tl.int64)
    points_ptr += cloud * N * 3
    nearest_ptr += cloud * N
    idx_ptr += cloud * M
    chosen = tl.zeros((), tl.int32)
    tl.store(idx_ptr, chosen)
    for m in range(1, M):
        cx, cy, cz = load_points(points_ptr, chosen)
        best = tl.full((BLOCK,), -1.0, tl.float32)
        best_n = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, N, BLOCK):
            n = first + tl.arange(0, BLOCK)
            live = n < N
            x, y, z = load_points(points_ptr, n, mask=live, other=0.0)
            nearest = tl.load(nearest_ptr + n, mask=live & (m > 1), other=float("inf"))
            nearest = tl.minimum(nearest, point_sqdist(x, y, z, cx, cy, cz))
            tl.store(nearest_ptr + n, nearest, mask=live)
            further = live & (nearest > best)
            best = tl.where(further, nearest, best)
            best_n = tl.where(further, n, best_n)
        chosen = tl.min(tl.where(best == tl.max(best, 0), best_n, N), 0)
        tl.store(idx_ptr + m, chosen)


def _empty_indices(points: Tensor, num_samples: int) -> Tensor:
    return points.new_empty((points.shape[0], num_samples), dtype=torch.int32)


@op(fake=_empty_indices)
def _furthest_point_sample_op(points: Tensor, num_samples: int) -> Tensor:
    B, N = points.shape[:2]
    idx, points = _empty_indices(points, num_samples), points.contiguous()
    block = min(triton.next_power_of_2(N), _MOST_POINTS)
    warps = max(1, block // _POINTS_PER_WARP)
    if block >= N:
        launch(_furthest_kernel, (B,), points, idx, N, num_samples, BLOCK=block, num_warps=warps)
    else:
        nearest = points.new_empty((B, N), dtype=torch.float32)
        launch(_furthest_large_kernel, (B,), points, nearest, idx, N, num_samples, BLOCK=block, num_warps=warps)
    return idx


def furthest_point_sample(
    points: Float[Tensor, "B N 3"], num_samples: int, *, impl: Impl = "auto"
) -> Int32[Tensor, "B M"]:
    """Indices of points, each the one furthest from all chosen before it, starting at point 0.

    points: (B, N, 3), any floating dtype. num_samples: 1 to N. Returns (B, num_samples) int32, in the order
    chosen; ties go to the lowest index. Not differentiable, deterministic. Triton computes float64 input in float32.
    Source: module docstring. ValueError: points not (B, N, 3) with N >= 1; num_samples outside [1, N].
    """
    check_points("points", points)
    N = points.shape[1]
    num_samples = check_integer("num_samples", num_samples, least=1)
    if num_samples > N:
        raise ValueError(f"num_samples: expected at most the number of points ({N}), got {num_samples}")
    if not use_triton(impl, points):
        return furthest_point_sample_reference(points, num_samples)
    return _furthest_point_sample_op(points, num_samples)
