"""Runs that go on for longer, and runs that start from another one's weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from lion_triton import train
from lion_triton.config import TrainConfig
from lion_triton.data.procedural import CLASSES
from lion_triton.data.sources import load_sources
from lion_triton.devices import resolve_precision
from lion_triton.models import LION
from lion_triton.runs import load_model, open_run
from lion_triton.training import initial, stages
from lion_triton.training.context import Context
from lion_triton.training.initial import initial_weights
from lion_triton.training.longer import schedule_changes
from lion_triton.training.step import Step
from tests.tiny import tiny_config, tiny_run


def config(vae_steps: int, prior_steps: int = 2, decay: Any = "constant") -> TrainConfig:
    base = tiny_config()
    vae = replace(base.vae, steps=vae_steps, batch_size=3, learning_rate_decay=decay, kl_start=0.5, kl_end=0.5)
    priors = replace(base.priors, steps=prior_steps, batch_size=3, cached_draws=1, learning_rate_decay=decay)
    # "auto" as all tests that train: Accelerate knows one precision in a process.
    return replace(base, vae=vae, priors=priors, log_every=1, mixed_precision="auto")


def go(config: TrainConfig, out: Path, stage: Any = "all") -> None:
    train.train(train.Arguments(config, out=out, stage=stage))


def metrics(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "shapes_per_second"} for line in lines]


@pytest.fixture(scope="module", autouse=True)
def without_figures() -> Iterator[None]:
    """And without pictures: they take most of so short a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "finish", lambda context: None)
        patch.setattr(stages, "draw_grid", lambda rows, path: None)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    go(config(4, 3), out)
    return out


def test_more_steps_go_on_as_if_asked_for_at_first(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit, where no schedule depends on the length."""
    out = tmp_path / "grown"
    go(config(2), out, "vae")
    go(config(4), out)
    assert "vae.steps: 4, was 2; after step 2: no schedule depends on it" in capsys.readouterr().out
    go(config(4, 3), out)
    assert "priors.steps: 3, was 2; after step 2: no schedule depends on it" in capsys.readouterr().out
    assert metrics(out) == metrics(whole)
    for name in ("model.safetensors", "ema.safetensors"):
        expected, got = (load_file(run.checkpoints()[-1] / name) for run in (open_run(whole), open_run(out)))
        assert all(torch.equal(value, got[key]) for key, value in expected.items())
    content = json.loads((out / "config.json").read_text())
    assert (content["config"]["vae"]["steps"], content["config"]["priors"]["steps"]) == (4, 3)
    assert len(content["changes"]) == 2

    for wrong, line in {
        (4, 2): "priors.steps: 3 are done, expected no fewer, got 2",
        (
            5,
            3,
        ): f"vae.steps: the priors of {out} are trained on its VAE as it is after 4, got 5: a longer VAE takes a new",
    }.items():
        with pytest.raises(ValueError, match=line):
            go(config(*wrong), out)
    assert json.loads((out / "config.json").read_text()) == content


def test_what_a_longer_schedule_changes() -> None:
    new, old = config(400, 400, "cosine"), config(300, 300, "cosine")
    line = "learning rate 0.000293, was 0 (its cosine ends with the last step)"
    assert schedule_changes(new.vae, old.vae, 300) == [line]
    assert schedule_changes(new.priors, old.priors, 300) == [line]
    annealed = [
        replace(c.vae, kl_start=0.0, kl_end=1.0, kl_anneal=1.0, learning_rate_decay="constant") for c in (new, old)
    ]
    assert schedule_changes(*annealed, 300) == ["KL coefficient 0.75, was 1 (it rises until step 400)"]


@pytest.mark.parametrize("stage", ["vae", "priors"])
def test_a_run_starts_at_the_loss_of_the_other(whole: Path, tmp_path: Path, stage: Any) -> None:
    """Its first loss is what the other's (averaged) weights have on the first batch, to the bit."""
    first = config(1, 1)
    go(replace(first, init_from=str(whole)), tmp_path / "out", stage)
    (line,) = metrics(tmp_path / "out")
    lion = load_model(open_run(whole))
    run = open_run(tmp_path / "out")
    accelerator = Accelerator(mixed_precision=resolve_precision("auto", torch.device("cpu")), cpu=True)
    context = Context(run, load_sources(first.data, first.evaluate_shapes), accelerator, lion)
    losses: list[float] = []

    def measure(context: Context, stage: Any, objective: Any, training: Any, batches: Any, *_: Any, **__: Any) -> None:
        step = Step(context, stage, objective.train(), training)
        step.load(next(batches(0)))
        losses.append(step()["loss"].item())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "fit", measure)
        {"vae": stages.fit_vae, "priors": stages.fit_priors}[stage](context, None)
    assert line["stage"] == stage and losses == [line["loss"]]
    from_scratch = next(other["loss"] for other in metrics(whole) if other["stage"] == stage)
    assert line["loss"] < from_scratch


def test_what_does_not_fit_is_named(whole: Path, tmp_path: Path) -> None:
    name, model = str(whole), config(1).model
    # Another point prior: the VAE alone fits.
    other = replace(model, point_prior=replace(model.point_prior, class_dim=4))
    given = initial_weights(name, other, tuple(CLASSES), "box")
    assert given.parts == ("VAE",) and all(key.startswith("vae.") for key in given.state)
    known, line = given.lines
    assert known == f"init-from: {name} knows clouds normalised as global, not box"
    assert line.startswith(f"starting from the weights of {name}: VAE, only these: of the priors, point_prior.")
    assert "point_prior.class_embedding.weight is (5, 8), expected (5, 4)" in line
    # Another VAE: the priors alone.
    other = replace(model, vae=replace(model.vae, occupancy_resolution=3))
    given = initial_weights(name, other, tuple(CLASSES), "global")
    assert given.parts == ("priors",) and "of the VAE, vae.occupancy_head" in given.lines[0]
    # Neither.
    other = replace(other, point_prior=replace(model.point_prior, class_dim=4))
    with pytest.raises(
        ValueError, match=r"fits neither the VAE \(vae.occupancy_head.* is missing.*\) nor the priors \("
    ):
        initial_weights(name, other, tuple(CLASSES), "global")
    with pytest.raises(ValueError, match=r"init-from: .*nowhere is not a run folder"):
        go(replace(config(1), init_from=str(tmp_path / "nowhere")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_moments_may_be_new(whole: Path) -> None:
    model = config(1).model
    network: Any = model.point_prior.network
    told = replace(model, point_prior=replace(model.point_prior, network=replace(network, moments=0.8)))
    given = initial_weights(str(whole), told, tuple(CLASSES), "global")
    assert given.parts == ("VAE", "priors")
    lion, theirs = LION(told), load_model(open_run(whole))
    given.load(lion)
    h, t, z, label = torch.randn(1, 48, 4), torch.tensor([500]), torch.randn(1, 8), torch.tensor([1])
    outputs = [one.point_prior.eval()(h, t, z, None, label) for one in (lion, theirs)]
    assert torch.equal(*outputs)


def test_classes_are_taken_by_their_names(whole: Path) -> None:
    model = config(1).model
    two = replace(
        model,
        shape_prior=replace(model.shape_prior, num_classes=2),
        point_prior=replace(model.point_prior, num_classes=2),
    )
    given = initial_weights(str(whole), two, ("sofa", "boat"), "global")
    assert given.parts == ("VAE", "priors")
    theirs = load_model(open_run(whole)).state_dict()["point_prior.class_embedding.weight"]
    ours = given.state["point_prior.class_embedding.weight"]
    assert torch.equal(ours, torch.stack([theirs[CLASSES.index("sofa")], theirs.mean(0)]))


def test_what_weights_may_come_in(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LION.from_pretrained(whole).save_pretrained(tmp_path / "kept")
    model = config(1).model
    kept, run = (initial_weights(str(name), model, tuple(CLASSES), "global") for name in (tmp_path / "kept", whole))
    assert all(torch.equal(value, kept.state[key]) for key, value in run.state.items())
    published = tmp_path / "published.pt"
    published.touch()
    monkeypatch.setattr(initial, "load_published", lambda path: LION.from_pretrained(whole))
    given = initial_weights(str(published), model, tuple(CLASSES), "box")  # its classes and units are not known
    assert given.parts == ("VAE", "priors") and len(given.lines) == 1
    tiny_run(tmp_path / "vae", config(4), "vae")
    given = initial_weights(str(tmp_path / "vae"), model, tuple(CLASSES), "global")
    assert given.parts == ("VAE",)
    assert given.lines[-1].endswith(f"VAE, only these: of the priors, {tmp_path / 'vae'} has none")
