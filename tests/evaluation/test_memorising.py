"""The check against memorising: the nearest training shapes, and how near two draws of one shape are."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lion_triton.data.clouds import Normalization, procedural_clouds
from lion_triton.evaluation.memorising import (
    COPY,
    SCREEN_POINTS,
    Nearest,
    Training,
    nearest_training,
    sampling_floor,
    summary,
)
from lion_triton.evaluation.sets import CloudSet, Preparation, in_memory, open_clouds
from lion_triton.kernels import chamfer_distance, pairwise_chamfer
from tests.evaluation import clouds, source

CPU = torch.device("cpu")


def training(points: np.ndarray, num_points: int, *, norm_box: bool = False) -> Training:
    return Training.read(source(points, "training"), Preparation(None, 0, norm_box=norm_box), num_points)


def nearest(points: np.ndarray, shapes: Training) -> Nearest:
    return nearest_training(points, shapes, CPU, lambda _: None)


@pytest.mark.parametrize("points", [1, 200, SCREEN_POINTS, SCREEN_POINTS + 1, 400])
def test_the_nearest_training_shapes_are_those_of_all_pairs_with_all_points(points: int) -> None:
    """Also where the shapes are screened with fewer points first."""
    shapes = clouds(30, points, 5) * np.linspace(0.5, 2, 30, dtype=np.float32)[:, None, None]
    samples = clouds(8, points, 6)
    samples[[2, 5]] = shapes[[11, 29]]
    found = nearest(samples, training(shapes, points))
    brute = pairwise_chamfer(torch.from_numpy(samples), torch.from_numpy(shapes)).min(1)
    assert found.index.tolist() == brute.indices.tolist()
    np.testing.assert_allclose(found.distance, brute.values, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(found.points, shapes[found.index])
    assert found.index[[2, 5]].tolist() == [11, 29]
    assert found.distance[[2, 5]].tolist() == [0, 0]


def test_the_distance_is_to_the_points_that_are_shown() -> None:
    """Training shapes of more points than are compared are drawn from; those of fewer repeat some."""
    for long in (12, 7):
        stored = [cloud[:700] if i < long else cloud[:120] for i, cloud in enumerate(clouds(12, 700, 5))]
        given = CloudSet("training", "", in_memory("training", stored, [str(i) for i in range(12)]))
        shapes, samples = Training.read(given, Preparation(None, 0), 300), clouds(3, 300, 6)
        found = nearest(samples, shapes)
        assert found.points.shape == (3, 300, 3)
        expected = chamfer_distance(torch.from_numpy(samples), torch.from_numpy(found.points))
        np.testing.assert_allclose(found.distance, expected, rtol=1e-5)
        for points, i in zip(found.points, found.index, strict=True):
            assert {tuple(p) for p in points.tolist()} <= {tuple(p) for p in shapes.source[i].tolist()}


def test_where_most_training_shapes_have_fewer_points_so_few_are_compared() -> None:
    shapes = training(clouds(4, 30, 5), 40)
    found = nearest(np.concatenate([shapes.screen, shapes.screen], axis=1), shapes)
    assert found.points.shape == (4, 30, 3)
    assert summary(found, found, shapes, CPU)["points"] == 30
    assert found.index.tolist() == [0, 1, 2, 3]
    split = Preparation("last5k", 0)
    assert Training.read(source(clouds(1, 15_000, 0), "training"), split, 6000).num_points == 5000


def test_both_passes_report_the_pairs_of_the_first() -> None:
    shapes, counted = training(clouds(30, 300, 5), 300), list[int]()
    nearest_training(clouds(8, 300, 6), shapes, CPU, counted.append)
    assert sum(counted) == 8 * 30


def test_training_shapes_are_read_whole_and_once() -> None:
    points, read = clouds(3, 50, 0), list[int]()

    class Noting(CloudSet):
        def __getitem__(self, i: int) -> np.ndarray:
            read.append(i)
            return super().__getitem__(i)

    given = Noting("training", "", source(points).clouds)
    shapes = Training.read(given, Preparation("first10k", 0), 10)
    assert read == [0, 1, 2]
    assert shapes.sha256 == hashlib.sha256(points.astype("<f4").tobytes()).hexdigest()
    assert shapes.screen.shape == (3, 10, 3)
    assert training(clouds(2, 700, 0), 600).screen.shape == (2, SCREEN_POINTS, 3)


def test_training_shapes_are_compared_in_the_units_of_the_samples() -> None:
    """By its box each shape is a sample, but elsewhere and of another size."""
    for points in (40, 300):
        samples = Preparation(None, 0, norm_box=True)(source(clouds(4, points, 1)), points, 3)
        moved = clouds(4, points, 1)[::-1] * np.array([2, 3, 4, 5], np.float32)[:, None, None] + 7
        found = nearest(samples, training(moved, points, norm_box=True))
        assert found.index.tolist() == [3, 2, 1, 0]
        np.testing.assert_allclose(found.distance, 0, atol=1e-10)
        assert nearest(samples, training(moved, points)).distance.min() > 1


def test_samples_are_in_the_units_of_the_comparison_already() -> None:
    """A sample of a run that was trained on clouds fitted to a box need not fill that box."""
    prepare = Preparation(None, 0, Normalization("box"))
    shapes = Training.read(source(clouds(4, 40, 1), "training"), prepare, 40)
    samples = shapes.screen * np.float32(0.5)
    brute = pairwise_chamfer(torch.from_numpy(samples), torch.from_numpy(shapes.screen)).min(1)
    np.testing.assert_allclose(nearest(samples, shapes).distance, brute.values, rtol=1e-4)
    assert brute.values.min() > 0.01


def test_training_shapes_are_of_the_split(tmp_path: Path) -> None:
    cloud = clouds(1, 15_000, 0)[0]
    cloud[10_000:] += 5
    np.save(tmp_path / "set.npy", cloud[None])
    for split, center in (("first10k", 0), ("last5k", 5)):
        prepare = Preparation(split, 0)  # type: ignore[arg-type]
        shapes = Training.read(open_clouds("training", str(tmp_path / "set.npy"), "train"), prepare, 30)
        assert shapes.screen.mean() == pytest.approx(center, abs=0.1)


def of_shapes(shapes: Training, index: list[int], points: int, distance: float = 0.0) -> Nearest:
    """Clouds whose nearest shapes these are, at that distance."""
    drawn = shapes.prepare(shapes.source, points, 5, index)
    return Nearest(np.array(index), np.full(len(index), distance, np.float32), drawn)


def test_two_draws_of_a_shape_lie_as_far_apart_as_clouds_of_one_distribution() -> None:
    shapes = training(clouds(4, 100, 5) * np.array([1, 2, 3, 4], np.float32)[:, None, None], 40)
    floor = sampling_floor(of_shapes(shapes, [2, 0, 2, 2, 1], 40), shapes, CPU)
    unit = pairwise_chamfer(*(torch.from_numpy(clouds(20, 40, seed)) for seed in (8, 9))).median().item()
    np.testing.assert_allclose(floor / unit, np.square([3, 1, 3, 3, 2]), rtol=0.3)  # each of its own shape
    assert floor[0] == floor[2] == floor[3]


def test_two_draws_share_no_point() -> None:
    for stored, compared in ((80, 40), (40, 40), (2, 1)):
        shapes = training(clouds(3, stored, 0), compared)
        assert sampling_floor(of_shapes(shapes, [0, 1], compared), shapes, CPU).min() > 0
    split = Training.read(source(clouds(1, 15_000, 0), "training"), Preparation("last5k", 0), 3000)
    floor = sampling_floor(of_shapes(split, [0], 3000), split, CPU)  # from two halves of 5000 points
    apart = chamfer_distance(*(torch.from_numpy(clouds(1, 3000, seed)) for seed in (1, 2)))
    np.testing.assert_allclose(floor, apart, rtol=0.2)


def test_two_draws_of_a_shape_with_too_few_points_follow_from_its_halves() -> None:
    points, index = np.stack(list(procedural_clouds(10, 512, seed=0))), list(range(10))
    floors = []
    for stored in (512, 511, 256):
        shapes = training(points[:, :stored], 256)
        floors.append(sampling_floor(of_shapes(shapes, index, 256), shapes, CPU))
    np.testing.assert_allclose(floors[1], floors[0], rtol=0.3)
    np.testing.assert_allclose(floors[2], floors[0], rtol=0.3)


def test_two_draws_are_in_any_order() -> None:
    """A cloud is not read from one end: its two halves may be two parts of the shape."""
    points = clouds(3, 80, 0)
    points[:, 40:] += 1
    shapes = training(points, 40)
    floor = sampling_floor(of_shapes(shapes, [0, 1, 2], 40), shapes, CPU)
    assert floor.max() < 0.1


def test_other_points_of_a_training_shape_count_as_a_copy_and_another_piece_of_furniture_does_not() -> None:
    furniture = procedural_clouds(50, 1024, seed=0)
    points, sofas = np.stack(list(furniture)), furniture.labels == furniture.classes.index("sofa")
    shapes = training(points[~sofas, 256:], 256)
    copies, others = (nearest(points[chosen, :256], shapes) for chosen in (~sofas, sofas))
    found = summary(copies, others, shapes, CPU)
    assert found["samples_as_near_as_two_draws"] >= 0.95 * 40
    assert found["references_as_near_as_two_draws"] == 0


def test_the_summary_counts_what_is_as_near_as_two_draws() -> None:
    shapes = training(clouds(3, 100, 5) * np.array([1, 2, 3], np.float32)[:, None, None], 40)

    def some(index: list[int], times: list[float]) -> tuple[Nearest, np.ndarray]:
        """Clouds whose nearest shapes these are, so many times as far from them as two draws of them may lie."""
        near = of_shapes(shapes, index, 40)
        floor = sampling_floor(near, shapes, CPU)
        return replace(near, distance=(np.array(times) * COPY * floor).astype(np.float32)), floor

    samples, floor = some([0, 1, 2, 1], [0, 0.98, 1.02, 5])
    references, _ = some([2, 2, 2], [2, 3, 1.01])
    assert summary(samples, references, shapes, CPU) == {
        "points": 40,
        "samples_median": np.median(samples.distance),
        "references_median": np.median(references.distance),
        "samples_nearer_than_any_reference": (samples.distance < references.distance.min()).sum(),
        "one_shape_drawn_twice": np.median(floor),
        "samples_as_near_as_two_draws": 2,
        "references_as_near_as_two_draws": 0,
    }
    back = summary(references, samples, shapes, CPU)
    assert (back["samples_as_near_as_two_draws"], back["references_as_near_as_two_draws"]) == (0, 2)


def test_the_summary_takes_the_nearest_reference() -> None:
    shapes = training(clouds(3, 50, 5), 40)
    near = of_shapes(shapes, [0, 1, 2], 40)
    samples = replace(near, distance=np.array([1, 3, 5], np.float32))
    references = replace(near, distance=np.array([3, 8, 6], np.float32))
    found = summary(samples, references, shapes, CPU)
    assert (found["samples_median"], found["references_median"]) == (3, 6)
    assert found["samples_nearer_than_any_reference"] == 1
