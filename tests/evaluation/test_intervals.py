"""Intervals and floors on sets of points of a source that can be drawn from again, so that the truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lion_triton import metrics
from lion_triton.evaluation import floors, intervals
from lion_triton.evaluation.intervals import FEWEST, PART, SUBSETS
from lion_triton.evaluation.sets import Preparation
from lion_triton.kernels import approx_emd, chamfer_distance
from lion_triton.metrics import Comparison, Distances, Measures
from tests.evaluation import clouds, source


def compared(a: np.ndarray, b: np.ndarray) -> Comparison:
    """Points (S, D) in place of clouds, with their squared distances."""

    def distances(x: np.ndarray, y: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.square(x[:, None] - y[None]).sum(-1))

    def measures(x: np.ndarray) -> Measures:
        lengths = torch.from_numpy(np.exp(0.3 * x))
        return Measures(np.digitize(x[:, :1], np.linspace(-2, 2, 9)), lengths[:, 0], lengths[:, 1])

    return Comparison({"cd": Distances(distances(a, a), distances(a, b), distances(b, b))}, measures(a), measures(b))


def test_intervals_hold_the_truth_about_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Normal points and shifted ones: the truth and how it spreads by many more sets of the same two sources."""
    monkeypatch.setattr(intervals, "SUBSETS", 60)
    rng = np.random.default_rng(0)

    def drawn() -> Comparison:
        return compared(rng.normal((0.7, 0, 0, 0), 1, (80, 4)), rng.normal(size=(60, 4)))

    many = [drawn().figures() for _ in range(300)]
    trials = [intervals.intervals(drawn(), rng, lambda _: None) for _ in range(60)]
    for name in ("1nna_cd", "cov_cd", "mmd_cd", "jsd", "thickness", "unevenness"):
        truth, spread = np.mean([of[name] for of in many]), np.std([of[name] for of in many])
        ends = np.array([of[name] for of in trials])
        held = ((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean()
        width = np.ptp(ends, axis=1).mean() / (2 * 1.96 * spread)
        assert held >= 0.87, name
        assert 0.75 < width < 1.5, (name, width)


def test_a_subset_holds_no_shape_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, taken, counted = clouds(41, 1, 1)[:, 0], clouds(50, 1, 2)[:, 0], list[Any](), list[int]()
    some = Comparison.some

    def noted(self: Comparison, *rows: np.ndarray) -> Comparison:
        taken.append(rows)
        return some(self, *rows)

    monkeypatch.setattr(Comparison, "some", noted)
    found = intervals.intervals(compared(a, b), np.random.default_rng(0), counted.append)
    assert len(taken) == sum(counted) == SUBSETS
    for rows in taken:
        assert [len(set(part.tolist())) for part in rows] == [len(part) for part in rows] == [41 // PART, 50 // PART]
    assert set(np.concatenate([rows[0] for rows in taken])) == set(range(41))
    taken.clear()
    intervals.halves(compared(a, b), np.random.default_rng(0), counted.append)
    assert all(len(set(np.concatenate(rows).tolist())) == 50 for rows in taken)  # neither half holds one of the other
    assert sum(counted) == intervals.num_subsets(41, 50)
    assert found == intervals.intervals(compared(a, b), np.random.default_rng(0), counted.append)


def test_of_few_shapes_there_is_no_interval() -> None:
    rng, few = np.random.default_rng(0), clouds(FEWEST - 1, 1, 1)[:, 0]
    for a, b in ((few, clouds(FEWEST, 1, 2)[:, 0]), (clouds(FEWEST, 1, 2)[:, 0], few)):
        assert intervals.intervals(compared(a, b), rng, lambda _: None) == {}
        assert intervals.halves(compared(a, b), rng, lambda _: None) == ({}, {})
        assert intervals.num_subsets(len(a), len(b)) == 0
    assert intervals.num_subsets(FEWEST, FEWEST) == intervals.num_subsets(1, 2 * FEWEST) == SUBSETS


def test_intervals_end_where_figures_do() -> None:
    rng = np.random.default_rng(0)
    far = intervals.intervals(compared(clouds(40, 1, 1)[:, 0], clouds(40, 1, 2)[:, 0] + 9), rng, lambda _: None)
    assert far["1nna_cd"] == (1, 1)
    near = compared(clouds(90, 1, 1, 1.0)[:, 0], clouds(90, 1, 2, 1.0)[:, 0] + 2)
    low, high = intervals.intervals(near, rng, lambda _: None)["1nna_cd"]
    assert low < near.figures()["1nna_cd"] < high <= 1
    same = compared(np.zeros((40, 3)), np.zeros((40, 3)))
    assert intervals.intervals(same, rng, lambda _: None)["mmd_cd"] == (0, 0)


def test_the_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).exponential(size=400)
    low, high = intervals.of_mean(values) or (0, 0)
    assert (low + high) / 2 == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std(ddof=1) / 20)
    assert intervals.of_mean(values[: FEWEST - 1]) is None
    assert intervals.of_mean(np.array([np.nan])) is None


def test_one_half_of_the_references_against_the_other() -> None:
    """Whatever the samples: 1-NNA is chance, and the rest what other sets of half the size get."""
    rng = np.random.default_rng(1)
    b = rng.normal(size=(60, 3))
    found, ends = intervals.halves(compared(rng.normal(size=(25, 3)) + 5, b), rng, lambda _: None)
    assert found["1nna_cd"] == pytest.approx(metrics.chance_accuracy(30, 30), abs=0.012)
    many = [compared(rng.normal(size=(30, 3)), rng.normal(size=(30, 3))).figures() for _ in range(200)]
    for name, value in found.items():
        values = [of[name] for of in many]
        assert abs(value - np.mean(values)) < 3 * np.std(values), name
        assert ends[name][0] < value < ends[name][1], name
    assert found["mmd_cd"] < 1 < compared(rng.normal(size=(25, 3)) + 5, b).figures()["mmd_cd"]


def test_a_second_draw_takes_none_of_the_first_points() -> None:
    whole = source(clouds(3, 50, 0))
    prepare = Preparation("first10k", 4)
    first, again = (prepare(whole, 20, 7, again=second) for second in (False, True))
    for i in range(3):
        points = {tuple(p) for p in whole[i].tolist()}
        one, two = ({tuple(p) for p in draw[i].tolist()} for draw in (first, again))
        assert len(one) == len(two) == 20
        assert not one & two
        assert one | two < points
    assert np.array_equal(again, prepare(whole, 20, 7, again=True))
    rest = prepare(whole, 25, 7, again=True)
    assert {tuple(p) for p in np.concatenate([rest[0], prepare(whole, 25, 7)[0]]).tolist()} == {
        tuple(p) for p in whole[0].tolist()
    }


def test_the_floor_of_other_points_is_between_two_draws_of_a_shape() -> None:
    a, b = (torch.from_numpy(clouds(6, 30, seed)) for seed in (1, 2))
    got = floors.redrawn(a, b, Measures.of(b), "approx")
    whole = metrics.evaluate(a, b)
    assert got == {
        "mmd_cd": pytest.approx(chamfer_distance(a, b).mean().item(), rel=1e-6),
        "mmd_emd": pytest.approx(approx_emd(b, a).mean().item(), rel=1e-6),
        "jsd": whole["jsd"],
        "thickness": whole["thickness"],
        "unevenness": whole["unevenness"],
    }
    assert "mmd_emd" not in floors.redrawn(a, b, Measures.of(b), None)


def test_the_floor_beside_a_figure_is_the_first_there_is() -> None:
    kinds = {"redrawn": {"jsd": 1.0, "mmd_cd": 2.0, "cov_cd": 3.0}, "halves": {"jsd": 4.0, "mmd_cd": 5.0}}
    record = {"floors": kinds | {"fresh": {"jsd": 6.0, "mmd_cd": None}}, "references": {"clouds": 41}}
    names = ("jsd", "mmd_cd", "cov_cd", "1nna_cd")
    assert [floors.floor(record, n) for n in names] == [("fresh", 6), ("halves", 5), ("redrawn", 3), None]
