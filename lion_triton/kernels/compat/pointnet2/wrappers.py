"""The functions of ``pointnet2_cuda`` (Pointnet2.PyTorch, PointRCNN, OpenPCDet): outputs are tensors that are given.

Sizes come first, as in the originals, and are ignored: the tensors know them. ``*_grad_wrapper`` functions add to what
their output holds, the others overwrite it. Here sampling passes over no point, and ``three_nn_wrapper`` writes SQUARED
distances. All return 1. ValueError: arguments that do not fit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lion_triton import kernels
from lion_triton.kernels.compat._clouds import as_int, check_tensors, furthest_points
from lion_triton.kernels.compat.pointnet2.utils import (
    ball_query,
    gather_operation,
    grouping_operation,
    three_interpolate,
)

__all__ = [
    "ball_query_wrapper",
    "furthest_point_sampling_wrapper",
    "gather_points_grad_wrapper",
    "gather_points_wrapper",
    "group_points_grad_wrapper",
    "group_points_wrapper",
    "three_interpolate_grad_wrapper",
    "three_interpolate_wrapper",
    "three_nn_wrapper",
]


def furthest_point_sampling_wrapper(
    b: Any, n: Any, m: Any, points_tensor: Tensor, temp_tensor: Any, idx_tensor: Tensor
) -> int:
    """points (B, N, 3), idx (B, M). ``temp_tensor`` is not used."""
    check_tensors(points_tensor=points_tensor, idx_tensor=idx_tensor)
    return _write("idx_tensor", idx_tensor, furthest_points(points_tensor.detach(), as_int("m", m)))


def gather_points_wrapper(
    b: Any, c: Any, n: Any, npoints: Any, points_tensor: Tensor, idx_tensor: Tensor, out_tensor: Tensor
) -> int:
    """points (B, C, N), idx (B, M), out (B, C, M)."""
    return _write("out_tensor", out_tensor, gather_operation(points_tensor, idx_tensor))


def gather_points_grad_wrapper(
    b: Any, c: Any, n: Any, npoints: Any, grad_out_tensor: Tensor, idx_tensor: Tensor, grad_points_tensor: Tensor
) -> int:
    """grad_out (B, C, M), idx (B, M), grad_points (B, C, N)."""
    return _add_gradient(grad_points_tensor, grad_out_tensor, lambda points: gather_operation(points, idx_tensor))


def group_points_wrapper(
    b: Any, c: Any, n: Any, npoints: Any, nsample: Any, points_tensor: Tensor, idx_tensor: Tensor, out_tensor: Tensor
) -> int:
    """points (B, C, N), idx (B, M, U), out (B, C, M, U)."""
    return _write("out_tensor", out_tensor, grouping_operation(points_tensor, idx_tensor))


def group_points_grad_wrapper(
    b: Any,
    c: Any,
    n: Any,
    npoints: Any,
    nsample: Any,
    grad_out_tensor: Tensor,
    idx_tensor: Tensor,
    grad_points_tensor: Tensor,
) -> int:
    """grad_out (B, C, M, U), idx (B, M, U), grad_points (B, C, N)."""
    return _add_gradient(grad_points_tensor, grad_out_tensor, lambda points: grouping_operation(points, idx_tensor))


def ball_query_wrapper(
    b: Any,
    n: Any,
    m: Any,
    radius: float,
    nsample: Any,
    new_xyz_tensor: Tensor,
    xyz_tensor: Tensor,
    idx_tensor: Tensor,
) -> int:
    """new_xyz (B, M, 3), xyz (B, N, 3), idx (B, M, U)."""
    return _write("idx_tensor", idx_tensor, ball_query(radius, nsample, xyz_tensor, new_xyz_tensor))


def three_nn_wrapper(
    b: Any, n: Any, m: Any, unknown_tensor: Tensor, known_tensor: Tensor, dist2_tensor: Tensor, idx_tensor: Tensor
) -> int:
    """unknown (B, N, 3), known (B, M, 3), dist2 (B, N, 3), idx (B, N, 3)."""
    check_tensors(unknown_tensor=unknown_tensor, known_tensor=known_tensor)
    sqdist, idx = kernels.knn(unknown_tensor.detach(), known_tensor.detach(), 3)
    _write("dist2_tensor", dist2_tensor, sqdist)
    return _write("idx_tensor", idx_tensor, idx.clamp(min=0))


def three_interpolate_wrapper(
    b: Any,
    c: Any,
    m: Any,
    n: Any,
    points_tensor: Tensor,
    idx_tensor: Tensor,
    weight_tensor: Tensor,
    out_tensor: Tensor,
) -> int:
    """points (B, C, M), idx and weight (B, N, 3), out (B, C, N)."""
    return _write("out_tensor", out_tensor, three_interpolate(points_tensor, idx_tensor, weight_tensor))


def three_interpolate_grad_wrapper(
    b: Any,
    c: Any,
    n: Any,
    m: Any,
    grad_out_tensor: Tensor,
    idx_tensor: Tensor,
    weight_tensor: Tensor,
    grad_points_tensor: Tensor,
) -> int:
    """grad_out (B, C, N), idx and weight (B, N, 3), grad_points (B, C, M)."""

    def forward(points: Tensor) -> Tensor:
        return three_interpolate(points, idx_tensor, weight_tensor)

    return _add_gradient(grad_points_tensor, grad_out_tensor, forward)


@torch.no_grad()
def _write(name: str, output: Tensor, value: Tensor) -> int:
    check_tensors(**{name: output})
    if output.shape != value.shape:
        raise ValueError(f"{name}: expected shape {tuple(value.shape)}, got {tuple(output.shape)}")
    output.copy_(value)
    return 1


def _add_gradient(output: Tensor, grad: Tensor, forward: Any) -> int:
    check_tensors(grad_points_tensor=output, grad_out_tensor=grad)
    with torch.enable_grad():
        points = torch.zeros_like(output).requires_grad_()
        (gradient,) = torch.autograd.grad(forward(points), points, grad.detach())
    with torch.no_grad():
        output += gradient
    return 1
