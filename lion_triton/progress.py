"""Bars that tell how far a piece of work is and how long it will last."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from lion_triton.processes import Processes

FIRST, SECONDS = 10, 60  # before the first line of a bar that is no terminal's, and between any two

Progress = Callable[[int, int], None]  # (steps done, steps in all)
Begin = Callable[[], Progress]
# The pieces of a batch are ready together: while it runs the bar tells the part that is done.
BAR = "{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}]"


class _Lines:
    """The standard error as tqdm writes to it, where nobody can move a cursor: one line for each state of a bar."""

    def write(self, text: str) -> None:
        if line := text.replace("\x1b[A", "").strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Nothing is held back."""


class ProgressBar(tqdm):
    """tqdm, with its arguments: on a terminal a bar, and elsewhere (a log, a scheduler's file) a line after
    ten seconds, and then one a minute. Of several processes the main one alone shows anything."""

    def __init__(self, *args: Any, **options: Any) -> None:
        if not Processes.launched().main:
            options |= {"disable": True}
        elif not sys.stderr.isatty():
            options |= {"mininterval": FIRST, "miniters": 1, "delay": FIRST, "file": _Lines()}
        super().__init__(*args, **options)

    def display(self, *args: Any, **options: Any) -> None:
        """Show the state as it is."""
        super().display(*args, **options)
        if not sys.stderr.isatty():
            self.mininterval = SECONDS


def begin_parts(report: Callable[[float], None]) -> Begin:
    """A function that begins the next part and returns what this part calls as it goes on; ``report`` gets how many
    parts are done."""
    begun = 0

    def begin() -> Progress:
        nonlocal begun
        start, begun = begun, begun + 1
        report(start)

        def advance(done: int, total: int) -> None:
            report(start + done / total)

        return advance

    return begin


@contextmanager
def progress_bar(title: str, parts: int) -> Iterator[Begin]:
    """A bar over ``parts`` parts; see :func:`begin_parts`."""
    with ProgressBar(total=parts, desc=title, bar_format=BAR) as bar:
        yield begin_parts(lambda done: _move(bar, done))
        _move(bar, parts)


def _move(bar: ProgressBar, done: float) -> None:
    bar.update(done - bar.n)
