"""The soaks count what becomes of cases, failures too; and a few kills."""

from __future__ import annotations

import time

import pytest

from tests import fresh
from tests.properties.strategies import Draw, size
from tests.soak import properties


def test_every_property_can_be_soaked(capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name, _ in properties.all_properties()]
    assert len(names) > 50 and len(set(names)) == len(names)
    assert properties.main(["--cases", "6", "--only", "metrics.chance", "metrics.figures"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["all", "6", "6"]


def test_failures_are_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(draw: Draw) -> str:
        assert size(draw, 0, 9) < 0, "never"
        return "equal"

    def crash(draw: Draw) -> str:
        return str([][size(draw, 0, 9)])

    def hang(draw: Draw) -> str:
        size(draw, 0, 9)
        time.sleep(5)
        return "equal"

    monkeypatch.setattr(properties, "SECONDS", 1)
    checks = [("wrong", wrong), ("crash", crash), ("hang", hang)]
    monkeypatch.setattr(properties, "all_properties", lambda: iter(checks))
    assert properties.main(["--cases", "3"]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].split() == ["all", "3", "0", "0", "1", "1", "1"]
    assert "AssertionError: never" in err and "IndexError" in err and "no answer after 1 s" in err


def test_killed_runs_end_as_undisturbed_ones() -> None:
    """One kill in one process, one in two. In a process of its own: it forks, and one that has trained cannot."""
    ended = fresh.python("-m", "tests.soak.kills", "--count", "2", "--seed", "0")
    assert ended.returncode == 0, ended.stderr[-3000:]
    head, *rows = (line.split() for line in ended.stdout.replace("in a checkpoint", "writing").splitlines()[-3:])
    counts = [dict(zip(head, map(int, row), strict=True)) for row in rows]
    for processes, count in enumerate(counts, 1):
        assert (count["processes"], count["kills"]) == (processes, 1) and count["equal"] >= 1
