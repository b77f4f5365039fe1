from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lion_triton.kernels import adagn
from lion_triton.kernels import adagn_max_neighbors as fused
from lion_triton.kernels._checks import Impl, interpreting
from lion_triton.kernels.adagn_max_neighbors import (
    _adagn_max_neighbors_bwd_op,
    _adagn_max_neighbors_op,
    _adagn_max_neighbors_reference_bwd_op,
    _adagn_max_neighbors_reference_op,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = pytest.mark.parametrize("impl", ["reference", "triton"])
EPS = 1e-5

# B, M, K, C, groups
CASES = [
    (2, 5, 1, 8, 4),
    (1, 1, 1, 8, 2),
    (3, 13, 5, 24, 8),  # groups that are no power of two
    (2, 37, 9, 33, 3),  # channels that are none, and no multiple of 8
    (1, 3, 4, 264, 8),  # more channels than a program has
]
cases = pytest.mark.parametrize(("B", "M", "K", "C", "G"), CASES, ids=["-".join(map(str, case)) for case in CASES])
shared = pytest.mark.parametrize("with_offset", [True, False], ids=["offset", "plain"])
Inputs = list[Tensor | None]


def _inputs(
    B: int, M: int, K: int, C: int, with_offset: bool = True, dtype: torch.dtype = torch.float64
) -> list[Tensor | None]:
    """x, scale, shift, offset."""
    torch.manual_seed(0)
    values = [2 * torch.randn(B, M, K, C) + 1, 1 + 0.5 * torch.randn(B, C), torch.randn(B, C), torch.randn(B, C)]
    leaves: Inputs = [v.to(DEVICE, dtype).requires_grad_() for v in values]
    return leaves if with_offset else [*leaves[:3], None]


def _call(inputs: Inputs, G: int, impl: Impl) -> Tensor:
    x, scale, shift, offset = inputs
    return fused(x, scale, shift, G, EPS, offset=offset, impl=impl)


def _plain(inputs: Inputs, G: int) -> Tensor:
    """What the op is short for."""
    x, scale, shift, offset = inputs
    return adagn(x, scale, shift, None, None, G, EPS, "silu", offset=offset, impl="reference").max(2).values


def _results(y: Tensor, inputs: Inputs) -> list[Tensor]:
    """The output, then every gradient."""
    torch.manual_seed(1)
    cotangent = torch.randn(y.shape, dtype=torch.float64).to(y)
    return [y.detach(), *torch.autograd.grad(y, [v for v in inputs if v is not None and v.requires_grad], cotangent)]


def _leaves(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    return [v if v is None else v.detach().clone().to(dtype or v.dtype).requires_grad_() for v in inputs]


@cases
@shared
def test_reference_is_the_composition(B: int, M: int, K: int, C: int, G: int, with_offset: bool) -> None:
    inputs = _inputs(B, M, K, C, with_offset)
    got, expected = (_results(y, inputs) for y in (_call(inputs, G, "reference"), _plain(inputs, G)))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def _assert_as_good_as_the_reference(inputs: Inputs, G: int) -> None:
    """Output and gradients at most twice as far from float64 as the reference of the same dtypes."""
    ours, reference = (_results(_call(v, G, i), v) for v, i in ((_leaves(inputs), "triton"), (inputs, "reference")))
    double = _leaves(inputs, torch.float64)
    for x, y, z in zip(ours, reference, _results(_call(double, G, "reference"), double), strict=True):
        assert x.shape == y.shape == z.shape
        assert x.dtype == y.dtype
        # The second term is for a reference that is right by chance.
        allowed = 2 * (y - z).abs().max() + (2e-6 if interpreting() else 5e-6) * z.abs().max()
        if interpreting() and x.dtype == torch.bfloat16:
            # The interpreter truncates where a GPU rounds: a whole unit in the last place, not half.
            allowed = 2.0**-7 * z.abs().max()
        assert (x - z).abs().max() <= allowed


@cases
@shared
def test_triton_is_as_good_as_the_reference(B: int, M: int, K: int, C: int, G: int, with_offset: bool) -> None:
    _assert_as_good_as_the_reference(_inputs(B, M, K, C, with_offset, torch.float32), G)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("mixed", [False, True], ids=["all", "features"])
def test_half_precision_by_triton(dtype: torch.dtype, mixed: bool) -> None:
    inputs = _inputs(2, 9, 5, 16, dtype=dtype)
    if mixed:
        inputs[1:] = _leaves(inputs[1:], torch.float32)
    _assert_as_good_as_the_reference(inputs, 8)


def test_triton_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lion_triton.kernels._groups._LEAST_CHUNK", 1)
    monkeypatch.setattr("lion_triton.kernels._groups._PROGRAMS", 10**9)
    _assert_as_good_as_the_reference(_inputs(2, 70, 3, 64, dtype=torch.float32), 8)


@BOTH
def test_rows_that_are_equal_share_their_maximum_by_the_first(impl: Impl) -> None:
    """As a ball query makes them, which repeats a neighbour to fill up."""
    inputs = _inputs(2, 6, 5, 8)
    x = inputs[0].detach()
    x[:, :, 2:] = x[:, :, :1]
    inputs[0] = x.requires_grad_()
    got, expected = _results(_call(inputs, 4, impl), inputs), _results(_plain(inputs, 4), inputs)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    dx = got[1]
    assert torch.equal(dx[:, :, 2:], dx[:, :, 2:3].expand_as(dx[:, :, 2:]))  # only what the statistics add
    assert not torch.equal(dx[:, :, 0], dx[:, :, 2])


@BOTH
@pytest.mark.parametrize(("K", "dtype"), [(256, torch.uint8), (257, torch.int16), (2**15 + 1, torch.int32)])
def test_indices_are_as_small_as_they_can_be(K: int, dtype: torch.dtype, impl: Impl) -> None:
    op = _adagn_max_neighbors_op if impl == "triton" else _adagn_max_neighbors_reference_op
    if impl == "triton" and K > 1000:
        op = op.overload  # by shape alone: an interpreter would take its time
        with torch._subclasses.FakeTensorMode():
            x, style = torch.empty(1, 1, K, 1), torch.empty(1, 1)
            assert op(x, style, style, None, 1, EPS)[1].dtype == dtype
        return
    x, style = torch.zeros(1, 1, K, 1, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    x[:, :, -1] = 1
    index = op(x, style, style, None, 1, EPS)[1]
    assert index.dtype == dtype
    assert index.item() == K - 1


def test_triton_repeats_bit_for_bit_and_computes_float64_in_float32() -> None:
    inputs = _inputs(2, 9, 5, 16, dtype=torch.float32)
    once, twice = (_results(_call(v, 8, "triton"), v) for v in (_leaves(inputs), _leaves(inputs)))
    double = _leaves(inputs, torch.float64)
    for x, y, z in zip(once, twice, _results(_call(double, 8, "triton"), double), strict=True):
        assert torch.equal(x, y)
        assert z.dtype == torch.float64
        torch.testing.assert_close(x.double(), z, rtol=1e-5, atol=1e-5)


def test_gradcheck() -> None:
    inputs = _inputs(2, 3, 2, 4)
    assert torch.autograd.gradcheck(lambda *v: _call(list(v), 2, "reference"), inputs)


@BOTH
@pytest.mark.parametrize("mean", [0, 3000])
def test_float32_error_grows_only_with_the_rounding_of_the_mean(mean: float, impl: Impl) -> None:
    inputs = _inputs(1, 12, 5, 16, False, torch.float32)
    inputs[0] = (inputs[0].detach() + mean).requires_grad_()
    got = _results(_call(inputs, 8, impl), inputs)
    double = _leaves(inputs, torch.float64)
    for x, y in zip(got, _results(_plain(double, 8), double), strict=True):
        error = (x.double() - y).norm() / y.norm()
        assert error < 16 * torch.finfo(torch.float32).eps * (1 + mean / 2)


@BOTH
def test_constant_clouds_are_their_shift(impl: Impl) -> None:
    inputs = _inputs(2, 9, 5, 8, False, torch.float32)
    inputs[0] = torch.full_like(inputs[0], 1 / 3, requires_grad=True)
    y = _call(inputs, 4, impl)
    expected = torch.nn.functional.silu(inputs[2].detach())[:, None].expand_as(y)
    torch.testing.assert_close(y.detach(), expected, rtol=1e-4, atol=1e-4)
    assert all(g.isfinite().all() for g in _results(y, inputs))


@BOTH
def test_views_of_one_style_and_other_strides(impl: Impl) -> None:
    inputs = _inputs(2, 4, 3, 8, dtype=torch.float32)
    views = list(inputs)
    views[1:] = torch.cat([v.detach() for v in inputs[1:]], 1).split(8, 1)
    views[0] = inputs[0].detach().permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0).requires_grad_()
    y, dx = _results(_call(views, 4, impl), views)
    torch.testing.assert_close([y, dx], _results(_call(inputs, 4, impl), inputs)[:2])


@BOTH
def test_only_some_gradients(impl: Impl) -> None:
    inputs = _inputs(1, 4, 3, 8, dtype=torch.float32)
    expected = _results(_call(inputs, 4, impl), inputs)[1:]
    for i, want in enumerate(expected):
        alone = [v.detach().requires_grad_(i == j) for j, v in enumerate(inputs)]
        torch.testing.assert_close(_results(_call(alone, 4, impl), alone)[1], want)


@BOTH
def test_opcheck(impl: Impl) -> None:
    x, scale, shift, offset = _inputs(2, 4, 3, 8, dtype=torch.float32)
    triton = impl == "triton"
    op = _adagn_max_neighbors_op if triton else _adagn_max_neighbors_reference_op
    torch.library.opcheck(op.overload, (x, scale, shift, offset, 4, EPS))
    x, scale, shift, offset = (None if v is None else v.detach() for v in (x, scale, shift, offset))
    y, *saved = op(x, scale, shift, offset, 4, EPS)
    style = (scale, shift, offset) if triton else (scale, shift)
    backward = _adagn_max_neighbors_bwd_op if triton else _adagn_max_neighbors_reference_bwd_op
    never_differentiated = ("test_schema", "test_faketensor")
    torch.library.opcheck(backward.overload, (y, x, *style, *saved, 4), test_utils=never_differentiated)


@BOTH
def test_compiles_whole_with_a_dynamic_batch(impl: Impl) -> None:
    inputs = _inputs(3, 4, 3, 8, dtype=torch.float32)
    for v in inputs:
        torch._dynamo.mark_dynamic(v, 0)
    compiled = torch.compile(lambda *v: _call(list(v), 4, impl), fullgraph=True, backend="aot_eager")
    got, expected = (_results(f(*inputs), inputs) for f in (compiled, lambda *v: _call(list(v), 4, impl)))
    torch.testing.assert_close(got, expected)


X, STYLE = torch.zeros(2, 3, 4, 8), torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fused(X[0], STYLE, STYLE, 4), "x: expected shape (B, M, K, C) with M, K, C >= 1, got (3, 4, 8)"),
        (
            lambda: fused(X[:, :, :0], STYLE, STYLE, 4),
            "x: expected shape (B, M, K, C) with M, K, C >= 1, got (2, 3, 0, 8)",
        ),
        (lambda: fused(X, STYLE, STYLE, 3), "num_groups: expected a divisor of C = 8, got 3"),
        (lambda: fused(X, STYLE, STYLE[:1], 4), "shift: expected shape (2, 8), got (1, 8)"),
        (lambda: fused(X, STYLE, None, 4), "shift: expected a tensor, got NoneType"),
        (
            lambda: fused(X, STYLE, STYLE, 4, offset=STYLE.to("meta")),
            "offset: expected the device of x (cpu), got meta",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert str(error.value) == message
