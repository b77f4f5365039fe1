"""When to stop: the measurements of a stage on validation shapes, and what they say."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import stats

from lion_triton.pictures import Panel, draw_curves
from lion_triton.runs import Run, Stage

PREFIX = "validation/"  # of its figures in metrics.jsonl and TensorBoard
FIGURE = "loss"  # decides which checkpoint is the best: the lowest
WINDOW = 6  # measurements that the trend is fitted to
OLD = 3  # measurements after which a best one may have been the last
CONFIDENCE = 0.9
PARTS = "1234"  # of the schedule, the least noise first
PANELS: dict[Stage, dict[str, tuple[str, ...]]] = {
    "vae": {
        "loss at the final KL coefficient": (FIGURE,),
        "KL, nats per shape": ("kl_z", "kl_h_xyz", "kl_h_feature"),
        "Chamfer distance to shapes": ("chamfer", "chamfer_perturbed", "chamfer_normal"),
    },
    "priors": {
        "loss of both priors": (FIGURE,),
        "shape prior, by noise (1: least)": ("shape", *(f"shape_{i}" for i in PARTS)),
        "point prior, by noise (1: least)": ("point", *(f"point_{i}" for i in PARTS)),
        "generated shapes": ("1nna_cd", "thickness", "unevenness"),
    },
}

Verdict = Literal["helps", "is of no more use", "may help or not"]


@dataclass(frozen=True)
class Trend:
    """How a figure changes from the first to the last of some measurements, as a share of its mean there.

    The slope of the straight line through them (least squares), and its interval of 90 % (Student's t).
    """

    change: float
    low: float
    high: float

    @classmethod
    def of(cls, steps: list[int], values: list[float]) -> Trend | None:
        """None of fewer than three measurements, or where one is not finite."""
        if len(steps) < 3 or not all(map(math.isfinite, values)):
            return None
        fit = stats.linregress(steps, values)
        scale = (steps[-1] - steps[0]) / (abs(float(np.mean(values))) or 1.0)
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(steps) - 2) * fit.stderr)
        return cls(fit.slope * scale, (fit.slope - half) * scale, (fit.slope + half) * scale)

    def __str__(self) -> str:
        return f"{self.change:+.1%} (90 % interval {self.low:+.1%} to {self.high:+.1%})"


@dataclass
class Curve:
    """The measurements of a stage, oldest first, and what follows from them.

    Going on helps where all of the interval of the trend over the last six measurements says that the loss falls. It is
    of no more use where that interval excludes that it falls, and the best is older than three measurements: noise
    alone makes the last ones no better than one before them often, and seldom gives them a rising trend as well. Else
    it may help or not.

    ``settled``: the step from which on the loss that is measured is the one that is minimised. As long as the KL
    coefficient rises it is another one, which may well get worse: no trend is told, and no patience lost.
    """

    stage: Stage
    settled: int = 0
    steps: list[int] = field(default_factory=list)
    figures: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def read(cls, run: Run, stage: Stage, step: int, settled: int = 0) -> Curve:
        """What metrics.jsonl says of the first ``step`` steps of a stage."""
        curve = cls(stage, settled)
        for line in run.metrics.read_text().splitlines() if run.metrics.exists() else []:
            if f'"{PREFIX}' not in line:
                continue
            try:
                record = json.loads(line)
            except ValueError:  # a line that a killed process left unfinished
                continue
            if record["stage"] == stage and record["step"] <= step:
                found = {k.removeprefix(PREFIX): v for k, v in record.items() if k.startswith(PREFIX)}
                curve.add(record["step"], {k: math.nan if v is None else v for k, v in found.items()})
        return curve

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        self.steps.append(step)
        self.figures.append(dict(figures))

    @property
    def losses(self) -> list[float]:
        """Infinite where they are not finite."""
        losses = (figures[FIGURE] for figures in self.figures)
        return [x if math.isfinite(x) else math.inf for x in losses]

    @property
    def best(self) -> int:
        """The index of the best measurement, of which there is at least one; of several equal ones the first."""
        return int(np.argmin(self.losses))

    @property
    def age(self) -> int:
        """Measurements since the best, or since the first settled one if that was later; 0 before."""
        settled = sum(step >= self.settled for step in self.steps)
        return min(len(self.steps) - 1 - self.best, max(settled - 1, 0)) if self.steps else 0

    def loss_at(self, step: int) -> float | None:
        """What was measured last, if it was after ``step`` steps and is finite."""
        return self.losses[-1] if self.steps and self.steps[-1] == step and math.isfinite(self.losses[-1]) else None

    def trend(self) -> Trend | None:
        """Of the loss over the last measurements, settled ones."""
        return Trend.of(*self._last())

    def _last(self) -> tuple[list[int], list[float]]:
        first = max(len(self.steps) - WINDOW, sum(step < self.settled for step in self.steps))
        return self.steps[first:], self.losses[first:]

    def verdict(self) -> Verdict:
        """Whether going on helps."""
        trend = self.trend()
        if trend is not None and trend.high < 0:
            return "helps"
        return "is of no more use" if trend is not None and trend.low >= 0 and self.age > OLD else "may help or not"

    def line(self) -> str:
        """The best checkpoint, by which figure, and whether going on helps. Takes at least one measurement."""
        since = len(self.steps) - 1 - self.best
        ago = f", {since} of {len(self.steps)} measurements ago" if since else ""
        best = f"best by loss on validation shapes: step {self.steps[self.best]} ({self.losses[self.best]:.4g}{ago})"
        trend = self.trend()
        last = "" if trend is None else f"; over the last {len(self._last()[0])} it changed by {trend}"
        return f"stage {self.stage}, {best}{last}: going on {self.verdict()}"

    def draw(self, path: Path) -> None:
        """Draw all figures, and mark the best step."""
        panels: list[Panel] = []
        for title, names in PANELS[self.stage].items():
            curves = {}
            for name in names:
                known = [(s, f[name]) for s, f in zip(self.steps, self.figures, strict=True) if name in f]
                curves[name] = ([s for s, _ in known], [v for _, v in known])
            panels.append((title, curves))
        draw_curves(panels, path, title=self.line(), mark=self.steps[self.best])
