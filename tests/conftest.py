"""On a machine without a GPU, Triton kernels run in Triton's interpreter; it must be told before any is defined."""

import gc
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

    from tests.interpreter import speed_up

    speed_up()


def pytest_collection_finish() -> None:
    """Collections of garbage, of which Accelerate asks for one after every training, pass over all that is imported."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _accelerators_of_their_own() -> Iterator[None]:
    """Accelerate keeps the precision of a process's first run for all that follow; each test begins a process anew."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True, scope="session")
def _without_the_shipped_model() -> Iterator[None]:
    """A quickstart's picture shows it, and it takes as long as the smallest training; one test puts it back."""
    from lion_triton import train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "shipped_clouds", lambda count: np.random.default_rng(0).normal(size=(count, 9, 3)))
        yield
