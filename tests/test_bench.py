"""The benchmark's own driver: what it counts, refuses, judges and writes. No speed is tested here."""

from __future__ import annotations

import json
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import clock, driver, gpu, guards, host, models, report
from bench.registry import OPS, Cost, Op, Shape, Target, _touched
from lion_triton import kernels
from tests import fresh

CPU = torch.device("cpu")
OP = {op.name: op for op in OPS}
LIMITS: dict[str, float | None] = {"copy": 1e9, "peak": 1e12, "normals": 2e9, "empty": 1e-6}


def measure(op: Op, way: str = "ours", which: str = "forward", **kwargs: Any) -> driver.Row:
    return driver.measure(op, op.cpu, way, which, CPU, **kwargs)


# The registry


def test_registry_has_every_op_and_its_tests() -> None:
    helpers = {"Style", "VoxelPlan", "check_finite", "exact_emd", "voxel_coords"}
    named = {part for name in OP for part in name.split(" + ")} - {"SiLU", "1-NNA's Chamfer distances"}
    assert named == set(kernels.__all__) - helpers
    assert len(OP) == len(OPS)
    for file in {file for op in OPS for file in op.tests}:
        assert (guards.ROOT / file).is_file(), file


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_ours_is_eager_on_the_small_shape(op: Op) -> None:
    assert driver.problem(op, op.cpu, "ours", CPU) == ""
    assert op.backward is None or op.wrt


@pytest.mark.parametrize(
    "name", ["nearest_neighbor", "chamfer_distance", "ball_query", "three_nn", "local_moments", "pairwise_chamfer"]
)
def test_the_timed_baseline_is_the_exact_one_but_for_rounding(name: str) -> None:
    op = OP[name]
    inputs = op.inputs(op.cpu, driver.Draw(CPU, 0))
    for x, y in zip(
        driver.results(op, op.eager, inputs),
        driver.results(op, lambda *args: op.eager(*args, **op.exact), inputs),
        strict=True,
    ):
        assert driver.disagreement(x, y, 1e-3) == ""


@pytest.mark.parametrize(
    ("name", "shape", "forward", "backward"),
    [
        # 24 elements of 4 bytes, read and written; the backward reads and writes as much, and needs no noise.
        ("q_sample", Shape(2, 3, C=4), Cost(192, 72, 24), Cost(192, 24)),
        ("noise_mse", Shape(2, 3, C=4), Cost(96, 72, 24), Cost(192, 48, 24)),
        # Features 96, grids 2 x 8 voxels x 16, plan 2 x (16 x 3 + 4 x 8). Backward: 8 (1 - (7/8)^3) = 2.64 voxels.
        ("avg_voxelize", Shape(2, 3, C=4, R=2), Cost(512, 48), Cost(84 + 96 + 96, 24)),
        # Two clouds of 8 points and 15 pairs, both directions.
        ("chamfer_distance", Shape(2, 3, 5), Cost(192 + 8, 480), Cost(2 * 192 + 8 + 64, 144)),
        ("group", Shape(2, 3, 5, 7, 4), Cost(96 + 70 * (16 + 4)), Cost(96 + 70 * (16 + 4), 280)),
        ("furthest_point_sample", Shape(2, 3, 2), Cost(72 + 16, 108), None),
        ("adagn + SiLU", Shape(2, 3, C=8, dtype=torch.bfloat16), Cost(288, 528), Cost(480, 1152)),
    ],
)
def test_least_work_by_hand(name: str, shape: Shape, forward: Cost, backward: Cost | None) -> None:
    op = OP[name]
    assert op.cost("forward", shape) == forward
    if backward is not None:
        assert op.cost("backward", shape) == backward
        assert op.cost("both", shape) == tuple(a + b for a, b in zip(forward, backward, strict=True))


def test_touched_voxels() -> None:
    assert _touched(Shape(1, 1, R=4), 8) == pytest.approx(8)
    assert _touched(Shape(1, 10_000, R=4), 1) == pytest.approx(64)
    coords = (torch.rand(1, 500, 3, generator=torch.Generator().manual_seed(0)) * 8 - 0.5).round()
    assert _touched(Shape(1, 500, R=8), 1) == pytest.approx(len(coords[0].unique(dim=0)), rel=0.05)


# Measuring


def test_statistics_of_the_rounds() -> None:
    row = measure(OP["gaussian_kl"], which="both", repeat=lambda prepare, call, rounds: [5.0, 1.0, 4.0, 2.0, 3.0])
    assert (row["median"], row["quartiles"], row["rounds"]) == (3.0, [2.0, 4.0], 5)
    assert (row["reason"], row["implementation"], row["bytes"]) == ("", "reference", 6 * 2 * 256 * 4 * 4)


@pytest.mark.parametrize("which", ["forward", "backward", "both"])
def test_every_pass_is_timed(which: str) -> None:
    row = measure(OP["gaussian_kl"], which=which)
    assert row["reason"] == "" and 0 <= row["quartiles"][0] <= row["median"] <= row["quartiles"][1]
    assert driver.ROUNDS[0] <= row["rounds"] <= driver.ROUNDS[1]


def test_repeat_prepares_each_round_outside_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now, log = [0.0], []
    monkeypatch.setattr(clock, "clock", lambda: now[0])
    monkeypatch.setattr(clock, "empty_caches", lambda: log.append("flush"))

    def prepare() -> int:
        now[0] += 100
        log.append("prepare")
        return len(log)

    def call(state: int) -> None:
        assert state == len(log) - 1
        now[0] += 2
        log.append("call")

    assert clock.repeat(prepare, call, 3) == [2, 2, 2]
    assert log == ["prepare", "flush", "call"] * 3


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 1.01 * grads[0]


def kl(mu: Tensor, log_sigma: Tensor, impl: Any) -> Tensor:
    return kernels.gaussian_kl(mu, log_sigma, impl=impl)


def fails(mu: Tensor, log_sigma: Tensor, impl: Any) -> Tensor:
    raise RuntimeError("no such kernel\nand more")


@pytest.mark.parametrize(
    ("ours", "reason"),
    [
        (lambda m, s, impl: 1.01 * kl(m, s, impl), "wrong: output 0: relative error 1.0e-02"),
        (lambda m, s, impl: kl(m, WrongGradient.apply(s), impl), "wrong: gradient of input 1: relative error 1.0e-02"),
        (lambda m, s, impl: kl(m, s, impl) * torch.nan, "wrong: output 0: relative error nan"),
        (lambda m, s, impl: kl(m, s, impl)[:1], r"wrong: output 0: torch.float32 (1,), expected torch.float32 (2,)"),
        (
            lambda m, s, impl: kl(m, s, impl).double(),
            "wrong: output 0: torch.float64 (2,), expected torch.float32 (2,)",
        ),
        (lambda m, s, impl: (kl(m, s, impl), m), "wrong: 4 results, expected 3"),
        (fails, "RuntimeError: no such kernel"),
    ],
)
def test_a_wrong_op_gets_no_number(ours: Callable[..., Any], reason: str) -> None:
    for which in ("forward", "backward"):
        row = measure(replace(OP["gaussian_kl"], ours=ours), which=which)
        assert row["reason"] == reason
        assert "median" not in row


def test_wrong_indices_get_no_number() -> None:
    op = replace(OP["ball_query"], ours=lambda c, p, r, k, impl: kernels.ball_query(c, p, 0.5 * r, k, impl=impl))
    assert "of the indices agree" in measure(op)["reason"]


def test_a_peer_is_checked_too_and_torch_compile_needs_a_gpu() -> None:
    op = replace(OP["gaussian_kl"], peers={"json": lambda m, s: (m + s).sum((1, 2)), "no_such_package": fails})
    assert driver.ways(op) == ["ours", "eager", "json", "compile"]
    assert measure(op, "json")["reason"].startswith("wrong: ")
    assert "C++ compiler" in measure(op, "compile")["reason"]


def test_run_guards_every_op_and_stops_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good, bad = OP["gaussian_kl"], replace(OP["furthest_point_sample"], tests=("tests/test_bad.py",))
    failed = {"tests/test_bad.py": "tests/test_bad.py: 1 of 2 tests fail"}
    monkeypatch.setattr(guards, "failures", lambda report, files: {f: failed.get(f, "") for f in files})
    saved: list[int] = []
    rows = driver.run([good, bad], CPU, tmp_path, save=lambda rows: saved.append(len(rows)))
    assert saved == [3, 6, 7, 8, 11, 12]  # ours and eager of both, then torch.compile of both
    assert all(row["reason"] == failed["tests/test_bad.py"] for row in rows if row["op"] == bad.name)
    assert all("median" in row for row in rows if row["op"] == good.name and row["way"] in ("ours", "eager"))
    late = driver.run([good], CPU, tmp_path, seconds=-1)
    assert {row["reason"] for row in late} == {"not measured: time was up"}


# Guards


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.kernels.test_a" name="test_1"/>
<testcase classname="tests.kernels.test_a.TestX" name="test_2"><skipped/></testcase>
<testcase classname="tests.kernels.test_ab" name="test_1"><failure>AssertionError</failure></testcase>
<testcase classname="tests.kernels.test_ab.TestX" name="test_2"/>
<testcase classname="" name="tests.kernels.test_c"><error>ModuleNotFoundError: No module named 'trimesh.base'</error>
</testcase>
<testcase classname="tests.kernels.test_d" name="test_1"><skipped/></testcase>
<testcase classname="" name="tests.kernels.test_e"><error>ModuleNotFoundError: No module named 'lion_triton.x'</error>
</testcase>
</testsuite></testsuites>"""


@pytest.mark.parametrize(
    ("file", "failure"),
    [
        ("tests/kernels/test_a.py", ""),
        ("tests/kernels/test_ab.py", "tests/kernels/test_ab.py: 1 of 2 tests fail, test_1 the first"),
        ("tests/kernels/test_c.py", "tests/kernels/test_c.py: 1 of 1 tests fail, tests.kernels.test_c the first"),
        ("tests/kernels/test_d.py", "tests/kernels/test_d.py: none of its tests ran"),
        ("tests/kernels/test_missing.py", "tests/kernels/test_missing.py: none of its tests ran"),
    ],
)
def test_guards_by_a_report(tmp_path: Path, file: str, failure: str) -> None:
    path = tmp_path / "junit.xml"
    path.write_text(JUNIT)
    assert guards.failures(path, [file]) == {file: failure}


@pytest.mark.parametrize("text", [None, "<testsuites><testsuite>"], ids=["missing", "cut-off"])
def test_no_report_vouches_for_nothing(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "junit.xml"
    if text:
        path.write_text(text)
    assert guards.failures(path, ["tests/x.py"]) == {"tests/x.py": "tests/x.py: its tests did not finish"}


# Judging and writing


def row(way: str = "ours", which: str = "forward", op: str = "q_sample", **measured: Any) -> driver.Row:
    shape = OP[op].gpu[0]
    cost = OP[op].cost(which, shape)._asdict()
    return {
        **{"op": op, "shape": shape.sizes, "dtype": "float32", "pass": which, "way": way, "reason": ""},
        **{"implementation": "triton", **cost, **measured},
    }


def test_floor_is_the_longer_of_memory_and_noise() -> None:
    ours = row()  # 2 x 1 MiB at 1 GB/s; 262144 normals at 2e9/s
    assert report.floor(ours, LIMITS) == pytest.approx(2**21 / 1e9)
    assert report.floor(ours, {**LIMITS, "normals": 1e6}) == pytest.approx(2**18 / 1e6)
    assert report.floor(ours, {**LIMITS, "normals": None}) is None
    assert report.floor(row(op="gaussian_kl"), {**LIMITS, "normals": None}) == pytest.approx(2**21 / 1e9)


@pytest.mark.parametrize(
    ("target", "ours", "met"),
    [
        (Target("seconds", 1e-3), 0.001, True),
        (Target("seconds", 1e-3), 0.00101, False),
        (Target("floor", 0.5), 0.00419, True),  # the floor is 2.097 ms
        (Target("floor", 0.5), 0.0042, False),
        (Target("eager", 5), 0.002, True),  # eager takes 10 ms
        (Target("eager", 5), 0.00201, False),
        (Target("compile", 1), 0.002, None),
        (Target("chamferdist", 3), 0.002, None),
        (Target("eager", 5), None, None),
    ],
)
def test_targets(target: Target, ours: float | None, met: bool | None) -> None:
    measured: dict[str, Any] = {} if ours is None else {"median": ours}
    rows = [row(**measured), row("eager", median=0.01), row("compile")]
    driver.judge(rows, LIMITS, [replace(OP["q_sample"], targets=(target,))])
    assert rows[0]["targets"] == [{"text": str(target), "met": met}]
    assert "targets" not in rows[1]


def test_targets_only_where_they_apply() -> None:
    rows = [row(median=1.0)]
    elsewhere = (Target("eager", 5, ("backward",)), Target("eager", 5, at=lambda s: s.B == 1))
    driver.judge(rows, LIMITS, [replace(OP["q_sample"], targets=elsewhere)])
    assert rows[0]["targets"] == []


def test_results_are_written_as_json_and_markdown(tmp_path: Path) -> None:
    measured: dict[str, Any] = {"median": 0.002, "quartiles": [0.0019, 0.0022], "call": 0.0021, "peak_bytes": 2_000_000}
    rows = [
        row(**measured, targets=[{"text": "5x eager", "met": True}, {"text": "1x compile", "met": None}]),
        row("eager", median=0.01, peak_bytes=6_000_000),
        row("compile") | {"reason": "out of memory"},
        row("peer", median=0.003),
        row(which="backward") | {"reason": "out of memory"},
    ]
    about = {"device": "NVIDIA X/1", "commit": "abc-dirty", "versions": {"torch": "2"}, "limits": LIMITS}
    path = driver.write(tmp_path / "new", about, rows)
    assert path.name == "nvidia-x-1-abc-dirty.json"
    assert json.loads(path.read_text()) == {**about, "rows": rows}
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, path.with_suffix(".md").name]

    lines = path.with_suffix(".md").read_text().splitlines()
    assert lines[0].startswith("NVIDIA X/1, commit abc-dirty; torch 2. Measured: copy 1 GB/s, peak 1.00 TFLOP/s")
    header, _, forward, backward = (line.strip("| ").split(" | ") for line in lines[2:6])
    assert len(header) == len(forward) == len(backward)
    assert dict(zip(header, forward, strict=True)) == {
        "op": "q_sample",
        "pass": "forward",
        "shape": "B=32 N=2048 C=4",
        "dtype": "float32",
        "ours, us (quartiles)": "2000.0 (1900.0 to 2200.0)",
        "call, us": "2100.0",
        "eager, us": "10000.0",
        "compile, us": "none (1)",
        "peers, us": "peer 3000.0",
        "eager / ours": "5.00",
        "GB/s (of copy)": "1.05 (105%)",
        "TFLOP/s (of peak)": "0.000393 (0%)",
        "of floor": "105%",
        "peak memory, MB (eager)": "2.0 (6.0)",
        "targets": "5x eager: met; 1x compile: not measured",
    }
    assert backward[4] == "none (1)"
    assert lines[-1] == "1. out of memory"


def test_column_meanings_are_in_the_readme() -> None:
    text = (guards.ROOT / "bench" / "README.md").read_text()
    for column in report._COLUMNS:
        assert f"| {column} |" in text


# make gpu


def test_missing_packages_are_told_from_failures() -> None:
    cases = {case.get("name"): gpu.missing_package(case) for case in ET.fromstring(JUNIT).iter("testcase")}
    assert cases["tests.kernels.test_c"] == "trimesh"
    assert cases["tests.kernels.test_e"] == ""
    assert cases["test_1"] == ""


def test_a_step_is_stopped_at_its_limit_and_its_status_kept() -> None:
    start = time.monotonic()
    assert gpu.step("sleep", [sys.executable, "-c", "import time; time.sleep(60)"], 0.2) is None
    assert time.monotonic() - start < 30
    assert gpu.step("status", [sys.executable, "-c", "raise SystemExit(3)"], 60) == 3


def test_make_gpu_says_so_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_all_steps_end_in_time_and_leave_what_they_wrote(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps that all take what they may, in a time that stands still otherwise; each writes one file first."""
    now, steps, out = 0.0, list[str](), tmp_path / "out"
    results = tmp_path / "results"

    def overrun(name: str, command: list[str], limit: float) -> int | None:
        nonlocal now
        copied = {path.name for path in out.iterdir()} if out.exists() else set()
        assert copied == {f"{before}.txt" for before in steps}
        steps.append(name)
        (results / f"{name}.txt").write_text("")
        now += limit
        return 0 if name.startswith("furniture") else None

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out)])
    monkeypatch.setattr(gpu, "RESULTS", results)
    monkeypatch.setattr(gpu, "step", overrun)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now)
    assert gpu.main() == 1
    assert steps[:3] == ["tests", "whole model", "quickstart"]
    assert {"furniture", "furniture, sampled", "furniture, evaluated", "ops", "census"} <= set(steps)
    assert now <= 8 * 60 + len(steps)
    assert "furniture: passed" in capsys.readouterr().out


# The whole model


def test_the_whole_model_runs_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "ROUNDS", 1)
    monkeypatch.setattr(models, "SECONDS", 0.0)
    models.main(["--no-compile", "--out", str(tmp_path), "--commit", "abc"])
    (path,) = tmp_path.glob("models-*-abc.json")
    rows = json.loads(path.read_text())["rows"]
    assert {row["what"] for row in rows} >= {"training step, VAE", "training step, priors", "point prior, forward"}
    for row in rows:
        assert row["reason"] == ""
        assert row["seconds"] > 0
        assert row["clouds"] == pytest.approx(row["B"] / row["seconds"])
    (prior,) = (row for row in rows if row["what"] == "point prior, forward")
    assert prior["operations"] > 1e7
    table = path.with_suffix(".md").read_text()
    assert len([line for line in table.splitlines() if line.startswith("| point prior")]) == 2


def test_a_section_that_fails_says_why_and_the_next_runs(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(bench: models.Bench) -> Any:
        raise RuntimeError("no such network\nmore")
        yield

    def fine(bench: models.Bench) -> Any:
        yield "nothing", 1, "launched", lambda: None

    saved: list[int] = []
    bench = models.Bench(CPU, lambda rows: saved.append(len(rows)))
    bench.run(broken)
    bench.run(fine)
    assert saved == [1, 2]
    assert [row["reason"] for row in bench.rows] == ["RuntimeError: no such network", ""]
    assert "none: RuntimeError: no such network" in models.markdown(
        {"device": "x", "commit": "y", "versions": {}, "matrix_rate": 1e12, "rows": bench.rows}
    )


def test_what_bounds_a_call() -> None:
    row: dict[str, Any] = {"seconds": 0.1, "busy": 0.02, "costs": [("gemm_kernel", 0.01, 3), ("copy_kernel", 0.01, 9)]}
    assert models.bound(row) == "the host: the GPU works 20% of the time"
    row["busy"] = 0.09
    assert models.bound(row) == "gemm_kernel 10.00 ms in 3 (arithmetic); copy_kernel 10.00 ms in 9 (memory)"
    assert models.bound({"seconds": 0.1}) == "-"


# What a call costs the host

HOST = """
from unittest.mock import patch
from bench import host

with patch.object(host, "SERIES", 1), patch.object(host, "CALLS", 1):
    row = host.measure(next(op for op in host.CALLED_OFTEN if op.name == "q_sample"))
assert 0 < row["forward"] < row["both"]
print(host.markdown([row]))
"""


def test_host_measures_without_compiling() -> None:
    result = fresh.python("-c", HOST)
    assert result.returncode == 0, result.stderr
    names = [line.split("|")[1].strip() for line in result.stdout.splitlines() if line.startswith("|")]
    assert names == ["op", "---", "PyTorch's x * 2", "q_sample", "goal"]


def test_host_table() -> None:
    table = host.markdown([{"op": "f", "forward": 1.25e-5, "both": None}])
    assert "| f | 12.5 | - |" in table
    assert table.endswith("| goal | 20 at most | 60 at most |\n")
