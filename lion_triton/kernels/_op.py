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

An op may not return its inputs, nor views of them or of one another, and all that it returns is new and contiguous.

Where nobody traces, PyTorch's dispatcher does nothing but cost time, as much as all the rest of a call: there the
function is called directly, or by an autograd function of its own (``pytest bench/`` has the figures).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Needs = Sequence[bool]
Gradients = tuple[Tensor | None, ...]
_Function = TypeVar("_Function", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("lion_triton", "FRAGMENT")
# Types of arguments that nobody traces; the fake tensors of torch.compile are of another.
_PLAIN = {Tensor, torch.nn.Parameter, NoneType, bool, int, float, list, torch.dtype}


def op(*, fake: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Make a function of tensors and numbers, which changes none of them, the op of its name (``_<name>_op``).

    fake: the same arguments to empty results of the right shapes, dtypes and device; sizes may be symbols.
    Called by position. The op itself is ``torch.ops.lion_triton.<name>``.
    """

    def register(function: _Function) -> _Function:
        name = function.__name__.removeprefix("_").removesuffix("_op")
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lion_triton::{name}", fake, lib=_LIBRARY)
        made: Any = _Op(function, getattr(torch.ops.lion_triton, name).default)
        return made

    return register


class _Op:
    def __init__(self, function: Callable[..., Any], overload: Any) -> None:
        self.function, self.overload = function, overload
        self.node: Any = None  # its autograd function

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or _traced(args):
            return self.overload(*args)
        if self.node is not None and torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return self.node.apply(*args)
        return self.function(*args)


def _traced(args: tuple[Any, ...]) -> bool:
    """Whether somebody else than autograd wants to know of a call with these arguments."""
    return torch._C._len_torch_dispatch_stack() > 0 or not _PLAIN.issuperset(map(type, args))


def gradient(
    op: Any, *, save: Callable[..., tuple[Any, ...]], results: int = 1, once: bool = True
) -> Callable[[_Function], _Function]:
    """Make a function the backward of an op that returns a tensor, or a tuple: of its first ``results``, and no other.

    save: the op's arguments and its result to what the backward needs of them, tensors or not.
    The function gets which arguments need a gradient, the gradients of the results (None where there is none, but not
    for all), and what was saved; it returns the gradients of the arguments in order, as far as there are any. once: it
    cannot be differentiated itself, and says so.
    """

    def register(backward: _Function) -> _Function:
        def below_autograd(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op.overload(*args)

        traced = _node(op.overload, below_autograd, save, backward, results, once)

        def dispatch(*args: Any) -> Any:
            differentiate = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
            return traced.apply(*args) if differentiate else below_autograd(*args)

        _LIBRARY.impl(op.overload, dispatch, "Autograd")
        op.node = _node(op.overload, op.function, save, backward, results, once)
        return backward

    return register


def _node(
    overload: Any,
    run: Callable[..., Any],
    save: Callable[..., Any],
    backward: Callable[..., Gradients],
    results: int,
    once: bool,
) -> Any:
    """The autograd function that runs ``run`` forward."""
    nothing = (None,) * len(overload._schema.arguments)

    def forward(ctx: Any, *args: Any) -> Any:
        out = run(*args)
        ctx.set_materialize_grads(False)
        saved = save(*args, out)
        ctx.others = [None if isinstance(x, Tensor) else x for x in saved]
        ctx.save_for_backward(*[x if isinstance(x, Tensor) else None for x in saved])
        if not isinstance(out, Tensor):
            ctx.mark_non_differentiable(*out[results:])
        return out

    def gradients(ctx: Any, *all_grads: Tensor | None) -> Gradients:
        given = all_grads[:results]
        if all(grad is None for grad in given):
            return nothing
        saved = [other if x is None else x for x, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
        grads = backward(ctx.needs_input_grad, *given, *saved)
        return (*grads, *nothing[len(grads) :])

    guarded = once_differentiable(gradients) if once else gradients

    def gradients_once(ctx: Any, *grads: Tensor | None) -> Gradients:
        return (guarded if torch.is_grad_enabled() else gradients)(ctx, *grads)  # unguarded it is 2 us quicker

    functions = {"forward": staticmethod(forward), "backward": staticmethod(gradients_once)}
    return type(overload._opname, (torch.autograd.Function,), functions)
