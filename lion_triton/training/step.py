"""One training step, and all that changes from step to step, in tensors on the device that stay where they are.

So it can be captured in a CUDA graph: nothing but the contents of these tensors tells one step from the next, and the
host reads none of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lion_triton.config import PriorTraining, VAETraining
from lion_triton.kernels.noise import later_key
from lion_triton.runs import Stage
from lion_triton.training.batches import Batch
from lion_triton.training.context import Context

KEYS_PER_STEP = 4  # noise keys that one step may use


class Step:
    """Forward, backward, gradient norm and clipping, Adam, averaged weights.

    Calling it does the next step on ``batch``, this process's part, which ``load`` fills. It returns the losses, means
    over all processes, and the gradient norm.

    Args:
        objective: ``objective(batch, key, number)`` returns losses by name, of which "loss" is minimised; ``number`` is
            an int64 scalar, how many steps of the stage are done.
        average: of weights that the step trains.
    """

    def __init__(
        self,
        context: Context,
        stage: Stage,
        objective: nn.Module,
        training: VAETraining | PriorTraining,
        average: Average | None = None,
    ) -> None:
        device = context.device
        self.accelerator, self.training, self.average = context.accelerator, training, average
        self.number = torch.zeros((), dtype=torch.int64, device=device)
        self.first_key = context.key(stage, training.batch_size)
        self.learning_rate = torch.tensor(training.learning_rate, device=device)
        self.batch: Batch = {}
        # Fused: it takes its learning rate from a tensor on every device.
        self.options: dict[str, Any] = {"lr": self.learning_rate, "fused": True, "capturable": device.type == "cuda"}
        self.optimizer = torch.optim.Adam(objective.parameters(), betas=training.betas, **self.options)
        self.objective = context.accelerator.prepare(objective)

    def resume(self, done: int, optimizer: Mapping[str, Any]) -> None:
        """Go on after ``done`` steps with the optimizer's state, which may come from another device."""
        groups = [group | self.options for group in optimizer["param_groups"]]
        self.optimizer.load_state_dict({"state": optimizer["state"], "param_groups": groups})
        for group in self.optimizer.param_groups:
            group.update(self.options)  # loading made a copy of the learning rate
        self.number.fill_(done)

    def load(self, batch: Batch) -> None:
        """Copy what the next step trains on to where it looks."""
        if not self.batch:
            self.batch = {name: torch.empty_like(x) for name, x in batch.items()}
        for name, x in batch.items():
            self.batch[name].copy_(x)

    def __call__(self) -> dict[str, Tensor]:
        self.optimizer.zero_grad()
        self.learning_rate.copy_(learning_rate(self.training, self.number))
        key = later_key(self.first_key, self.number * KEYS_PER_STEP)
        losses = self.objective(self.batch, key, self.number)
        self.accelerator.backward(losses["loss"])
        limit = self.training.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), math.inf if limit is None else limit)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.number)
        self.number += 1
        found = {name: loss.detach() for name, loss in losses.items()} | {"grad_norm": norm}
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(torch.stack([x.double() for x in found.values()]), "mean")
            found = dict(zip(found, means, strict=True))
        return found


def learning_rate(training: VAETraining | PriorTraining, done: Tensor) -> Tensor:
    """Of the step after ``done`` steps (int64 scalar): float64 scalar."""
    rate = torch.full_like(done, training.learning_rate, dtype=torch.float64)
    if training.learning_rate_decay == "cosine":
        rate = rate * 0.5 * (1 + torch.cos(math.pi * done.double() / training.steps))
    return rate


class Average:
    """Exponential moving average of a module's parameters.

    Its decay rises with the number of steps k as (1 + k) / (10 + k), up to ``decay``, so that a short run forgets its
    start.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.parameters = [p.detach() for p in module.parameters()]
        self.averaged = [p.clone() for p in self.parameters]

    def update(self, done: Tensor) -> None:
        """Take in the parameters after a step; ``done`` (int64 scalar): steps before that one."""
        k = done.double()
        decay = ((1 + k) / (10 + k)).clamp_max(self.decay) * (k > 0)  # the first is a copy
        torch._foreach_lerp_(self.averaged, self.parameters, [(1 - decay).float()] * len(self.averaged))

    def state_dict(self) -> dict[str, Tensor]:
        """The module's, with averaged parameters."""
        names = (name for name, _ in self.module.named_parameters())
        return {**self.module.state_dict(), **dict(zip(names, self.averaged, strict=True))}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for (name, _), averaged in zip(self.module.named_parameters(), self.averaged, strict=True):
            averaged.copy_(state[name])
