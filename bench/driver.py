"""Measures one row per op, shape, way and pass: ``python -m bench.driver`` on this machine's GPU, or its CPU.

Ways: "ours" (Triton on a GPU, what ``impl="auto"`` takes on a CPU), "eager", "compile" (torch.compile of eager), and
the peers that are installed. A row has a number or a reason why it has none, never both:

    {"op", "shape", "dtype", "pass", "way", "implementation", "reason",
     "median", "quartiles", "rounds", "call", "peak_bytes", "bytes", "operations", "normals", "targets"}

Times are seconds (``bench.clock``), ``peak_bytes`` is what the call allocates beyond its inputs. Passes: "forward"
without gradients, "backward" after a forward pass that is not timed, "both" as in training. Before anything is timed
the op's tests must have passed, and outputs and gradients must agree with the eager ones on the very inputs.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import clock, guards, machine, report
from bench.clock import Call, Prepare, Repeat
from bench.registry import OPS, Draw, Op, Shape

Row = dict[str, Any]
# Largest error that is only rounding, as a norm relative to that of the eager result. Indices may differ where two
# distances are equal but for rounding, and furthest points then differ from there on: nine in ten must be the same.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2}
SAME_INDICES = 0.9
SECONDS, ROUNDS = 0.2, (5, 50)  # per row: so long, but so many rounds


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def shapes(op: Op, device: torch.device) -> Sequence[Shape]:
    return op.gpu if device.type == "cuda" else (op.cpu,)


def ways(op: Op) -> list[str]:
    """Every way to be measured here, torch.compile last: it is by far the slowest to prepare."""
    return ["ours", "eager", *(peer for peer in op.peers if find_spec(peer)), "compile"]


def no_way(op: Op, way: str, device: torch.device) -> str:
    """Why this way is not measured, if it is not."""
    if way != "compile":
        return ""
    if not op.compiles:
        return "not compiled: a long Python loop"
    return "not compiled: torch.compile for a CPU needs a C++ compiler" if device.type == "cpu" else ""


def implementation(way: str, device: torch.device) -> str:
    if way != "ours":
        return way
    return "triton" if device.type == "cuda" else "reference"


@cache
def function(op: Op, shape: Shape, way: str, device: torch.device) -> Callable[..., Any]:
    """Cached, as torch.compile's result serves every pass of a shape."""
    if way == "ours":
        # Explicit on a GPU, where "auto" must not fall back unseen; on a CPU "auto" is the fastest that there is.
        return partial(op.ours, impl="triton" if device.type == "cuda" else "auto")
    if way == "compile":
        torch._dynamo.reset()
        return torch.compile(op.eager, dynamic=False)
    return op.eager if way == "eager" else op.peers[way]


def differentiable(op: Op, inputs: Sequence[Any]) -> tuple[list[Any], list[Tensor]]:
    """The inputs with fresh leaves, and those leaves."""
    fresh = [x.detach().requires_grad_(i in op.wrt) if isinstance(x, Tensor) else x for i, x in enumerate(inputs)]
    return fresh, [fresh[i] for i in op.wrt]


def first(out: Any) -> Tensor:
    """The differentiable output."""
    return out if isinstance(out, Tensor) else out[0]


def results(op: Op, call: Callable[..., Any], inputs: Sequence[Any], seed: int = 1) -> list[Tensor]:
    """Outputs, then the gradients for a random cotangent."""
    inputs, leaves = differentiable(op, inputs)
    out = call(*inputs)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    gradients: tuple[Tensor, ...] = ()
    if leaves:
        gradients = torch.autograd.grad(first(out), leaves, cotangent(first(out), seed))
    return [x.detach() for x in (*outputs, *gradients)]


def cotangent(out: Tensor, seed: int = 1) -> Tensor:
    return Draw(out.device, seed).normal(*out.shape, dtype=out.dtype)


def disagreement(result: Tensor, expected: Tensor, tolerance: float) -> str:
    """In words, if there is any beyond rounding."""
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return f"{result.dtype} {tuple(result.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
    if not expected.is_floating_point():
        same = (result == expected).float().mean().item()
        return "" if same >= SAME_INDICES else f"{same:.1%} of the indices agree"
    norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
    error = (norm(result - expected) / norm(expected).clamp_min(1e-30)).item()
    return "" if error <= tolerance else f"relative error {error:.1e}"  # NaN is no agreement


@cache
def problem(op: Op, shape: Shape, way: str, device: torch.device) -> str:
    """What is wrong with a way's outputs and gradients, if anything is."""
    exact = partial(op.eager, **op.exact)
    if way in ("eager", "compile"):
        return ""
    inputs = op.inputs(shape, Draw(device, 0))
    got = results(op, function(op, shape, way, device), inputs)
    expected = results(op, exact, inputs)
    if len(got) != len(expected):
        return f"wrong: {len(got)} results, expected {len(expected)}"
    for i, (x, y) in enumerate(zip(got, expected, strict=True)):
        wrong = disagreement(x, y, TOLERANCE[shape.dtype])
        if wrong:
            gradient = i - len(expected) + len(op.wrt)
            which = f"output {i}" if gradient < 0 else f"gradient of input {op.wrt[gradient]}"
            return f"wrong: {which}: {wrong}"
    return ""


def measure(
    op: Op, shape: Shape, way: str, which: str, device: torch.device, reason: str = "", repeat: Repeat = clock.repeat
) -> Row:
    """One row. With a ``reason`` not to, nothing is run; whatever goes wrong becomes the reason."""
    row: Row = {
        "op": op.name,
        "shape": shape.sizes,
        "dtype": str(shape.dtype)[6:],
        "pass": which,
        "way": way,
        "implementation": implementation(way, device),
        **op.cost(which, shape)._asdict(),
    }
    try:
        reason = reason or no_way(op, way, device) or problem(op, shape, way, device)
        if not reason:
            return row | {"reason": ""} | timing(op, shape, way, which, device, repeat)
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return row | {"reason": reason}


def timing(op: Op, shape: Shape, way: str, which: str, device: torch.device, repeat: Repeat = clock.repeat) -> Row:
    """The measured entries of a row."""
    run = function(op, shape, way, device)
    inputs: Sequence[Any] = op.inputs(shape, Draw(device, 0))
    if which != "forward":
        inputs, leaves = differentiable(op, inputs)
        grad = cotangent(first(run(*inputs)))

    def prepare() -> Any:
        return first(run(*inputs)) if which == "backward" else None

    def call(out: Any) -> Any:
        if which == "forward":
            return run(*inputs)
        return torch.autograd.grad(first(run(*inputs)) if out is None else out, leaves, grad)

    _, once = clock.repeat(prepare, call, 2)  # the first may compile
    rounds = min(max(int(SECONDS / max(once, 1e-9)), ROUNDS[0]), ROUNDS[1])
    samples = repeat(prepare, call, rounds)
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    row: Row = {"median": median, "quartiles": [q1, q3], "rounds": len(samples)}
    if device.type == "cuda":
        row["peak_bytes"] = peak_bytes(prepare, call)
        if which != "backward":
            row["call"] = clock.call_seconds(prepare, call, rounds)
    return row


def peak_bytes(prepare: Prepare, call: Call) -> int:
    """What ``call`` has allocated at most, beyond what stood before it."""
    state = prepare()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(state)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def judge(rows: Sequence[Row], limits: dict[str, float | None], ops: Sequence[Op] = OPS) -> None:
    """Write the targets into our rows, and whether they are met: None where that was not measured. For GPUs only."""
    medians: dict[tuple[str, ...], float] = {report.key(row): row["median"] for row in rows if "median" in row}
    targets = {op.name: op.targets for op in ops}
    for row in rows:
        if row["way"] != "ours":
            continue
        *case, _ = report.key(row)
        shape = Shape(**row["shape"], dtype=getattr(torch, row["dtype"]))
        row["targets"] = []
        for target in targets[row["op"]]:
            if row["pass"] in target.passes and target.at(shape):
                speed = _speed(row, target.of, medians.get((*case, target.of)), limits)
                met = None if speed is None else speed >= (1 / target.value if target.of == "seconds" else target.value)
                row["targets"].append({"text": str(target), "met": met})


def _speed(row: Row, of: str, other: float | None, limits: dict[str, float | None]) -> float | None:
    """Per second, or relative to the floor or to another way; None if it was not measured."""
    numerator = {"seconds": 1.0, "floor": report.floor(row, limits)}.get(of, other)
    return numerator / row["median"] if numerator is not None and "median" in row else None


def run(
    ops: Sequence[Op],
    device: torch.device,
    guard_report: Path | None = None,
    seconds: float = float("inf"),
    save: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Every row of ``ops``; ``save`` is called with all rows so far after each op, shape and way.

    torch.compile comes last, at each op's first shape before any op's second (and one shape earlier where it is a
    target), so that if time is short it is what goes without numbers.
    """
    end = time.monotonic() + seconds
    files = {file for op in ops for file in op.tests}
    failed = guards.failures(guard_report or guards.run(files), files)
    todo = [(op, shape, i, way) for op in ops for i, shape in enumerate(shapes(op, device)) for way in ways(op)]
    todo.sort(key=lambda item: (item[3] == "compile") * (1 + item[2] - any(t.of == "compile" for t in item[0].targets)))
    rows: list[Row] = []
    for op, shape, _, way in todo:
        reason = next((failed[file] for file in op.tests if failed[file]), "")
        for which in op.passes:
            late = "not measured: time was up" if time.monotonic() > end else ""
            rows.append(measure(op, shape, way, which, device, reason or late))
        save(rows)
    return rows


def write(folder: Path, about: dict[str, Any], rows: list[Row]) -> Path:
    """Write ``<device>-<commit>.json`` and ``.md`` and return the former; whole at any time, also when killed."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {**about, "rows": rows}
    return write_both(folder / name(about), document, report.markdown(document))


def name(about: dict[str, Any]) -> str:
    """``<device>-<commit>``, fit for a file."""
    return re.sub(r"[^a-z0-9]+", "-", f"{about['device']}-{about['commit']}".lower()).strip("-")


def write_both(stem: Path, document: dict[str, Any], table: str) -> Path:
    """Write ``stem``.json and .md, each whole at any time, and return the former."""
    for suffix, text in ((".md", table), (".json", json.dumps(document, indent=1) + "\n")):
        part = stem.with_name(f"{stem.name}{suffix}.part")
        part.write_text(text)
        part.rename(stem.with_name(f"{stem.name}{suffix}"))
    return stem.with_name(f"{stem.name}.json")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure every op on this machine's GPU, or its CPU if it has none.")
    parser.add_argument("--out", type=Path, default=guards.ROOT / "bench" / "results", metavar="DIR")
    parser.add_argument("--guards-passed", type=Path, metavar="FILE", help="JUnit report of the kernels' tests")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no measurement after so long")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    args = parser.parse_args()
    where = device()
    about = machine.describe(where, args.commit) | {"limits": machine.limits(where)}
    print(report.heading(about), flush=True)

    def save(rows: list[Row]) -> None:
        if where.type == "cuda":
            judge(rows, about["limits"])
        write(args.out, about, rows)
        print(report.line(rows[-1]), flush=True)

    rows = run(OPS, where, args.guards_passed, args.seconds, save)
    print(report.markdown({**about, "rows": rows}))
    print(f"written: {write(args.out, about, rows)} and .md")
    without = sorted({row["op"] for row in rows if row["way"] == "ours" and row["reason"]})
    if without:
        raise SystemExit(f"without a number: {', '.join(without)}")


if __name__ == "__main__":
    main()
