"""How ops are registered: what torch.compile, dispatch modes and autograd see of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from lion_triton.kernels import approx_emd
from lion_triton.kernels._op import Gradients, Needs, gradient, op


@op(fake=lambda x, weight, power: (x.new_empty(x.shape), x.new_empty(x.shape[:1])))
def _test_scale_op(x: Tensor, weight: Tensor, power: int) -> tuple[Tensor, Tensor]:
    """weight^power x, and a sum that is a constant to autograd."""
    return x * weight**power, x.sum(1)


@op(fake=lambda grad, x, weight, power: (grad.new_empty(grad.shape), weight.new_empty(weight.shape)))
def _test_scale_bwd_op(grad: Tensor, x: Tensor, weight: Tensor, power: int) -> tuple[Tensor, Tensor]:
    return grad * weight**power, (grad * x).sum() * power * weight ** (power - 1)


@gradient(_test_scale_op, save=lambda x, weight, power, out: (x, power, weight))
def _test_scale_backward(needs: Needs, grad: Tensor, x: Tensor, power: int, weight: Tensor) -> Gradients:
    dx, dweight = _test_scale_bwd_op(grad, x, weight, power)
    return dx if needs[0] else None, dweight if needs[1] else None


@op(fake=lambda x: x.new_empty(x.shape))
def _test_square_op(x: Tensor) -> Tensor:
    return x * x


@gradient(_test_square_op, save=lambda x, out: (x,), once=False)
def _test_square_backward(needs: Needs, grad: Tensor, x: Tensor) -> Gradients:
    return (2 * grad * x,)


def scale(x: Tensor, weight: Tensor) -> Tensor:
    return _test_scale_op(x, weight, 3)[0]


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 3), ()))
    return x.requires_grad_(), weight.requires_grad_()


class Seen(TorchDispatchMode):
    """Names of the ops of this package that a dispatch mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lion_triton":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_gradients(inputs: tuple[Tensor, Tensor]) -> None:
    assert torch.autograd.gradcheck(scale, inputs)
    x, weight = inputs
    (only,) = torch.autograd.grad(scale(x, weight.detach()).sum(), x)
    torch.testing.assert_close(only, weight.detach() ** 3 * torch.ones_like(x))


def test_all_ways_to_call_it_agree(inputs: tuple[Tensor, Tensor]) -> None:
    def both(function: Any) -> list[Tensor]:
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]

    plain = both(scale)
    dispatched = both(lambda x, weight: torch.ops.lion_triton.test_scale(x, weight, 3)[0])
    compiled = both(torch.compile(scale, fullgraph=True, backend="aot_eager"))
    with Seen() as seen:
        watched = both(scale)
    assert seen.names == ["test_scale", "test_scale_bwd"]
    for others in (dispatched, compiled, watched):
        assert all(torch.equal(a, b) for a, b in zip(plain, others, strict=True))


def test_opcheck(inputs: tuple[Tensor, Tensor]) -> None:
    torch.library.opcheck(torch.ops.lion_triton.test_scale.default, (*inputs, 3))


def test_what_traces_sees_the_op(inputs: tuple[Tensor, Tensor]) -> None:
    x, weight = inputs
    graph = make_fx(scale)(x.detach(), weight.detach()).graph
    assert "lion_triton.test_scale.default" in {str(node.target) for node in graph.nodes}
    with FakeTensorMode() as mode:
        out = scale(mode.from_tensor(x), mode.from_tensor(weight))
    assert type(out) is type(mode.from_tensor(x))
    assert out.shape == x.shape


def test_only_the_first_result_has_a_gradient(inputs: tuple[Tensor, Tensor]) -> None:
    for call in (_test_scale_op, torch.ops.lion_triton.test_scale):
        out, constant = call(*inputs, 3)
        assert out.requires_grad
        assert not constant.requires_grad
    with torch.no_grad():
        assert not _test_scale_op(*inputs, 3)[0].requires_grad


def test_a_second_derivative_is_refused_or_right(inputs: tuple[Tensor, Tensor]) -> None:
    x, weight = inputs
    (dx,) = torch.autograd.grad(scale(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()
    assert torch.autograd.gradgradcheck(_test_square_op, (x,))


def test_a_missing_gradient_is_none(inputs: tuple[Tensor, Tensor]) -> None:
    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> None:
            return None

    Drop.apply(scale(*inputs)).sum().backward()
    assert inputs[0].grad is None


def traced_through(graph: torch.fx.Graph) -> Iterator[Any]:
    return (n for n in graph.nodes if n.target is torch.ops.higher_order.autograd_function_apply)


def test_compile_looks_into_no_reference() -> None:
    """PyTorch 2.11 loses gradients where it does: of what is made in place, by ``out=`` or an idle ``to``."""
    graphs: list[torch.fx.Graph] = []

    def keep(module: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(module.graph)
        return module

    x, y = torch.rand(2, 4, 3, requires_grad=True), torch.rand(2, 5, 3)
    torch.compile(approx_emd, fullgraph=True, backend=keep)(x, y, impl="reference").sum().backward()
    assert len(graphs) == 1
    assert not any(traced_through(graphs[0]))
