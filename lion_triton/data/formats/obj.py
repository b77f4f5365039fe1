"""Wavefront OBJ: polygons, or vertices alone."""

from __future__ import annotations

import re

import numpy as np

from lion_triton.data.formats.polygons import polygon_shape
from lion_triton.data.formats.text import floats, integers, plain_text
from lion_triton.data.shape import Shape

NOT_READ = {b"surf": "free-form surfaces are", b"curv": "free-form curves are", b"call": "a file that calls others is"}


def read_obj(data: bytes) -> Shape:
    """The faces of an OBJ file; of one that holds neither faces nor lines, the vertices as a cloud.

    Lines and points beside faces are left out. ValueError for faces that refer to no vertex, and for surfaces that
    are not made of polygons.
    """
    coordinates: list[bytes] = []
    words_of_faces: list[bytes] = []
    counts: list[int] = []  # of each face's corners
    known: list[int] = []  # vertices before each face, from which negative indices count
    other = set()
    for line in re.sub(rb"\\[ \t]*\n", b" ", plain_text(data)).split(b"\n"):
        if b"#" in line:
            line = line.partition(b"#")[0]
        words = line.split()
        if not words:
            continue
        keyword = words[0]
        if keyword == b"v":
            if len(words) < 4:
                raise ValueError(f"vertex {len(coordinates) // 3} has {len(words) - 1} coordinates, not 3")
            coordinates += words[1:4]
        elif keyword in (b"f", b"fo"):
            words_of_faces += words[1:]
            counts.append(len(words) - 1)
            known.append(len(coordinates) // 3)
        else:
            other.add(keyword)
    for keyword, what in NOT_READ.items():
        if keyword in other:
            raise ValueError(f"{what} not read ({keyword.decode()})")
    vertices = floats(coordinates, "a vertex").reshape(-1, 3)
    if not counts and b"l" in other:
        raise ValueError("holds lines, no faces")
    if not counts and len(vertices):
        return Shape(vertices)
    numbers = integers([word.partition(b"/")[0] for word in words_of_faces], "a face's vertex")
    sizes = np.array(counts, dtype=np.int64)
    corners = np.where(numbers > 0, numbers - 1, numbers + np.repeat(np.array(known, dtype=np.int64), sizes))
    early = (numbers == 0) | (corners < 0)
    if early.any():
        face = np.searchsorted(np.cumsum(sizes), np.argmax(early), side="right")
        raise ValueError(f"face {face} refers to a vertex before the first")
    if corners.max(initial=-1) >= len(vertices):
        raise ValueError(f"a face refers to vertex {corners.max() + 1} of {len(vertices)}")
    return polygon_shape(vertices, sizes, corners)
