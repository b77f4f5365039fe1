"""What an error of another library says, for an error of ours."""

from __future__ import annotations


def one_line(error: Exception) -> str:
    """The first line that says something; with the error's kind, unless it is a ValueError, which explains itself."""
    lines = [line.strip()[:200] for line in str(error).splitlines() if line.strip()]
    text = next((line for line in lines if not line.endswith(":")), "".join(lines[:1]))  # a heading says little
    if isinstance(error, KeyError) and text:
        return f"{text} is missing"
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
