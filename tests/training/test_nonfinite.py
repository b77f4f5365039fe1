"""A step whose loss or gradient is not finite: found at that very step, its weights not touched, its tensors named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from lion_triton import runs, train
from lion_triton.config import TrainConfig
from lion_triton.data.clouds import Normalization, TrainingStream
from lion_triton.data.sources import load_sources
from lion_triton.devices import resolve_precision
from lion_triton.runs import Run
from lion_triton.training import loop, step
from lion_triton.training.context import Context
from lion_triton.training.objectives import VAEObjective
from lion_triton.training.step import SKIPPED_IN_A_ROW, Average, Late, Step
from tests.cuda_graphs import pretend
from tests.tiny import tiny_config

CPU = torch.device("cpu")
AT = 4  # the step at which something is planted, counted from 1; row 1 of its batch


def config(**more: Any) -> TrainConfig:
    base = tiny_config()
    vae = replace(base.vae, steps=6, batch_size=3)
    # "auto" as all tests that train: Accelerate knows one precision in a process.
    free = {"log_every": 100, "picture_every": 100, "checkpoint_every": 100, "mixed_precision": "auto"}
    return replace(base, vae=vae, **{**free, **more})


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bad: Tensor) -> Tensor:
        ctx.save_for_backward(bad)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.where(ctx.saved_tensors[0], torch.nan, grad), None


def bad_output(x: Tensor, bad: Tensor) -> Tensor:
    row = torch.arange(len(x)) == 1
    return torch.where(bad & row.view(-1, *[1] * (x.ndim - 1)), torch.nan, x)


def plant(monkeypatch: pytest.MonkeyPatch, what: Callable[[Tensor, Tensor], Tensor], until: int = AT) -> None:
    """Into the output of the decoder's last layer, in steps ``AT`` to ``until``; operations that a graph takes."""
    forward = VAEObjective.forward

    def planted(self: VAEObjective, batch: Any, key: Tensor, number: Tensor) -> dict[str, Tensor]:
        def hook(_module: nn.Module, _inputs: Any, x: Tensor) -> Tensor:
            return what(x, (number >= AT - 1) & (number < until))

        handle = self.vae.decoder.out.register_forward_hook(hook, prepend=True)
        try:
            return forward(self, batch, key, number)
        finally:
            handle.remove()

    monkeypatch.setattr(VAEObjective, "forward", planted)


def names(config: TrainConfig, number: int) -> list[str]:
    """Of the clouds of a step, counted from 1."""
    clouds = load_sources(config.data, config.evaluate_shapes).train
    stream = TrainingStream(clouds, Normalization("box"), 8, 100, config.seed)
    return [clouds.names[stream.shape(i)] for i in range(3 * (number - 1), 3 * number)]


def ended(out: Path, config: TrainConfig) -> tuple[str, dict[str, Any]]:
    """The message that ends a run, and its file."""
    with pytest.raises(ValueError, match="not finite") as error:
        train.train(train.Arguments(config, out=out, stage="vae"))
    return str(error.value), json.loads((out / "nonfinite.json").read_text())


@pytest.mark.parametrize("captured", [False, True], ids=["plain", "captured"])
def test_a_planted_nan_is_found_at_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], captured: bool
) -> None:
    """At that step, though nothing is logged or saved there; and the checkpoint is that of the step before."""
    if captured:
        pretend(monkeypatch, loop)
    else:
        train.train(train.Arguments(replace(config(), checkpoint_every=3), out=tmp_path / "good", stage="vae"))
    plant(monkeypatch, bad_output)
    line, record = ended(tmp_path / "bad", config())
    batch = names(config(), AT)
    assert (
        f"not finite in step {AT} of stage vae; first at fault: the output of vae.decoder.out (its input was finite), "
        "the loss (reconstruction)" in line
    )
    assert f", at {batch[1]}; clouds of the batch: {', '.join(batch)}; largest gradient norms before: " in line
    assert (record["stage"], record["step"], record["in_a_row"], record["clouds"]) == ("vae", AT, 1, batch)
    assert record["first_at_fault"]["rows"] == [batch[1]]
    assert {"loss", "reconstruction"} <= set(record["first_at_fault"]["losses"])
    assert sorted(record["largest_gradient_norms"]) == ["1", "2", "3"]
    assert sorted(record["largest_gradient_norms"].values(), reverse=True) == list(
        record["largest_gradient_norms"].values()
    )
    kept = runs.open_run(tmp_path / "bad").checkpoints()
    assert [folder.name for folder in kept] == [f"step-{AT - 1:08d}"]
    assert "CUDA graph:" not in capsys.readouterr().err  # nothing that a graph refuses
    if not captured:
        good = load_file(tmp_path / "good" / "checkpoints" / kept[0].name / "model.safetensors")
        assert all(torch.equal(value, good[key]) for key, value in load_file(kept[0] / "model.safetensors").items())


def test_a_planted_gradient_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, BadGradient.apply)
    line, record = ended(tmp_path / "bad", config())
    assert f"in step {AT} of stage vae; first at fault: the gradient of vae.decoder.out." in line
    fault = record["first_at_fault"]
    assert (fault["inputs"], fault["output"], fault["losses"]) == ([], "", [])


def test_skipping_counts_and_ends_after_ten_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skipping = replace(config(on_nonfinite="skip"), log_every=1)
    plant(monkeypatch, bad_output)
    train.train(train.Arguments(skipping, out=tmp_path / "skipped", stage="vae"))
    lines = [json.loads(line) for line in (tmp_path / "skipped" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert [line["loss"] is None for line in lines] == [False, False, False, True, False, False]
    monkeypatch.undo()

    plant(monkeypatch, bad_output, until=100)
    many = replace(skipping, vae=replace(skipping.vae, steps=20), checkpoint_every=5)
    line, record = ended(tmp_path / "many", many)
    assert f"not finite in steps {AT} to {AT + SKIPPED_IN_A_ROW - 1} of stage vae" in line
    assert (record["step"], record["in_a_row"], record["clouds"]) == (AT, SKIPPED_IN_A_ROW, names(many, AT))
    model = load_file(runs.open_run(tmp_path / "many").checkpoints()[-1] / "model.safetensors")
    assert all(value.isfinite().all() for value in model.values())


class Line(nn.Module):
    """A loss that is not finite where the batch is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, batch: Any, key: Tensor, number: Tensor) -> dict[str, Tensor]:
        return {"loss": (batch["points"] * self.weight).square().sum()}


def make(on_nonfinite: Any = "stop") -> tuple[Step, Line, Average]:
    run = Run(Path(), config(on_nonfinite=on_nonfinite), (), Normalization("box"))
    accelerator = Accelerator(mixed_precision=resolve_precision("auto", CPU), cpu=True)
    context = Context(run, None, accelerator, None)  # type: ignore[arg-type]
    objective = Line()
    average = Average(objective, 0.9)
    return Step(context, "vae", objective, run.config.vae, average), objective, average


def state(made: tuple[Step, Line, Average]) -> list[Tensor]:
    step, objective, average = made
    adam = step.optimizer.state_dict()["state"].get(0, {})
    return [x.clone() for x in (objective.weight.detach(), *average.averaged, *adam.values())]


GOOD, BAD = torch.ones(2, 4, 3), torch.full((2, 4, 3), torch.inf)


def test_nothing_changes_after_a_step_that_is_not_finite() -> None:
    made = make()
    step = made[0]
    for scale in (1.0, 3.0, 2.0):
        step.load({"points": scale * GOOD})
        step()
    before = state(made)
    step.load({"points": BAD})
    for _ in range(4):  # the host may be late
        step()
        step.load({"points": GOOD})
        assert step.failed(wait=True)
        assert all(map(torch.equal, before, state(made)))
        assert (int(step.number), step.good) == (4, 3)
    assert list(step.largest_norms(2)) == [2, 3]


def test_skipped_steps_leave_no_trace_but_their_number() -> None:
    one, other = make("skip"), make("skip")
    for points in (GOOD, BAD, 2 * GOOD):
        one[0].load({"points": points})
        losses = one[0]()
    assert (int(losses["skipped"]), one[0].good, one[0].failed(wait=True)) == (1, 3, False)
    resumed = make("skip")
    resumed[0].load({"points": GOOD})
    resumed[0]()
    resumed[0].resume(3, one[0].state_dict())
    assert [int(x) for x in (resumed[0].in_a_row, resumed[0].skipped, resumed[0].number)] == [0, 1, 3]
    # Adam has seen two gradients; the learning rate and the average's decay are those of the steps' numbers.
    assert one[0].optimizer.state_dict()["state"][0]["step"] == 2
    other[0].load({"points": GOOD})
    other[0]()
    other[0].number += 1
    other[0].load({"points": 2 * GOOD})
    other[0]()
    assert all(map(torch.equal, state(one), state(other)))


def test_ten_in_a_row_end_it() -> None:
    step, *_ = make("skip")
    step.load({"points": BAD})
    for number in range(1, SKIPPED_IN_A_ROW + 3):
        step()
        assert step.failed(wait=False) == (number >= SKIPPED_IN_A_ROW)
    assert (int(step.number), step.good, int(step.skipped)) == (SKIPPED_IN_A_ROW, 0, SKIPPED_IN_A_ROW)


def test_a_gpu_is_read_late_and_never_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the GPU's memory, whose copies arrive when they are told to."""

    class Copy:
        value, sent = 0, 0

        def pin_memory(self) -> Copy:
            return self

        def copy_(self, x: Any, non_blocking: bool) -> None:
            assert non_blocking
            self.sent = x.value

        def __int__(self) -> int:
            assert event.arrived, "read before it was there"
            return self.value

    copy = Copy()
    event = SimpleNamespace(arrived=True, query=lambda: event.arrived, record=lambda: setattr(event, "arrived", False))
    monkeypatch.setattr(
        step, "torch", SimpleNamespace(zeros_like=lambda *_, **__: copy, cuda=SimpleNamespace(Event=lambda: event))
    )
    x = SimpleNamespace(device=SimpleNamespace(type="cuda"), value=1)
    late = Late(x)  # type: ignore[arg-type]
    assert late.read() == 0
    x.value = 2
    assert late.read() == 0  # the copy is under way
    event.arrived, copy.value = True, copy.sent
    assert late.read() == 1
    event.arrived, copy.value = True, copy.sent
    assert late.read() == 2
