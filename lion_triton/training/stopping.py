"""How a run is asked to stop: Ctrl-C, which ends with exit code 130, or SIGTERM, which ends with 0."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """What to do when a signal comes: end at once, or, within ``deferred``, when the program asks.

    Signals go their usual ways but within ``listening``.
    """

    def __init__(self) -> None:
        self.signal = 0  # the last that came
        self._at_once = True
        self._ending = False  # whether it was told to end at once

    @contextmanager
    def listening(self) -> Iterator[None]:
        previous = {s: signal.signal(s, self._receive) for s in SIGNALS}
        try:
            yield
        except Exception:
            if self._ending:  # C code that tries one thing after the other may have taken the end for a failed attempt
                self.now()
            raise
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)

    @contextmanager
    def deferred(self, deferred: bool = True) -> Iterator[None]:
        """In here a signal is only noted; with False it ends the program again, one that is noted already too."""
        before, self._at_once = self._at_once, not deferred
        try:
            if self._at_once and self.signal:
                self.now()
            yield
        finally:
            self._at_once = before

    def asked(self, accelerator: Accelerator) -> bool:
        """Whether any process got a signal; all processes get the same answer."""
        if accelerator.num_processes > 1:
            signals = accelerator.gather(torch.tensor([self.signal], device=accelerator.device))
            self.signal = int(signals.max())
        return self.signal > 0

    def now(self) -> NoReturn:
        """End the program as the signal wants it."""
        self._ending = True
        if self.signal == signal.SIGTERM:
            raise SystemExit(0)
        raise KeyboardInterrupt

    def _receive(self, number: int, _: object) -> None:
        self.signal = number
        if self._at_once:
            self.now()
