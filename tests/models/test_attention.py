"""Softmax attention against float64, and who computes it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lion_triton.models import attention
from lion_triton.models.attention import softmax_attention, softmax_operator
from tests import fresh

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def packed(b: int, n: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """(B, N, 3, H, D) as a projection makes it: q, k and v are strided views of it."""
    x = torch.randn(b, n, 3, heads, dim, generator=torch.Generator().manual_seed(0))
    return x.to(DEVICE, dtype).requires_grad_()


def by_formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 2, 8), (1, 131, 4, 32), (2, 64, 8, 32)], ids=str)
def test_forward_and_backward_against_float64(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """On a GPU by whatever ``softmax_operator`` names there."""
    qkv = packed(*shape, dtype)
    exact = qkv.detach().double().requires_grad_()
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)

    def run(attend: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        out = attend(*x.unbind(2))
        return out.double(), torch.autograd.grad(out, x, grad)[0].double()

    expected = run(by_formula, exact, cotangent.double())
    plain = run(by_formula, qkv, cotangent)
    for got, same_dtype, right in zip(run(softmax_attention, qkv, cotangent), plain, expected, strict=True):
        error, rounding = (got - right).norm(), (same_dtype - right).norm()
        assert error <= 2 * rounding + 1e-7 * right.norm()


class StandIn:
    """xformers' attention with two operators, of which some support the tensors: counts the questions."""

    def __init__(self, **supports: bool) -> None:
        self.questions = 0
        self.taken: list[str] = []

        def half(name: str) -> Any:
            def answer(_: Any) -> bool:
                self.questions += 1
                return supports[name]

            return SimpleNamespace(NAME=name, supports=answer)

        self.MemoryEfficientAttentionFlashAttentionOp = (half("fa2F"), half("fa2B"))
        self.MemoryEfficientAttentionCutlassOp = (half("cutlassF"), half("cutlassB"))
        self.Inputs = lambda q, k, v: (q, k, v)

    def memory_efficient_attention(self, q: Tensor, k: Tensor, v: Tensor, op: Any) -> Tensor:
        self.taken.append(op[0].NAME)
        return by_formula(q, k, v)


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(attention, "_operators", {})


@pytest.mark.parametrize(
    ("supports", "with_gradient", "without"),
    [
        ({"fa2F": True, "fa2B": True, "cutlassF": True, "cutlassB": True}, "fa2F", "fa2F"),
        ({"fa2F": True, "fa2B": False, "cutlassF": True, "cutlassB": True}, "cutlassF", "fa2F"),
        ({"fa2F": False, "fa2B": True, "cutlassF": True, "cutlassB": False}, None, "cutlassF"),
        ({"fa2F": False, "fa2B": False, "cutlassF": False, "cutlassB": False}, None, None),
    ],
    ids=["both", "flash-forward-only", "cutlass-forward-only", "neither"],
)
@pytest.mark.usefixtures("pretend_gpu")
def test_xformers_where_it_has_an_operator(
    monkeypatch: pytest.MonkeyPatch, supports: dict[str, bool], with_gradient: str | None, without: str | None
) -> None:
    xformers = StandIn(**supports)
    monkeypatch.setattr(attention, "_xformers", lambda: xformers)
    qkv = packed(1, 5, 2, 8, torch.float32)
    for x, expected in ((qkv, with_gradient), (qkv.detach(), without)):
        xformers.taken.clear()
        torch.testing.assert_close(softmax_attention(*x.unbind(2)), by_formula(*x.unbind(2)))
        assert xformers.taken == ([] if expected is None else [expected])
        assert (expected or "PyTorch") in softmax_operator(*x.unbind(2))
    asked = xformers.questions
    for x in (qkv, qkv.detach()):
        softmax_attention(*x.unbind(2))
    assert xformers.questions == asked  # once for the same kind of tensors
    softmax_attention(*packed(1, 6, 2, 8, torch.float32).unbind(2))
    assert xformers.questions > asked


@pytest.mark.usefixtures("pretend_gpu")
def test_without_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_xformers", lambda: None)
    qkv = packed(1, 5, 2, 8, torch.float32)
    torch.testing.assert_close(softmax_attention(*qkv.unbind(2)), by_formula(*qkv.unbind(2)))


def test_xformers_of_another_torch_says_nothing() -> None:
    """This machine's torch may be another than the one that xformers was built for."""
    script = "from lion_triton.models.attention import _xformers; _xformers()"
    result = fresh.python("-c", script)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
