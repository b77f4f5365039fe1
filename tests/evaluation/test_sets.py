"""Sets of clouds in every form, what is wrong with them, and which of their points are compared in which units."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from lion_triton.data.clouds import Normalization, procedural_clouds
from lion_triton.data.sources import PROCEDURAL_POINTS, PROCEDURAL_SEEDS
from lion_triton.evaluation.sets import LARGEST, Preparation, in_units_of, open_clouds
from tests.evaluation import clouds, refusal, source

Form = Callable[[Path, np.ndarray], Path]


def npy(folder: Path, points: np.ndarray) -> Path:
    np.save(folder / "set.npy", points)
    return folder / "set.npy"


def npz(folder: Path, points: np.ndarray) -> Path:
    np.savez(folder / "set.npz", anything=points.astype(np.float64))
    return folder / "set.npz"


def samples_folder(folder: Path, points: np.ndarray) -> Path:
    labels, other = np.zeros(len(points)), np.array([{}], dtype=object)  # of no concern, readable or not
    np.savez(folder / "clouds.npz", labels=labels, points=points, classes=np.array(["a"]), other=other)
    return folder


def files(folder: Path, points: np.ndarray) -> Path:
    np.save(folder / "0.npy", points[0])
    trimesh.PointCloud(points[1]).export(folder / "1.ply")
    np.savetxt(folder / "2.xyz", points[2], fmt="%.9g")
    for i, cloud in enumerate(points[3:], 3):
        np.savez(folder / f"{i}.npz", points=cloud)
    (folder / "readme.md").write_text("no cloud")
    (folder / "._0.npy").write_text("what some systems leave beside a file")
    return folder


def layout(folder: Path, points: np.ndarray, *, subset: str = "test", category: str = "chair") -> Path:
    (folder / category / subset).mkdir(parents=True)
    for i, cloud in enumerate(points):
        np.save(folder / category / subset / f"{i}.npy", cloud)
    return folder


@pytest.mark.parametrize("form", [npy, npz, samples_folder, files, layout])
def test_every_form_of_a_set_is_the_same_set(tmp_path: Path, form: Form) -> None:
    points = clouds(5, 40, 2)
    path = form(tmp_path, points)
    opened = open_clouds("reference", str(path), "test")
    assert len(opened) == 5
    assert opened.num_points() == [40] * 5
    for i, cloud in enumerate(points):
        assert opened[i].dtype == np.float32
        np.testing.assert_array_equal(opened[i], cloud)
        assert str(i) in opened.clouds.names[i]
    assert str(path) in opened.what


def test_the_subset_and_the_categories_asked_for(tmp_path: Path) -> None:
    sets = {}
    for number, (category, subset) in enumerate([("chair", "train"), ("chair", "val"), ("lamp", "val")]):
        sets[category, subset] = clouds(2, 9, number)
        layout(tmp_path, sets[category, subset], subset=subset, category=category)
    for chosen, subset, expected in [
        ((), "train", [("chair", "train")]),
        ((), "val", [("chair", "val"), ("lamp", "val")]),
        (("lamp",), "val", [("lamp", "val")]),
    ]:
        opened = open_clouds("reference", str(tmp_path), subset, chosen)  # type: ignore[arg-type]
        assert opened.what == f"{tmp_path}, {subset}"
        np.testing.assert_array_equal(list(opened.clouds), np.concatenate([sets[key] for key in expected]))
    with pytest.raises(ValueError, match=r"^categories: no 'boat' in .*, which holds chair, lamp$"):
        open_clouds("reference", str(tmp_path), "val", ("boat",))


@pytest.mark.parametrize("form", [npy, npz, samples_folder, files])
def test_categories_are_refused_where_there_are_none(tmp_path: Path, form: Form) -> None:
    path = form(tmp_path, clouds(5, 8, 0))
    where = path / "clouds.npz" if form is samples_folder else path
    expected = f"categories: are chosen of a folder <category>/<subset>/<id>.npy, {where} is none; got chair, lamp"
    assert refusal(open_clouds, "reference", str(path), "test", ("chair", "lamp")) == expected


def test_procedural_shapes_are_those_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for option, kind in (("training", "train"), ("reference", "held_out")):
        opened = open_clouds(option, "procedural", "test", count=6)
        expected = procedural_clouds(6, PROCEDURAL_POINTS, PROCEDURAL_SEEDS[kind])
        np.testing.assert_array_equal(list(opened.clouds), expected.source)
        assert kind.replace("_", "-") in opened.what
    with pytest.raises(ValueError, match=r"^categories: .* the procedural shapes are none; got chair$"):
        open_clouds("reference", "procedural", "test", ("chair",), 6)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^samples: procedural does not exist$"):
        open_clouds("samples", "procedural", "test", count=6)


def test_a_file_that_holds_no_set_is_refused_in_one_line(tmp_path: Path) -> None:
    one = clouds(1, 4, 0)
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 not a zip")
    (tmp_path / "text.npz").write_text("x,y,z\n0,0,0\n")
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "two.npz", first=one, second=one)
    np.savez(tmp_path / "none.npz")
    np.save(tmp_path / "flat.npy", one[0])
    np.save(tmp_path / "pairs.npy", one[:, :, :2])
    np.save(tmp_path / "words.npy", np.array([[["a", "b", "c"]]]))
    np.save(tmp_path / "no-points.npy", one[:, :0])
    for name, message in {
        "missing": "does not exist",
        "broken.npz": "is not a readable .npy or .npz of clouds (",
        "text.npz": "is not a readable .npy or .npz of clouds (it holds no plain numbers)",
        "pickle.npy": "is not a readable .npy or .npz of clouds (it holds no plain numbers)",
        "two.npz": "expected one array or one called points in {path}, got first, second",
        "none.npz": "expected one array or one called points in {path}, got none",
        "flat.npy": "expected numbers of shape (S, P, 3) in {path}, got float32 (4, 3)",
        "pairs.npy": "expected numbers of shape (S, P, 3) in {path}, got float32 (1, 4, 2)",
        "words.npy": "expected numbers of shape (S, P, 3) in {path}, got <U1 (1, 1, 3)",
        "no-points.npy": "expected numbers of shape (S, P, 3) in {path}, got float32 (1, 0, 3)",
    }.items():
        path = tmp_path / name
        line = refusal(open_clouds, "training", str(path), "test")
        assert line.startswith("training: ")
        assert message.format(path=path) in line
        assert str(path) in line


def test_a_folder_that_holds_no_set_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^reference: no <category>/val/<id>.npy in"):
        open_clouds("reference", str(tmp_path), "val")
    trimesh.creation.box().export(tmp_path / "box.obj")
    with pytest.raises(ValueError, match=r"^reference: .*box.obj is a mesh: python -m lion_triton.prepare"):
        open_clouds("reference", str(tmp_path), "test")
    (tmp_path / "box.obj").unlink()
    (tmp_path / "a.npy").write_text("nothing")
    with pytest.raises(ValueError, match=r"^reference: cloud 0, .*a.npy: "):
        open_clouds("reference", str(tmp_path), "test")


def read_all(option: str, path: Path) -> None:
    """Open a set and read what a comparison reads of it."""
    opened = open_clouds(option, str(path), "test")
    opened.num_points()
    Preparation(None, 0)(opened, 8, 0)


@pytest.mark.parametrize("option", ["samples", "reference", "training"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -1.1 * LARGEST])
@pytest.mark.parametrize("form", [npy, npz, samples_folder, files, layout])
def test_a_coordinate_that_cannot_be_is_named_by_option_and_cloud(
    tmp_path: Path, form: Form, value: float, option: str
) -> None:
    points = clouds(5, 40, 3)
    points[2, 17, 0] = value
    path = form(tmp_path, points)
    line = refusal(read_all, option, path)
    assert line.startswith(f"{option}: ")
    assert "cloud 2" in line
    assert ("expected coordinates up to 1e+09, got 1.1e+09" if np.isfinite(value) else "finite") in line
    if form is layout and not np.isfinite(value):
        assert f"{path / 'chair' / 'test' / '2.npy'}: point 17 is not finite ({value})" in line


def test_of_several_bad_clouds_the_first_is_named_and_all_are_counted() -> None:
    points = clouds(5, 9, 0)
    points[[1, 4]] = np.nan
    with pytest.raises(ValueError, match=r"^samples: .*NaN or infinity in cloud 1 \(2 clouds in all\)$"):
        source(points)
    with pytest.raises(ValueError, match=r"^samples: .*NaN or infinity in cloud 0$"):
        source(np.full((1, 2, 3), 1e300))  # float32 cannot hold it


def test_the_largest_coordinates_are_taken() -> None:
    points = clouds(1, 9, 0)
    points[0, 0, 0] = LARGEST
    assert source(points)[0].max() == np.float32(LARGEST)


@pytest.mark.parametrize("damage", [b"", b"text", "truncated", "shape"])
def test_a_cloud_on_disk_that_cannot_be_read_is_named_by_option_and_cloud(tmp_path: Path, damage: bytes | str) -> None:
    layout(tmp_path, clouds(4, 12, 0))
    path = tmp_path / "chair" / "test" / "3.npy"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "shape":
        np.save(path, np.zeros((12, 2)))
    elif isinstance(damage, bytes):
        path.write_bytes(damage)
    assert refusal(read_all, "reference", tmp_path).startswith(f"reference: cloud 3, {path}: ")


def test_the_split_of_the_points() -> None:
    """A cloud of 15,000 is divided, a shorter one is not."""
    cloud = np.arange(15_000, dtype=np.float32)[:, None].repeat(3, 1)
    for split, low, high in (("first10k", 0, 10_000), ("last5k", 10_000, 15_000), (None, 0, 15_000)):
        prepare = Preparation(split, 0)  # type: ignore[arg-type]
        drawn = prepare.draw(cloud, 4000, np.random.default_rng(0))[:, 0]
        assert low <= drawn.min() < low + 50
        assert high - 50 < drawn.max() < high
        assert len(np.unique(drawn)) == 4000
        assert prepare.available(15_000) == high - low
        np.testing.assert_array_equal(prepare.draw(cloud, high - low, np.random.default_rng(0)), cloud[low:high])
        assert prepare.draw(cloud[:14_999], 14_999, np.random.default_rng(0))[-1, 0] == 14_998
        assert prepare.available(14_999) == 14_999
    longer = np.arange(16_000, dtype=np.float32)[:, None].repeat(3, 1)
    np.testing.assert_array_equal(Preparation("last5k", 0).draw(longer, 5000, np.random.default_rng(0)), longer[-5000:])


def test_a_cloud_of_too_few_points_repeats_some() -> None:
    cloud = clouds(1, 5, 0)[0]
    drawn = Preparation(None, 0).draw(cloud, 40, np.random.default_rng(0))
    assert drawn.shape == (40, 3)
    assert {tuple(p) for p in drawn.tolist()} == {tuple(p) for p in cloud.tolist()}


def test_what_is_drawn_depends_on_seed_stream_and_cloud_alone() -> None:
    given = source(np.repeat(clouds(1, 200, 0), 4, axis=0))  # four times the same cloud
    prepare = Preparation(None, 1)
    drawn = prepare(given, 20, 3)
    np.testing.assert_array_equal(prepare(given, 20, 3), drawn)
    np.testing.assert_array_equal(prepare(given, 20, 3, [3, 1]), drawn[[3, 1]])
    others = [Preparation(None, 2)(given, 20, 3), prepare(given, 20, 4), drawn[[1, 2, 3, 0]]]
    for other in others:
        assert not (other == drawn).all((1, 2)).any()


def test_norm_box_takes_the_box_of_the_points_that_are_compared() -> None:
    given = source(clouds(3, 100, 0) * 7 + np.array([1, 2, 3], np.float32))
    drawn = Preparation(None, 0)(given, 10, 3)
    boxed = Preparation(None, 0, norm_box=True)(given, 10, 3)
    assert boxed.dtype == np.float32
    low, high = boxed.min(1), boxed.max(1)
    np.testing.assert_allclose((high - low).max(1), 1, rtol=1e-6)
    np.testing.assert_allclose(high + low, 0, atol=1e-6)
    longest = np.ptp(drawn, axis=1).max(1)
    np.testing.assert_allclose(np.ptp(boxed, axis=1) * longest[:, None], np.ptp(drawn, axis=1), rtol=1e-5)


@pytest.mark.parametrize("kind", ["box", "sphere"])
def test_the_units_of_a_run_are_those_of_the_whole_cloud(kind: str) -> None:
    cloud = clouds(1, 300, 0)[0] * 5 + 3
    normalization = Normalization(kind)  # type: ignore[arg-type]
    drawn = Preparation(None, 0).draw(cloud, 20, np.random.default_rng(0))
    inside = Preparation(None, 0, normalization).draw(cloud, 20, np.random.default_rng(0))
    center, scale = normalization.center_and_scale(cloud)
    np.testing.assert_allclose(inside, (drawn - center) / scale, rtol=1e-5, atol=1e-6)
    assert inside.dtype == np.float32


def test_files_of_torch_as_lion_and_pvd_write_them(tmp_path: Path) -> None:
    points = clouds(5, 40, 3)
    torch.save(torch.from_numpy(np.concatenate([points, points], axis=2)), tmp_path / "samples.pt")
    mean, std = torch.tensor([[[1.0, -2.0, 3.0]]]), torch.full((5, 1, 1), 4.0)
    references = {"ref": torch.from_numpy(points).double(), "mean": mean.expand(5, 1, 3), "std": std}
    torch.save(references, tmp_path / "ref.pt")
    given = open_clouds("samples", str(tmp_path / "samples.pt"), "test")
    held = open_clouds("reference", str(tmp_path / "ref.pt"), "test")
    in_data_units = points * 4 + mean.numpy()
    np.testing.assert_array_equal(list(given), points)
    np.testing.assert_allclose(list(held), in_data_units, rtol=1e-6)
    # The networks' output is compared in the units of the data, as the authors compare it.
    moved = in_units_of(given, held)
    np.testing.assert_allclose(list(moved), in_data_units, rtol=1e-6)
    assert "mean" in moved.what
    assert in_units_of(held, held) is held
    assert in_units_of(given, open_clouds("reference", str(npy(tmp_path, points)), "test")) is given


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_files_of_torch_that_are_refused(tmp_path: Path) -> None:
    path, made = tmp_path / "a.pt", tmp_path / "made"
    points = torch.zeros(5, 4, 3)
    for content, message in (
        (Evil(made), "checkpoint of plain tensors"),
        (points[0], "got float32 (4, 3)"),
        (points.int(), "got int32 (5, 4, 3)"),
        ([points], "got list"),
        ({"samples": points}, "got a dictionary of samples"),
        ({"ref": points}, "expected mean and std that fit ref (5, 4, 3)"),
        ({"ref": points, "mean": torch.zeros(4), "std": torch.ones(1)}, "expected mean and std"),
    ):
        torch.save(content, path)
        line = refusal(open_clouds, "samples", str(path), "test")
        assert line.startswith("samples: ") and message in line and str(path) in line
    assert not made.exists()
    path.write_bytes(path.read_bytes()[:300])
    assert "torch.save did not write it so" in refusal(open_clouds, "samples", str(path), "test")
