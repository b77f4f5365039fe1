"""On a machine without a GPU, Triton kernels run in Triton's interpreter; it must be told before any is defined."""

import os
import sys
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="module")
def own_precision() -> Iterator[None]:
    """accelerate lets a process have one precision for all its life; here each module of tests has its own."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
