"""The loop that the stages of training run through: steps, logs, checkpoints, pictures, and how it is stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from lion_triton.capture import Captured, why_uncaptured
from lion_triton.config import Optimization
from lion_triton.progress import ProgressBar
from lion_triton.runs import Checkpoint, Stage, save_checkpoint
from lion_triton.training.batches import Batch, prefetch
from lion_triton.training.context import Context
from lion_triton.training.log import Log
from lion_triton.training.nonfinite import explain
from lion_triton.training.step import Average, Step
from lion_triton.training.validation import Measure, Watch


def fit(
    context: Context,
    stage: Stage,
    objective: nn.Module,
    training: Optimization,
    batches: Callable[[int], Iterator[Batch]],
    clouds: Callable[[int], list[str]],
    checkpoint: Checkpoint | None,
    *,
    title: str,
    before: int = 0,
    key: Tensor | None = None,
    average: Average | None = None,
    state: Callable[[], Mapping[str, Tensor]] | None = None,
    picture: Callable[[int], None] | None = None,
    measure: Measure | None = None,
) -> None:
    """Train ``objective`` to the end of its stage, from ``checkpoint`` if that is one of this stage.

    The device's results are waited for where they are logged, measured or saved, and nowhere else.

    Args:
        batches: ``batches(start)`` yields what the objective trains on in step ``start``, ``start + 1``, ..., which
            nothing but the step's number decides.
        clouds: ``clouds(start)`` names the clouds of step ``start``, those of all processes.
        checkpoint: the model's weights are those in it already.
        title: of the progress bar.
        before: steps of the folder's checkpoints and log before this stage's first.
        key: of the first step's noise; default: that of the stage in a run.
        state: makes what a checkpoint holds of the model; default: all of LION.
        picture: draws one, of that number of steps.
        measure: tells how well it does on validation shapes, and changes nothing; None: nobody asks.

    Raises:
        ValueError: a loss or a gradient is not finite, or ten in a row are not where they are skipped; the weights
            before it are saved.
        KeyboardInterrupt, SystemExit: asked to stop; the last step is saved.
    """
    config, accelerator, stop = context.config, context.accelerator, context.stop
    step = Step(context, stage, objective, training, average)
    if key is not None:
        step.first_key = key
    start = 0
    if checkpoint is not None and checkpoint.stage == stage:
        start = checkpoint.step
        step.resume(start, checkpoint.optimizer)
        if average is not None:
            average.load_state_dict(checkpoint.ema)
    captured = Captured(
        step, f"the step of stage {stage}", not why_uncaptured(context.device, accelerator.num_processes)
    )
    watch = None if measure is None else Watch(context, stage, training, start, measure)
    accelerator.wait_for_everyone()  # all have read what was measured so far
    log = Log(context.run, before + start) if accelerator.is_main_process else None
    losses: dict[str, Tensor] = {}
    clock, clock_step, saved = time.perf_counter(), start, start

    def write(done: int) -> None:
        values = dict(zip(losses, torch.stack([x.double() for x in losses.values()]).tolist(), strict=True))
        values["shapes_per_second"] = (done - clock_step) * training.batch_size / (time.perf_counter() - clock)
        bar.set_postfix_str(f"loss {values['loss']:.4g}, {values['shapes_per_second']:.0f} shapes/s", refresh=False)
        if log is not None:
            log.write(stage, done, before + done, values)

    def save(done: int) -> None:
        nonlocal saved
        if done == saved > start:  # when it was measured
            return
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            averaged = {} if average is None else average.state_dict()
            model = (state or context.lion.state_dict)()
            kept = Checkpoint(stage, done, model, averaged, step.state_dict())
            if watch is not None:
                kept = replace(kept, loss=watch.curve.loss_at(done), ended=watch.ended)
            save_checkpoint(context.run, before + done, kept)
        accelerator.wait_for_everyone()
        saved = done

    def validate(done: int) -> None:
        assert watch is not None
        objective.eval()
        try:  # what is measured can be measured again, too
            with stop.deferred(accelerator.num_processes > 1):
                watch(done, before + done, log)
        except (KeyboardInterrupt, SystemExit):
            save(done)
            raise
        objective.train()
        if watch.curve.steps[watch.curve.best] == done or watch.ended:
            save(done)

    def draw(done: int) -> None:
        if picture is None:
            return
        # What is saved and drawn can be drawn again, so a signal need not wait for it; but processes that wait for this
        # one would not see it end.
        if saved < done:
            save(done)
        with stop.deferred(accelerator.num_processes > 1):
            if accelerator.is_main_process:
                objective.eval()
                picture(before + done)
                objective.train()
                if watch is not None:
                    watch.draw()
            accelerator.wait_for_everyone()

    # What is done every so many steps and after the last, in this order.
    tasks = [(config.log_every, write), (config.checkpoint_every, save), (config.picture_every, draw)]
    if watch is not None:
        tasks.insert(1, (config.validate_every, validate))
    to_stop = [(config.log_every, write), (1, save)]

    objective.train()
    bar = ProgressBar(
        total=training.steps,
        initial=start,
        desc=title,
        unit="step",
    )
    with bar, stop.deferred(), nullcontext() if log is None else closing(log.board):
        if watch is not None and watch.missed(start):
            validate(start)
        upcoming = iter(()) if watch is not None and watch.ended else prefetch(batches(start), context.device)
        for done, batch in enumerate(upcoming, start + 1):
            step.load(batch)
            losses = captured()
            bar.update()
            stopping = stop.asked(accelerator)
            due = [do for every, do in (to_stop if stopping else tasks) if done % every == 0 or done == training.steps]
            # All processes must come to know it at the same step.
            if step.failed(wait=bool(due) or accelerator.num_processes > 1):
                good = step.good
                if good > saved:
                    save(good)
                batch, share = next(prefetch(batches(good), context.device)), context.share(range(training.batch_size))
                raise ValueError(explain(context, stage, step, batch, clouds(good), share))
            for do in due:
                do(done)
            if stopping:
                accelerator.print(f"\nstopped after step {done} of stage {stage}; the same command continues")
                stop.now()
            if watch is not None and watch.ended:
                for do in [do for do in (write, draw) if do not in due]:
                    do(done)
                accelerator.print(f"\nstage {stage} ends after step {done}: --patience {config.patience} is at its end")
                break
            if write in due:
                clock, clock_step = time.perf_counter(), done
        if stop.asked(accelerator):  # while the last step was being saved
            stop.now()
    if watch is not None:
        accelerator.print(f"\n{watch.curve.line()}")
    step.optimizer.zero_grad()
    accelerator.free_memory()
