"""Clouds from memory and from folders, their normalisation, and the stream of training samples."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lion_triton.data.clouds import (
    SYNSETS,
    Clouds,
    Kind,
    Normalization,
    TrainingStream,
    check_all,
    fixed_batch,
    folder_clouds,
    procedural_clouds,
)
from lion_triton.data.procedural import CLASSES
from lion_triton.data.sources import DataConfig, load_sources

KINDS: tuple[Kind, ...] = ("global", "box", "sphere")
IDENTITY = Normalization("global")


def random_cloud(seed: int, num_points: int = 40) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(num_points, 3)) * (1, 2, 3) + (5, 0, -1)).astype(np.float32)


def in_memory(num_shapes: int = 7, num_points: int = 40) -> Clouds:
    points = np.stack([random_cloud(i, num_points) for i in range(num_shapes)])
    names = tuple(f"a/{i}" for i in range(num_shapes))
    return Clouds(points, np.arange(num_shapes, dtype=np.int64) % 2, ("a", "b"), names)


def save(path: Path, cloud: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, cloud)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two ShapeNet categories and one of our own; the lamp has no validation clouds."""
    counts = {
        "03001627/train": 3,
        "03001627/val": 1,
        "02691156/train": 2,
        "02691156/val": 2,
        "stool/train": 1,
        "stool/val": 1,
        "03636649/train": 2,
    }
    for number, (folder, count) in enumerate(counts.items()):
        for i in reversed(range(count)):
            save(tmp_path / folder / f"{i}.npy", random_cloud(10 * number + i))
    return tmp_path


def samples(loader: DataLoader) -> list[torch.Tensor]:
    """Points, labels and shapes of a whole pass, concatenated."""
    return [torch.cat(column) for column in zip(*loader, strict=True)]


class TestFolder:
    def test_everything_in_the_order_of_the_names(self, root: Path) -> None:
        clouds = folder_clouds(root, "train")
        assert clouds.classes == ("airplane", "chair", "lamp", "stool")
        expected_names = [
            "airplane/0",
            "airplane/1",
            "chair/0",
            "chair/1",
            "chair/2",
            "lamp/0",
            "lamp/1",
            "stool/0",
        ]
        assert list(clouds.names) == expected_names
        assert clouds.labels.tolist() == [0, 0, 1, 1, 1, 2, 2, 3]
        assert clouds.labels.dtype == np.int64
        for i, expected in enumerate([20, 21, 0, 1, 2, 60, 61, 40]):
            np.testing.assert_array_equal(clouds[i], random_cloud(expected))
        assert len(list(clouds)) == len(clouds) == 8

    def test_labels_agree_between_splits(self, root: Path) -> None:
        clouds = folder_clouds(root, "val")
        assert clouds.classes == folder_clouds(root, "train").classes
        assert [clouds.classes[label] for label in clouds.labels] == [
            "airplane",
            "airplane",
            "chair",
            "stool",
        ]

    @pytest.mark.parametrize("categories", [["chair", "stool"], ["stool", "03001627"], ["chair", "03001627", "stool"]])
    def test_synsets_by_either_name(self, root: Path, categories: list[str]) -> None:
        clouds = folder_clouds(root, "train", categories)
        assert clouds.classes == ("chair", "stool")
        assert clouds.names == ("chair/0", "chair/1", "chair/2", "stool/0")

    def test_synset_table(self) -> None:
        assert len(SYNSETS) == len(set(SYNSETS.values())) == 55
        assert all(len(synset) == 8 and synset.isdigit() for synset in SYNSETS)

    def test_folder_named_like_a_synset(self, root: Path) -> None:
        save(root / "chair" / "train" / "x.npy", random_cloud(0))
        assert folder_clouds(root, "train").classes == ("airplane", "03001627", "lamp", "chair", "stool")
        assert folder_clouds(root, "train", ["chair"]).names == ("chair/x",)

    def test_category_named_train(self, tmp_path: Path) -> None:
        save(tmp_path / "train" / "train" / "x.npy", random_cloud(0))
        assert folder_clouds(tmp_path, "train").names == ("train/x",)

    def test_unknown_category_lists_what_there_is(self, root: Path) -> None:
        with pytest.raises(ValueError, match=r"categories: no 'sofa' in .*airplane, chair, lamp, stool$"):
            folder_clouds(root, "train", ["chair", "sofa"])

    def test_missing_root(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^root: .*nowhere is not a folder: python"):
            folder_clouds(tmp_path / "nowhere", "train")

    @pytest.mark.parametrize("folder", ["", "empty", "chair/train", "chair/val/deeper"])
    def test_no_clouds(self, tmp_path: Path, folder: str) -> None:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        with pytest.raises(ValueError, match=r"^root: no <category>/train/<id>.npy in .*lion_triton.prepare"):
            folder_clouds(tmp_path, "train")

    def test_named_category_without_clouds_in_the_split(self, root: Path) -> None:
        with pytest.raises(ValueError, match=r"^root: no .npy file in .*03636649/val$"):
            folder_clouds(root, "val", ["lamp", "chair"])

    def test_category_without_splits(self, root: Path) -> None:
        save(root / "sofa" / "x.npy", random_cloud(0))
        with pytest.raises(ValueError, match=r"sofa is not divided into train, val, test: .*lion_triton.prepare"):
            folder_clouds(root, "train")
        assert len(folder_clouds(root, "train", ["chair"])) == 3

    def test_root_is_a_category(self, root: Path) -> None:
        with pytest.raises(ValueError, match="single category"):
            folder_clouds(root / "03001627", "train")

    def test_unknown_split(self, root: Path) -> None:
        with pytest.raises(ValueError, match=r"^split: expected one of train, val, test, got 'dev'$"):
            folder_clouds(root, "dev")  # type: ignore[arg-type]


class CreatesFile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


class TestReading:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return save(tmp_path / "data" / "chair" / "train" / "x.npy", random_cloud(0))

    def clouds(self, path: Path) -> Clouds:
        return folder_clouds(path.parents[2], "train")

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, path: Path, value: float) -> None:
        cloud = random_cloud(0)
        cloud[17, 1] = cloud[30, 0] = value
        clouds = self.clouds(save(path, cloud))
        assert check_all(clouds, 1) == 0
        message = f"{path}: point 17 is not finite ({value})"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            clouds[0]

    def test_more_than_float32_holds(self, path: Path) -> None:
        cloud = random_cloud(0).astype(np.float64)
        cloud[2, 2] = 1e300
        with pytest.raises(ValueError, match=r"point 2 is not finite \(inf\)"):
            self.clouds(save(path, cloud))[0]

    @pytest.mark.parametrize("dtype", ["<f2", "<f8", ">f4"])
    @pytest.mark.parametrize("order", ["C", "F"])
    def test_other_layouts(self, path: Path, dtype: str, order: str) -> None:
        stored = np.asarray(random_cloud(0), dtype, order)  # type: ignore[call-overload]
        cloud = self.clouds(save(path, stored))[0]
        assert cloud.dtype == np.float32
        assert cloud.dtype.isnative
        assert cloud.flags.c_contiguous
        np.testing.assert_array_equal(cloud, stored.astype(np.float32))

    @pytest.mark.parametrize(
        "array",
        [
            np.zeros((4, 3), np.int16),
            np.zeros((4, 2)),
            np.zeros((1, 4, 3)),
            np.zeros((0, 3)),
            np.zeros(()),
            np.ones(3),
        ],
        ids=["int16", "planar", "batched", "empty", "scalar", "one point"],
    )
    @pytest.mark.parametrize("look", ["read", "check"])
    def test_other_arrays(self, path: Path, array: np.ndarray, look: str) -> None:
        clouds = self.clouds(save(path, array))
        message = f"{path}: expected floating-point (P, 3) with P >= 1, got {array.dtype} {array.shape}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            clouds[0] if look == "read" else check_all(clouds, 1)

    @pytest.mark.parametrize("look", ["read", "check"])
    @pytest.mark.parametrize("damage", ["truncated", "half a header", "long header", "empty", "text", "zip", "missing"])
    def test_damaged(self, path: Path, damage: str, look: str) -> None:
        clouds = self.clouds(path)
        whole = path.read_bytes()
        if damage == "zip":
            with path.open("wb") as file:
                np.savez(file, points=random_cloud(0))
        elif damage == "missing":
            path.unlink()
        else:
            texts = {
                "truncated": whole[:-1],
                "half a header": whole[:50],
                "long header": whole[:8] + (60000).to_bytes(2, "little") + b" " * 60000,
                "empty": b"",
                "text": b"0 0 0\n",
            }
            path.write_bytes(texts[damage])
        message = f"{path}: not a readable .npy of numbers ("
        with pytest.raises(ValueError, match=rf"\A{re.escape(message)}.+\)\Z"):
            clouds[0] if look == "read" else check_all(clouds, 1)

    def test_every_damaged_header_is_named(self, path: Path) -> None:
        clouds, whole, rng = self.clouds(path), path.read_bytes(), np.random.default_rng(0)
        named = refused = 0
        for _ in range(200):
            damaged = bytearray(whole)
            for at in rng.integers(6, 128, size=3):
                damaged[at] = rng.integers(256)
            path.write_bytes(damaged)
            for look in (clouds.__getitem__, clouds.num_points):
                try:
                    look(0)
                except ValueError as error:
                    message = str(error)
                    named += message.startswith(f"{path}: ")
                    refused += 1
        assert named == refused > 200

    @pytest.mark.parametrize("look", ["read", "check"])
    @pytest.mark.parametrize("wrapped", [False, True], ids=["plain pickle", "object array"])
    def test_pickles_are_not_run(self, path: Path, wrapped: bool, look: str) -> None:
        trace = path.parent / "trace"
        evil = CreatesFile(trace)
        if wrapped:
            np.save(path, np.array([[evil, 0, 0]], dtype=object), allow_pickle=True)
        else:
            path.write_bytes(pickle.dumps(evil))
        clouds = self.clouds(path)
        with pytest.raises(ValueError, match="not a readable"):
            clouds[0] if look == "read" else check_all(clouds, 1)
        assert not trace.exists()
        pickle.loads(pickle.dumps(evil))
        assert trace.exists()  # It would have been, had the file been unpickled.


class TestCheckAll:
    def test_counts_short_clouds(self, root: Path) -> None:
        save(root / "03001627" / "train" / "1.npy", random_cloud(0, 39))
        save(root / "stool" / "train" / "0.npy", random_cloud(0, 7))
        clouds = folder_clouds(root, "train")
        assert [check_all(clouds, n) for n in (7, 8, 39, 40, 41)] == [0, 1, 1, 2, 8]
        with pytest.raises(ValueError, match=r"2 of 8 clouds have fewer than 40 points, the first is chair/1 with 39$"):
            check_all(clouds, 40, strict=True)
        assert check_all(clouds, 7, strict=True) == 0

    def test_reads_only_headers(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        clouds = folder_clouds(root, "train")

        def refuse(*args: object, **kwargs: object) -> None:
            raise AssertionError("read")

        monkeypatch.setattr(np.lib.format, "read_array", refuse)
        assert check_all(clouds, 40) == 0
        with pytest.raises(ValueError, match="read"):
            clouds[0]

    def test_in_memory(self) -> None:
        clouds = in_memory()
        assert [check_all(clouds, n) for n in (40, 41)] == [0, 7]
        with pytest.raises(ValueError, match=r"7 of 7 .* the first is a/0 with 40$"):
            check_all(clouds, 41, strict=True)
        assert isinstance(clouds.source, np.ndarray)
        clouds.source[3, 9, 2] = np.nan
        with pytest.raises(ValueError, match=r"^a/3: point 9 is not finite \(nan\)$"):
            check_all(clouds, 1)


def test_procedural() -> None:
    clouds = procedural_clouds(11, 64, seed=3)
    assert len(clouds) == len(clouds.labels) == len(set(clouds.names)) == 11
    assert clouds.classes == CLASSES
    assert all(name.split("/")[0] == CLASSES[label] for name, label in zip(clouds.names, clouds.labels, strict=True))
    assert clouds.labels.dtype == np.int64
    assert clouds[4].shape == (64, 3)
    assert clouds[4].dtype == np.float32
    assert clouds.num_points(4) == 64
    assert check_all(clouds, 64) == 0
    again, other = procedural_clouds(11, 64, seed=3), procedural_clouds(11, 64, seed=4)
    np.testing.assert_array_equal(clouds[4], again[4])
    assert not np.array_equal(clouds[4], other[4])


class TestNormalization:
    def test_global_is_the_published_formula(self, root: Path) -> None:
        save(root / "stool" / "train" / "0.npy", random_cloud(0, 77))
        clouds = folder_clouds(root, "train")
        points = np.concatenate(list(clouds)).astype(np.float64)
        fitted = Normalization.fit(clouds, "global")
        np.testing.assert_allclose(fitted.mean, points.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(fitted.scale, points.std(), rtol=1e-12)
        assert Normalization.fit(clouds, "global") == fitted
        first = np.concatenate([cloud[:9] for cloud in clouds]).astype(np.float64)
        np.testing.assert_allclose(Normalization.fit(clouds, "global", max_points=9).scale, first.std(), rtol=1e-12)

    def test_far_from_the_origin(self) -> None:
        """Distances of 1e-3 at 1e6 would drown in E[x^2] - E[x]^2, even in float64."""
        points = np.random.default_rng(0).normal(size=(5, 50, 3)) * 1e-3 + 1e6
        clouds = Clouds(points, np.zeros(5, np.int64), ("a",), tuple("abcde"))
        assert Normalization.fit(clouds, "global").scale == pytest.approx(points.std(), rel=1e-6)

    def test_box_and_sphere(self) -> None:
        cloud = random_cloud(0)
        box = Normalization("box").apply(cloud)
        np.testing.assert_allclose(box.min(axis=0), -box.max(axis=0), atol=1e-6)
        assert np.ptp(box, axis=0).max() == pytest.approx(2, abs=1e-6)
        sphere = Normalization("sphere").apply(cloud)
        np.testing.assert_allclose(sphere.mean(axis=0), 0, atol=1e-6)
        assert np.linalg.norm(sphere, axis=1).max() == pytest.approx(1, abs=1e-6)
        for shape in (box, sphere):  # One scale for the three axes.
            ratio = (shape[1:] - shape[0]) / (cloud[1:] - cloud[0])
            np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-4)
        for kind in ("box", "sphere"):
            assert Normalization.fit(in_memory(), kind) == Normalization(kind, (0.0, 0.0, 0.0), 1.0)

    def test_round_trip(self) -> None:
        clouds = in_memory()
        fitted = Normalization.fit(clouds, "global")
        normalised = fitted.apply(clouds[2])
        assert normalised.dtype == np.float32
        np.testing.assert_allclose(fitted.invert(normalised), clouds[2], atol=1e-5)
        batch = torch.from_numpy(normalised).expand(2, 4, -1, 3)
        back = fitted.invert(batch)
        assert back.dtype == torch.float32
        torch.testing.assert_close(back, torch.from_numpy(clouds[2]).expand(2, 4, -1, 3), atol=1e-5, rtol=0)
        for kind in ("box", "sphere"):
            assert Normalization(kind).invert(batch) is batch

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("value", [0.0, 0.1, -7e8, 3e38])
    def test_all_points_equal(self, kind: Kind, value: float) -> None:
        points = np.full((3, 37, 3), value, dtype=np.float32)
        clouds = Clouds(points, np.zeros(3, np.int64), ("a",), tuple("abc"))
        fitted = Normalization.fit(clouds, kind)
        assert fitted.scale == 1
        np.testing.assert_array_equal(fitted.apply(clouds[0]), 0)

    @pytest.mark.parametrize("kind", KINDS)
    def test_json(self, kind: Kind) -> None:
        fitted = Normalization.fit(in_memory(), kind)
        assert Normalization.from_json(json.loads(json.dumps(fitted.to_json()))) == fitted

    @pytest.mark.parametrize(
        "change",
        [
            {"kind": "none"},
            {"kind": []},
            {"mean": [0, 0]},
            {"mean": None},
            {"mean": [0, 0, float("nan")]},
            {"scale": 0},
            {"scale": -1.0},
            {"scale": float("inf")},
            {"scale": "wide"},
        ],
        ids=str,
    )
    def test_bad_json(self, change: dict) -> None:
        with pytest.raises(ValueError, match=r"^normalization: expected"):
            Normalization.from_json(IDENTITY.to_json() | change)

    def test_bad_arguments(self) -> None:
        with pytest.raises(ValueError, match=r"^normalization: expected one of global, box, sphere, got 'unit'$"):
            Normalization.fit(in_memory(), "unit")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"^max_points: expected at least 1, got 0$"):
            Normalization.fit(in_memory(), "global", max_points=0)
        with pytest.raises(ValueError, match=r"^clouds: "):
            Normalization.fit(Clouds((), np.zeros(0, np.int64), (), ()), "global")


class TestTrainingStream:
    def stream(self, **changes: object) -> TrainingStream:
        clouds = in_memory()
        options = {
            "normalization": Normalization.fit(clouds, "global"),
            "num_points": 16,
            "total": 50,
            "seed": 5,
        }
        return TrainingStream(clouds, **(options | changes))  # type: ignore[arg-type]

    def test_item(self) -> None:
        stream = self.stream(normalization=IDENTITY)
        points, label, shape = stream[23]
        assert points.shape == (16, 3)
        assert points.dtype == torch.float32
        assert (type(label), type(shape)) == (int, int)
        assert label == stream.clouds.labels[shape]
        cloud = {tuple(point) for point in stream.clouds[shape].tolist()}
        drawn = {tuple(point) for point in points.tolist()}
        assert drawn <= cloud
        assert len(drawn) == 16  # None twice.

    def test_batches(self) -> None:
        points, labels, shapes = next(iter(DataLoader(self.stream(), batch_size=4)))
        assert (points.shape, points.dtype) == ((4, 16, 3), torch.float32)
        assert labels.dtype == shapes.dtype == torch.int64

    @pytest.mark.parametrize("kind", KINDS)
    def test_normalised_as_the_whole_cloud(self, kind: Kind) -> None:
        fitted = Normalization.fit(in_memory(), kind)
        stream = self.stream(normalization=fitted)
        points, _, shape = stream[3]
        whole = {tuple(point) for point in fitted.apply(stream.clouds[shape]).tolist()}
        assert {tuple(point) for point in points.tolist()} <= whole

    def test_each_epoch_visits_each_cloud_once(self) -> None:
        stream = self.stream(total=70)
        shapes = np.array([shape for _, _, shape in stream]).reshape(10, 7)
        assert (np.sort(shapes, axis=1) == np.arange(7)).all()
        assert len({tuple(epoch) for epoch in shapes.tolist()}) > 5

    def test_fresh_points_in_each_epoch(self) -> None:
        stream = self.stream(total=14)
        clouds: dict[int, list[torch.Tensor]] = {}
        for points, _, shape in stream:
            clouds.setdefault(shape, []).append(points)
        assert all(not torch.equal(first, second) for first, second in clouds.values())

    @pytest.mark.parametrize("workers", [0, 2])
    def test_resumed_equals_unbroken(self, workers: int) -> None:
        whole = samples(DataLoader(self.stream(), batch_size=4))
        start = 12
        resumed = DataLoader(self.stream(), sampler=range(start, 50), batch_size=5, num_workers=workers)
        for tail, column in zip(samples(resumed), whole, strict=True):
            assert torch.equal(tail, column[start:])

    def test_random_access(self) -> None:
        stream, other = self.stream(), self.stream()
        backwards = {i: stream[i] for i in reversed(range(50))}
        for i in range(50):
            points, label, shape = other[i]
            assert torch.equal(points, backwards[i][0])
            assert (label, shape) == backwards[i][1:]

    def test_points_depend_on_seed_and_number(self) -> None:
        same = Clouds(np.stack([random_cloud(0)] * 7), np.zeros(7, np.int64), ("a",), tuple("abcdefg"))
        drawn = [
            points.numpy().tobytes() for seed in (1, 2) for points, _, _ in TrainingStream(same, IDENTITY, 16, 14, seed)
        ]
        assert len(set(drawn)) == 28

    def test_order_depends_on_seed(self) -> None:
        first, second = (samples(DataLoader(self.stream(seed=seed)))[2] for seed in (1, 2))
        assert not torch.equal(first, second)

    def test_draw_from(self) -> None:
        stream = self.stream(draw_from=20, normalization=IDENTITY)
        seen: dict[int, set[tuple[float, ...]]] = {}
        for points, _, shape in stream:
            seen.setdefault(shape, set()).update(tuple(point) for point in points.tolist())
        for shape, points in seen.items():
            assert points == {tuple(point) for point in stream.clouds[shape][:20].tolist()}

    def test_uniform(self) -> None:
        clouds = in_memory(1, 10)
        stream = TrainingStream(clouds, IDENTITY, 4, 3000, 0)
        rows = {tuple(point): row for row, point in enumerate(clouds[0].tolist())}
        drawn = np.array([[rows[tuple(point)] for point in points.tolist()] for points, _, _ in stream])
        for column in drawn.T:  # Any place may hold any point.
            counts = np.bincount(column, minlength=10)
            assert np.abs(counts - 300).max() < 5 * np.sqrt(300)

    def test_fewer_points_than_asked(self) -> None:
        clouds = in_memory(2, 10)
        points, _, shape = TrainingStream(clouds, IDENTITY, 64, 4, 0)[1]
        assert points.shape == (64, 3)
        assert {tuple(point) for point in points.tolist()} <= {tuple(p) for p in clouds[shape].tolist()}

    def test_from_folder(self, root: Path) -> None:
        clouds = folder_clouds(root, "train", ["chair"])
        stream = TrainingStream(clouds, Normalization.fit(clouds, "box"), 16, 9, 0)
        points, labels, shapes = samples(DataLoader(stream, batch_size=2, num_workers=1))
        assert points.abs().max() <= 1
        assert labels.tolist() == [0] * 9
        assert sorted(shapes[:3].tolist()) == [0, 1, 2]

    @pytest.mark.parametrize("i", [-8, -1, 50])
    def test_out_of_range(self, i: int) -> None:
        with pytest.raises(IndexError):
            self.stream()[i]

    @pytest.mark.parametrize(("name", "value"), [("num_points", 0), ("total", -1), ("seed", -1), ("draw_from", 15)])
    def test_bad_arguments(self, name: str, value: int) -> None:
        with pytest.raises(ValueError, match=rf"^{name}: expected at least .*, got {value}$"):
            self.stream(**{name: value})


class TestFixedBatch:
    def test_depends_on_seed_and_index_only(self) -> None:
        clouds = in_memory()
        fitted = Normalization.fit(clouds, "global")
        batch = fixed_batch(clouds, [3, 0, 5], 16, 1, fitted)
        assert (batch.shape, batch.dtype) == ((3, 16, 3), torch.float32)
        assert torch.equal(batch[[2, 0]], fixed_batch(clouds, [5, 3], 16, 1, fitted))
        assert not torch.equal(batch, fixed_batch(clouds, [3, 0, 5], 16, 2, fitted))
        same = Clouds(np.stack([random_cloud(0)] * 2), np.zeros(2, np.int64), ("a",), ("a/0", "a/1"))
        first, second = fixed_batch(same, [0, 1], 16, 1, IDENTITY)
        assert not torch.equal(first, second)

    @pytest.mark.parametrize("kind", KINDS)
    def test_points_of_the_clouds_normalised(self, kind: Kind) -> None:
        clouds = in_memory()
        fitted = Normalization.fit(clouds, kind)
        batch = fixed_batch(clouds, range(7), 40, 0, fitted)
        for cloud, points in zip(clouds, batch, strict=True):
            whole = fitted.apply(cloud)
            np.testing.assert_array_equal(np.sort(points.numpy(), axis=0), np.sort(whole, axis=0))

    def test_fewer_points_than_asked(self) -> None:
        assert fixed_batch(in_memory(2, 10), [1], 30, 0, IDENTITY).shape == (1, 30, 3)


def test_errors_of_a_folder_name_the_option_it_was_given_by(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.source: .* is not a folder: "):
        load_sources(DataConfig(source=str(tmp_path / "nowhere")), 2)
