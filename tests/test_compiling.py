"""Compiled blocks: no graph break, no recompilation after the first steps, one form for all blocks of a kind."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lion_triton import runs, train
from lion_triton.config import from_json, quickstart
from lion_triton.models import LION
from lion_triton.models.priors import TransformerConfig
from lion_triton.training import compiling
from lion_triton.training.compiling import BLOCKS, check_compiler, compile_bar, compile_blocks, pays
from lion_triton.training.objectives import PriorObjective, VAEObjective
from tests.models.test_networks_on_triton import tiny

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Bars:
    """Stands for tqdm: what was shown, and whether it was taken away again."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.open = 0

    def __call__(self, desc: str, **_: Any) -> Bars:
        self.texts.append(desc)
        self.open += 1
        return self

    def close(self) -> None:
        self.open -= 1


def step(objective: nn.Module, seed: int) -> tuple[float, list[Tensor]]:
    points = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(seed))
    batch = {"points": points, "labels": torch.tensor([seed % 2, 1])}
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(batch, torch.tensor([3, seed]), torch.tensor(seed))["loss"]
    loss.backward()
    gradients = [p.grad for p in objective.parameters() if p.grad is not None]
    objective.zero_grad()
    return loss.item(), gradients


@pytest.mark.parametrize("stage", ["vae", "transformer prior"])
def test_blocks_compile_whole_and_once(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """A graph break raises, as blocks are compiled with ``fullgraph``."""
    torch.manual_seed(0)
    model = tiny()
    if stage != "vae":
        model = replace(model, point_prior=replace(model.point_prior, network=TransformerConfig(16, 3, 2)))
    lion = LION(model).eval()
    config = quickstart()
    objective: nn.Module = VAEObjective(lion, config.vae) if stage == "vae" else PriorObjective(lion, config.priors)
    part: nn.Module = lion.vae if stage == "vae" else lion.point_prior
    expected = [step(objective, seed) for seed in range(4)]

    compile_blocks(part, "aot_eager")
    bars = Bars()
    monkeypatch.setattr(compiling, "ProgressBar", bars)
    with compile_bar(lion):
        got = [step(objective, seed) for seed in range(2)]
        compiled = counters["stats"]["unique_graphs"]
        with torch._dynamo.config.patch(error_on_recompile=True):
            got += [step(objective, seed) for seed in range(2, 4)]
    assert counters["stats"]["unique_graphs"] == compiled
    blocks = [name for name, block in part.named_modules() if isinstance(block, BLOCKS)]
    assert 0 < compiled < len(blocks)  # encoder and decoder share theirs, as do all blocks of a transformer

    first = "vae.shape_encoder.convolutions.0.blocks.0" if stage == "vae" else "point_prior.network.blocks.0"
    assert bars.texts[0] == f"compiling {first}"
    assert f"compiling {first}, backward pass" in bars.texts
    assert bars.open == 0
    for (loss, gradients), (right, right_gradients) in zip(got, expected, strict=True):
        assert loss == pytest.approx(right, rel=1e-3)
        for x, y in zip(gradients, right_gradients, strict=True):
            torch.testing.assert_close(x, y, rtol=0.05, atol=0.02 * y.abs().max().item() + 1e-6)


def test_a_copy_computes_with_its_own_weights() -> None:
    from copy import deepcopy

    block = next(m for m in LION(tiny()).modules() if isinstance(m, BLOCKS))
    compile_blocks(block, "eager")
    assert deepcopy(block).forward.__self__ is not block


def test_auto_compiles_long_runs_on_a_gpu_only() -> None:
    auto = quickstart()
    assert auto.compile == "auto"
    assert compiling.whether_to_compile(auto, CPU) == "off"
    assert compiling.whether_to_compile(replace(auto, compile="on"), CPU) == "on"
    assert not pays(300)  # as long as compiling takes
    assert pays(3600)


def test_a_run_stays_as_it_was_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = quickstart()
    config = replace(
        config,
        model=tiny(),
        data=replace(config.data, num_shapes=4, num_points=16),
        vae=replace(config.vae, steps=1, batch_size=2),
        priors=replace(config.priors, steps=1, batch_size=2, cached_draws=1),
        sampling=replace(config.sampling, steps=1),
        validate_every=0,
        evaluate_shapes=2,
    )
    compiled: list[nn.Module] = []
    monkeypatch.setattr(train, "compile_blocks", compiled.append)
    monkeypatch.setattr(train, "whether_to_compile", lambda *_: "on")
    arguments = train.Arguments(config, out=tmp_path / "run", stage="vae")
    train.train(arguments)
    assert runs.open_run(tmp_path / "run").config.compile == "on"
    monkeypatch.setattr(train, "whether_to_compile", lambda *_: pytest.fail("decided again"))
    train.train(replace(arguments, stage="all"))
    assert len(compiled) == 3  # in either command, and the model of the final samples
    train.train(replace(arguments, stage="all", config=replace(config, compile="off")))
    assert len(compiled) == 3


def test_a_compiler_is_asked_for_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_compiler(torch.device("cuda"))
    monkeypatch.setattr(compiling.shutil, "which", lambda _: None)
    monkeypatch.setattr(train, "best_device", lambda: CPU)
    with pytest.raises(SystemExit) as stop:
        train.main(["quickstart", "--out", str(tmp_path / "run"), "--compile", "on", "--data.num-shapes", "4"])
    assert stop.value.code == 2
    assert "error: compile: on a CPU it needs a C++ compiler" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("old", [True, False])
def test_configurations_of_older_runs_are_read(old: bool) -> None:
    written = json.loads(json.dumps(asdict(quickstart()))) | {"compile": old}
    assert from_json(written) == replace(quickstart(), compile="off")
