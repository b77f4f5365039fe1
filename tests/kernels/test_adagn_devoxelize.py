from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lion_triton.kernels import adagn, plan_voxels, trilinear_devoxelize
from lion_triton.kernels import adagn_devoxelize as fused
from lion_triton.kernels._checks import Impl, interpreting
from lion_triton.kernels.adagn_devoxelize import (
    _adagn_devoxelize_bwd_op,
    _adagn_devoxelize_op,
    _gather_moments_bwd_op,
    _gather_moments_op,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = pytest.mark.parametrize("impl", ["reference", "triton"])
EPS = 1e-5

# B, N, C, R, groups, hidden channels
CASES = [
    (2, 1, 8, 3, 8, 1),
    (1, 67, 8, 1, 2, 3),
    (3, 67, 24, 4, 8, 3),  # groups that are no power of two
    (2, 200, 16, 5, 4, 5),
    (1, 37, 32, 3, 8, 40),  # more hidden channels than are held at once
]
cases = pytest.mark.parametrize(("B", "N", "C", "R", "G", "H"), CASES, ids=["-".join(map(str, case)) for case in CASES])
extras = pytest.mark.parametrize("extra", [True, False], ids=["offset-points", "plain"])
Inputs = list[Tensor | None]


def _inputs(B: int, N: int, C: int, R: int, H: int, extra: bool, dtype: torch.dtype = torch.float64) -> Inputs:
    """Voxels, coords, scale, shift, squeeze, excite, offset, points; the coords are float32 throughout."""
    torch.manual_seed(0)
    values: Inputs = [
        2 * torch.randn(B, R, R, R, C) + 1,
        1 + 0.5 * torch.randn(B, C),
        torch.randn(B, C),
        torch.randn(H, C) / C**0.5,
        torch.randn(C, H) / H**0.5,
        torch.randn(B, C) if extra else None,
        torch.randn(B, N, C) if extra else None,
    ]
    voxels, *rest = (None if v is None else v.to(DEVICE, dtype).requires_grad_() for v in values)
    return [voxels, (torch.rand(B, N, 3) * (R - 1)).to(DEVICE), *rest]


def _call(inputs: Inputs, G: int, impl: Impl) -> Tensor:
    voxels, coords, scale, shift, squeeze, excite, offset, points = inputs
    return fused(voxels, coords, scale, shift, G, squeeze, excite, EPS, offset=offset, points=points, impl=impl)


def _plain(inputs: Inputs, G: int) -> Tensor:
    """What the op is short for."""
    voxels, coords, scale, shift, squeeze, excite, offset, points = inputs
    z = adagn(voxels, scale, shift, None, None, G, EPS, offset=offset, impl="reference")
    gate = ((z.mean((1, 2, 3)) @ squeeze.T).relu() @ excite.T).sigmoid()
    y = trilinear_devoxelize(z * gate[:, None, None, None], coords, impl="reference")
    return y if points is None else y + points


def _results(y: Tensor, inputs: Inputs) -> list[Tensor]:
    """The output, then every gradient."""
    torch.manual_seed(1)
    cotangent = torch.randn(y.shape, dtype=torch.float64).to(y)
    leaves = [v for v in inputs if v is not None and v.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]


def _leaves(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    return [
        v if v is None or not v.requires_grad else v.detach().clone().to(dtype or v.dtype).requires_grad_()
        for v in inputs
    ]


@cases
@extras
def test_reference_is_the_composition(B: int, N: int, C: int, R: int, G: int, H: int, extra: bool) -> None:
    inputs = _inputs(B, N, C, R, H, extra)
    inputs[1] = inputs[1].double()
    got, expected = (_results(y, inputs) for y in (_call(inputs, G, "reference"), _plain(inputs, G)))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def _assert_as_good_as_the_reference(inputs: Inputs, G: int) -> None:
    """Output and gradients at most twice as far from float64 as the reference of the same dtypes."""
    ours, reference = (_results(_call(v, G, i), v) for v, i in ((_leaves(inputs), "triton"), (inputs, "reference")))
    double = _leaves(inputs, torch.float64)
    exact = _results(_call(double, G, "reference"), double)
    for x, y, z in zip(ours, reference, exact, strict=True):
        assert x.shape == y.shape == z.shape
        assert x.dtype == y.dtype
        # The second term is for a reference that is right by chance.
        allowed = 2 * (y - z).abs().max() + (2e-6 if interpreting() else 5e-6) * z.abs().max()
        if interpreting() and x.dtype == torch.bfloat16:
            # The interpreter truncates where a GPU rounds: a whole unit in the last place, not half.
            allowed = 2.0**-7 * z.abs().max()
        assert (x - z).abs().max() <= allowed


@cases
@extras
def test_triton_is_as_good_as_the_reference(B: int, N: int, C: int, R: int, G: int, H: int, extra: bool) -> None:
    _assert_as_good_as_the_reference(_inputs(B, N, C, R, H, extra, torch.float32), G)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("mixed", [False, True], ids=["all", "features"])
def test_half_precision_by_triton(dtype: torch.dtype, mixed: bool) -> None:
    inputs = _inputs(2, 40, 16, 3, 2, True, dtype)
    if mixed:
        inputs[2:7] = [v.detach().float().requires_grad_() for v in inputs[2:7]]
    _assert_as_good_as_the_reference(inputs, 8)


def test_triton_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lion_triton.kernels._groups._LEAST_CHUNK", 1)
    monkeypatch.setattr("lion_triton.kernels._groups._PROGRAMS", 10**9)
    inputs = _inputs(2, 150, 32, 4, 2, True, torch.float32)  # 64 voxels and 150 points, in twos and threes
    _assert_as_good_as_the_reference(inputs, 8)


def test_triton_repeats_bit_for_bit_and_computes_float64_in_float32() -> None:
    inputs = _inputs(2, 40, 16, 3, 2, True, torch.float32)
    once, twice = (_results(_call(v, 8, "triton"), v) for v in (_leaves(inputs), _leaves(inputs)))
    double = _leaves(inputs, torch.float64)
    for x, y, z in zip(once, twice, _results(_call(double, 8, "triton"), double), strict=True):
        assert torch.equal(x, y)
        assert z.dtype == torch.float64
        torch.testing.assert_close(x.double(), z, rtol=1e-5, atol=1e-5)


def test_gradcheck() -> None:
    inputs = _inputs(2, 5, 4, 2, 2, True)

    def call(*v: Tensor) -> Tensor:
        return _call([v[0], inputs[1].double(), *v[1:]], 2, "reference")

    assert torch.autograd.gradcheck(call, [v for v in inputs if v.requires_grad])


@BOTH
@pytest.mark.parametrize("offset", [0, 3000])
def test_float32_error_grows_only_with_the_rounding_of_the_mean(offset: float, impl: Impl) -> None:
    inputs = _inputs(1, 50, 16, 5, 8, False, torch.float32)
    inputs[0] = (inputs[0].detach() + offset).requires_grad_()
    got = _results(_call(inputs, 8, impl), inputs)
    double = _leaves(inputs, torch.float64)
    for x, y in zip(got, _results(_plain(double, 8), double), strict=True):
        error = (x.double() - y).norm() / y.norm()
        assert error < 16 * torch.finfo(torch.float32).eps * (1 + offset / 2)


@BOTH
def test_constant_grids_stay_finite(impl: Impl) -> None:
    inputs = _inputs(2, 9, 8, 3, 2, True, torch.float32)
    inputs[0] = torch.full_like(inputs[0], 1 / 3, requires_grad=True)
    inputs[6] = None
    y = _call(inputs, 4, impl)
    shift, squeeze, excite, points = (inputs[i].detach() for i in (3, 4, 5, 7))
    expected = ((shift @ squeeze.T).relu() @ excite.T).sigmoid() * shift
    torch.testing.assert_close(y.detach(), expected[:, None] + points, rtol=1e-4, atol=1e-4)
    assert all(g.isfinite().all() for g in _results(y, inputs))


@BOTH
def test_empty_batch(impl: Impl) -> None:
    inputs = _inputs(0, 5, 8, 2, 2, True, torch.float32)
    y, dvoxels, dscale, _, dsqueeze, dexcite, _, dpoints = _results(_call(inputs, 4, impl), inputs)
    assert y.shape == dpoints.shape == (0, 5, 8)
    assert dvoxels.shape == (0, 2, 2, 2, 8)
    assert dscale.shape == (0, 8)
    assert not dsqueeze.any() and not dexcite.any()


@BOTH
def test_views_of_one_style_and_other_strides(impl: Impl) -> None:
    inputs = _inputs(2, 9, 8, 3, 2, True, torch.float32)
    both = torch.cat([v.detach() for v in (inputs[2], inputs[3], inputs[6])], 1)
    views = list(inputs)
    views[2], views[3], views[6] = both.split(8, 1)
    views[0] = inputs[0].detach().permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
    views[5] = inputs[5].detach().T.contiguous().T
    torch.testing.assert_close(_call(views, 4, impl), _call(inputs, 4, impl))


@BOTH
def test_only_some_gradients(impl: Impl) -> None:
    inputs = _inputs(1, 9, 8, 2, 2, True, torch.float32)
    expected = _results(_call(inputs, 4, impl), inputs)[1:]
    places = [i for i, v in enumerate(inputs) if v.requires_grad]
    for i, want in zip(places, expected, strict=True):
        alone = [v.detach().requires_grad_(i == j) for j, v in enumerate(inputs)]
        torch.testing.assert_close(_results(_call(alone, 4, impl), alone)[1], want)


@extras
def test_opcheck(extra: bool) -> None:
    inputs = _inputs(2, 9, 8, 2, 2, extra, torch.float32)
    voxels, coords, scale, shift, squeeze, excite, offset, points = inputs
    cells = plan_voxels(coords, 2, impl="triton").cells
    style = (scale, shift, offset, squeeze, excite)
    torch.library.opcheck(_adagn_devoxelize_op.overload, (voxels, coords, *cells, *style, points, 4, EPS, True))
    style = [None if v is None else v.detach() for v in style]
    with torch.no_grad():
        y, raw, _, saved, hidden = _adagn_devoxelize_op(voxels, coords, *cells, *style, points, 4, EPS, True)
    backward = (y, voxels.detach(), coords, *cells, *style, raw, saved, hidden, 4)
    never_differentiated = ("test_schema", "test_faketensor")
    torch.library.opcheck(_adagn_devoxelize_bwd_op.overload, backward, test_utils=never_differentiated)
    matrices, x = plan_voxels(coords, 2, impl="reference").matrices, voxels.detach().flatten(1, 3)
    torch.library.opcheck(_gather_moments_op.overload, (x.requires_grad_(), *matrices.corners, *matrices.corners_t))
    mean = torch.zeros(2, 8, device=DEVICE)
    backward = (x.detach(), mean, y.flatten(0, 1), mean, mean, *matrices.corners_t)
    torch.library.opcheck(_gather_moments_bwd_op.overload, backward, test_utils=never_differentiated)


@BOTH
def test_compiles_whole_with_a_dynamic_batch(impl: Impl) -> None:
    inputs = _inputs(3, 9, 8, 2, 2, True, torch.float32)
    for i in (0, 1, 2, 3, 6, 7):
        torch._dynamo.mark_dynamic(inputs[i], 0)
    compiled = torch.compile(lambda *v: _call(list(v), 4, impl), fullgraph=True, backend="aot_eager")
    got, expected = (_results(f(*inputs), inputs) for f in (compiled, lambda *v: _call(list(v), 4, impl)))
    torch.testing.assert_close(got, expected)


VOXELS, COORDS, STYLE = torch.zeros(2, 3, 3, 3, 8), torch.zeros(2, 5, 3), torch.zeros(2, 8)
SQUEEZE, EXCITE = torch.zeros(2, 8), torch.zeros(8, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fused(VOXELS[0], COORDS, STYLE, STYLE, 4, SQUEEZE, EXCITE),
            "voxels: expected shape (B, R, R, R, C) with R >= 1 and C >= 1, got (3, 3, 3, 8)",
        ),
        (
            lambda: fused(VOXELS, COORDS, STYLE, STYLE, 3, SQUEEZE, EXCITE),
            "num_groups: expected a divisor of C = 8, got 3",
        ),
        (
            lambda: fused(VOXELS, COORDS, STYLE, STYLE[:1], 4, SQUEEZE, EXCITE),
            "shift: expected shape (2, 8), got (1, 8)",
        ),
        (
            lambda: fused(VOXELS, COORDS, STYLE, STYLE, 4, SQUEEZE[:, :4], EXCITE),
            "squeeze: expected shape (2, 8), got (2, 4)",
        ),
        (
            lambda: fused(VOXELS, COORDS, STYLE, STYLE, 4, SQUEEZE, EXCITE[:, :1]),
            "excite: expected shape (8, 2), got (8, 1)",
        ),
        (
            lambda: fused(VOXELS, COORDS, STYLE, STYLE, 4, SQUEEZE, EXCITE, points=COORDS),
            "points: expected shape (2, 5, 8), got (2, 5, 3)",
        ),
        (
            lambda: fused(VOXELS, COORDS, STYLE, STYLE, 4, SQUEEZE, EXCITE, offset=STYLE.to("meta")),
            "offset: expected the device of voxels (cpu), got meta",
        ),
        (
            lambda: fused(VOXELS, COORDS, STYLE, STYLE, 4, SQUEEZE, EXCITE, plan=plan_voxels(COORDS, 4)),
            "plan: expected resolution 3, got 4",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert str(error.value) == message
