"""``interpolate`` and ``vary`` as commands: what they write, that it repeats, and how they fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from lion_triton import interpolate, sample, vary
from lion_triton.config import SamplingConfig
from lion_triton.data.clouds import procedural_clouds
from lion_triton.generation import output
from lion_triton.kernels import chamfer_distance
from tests.test_train import fails
from tests.tiny import POINTS, tiny_config, tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("runs") / "tiny").folder


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Drawing takes most of the time; tests marked ``pictures`` draw."""
    if "drawn" in request.fixturenames:
        return
    for owner, name in ((output, "grid"), (interpolate, "grid"), (output, "animate"), (vary, "draw_grid")):
        monkeypatch.setattr(owner, name, lambda *args, **_: args[1].write_bytes(b""))


@pytest.fixture
def drawn() -> None:
    """For tests that look at the pictures."""


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def clouds(folder: Path) -> np.ndarray:
    return np.load(folder / "clouds.npz")["points"]


def record(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "samples.json").read_text())
    return found


@pytest.mark.usefixtures("drawn")
def test_interpolating_writes_frames_pictures_and_a_record(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    interpolate.main([str(run), "procedural:0", "procedural:2", "--frames", "4", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "procedural:0 (chair): Chamfer distance" in printed
    assert "procedural:2 (sofa): Chamfer distance" in printed
    found = np.load(out / "clouds.npz")
    assert found["points"].shape == (4, POINTS, 3)
    assert [str(found["classes"][i]) for i in found["labels"]] == ["chair", "chair", "sofa", "sofa"]
    assert len(list((out / "ply").iterdir())) == 4
    np.testing.assert_allclose(trimesh.load(out / "ply" / "0003.ply").vertices, found["points"][3], atol=1e-6)
    with Image.open(out / "grid.png") as grid, Image.open(out / "animation.gif") as animation:
        assert grid.size == (4 * 240, 240)
        assert (animation.size, animation.n_frames) == ((240, 240), 6)  # type: ignore[attr-defined]
        assert animation.info["loop"] == 0
    written = record(out)
    assert written["checkpoint"] == "step-00000008"
    assert written["sampling"] == {"sampler": "ddim", "steps": 8, "eta": 0.0, "clip_x0": 5.0, "guidance": 0.0}
    # The ends come back as the reconstruction is.
    for row, frame, number in zip(written["given"], (0, 3), (0, 2), strict=True):  # type: ignore[call-overload]
        assert row["chamfer"] == pytest.approx(row["reconstruction_chamfer"], rel=1e-5)
        assert row["points"] == POINTS
        shape = procedural_clouds(3, 2048, 1)[number]
        whole, cloud = (np.ascontiguousarray(x[None], dtype=np.float32) for x in (shape, found["points"][frame]))
        assert chamfer_distance(torch.from_numpy(whole), torch.from_numpy(cloud)).item() < 0.02


def test_points_move_they_do_not_jump(run: Path, tmp_path: Path) -> None:
    interpolate.main([str(run), "procedural:0", "procedural:5", "--frames", "9", "--out", str(tmp_path / "out")])
    frames = clouds(tmp_path / "out")
    steps = np.linalg.norm(np.diff(frames, axis=0), axis=-1)  # (frames - 1, P)
    whole = np.linalg.norm(frames[-1] - frames[0], axis=-1)
    assert steps.max() < 0.6 * whole.max()
    assert np.median(steps) < 0.3 * np.median(whole)
    shuffled = np.linalg.norm(frames[-1][np.random.default_rng(0).permutation(POINTS)] - frames[0], axis=-1)
    assert whole.mean() < 0.7 * shuffled.mean()


@pytest.mark.parametrize("label", [None, "lamp"])
def test_seeds_are_the_clouds_of_sample(run: Path, tmp_path: Path, label: str | None) -> None:
    given = [] if label is None else ["--class", label]
    interpolate.main([str(run), "3", "14", "--frames", "3", *given, "--out", str(tmp_path / "way")])
    frames = clouds(tmp_path / "way")
    for seed, frame in (("3", frames[0]), ("14", frames[-1])):
        out = tmp_path / seed
        sample.main([str(run), "--num-samples", "1", "--seed", seed, *given, "--out", str(out)])
        assert np.array_equal(clouds(out)[0], frame)
    assert not np.array_equal(frames[1], frames[0])


def test_a_seed_and_a_shape_can_be_the_ends(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cloud = np.random.default_rng(0).uniform(-0.4, 0.4, (100, 3)).astype(np.float32)
    np.savetxt(tmp_path / "mine.xyz", cloud)
    interpolate.main([str(run), "3", str(tmp_path / "mine.xyz"), "--frames", "3", "--out", str(tmp_path / "out")])
    assert clouds(tmp_path / "out").shape == (3, POINTS, 3)
    assert "taken for class" in capsys.readouterr().out
    sample.main([str(run), "--num-samples", "1", "--seed", "3", "--out", str(tmp_path / "3")])
    assert np.array_equal(clouds(tmp_path / "3")[0], clouds(tmp_path / "out")[0])


@pytest.mark.usefixtures("drawn")
def test_the_same_seed_gives_the_same_files(run: Path, tmp_path: Path) -> None:
    trimesh.creation.icosphere(radius=0.4).export(tmp_path / "ball.stl")
    ball = str(tmp_path / "ball.stl")
    for command, *args in (
        (interpolate.main, ball, "4", "--frames", "3", "--class", "lamp"),
        (vary.main, ball, "--num-samples", "2"),
    ):
        for name in ("once", "again", "other"):
            seed = "1" if name == "other" else "0"
            command([str(run), *args, "--seed", seed, "--out", str(tmp_path / name)])  # type: ignore[operator]
        once, again, other = (content(tmp_path / name) for name in ("once", "again", "other"))
        for found in (once, again):  # all but where it was written
            assert str(tmp_path).encode() in found["samples.json"]
        once.pop("samples.json"), again.pop("samples.json")
        assert once == again
        assert other["clouds.npz"] != once["clouds.npz"]


@pytest.mark.usefixtures("drawn")
def test_varying_writes_variations_and_their_distances(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    vary.main([str(run), "procedural:4", "--num-samples", "9", "--strength", "0.4", "--out", str(out)])
    assert "procedural:4 (shelf): Chamfer distance" in capsys.readouterr().out
    found = np.load(out / "clouds.npz")
    assert found["points"].shape == (9, POINTS, 3)
    assert set(found["labels"]) == {4}
    assert found["given"].shape == found["reconstruction"].shape == (POINTS, 3)
    with Image.open(out / "grid.png") as grid:
        assert grid.size == (40 + 8 * 240, 3 * 240)  # the shape, and two rows
    written = record(out)
    assert len(written["chamfer"]) == 9  # type: ignore[arg-type]
    assert written["given"]["reconstruction_chamfer"] < min(written["chamfer"])  # type: ignore[index, call-overload]
    assert len({cloud.tobytes() for cloud in found["points"]}) == 9


def test_strength_0_is_the_reconstruction_and_more_goes_further(run: Path, tmp_path: Path) -> None:
    means = []
    for strength in ("0", "0.1", "0.3", "1"):
        out = tmp_path / strength
        vary.main([str(run), "procedural:4", "--strength", strength, "--num-samples", "3", "--out", str(out)])
        means.append(np.mean(record(out)["chamfer"]))  # type: ignore[arg-type]
    assert means == sorted(means)
    assert means[3] > 3 * means[0]
    for cloud in clouds(tmp_path / "0"):
        np.testing.assert_allclose(cloud, np.load(tmp_path / "0" / "clouds.npz")["reconstruction"], atol=1e-5)


def test_what_is_kept_makes_a_difference(run: Path, tmp_path: Path) -> None:
    found = {}
    for keep in ("nothing", "shape", "points"):
        out = tmp_path / keep
        vary.main([str(run), "procedural:4", "--keep", keep, "--num-samples", "1", "--out", str(out)])
        found[keep] = clouds(out).tobytes()
    assert len(set(found.values())) == 3


def test_by_default_results_lie_in_the_run_by_their_options(run: Path) -> None:
    vary.main([str(run), "procedural:4", "--num-samples", "1"])
    assert (run / "samples" / "procedural-4-varied-strength0.2-n1-seed0" / "clouds.npz").is_file()
    interpolate.main([str(run), "1", "2", "--frames", "2"])
    assert (run / "samples" / "1-to-2-frames2-seed0" / "clouds.npz").is_file()


def test_a_run_without_classes_and_with_ancestral_sampling(tmp_path: Path) -> None:
    config = replace(tiny_config(classes=0), sampling=SamplingConfig("ddpm", 1000))
    run = tiny_run(tmp_path / "run", config).folder
    given = ["--steps", "4", "--out", str(tmp_path / "out")]
    interpolate.main([str(run), "1", "procedural:0", "--frames", "2", *given])
    assert set(np.load(tmp_path / "out" / "clouds.npz")["labels"]) == {-1}
    vary.main([str(run), "procedural:0", "--num-samples", "2", *given])
    assert record(tmp_path / "out")["sampling"]["sampler"] == "ddim"  # type: ignore[index]


@pytest.mark.parametrize(
    ("command", "args", "words"),
    [
        (interpolate.main, "RUN 1 2 --frames 1", "frames: expected at least 2, got 1"),
        (interpolate.main, "RUN 1 nothing.obj", "b: expected a file of a shape"),
        (interpolate.main, "RUN procedural 2", "a: expected a file of a shape"),
        (interpolate.main, "RUN 1 2 --class boat", "class: expected one of chair"),
        (interpolate.main, "RUN 1 2 --sampler ode", "sampler: ode needs"),
        (interpolate.main, "RUN 1 2 --steps 0", "steps: expected 1 to 1000"),
        (interpolate.main, "RUN 1 2 --num-points 3", "num-points: this model needs at least 16, got 3"),
        (interpolate.main, "RUN 1 2 --checkpoint step-1", "checkpoint: expected one of step-00000008"),
        (interpolate.main, "nowhere 1 2", "run: nowhere is not a run folder"),
        (vary.main, "RUN procedural:0 --strength 1.2", "strength: expected a number in [0, 1], got 1.2"),
        (vary.main, "RUN procedural:0 --num-samples 0", "num-samples: expected at least 1, got 0"),
        (vary.main, "RUN procedural:0 --eta 2", "eta: expected a number in [0, 1]"),
        (interpolate.main, "RUN 2147483648 2", "a: expected 0 to 2^31 - 1, got 2147483648"),
        (interpolate.main, "RUN 1 2 --seed -1", "seed: expected 0 to 2^31 - 1, got -1"),
        (vary.main, "RUN procedural:0 --seed -1", "seed: expected 0 to 2^31 - 1, got -1"),
        (vary.main, "RUN 12", "shape: expected a file of a shape"),
        (vary.main, "VAE procedural:0", "has no trained priors yet"),
    ],
)
def test_what_cannot_work_is_one_line(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: Callable[[list[str]], None],
    args: str,
    words: str,
) -> None:
    names = {"RUN": str(run), "VAE": str(tmp_path / "vae")}
    if "VAE" in args:
        tiny_run(tmp_path / "vae", stage="vae")
    line = fails(capsys, command, [*(names.get(a, a) for a in args.split()), "--out", str(tmp_path / "out")])
    assert words in line
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_not_replaced(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for command, args in ((interpolate.main, ["1", "2"]), (vary.main, ["procedural:0"])):
        line = fails(capsys, command, [str(run), *args, "--out", str(tmp_path / "out")])
        assert "exists and holds no samples" in line
        file = tmp_path / "out" / "thesis.txt"
        line = fails(capsys, command, [str(run), *args, "--out", str(file / "new" / "folder")])
        assert line == f"error: out: {file} is no folder that can be written to: give another --out"
    assert content(tmp_path / "out") == {"thesis.txt": b"mine"}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output, "animate", full)
    line = fails(capsys, interpolate.main, [str(run), "1", "2", "--frames", "2", "--out", str(tmp_path / "new")])
    assert "no space left" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
