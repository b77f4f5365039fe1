"""The page of recipes does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lion_triton.generation import output
from tests.tiny import tiny_run

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"


def test_the_recipes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(output, "grid", lambda *args: None)  # drawing takes most of the time
    monkeypatch.setattr(output, "animate", lambda *args: None)
    tiny_run(tmp_path / "runs" / "quickstart")
    code = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(code) >= 7
    names: dict[str, Any] = {}
    for block in code:
        exec(block, names)
    assert names["way"].points.shape[0] == 5
    assert names["rebuilt"].shape == names["clouds"].shape
    assert names["halfway"].shape == names["variation"].shape == names["clouds"][:1].shape
    again, lion = names["again"].state_dict(), names["lion"].state_dict()
    assert all(torch.equal(again[name], lion[name]) for name in lion)
