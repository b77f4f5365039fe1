from __future__ import annotations

import pytest
import torch

from lion_triton.kernels.compat.chamfer3d import (
    chamfer_3DDist,
    chamfer_3DDist_nograd,
    chamfer_3DFunction,
    chamfer_3DFunction_noGrad,
    fscore,
)
from tests.kernels.compat.cases import DEVICE, assert_close, assert_equal, assert_same_gradients, double, leaf, rand


@pytest.mark.parametrize(("B", "N", "M"), [(2, 9, 14), (1, 1, 3), (3, 5, 1)])
def test_both_ways(B: int, N: int, M: int) -> None:
    x, y = leaf(rand(B, N, 3, seed=0)), leaf(rand(B, M, 3, seed=1))
    dist1, dist2, idx1, idx2 = chamfer_3DDist()(x, y)
    a, b = double(x), double(y)
    sqdist = (a[:, :, None] - b[:, None]).square().sum(-1)
    assert idx1.dtype == idx2.dtype == torch.int32
    assert dist1.dtype == dist2.dtype == torch.float32
    assert_equal(idx1, sqdist.argmin(2).int())
    assert_equal(idx2, sqdist.argmin(1).int())
    assert_same_gradients([dist1, dist2], [sqdist.amin(2), sqdist.amin(1)], [x, y], [a, b])


def test_other_names_of_the_same() -> None:
    x, y = leaf(rand(2, 6, 3, seed=2)), leaf(rand(2, 4, 3, seed=3))
    expected = chamfer_3DDist()(x, y)
    for outputs in (
        chamfer_3DFunction.apply(x, y),
        chamfer_3DDist_nograd()(x, y),
        chamfer_3DFunction_noGrad.apply(x, y),
    ):
        for actual, value in zip(outputs, expected, strict=True):
            assert_equal(actual, value.detach().cpu())
    assert chamfer_3DFunction.apply(x, y)[0].requires_grad
    assert not any(o.requires_grad for o in (*chamfer_3DDist_nograd()(x, y), *chamfer_3DFunction_noGrad.apply(x, y)))


def test_fscore() -> None:
    dist1 = torch.tensor([[0.0, 0.002, 0.0009, 0.1], [1, 1, 1, 1]], device=DEVICE)
    dist2 = torch.tensor([[0.0005, 0.001], [1, 0]], device=DEVICE)
    score, precision1, precision2 = fscore(dist1, dist2)
    assert_close(precision1, torch.tensor([0.5, 0]))
    assert_close(precision2, torch.tensor([0.5, 0.5]))
    assert_close(score, torch.tensor([0.5, 0]))
    assert_equal(fscore(dist1 + 1, dist2 + 1)[0], [0.0, 0.0])
    assert_close(fscore(dist1, dist2, 0.05)[0], torch.tensor([2 * 0.75 / 1.75, 0]))


def test_rejects_two_dimensions() -> None:
    with pytest.raises(ValueError, match="expected shape"):
        chamfer_3DDist()(rand(2, 4, 2, seed=0), rand(2, 4, 2, seed=1))
