"""Random arguments of every public function: each is answered as its specification says, or refused, and nothing else.

    python -m tests.soak.properties --cases 10000

runs that many cases, equally many of each property of ``tests/properties``, and prints of each how many were equal to
the specification and how many refused, and how often each kind of failure occurred; the first case of every failure
goes to stderr. It ends with exit code 1 if there was any. The cases are the same ones every time.
"""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tqdm import tqdm

import tests.conftest  # noqa: F401  tells Triton to interpret where there is no GPU, before any kernel is defined
from tests import properties
from tests.properties.strategies import Check

SECONDS = 60  # that a case may take
FAILURES = ("wrong", "hang", "exception")


def all_properties() -> Iterator[tuple[str, Check]]:
    """``family.function`` of every property, and its check."""
    for file in sorted(Path(properties.__path__[0]).glob("test_*.py")):
        for name, test in vars(import_module(f"tests.properties.{file.stem}")).items():
            if name.startswith("test_"):
                yield f"{file.stem.removeprefix('test_')}.{name.removeprefix('test_')}", test.check


class Hang(Exception):
    pass


def _out_of_time(*_: Any) -> None:
    raise Hang(f"no answer after {SECONDS} s")


def tried(name: str, check: Check, cases: int, bar: Any) -> Counter[str]:
    """What became of ``cases`` cases."""
    counts: Counter[str] = Counter()

    @settings(
        max_examples=cases,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        drawn: list[Any] = []

        def draw(strategy: st.SearchStrategy[Any]) -> Any:
            drawn.append(data.draw(strategy))
            return drawn[-1]

        signal.alarm(SECONDS)
        try:
            outcome = check(draw)
        except Exception as error:
            outcome = "hang" if isinstance(error, Hang) else "wrong" if type(error) is AssertionError else "exception"
            if type(error).__module__.startswith("hypothesis"):  # it has had enough of this case, not we
                raise
            if not counts[outcome]:
                print(f"{name}: drawn {drawn}\n{traceback.format_exc(limit=-4)}", file=sys.stderr, flush=True)
        finally:
            signal.alarm(0)
        counts[outcome] += 1
        bar.update()

    run()
    return counts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10000, help="of all properties together")
    parser.add_argument("--only", nargs="+", default=[""], help="properties whose name begins so")
    args = parser.parse_args(arguments)
    chosen = [(name, check) for name, check in all_properties() if name.startswith(tuple(args.only))]
    each = -(-args.cases // max(len(chosen), 1))
    head = ("tried", "equal", "refused", *FAILURES)
    width = max(len(name) for name, _ in chosen) + 2
    signal.signal(signal.SIGALRM, _out_of_time)
    warnings.simplefilter("ignore")
    print(f"{'property':<{width}}" + "".join(f"{column:>10}" for column in head))
    total: Counter[str] = Counter()
    with tqdm(total=each * len(chosen), desc="cases", unit="case", disable=None) as bar:
        for name, check in chosen:
            counts = tried(name, check, each, bar)
            counts["tried"] = counts.total()
            total += counts
            print(f"{name:<{width}}" + "".join(f"{counts[column]:10}" for column in head), flush=True)
    print(f"{'all':<{width}}" + "".join(f"{total[column]:10}" for column in head))
    return int(any(total[failure] for failure in FAILURES))


if __name__ == "__main__":
    sys.exit(main())
