"""Every option of every command says what it does."""

from __future__ import annotations

import re
from importlib import import_module

import pytest

from lion_triton.__main__ import COMMANDS

# Its name, and right behind it or on the next line what else would follow its text; in a box, or where none is drawn.
SILENT = re.compile(r"^[│ ] *(-\S+)(?: \S+)*(?: *│?\n[│ ])? {2,}\((?:default|required)", re.MULTILINE)


def helped(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        import_module(f"lion_triton.{command}").main(["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_options_say_what_they_do(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # boxes below each other
    text = helped(command, capsys)
    assert SILENT.findall(text) == []
    assert re.findall(r"(?<![-\w.])(?:data|vae|priors|sampling)\.[a-z]+[-_][a-z-_]+", text) == []


def test_options_without_a_text_are_seen() -> None:
    boxed = "│ --kl-end FLOAT      (default: 1)  │\n│ --eta INT     │\n│      (default: 2)  │\n"
    assert SILENT.findall(boxed) == SILENT.findall(boxed.replace("│", " ")) == ["--kl-end", "--eta"]
