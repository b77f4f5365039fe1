"""What a call of an op costs the host beyond Triton's own launches, which are left out here.

That is: argument checks, dispatch, autograd, allocation, and PyTorch's operations around the kernels, on tensors so
small that these have next to nothing to do. On a CPU, whatever the machine has: nothing is compiled, nothing computed.
The time is that of the calling thread on its core, and the least of many short series: other processes only add to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from bench.driver import Row, cotangent, differentiable, first
from bench.registry import Draw, Op
from lion_triton.kernels import _checks

TARGETS = {"forward": 20e-6, "both": 60e-6}
SERIES, CALLS = 50, 40
_SMALL = 8


@contextmanager
def nothing_launched() -> Iterator[None]:
    from triton.runtime.jit import JITFunction

    with (
        patch.object(JITFunction, "run", lambda self, *args, **kwargs: None),
        patch.object(_checks, "interpreting", lambda: True),
    ):
        yield


def measure(op: Op) -> list[Row]:
    """The op without gradients; and, where it has any, with its backward."""
    device = torch.device("cpu")
    shape = replace(op.cpu, **{name: min(size, _SMALL) for name, size in op.cpu.sizes.items()})
    inputs = op.inputs(shape, Draw(device, 0))
    run: Callable[..., Any] = partial(op.ours, impl="triton")
    with nothing_launched():
        rows = [{"op": op.name, "pass": "forward", "host": seconds(lambda: run(*inputs))}]
        if op.wrt:
            leaves_in, leaves = differentiable(op, inputs)
            grad = cotangent(first(run(*leaves_in)))
            both = seconds(lambda: torch.autograd.grad(first(run(*leaves_in)), leaves, grad))
            rows.append({"op": op.name, "pass": "both", "host": both})
    return rows


def seconds(call: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(SERIES):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        best = min(best, (time.thread_time() - start) / CALLS)
    return best
