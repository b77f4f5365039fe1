"""Points with normals to an indicator grid: the Poisson equation, solved in Fourier space, differentiably.

    v = sum_i normal_i delta(x - point_i)      laplace(chi) = -div(v)      so that grad(chi) = -v, blurred

With outward normals chi is high inside, low outside, and on the surface it is c = mean_i chi(point_i). The equation
leaves a constant and, as nobody knows the area that a point stands for, a factor open: chi is shifted by c and scaled
so that it is 0 on the surface and -1/2 far outside, hence about +1/2 inside.

On a grid with R nodes per side of the periodic unit cube, at k / R, normals are spread trilinearly over the eight
nodes around their point; in Fourier space the solution is a product per frequency u in Z^3,

    chi(u) = exp(-2 (pi sigma |u|)^2) (i u . v(u)) / (2 pi |u|^2),   chi(0) = 0,

where the factor in front is a Gaussian blur of standard deviation sigma.

Source: Peng et al., "Shape As Points: A Differentiable Poisson Solver", NeurIPS 2021, equations 5 to 9 (their sigma is
in nodes and pi times ours); Kazhdan et al., "Poisson Surface Reconstruction", SGP 2006.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lion_triton.kernels.rows import SparseRows, product, take_rows, transpose


class PoissonSolver(nn.Module):
    """:func:`poisson_indicator` at one resolution and blur, whose frequencies are computed once.

    Args:
        resolution: R, nodes per side.
        sigma: standard deviation of the blur, as a share of the cube's side.

    Raises:
        ValueError: resolution below 4, or negative sigma.
    """

    def __init__(self, resolution: int, sigma: float) -> None:
        super().__init__()
        if resolution < 4:
            raise ValueError(f"resolution: expected at least 4, got {resolution}")
        if not 0 <= sigma < math.inf:
            raise ValueError(f"sigma: expected a number >= 0, got {sigma}")
        self.resolution, self.sigma = resolution, sigma
        u = torch.fft.fftfreq(resolution, 1 / resolution, dtype=torch.float64)
        last = torch.fft.rfftfreq(resolution, 1 / resolution, dtype=torch.float64)
        square = u[:, None, None].square() + u[:, None].square() + last.square()
        blur = torch.exp(-2 * (math.pi * sigma) ** 2 * square)
        self.inverse_laplacian: Tensor
        self.derivative: Tensor
        self.register_buffer("inverse_laplacian", blur / (2 * math.pi * square.clamp_min(1)), persistent=False)
        # The highest frequency of an even grid has no sign, hence no derivative.
        self.register_buffer("derivative", torch.where(u.abs() * 2 == resolution, 0, u), persistent=False)

    def forward(self, points: Float[Tensor, "B N 3"], normals: Float[Tensor, "B N 3"]) -> Float[Tensor, "B R R R"]:
        """See :func:`poisson_indicator`."""
        potential, height = self.potential(points, normals)
        return potential * (0.5 / height.clamp_min(torch.finfo(height.dtype).tiny ** 0.5)).view(-1, 1, 1, 1)

    def potential(
        self, points: Float[Tensor, "B N 3"], normals: Float[Tensor, "B N 3"]
    ) -> tuple[Float[Tensor, "B R R R"], Float[Tensor, " B"]]:
        """chi - c in the units of the normals' mean over the points, and how far below 0 that is outside: (B,).

        Linear in the normals, so that it can be learned where the indicator, which is divided by the latter, explodes.
        """
        for name, x in (("points", points), ("normals", normals)):
            if x.ndim != 3 or x.shape[-1] != 3 or x.shape[1] == 0:
                raise ValueError(f"{name}: expected shape (B, N, 3) with N >= 1, got {tuple(x.shape)}")
            if x.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{name}: expected float32 or float64, got {x.dtype}")
        if points.shape != normals.shape or points.dtype != normals.dtype:
            raise ValueError(
                f"normals: expected {points.dtype} of shape {tuple(points.shape)} like points, "
                f"got {normals.dtype} of shape {tuple(normals.shape)}"
            )
        B, R = points.shape[0], self.resolution
        if max(B * R**3, 8 * B * points.shape[1]) >= 2**31:
            raise ValueError(f"points: expected B R^3 and 8 B N below 2^31, got {tuple(points.shape)} and R = {R}")
        index, weight = _corners(points, R)
        field = _Spread.apply((normals / normals.shape[1]).flatten(0, 1), index, weight, B * R**3).view(B, R, R, R, 3)
        chi = _Solve.apply(
            field.movedim(-1, 0), self.derivative.to(points.dtype), self.inverse_laplacian.to(points.dtype)
        )
        surface = _gather(chi, index, weight).mean(1)
        # The cube's faces: with periodic borders one of each pair is all there is.
        outside = torch.stack((chi[:, 0].mean((1, 2)), chi[:, :, 0].mean((1, 2)), chi[..., 0].mean((1, 2)))).mean(0)
        return chi - surface.view(-1, 1, 1, 1), (surface - outside).abs()


def poisson_indicator(
    points: Float[Tensor, "B N 3"], normals: Float[Tensor, "B N 3"], resolution: int, sigma: float
) -> Float[Tensor, "B R R R"]:
    """The indicator of the solids whose surfaces run through ``points``: 0 there, about +1/2 inside, -1/2 outside.

    points: (B, N, 3), float32 or float64, in the unit cube, which is periodic: leave a margin of at least 0.05, and
    whatever lies outside comes in again at the other side. normals: like points, outward; their lengths weigh the
    points. resolution: nodes per side R, at coordinates k / R. sigma: blur, as a share of the cube's side.

    Differentiable once in both (the points' cells are taken as fixed, as in any trilinear interpolation).
    Deterministic: no atomics. The formula and its source are at the head of this file.
    ValueError: other shapes or dtypes, resolution below 4, negative sigma.
    """
    return PoissonSolver(resolution, sigma).to(points.device)(points, normals)


def sample_grid(grid: Float[Tensor, "B R R R"], points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N"]:
    """The trilinear value at each point of a periodic grid; differentiable in both."""
    return _gather(grid, *_corners(points, grid.shape[-1]))


def _gather(grid: Float[Tensor, "B R R R"], index: Tensor, weight: Tensor) -> Float[Tensor, "B N"]:
    return take_rows(grid.reshape(-1, 1), index, weight).view(grid.shape[0], -1)


def _corners(points: Float[Tensor, "B N 3"], resolution: int) -> tuple[Int[Tensor, "BN 8"], Float[Tensor, "BN 8"]]:
    """The nodes around each point, as rows of the batch's grids, and their trilinear weights."""
    B, N, R = *points.shape[:2], resolution
    scaled = points.flatten(0, 1) * R
    floor = scaled.detach().floor()
    fraction = scaled - floor
    low = floor.int().remainder(R)
    x, y, z = torch.stack((low, (low + 1).remainder(R))).unbind(-1)  # (2, B N) each: lower and upper node
    wx, wy, wz = torch.stack((1 - fraction, fraction)).unbind(-1)
    cloud = torch.arange(B, dtype=torch.int32, device=points.device).repeat_interleave(N)
    node = (((cloud * R + x)[:, None, None] * R + y[:, None]) * R + z).view(8, -1)
    weight = (wx[:, None, None] * wy[:, None] * wz).reshape(8, -1)
    return node.t().contiguous(), weight.t().contiguous()


class _Spread(torch.autograd.Function):
    """grid[index[p, k]] += weight[p, k] value[p]: the transpose of ``take_rows``, and differentiable in both."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, index: Tensor, weight: Tensor, num_nodes: int) -> Tensor:
        ctx.save_for_backward(value, index, weight)
        gather = SparseRows(index, None, weight)
        return product(value, transpose(index, weight, num_nodes), gather)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, index, weight = ctx.saved_tensors
        corners = grad.contiguous()[index]  # (P, 8, 3)
        return (corners * weight[..., None]).sum(1), None, torch.einsum("pkc,pc->pk", corners, value), None


class _Solve(torch.autograd.Function):
    """chi of the field (3, B, R, R, R): linear, so its backward is its transpose, half the work of autograd's own."""

    @staticmethod
    def forward(ctx: Any, field: Tensor, derivative: Tensor, inverse_laplacian: Tensor) -> Tensor:
        ctx.save_for_backward(derivative, inverse_laplacian)
        x, y, z = torch.fft.rfftn(field.contiguous(), dim=(2, 3, 4))
        last = derivative[: z.shape[-1]]
        divergence = derivative[:, None, None] * x + derivative[:, None] * y + last * z
        return torch.fft.irfftn(1j * inverse_laplacian * divergence, s=field.shape[2:], dim=(1, 2, 3))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        derivative, inverse_laplacian = ctx.saved_tensors
        waves = -1j * inverse_laplacian * torch.fft.rfftn(grad, dim=(1, 2, 3))
        last = derivative[: waves.shape[-1]]
        parts = torch.stack((derivative[:, None, None] * waves, derivative[:, None] * waves, last * waves))
        return torch.fft.irfftn(parts, s=grad.shape[1:], dim=(2, 3, 4)), None, None
