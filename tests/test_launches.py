"""How many kernels a network would launch on a GPU, and that they are counted. Outside Triton's interpreter."""

from __future__ import annotations

from tests import fresh

# Two elementwise operators, a view, and one op of Triton's; by hand, bytes of what each reads and writes.
LITTLE = """
import torch
from bench.launches import counting
from lion_triton.kernels import dropout

x, key = torch.empty(3, 8, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
with counting() as found:
    y = dropout((x * 2).relu().view(4, 6), 0.5, key)
assert y.shape == (4, 6), y.shape
assert found.kernels == {"mul": 1, "relu": 1, "dropout_kernel": 1}, found.kernels
assert found.count == 3
assert found.bytes == 3 * (96 + 96) + 24, found.bytes

assert not torch.amp.is_autocast_available("meta")
with counting(torch.bfloat16):
    assert torch.is_autocast_enabled("meta") and torch.get_autocast_dtype("meta") == torch.bfloat16

x, weight = (torch.empty(n, 4, *[k] * 3, device="meta", requires_grad=True) for n, k in ((2, 3), (8, 1)))
with counting() as found:
    out = torch.nn.functional.conv3d(x, weight)
    torch.autograd.grad(out, (x, weight), torch.empty_like(out))
assert out.is_contiguous(memory_format=torch.channels_last_3d)  # as cuDNN leaves what a channels-last network gives it
assert found.kernels == {"convolution": 1, "convolution_backward": 2}, found.kernels

tensors = [torch.empty(2, device="meta")] * 65
with counting() as found:
    torch._foreach_add(tensors, 1)
assert found.count == 2, found.kernels
"""
POINT_PRIOR = """
import torch
from bench.launches import count, networks

forward, both = count(*networks(32)["point prior"], torch.bfloat16)
print(forward.count, both.count, forward.bytes, both.bytes)
"""


def run(script: str) -> str:
    result = fresh.python("-c", script)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_kernels_and_bytes_are_counted() -> None:
    run(LITTLE)


def test_launches_and_bytes_of_the_point_prior() -> None:
    forward, both, forward_bytes, both_bytes = map(int, run(POINT_PRIOR).split())
    assert 200 < forward <= 320
    assert 500 < both <= 785
    assert forward_bytes < 5.27e9
    assert both_bytes < 14.56e9  # 45% of what it was when counting began
