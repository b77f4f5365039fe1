"""The command ``lion_triton.mesh``, on a run with random weights and on clouds of known surfaces."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from lion_triton import mesh
from lion_triton.models import LION
from tests.surface.runs import POINTS, TRAINING, random_run, trained
from tests.test_train import fails

SMALL = ("--resolution", "24", "--num-samples", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mesh") / "run"
    trained(random_run(folder))
    return folder


@pytest.fixture(scope="module")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three balls of 400 points, far from the origin and of radius 3."""
    points = np.random.default_rng(0).normal(size=(3, 400, 3))
    points = 3 * points / np.linalg.norm(points, axis=-1, keepdims=True) + (100, -20, 5)
    path = tmp_path_factory.mktemp("balls") / "balls.npz"
    np.savez(path, points=points.astype(np.float32))
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_runs_samples_become_meshes_and_the_same_seed_the_same_files(folder: Path, tmp_path: Path) -> None:
    mesh.main([str(folder), *SMALL])
    first = files(folder / "meshes")
    expected = {f"{kind}/{i:04d}.{kind}" for kind in ("ply", "glb") for i in range(2)}
    assert first.keys() == expected | {"clouds.npz", "grid.png", "meshes.json"}
    for name in expected:
        assert trimesh.load_mesh(folder / "meshes" / name).is_watertight, name
    record = json.loads(first["meshes.json"])
    assert record["options"]["checkpoint"] == "step-00000304"
    assert record["network"].endswith("surface/checkpoints/step-00000004")
    assert record["sampling"]["steps"] == 2
    assert record["sigma"] == TRAINING.sigma
    assert [m["watertight"] for m in record["meshes"]] == [True, True]
    mesh.main([str(folder), *SMALL])
    assert files(folder / "meshes") == first
    for i, options in enumerate((["--seed", "1"], ["--steps", "3"])):
        mesh.main([str(folder), *SMALL, *options, "--out", str(tmp_path / f"other-{i}")])
        assert files(tmp_path / f"other-{i}")["ply/0000.ply"] != first["ply/0000.ply"]
    assert json.loads((tmp_path / "other-1" / "meshes.json").read_text())["sampling"]["steps"] == 3
    # The clouds that a run made before, by its network: the same meshes.
    shutil.copy(folder / "meshes" / "clouds.npz", tmp_path)
    mesh.main([str(tmp_path / "clouds.npz"), "--network", str(folder), "--resolution", "24"])
    again = files(tmp_path / "clouds-meshes")
    assert all(again[name] == first[name] for name in (*expected, "grid.png"))
    # A model that is saved keeps the network.
    LION.from_pretrained(folder).save_pretrained(tmp_path / "kept")
    mesh.main([str(tmp_path / "kept"), *SMALL])
    kept = files(tmp_path / "kept" / "meshes")
    assert all(kept[name] == first[name] for name in (*expected, "grid.png"))
    for source in ("kept", "half"):  # where it lies, too
        LION.from_pretrained(tmp_path / source).save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    weights = "surface/checkpoints/step-00000004/model.safetensors"
    assert (tmp_path / "half" / weights).stat().st_size < 0.7 * (tmp_path / "kept" / weights).stat().st_size
    mesh.main([str(tmp_path / "half"), *SMALL])
    assert set(files(tmp_path / "half" / "meshes")) == set(kept)
    watertight = json.loads((folder / "surface" / "figures.json").read_text())["watertight"]
    assert f"| watertight {watertight:.4g}, chamfer" in (tmp_path / "kept" / "README.md").read_text()


def test_clouds_without_a_network_keep_their_units(balls: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.main([str(balls), "--resolution", "40"])
    out = balls.with_name("balls-meshes")
    for i in range(3):
        made = trimesh.load_mesh(out / "glb" / f"{i:04d}.glb")
        assert made.is_watertight
        radius = np.linalg.norm(made.vertices - (100, -20, 5), axis=1)
        assert radius.mean() == pytest.approx(3, abs=0.1)
        assert radius.std() < 0.1
    record = json.loads((out / "meshes.json").read_text())
    assert (record["normals"], record["network"], record["sigma"]) == ("estimated", None, mesh.DEFAULT_SIGMA)
    assert len(set(record["clouds_sha256"])) == 3
    # What else lies there is kept.
    (out / "notes.txt").write_text("mine")
    before = files(out)
    line = fails(capsys, mesh.main, [str(balls), "--resolution", "40"])
    assert line.endswith(f"out: {out} holds notes.txt, which no command made and would be lost: give another --out")
    assert files(out) == before
    (out / "notes.txt").unlink()


def test_meshes_far_larger_than_their_clouds_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Normals of a table's thin legs and top, estimated: their sides disagree."""
    mesh.main(["procedural:1", "--resolution", "32", "--out", str(tmp_path / "out")])
    assert "1 of 1 meshes reach far beyond their clouds (0)" in capsys.readouterr().err
    with np.load(tmp_path / "out" / "clouds.npz") as file:
        assert file["points"].shape[0] == 1


def test_no_mesh_is_inside_out(tmp_path: Path) -> None:
    """A cloud whose parts enclose positive volumes and yet leave the grid's border inside, as their sides disagree."""
    (made,) = mesh.mesh(mesh.MeshArguments(Path("procedural:5"), resolution=32, out=tmp_path / "out"))
    assert made.volume < 0.5 * np.prod(made.bounds[1] - made.bounds[0])


def test_one_shape_is_one_mesh_whatever_file_it_lies_in(balls: Path, tmp_path: Path) -> None:
    cloud = np.load(balls)["points"][1]
    np.save(tmp_path / "one.npy", cloud)
    np.savetxt(tmp_path / "one.xyz", cloud, fmt="%.9g")
    made = {}
    for name in (str(tmp_path / "one.npy"), str(tmp_path / "one.xyz"), f"{balls}:1", "procedural:2"):
        out = tmp_path / f"out-{len(made)}"
        mesh.main([name, "--resolution", "24", "--out", str(out)])
        made[name] = files(out)
        assert sorted(p.name for p in (out / "ply").iterdir()) == ["0000.ply"]
    first, *others, furniture = made.values()
    assert all(other["ply/0000.ply"] == first["ply/0000.ply"] for other in others)
    assert json.loads(furniture["meshes.json"])["meshes"][0]["watertight"]
    trimesh.creation.icosphere(radius=2).export(tmp_path / "ball.off")
    mesh.main([str(tmp_path / "ball.off"), "--resolution", "24"])
    again = trimesh.load_mesh(tmp_path / "ball-meshes" / "ply" / "0000.ply")
    assert np.linalg.norm(again.vertices, axis=1).mean() == pytest.approx(2, abs=0.1)
    mesh.main([f"{balls}:2", "--resolution", "24"])
    assert (balls.parent / "balls.npz-2-meshes" / "ply" / "0000.ply").is_file()


def test_a_network_takes_as_many_points_as_it_was_trained_on(folder: Path, balls: Path, tmp_path: Path) -> None:
    options = ("--network", str(folder), "--resolution", "24")
    mesh.main([str(balls), *options, "--out", str(tmp_path / "a")])
    taken = np.load(tmp_path / "a" / "clouds.npz")["points"]
    assert taken.shape == (3, POINTS, 3)
    assert all(len(np.unique(cloud, axis=0)) == POINTS for cloud in taken)
    mesh.main([str(balls), *options, "--out", str(tmp_path / "b"), "--seed", "1"])
    assert not np.array_equal(np.load(tmp_path / "b" / "clouds.npz")["points"], taken)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["missing"], "clouds: missing does not exist: expected a run folder, a shipped model (furniture), or clouds"),
        (["{balls}:3"], "clouds: expected a cloud 0 to 2 of {balls}, got 3"),
        (["{balls}", "--num-samples", "2"], "num-samples: is for a run folder, {balls} is not one"),
        (["{balls}", "--steps", "2"], "steps: is for a run folder, {balls} is not one"),
        (["{balls}", "--class", "chair"], "class: is for a run folder, {balls} is not one"),
        (["{balls}", "--normals", "network"], "normals: a network needs --network RUN, whose surface network is used"),
        (["{balls}", "--network", "{balls}"], "network: {balls} is not a run folder (it has no config.json)"),
        (["{run}", "--network", "{run}", "--normals", "estimated"], "network: is not used with --normals estimated"),
        (["{run}", "--num-samples", "0"], "num-samples: expected at least 1, got 0"),
        (["{run}", "--steps", "0"], "steps: expected 1 to 1000, got 0"),
        (["{run}", "--class", "bed"], "class: expected one of chair, table, sofa, lamp, shelf, got bed"),
        (["{run}", "--resolution", "8"], "resolution: expected 16 to 512, got 8"),
        (["{run}", "--sigma", "0.5"], "sigma: expected 0 to 0.1, got 0.5"),
        (["{run}", "--seed", "-1"], "seed: expected 0 to 2^31 - 1, got -1"),
        (
            ["{run}", "--out", "{run}"],
            "out: {run} exists and holds no meshes of an earlier command: give another --out",
        ),
        (["{few}", "--network", "{run}"], "clouds: this network takes 130 points of each, got 12 in cloud 0"),
        (["{few}"], "clouds: no mesh can be made of cloud 0 ("),
    ],
)
def test_one_line_for_bad_input(
    folder: Path, balls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    few = tmp_path / "few.npy"
    np.save(few, np.zeros((1, 12, 3), np.float32))
    places = {"{run}": str(folder), "{balls}": str(balls), "{few}": str(few)}
    for name, path in places.items():
        options, message = [o.replace(name, path) for o in options], message.replace(name, path)
    assert fails(capsys, mesh.main, options).startswith(f"error: {message}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["few.npy"]


def test_a_run_without_a_surface_network_says_how_to_get_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = random_run(tmp_path / "run")
    line = fails(capsys, mesh.main, [str(run.folder)])
    assert "has no surface network yet: train it with --stage surface, or give --normals estimated" in line
    assert not (run.folder / "meshes").exists()
    line = fails(capsys, mesh.main, ["procedural:1", "--network", str(run.folder)])
    assert line.startswith(f"error: network: {run.folder} has no surface network yet")


def test_nothing_is_left_where_writing_fails(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "grid.png")

    monkeypatch.setattr(mesh, "mesh_grid", full)
    assert "no space left" in fails(capsys, mesh.main, [str(folder), *SMALL, "--out", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []
