from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lion_triton.kernels.adagn import Activation, adagn

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
styles = pytest.mark.parametrize("style", [True, False], ids=["style", "plain"])


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
    return [None if v is None else v.to(dtype).requires_grad_() for v in inputs]


def _gradients(y: Tensor, inputs: list[Tensor | None]) -> list[Tensor]:
    torch.manual_seed(1)
    cotangent = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
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
    return y.view(x.shape)


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
    torch.testing.assert_close(
        adagn(*inputs, num_groups, act=act), _naive(*inputs, num_groups, act), rtol=1e-12, atol=1e-12
    )


@cases
@acts
@styles
def test_gradients_against_autograd(shape: tuple[int, ...], num_groups: int, act: Activation, style: bool) -> None:
    inputs = _inputs(shape, style)
    y, expected = adagn(*inputs, num_groups, act=act), _plain(*inputs, num_groups, act)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(_gradients(y, inputs), _gradients(expected, inputs), rtol=1e-10, atol=1e-10)


@acts
@styles
def test_gradcheck(act: Activation, style: bool) -> None:
    inputs = _inputs((2, 3, 8), style)
    assert torch.autograd.gradcheck(lambda *v: adagn(*v, 4, act=act), inputs)


@pytest.mark.parametrize("offset", [0, 100, 3000])
def test_float32_error_grows_only_with_the_rounding_of_the_mean(offset: float) -> None:
    """Subtracting the mean of x costs eps * offset / std at best; E[x^2] - E[x]^2 squares that ratio."""
    x, *rest = _inputs((2, 512, 64), style=True, dtype=torch.float32)
    x = (x.detach() + offset).requires_grad_()
    exact_inputs = [v.detach().double().requires_grad_() for v in (x, *rest)]
    y, exact = adagn(x, *rest, 8, act="silu"), _plain(*exact_inputs, 8, "silu")
    pairs = zip([y, *_gradients(y, [x, *rest])], [exact, *_gradients(exact, exact_inputs)], strict=True)
    for got, expected in pairs:
        error = (got.double() - expected).norm() / expected.norm()
        assert error < 4 * torch.finfo(torch.float32).eps * (1 + offset / 2)


@acts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_half_precision_is_float32_rounded_once(act: Activation, dtype: torch.dtype) -> None:
    half = _inputs((2, 40, 16), style=True, dtype=dtype)
    full = [v.detach().float().requires_grad_() for v in half]
    y, expected = adagn(*half, 8, act=act), adagn(*full, 8, act=act)
    assert y.dtype == dtype
    assert torch.equal(y, expected.to(dtype))
    cotangent = torch.randn_like(y)
    for got, want in zip(
        torch.autograd.grad(y, half, cotangent), torch.autograd.grad(expected, full, cotangent.float()), strict=True
    ):
        assert torch.equal(got, want.to(dtype))


def test_constant_groups_and_large_values_stay_finite() -> None:
    _, scale, shift, weight, bias = _inputs((2, 5, 8), style=True, dtype=torch.float32)
    x = torch.full((2, 5, 8), 3.0, requires_grad=True)
    y = adagn(x, scale, shift, weight, bias, 4)
    torch.testing.assert_close(y, (bias * scale + shift)[:, None].expand_as(y))
    assert all(g.isfinite().all() for g in _gradients(y, [x, scale, shift, weight, bias]))
    # SiLU of hugely negative values is 0, with gradient 0.
    z = adagn(torch.randn(2, 5, 8, requires_grad=True), scale, shift - 1e4, weight, bias, 4, act="silu")
    assert torch.equal(z, torch.zeros_like(z))


@acts
def test_inputs_and_cotangent_are_left_alone(act: Activation) -> None:
    inputs = _inputs((2, 30, 8), style=True, dtype=torch.float32)
    before = [v.detach().clone() for v in inputs]
    y = adagn(*inputs, 4, act=act)
    cotangent = torch.randn_like(y)
    kept = cotangent.clone(), y.detach().clone()
    first = torch.autograd.grad(y, inputs, cotangent, retain_graph=True)
    second = torch.autograd.grad(y, inputs, cotangent)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((*before, *kept), (*inputs, cotangent, y), strict=True))


def test_not_contiguous() -> None:
    x, *rest = _inputs((2, 4, 5, 8), style=True)
    strided = x.detach().permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0).requires_grad_()
    y, expected = adagn(strided, *rest, 4, act="silu"), adagn(x, *rest, 4, act="silu")
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


def test_compiles_whole() -> None:
    inputs = _inputs((2, 30, 8), style=True, dtype=torch.float32)
    compiled = torch.compile(adagn, backend="aot_eager", fullgraph=True)
    y, expected = compiled(*inputs, 4, act="silu"), adagn(*inputs, 4, act="silu")
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


def test_explicit_triton_does_not_fall_back() -> None:
    with pytest.raises(NotImplementedError, match=r"adagn: .* no Triton kernel"):
        adagn(X, STYLE, STYLE, CHANNEL, CHANNEL, 4, impl="triton")
