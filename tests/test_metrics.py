"""The metrics against the authors' figures, and on sets whose answer is known."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lion_triton import metrics
from lion_triton.diffusion import Schedule
from lion_triton.kernels import exact_emd, normal_noise
from lion_triton.models.lion import DiffusionConfig, Posterior

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(DATA / "lion_metrics.npz") as file:
        return {name: file[name] for name in file}


def stored(fraction: np.ndarray) -> object:
    """A fraction of 14 or 28 clouds, which the file holds rounded to float32: one cloud more would be 0.03 off."""
    return pytest.approx(float(fraction), abs=1e-7)


def test_golden_figures(golden: dict[str, np.ndarray]) -> None:
    samples, references = torch.from_numpy(golden["samples"]), torch.from_numpy(golden["refs"])
    got = metrics.evaluate(samples, references)
    assert got["mmd_cd"] == pytest.approx(float(golden["cd_mmd"]), rel=1e-5)
    assert got["cov_cd"] == stored(golden["cd_cov"])
    assert got["1nna_cd"] == stored(golden["cd_1nna"])
    assert got["jsd"] == pytest.approx(float(golden["jsd"]), rel=1e-4)
    assert got["mmd_emd"] == pytest.approx(float(golden["emd_approx_mmd"]), rel=1e-4)
    assert got["cov_emd"] == stored(golden["emd_approx_cov"])
    assert got["1nna_emd"] == stored(golden["emd_approx_1nna"])


def test_golden_emd_figures_from_the_golden_matrices(golden: dict[str, np.ndarray]) -> None:
    """The authors' matrices have the references first; the approximate EMD is not symmetric."""
    cross = torch.from_numpy(golden["emd_approx_ref_sample"]).T
    within = [torch.from_numpy(golden[f"emd_approx_{name}"]) for name in ("sample_sample", "ref_ref")]
    assert metrics.minimum_matching_distance(cross) == pytest.approx(float(golden["emd_approx_mmd"]), rel=1e-6)
    assert metrics.coverage(cross) == stored(golden["emd_approx_cov"])
    accuracy = metrics.nearest_neighbor_accuracy(within[0], cross, within[1])
    assert accuracy == stored(golden["emd_approx_1nna"])


def test_identical_and_distant_sets() -> None:
    a = torch.randn(6, 40, 3, generator=torch.Generator().manual_seed(0)) * 0.1
    same = metrics.evaluate(a, a.clone(), emd=None)
    assert same["mmd_cd"] == 0
    assert same["cov_cd"] == 1
    assert same["1nna_cd"] == 0  # every cloud's nearest is its copy in the other set
    assert same["jsd"] == pytest.approx(0, abs=1e-9)
    assert "mmd_emd" not in same
    far = metrics.evaluate(a, a + 0.3, emd=None)
    assert far["1nna_cd"] == 1
    assert far["jsd"] > 0.5


def clouds(count: int, points: int, seed: int, scale: float = 0.1) -> Tensor:
    return torch.randn(count, points, 3, generator=torch.Generator().manual_seed(seed)) * scale


def brute_chamfer(a: Tensor, b: Tensor) -> np.ndarray:
    """All pairs, the slow way, in float64."""
    d = np.square(a.double().numpy()[:, None, :, None] - b.double().numpy()[None, :, None]).sum(-1)
    return d.min(3).mean(2) + d.min(2).mean(2)


def brute_figures(samples: Tensor, references: Tensor) -> dict[str, float]:
    """The figures by their definitions, cloud by cloud."""
    S, R = len(samples), len(references)
    cross = brute_chamfer(samples, references)
    union = np.concatenate(
        [np.c_[brute_chamfer(samples, samples), cross], np.c_[cross.T, brute_chamfer(references, references)]]
    )
    right = 0
    for i in range(S + R):
        others = [j for j in range(S + R) if j != i]
        nearest = min(others, key=lambda j: union[j, i])
        right += (nearest < S) == (i < S)
    return {
        "mmd_cd": float(np.mean([min(cross[:, r]) for r in range(R)])),
        "cov_cd": len({int(np.argmin(cross[s])) for s in range(S)}) / R,
        "1nna_cd": right / (S + R),
    }


@pytest.mark.parametrize(("kind", "name", "rel"), [("cd", "cd", 1e-5), ("approx", "emd_approx", 1e-4)])
def test_golden_matrices(golden: dict[str, np.ndarray], kind: Any, name: str, rel: float) -> None:
    samples, references = torch.from_numpy(golden["samples"]), torch.from_numpy(golden["refs"])
    counted: list[int] = []
    got = metrics.all_distances(samples, references, kind, progress=counted.append)
    assert sum(counted) == metrics.num_pairs(14, 14)
    expected = {"cross": golden[f"{name}_ref_sample"].T}
    expected |= {"samples": golden[f"{name}_sample_sample"], "references": golden[f"{name}_ref_ref"]}
    for field, matrix in expected.items():
        np.testing.assert_allclose(getattr(got, field), matrix, rtol=rel, atol=1e-9, err_msg=field)


SETS = {
    "more-samples": (clouds(7, 20, 1), clouds(4, 20, 2)),
    "more-references": (clouds(3, 20, 1), clouds(8, 20, 2)),
    "other-points": (clouds(5, 31, 1), clouds(5, 17, 2)),
    "one-and-one": (clouds(1, 9, 1), clouds(1, 9, 2)),
    "one-and-many": (clouds(1, 9, 1), clouds(5, 9, 2)),
    "one-point-each": (clouds(4, 1, 1), clouds(4, 1, 2)),
    "duplicates": (clouds(3, 12, 1)[[0, 1, 1, 1, 2]], clouds(3, 12, 1)[[1, 0, 0]]),
    "coincident-points": (clouds(4, 1, 1).expand(4, 16, 3).contiguous(), clouds(4, 16, 2)),
    "all-one-point": (torch.zeros(3, 8, 3), torch.zeros(2, 8, 3)),
}


@pytest.mark.parametrize("name", SETS)
def test_hard_sets_by_the_definitions(name: str) -> None:
    samples, references = SETS[name]
    counted = list[int]()
    got = metrics.evaluate(samples, references, emd="approx", progress=counted.append)
    assert sum(counted) == 2 * metrics.num_pairs(len(samples), len(references))
    expected = brute_figures(samples, references)
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=1e-5, abs=1e-9), key
    assert np.isfinite(list(got.values())).all()
    assert 0 <= got["jsd"] <= 1


def test_exact_emd_is_that_of_the_assignment() -> None:
    a, b = clouds(3, 12, 1), clouds(4, 12, 2)
    got = metrics.all_distances(a, b, "exact").cross
    for s in range(3):
        for r in range(4):
            assert got[s, r].item() == pytest.approx(exact_emd(b[r : r + 1], a[s : s + 1]).item(), rel=1e-5)
    with pytest.raises(
        ValueError, match=r"^emd: exact needs equally many points, got samples of 12 and references of 9$"
    ):
        metrics.evaluate(a, b[:, :9], emd="exact")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_cloud_that_is_not_finite_is_named(value: float) -> None:
    a, b = clouds(5, 8, 1), clouds(6, 8, 2)
    bad = b.clone()
    bad[3, 2, 1] = value
    with pytest.raises(ValueError, match=r"^references: expected finite coordinates, got NaN or infinity in cloud 3$"):
        metrics.evaluate(a, bad)
    bad[5] = value
    with pytest.raises(ValueError, match=r"^samples: .* in cloud 3 \(2 clouds in all\)$"):
        metrics.evaluate(bad, a)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (4, 3), (2, 4, 2)])
def test_sets_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^samples: expected shape \(S, N, 3\) with S, N >= 1, got"):
        metrics.evaluate(torch.zeros(shape), clouds(2, 4, 0))


def loop_thickness(cloud: np.ndarray, k: int = 12) -> float:
    """By the definition, point by point."""
    values = []
    for point in cloud:
        near = cloud[np.argsort(((cloud - point) ** 2).sum(1), kind="stable")[:k]]
        values.append(np.linalg.svd(near - near.mean(0), compute_uv=False)[2] / len(near) ** 0.5)
    return float(np.mean(values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("points", [12, 13, 40, 131])
def test_thickness_is_that_of_a_loop(points: int, dtype: torch.dtype) -> None:
    x = clouds(35, points, 1).to(dtype)  # more than are computed at a time
    x[:, :2] = x[:, 2:4]  # coincident points
    got = metrics.thickness(x)
    assert got.dtype == torch.float64
    assert got.shape == (35,)
    expected = [loop_thickness(cloud.double().numpy()) for cloud in x[:5]]
    np.testing.assert_allclose(got[:5], expected, rtol=1e-12)
    assert got[34].item() == metrics.thickness(x[34:]).item()


def test_thickness_of_planes_lines_and_few_points_is_zero() -> None:
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    flat, line = rng.normal(size=(200, 3)), rng.normal(size=(200, 3))
    flat[:, 2], line[:, 1:] = 0, 0
    for cloud in (flat, line, np.zeros((200, 3))):
        moved = torch.from_numpy((cloud @ turn + np.array([3, -2, 7]))[None])
        assert metrics.thickness(moved).item() < 1e-6
    for points in (1, 2, 3):
        assert metrics.thickness(clouds(1, points, 0)).item() < 1e-8
    two = np.concatenate([flat, flat + np.array([0, 0, 100])])  # sheets so far apart that neighbours are of one
    assert metrics.thickness(torch.from_numpy(two[None])).item() < 1e-6


def test_thickness_grows_with_noise_around_a_plane() -> None:
    """Dense points with normal noise around a plane: all but three of twelve degrees of freedom are noise."""
    rng = np.random.default_rng(1)
    for noise in (1e-4, 2e-3):
        sheet = np.concatenate([rng.uniform(-1, 1, (4000, 2)), noise * rng.normal(size=(4000, 1))], axis=1)
        got = metrics.thickness(torch.from_numpy(sheet[None])).item()
        # The mean of the root of a chi-squared variable of 9 degrees of freedom is 2.918.
        assert got == pytest.approx(noise * 2.918 / 12**0.5, rel=0.03)


def test_thickness_within_a_ball() -> None:
    """Neighbours of a point of a volume are uniform in a ball: of twelve, by another computation of that many balls."""
    rng = np.random.default_rng(2)
    count, radius = 4000, 2.0
    points = rng.normal(size=(count, 3))
    points *= radius * rng.uniform(size=(count, 1)) ** (1 / 3) / np.linalg.norm(points, axis=1, keepdims=True)
    density = count / (4 / 3 * np.pi * radius**3)
    # A Poisson process around a point of it: the volumes to its neighbours are sums of exponential ones.
    volumes = rng.exponential(size=(4000, 11)).cumsum(axis=1) / density
    direction = rng.normal(size=(4000, 11, 3))
    near = direction / np.linalg.norm(direction, axis=2, keepdims=True) * np.cbrt(3 / (4 * np.pi) * volumes)[..., None]
    near = np.concatenate([np.zeros((4000, 1, 3)), near], axis=1)
    near -= near.mean(1, keepdims=True)
    expected = np.linalg.svd(near, compute_uv=False)[:, 2].mean() / 12**0.5
    got = metrics.thickness(torch.from_numpy(points[None])).item()
    assert got == pytest.approx(expected, rel=0.05)  # at the ball's surface neighbours are further away


def test_thickness_is_a_ratio_of_medians_whatever_place_size_and_turn() -> None:
    a, b = clouds(5, 60, 1).double(), clouds(4, 60, 2, 0.05).double()
    values = metrics.thickness(a), metrics.thickness(b)
    ratio = metrics.ratio_of_medians(*values)
    assert ratio == np.median(values[0]) / np.median(values[1])
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    moved = [3.5 * x @ turn + torch.tensor([1.0, -2, 5]) for x in (a, b)]
    assert metrics.ratio_of_medians(*map(metrics.thickness, moved)) == pytest.approx(ratio, rel=1e-9)
    assert metrics.thickness(moved[0]).numpy() == pytest.approx(3.5 * values[0].numpy(), rel=1e-9)
    assert metrics.evaluate(a.float(), b.float(), None)["thickness"] == pytest.approx(ratio, rel=1e-5)
    zero = torch.zeros(2)
    assert metrics.ratio_of_medians(zero, zero) == 1
    assert metrics.ratio_of_medians(zero, values[0]) == 0
    assert metrics.ratio_of_medians(values[0], zero) == np.inf


def loop_unevenness(cloud: np.ndarray, k: int) -> float:
    distances = [np.sort(np.linalg.norm(cloud - point, axis=1))[k] for point in cloud]
    return float(np.std(distances) / np.mean(distances))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("points", [2, 8, 9, 70])
def test_unevenness_is_that_of_a_loop(points: int, dtype: torch.dtype) -> None:
    x = clouds(35, points, 1).to(dtype)
    got = metrics.unevenness(x)
    assert (got.dtype, got.shape) == (torch.float64, (35,))
    expected = [loop_unevenness(cloud.double().numpy(), min(8, points - 1)) for cloud in x[:5]]
    np.testing.assert_allclose(got[:5], expected, rtol=1e-5, atol=1e-6)
    assert got[34].item() == pytest.approx(metrics.unevenness(x[34:]).item(), rel=1e-12)


def test_unevenness_of_a_ring_is_zero_and_of_a_plane_as_the_gamma_distribution_says() -> None:
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    ring = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
    assert metrics.unevenness(torch.from_numpy(ring[None])).item() < 1e-6
    for nothing in (np.zeros((1, 1, 3)), np.zeros((1, 20, 3))):  # one point; all at one place
        assert metrics.unevenness(torch.from_numpy(nothing)).item() == 0
    # Uniform on a sphere, which has no edges; the mean and variance of the root of a Gamma variable of shape 8.
    points = np.random.default_rng(3).normal(size=(1, 6000, 3))
    points /= np.linalg.norm(points, axis=2, keepdims=True)
    mean = math.exp(math.lgamma(8.5) - math.lgamma(8))
    expected = math.sqrt(8 - mean**2) / mean
    assert expected == pytest.approx(1 / (2 * math.sqrt(8)), rel=0.01)
    assert metrics.unevenness(torch.from_numpy(points)).item() == pytest.approx(expected, rel=0.04)


def test_unevenness_sees_clumps_whatever_place_size_and_turn() -> None:
    even, clumped = clouds(3, 400, 1).double(), clouds(3, 400, 2).double()
    clumped[:, :200] = 0.2 * clumped[:, :200]
    values = metrics.unevenness(even), metrics.unevenness(clumped)
    ratio = metrics.ratio_of_medians(values[1], values[0])
    assert ratio > 1.3
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    moved = metrics.unevenness(3.5 * clumped @ turn + torch.tensor([1.0, -2, 5]))
    assert moved.numpy() == pytest.approx(values[1].numpy(), rel=1e-9)
    assert metrics.evaluate(clumped.float(), even.float(), None)["unevenness"] == pytest.approx(ratio, rel=1e-5)


def test_figures_of_some_clouds_are_those_of_these_clouds() -> None:
    a, b = clouds(9, 20, 1), clouds(8, 20, 2)
    i, j = np.array([7, 0, 3]), np.array([1, 6, 2, 5])

    def compared(x: Tensor, y: Tensor) -> metrics.Comparison:
        distances = {name: metrics.all_distances(x, y, kind) for name, kind in metrics.kinds("approx").items()}
        return metrics.Comparison(distances, metrics.Measures.of(x), metrics.Measures.of(y))

    whole = compared(a, b)
    assert whole.figures() == metrics.evaluate(a, b)
    assert whole.some(i, j).figures() == pytest.approx(metrics.evaluate(a[i], b[j]), rel=1e-6)
    apart = whole.among_references().some(j, np.array([0, 7, 4]))
    assert apart.figures() == pytest.approx(metrics.evaluate(b[j], b[[0, 7, 4]]), rel=1e-6)


@pytest.mark.parametrize(("samples", "references"), [(1, 1), (2, 3), (3, 3), (1, 4)])
def test_chance_accuracy_is_the_mean_over_all_labellings(samples: int, references: int) -> None:
    """Whatever the clouds, drawing which of them are the samples by lot gives the chance level on average."""
    union = clouds(samples + references, 7, 3)
    accuracies = []
    for chosen in combinations(range(len(union)), samples):
        rest = [i for i in range(len(union)) if i not in chosen]
        accuracies.append(metrics.evaluate(union[list(chosen)], union[rest], emd=None)["1nna_cd"])
    assert np.mean(accuracies) == pytest.approx(metrics.chance_accuracy(samples, references))


def test_jsd_counts_each_point_for_the_nearest_grid_point_and_ties_upwards() -> None:
    axis = np.linspace(-0.5, 0.5, 28)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    grid = grid[np.linalg.norm(grid, axis=1) <= 0.5]
    rng = np.random.default_rng(0)
    points = np.concatenate(
        [
            rng.uniform(-0.8, 0.8, (300, 3)),  # also outside the sphere and the box
            rng.uniform(-0.6, 0.6, (150, 3)) * rng.integers(0, 2, (150, 3)),  # 0 is halfway between grid points
            rng.integers(-7, 8, (100, 3)) / 27,  # halfway but for rounding, which decides
            [[0, 0, 0], [0, 0, 0.6], [0.7, 0, 0], [-3, 0, 0], [0, -0.5, 0]],
        ]
    ).astype(np.float32)
    distance = np.linalg.norm(points[:, None] - grid, axis=2)
    tied = distance <= distance.min(1, keepdims=True) + 1e-12
    assert (tied.sum(1) > 1).sum() > 100
    nearest = len(grid) - 1 - tied[:, ::-1].argmax(1)  # the last in the order of x, then y, then z
    placed = torch.from_numpy(grid[nearest])
    got = metrics.jensen_shannon_divergence(torch.from_numpy(points)[None], placed[None])
    assert got == pytest.approx(0, abs=1e-12)


def test_jsd_of_sets_that_share_no_cell_is_one_bit() -> None:
    a = torch.zeros(2, 5, 3)
    assert metrics.jensen_shannon_divergence(a, a + 0.2) == pytest.approx(1)
    half = torch.cat([a, a + 0.2])
    # p = (1, 0), q = (1/2, 1/2): H(3/4, 1/4) - 1/2 H(1/2, 1/2)
    assert metrics.jensen_shannon_divergence(a, half) == pytest.approx(0.8112781 - 0.5, abs=1e-6)


def test_f_score_has_its_threshold_on_the_squared_distance() -> None:
    y = torch.arange(8.0)[:, None] * torch.tensor([[1.0, 0, 0]])
    x = y.clone()
    x[:2, 1] = 0.03  # squared 0.0009, near
    x[2:4, 1] = 0.04  # squared 0.0016, not
    got = metrics.f_score(x[None], y[None])
    assert got.item() == pytest.approx(0.75)
    fewer = metrics.f_score(y[None, :4], y[None])  # precision 1, recall 1/2
    assert fewer.item() == pytest.approx(2 / 3)
    assert metrics.f_score(x[None], y[None], threshold=0.002).item() == 1
    assert metrics.f_score(x[None] + 100, y[None]).item() == 0
    with pytest.raises(ValueError, match="threshold: expected a number above 0, got 0"):
        metrics.f_score(x[None], y[None], threshold=0)


def test_reconstruction_figures() -> None:
    x, y = clouds(3, 16, 1), clouds(3, 16, 2)
    same = metrics.reconstruction(x, x.clone(), "exact")
    assert same == pytest.approx(
        {"reconstruction_cd": 0, "reconstruction_emd": 0, "reconstruction_f_score": 1}, abs=1e-9
    )
    other = metrics.reconstruction(x, y, "exact")
    assert other["reconstruction_cd"] == pytest.approx(np.diag(brute_chamfer(x, y)).mean(), rel=1e-5)
    assert other["reconstruction_emd"] == pytest.approx(exact_emd(x, y).mean().item(), rel=1e-5)
    assert "reconstruction_emd" not in metrics.reconstruction(x, y, None)
    near = x + torch.tensor([0.04, 0, 0])  # squared 0.0016
    assert metrics.reconstruction(near, x, None, threshold=0.002)["reconstruction_f_score"] == 1
    assert metrics.reconstruction(near, x, None)["reconstruction_f_score"] < 1
    with pytest.raises(ValueError, match="y: expected finite"):
        metrics.reconstruction(x, y * torch.inf)
    with pytest.raises(ValueError, match=r"^y: expected the number of clouds of x \(3\), got 1$"):
        metrics.reconstruction(x, y[:1])


def test_reconstruction_figures_are_means_over_all_clouds_however_many_at_a_time() -> None:
    x, y, counted = clouds(70, 16, 1), clouds(70, 12, 2), list[int]()
    got = metrics.reconstruction(x, y, progress=counted.append)
    assert sum(counted) == 70
    alone = [metrics.reconstruction(a[None], b[None]) for a, b in zip(x, y, strict=True)]
    for name, value in got.items():
        assert value == pytest.approx(np.mean([figures[name] for figures in alone]), rel=1e-5), name


ENTROPY = 0.5 * np.log(2 * np.pi * np.e)  # of a standard normal, in nats


class Prior:
    """The best denoiser of standard normal latents: the mean of eps is sigma_t x_t. Notes what it is given."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.seen = schedule, list[tuple[Any, ...]]()

    def __call__(self, x: Tensor, t: Tensor, *condition: Any) -> Tensor:
        self.seen.append((t[0].item(), x, *condition))
        return self.schedule.sigma(t).reshape(-1, *[1] * (x.ndim - 1)) * x


def gaussian_lion(z_std: float = 1.0, h_std: float = 1.0) -> Any:
    diffusion = DiffusionConfig(num_train_timesteps=200, beta_end=0.1)
    schedule = Schedule(diffusion.schedule, diffusion.num_train_timesteps, diffusion.beta_start, diffusion.beta_end)
    return SimpleNamespace(
        config=SimpleNamespace(diffusion=diffusion),
        schedule=schedule,
        shape_prior=Prior(schedule),
        point_prior=Prior(schedule),
        z_mean=torch.full((6,), 2.0),
        z_std=torch.full((6,), z_std),
        h_mean=torch.zeros(4),
        h_std=torch.full((4,), h_std),
    )


def gaussian_latents(lion: Any, count: int = 70, log_sigma: float = -30.0) -> Posterior:
    z = normal_noise((count, 6), torch.tensor([5, 0])) * lion.z_std + lion.z_mean
    h = normal_noise((count, 10, 4), torch.tensor([6, 0])) * lion.h_std
    return Posterior(z, h, torch.full_like(h, log_sigma))


def bound_of(*args: Any, **kwargs: Any) -> SimpleNamespace:
    """Means over clouds."""
    return SimpleNamespace(**{name: of.mean().item() for name, of in metrics.prior_bounds(*args, **kwargs).items()})


def test_prior_bound_of_the_perfect_prior_is_the_entropy() -> None:
    lion = gaussian_lion()
    latents = gaussian_latents(lion)
    key = torch.tensor([1, 0])
    bound = bound_of(lion, latents, key, num_timesteps=None)
    assert {t for t, *_ in lion.shape_prior.seen} == set(range(1, 201))
    for value, sample in ((bound.shape, latents.z - 2), (bound.point, latents.h_mu)):
        nll = 0.5 * sample.square().mean().item() + 0.5 * np.log(2 * np.pi)  # of these latents
        assert nll - 0.02 < value < nll + 0.1
        assert value == pytest.approx(ENTROPY, abs=0.2)
    assert bound.joint == pytest.approx((6 * bound.shape + 40 * bound.point) / 46)

    lion.shape_prior.seen.clear()
    estimate = bound_of(lion, latents, key, num_timesteps=50)
    assert len(lion.shape_prior.seen) < 3 * 60  # three batches of latents
    assert estimate.shape == pytest.approx(bound.shape, abs=0.05)
    assert estimate.point == pytest.approx(bound.point, abs=0.05)
    assert bound_of(lion, latents, key, num_timesteps=50) == estimate
    assert bound_of(lion, latents, torch.tensor([2, 0]), num_timesteps=50) != estimate
    with pytest.raises(ValueError, match="num_timesteps: expected at least 5, got 4"):
        bound_of(lion, latents, key, num_timesteps=4)


def test_prior_bound_is_in_the_units_of_the_latents() -> None:
    """The same priors on latents k times as wide: log k nats more per dimension. A wide posterior adds its variance."""
    key, unit = torch.tensor([1, 0]), gaussian_lion()
    one = bound_of(unit, gaussian_latents(unit), key)
    wide = gaussian_lion(z_std=3.0, h_std=0.2)
    other = bound_of(wide, gaussian_latents(wide), key)
    assert other.shape == pytest.approx(one.shape + np.log(3.0), abs=1e-4)
    assert other.point == pytest.approx(one.point + np.log(0.2), abs=1e-4)
    noisy = bound_of(unit, gaussian_latents(unit, log_sigma=0.0), key)
    assert noisy.shape == one.shape
    assert noisy.point == pytest.approx(one.point + 0.5, abs=0.1)


def test_prior_bound_hands_each_batch_its_condition() -> None:
    lion = gaussian_lion()
    latents, labels = gaussian_latents(lion), torch.arange(70)
    counted = list[int]()
    bound_of(lion, latents, torch.tensor([1, 0]), labels, num_timesteps=5, progress=counted.append)
    assert counted == [32, 32, 32, 32, 6, 6]  # both priors on each batch
    for prior, position in ((lion.shape_prior, 3), (lion.point_prior, 4)):
        seen = [call[position] for call in prior.seen]
        assert sorted({tuple(x.tolist()) for x in seen}) == [tuple(range(i, min(i + 32, 70))) for i in (0, 32, 64)]
    z = next(call[2] for call in lion.point_prior.seen)
    torch.testing.assert_close(z, latents.z[:32] - 2)  # standardised


def test_prior_bound_gives_each_latent_noise_of_its_own() -> None:
    """In every batch, and in either prior: of equal latents no two are noised alike."""
    lion, count = gaussian_lion(), metrics._CLOUDS + 1
    zeros = torch.zeros(count, 10, 4)
    latents = Posterior(lion.z_mean.expand(count, 6), zeros, zeros - 30)
    bound_of(lion, latents, torch.tensor([1, 0]), num_timesteps=5)
    time = lion.shape_prior.seen[0][0]
    x_t = [x.flatten(1) for prior in (lion.shape_prior, lion.point_prior) for t, x, *_ in prior.seen if t == time]
    assert [x.shape for x in x_t] == [(32, 6), (1, 6), (32, 40), (1, 40)]
    assert len(torch.cat([x[:, :6] for x in x_t]).unique(dim=0)) == 2 * count
