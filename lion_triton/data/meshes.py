"""Reading shapes: a mesh's or cloud's file as a plain array of coordinates.

Only geometry is read: textures and materials are never opened, nothing is fetched from a network, and nothing
is unpickled.
"""

from __future__ import annotations

import io
import json
import posixpath
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from urllib.parse import unquote

import numpy as np
import trimesh
from jaxtyping import Float, Float32, Float64
from numpy import ndarray

from lion_triton.data.containers import Container, read_entry

MESH_SUFFIXES = frozenset({".obj", ".ply", ".off", ".stl", ".glb", ".gltf"})
CLOUD_SUFFIXES = frozenset({".npy", ".npz", ".xyz", ".txt"})  # and .ply without faces
SHAPE_SUFFIXES = MESH_SUFFIXES | CLOUD_SUFFIXES
MAX_CLOUD_COLUMNS = 16  # coordinates, then normals, colours, labels; more is taken for a transposed array

Z_UP_TO_Y_UP = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])


@dataclass(frozen=True)
class Shape:
    """`coordinates`: the corners of a mesh's triangles (F, 3, 3), or a cloud's points (P, 3), float64."""

    coordinates: Float64[ndarray, "*n 3"]

    @property
    def is_mesh(self) -> bool:
        return self.coordinates.ndim == 3

    def turned(self, rotation: Float[ndarray, "3 3"]) -> Shape:
        """Every point p becomes rotation @ p."""
        return Shape(self.coordinates @ rotation.T)

    def fitted(self, size: Float[ndarray, " 3"]) -> Shape:
        """Bounding box stretched to `size` along x, y, z, centred at the origin; a flat axis stays flat."""
        points = self.coordinates.reshape(-1, 3)
        low, high = points.min(axis=0), points.max(axis=0)
        extent = high - low
        scale = np.where(extent > 0, size / np.where(extent > 0, extent, 1.0), 1.0)
        return Shape((self.coordinates - (low + high) / 2) * scale)

    def check(self) -> None:
        """ValueError unless there is something to draw points from and all of it is finite as float32."""
        kind = "face" if self.is_mesh else "point"
        if len(self.coordinates) == 0:
            raise ValueError(f"no {kind}s")
        with np.errstate(over="ignore"):
            finite = np.isfinite(self.coordinates.astype(np.float32)).reshape(len(self.coordinates), -1).all(axis=1)
        if not finite.all():
            raise ValueError(f"{kind} {int(np.argmin(finite))} is not finite")
        if self.is_mesh and not trimesh.triangles.area(self.coordinates).sum() > 0:
            raise ValueError("the surface has no area")

    def sample(self, count: int, seed: int) -> Float32[ndarray, "P 3"]:
        """`count` points as float32, in random order, determined by the shape and `seed`.

        Mesh: independent, uniform over the surface's area. Cloud: drawn without replacement; a cloud of fewer
        than `count` points is returned whole and in its own order.
        """
        if self.is_mesh:
            mesh = trimesh.Trimesh(**trimesh.triangles.to_kwargs(self.coordinates), process=False)
            points = trimesh.sample.sample_surface(mesh, count, seed=seed)[0]
        elif len(self.coordinates) >= count:
            chosen = np.random.default_rng(seed).choice(len(self.coordinates), count, replace=False)
            points = self.coordinates[chosen]
        else:
            points = self.coordinates
        return np.ascontiguousarray(points, dtype=np.float32)


def read_shape(container: Container, name: str) -> Shape:
    """The shape in the file `name`, whose suffix tells the format; checked.

    A mesh's scene graph is applied and all its parts are taken together. A cloud has its coordinates in the
    first three columns. Raises ValueError, or whatever error the format's parser ends with.
    """
    suffix = posixpath.splitext(name)[1].lower()
    if suffix not in SHAPE_SUFFIXES:
        raise ValueError(f"format {suffix or 'without suffix'} is not read")
    data = container.read(name)
    if suffix in (".npy", ".npz"):
        shape = Shape(_read_array(data, suffix))
    elif suffix in (".xyz", ".txt"):
        text = data.decode("utf-8-sig", errors="replace").replace(",", " ")
        if not re.search(r"^\s*([-+.\d]|nan|inf)", text, re.MULTILINE | re.IGNORECASE):
            raise ValueError("holds no rows of numbers")
        shape = Shape(np.loadtxt(io.StringIO(text), usecols=(0, 1, 2), ndmin=2))
    else:
        shape = _read_mesh(data, suffix, lambda reference: container.read_sibling(name, reference))
    shape.check()
    return shape


def _read_array(data: bytes, suffix: str) -> Float64[ndarray, "P 3"]:
    """A cloud from a .npy file, or from a .npz file's array `points` or its only array."""
    if suffix == ".npz":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            if "points.npy" not in names and len(names) != 1:
                raise ValueError(f"expected an array called points or a single array, got {len(names)} arrays")
            name = "points.npy" if "points.npy" in names else names[0]
            data = read_entry(archive, name)
    if not data.startswith(b"\x93NUMPY"):
        raise ValueError("is not in NumPy's array format (pickles are not read)")
    array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    if array.dtype.kind not in "fiu" or array.ndim != 2 or not 3 <= array.shape[1] <= MAX_CLOUD_COLUMNS:
        columns = f"(P, 3 to {MAX_CLOUD_COLUMNS})"
        raise ValueError(f"expected numbers of shape {columns}, got {array.dtype} of shape {array.shape}")
    return array[:, :3].astype(np.float64)


def _read_mesh(data: bytes, suffix: str, sibling: Callable[[str], bytes]) -> Shape:
    if suffix == ".obj":
        return Shape(_read_obj(data.decode("latin-1")))
    resolver = _gltf_buffers(data, sibling) if suffix in (".gltf", ".glb") else {}
    scene = trimesh.load_scene(
        io.BytesIO(data), file_type=suffix[1:], resolver=resolver, process=False, skip_materials=True
    )
    meshes, clouds = [np.empty((0, 3, 3))], [np.empty((0, 3))]
    for node in scene.graph.nodes_geometry:
        transform, key = scene.graph[node]
        geometry = scene.geometry[key]
        if isinstance(geometry, trimesh.Trimesh) and len(geometry.faces):
            if geometry.faces.min() < 0:
                raise ValueError("a face has a negative vertex index")
            meshes.append(trimesh.transform_points(geometry.vertices, transform)[geometry.faces])
        elif isinstance(geometry, (trimesh.Trimesh, trimesh.PointCloud)) and len(geometry.vertices):
            clouds.append(trimesh.transform_points(geometry.vertices, transform))
    is_cloud = suffix == ".ply" and len(meshes) == 1
    return Shape(np.concatenate(clouds if is_cloud else meshes))


def _read_obj(text: str) -> Float64[ndarray, "F 3 3"]:
    """The faces of an OBJ file, polygons as fans of triangles.

    Not left to trimesh, which counts a negative vertex index from the end of the file (OBJ counts from the face's
    own line), takes index 0 for the first vertex, and misses the faces in lines that are indented or use tabs.
    """
    vertices: list[tuple[float, float, float]] = []
    faces: list[tuple[int, int, int]] = []
    for line in re.sub(r"\\\r?\n", " ", text).splitlines():
        words = line.partition("#")[0].split()
        if words[:1] == ["v"]:
            x, y, z = map(float, words[1:4])
            vertices.append((x, y, z))
        elif words[:1] == ["f"]:
            numbers = [int(word.partition("/")[0]) for word in words[1:]]
            corners = [number - 1 if number > 0 else len(vertices) + number for number in numbers]
            if 0 in numbers or min(corners, default=0) < 0:
                raise ValueError(f"face {len(faces)} refers to a vertex before the first")
            faces += [(corners[0], b, c) for b, c in pairwise(corners[1:])]
    indices = np.array(faces, dtype=np.int64).reshape(-1, 3)
    if indices.max(initial=-1) >= len(vertices):
        raise ValueError(f"a face refers to vertex {indices.max() + 1} of {len(vertices)}")
    return np.array(vertices, dtype=np.float64).reshape(-1, 3)[indices]


def _gltf_buffers(data: bytes, sibling: Callable[[str], bytes]) -> dict[str, bytes]:
    """The files that hold a glTF scene's geometry, by the names it calls them; not its images."""
    if data[:4] == b"glTF":  # binary: a 12-byte header, then the JSON chunk's length and type
        data = data[20 : 20 + int.from_bytes(data[12:16], "little")]
    scene: dict[str, Any] = json.loads(data)
    for extension in scene.get("extensionsRequired", []):
        if "compression" in extension:  # trimesh would put zeros in place of the compressed positions
            raise ValueError(f"glTF extension {extension} is not read")
    uris = [buffer["uri"] for buffer in scene.get("buffers", []) if "uri" in buffer]
    return {uri: sibling(unquote(uri)) for uri in uris if not uri.startswith("data:")}
