"""Random tensors and comparisons shared by the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def randint(low: int, high: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def double(x: Tensor) -> Tensor:
    """The same values in float64 on the CPU, where brute force runs, as a leaf."""
    return x.detach().cpu().double().requires_grad_()


def assert_close(actual: Any, expected: Any, tol: float = 1e-5) -> None:
    assert isinstance(actual, Tensor)
    torch.testing.assert_close(actual.detach().cpu().double(), expected.detach().double(), rtol=tol, atol=tol)


def assert_equal(actual: Any, expected: Any) -> None:
    assert isinstance(actual, Tensor)
    torch.testing.assert_close(actual.detach().cpu(), torch.as_tensor(expected), rtol=0, atol=0)


def assert_same_gradients(
    outputs: list[Any], expected: list[Any], leaves: list[Tensor], expected_leaves: list[Tensor], tol: float = 1e-4
) -> None:
    """Compare values, then gradients under random cotangents."""
    for actual, value in zip(outputs, expected, strict=True):
        assert_close(actual, value)
    cotangents = [rand(*o.shape, seed=1000 + i) for i, o in enumerate(outputs)]
    torch.autograd.backward(outputs, cotangents)
    torch.autograd.backward(expected, [c.cpu().double() for c in cotangents])
    for actual, value in zip(leaves, expected_leaves, strict=True):
        assert value.grad is not None
        assert_close(actual.grad, value.grad, tol)
