"""The point prior as one would write it first, and its speed beside ours: ``python -m bench.plain``.

The published network in plain PyTorch: float32, channels first, one adaptive group norm after another, geometry made
anew in every block, by differences of all pairs; no plan, no op of this project. Of the network's mathematics nothing
is left out but dropout, so it stands for evaluation mode. ``compare`` runs it and ours in turn, on the same weights
and inputs, and checks that their results agree before anything is timed.

Legend: B clouds, N points, C channels, M centres, K neighbours, R voxels per side, S style channels, E time channels.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import driver, machine
from bench.registry import Draw
from lion_triton.devices import autocast, resolve_precision
from lion_triton.models.modulation import GROUPS
from lion_triton.models.plan import SetAbstractionGeometry
from lion_triton.models.priors import PointPrior, published_point_prior
from lion_triton.models.unet import Convolutions, UNet

PASSES = ("forward", "forward and backward")
BATCH = {"cpu": 1, "cuda": 32}
POINTS, ROUNDS = 2048, 5
Row = dict[str, Any]
Inputs = tuple[Tensor, Tensor, Tensor]  # h_t, t, z


def sqdist(x: Tensor, y: Tensor) -> Tensor:
    """(B, 3, N) and (B, 3, M) to (B, N, M)."""
    dx, dy, dz = ((a[..., None] - b[:, None]).square() for a, b in zip(x.unbind(1), y.unbind(1), strict=True))
    return dx + dy + dz


def gather(x: Tensor, idx: Tensor) -> Tensor:
    """(B, C, N) at (B, ...) to (B, C, ...)."""
    return x.gather(2, idx.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view(*x.shape[:2], *idx.shape[1:])


@torch.no_grad()
def furthest_points(points: Tensor, count: int) -> Tensor:
    """(B, M), from point 0 on."""
    chosen = torch.zeros(len(points), count, dtype=torch.int64, device=points.device)
    nearest = torch.full_like(points[:, 0], torch.inf)
    for m in range(1, count):
        dx, dy, dz = (points - gather(points, chosen[:, m - 1, None])).square().unbind(1)
        nearest = torch.minimum(nearest, dx + dy + dz)
        chosen[:, m] = nearest.argmax(1)
    return chosen


@torch.no_grad()
def ball_query(centers: Tensor, points: Tensor, radius: float, k: int) -> Tensor:
    """(B, M, K): the first K <= N points in the ball, in index order; missing ones repeat the first."""
    N = points.shape[2]
    order = torch.arange(N, device=points.device)
    hits = torch.where(sqdist(centers, points) < radius**2, order, N).topk(k, largest=False).values
    return torch.where(hits == N, hits[..., :1], hits)


@torch.no_grad()
def three_nearest(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and indices (B, N, 3) of the three nearest centres."""
    nearest, idx = sqdist(points, centers).topk(3, largest=False)
    weights = 1 / nearest.clamp(1e-10, 1e10)
    return weights / weights.sum(-1, keepdim=True), idx


@torch.no_grad()
def voxel_coords(points: Tensor, resolution: int) -> Tensor:
    """(B, 3, N) within the grid: [0, R - 1]."""
    p = points - points.mean(2, keepdim=True)
    p = p / (2 * p.norm(dim=1).amax(1)[:, None, None])
    return ((p + 0.5) * resolution).clamp(0, resolution - 1)


def voxel_index(coords: Tensor, resolution: int) -> Tensor:
    """(B, N) in a cloud's flat grid, of integer coordinates."""
    x, y, z = coords.long().unbind(1)
    return (x * resolution + y) * resolution + z


def voxelize(features: Tensor, coords: Tensor, resolution: int) -> Tensor:
    """Means of the points in each voxel: (B, C, R, R, R)."""
    B, C, N = features.shape
    cloud = torch.arange(B, device=features.device)[:, None] * resolution**3
    index = (voxel_index(coords.round(), resolution) + cloud).flatten()
    total = features.new_zeros(B * resolution**3, C).index_add(0, index, features.transpose(1, 2).flatten(0, 1))
    count = features.new_zeros(B * resolution**3).index_add_(0, index, features.new_ones(B * N))
    mean = (total / count.clamp_min(1)[:, None]).view(B, resolution**3, C)
    return mean.transpose(1, 2).contiguous().view(B, C, *[resolution] * 3)


def devoxelize(voxels: Tensor, coords: Tensor) -> Tensor:
    """Trilinear: (B, C, N)."""
    grid = (coords / (voxels.shape[2] - 1) * 2 - 1).flip(1).transpose(1, 2)[:, :, None, None]
    return F.grid_sample(voxels, grid, align_corners=True, padding_mode="border")[..., 0, 0]


class Layer(nn.Module):
    """Linear map or convolution, then adaptive group norm: group norm, scaled and shifted by the style."""

    def __init__(self, kind: type[nn.Module], in_channels: int, channels: int, style_dim: int, **kwargs: Any) -> None:
        super().__init__()
        self.map = kind(in_channels, channels, **kwargs)
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.style = nn.Linear(style_dim, 2 * channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = self.norm(self.map(x))
        scale, shift = self.style(style).view(len(x), -1, *[1] * (x.ndim - 2)).chunk(2, dim=1)
        return x * scale + shift


class MLP(nn.ModuleList):
    """Layers shared by all positions, SiLU after each."""

    def __init__(self, kind: type[nn.Module], in_channels: int, widths: Sequence[int], style_dim: int) -> None:
        super().__init__(Layer(kind, a, b, style_dim, kernel_size=1) for a, b in pairwise([in_channels, *widths]))

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        for layer in self:
            x = F.silu(layer(x, style))
        return x


class Attention(nn.Module):
    """Linear attention over the points."""

    def __init__(self, channels: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Conv1d(channels, 3 * heads * head_dim, 1, bias=False)
        self.out = nn.Conv1d(heads * head_dim, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(1, (3, self.heads, -1)).unbind(1)  # (B, H, D, N)
        context = k.softmax(-1) @ v.transpose(2, 3)
        return self.out((context.transpose(2, 3) @ q).flatten(1, 2))


class PVConv(nn.Module):
    def __init__(self, in_channels: int, run: Convolutions, style_dim: int, attention: bool) -> None:
        super().__init__()
        C, self.resolution = run.channels, run.resolution
        self.conv1 = Layer(nn.Conv3d, in_channels, C, style_dim, kernel_size=3, padding=1)
        self.conv2 = Layer(nn.Conv3d, C, C, style_dim, kernel_size=3, padding=1)
        self.squeeze, self.excite = nn.Linear(C, C // 8, bias=False), nn.Linear(C // 8, C, bias=False)
        self.points = MLP(nn.Conv1d, in_channels, [C], style_dim)
        self.attention = Attention(C, run.attention_heads, run.attention_head_dim) if attention else nn.Identity()

    def forward(self, x: Tensor, coords: Tensor, style: Tensor) -> Tensor:
        grid = voxel_coords(coords, self.resolution)
        voxels = F.silu(self.conv1(voxelize(x, grid, self.resolution), style))
        voxels = self.conv2(voxels, style)
        gate = self.excite(self.squeeze(voxels.mean((2, 3, 4))).relu()).sigmoid()
        voxels = voxels * gate[..., None, None, None]
        return self.attention(devoxelize(voxels, grid) + self.points(x, style))


class Run(nn.ModuleList):
    """The PVConvs of a level."""

    def __init__(self, in_channels: int, run: Convolutions, style_dim: int) -> None:
        super().__init__(
            PVConv(run.channels if i else in_channels, run, style_dim, i == 0 and run.attention_heads > 0)
            for i in range(run.blocks)
        )

    def forward(self, x: Tensor, coords: Tensor, style: Tensor) -> Tensor:
        for block in self:
            x = block(x, coords, style)
        return x


class SetAbstraction(nn.Module):
    def __init__(self, in_channels: int, sample: SetAbstractionGeometry, widths: Sequence[int], style_dim: int) -> None:
        super().__init__()
        self.sample = sample
        self.mlp = MLP(nn.Conv2d, 3 + in_channels, widths, style_dim)

    def forward(self, x: Tensor, coords: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
        centers = gather(coords, furthest_points(coords, self.sample.centers))
        idx = ball_query(centers, coords, self.sample.radius, self.sample.neighbors)
        offsets = gather(coords, idx) - centers[..., None]
        return self.mlp(torch.cat([offsets, gather(x, idx)], 1), style).amax(-1), centers


class FeaturePropagation(nn.Module):
    def __init__(self, in_channels: int, widths: Sequence[int], style_dim: int) -> None:
        super().__init__()
        self.mlp = MLP(nn.Conv1d, in_channels, widths, style_dim)

    def forward(self, x: Tensor, centers: Tensor, skip: Tensor, coords: Tensor, style: Tensor) -> Tensor:
        weights, idx = three_nearest(coords, centers)
        x = (gather(x, idx) * weights[:, None]).sum(-1)
        return self.mlp(torch.cat([x, skip], 1), style)


def _options(network: UNet) -> tuple[Any, ...]:
    config = network.config
    return config.attention, config.skip, config.residual, config.moments


class PlainPointPrior(nn.Module):
    """The same function of ``h_t, t, z`` as a published ``PointPrior`` in evaluation mode, with copies of its weights.

    ValueError: a prior with classes or CLIP, or whose network is a transformer or has options that are not published.
    """

    def __init__(self, prior: PointPrior) -> None:
        super().__init__()
        ours, time_dim = prior.network, prior.config.time_dim
        unconditional = prior.class_embedding is None and prior.clip_projection is None
        if not isinstance(ours, UNet) or not unconditional or _options(ours) != ("linear", "input", False, 0):
            raise ValueError(
                f"prior: expected the published kind, without conditions but its style, got {prior.config}"
            )
        assert ours.modulation.style is not None
        config, channels, style_dim = ours.config, ours.out.out_features, ours.modulation.style.in_features
        # Registered in the order in which they run, as _copy needs it.
        self.time_mlp = nn.Sequential(nn.Linear(time_dim, time_dim), nn.LeakyReLU(0.1), nn.Linear(time_dim, time_dim))
        skips = [channels - 3]
        self.down = nn.ModuleList()
        for level, down in enumerate(config.down):
            channels += time_dim if level else 0
            run = Run(channels, down.convolutions, style_dim)
            channels = down.convolutions.channels if run else channels
            self.down.append(nn.ModuleList([run, SetAbstraction(channels, down.sample, down.widths, style_dim)]))
            channels = down.widths[-1]
            skips.append(channels)
        skips.pop()  # the coarsest features go through the middle, not around it
        self.middle = Attention(channels, config.middle_heads, config.middle_head_dim)
        self.up = nn.ModuleList()
        for up in config.up:
            propagation = FeaturePropagation(channels + time_dim + skips.pop(), up.widths, style_dim)
            run = Run(up.widths[-1], up.convolutions, style_dim)
            channels = up.convolutions.channels if run else up.widths[-1]
            self.up.append(nn.ModuleList([propagation, run]))
        self.head = MLP(nn.Conv1d, channels, [config.head_width], style_dim)
        self.out = nn.Conv1d(config.head_width, ours.out.out_features, 1)
        self._copy(ours)

    @torch.no_grad()
    def _copy(self, ours: UNet) -> None:
        """Take the weights: of norms, and the biases before them, from ``modulation``; the rest in running order."""
        m = ours.modulation
        assert m.style is not None
        halves = [m.style.weight.chunk(2), m.style.bias.chunk(2)]  # of all scales, of all shifts
        styles = [map(torch.cat, zip(*(half.split(m.channels) for half in two), strict=True)) for two in halves]
        values = [*(x.split(m.channels) for x in (m.offset, m.weight, m.bias)), *styles]
        layers = [module for module in self.modules() if isinstance(module, Layer)]
        normed = {}
        for layer, *theirs in zip(layers, *values, strict=True):
            parts = (layer.map.bias, layer.norm.weight, layer.norm.bias, layer.style.weight, layer.style.bias)
            normed |= zip(parts, theirs, strict=True)
        down = chain(*zip(ours.down_convolutions, ours.set_abstractions, strict=True))
        up = chain(*zip(ours.propagations, ours.up_convolutions, strict=True))
        modules = (ours.time_mlp, *down, ours.middle, *up, ours.head, ours.out)
        rest = (parameter for module in modules for parameter in module.parameters())
        for parameter in self.parameters():
            parameter.copy_((normed[parameter] if parameter in normed else next(rest)).view_as(parameter))
        assert next(rest, None) is None

    def forward(self, h_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """(B, N, H), (B,), (B, S) to (B, N, H)."""
        x = h_t.transpose(1, 2).contiguous()
        half = self.time_mlp[0].in_features // 2
        angles = t[:, None] * torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, device=t.device))
        time = self.time_mlp(torch.cat([angles.sin(), angles.cos()], 1).to(h_t.dtype))

        def with_time(x: Tensor) -> Tensor:
            return torch.cat([x, time[..., None].expand(-1, -1, x.shape[2])], 1)

        coords, levels = x[:, :3], []
        for level, (run, abstraction) in enumerate(self.down):
            levels.append((x if level else x[:, 3:], coords))
            x = run(with_time(x) if level else x, coords, z)
            x, coords = abstraction(x, coords, z)
        x = self.middle(x)
        for propagation, run in self.up:
            skip, fine = levels.pop()
            x = run(propagation(with_time(x), coords, skip, fine, z), fine, z)
            coords = fine
        return self.out(self.head(x, z)).transpose(1, 2)


def published() -> PointPrior:
    """The published point prior in evaluation mode, with weights that no norm is indifferent to."""
    torch.manual_seed(0)
    prior = PointPrior(published_point_prior(), 4, 128).eval()
    assert isinstance(prior.network, UNet)
    with torch.no_grad():
        for parameter in prior.network.modulation.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return prior


def inputs(batch: int, num_points: int, device: torch.device) -> Inputs:
    """Latent points, times and styles, as :func:`published` takes them."""
    draw = Draw(device, 0)
    h_t = torch.cat([draw.points(batch, num_points), draw.normal(batch, num_points, 1)], -1)
    return h_t, 1 + 999 * draw.uniform(batch), draw.normal(batch, 128)


def results(network: nn.Module, which: str, args: Inputs, precision: str) -> list[Tensor]:
    """The output and, with a backward, the gradients of latent points and style."""
    h_t, t, z = args[0].detach().requires_grad_(), args[1], args[2].detach().requires_grad_()
    with autocast(precision, t.device):
        out = network(h_t, t, z).float()
    gradients = torch.autograd.grad(out, (h_t, z), driver.cotangent(out)) if which != "forward" else ()
    return [out.detach(), *gradients]


def errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Of each result, relative, in the L2 norm, of the median cloud.

    Where two furthest points are equal but for rounding either may be chosen, or a point may be rounded to either of
    two voxels: all that follows in that cloud differs, and it is no error.
    """
    pairs = zip(found, expected, strict=True)
    return [((x - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).median().item() for x, y in pairs]


def compare(which: str, prior: PointPrior, args: Inputs, rounds: int) -> list[Row]:
    """Plain and ours, run in turn: a row for each way, with medians of seconds and of the process' CPU seconds.

    ``which`` is one of ``PASSES``; the backward that is timed is that of the weights, as in training. A row of ours
    has the errors of its results, and a reason instead of times if they are more than rounding: that of float32, or in
    bf16 twice the errors of the plain form under autocast.
    """
    device = args[0].device
    plain = PlainPointPrior(prior).to(device)
    ways: dict[str, tuple[nn.Module, str]] = {"plain, float32": (plain, "no"), "ours, float32": (prior, "no")}
    if (auto := resolve_precision("auto", device)) != "no":
        ways[f"ours, {auto}"] = prior, auto

    expected = results(plain, which, args, "no")
    rows: list[Row] = []
    for way, (network, precision) in ways.items():
        row: Row = {"pass": which, "way": way, "batch": len(args[0]), "errors": [], "reason": ""}
        if network is prior:
            allowed = [driver.TOLERANCE[torch.float32]] * len(expected)
            if precision != "no":
                allowed = [2 * error for error in errors(results(plain, which, args, precision), expected)]
            row["errors"] = errors(results(prior, which, args, precision), expected)
            if not all(error <= most for error, most in zip(row["errors"], allowed, strict=True)):
                row["reason"] = "wrong"
        rows.append(row)

    weigh = driver.cotangent(expected[0])
    right = [row for row in rows if not row["reason"]]
    samples: list[list[tuple[float, float]]] = [[] for _ in right]
    for _ in range(1 + rounds):  # the first warms up
        for row, times in zip(right, samples, strict=True):
            start = time.perf_counter(), time.process_time()
            _run(*ways[row["way"]], args, None if which == "forward" else weigh)
            times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    for row, times in zip(right, samples, strict=True):
        row["seconds"], row["cpu"] = map(statistics.median, zip(*times[1:], strict=True))
    return rows


def _run(network: nn.Module, precision: str, args: Inputs, grad: Tensor | None) -> None:
    """One call to its end, with a backward if there is a gradient for it."""
    device = args[0].device
    with torch.set_grad_enabled(grad is not None):
        with autocast(precision, device):
            out = network(*args)
        if grad is not None:
            torch.autograd.grad(out, list(network.parameters()), grad)
    if device.type == "cuda":
        torch.cuda.synchronize()


_COLUMNS = ("pass", "B", "", "ms a cloud", "CPU ms a cloud", "plain / this", "by CPU time", "errors")


def markdown(rows: Sequence[Row]) -> str:
    """A table. The first row of a pass is the plain form's."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    plain = rows[0]
    for row in rows:
        if row["pass"] != plain["pass"]:
            plain = row
        cells = [row["pass"], row["batch"], row["way"]]
        if row["reason"]:
            cells += [row["reason"], "-", "-", "-"]
        else:
            cells += [f"{1e3 * row[clock] / row['batch']:.1f}" for clock in ("seconds", "cpu")]
            cells += [f"{plain[clock] / row[clock]:.2f}" for clock in ("seconds", "cpu")]
        cells.append(", ".join(f"{error:.0e}" for error in row["errors"]) or "-")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="The point prior of the published size, plain and ours, in turn.")
    parser.add_argument("--batch", type=int, default=BATCH[driver.device().type])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch on the CPU")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = driver.device()
    about = machine.describe(device)
    print(
        f"{about['device']}, {options.threads} threads, commit {about['commit']}, torch {torch.__version__}\n",
        flush=True,
    )
    prior = published().to(device)
    args = inputs(options.batch, POINTS, device)
    for which in PASSES:  # each takes a while
        print(markdown(compare(which, prior, args, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
