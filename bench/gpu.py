"""``make gpu``: everything that needs a GPU, in one command of eight minutes that installs nothing.

    1. all tests; those of the kernels guard the benchmark of the ops
    2. the whole model's benchmark, to bench/results/models-<gpu>-<commit>.json and .md
    3. the quickstart, from nothing to its picture
    4. the published networks on the embedded shapes: trained for a while, sampled, evaluated
    5. the ops' benchmark, to bench/results/<gpu>-<commit>.json and .md
    6. the census of compiled kernels against what this GPU used

The most informative part comes first, and what a step wrote is in its place before the next begins. Runs with the
Python that runs it. A test module that needs a package which is not installed is reported, not a failure. A step that
fails or is killed at its limit does not stop the next. Exit status: 0 if every step passed, 1 if not, 2 without a GPU.
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
# Seconds at most of each step, and of all; a step that overruns gets GRACE more to write what it has.
TESTS, MODELS, QUICKSTART, FURNITURE, SAMPLED, EVALUATED, OPS, CENSUS = 140, 85, 60, 60, 15, 30, 60, 40
ALL, GRACE = 480, 5
# The published networks for about a minute; at the times measured before steps were captured.
FURNITURE_OPTIONS = (
    "--data.source procedural --data.num-shapes 500 --vae.steps 80 --priors.steps 120 --evaluate-shapes 16 "
    "--picture-every 1000 --checkpoint-every 1000 --sampling.steps 25"
).split()


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
    before = {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    work = Path(tempfile.mkdtemp())
    report = work / "tests.xml"
    outcome: dict[str, str] = {}

    def left(limit: float) -> float:
        """What a step may take so that all end in time."""
        return max(min(limit, ALL - GRACE - (time.monotonic() - start)), 1)

    def written() -> list[Path]:
        return sorted(path for path in RESULTS.iterdir() if before.get(path) != path.stat().st_mtime_ns)

    def end(name: str, problem: str) -> None:
        """Note how a step ended, and copy what there is so far."""
        outcome[name] = problem
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            for path in (*written(), *work.glob("*.*")):
                shutil.copy(path, args.out)

    def run(name: str, limit: float, module: str, *options: str) -> bool:
        limit = left(limit)
        began = time.monotonic()
        problem = words(step(name, [sys.executable, "-m", module, *options], limit), limit)
        print(f"{name}: {time.monotonic() - began:.0f} s")
        end(name, problem)
        return not problem

    commit = [f"--commit={args.commit}"] if args.commit else []
    end("tests", tests("tests", ["tests"], left(TESTS), report))
    seconds = f"--seconds={left(MODELS) - 15:.0f}"
    run("whole model", MODELS, "bench.models", f"--out={RESULTS}", seconds, *commit)

    quickstart, furniture = work / "quickstart", work / "furniture"
    run("quickstart", QUICKSTART, "lion_triton.train", "quickstart", "--out", str(quickstart))
    for picture in quickstart.glob("samples/overview.png"):
        shutil.copy(picture, work / "quickstart.png")
    trained = run("furniture", FURNITURE, "lion_triton.train", "furniture", "--out", str(furniture), *FURNITURE_OPTIONS)
    if trained:
        run("furniture, sampled", SAMPLED, "lion_triton.sample", str(furniture), "--num-samples", "64")
        run("furniture, evaluated", EVALUATED, "lion_triton.evaluate", str(furniture), "--emd", "none")

    # Without a whole report the benchmark runs the kernels' tests again, all compiled by now.
    passed = [f"--guards-passed={report}"] if report.exists() else []
    run("ops", OPS, "bench.driver", f"--out={RESULTS}", f"--seconds={left(OPS) - 15:.0f}", *passed, *commit)
    run("census", CENSUS, "lion_triton.kernels.census", "--check", "--device")

    print(f"\n=== {time.monotonic() - start:.0f} s")
    for name, problem in outcome.items():
        print(f"{name}: {problem or 'passed'}")
    print(f"written: {', '.join(str(path) for path in written()) or 'nothing'}")
    shutil.rmtree(work)
    return int(any(outcome.values()))


def words(status: int | None, limit: float) -> str:
    if status is None:
        return f"stopped at its limit of {limit:.0f} s"
    return f"failed, exit status {status}" if status else ""


if __name__ == "__main__":
    sys.exit(main())
