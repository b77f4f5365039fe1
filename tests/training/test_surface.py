"""The stage ``surface``, on a run with random weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lion_triton.data.find import normals_path
from lion_triton.data.sources import load_sources
from lion_triton.runs import Run, open_run
from lion_triton.surface import SurfaceNetwork, SurfaceTraining, storage, surface_config
from lion_triton.surface.quality import mesh_quality
from lion_triton.surface.shapes import OrientedShapes, held_out_shapes, training_shapes
from lion_triton.training import loop
from lion_triton.training import surface as training
from lion_triton.training.surface import SurfaceObjective, surface_batch
from tests.surface.runs import POINTS, TRAINING, random_run, trained


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("surface") / "run"
    trained(random_run(folder))
    return folder


def logged(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "surface" / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name != "shapes_per_second"} for line in lines]


def newest(folder: Path) -> Path:
    return max((folder / "surface" / "checkpoints").iterdir())


def test_the_folder_explains_itself(finished: Path) -> None:
    config = json.loads((finished / "surface" / "config.json").read_text())
    assert config["vae"] == "step-00000304"
    assert config["training"]["sigma"] == 0.03
    assert config["config"]["num_points"] == POINTS
    lines = logged(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "indicator", "near", "normals", "points", "grad_norm"} < lines[0].keys()
    figures = json.loads((finished / "surface" / "figures.json").read_text())
    assert figures["held_out_shapes"] == 2
    assert figures.keys() >= {"watertight", "chamfer", "normal_consistency"}
    assert (finished / "surface" / "overview.png").is_file()
    network, config, name = storage.load_surface(open_run(finished))
    assert (config, name) == (TRAINING, "step-00000004")
    assert network.config == surface_config(POINTS)
    assert open_run(finished).checkpoint().name == "step-00000304"  # type: ignore[union-attr]  # the run's own is untouched


def test_a_stopped_training_continues_as_if_unbroken(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = random_run(tmp_path / "run")
    write = loop.Log.write

    def write_and_stop(self: loop.Log, *record: Any) -> None:
        write(self, *record)
        if record[1] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Log, "write", write_and_stop)
    with pytest.raises(SystemExit) as stop:
        trained(run)
    assert stop.value.code == 0 and "stopped after step 3 of stage surface" in capsys.readouterr().out
    monkeypatch.undo()
    assert newest(run.folder).name == "step-00000003"
    with (run.folder / "surface" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # as a killed process may leave it
    trained(run)
    expected, got = (load_file(newest(folder) / "model.safetensors") for folder in (finished, run.folder))
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert logged(run.folder) == logged(finished)
    for name in ("figures.json", "overview.png"):
        assert (finished / "surface" / name).read_bytes() == (run.folder / "surface" / name).read_bytes(), name


def test_a_loss_that_is_not_finite_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its step, in the network, at the shape that it is of; or it is skipped."""
    run = random_run(tmp_path / "run")
    forward = SurfaceObjective.forward

    def planted(self: SurfaceObjective, batch: Any, key: Tensor, number: Tensor) -> dict[str, Tensor]:
        def hook(_module: torch.nn.Module, _inputs: Any, x: Tensor) -> Tensor:
            return torch.where((number == 2) & (torch.arange(len(x)) == 1)[:, None, None], torch.nan, x)

        handle = self.network.unet.register_forward_hook(hook, prepend=True)
        try:
            return forward(self, batch, key, number)
        finally:
            handle.remove()

    monkeypatch.setattr(SurfaceObjective, "forward", planted)
    with pytest.raises(
        ValueError, match=r"not finite in step 3 of stage surface; first at fault: the output of net"
    ) as e:
        trained(run)
    sources = load_sources(run.config.data, run.config.evaluate_shapes)
    drawn = np.random.default_rng((run.config.seed, training.STREAM, 2)).integers(len(sources.train), size=2)
    names = [sources.train.names[i] for i in drawn]
    assert f", at {names[1]}; clouds of the batch: {', '.join(names)}; " in str(e.value)
    assert newest(run.folder).name == "step-00000002"
    skipping = replace(run, config=replace(run.config, on_nonfinite="skip"))
    trained(skipping)
    assert [line["skipped"] for line in logged(run.folder)[2:]] == [1, 1]


def test_a_finished_training_is_left_as_it_is(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in (finished / "surface").rglob("*")}
    again = trained(open_run(finished))
    assert f"{finished / 'surface'} is trained to the end, in 4 steps" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (finished / "surface").rglob("*")} == before
    network, _, _ = storage.load_surface(open_run(finished))
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in network.state_dict().items())


def test_other_settings_and_missing_parts_are_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"was started with other settings \(surface.steps: 5, was 4\)"):
        trained(open_run(finished), replace(TRAINING, steps=5))
    with pytest.raises(ValueError, match="has no trained VAE yet; run --stage vae first"):
        trained(random_run(tmp_path / "vae", stage="vae"))
    with pytest.raises(ValueError, match="has no surface network yet: train it with --stage surface"):
        storage.load_surface(open_run(tmp_path / "vae"))
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "surface" / "config.json").write_text('{"config": {}}')
    with pytest.raises(ValueError, match=r"config.json is damaged or of another version \('training' is missing\)"):
        storage.load_surface(open_run(copy))
    assert not (tmp_path / "vae" / "surface").exists()


def make(folder: Path) -> tuple[Run, SurfaceObjective, OrientedShapes]:
    run = random_run(folder)
    lion, _ = training.trained_vae(run, torch.device("cpu"))
    torch.manual_seed(0)
    objective = SurfaceObjective(SurfaceNetwork(surface_config(POINTS)), run, lion, TRAINING)
    return run, objective, training_shapes(run, load_sources(run.config.data, 2))


def test_a_batch_is_the_surface_and_the_same_points_with_the_noise_of_the_vae(tmp_path: Path) -> None:
    run, objective, shapes = make(tmp_path / "run")

    def inputs(step: int, config: SurfaceTraining = TRAINING) -> tuple[Tensor, ...]:
        return objective.inputs(surface_batch(run, shapes, config, step), torch.tensor([0, 4 * step]))

    batch = inputs(0)
    for value, again, other in zip(batch, inputs(0), inputs(1), strict=True):
        assert torch.equal(value, again)
        assert not torch.equal(value, other)
    noisy, points, normals, distances = batch
    assert distances.std() == pytest.approx(TRAINING.band, rel=0.2)
    low, high = noisy.amin(1), noisy.amax(1)
    torch.testing.assert_close((high - low).amax(-1), torch.full((2,), 2.0))
    torch.testing.assert_close(low, -high)
    noise = (noisy - points[:, :POINTS]).norm(dim=-1)
    apart = (noisy - points[:, :POINTS].roll(1, 1)).norm(dim=-1)
    assert 0 < noise.median() < 0.2 * apart.median()  # an untrained VAE is near the identity
    torch.testing.assert_close(normals.norm(dim=-1), torch.ones(2, 512))
    # Half the largest jitter on average, in the units of a latent of standard deviation 1, in those of the frame.
    wild, wild_points, *_ = inputs(0, replace(TRAINING, jitter=2.0))
    offsets = (wild - wild_points[:, :POINTS]).norm(dim=-1).median(1).values
    assert (offsets > 2 * noise.median(1).values).all()


def test_the_objective_is_0_at_the_truth_and_falls_as_it_trains(tmp_path: Path) -> None:
    run, objective, shapes = make(tmp_path / "run")
    key = torch.tensor([0, 0])
    batch = surface_batch(run, shapes, TRAINING, 0)
    _, points, normals, distances = objective.inputs(batch, key)

    class Truth(torch.nn.Module):
        def forward(self, _: Tensor) -> tuple[Tensor, Tensor]:
            return points[:, :, None], normals[:, :, None]

    truth = SurfaceObjective(Truth(), run, objective._lion[0], TRAINING)  # type: ignore[arg-type]
    perfect = truth.losses(points, points, normals, distances)
    assert all(value.item() < 1e-8 for value in perfect.values())

    optimizer = torch.optim.Adam(objective.parameters(), 2e-3)
    losses = []
    for _ in range(12):
        terms = objective(batch, key, key[0])
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append({name: value.item() for name, value in terms.items()})
    for name in losses[0]:
        assert losses[-1][name] < 0.8 * losses[0][name], name


def test_stored_normals_are_read_row_for_row(tmp_path: Path) -> None:
    """A folder of clouds with normals beside them, as of prepared meshes: here of spheres, where both are the same."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        for i in range(count):
            path = tmp_path / "data" / "ball" / split / f"{i}.npy"
            normals_path(path).parent.mkdir(parents=True, exist_ok=True)
            directions = rng.normal(size=(300, 3))
            directions /= np.linalg.norm(directions, axis=1, keepdims=True)
            np.save(path, (0.5 * directions).astype(np.float32))
            np.save(normals_path(path), directions.astype(np.float16))
    run = random_run(tmp_path / "run")
    data = replace(run.config.data, source=str(tmp_path / "data"))
    run = replace(run, config=replace(run.config, data=data))
    sources = load_sources(data, 1)
    shapes = training_shapes(run, sources)
    assert (shapes.count, held_out_shapes(run, sources).count) == (3, 2)
    points, normals = shapes.draw(1, 200, 5)
    assert points.shape == normals.shape == (200, 3)
    np.testing.assert_allclose(2 * points, normals, atol=1e-3)
    assert not np.array_equal(points, shapes.draw(1, 200, 6)[0])
    np.save(normals_path(tmp_path / "data" / "ball" / "train" / "1.npy"), np.zeros((299, 3), np.float16))
    with pytest.raises(ValueError, match=r"1.npy: expected shape \(300, 3\) as of its cloud, got \(299, 3\)"):
        shapes.draw(1, 200, 5)
    normals_path(tmp_path / "data" / "ball" / "train" / "1.npy").unlink()
    with pytest.raises(ValueError, match="1 of 3 clouds in .* have no normals beside them: prepare"):
        training_shapes(run, sources)


def test_quality_of_a_mesh_of_the_very_surface_and_of_another() -> None:
    import trimesh

    ball = trimesh.creation.icosphere(4, 0.5)
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(8192, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    near = mesh_quality(ball, 0.5 * normals, normals)
    assert near.watertight
    assert near.normal_consistency > 0.98
    assert near.chamfer < 5e-4
    assert mesh_quality(ball, 0.6 * normals, normals).chamfer == pytest.approx(0.02, rel=0.05)
    ball.update_faces(np.arange(len(ball.faces)) > 0)
    assert not mesh_quality(ball, 0.5 * normals, normals).watertight
