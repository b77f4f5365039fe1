"""Each op against the formulation that one would write first in eager PyTorch, on the same inputs.

Shapes are those of LION's layers, with a batch that suits the device. ``pytest bench/`` prints one table per op.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from lion_triton import kernels

N, M, K, C, R = 2048, 1024, 32, 64, 16


def _sqdist(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, :, None] - y[:, None]).square().sum(-1)


def chamfer_eager(x: Tensor, y: Tensor) -> Tensor:
    d = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    return d.min(2).values.mean(1) + d.min(1).values.mean(1)


def ball_query_eager(centers: Tensor, points: Tensor) -> Tensor:
    inside = _sqdist(centers, points) < 0.2**2
    order = torch.where(inside, torch.arange(points.shape[1], device=points.device), points.shape[1])
    first = order.topk(K, largest=False).values.sort().values
    return torch.where(first == points.shape[1], first[..., :1], first).int()


def three_nn_eager(points: Tensor, centers: Tensor) -> Tensor:
    d, _ = _sqdist(points, centers).topk(3, largest=False)
    w = 1 / d.clamp(1e-10, 1e10)
    return w / w.sum(-1, keepdim=True)


def furthest_point_eager(points: Tensor) -> Tensor:
    chosen = torch.zeros(points.shape[0], M, dtype=torch.int64, device=points.device)
    nearest = torch.full(points.shape[:2], torch.inf, device=points.device)
    last = chosen[:, 0]
    for i in range(1, M):
        center = points.gather(1, last[:, None, None].expand(-1, 1, 3))
        nearest = torch.minimum(nearest, (points - center).square().sum(-1))
        last = nearest.argmax(1)
        chosen[:, i] = last
    return chosen.int()


def voxelize_eager(features: Tensor, coords: Tensor) -> Tensor:
    b = features.shape[0]
    x, y, z = coords.round().long().unbind(-1)
    index = ((x * R + y) * R + z + torch.arange(b, device=x.device)[:, None] * R**3).flatten()
    total = features.new_zeros(b * R**3, C).index_add_(0, index, features.flatten(0, 1))
    count = features.new_zeros(b * R**3).index_add_(0, index, torch.ones_like(index, dtype=features.dtype))
    return (total / count.clamp_min(1)[:, None]).view(b, R, R, R, C)


def devoxelize_eager(voxels: Tensor, coords: Tensor) -> Tensor:
    grid = (coords / (R - 1) * 2 - 1).flip(-1)[:, :, None, None]
    out = F.grid_sample(voxels.permute(0, 4, 1, 2, 3), grid, align_corners=True, padding_mode="border")
    return out[..., 0, 0].transpose(1, 2)


def adagn_eager(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    normal = F.group_norm(x.transpose(1, 2), 8, weight, bias).transpose(1, 2)
    return F.silu(normal * scale[:, None] + shift[:, None])


def noise_mse_eager(x_0: Tensor, alpha: Tensor, sigma: Tensor, key: Tensor) -> Tensor:
    noise = kernels.normal_noise(x_0.shape, key)
    x_t = alpha[:, None, None] * x_0 + sigma[:, None, None] * noise
    return (noise - x_t).square().flatten(1).mean(1)


def noise_mse_ours(x_0: Tensor, alpha: Tensor, sigma: Tensor, key: Tensor) -> Tensor:
    return kernels.noise_mse(kernels.q_sample(x_0, alpha, sigma, key), key)


@dataclass(frozen=True)
class Case:
    """One op: its inputs from the random clouds, ours and the eager way."""

    name: str
    inputs: Callable[[Callable[..., Tensor]], tuple[Tensor, ...]]
    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    backward: bool


CASES = [
    Case("chamfer_distance", lambda r: (r(N, 3), r(N, 3)), kernels.chamfer_distance, chamfer_eager, True),
    Case(
        "ball_query",
        lambda r: (r(N, 3),),
        lambda p: kernels.ball_query(p[:, :M], p, 0.2, K),
        lambda p: ball_query_eager(p[:, :M], p),
        False,
    ),
    Case("three_nn", lambda r: (r(N, 3), r(M, 3)), lambda p, c: kernels.three_nn(p, c)[0], three_nn_eager, False),
    Case(
        "furthest_point_sample",
        lambda r: (r(N, 3),),
        lambda p: kernels.furthest_point_sample(p, M),
        furthest_point_eager,
        False,
    ),
    Case(
        "avg_voxelize",
        lambda r: (r(N, C), r(N, 3).sigmoid() * (R - 1)),
        lambda f, c: kernels.avg_voxelize(f, c, R),
        voxelize_eager,
        True,
    ),
    Case(
        "trilinear_devoxelize",
        lambda r: (r(R, R, R, C), r(N, 3).sigmoid() * (R - 1)),
        kernels.trilinear_devoxelize,
        devoxelize_eager,
        True,
    ),
    Case(
        "adagn",
        lambda r: (r(N, C), r(C), r(C), r(C)[0], r(C)[0]),
        lambda x, a, b, w, c: kernels.adagn(x, a, b, w, c, 8, act="silu"),
        adagn_eager,
        True,
    ),
    Case(
        "q_sample+noise_mse",
        lambda r: (r(N, 4), r().sigmoid(), r().sigmoid(), torch.tensor([7, 0], device=r().device)),
        noise_mse_ours,
        noise_mse_eager,
        True,
    ),
]
TIMED = [
    pytest.param(case, way, backward, id=f"{case.name}-{'forward+backward' if backward else 'forward'}-{way}")
    for case in CASES
    for backward in ([False, True] if case.backward else [False])
    for way in ("ours", "eager")
]


@pytest.mark.parametrize(("case", "way", "backward"), TIMED)
def test_op(benchmark: BenchmarkFixture, device: torch.device, case: Case, way: str, backward: bool) -> None:
    batch = 32 if device.type == "cuda" else 2
    generator = torch.Generator().manual_seed(0)
    inputs = case.inputs(lambda *shape: torch.randn(batch, *shape, generator=generator).to(device))
    torch.testing.assert_close(case.ours(*inputs), case.eager(*inputs), rtol=1e-3, atol=1e-4)

    inputs = tuple(x.detach().requires_grad_(backward and i == 0) for i, x in enumerate(inputs))
    function = getattr(case, way)
    grad = torch.randn_like(function(*inputs)) if backward else None

    def run() -> Any:
        out = function(*inputs)
        if grad is not None:
            out = torch.autograd.grad(out, inputs[0], grad)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return out

    benchmark.group = f"{case.name}, {'forward + backward' if backward else 'forward'}, batch {batch}"
    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
