from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import cKDTree

from lion_triton.data.procedural import CLASSES, Part, box, build, furniture, lathe, rod, sample_surface


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    return furniture(100, 2048, seed=0)


def volume(part: Part) -> float:
    """Of a closed part; positive where its triangles face outwards."""
    a, b, c = np.moveaxis(part.triangles, 1, 0)
    return float((a * np.cross(b, c)).sum() / 6)


def test_shapes_dtypes_and_class_balance(data: tuple[np.ndarray, np.ndarray]) -> None:
    clouds, labels = data
    assert clouds.shape == (100, 2048, 3)
    assert clouds.dtype == np.float32
    assert labels.dtype == np.int64
    assert labels.tolist() == [i % 5 for i in range(100)]
    assert CLASSES == ("chair", "table", "sofa", "lamp", "shelf")


def test_every_cloud_fits_its_unit_box(data: tuple[np.ndarray, np.ndarray]) -> None:
    clouds, _ = data
    assert np.isfinite(clouds).all()
    low, high = clouds.min(1), clouds.max(1)
    np.testing.assert_allclose(low + high, 0, atol=1e-6)
    np.testing.assert_allclose((high - low).max(1), 1, atol=1e-6)


def test_a_shape_depends_on_seed_and_index_only() -> None:
    clouds, labels = furniture(12, 64, seed=3)
    fewer, fewer_labels = furniture(7, 64, seed=3)
    np.testing.assert_array_equal(clouds[:7], fewer)
    np.testing.assert_array_equal(labels[:7], fewer_labels)
    other, _ = furniture(12, 64, seed=4)
    assert all((a != b).any() for a, b in zip(clouds, other, strict=True))


def test_one_point_is_the_origin() -> None:
    np.testing.assert_array_equal(furniture(5, 1, seed=0)[0], 0)


@pytest.mark.parametrize("label", range(5), ids=CLASSES)
def test_no_two_shapes_of_a_class_are_alike(label: int, data: tuple[np.ndarray, np.ndarray]) -> None:
    """Two shapes lie further apart than two samplings of either of them."""
    clouds = data[0][label::5].astype(float)

    def again(i: int) -> np.ndarray:
        parts = build(CLASSES[label], np.random.default_rng((0, 5 * i + label)))
        points = sample_surface(parts, 2048, np.random.default_rng(1000 + i))
        low, high = points.min(0), points.max(0)
        return (points - (low + high) / 2) / (high - low).max()

    trees = [cKDTree(cloud) for cloud in clouds]

    def chamfer(a: cKDTree, b: cKDTree) -> float:
        return float(np.square(a.query(b.data)[0]).mean() + np.square(b.query(a.data)[0]).mean())

    floor = [chamfer(tree, cKDTree(again(i))) for i, tree in enumerate(trees)]
    assert max(floor) < 0.005  # the rebuilt shape is the same shape
    for i in range(len(trees)):
        for j in range(i):
            assert chamfer(trees[i], trees[j]) > max(floor[i], floor[j]), (i, j)


@pytest.mark.parametrize("label", range(5), ids=CLASSES)
def test_classes_stand_upright_and_face_the_front(label: int) -> None:
    clouds, labels = furniture(200, 512, seed=1)
    clouds = clouds[labels == label]
    tall = np.ptp(clouds, axis=1)
    name = CLASSES[label]
    if name in ("lamp", "shelf"):
        assert (tall[:, 1] > 0.45).mean() > 0.8
    if name == "shelf":
        assert (tall[:, 0] > tall[:, 2]).mean() > 0.8  # wider than deep
    if name in ("chair", "sofa"):  # the upper part is the back: behind the middle
        upper = clouds[..., 1] > 0.6 * clouds[..., 1].max(1, keepdims=True)
        depth = (clouds[..., 2] * upper).sum(1) / upper.sum(1)
        assert (depth < 0).mean() > 0.8
    if name == "table":  # the top holds more points than any other slice
        top = clouds[..., 1] > clouds[..., 1].max(1, keepdims=True) - 0.15 * tall[:, None, 1]
        assert np.median(top.mean(1)) > 0.4


def test_points_spread_by_area() -> None:
    size = np.array((1.0, 0.5, 0.25))
    points = sample_surface([box((0, 1), (0, 0.5), (0, 0.25))], 20000, np.random.default_rng(0))
    share = np.prod(size) / size / (2 * (np.prod(size) / size).sum())  # of one face across each axis
    sides = np.array([points < 1e-12, points > size - 1e-12])
    assert (sides.sum((0, 2)) == 1).all()  # every point on one face
    assert (points >= -1e-12).all()
    assert (points <= size + 1e-12).all()
    deviation = np.abs(sides.mean(1) - share) / np.sqrt(share * (1 - share) / len(points))
    assert deviation.max() < 1  # stratified: closer than independent draws
    top = points[sides[1, :, 1]]
    counts = np.histogram2d(top[:, 0], top[:, 2], bins=(8, 2))[0]
    assert np.abs(counts - counts.mean()).max() < 5 * np.sqrt(counts.mean())


def test_points_are_in_random_order() -> None:
    apart = [box((0, 1), (0, 1), (0, 1)), box((5, 6), (0, 1), (0, 1))]
    points = sample_surface(apart, 4000, np.random.default_rng(0))
    assert abs((points[:1000, 0] < 3).mean() - 0.5) < 0.06


def test_no_point_where_parts_touch_or_overlap() -> None:
    touching = [box((0, 1), (0, 1), (0, 1)), box((1, 2), (0, 1), (0, 1))]
    points = sample_surface(touching, 5000, np.random.default_rng(0))
    assert not (np.abs(points[:, 0] - 1) < 1e-6).any()
    crossing = [box((0, 2), (0, 1), (0, 1)), rod([(1, 0.5, 0.5), (1, 3, 0.5)], 0.2)]
    points = sample_surface(crossing, 5000, np.random.default_rng(0))
    inside = (points > (0.01, 0.01, 0.01)) & (points < (1.99, 0.99, 0.99))
    assert not inside.all(1).any()
    assert (points[:, 1] > 1.5).any()


def test_parts_face_outwards() -> None:
    assert volume(box((0, 1), (0, 2), (0, 3))) == pytest.approx(6)
    assert volume(rod([(0, 0, 0), (0, 2, 0)], 0.5, sides=4)) == pytest.approx(2)
    assert volume(rod([(1, 0, 0), (0, 0, 0)], 0.5, sides=4)) == pytest.approx(1)
    assert volume(lathe([(1, 0), (1, 2)])) == pytest.approx(2 * np.pi, rel=0.02)
    for name in CLASSES:
        for seed in range(20):
            for part in build(name, np.random.default_rng(seed)):
                # A lamp shade is open, but turned about an upright axis: outside is away from its middle.
                centred = Part(part.triangles - part.triangles.mean((0, 1)))
                assert volume(centred) > 0, (name, seed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8, 0), r"num_shapes: expected an integer >= 1, got 0"),
        ((5, 0, 0), r"num_points: expected an integer >= 1, got 0"),
        ((5, 8, -1), r"seed: expected an integer >= 0, got -1"),
    ],
)
def test_bad_input(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        furniture(*arguments)


def test_unknown_class() -> None:
    with pytest.raises(ValueError, match="name: expected one of chair, table, sofa, lamp, shelf, got 'bed'"):
        build("bed", np.random.default_rng(0))
