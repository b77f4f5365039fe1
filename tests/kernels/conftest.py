"""What every kernel test shares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def empty_holds_nan() -> Iterator[None]:
    """Fill ``torch.empty`` with NaN, so that an output that a kernel leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
