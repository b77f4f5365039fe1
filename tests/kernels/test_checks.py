from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lion_triton import kernels
from lion_triton.kernels import check_finite
from lion_triton.kernels._checks import Impl, check_integer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEY = torch.tensor([7, 0], device=DEVICE)


def test_finite_clouds_pass() -> None:
    check_finite(points=torch.zeros(2, 4, 3), centers=torch.full((1, 1, 3), 3e38))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_first_bad_cloud_is_named(value: float) -> None:
    points = torch.zeros(5, 4, 3)
    points[3, 1, 2] = points[4, 0, 0] = value
    with pytest.raises(ValueError, match="^centers: .* got NaN or infinity in cloud 3 \\(2 clouds in all\\)$"):
        check_finite(points=torch.zeros(2, 4, 3), centers=points)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "points: expected a tensor, got NoneType"),
        (torch.zeros(2, 3).int(), "points: expected float32, .* got torch.int32"),
        (torch.zeros(3), r"points: expected shape \(B, ...\) .* got \(3,\)"),
    ],
)
def test_bad_input_is_named(value: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_finite(points=value)


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)], ids=lambda v: type(v).__name__)
def test_integers_of_numpy_are_integers(value: Any) -> None:
    assert type(check_integer("k", value, least=3)) is int


@pytest.mark.parametrize("value", [2, 3.0, "3", None, [3], torch.tensor(3.0)], ids=lambda v: type(v).__name__)
def test_what_is_no_integer_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match="^k: expected an integer >= 3, got "):
        check_integer("k", value, least=3)


def cloud(*shape: int) -> Tensor:
    return torch.rand(2, *shape, device=DEVICE, requires_grad=True)


def index(*shape: int) -> Tensor:
    return torch.zeros(2, *shape, dtype=torch.int32, device=DEVICE)


# An op of some arguments, all of which have a batch.
BATCHED: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "q_sample": (lambda *a, impl: kernels.q_sample(*a, KEY, impl=impl), (cloud(5, 3), cloud(), cloud())),
    "posterior_q_sample": (
        lambda *a, impl: kernels.posterior_q_sample(*a, KEY, impl=impl),
        (cloud(5, 3), cloud(5, 3), cloud(), cloud()),
    ),
    "noise_mse": (lambda x, w, impl: kernels.noise_mse(x, KEY, w, impl=impl), (cloud(5, 3), cloud())),
    "noise_mse-one-element": (lambda x, impl: kernels.noise_mse(x, KEY, impl=impl), (cloud(),)),
    "ancestral_step": (
        lambda *a, impl: kernels.ancestral_step(*a, *[torch.ones(len(a[0]), device=DEVICE)] * 3, KEY, impl=impl),
        (cloud(5, 3), cloud(5, 3)),
    ),
    "gaussian_kl": (kernels.gaussian_kl, (cloud(5, 3), cloud(5, 3))),
    "nearest_neighbor": (kernels.nearest_neighbor, (cloud(5, 3), cloud(4, 3))),
    "chamfer_distance": (kernels.chamfer_distance, (cloud(5, 3), cloud(4, 3))),
    "approx_emd": (kernels.approx_emd, (cloud(5, 3), cloud(4, 3))),
    "knn": (lambda *a, impl: kernels.knn(*a, 3, impl=impl), (cloud(5, 4), cloud(6, 4))),
    "auction_emd": (lambda *a, impl: kernels.auction_emd(*a, 0.1, 3, impl=impl), (cloud(5, 3), cloud(5, 3))),
    "ball_query": (lambda *a, impl: kernels.ball_query(*a, 0.5, 3, impl=impl), (cloud(4, 3), cloud(5, 3))),
    "local_moments": (lambda x, impl: kernels.local_moments(x, 0.5, impl=impl), (cloud(5, 3),)),
    "three_nn": (kernels.three_nn, (cloud(5, 3), cloud(4, 3))),
    "group": (kernels.group, (cloud(5, 6), index(4, 3))),
    "group_offsets": (
        lambda *a, impl: kernels.group_offsets(*a, torch.ones(6, 3, device=DEVICE), impl=impl),
        (cloud(5, 6), index(4, 3), cloud(4, 3, 3)),
    ),
    "group_mlp_max": (
        lambda x, idx, offsets, *style, impl: kernels.group_mlp_max(
            *(x, idx, offsets, torch.ones(6, 3, device=DEVICE), kernels.Style(*style[:3])),
            *(torch.ones(4, 6, device=DEVICE), kernels.Style(*style[3:]), 2),
            impl=impl,
        ),
        (cloud(5, 6), index(4, 3), cloud(4, 3, 3), *(cloud(6) for _ in range(3)), *(cloud(4) for _ in range(3))),
    ),
    "linear_attention": (kernels.linear_attention, (cloud(5, 3, 2, 4),)),
    "dropout": (lambda x, impl: kernels.dropout(x, 0.5, KEY, impl=impl), (cloud(5, 6),)),
    "adagn_devoxelize": (
        lambda x, p, *style, impl: kernels.adagn_devoxelize(
            x, p, *style, 2, torch.ones(1, 6, device=DEVICE), torch.ones(6, 1, device=DEVICE), impl=impl
        ),
        (cloud(2, 2, 2, 6), cloud(5, 3).detach(), cloud(6), cloud(6)),
    ),
    "adagn_max_neighbors": (
        lambda *a, impl: kernels.adagn_max_neighbors(*a, 2, impl=impl),
        (cloud(4, 3, 6), cloud(6), cloud(6)),
    ),
    "three_interpolate": (kernels.three_interpolate, (cloud(5, 6), cloud(4, 3), index(4, 3))),
    "furthest_point_sample": (lambda x, impl: kernels.furthest_point_sample(x, 3, impl=impl), (cloud(5, 3),)),
    "avg_voxelize": (lambda *a, impl: kernels.avg_voxelize(*a, 2, impl=impl), (cloud(5, 6), cloud(5, 3).detach())),
    "voxelize_conv3d": (
        lambda *a, impl: kernels.voxelize_conv3d(*a, torch.ones(2, 6, 3, 3, 3, device=DEVICE), 2, impl=impl),
        (cloud(5, 6), cloud(5, 3).detach()),
    ),
    "trilinear_devoxelize": (kernels.trilinear_devoxelize, (cloud(2, 2, 2, 6), cloud(5, 3).detach())),
    "adagn": (
        lambda *a, impl: kernels.adagn(*a, torch.ones(6, device=DEVICE), torch.zeros(6, device=DEVICE), 2, impl=impl),
        (cloud(5, 6), cloud(6), cloud(6)),
    ),
}


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_no_clouds_make_no_results(name: str, impl: Impl) -> None:
    """Of the shapes and dtypes that some clouds make, and with gradients."""
    function, args = BATCHED[name]
    some, none = function(*args, impl=impl), function(*[x[:0] for x in args], impl=impl)
    pairs = [(some, none)] if isinstance(some, Tensor) else list(zip(some, none, strict=True))
    for x, y in pairs:
        assert y.shape == (0, *x.shape[1:])
        assert (y.dtype, y.requires_grad) == (x.dtype, x.requires_grad)
    if pairs[0][1].requires_grad:
        pairs[0][1].sum().backward()
        assert not any(x.grad.any() for x in args if x.grad is not None)


def test_every_op_is_tried_without_clouds() -> None:
    no_batch = {"Style", "VoxelPlan", "plan_voxels", "voxel_coords", "check_finite", "exact_emd", "normal_noise"}
    matrices = {"pairwise_chamfer", "pairwise_emd"}
    assert {name.partition("-")[0] for name in BATCHED} == set(kernels.__all__) - no_batch - matrices
