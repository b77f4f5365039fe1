from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lion_triton.kernels import rows
from lion_triton.kernels._checks import Impl, interpreting
from lion_triton.kernels.rows import SparseRows, product, sort_by_target, take_rows, transpose

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = pytest.mark.parametrize("impl", ["reference", "triton"])
Run = Callable[..., list[Tensor]]


class Case(NamedTuple):
    """``rows`` rows with K entries each, pointing at the n rows of x, of C channels."""

    rows: int
    K: int
    n: int
    C: int
    weighted: bool = True
    index: str = "random"

    def __str__(self) -> str:
        weighted = "weighted" if self.weighted else "ones"
        return f"rows{self.rows}-K{self.K}-n{self.n}-C{self.C}-{weighted}-{self.index}"


# One row; fewer channels than a vector; one past a block of rows and of channels; K that is no multiple of the
# entries in flight; rows of x that nothing points at, or that everything points at.
CASES = [
    Case(1, 1, 1, 1),
    Case(1, 8, 3, 5, weighted=False),
    Case(37, 1, 11, 3, weighted=False),
    Case(37, 3, 11, 3),
    Case(129, 2, 200, 4),
    Case(65, 2, 9, 48, weighted=False),
    Case(33, 8, 29, 32),
    Case(19, 5, 700, 24),
    Case(5, 9, 7, 257),
    Case(31, 3, 13, 16, index="one"),
    Case(31, 3, 13, 16, index="last"),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def make_inputs(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, index, weight."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.n, case.C, generator=generator)
    index = torch.randint(case.n, (case.rows, case.K), dtype=torch.int32, generator=generator)
    if case.index != "random":
        index.fill_(case.n // 2 if case.index == "one" else case.n - 1)
    weight = torch.rand(case.rows, case.K, generator=generator) if case.weighted else None
    return x.to(DEVICE, dtype), index.to(DEVICE), None if weight is None else weight.to(DEVICE, dtype)


def dense(index: Tensor, weight: Tensor | None, n: int) -> Tensor:
    """The (rows, n) float64 matrix, one entry after the other."""
    matrix = torch.zeros(len(index), n, dtype=torch.float64)
    weights = torch.ones(index.shape) if weight is None else weight.cpu()
    for r, columns in enumerate(index.tolist()):
        for k, column in enumerate(columns):
            matrix[r, column] += weights[r, k].double()
    return matrix.to(index.device)


def gradients(out: Tensor, inputs: tuple[Tensor | None, ...]) -> list[Tensor]:
    """The output, then its gradient to each input for one random cotangent."""
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return [out.detach(), *torch.autograd.grad(out, [x for x in inputs if x is not None], cotangent)]


def run_take(case_inputs: tuple[Tensor, Tensor, Tensor | None], impl: Impl, double: bool = False) -> list[Tensor]:
    x, index, weight = case_inputs
    x, weight = (
        None if t is None else (t.double() if double else t.detach()).clone().requires_grad_() for t in (x, weight)
    )
    return gradients(take_rows(x, index, weight, impl=impl), (x, weight))


def run_product(case_inputs: tuple[Tensor, Tensor, Tensor | None], impl: Impl, double: bool = False) -> list[Tensor]:
    """The product, its gradient, and the same of the transpose."""
    x, index, weight = case_inputs
    x = (x.double() if double else x.detach()).clone().requires_grad_()
    matrix, matrix_t = SparseRows(index, None, weight), transpose(index, weight, len(x), impl="reference")
    there = gradients(product(x, matrix, matrix_t, impl=impl), (x,))
    y = there[0].clone().requires_grad_()
    return there + gradients(product(y, matrix_t, matrix, impl=impl), (y,))


EITHER = pytest.mark.parametrize("run", [run_take, run_product])


def assert_as_good_as_reference(run: Run, case_inputs: tuple[Tensor, Tensor, Tensor | None]) -> None:
    """Each result at most twice as far from float64 as the reference of the same dtype."""
    ours, reference = run(case_inputs, "triton"), run(case_inputs, "reference")
    exact = run(case_inputs, "reference", double=True)
    for x, y, z in zip(ours, reference, exact, strict=True):
        assert x.shape == y.shape == z.shape
        assert x.dtype == y.dtype
        # The second term is for a reference that is right by chance.
        allowed = 2 * (y - z).abs().max() + 1e-6 * z.abs().max()
        if interpreting() and x.dtype == torch.bfloat16:
            # The interpreter truncates where a GPU rounds; run_product goes on from a result that it truncated.
            allowed = 2.0**-6 * z.abs().max()
        assert (x - z).abs().max() <= allowed


@cases
def test_take_rows_reference_is_a_product_with_the_dense_matrix(case: Case) -> None:
    x, index, weight = make_inputs(case)
    matrix = dense(index, weight, case.n)
    y, dx, *dweight = run_take((x, index, weight), "reference")
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(x).double()
    torch.testing.assert_close(y.double(), matrix @ x.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx.double(), matrix.mT @ cotangent, rtol=1e-5, atol=1e-5)
    for d in dweight:
        expected = (cotangent @ x.double().mT).gather(1, index.long())
        torch.testing.assert_close(d.double(), expected, rtol=1e-5, atol=1e-5)


@cases
def test_product_reference_is_that_of_the_dense_matrix(case: Case) -> None:
    x, index, weight = make_inputs(case)
    matrix = dense(index, weight, case.n)
    y, dx, z, dy = (t.double() for t in run_product((x, index, weight), "reference"))
    cotangent_y, cotangent_z = (
        torch.randn(t.shape, generator=torch.Generator().manual_seed(2)).to(x).double() for t in (y, z)
    )
    torch.testing.assert_close(y, matrix @ x.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, matrix.mT @ cotangent_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z, matrix.mT @ y, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dy, matrix @ cotangent_z, rtol=1e-5, atol=1e-4)


@cases
@EITHER
def test_as_good_as_the_reference(case: Case, run: Run) -> None:
    assert_as_good_as_reference(run, make_inputs(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@EITHER
def test_half_precision(dtype: torch.dtype, run: Run) -> None:
    for case in (CASES[3], CASES[5]):
        assert_as_good_as_reference(run, make_inputs(case, dtype))


@EITHER
def test_float64_is_computed_in_float32(run: Run) -> None:
    inputs = make_inputs(CASES[3], torch.float64)
    for x, y in zip(run(inputs, "triton"), run(inputs, "reference"), strict=True):
        assert x.dtype == y.dtype == torch.float64
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@BOTH
def test_weights_of_another_dtype(impl: Impl) -> None:
    x, index, weight = make_inputs(CASES[3], torch.bfloat16)
    assert weight is not None
    y, dx, dweight = run_take((x, index, weight.float()), impl)
    assert (y.dtype, dx.dtype, dweight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.double(), dense(index, weight, len(x)) @ x.double(), rtol=2**-7, atol=2**-7)


@BOTH
def test_not_contiguous(impl: Impl) -> None:
    x, index, weight = make_inputs(CASES[4])
    assert weight is not None
    strided = (x.T.contiguous().T, index.T.contiguous().T, weight.T.contiguous().T)
    for run in (run_take, run_product):
        for a, b in zip(run(strided, impl), run((x, index, weight), impl), strict=True):
            torch.testing.assert_close(a, b)
    # The gradient of a sum is one number, expanded.
    x = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(take_rows(x, index, weight, impl=impl).sum(), x)
    torch.testing.assert_close(dx, dense(index, weight, len(x)).sum(0)[:, None].expand_as(dx).float())


@cases
def test_transpose(case: Case) -> None:
    _, index, weight = make_inputs(case)
    expected = transpose(index, weight, case.n, impl="reference")
    got = transpose(index, weight, case.n, impl="triton")
    assert got.num_rows == expected.num_rows == case.n
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a, b)

    # Against a list of lists.
    entries: list[list[tuple[int, float]]] = [[] for _ in range(case.n)]
    values = torch.ones(index.shape) if weight is None else weight
    for r, columns in enumerate(index.tolist()):
        for k, column in enumerate(columns):
            entries[column].append((r, values[r, k].item()))
    assert expected.start is not None
    start = expected.start.tolist()
    assert [b - a for a, b in zip(start[:-1], start[1:], strict=True)] == [len(row) for row in entries]
    assert expected.column.tolist() == [r for row in entries for r, _ in row]
    if expected.weight is not None:
        assert expected.weight.tolist() == [value for row in entries for _, value in row]


def test_sort_by_target() -> None:
    order, start = sort_by_target(torch.tensor([2, 0, 2, 4, 0], dtype=torch.int32, device=DEVICE), 5)
    assert order.tolist() == [1, 4, 0, 2, 3]
    assert start.tolist() == [0, 2, 2, 4, 4, 5]


@BOTH
def test_nothing_to_take(impl: Impl) -> None:
    for n in (0, 3):
        x = torch.ones(n, 4, device=DEVICE, requires_grad=True)
        index = torch.empty(0, 2, dtype=torch.int32, device=DEVICE)
        weight = torch.empty(0, 2, device=DEVICE, requires_grad=True)
        y, dx, dweight = gradients(take_rows(x, index, weight, impl=impl), (x, weight))
        assert y.shape == (0, 4)
        assert torch.equal(dx, torch.zeros(n, 4, device=DEVICE))
        assert dweight.shape == (0, 2)


@EITHER
def test_repeats_bit_for_bit(run: Run) -> None:
    inputs = make_inputs(CASES[5])
    for x, y in zip(run(inputs, "triton"), run(inputs, "triton"), strict=True):
        assert torch.equal(x, y)


@BOTH
def test_only_some_gradients(impl: Impl) -> None:
    x, index, weight = make_inputs(CASES[3])
    assert weight is not None
    _, both, of_weight = run_take((x, index, weight), impl)
    cotangent = torch.randn(len(index), x.shape[1], generator=torch.Generator().manual_seed(2)).to(x)
    take_rows(x, index, weight.requires_grad_(), impl=impl).backward(cotangent)
    assert x.grad is None
    assert torch.equal(weight.grad, of_weight)
    take_rows(x.requires_grad_(), index, weight.detach(), impl=impl).backward(cotangent)
    assert torch.equal(x.grad, both)


def test_gradcheck_of_the_references() -> None:
    x, index, weight = make_inputs(Case(4, 3, 5, 2), torch.float64)
    assert weight is not None
    x.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: take_rows(x, index, w, impl="reference"), (x, weight))
    fixed = weight.detach()
    matrices = SparseRows(index, None, fixed), transpose(index, fixed, 5, impl="reference")
    for a, b, n in ((*matrices, 5), (*reversed(matrices), 4)):
        y = torch.randn(n, 2, dtype=torch.float64, requires_grad=True, device=DEVICE)
        assert torch.autograd.gradcheck(lambda y, a=a, b=b: product(y, a, b, impl="reference"), y)
        assert torch.autograd.gradgradcheck(lambda y, a=a, b=b: product(y, a, b, impl="reference"), y)


@BOTH
def test_product_is_twice_differentiable(impl: Impl) -> None:
    x, index, weight = make_inputs(CASES[3])
    x.requires_grad_()
    matrices = SparseRows(index, None, weight), transpose(index, weight, len(x), impl="reference")
    y = product(x, *matrices, impl=impl)
    (dx,) = torch.autograd.grad(y.square().sum() / 2, x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx, x, x.detach())
    torch.testing.assert_close(ddx, dx.detach())  # both are A^T A x


@BOTH
def test_compiles_whole(impl: Impl) -> None:
    x, index, weight = make_inputs(CASES[3])
    assert weight is not None
    x.requires_grad_()
    weight.requires_grad_()
    matrix = SparseRows(index, None, weight.detach())
    matrix_t = transpose(index, weight.detach(), len(x), impl="reference")

    def both(x: Tensor, weight: Tensor) -> Tensor:
        return product(x, matrix, matrix_t, impl=impl) * take_rows(x, index, weight, impl=impl)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled(x, weight), (x, weight)), gradients(both(x, weight), (x, weight)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "ones"])
@pytest.mark.parametrize("op", ["product", "product-counted", "take_rows", "take_rows_bwd", "row_dots"])
def test_opcheck(op: str, weighted: bool) -> None:
    x, index, weight = make_inputs(Case(6, 3, 5, 4, weighted=weighted))
    matrices = SparseRows(index, None, weight), transpose(index, weight, len(x), impl="reference")
    y = torch.randn(len(index), x.shape[1], device=DEVICE)
    never_differentiated = ("test_schema", "test_faketensor")
    if op == "product":
        torch.library.opcheck(rows._product_op.overload, (x.requires_grad_(), *matrices[0], *matrices[1]))
    elif op == "product-counted":
        torch.library.opcheck(rows._product_op.overload, (y.requires_grad_(), *matrices[1], *matrices[0]))
    elif op == "take_rows":
        weight = None if weight is None else weight.requires_grad_()
        torch.library.opcheck(rows._take_rows_op.overload, (x.requires_grad_(), index, weight))
    elif op == "take_rows_bwd":
        torch.library.opcheck(
            rows._take_rows_bwd_op.overload, (y, index, weight, len(x)), test_utils=never_differentiated
        )
    else:
        torch.library.opcheck(rows._row_dots_op.overload, (x, y, index, x), test_utils=never_differentiated)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs 13 GB and a GPU")
def test_more_than_2_to_the_31_elements() -> None:
    n, C = 2**21 + 1, 1024
    x = torch.zeros(n, C, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = torch.arange(C, device=DEVICE) % 128
    x[0] = 3
    index = torch.arange(n - 1, -1, -1, dtype=torch.int32, device=DEVICE)[:, None]
    y = take_rows(x.requires_grad_(), index, impl="triton")
    assert torch.equal(y[0], x[-1])
    assert torch.equal(y[-1], x[0])
    (dx,) = torch.autograd.grad(y, x, y.detach())
    assert torch.equal(dx, x)
