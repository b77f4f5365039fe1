from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lion_triton.kernels._checks import Impl
from lion_triton.kernels.dropout import _dropout_op, dropout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = pytest.mark.parametrize("impl", ["reference", "triton"])


def _key(seed: int = 3, offset: int = 4) -> torch.Tensor:
    return torch.tensor([seed, offset], device=DEVICE)


@pytest.mark.parametrize("shape", [(1,), (3, 7, 13), (5, 1025)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_triton_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
    ours, reference = (dropout(x, 0.25, _key(2**40 + 1, 2**35), impl=impl) for impl in ("triton", "reference"))
    assert ours.dtype == dtype
    assert torch.equal(ours == 0, reference == 0)
    torch.testing.assert_close(ours, reference)
    cotangent = torch.randn_like(x)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, cotangent)[0] for y in (ours, reference)))


@BOTH
def test_share_and_expectation(impl: Impl) -> None:
    x = torch.ones(40_000, device=DEVICE)
    for p in (0.1, 0.5, 0.9):
        y = dropout(x, p, _key(), impl=impl)
        assert abs((y == 0).float().mean().item() - p) < 0.01  # five standard deviations
        kept = y[y != 0]
        assert torch.equal(kept, torch.full_like(kept, 65536 / (65536 - round(p * 65536))))


@BOTH
def test_masks_of_other_keys_are_independent(impl: Impl) -> None:
    x = torch.ones(20_000, device=DEVICE)
    masks = [dropout(x, 0.5, key, impl=impl) == 0 for key in (_key(), _key(seed=4), _key(offset=5))]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs((a == b).float().mean().item() - 0.5) < 0.02
    assert torch.equal(masks[0], dropout(x, 0.5, _key(), impl=impl) == 0)


@BOTH
def test_an_element_keeps_its_fate_whatever_the_shape(impl: Impl) -> None:
    x = torch.ones(77, device=DEVICE)
    expected = dropout(x, 0.5, _key(), impl=impl)
    assert torch.equal(dropout(x.view(7, 11), 0.5, _key(), impl=impl).flatten(), expected)
    assert torch.equal(dropout(x[:33], 0.5, _key(), impl=impl), expected[:33])


@BOTH
def test_nothing_to_drop(impl: Impl) -> None:
    x = torch.randn(3, 5, device=DEVICE)
    assert dropout(x, 0.0, _key(), impl=impl) is x
    assert dropout(x[:0], 0.5, _key(), impl=impl).shape == (0, 5)


def test_gradcheck() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.5, _key(), impl="reference"), x)
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, 0.5, _key(), impl="reference"), x)


def test_opcheck() -> None:
    torch.library.opcheck(_dropout_op.overload, (torch.randn(3, 5, device=DEVICE, requires_grad=True), _key(), 0.5))


@BOTH
def test_compiles_whole_and_makes_new_masks_when_the_key_changes(impl: Impl) -> None:
    compiled = torch.compile(lambda x, key: dropout(x, 0.5, key, impl=impl), fullgraph=True, backend="aot_eager")
    x = torch.ones(64, device=DEVICE)
    for offset in (0, 1):
        assert torch.equal(compiled(x, _key(offset=offset)), dropout(x, 0.5, _key(offset=offset), impl=impl))


X = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: dropout(X.int(), 0.5, torch.tensor([0, 0])),
            "x: expected float32, float64, bfloat16 or float16, got torch.int32",
        ),
        (lambda: dropout(X, 1, torch.tensor([0, 0])), "dropout: expected a probability in [0, 1), got 1"),
        (lambda: dropout(X, float("nan"), torch.tensor([0, 0])), "dropout: expected a probability in [0, 1), got nan"),
        (
            lambda: dropout(X, 0.5, torch.tensor([0])),
            "key: expected an int64 tensor of shape (2,) or (3,), got torch.int64 of shape (1,)",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert str(error.value) == message
