"""Many tensors to another dtype at once, and their gradients back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Cast(torch.autograd.Function):
    """Not one of ``_op.py``: as many tensors as there are, and never inside a compiled block."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [t.dtype for t in tensors]
        ctx.set_materialize_grads(False)
        return tuple(_copied(tensors, [dtype] * len(tensors)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [(g, dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True) if g is not None]
        back = iter(_copied([g for g, _ in given], [dtype for _, dtype in given]))
        return None, *(None if g is None else next(back) for g in grads)


def _copied(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    copies = [torch.empty_like(t, dtype=dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


def cast_all(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Copies in ``dtype``, in a few launches for all; differentiable. Memory formats are kept."""
    return _Cast.apply(dtype, *tensors)
