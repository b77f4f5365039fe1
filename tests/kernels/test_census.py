from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lion_triton import kernels
from lion_triton.kernels import census, group_mlp, voxel_conv
from lion_triton.models import attention, layers, modulation, plan
from lion_triton.models.lion import LION, LIONConfig
from tests import fresh


def test_every_kernel_compiles_without_spills() -> None:
    """For one GPU and bfloat16; ``make census`` does it for all."""
    result = fresh.python("-m", "lion_triton.kernels.census", "sm_90", "--check", "--brief", "--dtype", "bfloat16")
    assert result.returncode == 0, result.stderr
    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    defined = {name.strip("_") for module in modules for name in vars(module) if name.endswith("_kernel")}
    compiled = {line.split()[0] for line in result.stdout.splitlines() if "warps=" in line}
    assert defined
    assert defined - compiled == set()


SPILLING = """
import sys, torch, triton, triton.language as tl
from lion_triton.kernels import census

@triton.jit
def _greedy_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, x / tl.sum(x))

@triton.jit
def _large_kernel(x_ptr, out_ptr):
    i = tl.arange(0, 32)
    t = tl.load(x_ptr + i[:, None] * 32 + i[None, :])
    tl.store(out_ptr + i[:, None] * 32 + i[None, :], tl.dot(t, t))

def run_all(device, dtypes):
    x = torch.zeros(65536, device=device)
    _greedy_kernel[(1,)](x, x, BLOCK=8192, num_warps=1)
    _large_kernel[(1,)](x, x)

census.run_all = run_all
census.TARGETS["sm_90"] = census.Target("cuda", 90, 32, shared=16)
sys.exit(census.main())
"""


@pytest.mark.parametrize("check", [True, False])
def test_spills_and_too_much_shared_memory_fail_the_check(tmp_path: Path, check: bool) -> None:
    script = tmp_path / "script.py"
    script.write_text(SPILLING)
    result = fresh.python(str(script), "sm_90", *["--check", "--brief"] * check)
    assert result.returncode == (1 if check else 0), result.stderr
    faults = result.stderr.strip().splitlines()
    assert any("sm_90 greedy_kernel" in line and "accesses to spilled registers" in line for line in faults)
    assert any("sm_90 large_kernel" in line and "bytes of shared memory, 16 at most" in line for line in faults)


def test_a_few_spills_below_the_limit_are_the_compilers_choice() -> None:
    row = census.Row("kernel", "", registers=255, most_registers=255, spills=3, shared=0, loads="", stores="")
    assert census.faults(row, census.TARGETS["sm_90"]) == ["3 accesses to spilled registers"]
    assert census.faults(replace(row, registers=72), census.TARGETS["sm_90"]) == []


def test_widths_are_read_from_machine_code(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SPILLING.replace("BLOCK=8192", "BLOCK=128").replace("x / tl.sum(x)", "1.0"))
    result = fresh.python(str(script), "sm_90")
    (row,) = (line for line in result.stdout.splitlines() if line.startswith("greedy_kernel"))
    assert row.split()[-1] == "1x128"  # 128 floats by one warp: one store of 16 bytes a thread
    assert "BLOCK=128 warps=1" in row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sm_10"], "expected one of sm_80, sm_90, sm_100, gfx942, got sm_10"),
        (["--device"], "expected a GPU, found none"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    if torch.cuda.is_available() and "--device" in arguments:
        pytest.skip("this machine has a GPU")
    result = fresh.python("-m", "lion_triton.kernels.census", *arguments)
    assert result.returncode == 2
    assert message in result.stderr


def test_covers_the_layers_of_lion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the published networks ask of the ops is among the census's shapes."""
    seen: set[tuple[str, Any]] = set()

    def watch(module: Any, name: str, key: Any) -> None:
        op = getattr(module, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen.add((name, key(*args, **kwargs)))
            return op(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    watch(modulation, "adagn", lambda x, *_, dropout, **__: (x[0, ..., 0].numel(), x.shape[-1], dropout > 0))
    watch(layers, "voxelize_conv3d_moments", lambda x, coords, w, r, plan: (x.shape[1], r, *w.shape[1::-1]))
    watch(voxel_conv, "avg_voxelize", lambda x, coords, r, **_: (x.shape[1], r, x.shape[2]))
    watch(layers, "adagn_devoxelize", lambda v, coords, *_, **__: (coords.shape[1], v.shape[1], v.shape[-1]))
    watch(layers, "three_interpolate", lambda x, w, idx: (idx.shape[1], x.shape[1], x.shape[2]))
    for module in (layers, group_mlp):
        watch(module, "group_offsets", lambda x, idx, *_, **__: (x.shape[1], *idx.shape[1:], x.shape[2]))
        watch(module, "adagn_max_neighbors", lambda x, *_, **__: tuple(x.shape[1:]))
    watch(layers, "group_mlp_max", lambda x, idx, o, w, s, matrix, *_: (*idx.shape[1:], *matrix.shape[::-1]))
    watch(attention, "linear_attention", lambda qkv: (qkv.shape[1], *qkv.shape[3:]))
    watch(plan, "three_nn", lambda x, centers: (x.shape[1], centers.shape[1]))
    watch(plan, "furthest_point_sample", lambda x, m: (x.shape[1], m))
    watch(plan, "ball_query", lambda centers, x, radius, k: (x.shape[1], centers.shape[1], k))
    watch(plan, "group", lambda x, idx: (x.shape[1], *idx.shape[1:], x.shape[2]))
    with torch.no_grad():
        lion = LION(LIONConfig()).eval()
        h, z = lion.encode(torch.randn(1, 2048, 3, generator=torch.Generator().manual_seed(0)))
        lion.decode(h, z)
        lion.point_prior(h, torch.tensor([5]), z)

    covered: set[tuple[str, Any]] = {("adagn", shape) for shape in census.NORMALIZED}
    for name, table in (("avg_voxelize", census.VOXELIZED), ("adagn_devoxelize", census.GATHERED)):
        covered |= {(name, (n, r, c)) for (n, r), channels in table.items() for c in channels}
    for (n, r), channels in census.CONVOLVED.items():
        covered |= {("voxelize_conv3d_moments", (n, r, *of)) for of in channels}
    covered |= {("linear_attention", (n, h, 32)) for n, h in census.ATTENDED}
    K = census.NEIGHBORS
    for n, m in census.LEVELS:
        covered |= {("three_nn", (n, m)), ("furthest_point_sample", (n, m)), ("ball_query", (n, m, K))}
        covered |= {("three_interpolate", (n, m, census.INTERPOLATED))}
        covered |= {("group", (n, m, k, 3)) for k in (1, K)}
        covered |= {("group_offsets", (n, m, K, c)) for c in census.NEIGHBORHOODS[n]}
        covered |= {("adagn_max_neighbors", (m, K, c)) for c in census.MAXIMA[m]}
        covered |= {("group_mlp_max", (m, K, *of)) for of in census.ABSTRACTED.get(m, ())}
    assert len(seen) > 50
    assert seen - covered == set()
