"""``pytest bench/``: every row of the registry on this machine, by the driver's clock through pytest-benchmark."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import clock, driver, host, plain
from bench.registry import OPS, Op, Shape

DEVICE = driver.device()
CASES = [
    pytest.param(op, shape, way, which, id=f"{op.name}-{shape}-{way}-{which}".replace(" ", "_"))
    for op in OPS
    for shape in driver.shapes(op, DEVICE)
    for way in driver.ways(op)
    for which in op.passes
]


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")  # rows without a number
@pytest.mark.benchmark(timer=clock.clock)
@pytest.mark.parametrize(("op", "shape", "way", "which"), CASES)
def test_op(
    benchmark: BenchmarkFixture,
    failed_guards: dict[str, str],
    rows: list[driver.Row],
    op: Op,
    shape: Shape,
    way: str,
    which: str,
) -> None:
    def repeat(prepare: clock.Prepare, call: clock.Call, rounds: int) -> list[float]:
        def setup() -> tuple[tuple[object], dict[str, object]]:
            state = prepare()
            clock.empty_caches()
            return (state,), {}

        benchmark.pedantic(call, setup=setup, rounds=rounds)
        if benchmark.stats is None:
            raise RuntimeError("pytest-benchmark is off: --benchmark-disable was given, or xdist is at work")
        return list(benchmark.stats.stats.data)

    benchmark.group = f"{op.name}, {which}, {shape}"
    unguarded = next((failed_guards[file] for file in op.tests if failed_guards[file]), "")
    row = driver.measure(op, shape, way, which, DEVICE, unguarded, repeat)
    rows.append(row)
    benchmark.extra_info = row
    if row["reason"]:
        (pytest.skip if driver.no_way(op, way, DEVICE) else pytest.fail)(row["reason"])


@pytest.mark.parametrize("op", host.CALLED_OFTEN, ids=lambda op: op.name.replace(" ", "_"))
def test_host(failed_guards: dict[str, str], host_rows: list[host.Row], op: Op) -> None:
    pytest.importorskip("triton")
    if reason := next((failed_guards[file] for file in op.tests if failed_guards[file]), ""):
        pytest.fail(reason)
    host_rows.append(host.measure(op))


def test_point_prior(network_rows: list[plain.Row]) -> None:
    """The whole network beside its plain form: the independent writing vouches for it."""
    prior, args = plain.published().to(DEVICE), plain.inputs(plain.BATCH[DEVICE.type], plain.POINTS, DEVICE)
    for which in plain.PASSES:
        network_rows += plain.compare(which, prior, args, plain.ROUNDS)
    assert not [row for row in network_rows if row["reason"]]
