"""The tests that guard the ops: an op whose tests fail gets no number."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]


def pytest_command(*arguments: str) -> list[str]:
    """pytest by this interpreter, on several cores where xdist is installed."""
    # Some tests take a minute, others milliseconds: none may wait behind a long one.
    workers = ["-n", str(os.cpu_count() or 1), "--dist", "worksteal"] if find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, *arguments]


def environment() -> dict[str, str]:
    """For a child process: this checkout first, one thread per process."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run(files: Iterable[str]) -> Path:
    """Run these test files; return their JUnit report, which is missing or partial if pytest broke off."""
    report = Path(tempfile.mkdtemp()) / "guards.xml"
    present = sorted(file for file in set(files) if (ROOT / file).exists())  # pytest refuses all for one that is not
    command = pytest_command("--continue-on-collection-errors", f"--junitxml={report}", *present)
    subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return report


def failures(report: Path, files: Iterable[str]) -> dict[str, str]:
    """Why each of these files does not vouch for its ops: empty if it passed, by a JUnit report of pytest's."""
    try:
        cases = list(ET.parse(report).iter("testcase"))
    except (OSError, ET.ParseError):
        return {file: f"{file}: its tests did not finish" for file in files}
    return {file: _failure(file, cases) for file in files}


def _failure(file: str, cases: list[ET.Element]) -> str:
    module = file.removesuffix(".py").replace("/", ".")
    # A test is of class tests.test_x or tests.test_x.TestY; a file that cannot be imported is one case, by name.
    mine = [c for c in cases if f"{c.get('classname') or c.get('name')}.".startswith(f"{module}.")]
    failed = [str(c.get("name")) for c in mine if c.find("failure") is not None or c.find("error") is not None]
    if failed:
        return f"{file}: {len(failed)} of {len(mine)} tests fail, {failed[0]} the first"
    passed = sum(c.find("skipped") is None for c in mine)
    return "" if passed else f"{file}: none of its tests ran"
