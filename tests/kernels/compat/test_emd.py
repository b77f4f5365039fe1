from __future__ import annotations

import torch
from torch import Tensor

from lion_triton.kernels import approx_emd
from lion_triton.kernels.compat.emd import EarthMoverDistanceFunction, earth_mover_distance
from tests.kernels.compat.cases import DEVICE, assert_close, leaf, rand


def exchange() -> tuple[Tensor, Tensor]:
    """Two clouds of two far points each; the best matching exchanges them."""
    x = torch.tensor([[1.7, -0.1, 0.1], [0.1, 1.2, 0.3]], device=DEVICE)
    y = torch.tensor([[0.3, 1.8, 0.2], [1.2, -0.2, 0.3]], device=DEVICE)
    return x, y


def test_is_the_sum_of_squared_distances() -> None:
    x, y = (leaf(cloud[None]) for cloud in exchange())
    a, b = (cloud.detach().cpu().double().requires_grad_() for cloud in (x, y))
    cost, expected = earth_mover_distance(x, y, transpose=False), (a - b.flip(1)).square().sum((1, 2))
    assert_close(cost, expected, 1e-4)
    cost.sum().backward()
    expected.sum().backward()
    assert a.grad is not None and b.grad is not None
    assert_close(x.grad, a.grad, 1e-4)
    assert_close(y.grad, b.grad, 1e-4)


def test_layouts() -> None:
    x, y = rand(2, 12, 3, seed=0), rand(2, 6, 3, seed=1)
    cost = 12 * approx_emd(x, y).cpu()
    assert_close(earth_mover_distance(x, y, transpose=False), cost, 1e-6)
    assert_close(earth_mover_distance(x.mT, y.mT), cost, 1e-6)
    assert_close(EarthMoverDistanceFunction.apply(x, y), cost, 1e-6)
    assert_close(earth_mover_distance(x[0].mT, y[0].mT), cost[:1], 1e-6)
    assert_close(earth_mover_distance(x[1], y[1], transpose=False), cost[1:], 1e-6)
