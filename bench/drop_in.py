"""The drop-in ops on a CPU beside their plain forms, in one run: ``python -m bench.drop_in``.

Neighbours beside ``torch.cdist`` and ``topk``, two thousand rows at a time; furthest points beside the loop that one
writes first. Median of three calls of each, taken in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench import machine
from lion_triton.kernels.compat import pytorch3d

ROUNDS = 3


def plain_knn(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    found = [torch.cdist(rows, y).topk(k, largest=False) for rows in x.split(2048, 1)]
    return torch.cat([f.values for f in found], 1).square(), torch.cat([f.indices for f in found], 1)


def plain_furthest(points: Tensor, lengths: Tensor, count: int) -> Tensor:
    padding = torch.arange(points.shape[1]) >= lengths[:, None]
    nearest = torch.full(points.shape[:2], torch.inf).masked_fill(padding, -1)
    idx = torch.zeros(len(points), count, dtype=torch.int64)
    for m in range(1, count):
        last = points.take_along_dim(idx[:, m - 1, None, None], 1)
        nearest = torch.minimum(nearest, (points - last).square().sum(-1))
        idx[:, m] = nearest.argmax(1)
    return idx


def compare(name: str, ours: Callable[[], Tensor], plain: Callable[[], Tensor]) -> None:
    same = (ours() == plain()).float().mean().item()
    seconds: dict[Callable[[], Tensor], list[float]] = {ours: [], plain: []}
    for _ in range(ROUNDS):
        for call, times in seconds.items():
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    a, b = (statistics.median(times) for times in seconds.values())
    print(f"{name:<52} {1e3 * a:9.1f} ms {1e3 * b:9.1f} ms {b / a:6.2f}x   {same:.2%} of the indices agree", flush=True)


def main() -> None:
    about = machine.describe(torch.device("cpu"))
    print(f"{about['device']}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':<52} {'ours':>12} {'plain':>12}")
    for N, D, K in ((20_000, 3, 32), (50_000, 3, 4), (2048, 3, 16), (1024, 64, 20), (4096, 64, 20)):
        x, y = (torch.randn(1, N, D, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
        compare(
            f"{K} nearest of {N} points in {D} dimensions",
            lambda x=x, y=y, K=K: pytorch3d.knn_points(x, y, K=K).idx,  # type: ignore[misc]
            lambda x=x, y=y, K=K: plain_knn(x, y, K)[1],  # type: ignore[misc]
        )
    for D, lengths in ((3, [2048, 1500, 900, 2048]), (6, [2048] * 4)):
        points, sizes = torch.randn(4, 2048, D, generator=torch.Generator().manual_seed(0)), torch.tensor(lengths)
        compare(
            f"256 furthest of 4 clouds of {min(lengths)} to 2048, {D} channels",
            lambda points=points, sizes=sizes: pytorch3d.sample_farthest_points(points, sizes, 256)[1],  # type: ignore[misc]
            lambda points=points, sizes=sizes: plain_furthest(points, sizes, 256),  # type: ignore[misc]
        )


if __name__ == "__main__":
    main()
