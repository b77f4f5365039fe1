"""What the machine is, and what it can do at most: measured, never looked up.

copy      bytes read and written per second by a copy between two buffers that no cache holds
peak      float32 operations per second: on a GPU a kernel of chained multiply-adds (2 operations each) that
          touches no memory; on a CPU a float32 matrix product
normals   normals per second made by the ops' own noise generator without storing them: the instruction
          floor of the fused noise ops (GPU only)
empty     seconds that the clock shows for no work at all; never subtracted
"""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.clock import repeat
from bench.registry import OPS
from lion_triton.kernels._triton import tl, triton
from lion_triton.kernels.noise import noise_block

ROOT = Path(__file__).parents[1]
PEERS = sorted({name for op in OPS for name in op.peers})
_PACKAGES = ("torch", "triton", "numpy", *PEERS)
_CHAIN = 16  # multiply-adds per loop step


@triton.jit
def fma_kernel(out_ptr, a, b, steps, CHAIN: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = i.to(tl.float32)
    for _ in range(steps):
        for _ in tl.static_range(CHAIN):
            x = x * a + b
    tl.store(out_ptr + i, x)


@triton.jit
def normals_kernel(key_ptr, out_ptr, steps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    pid = tl.program_id(0)
    total = tl.zeros((4 * BLOCK,), dtype=tl.float32)
    for step in range(steps):
        total += noise_block(key_ptr, (pid * steps + step).to(tl.int64) * BLOCK, 0, BLOCK)
    tl.store(out_ptr + pid, tl.sum(total))


def limits(device: torch.device) -> dict[str, float | None]:
    """The four figures of the module's docstring."""
    gpu = device.type == "cuda"
    size = 2**28 if gpu else 2**24
    source, target = torch.ones(size, device=device), torch.empty(size, device=device)
    copy = 2 * source.nbytes / _median(lambda: target.copy_(source))
    empty = _median(lambda: None)
    if not gpu:
        n = 768
        matrix = torch.ones(n, n)
        return {"copy": copy, "peak": 2 * n**3 / _median(lambda: matrix @ matrix), "normals": None, "empty": empty}

    programs = 64 * torch.cuda.get_device_properties(device).multi_processor_count
    block, steps = 1024, 256

    def fma() -> Any:
        return fma_kernel[(programs,)](target, 0.5, 0.5, steps, CHAIN=_CHAIN, BLOCK=block, num_warps=4)

    peak = 2 * programs * block * steps * _CHAIN / _median(fma)

    key, block, steps = torch.tensor([7, 0], device=device), 256, 32

    def normals() -> Any:
        return normals_kernel[(programs,)](key, target, steps, BLOCK=block, num_warps=4)

    rate = programs * steps * 4 * block / _median(normals)
    return {"copy": copy, "peak": peak, "normals": rate, "empty": empty}


def describe(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Name, commit and versions: what a reader must know to repeat the figures."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    machine: dict[str, Any] = {"commit": commit or find_commit(), "device": platform.processor() or "CPU"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        versions["cuda"] = torch.version.cuda
        versions["cudnn"] = str(torch.backends.cudnn.version())
        versions["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        machine |= {
            "device": torch.cuda.get_device_name(device),
            "capability": list(torch.cuda.get_device_capability(device)),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    else:
        machine["threads"] = torch.get_num_threads()
    return machine | {"versions": versions}


def find_commit() -> str:
    """The checkout's commit, with ``-dirty`` if files differ from it; "unknown" outside a checkout."""
    return _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") or "unknown"


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _median(call: Callable[[], Any]) -> float:
    for _ in range(3):
        call()
    return statistics.median(repeat(lambda: None, lambda _: call(), 20))
