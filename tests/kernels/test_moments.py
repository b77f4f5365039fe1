from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from lion_triton.kernels import _points, local_moments
from lion_triton.kernels._checks import Impl
from lion_triton.kernels.moments import local_moments_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One point; fewer than come at a time; as many, one more; more than a block of 128.
sizes = pytest.mark.parametrize(("B", "N"), [(1, 1), (2, 3), (2, 8), (3, 9), (1, 129)], ids=lambda n: str(n))
both = pytest.mark.parametrize("impl", ["reference", "triton"])


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def naive(points: Tensor, radius: float, scales: int) -> Tensor:
    """In float64, point by point."""
    clouds = points.double().cpu().numpy()
    out = np.empty((*clouds.shape[:2], scales, 10))
    for b, n, s in np.ndindex(out.shape[:3]):
        offsets = (clouds[b] - clouds[b, n]) / (radius / 2**s)
        w = np.maximum(1 - (offsets**2).sum(1), 0) ** 2
        mean = w @ offsets / w.sum()
        spread = (w * (offsets - mean).T) @ (offsets - mean) / w.sum()
        out[b, n, s] = [np.log(w.sum()), *mean, *spread[np.triu_indices(3)]]
    return torch.from_numpy(out).to(points.device)


@sizes
@pytest.mark.parametrize(("radius", "scales"), [(0.8, 3), (3.0, 1), (100.0, 2)])
def test_values(B: int, N: int, radius: float, scales: int) -> None:
    points = rand(B, N, 3, dtype=torch.float64)
    moments = local_moments(points, radius, scales, impl="reference")
    assert moments.dtype == torch.float64 and moments.is_contiguous()
    torch.testing.assert_close(moments, naive(points, radius, scales), rtol=1e-10, atol=1e-10)


def assert_as_good_as_reference(points: Tensor, radius: float = 0.8) -> None:
    """At most twice as far from float64 as the reference of the same dtype."""
    exact = local_moments(points.double(), radius, impl="reference")
    ours, reference = (local_moments(points, radius, impl=impl) for impl in ("triton", "reference"))
    assert ours.dtype == reference.dtype and ours.shape == exact.shape and ours.is_contiguous()
    # The second term is for a reference that is right by chance.
    allowed = 2 * (reference - exact).abs().amax((0, 1, 2)) + 1e-6 * exact.abs().amax((0, 1, 2))
    assert ((ours - exact).abs().amax((0, 1, 2)) <= allowed).all()


@sizes
def test_triton(B: int, N: int) -> None:
    assert_as_good_as_reference(rand(B, N, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    points = rand(2, 11, 3, dtype=dtype)
    assert_as_good_as_reference(points)
    for impl in ("reference", "triton"):
        assert torch.equal(local_moments(points, 0.8, impl=impl), local_moments(points.float(), 0.8, impl=impl))


def test_triton_computes_float64_in_float32() -> None:
    points = rand(2, 11, 3, dtype=torch.float64)
    ours, exact = (local_moments(points, 0.8, impl=impl) for impl in ("triton", "reference"))
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


@both
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_points_without_others_have_zeros(impl: Impl, scale: float) -> None:
    """Exactly, wherever they are."""
    points = scale * rand(2, 9, 3, seed=1)
    radius = 0.9 * torch.cdist(points, points).add(torch.eye(9, device=DEVICE) * 1e30).min().item()
    assert not local_moments(points, radius, impl=impl).any()


@both
def test_coincident_points(impl: Impl) -> None:
    moments = local_moments(torch.ones(1, 9, 3, device=DEVICE), 0.5, impl=impl)
    expected = torch.tensor([np.log(9.0)] + [0.0] * 9, device=DEVICE, dtype=torch.float32).expand(1, 9, 3, 10)
    torch.testing.assert_close(moments, expected, rtol=1e-6, atol=1e-6)


@both
def test_normal_and_distance_of_a_plane(impl: Impl) -> None:
    """Of the last point, which lies off the plane of all others, far from the origin."""
    normal = torch.tensor([2.0, -1.0, 2.0], device=DEVICE) / 3
    points = 0.3 * rand(1, 60, 3, dtype=torch.float64).to(torch.float32)
    points -= (points @ normal)[..., None] * normal
    points = torch.cat([points, 0.05 * normal.expand(1, 1, 3)], 1)
    radius = 1.0
    moments = local_moments(points + 100, radius, 1, impl=impl)[0, :, 0]
    i, j = torch.triu_indices(3, 3)
    spread = torch.empty(61, 3, 3, device=DEVICE)
    spread[:, i, j] = spread[:, j, i] = moments[:, 4:]
    axis = torch.linalg.eigh(spread).eigenvectors[-1, :, 0]
    # The point counts itself, so that the mean of its neighbours is on its side of the plane by 1 / W.
    share = 1 - 1 / moments[-1, 0].exp()
    assert (axis @ normal).abs() > 0.999
    torch.testing.assert_close(moments[-1, 1:4] @ normal, -0.05 / radius * share, rtol=1e-3, atol=0)


@both
def test_far_from_the_origin(impl: Impl) -> None:
    points = rand(1, 40, 3) + 1000
    torch.testing.assert_close(
        local_moments(points, 0.8, impl=impl).double(), naive(points, 0.8, 3), rtol=1e-4, atol=1e-4
    )


@both
def test_a_cloud_does_not_depend_on_its_batch(impl: Impl) -> None:
    """Bit for bit; nor does NaN in one spread to another, while it makes all of its own NaN."""
    points = rand(4, 9, 3)
    whole = local_moments(points, 0.8, 2, impl=impl)
    assert torch.equal(whole, local_moments(points, 0.8, 2, impl=impl))
    assert torch.equal(whole[1:2], local_moments(points[1:2], 0.8, 2, impl=impl))
    points[2, 5, 1] = torch.nan
    spoiled = local_moments(points, 0.8, 2, impl=impl)
    assert spoiled[2].isnan().all()
    assert torch.equal(spoiled[[0, 1, 3]], whole[[0, 1, 3]])


def test_both_say_the_same_of_a_point_at_infinity() -> None:
    """It has no weight, and its offset no value."""
    points = rand(1, 9, 3)
    points[0, 4, 0] = torch.inf
    ours, reference = (local_moments(points, 0.8, impl=impl) for impl in ("triton", "reference"))
    assert reference[..., 1].isnan().all() and reference[0, 4, :, 0].isnan().all()
    assert reference[0, :4, :, 0].isfinite().all()
    torch.testing.assert_close(ours, reference, equal_nan=True, rtol=1e-5, atol=1e-5)


@both
def test_strides_do_not_matter(impl: Impl) -> None:
    points = rand(2, 9, 3)
    strided = points.mT.contiguous().mT
    assert not strided.is_contiguous()
    torch.testing.assert_close(local_moments(strided, 0.8, impl=impl), local_moments(points, 0.8, impl=impl))


@both
def test_no_gradient(impl: Impl) -> None:
    assert not local_moments(rand(1, 4, 3).requires_grad_(), 0.8, impl=impl).requires_grad


@pytest.mark.parametrize("size", [1, 30, 250], ids=["one-row", "rows", "clouds"])
def test_reference_block_size_does_not_matter(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    points = rand(2, 9, 3, dtype=torch.float64)
    whole = local_moments_reference(points, 0.8, 3)
    monkeypatch.setattr(_points, "block_size", lambda x: size)
    torch.testing.assert_close(local_moments_reference(points, 0.8, 3), whole, rtol=1e-12, atol=1e-12)


@both
def test_numbers_of_numpy(impl: Impl) -> None:
    points = rand(1, 9, 3)
    moments = local_moments(points, cast(Any, np.float32(0.5)), cast(Any, np.int64(2)), impl=impl)
    assert torch.equal(moments, local_moments(points, 0.5, 2, impl=impl))


def test_compiles_whole() -> None:
    # aot_eager: inductor would spend its time in the C++ compiler.
    points, compiled = rand(2, 9, 3), torch.compile(local_moments, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(points, 0.8, impl="triton"), local_moments(points, 0.8, impl="triton"))


def test_opcheck() -> None:  # never differentiated
    op = torch.ops.lion_triton.local_moments.default
    torch.library.opcheck(op, (rand(2, 3, 3), 0.8, 2), test_utils=("test_schema", "test_faketensor"))


X = torch.zeros(2, 4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: local_moments(X[0], 0.8), r"points: expected shape \(B, N, 3\) with N >= 1, got \(4, 3\)"),
        (lambda: local_moments(X[:, :0], 0.8), r"points: expected shape .* got \(2, 0, 3\)"),
        (lambda: local_moments(X.int(), 0.8), "points: expected float32.* got torch.int32"),
        (lambda: local_moments(X, 0.0), "radius: expected a number > 0, got 0.0"),
        (lambda: local_moments(X, float("nan")), "radius: expected a number > 0, got nan"),
        (lambda: local_moments(X, cast(Any, "1")), "radius: expected a number > 0, got '1'"),
        (lambda: local_moments(X, 0.8, 0), "scales: expected an integer >= 1, got 0"),
        (lambda: local_moments(X, 0.8, cast(Any, 2.5)), "scales: expected an integer >= 1, got 2.5"),
        (lambda: local_moments(X, 0.8, impl=cast(Any, "cuda")), "impl: expected"),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
