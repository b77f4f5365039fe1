"""What a step moves on by itself: averages, learning rate, KL coefficient, noise keys."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lion_triton.config import VAETraining, quickstart
from lion_triton.data.clouds import Normalization
from lion_triton.devices import resolve_precision
from lion_triton.models import LION
from lion_triton.runs import Run
from lion_triton.training.context import Context
from lion_triton.training.objectives import VAEObjective
from lion_triton.training.step import Average, Step, learning_rate
from tests.models.test_networks_on_triton import tiny

CPU = torch.device("cpu")


def test_average_is_that_of_pytorch() -> None:
    """PyTorch's reads the number of steps on the host, which a captured step cannot."""

    def update(averaged: Any, current: Any, count: Any) -> None:
        torch._foreach_lerp_(averaged, current, 1 - min(0.6, (1 + int(count)) / (10 + int(count))))

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average, expected = Average(module, 0.6), AveragedModel(module, multi_avg_fn=update)
    for step in range(30):
        with torch.no_grad():
            for p in module.parameters():
                p.normal_()
        average.update(torch.tensor(step), torch.tensor(False))
        expected.update_parameters(module)
        for name, value in expected.module.named_parameters():
            torch.testing.assert_close(average.state_dict()[name], value.detach(), rtol=1e-6, atol=1e-7)
    assert average.state_dict().keys() == module.state_dict().keys()
    module[0].weight.data = module[0].weight.data + 1  # elsewhere, as where processes share gradients
    before = [x.clone() for x in average.averaged]
    average.update(torch.tensor(30), torch.tensor(False))
    torch.testing.assert_close(average.averaged[0] - before[0], 0.4 * (module[0].weight - before[0]))
    average.update(torch.tensor(31), torch.tensor(True))
    other = Average(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), 0.6)
    other.load_state_dict(average.state_dict())
    assert all(map(torch.equal, other.averaged, average.averaged))


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_learning_rate(decay: Any) -> None:
    training = VAETraining(steps=40, learning_rate=3e-3, learning_rate_decay=decay)
    for done in (0, 7, 39):
        factor = 0.5 * (1 + math.cos(math.pi * done / 40)) if decay == "cosine" else 1.0
        assert learning_rate(training, torch.tensor(done)).item() == pytest.approx(3e-3 * factor, rel=1e-12)


class Watched(VAEObjective):
    """Writes down the key and the number of every step."""

    def __init__(self, lion: LION, training: VAETraining) -> None:
        super().__init__(lion, training)
        self.seen: list[tuple[list[int], int]] = []

    def forward(self, batch: Any, key: Tensor, number: Tensor) -> dict[str, Tensor]:
        self.seen.append((key.tolist(), int(number)))
        return super().forward(batch, key, number)


def test_a_step_moves_on_and_resumes() -> None:
    config = quickstart()
    config = replace(config, model=tiny(), seed=5, vae=replace(config.vae, steps=8, kl_anneal=0.5, kl_end=1.0))
    accelerator = Accelerator(mixed_precision=resolve_precision("auto", CPU), cpu=True)
    batch = {"points": torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(0))}

    def make() -> tuple[Step, Watched, LION]:
        torch.manual_seed(0)
        lion = LION(config.model)
        run = Run(Path(), config, (), Normalization("box"))
        objective = Watched(lion, config.vae)
        context = Context(run, None, accelerator, lion)  # type: ignore[arg-type]
        return Step(context, "vae", objective, config.vae), objective, lion

    step, objective, lion = make()
    step.load(batch)
    place = step.batch["points"].data_ptr()
    coefficients = [step()["kl_coefficient"].item() for _ in range(6)]
    assert coefficients == pytest.approx([1e-7, 0.25, 0.5, 0.75, 1.0, 1.0], abs=1e-6)
    assert objective.seen == [([2 * 5 * 4096, 4 * i, 0], i) for i in range(6)]
    saved = {k: v.clone() for k, v in lion.state_dict().items()}
    optimizer = step.optimizer.state_dict()
    # As an older version saved it, or one that ran on another device: a plain number, other flags.
    groups = [g | {"lr": 0.5, "fused": None, "capturable": True} for g in optimizer["param_groups"]]
    state = {i: {k: v.clone() for k, v in s.items()} for i, s in optimizer["state"].items()}
    losses = [step()["loss"].item() for _ in range(2)]

    resumed, objective, lion = make()
    lion.load_state_dict(saved)
    resumed.resume(6, {"state": state, "param_groups": groups})
    resumed.load(batch)
    assert [resumed()["loss"].item() for _ in range(2)] == losses
    assert objective.seen == [([2 * 5 * 4096, 4 * i, 0], i) for i in (6, 7)]

    step.load({"points": torch.zeros(2, 12, 3)})
    assert step.batch["points"].data_ptr() == place
    assert not step.batch["points"].any()
