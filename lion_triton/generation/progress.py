"""One bar over pieces of work of which each tells how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

Progress = Callable[[int, int], None]  # (steps done, steps in all)
Begin = Callable[[], Progress]
# The pieces of a batch are ready together: while it runs the bar tells the part that is done.
BAR = "{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}]"


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
    """A bar on the terminal over ``parts`` parts; see :func:`begin_parts`."""
    with tqdm(total=parts, desc=title, bar_format=BAR, disable=None) as bar:
        yield begin_parts(lambda done: _move(bar, done))
        _move(bar, parts)


def _move(bar: tqdm[Any], done: float) -> None:
    bar.update(done - bar.n)
