"""Batches on their way to the device. A batch is a dict of tensors, the arguments of a stage's objective."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lion_triton.data.clouds import TrainingStream
from lion_triton.training.stopping import SIGNALS

Batch = dict[str, Tensor]


def read(stream: TrainingStream, samples: list[range], workers: int) -> DataLoader[Any]:
    """``(points, labels, indices of the clouds)`` of each range of sample numbers, in order."""
    batches: Any = samples  # ranges, not lists: the published recipe has hundreds of millions of sample numbers
    return DataLoader(stream, batch_sampler=batches, num_workers=workers, worker_init_fn=_outlive_signals)


def _outlive_signals(_: int) -> None:
    """Signals often go to every process of a run; its own processes end the readers, when they have saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def prefetch(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on ``device``: on a GPU the next one is read and copied while the present one is worked on."""
    if device.type != "cuda":
        yield from ({name: x.to(device) for name, x in batch.items()} for batch in batches)
        return
    stream = torch.cuda.Stream(device)

    def copy(batch: Batch) -> Batch:
        with torch.cuda.stream(stream):
            return {name: x.pin_memory().to(device, non_blocking=True) for name, x in batch.items()}

    upcoming = next(batches, None)
    copied = None if upcoming is None else copy(upcoming)
    while copied is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for x in copied.values():
            x.record_stream(current)  # its memory may be taken again when the present stream is done with it
        yield copied  # and the consumer enqueues its work
        upcoming = next(batches, None)
        copied = None if upcoming is None else copy(upcoming)
