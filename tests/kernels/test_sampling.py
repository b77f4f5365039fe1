from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lion_triton.kernels import sampling
from lion_triton.kernels._checks import Impl
from lion_triton.kernels.sampling import furthest_point_sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
both = pytest.mark.parametrize("impl", ["reference", "triton"])


def rand(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


def naive(points: Tensor, num_samples: int) -> np.ndarray:
    out = np.zeros((len(points), num_samples), np.int32)
    for b, p in enumerate(points.cpu().numpy()):
        for m in range(1, num_samples):
            chosen = p[out[b, :m]]
            out[b, m] = np.argmax([((q - chosen) ** 2).sum(1).min() for q in p])
    return out


@both
@pytest.mark.parametrize(("B", "N", "M"), [(2, 7, 3), (1, 1, 1), (3, 31, 31), (2, 128, 1), (2, 129, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values(impl: Impl, B: int, N: int, M: int, dtype: torch.dtype) -> None:
    points = rand(B, N, 3).float()  # the same clouds for both
    idx = furthest_point_sample(points.to(dtype), M, impl=impl)
    assert idx.dtype == torch.int32
    assert idx.is_contiguous()
    np.testing.assert_array_equal(idx.cpu().numpy(), naive(points.double(), M))


@pytest.fixture(params=["in registers", "in blocks"])
def small_block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of clouds beyond 4096 points, on small ones."""
    if request.param == "in blocks":
        monkeypatch.setattr(sampling, "_MOST_POINTS", 16)


@pytest.mark.usefixtures("small_block")
@pytest.mark.parametrize(("B", "N", "M"), [(2, 17, 17), (2, 48, 9), (1, 67, 20)], ids=str)
def test_values_in_blocks(B: int, N: int, M: int) -> None:
    points = rand(B, N, 3).float()
    idx = furthest_point_sample(points, M, impl="triton")
    np.testing.assert_array_equal(idx.cpu().numpy(), naive(points.double(), M))


def test_more_points_than_registers_hold() -> None:
    points = rand(2, 4099, 3).float()
    expected = furthest_point_sample(points, 4, impl="reference")
    assert torch.equal(furthest_point_sample(points, 4, impl="triton"), expected)


@pytest.mark.usefixtures("small_block")
@both
def test_ties_take_the_lowest_index(impl: Impl) -> None:
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).to(DEVICE)
    assert furthest_point_sample(corners[None], 8, impl=impl).tolist() == [[0, 7, 1, 2, 3, 4, 5, 6]]
    thrice = corners.repeat(3, 1)[None]
    assert furthest_point_sample(thrice, 9, impl=impl).tolist() == [[0, 7, 1, 2, 3, 4, 5, 6, 0]]


@pytest.mark.usefixtures("small_block")
@both
def test_coincident_points(impl: Impl) -> None:
    assert furthest_point_sample(torch.ones(2, 19, 3, device=DEVICE), 4, impl=impl).tolist() == [[0] * 4] * 2
    two_places = torch.tensor([0.0, 0, 1, 1]).view(1, 4, 1).expand(1, 4, 3).to(DEVICE)
    assert furthest_point_sample(two_places, 4, impl=impl).tolist() == [[0, 2, 0, 0]]


@both
def test_all_points_are_a_permutation(impl: Impl) -> None:
    idx = furthest_point_sample(rand(2, 50, 3), 50, impl=impl)
    assert idx.sort(1).values.tolist() == [list(range(50))] * 2


@pytest.mark.usefixtures("small_block")
def test_not_a_number_stays_in_bounds() -> None:
    points = rand(1, 20, 3)
    for cloud in (points.index_fill(1, torch.tensor([0, 18], device=DEVICE), torch.nan), points * torch.nan):
        idx = furthest_point_sample(cloud, 20, impl="triton")
        assert idx.min() >= 0
        assert idx.max() < 20


@both
def test_strides_and_gradients_do_not_matter(impl: Impl) -> None:
    points = rand(2, 40, 3)
    expected = furthest_point_sample(points, 9, impl=impl)
    assert torch.equal(furthest_point_sample(points.mT.contiguous().mT, 9, impl=impl), expected)
    assert torch.equal(furthest_point_sample(points.repeat(1, 1, 2)[..., :3], 9, impl=impl), expected)
    assert torch.equal(furthest_point_sample(points.clone().requires_grad_(), 9, impl=impl), expected)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(impl: Impl, dtype: torch.dtype) -> None:
    points = rand(2, 60, 3).to(dtype)
    expected = furthest_point_sample(points.float(), 20, impl="reference")
    assert torch.equal(furthest_point_sample(points, 20, impl=impl), expected)


@both
def test_empty_batch(impl: Impl) -> None:
    assert furthest_point_sample(rand(1, 4, 3)[:0], 2, impl=impl).shape == (0, 2)


def test_compiles_whole() -> None:
    # aot_eager: inductor would spend its time in the C++ compiler.
    compiled = torch.compile(furthest_point_sample, fullgraph=True, backend="aot_eager")
    points = rand(2, 20, 3).requires_grad_()
    assert torch.equal(compiled(points, 5, impl="triton"), furthest_point_sample(points, 5, impl="triton"))


def test_opcheck() -> None:
    op = torch.ops.lion_triton.furthest_point_sample.default
    torch.library.opcheck(op, (rand(2, 5, 3), 3), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("points", "num_samples", "message"),
    [
        (torch.zeros(2, 4, 3), 5, r"num_samples: expected at most the number of points \(4\), got 5"),
        (torch.zeros(2, 4, 3), 0, "num_samples: expected .* got 0"),
        (torch.zeros(2, 4, 3), 2.0, "num_samples: expected .* got 2.0"),
        (torch.zeros(2, 0, 3), 1, r"points: expected shape \(B, N, 3\) with N >= 1, got \(2, 0, 3\)"),
        (torch.zeros(4, 3), 1, r"points: expected shape .* got \(4, 3\)"),
        (torch.zeros(2, 4, 3, dtype=torch.int64), 1, "points: expected float32.* got torch.int64"),
        ([[[0.0, 0, 0]]], 1, "points: expected a tensor, got list"),
    ],
)
def test_bad_input(points: Any, num_samples: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        furthest_point_sample(points, num_samples)
