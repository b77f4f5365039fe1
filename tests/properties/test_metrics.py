"""The figures of sets of clouds against brute force in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lion_triton import metrics
from tests.properties.strategies import Draw, agree, dtype_of, one_of, property_of, size, spoiled, tensor


def sets(draw: Draw, least: int = 1) -> list[Tensor]:
    dtype, n = dtype_of(draw), size(draw, 1, 12)
    m = one_of(draw, n, size(draw, 1, 12))
    return [tensor(draw, size(draw, least, 4), k, 3, dtype=dtype) for k in (n, m)]


def chamfer(a: Tensor, b: Tensor) -> Tensor:
    sqdist = (a.double()[:, None, :, None] - b.double()[None, :, None]).square().sum(-1)  # (S, R, N, M)
    return sqdist.amin(3).mean(2) + sqdist.amin(2).mean(2)


def refuse_unless_sets(a: Any, b: Any) -> None:
    if not all(isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 3 and x.shape[2] == 3 for x in (a, b)):
        raise ValueError("not sets of clouds")
    if 0 in (*a.shape, *b.shape) or a.dtype != b.dtype:
        raise ValueError("nothing to compare")


@property_of(6)
def test_all_distances(draw: Draw) -> str:
    def ours(a: Any, b: Any) -> Any:
        d = metrics.all_distances(a, b)
        return d.samples, d.cross, d.references

    def plain(a: Any, b: Any) -> Any:
        refuse_unless_sets(a, b)
        dtype = torch.promote_types(a.dtype, torch.float32)
        pairs = ((a, a), (a, b), (b, b))
        return tuple(chamfer(x.detach(), y.detach()).to(dtype) for x, y in pairs)

    return agree(ours, plain, spoiled(draw, sets(draw, 0)), loose=3)


@property_of(6)
def test_figures_of_distances(draw: Draw) -> str:
    """Coverage, MMD and 1-NNA, looked up one by one, ties and all."""
    S, R = size(draw, 1, 6), size(draw, 1, 6)
    ss, sr, rr = (tensor(draw, *shape, kinds=("grid", "normal")).abs() for shape in ((S, S), (S, R), (R, R)))

    def plain(ss: Any, sr: Any, rr: Any) -> list[Tensor]:
        ss, sr, rr = (x.detach().double() for x in (ss, sr, rr))
        covered = {min(range(R), key=lambda r: float(sr[s, r])) for s in range(S)}
        mmd = sum(min(float(sr[s, r]) for s in range(S)) for r in range(R)) / R
        whole = torch.cat([torch.cat([ss, sr], 1), torch.cat([sr.T, rr], 1)])
        right = 0
        for j in range(S + R):
            i = min((i for i in range(S + R) if i != j), key=lambda i: float(whole[i, j]))
            right += (i < S) == (j < S)
        return [torch.tensor(x, dtype=torch.float64) for x in (mmd, len(covered) / R, right / (S + R))]

    def ours(*matrices: Any) -> list[Tensor]:
        detached = [x.detach() for x in matrices]
        figures = metrics.figures(metrics.Distances(*detached), "cd")
        return [torch.tensor(figures[f"{name}_cd"], dtype=torch.float64) for name in ("mmd", "cov", "1nna")]

    return agree(ours, plain, [ss, sr, rr])


@property_of(5)
def test_evaluate(draw: Draw) -> str:
    """All figures are numbers in their bounds, those of the distances; or the sets are refused."""
    emd = one_of(draw, None, "approx", "exact")

    def ours(a: Any, b: Any) -> list[Tensor]:
        results = metrics.evaluate(a, b, emd)
        # A ratio, infinite where only the references are flat, and no figure of distances.
        assert results.pop("thickness") >= 0
        assert results.pop("unevenness") >= 0
        assert all(0 <= v <= 1 + 1e-9 for k, v in results.items() if not k.startswith("mmd")), results
        assert all(v >= 0 for v in results.values()), results
        return [torch.tensor(v, dtype=torch.float64) for v in results.values()]

    def plain(a: Any, b: Any) -> list[Tensor]:
        refuse_unless_sets(a, b)
        if emd == "exact" and a.shape[1] != b.shape[1]:
            raise ValueError("other sizes")
        results = metrics.figures(metrics.all_distances(a, b), "cd")
        if emd is not None:
            results |= metrics.figures(metrics.all_distances(a, b, emd), "emd")
        results["jsd"] = metrics.jensen_shannon_divergence(b, a)  # is symmetric
        return [torch.tensor(v, dtype=torch.float64) for v in results.values()]

    return agree(ours, plain, spoiled(draw, sets(draw, 0)), loose=100)


@property_of(5)
def test_jensen_shannon_divergence(draw: Draw) -> str:
    """Of a set and itself 0, of two that share no place 1, and of half of each a half."""
    (a, _), resolution = sets(draw), one_of(draw, 4, 8, 28)
    assert metrics.jensen_shannon_divergence(a, a, resolution) == 0
    apart = torch.zeros_like(a) + a.new_tensor([0.4, 0, 0])
    other = torch.zeros_like(a) - a.new_tensor([0.4, 0, 0])
    assert abs(metrics.jensen_shannon_divergence(apart, other, resolution) - 1) < 1e-9
    return "equal"


@property_of(5)
def test_f_score(draw: Draw) -> str:
    batch, n, m, dtype = size(draw, 0, 3), size(draw, 1, 12), size(draw, 1, 12), dtype_of(draw)
    arguments: list[Any] = [tensor(draw, batch, k, 3, dtype=dtype, kinds=("normal", "grid", "huge")) for k in (n, m)]
    arguments.append(one_of(draw, 0.001, 0.5, 1e3))

    def plain(x: Any, y: Any, threshold: Any) -> Tensor:
        refuse_unless_sets(x if len(x) else x.new_zeros(1, *x.shape[1:]), y if len(y) else y.new_zeros(1, *y.shape[1:]))
        if len(x) != len(y) or not threshold > 0:
            raise ValueError("refused")
        sqdist = (x.detach().double()[:, :, None] - y.detach().double()[:, None]).square().sum(-1)
        p, r = ((sqdist.amin(axis) < threshold).double().mean(1) for axis in (2, 1))
        return torch.where(p + r > 0, 2 * p * r / (p + r), 0).float()

    return agree(metrics.f_score, plain, arguments)


@property_of(5)
def test_reconstruction(draw: Draw) -> str:
    emd = one_of(draw, None, "approx", "exact")

    def ours(x: Any, y: Any) -> list[Tensor]:
        return [torch.tensor(v, dtype=torch.float64) for v in metrics.reconstruction(x, y, emd).values()]

    def plain(x: Any, y: Any) -> list[Tensor]:
        refuse_unless_sets(x, y)
        if len(x) != len(y) or (emd == "exact" and x.shape[1] != y.shape[1]):
            raise ValueError("refused")
        parts = [chamfer(a[None], b[None]) for a, b in zip(x.detach(), y.detach(), strict=True)]
        cd = torch.cat(parts).mean()
        if emd is None:
            return [cd, metrics.f_score(x, y).double().mean()]
        distance = metrics.approx_emd if emd == "approx" else metrics.exact_emd
        return [cd, distance(x, y).detach().double().mean(), metrics.f_score(x, y).double().mean()]

    return agree(ours, plain, spoiled(draw, sets(draw, 0)), loose=100)


@property_of(4)
def test_chance_accuracy(draw: Draw) -> str:
    S, R = size(draw, 1, 50), size(draw, 1, 50)
    own = [(S - 1) / (S + R - 1)] * S + [(R - 1) / (S + R - 1)] * R
    assert abs(metrics.chance_accuracy(S, R) - sum(own) / len(own)) < 1e-12
    return "equal"
