"""Reading shapes: a mesh's or cloud's file as plain arrays of coordinates.

Only geometry is read: textures and materials are never opened, nothing is fetched from a network, and nothing
is unpickled.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from lion_triton.data.containers import Container
from lion_triton.data.formats.arrays import Clouds, read_hdf5, read_npy, read_npz
from lion_triton.data.formats.gltf import read_gltf
from lion_triton.data.formats.obj import read_obj
from lion_triton.data.formats.off import read_off
from lion_triton.data.formats.ply import read_ply
from lion_triton.data.formats.stl import read_stl
from lion_triton.data.formats.tables import read_pcd, read_table
from lion_triton.data.formats.text import plain_text
from lion_triton.data.shape import Shape

READERS: dict[str, Callable[[bytes], Shape]] = {
    ".obj": read_obj,
    ".ply": read_ply,
    ".off": read_off,
    ".stl": read_stl,
    ".pcd": read_pcd,
    **dict.fromkeys((".xyz", ".txt", ".pts", ".csv"), read_table),
}
GLTF_SUFFIXES = frozenset({".glb", ".gltf"})
SET_SUFFIXES = frozenset({".npy", ".npz", ".h5", ".hdf5"})  # one cloud or many
MESH_SUFFIXES = frozenset({".obj", ".ply", ".off", ".stl"}) | GLTF_SUFFIXES
SHAPE_SUFFIXES = frozenset(READERS) | GLTF_SUFFIXES | SET_SUFFIXES
CLASS_NAMES = "shape_names.txt"  # beside ModelNet40's .h5 files: its classes, one a line, in order of their labels

Z_UP_TO_Y_UP = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])


@dataclass(frozen=True)
class Part:
    """One of a file's shapes: of a set, its number and the category that its label says; not yet checked."""

    shape: Shape
    number: int | None = None
    category: str | None = None


class SetOfShapes(ValueError):
    """A file holds several shapes where one was expected."""


def read_shape(container: Container, name: str) -> Shape:
    """The shape in the file `name`, whose suffix tells the format; checked. See `read_parts`.

    Raises SetOfShapes, another ValueError, or whatever error the format's parser ends with.
    """
    parts = list(read_parts(container, name))
    if len(parts) != 1:
        raise SetOfShapes(f"holds a set of {len(parts)} shapes")
    parts[0].shape.check()
    return parts[0].shape


def read_parts(container: Container, name: str) -> Iterator[Part]:
    """The shapes in the file `name`, whose suffix tells the format: one, or those of a set.

    A mesh's scene graph is applied and all its parts are taken together. A cloud has its coordinates in the
    first three columns. Raises ValueError, or whatever error the format's parser ends with.
    """
    suffix = posixpath.splitext(name)[1].lower()
    if suffix not in SHAPE_SUFFIXES:
        raise ValueError(f"format {suffix or 'without suffix'} is not read")
    data = container.read(name)
    if suffix in GLTF_SUFFIXES:
        yield Part(read_gltf(data, lambda reference: container.read_sibling(name, reference)))
    elif suffix in READERS:
        yield Part(READERS[suffix](data))
    elif suffix in (".npy", ".npz"):
        yield from _clouds((read_npy if suffix == ".npy" else read_npz)(data), None)
    else:
        clouds, labels = read_hdf5(data)
        yield from _clouds(clouds, None if labels is None else _class_names(labels, container, name))


def _clouds(clouds: Clouds, categories: list[str] | None) -> Iterator[Part]:
    if clouds.ndim == 2:
        yield Part(Shape(clouds.astype(np.float64)))
        return
    if len(clouds) == 0:
        raise ValueError("holds a set of no shapes")
    for i, cloud in enumerate(clouds):
        yield Part(Shape(cloud.astype(np.float64)), i, categories[i] if categories else None)


def _class_names(labels: list[int], container: Container, name: str) -> list[str]:
    """The labels' names, where a list of names lies beside the file; else the numbers."""
    try:
        text = plain_text(container.read_sibling(name, CLASS_NAMES)).decode(errors="replace")
    except ValueError:
        return [str(label) for label in labels]
    names = dict(enumerate(line.strip() for line in text.split("\n")))
    return [names.get(label) or str(label) for label in labels]
