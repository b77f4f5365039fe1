"""On a machine without a GPU, Triton kernels run in Triton's interpreter; it must be told before any is defined."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _accelerators_of_their_own() -> Iterator[None]:
    """Accelerate keeps the precision of a process's first run for all that follow; each test begins a process anew."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
