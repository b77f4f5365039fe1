"""Noise, diffusion's element-wise ops, losses and dropout: Triton and the reference agree."""

from __future__ import annotations

import torch
from torch import Tensor

from lion_triton import kernels
from tests.properties.strategies import (
    Draw,
    both,
    dtype_of,
    noise_key,
    one_of,
    property_of,
    size,
    tensor,
)

# Exponentials of larger numbers than these are infinite in float32, and so they are in both.
LOG = ("normal", "grid", "coincident", "tiny")


def batch_shape(draw: Draw) -> tuple[int, ...]:
    return (size(draw, 0, 3), *[size(draw, 1, 9) for _ in range(size(draw, 0, 3))])


def scalars(draw: Draw, count: int, batch: int) -> list[Tensor]:
    return [tensor(draw, batch, dtype=one_of(draw, torch.float32, torch.float64), kinds=LOG) for _ in range(count)]


@property_of(5)
def test_normal_noise(draw: Draw) -> str:
    return both(draw, kernels.normal_noise, [list(batch_shape(draw)), noise_key(draw)])


@property_of(5)
def test_q_sample(draw: Draw) -> str:
    shape = batch_shape(draw)
    arguments = [tensor(draw, *shape, dtype=dtype_of(draw)), *scalars(draw, 2, shape[0]), noise_key(draw)]
    return both(draw, kernels.q_sample, arguments)


@property_of(5)
def test_posterior_q_sample(draw: Draw) -> str:
    shape, dtype = batch_shape(draw), dtype_of(draw)
    mu, log_sigma = tensor(draw, *shape, dtype=dtype), tensor(draw, *shape, dtype=dtype, kinds=LOG)
    return both(draw, kernels.posterior_q_sample, [mu, log_sigma, *scalars(draw, 2, shape[0]), noise_key(draw)])


@property_of(5)
def test_ancestral_step(draw: Draw) -> str:
    shape = batch_shape(draw)
    x_t, eps = (tensor(draw, *shape, dtype=dtype_of(draw)) for _ in range(2))
    return both(draw, kernels.ancestral_step, [x_t, eps, *scalars(draw, 3, shape[0]), noise_key(draw)])


@property_of(5)
def test_noise_mse(draw: Draw) -> str:
    shape = batch_shape(draw)
    weight = scalars(draw, 1, shape[0])[0] if one_of(draw, False, True) else None
    return both(draw, kernels.noise_mse, [tensor(draw, *shape, dtype=dtype_of(draw)), noise_key(draw), weight])


@property_of(5)
def test_gaussian_kl(draw: Draw) -> str:
    shape, dtype = batch_shape(draw), dtype_of(draw)
    return both(draw, kernels.gaussian_kl, [tensor(draw, *shape, dtype=dtype) for dtype in (dtype, dtype_of(draw))])


@property_of(5)
def test_dropout(draw: Draw) -> str:
    x = tensor(draw, *batch_shape(draw), dtype=dtype_of(draw))
    return both(draw, kernels.dropout, [x, one_of(draw, 0, 1e-9, 0.1, 0.5, 1 - 1e-3, 1.0), noise_key(draw)])
