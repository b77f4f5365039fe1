"""Every op of ``lion_triton.kernels`` with what a fair comparison needs: inputs, baselines, least work, tests, targets.

A baseline is what one would write first in eager PyTorch; ``torch.compile`` gets the same function. Where that draws
noise of its own or takes distances from ``torch.cdist`` (a matrix product: fast, and without the digits of small
distances), ``exact`` names the arguments that make it comparable; outputs are checked against that form.

Least work counts each input read once and each output written once. Exceptions, which fit in no cache: group norm
reads its input twice (statistics, then values), and its backward reads input and cotangent twice. A plan counts with
four bytes per index and per weight. Every squared distance is 7 operations and its comparison 1; an exponential is 1.
Voxel coordinates are uniform, so that the expected number of voxels that are touched is known.
Inputs that are another op's output are made by its reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lion_triton import kernels
from lion_triton.kernels.dropout import keep_mask_reference, keep_threshold
from lion_triton.kernels.noise import normal_noise_reference
from lion_triton.kernels.voxel import cells_reference
from lion_triton.kernels.voxel_conv import conv3d


@dataclass(frozen=True)
class Shape:
    """Sizes of one case; the letters are those of the ops' docstrings, 0 where an op has no such size."""

    B: int
    N: int
    M: int = 0
    K: int = 0
    C: int = 0
    R: int = 0
    dtype: torch.dtype = torch.float32  # of features; coordinates are float32 always

    @property
    def sizes(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "dtype" and getattr(self, f.name)}

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes.items())
        return sizes if self.dtype == torch.float32 else f"{sizes} {str(self.dtype)[6:]}"


class Cost(NamedTuple):
    """Least work of one pass: bytes from and to memory, float32 operations, normals made from a key."""

    bytes: int
    operations: int = 0
    normals: int = 0


@dataclass(frozen=True)
class Target:
    """A goal on an H200-class GPU: a share of the floor, at most so many seconds, or so many times a way's speed."""

    of: str
    value: float
    passes: tuple[str, ...] = ("forward", "backward")
    at: Callable[[Shape], bool] = lambda s: True

    def __str__(self) -> str:
        if self.of == "floor":
            return f"{self.value:.0%} of the floor"
        return f"at most {1e6 * self.value:g} us" if self.of == "seconds" else f"{self.value:g}x {self.of}"


class Draw:
    """Random inputs, the same for the same seed and device."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)

    def normal(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=self.generator, device=self.device).to(dtype)

    def uniform(self, *size: int) -> Tensor:
        return torch.rand(size, generator=self.generator, device=self.device)

    def points(self, B: int, N: int) -> Tensor:
        """Points on an ellipsoid as large as LION's shapes: surfaces, not volumes, fill its balls and voxels."""
        return F.normalize(self.normal(B, N, 3), dim=-1) * torch.tensor([0.5, 0.3, 0.4], device=self.device)

    def key(self) -> Tensor:
        return torch.tensor([7, 0, 0], device=self.device)


@dataclass(frozen=True, eq=False)
class Op:
    """One row of the registry.

    Attributes:
        tests: files that guard it; if they fail, it gets no number.
        gpu, cpu: LION's shapes for a GPU, one small shape for a CPU.
        inputs: the arguments of ``ours``, ``eager`` and the peers, from a shape.
        ours: takes ``impl=`` as well.
        exact: keywords of ``eager`` that make its outputs comparable.
        forward, backward: least work.
        wrt: which inputs get a gradient.
        peers: by the name of the package that each imports.
        compiles: False where compiling would unroll a long loop.
    """

    name: str
    tests: tuple[str, ...]
    gpu: tuple[Shape, ...]
    cpu: Shape
    inputs: Callable[[Shape, Draw], tuple[Any, ...]]
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    forward: Callable[[Shape], Cost]
    backward: Callable[[Shape], Cost] | None = None
    wrt: tuple[int, ...] = ()
    exact: dict[str, Any] = field(default_factory=dict)
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    compiles: bool = True
    targets: tuple[Target, ...] = ()

    @property
    def passes(self) -> tuple[str, ...]:
        return ("forward",) if self.backward is None else ("forward", "backward", "both")

    def cost(self, which: str, shape: Shape) -> Cost:
        forward = self.forward(shape)
        if self.backward is None or which == "forward":
            return forward
        backward = self.backward(shape)
        if which == "backward":
            return backward
        return Cost(*(a + b for a, b in zip(forward, backward, strict=True)))


# Diffusion. E elements of e bytes. The eager forms draw their noise as people do, with randn_like.


def our_noise(x: Tensor, stream: int = 0) -> Tensor:
    """What the fused ops draw with ``Draw.key()``; stream 1 is the posterior's."""
    return normal_noise_reference(x.shape, torch.tensor([7, 0], device=x.device), stream).to(x.dtype)


def posterior_noise(x: Tensor) -> Tensor:
    return our_noise(x, stream=1)


def _elements(s: Shape) -> int:
    return s.B * s.N * s.C


def _bytes(s: Shape) -> int:
    """Bytes of one batch of features (B, N, C)."""
    return s.B * s.N * s.C * s.dtype.itemsize


def _cloud(s: Shape, draw: Draw) -> Tensor:
    return draw.normal(s.B, s.N, s.C, dtype=s.dtype)


def noise_eager(shape: tuple[int, ...], key: Tensor, randn: Callable[[Tensor], Tensor] = torch.randn_like) -> Tensor:
    return randn(torch.empty(shape, device=key.device))


def q_sample_eager(
    x_0: Tensor, alpha: Tensor, sigma: Tensor, key: Tensor, randn: Callable[[Tensor], Tensor] = torch.randn_like
) -> Tensor:
    return alpha[:, None, None] * x_0 + sigma[:, None, None] * randn(x_0)


def posterior_q_sample_eager(
    mu: Tensor,
    log_sigma: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    key: Tensor,
    randn: Callable[[Tensor], Tensor] = torch.randn_like,
    randn_1: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    return q_sample_eager(mu + log_sigma.exp() * randn_1(mu), alpha, sigma, key, randn)


def noise_mse_eager(pred: Tensor, key: Tensor, noise: Tensor) -> Tensor:
    return (noise - pred).square().flatten(1).mean(1)


def diffusion_loss_eager(
    x_0: Tensor, alpha: Tensor, sigma: Tensor, key: Tensor, randn: Callable[[Tensor], Tensor] = torch.randn_like
) -> Tensor:
    noise = randn(x_0)
    x_t = alpha[:, None, None] * x_0 + sigma[:, None, None] * noise
    return (noise - x_t).square().flatten(1).mean(1)


def diffusion_loss_ours(x_0: Tensor, alpha: Tensor, sigma: Tensor, key: Tensor, impl: Any) -> Tensor:
    return kernels.noise_mse(kernels.q_sample(x_0, alpha, sigma, key, impl=impl), key, impl=impl)


def ancestral_step_eager(
    x_t: Tensor,
    eps: Tensor,
    coef_x: Tensor,
    coef_eps: Tensor,
    rho: Tensor,
    key: Tensor,
    randn: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    mean = coef_x[:, None, None] * x_t - coef_eps[:, None, None] * eps
    return mean + rho[:, None, None] * randn(x_t)


def gaussian_kl_eager(mu: Tensor, log_sigma: Tensor) -> Tensor:
    return (0.5 * (mu.square() + (2 * log_sigma).exp() - 1) - log_sigma).flatten(1).sum(1)


# LION's latent clouds, 16 times as many, and 64M elements, where launching no longer matters.
LATENTS = (Shape(32, 2048, C=4), Shape(512, 2048, C=4), Shape(8192, 2048, C=4))
DIFFUSION_TESTS = ("tests/kernels/test_noise.py", "tests/kernels/test_diffusion_ops.py")
DIFFUSION_TARGETS = (
    Target("floor", 0.85, at=lambda s: _elements(s) >= 64_000_000),
    Target("eager", 5, at=lambda s: s.B == 32),
)
SMALL_LATENTS = Shape(2, 256, C=4)

DIFFUSION = (
    Op(
        "normal_noise",
        DIFFUSION_TESTS[:1],
        LATENTS,
        SMALL_LATENTS,
        inputs=lambda s, draw: ((s.B, s.N, s.C), draw.key()),
        ours=kernels.normal_noise,
        eager=noise_eager,
        exact={"randn": our_noise},
        forward=lambda s: Cost(4 * _elements(s), normals=_elements(s)),
    ),
    Op(
        "q_sample",
        DIFFUSION_TESTS,
        LATENTS,
        SMALL_LATENTS,
        inputs=lambda s, draw: (_cloud(s, draw), draw.uniform(s.B), draw.uniform(s.B), draw.key()),
        ours=kernels.q_sample,
        eager=q_sample_eager,
        exact={"randn": our_noise},
        forward=lambda s: Cost(2 * _bytes(s), 3 * _elements(s), _elements(s)),
        backward=lambda s: Cost(2 * _bytes(s), _elements(s)),
        wrt=(0,),
        targets=DIFFUSION_TARGETS,
    ),
    Op(
        "posterior_q_sample",
        DIFFUSION_TESTS,
        LATENTS,
        SMALL_LATENTS,
        inputs=lambda s, draw: (
            _cloud(s, draw),
            0.5 * _cloud(s, draw),
            draw.uniform(s.B),
            draw.uniform(s.B),
            draw.key(),
        ),
        ours=kernels.posterior_q_sample,
        eager=posterior_q_sample_eager,
        exact={"randn": our_noise, "randn_1": posterior_noise},
        forward=lambda s: Cost(3 * _bytes(s), 6 * _elements(s), 2 * _elements(s)),
        backward=lambda s: Cost(4 * _bytes(s), 4 * _elements(s), _elements(s)),
        wrt=(0, 1),
    ),
    Op(
        "noise_mse",
        DIFFUSION_TESTS,
        LATENTS,
        SMALL_LATENTS,
        inputs=lambda s, draw: (pred := _cloud(s, draw), draw.key(), our_noise(pred)),
        ours=lambda pred, key, noise, impl: kernels.noise_mse(pred, key, impl=impl),
        eager=noise_mse_eager,  # with the noise stored, as an eager training step has it
        forward=lambda s: Cost(_bytes(s), 3 * _elements(s), _elements(s)),
        backward=lambda s: Cost(2 * _bytes(s), 2 * _elements(s), _elements(s)),
        wrt=(0,),
        targets=DIFFUSION_TARGETS,
    ),
    Op(
        "q_sample + noise_mse",
        DIFFUSION_TESTS,
        LATENTS,
        SMALL_LATENTS,
        inputs=lambda s, draw: (_cloud(s, draw), draw.uniform(s.B), draw.uniform(s.B), draw.key()),
        ours=diffusion_loss_ours,
        eager=diffusion_loss_eager,
        exact={"randn": our_noise},
        # Between the two stands the network, so x_t is written and read.
        forward=lambda s: Cost(3 * _bytes(s), 6 * _elements(s), 2 * _elements(s)),
        backward=lambda s: Cost(4 * _bytes(s), 3 * _elements(s), _elements(s)),
        wrt=(0,),
        targets=DIFFUSION_TARGETS,
    ),
    Op(
        "ancestral_step",
        DIFFUSION_TESTS,
        LATENTS,
        SMALL_LATENTS,
        inputs=lambda s, draw: (
            _cloud(s, draw),
            _cloud(s, draw),
            draw.uniform(s.B),
            draw.uniform(s.B),
            draw.uniform(s.B),
            draw.key(),
        ),
        ours=kernels.ancestral_step,
        eager=ancestral_step_eager,
        exact={"randn": our_noise},
        forward=lambda s: Cost(3 * _bytes(s), 5 * _elements(s), _elements(s)),
    ),
    Op(
        "gaussian_kl",
        DIFFUSION_TESTS,
        LATENTS,
        SMALL_LATENTS,
        inputs=lambda s, draw: (_cloud(s, draw), 0.5 * _cloud(s, draw)),
        ours=kernels.gaussian_kl,
        eager=gaussian_kl_eager,
        forward=lambda s: Cost(2 * _bytes(s), 8 * _elements(s)),
        backward=lambda s: Cost(4 * _bytes(s), 5 * _elements(s)),
        wrt=(0, 1),
    ),
)


# Voxels


def _touched(s: Shape, per_point: int) -> float:
    """Expected number of a cloud's voxels that at least one point reads or writes, ``per_point`` voxels a point."""
    voxels = s.R**3
    return voxels * (1 - (1 - min(1.0, per_point / voxels)) ** s.N)


def _grid_bytes(s: Shape, voxels: float) -> int:
    """Bytes of so many voxels' features per cloud."""
    return round(s.B * voxels * s.C * s.dtype.itemsize)


def _coords(s: Shape, draw: Draw) -> Tensor:
    return draw.uniform(s.B, s.N, 3) * (s.R - 1)


def voxel_index(xyz: Tensor, R: int) -> Tensor:
    """Index (B, ...) over the voxels of all clouds, int64, of integer coordinates (B, ..., 3)."""
    x, y, z = xyz.long().unbind(-1)
    cloud = torch.arange(len(xyz), device=xyz.device).view(-1, *[1] * (x.ndim - 1))
    return ((cloud * R + x) * R + y) * R + z


def avg_voxelize_eager(features: Tensor, coords: Tensor, plan: kernels.VoxelPlan) -> Tensor:
    (B, _, C), R = features.shape, plan.resolution
    index = voxel_index(coords.round(), R).flatten()
    total = features.new_zeros(B * R**3, C).index_add_(0, index, features.flatten(0, 1))
    count = features.new_zeros(B * R**3).index_add_(0, index, torch.ones_like(index, dtype=features.dtype))
    return (total / count.clamp_min(1)[:, None]).view(B, R, R, R, C)


def trilinear_devoxelize_eager(voxels: Tensor, coords: Tensor, plan: kernels.VoxelPlan) -> Tensor:
    grid = (coords / (voxels.shape[1] - 1) * 2 - 1).flip(-1)[:, :, None, None]
    grids = voxels.float().permute(0, 4, 1, 2, 3)  # in float32, as autocast does it
    out = F.grid_sample(grids, grid, align_corners=True, padding_mode="border")
    return out[..., 0, 0].transpose(1, 2).to(voxels.dtype)


def cells(coords: Tensor, R: int, impl: Any) -> tuple[Tensor, ...]:
    """What Triton's plan holds: the points in order of their cells, and where each cell's run starts."""
    return kernels.plan_voxels(coords, R, impl=impl).cells or cells_reference(coords, R)


def cells_eager(coords: Tensor, R: int) -> tuple[Tensor, ...]:
    cell, point = voxel_index(coords.floor(), R).flatten().sort(stable=True)
    rows = torch.arange(len(coords) * R**3 + 1, device=coords.device)
    return point.int(), torch.searchsorted(cell, rows).int()


VOXEL_TESTS = ("tests/kernels/test_voxel.py",)
LEVELS = (  # of LION's U-Nets; then the first at 16 times the batch, and in the dtype of mixed precision
    Shape(32, 2048, C=32, R=32),
    Shape(32, 2048, C=64, R=32),
    Shape(32, 1024, C=128, R=16),
    Shape(32, 256, C=128, R=8),
    Shape(512, 2048, C=32, R=32),
    Shape(32, 2048, C=64, R=32, dtype=torch.bfloat16),
)
VOXEL_TARGETS = (
    Target("floor", 0.6, at=lambda s: s.N == 2048),
    Target("eager", 5, at=lambda s: s.N == 2048),
)


def _with_plan(features: Tensor, coords: Tensor, R: int) -> tuple[Any, ...]:
    return features, coords, kernels.plan_voxels(coords, R, impl="reference")


def _convolved_inputs(s: Shape, draw: Draw) -> tuple[Any, ...]:
    weight = draw.normal(s.C, s.C, 3, 3, 3, dtype=s.dtype).to(memory_format=torch.channels_last_3d)
    return *_with_plan(_cloud(s, draw), _coords(s, draw), s.R), weight


def _convolution_operations(s: Shape) -> int:
    return round(54 * s.B * _touched(s, 1) * s.C**2)


VOXELS = (
    Op(
        "avg_voxelize",
        VOXEL_TESTS,
        LEVELS,
        Shape(2, 256, C=8, R=8),
        inputs=lambda s, draw: _with_plan(_cloud(s, draw), _coords(s, draw), s.R),
        ours=lambda x, coords, plan, impl: kernels.avg_voxelize(x, coords, plan.resolution, plan=plan, impl=impl),
        eager=avg_voxelize_eager,
        forward=lambda s: Cost(_bytes(s) + _grid_bytes(s, s.R**3) + s.B * (16 * s.N + 4 * s.R**3), 2 * _elements(s)),
        backward=lambda s: Cost(_grid_bytes(s, _touched(s, 1)) + _bytes(s) + 16 * s.B * s.N, _elements(s)),
        wrt=(0,),
        targets=VOXEL_TARGETS,
    ),
    Op(
        "trilinear_devoxelize",
        VOXEL_TESTS,
        LEVELS,
        Shape(2, 256, C=8, R=8),
        inputs=lambda s, draw: _with_plan(draw.normal(s.B, s.R, s.R, s.R, s.C, dtype=s.dtype), _coords(s, draw), s.R),
        ours=lambda x, coords, plan, impl: kernels.trilinear_devoxelize(x, coords, plan=plan, impl=impl),
        eager=trilinear_devoxelize_eager,
        forward=lambda s: Cost(_grid_bytes(s, _touched(s, 8)) + _bytes(s) + 12 * s.B * s.N, 16 * _elements(s)),
        backward=lambda s: Cost(_bytes(s) + _grid_bytes(s, s.R**3) + s.B * (16 * s.N + 4 * s.R**3), 16 * _elements(s)),
        wrt=(0,),
        targets=VOXEL_TARGETS,
    ),
    Op(
        "voxelize_conv3d",
        ("tests/kernels/test_voxel_conv.py",),
        LEVELS[:4],
        Shape(2, 256, C=32, R=16),
        inputs=_convolved_inputs,
        ours=lambda x, coords, plan, weight, impl: kernels.voxelize_conv3d(
            x, coords, weight, plan.resolution, plan=plan, impl=impl
        ),
        eager=lambda x, coords, plan, weight: conv3d(avg_voxelize_eager(x, coords, plan), weight),
        # Products of the rows of voxels with points alone.
        forward=lambda s: Cost(_bytes(s) + _grid_bytes(s, s.R**3), _convolution_operations(s)),
        backward=lambda s: Cost(2 * _bytes(s) + _grid_bytes(s, s.R**3), 2 * _convolution_operations(s)),
        wrt=(0, 3),
    ),
    Op(
        "plan_voxels",
        VOXEL_TESTS,
        (Shape(32, 2048, R=32), Shape(32, 1024, R=16), Shape(32, 256, R=8), Shape(512, 2048, R=32)),
        Shape(2, 256, R=8),
        inputs=lambda s, draw: (_coords(s, draw), s.R),
        ours=cells,
        eager=cells_eager,
        # Coordinates; a point's place; a run's start.
        forward=lambda s: Cost(s.B * (12 * s.N + 4 * s.N + 4 * s.R**3)),
    ),
)


# Neighbours


def cdist_squared(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y).square()


def direct_squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances without cancellation, an axis at a time."""
    diffs = (x[..., i, None] - y[..., None, :, i] for i in range(3))
    dx, dy, dz = (d.square() for d in diffs)
    return dx + dy + dz


SquaredDistances = Callable[[Tensor, Tensor], Tensor]


def nearest_neighbor_eager(x: Tensor, y: Tensor, sqdist: SquaredDistances = cdist_squared) -> tuple[Tensor, Tensor]:
    d, idx = sqdist(x, y).min(2)
    return d, idx.int()


def chamfer_distance_eager(x: Tensor, y: Tensor, sqdist: SquaredDistances = cdist_squared) -> Tensor:
    d = sqdist(x, y)
    return d.min(2).values.mean(1) + d.min(1).values.mean(1)


def ball_query_eager(
    centers: Tensor, points: Tensor, radius: float, k: int, sqdist: SquaredDistances = cdist_squared
) -> Tensor:
    N = points.shape[1]
    order = torch.arange(N, dtype=torch.int32, device=points.device)
    hits = torch.where(sqdist(centers, points) < radius**2, order, N).topk(k, largest=False).values.sort().values
    return torch.where(hits == N, hits[..., :1], hits)


def three_nn_eager(points: Tensor, centers: Tensor, sqdist: SquaredDistances = cdist_squared) -> tuple[Tensor, Tensor]:
    d, idx = sqdist(points, centers).topk(3, largest=False)
    w = 1 / d.clamp(1e-10, 1e10)
    return w / w.sum(-1, keepdim=True), idx.int()


def local_moments_eager(points: Tensor, radius: float, sqdist: SquaredDistances = cdist_squared) -> Tensor:
    offsets, d = points[:, None] - points[:, :, None], sqdist(points, points)
    moments = []
    for r in (radius, radius / 2, radius / 4):
        w = (1 - d / r**2).relu().square()
        total = w.sum(2, keepdim=True)
        mean = (w[:, :, None] @ offsets)[:, :, 0] / total / r
        second = offsets.mT @ (w[..., None] * offsets) / total[..., None] / r**2
        spread = second - mean[..., None] * mean[..., None, :]
        i, j = torch.triu_indices(3, 3, device=points.device)
        moments.append(torch.cat([total.log(), mean, spread[..., i, j]], -1))
    return torch.stack(moments, 2)


def group_eager(features: Tensor, idx: Tensor) -> Tensor:
    return features[torch.arange(len(features), device=features.device)[:, None, None], idx.long()]


def three_interpolate_eager(features: Tensor, weights: Tensor, idx: Tensor) -> Tensor:
    return (group_eager(features, idx) * weights[..., None].to(features.dtype)).sum(2)


def furthest_point_sample_eager(points: Tensor, num_samples: int) -> Tensor:
    chosen = torch.zeros(points.shape[0], num_samples, dtype=torch.int64, device=points.device)
    nearest = torch.full(points.shape[:2], torch.inf, device=points.device)
    for i in range(1, num_samples):
        last = chosen[:, i - 1, None, None].expand(-1, 1, 3)
        nearest = torch.minimum(nearest, (points - points.gather(1, last)).square().sum(-1))
        chosen[:, i] = nearest.argmax(1)
    return chosen.int()


def _flat(points: Tensor) -> tuple[Tensor, Tensor]:
    """Points of all clouds and the cloud of each, as torch_cluster takes them."""
    return points.flatten(0, 1), torch.arange(len(points), device=points.device).repeat_interleave(points.shape[1])


def _to_pairs(x: Tensor, y: Tensor, idx: Tensor) -> Tensor:
    """Squared distances (B, N, K) of x to the points of y at idx (B, N, K)."""
    return (x[:, :, None] - group_eager(y, idx)).square().sum(-1)


def _three_nn_weights(d: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    w = 1 / d.clamp(1e-10, 1e10)
    return w / w.sum(-1, keepdim=True), idx.int()


def cluster_knn(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    knn = import_module("torch_cluster").knn
    (flat_x, cloud_x), (flat_y, cloud_y) = _flat(x), _flat(y)
    _, target = knn(flat_y, flat_x, k, cloud_y, cloud_x)
    idx = target.view(*x.shape[:2], k) - torch.arange(0, len(flat_y), y.shape[1], device=y.device)[:, None, None]
    return _to_pairs(x, y, idx), idx


def cluster_fps(points: Tensor, num_samples: int) -> Tensor:
    fps = import_module("torch_cluster").fps
    B, N, _ = points.shape
    idx = fps(*_flat(points), ratio=num_samples / N, random_start=False).view(B, num_samples)
    return (idx - torch.arange(0, B * N, N, device=idx.device)[:, None]).int()


def keops_knn(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    LazyTensor = import_module("pykeops.torch").LazyTensor
    sqdist = ((LazyTensor(x.detach()[:, :, None]) - LazyTensor(y.detach()[:, None])) ** 2).sum(-1)
    idx = sqdist.argKmin(k, dim=2)
    return _to_pairs(x, y, idx), idx


def pytorch3d_knn(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    knn_points = import_module("pytorch3d.ops").knn_points
    d, idx, _ = knn_points(x, y, K=k)
    return d, idx


def chamferdist_knn(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    knn_points = import_module("chamferdist.chamfer").knn_points
    d, idx, _ = knn_points(x, y, K=k)
    return d, idx


def physicsnemo_knn(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    knn = import_module("physicsnemo.nn.functional").knn
    idx = torch.stack([knn(points, queries, k)[0] for queries, points in zip(x.detach(), y.detach(), strict=True)])
    return _to_pairs(x, y, idx), idx


def torch_fps_sample(points: Tensor, num_samples: int) -> Tensor:
    farthest_point_sampling = import_module("torch_fps").farthest_point_sampling
    everything = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device)
    return farthest_point_sampling(points, everything, num_samples, random_start=False).int()


Knn = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
KNN: dict[str, Knn] = {
    "torch_cluster": cluster_knn,
    "pykeops": keops_knn,
    "pytorch3d": pytorch3d_knn,
    "chamferdist": chamferdist_knn,
    "physicsnemo": physicsnemo_knn,
}


def _nearest_by(knn: Knn) -> Callable[..., tuple[Tensor, Tensor]]:
    def nearest_neighbor(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        d, idx = knn(x, y, 1)
        return d[..., 0], idx[..., 0].int()

    return nearest_neighbor


def _chamfer_by(knn: Knn) -> Callable[..., Tensor]:
    return lambda x, y: knn(x, y, 1)[0].mean((1, 2)) + knn(y, x, 1)[0].mean((1, 2))


def _three_nn_by(knn: Knn) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda points, centers: _three_nn_weights(*knn(points, centers, 3))


def pytorch3d_chamfer(x: Tensor, y: Tensor) -> Tensor:
    chamfer_distance = import_module("pytorch3d.loss").chamfer_distance
    return chamfer_distance(x, y, batch_reduction=None)[0]


def pytorch3d_ball_query(centers: Tensor, points: Tensor, radius: float, k: int) -> Tensor:
    ball_query = import_module("pytorch3d.ops").ball_query
    _, idx, _ = ball_query(centers, points, K=k, radius=radius, return_nn=False)
    return torch.where(idx < 0, idx[..., :1], idx).int()


def pytorch3d_fps(points: Tensor, num_samples: int) -> Tensor:
    sample_farthest_points = import_module("pytorch3d.ops").sample_farthest_points
    return sample_farthest_points(points, K=num_samples)[1].int()


NEIGHBOR_TESTS = ("tests/kernels/test_neighbors.py",)
CLOUDS = (Shape(32, 2048, 2048), Shape(512, 2048, 2048))


def _pairs(s: Shape) -> int:
    return s.B * s.N * s.M


def _cloud_bytes(s: Shape) -> int:
    """Coordinates of both clouds."""
    return 12 * s.B * (s.N + s.M)


NEIGHBORS = (
    Op(
        "nearest_neighbor",
        NEIGHBOR_TESTS,
        CLOUDS,
        Shape(2, 256, 256),
        inputs=lambda s, draw: (draw.points(s.B, s.N), draw.points(s.B, s.M)),
        ours=kernels.nearest_neighbor,
        eager=nearest_neighbor_eager,
        exact={"sqdist": direct_squared},
        forward=lambda s: Cost(_cloud_bytes(s) + 8 * s.B * s.N, 8 * _pairs(s)),
        backward=lambda s: Cost(2 * _cloud_bytes(s) + 8 * s.B * s.N, 9 * s.B * s.N),
        wrt=(0, 1),
        peers={name: _nearest_by(knn) for name, knn in KNN.items()},
    ),
    Op(
        "chamfer_distance",
        NEIGHBOR_TESTS,
        CLOUDS,
        Shape(2, 256, 256),
        inputs=lambda s, draw: (draw.points(s.B, s.N), draw.points(s.B, s.M)),
        ours=kernels.chamfer_distance,
        eager=chamfer_distance_eager,
        exact={"sqdist": direct_squared},
        forward=lambda s: Cost(_cloud_bytes(s) + 4 * s.B, 16 * _pairs(s)),
        backward=lambda s: Cost(2 * _cloud_bytes(s) + 4 * s.B * (1 + s.N + s.M), 9 * s.B * (s.N + s.M)),
        wrt=(0, 1),
        peers={**{name: _chamfer_by(knn) for name, knn in KNN.items()}, "pytorch3d": pytorch3d_chamfer},
        targets=(
            Target("seconds", 100e-6, ("forward",), at=lambda s: s.B == 32),
            Target("eager", 5, ("forward",)),
            Target("chamferdist", 3, ("forward",)),
        ),
    ),
    Op(
        "ball_query",
        NEIGHBOR_TESTS,
        (Shape(32, 2048, 1024, 32), Shape(32, 1024, 256, 32), Shape(512, 2048, 1024, 32)),
        Shape(2, 256, 64, 8),
        inputs=lambda s, draw: ((p := draw.points(s.B, s.N))[:, : s.M].contiguous(), p, 0.1, s.K),
        ours=kernels.ball_query,
        eager=ball_query_eager,
        exact={"sqdist": direct_squared},
        # Every distance; a kernel may stop at its K-th hit.
        forward=lambda s: Cost(_cloud_bytes(s) + 4 * s.B * s.M * s.K, 8 * _pairs(s)),
        peers={"pytorch3d": pytorch3d_ball_query},
    ),
    Op(
        "three_nn",
        NEIGHBOR_TESTS,
        (Shape(32, 2048, 1024), Shape(32, 1024, 256), Shape(512, 2048, 1024)),
        Shape(2, 256, 64),
        inputs=lambda s, draw: ((p := draw.points(s.B, s.N)), p[:, : s.M] + 1e-3),
        ours=kernels.three_nn,
        eager=three_nn_eager,
        exact={"sqdist": direct_squared},
        forward=lambda s: Cost(_cloud_bytes(s) + 24 * s.B * s.N, 8 * _pairs(s)),
        peers={name: _three_nn_by(knn) for name, knn in KNN.items()},
    ),
    Op(
        "local_moments",
        ("tests/kernels/test_moments.py",),
        (Shape(32, 2048), Shape(32, 1024), Shape(512, 2048)),
        Shape(2, 256),
        inputs=lambda s, draw: (draw.points(s.B, s.N), 0.8),
        ours=kernels.local_moments,
        eager=local_moments_eager,
        exact={"sqdist": direct_squared},
        # The distance once; at each radius the weight 4, its sum 1, means 6, second moments 12.
        forward=lambda s: Cost(s.B * s.N * (12 + 120), (7 + 3 * 23) * s.B * s.N**2),
    ),
    Op(
        "group",
        NEIGHBOR_TESTS,
        (
            Shape(32, 2048, 1024, 32, 32),
            Shape(32, 1024, 256, 32, 64),
            Shape(32, 2048, 1024, 32, 32, dtype=torch.bfloat16),
        ),
        Shape(2, 256, 64, 8, 8),
        inputs=lambda s, draw: (
            _cloud(s, draw),
            kernels.ball_query((p := draw.points(s.B, s.N))[:, : s.M], p, 0.1, s.K, impl="reference"),
        ),
        ours=kernels.group,
        eager=group_eager,
        forward=lambda s: Cost(_bytes(s) + s.B * s.M * s.K * (s.C * s.dtype.itemsize + 4)),
        backward=lambda s: Cost(_bytes(s) + s.B * s.M * s.K * (s.C * s.dtype.itemsize + 4), s.B * s.M * s.K * s.C),
        wrt=(0,),
    ),
    Op(
        "three_interpolate",
        NEIGHBOR_TESTS,
        (
            Shape(32, 2048, 1024, C=128),
            Shape(32, 1024, 256, C=128),
            Shape(32, 2048, 1024, C=128, dtype=torch.bfloat16),
        ),
        Shape(2, 256, 64, C=8),
        inputs=lambda s, draw: (
            draw.normal(s.B, s.M, s.C, dtype=s.dtype),
            *kernels.three_nn((p := draw.points(s.B, s.N)), p[:, : s.M] + 1e-3, impl="reference"),
        ),
        ours=kernels.three_interpolate,
        eager=three_interpolate_eager,
        forward=lambda s: Cost(s.B * ((s.M + s.N) * s.C * s.dtype.itemsize + 24 * s.N), 6 * _elements(s)),
        backward=lambda s: Cost(s.B * ((s.M + s.N) * s.C * s.dtype.itemsize + 24 * s.N), 6 * _elements(s)),
        wrt=(0,),  # interpolation weights come from coordinates, which get no gradient
    ),
    Op(
        "furthest_point_sample",
        ("tests/kernels/test_sampling.py",),
        (Shape(32, 2048, 1024), Shape(32, 1024, 256), Shape(512, 2048, 1024)),
        Shape(2, 256, 64),
        inputs=lambda s, draw: (draw.points(s.B, s.N), s.M),
        ours=kernels.furthest_point_sample,
        eager=furthest_point_sample_eager,
        forward=lambda s: Cost(s.B * (12 * s.N + 4 * s.M), 9 * _pairs(s)),
        peers={"torch_cluster": cluster_fps, "pytorch3d": pytorch3d_fps, "torch_fps": torch_fps_sample},
        compiles=False,
        targets=(Target("seconds", 1024 * 1.0e-6, at=lambda s: (s.B, s.N, s.M) == (32, 2048, 1024)),),
    ),
)


# Adaptive group norm, N positions


def adagn_eager(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    normal = F.group_norm(x.transpose(1, 2), 8, weight, bias).transpose(1, 2)
    return F.silu(normal * scale[:, None] + shift[:, None])


def adagn_ours(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, impl: Any) -> Tensor:
    return kernels.adagn(x, scale, shift, weight, bias, 8, act="silu", impl=impl)


def _adagn_inputs(s: Shape, draw: Draw) -> tuple[Tensor, ...]:
    def normal(*size: int) -> Tensor:
        return draw.normal(*size, dtype=s.dtype)

    return normal(s.B, s.N, s.C), 1 + normal(s.B, s.C), normal(s.B, s.C), 1 + normal(s.C), normal(s.C)


def kept_by_key(x: Tensor, p: float, key: Tensor) -> Tensor:
    return x * keep_mask_reference(key, x.shape, keep_threshold(p)[0]) * keep_threshold(p)[1]


def dropout_eager(x: Tensor, p: float, key: Tensor, drop: Callable[..., Tensor] | None = None) -> Tensor:
    return F.dropout(x, p) if drop is None else drop(x, p, key)


def _tail_inputs(s: Shape, draw: Draw) -> tuple[Any, ...]:
    def normal(*size: int) -> Tensor:
        return draw.normal(*size, dtype=s.dtype)

    grid, coords, plan = _with_plan(normal(s.B, s.R, s.R, s.R, s.C), _coords(s, draw), s.R)
    style = 1 + normal(s.B, s.C), normal(s.B, s.C)
    return grid, coords, plan, *style, normal(s.C // 8, s.C), normal(s.C, s.C // 8), _cloud(s, draw)


def tail_ours(x: Tensor, coords: Tensor, plan: Any, *rest: Any, impl: Any) -> Tensor:
    scale, shift, squeeze, excite, points = rest
    return kernels.adagn_devoxelize(x, coords, scale, shift, 8, squeeze, excite, points=points, plan=plan, impl=impl)


def tail_eager(x: Tensor, coords: Tensor, plan: Any, *rest: Tensor) -> Tensor:
    scale, shift, squeeze, excite, points = rest
    normal = F.group_norm(x.flatten(1, 3).transpose(1, 2), 8).transpose(1, 2)
    z = normal * scale[:, None] + shift[:, None]
    gate = ((z.mean(1) @ squeeze.T).relu() @ excite.T).sigmoid()
    return trilinear_devoxelize_eager((z * gate[:, None]).view(x.shape), coords, plan) + points


def _neighborhoods(s: Shape) -> int:
    return s.B * s.M * s.K


def _offsets_inputs(s: Shape, draw: Draw) -> tuple[Tensor, ...]:
    points = draw.points(s.B, s.N)
    idx = kernels.ball_query(points[:, : s.M], points, 0.1, s.K, impl="reference")
    offsets = kernels.group(points, idx, impl="reference") - points[:, : s.M, None]
    return _cloud(s, draw), idx, offsets, draw.normal(s.C, 3)


def _maxima_inputs(s: Shape, draw: Draw) -> tuple[Tensor, ...]:
    return draw.normal(s.B, s.M, s.K, s.C, dtype=s.dtype), 1 + draw.normal(s.B, s.C), draw.normal(s.B, s.C)


def maxima_eager(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    normal = F.group_norm(x.flatten(1, 2).transpose(1, 2), 8).transpose(1, 2)
    return F.silu(normal * scale[:, None] + shift[:, None]).view(x.shape).max(2).values.to(x.dtype)


def _abstraction_inputs(s: Shape, draw: Draw) -> tuple[Any, ...]:
    """Of C channels to as many; a style has scale and shift."""
    styles = [1 + draw.normal(s.B, s.C) if i % 2 == 0 else draw.normal(s.B, s.C) for i in range(4)]
    return *_offsets_inputs(s, draw), draw.normal(s.C, s.C, dtype=s.dtype), *styles


def abstraction_ours(
    x: Tensor, idx: Tensor, offsets: Tensor, weight: Tensor, matrix: Tensor, *style: Any, impl: Any
) -> Tensor:
    styles = kernels.Style(*style[:2]), kernels.Style(*style[2:])
    return kernels.group_mlp_max(x, idx, offsets, weight, styles[0], matrix, styles[1], 8, impl=impl)


def abstraction_eager(
    x: Tensor, idx: Tensor, offsets: Tensor, weight: Tensor, matrix: Tensor, *style: Tensor
) -> Tensor:
    rows = group_offsets_eager(x, idx, offsets, weight)
    normal = F.group_norm(rows.flatten(1, 2).transpose(1, 2), 8).transpose(1, 2)
    hidden = F.silu(normal * style[0][:, None] + style[1][:, None]).view(rows.shape).to(x.dtype)
    return maxima_eager(hidden @ matrix.T, *style[2:])


def _attention_inputs(s: Shape, draw: Draw) -> tuple[Tensor]:
    """Heads of 32 channels, or of all."""
    return (draw.normal(s.B, s.N, 3, max(s.C // 32, 1), min(s.C, 32), dtype=s.dtype),)


def linear_attention_eager(qkv: Tensor) -> Tensor:
    q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, N, D)
    return (q @ (k.softmax(2).transpose(2, 3) @ v)).transpose(1, 2)


def group_offsets_eager(features: Tensor, idx: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    return group_eager(features, idx) + (offsets @ weight.T).to(features.dtype)


NORMS = (
    Op(
        "adagn + SiLU",
        ("tests/kernels/test_adagn.py",),
        (  # voxels of each level; 32768 positions are also 1024 centres of 32 neighbours
            Shape(32, 32768, C=32),
            Shape(32, 32768, C=64),
            Shape(32, 4096, C=128),
            Shape(32, 512, C=128),
            Shape(512, 32768, C=32),
            Shape(32, 32768, C=64, dtype=torch.bfloat16),
        ),
        Shape(2, 512, C=16),
        inputs=_adagn_inputs,
        ours=adagn_ours,
        eager=adagn_eager,
        forward=lambda s: Cost(3 * _bytes(s), 11 * _elements(s)),
        backward=lambda s: Cost(5 * _bytes(s), 24 * _elements(s)),
        wrt=(0, 1, 2, 3, 4),
        targets=(
            Target("floor", 0.7, at=lambda s: s.N == 32768),
            Target("compile", 1),
        ),
    ),
    Op(
        "dropout",
        ("tests/kernels/test_dropout.py",),
        (Shape(32, 32768, C=32), Shape(32, 32768, C=32, dtype=torch.bfloat16)),
        Shape(2, 512, C=16),
        inputs=lambda s, draw: (_cloud(s, draw), 0.1, draw.key()),
        ours=kernels.dropout,
        eager=dropout_eager,
        forward=lambda s: Cost(2 * _bytes(s), 2 * _elements(s)),
        backward=lambda s: Cost(2 * _bytes(s), 2 * _elements(s)),
        wrt=(0,),
        exact={"drop": kept_by_key},
    ),
    Op(
        "adagn_devoxelize",
        ("tests/kernels/test_adagn_devoxelize.py",),
        LEVELS,
        Shape(2, 256, C=8, R=8),
        inputs=_tail_inputs,
        ours=tail_ours,
        eager=tail_eager,
        # The grid for its statistics, the corners of the points; then the points' cotangents, the grid, its gradient.
        forward=lambda s: Cost(
            _grid_bytes(s, s.R**3) + _grid_bytes(s, _touched(s, 8)) + 2 * _bytes(s) + 12 * s.B * s.N,
            4 * s.B * s.R**3 * s.C + 18 * _elements(s),
        ),
        backward=lambda s: Cost(
            2 * _grid_bytes(s, s.R**3) + 2 * _bytes(s) + 4 * _elements(s) + 16 * s.B * s.N,
            4 * s.B * s.R**3 * s.C + 20 * _elements(s),
        ),
        wrt=(0, 3, 4, 5, 6, 7),
    ),
    Op(
        "group_offsets",
        ("tests/kernels/test_neighborhood.py",),
        (Shape(32, 2048, 1024, 32, 32), Shape(32, 2048, 1024, 32, 32, dtype=torch.bfloat16)),
        Shape(2, 256, 64, 8, 8),
        inputs=_offsets_inputs,
        ours=kernels.group_offsets,
        eager=group_offsets_eager,
        forward=lambda s: Cost(
            _bytes(s) + _neighborhoods(s) * (s.C * s.dtype.itemsize + 16), 6 * _neighborhoods(s) * s.C
        ),
        backward=lambda s: Cost(
            _bytes(s) + _neighborhoods(s) * (s.C * s.dtype.itemsize + 28), 13 * _neighborhoods(s) * s.C
        ),
        wrt=(0, 2, 3),
    ),
    Op(
        "adagn_max_neighbors",
        ("tests/kernels/test_adagn_max_neighbors.py",),
        (Shape(32, 0, 1024, 32, 64), Shape(32, 0, 1024, 32, 64, dtype=torch.bfloat16)),
        Shape(2, 0, 64, 8, 8),
        inputs=_maxima_inputs,
        ours=lambda x, scale, shift, impl: kernels.adagn_max_neighbors(x, scale, shift, 8, impl=impl),
        eager=maxima_eager,
        # x twice, then the maxima, their x and index; x and its gradient, and what of each maximum is read twice.
        forward=lambda s: Cost(
            (2 * _neighborhoods(s) + 2 * s.B * s.M) * s.C * s.dtype.itemsize + s.B * s.M * s.C,
            12 * _neighborhoods(s) * s.C,
        ),
        backward=lambda s: Cost(
            (2 * _neighborhoods(s) + 4 * s.B * s.M) * s.C * s.dtype.itemsize + s.B * s.M * s.C,
            5 * _neighborhoods(s) * s.C,
        ),
        wrt=(0, 1, 2),
    ),
    Op(
        "group_mlp_max",
        ("tests/kernels/test_group_mlp.py",),
        (Shape(32, 2048, 1024, 32, 64), Shape(32, 2048, 1024, 32, 64, dtype=torch.bfloat16)),
        Shape(2, 256, 64, 8, 8),
        inputs=_abstraction_inputs,
        ours=abstraction_ours,
        eager=abstraction_eager,
        # Three passes over offsets and indices, with the product in two; then two, one of which writes a gradient that
        # is then gathered.
        forward=lambda s: Cost(
            3 * (_bytes(s) + 16 * _neighborhoods(s)) + s.B * s.M * s.C * (2 * s.dtype.itemsize + 1),
            4 * _neighborhoods(s) * s.C**2,
        ),
        backward=lambda s: Cost(
            3 * _bytes(s) + _neighborhoods(s) * (2 * s.C * s.dtype.itemsize + 32), 10 * _neighborhoods(s) * s.C**2
        ),
        wrt=(0, 2, 3, 4, 5, 6, 7, 8),
    ),
    Op(
        "linear_attention",
        ("tests/kernels/test_linear_attention.py",),
        (Shape(32, 1024, C=128), Shape(32, 1024, C=128, dtype=torch.bfloat16)),
        Shape(2, 256, C=64),
        inputs=_attention_inputs,
        ours=kernels.linear_attention,
        eager=linear_attention_eager,
        forward=lambda s: Cost(4 * _bytes(s), 4 * 32 * _elements(s)),
        backward=lambda s: Cost(8 * _bytes(s), 8 * 32 * _elements(s)),
        wrt=(0,),
    ),
)


# Earth mover's distance and the all-pairs matrices of evaluation; there B and M count clouds of N points


def approx_emd_eager(x: Tensor, y: Tensor) -> Tensor:
    N, M = x.shape[1], y.shape[1]
    sqdist = direct_squared(x, y)
    with torch.no_grad():
        left = torch.full_like(sqdist[:, :, :1], max(1.0, M / N))
        right = torch.full_like(sqdist[:, :1], max(1.0, N / M))
        match = torch.zeros_like(sqdist)
        for level in (*(-(4.0**j) for j in range(7, -2, -1)), 0.0):
            kernel = torch.exp(level * sqdist)
            offer = left / ((kernel * right).sum(2, keepdim=True) + 1e-9)
            arriving = right * (kernel * offer).sum(1, keepdim=True)
            taken = right * (right / (arriving + 1e-9)).clamp(max=1)
            flow = offer * kernel * taken
            match += flow
            left = (left - flow.sum(2, keepdim=True)).clamp(min=0)
            right = (right - arriving).clamp(min=0)
    return (match * sqdist).sum((1, 2)) / N


def pairwise_chamfer_eager(a: Tensor, b: Tensor, sqdist: SquaredDistances = cdist_squared) -> Tensor:
    return torch.stack([chamfer_distance_eager(cloud.expand_as(b), b, sqdist) for cloud in a])


def three_matrices(a: Tensor, b: Tensor, matrix: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """All distances that the 1-NNA of a set of samples is made of."""
    return matrix(a, a), matrix(a, b), matrix(b, b)


def three_matrices_eager(
    a: Tensor, b: Tensor, sqdist: SquaredDistances = cdist_squared
) -> tuple[Tensor, Tensor, Tensor]:
    return three_matrices(a, b, partial(pairwise_chamfer_eager, sqdist=sqdist))


def pairwise_emd_eager(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([approx_emd_eager(cloud.expand_as(b), b) for cloud in a])


# Ten levels: an exponential and three multiply-adds (two row sums, one column sum) each; the distance and the cost.
EMD_OPERATIONS = 7 + 10 * (1 + 3 * 2) + 2

METRICS = (
    Op(
        "approx_emd",
        ("tests/kernels/test_emd.py",),
        (Shape(32, 2048, 2048),),
        Shape(2, 64, 64),
        inputs=lambda s, draw: (draw.points(s.B, s.N), draw.points(s.B, s.M)),
        ours=kernels.approx_emd,
        eager=approx_emd_eager,
        forward=lambda s: Cost(_cloud_bytes(s) + 4 * s.B, EMD_OPERATIONS * _pairs(s)),
        # The forward pass may already have made the gradients, so scaling them is the least.
        backward=lambda s: Cost(2 * _cloud_bytes(s) + 4 * s.B),
        wrt=(0, 1),
    ),
    Op(
        "pairwise_chamfer",
        ("tests/kernels/test_pairwise.py",),
        (Shape(64, 2048, 64),),
        Shape(2, 128, 3),
        inputs=lambda s, draw: (draw.points(s.B, s.N), draw.points(s.M, s.N)),
        ours=kernels.pairwise_chamfer,
        eager=pairwise_chamfer_eager,
        exact={"sqdist": direct_squared},
        forward=lambda s: Cost(12 * (s.B + s.M) * s.N + 4 * s.B * s.M, 16 * s.B * s.M * s.N**2),
        compiles=False,
        # 3 s for the chair set's two symmetric matrices, half of them each, and the one between: 2 x 662 x 662 pairs.
        targets=(Target("seconds", 3 / 2 * (64 / 662) ** 2),),
    ),
    Op(
        "1-NNA's Chamfer distances",
        ("tests/kernels/test_pairwise.py",),
        (Shape(64, 2048, 64),),
        Shape(4, 2048, 4),
        inputs=lambda s, draw: (draw.points(s.B, s.N), draw.points(s.M, s.N)),
        ours=lambda a, b, impl: three_matrices(a, b, partial(kernels.pairwise_chamfer, impl=impl)),
        eager=three_matrices_eager,
        exact={"sqdist": direct_squared},
        forward=lambda s: Cost(12 * (s.B + s.M) * s.N + 4 * (s.B + s.M) ** 2, 8 * (s.B + s.M) ** 2 * s.N**2),
        compiles=False,
    ),
    Op(
        "pairwise_emd",
        ("tests/kernels/test_pairwise.py", "tests/kernels/test_emd.py"),
        (Shape(16, 2048, 16),),
        Shape(2, 64, 3),
        inputs=lambda s, draw: (draw.points(s.B, s.N), draw.points(s.M, s.N)),
        ours=kernels.pairwise_emd,
        eager=pairwise_emd_eager,
        forward=lambda s: Cost(12 * (s.B + s.M) * s.N + 4 * s.B * s.M, EMD_OPERATIONS * s.B * s.M * s.N**2),
        compiles=False,
        targets=(Target("seconds", 120 / 3 * (16 / 662) ** 2),),  # 2 minutes for the chair set's three matrices
    ),
)


# Of the drop-in modules: neighbours in any number of dimensions C, and the auction, whose M are rounds


def any_squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances without cancellation, in any number of dimensions."""
    return sum((a[..., None] - b[..., None, :]).square() for a, b in zip(x.unbind(-1), y.unbind(-1), strict=True))


def knn_eager(x: Tensor, y: Tensor, k: int, sqdist: SquaredDistances = cdist_squared) -> tuple[Tensor, Tensor]:
    d, idx = sqdist(x, y).topk(k, largest=False)
    return d, idx.int()


def auction_eager(x: Tensor, y: Tensor, eps: float, iters: int) -> Tensor:
    """Every round over all points, those that have a partner too."""
    B, N = x.shape[:2]
    with torch.no_grad():
        cost = direct_squared(x, y).sqrt()
        price, owner = torch.zeros_like(x[..., 0]), torch.full((B, N), -1, device=x.device)
        partner, k = owner.clone(), torch.arange(N, device=x.device).expand(B, N)
        for i in range(iters):
            value, choice = (-cost - price[:, None]).topk(2)
            waits = partner < 0
            if i == iters - 1:
                partner = torch.where(waits, choice[..., 0], partner)
                break
            wanted, raise_by = choice[..., 0], value[..., 0] - value[..., 1] + eps
            offers = torch.zeros(B, N, N, device=x.device).scatter_(2, wanted[..., None], raise_by[..., None])
            most, winner = offers.mul_(waits[..., None]).max(1)
            sold, before = most > 0, owner
            lost = torch.where(sold & (before >= 0), before, N)
            partner = F.pad(partner, (0, 1)).scatter(1, lost, -1)[:, :N]
            taken = torch.where(sold, winner, N)
            partner = F.pad(partner, (0, 1)).scatter(1, taken, k)[:, :N]
            owner, price = torch.where(sold, winner, owner), price + most
    return (x - y.take_along_dim(partner[..., None], 1)).square().sum(-1)


DROP_IN = (
    Op(
        "knn",
        ("tests/kernels/test_knn.py",),
        (Shape(32, 2048, 2048, 8, 3), Shape(32, 2048, 2048, 32, 3), Shape(32, 1024, 1024, 20, 64)),
        Shape(1, 2048, 2048, 16, 3),
        inputs=lambda s, draw: (draw.normal(s.B, s.N, s.C), draw.normal(s.B, s.M, s.C), s.K),
        ours=kernels.knn,
        eager=knn_eager,
        exact={"sqdist": any_squared},
        forward=lambda s: Cost(4 * s.B * (s.N + s.M) * s.C + 8 * s.B * s.N * s.K, 3 * s.C * _pairs(s)),
        backward=lambda s: Cost(8 * s.B * (s.N + s.M) * s.C + 8 * s.B * s.N * s.K, 6 * s.B * s.N * s.K * s.C),
        wrt=(0, 1),
        peers=dict(KNN),
    ),
    Op(
        "auction_emd",
        ("tests/kernels/test_auction.py",),
        (Shape(32, 1024, 50),),
        Shape(1, 128, 20),
        inputs=lambda s, draw: (draw.points(s.B, s.N), draw.points(s.B, s.N), 0.005, s.M),
        ours=lambda x, y, eps, iters, impl: kernels.auction_emd(x, y, eps, iters, impl=impl)[0],
        eager=auction_eager,
        forward=lambda s: Cost(24 * s.B * s.N + 8 * s.B * s.N, 12 * s.B * s.N**2),  # the first round at least
        backward=lambda s: Cost(52 * s.B * s.N, 9 * s.B * s.N),
        wrt=(0, 1),
        compiles=False,
    ),
)

OPS = (*DIFFUSION, *VOXELS, *NEIGHBORS, *NORMS, *METRICS, *DROP_IN)
