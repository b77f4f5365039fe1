"""PLY: polygons, triangle strips or points, as text or binary of either byte order."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from lion_triton.data.formats.polygons import polygon_shape
from lion_triton.data.formats.text import floats, integers, quoted
from lion_triton.data.shape import Shape

TYPES = {  # to the letters that struct and NumPy have for them
    **dict.fromkeys(("char", "int8"), "b"),
    **dict.fromkeys(("uchar", "uint8"), "B"),
    **dict.fromkeys(("short", "int16"), "h"),
    **dict.fromkeys(("ushort", "uint16"), "H"),
    **dict.fromkeys(("int", "int32"), "i"),
    **dict.fromkeys(("uint", "uint32"), "I"),
    **dict.fromkeys(("long", "int64"), "q"),
    **dict.fromkeys(("ulong", "uint64"), "Q"),
    **dict.fromkeys(("float", "float32"), "f"),
    **dict.fromkeys(("double", "float64"), "d"),
}
ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
INDEX_LISTS = ("vertex_indices", "vertex_index", "vertex_indexes", "vertices", "indices", "index")
NOT_FACES = frozenset({"vertex", "edge", "range_grid"})  # a range grid only orders the points of a scan


@dataclass(frozen=True)
class Property:
    name: str
    type: str
    length_type: str | None  # of a list


@dataclass(frozen=True)
class Element:
    name: str
    count: int
    properties: list[Property]


@dataclass(frozen=True)
class Column:
    """A property's values, row after row; how many each row has."""

    values: ndarray
    lengths: Int64[ndarray, " rows"]
    is_list: bool


Table = dict[str, Column]


def read_ply(data: bytes) -> Shape:
    """The faces and triangle strips of a PLY file, or the points of one that has neither.

    ValueError when the file holds less than its header promises, or has faces in a form that is not read.
    """
    order, elements, body = _header(data)
    read = _binary_rows(body, order) if order else _text_rows(body)
    tables = {element.name: read(element) for element in elements}
    axes = [tables.get("vertex", {}).get(axis) for axis in "xyz"]
    if any(axis is None or axis.is_list for axis in axes):
        raise ValueError("has no element vertex with x, y, z")
    vertices = np.stack([axis.values for axis in axes if axis], axis=1).astype(np.float64)
    shapes = []
    for element in elements:
        table = tables[element.name]
        if element.count == 0 or element.name in NOT_FACES:
            continue
        if element.name == "face":
            shapes.append(polygon_shape(vertices, *_index_list(table, "face")))
        elif element.name == "tristrips":
            shapes.append(polygon_shape(vertices, *_strips(*_index_list(table, "tristrips"))))
        elif any(name in table and table[name].is_list for name in INDEX_LISTS):
            raise ValueError(f"faces in an element called {element.name} are not read")
    if not shapes:
        return Shape(vertices)
    crossing = sum(shape.crossing_faces for shape in shapes)
    return Shape(np.concatenate([shape.coordinates for shape in shapes]), crossing)


def _header(data: bytes) -> tuple[str, list[Element], bytes]:
    """Byte order (empty for text), elements, and what follows the header."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    first = re.match(rb"ply[ \t]*(\r\n|\n|\r)", data)
    if not first:
        raise ValueError("does not begin with a line ply")
    end = re.search(rb"[\r\n]end_header[ \t]*" + first[1], data)
    if not end:
        raise ValueError("its header has no end")
    order, elements = None, []
    for line in data[first.end() : end.start()].replace(b"\r", b"\n").decode("latin-1").split("\n"):
        try:
            match line.split():
                case ["format", kind, _]:
                    order = ORDERS[kind]
                case ["element", name, count]:
                    elements.append(Element(name, int(count), []))
                case ["property", "list", length_type, kind, name]:
                    elements[-1].properties.append(Property(name, TYPES[kind], TYPES[length_type]))
                case ["property", kind, name]:
                    elements[-1].properties.append(Property(name, TYPES[kind], None))
                case [] | ["comment" | "obj_info", *_]:
                    pass
                case _:
                    raise ValueError
        except (ValueError, KeyError, IndexError):
            raise ValueError(f"its header has a line that is not understood: {quoted(line.encode())}") from None
    repeated = len({element.name for element in elements}) < len(elements)
    if order is None or repeated or any(element.count < 0 or not element.properties for element in elements):
        raise ValueError("its header has no format, an element twice, one without properties, or a negative count")
    return order, elements, data[end.end() :]


def _promised(element: Element, most: int) -> None:
    if most < element.count:
        raise ValueError(f"promises {element.count} rows of {element.name} and holds at most {most}")


def _text_rows(body: bytes) -> Callable[[Element], Table]:
    """Reads one element after the other, a row in each line that is not empty."""
    lines = [line for line in body.replace(b"\r", b"\n").split(b"\n") if line and not line.isspace()]

    def read(element: Element) -> Table:
        nonlocal lines
        _promised(element, len(lines))
        rows, lines = lines[: element.count], lines[element.count :]
        what = f"a row of {element.name}"
        lists = any(entry.length_type for entry in element.properties)
        if not lists:
            words = b" ".join(rows).split()
            if len(words) != element.count * len(element.properties):
                raise ValueError(f"{what} does not hold {len(element.properties)} numbers")
            table = floats(words, what).reshape(element.count, len(element.properties))
            ones = np.ones(element.count, dtype=np.int64)
            return {e.name: Column(values, ones, False) for e, values in zip(element.properties, table.T, strict=True)}
        cells: list[list[bytes]] = [[] for _ in element.properties]
        lengths: list[list[int]] = [[] for _ in element.properties]
        for row in rows:
            words, at = row.split(), 0
            for entry, cell, seen in zip(element.properties, cells, lengths, strict=True):
                length = 1
                if entry.length_type and at < len(words):
                    length, at = int(floats(words[at : at + 1], what)[0]), at + 1
                if length < 0 or at + length > len(words):
                    raise ValueError(f"{what} is shorter than its lists say")
                cell += words[at : at + length]
                seen.append(length)
                at += length
            if at < len(words):
                raise ValueError(f"{what} holds more than its header says")
        columns = zip(element.properties, cells, lengths, strict=True)
        return {
            e.name: Column((floats if e.type in "fd" else integers)(cell, what), np.array(n), bool(e.length_type))
            for e, cell, n in columns
        }

    return read


def _binary_rows(body: bytes, order: str) -> Callable[[Element], Table]:
    """Reads one element after the other."""
    at = 0

    def read(element: Element) -> Table:
        nonlocal at
        least = sum(struct.calcsize(order + (entry.length_type or entry.type)) for entry in element.properties)
        _promised(element, (len(body) - at) // least)
        table, end = _equal_rows(body, at, element, order) or _walk(body, at, element, order, element.count)
        at = end
        return table

    return read


def _equal_rows(body: bytes, at: int, element: Element, order: str) -> tuple[Table, int] | None:
    """The rows and where they end, read at once; None if their lists are not all as long as in the first."""
    first, _ = _walk(body, at, element, order, min(element.count, 1))
    fields: list[tuple[str, str, tuple[int, ...]]] = []
    for i, entry in enumerate(element.properties):
        if entry.length_type:
            fields.append((f"length {i}", order + entry.length_type, ()))
        fields.append((f"{i}", order + entry.type, (int(first[entry.name].lengths.sum()),)))
    rows = np.dtype(fields)
    if element.count * rows.itemsize > len(body) - at:
        return None
    read = np.frombuffer(body, rows, element.count, at)
    table = {}
    for i, entry in enumerate(element.properties):
        length = read[f"{i}"].shape[1]
        if entry.length_type and (read[f"length {i}"] != length).any():
            return None
        lengths = np.full(element.count, length)
        table[entry.name] = Column(read[f"{i}"].reshape(-1), lengths, bool(entry.length_type))
    return table, at + element.count * rows.itemsize


def _walk(body: bytes, at: int, element: Element, order: str, count: int) -> tuple[Table, int]:
    """The first `count` rows, one by one, and where they end."""
    cells: list[list[bytes]] = [[] for _ in element.properties]
    lengths: list[list[int]] = [[] for _ in element.properties]
    plan = []
    for entry, cell, seen in zip(element.properties, cells, lengths, strict=True):
        length_form = struct.Struct(order + entry.length_type) if entry.length_type else None
        plan.append((length_form, struct.calcsize(order + entry.type), cell, seen))
    try:
        for _ in range(count):
            for form, width, cell, seen in plan:
                length = 1
                if form:
                    length = int(form.unpack_from(body, at)[0])
                    at += form.size
                end = at + length * width
                if length < 0 or end > len(body):
                    raise ValueError
                cell.append(body[at:end])
                seen.append(length)
                at = end
    except (ValueError, OverflowError, struct.error):
        raise ValueError(f"holds fewer rows of {element.name}, or shorter lists, than it says") from None
    table = {}
    for entry, cell, seen in zip(element.properties, cells, lengths, strict=True):
        values = np.frombuffer(b"".join(cell), order + entry.type)
        table[entry.name] = Column(values, np.array(seen, dtype=np.int64), bool(entry.length_type))
    return table, at


def _index_list(table: Table, element: str) -> tuple[Int64[ndarray, " F"], Int64[ndarray, " C"]]:
    """How many corners each face has, and the vertices of all."""
    lists = [name for name, column in table.items() if column.is_list]
    whole = [name for name in lists if table[name].values.dtype.kind in "iu"]
    found = [name for name in INDEX_LISTS if name in lists] or (whole if len(whole) == 1 else [])
    if not found:
        raise ValueError(f"which property of {element} holds its vertices is not clear: {', '.join(table)[:100]}")
    column = table[found[0]]
    values = column.values
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (values == np.round(values)).all()):
        raise ValueError(f"{element}: {found[0]} holds what is no whole number")
    return column.lengths, values.astype(np.int64)


def _strips(
    lengths: Int64[ndarray, " F"], corners: Int64[ndarray, " C"]
) -> tuple[Int64[ndarray, " T"], Int64[ndarray, " 3T"]]:
    """The triangles of strips, each the next three corners; -1 begins a new strip within a list."""
    strip = np.repeat(np.arange(len(lengths)), lengths)
    triples = np.arange(max(len(corners) - 2, 0))[:, None] + np.arange(3)
    whole = (strip[triples[:, 0]] == strip[triples[:, 2]]) & (corners[triples] != -1).all(axis=1)
    triangles = corners[triples[whole]]
    return np.full(len(triangles), 3), triangles.reshape(-1)
