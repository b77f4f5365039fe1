"""``torch_cluster``: furthest points, nearest neighbours and neighbours in a radius, of clouds told apart by a batch.

x: (n, D), any D; batch vectors (n,) int64, in rising order, None for one cloud. Indices are int64 into all points.
``num_workers`` is ignored, and ``batch_size``, which the batch vectors know. No gradients, as in the original;
deterministic. Batch vectors are read on the host. ValueError: arguments that do not fit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from lion_triton import kernels
from lion_triton.kernels.compat._clouds import as_int, check_tensors, furthest_points, pack_clouds, pad_clouds
from lion_triton.kernels.compat.pytorch3d import ball_query

__all__ = ["fps", "knn", "knn_graph", "radius", "radius_graph"]


def fps(
    x: Float[Tensor, "n D"],
    batch: Int64[Tensor, " n"] | None = None,
    ratio: float | Tensor | None = None,
    random_start: bool = True,
    batch_size: int | None = None,
    ptr: Any = None,
) -> Int64[Tensor, " m"]:
    """Indices of ceil(ratio x size) points of each cloud, each the furthest from those before it.

    ratio: 0.5 by default, a number or one of each cloud. random_start: from a random point, drawn by PyTorch's
    generator of the device; else from the first. ptr: where clouds begin and the last ends, instead of ``batch``.
    """
    x = _points("x", x)
    if ptr is not None:
        starts = [as_int("ptr", p) for p in ptr]
        sizes = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    else:
        sizes = _sizes("batch", batch, x)
    ratios = torch.as_tensor(0.5 if ratio is None else ratio, dtype=torch.float32).cpu().expand(len(sizes))
    samples = [min(n, int(m)) for n, m in zip(sizes, (torch.tensor(sizes) * ratios).ceil().tolist(), strict=True)]
    if not samples or max(samples) == 0:
        return torch.zeros(0, dtype=torch.int64, device=x.device)
    lengths = _lengths(sizes, x)
    start = (torch.rand(len(sizes), device=x.device) * lengths).long() if random_start else None
    idx = furthest_points(pad_clouds(x, sizes), max(samples), lengths, start)
    return pack_clouds(idx + (lengths.cumsum(0) - lengths)[:, None], samples)


def knn(
    x: Float[Tensor, "n D"],
    y: Float[Tensor, "m D"],
    k: int,
    batch_x: Int64[Tensor, " n"] | None = None,
    batch_y: Int64[Tensor, " m"] | None = None,
    cosine: bool = False,
    num_workers: int = 1,
    batch_size: int | None = None,
) -> Int64[Tensor, "2 E"]:
    """For each point of y the k points of x nearest to it in its own cloud: rows of y, and of x.

    Nearest first; fewer where a cloud has fewer. cosine: by the angle instead of the distance.
    """
    x, y, sizes_x, sizes_y = _clouds(x, y, batch_x, batch_y)
    if cosine:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    _, idx = kernels.knn(pad_clouds(y, sizes_y), pad_clouds(x, sizes_x), as_int("k", k), lengths=_lengths(sizes_x, x))
    return _pairs(idx, sizes_x, sizes_y)


def radius(
    x: Float[Tensor, "n D"],
    y: Float[Tensor, "m D"],
    r: float,
    batch_x: Int64[Tensor, " n"] | None = None,
    batch_y: Int64[Tensor, " m"] | None = None,
    max_num_neighbors: int = 32,
    num_workers: int = 1,
    batch_size: int | None = None,
    ignore_same_index: bool = False,
) -> Int64[Tensor, "2 E"]:
    """For each point of y the first points of x, in index order, of its own cloud that are closer than r: rows of both.

    max_num_neighbors: at most so many. ignore_same_index: no pairs of equal rows.
    """
    x, y, sizes_x, sizes_y = _clouds(x, y, batch_x, batch_y)
    most = as_int("max_num_neighbors", max_num_neighbors)
    lengths_y, lengths_x = (_lengths(sizes, x) for sizes in (sizes_y, sizes_x))
    clouds = pad_clouds(y, sizes_y), pad_clouds(x, sizes_x)
    _, idx, _ = ball_query(*clouds, lengths_y, lengths_x, most + ignore_same_index, float(r), False)
    if ignore_same_index:
        same = idx == torch.arange(idx.shape[1], device=x.device)[:, None]
        found = (idx >= 0) & ~same
        idx = idx.masked_fill(~found | (found.cumsum(-1) > most), -1)
    return _pairs(idx, sizes_x, sizes_y)


def knn_graph(
    x: Float[Tensor, "n D"],
    k: int,
    batch: Int64[Tensor, " n"] | None = None,
    loop: bool = False,
    flow: str = "source_to_target",
    cosine: bool = False,
    num_workers: int = 1,
    batch_size: int | None = None,
) -> Int64[Tensor, "2 E"]:
    """Edges to each point from its k nearest others (with loop from itself too); ``flow`` says which row is which."""
    edges = knn(x, x, as_int("k", k) + (not loop), batch, batch, cosine)
    return _graph(edges if loop else edges[:, edges[0] != edges[1]], flow)


def radius_graph(
    x: Float[Tensor, "n D"],
    r: float,
    batch: Int64[Tensor, " n"] | None = None,
    loop: bool = False,
    max_num_neighbors: int = 32,
    flow: str = "source_to_target",
    num_workers: int = 1,
    batch_size: int | None = None,
) -> Int64[Tensor, "2 E"]:
    """Edges to each point from those closer than r (with loop from itself too); ``flow`` says which row is which."""
    edges = radius(x, x, r, batch, batch, max_num_neighbors, ignore_same_index=not loop)
    return _graph(edges, flow)


def _graph(edges: Tensor, flow: str) -> Tensor:
    if flow not in ("source_to_target", "target_to_source"):
        raise ValueError(f'flow: expected "source_to_target" or "target_to_source", got {flow!r}')
    return edges.flip(0) if flow == "source_to_target" else edges


def _pairs(idx: Tensor, sizes_x: list[int], sizes_y: list[int]) -> Int64[Tensor, "2 E"]:
    """Rows of y and of x from indices (B, M, K) within clouds, -1 where there is none."""
    lengths = _lengths(sizes_x, idx)
    within = pack_clouds(idx.long(), sizes_y)
    rows = pack_clouds(idx + (lengths.cumsum(0) - lengths)[:, None, None], sizes_y)
    found = within >= 0
    return torch.stack([found.nonzero()[:, 0], rows[found]])


def _points(name: str, x: Any) -> Float[Tensor, "n D"]:
    check_tensors(**{name: x})
    if x.ndim not in (1, 2):
        raise ValueError(f"{name}: expected shape (n, D), got {tuple(x.shape)}")
    x = x.detach().view(-1, 1) if x.ndim == 1 else x.detach()
    return x if x.dtype == torch.float64 else x.float()


def _clouds(
    x: Any, y: Any, batch_x: Tensor | None, batch_y: Tensor | None
) -> tuple[Tensor, Tensor, list[int], list[int]]:
    x, y = _points("x", x), _points("y", y)
    sizes_x, sizes_y = _sizes("batch_x", batch_x, x), _sizes("batch_y", batch_y, y)
    clouds = max(len(sizes_x), len(sizes_y))
    sizes_x, sizes_y = (sizes + [0] * (clouds - len(sizes)) for sizes in (sizes_x, sizes_y))
    return x, y, sizes_x, sizes_y


def _sizes(name: str, batch: Any, x: Tensor) -> list[int]:
    """How many points each cloud has; read on the host."""
    if batch is None:
        return [len(x)]
    check_tensors(**{name: batch})
    if batch.shape != x.shape[:1]:
        raise ValueError(f"{name}: expected shape ({len(x)},), got {tuple(batch.shape)}")
    if len(batch) > 1 and (batch.diff() < 0).any():
        raise ValueError(f"{name}: expected the clouds in rising order")
    return batch.bincount().tolist()


def _lengths(sizes: list[int], like: Tensor) -> Int64[Tensor, " B"]:
    return torch.tensor(sizes, dtype=torch.int64, device=like.device)  # of no clouds it would be float32
