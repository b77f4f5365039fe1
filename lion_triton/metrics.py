"""How good are generated clouds? MMD, COV and 1-NNA by CD and EMD, JSD, thickness and unevenness; reconstruction, the
priors' bound.

Notation: S samples (generated), R references, in one and the same unit. Conventions are those of the field since
Achlioptas et al. 2018 and Yang et al. 2019 (PointFlow): distances are means of SQUARED distances between points,
see ``lion_triton.kernels.pairwise``. The sets may differ in size and their clouds in number of points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from scipy.spatial import cKDTree
from torch import Tensor

from lion_triton.diffusion import Model, to_eps, variational_bound
from lion_triton.kernels import (
    approx_emd,
    chamfer_distance,
    check_finite,
    exact_emd,
    knn,
    nearest_neighbor,
    normal_noise,
    pairwise_chamfer,
    pairwise_emd,
)
from lion_triton.kernels._checks import check_float
from lion_triton.models.lion import LION, Posterior

Progress = Callable[[int], Any]
EMD = Literal["approx", "exact"]
Distance = Literal["cd", "approx", "exact"]

F_SCORE_THRESHOLD = 0.001  # of squared distances: 0.032 in length
THICKNESS_POINTS = 12  # that a plane is fitted to
UNEVENNESS_NEIGHBOR = 8  # the distance to which tells how dense points lie
BOUND_TIMESTEPS = 50
_BOUND_RANGES = 5
_CLOUDS = 32  # at a time; in the bound part of what decides the noise


@dataclass(frozen=True)
class Distances:
    """All distances within and between samples and references, from which every figure follows.

    Rows and columns are in the order of the sets. ``cross`` is the distance of reference r, as first cloud, to sample
    s, as published: the approximate EMD is not symmetric.
    """

    samples: Float[Tensor, "S S"]
    cross: Float[Tensor, "S R"]
    references: Float[Tensor, "R R"]


def all_distances(
    samples: Float[Tensor, "S N 3"],
    references: Float[Tensor, "R M 3"],
    distance: Distance = "cd",
    *,
    progress: Progress | None = None,
) -> Distances:
    """Chamfer distances ("cd") or EMD ("approx", "exact") of all pairs, in the units of the coordinates, squared.

    progress: called with the number of pairs finished since its last call; they add up to ``num_pairs(S, R)``.
    ValueError: see ``check_sets``.
    """
    check_sets(samples, references, None if distance == "cd" else distance)
    pairs = ((samples, samples), (references, samples), (references, references))
    within, cross, others = (pairwise_distances(a, b, distance, progress=progress) for a, b in pairs)
    return Distances(within, cross.T, others)


def pairwise_distances(
    a: Float[Tensor, "S N 3"],
    b: Float[Tensor, "R M 3"],
    distance: Distance = "cd",
    *,
    progress: Progress | None = None,
) -> Float[Tensor, "S R"]:
    """One of the matrices of ``all_distances``, which see."""
    if distance == "cd":
        return pairwise_chamfer(a, b, progress=progress)
    return pairwise_emd(a, b, method=distance, progress=progress)


def kinds(emd: EMD | None) -> dict[str, Distance]:
    """The distances to compare by, by the names that figures have."""
    return {"cd": "cd"} if emd is None else {"cd": "cd", "emd": emd}


def num_pairs(samples: int, references: int) -> int:
    """How many pairs of clouds ``all_distances`` compares."""
    return samples**2 + samples * references + references**2


def check_sets(samples: Tensor, references: Tensor, emd: EMD | None) -> None:
    """Raise ``ValueError`` unless both are sets of finite clouds that can be compared.

    A cloud with NaN or infinity is named by its index. Exact EMD needs equally many points.
    """
    _check_pair({"samples": samples, "references": references}, emd)


def _check_pair(sets: dict[str, Tensor], emd: EMD | None) -> None:
    for name, clouds in sets.items():
        check_float(name, clouds)
        if clouds.ndim != 3 or clouds.shape[2] != 3 or 0 in clouds.shape:
            raise ValueError(f"{name}: expected shape (S, N, 3) with S, N >= 1, got {tuple(clouds.shape)}")
    check_finite(**sets)
    (first, a), (second, b) = sets.items()
    if emd == "exact" and a.shape[1] != b.shape[1]:
        raise ValueError(
            f"emd: exact needs equally many points, got {first} of {a.shape[1]} and {second} of {b.shape[1]}"
        )


def minimum_matching_distance(sample_to_reference: Float[Tensor, "S R"]) -> float:
    """MMD: the mean over references of the distance to their nearest sample; lower is better."""
    return sample_to_reference.min(dim=0).values.double().mean().item()


def coverage(sample_to_reference: Float[Tensor, "S R"]) -> float:
    """COV: the fraction of references that are the nearest reference of some sample; higher is better.

    Of several references at the same distance the first counts as the nearest. At most S / R if S < R.
    """
    nearest = sample_to_reference.min(dim=1).indices
    return nearest.unique().numel() / sample_to_reference.shape[1]


def nearest_neighbor_accuracy(
    sample_to_sample: Float[Tensor, "S S"],
    sample_to_reference: Float[Tensor, "S R"],
    reference_to_reference: Float[Tensor, "R R"],
) -> float:
    """1-NNA: leave-one-out accuracy of a nearest-neighbour classifier, sample or reference; 0.5 is best.

    A cloud's neighbours are looked for down its column, as published; the approximate EMD is not symmetric. Of several
    clouds at the same distance the first is the neighbour, samples before references. For sets of different sizes
    the best value is ``chance_accuracy``.
    """
    samples = len(sample_to_sample)
    top = torch.cat([sample_to_sample, sample_to_reference], dim=1)
    bottom = torch.cat([sample_to_reference.T, reference_to_reference], dim=1)
    distances = torch.cat([top, bottom])
    distances.fill_diagonal_(torch.inf)
    is_sample = torch.arange(len(distances), device=distances.device) < samples
    nearest = distances.min(dim=0).indices
    return (is_sample[nearest] == is_sample).double().mean().item()


def chance_accuracy(samples: int, references: int) -> float:
    """The 1-NNA to expect of samples from the very distribution of the references: just below 0.5 for S = R.

    The probability that a cloud's nearest neighbour, equally likely to be any of the others, is of its own set.
    """
    total = samples + references
    return (samples * (samples - 1) + references * (references - 1)) / (total * (total - 1))


def jensen_shannon_divergence(
    samples: Float[Tensor, "S N 3"], references: Float[Tensor, "R M 3"], resolution: int = 28
) -> float:
    """JSD in bits between where the points of both sets lie, 0 to 1, lower is better.

    On a grid of resolution^3 over [-0.5, 0.5]^3, without the grid points outside the sphere of radius 0.5. A point
    counts for the nearest grid point that is left, also from outside. On a tie (28 is even, so that 0 lies between two
    grid points) the one with the larger coordinates gets it, x before y before z.
    """
    return _divergence(*(_cells(clouds, resolution) for clouds in (samples, references)))


def _divergence(samples: Int64[np.ndarray, "S N"], references: Int64[np.ndarray, "R M"]) -> float:
    """JSD between sets whose points count for these grid points."""
    count = 1 + max(samples.max(), references.max())
    p, q = (np.bincount(cells.ravel(), minlength=count) / cells.size for cells in (samples, references))
    return max(0.0, float(_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2))


def _cells(clouds: Float[Tensor, "S N 3"], resolution: int = 28) -> Int64[np.ndarray, "S N"]:
    """The grid point that each point counts for."""
    axis = np.linspace(-0.5, 0.5, resolution)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    inside = np.linalg.norm(grid, axis=1) <= 0.5
    points = clouds.detach().reshape(-1, 3).cpu().double().numpy()
    steps = np.floor((points + 0.5) * (resolution - 1) + 0.5).clip(0, resolution - 1).astype(np.int64)
    cell = (steps[:, 0] * resolution + steps[:, 1]) * resolution + steps[:, 2]
    # The nearest point of the whole grid is the nearest of those left, if it is one of them. Elsewhere all that are
    # equally near are asked for, eight at most around a point, and the last in the grid's order is taken.
    outside = np.flatnonzero(~inside[cell])
    left = np.flatnonzero(inside)
    if len(outside):
        neighbours = cKDTree(grid[left]).query(points[outside], k=list(range(1, min(8, len(left)) + 1)), workers=-1)
        distance, found = map(np.asarray, neighbours)
        cell[outside] = left[np.where(distance <= distance[:, :1] * (1 + 1e-9), found, -1).max(axis=1)]
    return cell.reshape(clouds.shape[:2])


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


@torch.no_grad()
def thickness(clouds: Float[Tensor, "S N 3"], k: int = THICKNESS_POINTS) -> Float[Tensor, " S"]:
    """How thick the surfaces are that points lie on, in the units of the coordinates, float64: 0 on planes.

    For each point the root mean square distance of its k nearest points, itself among them, from their best plane: the
    least singular value of the centred (k, 3) matrix over sqrt(k); the mean over a cloud. k: all where it has fewer.
    It sees noise around a surface, and also curvature and distance between points: compare clouds of equally many.
    Not differentiable. ValueError: see ``kernels.knn``.
    """
    k = min(k, clouds.shape[1])
    means = []
    for some in clouds.split(_CLOUDS):
        index = knn(some, some, k)[1].long()
        near = torch.stack([cloud[rows] for cloud, rows in zip(some.double(), index, strict=True)])
        near = near - near.mean(2, keepdim=True)
        # Squared singular values are the eigenvalues of a 3 x 3 matrix; float64 keeps half its digits of the least.
        least = torch.linalg.eigvalsh(near.mT @ near / k)[..., 0]
        means.append(least.clamp_min(0).sqrt().mean(1))
    return torch.cat(means)


@torch.no_grad()
def unevenness(clouds: Float[Tensor, "S N 3"], k: int = UNEVENNESS_NEIGHBOR) -> Float[Tensor, " S"]:
    """How unevenly points lie on their surfaces, float64: 0 where all have as much room.

    The standard deviation over a cloud's points of the distance to their k-th nearest other point, over its mean. Of
    points drawn uniformly from a plane it is 1 / (2 sqrt(k)), .18 for 8, as the disc around a point that reaches to the
    k-th has an area of Gamma distribution; edges and parts that touch add to it. k: N - 1 where that is less.
    It depends on neither place, size nor turn. Not differentiable. ValueError: see ``kernels.knn``.
    """
    k = min(k, clouds.shape[1] - 1)
    found = []
    for some in clouds.split(_CLOUDS):
        distances = knn(some, some, k + 1)[0][..., -1].double().sqrt()
        found.append(distances.std(1, correction=0) / distances.mean(1).clamp_min(torch.finfo(torch.float64).tiny))
    return torch.cat(found)


def ratio_of_medians(samples: Float[Tensor, " S"], references: Float[Tensor, " R"]) -> float:
    """The median thickness or unevenness of samples over that of references: 1 is best. Above it surfaces are fuzzy, or
    points clumped.

    Of clouds of equally many points it depends on neither place, size nor turn of all of them together. 1 where both
    have none, infinite where the references alone have none.
    """
    ours, theirs = (float(np.median(values.cpu().numpy())) for values in (samples, references))
    if theirs == 0:
        return 1.0 if ours == 0 else float("inf")
    return ours / theirs


def figures(distances: Distances, name: str) -> dict[str, float]:
    """``mmd_<name>, cov_<name>, 1nna_<name>`` of these distances."""
    return {
        f"mmd_{name}": minimum_matching_distance(distances.cross),
        f"cov_{name}": coverage(distances.cross),
        f"1nna_{name}": nearest_neighbor_accuracy(distances.samples, distances.cross, distances.references),
    }


@dataclass(frozen=True)
class Measures:
    """What the figures need of each cloud of a set beside distances."""

    cells: Int64[np.ndarray, "S N"]  # the grid point that JSD counts each point for
    thickness: Float[Tensor, " S"]
    unevenness: Float[Tensor, " S"]

    @classmethod
    def of(cls, clouds: Float[Tensor, "S N 3"]) -> Measures:
        return cls(_cells(clouds), thickness(clouds).cpu(), unevenness(clouds).cpu())

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, rows: Int64[np.ndarray, " K"]) -> Measures:
        return Measures(self.cells[rows], self.thickness[rows], self.unevenness[rows])


@dataclass(frozen=True)
class Comparison:
    """What the figures of samples against references follow from, cloud by cloud: also those of some of the clouds."""

    distances: Mapping[str, Distances]  # by the names that figures have, "cd" and "emd"; on the CPU
    samples: Measures
    references: Measures

    def figures(self) -> dict[str, float]:
        """See ``evaluate``."""
        results = dict[str, float]()
        for name, distances in self.distances.items():
            results |= figures(distances, name)
        ours, theirs = self.samples, self.references
        results["jsd"] = _divergence(ours.cells, theirs.cells)
        results["thickness"] = ratio_of_medians(ours.thickness, theirs.thickness)
        results["unevenness"] = ratio_of_medians(ours.unevenness, theirs.unevenness)
        return results

    def some(self, samples: Int64[np.ndarray, " K"], references: Int64[np.ndarray, " L"]) -> Comparison:
        """Of these samples and these references alone, by their indices."""
        i, j = torch.from_numpy(samples)[:, None], torch.from_numpy(references)[:, None]
        distances = {
            name: Distances(d.samples[i, i.T], d.cross[i, j.T], d.references[j, j.T])
            for name, d in self.distances.items()
        }
        return Comparison(distances, self.samples[samples], self.references[references])

    def among_references(self) -> Comparison:
        """Of the references against themselves, in the samples' place: what ``some`` of them get against others."""
        distances = {name: Distances(d.references, d.references.T, d.references) for name, d in self.distances.items()}
        return Comparison(distances, self.references, self.references)


def evaluate(
    samples: Float[Tensor, "S N 3"],
    references: Float[Tensor, "R M 3"],
    emd: EMD | None = "approx",
    *,
    progress: Progress | None = None,
) -> dict[str, float]:
    """All figures of a set of samples against a set of references in the same (data) units.

    progress: called with the number of pairs finished since its last call; they add up to ``num_pairs(S, R)``, twice
    that with an EMD.

    Returns:
        ``mmd_cd, cov_cd, 1nna_cd``, the same with ``emd`` unless that is None, ``jsd``, and ``thickness`` and
        ``unevenness``: the ratios.

    Raises:
        ValueError: see ``check_sets``; before anything is computed.
    """
    check_sets(samples, references, emd)
    distances = {name: all_distances(samples, references, kind, progress=progress) for name, kind in kinds(emd).items()}
    return Comparison(distances, Measures.of(samples), Measures.of(references)).figures()


def f_score(
    x: Float[Tensor, "B N 3"], y: Float[Tensor, "B M 3"], threshold: float = F_SCORE_THRESHOLD
) -> Float[Tensor, " B"]:
    """The harmonic mean of precision and recall of x as a reconstruction of y, 0 to 1, higher is better.

    Precision is the fraction of points of x whose SQUARED distance to y is below ``threshold``, recall that of y to x;
    0 where both are 0. With the threshold on the squared distance this is the F-score of Tatarchenko et al. 2019
    ("What do single-view 3D reconstruction networks learn?") at a distance of sqrt(threshold).
    """
    if not threshold > 0:
        raise ValueError(f"threshold: expected a number above 0, got {threshold}")
    precision, recall = ((nearest_neighbor(a, b)[0] < threshold).float().mean(1) for a, b in ((x, y), (y, x)))
    return 2 * precision * recall / (precision + recall).clamp_min(torch.finfo(torch.float32).tiny)


def reconstruction(
    x: Float[Tensor, "B N 3"],
    y: Float[Tensor, "B M 3"],
    emd: EMD | None = "approx",
    *,
    threshold: float = F_SCORE_THRESHOLD,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Means over clouds of ``reconstructions``, which see."""
    values = reconstructions(x, y, emd, threshold=threshold, progress=progress)
    return {name: of.mean().item() for name, of in values.items()}


def reconstructions(
    x: Float[Tensor, "B N 3"],
    y: Float[Tensor, "B M 3"],
    emd: EMD | None = "approx",
    *,
    threshold: float = F_SCORE_THRESHOLD,
    progress: Progress | None = None,
) -> dict[str, Float[Tensor, " B"]]:
    """Of each cloud ``reconstruction_cd``, ``_emd`` unless ``emd`` is None, ``_f_score``, in float64. x rebuilds y.

    CD and EMD are in squared units of the coordinates, see ``f_score`` for the third. progress: called with the number
    of clouds finished since its last call. ValueError: see ``check_sets``; x and y of different sizes.
    """
    _check_pair({"x": x, "y": y}, emd)
    if len(x) != len(y):
        raise ValueError(f"y: expected the number of clouds of x ({len(x)}), got {len(y)}")
    measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"reconstruction_cd": chamfer_distance}
    if emd is not None:
        measures["reconstruction_emd"] = approx_emd if emd == "approx" else exact_emd
    measures["reconstruction_f_score"] = partial(f_score, threshold=threshold)
    values: dict[str, list[Tensor]] = {name: [] for name in measures}
    for a, b in zip(x.split(_CLOUDS), y.split(_CLOUDS), strict=True):
        for name, measure in measures.items():
            values[name].append(measure(a, b))
        if progress is not None:
            progress(len(a))
    return {name: torch.cat(parts).double() for name, parts in values.items()}


@torch.no_grad()
def prior_bounds(
    lion: LION,
    latents: Posterior,
    key: Int[Tensor, " 2"],
    labels: Int[Tensor, " B"] | None = None,
    clip: Float[Tensor, "B 512"] | None = None,
    *,
    num_timesteps: int | None = BOUND_TIMESTEPS,
    progress: Progress | None = None,
) -> dict[str, Float[Tensor, " B"]]:
    """Upper bounds on minus the log density that the priors give to each cloud's latents, float64 on the CPU.

    In nats per dimension, lower is better (``diffusion.variational_bound``): "shape" of z0, "point" of h0 given z0, and
    "joint" of both together.

    latents: of the posterior of held-out clouds; h0 is sampled from its distribution here. The density is that of the
    latents themselves, whatever units the priors work in, so it depends on the VAE: compare priors of one VAE.
    num_timesteps: about so many of the bound's T - 1 terms, an unbiased estimate; None: all. The terms fall about as
    1/t, so equally many are taken of each of a few ranges that grow geometrically, evenly spaced from a random start.
    progress: called with the number of clouds that a prior is done with; they add up to 2 B.
    """
    config, schedule, device = lion.config, lion.schedule, latents.z.device
    T = schedule.num_train_timesteps
    step = torch.tensor([0, 1], device=device)
    if num_timesteps is not None and num_timesteps < _BOUND_RANGES:
        raise ValueError(f"num_timesteps: expected at least {_BOUND_RANGES}, got {num_timesteps}")
    ranges = _bound_times(T, num_timesteps, float(torch.special.ndtr(normal_noise((1,), key))))

    def eps_of(prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return to_eps(prediction, x_t, t, schedule, config.diffusion.prediction)

    nats = torch.zeros(2, len(latents.z), dtype=torch.float64)
    for number, rows in enumerate(torch.arange(len(latents.z), device=device).split(_CLOUDS)):
        # Offset 0 of the key is the times', then three keys for each part: the noise of h0, and the two bounds'.
        h_key, z_key, point_key = (key + step * (1 + (3 * number + i) * (T + 1)) for i in range(3))
        h_mu, h_log_sigma = latents.h_mu[rows], latents.h_log_sigma[rows]
        h = h_mu + h_log_sigma.exp() * normal_noise(h_mu.shape, h_key)
        h, z = (h - lion.h_mean) / lion.h_std, (latents.z[rows] - lion.z_mean) / lion.z_std
        part_labels, part_clip = (None if x is None else x[rows] for x in (labels, clip))

        def shape(x: Tensor, t: Tensor, labels: Any = part_labels, clip: Any = part_clip) -> Tensor:
            return eps_of(lion.shape_prior(x, t, clip, labels), x, t)

        def point(x: Tensor, t: Tensor, z: Tensor = z, labels: Any = part_labels, clip: Any = part_clip) -> Tensor:
            return eps_of(lion.point_prior(x, t, z, clip, labels), x, t)

        parts: tuple[tuple[Model, Tensor, Tensor], ...] = ((shape, z, z_key), (point, h, point_key))
        for i, (model, x, x_key) in enumerate(parts):
            for count, times in ranges:
                bound = variational_bound(
                    model, x, schedule, x_key, variance=config.diffusion.variance, timesteps=times
                )
                # It takes the times for a draw from all T - 1; these are from ``count`` of them.
                nats[i, rows.cpu()] += (bound.diffusion.double() * (count / (T - 1))).cpu()
            nats[i, rows.cpu()] += (bound.prior + bound.reconstruction).double().cpu()
            if progress is not None:
                progress(len(rows))
    # Standardising multiplied the density by the standard deviations.
    nats[0] += lion.z_std.double().log().sum().cpu()
    nats[1] += latents.h_mu.shape[1] * lion.h_std.double().log().sum().cpu()
    dims = latents.z[0].numel(), latents.h_mu[0].numel()
    return {"shape": nats[0] / dims[0], "point": nats[1] / dims[1], "joint": nats.sum(0) / sum(dims)}


def _bound_times(T: int, num_timesteps: int | None, start: float) -> list[tuple[int, Tensor]]:
    """Ranges of the times 2..T, each as its length and the times chosen of it; ``start``, in [0, 1), shifts these."""
    if num_timesteps is None or num_timesteps >= T - 1:
        return [(max(T - 1, 1), torch.arange(2, max(T, 2) + 1))]
    edges = sorted({round(2 * ((T + 1) / 2) ** (i / _BOUND_RANGES)) for i in range(_BOUND_RANGES + 1)})
    ranges = []
    for i, (first, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        shift = start if i % 2 == 0 else 1 - start  # an early start makes the sum too large, a late one too small
        count = min(num_timesteps // _BOUND_RANGES, end - first)
        spaced = (torch.arange(count, dtype=torch.float64) + shift) * ((end - first) / count)
        ranges.append((end - first, first + spaced.long().clamp_max(end - first - 1)))
    return ranges
