"""Stages that are measured while they train: what is measured, what that changes (nothing), and what ends a stage."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lion_triton import train
from lion_triton.config import TrainConfig
from lion_triton.data.clouds import Normalization
from lion_triton.data.sources import DataConfig, load_sources
from lion_triton.kernels import chamfer_distance, normal_noise, pairwise_chamfer
from lion_triton.models.lion import DiffusionConfig, Posterior
from lion_triton.models.vae import Latents
from lion_triton.runs import load_checkpoint, open_run, vae_trained
from lion_triton.training import context, loop, report, stages, validation
from lion_triton.training.curve import Curve
from lion_triton.training.validation import PERTURBATION, prior_figures, sample_figures, vae_figures
from tests.tiny import tiny_config, tiny_lion


def config(steps: int, **options: Any) -> TrainConfig:
    base = tiny_config()
    vae = replace(base.vae, steps=steps, batch_size=2, learning_rate_decay="constant", kl_start=1.0)
    priors = replace(base.priors, steps=steps, batch_size=2, cached_draws=1)
    few = replace(base.data, num_shapes=4)
    options = {"log_every": 1, "validate_every": 1, "checkpoint_every": 100, "picture_every": 100, **options}
    return replace(base, data=few, vae=vae, priors=priors, **options)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few shapes, few steps of sampling, no pictures and no final figures."""
    monkeypatch.setattr(context, "VALIDATION_SHAPES", 3)
    monkeypatch.setattr(validation, "SAMPLE_STEPS", 1)
    monkeypatch.setattr(train, "finish", lambda _: None)
    monkeypatch.setattr(Curve, "draw", lambda _, path: path.touch())
    for name in ("draw_grid", "generate"):
        monkeypatch.setattr(stages, name, lambda *_: torch.zeros(1, 1, 3).numpy())


def go(config: TrainConfig, out: Path, stage: Any = "all") -> None:
    train.train(train.Arguments(config, out=out, stage=stage))


def metrics(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "shapes_per_second"} for line in lines]


def weights(out: Path) -> dict[str, Tensor]:
    folder = open_run(out).checkpoints()[-1]
    return load_file(folder / "model.safetensors") | {
        f"ema.{name}": x for name, x in load_file(folder / "ema.safetensors").items()
    }


def test_measuring_changes_no_bit_and_goes_on_as_if_unbroken(
    tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    unwatched, watched, broken = (tmp_path / name for name in ("unwatched", "watched", "broken"))
    go(config(2, validate_every=0), unwatched)
    go(config(2), watched)
    expected, got = weights(unwatched), weights(watched)
    assert expected.keys() == got.keys() and all(torch.equal(x, got[name]) for name, x in expected.items())
    figures = [line for line in metrics(watched) if "validation/loss" in line]
    assert [(line["stage"], line["step"]) for line in figures] == [("vae", 1), ("vae", 2), ("priors", 1), ("priors", 2)]
    assert [line for line in metrics(watched) if line not in figures] == metrics(unwatched)
    assert {"validation/chamfer_perturbed", "validation/kl_h_xyz"} < figures[0].keys()
    measured = {f"validation/{name}" for name in ("point_4", "1nna_cd", "thickness", "unevenness")}
    assert measured < figures[3].keys()
    assert (watched / "validation-vae.png").is_file() and (watched / "validation-priors.png").is_file()

    # Asked to stop while it is being measured: at once, and it is measured when it goes on.
    measure, calls = validation.prior_figures, []

    def stop_in_it(*args: Any) -> dict[str, float]:
        calls.append(args)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(*args)

    monkeypatch.setattr(validation, "prior_figures", stop_in_it)
    with pytest.raises(SystemExit):
        go(config(2), broken)
    assert open_run(broken).checkpoints()[-1].name == "step-00000003"
    go(config(2), broken)
    assert metrics(broken) == metrics(watched)
    assert all(torch.equal(x, weights(broken)[name]) for name, x in expected.items())
    best = [open_run(out).checkpoint("best") for out in (watched, broken)]
    assert best[0] is not None and best[1] is not None and best[0].name == best[1].name


def test_patience_ends_a_stage_and_the_best_is_kept(
    tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A planted measure that gets worse after the third step."""
    monkeypatch.setattr(validation, "vae_figures", planted := Planted(3))
    out, saved = tmp_path / "run", []
    save = loop.save_checkpoint
    monkeypatch.setattr(loop, "save_checkpoint", lambda *args: saved.append(args[1]) or save(*args))
    go(config(12, patience=4, checkpoint_every=2), out, "vae")
    said = capsys.readouterr().out
    assert "stage vae ends after step 7: --patience 4 is at its end" in said
    assert "best by loss on validation shapes: step 3 (1, 4 of 7 measurements ago); over the last 6" in said
    assert said.strip().endswith("going on is of no more use")
    assert saved == [1, 2, 3, 4, 6, 7]
    run = open_run(out)
    assert [folder.name for folder in run.checkpoints()] == [f"step-0000000{i}" for i in (3, 6, 7)]
    last = load_checkpoint(run)
    assert last is not None and last.ended and vae_trained(last, run.config)

    # The same again trains no further; without patience it goes on, and says that this is of no more use.
    go(config(12, patience=4, checkpoint_every=2), out, "vae")
    assert planted.count == 7
    fit = stages.fit
    monkeypatch.setattr(stages, "fit", lambda context, *_, **__: state.update(context.lion.state_dict()))
    state: dict[str, Tensor] = {}
    go(config(12, patience=4, checkpoint_every=2), out, "priors")
    assert "the priors are trained on the best VAE, of step-00000003" in capsys.readouterr().out
    best = load_file(run.folder / "checkpoints" / "step-00000003" / "model.safetensors")
    newest = load_file(run.folder / "checkpoints" / "step-00000007" / "model.safetensors")
    names = [name for name in best if name.startswith("vae.")]
    assert all(torch.equal(state[name], best[name]) for name in names)
    assert not all(torch.equal(best[name], newest[name]) for name in names)
    monkeypatch.setattr(stages, "fit", fit)
    go(config(12, checkpoint_every=12), out, "vae")
    change = "+30.3% (90 % interval +30.3% to +30.3%)"  # 0.5 of 1.65
    line = f"step 3 (1, 9 of 12 measurements ago); over the last 6 it changed by {change}: going on is of no more use"
    assert capsys.readouterr().out.strip().endswith(line)
    assert [folder.name for folder in run.checkpoints()] == ["step-00000003", "step-00000007", "step-00000012"]


class Planted:
    """A loss that falls until it was asked for ``turn`` times, and rises from there."""

    def __init__(self, turn: int) -> None:
        self.turn, self.count = turn, 0

    def __call__(self, *_: Any) -> dict[str, float]:
        self.count += 1
        return {"loss": 1 + 0.1 * abs(self.count - self.turn)}


def test_what_priors_are_measured_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Priors that predict no noise: the error is the noise's own square, at times spread over each quarter."""
    lion = tiny_lion(tiny_config(diffusion=DiffusionConfig(num_train_timesteps=80)))
    seen: list[list[int]] = []

    class Nothing(nn.Module):
        def forward(self, x: Tensor, t: Tensor, *_: Any) -> Tensor:
            seen.append(t.tolist())
            return torch.zeros_like(x)

    lion.shape_prior = lion.point_prior = Nothing()  # type: ignore[assignment]
    h = torch.zeros(4, 6, 4)
    figures = prior_figures(lion, Posterior(torch.zeros(4, 8), h, h), None)
    assert seen[::2] == seen[1::2] == [[20 * q + 1 + x for x in (2, 7, 12, 17)] for q in range(4)]
    for part in range(4):
        for i, (name, shape) in enumerate({"shape": (4, 8), "point": (4, 6, 4)}.items()):
            expected = normal_noise(shape, torch.tensor([1, 2 * part + i])).square().mean()
            assert figures[f"{name}_{part + 1}"] == pytest.approx(expected.item(), rel=1e-5)
    for name in ("shape", "point"):
        assert figures[name] == pytest.approx(np.mean([figures[f"{name}_{part}"] for part in "1234"]))
    assert figures["loss"] == figures["shape"] + figures["point"]


def test_what_a_vae_is_measured_by() -> None:
    """A VAE whose latent points are the points themselves, twice as large in data units."""
    points = torch.randn(5, 20, 3, generator=torch.Generator().manual_seed(0))

    class Objective:
        training_config = SimpleNamespace(steps=7)

        def forward(self, batch: dict[str, Tensor], key: Tensor, number: Tensor) -> dict[str, Tensor]:
            assert number == 7 and batch["points"] is points
            names = ("loss", "reconstruction", "kl_z", "kl_h_xyz", "kl_h_feature", "occupancy")
            return {name: torch.tensor(float(i)) for i, name in enumerate(names)}

    class Lion:
        def encode(self, points: Tensor, generator: Any) -> Latents:
            return Latents(points, torch.zeros(len(points), 2))

        def decode(self, h: Tensor, z: Tensor) -> Tensor:
            return h

    figures = vae_figures(Objective(), Lion(), points, Normalization("global", (0.0, 1.0, 0.0), 2.0))  # type: ignore[arg-type]
    assert [figures[name] for name in ("loss", "kl_z", "kl_h_feature")] == [0, 2, 4]
    assert "occupancy" not in figures and figures["chamfer"] == 0
    noise = normal_noise(points.shape, torch.tensor([1, 1]))
    near = points + PERTURBATION * points.flatten(0, 1).std(0) * noise
    assert figures["chamfer_perturbed"] == pytest.approx(4 * chamfer_distance(near, points).mean().item(), rel=1e-4)
    nearest = pairwise_chamfer(noise, points).min(1).values
    assert figures["chamfer_normal"] == pytest.approx(4 * nearest.mean().item(), rel=1e-4)
    assert figures["chamfer_perturbed"] < figures["chamfer_normal"]


def test_what_generated_shapes_are_measured_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sheets three times as thick as the references, in the model's units."""
    generator = torch.Generator().manual_seed(0)
    flat, made = torch.rand(2, 4, 100, 3, generator=generator)
    flat[..., 2] *= 0.01
    made[..., 2] *= 0.03
    asked: list[Any] = []

    def generate(_: Any, lion: Any, args: Any, labels: np.ndarray, title: str) -> np.ndarray:
        asked.append((args.num_samples, args.steps, labels.tolist()))
        return made.numpy()

    monkeypatch.setattr(validation, "generate", generate)
    run = SimpleNamespace(folder=Path(), config=tiny_config(), normalization=Normalization("global", scale=2.0))
    figures = sample_figures(SimpleNamespace(run=run, lion=None), flat, torch.tensor([0, 3, 1, 1]))  # type: ignore[arg-type]
    assert asked == [(4, validation.SAMPLE_STEPS, [0, 3, 1, 1])]
    assert 2 < figures["thickness"] < 3.5
    assert figures["1nna_cd"] == report.one_nna({"made": 2 * made.numpy()}, 2 * flat.numpy())["made"]


def test_shapes_to_choose_by_are_in_no_figure(tmp_path: Path) -> None:
    made = load_sources(DataConfig(num_shapes=3, num_points=16), 2)
    assert (len(made.train), len(made.validation), len(made.held_out)) == (3, 32, 2)

    def folder(name: str, **counts: int) -> list[tuple[str, ...]]:
        for split, count in counts.items():
            (tmp_path / name / "chair" / split).mkdir(parents=True)
            for i in range(count):
                np.save(tmp_path / name / "chair" / split / f"{split}{i}.npy", np.zeros((4, 3), np.float32))
        sources = load_sources(DataConfig(str(tmp_path / name)), 2)
        return [
            tuple(n.removeprefix("chair/") for n in c.names)
            for c in (sources.train, sources.validation, sources.held_out)
        ]

    assert folder("both", train=1, val=2, test=1) == [("train0",), ("val0", "val1"), ("test0",)]
    assert folder("val", train=1, val=5) == [("train0",), ("val1", "val3"), ("val0", "val2", "val4")]
    assert folder("test", train=1, test=1) == [("train0",), (), ("test0",)]
    train_names, chosen, held_out = folder("neither", train=21)
    assert (len(train_names), chosen, held_out) == (18, ("train18",), ("train0", "train9"))
    _, chosen, held_out = folder("many", train=1, val=200)
    assert (len(chosen), len(held_out), set(chosen) & set(held_out)) == (32, 168, set())
