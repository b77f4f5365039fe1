"""The loop that both stages of training run through: steps, logs, checkpoints, pictures, and how it is stopped."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from lion_triton.config import PriorTraining, TrainConfig, VAETraining
from lion_triton.data.clouds import fixed_batch
from lion_triton.data.sources import Sources
from lion_triton.models.lion import LION
from lion_triton.runs import Checkpoint, Run, Stage, save_checkpoint
from lion_triton.training import report
from lion_triton.training.log import Log


@dataclass
class Context:
    """One process's part in a run: where it computes, what it trains, what it trains on."""

    run: Run
    sources: Sources
    accelerator: Accelerator
    lion: LION

    @property
    def config(self) -> TrainConfig:
        return self.run.config

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def key(self, stage: Stage, number: int) -> Tensor:
        """The noise key ``number`` of a stage; every process draws other noise."""
        seed = (2 * self.config.seed + (stage == "priors")) * 4096 + self.accelerator.process_index
        return torch.tensor([seed, number], device=self.device)

    def share(self, numbers: range) -> range:
        """This process's part of a global batch."""
        size = len(numbers) // self.accelerator.num_processes
        first = numbers.start + size * self.accelerator.process_index
        return range(first, first + size)

    def labels(self, labels: Tensor) -> Tensor | None:
        return labels.to(self.device) if self.config.model.shape_prior.num_classes else None

    def held_out(self, count: int) -> Tensor:
        """The first ``count`` held-out clouds, normalised; classes in turn where they are known."""
        clouds, config = self.sources.held_out, self.config.data
        order = report.in_turn(clouds.labels)[:count]
        return fixed_batch(clouds, order, config.num_points, self.config.seed, self.run.normalization)


def fit(
    context: Context,
    stage: Stage,
    objective: nn.Module,
    training: VAETraining | PriorTraining,
    inputs: Callable[[int], Iterator[tuple[Any, ...]]],
    picture: Callable[[int], None],
    checkpoint: Checkpoint | None,
    ema: AveragedModel | None = None,
) -> None:
    """Train ``objective`` to the end of its stage, from ``checkpoint`` if that is one of this stage.

    ``inputs(start)`` yields the objective's arguments for step ``start``, ``start + 1``, ... and nothing but the
    step's number decides them.
    """
    config, accelerator = context.config, context.accelerator
    optimizer = torch.optim.Adam(objective.parameters(), lr=training.learning_rate, betas=training.betas)
    module = objective
    objective, optimizer = accelerator.prepare(objective, optimizer)
    start = 0
    if checkpoint is not None and checkpoint.stage == stage:
        optimizer.load_state_dict(checkpoint.optimizer)
        start = checkpoint.step
    before = config.vae.steps if stage == "priors" else 0
    log = Log(context.run, before + start) if accelerator.is_main_process else None

    def save(step: int) -> None:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            averaged = {} if ema is None else ema.module.state_dict()
            state = Checkpoint(stage, step, context.lion.state_dict(), averaged, optimizer.state_dict())
            save_checkpoint(context.run, before + step, state)
        accelerator.wait_for_everyone()

    module.train()

    def finite(losses: dict[str, Tensor], step: int) -> None:
        if not math.isfinite(losses["loss"].item()):
            raise ValueError(
                f"loss: not finite at step {step} of stage {stage}; a smaller {stage}.learning-rate may help; the last "
                f"checkpoint is kept in {context.run.folder}"
            )

    bar = tqdm(
        total=training.steps,
        initial=start,
        desc={"vae": "stage 1, VAE", "priors": "stage 2, priors"}[stage],
        unit="step",
        disable=None if accelerator.is_main_process else True,
    )
    clock, clock_step = time.perf_counter(), start
    with bar, stop_requests() as stop, nullcontext() if log is None else closing(log.board):
        for step, arguments in zip(range(start, training.steps), inputs(start), strict=False):
            decay = 0.5 * (1 + math.cos(math.pi * step / training.steps))
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate * (decay if training.learning_rate_decay == "cosine" else 1)
            # Dropout: other masks in every step and process, the same when the run is continued.
            torch.manual_seed((config.seed << 32) + (accelerator.process_index << 26) + before + step)
            losses = objective(*arguments)
            accelerator.backward(losses["loss"])
            limit = training.max_grad_norm if training.max_grad_norm is not None else math.inf
            grad_norm = accelerator.clip_grad_norm_(objective.parameters(), limit)
            optimizer.step()
            optimizer.zero_grad()
            if ema is not None:
                ema.update_parameters(module)
            bar.update()
            done = step + 1

            if done % config.log_every == 0 or done == training.steps:
                finite(losses, done)
                values = {name: value.item() for name, value in losses.items()} | {"grad_norm": float(grad_norm)}
                if stage == "vae":
                    values["kl_coefficient"] = arguments[-1]
                elapsed = time.perf_counter() - clock
                values["shapes_per_second"] = (done - clock_step) * training.batch_size / elapsed
                bar.set_postfix_str(f"loss {values['loss']:.4g}, {values['shapes_per_second']:.0f} shapes/s")
                if log is not None:
                    log.write(stage, done, before + done, values)
            stopping = stop(accelerator)
            if stopping or done % config.checkpoint_every == 0 or done == training.steps:
                finite(losses, done)
                save(done)
            if stopping:
                accelerator.print(f"\nstopped after step {done} of stage {stage}; the same command continues")
                raise KeyboardInterrupt
            if done % config.picture_every == 0 or done == training.steps:
                if accelerator.is_main_process:
                    module.eval()
                    picture(before + done)
                    module.train()
                accelerator.wait_for_everyone()
            if done % config.log_every == 0:
                clock, clock_step = time.perf_counter(), done
        if stop(accelerator):  # asked for while the last step was being saved
            raise KeyboardInterrupt
    accelerator.free_memory()


@contextmanager
def stop_requests() -> Iterator[Callable[[Accelerator], bool]]:
    """Ctrl-C or SIGTERM lets the step finish and asks for a checkpoint instead of breaking off.

    Yields a function that says whether to stop; all processes get the same answer.
    """
    requested = False

    def request(*_: object) -> None:
        nonlocal requested
        requested = True

    previous = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:

        def stop(accelerator: Accelerator) -> bool:
            if accelerator.num_processes == 1:
                return requested
            anyone = accelerator.reduce(torch.tensor(float(requested), device=accelerator.device), "max")
            return bool(anyone.item() > 0)

        yield stop
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
