"""Clouds and meshes that lie in files: one of them at a time, chosen by a slider."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import trimesh

from lion_triton.data.containers import Container
from lion_triton.data.meshes import SHAPE_SUFFIXES, read_shape
from lion_triton.errors import one_line
from lion_triton.evaluation.sets import CloudSet, open_clouds
from lion_triton.viewer.page import Page


@dataclass(frozen=True)
class Item:
    """A shape of which only the name has been read."""

    name: str
    read: Callable[[], trimesh.Trimesh | trimesh.PointCloud]


def find_items(path: Path) -> Sequence[Item]:
    """The shapes at ``path``: a file of one shape or of several clouds, or a folder of such files or of a data set.

    Of files that differ in the suffix alone, a mesh's .ply and .glb, the first is taken.

    Raises:
        ValueError: nothing there, or nothing that is a shape.
    """
    if path.is_dir() and not (path / "clouds.npz").is_file():
        files = sorted(f for f in path.iterdir() if f.suffix.lower() in SHAPE_SUFFIXES and f.name[0] != ".")
        if files:
            first = {file.stem: file for file in reversed(files)}
            return [Item(file.name, partial(_read, file)) for file in sorted(first.values())]
    if path.is_file() and (path.suffix.lower() in SHAPE_SUFFIXES - {".npy", ".npz"} or not _several(path)):
        return [Item(path.name, partial(_read, path))]
    clouds = open_clouds("what", str(path), "test")
    return [Item(name, partial(_cloud, clouds, i)) for i, name in enumerate(clouds.clouds.names)]


def _cloud(clouds: CloudSet, i: int) -> trimesh.PointCloud:
    return trimesh.PointCloud(clouds[i])


def _several(path: Path) -> bool:
    """Whether a .npy or .npz holds several clouds; a damaged one counts, and is complained of when it is opened."""
    try:
        loaded = np.load(path, allow_pickle=False)
        array = loaded if isinstance(loaded, np.ndarray) else loaded["points"]
        return bool(array.ndim == 3)
    except Exception:
        return True


def _read(path: Path) -> trimesh.Trimesh | trimesh.PointCloud:
    try:
        shape = read_shape(Container(path.parent), path.name)
    except Exception as error:  # whatever a parser makes of a bad file
        raise ValueError(f"{path}: {one_line(error)}") from None
    if not shape.is_mesh:
        return trimesh.PointCloud(shape.coordinates)
    return trimesh.Trimesh(**trimesh.triangles.to_kwargs(shape.coordinates))


def add_files(page: Page, items: Sequence[Item]) -> None:
    """The panel: which of the shapes is shown, and its download."""

    def show(index: int) -> str:
        item = items[index]
        geometry = item.read()
        page.remove("shape")
        if isinstance(geometry, trimesh.Trimesh):
            page.show_mesh("shape", geometry)
            size = f"{len(geometry.faces)} faces"
        else:
            page.show_cloud("shape", np.asarray(geometry.vertices, dtype=np.float32))
            size = f"{len(geometry.vertices)} points"
        page.offer(Path(item.name).stem, geometry)
        if index == 0:
            page.look_at(np.asarray(geometry.vertices, dtype=np.float32))
        return f"{item.name}: {size}"

    if len(items) > 1:
        slider = page.server.gui.add_slider("shape", min=0, max=len(items) - 1, step=1, initial_value=0)
        slider.on_update(lambda _: page.do("reading", lambda: show(slider.value)))
    page.add_download()
    page.say(show(0))
