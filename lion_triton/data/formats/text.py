"""Text as programs write it: any encoding, any line ends."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

ENCODINGS = (  # longer marks first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def plain_text(data: bytes) -> bytes:
    """The text in an encoding that agrees with ASCII, without a byte order mark; lines end in line feeds."""
    marked = [(mark, encoding) for mark, encoding in ENCODINGS if data.startswith(mark)]
    if marked:
        mark, encoding = marked[0]
        data = data[len(mark) :]
    else:  # of UTF-16 without a mark, the first character tells
        encoding = "utf-16-be" if data[:1] == b"\0" else "utf-16-le" if data[1:2] == b"\0" else "utf-8"
    if encoding != "utf-8":
        data = data.decode(encoding, errors="replace").encode(errors="replace")
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def floats(words: Sequence[bytes], what: str) -> Float64[ndarray, " n"]:
    """The words as numbers; ValueError naming the first that is none."""
    try:
        return np.array(list(map(float, words)), dtype=np.float64)
    except ValueError:
        raise ValueError(f"{what}: expected a number, got {first_bad(words, float)}") from None


def integers(words: Sequence[bytes], what: str) -> Int64[ndarray, " n"]:
    """The words as whole numbers; ValueError naming the first that is none, or that 64 bits do not hold."""
    try:
        return np.array(list(map(int, words)), dtype=np.int64)
    except (ValueError, OverflowError):
        raise ValueError(f"{what}: expected a whole number, got {first_bad(words, np.int64)}") from None


def first_bad(words: Sequence[bytes], kind: type) -> str:
    """The first word that is no number of the kind, for people to read."""
    for word in words:
        try:
            kind(word)
        except (ValueError, OverflowError):
            return quoted(word)
    return "none"


def quoted(text: bytes) -> str:
    """Part of a file as it can be shown in a line."""
    shown = repr(re.sub(r"\s+", " ", text[:60].decode(errors="replace")))
    return shown if len(text) <= 60 else f"{shown}..."
