"""Geomview's OFF: polygons as text."""

from __future__ import annotations

import re

import numpy as np

from lion_triton.data.formats.polygons import polygon_shape
from lion_triton.data.formats.text import floats, integers, plain_text, quoted
from lion_triton.data.shape import Shape

HEADER = re.compile(rb"(ST)?(C)?(N)?(4)?(n)?OFF")  # what vertices have besides x, y, z, which come first


def read_off(data: bytes) -> Shape:
    """The faces of an OFF file, with or without normals, colours and texture coordinates; without faces, a cloud.

    The counts may follow the first word directly, as in some files of ModelNet. ValueError for other dimensions
    than three and for the binary form.
    """
    lines = [line for line in re.sub(rb"#[^\n]*", b"", plain_text(data)).split(b"\n") if not line.isspace() and line]
    if not lines:
        raise ValueError("is empty")
    header = HEADER.match(lines[0].lstrip())
    if header:
        if header[4] or header[5] or b"BINARY" in lines[0]:
            raise ValueError(f"this form of OFF is not read: {quoted(lines[0])}")
        lines[0] = lines[0].lstrip()[header.end() :]
        lines = lines[not lines[0].strip() :]
    counts = lines[0].split() if lines else []
    if len(counts) not in (2, 3):  # the number of edges may be missing
        raise ValueError("expected OFF and the numbers of vertices and faces")
    num_vertices, num_faces = map(int, integers(counts[:2], "the numbers of vertices and faces"))
    if min(num_vertices, num_faces) < 0 or len(lines) - 1 < num_vertices + num_faces:
        promised = f"{num_vertices} vertices and {num_faces} faces"
        raise ValueError(f"promises {promised}, one a line, and holds {len(lines) - 1} lines")
    rows = [line.split() for line in lines[1 : 1 + num_vertices]]
    if any(len(row) < 3 for row in rows):
        raise ValueError("a vertex has fewer than 3 coordinates")
    vertices = floats([word for row in rows for word in row[:3]], "a vertex").reshape(-1, 3)
    if num_faces == 0:
        return Shape(vertices)
    rows = [line.split() for line in lines[1 + num_vertices : 1 + num_vertices + num_faces]]
    sizes = integers([row[0] for row in rows], "a face's number of corners")
    if any(not 0 <= size < len(row) for size, row in zip(sizes, rows, strict=True)):
        raise ValueError("a face has fewer corners than it says")
    corners = [word for size, row in zip(sizes.tolist(), rows, strict=True) for word in row[1 : 1 + size]]
    return polygon_shape(vertices, np.asarray(sizes), integers(corners, "a face's vertex"))
