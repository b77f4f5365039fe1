"""The stage ``encoder``, and ``vary`` of coarse, noisy and partial shapes, on tiny runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lion_triton import runs, train, vary
from lion_triton.config import EncoderTraining, ReconstructionWeights, check_encoder, quickstart
from lion_triton.data.degraded import VoxelGrid
from lion_triton.data.procedural import furniture
from lion_triton.generation.encoders import trained_encoders, use_encoders
from lion_triton.models.lion import LION
from lion_triton.training import encoders as stage
from lion_triton.training import loop
from tests.test_train import fails
from tests.tiny import POINTS, tiny_config, tiny_run

OPTIONS = "--encoder.batch-size 4 --checkpoint-every 2 --log-every 1".split()
STEPS = {"voxels": 4, "noisy": 50, "partial": 4}
CONFIG = replace(tiny_config(), mixed_precision="auto")  # Accelerate keeps one a process, and other tests take this


def quick(patch: pytest.MonkeyPatch) -> None:
    """Few shapes to judge, and no pictures, which would take most of the time."""
    patch.setattr(stage, "JUDGED", 3)
    for owner in (stage, vary):
        patch.setattr(owner, "draw_grid", lambda rows, path: path.write_bytes(b""))


@pytest.fixture(autouse=True)
def always_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)


def tune(folder: Path, kind: str, *more: str) -> None:
    steps = ["--encoder.steps", str(STEPS[kind])]
    train.main([str(folder), "--stage", "encoder", "--encoder.input", kind, *steps, *OPTIONS, *more])


@pytest.fixture(scope="module")
def untuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("runs") / "tiny", CONFIG).folder


@pytest.fixture(scope="module")
def tuned(untuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "tiny"
    shutil.copytree(untuned, folder)
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        tune(folder, "partial")
        tune(folder, "noisy", "--encoder.noise", "0.5", "--encoder.learning-rate", "0.004")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "JUDGED", 3)
        tune(folder, "voxels")
    return folder


def test_a_run_folder_gives_its_own_configuration(untuned: Path) -> None:
    config = runs.open_run(untuned).config
    args = train.parse([str(untuned), "--seed", "3", "--encoder.kept", "0.25"])
    assert (args.out, args.config) == (untuned, replace(config, seed=3))
    assert args.encoder == EncoderTraining(kept=0.25)
    assert train.parse(["quickstart", "--out", str(untuned)]).config == quickstart()


@pytest.mark.parametrize("kind", ["voxels", "noisy", "partial"])
def test_the_folder_explains_itself_and_only_encoders_change(untuned: Path, tuned: Path, kind: str) -> None:
    folder = tuned / "encoders" / kind
    about = json.loads((folder / "config.json").read_text())
    assert (about["training"]["input"], about["training"]["steps"], about["vae"]) == (
        kind,
        STEPS[kind],
        "step-00000008",
    )
    assert about["place"]["longest_side"] == pytest.approx(1, abs=0.2)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS[kind] + 1))
    assert all(np.isfinite(line["loss"]) for line in lines)
    figures = json.loads((folder / "figures.json").read_text())
    assert (figures["input"], figures["held_out_shapes"]) == (kind, 3)
    for name in ("tuned_varied", "untuned_varied"):
        assert figures[name].keys() == {"chamfer", "diversity", "voxel_iou" if kind == "voxels" else "from_given"}
    assert 0 < figures["shape"]["chamfer"] < 0.1  # other points of the same
    assert figures["tuned_rebuilt"] != figures["untuned_rebuilt"]
    assert kind != "voxels" or (folder / "overview.png").stat().st_size > 1000
    last = [f"step-{STEPS[kind] - i:08d}" for i in (2, 0)]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == last

    run = runs.open_run(tuned)
    before, after = runs.load_model(run), runs.load_model(run)
    use_encoders(after.vae, trained_encoders(run, kind))  # type: ignore[arg-type]
    changed = {name for name, x in after.state_dict().items() if not torch.equal(x, before.state_dict()[name])}
    assert {name.split(".")[1] for name in changed} == {"shape_encoder", "shape_head", "point_encoder"}
    # Trained in other units, kept in the run's own: the steps of Adam moved no weight by more than their rates.
    rates = STEPS[kind] * about["training"]["learning_rate"]
    out = "vae.point_encoder.out.weight"
    moved = (after.state_dict()[out] - before.state_dict()[out]).abs()
    assert moved[3:].max() < rates
    assert 64 * 0.1 * rates < moved[:3].max() < 64 * rates
    original = {p.relative_to(untuned): p.read_bytes() for p in untuned.rglob("*") if p.is_file()}
    assert all((tuned / name).read_bytes() == content for name, content in original.items())


def test_a_stopped_training_continues_as_if_unbroken(
    untuned: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(untuned, folder)
    save = loop.save_checkpoint

    def save_and_stop(run: runs.Run, total_step: int, checkpoint: runs.Checkpoint) -> Path:
        path = save(run, total_step, checkpoint)
        if checkpoint.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return path

    monkeypatch.setattr(loop, "save_checkpoint", save_and_stop)
    with pytest.raises(SystemExit) as stop:
        tune(folder, "voxels")
    assert stop.value.code == 130
    monkeypatch.undo()
    quick(monkeypatch)
    np.savez(tmp_path / "grid.npz", voxels=np.ones((2, 2, 2), dtype=bool))
    line = fails(capsys, vary.main, [str(folder), str(tmp_path / "grid.npz")])
    assert "are not trained to the end" in line
    assert "was started with other settings (encoder.noise: 0.1, was 0.05)" in fails(
        capsys, tune, folder, "voxels", "--encoder.noise", "0.1"
    )
    tune(folder, "voxels")
    parts = [root / "encoders" / "voxels" for root in (tuned, folder)]
    a, b = (load_file(part / "checkpoints" / "step-00000004" / "model.safetensors") for part in parts)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert parts[0].joinpath("figures.json").read_bytes() == parts[1].joinpath("figures.json").read_bytes()


def test_the_encoders_learn(tuned: Path) -> None:
    """What they make of noisy shapes comes nearer to the clean ones, with the decoder as it is."""
    figures = json.loads((tuned / "encoders" / "noisy" / "figures.json").read_text())
    assert figures["tuned_rebuilt"]["chamfer"] < 0.9 * figures["untuned_rebuilt"]["chamfer"]


def test_vary_takes_voxels_noisy_and_partial_shapes(
    tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud = furniture(1, 2048, seed=1)[0][0]
    grid = VoxelGrid.around(cloud, 16, np.random.default_rng(0))
    grid.save(tmp_path / "coarse.npz")
    np.save(tmp_path / "part.npy", cloud[cloud[:, 0] < 0])
    options = ["--num-samples", "2", "--class", "chair", "--steps", "4"]
    found = {}
    for name, more in (("coarse.npz", []), ("part.npy", ["--input", "partial"]), ("part.npy", ["--input", "noisy"])):
        out = tmp_path / "-".join(["out", name, *more[1:]])
        vary.main([str(tuned), str(tmp_path / name), *more, *options, "--out", str(out)])
        found[out.name] = json.loads((out / "samples.json").read_text())
        assert np.load(out / "clouds.npz")["points"].shape == (2, POINTS, 3)
    vary.main([str(tuned), str(tmp_path / "coarse.npz"), *options, "--out", str(tmp_path / "again")])
    one, other = (tmp_path / name / "clouds.npz" for name in ("out-coarse.npz", "again"))
    assert one.read_bytes() == other.read_bytes()
    printed = capsys.readouterr().out
    assert re.search(r"IoU of their voxels with those given 0...; as many points of true shapes have 0...\n", printed)
    assert "squared distance from a point given to the nearest" in printed
    assert {name: record["input"] for name, record in found.items()} == {
        "out-coarse.npz": "voxels",
        "out-part.npy-partial": "partial",
        "out-part.npy-noisy": "noisy",
    }
    assert 0 < found["out-coarse.npz"]["voxel_iou"] <= 1
    # Each has its own encoders: the same points come out otherwise.
    partial, noisy = (np.load(tmp_path / f"out-part.npy-{kind}" / "clouds.npz") for kind in ("partial", "noisy"))
    np.testing.assert_array_equal(partial["given"], noisy["given"])
    assert not np.allclose(partial["points"], noisy["points"], atol=1e-4)
    # What is given is where the file says.
    given = np.load(tmp_path / "out-coarse.npz" / "clouds.npz")["given"]
    assert grid.voxels[tuple(np.clip(grid.index(given), 0, 15).T)].mean() > 0.98


def test_errors_in_one_line(untuned: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "grid.npz", voxels=np.ones((2, 2, 2), dtype=bool))
    grid = str(tmp_path / "grid.npz")
    assert "no encoders for the input voxels yet: train" in fails(capsys, vary.main, [str(untuned), grid])
    line = fails(capsys, vary.main, [str(tuned), grid, "--input", "noisy"])
    assert line == f"error: input: {grid} holds voxels, got noisy"
    line = fails(capsys, vary.main, [str(tuned), "procedural:0", "--input", "voxels"])
    assert line == "error: shape: expected an .npz with a boolean array voxels, got procedural:0"
    np.savez(tmp_path / "grid.npz", voxels=np.ones((2, 2, 2)))
    assert "expected voxels as a boolean array" in fails(capsys, vary.main, [str(tuned), grid])
    assert fails(capsys, tune, untuned, "voxels", "--encoder.resolution", "1") == (
        "error: encoder.resolution: expected at least 2, got 1"
    )
    for name, value in {"kept": 0.95, "noise": 0.0, "steps": 0, "reconstruction": ReconstructionWeights()}.items():
        with pytest.raises(ValueError, match=rf"^encoder\.{name}: expected"):
            check_encoder(EncoderTraining(**{name: value}))  # type: ignore[arg-type]
    assert not (untuned / "encoders").exists()
    vae = tiny_run(tmp_path / "vae", CONFIG, stage="vae")
    assert "no trained priors yet" in fails(capsys, tune, vae.folder, "voxels")


def test_a_model_of_save_pretrained_keeps_encoders(tuned: Path, tmp_path: Path) -> None:
    """Only what using them takes, of those that are trained to the end; and again where it is saved again."""
    run, kept, again = tmp_path / "run", tmp_path / "kept", tmp_path / "again"
    shutil.copytree(tuned, run)
    shutil.rmtree(next((run / "encoders" / "noisy" / "checkpoints").glob("*50")))  # stopped before
    LION.from_pretrained(tuned).save_pretrained(again)  # what another model left there
    LION.from_pretrained(run).save_pretrained(kept)
    LION.from_pretrained(kept).save_pretrained(again)
    LION.from_pretrained(kept).save_pretrained(kept)
    files = {"config.json", "figures.json", "state.json", "model.safetensors"}
    for folder in (kept, again):
        found = {path.relative_to(folder) for path in (folder / "encoders").rglob("*") if path.is_file()}
        assert {path.parts[1] for path in found} == {"voxels", "partial"}
        assert {path.name for path in found} == files
        assert len(found) == 2 * len(files)
        about = json.loads((folder / "config.json").read_text())["parts"]
        assert {name: part["training"]["steps"] for name, part in about.items()} == {
            "encoders/voxels": STEPS["voxels"],
            "encoders/partial": STEPS["partial"],
        }
        card = (folder / "README.md").read_text()
        chamfer = json.loads((tuned / "encoders" / "voxels" / "figures.json").read_text())["tuned_rebuilt"]["chamfer"]
        assert f"--input voxels`: shapes of coarse voxels | Chamfer distance {chamfer:.4g} rebuilt" in card
    VoxelGrid.around(furniture(1, 2048, seed=1)[0][0], 16, np.random.default_rng(0)).save(tmp_path / "coarse.npz")
    options = [str(tmp_path / "coarse.npz"), "--num-samples", "1", "--steps", "4", "--out"]
    clouds = []
    for folder in (tuned, again):
        vary.main([str(folder), *options, str(tmp_path / f"of-{folder.name}")])
        clouds.append((tmp_path / f"of-{folder.name}" / "clouds.npz").read_bytes())
    assert clouds[0] == clouds[1]


def test_what_is_trained_to_the_end_is_not_trained_again(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune(tuned, "voxels")
    assert f"is trained to the end, in {STEPS['voxels']} steps" in capsys.readouterr().out


def test_a_model_of_save_pretrained_gets_encoders_but_no_further_training(
    untuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LION.from_pretrained(untuned).save_pretrained(tmp_path / "kept")
    assert "with no training to continue" in fails(capsys, train.main, [str(tmp_path / "kept")])
    tune(tmp_path / "kept", "partial")
    vary.main(
        [str(tmp_path / "kept"), "procedural:0", "--input", "partial", "--steps", "4", "--out", str(tmp_path / "out")]
    )
    assert (tmp_path / "out" / "clouds.npz").is_file()
