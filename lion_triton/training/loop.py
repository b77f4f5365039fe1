"""The loop that the stages of training run through: steps, logs, checkpoints, pictures, and how it is stopped."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from lion_triton.capture import Captured, why_uncaptured
from lion_triton.config import EncoderTraining, PriorTraining, VAETraining
from lion_triton.runs import Checkpoint, Stage, save_checkpoint
from lion_triton.training.batches import Batch, prefetch
from lion_triton.training.context import Context
from lion_triton.training.log import Log
from lion_triton.training.step import Average, Step


def fit(
    context: Context,
    stage: Stage,
    objective: nn.Module,
    training: VAETraining | PriorTraining | EncoderTraining,
    batches: Callable[[int], Iterator[Batch]],
    picture: Callable[[int], None] | None,
    checkpoint: Checkpoint | None,
    average: Average | None = None,
    state: Callable[[], Mapping[str, Tensor]] | None = None,
) -> None:
    """Train ``objective`` to the end of its stage, from ``checkpoint`` if that is one of this stage.

    ``batches(start)`` yields what the objective trains on in step ``start``, ``start + 1``, ... and nothing but the
    step's number decides it. ``state`` makes what a checkpoint holds of the model, by default all of LION. The device's
    results are waited for where they are logged or saved, and nowhere else.
    """
    config, accelerator = context.config, context.accelerator
    step = Step(context, stage, objective, training, average)
    start = 0
    if checkpoint is not None and checkpoint.stage == stage:
        start = checkpoint.step
        step.resume(start, checkpoint.optimizer)
    captured = Captured(
        step, f"the step of stage {stage}", not why_uncaptured(context.device, accelerator.num_processes)
    )
    before = config.vae.steps if stage == "priors" else 0
    log = Log(context.run, before + start) if accelerator.is_main_process else None

    def save(done: int) -> None:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            averaged = {} if average is None else average.state_dict()
            model = (state or context.lion.state_dict)()
            reached = Checkpoint(stage, done, model, averaged, step.optimizer.state_dict())
            save_checkpoint(context.run, before + done, reached)
        accelerator.wait_for_everyone()

    def finite(losses: dict[str, Tensor], done: int) -> None:
        if not math.isfinite(losses["loss"].item()):
            raise ValueError(
                f"loss: not finite at step {done} of stage {stage}; a smaller {stage}.learning-rate may help; the last "
                f"checkpoint is kept in {context.run.folder}"
            )

    objective.train()
    bar = tqdm(
        total=training.steps,
        initial=start,
        desc={"vae": "stage 1, VAE", "priors": "stage 2, priors", "encoder": "stage 3, encoders"}[stage],
        unit="step",
        disable=None if accelerator.is_main_process else True,
    )
    clock, clock_step = time.perf_counter(), start
    with bar, stop_requests() as stop, nullcontext() if log is None else closing(log.board):
        for done, batch in enumerate(prefetch(batches(start), context.device), start + 1):
            step.load(batch)
            losses = captured()
            bar.update()

            if done % config.log_every == 0 or done == training.steps:
                finite(losses, done)
                values = dict(zip(losses, torch.stack([x.double() for x in losses.values()]).tolist(), strict=True))
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
            if picture is not None and (done % config.picture_every == 0 or done == training.steps):
                if accelerator.is_main_process:
                    objective.eval()
                    picture(before + done)
                    objective.train()
                accelerator.wait_for_everyone()
            if done % config.log_every == 0:
                clock, clock_step = time.perf_counter(), done
        if stop(accelerator):  # asked for while the last step was being saved
            raise KeyboardInterrupt
    step.optimizer.zero_grad()
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
