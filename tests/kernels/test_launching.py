"""What every op promises about its launches: it never waits for the device, and keeps no more than it must."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lion_triton.kernels import census, noise_mse, q_sample
from tests import fresh

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; the twin below runs without one")

# Everything by which Python could wait for a tensor's values. Nothing is compiled: launches are counted.
WITHOUT_A_GPU = """
import torch
from unittest.mock import patch
from triton.runtime.jit import JITFunction
from lion_triton.kernels import census, gather, neighborhood

def refuse(self, *args, **kwargs):
    raise AssertionError("waits for the device")

for name in "item tolist numpy cpu nonzero unique __bool__ __int__ __float__ __index__ masked_select".split():
    setattr(torch.Tensor, name, refuse)

gather.check_gather = neighborhood.check_gather = lambda *args: None  # looks at indices on a CPU only
launches = 0

def skip(self, *args, **kwargs):
    global launches
    launches += 1
    for x in args:
        if isinstance(x, torch.Tensor) and not x.is_floating_point():
            x.data.zero_()  # what comes next may index with it

%s
with patch.object(JITFunction, "run", skip), census.standing_in(census.TARGETS["sm_90"]):
    census.run_ops(torch.device("cpu"))
print(launches, "launches")
"""


def test_no_op_waits_for_the_device() -> None:
    result = fresh.python("-c", WITHOUT_A_GPU % "")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) > 50


def test_waiting_would_be_seen() -> None:
    wait = "census.run_ops = lambda device: torch.ones(1).item()"
    result = fresh.python("-c", WITHOUT_A_GPU % wait)
    assert result.returncode == 1
    assert "waits for the device" in result.stderr


@GPU
def test_no_op_synchronizes() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        census.run_ops(torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@GPU
def test_every_op_can_be_captured_in_a_graph() -> None:
    census.run_ops(torch.device("cuda"))  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        census.run_ops(torch.device("cuda"))
    graph.replay()
    torch.cuda.synchronize()


def diffuse_and_compare(x_0: Tensor, pred: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and the gradient of the loss, as a training step makes them around its network."""
    scalar, key = torch.full((len(x_0),), 0.6, device=x_0.device), torch.tensor([7, 0], device=x_0.device)
    x_t = q_sample(x_0, scalar, scalar, key, impl="triton")
    noise_mse(pred, key, scalar, impl="triton").sum().backward()
    assert pred.grad is not None
    return x_t, pred.grad


def test_diffusion_allocates_its_results_only(monkeypatch: pytest.MonkeyPatch) -> None:
    x_0, pred = torch.randn(2, 3000), torch.randn(2, 3000, requires_grad=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x_0, pred = x_0.to(device), pred.detach().to(device).requires_grad_()
    large = []

    def watch(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(*args: Any, **kwargs: Any) -> Tensor:
            made = allocate(*args, **kwargs)
            if made.numel() >= x_0.numel():
                large.append(made.shape)
            return made

        return watched

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, watch(getattr(owner, name)))
    x_t, grad = diffuse_and_compare(x_0, pred)
    assert large == [x_t.shape, grad.shape]


@GPU
def test_peak_memory_of_diffusion() -> None:
    x_0 = torch.randn(32, 2**20, device="cuda")
    pred = torch.randn_like(x_0).requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    diffuse_and_compare(x_0, pred)
    size = x_0.numel() * x_0.element_size()
    assert torch.cuda.max_memory_allocated() - before <= 2.05 * size  # x_t and the gradient; partial sums are small
