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

from lion_triton.config import Optimization
from lion_triton.kernels.noise import later_key
from lion_triton.runs import Stage
from lion_triton.training.batches import Batch
from lion_triton.training.context import Context

KEYS_PER_STEP = 4  # noise keys that one step may use
SKIPPED_IN_A_ROW = 10  # steps that are not finite, where one does not end the run
REMEMBERED = 100  # gradient norms


class Step:
    """Forward, backward, gradient norm and clipping, Adam, averaged weights.

    Calling it does the next step on ``batch``, this process's part, which ``load`` fills. It returns the losses, means
    over all processes, and the gradient norm.

    A step whose loss or gradient is not finite changes no weight, no average and no state of Adam, in any process.
    After ``limit`` such steps in a row nothing changes any more, not even ``number``, however often it is called: the
    host may come to know it late (``failed``), and still finds the weights good and the step's number right.

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
        training: Optimization,
        average: Average | None = None,
    ) -> None:
        device = context.device
        self.accelerator, self.training, self.average = context.accelerator, training, average
        self.number = torch.zeros((), dtype=torch.int64, device=device)
        self.first_key = context.key(stage, training.batch_size)
        self.learning_rate = torch.tensor(training.learning_rate, device=device)
        self.batch: Batch = {}
        self.limit = SKIPPED_IN_A_ROW if context.config.on_nonfinite == "skip" else 1
        self.in_a_row = torch.zeros_like(self.number)  # steps just done that were not finite
        self.skipped = torch.zeros_like(self.number)  # all such steps
        self.norms = torch.full((REMEMBERED,), math.nan, device=device)  # of the gradients, by step modulo their count
        self._late = Late(self.in_a_row)
        # Fused: it takes its learning rate from a tensor on every device.
        self.options: dict[str, Any] = {"lr": self.learning_rate, "fused": True, "capturable": device.type == "cuda"}
        self.optimizer = torch.optim.Adam(objective.parameters(), betas=training.betas, **self.options)
        self.local = objective  # without what shares gradients between processes
        self.objective = context.accelerator.prepare(objective)

    def state_dict(self) -> dict[str, Any]:
        """What ``resume`` takes."""
        return {**self.optimizer.state_dict(), "nonfinite": [int(self.in_a_row), int(self.skipped)]}

    def resume(self, done: int, state: Mapping[str, Any]) -> None:
        """Go on after ``done`` steps with the optimizer's state, which may come from another device."""
        groups = [group | self.options for group in state["param_groups"]]
        self.optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
        in_a_row, skipped = state.get("nonfinite", (0, 0))
        self.in_a_row.fill_(in_a_row)
        self.skipped.fill_(skipped)
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
        losses = self.losses(self.objective)
        self.accelerator.backward(losses["loss"])
        limit = self.training.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), math.inf if limit is None else limit)
        found = {name: loss.detach() for name, loss in losses.items()} | {"grad_norm": norm}
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(torch.stack([x.double() for x in found.values()]), "mean")
            found = dict(zip(found, means, strict=True))
        bad = ~(found["loss"].isfinite() & found["grad_norm"].isfinite())
        ended = self.in_a_row >= self.limit
        self.optimizer.found_inf = (bad | ended).float()  # type: ignore[attr-defined]  # as a GradScaler's: no update
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.number, bad | ended)
        self.norms.index_copy_(0, (self.number % REMEMBERED)[None], norm.float()[None])
        self.in_a_row.copy_(torch.where(ended, self.in_a_row, (self.in_a_row + 1) * bad))
        self.skipped += bad & ~ended
        self.number += ~ended
        return found | ({"skipped": self.skipped.clone()} if self.limit > 1 else {})

    def losses(self, objective: nn.Module) -> dict[str, Tensor]:
        """Of the next step."""
        return objective(self.batch, later_key(self.first_key, self.number * KEYS_PER_STEP), self.number)

    def failed(self, *, wait: bool) -> bool:
        """Whether so many steps in a row were not finite that none changes anything any more.

        Without ``wait`` a GPU is not waited for, and the answer may be some steps old.
        """
        return (int(self.in_a_row) if wait else self._late.read()) >= self.limit

    @property
    def good(self) -> int:
        """How many steps were done when the weights became what they are."""
        return int(self.number - self.in_a_row)

    def largest_norms(self, count: int) -> dict[int, float]:
        """The largest gradient norms of those remembered of the last good steps, by the number of the step."""
        good, norms = self.good, self.norms.tolist()
        last = range(max(0, good + SKIPPED_IN_A_ROW + 1 - REMEMBERED), good)  # older ones are overwritten
        known = {done + 1: norms[done % REMEMBERED] for done in last if math.isfinite(norms[done % REMEMBERED])}
        return dict(sorted(known.items(), key=lambda item: -item[1])[:count])


class Late:
    """Reads a number on a device without waiting for it: what it was when the device was done with an earlier read.

    Args:
        x: int64 scalar.
    """

    def __init__(self, x: Tensor) -> None:
        self.x, self.value = x, 0
        if x.device.type == "cuda":
            self.copy, self.copied = torch.zeros_like(x, device="cpu").pin_memory(), torch.cuda.Event()

    def read(self) -> int:
        if self.x.device.type != "cuda":
            return int(self.x)
        if self.copied.query():
            self.value = int(self.copy)
            self.copy.copy_(self.x, non_blocking=True)
            self.copied.record()
        return self.value


def learning_rate(training: Optimization, done: Tensor) -> Tensor:
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
        self.averaged = [p.detach().clone() for p in module.parameters()]

    @torch.no_grad()
    def update(self, done: Tensor, skip: Tensor) -> None:
        """Take in the parameters after a step; ``done`` (int64 scalar): steps before that one; ``skip`` (bool scalar):
        it changed none, so take in nothing."""
        k = done.double()
        decay = ((1 + k) / (10 + k)).clamp_max(self.decay) * (k > 0)  # the first is a copy
        # Not kept: where they are distributed, their memory changes.
        parameters: list[Tensor] = list(self.module.parameters())
        torch._foreach_lerp_(self.averaged, parameters, [((1 - decay) * ~skip).float()] * len(parameters))

    def state_dict(self) -> dict[str, Tensor]:
        """The module's, with averaged parameters."""
        names = (name for name, _ in self.module.named_parameters())
        return {**self.module.state_dict(), **dict(zip(names, self.averaged, strict=True))}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for (name, _), averaged in zip(self.module.named_parameters(), self.averaged, strict=True):
            averaged.copy_(state[name])
