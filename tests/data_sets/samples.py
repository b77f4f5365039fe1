"""Files of every mesh format with the same surface: a unit square at x = 0, a triangle of area 1/2 at x = 2 and a
pentagon that is not convex, of area 5/2, at x = 4, in the plane z = 0; 12 corners, no two alike."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

CORNERS = np.array(
    [(0, 0), (1, 0), (1, 1), (0, 1), (2, 0), (3, 0), (2, 1), (4, 0), (6, 0), (6, 2), (5, 0.5), (4, 2)], dtype=np.float64
)
VERTICES = np.pad(CORNERS, ((0, 0), (0, 1)))
FACES = [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11]]
TRIANGLES = [[0, 1, 2], [0, 2, 3], [4, 5, 6], [7, 8, 10], [8, 9, 10], [7, 10, 11]]
AREAS = np.array([1.0, 0.5, 2.5])
LETTERS = {  # of PLY's types, as struct has them
    **{"char": "b", "uchar": "B", "short": "h", "ushort": "H", "int": "i", "uint": "I"},
    **{"int8": "b", "uint8": "B", "int16": "h", "uint16": "H", "int32": "i", "uint32": "I"},
    **{"float": "f", "double": "d", "float32": "f", "float64": "d"},
}


def rows(separator: str = " ", end: str = "\n") -> str:
    return "".join(separator.join(f"{x:g}" for x in vertex) + end for vertex in VERTICES)


def obj() -> bytes:
    faces = "".join("f " + " ".join(f"{i + 1}/1" for i in face) + "\n" for face in FACES)
    return ("".join(f"v {line}\n" for line in rows().splitlines()) + "vt 0 0\n" + faces).encode()


def off(header: bytes = b"OFF") -> bytes:
    more = " 255 0 0 255" if b"C" in header else ""
    faces = "".join(f"{len(face)} {' '.join(map(str, face))} 0.5 0.5 0.5\n" for face in FACES)
    return header + f"\n# made by hand\n12 3 0\n{rows(end=more + chr(10))}{faces}".encode()


def ply(
    form: str,
    faces: Sequence[Sequence[int]] = FACES,
    count: str = "uchar",
    index: str = "int",
    name: str = "vertex_indices",
) -> bytes:
    """With a list of another kind before the corners, a number after them, and an element between."""
    header = (
        f"ply\nformat {form} 1.0\ncomment by hand\n"
        "element vertex 12\nproperty double x\nproperty double y\nproperty double z\n"
        "element note 2\nproperty list uchar float words\nproperty short mark\n"
        f"element face {len(faces)}\nproperty list uchar float texcoord\n"
        f"property list {count} {index} {name}\nproperty uchar flags\nend_header\n"
    )
    if form == "ascii":
        listed = "".join(f"2 0.5 0.25 {len(face)} {' '.join(map(str, face))} 1\n" for face in faces)
        return f"{header}{rows()}2 0.5 1 7\n0 9\n{listed}".encode()
    order = "<" if form == "binary_little_endian" else ">"
    binary = VERTICES.astype(f"{order}f8").tobytes() + struct.pack(f"{order}BffhBh", 2, 0.5, 1, 7, 0, 9)
    for face in faces:
        layout = f"{order}Bff{LETTERS[count]}{len(face)}{LETTERS[index]}B"
        binary += struct.pack(layout, 2, 0.5, 0.25, len(face), *face, 1)
    return header.encode() + binary


def ply_strips(form: str = "ascii") -> bytes:
    """The square as a strip, and the other faces cut into strips within one list."""
    strip = [0, 1, 3, 2, -1, 4, 5, 6, -1, 9, 8, 10, 7, 11]
    header = f"ply\nformat {form} 1.0\nelement tristrips 1\nproperty list int int vertex_indices\n"
    header += "element vertex 12\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
    if form == "ascii":
        return (header + f"{len(strip)} {' '.join(map(str, strip))}\n" + rows()).encode()
    return header.encode() + struct.pack("<15i", len(strip), *strip) + VERTICES.astype("<f4").tobytes()


def stl_text(name: str = "by hand", end: str = "endsolid") -> bytes:
    facets = ""
    for triangle in TRIANGLES:
        corners = "".join("    vertex {:e} {:e} {:e}\n".format(*VERTICES[i]) for i in triangle)
        facets += f"  facet normal 0 0 1\n   outer loop\n{corners}   endloop\n  endfacet\n"
    return f"solid {name}\n{facets}{end} {name}\n".encode()


def stl_binary(header: bytes = b"by hand") -> bytes:
    data = header.ljust(80) + struct.pack("<I", len(TRIANGLES))
    return data + b"".join(struct.pack("<12fH", 0, 0, 1, *VERTICES[t].ravel(), 0) for t in TRIANGLES)


class Gltf:
    """A glTF file in the making."""

    def __init__(self) -> None:
        self.data = b""
        self.content: dict[str, Any] = {"asset": {"version": "2.0"}, "bufferViews": [], "accessors": []}

    def view(self, array: np.ndarray, **more: Any) -> int:
        self.data += bytes(-len(self.data) % 4)
        entry = {"buffer": 0, "byteOffset": len(self.data), "byteLength": array.nbytes}
        self.content["bufferViews"].append(entry | more)
        self.data += array.tobytes()
        return len(self.content["bufferViews"]) - 1

    def accessor(self, array: np.ndarray, **more: Any) -> int:
        types = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123, "u4": 5125, "f4": 5126}
        kinds = {1: "SCALAR", 3: "VEC3", 4: "VEC4", 16: "MAT4"}
        width = 1 if array.ndim == 1 else array.shape[1]
        entry = {"bufferView": self.view(array), "componentType": types[array.dtype.str[1:]], "count": len(array)}
        self.content["accessors"].append(entry | {"type": kinds[width]} | more)
        return len(self.content["accessors"]) - 1

    def text(self, **more: Any) -> bytes:
        uri = "data:application/octet-stream;base64," + base64.b64encode(self.data).decode()
        buffers = [{"byteLength": len(self.data), "uri": uri}]
        return json.dumps(self.content | {"buffers": buffers} | more).encode()

    def binary(self, **more: Any) -> bytes:
        text = json.dumps(self.content | {"buffers": [{"byteLength": len(self.data)}]} | more).encode()
        text += b" " * (-len(text) % 4)
        body = self.data + bytes(-len(self.data) % 4)
        chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(body), b"BIN\0") + body
        return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def _scene() -> tuple[Gltf, dict[str, Any]]:
    """The square as a strip below a camera's node, the triangle moved there by a joint, the pentagon by a morph."""
    made = Gltf()

    def part(face: list[int], shift: float = 0.0) -> int:
        return made.accessor((VERTICES[face] + [shift, 0, 0]).astype("<f4"))

    strip = {"attributes": {"POSITION": part([0, 1, 3, 2])}, "mode": 5}
    ones, zeros = np.zeros((3, 4), "u1"), np.zeros((3, 4), "u1")
    ones[:, 0] = 255
    triangle = {
        "POSITION": part(FACES[1], -7.0),
        "JOINTS_0": made.accessor(zeros),
        "WEIGHTS_0": made.accessor(ones, normalized=True),
    }
    pentagon = {
        "attributes": {"POSITION": part(FACES[2], -3.0)},
        "indices": made.accessor(np.array([0, 1, 3, 1, 2, 3, 0, 3, 4], "<u2")),
        "targets": [{"POSITION": made.accessor(np.tile(np.array([[6, 0, 0]], "<f4"), (5, 1)))}],
    }
    inverse = np.eye(4, dtype="<f4")
    inverse[3, 0] = 1  # column by column: moves by 1 along x
    scene = {
        "scene": 0,
        "scenes": [{"nodes": [0, 2, 3, 5]}],
        "nodes": [
            {"camera": 0, "translation": [10, 0, 0], "children": [1]},
            {"mesh": 0, "translation": [-10, 0, 0]},
            {"translation": [2, 0, 0], "children": [4]},
            {"mesh": 1, "skin": 0, "translation": [99, 0, 0]},
            {"translation": [4, 0, 0]},
            {"mesh": 2, "weights": [0.5]},
        ],
        "cameras": [{"type": "perspective", "perspective": {"yfov": 1, "znear": 0.1}}],
        "meshes": [
            {"primitives": [strip]},
            {"primitives": [{"attributes": triangle}]},
            {"primitives": [pentagon], "weights": [0.0]},
        ],
        "skins": [{"joints": [4], "inverseBindMatrices": made.accessor(inverse.reshape(1, 16))}],
    }
    return made, scene


def gltf() -> bytes:
    made, scene = _scene()
    return made.text(**scene)


def glb() -> bytes:
    made, scene = _scene()
    return made.binary(**scene)
