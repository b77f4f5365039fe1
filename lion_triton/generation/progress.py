"""One bar over pieces of work of which each tells how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Progress = Callable[[int, int], None]  # (steps done, steps in all)
Begin = Callable[[], Progress]
# The pieces of a batch are ready together: while it runs the bar tells the part that is done.
BAR = "{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}]"


@contextmanager
def progress_bar(title: str, parts: int) -> Iterator[Begin]:
    """Yields a function that begins the next part and returns what this part calls as it goes on."""
    with tqdm(total=parts, desc=title, bar_format=BAR, disable=None) as bar:
        begun = 0

        def begin() -> Progress:
            nonlocal begun
            start, begun = begun, begun + 1
            bar.update(start - bar.n)

            def advance(done: int, total: int) -> None:
                bar.update(start + done / total - bar.n)

            return advance

        yield begin
        bar.update(parts - bar.n)
