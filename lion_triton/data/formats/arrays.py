"""Clouds as arrays: NumPy's .npy and .npz, and HDF5. One cloud (P, 3) or a set of S clouds (S, P, 3).

Nothing is unpickled, and no file but the one that is read is ever opened.
"""

from __future__ import annotations

import io
import zipfile

import numpy as np
from jaxtyping import Shaped
from numpy import ndarray

from lion_triton.data.containers import MAX_EXPANSION, Archive

MAX_CLOUD_COLUMNS = 16  # coordinates, then normals, colours, labels; more is taken for a transposed array
CLOUDS = ("points", "pc", "pointcloud", "xyz")  # what people call the coordinates
FIELDS = frozenset({"occupancies", "occupancy", "sdf", "sdfs", "udf"})  # of points in space, not on a surface

Clouds = Shaped[ndarray, "*S P 3"]


def read_npy(data: bytes) -> Clouds:
    """The array of a .npy file. ValueError unless it holds one cloud, of which the first three columns are taken, or
    a set."""
    if not data.startswith(b"\x93NUMPY"):
        raise ValueError("is not in NumPy's array format (pickles are not read)")
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, column_major, dtype = header(file)
    if dtype.hasobject:
        raise ValueError("Object arrays are not read: they would have to be unpickled")
    _check_form(shape, dtype)
    size = int(np.prod(shape, dtype=object))
    held = (len(data) - file.tell()) // dtype.itemsize
    if min(shape) < 0 or held < size:
        raise ValueError(f"promises {size} numbers and holds {held}")
    array = np.frombuffer(data, dtype, size, file.tell()).reshape(shape, order="F" if column_major else "C")
    return array[..., :3]


def _check_form(shape: tuple[int, ...], dtype: np.dtype) -> None:
    one = len(shape) == 2 and 3 <= shape[1] <= MAX_CLOUD_COLUMNS
    many = len(shape) == 3 and shape[2] == 3 and dtype != np.uint8  # those are images
    if dtype.kind not in "fiu" or not (one or many):
        wanted = f"(P, 3 to {MAX_CLOUD_COLUMNS}) or (S, P, 3)"
        raise ValueError(f"expected numbers of shape {wanted}, got {dtype} of shape {shape}")


def read_npz(data: bytes) -> Clouds:
    """The array of a .npz file that is called as clouds are, or its only one."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        archive = Archive(file)
        names = [name.removesuffix(".npy") for name in archive.names() if name.endswith(".npy")]
        named = [name for name in CLOUDS if name in names]
        fields = sorted(FIELDS.intersection(names))
        if fields:
            raise ValueError(f"holds {fields[0]} of points in space, no surface")
        if len(named) != 1 and len(names) != 1:
            got = ", ".join(names)[:200] or "none"
            raise ValueError(f"expected one array, or one of {', '.join(CLOUDS)}; got {got}")
        return read_npy(archive.read(f"{(named or names)[0]}.npy"))


def read_hdf5(data: bytes) -> tuple[Clouds, list[int] | None]:
    """The set `data` (S, P, 3) of an HDF5 file, and the classes `label` of its shapes if there are any: the form in
    which ModelNet40 and ScanObjectNN are handed round."""
    import h5py  # takes as long to import as many shapes to prepare

    with h5py.File(io.BytesIO(data), "r") as file:

        def array(name: str) -> ndarray:
            found = file[name]
            if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual:
                raise ValueError(f"{name} is kept in another file, or is no array")
            if found.size is None or found.size * found.dtype.itemsize > MAX_EXPANSION * len(data):
                raise ValueError(f"{name} promises {found.shape}, more than {MAX_EXPANSION} times the file's size")
            return found[...]

        if not all(isinstance(file.get(name, getlink=True), h5py.HardLink) for name in file):
            raise ValueError("refers to other files")
        if "data" not in file:
            raise ValueError(f"expected an array called data, got {', '.join(file)[:200] or 'none'}")
        clouds = array("data")
        _check_form(clouds.shape, clouds.dtype)
        if "label" not in file:
            return clouds[..., :3], None
        labels = array("label")
        if labels.dtype.kind not in "iu" or clouds.ndim != 3 or labels.size != len(clouds):
            raise ValueError(f"label: expected {len(clouds)} whole numbers, got {labels.dtype} of shape {labels.shape}")
        return clouds, labels.reshape(-1).tolist()
