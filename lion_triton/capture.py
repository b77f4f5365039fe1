"""Steps without the host: the launches of a function, captured in a CUDA graph once and replayed as one.

What is captured takes no arguments. Whatever changes from call to call lives in tensors that stay where they are and
that the function itself moves on (a step's number, a noise key, the state of a sampler), or that the caller copies into
(a batch); Python's own values are frozen at capture. Nothing inside may wait for the device.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from tqdm import tqdm

T = TypeVar("T")
AHEAD = 2  # replays that the host may be ahead of the device: neither waits, and progress tells what is nearly done
WARM_UPS = 2  # the first call compiles kernels and makes the optimizer's state, the second finds all as it stays


def why_uncaptured(device: torch.device, processes: int = 1) -> str:
    """Why steps on ``device`` cannot be captured, in words; empty where they can."""
    if device.type != "cuda":
        return f"there are none on a {device.type.upper()}"
    return f"{processes} processes take part" if processes > 1 else ""


class Captured(Generic[T]):
    """``function``, called uncaptured at first, then as a CUDA graph; either gives the same bits.

    Every call does the function's work exactly once: the first ``WARM_UPS`` launch it as usual. The tensors that it
    returns are the same in every replay, so the next call overwrites them. Should it refuse to be captured, one line
    says why and it goes on uncaptured.

    Args:
        function: leaves nothing behind in Python that its next call depends on.
        name: what it is, for that line.
        enabled: whether to capture at all; see ``why_uncaptured``.
    """

    def __init__(self, function: Callable[[], T], name: str, enabled: bool) -> None:
        self.function, self.name, self.enabled = function, name, enabled
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._out: T
        self._replays: deque[torch.cuda.Event] = deque()
        # Backward passes run on the streams of their forward passes: all calls, captured or not, must share one.
        self._stream = torch.cuda.Stream() if enabled else None

    def __call__(self) -> T:
        if not self.enabled:
            return self.function()
        if self._graph is None and self._calls >= WARM_UPS:
            self._capture()
        if self._graph is not None:
            self._graph.replay()
            event = torch.cuda.Event()
            event.record()
            self._replays.append(event)
            if len(self._replays) > AHEAD:
                self._replays.popleft().synchronize()
            return self._out
        self._calls += 1
        return self._launch()

    def _launch(self) -> T:
        assert self._stream is not None
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), _own_casts():
            out = self.function()
        current.wait_stream(self._stream)
        return out

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as one that pins memory, may go on meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"), _own_casts():
                self._out = self.function()
            self._graph = graph
        except RuntimeError as error:
            while isinstance(error.__context__, RuntimeError):  # ending a capture that failed fails, too
                error = error.__context__
            self.enabled = False
            reason = str(error).strip().partition("\n")[0]
            tqdm.write(f"{self.name} runs launch by launch, not as a CUDA graph: {reason}", file=sys.stderr)


@contextmanager
def _own_casts() -> Iterator[None]:
    """Autocast keeps casts of the weights until its context ends, here perhaps outside of the graph that reads them."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
