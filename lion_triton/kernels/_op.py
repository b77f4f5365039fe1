"""The one place where a function becomes a PyTorch op, which autograd, torch.compile and CUDA graphs take whole.

    @op(fake=lambda x, scale: x.new_empty(x.shape))  # what it returns, by shape, dtype and device alone
    def _stretch_op(x: Tensor, scale: float) -> Tensor:  # becomes lion_triton::stretch
        ...

    @gradient(_stretch_op, save=lambda x, scale, out: (scale,))
    def _stretch_backward(needs: Needs, grad: Tensor, scale: float) -> Gradients:
        return (_stretch_op(grad, scale),)

Nothing else in the package derives from ``torch.autograd.Function``, references neither: torch.compile traces through
such a class, and in PyTorch 2.11 its gradients are zero, without a word, wherever ``forward`` returns a tensor that it
made in place, by ``out=`` or by a ``to`` that had nothing to do. It does not look into an op.

An op may not return its inputs, nor views of them or of one another, and all that it returns is new and contiguous. A
call costs the host less than half of what one by ``torch.library.custom_op`` does (``pytest bench/``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Needs = Sequence[bool]
Gradients = tuple[Tensor | None, ...]
_Function = TypeVar("_Function", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("lion_triton", "FRAGMENT")


def op(*, fake: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Make a function of tensors and numbers, which changes none of them, the op of its name (``_<name>_op``).

    fake: the same arguments to empty results of the right shapes, dtypes and device; sizes may be symbols.
    """

    def register(function: _Function) -> _Function:
        name = function.__name__.removeprefix("_").removesuffix("_op")
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lion_triton::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.lion_triton, name).default

    return register


def gradient(
    op: Any, *, save: Callable[..., tuple[Any, ...]], results: int = 1, once: bool = True
) -> Callable[[_Function], _Function]:
    """Make a function the backward of an op: of the first ``results`` tensors that it returns; others are constants.

    save: the op's arguments and its result to what the backward needs of them, tensors or not.
    The function gets which arguments need a gradient, the gradients of the results (None where there is none, but not
    for all), and what was saved; it returns the gradients of the arguments in order, as far as there are any. once: it
    cannot be differentiated itself, and says so.
    """

    def register(backward: _Function) -> _Function:
        nothing = (None,) * len(op._schema.arguments)

        def node_forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                out = op(*args)
            ctx.set_materialize_grads(False)
            saved = save(*args, out)
            ctx.others = [None if isinstance(x, Tensor) else x for x in saved]
            ctx.save_for_backward(*[x if isinstance(x, Tensor) else None for x in saved])
            if not isinstance(out, Tensor):
                ctx.mark_non_differentiable(*out[results:])
            return out

        def node_backward(ctx: Any, *grads_out: Tensor | None) -> Gradients:
            given = grads_out[:results]
            if all(grad is None for grad in given):
                return nothing
            saved = [other if x is None else x for x, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
            grads = backward(ctx.needs_input_grad, *given, *saved)
            return grads + nothing[len(grads) :]

        # With gradients off it is the same, and 2 us quicker.
        guarded = once_differentiable(node_backward) if once else node_backward

        def node_backward_once(ctx: Any, *grads: Tensor | None) -> Gradients:
            return (guarded if torch.is_grad_enabled() else node_backward)(ctx, *grads)

        node: Any = type(
            op._opname,
            (torch.autograd.Function,),
            {
                "forward": staticmethod(node_forward),
                "backward": staticmethod(node_backward_once),
            },
        )

        def dispatch(*args: Any) -> Any:
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
                return node.apply(*args)
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)

        _LIBRARY.impl(op, dispatch, "Autograd")
        return backward

    return register
