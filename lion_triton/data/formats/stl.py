"""STL: triangles, as text or binary."""

from __future__ import annotations

import re

import numpy as np

from lion_triton.data.formats.text import floats, plain_text
from lion_triton.data.shape import Shape

HEADER, TRIANGLE = 84, 50  # bytes


def read_stl(data: bytes) -> Shape:
    """The triangles of an STL file, of all solids in it.

    What follows the last triangle of a binary file is ignored, and so is what a text file calls its solids and how it
    ends them. ValueError when a file ends within its triangles.
    """
    count = int.from_bytes(data[80:HEADER], "little")
    if len(data) != HEADER + TRIANGLE * count:  # a binary file may begin with solid too
        text = plain_text(data)
        if re.match(rb"\s*solid", text, re.IGNORECASE) and b"\0" not in text[:HEADER]:
            return _read_text(text)
    if len(data) < HEADER:
        raise ValueError(f"is cut short: {len(data)} bytes, a header has {HEADER}")
    whole = (len(data) - HEADER) // TRIANGLE
    if whole < count:
        raise ValueError(f"is cut short: promises {count} triangles, holds {whole}")
    if count == 0 and whole:
        raise ValueError(f"promises no triangles, and {len(data) - HEADER} bytes follow")
    triangle = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    return Shape(np.frombuffer(data, triangle, count, HEADER)["corners"].astype(np.float64))


def _read_text(text: bytes) -> Shape:
    facets = 0
    coordinates: list[bytes] = []
    for line in [*text.split(b"\n"), b"facet"]:  # the last one ends what is before it
        words = line.split()
        keyword = words[0].lower() if words else b""
        if keyword == b"facet":
            if len(coordinates) != 9 * facets:
                held = len(coordinates) - 9 * (facets - 1)
                raise ValueError(f"is cut short: facet {facets - 1} has {held // 3} corners, not 3")
            facets += 1
        elif keyword == b"vertex":
            if len(words) != 4:
                raise ValueError(f"is cut short: a vertex of facet {facets - 1} has {len(words) - 1} coordinates")
            coordinates += words[1:]
    return Shape(floats(coordinates, "a vertex").reshape(-1, 3, 3))
