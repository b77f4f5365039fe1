"""glTF 2.0, text or binary: the triangles of a scene, where its nodes and joints put them.

Section numbers are those of the Khronos glTF 2.0 specification. Animations are not played, cameras, lights and
materials are left out.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from lion_triton.data.formats.text import quoted
from lion_triton.data.shape import Shape

COMPONENTS = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
TRIANGLES, STRIP, FAN = 4, 5, 6  # modes; 0 to 3 are points and lines
MOST = 2_000_000  # of what a few bytes can ask for any number of: values of empty accessors, instances' triangles
MOST_PARTS = 50_000  # primitives, each as often as it is placed
INSTANCING, VISIBILITY = "EXT_mesh_gpu_instancing", "KHR_node_visibility"
# Extensions that a reader of the geometry may leave out, or that are read here. Any other that a file requires may
# change the surface.
HARMLESS = re.compile(
    r"KHR_materials_\w+|KHR_texture_\w+|EXT_texture_\w+|MSFT_texture_\w+|KHR_lights_\w+|EXT_lights_\w+|KHR_xmp\w*|"
    r"KHR_animation_pointer|KHR_mesh_quantization|FB_ngon_encoding|EXT_mesh_features|EXT_structural_metadata|"
    rf"EXT_instance_features|EXT_mesh_manifold|{INSTANCING}|{VISIBILITY}"
)


def read_gltf(data: bytes, sibling: Callable[[str], bytes]) -> Shape:
    """All triangles of the file's scene; `sibling` reads the files that it refers to.

    ValueError, naming what it is, for what would give another surface than the author's: extensions that are required
    and not known to leave the geometry alone, compressed geometry, version 1.
    """
    text, binary = _chunks(data)
    if text.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("begins with a byte order mark, which glTF does not allow: save it as UTF-8 without one")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its JSON cannot be read: {error}") from None
    try:
        return _Scene(content, binary, sibling).shape()
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"is not valid glTF 2.0 ({type(error).__name__}: {error})") from None


def _chunks(data: bytes) -> tuple[bytes, bytes | None]:
    """The JSON text and, of a binary file, what follows it (section 4)."""
    if data[:4] != b"glTF":
        return data, None
    version, length = (int.from_bytes(data[at : at + 4], "little") for at in (4, 8))
    if version != 2:
        raise ValueError(f"glTF {version} is not read: convert it to glTF 2.0")
    if len(data) < length:
        raise ValueError(f"is cut short: promises {length} bytes, holds {len(data)}")
    chunks: dict[bytes, bytes] = {}
    at = 12
    while at + 8 <= length:
        size, kind = int.from_bytes(data[at : at + 4], "little"), data[at + 4 : at + 8]
        if at + 8 + size > length:
            raise ValueError("a chunk is longer than the file")
        chunks.setdefault(kind, data[at + 8 : at + 8 + size])
        at += 8 + size
    if b"JSON" not in chunks:
        raise ValueError("has no JSON chunk")
    return chunks[b"JSON"], chunks.get(b"BIN\0")


class _Scene:
    def __init__(self, content: Any, binary: bytes | None, sibling: Callable[[str], bytes]) -> None:
        if not isinstance(content, dict):
            raise ValueError("is JSON, but not glTF 2.0")
        for name in content.get("extensionsRequired", []):
            if not HARMLESS.fullmatch(name):
                raise ValueError(f"glTF extension {name[:100]} is required and not read")
        if "asset" not in content:
            raise ValueError("is JSON, but not glTF 2.0")
        version = str(content["asset"].get("version", "1.0"))
        if not version.startswith("2."):
            raise ValueError(f"glTF {version[:20]} is not read: convert it to glTF 2.0")
        self.content, self.binary, self.sibling = content, binary, sibling
        self.buffers: dict[int, bytes] = {}
        self.meshes: dict[int, list[Float64[ndarray, "T 3 3"]]] = {}
        self.decoded: dict[tuple[int, bool], ndarray] = {}
        self.nodes = content.get("nodes", [])
        self.world: dict[int, Float64[ndarray, "4 4"]] = {}

    def entry(self, kind: str, index: Any) -> dict[str, Any]:
        """An entry of one of the file's lists; Python's negative indices are not glTF's."""
        entries = self.content.get(kind, [])
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(entries):
            raise ValueError(f"refers to number {index} of {len(entries)} {kind}")
        return entries[index]

    def shape(self) -> Shape:
        scenes = self.content.get("scenes", [])
        if scenes:
            roots = self.entry("scenes", self.content.get("scene", 0)).get("nodes", [])
        else:
            below = {child for node in self.nodes for child in node.get("children", [])}
            roots = [i for i in range(len(self.nodes)) if i not in below]
        self._place(list(range(len(self.nodes))))
        shown = self._below(roots)
        parts, triangles = [np.empty((0, 3, 3))], 0
        for i in shown:
            if "mesh" not in self.nodes[i]:
                continue
            for corners in self._primitives(self.nodes[i]):
                for place in self._places(i):
                    triangles += len(corners)
                    if triangles > max(MOST, sum(map(len, self.buffers.values()))) or len(parts) > MOST_PARTS:
                        raise ValueError(f"it places more than {MOST} triangles, or {MOST_PARTS} parts, in the scene")
                    parts.append(corners @ place[:3, :3].T + place[:3, 3])
        return Shape(np.concatenate(parts))

    # Nodes (section 3.5)

    def _below(self, roots: list[int]) -> list[int]:
        """The roots and all nodes below them that are shown."""
        found, left, seen = [], list(reversed(roots)), set()
        while left:
            i = left.pop()
            node = self.entry("nodes", i)
            if i in seen:
                raise ValueError(f"node {i} is in more than one place")
            seen.add(i)
            if node.get("extensions", {}).get(VISIBILITY, {}).get("visible", True):  # else hidden with all below it
                found.append(i)
                left += reversed(node.get("children", []))
        return found

    def _place(self, nodes: list[int]) -> None:
        """Find where every node is in the world, its parents before itself."""
        children = {child for i in nodes for child in self.nodes[i].get("children", [])}
        left: list[tuple[int, ndarray]] = [(i, np.eye(4)) for i in nodes if i not in children]
        while left:
            i, above = left.pop()
            node = self.entry("nodes", i)
            if i in self.world:
                raise ValueError(f"node {i} is in more than one place")
            self.world[i] = above @ _local(node)
            left += [(child, self.world[i]) for child in node.get("children", [])]

    def _places(self, i: int) -> Iterator[Float64[ndarray, "4 4"]]:
        """The transforms that put the node's mesh into the world: its own, or one for each instance."""
        node = self.nodes[i]
        if "skin" in node:  # the joints have placed it already (3.7.3.3)
            yield np.eye(4)
            return
        instances = node.get("extensions", {}).get(INSTANCING)
        if instances is None:
            yield self.world[i]
            return
        given = {name.lower(): self.values(index) for name, index in instances.get("attributes", {}).items()}
        known = {name: given[name] for name in ("translation", "rotation", "scale") if name in given}
        count = {len(values) for values in known.values()}
        if len(count) != 1:
            raise ValueError(f"{INSTANCING}: expected equally many translations, rotations and scales")
        for k in range(count.pop()):
            yield self.world[i] @ _local({name: values[k] for name, values in known.items()})

    # Meshes (section 3.7)

    def _primitives(self, node: dict[str, Any]) -> list[Float64[ndarray, "T 3 3"]]:
        """Triangles of each of the mesh's primitives, morphed and moved by the node's joints."""
        if "skin" in node or "weights" in node:
            return list(self._made(node))
        if node["mesh"] not in self.meshes:  # most are placed more than once
            self.meshes[node["mesh"]] = list(self._made(node))
        return self.meshes[node["mesh"]]

    def _made(self, node: dict[str, Any]) -> Iterator[Float64[ndarray, "T 3 3"]]:
        mesh = self.entry("meshes", node["mesh"])
        weights = node.get("weights", mesh.get("weights", []))
        for primitive in mesh["primitives"]:
            mode = primitive.get("mode", TRIANGLES)
            if mode not in range(7):
                raise ValueError(f"mode {mode} of a primitive is none of glTF's")
            if mode not in (TRIANGLES, STRIP, FAN):
                continue
            attributes = primitive["attributes"]
            if "POSITION" not in attributes:
                continue  # nothing to draw (3.7.2.1)
            self._refuse_compressed(primitive)
            points = self.values(attributes["POSITION"], 3)
            for weight, target in zip(weights, primitive.get("targets", []), strict=False):
                if weight and "POSITION" in target:
                    change = self.values(target["POSITION"], 3)
                    if len(change) != len(points):
                        raise ValueError("a morph target has another number of vertices than its mesh")
                    points = points + float(weight) * change
            if "indices" in primitive:
                indices = self.values(primitive["indices"], 1, whole=True)[:, 0]
            else:
                indices = np.arange(len(points))
            corners = _triangles(indices, mode)
            if len(corners) and corners.max() >= len(points):
                raise ValueError(f"a triangle refers to vertex {corners.max()} of {len(points)}, counted from 0")
            if "skin" in node:
                points = self._skinned(points, attributes, self.entry("skins", node["skin"]))
            yield points[corners]

    def _refuse_compressed(self, primitive: dict[str, Any]) -> None:
        """Geometry that only a decoder can read; a file that does not require one may hold a plain copy beside it."""
        used = [primitive["attributes"]["POSITION"], *([primitive["indices"]] if "indices" in primitive else [])]
        for name in primitive.get("extensions", {}):
            if "compression" in name and any("bufferView" not in self.entry("accessors", i) for i in used):
                raise ValueError(f"glTF extension {name} is not read")

    def _skinned(
        self, points: Float64[ndarray, "V 3"], attributes: dict[str, Any], skin: dict[str, Any]
    ) -> Float64[ndarray, "V 3"]:
        """Each point moved by the mean of its joints' matrices (3.7.3)."""
        joints = skin["joints"]
        matrices = np.stack([self.world[i] for i in joints if self.entry("nodes", i) is not None])
        if "inverseBindMatrices" in skin:
            inverse = self.values(skin["inverseBindMatrices"], 16).reshape(-1, 4, 4).transpose(0, 2, 1)
            if len(inverse) < len(joints):
                raise ValueError(f"has {len(inverse)} inverse bind matrices for {len(joints)} joints")
            matrices = matrices @ inverse[: len(joints)]
        total, moved = np.zeros((len(points), 1)), np.zeros((len(points), 3))
        for k in range(len(attributes)):
            if f"JOINTS_{k}" not in attributes:
                break
            chosen = self.values(attributes[f"JOINTS_{k}"], 4, whole=True)
            weights = self.values(attributes[f"WEIGHTS_{k}"], 4)
            if len(chosen) != len(points) or len(weights) != len(points) or chosen.max(initial=0) >= len(joints):
                raise ValueError("joints or weights do not fit the mesh or the skin")
            for joint, weight in zip(chosen.T, weights.T, strict=True):
                placed = np.einsum("nij,nj->ni", matrices[joint, :3, :3], points) + matrices[joint, :3, 3]
                moved += weight[:, None] * placed
                total += weight[:, None]
        if not (total > 0).all():
            raise ValueError("has a skin, and vertices that no joint moves")
        return moved / total

    # Accessors (section 3.6.2)

    def values(self, index: int, width: int | None = None, whole: bool = False) -> ndarray:
        """An accessor's rows: float64, normalised integers as fractions, or int64 if `whole`."""
        accessor = self.entry("accessors", index)
        form, columns = COMPONENTS[accessor["componentType"]], WIDTHS[accessor["type"]]
        if accessor["type"] in ("MAT2", "MAT3") or (width and columns != width) or (whole and form == "<f4"):
            raise ValueError(f"accessor {index}: expected other values than {accessor['type']} of {form[1:]}")
        if (index, whole) not in self.decoded:
            rows = self._stored(index, accessor, form, columns)
            if whole:
                rows = rows.astype(np.int64)
            elif accessor.get("normalized") and form != "<f4":
                rows = np.maximum(rows / np.iinfo(form).max, -1.0)
            self.decoded[index, whole] = rows if whole else rows.astype(np.float64)
        return self.decoded[index, whole]

    def _stored(self, index: int, accessor: dict[str, Any], form: str, columns: int) -> ndarray:
        """An accessor's rows as they are stored."""
        count = accessor["count"]
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"accessor {index}: count {quoted(str(count).encode())}")
        if "bufferView" in accessor:
            rows = self._rows(accessor["bufferView"], accessor.get("byteOffset", 0), form, columns, count)
        elif count * columns > MOST:
            raise ValueError(f"accessor {index} promises {count} rows that no buffer holds")
        else:
            rows = np.zeros((count, columns), form)
        return self._sparse(rows, accessor["sparse"]) if "sparse" in accessor else rows

    def _sparse(self, rows: ndarray, sparse: dict[str, Any]) -> ndarray:
        """The rows, some of them replaced."""
        count, where, values = sparse["count"], sparse["indices"], sparse["values"]
        form = COMPONENTS[where["componentType"]]
        at = self._rows(where["bufferView"], where.get("byteOffset", 0), form, 1, count)[:, 0]
        new = self._rows(values["bufferView"], values.get("byteOffset", 0), rows.dtype.str, rows.shape[1], count)
        if len(at) and at.max() >= len(rows):
            raise ValueError(f"a sparse accessor replaces row {at.max()} of {len(rows)}, counted from 0")
        rows = rows.copy()
        rows[at] = new
        return rows

    def _rows(self, view_index: int, offset: int, form: str, columns: int, count: int) -> ndarray:
        view = self.entry("bufferViews", view_index)
        width = np.dtype(form).itemsize * columns
        stride = view.get("byteStride", width)
        size, start = view["byteLength"], view.get("byteOffset", 0)
        if min(offset, size, start, count) < 0 or stride < width:
            raise ValueError(f"buffer view {view_index} has a negative offset or size, or rows that overlap")
        buffer = self._buffer(view)
        if start + size > len(buffer) or (count and offset + (count - 1) * stride + width > size):
            raise ValueError(f"buffer view {view_index} ends before what it should hold")
        return np.ndarray((count, columns), form, buffer, start + offset, (stride, np.dtype(form).itemsize))

    def _buffer(self, view: dict[str, Any]) -> bytes:
        index = view["buffer"]
        buffer, uri = self.entry("buffers", index), self.entry("buffers", index).get("uri")
        if index not in self.buffers:
            if uri is None and index == 0 and self.binary is not None:
                data = self.binary
            elif uri is None:
                compressed = [f"glTF extension {name} is not read" for name in view.get("extensions", {})]
                raise ValueError(compressed[0] if compressed else "a buffer has no data")
            elif uri.startswith("data:"):
                head, _, body = uri.partition(",")
                data = unquote_to_bytes(body)
                if head.endswith(";base64"):
                    data = base64.b64decode(data, validate=True)
            else:
                data = self.sibling(unquote(uri))
            if len(data) < buffer["byteLength"]:
                raise ValueError(f"a buffer promises {buffer['byteLength']} bytes and holds {len(data)}")
            self.buffers[index] = data
        return self.buffers[index]


def _local(node: dict[str, Any]) -> Float64[ndarray, "4 4"]:
    """A node's own transform (3.5.2): its matrix, or translation after rotation after scale."""
    if "matrix" in node:
        return np.array(node["matrix"], dtype=np.float64).reshape(4, 4).T
    x, y, z, w = np.array(node.get("rotation", (0, 0, 0, 1)), dtype=np.float64)
    length = x * x + y * y + z * z + w * w
    if not length > 0:
        raise ValueError("a rotation is no quaternion")
    s = 2 / length
    result = np.eye(4)
    result[:3, :3] = [
        [1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w)],
        [s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w)],
        [s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)],
    ]
    result[:3, :3] *= np.array(node.get("scale", (1, 1, 1)), dtype=np.float64)
    result[:3, 3] = node.get("translation", (0, 0, 0))
    return result


def _triangles(indices: Int64[ndarray, " n"], mode: int) -> Int64[ndarray, "T 3"]:
    """The triangles of a list, strip or fan (3.7.2.1)."""
    if mode == TRIANGLES:
        return indices[: len(indices) // 3 * 3].reshape(-1, 3)
    first = indices[:-2] if mode == STRIP else np.broadcast_to(indices[:1], max(len(indices) - 2, 0))
    return np.stack([first, indices[1:-1], indices[2:]], axis=1) if len(indices) > 2 else np.empty((0, 3), np.int64)
