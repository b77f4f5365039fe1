from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from lion_triton.kernels import _points, emd, pairwise
from lion_triton.kernels._checks import Impl, interpreting, use_triton
from lion_triton.kernels.emd import approx_emd, exact_emd
from lion_triton.kernels.pairwise import pairwise_chamfer, pairwise_emd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GOLDEN = np.load(Path(__file__).parents[1] / "data" / "lion_metrics.npz")
golden = pytest.mark.parametrize(("first", "second"), [("ref", "sample"), ("ref", "ref"), ("sample", "sample")])
impls = pytest.mark.parametrize("impl", ["auto", "reference", "triton"])


def rand(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


def rtol(impl: Impl) -> float:
    """Of float64 input, which the kernels compute in float32."""
    return 1e-5 if use_triton(impl, rand(1, seed=0)) else 1e-12


def golden_sets(first: str, second: str) -> tuple[Tensor, Tensor]:
    sets = {name: torch.from_numpy(GOLDEN[f"{name}s"]).to(DEVICE) for name in ("ref", "sample")}
    return sets[first], sets[second]


def naive_chamfer(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(len(a), len(b), dtype=torch.float64)
    for s, x in enumerate(a.cpu().double().numpy()):
        for r, y in enumerate(b.cpu().double().numpy()):
            to_y = [((p - y) ** 2).sum(1).min() for p in x]
            to_x = [((x - q) ** 2).sum(1).min() for q in y]
            out[s, r] = np.mean(to_y) + np.mean(to_x)
    return out.to(a.device)


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class TestChamfer:
    @impls
    @golden
    def test_golden(self, first: str, second: str, impl: Impl) -> None:
        a, b = golden_sets(first, second)
        expected = torch.from_numpy(GOLDEN[f"cd_{first}_{second}"]).to(DEVICE)
        if impl == "triton" and interpreting():
            a, b, expected = a[:1], b[1:3], expected[:1, 1:3]
        torch.testing.assert_close(pairwise_chamfer(a, b, impl=impl), expected, rtol=1e-6, atol=0)

    @impls
    @pytest.mark.parametrize(("S", "N", "R", "M"), [(3, 7, 2, 11), (1, 1, 1, 1), (2, 1, 3, 5), (1, 257, 2, 33)])
    def test_values(self, S: int, N: int, R: int, M: int, impl: Impl) -> None:
        a, b = rand(S, N, 3, seed=0), rand(R, M, 3, seed=1)
        torch.testing.assert_close(pairwise_chamfer(a, b, impl=impl), naive_chamfer(a, b), rtol=rtol(impl), atol=0)

    @impls
    def test_a_set_with_itself(self, impl: Impl) -> None:
        a = rand(5, 20, 3, seed=0)
        out = pairwise_chamfer(a, a, impl=impl)
        torch.testing.assert_close(out, naive_chamfer(a, a), rtol=rtol(impl), atol=0)
        assert torch.equal(out.diag(), torch.zeros_like(out.diag()))
        assert torch.equal(out, out.T)

    @impls
    def test_coincident_points(self, impl: Impl) -> None:
        a = torch.zeros(1, 100, 3, device=DEVICE)
        b = torch.tensor([0.0, 2.0], device=DEVICE).view(2, 1, 1).expand(2, 40, 3)
        assert pairwise_chamfer(a, b, impl=impl).tolist() == [[0, 24]]

    @impls
    def test_more_partners_than_one_call_takes(self, impl: Impl, monkeypatch: pytest.MonkeyPatch) -> None:
        a, b = rand(4, 9, 3, seed=0), rand(5, 8, 3, seed=1)
        whole, symmetric = pairwise_chamfer(a, b, impl=impl), pairwise_chamfer(a, a, impl=impl)
        monkeypatch.setattr(pairwise, "_CLOUDS", 2)
        monkeypatch.setattr(pairwise, "_PAIRS", 12)
        monkeypatch.setattr(_points, "block_size", lambda x: 100)
        torch.testing.assert_close(pairwise_chamfer(a, b, impl=impl), whole, rtol=1e-12, atol=0)
        torch.testing.assert_close(pairwise_chamfer(a, a, impl=impl), symmetric, rtol=1e-12, atol=0)

    @impls
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_dtype_strides_and_gradient(self, dtype: torch.dtype, impl: Impl) -> None:
        a, b = rand(2, 30, 3, seed=0).to(dtype).requires_grad_(), rand(3, 20, 3, seed=1).to(dtype)
        out = pairwise_chamfer(a.mT.contiguous().mT, b.repeat(1, 1, 2)[..., 3:], impl=impl)
        assert out.dtype == torch.float32
        assert not out.requires_grad
        torch.testing.assert_close(out, naive_chamfer(a.detach().float(), b.float()).float())

    def test_threads(self, threads: int) -> None:
        a, b = rand(3, 40, 3, seed=0), rand(4, 50, 3, seed=1)
        torch.testing.assert_close(pairwise_chamfer(a, b), naive_chamfer(a, b), rtol=rtol("auto"), atol=0)

    @pytest.mark.parametrize("offset", [0.0, 10.0])
    def test_kernel_is_as_good_as_the_reference(self, offset: float) -> None:
        a, b = rand(2, 11, 3, seed=0).float() + offset, rand(3, 9, 3, seed=1).float() + offset
        b = torch.cat([b, b[:, :4], a[:1, :2].expand(3, -1, -1)], 1)  # coincident points, in one cloud and in both
        exact = pairwise_chamfer(a.double(), b.double(), impl="reference")
        ours, again, reference = (pairwise_chamfer(a, b, impl=i).double() for i in ("triton", "triton", "reference"))
        assert (ours - exact).abs().max() <= 2 * (reference - exact).abs().max() + 1e-7 * exact.max()
        assert torch.equal(ours, again)


class TestEMD:
    @golden
    def test_golden(self, first: str, second: str) -> None:
        a, b = golden_sets(first, second)
        expected = torch.from_numpy(GOLDEN[f"emd_approx_{first}_{second}"]).to(DEVICE)
        # atol: of a cloud to itself the cost is about 1e-6, and rounding shows (1e-9 by the kernels).
        torch.testing.assert_close(
            pairwise_emd(a, b).double(), expected, rtol=1e-4, atol=1e-9 if DEVICE == "cpu" else 1e-8
        )

    @impls
    def test_approx(self, impl: Impl, monkeypatch: pytest.MonkeyPatch) -> None:
        a, b = rand(2, 4, 3, seed=0), rand(3, 2, 3, seed=1)
        expected = torch.stack([approx_emd(x.expand(len(b), -1, -1), b, impl="reference") for x in a])
        torch.testing.assert_close(pairwise_emd(a, b, impl=impl), expected, rtol=rtol(impl), atol=0)
        monkeypatch.setattr(pairwise, "_CLOUDS", 2)
        monkeypatch.setattr(pairwise, "_SCRATCH", 4 * 4 * (3 * 4 + 2 * 2))
        torch.testing.assert_close(pairwise_emd(a, b, method="approx", impl=impl), expected, rtol=rtol(impl), atol=0)

    def test_approx_of_a_set_with_itself_is_all_pairs(self) -> None:
        a = rand(2, 3, 3, seed=0).float()
        out = pairwise_emd(a, a, impl="triton")
        assert torch.equal(out, pairwise_emd(a, a.clone(), impl="triton"))
        torch.testing.assert_close(out, pairwise_emd(a, a, impl="reference"), rtol=1e-5, atol=1e-9)
        assert not torch.equal(out, out.T)

    def test_dtype_strides_and_gradient(self) -> None:
        a, b = rand(1, 4, 3, seed=0).bfloat16().requires_grad_(), rand(2, 3, 3, seed=1).bfloat16()
        out = pairwise_emd(a.mT.contiguous().mT, b.repeat(1, 1, 2)[..., 3:], impl="triton")
        assert out.dtype == torch.float32
        assert not out.requires_grad
        torch.testing.assert_close(out, pairwise_emd(a.float(), b.float(), impl="reference"), rtol=1e-5, atol=0)

    def test_approx_leaves_the_number_of_threads_of_every_new_thread(self, threads: int) -> None:
        """Its workers take one each; also where it is stopped."""
        a, b = rand(1, 4, 3, seed=0).cpu(), rand(1, 2, 3, seed=1).cpu()

        def of_a_new_thread() -> int:
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(torch.get_num_threads).result()

        def stop(pairs: int) -> None:
            raise KeyboardInterrupt

        pairwise_emd(a, b, impl="reference")
        assert of_a_new_thread() == torch.get_num_threads() == threads
        with pytest.raises(KeyboardInterrupt):
            pairwise_emd(a, b, impl="reference", progress=stop)
        assert of_a_new_thread() == torch.get_num_threads() == threads

    def test_exact(self, threads: int) -> None:
        a, b = rand(3, 12, 3, seed=0), rand(4, 12, 3, seed=1)
        for other in (a, b):
            expected = torch.stack([exact_emd(x.expand(len(other), -1, -1), other) for x in a])
            out = pairwise_emd(a, other, method="exact")
            torch.testing.assert_close(out, expected, rtol=1e-12, atol=0)

    def test_exact_of_a_set_with_itself_solves_each_pair_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        solved: list[int] = []

        def counting(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            solved.append(1)
            return np.arange(len(x))

        monkeypatch.setattr(pairwise, "assign", counting)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        a = rand(5, 6, 3, seed=0)
        pairwise_emd(a, a, method="exact")
        assert len(solved) == 10
        pairwise_emd(a, a.clone(), method="exact")
        assert len(solved) == 10 + 25


@pytest.mark.parametrize(
    "distances",
    [
        pairwise_chamfer,
        lambda a, b, progress: pairwise_chamfer(a, b, progress=progress, impl="reference"),
        lambda a, b, progress: pairwise_chamfer(a, b, progress=progress, impl="triton"),
        pairwise_emd,
        lambda a, b, progress: pairwise_emd(a, b, progress=progress, impl="triton"),
        lambda a, b, progress: pairwise_emd(a, b, method="exact", progress=progress),
    ],
    ids=["trees", "reference", "triton", "approx", "approx-triton", "exact"],
)
def test_progress_adds_up_to_all_pairs(distances: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairwise, "_PAIRS", 4)
    a, b = rand(3, 1, 3, seed=0), rand(2, 1, 3, seed=1)
    for other in (a, b):
        finished: list[int] = []
        distances(a, other, progress=finished.append)
        assert sum(finished) == len(a) * len(other)
        assert len(finished) >= 2


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of what each launch is given beside the clouds; nothing is computed."""
    given = list[int]()

    class Kernel:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda x, y, *args, **_: given.append(sum(t.nbytes for t in args if isinstance(t, Tensor)))

    monkeypatch.setattr(pairwise, "_pairwise_nearest_kernel", Kernel())
    for name in ("_match_rows_kernel", "_match_columns_kernel"):
        monkeypatch.setattr(emd, name, Kernel())
    return given


@pytest.mark.parametrize(("N", "M"), [(600, 20), (20, 600)])
@pytest.mark.parametrize(("op", "limit"), [(pairwise_chamfer, 200), (pairwise_emd, 20_000)])
def test_scratch_is_bounded(
    op: Callable[..., Tensor], limit: int, N: int, M: int, scratch: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, chunks = rand(7, N, 3, seed=0), rand(5, M, 3, seed=1), list[int]()
    monkeypatch.setattr(pairwise, "_SCRATCH", limit)
    op(a, b, impl="triton")
    assert limit / 2 < max(scratch) <= limit
    monkeypatch.setattr(pairwise, "_SCRATCH", 1)  # too little for anything
    op(a, b, impl="triton", progress=chunks.append)
    assert set(chunks) == {5 if op is pairwise_chamfer else 1}  # a row, a pair
    assert sum(chunks) == 35


@pytest.mark.parametrize("op", [pairwise_chamfer, pairwise_emd])
def test_no_clouds(op: Callable[..., Tensor]) -> None:
    a, b = rand(2, 3, 3, seed=0), rand(3, 2, 3, seed=1)
    assert op(a[:0], b, impl="triton").shape == (0, 3)
    assert op(a, b[:0], impl="triton").shape == (2, 0)


X, Y = torch.zeros(2, 4, 3), torch.zeros(3, 5, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pairwise_chamfer(X[0], Y), r"a: expected shape \(B, N, 3\) with N >= 1, got \(4, 3\)"),
        (lambda: pairwise_chamfer(X, Y.int()), "b: expected float32.* got torch.int32"),
        (lambda: pairwise_chamfer(X, Y.double()), r"b: expected the dtype of a \(torch.float32\)"),
        (
            lambda: pairwise_chamfer(X, Y * torch.nan),
            "b: expected finite coordinates, got .* in cloud 0 \\(3 clouds in all\\)",
        ),
        (lambda: pairwise_chamfer(X, Y, impl=cast(Any, "cuda")), "impl: expected"),
        (
            lambda: pairwise_emd(X * torch.inf, Y),
            "a: expected finite coordinates, got .* in cloud 0 \\(2 clouds in all\\)",
        ),
        (lambda: pairwise_emd(X, Y, method="exact"), r"b: expected as many points as a \(4\), got 5"),
        (
            lambda: pairwise_emd(X, Y, method=cast(Any, "sinkhorn")),
            'method: expected "approx" or "exact", got .sinkhorn.',
        ),
        (lambda: pairwise_emd(X, X, method="exact", impl="triton"), 'impl: method="exact" has no kernel'),
    ],
)
def test_bad_input(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_trees_and_products_agree_with_the_reference() -> None:
    """Which of the two serves a pair depends on its size; both must be right at every size."""
    from lion_triton.kernels import pairwise

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 70, 3, generator=generator) + 5.0
    b = torch.randn(4, 131, 3, generator=generator) + 5.0
    for x, y in ((a, b), (a, a)):
        expected = pairwise.pairwise_chamfer_reference(x.double(), y.double())
        for way in (pairwise._pairwise_chamfer_trees, pairwise._pairwise_chamfer_products):
            torch.testing.assert_close(way(x, y, None).double(), expected, rtol=1e-6, atol=1e-9)
