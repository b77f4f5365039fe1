"""What a cloud looks like around each of its points: how many points there are, where, and how they spread.

    w_j = (1 - |p_j - p_i|^2 / r^2)^2 within the radius r (the biweight kernel), 0 outside; the point itself counts as 1
    W = sum_j w_j,  m = sum_j w_j (p_j - p_i) / (r W),  C = sum_j w_j (p_j - p_i)(p_j - p_i)^T / (r^2 W) - m m^T

at several radii, each half of the one before. The least eigenvector of C is the surface's normal, m along it how far
the point lies off the surface. About 35 operations a pair of points and radius.

Legend: B clouds, N points, S radii. float32 (in the reference float64 where the input is). No gradients.
Source: weighted covariances as in Alexa et al., "Point Set Surfaces", 2001; the kernel: Silverman 1986, table 3.1.
"""

from __future__ import annotations

from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor

from lion_triton.kernels._checks import Impl, check_integer, check_points, sums_dtype, upcast, use_triton
from lion_triton.kernels._op import op
from lion_triton.kernels._points import load_points, load_scalars, points_at_a_time, points_per_program, sqdist_blocks
from lion_triton.kernels._triton import cdiv, launch, tl, triton

MOMENTS = 10  # log W, m, and C as xx, xy, xz, yy, yz, zz
_COLUMNS = 16  # of the reference's product: with 10 it takes three times as long
_BLOCKS, _WARPS = (256, 128), 4


def local_moments_reference(points: Float[Tensor, "B N 3"], radius: float, scales: int) -> Float[Tensor, "B N S 10"]:
    """Plain PyTorch form of :func:`local_moments`: matrix products of the weights with powers of all coordinates.

    These count from the cloud's centre: at a distance d from there C is off by about eps (d / r)^2.
    """
    points = upcast(points.detach())
    centered = points - points.mean(1, keepdim=True)
    powers = points.new_zeros(*points.shape[:2], _COLUMNS)
    powers[..., 0].fill_(1)
    powers[..., 1:4], powers[..., 4:MOMENTS] = centered, _products(centered)
    sums = points.new_empty(*points.shape[:2], scales, MOMENTS)
    for b, i, sqdist in sqdist_blocks(points, points):
        for scale in range(scales):
            weights = torch.rsub(sqdist, 1, alpha=4.0**scale / radius / radius).clamp_min_(0).square_()
            sums[b, i, scale] = (weights @ powers[b])[..., :MOMENTS]
    radii = radius / 2.0 ** torch.arange(scales, device=points.device, dtype=points.dtype)[:, None]
    total = sums[..., :1]
    mean, second = sums[..., 1:4] / total, sums[..., 4:] / total
    spread = (second - _products(mean)) / radii / radii  # their squares may overflow
    return torch.cat([total.log(), (mean - centered[:, :, None]) / radii, spread], -1)


def _products(x: Float[Tensor, "... 3"]) -> Float[Tensor, "... 6"]:
    """xx, xy, xz, yy, yz, zz"""
    return torch.cat([x[..., i : i + 1] * x[..., i:] for i in range(3)], -1)


@triton.jit
def _local_moments_kernel(  # type: ignore[no-untyped-def]
    points_ptr, moments_ptr, inverse, N, blocks, S, BLOCK: tl.constexpr, UNROLL: tl.constexpr
):
    """inverse: 1 / r of the largest radius. UNROLL: at most N."""
    scale = tl.program_id(1)
    for _ in range(scale):
        inverse *= 2.0
    cloud = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    live = n < N
    px, py, pz = load_points(points_ptr, cloud * N + tl.minimum(n, N - 1))
    points_ptr += cloud * N * 3
    total = tl.zeros((BLOCK,), tl.float32)
    x, y, z = total, total, total
    xx, xy, xz, yy, yz, zz = total, total, total, total, total, total
    ahead = load_scalars(points_ptr, 3 * UNROLL)
    for j in range(0, N, UNROLL):
        q = ahead
        ahead = load_scalars(points_ptr + tl.minimum(j + UNROLL, N - UNROLL).to(tl.int64) * 3, 3 * UNROLL)
        for u in tl.static_range(UNROLL):
            dx = (q[3 * u] - px) * inverse
            dy = (q[3 * u + 1] - py) * inverse
            dz = (q[3 * u + 2] - pz) * inverse
            w = tl.maximum(1.0 - (dx * dx + dy * dy + dz * dz), 0.0, propagate_nan=tl.PropagateNan.ALL)
            w *= w
            w = tl.where(tl.minimum(j, N - UNROLL) + u >= j, w, 0.0)  # the last group may begin with points that were
            total += w
            wx, wy, wz = w * dx, w * dy, w * dz
            x, y, z = x + wx, y + wy, z + wz
            xx, xy, xz = xx + wx * dx, xy + wx * dy, xz + wx * dz
            yy, yz, zz = yy + wy * dy, yz + wy * dz, zz + wz * dz
    slots = moments_ptr + ((cloud * N + n) * S + scale) * 10
    x, y, z = x / total, y / total, z / total
    tl.store(slots, tl.log(total), mask=live)
    tl.store(slots + 1, x, mask=live)
    tl.store(slots + 2, y, mask=live)
    tl.store(slots + 3, z, mask=live)
    tl.store(slots + 4, xx / total - x * x, mask=live)
    tl.store(slots + 5, xy / total - x * y, mask=live)
    tl.store(slots + 6, xz / total - x * z, mask=live)
    tl.store(slots + 7, yy / total - y * y, mask=live)
    tl.store(slots + 8, yz / total - y * z, mask=live)
    tl.store(slots + 9, zz / total - z * z, mask=live)


def _empty(points: Tensor, radius: float, scales: int) -> Tensor:
    return points.new_empty((*points.shape[:2], scales, MOMENTS), dtype=sums_dtype(points))


@op(fake=_empty)
def _local_moments_op(points: Tensor, radius: float, scales: int) -> Tensor:
    moments = _empty(points, radius, scales)
    B, N = points.shape[:2]
    block = points_per_program(B * N * scales, _BLOCKS)
    blocks = cdiv(N, block)
    launch(
        _local_moments_kernel,
        (B * blocks, scales),
        points.contiguous(),
        moments,
        1.0 / radius,
        N,
        blocks,
        scales,
        BLOCK=block,
        UNROLL=points_at_a_time(points),
        num_warps=_WARPS,
    )
    return moments


def local_moments(
    points: Float[Tensor, "B N 3"], radius: float, scales: int = 3, *, impl: Impl = "auto"
) -> Float[Tensor, "B N S 10"]:
    """Weight, mean offset and covariance of the points around each point of its cloud, within some radii.

    points: (B, N, 3). radius: > 0, the largest, in units of the coordinates. scales: S >= 1, each radius half of the
    one before. Returns (B, N, S, 10) float32 (float64 for float64): log W, m as x, y, z and C as xx, xy, xz, yy, yz, zz
    (see the module), m in units of the radius and C of its square; a point without others has zeros. No gradient to
    coordinates; deterministic. Triton computes float64 input in float32.
    ValueError: shapes or dtypes that do not fit; radius <= 0; scales < 1.
    """
    check_points("points", points)
    if not isinstance(radius, Real) or not radius > 0:
        raise ValueError(f"radius: expected a number > 0, got {radius!r}")
    scales = check_integer("scales", scales, least=1)
    if not use_triton(impl, points):
        return local_moments_reference(points, float(radius), scales)
    return _local_moments_op(points.detach(), float(radius), scales)
