"""A slice of a batch, with the number of its first sample in the key, gets what it gets in the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lion_triton.kernels import (
    adagn,
    ancestral_step,
    dropout,
    noise_mse,
    normal_noise,
    posterior_q_sample,
    q_sample,
)
from lion_triton.kernels.noise import key_of_parts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, PARTS = 6, (slice(0, 1), slice(1, 4), slice(4, 6))
Call = Callable[..., Tensor]


def scalars(count: int, size: int) -> list[Tensor]:
    return list(torch.rand(count, size, generator=torch.Generator().manual_seed(1)).to(DEVICE))


def normalized(x: Tensor, key: Tensor, impl: Any) -> Tensor:
    scale, shift = x.new_ones(len(x), x.shape[-1]), x.new_zeros(len(x), x.shape[-1])
    return adagn(x, scale, shift, None, None, 2, dropout=0.4, key=key, impl=impl)


# Each of a tensor, one value per cloud, key and form.
OPS: dict[str, Call] = {
    "normal_noise": lambda x, a, key, impl: normal_noise(x.shape, key, impl=impl),
    "q_sample": lambda x, a, key, impl: q_sample(x, a, a, key, impl=impl),
    "posterior_q_sample": lambda x, a, key, impl: posterior_q_sample(x, x / 9, a, a, key, impl=impl),
    "ancestral_step": lambda x, a, key, impl: ancestral_step(x, x, a, a, a, key, impl=impl),
    "noise_mse": lambda x, a, key, impl: noise_mse(x, key, a, impl=impl),
    "dropout": lambda x, a, key, impl: dropout(x, 0.4, key, impl=impl),
    "adagn": lambda x, a, key, impl: normalized(x, key, impl),
}


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("shape", [(5, 2), (3, 8)], ids=["inside-a-counter", "whole-counters"])
@pytest.mark.parametrize("name", OPS)
def test_parts_are_those_of_the_whole(name: str, shape: tuple[int, ...], impl: Any) -> None:
    """Bit for bit, gradients too."""
    op, (values,) = OPS[name], scalars(1, BATCH)
    x = torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    far = 2**33  # samples before this batch, too

    def run(part: slice) -> list[Tensor]:
        leaf = x[part].clone().requires_grad_()
        key = torch.tensor([7, 2**40 + 3, far + part.start], device=DEVICE)
        y = op(leaf, values[part], key, impl)
        return [y.detach(), *(torch.autograd.grad(y.square().sum(), leaf) if y.requires_grad else ())]

    for got, expected in zip(map(torch.cat, zip(*map(run, PARTS), strict=True)), run(slice(0, BATCH)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("channels", [8, 6])
def test_dropout_of_clouds_too_large_for_a_program(channels: int, impl: Any) -> None:
    """By the kernels that take a cloud in chunks, whose sums may be cut otherwise: what is dropped out is the same."""
    x = torch.randn(2, 16384 // channels + 1, channels, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    masks = []
    for part in (slice(0, 2), slice(1, 2)):
        leaf = x[part].clone().requires_grad_()
        y = normalized(leaf, torch.tensor([7, 3, part.start], device=DEVICE), impl)
        y.backward(torch.ones_like(y))
        masks.append(y.detach() == 0)
    assert torch.equal(masks[0][1:], masks[1])
    assert masks[0][0].ne(masks[0][1]).any()


def test_no_third_number_is_none_before() -> None:
    for make in (lambda key: normal_noise((3, 5), key), lambda key: dropout(torch.ones(3, 5, device=DEVICE), 0.5, key)):
        assert torch.equal(make(torch.tensor([1, 2], device=DEVICE)), make(torch.tensor([1, 2, 0], device=DEVICE)))


def test_parts_of_samples() -> None:
    key = torch.tensor([1, 2, 5], device=DEVICE)
    of_samples = normal_noise((4, 3, 2), key)
    assert torch.equal(normal_noise((12, 2), key_of_parts(key, 3)), of_samples.flatten(0, 1))
    assert key.tolist() == [1, 2, 5]
