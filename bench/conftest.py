"""Speed comparisons: ``pytest bench/``. Every row's output is checked against its baseline before it is timed."""

from __future__ import annotations

import pytest
import torch


def pytest_report_header() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"device: {device}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
