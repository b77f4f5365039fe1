from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lion_triton.kernels import check_finite
from lion_triton.kernels._checks import as_int


def test_finite_clouds_pass() -> None:
    check_finite(points=torch.zeros(2, 4, 3), centers=torch.full((1, 1, 3), 3e38))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_first_bad_cloud_is_named(value: float) -> None:
    points = torch.zeros(5, 4, 3)
    points[3, 1, 2] = points[4, 0, 0] = value
    with pytest.raises(ValueError, match="^centers: .* got NaN or infinity in cloud 3 \\(2 clouds in all\\)$"):
        check_finite(points=torch.zeros(2, 4, 3), centers=points)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "points: expected a tensor, got NoneType"),
        (torch.zeros(2, 3).int(), "points: expected float32, .* got torch.int32"),
        (torch.zeros(3), r"points: expected shape \(B, ...\) .* got \(3,\)"),
    ],
)
def test_bad_input_is_named(value: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_finite(points=value)


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor([3], dtype=torch.int32)])
def test_integers(value: Any) -> None:
    assert type(as_int("k", value)) is int and as_int("k", value) == 3


@pytest.mark.parametrize("value", [3.0, np.float32(3), "3", None, torch.tensor(3.0), torch.tensor([3, 4]), [3]])
def test_what_is_no_integer_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match="^k: expected an integer, got "):
        as_int("k", value)
