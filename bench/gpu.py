"""``make gpu``: everything that needs a GPU, in one command of less than nine minutes that installs nothing.

    1. the kernels' tests, which guard the benchmark, then all other tests
    2. the census of compiled kernels against what this GPU used
    3. the benchmark, to bench/results/<gpu>-<commit>.json and .md

Runs with the Python that runs it. A test module that needs a package which is not installed is reported, not a failure.
A step that fails or is killed at its limit does not stop the next. Exit status: 0 if every step passed, 1 if not, 2
without a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.guards import environment, pytest_command  # noqa: E402  (imports nothing but the standard library)

RESULTS = ROOT / "bench" / "results"
# Seconds; a step that overruns gets GRACE more to write what it has. The benchmark takes what the others leave.
KERNEL_TESTS, OTHER_TESTS, CENSUS, ALL, GRACE = 150, 90, 80, 510, 15


def step(name: str, command: list[str], limit: float) -> int | None:
    """Exit status of a command, None if it was stopped at its limit."""
    print(f"\n=== {name}: at most {limit:.0f} s\n{' '.join(command)}", flush=True)
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest then still writes its report
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # itself if it still runs, and workers that outlive it


def tests(name: str, paths: list[str], limit: float, report: Path) -> str:
    """Why these tests did not pass, "" if they did. A report that is not of all of them is renamed ``.partial``."""
    command = pytest_command("--continue-on-collection-errors", f"--junitxml={report}", *paths)
    status = step(name, command, limit)
    # 1 is "tests failed", which missing packages cause too; anything else is an interruption or an internal error.
    if report.exists() and status not in (0, 1):
        report = report.rename(report.with_suffix(".partial"))
    try:
        cases = list(ET.parse(report).iter("testcase"))
    except (OSError, ET.ParseError):
        return f"no report: {words(status, limit)}"
    broken = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    lacking = {case: package for case in broken if (package := missing_package(case))}
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in broken if case not in lacking]
    passed = len(cases) - len(broken) - sum(case.find("skipped") is not None for case in cases)
    for package in sorted(set(lacking.values())):
        names = sorted(c.get("classname") or c.get("name") or "" for c, p in lacking.items() if p == package)
        print(f"not run for want of {package}: {', '.join(dict.fromkeys(names))}")
    print(f"{name}: {passed} passed, {len(failed)} failed, {len(lacking)} not run for want of a package")
    if failed:
        return f"{len(failed)} failed: {', '.join(failed[:5])}"
    return "" if passed and status in (0, 1) else f"{passed} passed, then {words(status, limit)}"


def missing_package(case: ET.Element) -> str:
    """The package of others that this test failed for want of, if that is why."""
    text = " ".join(part for child in case for part in (child.get("message") or "", child.text or ""))
    found = re.search(r"ModuleNotFoundError: No module named '(\w+)", text)
    return found[1] if found and found[1] not in ("lion_triton", "bench", "tests") else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="copy the results here too")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    args = parser.parse_args()
    try:
        import torch

        available = torch.cuda.is_available()
    except ImportError:
        available = False
    if not available:
        print(f"make gpu: needs a CUDA GPU and a Python with torch; {sys.executable} sees none", file=sys.stderr)
        return 2

    start = time.monotonic()
    RESULTS.mkdir(parents=True, exist_ok=True)
    reports = Path(tempfile.mkdtemp())
    guards = reports / "kernel-tests.xml"
    outcome: dict[str, str] = {}

    outcome["kernel tests"] = tests("kernel tests", ["tests/kernels"], KERNEL_TESTS, guards)
    others = ["tests", "--ignore=tests/kernels"]
    outcome["other tests"] = tests("other tests", others, OTHER_TESTS, reports / "other-tests.xml")

    census = [sys.executable, "-m", "lion_triton.kernels.census", "--check", "--device"]
    outcome["census"] = words(step("census", census, CENSUS), CENSUS)

    limit = ALL - GRACE - (time.monotonic() - start)
    benchmark = [sys.executable, "-m", "bench.driver", f"--out={RESULTS}", f"--seconds={limit - 20:.0f}"]
    # Without a whole report the benchmark runs the kernels' tests again, all compiled by now.
    benchmark += [f"--guards-passed={guards}"] if guards.exists() else []
    benchmark += [f"--commit={args.commit}"] if args.commit else []
    before = {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    outcome["benchmark"] = words(step("benchmark", benchmark, limit), limit)
    written = [path for path in RESULTS.iterdir() if before.get(path) != path.stat().st_mtime_ns]

    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        for path in (*written, *reports.iterdir()):
            shutil.copy(path, args.out)
    print(f"\n=== {time.monotonic() - start:.0f} s")
    for name, problem in outcome.items():
        print(f"{name}: {problem or 'passed'}")
    print(f"written: {', '.join(str(path.relative_to(ROOT)) for path in sorted(written)) or 'nothing'}")
    return int(any(outcome.values()))


def words(status: int | None, limit: float) -> str:
    if status is None:
        return f"stopped at its limit of {limit:.0f} s"
    return f"failed, exit status {status}" if status else ""


if __name__ == "__main__":
    sys.exit(main())
