"""Which way a mesh's normals point, and that ``prepare --normals`` keeps them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trimesh

from lion_triton.config import quickstart
from lion_triton.data.clouds import Normalization
from lion_triton.data.find import normals_path
from lion_triton.data.orientation import inward_faces
from lion_triton.data.sources import DataConfig, load_sources
from lion_triton.prepare import PrepareConfig, prepare
from lion_triton.runs import Run
from lion_triton.surface.shapes import training_shapes


def scrambled(mesh: trimesh.Trimesh, seed: int, share: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Its triangles, of which some are turned, and which."""
    turned = np.random.default_rng(seed).random(len(mesh.faces)) < share
    triangles = np.array(mesh.triangles)
    triangles[turned] = triangles[turned][:, ::-1]
    return triangles, turned


def test_closed_parts_face_outward() -> None:
    boxes = trimesh.util.concatenate(
        [trimesh.creation.box(bounds=[[0, 0, 0], [1, 2, 3]]), trimesh.creation.box(bounds=[[4, -1, -2], [5, 0, 0]])]
    )
    for mesh in (trimesh.creation.icosphere(2), trimesh.creation.torus(1.0, 0.3), boxes):
        triangles, turned = scrambled(mesh, seed=1)
        np.testing.assert_array_equal(inward_faces(triangles), turned)
        np.testing.assert_array_equal(inward_faces(triangles + np.array([1e4, 0, -1e4])), turned)
        assert inward_faces(triangles[:, ::-1])[~turned].all()


def test_an_open_part_is_as_most_of_it_was() -> None:
    mesh = trimesh.creation.icosphere(2)
    mesh.update_faces(mesh.triangles_center[:, 1] < 0.5)  # a bowl
    triangles, turned = scrambled(mesh, seed=2, share=0.2)
    np.testing.assert_array_equal(inward_faces(triangles), turned)
    np.testing.assert_array_equal(inward_faces(triangles[:, ::-1]), turned)  # of most triangles the inside, here too


def test_what_has_no_two_sides_stays() -> None:
    angle = np.linspace(0, np.pi, 9)  # of a strip that is turned by half a turn
    out, up = np.sin(2 * angle), np.cos(2 * angle)
    middle = np.stack((3 * up, np.zeros(9), 3 * out), 1)
    across = np.stack((np.cos(angle) * up, np.sin(angle), np.cos(angle) * out), 1)
    low, high = middle - across, middle + across
    low[-1], high[-1] = high[0], low[0]  # to the bit
    strips = [(low[i], high[i], low[i + 1]) for i in range(8)] + [(low[i + 1], high[i], high[i + 1]) for i in range(8)]
    assert not inward_faces(np.array(strips)).any()
    fan = np.array([[[0, 0, 0], [0, 1, 0], p] for p in ([1, 0, 0], [-1, 0, 0], [0, 0, 1])], dtype=float)
    assert not inward_faces(fan).any()  # three at an edge say nothing of each other


@pytest.mark.parametrize("closed", [True, False])
def test_prepared_normals_are_those_of_the_faces(tmp_path: Path, closed: bool) -> None:
    mesh = trimesh.creation.box(bounds=[[0, 0, 0], [1, 2, 3]])
    if not closed:
        mesh.update_faces(mesh.face_normals[:, 1] < 0.5)  # a box without its lid
    triangles, _ = scrambled(mesh, seed=3, share=0.5 if closed else 0.2)
    source = tmp_path / "source" / "boxes"
    source.mkdir(parents=True)
    faces = np.arange(3 * len(triangles)).reshape(-1, 3)
    trimesh.Trimesh(triangles.reshape(-1, 3), faces, process=False).export(source / "box.stl")
    np.save(source / "cloud.npy", np.random.default_rng(0).standard_normal((50, 3)))
    options = {"source": source.parent, "points": 400, "up": "z", "val": 0.0, "test": 0.0}
    summary = prepare(PrepareConfig(**options, out=tmp_path / "with", normals=True))
    prepare(PrepareConfig(**options, out=tmp_path / "without"))

    path = tmp_path / "with" / "boxes" / "train" / "box.npy"
    points, normals = np.load(path), np.load(normals_path(path))
    assert path.read_bytes() == (tmp_path / "without" / "boxes" / "train" / "box.npy").read_bytes()
    assert (normals.dtype, normals.shape) == (np.float16, points.shape)
    # z up in the file: the box is 1 wide, 3 high, 2 deep, and its lid was at low z.
    center = np.array([0.5, 1.5, -1.0])
    half = np.array([0.5, 1.5, 1.0])
    side = np.abs(np.abs(points - center) - half).argmin(axis=1)  # the axis along which the point lies on the surface
    expected = np.zeros_like(points)
    rows = np.arange(len(points))
    expected[rows, side] = np.sign((points - center)[rows, side])
    np.testing.assert_allclose(normals, expected, atol=1e-3)

    assert not normals_path(path.with_name("cloud.npy")).exists()
    assert "clouds, which have no faces and so no normals: 1" in str(summary)
    assert not list((tmp_path / "without").rglob("normals"))


def test_the_surface_stage_reads_them(tmp_path: Path) -> None:
    source = tmp_path / "source" / "balls"
    source.mkdir(parents=True)
    for i in range(2):
        triangles, _ = scrambled(trimesh.creation.icosphere(3), seed=i)
        trimesh.Trimesh(triangles.reshape(-1, 3), np.arange(3 * len(triangles)).reshape(-1, 3), process=False).export(
            source / f"{i}.ply"
        )
    prepare(PrepareConfig(source.parent, tmp_path / "data", points=300, val=0.0, test=0.0, normals=True))
    config = replace(quickstart(), data=DataConfig(str(tmp_path / "data"), num_points=100))
    run = Run(tmp_path / "run", config, ("balls",), Normalization("box"))
    points, normals = training_shapes(run, load_sources(config.data, 1)).draw(0, 200, 0)
    assert (points * normals).sum(1).min() > 0.98
