"""What a call of an op costs the host beyond Triton's own launches, which are left out here.

That is: argument checks, dispatch, autograd, allocation, and PyTorch's operations around the kernels, on tensors so
small that these have next to nothing to do. On a CPU, whatever the machine has: nothing is compiled, nothing computed.
The time is that of the calling thread on its core, and the least of many short series: other processes only add to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from bench.driver import cotangent, differentiable, first
from bench.registry import OPS, Draw, Op
from lion_triton.kernels import census

Row = dict[
    str, Any
]  # op; seconds "forward", without gradients, and "both", with the backward (None where there is none)
TARGETS = {"forward": 20e-6, "both": 60e-6}
SERIES, CALLS = 50, 40
_SMALL = 8  # sizes are at most this
CPU = torch.device("cpu")
# The all-pairs matrices are loops of launches and look at values.
CALLED_OFTEN = tuple(op for op in OPS if "pairwise" not in op.name and "1-NNA" not in op.name)


@contextmanager
def nothing_launched() -> Iterator[None]:
    from triton.runtime.jit import JITFunction

    nothing = patch.object(JITFunction, "run", lambda self, *args, **kwargs: None)
    with nothing, census.standing_in(census.TARGETS["sm_90"]):
        yield


def measure(op: Op) -> Row:
    sizes = {name: min(size, _SMALL) for name, size in op.cpu.sizes.items()}
    inputs = op.inputs(replace(op.cpu, **sizes), Draw(CPU, 0))
    run = partial(op.ours, impl="triton")
    with nothing_launched():
        row: Row = {"op": op.name, "forward": seconds(lambda: run(*inputs)), "both": None}
        if op.wrt:
            tracked, leaves = differentiable(op, inputs)
            grad = cotangent(first(run(*tracked)))
            row["both"] = seconds(lambda: torch.autograd.grad(first(run(*tracked)), leaves, grad))
    return row


def seconds(call: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(SERIES):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        best = min(best, (time.thread_time() - start) / CALLS)
    return best


def plain() -> Row:
    """One of PyTorch's own, for comparison."""
    x, grad = torch.ones(_SMALL), torch.ones(_SMALL)
    leaf = x.clone().requires_grad_()
    both = seconds(lambda: torch.autograd.grad(leaf * 2, leaf, grad))
    return {"op": "PyTorch's x * 2", "forward": seconds(lambda: x * 2), "both": both}


def markdown(rows: Sequence[Row]) -> str:
    lines = ["Host, microseconds a call beyond Triton's launches", "", "| op | forward | forward and backward |"]
    lines += ["|---|---|---|"]
    targets = " | ".join(f"{1e6 * target:.0f} at most" for target in TARGETS.values())
    lines += [f"| {row['op']} | {_us(row['forward'])} | {_us(row['both'])} |" for row in (plain(), *rows)]
    return "\n".join([*lines, f"| goal | {targets} |"]) + "\n"


def _us(value: float | None) -> str:
    return "-" if value is None else f"{1e6 * value:.1f}"
