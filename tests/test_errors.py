"""What errors of other libraries become."""

from __future__ import annotations

import json

import pytest
import torch

from lion_triton.errors import one_line


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (lambda: {}["config"], "'config' is missing"),
        (lambda: json.loads("{"), "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (lambda: [].pop(), "IndexError: pop from empty list"),
        (lambda: exec("raise ValueError"), "ValueError"),
        (lambda: exec("raise KeyError"), "KeyError"),
        (lambda: exec("raise ValueError('it ends here:')"), "it ends here:"),  # all that there is
        (
            lambda: torch.nn.Linear(1, 1).load_state_dict({}),  # a heading, and then what it is about
            'RuntimeError: Missing key(s) in state_dict: "weight", "bias".',
        ),
    ],
)
def test_one_line(act: object, line: str) -> None:
    with pytest.raises(Exception, match=".*") as caught:
        act()  # type: ignore[operator]
    assert one_line(caught.value) == line
