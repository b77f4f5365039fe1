from __future__ import annotations

import math
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lion_triton.kernels._checks import Impl, interpreting
from lion_triton.kernels.adagn import Activation, _adagn_bwd_op, _adagn_op, adagn
from lion_triton.kernels.dropout import dropout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = pytest.mark.parametrize("impl", ["reference", "triton"])
EPS = 1e-5

# (shape, groups)
CASES: list[tuple[tuple[int, ...], int]] = [
    ((3, 8), 8),  # no positions, one channel: every group is one element
    ((3, 8), 2),
    ((2, 1, 8), 4),
    ((1, 37, 8), 8),
    ((3, 13, 24), 8),
    ((2, 5, 3, 16), 8),
    ((2, 3, 3, 3, 6), 1),
]
cases = pytest.mark.parametrize(
    ("shape", "num_groups"), CASES, ids=[f"{'x'.join(map(str, shape))}-G{g}" for shape, g in CASES]
)
acts = pytest.mark.parametrize("act", ["silu", None])
# For the kernels: groups that are no power of two; several chunks, the last one short; more chunks than are combined
# at once; more channels than a step has elements.
TRITON_CASES = [*CASES, ((2, 67, 40), 40), ((1, 301, 32), 8), ((1, 53, 512), 512), ((1, 3, 2056), 8)]
triton_cases = pytest.mark.parametrize(
    ("shape", "num_groups"), TRITON_CASES, ids=[f"{'x'.join(map(str, shape))}-G{g}" for shape, g in TRITON_CASES]
)
styles = pytest.mark.parametrize("style", [True, False], ids=["style", "plain"])


@pytest.fixture(params=["held", "chunks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A program that holds whole groups of a cloud, or several with a chunk of its rows each."""
    if request.param == "chunks":
        module = sys.modules[adagn.__module__]  # whose name the function has taken
        monkeypatch.setattr(module, "_HELD", 0)
        monkeypatch.setattr(module, "_HELD_BACKWARD", 0)
    return request.param


def _inputs(shape: tuple[int, ...], style: bool, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    """x, scale, shift, weight, bias."""
    torch.manual_seed(0)
    B, C = shape[0], shape[-1]
    inputs = [
        2 * torch.randn(shape) + 1,
        1 + 0.5 * torch.randn(B, C) if style else None,
        torch.randn(B, C) if style else None,
        1 + 0.5 * torch.randn(C),
        torch.randn(C),
    ]
    return [None if v is None else v.to(DEVICE, dtype).requires_grad_() for v in inputs]


def _gradients(y: Tensor, inputs: list[Tensor | None]) -> list[Tensor]:
    torch.manual_seed(1)
    cotangent = torch.randn(y.shape, dtype=torch.float64).to(y)
    return list(torch.autograd.grad(y, [v for v in inputs if v is not None], cotangent))


def _naive(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, groups: int, act: Activation
) -> Tensor:
    """One Python number at a time."""
    B, C = x.shape[0], x.shape[-1]
    rows = x.reshape(B, -1, C).tolist()
    y = torch.empty(B, len(rows[0]), C, dtype=torch.float64)
    for b, g in product(range(B), range(groups)):
        channels = range(g * C // groups, (g + 1) * C // groups)
        values = [row[c] for row in rows[b] for c in channels]
        mean = math.fsum(values) / len(values)
        var = math.fsum((v - mean) ** 2 for v in values) / len(values)
        for p, c in product(range(len(rows[b])), channels):
            z = (rows[b][p][c] - mean) / math.sqrt(var + EPS) * weight[c].item() + bias[c].item()
            z = z * scale[b, c].item() + shift[b, c].item()
            y[b, p, c] = z / (1 + math.exp(-z)) if act == "silu" else z
    return y.view(x.shape).to(x.device)


def _plain(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, act: Activation
) -> Tensor:
    """torch's group norm on contiguous channels-first memory, gradients from autograd."""
    B, C = x.shape[0], x.shape[-1]
    y = F.group_norm(x.reshape(B, -1, C).mT.contiguous(), groups, weight, bias, EPS).mT
    if scale is not None and shift is not None:
        y = y * scale[:, None] + shift[:, None]
    return (F.silu(y) if act == "silu" else y).reshape(x.shape)


@cases
@acts
def test_values_against_loops(shape: tuple[int, ...], num_groups: int, act: Activation) -> None:
    inputs = _inputs(shape, style=True)
    y = adagn(*inputs, num_groups, act=act, impl="reference")
    torch.testing.assert_close(y, _naive(*inputs, num_groups, act), rtol=1e-12, atol=1e-12)


@cases
@acts
@styles
def test_gradients_against_autograd(shape: tuple[int, ...], num_groups: int, act: Activation, style: bool) -> None:
    inputs = _inputs(shape, style)
    y = adagn(*inputs, num_groups, act=act, impl="reference")
    expected = _plain(*inputs, num_groups, act)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(_gradients(y, inputs), _gradients(expected, inputs), rtol=1e-10, atol=1e-10)


@acts
@styles
def test_gradcheck(act: Activation, style: bool) -> None:
    inputs = _inputs((2, 3, 8), style)
    assert torch.autograd.gradcheck(lambda *v: adagn(*v, 4, act=act, impl="reference"), inputs)


def _run(
    inputs: list[Tensor | None], num_groups: int, act: Activation, impl: Impl, offset: Tensor | None = None, **drop: Any
) -> list[Tensor]:
    """The output, then every gradient."""
    leaves = [None if v is None else v.detach().clone().requires_grad_() for v in (*inputs, offset)]
    y = adagn(*leaves[:-1], num_groups, act=act, offset=leaves[-1], impl=impl, **drop)
    return [y.detach(), *_gradients(y, leaves)]


def _assert_as_good_as_reference(
    inputs: list[Tensor | None], num_groups: int, act: Activation, offset: Tensor | None = None, **drop: Any
) -> None:
    """Output and gradients at most twice as far from float64 as the reference of the same dtypes."""
    ours, reference = (_run(inputs, num_groups, act, impl, offset, **drop) for impl in ("triton", "reference"))
    *double, offset = (None if v is None else v.double() for v in (*inputs, offset))
    exact = _run(double, num_groups, act, "reference", offset, **drop)
    for x, y, z in zip(ours, reference, exact, strict=True):
        assert x.shape == y.shape == z.shape
        assert x.dtype == y.dtype
        # The second term is for a reference that is right by chance.
        allowed = 2 * (y - z).abs().max() + 1e-6 * z.abs().max()
        if not interpreting():  # a GPU's fast exponential and division
            allowed += 3e-6 * z.abs().max()
            if inputs[0][0].numel() == num_groups:  # one element each: rounding errors times rstd are all there is
                allowed += 4e-7 * EPS**-0.5
        if interpreting() and x.dtype == torch.bfloat16:
            # The interpreter truncates where a GPU rounds: a whole unit in the last place, not half.
            allowed = 2.0**-7 * z.abs().max()
        assert (x - z).abs().max() <= allowed


@triton_cases
@pytest.mark.parametrize(("act", "style"), [("silu", True), (None, False)], ids=["silu-style", "plain"])
def test_triton_is_as_good_as_the_reference(
    shape: tuple[int, ...], num_groups: int, act: Activation, style: bool, way: str
) -> None:
    _assert_as_good_as_reference(_inputs(shape, style, torch.float32), num_groups, act)


@pytest.mark.parametrize(("shape", "num_groups"), [((3, 13, 24), 8), ((2, 37, 16), 2)], ids=["C24", "C16"])
@pytest.mark.parametrize("per_cloud", [True, False], ids=["per-cloud", "shared"])
def test_triton_with_offset_and_dropout(shape: tuple[int, ...], num_groups: int, per_cloud: bool, way: str) -> None:
    offset = 3 * torch.randn((shape[0], shape[-1]) if per_cloud else shape[-1:], device=DEVICE)
    drop = {"dropout": 0.3, "key": torch.tensor([5, 2**33 + 1], device=DEVICE)}
    _assert_as_good_as_reference(_inputs(shape, True, torch.float32), num_groups, "silu", offset, **drop)
    _assert_as_good_as_reference(_inputs(shape, False, torch.float32), num_groups, None, offset)


@BOTH
@acts
@pytest.mark.parametrize("C", [24, 16])
def test_dropout_is_that_of_the_op_behind_it(impl: Impl, act: Activation, C: int, way: str) -> None:
    inputs, key = _inputs((2, 9, C), style=True, dtype=torch.float32), torch.tensor([3, 4], device=DEVICE)
    y = adagn(*inputs, 8, act=act, dropout=0.4, key=key, impl=impl)
    expected = dropout(adagn(*inputs, 8, act=act, impl=impl), 0.4, key, impl=impl)
    torch.testing.assert_close(y, expected)
    assert 0.2 < (y == 0).float().mean() < 0.6
    torch.testing.assert_close(_gradients(y, inputs), _gradients(expected, inputs))


@pytest.mark.parametrize("per_cloud", [True, False], ids=["per-cloud", "shared"])
@cases
def test_an_offset_is_added_first(shape: tuple[int, ...], num_groups: int, per_cloud: bool) -> None:
    inputs = _inputs(shape, style=True)
    B, C = shape[0], shape[-1]
    offset = torch.randn((B, C) if per_cloud else (C,), dtype=torch.float64, device=DEVICE).requires_grad_()
    y = adagn(*inputs, num_groups, act="silu", offset=offset, impl="reference")
    added = inputs[0] + (offset.view(B, *[1] * (len(shape) - 2), C) if per_cloud else offset)
    expected = _plain(added, *inputs[1:], num_groups, "silu")
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    gradients = (_gradients(v, [*inputs, offset]) for v in (y, expected))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@acts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("mixed", [False, True], ids=["all", "x"])
def test_half_precision_by_triton(act: Activation, dtype: torch.dtype, mixed: bool, way: str) -> None:
    x, *rest = _inputs((2, 37, 24), style=True, dtype=dtype)
    _assert_as_good_as_reference([x, *(v.float() if mixed else v for v in rest)], 8, act)


def test_triton_computes_float64_in_float32(way: str) -> None:
    inputs = _inputs((2, 37, 16), style=True)
    for x, y in zip(_run(inputs, 8, "silu", "triton"), _run(inputs, 8, "silu", "reference"), strict=True):
        assert x.dtype == y.dtype == torch.float64
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_triton_repeats_bit_for_bit(way: str) -> None:
    inputs = _inputs((1, 301, 32), style=True, dtype=torch.float32)
    for x, y in zip(_run(inputs, 8, "silu", "triton"), _run(inputs, 8, "silu", "triton"), strict=True):
        assert torch.equal(x, y)


@BOTH
def test_empty_batch(impl: Impl) -> None:
    y, dx, dscale, dshift, dweight, dbias = _run(_inputs((0, 5, 8), True, torch.float32), 4, "silu", impl)
    assert y.shape == dx.shape == (0, 5, 8)
    assert dscale.shape == dshift.shape == (0, 8)
    assert torch.equal(dweight, torch.zeros_like(dweight)) and torch.equal(dbias, torch.zeros_like(dbias))


@BOTH
def test_style_from_halves_of_one_tensor(impl: Impl) -> None:
    x, scale, shift, *rest = _inputs((2, 9, 8), style=True, dtype=torch.float32)
    both = torch.cat((scale, shift), 1).detach().requires_grad_()
    y, expected = (adagn(x, *s, *rest, 4, act="silu", impl=impl) for s in (both.chunk(2, 1), (scale, shift)))
    assert torch.equal(y, expected)
    (dboth,) = _gradients(y, [both])
    assert torch.equal(dboth, torch.cat(_gradients(expected, [scale, shift]), 1))
    strided = [v.detach().T.contiguous().T for v in (scale, shift)]
    assert torch.equal(adagn(x, *strided, *rest, 4, act="silu", impl=impl), expected)


@BOTH
def test_only_some_gradients(impl: Impl) -> None:
    inputs = _inputs((1, 9, 8), style=True, dtype=torch.float32)
    all_of_them = _run(inputs, 4, "silu", impl)[1:]
    for i, expected in enumerate(all_of_them):
        alone = [v.detach().requires_grad_(i == j) for j, v in enumerate(inputs)]
        (got,) = _gradients(adagn(*alone, 4, act="silu", impl=impl), [alone[i]])
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("act", "style"), [("silu", True), (None, False)], ids=["silu-style", "plain"])
def test_opcheck(act: Activation, style: bool) -> None:
    x, scale, shift, *_ = _inputs((2, 5, 8), True, torch.float32)
    offset, key = (torch.randn(2, 8, device=DEVICE), torch.tensor([1, 2], device=DEVICE)) if style else (None, None)
    inputs, options = (x, scale, shift, offset, key), (act == "silu", 0.5 if style else 0.0)
    torch.library.opcheck(_adagn_op.overload, (*inputs, None, 4, EPS, *options))
    inputs = [None if v is None else v.detach() for v in inputs]
    y, stats = _adagn_op(*inputs, None, 4, EPS, *options)
    torch.library.opcheck(
        _adagn_bwd_op.overload, (y, *inputs, stats, *options), test_utils=("test_schema", "test_faketensor")
    )


@BOTH
@pytest.mark.parametrize("offset", [0, 100, 3000])
def test_float32_error_grows_only_with_the_rounding_of_the_mean(offset: float, impl: Impl) -> None:
    """Subtracting the mean of x costs eps * offset / std at best; E[x^2] - E[x]^2 squares that ratio."""
    x, *rest = _inputs((2, 512, 64) if impl == "reference" else (1, 201, 32), style=True, dtype=torch.float32)
    x = (x.detach() + offset).requires_grad_()
    exact_inputs = [v.detach().double().requires_grad_() for v in (x, *rest)]
    y, exact = adagn(x, *rest, 8, act="silu", impl=impl), _plain(*exact_inputs, 8, "silu")
    pairs = zip([y, *_gradients(y, [x, *rest])], [exact, *_gradients(exact, exact_inputs)], strict=True)
    for got, expected in pairs:
        error = (got.double() - expected).norm() / expected.norm()
        assert error < (4 if interpreting() else 8) * torch.finfo(torch.float32).eps * (1 + offset / 2)


@acts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_half_precision_is_float32_rounded_once(act: Activation, dtype: torch.dtype) -> None:
    half = _inputs((2, 40, 16), style=True, dtype=dtype)
    full = [v.detach().float().requires_grad_() for v in half]
    y, expected = (adagn(*v, 8, act=act, impl="reference") for v in (half, full))
    assert y.dtype == dtype
    assert torch.equal(y, expected.to(dtype))
    cotangent = torch.randn_like(y)
    for got, want in zip(
        torch.autograd.grad(y, half, cotangent), torch.autograd.grad(expected, full, cotangent.float()), strict=True
    ):
        assert torch.equal(got, want.to(dtype))


@BOTH
def test_constant_groups_and_large_values_stay_finite(impl: Impl) -> None:
    _, scale, shift, weight, bias = _inputs((2, 5, 8), style=True, dtype=torch.float32)
    x = torch.full((2, 5, 8), 3.0, device=DEVICE, requires_grad=True)
    y = adagn(x, scale, shift, weight, bias, 4, impl=impl)
    torch.testing.assert_close(y, (bias * scale + shift)[:, None].expand_as(y))
    assert all(g.isfinite().all() for g in _gradients(y, [x, scale, shift, weight, bias]))
    # SiLU of hugely negative values is 0, with gradient 0.
    z = adagn(torch.randn(2, 5, 8, device=DEVICE), scale, shift - 1e4, weight, bias, 4, act="silu", impl=impl)
    assert torch.equal(z, torch.zeros_like(z))
    assert torch.equal(_gradients(z, [shift])[0], torch.zeros_like(shift))


@acts
@BOTH
def test_inputs_and_cotangent_are_left_alone(act: Activation, impl: Impl) -> None:
    inputs = _inputs((2, 30, 8), style=True, dtype=torch.float32)
    before = [v.detach().clone() for v in inputs]
    y = adagn(*inputs, 4, act=act, impl=impl)
    cotangent = torch.randn_like(y)
    kept = cotangent.clone(), y.detach().clone()
    first = torch.autograd.grad(y, inputs, cotangent, retain_graph=True)
    second = torch.autograd.grad(y, inputs, cotangent)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((*before, *kept), (*inputs, cotangent, y), strict=True))


@BOTH
def test_not_contiguous(impl: Impl) -> None:
    x, *rest = _inputs((2, 4, 5, 8), style=True, dtype=torch.float32)
    strided = x.detach().permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0).requires_grad_()
    y, expected = (adagn(v, *rest, 4, act="silu", impl=impl) for v in (strided, x))
    torch.testing.assert_close(y, expected)
    (grad,) = torch.autograd.grad(y.sum(), strided)  # an expanded cotangent
    torch.testing.assert_close(grad, torch.autograd.grad(expected, x, torch.ones_like(x))[0])


def test_same_bits_twice_and_with_any_number_of_threads() -> None:
    inputs = _inputs((4, 1024, 32), style=True, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        runs = []
        for n in (1, 1, 2, 5):
            torch.set_num_threads(n)
            y = adagn(*inputs, 8, act="silu")
            runs.append([y, *_gradients(y, inputs)])
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@BOTH
def test_compiles_whole(impl: Impl) -> None:
    inputs = _inputs((2, 30, 8), style=True, dtype=torch.float32)
    compiled = torch.compile(adagn, backend="aot_eager", fullgraph=True)
    y, expected = (f(*inputs, 4, act="silu", impl=impl) for f in (compiled, adagn))
    assert torch.equal(y, expected)
    for got, want in zip(_gradients(y, inputs), _gradients(expected, inputs), strict=True):
        assert torch.equal(got, want)


X, STYLE, CHANNEL = torch.zeros(2, 5, 8), torch.zeros(2, 8), torch.zeros(8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: adagn(CHANNEL, None, None, CHANNEL, CHANNEL, 4),
            "x: expected a non-empty shape (B, ..., C), got (8,)",
        ),
        (
            lambda: adagn(X[:, :0], None, None, CHANNEL, CHANNEL, 4),
            "x: expected a non-empty shape (B, ..., C), got (2, 0, 8)",
        ),
        (
            lambda: adagn(X.int(), None, None, CHANNEL, CHANNEL, 4),
            "x: expected float32, float64, bfloat16 or float16, got torch.int32",
        ),
        (lambda: adagn(X, None, None, CHANNEL, CHANNEL, 3), "num_groups: expected a divisor of C = 8, got 3"),
        (lambda: adagn(X, None, None, CHANNEL, CHANNEL, 0), "num_groups: expected a divisor of C = 8, got 0"),
        (
            lambda: adagn(X, STYLE, None, CHANNEL, CHANNEL, 4),
            "shift: expected a tensor because scale is one, got None",
        ),
        (
            lambda: adagn(X, None, STYLE, CHANNEL, CHANNEL, 4),
            "scale: expected a tensor because shift is one, got None",
        ),
        (
            lambda: adagn(X, STYLE[:1], STYLE, CHANNEL, CHANNEL, 4),
            "scale: expected shape (2, 8), got (1, 8)",
        ),
        (
            lambda: adagn(X, STYLE, STYLE[:, None], CHANNEL, CHANNEL, 4),
            "shift: expected shape (2, 8), got (2, 1, 8)",
        ),
        (lambda: adagn(X, STYLE, STYLE, CHANNEL[:4], CHANNEL, 4), "weight: expected shape (8,), got (4,)"),
        (
            lambda: adagn(X, STYLE, STYLE, CHANNEL, CHANNEL.to("meta"), 4),
            "bias: expected the device of x (cpu), got meta",
        ),
        (
            lambda: adagn(X, STYLE, STYLE, CHANNEL, CHANNEL, 4, act="relu"),
            "act: expected \"silu\" or None, got 'relu'",
        ),
        (lambda: adagn(X, STYLE, STYLE, CHANNEL, None, 4), "bias: expected a tensor because weight is one, got None"),
        (
            lambda: adagn(X, STYLE, STYLE, None, None, 4, offset=X),
            "offset: expected shape (2, 8), got (2, 5, 8)",
        ),
        (lambda: adagn(X, STYLE, STYLE, None, None, 4, offset=1.0), "offset: expected a tensor, got float"),  # type: ignore[arg-type]
        (lambda: adagn(X, STYLE, STYLE, None, None, 4, moments=1.0), "moments: expected a tensor, got float"),  # type: ignore[arg-type]
        (
            lambda: adagn(X, STYLE, STYLE, None, None, 4, dropout=1.0),
            "dropout: expected a probability in [0, 1), got 1.0",
        ),
        (
            lambda: adagn(X, STYLE, STYLE, None, None, 4, dropout=0.5),
            "key: expected a noise key for dropout, got None",
        ),
        (
            lambda: adagn(X, STYLE, STYLE, CHANNEL, CHANNEL, 4, impl="cuda"),
            'impl: expected "auto", "triton" or "reference", got \'cuda\'',
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert str(error.value) == message


@pytest.mark.skipif(DEVICE == "cpu", reason="needs 25 GB and a GPU")
def test_more_than_2_to_the_31_elements() -> None:
    x = torch.zeros(2, 2**20 + 1, 1024, dtype=torch.bfloat16, device=DEVICE)
    x[1] = torch.randn(2**20 + 1, 1024, dtype=torch.bfloat16, device=DEVICE)
    weight, bias = torch.ones(1024, device=DEVICE), torch.zeros(1024, device=DEVICE)
    cotangent = torch.randn_like(x)  # here, as making it on a CPU would take a minute
    results = []
    for v, g in ((x, cotangent), (x[1:], cotangent[1:])):
        v = v.detach().requires_grad_()
        y = adagn(v, None, None, weight, bias, 8, act="silu", impl="triton")
        results.append((y.detach(), *torch.autograd.grad(y, v, g)))
    for whole, part in zip(*results, strict=True):
        torch.testing.assert_close(whole[1:], part)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("eps", [0.5, 1e-8])
def test_eps_is_added_to_the_variance(impl: Impl, eps: float) -> None:
    x = 0.1 * torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    ones, zeros = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    ours = adagn(x, None, None, ones, zeros, 4, eps, impl=impl)
    groups = x.double().view(2, 9, 4, 2)
    var, mean = torch.var_mean(groups, (1, 3), correction=0, keepdim=True)
    expected = ((groups - mean) / (var + eps).sqrt()).view_as(x)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-6)


def test_the_batch_may_be_dynamic() -> None:
    x, style = torch.randn(3, 5, 8, device=DEVICE), torch.randn(3, 8, device=DEVICE)
    affine = torch.ones(8, device=DEVICE)
    for tensor in (x, style):
        torch._dynamo.mark_dynamic(tensor, 0)
    compiled = torch.compile(
        lambda x, s: adagn(x, s, s, affine, affine, 4, impl="triton"), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x, style), adagn(x, style, style, affine, affine, 4, impl="triton"))
