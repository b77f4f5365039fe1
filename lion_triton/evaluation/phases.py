"""Progress bars of an evaluation, each numbered among all there will be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lion_triton.progress import ProgressBar

Bar = Callable[[str, int, str], ProgressBar]  # title, total, unit


class Phases:
    """Progress bars that say which part of the whole each is, as "3/7 Chamfer distances"."""

    def __init__(self, titles: Sequence[str]) -> None:
        self.titles = list(titles)

    def title(self, name: str) -> str:
        return f"{self.titles.index(name) + 1}/{len(self.titles)} {name}"

    def __call__(self, name: str, total: int, unit: str) -> ProgressBar:
        return ProgressBar(total=total, desc=self.title(name), unit=unit)
