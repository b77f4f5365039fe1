"""Clouds as rows of numbers: text of many kinds (.xyz, .txt, .pts, .csv), and PCD."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from lion_triton.data.formats.text import floats, integers, plain_text, quoted
from lion_triton.data.shape import Shape

COMMENT = re.compile(rb"\s*(#|//|%)")
NUMBER = re.compile(rb'\s*"?([-+]?\.?\d|[-+]?(nan|inf(inity)?)\b)', re.IGNORECASE)
AXIS = re.compile(r"(?:points?|pos(?:ition)?|coord(?:inate)?s?|p)?[ _.:]*([xyz012])(?:[ _]?coord(?:inate)?)?")
DIGITS = str.maketrans("012", "xyz")  # of exports that number the axes
PCD_KEYS = (b"VERSION", b"FIELDS", b"SIZE", b"TYPE", b"COUNT", b"WIDTH", b"HEIGHT", b"VIEWPOINT", b"POINTS", b"DATA")


def read_table(data: bytes) -> Shape:
    """The first three columns of a text of numbers, or those that its header calls x, y and z, as a cloud.

    Columns are separated by blanks, tabs, commas or semicolons; comments begin with #, // or %; a line with a single
    whole number counts the rows that follow. ValueError for decimal commas, for rows shorter than the first, and for
    headers without x, y and z.
    """
    headers: list[tuple[bytes, bool]] = []  # what stands above the rows, and whether it is a comment
    rows: list[bytes] = []
    counted: list[int] = []
    for line in plain_text(data).split(b"\n"):
        comment = COMMENT.match(line)
        if comment or not NUMBER.match(line):
            text = line[comment.end() :] if comment else line
            if not rows:
                headers.append((text, bool(comment)))
            elif text.strip() and not comment:
                raise ValueError(f"row {len(rows)} is no row of numbers: {quoted(line)}")
        elif line.strip().isdigit():
            counted.append(int(line))
        else:
            rows.append(line.partition(b"#")[0])
    if not rows:
        raise ValueError("holds no rows of numbers")
    if counted and sum(counted) != len(rows):
        raise ValueError(f"promises {sum(counted)} rows and holds {len(rows)}, or has rows of one number")
    separator = next((mark for mark in (b";", b",") if mark in rows[0]), None)
    width = len(_cells(rows[0], separator))
    if width < 3:
        raise ValueError(f"expected at least 3 columns, got {width}")
    x, y, z = _axes(headers, width)
    coordinates: list[bytes] = []
    for i, row in enumerate(rows):
        cells = _cells(row, separator)
        if len(cells) < width:
            raise ValueError(f"row {i} has {len(cells)} columns, row 0 has {width}")
        coordinates += cells[x], cells[y], cells[z]
    return Shape(floats(coordinates, "a coordinate").reshape(-1, 3))


def _cells(row: bytes, separator: bytes | None) -> list[bytes]:
    """The row's columns without quotes; a separator at the end begins no column. ValueError for decimal commas."""
    if separator is None:
        return row.split()
    if b'"' in row:
        row = re.sub(rb'"([^",]*)"', rb"\1", row)
    cells = [cell.strip() for cell in row.split(separator)]
    while cells and not cells[-1]:
        cells.pop()
    if any(b" " in cell or b"\t" in cell or b"," in cell or b'"' in cell for cell in cells):
        raise ValueError(f"decimal commas, or two kinds of separators, are not read: {quoted(row)}")
    return cells


def _axes(headers: Sequence[tuple[bytes, bool]], width: int) -> tuple[int, int, int]:
    """The columns of x, y and z, by the last line above the rows that names them; else the first three."""
    for text, is_comment in reversed(headers):
        line = text.decode(errors="replace").strip().lower()
        words = re.split(r"[,;\t]", line) if re.search(r"[,;\t]", line) else line.split()
        names = [re.split(r"[(\[]", word)[0].strip(' "') for word in words]
        axes = {match[1].translate(DIGITS): i for i, name in enumerate(names) if (match := AXIS.fullmatch(name))}
        if len(axes) == 3:
            columns = axes["x"], axes["y"], axes["z"]
            if len(names) == width or (columns == (0, 1, 2) and not is_comment):
                return columns
        if not is_comment and len(names) == width:
            raise ValueError(f"which of its columns are x, y and z is not clear: {', '.join(names)[:100]}")
    return 0, 1, 2


def read_pcd(data: bytes) -> Shape:
    """The points of a PCD file, text or binary, without those that are NaN, which stand for no measurement there.

    ValueError for compressed files, and for those that hold less than their header promises.
    """
    data = data.removeprefix(b"\xef\xbb\xbf")
    header: dict[bytes, list[bytes]] = {}
    at = 0
    while b"DATA" not in header:
        end = data.find(b"\n", at)
        words = data[at : end if end >= 0 else len(data)].split()
        if words and not words[0].startswith(b"#"):
            if words[0] not in PCD_KEYS:
                raise ValueError(f"its header has a line that is not understood: {quoted(b' '.join(words))}")
            header[words[0]] = words[1:]
        if end < 0 and b"DATA" not in header:
            raise ValueError("its header has no end")
        at = end + 1
    names, kinds = header.get(b"FIELDS", []), header.get(b"TYPE", [])
    sizes = integers(header.get(b"SIZE", []), "SIZE")
    lengths = integers(header.get(b"COUNT", [b"1"] * len(names)), "COUNT")
    points = int(integers(header.get(b"POINTS", [b"-1"])[:1], "POINTS")[0])
    if points < 0 or not len(names) == len(kinds) == len(sizes) == len(lengths) or (lengths < 0).any():
        raise ValueError("its header lacks POINTS, or FIELDS, SIZE, TYPE and COUNT do not agree")
    if any(names.count(axis) != 1 or lengths[names.index(axis)] != 1 for axis in (b"x", b"y", b"z")):
        raise ValueError(f"has no fields x, y, z: {quoted(b' '.join(names))}")
    places = [names.index(axis) for axis in (b"x", b"y", b"z")]
    form = b" ".join(header[b"DATA"])
    if form == b"ascii":
        rows = [line for line in data[at:].split(b"\n") if line.strip()][:points]
        starts = np.cumsum(lengths) - lengths
        cells = [row.split() for row in rows]
        if any(len(row) != lengths.sum() for row in cells):
            raise ValueError(f"a row does not hold {lengths.sum()} numbers")
        flat = [row[starts[place]] for row in cells for place in places]
        cloud = floats(flat, "a coordinate").reshape(-1, 3)
    elif form == b"binary":
        cloud = _pcd_rows(data[at:], points, kinds, sizes, lengths, places)
    else:
        raise ValueError(f"DATA {form.decode(errors='replace')[:40]} is not read: save it as ascii or binary")
    if len(cloud) < points:
        raise ValueError(f"promises {points} points and holds {len(cloud)}")
    return Shape(cloud[~np.isnan(cloud).any(axis=1)])


def _pcd_rows(
    body: bytes,
    points: int,
    kinds: Sequence[bytes],
    sizes: Int64[ndarray, " K"],
    lengths: Int64[ndarray, " K"],
    places: Sequence[int],
) -> Float64[ndarray, "P 3"]:
    """x, y and z of binary rows, as many of them as are whole."""
    width = int((sizes * lengths).sum())
    starts = np.cumsum(sizes * lengths) - sizes * lengths
    axes = []
    for place in places:
        form = {b"F": "<f", b"I": "<i", b"U": "<u"}.get(kinds[place], "") + str(sizes[place])
        if form not in ("<f4", "<f8", "<i1", "<i2", "<i4", "<i8", "<u1", "<u2", "<u4", "<u8"):
            raise ValueError(f"TYPE {kinds[place].decode(errors='replace')[:9]} of {sizes[place]} bytes is not read")
        axes.append(form)
    if (sizes < 0).any() or width > len(body):
        return np.empty((0, 3))
    whole = min(points, len(body) // width)
    columns = [
        np.ndarray(whole, form, body, int(starts[place]), width) for place, form in zip(places, axes, strict=True)
    ]
    return np.stack(columns, axis=1).astype(np.float64)
