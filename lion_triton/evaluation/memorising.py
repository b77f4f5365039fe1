"""The check against memorising: how near do generated clouds lie to training shapes, compared with held-out ones?"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64

from lion_triton.evaluation.sets import FEWER, FLOOR, SCREEN, TRAINING, Array, CloudSet, Preparation, fingerprint
from lion_triton.kernels import chamfer_distance, pairwise_chamfer
from lion_triton.metrics import Progress
from lion_triton.progress import ProgressBar

SCREEN_POINTS, CANDIDATES = 256, 8  # how the nearest training shape is found
# A cloud is as near to a shape as two draws of it are to each other: of 512 points these differ by 30% once in 1000, of
# 2048 points by 11% (240 pieces of furniture).
COPY = 1.3


@dataclass(frozen=True)
class Training:
    """Training shapes, of which a few points of each are at hand."""

    source: CloudSet
    prepare: Preparation
    num_points: int  # that shapes and clouds are compared with
    screen: Float32[Array, "T P 3"]
    sha256: str  # of the coordinates of all of them, whole, as little-endian float32
    fingerprints: frozenset[bytes]  # of each

    @classmethod
    def read(cls, source: CloudSet, prepare: Preparation, num_points: int) -> Training:
        """Read every shape once, so that a bad one is found before anything is computed.

        num_points: as many as all clouds to compare have; fewer are compared if most shapes have fewer.

        Raises:
            ValueError: see ``CloudSet``.
        """
        num_points = min(num_points, int(np.median([prepare.available(count) for count in source.num_points()])))
        digest, fingerprints, screen = hashlib.sha256(), [], []
        for i in ProgressBar(range(len(source)), "reading training shapes", unit="shape", leave=False):
            cloud = source[i]
            digest.update(cloud.astype("<f4").tobytes())
            fingerprints.append(fingerprint(cloud))
            whole = prepare.draw(cloud, num_points, prepare.rng(TRAINING, i))
            screen.append(_few(whole, min(SCREEN_POINTS, num_points), prepare.rng(SCREEN, i)))
        return cls(source, prepare, num_points, np.stack(screen), digest.hexdigest(), frozenset(fingerprints))


def _few(cloud: Float32[Array, "N 3"], num_points: int, rng: np.random.Generator) -> Float32[Array, "num_points 3"]:
    """Some points of a cloud that is in its units already; all, if just so many."""
    return Preparation(None, 0).draw(cloud, num_points, rng)


@dataclass(frozen=True)
class Nearest:
    """The nearest training shape of each of K clouds, of N points both."""

    index: Int64[Array, " K"]
    distance: Float32[Array, " K"]  # Chamfer
    points: Float32[Array, "K N 3"]  # of the shape


def nearest_training(
    clouds: Float32[Array, "K M 3"], training: Training, device: torch.device, progress: Progress
) -> Nearest:
    """Find each cloud's nearest training shape by Chamfer distance, with N = ``training.num_points`` points of either.

    All are compared with SCREEN_POINTS random points, then the CANDIDATES nearest with all N; up to SCREEN_POINTS
    points the first comparison is the whole. A training shape of fewer points repeats some. ``progress`` is called
    with the number of pairs compared first: K times the training shapes.
    """
    prepare, num_points, coarse = training.prepare, training.num_points, training.screen.shape[1]
    clouds = np.stack([_few(cloud, num_points, prepare.rng(FEWER, i)) for i, cloud in enumerate(clouds)])
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


def sampling_floor(near: Nearest, training: Training, device: torch.device) -> Float32[Array, " K"]:
    """How far apart two clouds of one shape lie: the Chamfer distance of two draws of points of each nearest shape.

    A shape with too few points for two draws is halved. The squared distance between neighbours on a surface goes with
    the area for each point, so that of all N points follows from the halves'.
    """
    source, prepare, num_points = training.source, training.prepare, training.num_points
    used, rows = np.unique(near.index, return_inverse=True)
    floors = np.empty(len(used), dtype=np.float32)
    for i, k in enumerate(used.tolist()):
        cloud, rng = source[k], prepare.rng(FLOOR, k)
        half = max(1, min(num_points, prepare.available(len(cloud)) // 2))
        both = torch.from_numpy(rng.permutation(prepare.draw(cloud, 2 * half, rng))).to(device)
        floors[i] = chamfer_distance(both[None, :half], both[None, half:]).item() * half / num_points
    return floors[rows]


def summary(samples: Nearest, references: Nearest, training: Training, device: torch.device) -> dict[str, Any]:
    """The distances to the nearest training shapes in a few figures, as ``evaluation.json`` has them."""
    sets = {"samples": samples, "references": references}
    floors = {name: sampling_floor(near, training, device) for name, near in sets.items()}
    return {
        "points": training.num_points,
        **{f"{name}_median": float(np.median(near.distance)) for name, near in sets.items()},
        "samples_nearer_than_any_reference": int((samples.distance < references.distance.min()).sum()),
        "one_shape_drawn_twice": float(np.median(floors["samples"])),
        **{
            f"{name}_as_near_as_two_draws": int((near.distance <= COPY * floors[name]).sum())
            for name, near in sets.items()
        },
    }
