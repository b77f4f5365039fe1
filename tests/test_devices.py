"""The memory of a command."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from lion_triton.cli import run_cli

def touched():
    for i in range(14):
        if i == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(10 << 20)  # 10240 pages, freed at once; glibc's own threshold never reaches so many
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

run_cli(touched)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is changed")
def test_a_command_writes_its_tensors_to_pages_that_it_has() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    assert int(result.stdout) < 10240  # of 40960
