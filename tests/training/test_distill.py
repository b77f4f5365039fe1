"""Priors for few steps: the target where the answer is known, rounds, their files, and who samples with them."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from lion_triton import evaluate, interpolate, sample, train
from lion_triton.capture import WARM_UPS
from lion_triton.config import DistillTraining, check_distill
from lion_triton.diffusion import Schedule, ddim, merged_steps, merged_v, timesteps, to_eps
from lion_triton.models.lion import LION, DiffusionConfig
from lion_triton.runs import Run, load_checkpoint, load_model, open_run, save_checkpoint
from lion_triton.training import distill as stage
from lion_triton.training import loop
from lion_triton.training.distill import DistillObjective, distill
from tests.cuda_graphs import Graph, pretend
from tests.test_train import fails
from tests.tiny import tiny_config, tiny_run

TRAINING = DistillTraining(teacher_steps=12, counts=(4, 2, 1), steps=2, batch_size=4, learning_rate=1e-3)
KEY = torch.zeros(2, dtype=torch.int64)


def gaussian_eps(schedule: Schedule, mean: float, std: float) -> object:
    """The exact eps of data from N(mean, std^2), in float64."""

    def eps(x: Tensor, t: Tensor) -> Tensor:
        log = schedule.log_abar[t][:, None]
        alpha, sigma = (log / 2).exp(), (-torch.expm1(log)).sqrt()
        return sigma * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    return eps


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize(("steps", "substeps"), [(1, 2), (3, 2), (8, 2), (4, 5), (1, 64)])
def test_a_student_that_predicts_the_target_does_all_steps_in_one(
    kind: str, steps: int, substeps: int, clip: float | None
) -> None:
    """All of the chain: its steps by what ``merged_v`` says, against the teacher's."""
    schedule = Schedule(kind, 200)  # type: ignore[arg-type]
    teacher = gaussian_eps(schedule, 0.4, 0.6)
    x_T = torch.randn(64, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    merged = merged_steps(schedule, steps, substeps)
    row = {int(t): i for i, t in enumerate(merged.times[:, 0])}

    def student(x: Tensor, t: Tensor) -> Tensor:
        i = torch.tensor([row[int(s)] for s in t])
        v = merged_v(teacher, x, merged.times[i], merged.coefficients[i], clip)  # type: ignore[arg-type]
        alpha, sigma = merged.coefficients[i, 0, :2, None].unbind(1)
        return alpha * v + sigma * x

    options = {"spacing": "trailing", "clip": clip}
    expected = ddim(teacher, x_T, schedule, KEY, steps=steps * substeps, **options)  # type: ignore[arg-type]
    found = ddim(student, x_T, schedule, KEY, steps=steps, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    if clip is not None:  # and it was reached
        assert expected.abs().max() == pytest.approx(clip)


def test_the_target_is_the_papers() -> None:
    """Salimans and Ho 2022, algorithm 2, as printed; and v of it as the network's output means it."""
    schedule = Schedule("cosine", 100)
    merged = merged_steps(schedule, 5)
    assert merged.times.tolist() == [[100, 90], [80, 70], [60, 50], [40, 30], [20, 10]]
    x_t = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def alpha_sigma(t: int) -> tuple[float, float]:
        log = float(schedule.log_abar[t])
        return math.exp(log / 2), math.sqrt(-math.expm1(log))

    def model(x: Tensor, t: Tensor) -> Tensor:  # predicts x_0
        return torch.tanh(x) * (1 + t[:, None] / 100)

    def eps(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = alpha_sigma(int(t[0]))
        return (x - alpha * model(x, t)) / sigma

    for i, (t, middle) in enumerate(merged.times.tolist()):
        (a, s), (a1, s1), (a2, s2) = map(alpha_sigma, (t, middle, t - 20))
        x_0 = model(x_t, torch.full((4,), t))
        x_1 = a1 * x_0 + s1 / s * (x_t - a * x_0)
        x_01 = model(x_1, torch.full((4,), middle))
        x_2 = a2 * x_01 + s2 / s1 * (x_1 - a1 * x_01)
        expected = (x_2 - s2 / s * x_t) / (a2 - s2 / s * a)
        v = merged_v(eps, x_t, merged.times[[i] * 4], merged.coefficients[[i] * 4])
        torch.testing.assert_close(a * x_t - s * v, expected, rtol=0, atol=1e-10)
        back = to_eps(v, x_t, torch.full((4,), t), schedule, "v")
        torch.testing.assert_close((x_t - s * back) / a, expected, rtol=0, atol=1e-4)  # by the schedule's float32


def test_trailing_times_are_nested() -> None:
    for T, steps in ((1000, 16), (1000, 7), (37, 9), (2, 1)):
        fine, coarse = timesteps(T, 2 * steps, "trailing"), timesteps(T, steps, "trailing")
        assert torch.equal(fine[::2], coarse)
        assert coarse[0] == T
        assert (fine.diff() < 0).all()
        assert (coarse.double() - T * torch.arange(steps, 0, -1) / steps).abs().max() <= 0.5


class Affine(nn.Module):
    """A denoiser of one slope and one constant per time; it keeps what it was given last."""

    def __init__(self, slopes: Tensor, constants: Tensor) -> None:
        super().__init__()
        self.slopes, self.constants = nn.Parameter(slopes.clone()), nn.Parameter(constants.clone())

    def forward(self, x: Tensor, t: Tensor, *_: object) -> Tensor:
        self.given = x.detach(), t
        shape = (-1, *[1] * (x.ndim - 1))
        return self.slopes[t].view(shape) * x + self.constants[t].view(shape)


def test_the_loss_of_the_exact_student_of_gaussians_is_zero() -> None:
    """Where the data are Gaussian a step is affine, and so is what the student is to learn: found from x = 0 and 1."""
    schedule, mean, std, steps = Schedule("cosine", 64), 0.3, 0.5, 4
    eps, merged = gaussian_eps(schedule, mean, std), merged_steps(schedule, steps)
    slopes, constants = torch.zeros(65), torch.zeros(65)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None]
    for t, middle in merged.times.tolist():
        logs = schedule.log_abar[torch.tensor([t, middle, t - 16])]
        (a, s), (a1, s1), (a2, s2) = zip((logs / 2).exp().tolist(), (-torch.expm1(logs)).sqrt().tolist(), strict=True)
        first = eps(ends, torch.tensor([t, t]))  # type: ignore[operator]
        x = a1 * (ends - s * first) / a + s1 * first
        second = eps(x, torch.tensor([middle, middle]))  # type: ignore[operator]
        x = a2 * (x - s1 * second) / a1 + s2 * second
        v = (a * ends - (x - s2 / s * ends) / (a2 - s2 / s * a)) / s
        constants[t], slopes[t] = v[0], v[1] - v[0]

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return eps(x.double().flatten(1), t).view_as(x).float()  # type: ignore[operator]

    student = SimpleNamespace(shape_prior=Affine(slopes, constants), point_prior=Affine(slopes, constants))
    teacher = SimpleNamespace(
        vae=None,
        z_mean=torch.tensor(1.0),
        z_std=torch.tensor(2.0),
        h_mean=torch.tensor(-1.0),
        h_std=torch.tensor(0.5),
        shape_denoiser=lambda labels, clip, guidance: {1.5: denoiser}[guidance],
        point_denoiser=lambda z, labels, clip, guidance: {1.5: denoiser}[guidance],
    )
    objective = DistillObjective(student, teacher, merged, guidance=1.5, shape_draws=2)  # type: ignore[arg-type]
    batch = {"z": torch.full((200, 3), 5.0), "h_mu": torch.full((200, 4, 3), 0.5)}
    batch["h_log_sigma"] = torch.full((200, 4, 3), -3.0)
    losses = objective(batch, KEY, KEY[0])
    assert losses["shape"] < 1e-9
    assert losses["point"] < 1e-9
    for prior, x_0, count in ((student.shape_prior, 2.0, 400), (student.point_prior, 3.0, 200)):
        x_t, t = prior.given
        for i, time in enumerate(merged.times[:, 0].tolist()):  # all of the steps, equally often
            chosen = x_t[t == time]
            assert len(chosen) == count / steps
            assert chosen.mean() == pytest.approx(float(merged.coefficients[i, 0, 0]) * x_0, abs=0.2)
    with torch.no_grad():
        student.point_prior.slopes[16] += 0.1
    changed = objective(batch, KEY, KEY[0])
    assert changed["shape"] == losses["shape"]
    assert changed["loss"] == changed["point"] > 1e-3
    changed["loss"].backward()
    assert student.point_prior.slopes.grad[16].abs() > 0.01
    assert not torch.equal(objective(batch, KEY + 1, KEY[0])["point"], changed["point"])  # other noise


def trained(folder: Path, drop_condition: float = 0.0) -> Run:
    """A run whose priors are said to be trained to the end."""
    config = tiny_config()
    priors = replace(config.priors, drop_condition=drop_condition, cached_draws=1)
    run = tiny_run(folder, replace(config, priors=priors))
    state = load_checkpoint(run)
    assert state is not None
    save_checkpoint(run, 9, replace(state, step=run.config.priors.steps))
    return run


def go(folder: Path, training: DistillTraining = TRAINING) -> LION:
    return distill(open_run(folder), training, Accelerator(cpu=True))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = trained(tmp_path_factory.mktemp("distill") / "run").folder
    go(folder)
    return folder


def logged(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name != "shapes_per_second"} for line in lines]


def clouds(lion: LION, **options: object) -> Tensor:
    given: dict[str, Any] = {"sampler": "ddim", "steps": 4, "num_points": 20, "labels": torch.tensor([0, 3])}
    return lion.sample(2, generator=torch.Generator().manual_seed(0), **given | options)


def test_the_folder_holds_what_is_kept_and_explains_itself(finished: Path) -> None:
    folder = finished / "distilled"
    names = {
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "overview.png",
        "steps-4.safetensors",
        "steps-2.safetensors",
        "steps-1.safetensors",
    }
    assert {p.name for p in folder.iterdir()} == names
    config = json.loads((folder / "config.json").read_text())
    assert config["checkpoint"] == "step-00000009"
    assert config["training"]["counts"] == [4, 2, 1]
    lines = logged(folder)
    assert [(line["total_step"], line["step"]) for line in lines] == [(2, 2), (4, 2), (6, 2)]
    assert {"loss", "shape", "point", "grad_norm"} < lines[0].keys()


def test_a_stopped_stage_goes_on_where_it_was(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After SIGTERM in the first round; killed when the second's file was there, but its checkpoints still, too."""
    run = trained(tmp_path / "run")
    folder = run.folder / "distilled"
    prior_batches, rmtree = stage.prior_batches, shutil.rmtree

    def batches_and_stop(*args: Any) -> Iterator[Any]:
        for number, batch in enumerate(prior_batches(*args)):
            if number == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(stage, "prior_batches", batches_and_stop)
    with pytest.raises(SystemExit) as stop:
        go(run.folder)
    assert stop.value.code == 0 and "stopped after step 1 of stage distill" in capsys.readouterr().out
    monkeypatch.undo()

    def killed(path: Path, **options: Any) -> None:
        if path == folder / "checkpoints" and (folder / "steps-2.safetensors").exists():
            raise KeyboardInterrupt
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        go(run.folder)
    assert "continuing the priors for 4 steps: 1 steps are done" in capsys.readouterr().out
    assert {p.name for p in folder.iterdir()} > {"checkpoints", "steps-2.safetensors", "steps-4.safetensors"}
    monkeypatch.undo()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"total_step": 5, "ste')  # as a killed process may leave it
    go(run.folder)
    assert "continuing" not in capsys.readouterr().out
    assert logged(folder) == logged(finished / "distilled")
    for name in ("overview.png", "steps-4.safetensors", "steps-2.safetensors", "steps-1.safetensors"):
        assert (folder / name).read_bytes() == (finished / "distilled" / name).read_bytes(), name
    assert not (folder / "checkpoints").exists()


def test_a_loss_that_is_not_finite_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tmp_path / "run")
    error, calls = DistillObjective._error, []

    def planted(self: DistillObjective, *args: Any) -> Tensor:
        calls.append(args)
        return error(self, *args) * (math.nan if len(calls) % 2 == 0 else 1)  # that of the point prior

    monkeypatch.setattr(DistillObjective, "_error", planted)
    with pytest.raises(
        ValueError, match=r"step 1 of stage distill; .* the loss \(point\).*; clouds of the batch: \w+/\d+"
    ):
        go(run.folder)


def test_captured_it_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = replace(TRAINING, counts=(2,), steps=5)
    folders = [trained(tmp_path / name).folder for name in ("plain", "captured")]
    monkeypatch.setattr(stage, "draw", lambda *_: None)
    go(folders[0], training)
    with monkeypatch.context() as patch:
        pretend(patch, loop)
        go(folders[1], training)
    assert (Graph.captured, Graph.replayed) == (1, training.steps - WARM_UPS)
    plain, captured = (folder / "distilled" / "steps-2.safetensors" for folder in folders)
    assert plain.read_bytes() == captured.read_bytes()


def test_a_finished_stage_is_left_as_it_is(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in (finished / "distilled").rglob("*.*")}
    go(finished)
    assert "all rounds are done" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (finished / "distilled").rglob("*.*")} == before


def test_few_steps_are_taken_by_their_own_priors(finished: Path) -> None:
    lion, files = load_model(open_run(finished)), finished / "distilled"
    assert list(lion.distilled) == ["4", "2", "1"]
    plain = load_model(open_run(finished))
    plain.distilled = nn.ModuleDict()
    for options in ({"steps": 3}, {"eta": 0.5}, {"sampler": "ddpm"}):
        assert torch.equal(clouds(lion, **options), clouds(plain, **options))
    for steps in (4, 2, 1):
        priors = load_file(files / f"steps-{steps}.safetensors")
        assert priors.pop("guidance") == 0
        few = copy.deepcopy(plain)
        few.load_state_dict(plain.state_dict() | priors)
        few.spacing = "trailing"
        assert torch.equal(clouds(lion, steps=steps), clouds(few, steps=steps))
        assert not torch.equal(clouds(lion, steps=steps), clouds(plain, steps=steps))
        assert any(not torch.equal(tensor, plain.state_dict()[name]) for name, tensor in priors.items())


def test_guidance_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The students then say by themselves what guidance makes of the teacher, and take its place for no other."""
    monkeypatch.setattr(stage, "draw", lambda *_: None)
    folder = trained(tmp_path / "run", drop_condition=0.1).folder
    lion = go(folder, replace(TRAINING, counts=(4,), guidance=1.5))
    unguided = go(trained(tmp_path / "unguided").folder, replace(TRAINING, counts=(4,)))
    assert not torch.equal(clouds(lion, guidance=1.5), clouds(unguided))  # trained on other targets
    plain = copy.deepcopy(lion)
    plain.distilled = nn.ModuleDict()
    for guidance in (0.0, 1.0):
        assert torch.equal(clouds(lion, guidance=guidance), clouds(plain, guidance=guidance))
    priors = load_file(folder / "distilled" / "steps-4.safetensors")
    assert priors.pop("guidance") == 1.5
    plain.load_state_dict(plain.state_dict() | priors)
    plain.spacing = "trailing"
    assert torch.equal(clouds(load_model(open_run(folder)), guidance=1.5), clouds(plain))


def test_a_saved_model_has_them_too(finished: Path, tmp_path: Path) -> None:
    LION.from_pretrained(finished).save_pretrained(tmp_path / "saved")
    assert {p.name for p in (tmp_path / "saved").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    lion = LION.from_pretrained(tmp_path / "saved")
    assert list(lion.distilled) == ["4", "2", "1"]
    assert torch.equal(clouds(lion), clouds(load_model(open_run(finished))))
    assert "`sampler='ddim'` with `steps` 4, 2, 1" in (tmp_path / "saved" / "README.md").read_text()
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["distilled"]["training"]["teacher_steps"] == 12
    message = "folder of save_pretrained"
    with pytest.raises(ValueError, match=message):
        go(tmp_path / "saved")


def test_commands_say_whose_steps_they_take(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, ours, trained_ones = str(finished), "by the priors distilled for so many", "by the priors as trained"
    for steps, words in ((4, ours), (3, trained_ones)):
        sample.main([run, "--num-samples", "2", "--steps", str(steps), "--out", str(tmp_path / f"sample-{steps}")])
        assert words in capsys.readouterr().out
        record = json.loads((tmp_path / f"sample-{steps}" / "samples.json").read_text())
        assert record["distilled"] == (steps == 4)
    one = ["--num-samples", "1", "--steps", "4", "--seed", "5"]
    sample.main([run, *one, "--out", str(tmp_path / "one")])
    for a, distilled in (("5", True), ("procedural:1", False)):
        out = tmp_path / a
        interpolate.main([run, a, "6", "--frames", "2", "--steps", "4", "--out", str(out)])
        assert json.loads((out / "samples.json").read_text())["distilled"] == distilled
    ends = np.load(tmp_path / "5" / "clouds.npz")["points"]
    np.testing.assert_array_equal(ends[0], np.load(tmp_path / "one" / "clouds.npz")["points"][0])
    record = evaluate.evaluate(evaluate.EvaluateArguments(finished, emd="none", steps=4, out=tmp_path / "evaluation"))
    assert record["samples"]["sampling"]["distilled"]
    assert "distilled/steps-4.safetensors" in record["samples"]["sampling"]["weights_sha256"]


def test_of_another_checkpoint_they_are_not_used(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    run = open_run(tmp_path / "run")
    state = load_checkpoint(run)
    assert state is not None
    save_checkpoint(run, 12, state)
    assert not load_model(run).distilled
    assert "is of another checkpoint than step-00000012: not used" in capsys.readouterr().out
    assert load_model(run, "step-00000009").distilled
    lion = LION.from_pretrained(run.folder)
    assert not lion.distilled
    assert "distilled" not in (lion.about or {})
    with pytest.raises(ValueError, match="another checkpoint: step-00000012, was step-00000009: remove it"):
        go(run.folder)


def test_errors(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished, tmp_path / "run")
    command = ["--stage", "distill", "--out", str(tmp_path / "run")]
    line = fails(capsys, train.main, ["furniture", *command])
    assert line == f"error: preset: {tmp_path / 'run'} is a run of quickstart, got furniture"
    line = fails(capsys, train.main, ["quickstart", *command, "--distill.steps", "7"])
    assert "was started with another distill.teacher_steps: 64, was 12: remove it" in line
    (tmp_path / "run" / "distilled" / "steps-1.safetensors").write_bytes(b"nothing")
    line = fails(capsys, sample.main, [str(tmp_path / "run")])
    assert line.startswith(f"error: distilled: {tmp_path / 'run' / 'distilled' / 'steps-1.safetensors'} is damaged")
    (tmp_path / "run" / "distilled" / "config.json").write_text("{")
    assert "is damaged" in fails(capsys, train.main, ["quickstart", *command])
    untrained = tiny_run(tmp_path / "untrained").folder
    line = fails(capsys, train.main, ["quickstart", "--stage", "distill", "--out", str(untrained)])
    assert line == f"error: stage: {untrained} has no trained priors yet; run --stage priors first"
    assert not (untrained / "distilled").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_steps": 1001}, "distill.teacher-steps: expected 1 to 1000, got 1001"),
        *(
            ({"counts": counts}, f"distill.counts: expected divisors of distill.teacher-steps, 12, {each}, got {got}")
            for each in ("each of the one before it",)
            for counts, got in (((), "none"), ((5, 1), "5 1"), ((4, 4), "4 4"), ((2, 0), "2 0"), ((12,), "12"))
        ),
        (
            {"guidance": 1.0},
            "distill.guidance: needs a model with classes or CLIP, trained with priors.drop-condition above 0",
        ),
        ({"steps": 0}, "distill.steps: expected at least 1, got 0"),
        ({"batch_size": 0}, "distill.batch-size: expected at least 1, got 0"),
        ({"learning_rate": math.nan}, "distill.learning-rate: expected a number above 0, got nan"),
    ],
)
def test_settings_that_make_no_rounds(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_distill(replace(TRAINING, **change), tiny_config())


def test_a_model_that_predicts_eps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stage: distill needs a model that predicts v, .* this one predicts eps"):
        check_distill(TRAINING, tiny_config(diffusion=DiffusionConfig()))
