"""What ``pytest bench/`` shares: one run's guards and rows, and the table at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import driver, guards, host, machine, plain, report

ROWS = pytest.StashKey[list[driver.Row]]()
HOST_ROWS = pytest.StashKey[list[host.Row]]()
NETWORK_ROWS = pytest.StashKey[list[plain.Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--guards-passed", type=Path, metavar="FILE", help="JUnit report of the kernels' tests, instead of running them"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[HOST_ROWS] = []
    config.stash[NETWORK_ROWS] = []


@pytest.fixture(scope="session")
def failed_guards(request: pytest.FixtureRequest) -> dict[str, str]:
    """Why a test file does not vouch for its ops, for the files that the chosen benchmarks need."""
    files = {file for item in request.session.items for file in _op_tests(item)}
    return guards.failures(request.config.getoption("--guards-passed") or guards.run(files), files)


def _op_tests(item: Any) -> tuple[str, ...]:
    return item.callspec.params["op"].tests if hasattr(item, "callspec") else ()


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> list[driver.Row]:
    return request.config.stash[ROWS]


@pytest.fixture(scope="session")
def host_rows(request: pytest.FixtureRequest) -> list[host.Row]:
    return request.config.stash[HOST_ROWS]


@pytest.fixture(scope="session")
def network_rows(request: pytest.FixtureRequest) -> list[plain.Row]:
    return request.config.stash[NETWORK_ROWS]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if host_rows := config.stash[HOST_ROWS]:
        terminalreporter.section("bench, host")
        terminalreporter.write(host.markdown(host_rows))
    if network_rows := config.stash[NETWORK_ROWS]:
        terminalreporter.section("bench, the point prior")
        terminalreporter.write(plain.markdown(network_rows))
    rows = config.stash[ROWS]
    if not rows:
        return
    device = driver.device()
    document = machine.describe(device) | {"limits": machine.limits(device), "rows": rows}
    if device.type == "cuda":
        driver.judge(rows, document["limits"])
    terminalreporter.section("bench")
    terminalreporter.write(report.markdown(document))
