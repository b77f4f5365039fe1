from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from lion_triton.kernels import knn
from lion_triton.kernels._checks import Impl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
module = sys.modules["lion_triton.kernels.knn"]  # the package's attribute of that name is the function
IMPLS: tuple[Impl, ...] = ("auto", "reference", "triton")
both = pytest.mark.parametrize("impl", ["reference", "triton"])


@pytest.fixture(autouse=True)
def wide_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a program's lists are cut at once: the interpreter's time is its number of operations."""
    if DEVICE == "cpu":
        monkeypatch.setattr(module, "_CUT", 1 << 12)


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)


def naive(x: Tensor, y: Tensor, k: int, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """In float64, cloud by cloud: distances with gradients, and indices."""
    sqdist = x.new_full((*x.shape[:2], k), torch.inf)
    idx = torch.full(sqdist.shape, -1, dtype=torch.int32)
    for b, size in enumerate(sizes):
        found = (x[b, :, None] - y[b, None, :size]).square().sum(-1).sort(dim=1, stable=True)
        most = min(k, size)
        idx[b, :, :most] = found.indices[:, :k].int()
        sqdist = sqdist.index_put(
            (torch.tensor(b), torch.arange(x.shape[1])[:, None], torch.arange(most)[None]), found.values[:, :k]
        )
    return sqdist, idx


CASES = {  # B, N, M, D, K, lengths
    "B2-N9-M40-D3-K4": (2, 9, 40, 3, 4, None),
    "one-point": (1, 1, 1, 3, 1, None),
    "fewer-points-than-neighbours": (1, 5, 3, 2, 7, None),
    "prime-ragged": (3, 7, 31, 3, 5, [31, 3, 0]),
    "one-dimension": (1, 4, 13, 1, 3, None),
    "past-a-block-and-many-lists": (1, 33, 150, 2, 3, None),  # lists are cut on the way
    "most-neighbours": (1, 3, 300, 3, 64, None),
    "many-dimensions": (1, 3, 20, 128, 4, None),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("impl", IMPLS)
def test_values_and_gradients(case: tuple[Any, ...], impl: Impl) -> None:
    B, N, M, D, K, sizes = case
    lengths = None if sizes is None else torch.tensor(sizes, device=DEVICE)
    x, y = rand(B, D, N, seed=0).mT.requires_grad_(), rand(B, M, D, seed=1)
    if sizes is not None:
        y[torch.arange(M) >= torch.tensor(sizes)[:, None]] = torch.nan  # padding is never read
    y.requires_grad_()
    sqdist, idx = knn(x, y, K, lengths=lengths, impl=impl)
    a, b = (t.detach().cpu().double().requires_grad_() for t in (x, y))
    expected, expected_idx = naive(a, b, K, sizes or [M] * B)
    assert sqdist.dtype == torch.float32 and idx.dtype == torch.int32
    assert torch.equal(idx.cpu(), expected_idx)
    torch.testing.assert_close(sqdist.detach().cpu().double(), expected.detach(), rtol=2e-6, atol=1e-30)
    cotangent = rand(B, N, K, seed=2)
    torch.autograd.backward(sqdist, cotangent.masked_fill(idx < 0, 0))
    torch.autograd.backward(expected, cotangent.cpu().double().masked_fill(expected_idx < 0, 0))
    for actual, value in ((x.grad, a.grad), (y.grad, b.grad)):
        assert actual is not None and value is not None
        torch.testing.assert_close(actual.cpu().double(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_take_the_lowest_index(impl: Impl) -> None:
    x = torch.zeros(1, 2, 3, device=DEVICE)
    y = torch.tensor([[2, 0, 0], [0, -1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]], device=DEVICE).float()
    assert knn(x, y[None], 6, impl=impl)[1].tolist() == [[[3, 5, 1, 2, 4, 0]] * 2]
    same = torch.ones(1, 150, 3, device=DEVICE)  # a list is cut among equal distances
    assert knn(x, same, 5, impl=impl)[1].tolist() == [[[0, 1, 2, 3, 4]] * 2]


def test_a_cut_keeps_the_nearest_whatever_their_order() -> None:
    """Falling distances: every point is a hit, and lists fill as often as they can."""
    y = torch.arange(200, 0, -1.0, device=DEVICE)[None, :, None]
    sqdist, idx = knn(torch.zeros(1, 1, 1, device=DEVICE), y, 4, impl="triton")
    assert idx.tolist() == [[[199, 198, 197, 196]]] and sqdist.tolist() == [[[1, 4, 9, 16]]]


def test_lists_are_cut_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rand(1, 5, 2, seed=3), rand(1, 90, 2, seed=4)
    expected = knn(x, y, 3, impl="reference")
    monkeypatch.setattr(module, "_CUT", 128)
    assert torch.equal(knn(x, y, 3, impl="triton")[1], expected[1])


@pytest.mark.parametrize(
    ("N", "M", "D", "K"), [(300, 400, 3, 8), (100, 700, 8, 3), (200, 300, 24, 5), (50, 600, 2, 40), (30, 90, 3, 80)]
)
@pytest.mark.parametrize("kind", ["normal", "lattice", "coincident", "far", "float64"])
def test_on_a_cpu_trees_and_products_give_the_same_bits(N: int, M: int, D: int, K: int, kind: str) -> None:
    x, y = rand(2, N, D, seed=5).cpu(), rand(2, M, D, seed=6).cpu()
    if kind == "lattice":  # ties at every boundary
        x, y = x.round(), y.round()
    elif kind == "coincident":
        y = y[:, :7].repeat(1, M // 7 + 1, 1)[:, :M]
    elif kind == "far":  # products lose their digits
        x, y = x * 1e-3 + 1000, y * 1e-3 + 1000
    elif kind == "float64":
        x, y = x.double(), y.double()
    for fast, slow in zip(knn(x, y, K), knn(x, y, K, impl="reference"), strict=True):
        assert torch.equal(fast, slow)


@pytest.mark.parametrize("D", [3, 24])
def test_a_wrong_candidate_is_noticed(D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound on all other points is what makes it exact: rows whose candidates are not sure are searched again."""
    x, y = rand(1, 40, D, seed=7).cpu(), rand(1, 600, D, seed=8).cpu()
    name = "_candidates_by_tree" if D == 3 else "_candidates_by_product"
    real, searched = getattr(module, name), []

    def worse(x: Tensor, y: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        searched.append(len(x))
        candidates, bound = real(x, y, count, dtype)
        bound[::2] = 0  # for every second row nothing is certain
        return candidates, bound

    monkeypatch.setattr(module, name, worse)
    assert torch.equal(knn(x, y, 6)[1], knn(x, y, 6, impl="reference")[1])
    assert searched == [40, 20]


@pytest.mark.parametrize("impl", IMPLS)
def test_not_a_number_gives_an_index_in_bounds(impl: Impl) -> None:
    x, y = rand(1, 4, 3, seed=9), rand(1, 20, 3, seed=10)
    x[0, 1, 0], y[0, 3, 2], y[0, 5, 1] = torch.nan, torch.nan, torch.inf
    _, idx = knn(x, y, 4, impl=impl)
    assert idx.min() >= 0 and idx.max() < 20
    assert not ((idx[0, [0, 2, 3]] == 3) | (idx[0, [0, 2, 3]] == 5)).any()


@both
def test_half_precision_is_computed_in_float32(impl: Impl) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x, y = rand(1, 3, 3, seed=11).to(dtype), rand(1, 12, 3, seed=12).to(dtype)
        for half, single in zip(knn(x, y, 2, impl=impl), knn(x.float(), y.float(), 2, impl=impl), strict=True):
            assert torch.equal(half, single)


@both
def test_nothing_there(impl: Impl) -> None:
    for shape in ((0, 4, 3), (2, 0, 3)):
        assert knn(torch.zeros(shape, device=DEVICE), rand(shape[0], 5, 3, seed=0), 2, impl=impl)[0].shape == (
            *shape[:2],
            2,
        )
    sqdist, idx = knn(rand(1, 2, 3, seed=0), torch.zeros(1, 0, 3, device=DEVICE), 2, impl=impl)
    assert (idx == -1).all() and sqdist.isinf().all()


def test_twice_the_same_bits() -> None:
    x, y = rand(2, 20, 3, seed=13).requires_grad_(), rand(2, 12, 3, seed=14).requires_grad_()

    def run() -> list[Tensor]:
        sqdist, idx = knn(x, y, 3, impl="triton")
        return [sqdist, idx, *torch.autograd.grad(sqdist, (x, y), torch.ones_like(sqdist))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_gradcheck() -> None:
    x, y = (rand(1, n, 3, seed=n, dtype=torch.float64).requires_grad_() for n in (4, 6))
    torch.autograd.gradcheck(lambda x, y: knn(x, y, 3, impl="reference")[0], (x, y))


def test_opcheck_and_compile() -> None:
    x, y = rand(1, 3, 2, seed=15).requires_grad_(), rand(1, 6, 2, seed=16).requires_grad_()
    lengths = torch.tensor([5], device=DEVICE)
    torch.library.opcheck(
        torch.ops.lion_triton.knn.default, (x, y, 2, lengths), test_utils=("test_schema", "test_faketensor")
    )
    compiled = torch.compile(lambda x, y: knn(x, y, 2, impl="triton")[0].sum(), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(knn(x, y, 2, impl="triton")[0].sum(), (x, y))
    for actual, value in zip(torch.autograd.grad(compiled(x, y), (x, y)), expected, strict=True):
        assert torch.equal(actual, value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4, 3), torch.zeros(1, 4, 3), 2), r"x: expected shape \(B, N, D\) with D >= 1, got \(4, 3\)"),
        ((torch.zeros(1, 4, 3), torch.zeros(1, 4, 2), 2), r"y: expected the number of dimensions of x \(3\), got 2"),
        ((torch.zeros(1, 4, 3), torch.zeros(1, 4, 3).double(), 2), "y: expected the dtype of x"),
        ((torch.zeros(1, 4, 3), torch.zeros(2, 4, 3), 2), r"y: expected the batch size of x \(1\), got 2"),
        ((torch.zeros(1, 4, 3), torch.zeros(1, 4, 3), 0), "k: expected an integer >= 1, got 0"),
        ((torch.zeros(1, 4, 3), torch.zeros(1, 4, 3), 2.5), "k: expected an integer >= 1, got 2.5"),
        (([[0.0]], torch.zeros(1, 4, 3), 2), "x: expected a tensor, got list"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        knn(*arguments)


def test_beyond_the_kernel() -> None:
    x = rand(1, 2, 130, seed=0)
    with pytest.raises(ValueError, match='impl: "triton" takes k <= 64 and D <= 128, got k = 1 and D = 130'):
        knn(x, x, 1, impl="triton")
    with pytest.raises(ValueError, match="got k = 65 and D = 3"):
        knn(x[..., :3], x[..., :3], 65, impl="triton")
    assert knn(x, x, 1)[1].tolist() == [[[0], [1]]]


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_lengths_of_any_strides(impl: Impl) -> None:
    x, y, lengths = rand(3, 5, 3, seed=0), rand(3, 9, 3, seed=1), torch.tensor([4, 0, 9], device=DEVICE)
    spread = torch.stack([lengths, torch.full_like(lengths, 7)], 1)[:, 0]
    for got, expected in zip(
        knn(x, y, 2, lengths=spread, impl=impl), knn(x, y, 2, lengths=lengths, impl=impl), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
