"""Attention over points: the published linear attention, and softmax attention.

Shapes: B clouds, N points, C channels, H heads, D channels per head.
"""

from __future__ import annotations

import logging
import warnings
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lion_triton.kernels import linear_attention

AttentionKind = Literal["linear", "softmax"]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for (B, N, H, D) tensors, differentiable.

    By xformers' kernels where they serve these tensors, else by PyTorch's scaled dot product attention, as always in
    compiled code: ``softmax_operator`` says which. On a GPU the gradients of either may differ in their last bits from
    run to run, unless ``torch.use_deterministic_algorithms(True)``.
    """
    operator = None if torch.compiler.is_compiling() else _xformers_operator(q, k, v)
    if operator is not None:
        return _xformers().memory_efficient_attention(q, k, v, op=operator)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def softmax_operator(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Whose kernels ``softmax_attention`` takes for these tensors, in words."""
    operator = _xformers_operator(q, k, v)
    if operator is not None:
        return f"xformers ({operator[0].NAME})"
    return "PyTorch's scaled_dot_product_attention"


@cache
def _xformers() -> Any:
    """xformers' attention, or None where it cannot be imported; its own warnings about that are seven lines long."""
    logging.getLogger("xformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from xformers.ops import fmha
        except Exception:  # built for another PyTorch it may fail in any way; attention runs without it
            return None
    return fmha


_operators: dict[Any, Any] = {}  # by all that an operator's support depends on: xformers is asked once


def _xformers_operator(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """xformers' (forward, backward) operators for these very tensors, or None; always None on a CPU."""
    if not q.is_cuda:
        return None
    differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    question = (differentiable, *((x.device, x.dtype, x.shape, x.stride()) for x in (q, k, v)))
    if question not in _operators:
        _operators[question] = _ask_xformers(q, k, v, differentiable)
    return _operators[question]


def _ask_xformers(q: Tensor, k: Tensor, v: Tensor, differentiable: bool) -> Any:
    fmha = _xformers()
    if fmha is None:
        return None
    inputs = fmha.Inputs(q, k, v)
    for operator in (fmha.MemoryEfficientAttentionFlashAttentionOp, fmha.MemoryEfficientAttentionCutlassOp):
        if all(half.supports(inputs) for half in operator[: 1 + differentiable]):
            return operator
    return None


class Attention(nn.Module):
    """Multi-head self-attention over the points of a cloud, without a residual connection.

    Args:
        channels: input and output channels C.
        heads, head_dim: H and D.
        kind: "linear" (published) or "softmax". Both have the same parameters.
    """

    def __init__(self, channels: int, heads: int, head_dim: int, kind: AttentionKind = "linear") -> None:
        super().__init__()
        self.heads, self.kind = heads, kind
        self.qkv = nn.Linear(channels, 3 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, channels)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        out = linear_attention(qkv) if self.kind == "linear" else softmax_attention(*qkv.unbind(dim=2))
        return self.out(out.flatten(2))
