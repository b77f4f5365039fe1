from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lion_triton.kernels import linear_attention
from lion_triton.kernels._checks import Impl, interpreting
from lion_triton.kernels.linear_attention import _linear_attention_bwd_op, _linear_attention_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = pytest.mark.parametrize("impl", ["reference", "triton"])
# B, N, H, D: one point; several blocks of them; channels that are no power of two, and more than a program has
CASES = [(1, 1, 1, 1), (2, 67, 3, 8), (1, 130, 1, 20), (2, 5, 2, 70)]
cases = pytest.mark.parametrize(("B", "N", "H", "D"), CASES, ids=["-".join(map(str, case)) for case in CASES])


def _qkv(B: int, N: int, H: int, D: int, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(B, N, 3, H, D).to(DEVICE, dtype).requires_grad_()


def _results(qkv: Tensor, impl: Impl) -> tuple[Tensor, Tensor]:
    """The output and the gradient."""
    torch.manual_seed(1)
    out = linear_attention(qkv, impl=impl)
    return out.detach(), torch.autograd.grad(out, qkv, torch.randn(out.shape, dtype=torch.float64).to(out))[0]


@cases
def test_reference_is_the_formula(B: int, N: int, H: int, D: int) -> None:
    qkv = _qkv(B, N, H, D)
    q, k, v = qkv.detach().unbind(2)
    out = linear_attention(qkv, impl="reference")
    for b in range(B):
        for h in range(H):
            weights = torch.exp(k[b, :, h]) / torch.exp(k[b, :, h]).sum(0)
            torch.testing.assert_close(out[b, :, h], q[b, :, h] @ (weights.T @ v[b, :, h]))


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_triton_is_as_good_as_the_reference(B: int, N: int, H: int, D: int, dtype: torch.dtype) -> None:
    qkv = _qkv(B, N, H, D, dtype)
    double = qkv.detach().double().requires_grad_()
    both = (_results(qkv, "triton"), _results(qkv, "triton"), _results(qkv, "reference"), _results(double, "reference"))
    for x, again, y, z in zip(*both, strict=True):
        assert torch.equal(x, again)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        allowed = 2 * (y - z).abs().max() + 2e-6 * z.abs().max()
        if interpreting() and dtype == torch.bfloat16:  # it truncates where a GPU rounds
            allowed = 2.0**-7 * z.abs().max()
        assert (x - z).abs().max() <= allowed


@BOTH
def test_large_values_do_not_overflow(impl: Impl) -> None:
    """As the running maximum grows from block to block."""
    qkv = _qkv(1, 140, 1, 4, torch.float32).detach()
    qkv[:, :, 1] += torch.linspace(-300, 300, 140, device=DEVICE)[None, :, None, None]
    qkv.requires_grad_()
    double = qkv.detach().double().requires_grad_()
    for x, z in zip(_results(qkv, impl), _results(double, "reference"), strict=True):
        torch.testing.assert_close(x.double(), z, rtol=1e-4, atol=1e-4)


def test_gradcheck_opcheck_and_compile() -> None:
    assert torch.autograd.gradcheck(lambda x: linear_attention(x, impl="reference"), _qkv(1, 3, 2, 2))
    qkv = _qkv(2, 5, 2, 4, torch.float32)
    torch.library.opcheck(_linear_attention_op.overload, (qkv,))
    out, *saved = _linear_attention_op(qkv.detach())
    backward = (out, qkv.detach(), *saved)
    torch.library.opcheck(_linear_attention_bwd_op.overload, backward, test_utils=("test_schema", "test_faketensor"))
    torch._dynamo.mark_dynamic(qkv, 0)
    compiled = torch.compile(lambda x: linear_attention(x, impl="triton"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv), linear_attention(qkv, impl="triton"))


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 5, 2, 1, 4), (2, 5, 3, 0, 4)])
def test_bad_input_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^qkv: expected shape \(B, N, 3, H, D\) with H, D >= 1, got "):
        linear_attention(torch.zeros(shape))
