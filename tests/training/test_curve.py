"""What the measurements of a stage say: on curves whose turning points are known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lion_triton.runs import Checkpoint, open_run, save_checkpoint
from lion_triton.training.curve import Curve, Trend
from tests.tiny import tiny_run


def curve(losses: list[float]) -> Curve:
    made = Curve("priors")
    for i, loss in enumerate(losses, 1):
        made.add(10 * i, {"loss": loss})
    return made


def test_trend_is_the_slope_with_students_interval() -> None:
    """By hand for four points: slope 1.1, standard error sqrt(0.35 / 5), t of 2 degrees of freedom 2.920 at 95 %."""
    trend = Trend.of([0, 1, 2, 3], [1.0, 2.5, 3.0, 4.5])
    assert trend is not None
    scale, half = 3 / 2.75, 2.919986 * math.sqrt(0.2 / 2 / 5)
    assert (trend.change, trend.low, trend.high) == pytest.approx(
        (1.1 * scale, (1.1 - half) * scale, (1.1 + half) * scale), rel=1e-5
    )
    assert Trend.of([1, 2], [1.0, 2.0]) is None
    assert Trend.of([1, 2, 3], [1.0, 2.0, math.inf]) is None


def test_a_planted_turn_is_told() -> None:
    """It falls to the sixth measurement and rises from there: what is said after each."""
    losses = [abs(i - 6) * 0.1 + 1 + 0.001 * (i % 2) for i in range(1, 13)]
    verdicts = [curve(losses[:n]).verdict() for n in range(1, 13)]
    assert verdicts[:3] == ["may help or not", "may help or not", "helps"]
    assert verdicts[3:7] == ["helps"] * 4
    assert verdicts[9:] == ["is of no more use"] * 3
    line = curve(losses).line()
    assert line.startswith("stage priors, best by loss on validation shapes: step 60 (1, 6 of 12 measurements ago)")
    assert line.endswith("going on is of no more use")
    assert curve(losses[:2]).line() == (
        "stage priors, best by loss on validation shapes: step 20 (1.4): going on may help or not"
    )


def test_noise_alone_seldom_says_anything() -> None:
    """No trend at all: a twentieth of the curves should be told to fall, by the interval's own probability."""
    rng = np.random.default_rng(0)
    verdicts = [curve((1 + 0.01 * rng.normal(size=12)).tolist()).verdict() for _ in range(300)]
    assert 0.01 < verdicts.count("helps") / 300 < 0.09
    assert verdicts.count("is of no more use") / 300 < 0.09


def test_nothing_is_told_of_a_loss_that_is_not_yet_minimised() -> None:
    """It rises as long as the KL coefficient does, up to step 50, and falls from there, but not as low as at first."""
    losses = [1.0, 2.0, 3.0, 4.0, 5.0, 4.0, 3.0, 2.0]
    made = [Curve("vae", 50, [10 * i for i in range(1, n + 1)], [{"loss": x} for x in losses[:n]]) for n in range(1, 9)]
    assert [c.age for c in made] == [0, 0, 0, 0, 0, 1, 2, 3]
    assert [c.verdict() for c in made] == ["may help or not"] * 6 + ["helps"] * 2
    assert "step 10 (1, 7 of 8 measurements ago); over the last 4 it changed by" in made[-1].line()


def test_what_is_not_finite_is_never_the_best() -> None:
    planted = curve([2.0, math.nan, 1.5, math.inf])
    assert planted.steps[planted.best] == 30 and planted.age == 1
    assert planted.verdict() == "may help or not"
    assert planted.loss_at(40) is None and planted.loss_at(30) is None
    assert curve([2.0, 1.5]).loss_at(20) == 1.5


def test_it_is_read_from_metrics_and_drawn(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run")
    figures = {"validation/loss": 2.0, "validation/shape_1": None}
    lines = [
        {"total_step": 2, "stage": "vae", "step": 2, "validation/loss": 9.0},
        {"total_step": 6, "stage": "priors", "step": 2, "loss": 1.0},
        {"total_step": 6, "stage": "priors", "step": 2, **figures},
        {"total_step": 8, "stage": "priors", "step": 4, "validation/loss": 1.0, "validation/1nna_cd": 0.9},
        {"total_step": 10, "stage": "priors", "step": 6, "validation/loss": 3.0},
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"total_step": 9, "validation/lo')
    read = Curve.read(run, "priors", 4)
    assert read.steps == [2, 4] and read.losses == [2.0, 1.0] and math.isnan(read.figures[0]["shape_1"])
    read.draw(tmp_path / "curves.png")
    width, height = Image.open(tmp_path / "curves.png").size
    assert (width, height) == (1440, 340)


def test_the_best_of_each_stage_is_kept_and_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"^checkpoint: none of .* is known as the best, as none was measured$"):
        run.checkpoint("best")
    losses = [("vae", 3.0), ("vae", 2.0), ("vae", 4.0), ("priors", None), ("priors", 1.0), ("priors", 1.0)]
    for i, (stage, loss) in enumerate([*losses, ("priors", 5.0), ("priors", None)], 10):
        state = Checkpoint(stage, i, {"x": torch.zeros(1)}, {}, {}, loss)  # type: ignore[arg-type]
        save_checkpoint(run, i, state)
    kept = [folder.name for folder in run.checkpoints()]
    assert kept == ["step-00000011", "step-00000014", "step-00000016", "step-00000017"]
    best = open_run(run.folder).checkpoint("best")
    assert best is not None and best.name == "step-00000014"
    assert (vae := run.best("vae")) is not None and vae.name == "step-00000011"
