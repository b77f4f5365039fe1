"""What a command is given: models by any name, shapes in any form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from lion_triton.data.clouds import Normalization, procedural_clouds
from lion_triton.generation.inputs import (
    described,
    distances,
    known_label,
    open_model,
    read_given,
    read_given_or_seed,
    reconstruct,
)
from lion_triton.models import hub
from lion_triton.models.lion import LION
from lion_triton.runs import Run, open_run
from tests.tiny import POINTS, tiny_config, tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return tiny_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def cloud() -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.4, 0.4, (POINTS, 3)).astype(np.float32)


def in_data_units(run: Run, points: np.ndarray) -> np.ndarray:
    return run.normalization.invert(points)


def test_a_model_goes_by_any_of_its_names(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(run.folder)
    assert (model.checkpoint, model.conditional) == ("step-00000008", True)
    assert not model.lion.training
    LION.from_pretrained(run.folder).save_pretrained(tmp_path / "shipped" / "small")
    folder = open_model(tmp_path / "shipped" / "small")
    assert folder.checkpoint is None
    assert folder.run.config == run.config
    monkeypatch.setattr(hub, "SHIPPED", tmp_path / "shipped")
    shipped = open_model("small")
    assert shipped.run.samples == Path("runs/small/samples")  # not in the package
    for other in (folder, shipped):
        assert (other.run.classes, other.run.normalization) == (run.classes, run.normalization)
        ours, theirs = model.lion.state_dict(), other.lion.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(ValueError, match=r"run: great is not a run folder .* nor a shipped model: small"):
        open_model("great")
    with pytest.raises(ValueError, match=r"checkpoint: expected one of none yet, got step-1"):
        open_model("small", "step-1")


def test_a_cloud_of_just_so_many_points_stays_in_its_order(run: Run, tmp_path: Path, cloud: np.ndarray) -> None:
    np.save(tmp_path / "one.npy", cloud)
    given = read_given("a", str(tmp_path / "one.npy"), run, POINTS, 0)
    np.testing.assert_allclose(in_data_units(run, given.points), cloud, atol=1e-6)
    assert given.label is None


def test_others_are_drawn_from_or_repeat_points(
    run: Run, tmp_path: Path, cloud: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "one.npy", cloud)
    few = read_given("a", str(tmp_path / "one.npy"), run, 20, 0)
    assert len(few.points) == 20
    assert np.array_equal(few.points, read_given("a", str(tmp_path / "one.npy"), run, 20, 0).points)
    assert not np.array_equal(few.points, read_given("a", str(tmp_path / "one.npy"), run, 20, 1).points)
    assert capsys.readouterr().out == ""
    many = read_given("a", str(tmp_path / "one.npy"), run, 100, 0)
    assert len(many.points) == 100
    assert "has only 48 points" in capsys.readouterr().out


def test_a_mesh_is_drawn_from_its_surface(run: Run, tmp_path: Path) -> None:
    trimesh.creation.box((0.5, 0.2, 0.8)).export(tmp_path / "box.obj")
    points = in_data_units(run, read_given("a", str(tmp_path / "box.obj"), run, POINTS, 0).points)
    on_a_side = np.isclose(np.abs(points), np.array([0.25, 0.1, 0.4]), atol=1e-6).any(axis=1)
    assert on_a_side.all()


def test_one_of_several_knows_its_class(run: Run, tmp_path: Path, cloud: np.ndarray) -> None:
    clouds = np.stack((cloud, -cloud))
    np.savez(tmp_path / "clouds.npz", points=clouds, labels=np.array([1, 0]), classes=np.array(["chair", "lamp"]))
    for text in (f"{tmp_path / 'clouds.npz'}:1", f"{tmp_path}:1"):
        given = read_given("a", text, run, POINTS, 0)
        np.testing.assert_allclose(in_data_units(run, given.points), -cloud, atol=1e-6)
        assert given.label == run.classes.index("chair")
    assert read_given("a", f"{tmp_path / 'clouds.npz'}:0", run, POINTS, 0).label == run.classes.index("lamp")
    np.savez(tmp_path / "other.npz", points=clouds, labels=np.array([0, 0]), classes=np.array(["boat"]))
    assert read_given("a", f"{tmp_path / 'other.npz'}:0", run, POINTS, 0).label is None


def test_one_embedded_shape_is_that_of_the_whole_set_and_made_alone(run: Run) -> None:
    own = replace(run, normalization=Normalization("global", (0.0, 0.0, 0.0), 1.0))
    held_out = read_given("a", "procedural:3", own, 2048, 0)
    assert np.array_equal(held_out.points, procedural_clouds(4, 2048, 1)[3])
    assert held_out.label == run.classes.index("lamp")
    far = read_given("a", "procedural:1000000001", own, 2048, 0)  # or this would not end
    assert far.label == run.classes.index("table")


def test_each_cloud_its_own_units_where_the_run_has_it_so(run: Run, tmp_path: Path, cloud: np.ndarray) -> None:
    np.save(tmp_path / "big.npy", 100 * cloud + 7)
    boxed = replace(run, normalization=Normalization("box"))
    points = read_given("a", str(tmp_path / "big.npy"), boxed, POINTS, 0).points
    np.testing.assert_allclose(points, Normalization("box").apply(cloud), atol=1e-4)


def test_other_units_are_said(run: Run, tmp_path: Path, cloud: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "cm.npy", 100 * cloud)
    read_given("a", str(tmp_path / "cm.npy"), run, POINTS, 0)
    assert "times as large as the shapes that the model knows" in capsys.readouterr().out


def test_what_cannot_be_read_is_named(run: Run, tmp_path: Path, cloud: np.ndarray) -> None:
    np.save(tmp_path / "many.npy", np.stack((cloud, cloud)))
    (tmp_path / "bad.ply").write_bytes(b"no mesh")
    trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 0, 0]], [[0, 1, 2]], process=False).export(tmp_path / "flat.obj")
    nan = cloud.copy()
    nan[3, 1] = np.nan
    np.save(tmp_path / "nan.npy", nan)
    for text, words in {
        str(tmp_path / "nothing.obj"): "expected a file of a shape",
        str(tmp_path): "expected a file of a shape",
        str(tmp_path / "bad.ply"): "bad.ply: ",
        str(tmp_path / "flat.obj"): "the surface has no area",
        str(tmp_path / "many.npy"): f"holds a set of 2 shapes: give one of them, as {tmp_path / 'many.npy'}:0",
        f"{tmp_path / 'many.npy'}:2": "expected a cloud 0 to 1",
        str(tmp_path / "nan.npy"): "point 3 is not finite",
        f"{tmp_path / 'nothing.npz'}:0": "does not exist",
        "-3": "expected a file of a shape",
        "1.5": "expected a file of a shape",
    }.items():
        with pytest.raises(ValueError, match=r"^b: ") as error:
            read_given_or_seed("b", text, run, POINTS, 0)
        assert words in str(error.value)
        assert "\n" not in str(error.value)
        assert ("give one of them" in str(error.value)) == (text == str(tmp_path / "many.npy"))
    assert read_given_or_seed("b", "12", run, POINTS, 0) == 12


def test_the_class_is_as_told_or_known_or_likeliest(
    run: Run, tmp_path: Path, cloud: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    model = open_model(run.folder)
    np.save(tmp_path / "one.npy", cloud)
    given = read_given("a", str(tmp_path / "one.npy"), run, POINTS, 0)
    assert described(model, given, 3).label == 3
    assert described(model, replace(given, label=2), None).label == 2
    assert described(model, replace(given, label=2), 3).label == 3
    assert capsys.readouterr().out == ""
    label = described(model, given, None).label
    assert label is not None
    assert f"taken for class {run.classes[label]}" in capsys.readouterr().out
    assert known_label(run, "sofa") == run.classes.index("sofa")
    with pytest.raises(ValueError, match=r"class: expected one of chair, .*, got boat"):
        known_label(run, "boat")


def test_distances_are_in_data_units(run: Run, tmp_path: Path, cloud: np.ndarray) -> None:
    model = open_model(run.folder)
    np.save(tmp_path / "one.npy", cloud)
    given = read_given("a", str(tmp_path / "one.npy"), run, POINTS, 0)
    rebuilt = reconstruct(model, given)
    found = distances(model, given, np.stack((cloud, cloud + np.float32(0.001), rebuilt)))
    assert found[0] == pytest.approx(0, abs=1e-9)
    assert found[1] == pytest.approx(2 * 3e-6, rel=0.01)
    assert 0 < found[2] < 0.01


def test_a_run_without_classes_takes_none(tmp_path: Path, cloud: np.ndarray) -> None:
    run = tiny_run(tmp_path / "run", tiny_config(classes=0))
    model = open_model(run.folder)
    given = read_given("a", "procedural:3", run, POINTS, 0)
    assert given.label is None
    assert described(model, given, None).label is None
    assert model.labels(None, 3) is None
    with pytest.raises(ValueError, match=r"class: this run was trained without classes, got chair"):
        known_label(open_run(run.folder), "chair")
