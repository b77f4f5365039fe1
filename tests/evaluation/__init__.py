"""The parts of an evaluation one by one; the whole command is in tests/test_evaluate.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lion_triton.evaluation.sets import CloudSet, in_memory


def clouds(count: int, points: int, seed: int, scale: float = 0.1) -> np.ndarray:
    """(count, points, 3) float32."""
    return (np.random.default_rng(seed).normal(size=(count, points, 3)) * scale).astype(np.float32)


def source(points: np.ndarray, option: str = "samples") -> CloudSet:
    """The clouds as if ``option`` had given them; they are called "0", "1", ..."""
    return CloudSet(option, "mine", in_memory(option, list(points), [str(i) for i in range(len(points))]))


def refusal(function: Callable[..., Any], *args: Any) -> str:
    """The message, one line, of the ``ValueError`` that the call must end with."""
    with pytest.raises(ValueError, match=r"\A.+\Z") as refused:
        function(*args)
    return str(refused.value)
