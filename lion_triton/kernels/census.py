"""What the compiler makes of every kernel, at the shapes and dtypes of LION's layers. It needs no GPU.

    python -m lion_triton.kernels.census                 a table of registers, spills, shared memory and accesses
    python -m lion_triton.kernels.census --check         exit 1 on spills or on too much shared memory
    python -m lion_triton.kernels.census --brief         without the accesses: several times faster
    python -m lion_triton.kernels.census --device        only this machine's GPU; compare with what it really ran

Every op is called, forward and backward, as a user would call it; only the last step of a launch is left out. The
launch goes through Triton's own specialisation of arguments (dtypes, divisibility by 16, constants), so that what is
compiled here is what would run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from lion_triton import kernels
from lion_triton.kernels import _checks
from lion_triton.kernels._triton import triton
from lion_triton.kernels.voxel_conv import voxelize_conv3d_moments

BATCH = 32
FEATURE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# The layers of the published networks: points of each level, and the centres sampled from them.
LEVELS = ((2048, 1024), (1024, 256), (256, 64), (64, 16))
NEIGHBORS = 32
# (points, voxels per side): channels of the points that are averaged, and of the grids that are gathered
VOXELIZED = {(2048, 32): (3, 4, 32, 64, 128), (1024, 16): (32, 64, 128), (256, 8): (128, 192), (64, 8): (128,)}
# the same: channels before and behind the first convolution of a grid
CONVOLVED = {
    (2048, 32): ((3, 32), (4, 32), (32, 32), (64, 64)),
    (1024, 16): ((32, 32), (64, 64), (128, 64), (128, 128)),
    (256, 8): ((128, 128), (192, 128)),
    (64, 8): ((128, 128),),
}
GATHERED = {(2048, 32): (32, 64), (1024, 16): (32, 64, 128), (256, 8): (128,), (64, 8): (128,)}
# points of a level: channels that their neighbours are gathered with; and of what is interpolated, everywhere
NEIGHBORHOODS = {2048: (32,), 1024: (32, 64), 256: (128,), 64: (128,)}
INTERPOLATED = 128
# centres: channels of the maximum over their neighbours, and of its norm
MAXIMA = {1024: (32, 64), 256: (64, 128), 64: (128, 256), 16: (128,)}
# centres: channels of the two layers of a set abstraction, in one op
ABSTRACTED = {1024: ((32, 32), (32, 64)), 256: ((32, 64), (64, 128)), 64: ((128, 128), (128, 256))}
ATTENDED = ((1024, 4), (16, 8))  # points that attend to one another, and heads of 32 channels
# (positions, channels) of the PVConvs' grids, and of the MLPs on points and on neighbours
_GRIDS = ((32**3, (32, 64)), (16**3, (32, 64, 128)), (8**3, (128,)))
_POINTS = ((2048, (32, 64, 128)), (1024, (32, 64, 128)), (256, (128,)), (64, (128,)))
_GROUPS = ((1024, (32, 64)), (256, (32, 64, 128)), (64, (128, 256)), (16, (128,)))  # each with its neighbours
# (positions, channels, whether it drops out): the grids do in training, and the head
NORMALIZED = {
    (p, c, dropout)
    for p, channels in (*_GRIDS, *_POINTS, *((m * NEIGHBORS, channels) for m, channels in _GROUPS))
    for c in channels
    for dropout in ((True, False) if (p, channels) in _GRIDS or (p, c) == (2048, 128) else (False,))
}
DESCRIBED = (2048, 1024)  # points of the clouds whose local moments are taken
LATENTS = ((2048 * 4,), (128,))  # of points and of shape
NEAREST = ((3, 8), (3, 32), (64, 64))  # (dimensions, neighbours) of the drop-in modules


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and the shared memory that one program may take there, in bytes."""

    backend: str
    arch: int | str
    warp_size: int
    shared: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}


@dataclass(frozen=True)
class Row:
    """One compiled kernel. ``most_registers``: that a thread of it could have had."""

    kernel: str
    variant: str
    registers: int
    most_registers: int
    spills: int
    shared: int
    loads: str
    stores: str


def run_all(device: torch.device, dtypes: Sequence[torch.dtype] = tuple(FEATURE_DTYPES.values())) -> None:
    """Launch every kernel, forward and backward, at every shape of LION's layers. Values do not matter."""
    run_ops(device, dtypes)
    # All pairs, for evaluation: unlike all other ops these look at the values of their arguments.
    clouds = torch.zeros(4, 2048, 3, device=device)
    kernels.pairwise_chamfer(clouds, clouds, impl="triton")
    kernels.pairwise_chamfer(clouds, clouds.clone(), impl="triton")
    kernels.pairwise_emd(clouds, clouds, impl="triton")


def run_ops(device: torch.device, dtypes: Sequence[torch.dtype] = tuple(FEATURE_DTYPES.values())) -> None:
    """The part of ``run_all`` that never waits for the device."""

    def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(BATCH, *shape, dtype=dtype, device=device, requires_grad=True)

    def cloud(n: int) -> Tensor:
        return torch.zeros(BATCH, n, 3, device=device)

    def index(*shape: int) -> Tensor:
        return torch.zeros(BATCH, *shape, dtype=torch.int32, device=device)

    def backward(out: Tensor) -> None:
        out.backward(torch.zeros_like(out))

    key = torch.zeros(2, dtype=torch.int64, device=device)
    scalar = torch.ones(BATCH, device=device)
    learned = scalar.clone().requires_grad_()
    for shape, dtype in product(LATENTS, dtypes):
        x = features(*shape, dtype=dtype)
        kernels.normal_noise(x.shape, key, impl="triton")
        for alpha in (scalar, learned):
            backward(kernels.q_sample(x, alpha, scalar, key, impl="triton"))
            backward(kernels.posterior_q_sample(x, x, alpha, scalar, key, impl="triton"))
        backward(kernels.noise_mse(x, key, impl="triton"))
        backward(kernels.ancestral_step(x, x, scalar, scalar, scalar, key, impl="triton"))
        backward(kernels.gaussian_kl(x, x, impl="triton"))

    for (n, r), channels in VOXELIZED.items():
        plan = kernels.plan_voxels(kernels.voxel_coords(cloud(n), r, impl="triton"), r, impl="triton")
        for c, dtype in product(channels, dtypes):
            backward(kernels.avg_voxelize(features(n, c, dtype=dtype), plan.coords, r, plan=plan, impl="triton"))
        for (c, c2), dtype in product(CONVOLVED[n, r], dtypes):
            weight = torch.zeros(c2, c, 3, 3, 3, dtype=dtype, device=device, requires_grad=True)
            x = features(n, c, dtype=dtype)
            grid, moments = voxelize_conv3d_moments(x, plan.coords, weight, r, plan=plan, impl="triton")
            style = features(c2)
            backward(kernels.adagn(grid, style, style, None, None, 8, act="silu", moments=moments, impl="triton"))
        for c, dtype in product(GATHERED[n, r], dtypes):
            grid, style = features(r, r, r, c, dtype=dtype), features(c)
            backward(kernels.trilinear_devoxelize(grid, plan.coords, plan=plan, impl="triton"))
            squeeze, excite = (torch.zeros(shape, device=device) for shape in ((c // 8, c), (c, c // 8)))
            args = (style, style, 8, squeeze.requires_grad_(), excite.requires_grad_())
            extras: dict[str, Any] = {"offset": style, "points": features(n, c, dtype=dtype), "plan": plan}
            backward(kernels.adagn_devoxelize(grid, plan.coords, *args, **extras, impl="triton"))
            with torch.no_grad():
                kernels.adagn_devoxelize(grid, plan.coords, *args, **extras, impl="triton")

    for n, m in LEVELS:
        kernels.furthest_point_sample(cloud(n), m, impl="triton")
        kernels.ball_query(cloud(m), cloud(n), 0.1, NEIGHBORS, impl="triton")
        kernels.three_nn(cloud(n), cloud(m), impl="triton")
        for k in (1, NEIGHBORS):
            backward(kernels.group(features(n, 3), index(m, k), impl="triton"))
        for dtype in dtypes:
            weights, x = cloud(n).requires_grad_(), features(m, INTERPOLATED, dtype=dtype)
            backward(kernels.three_interpolate(x, weights, index(n, 3), impl="triton"))
            for c in NEIGHBORHOODS[n]:
                offsets, weight = features(m, NEIGHBORS, 3), torch.zeros(c, 3, device=device, requires_grad=True)
                x = features(n, c, dtype=dtype)
                backward(kernels.group_offsets(x, index(m, NEIGHBORS), offsets, weight, impl="triton"))
            for c, c2 in ABSTRACTED.get(m, ()):
                offsets, weight = features(m, NEIGHBORS, 3), torch.zeros(c, 3, device=device, requires_grad=True)
                matrix = torch.zeros(c2, c, dtype=dtype, device=device, requires_grad=True)
                styles = (kernels.Style(*[features(k)] * 3) for k in (c, c2))
                x, idx = features(n, c, dtype=dtype), index(m, NEIGHBORS)
                layers: Any = (offsets, weight, next(styles), matrix, next(styles), 8)
                backward(kernels.group_mlp_max(x, idx, *layers, impl="triton"))
                with torch.no_grad():
                    kernels.group_mlp_max(x, idx, *layers, impl="triton")
            for c in MAXIMA[m]:
                x, style = features(m, NEIGHBORS, c, dtype=dtype), features(c)
                backward(kernels.adagn_max_neighbors(x, style, style, 8, offset=style, impl="triton"))

    for (p, c, dropout), dtype in product(sorted(NORMALIZED), dtypes):
        x, style = features(p, c, dtype=dtype), features(c)
        drop: dict[str, Any] = {"dropout": 0.1, "key": key} if dropout else {}
        backward(kernels.adagn(x, style, style, None, None, 8, act="silu", offset=style, **drop, impl="triton"))
    for (n, h), dtype in product(ATTENDED, dtypes):
        backward(kernels.linear_attention(features(n, 3, h, 32, dtype=dtype), impl="triton"))
    for dtype in dtypes:
        backward(kernels.dropout(features(2048, dtype=dtype), 0.3, key, impl="triton"))
    backward(kernels.adagn(features(2048, 32), None, None, None, None, 8, impl="triton"))

    for n in DESCRIBED:
        kernels.local_moments(cloud(n), 0.8, impl="triton")

    # A whole cloud of ShapeNet.
    kernels.furthest_point_sample(cloud(15_000), 2048, impl="triton")
    kernels.plan_voxels(cloud(15_000), 32, impl="triton")
    x = features(2048, 3)
    backward(kernels.nearest_neighbor(x, x, impl="triton")[0])
    backward(kernels.chamfer_distance(x, x, impl="triton"))
    backward(kernels.approx_emd(x, x, impl="triton"))
    backward(kernels.auction_emd(x, x, 0.005, 2, impl="triton")[0])
    lengths = torch.full((BATCH,), 2048, device=device)
    for (d, k), ragged in product(NEAREST, (None, lengths)):
        points = features(2048, d)
        backward(kernels.knn(points, points, k, lengths=ragged, impl="triton")[0])


class _NoGPU:
    """Stands for Triton's driver: tells it what to compile for."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(target.backend, target.arch, target.warp_size)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return f"no {self.target}"  # Triton keeps what it compiled by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def standing_in(target: Target) -> Iterator[None]:
    """Ops take tensors on any device for the target's, and Triton compiles for it."""
    from triton.runtime import driver

    before = driver._active
    driver.set_active(_NoGPU(target))
    try:
        with patch.object(_checks, "interpreting", lambda: True):
            yield
    finally:
        driver._active = before


@contextmanager
def recording(target: Target | None) -> Iterator[dict[str, Any]]:
    """Collect the compiled kernels, by Triton's hash, of all launches in this block.

    With a target kernels are compiled for it and not run: their outputs hold zeros (integers) or anything.
    """
    from triton.runtime.jit import JITFunction

    compiled: dict[str, Any] = {}
    launch = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=warmup or target is not None, **kwargs)
        compiled[kernel.hash] = kernel
        for x in args if target is not None else ():
            if isinstance(x, Tensor) and not x.is_floating_point():
                x.data.zero_()  # what comes next may index with it
        return kernel

    with patch.object(JITFunction, "run", record), standing_in(target) if target else nullcontext():
        yield compiled


def compile_all(target: Target, dtypes: Sequence[torch.dtype] = tuple(FEATURE_DTYPES.values())) -> dict[str, Any]:
    """Every kernel compiled for a target, by Triton's hash."""
    with recording(target) as compiled:
        run_all(torch.device("cpu"), dtypes)
    return compiled


def describe(kernel: Any, brief: bool = False) -> Row:
    """Read one compiled kernel's machine code; ``brief``: not its accesses, if it has no local memory to spill to."""
    source = kernel.src
    names = [re.sub(r"_ptr$", "", p.name) for p in source.fn.params]
    constants = {names[k[0]]: v for k, v in source.constants.items() if isinstance(v, (int, bool))}
    dtypes = Counter(ty[1:] for ty in source.signature.values() if ty.startswith("*"))
    variant = " ".join(
        ["/".join(dtypes), *(f"{k}={v}" for k, v in constants.items()), f"warps={kernel.metadata.num_warps}"]
    )
    amd = "amdgcn" in kernel.asm
    registers, spills, loads, stores = _read_amdgcn(kernel.asm) if amd else _read_cubin(kernel.asm, brief)
    threads = kernel.metadata.num_warps * kernel.metadata.target.warp_size
    most = min(512, (512 << 8) // threads) if amd else min(255, (1 << 16) // threads)
    return Row(kernel.name.strip("_"), variant, registers, most, spills, kernel.metadata.shared, loads, stores)


def _read_cubin(asm: dict[str, Any], brief: bool) -> tuple[int, int, str, str]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
        registers = max(int(n) for n in re.findall(r"\bREG:(\d+)", usage))
        if brief and set(re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage)) == {"0"}:
            return registers, 0, "", ""
        code = _tool("nvdisasm", "-c", "--no-dataflow", str(cubin))
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    width = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}

    def accesses(name: str) -> str:
        found = (m.split(".") for m in re.findall(rf"\b{name}((?:\.\w+)*)", code))
        return _widths(next((width[part] for part in parts if part in width), 32) for parts in found)

    return registers, spills, accesses("LDG"), accesses("STG")


def _read_amdgcn(asm: dict[str, Any]) -> tuple[int, int, str, str]:
    code = asm["amdgcn"]
    registers = int(re.findall(r"\.vgpr_count:\s*(\d+)", code)[0])
    spills = len(re.findall(r"\bscratch_(?:load|store)", code))  # what leaves its registers for others' is no access
    width = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}

    def accesses(name: str) -> str:
        return _widths(
            width[m] for m in re.findall(rf"\b(?:global|buffer|flat)_{name}_[us]?(byte|short|dword(?:x[234])?)\b", code)
        )

    return registers, spills, accesses("load"), accesses("store")


def _widths(bits: Iterator[int]) -> str:
    """``4x128 1x32``: how many accesses of how many bits."""
    return " ".join(f"{n}x{b}" for b, n in sorted(Counter(bits).items(), reverse=True))


def _tool(name: str, *arguments: str) -> str:
    """Output of one of the CUDA tools that Triton's package brings."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def faults(row: Row, target: Target) -> list[str]:
    """What is wrong with a kernel, in words.

    A few accesses of a kernel that could have had more registers are its compiler's choice: more programs run at once.
    """
    spilled = row.spills and row.registers >= row.most_registers
    found = [f"{row.spills} accesses to spilled registers"] if spilled else []
    if row.shared > target.shared:
        found.append(f"{row.shared} bytes of shared memory, {target.shared} at most")
    return found


def device_target() -> str | None:
    """Which target this machine's GPU is, if it is one."""
    major, minor = torch.cuda.get_device_capability()
    return next((name for name, t in TARGETS.items() if t.arch == 10 * major + minor), None)


def device_differences(target: Target) -> list[str]:
    """Run every case on this machine's GPU; what it ran that the census did not compile, or that uses more there."""
    with recording(None) as ran:
        run_all(torch.device("cuda"))
    torch.cuda.synchronize()
    compiled = compile_all(target)
    found = []
    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(describe, ran.values()))
    for (key, kernel), row in zip(ran.items(), rows, strict=True):
        if key not in compiled:
            found.append(f"{row.kernel} {row.variant}: ran here, but the census does not compile it")
        elif (kernel.n_regs, kernel.n_spills) != (row.registers, 0):
            found.append(
                f"{row.kernel} {row.variant}: {kernel.n_regs} registers and {kernel.n_spills} spills on the GPU, "
                f"{row.registers} and 0 in the census"
            )
    found += [
        f"{describe(compiled[k]).kernel}: in the census, but never ran here" for k in compiled.keys() - ran.keys()
    ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lion_triton.kernels.census", description="Compile every kernel.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--check", action="store_true", help="exit 1 on a spill or too much shared memory")
    parser.add_argument("--brief", action="store_true", help="leave out the accesses, as far as no kernel may spill")
    parser.add_argument("--dtype", choices=FEATURE_DTYPES, help="of features (default: all)")
    parser.add_argument("--device", action="store_true", help="compare with what this machine's GPU runs")
    options = parser.parse_args()
    if unknown := set(options.targets) - TARGETS.keys():
        parser.error(f"target: expected one of {', '.join(TARGETS)}, got {', '.join(sorted(unknown))}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET: expected to be unset, got 1 (nothing is compiled then)")
    if options.device and not torch.cuda.is_available():
        parser.error("--device: expected a GPU, found none")

    device = device_target() if options.device else None
    if options.device and device is None:
        parser.error("--device: expected a GPU that is a target of the census")

    wrong = []
    dtypes = tuple(FEATURE_DTYPES.values()) if options.dtype is None else (FEATURE_DTYPES[options.dtype],)
    for name in options.targets or ([device] if device else TARGETS):
        with ThreadPoolExecutor() as pool:
            rows = sorted(
                set(pool.map(partial(describe, brief=options.brief), compile_all(TARGETS[name], dtypes).values())),
                key=lambda row: (row.kernel, row.variant),
            )
        _print_table(name, rows)
        wrong += [f"{name} {row.kernel} {row.variant}: {fault}" for row in rows for fault in faults(row, TARGETS[name])]
    if device:
        wrong += device_differences(TARGETS[device])
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong and (options.check or options.device) else 0


def _print_table(target: str, rows: list[Row]) -> None:
    header = ("kernel", "variant", "regs", "spills", "shared", "loads x bits", "stores x bits")
    table = [header, *((r.kernel, r.variant, r.registers, r.spills, r.shared, r.loads, r.stores) for r in rows)]
    widths = [max(len(str(row[i])) for row in table) for i in range(len(header))]
    print(f"\n{target}: {len(rows)} kernels")
    for row in table:
        print("  ".join(str(cell).ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
