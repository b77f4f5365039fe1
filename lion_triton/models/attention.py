"""Attention over points: the published linear attention, and softmax attention.

Shapes: B clouds, N points, C channels, H heads, D channels per head.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

AttentionKind = Literal["linear", "softmax"]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for (B, N, H, D) tensors: xformers on CUDA, PyTorch's SDPA elsewhere."""
    if q.is_cuda and q.dtype != torch.float64:
        # Imported here because xformers warns at import on machines without a GPU.
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (softmax_N(k)^T v) for (B, N, H, D) tensors: linear in N, q is not scaled (as in LION)."""
    k = k.softmax(dim=1, dtype=torch.promote_types(k.dtype, torch.float32)).to(v.dtype)
    context = torch.einsum("bnhd,bnhe->bhde", k, v)
    return torch.einsum("bhde,bnhd->bnhe", context, q)


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
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(dim=2)
        attend = linear_attention if self.kind == "linear" else softmax_attention
        return self.out(attend(q, k, v).flatten(2))
