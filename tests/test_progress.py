"""Bars: what they show where nobody looks at a terminal."""

from __future__ import annotations

import sys

import pytest

from lion_triton import progress
from lion_triton.progress import ProgressBar, progress_bar


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock)
    return clock


def work(clock: Clock, seconds: int) -> None:
    """A bar of 100 pieces that take ``seconds`` in all, around another."""
    with ProgressBar(total=100, desc="meshes", unit="mesh") as bar:
        for _ in range(100):
            for _ in ProgressBar(range(2), "inner", leave=False):
                pass
            clock.now += seconds / 100
            bar.update()


def test_a_log_gets_a_line_a_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    work(clock, 290)
    text = capsys.readouterr().err
    assert "\r" not in text and "\x1b" not in text
    lines = text.splitlines()
    assert [line.split("%")[0] for line in lines] == [f"meshes: {share:>3}" for share in (4, 25, 46, 67, 88, 100)]
    assert "25/100 [01:12<03:37" in lines[1]


def test_a_log_gets_two_lines_of_what_lasts_half_a_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    work(clock, 30)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("%")[0] for line in lines] == ["meshes:  34", "meshes: 100"]


def test_a_log_gets_nothing_of_what_is_over_soon(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    work(clock, 9)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    work(clock, 5)
    text = capsys.readouterr().err
    assert text.startswith("\rmeshes:   0%") and "100/100" in text


def test_the_main_process_alone_shows_bars(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        work(clock, 300)
    assert capsys.readouterr().err == ""


def test_parts_tell_how_far_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST", "SECONDS"):
        monkeypatch.setattr(progress, name, 0)
    with progress_bar("clouds", 2) as begin:
        for _ in range(2):
            begin()(1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("clouds: 100%") and any(" 50%" in line for line in lines)
