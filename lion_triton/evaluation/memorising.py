"""The check against memorising: how near do generated clouds lie to training shapes, compared with held-out ones?"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from tqdm import tqdm

from lion_triton.evaluation.sets import Array, Preparation, Source
from lion_triton.kernels import chamfer_distance, pairwise_chamfer
from lion_triton.metrics import Progress

SCREEN_POINTS, CANDIDATES = 256, 8  # how the nearest training shape is found
# A cloud is as near to a shape as two draws of it are to each other: of 512 points these differ by 30% once in 1000, of
# 2048 points by 11% (240 pieces of furniture).
COPY = 1.3
TRAINING, FLOOR, SCREEN = range(5, 8)  # streams of random numbers


@dataclass(frozen=True)
class Training:
    """Training shapes, of which a few points of each are at hand."""

    source: Source
    prepare: Preparation
    screen: Float32[Array, "T P 3"]
    sha256: str  # of the coordinates of all of them, whole, as little-endian float32

    @classmethod
    def read(cls, source: Source, prepare: Preparation, num_points: int) -> Training:
        """Read every shape once, so that a bad one is found before anything is computed.

        num_points: of the clouds whose nearest shapes are looked for; the fewest, if they differ.

        Raises:
            ValueError: see ``Source``.
        """
        digest, screen = hashlib.sha256(), []
        for i in tqdm(range(len(source)), "reading training shapes", unit="shape", leave=False, disable=None):
            cloud = source[i]
            digest.update(cloud.astype("<f4").tobytes())
            whole = prepare.draw(cloud, num_points, prepare.rng(TRAINING, i))
            screen.append(_few(whole, min(SCREEN_POINTS, num_points), prepare.rng(SCREEN, i)))
        return cls(source, prepare, np.stack(screen), digest.hexdigest())


def _few(cloud: Float32[Array, "N 3"], num_points: int, rng: np.random.Generator) -> Float32[Array, "num_points 3"]:
    """Some points of a cloud that is in its units already; all, if just so many."""
    return Preparation(None, 0).draw(cloud, num_points, rng)


@dataclass(frozen=True)
class Nearest:
    """The nearest training shape of each of K clouds."""

    index: Array  # (K,)
    distance: Array  # (K,) Chamfer
    points: Array  # (K, N, 3)


def nearest_training(
    clouds: Float32[Array, "K N 3"], training: Training, device: torch.device, progress: Progress
) -> Nearest:
    """Find each cloud's nearest training shape by Chamfer distance.

    All are compared with SCREEN_POINTS random points, then the CANDIDATES nearest with all N; up to SCREEN_POINTS
    points the first comparison is the whole. A training shape of fewer points repeats some. ``progress`` is called
    with the number of pairs compared first: K times the training shapes.
    """
    num_points, coarse = clouds.shape[1], training.screen.shape[1]
    prepare = training.prepare
    a = np.stack([_few(cloud, coarse, prepare.rng(SCREEN, i)) for i, cloud in enumerate(clouds)])
    table = pairwise_chamfer(*(torch.from_numpy(x).to(device) for x in (a, training.screen)), progress=progress).cpu()
    if coarse == num_points:
        distance, index = (x.numpy() for x in table.min(dim=1))
        return Nearest(index, distance, training.screen[index])
    found = table.topk(min(CANDIDATES, table.shape[1]), largest=False).indices.sort(dim=1).values.numpy()
    used = np.unique(found)
    full = torch.from_numpy(prepare(training.source, num_points, TRAINING, used.tolist()))
    rows = np.searchsorted(used, found)
    index, distance = np.empty(len(clouds), dtype=np.int64), np.empty(len(clouds), dtype=np.float32)
    for i, candidates in enumerate(rows):
        some = pairwise_chamfer(torch.from_numpy(clouds[i : i + 1]).to(device), full[candidates].to(device))[0].cpu()
        best = int(some.argmin())
        index[i], distance[i] = candidates[best], some[best]
    return Nearest(used[index], distance, full[index].numpy())


def sampling_floor(near: Nearest, training: Training, device: torch.device) -> Float32[Array, " K"] | None:
    """How far apart two clouds of one shape lie: the Chamfer distance of two draws of points of each nearest shape.

    None if one of these shapes has too few points for two draws.
    """
    source, prepare, num_points = training.source, training.prepare, near.points.shape[1]
    used, rows = np.unique(near.index, return_inverse=True)
    pairs = []
    for k in used.tolist():
        cloud = source[k]
        if prepare.available(len(cloud)) < 2 * num_points:
            return None
        rng = prepare.rng(FLOOR, k)
        pairs.append(rng.permutation(prepare.draw(cloud, 2 * num_points, rng)))
    both = torch.from_numpy(np.stack(pairs)).to(device)
    return chamfer_distance(both[:, :num_points], both[:, num_points:]).cpu().numpy()[rows]


def summary(samples: Nearest, references: Nearest, training: Training, device: torch.device) -> dict[str, Any]:
    """The distances to the nearest training shapes in a few figures, as ``evaluation.json`` has them."""
    sets = {"samples": samples, "references": references}
    figures: dict[str, Any] = {f"{name}_median": float(np.median(near.distance)) for name, near in sets.items()}
    figures["samples_nearer_than_any_reference"] = int((samples.distance < references.distance.min()).sum())
    floors = {name: sampling_floor(near, training, device) for name, near in sets.items()}
    if any(floor is None for floor in floors.values()):
        floors = dict.fromkeys(sets)
    floor = floors["samples"]
    figures["one_shape_drawn_twice"] = None if floor is None else float(np.median(floor))
    for name, floor in floors.items():
        copies = None if floor is None else int((sets[name].distance <= COPY * floor).sum())
        figures[f"{name}_as_near_as_two_draws"] = copies
    return figures
