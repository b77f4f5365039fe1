"""The one way of timing. A round is: prepare (untimed), empty the caches, read the clock, call, read the clock.

GPU: CUDA events around one call. Before it 2 GiB are read, which fills the L2 cache with other, clean lines and keeps
the GPU busy while the host enqueues the call: what is measured is the GPU's time, not the host's, as long as the host
is done by then (about half a millisecond at 4 TB/s). What a call costs the host is ``call_seconds``.
CPU: ``perf_counter`` around one call, with the caches as the call before left them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

Prepare = Callable[[], Any]
Call = Callable[[Any], Any]
Repeat = Callable[[Prepare, Call, int], list[float]]


class Instant:
    """A point in the GPU's stream; the difference of two is in seconds and waits for the later one."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Instant) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def clock() -> Any:
    """Now, on a GPU if there is one; differences are seconds."""
    return Instant() if torch.cuda.is_available() else time.perf_counter()


@cache
def _scratch() -> Tensor:
    return torch.zeros(2**28, device="cuda")


def empty_caches() -> None:
    if torch.cuda.is_available():
        for _ in range(2):
            _scratch().sum()


def repeat(prepare: Prepare, call: Call, rounds: int) -> list[float]:
    """Seconds of each of so many rounds of ``call(prepare())``."""
    samples = []
    for _ in range(rounds):
        state = prepare()
        empty_caches()
        start = clock()
        call(state)
        samples.append(clock() - start)
    return samples


def call_seconds(prepare: Prepare, call: Call, calls: int) -> float:
    """Seconds per call of calls back to back on a GPU: the host's time or the GPU's, whichever is longer."""
    state = prepare()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call(state)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls
