from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lion_triton.kernels import group, group_offsets
from lion_triton.kernels._checks import Impl, interpreting
from lion_triton.kernels.neighborhood import (
    _group_offsets_bwd_op,
    _group_offsets_op,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = pytest.mark.parametrize("impl", ["reference", "triton"])
# B, N, M, K, C
CASES = [(2, 1, 1, 1, 1), (1, 37, 5, 8, 3), (3, 67, 13, 5, 24), (1, 300, 70, 9, 16), (2, 20, 3, 4, 260)]
cases = pytest.mark.parametrize(("B", "N", "M", "K", "C"), CASES, ids=["-".join(map(str, c)) for c in CASES])


def _inputs(B: int, N: int, M: int, K: int, C: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Features, idx, offsets, weight."""
    torch.manual_seed(0)
    features, offsets, weight = torch.randn(B, N, C), 0.1 * torch.randn(B, M, K, 3), torch.randn(C, 3)
    idx = torch.randint(N, (B, M, K), device=DEVICE)
    features, offsets, weight = (v.to(DEVICE, dtype).requires_grad_() for v in (features, offsets, weight))
    return [features, idx, offsets, weight]


def _results(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The output, then every gradient."""
    torch.manual_seed(1)
    cotangent = torch.randn(y.shape, dtype=torch.float64).to(y)
    return [y.detach(), *torch.autograd.grad(y, [v for v in inputs if v.requires_grad], cotangent)]


def _copies(inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [v.detach().to(dtype).requires_grad_() if v.is_floating_point() else v for v in inputs]


def _assert_as_good(f: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Output and gradients of Triton at most twice as far from float64 as the reference of the same dtype."""
    ours, reference = (_results(f(*inputs, impl=impl), inputs) for impl in ("triton", "reference"))
    double = _copies(inputs, torch.float64)
    for x, y, z in zip(ours, reference, _results(f(*double, impl="reference"), double), strict=True):
        assert x.shape == y.shape == z.shape
        assert x.dtype == y.dtype
        allowed = 2 * (y - z).abs().max() + 1e-6 * z.abs().max()
        if interpreting() and x.dtype == torch.bfloat16:  # it truncates where a GPU rounds
            allowed = 2.0**-7 * z.abs().max()
        assert (x - z).abs().max() <= allowed


@cases
def test_group_offsets_is_a_gather_and_a_product(B: int, N: int, M: int, K: int, C: int) -> None:
    features, idx, offsets, weight = inputs = _inputs(B, N, M, K, C)
    expected = group(features, idx, impl="reference") + offsets @ weight.T
    got = group_offsets(*inputs, impl="reference")
    torch.testing.assert_close(_results(got, inputs), _results(expected, inputs), rtol=1e-12, atol=1e-12)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_group_offsets_by_triton(B: int, N: int, M: int, K: int, C: int, dtype: torch.dtype) -> None:
    inputs = _inputs(B, N, M, K, C, dtype)
    inputs[2] = inputs[2].detach().float().requires_grad_()  # coordinates always are
    _assert_as_good(group_offsets, inputs)


def test_small_offsets_survive_bfloat16() -> None:
    """Features that would swallow them are multiplied apart; the offsets are, in float32, what remains."""
    features, weight = torch.zeros(1, 2, 8, dtype=torch.bfloat16), torch.eye(8, 3)
    offsets = torch.tensor([1e-4, 2e-4, -3e-4]).expand(1, 1, 1, 3)
    for impl in ("reference", "triton"):
        y = group_offsets(
            features.to(DEVICE),
            torch.zeros(1, 1, 1, dtype=torch.int32, device=DEVICE),
            offsets.to(DEVICE),
            weight.to(DEVICE),
            impl=impl,
        )
        torch.testing.assert_close(y[0, 0, 0, :3].float().cpu(), offsets[0, 0, 0], rtol=1e-2, atol=0)


def test_gradcheck() -> None:
    features, idx, offsets, weight = _inputs(2, 5, 2, 3, 4)
    f = lambda *v: group_offsets(v[0], idx, *v[1:], impl="reference")  # noqa: E731
    assert torch.autograd.gradcheck(f, (features, offsets, weight))


@BOTH
def test_only_some_gradients_and_the_same_bits_twice(impl: Impl) -> None:
    inputs = _inputs(2, 30, 9, 4, 8, torch.float32)
    expected = _results(group_offsets(*inputs, impl=impl), inputs)[1:]
    for i, want in zip((0, 2, 3), expected, strict=True):
        alone = [v.detach().requires_grad_(i == j) if v.is_floating_point() else v for j, v in enumerate(inputs)]
        assert torch.equal(_results(group_offsets(*alone, impl=impl), alone)[1], want)


@BOTH
def test_not_contiguous_and_empty(impl: Impl) -> None:
    features, idx, offsets, weight = inputs = _inputs(2, 30, 9, 4, 8, torch.float32)
    strided = [
        features.detach().mT.contiguous().mT,
        idx.int().mT.contiguous().mT,
        offsets.detach().transpose(1, 3).contiguous().transpose(1, 3),
        weight.detach().T.contiguous().T,
    ]
    torch.testing.assert_close(group_offsets(*strided, impl=impl), group_offsets(*inputs, impl=impl))
    none = group_offsets(features[:0], idx[:0], offsets[:0], weight, impl=impl)
    assert none.shape == (0, 9, 4, 8)


def test_opcheck() -> None:
    features, _, offsets, weight = _inputs(1, 5, 2, 3, 4, torch.float32)
    index = torch.tensor([[0], [4], [4], [1], [2], [0]], dtype=torch.int32, device=DEVICE)
    rows = (features[0].detach().requires_grad_(), index, offsets.flatten(0, 2).detach().requires_grad_(), weight)
    torch.library.opcheck(_group_offsets_op.overload, rows)
    never_differentiated = ("test_schema", "test_faketensor")
    backward = (torch.randn(6, 4, device=DEVICE), rows[2].detach(), weight.detach(), True)
    torch.library.opcheck(_group_offsets_bwd_op.overload, backward, test_utils=never_differentiated)


@BOTH
def test_compiles_whole(impl: Impl) -> None:
    inputs = _inputs(2, 9, 3, 4, 8, torch.float32)

    def f(*v: Tensor) -> Tensor:
        return group_offsets(*v, impl=impl)

    got, expected = (_results(g(*inputs), inputs) for g in (torch.compile(f, fullgraph=True, backend="aot_eager"), f))
    torch.testing.assert_close(got, expected)


F, I, O, W = torch.zeros(2, 5, 4), torch.zeros(2, 3, 6, dtype=torch.int32), torch.zeros(2, 3, 6, 3), torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_offsets(F, I, O[:, :2], W), "offsets: expected shape (2, 3, 6, 3), got (2, 2, 6, 3)"),
        (lambda: group_offsets(F, I, O, W.T), "weight: expected shape (4, 3), got (3, 4)"),
        (lambda: group_offsets(F, I + 5, O, W), "idx: expected values in [0, 5), got 5 to 5"),
        (
            lambda: group_offsets(F, I, O.int(), W),
            "offsets: expected float32, float64, bfloat16 or float16, got torch.int32",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert str(error.value) == message
