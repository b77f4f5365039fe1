"""Preparing data sets: every format, catalogues, archives, hostile and broken files, and what a run leaves on disk."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import signal
import struct
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import trimesh

from lion_triton import prepare as prepare_module
from lion_triton.data import containers
from lion_triton.data.find import safe_name
from lion_triton.data.meshes import Shape, read_shape
from lion_triton.data.sweethome3d import parse_properties
from lion_triton.prepare import PrepareConfig, Summary, prepare
from tests import fresh

EXTENTS = np.array([1.0, 2.0, 3.0])
SCENE = {
    "asset": {"version": "2.0"},
    "nodes": [{"mesh": 0}],
    "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
    "buffers": [{"uri": "parts\\scene.bin", "byteLength": 36}],
    "bufferViews": [{"buffer": 0, "byteLength": 36}],
    "accessors": [{"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}],
}
CORNERS = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\n"


def box() -> trimesh.Trimesh:
    return trimesh.creation.box(extents=EXTENTS)


def run(source: Path, out: Path, **options: Any) -> tuple[Summary, dict[str, Any]]:
    summary = prepare(PrepareConfig(source, out, **{"points": 500} | options))
    return summary, json.loads((out / "index.json").read_text())


def load(out: Path, row: dict[str, Any]) -> np.ndarray:
    return np.load(out / row["category"] / row["split"] / f"{row['id']}.npy")


def reasons(summary: Summary) -> dict[str, str]:
    return {failure.path: failure.reason for failure in summary.failures}


def zipped(path: Path, files: dict[str, bytes | str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def obj_bytes(mesh: trimesh.Trimesh) -> bytes:
    return str(mesh.export(file_type="obj")).encode()


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


# Formats


@pytest.mark.parametrize("suffix", ["obj", "ply", "off", "stl", "glb", "gltf"])
def test_mesh_formats(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "shapes" / "boxes"
    folder.mkdir(parents=True)
    if suffix == "gltf":
        for name, data in trimesh.exchange.gltf.export_gltf(trimesh.Scene(box())).items():
            write(folder / name, data)  # model.gltf and the .bin that it refers to
    else:
        box().export(folder / f"a.{suffix}")
    summary, index = run(tmp_path / "shapes", tmp_path / "out", points=2000)
    assert not summary.failures
    (row,) = index["objects"]
    assert (row["category"], row["faces"], row["points"], row["up"]) == ("boxes", 12, 2000, "y")
    points = load(tmp_path / "out", row)
    assert points.shape == (2000, 3)
    assert points.dtype == np.float32
    on_surface = np.isclose(np.abs(points), EXTENTS / 2, atol=1e-6).any(axis=1)
    assert on_surface.all()
    np.testing.assert_allclose(np.ptp(points, axis=0), EXTENTS, rtol=1e-6)


@pytest.mark.parametrize("name", ["c.npy", "c.npz", "named.npz", "c.ply", "c.xyz", "c.txt", "int.npy", "wide.npy"])
def test_cloud_formats(tmp_path: Path, name: str) -> None:
    cloud = np.random.default_rng(0).integers(-50, 50, (700, 3)).astype(np.float32)
    cloud[:, 0] = np.arange(700)
    path = tmp_path / "clouds" / name
    path.parent.mkdir()
    if name == "named.npz":
        np.savez(path, other=np.zeros(5), points=cloud)
    elif path.suffix == ".npz":
        np.savez(path, cloud)
    elif path.suffix == ".ply":
        trimesh.PointCloud(cloud).export(path)
    elif path.suffix in (".xyz", ".txt"):
        comma = name == "c.txt"
        np.savetxt(path, np.hstack([cloud, -cloud]), delimiter="," if comma else " ", header="x y z nx ny nz")
    else:
        wide = np.hstack([cloud, -cloud]) if name == "wide.npy" else cloud
        np.save(path, wide.astype(np.int16) if name == "int.npy" else wide)
    summary, index = run(tmp_path / "clouds", tmp_path / "out")
    assert not summary.failures
    points = load(tmp_path / "out", index["objects"][0])
    assert points.shape == (500, 3)
    chosen = points[:, 0].astype(int)
    assert len(set(chosen)) == 500  # without replacement
    assert (np.diff(chosen) < 0).any()  # in random order
    np.testing.assert_array_equal(points, cloud[chosen])


def test_short_clouds_are_kept_whole_and_noted(tmp_path: Path) -> None:
    clouds = {n: np.random.default_rng(n).normal(size=(n, 3)).astype(np.float32) for n in (1, 3, 500)}
    for n, cloud in clouds.items():
        write(tmp_path / "in" / f"{n}.npy", b"")
        np.save(tmp_path / "in" / f"{n}.npy", cloud)
    summary, index = run(tmp_path / "in", tmp_path / "out")
    rows = {row["id"]: row for row in index["objects"]}
    for n in (1, 3):
        np.testing.assert_array_equal(load(tmp_path / "out", rows[str(n)]), clouds[n])
        assert rows[str(n)]["points_in_file"] == n
    assert str(summary).count("kept whole, with fewer than 500 points (from 1): 2") == 1


def test_scene_parts_are_placed_and_weighted_by_area(tmp_path: Path) -> None:
    scene = trimesh.Scene()
    square = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 3]])
    big = np.diag([2.0, 1.0, 1.0, 1.0])
    big[:3, 3] = [0, 0, 10]
    scene.add_geometry(square, node_name="small", geom_name="square")
    scene.add_geometry(square, node_name="big", geom_name="square", transform=big)  # an instance, area 2
    (tmp_path / "in").mkdir()
    scene.export(tmp_path / "in" / "two.glb")
    _, index = run(tmp_path / "in", tmp_path / "out", points=9000)
    points = load(tmp_path / "out", index["objects"][0])
    far = points[:, 2] > 5
    assert far.mean() == pytest.approx(2 / 3, abs=4 * np.sqrt(2 / 9 / 9000))
    np.testing.assert_allclose(points[far][:, 2], 10)
    np.testing.assert_allclose(points[far].max(axis=0)[:2], [2, 1], rtol=0.01)
    np.testing.assert_allclose(points[~far].max(axis=0), [1, 1, 0], rtol=0.01)


def test_sampling_is_uniform_over_area_whatever_the_triangles() -> None:
    # One square of area 100 in two triangles, one of area 1 in 200: the fine one must not draw more.
    grid = np.linspace(0, 1, 11)
    corner = np.stack(np.meshgrid(grid[:-1], grid[:-1]), -1).reshape(-1, 1, 2)
    halves = np.array([[[0, 0], [1, 0], [1, 1]], [[0, 0], [1, 1], [0, 1]]])
    fine = (corner[:, None] + 0.1 * halves).reshape(-1, 3, 2)
    coarse = 10.0 * halves + 20
    shape = Shape(np.pad(np.concatenate([fine, coarse]), ((0, 0), (0, 0), (0, 1))))
    points = shape.sample(20000, seed=3)
    share = (points[:, 0] < 10).mean()
    assert share == pytest.approx(1 / 101, abs=4 * np.sqrt(1 / 101 / 20000))
    x, y = points[points[:, 0] > 10][:, :2].T - 20
    cells = np.histogram2d(x, y, bins=4, range=[[0, 10], [0, 10]])[0]
    assert np.abs(cells / cells.sum() * 16 - 1).max() < 0.15


@pytest.mark.parametrize(
    ("text", "area"),
    [
        ("v 9 9 9\n" + CORNERS + "f -4 -3 -2 -1\nv 0 0 5\nv 10 0 5\nv 0 10 5\nf -3 -2 -1\n", 51.0),
        (CORNERS + "v -1 .5 0\nvt 0 0\nf 1/1 2/1 3/1 4/1 5/1\n", 1.5),
        ("\tv 0\t0 0 # c\r\n v 1 0 0 1 1 1\r\nv 0 2\\\r\n 0\r\n f\t1 2 3 #4\r\nl 1 2\r\nf 1 2\r\n", 1.0),
        (CORNERS + "mtllib no/such.mtl\nusemtl red\nf 1 2 3\nusemtl blue\nf 1//1 3//1 4//1\n", 1.0),
    ],
    ids=["indices-from-the-line", "pentagon", "layout", "materials-without-library"],
)
def test_obj_faces(tmp_path: Path, text: str, area: float) -> None:
    write(tmp_path / "a.obj", text)
    shape = read_shape(containers.Container(tmp_path), "a.obj")
    assert trimesh.triangles.area(shape.coordinates).sum() == pytest.approx(area)


def test_up_z_turns_upright(tmp_path: Path) -> None:
    cloud = np.array([[1.0, 2.0, 3.0]])  # x right, y back, z up
    write(tmp_path / "in" / "a.xyz", "1 2 3\n")
    _, index = run(tmp_path / "in", tmp_path / "out", up="z")
    np.testing.assert_array_equal(load(tmp_path / "out", index["objects"][0]), cloud[:, [0, 2, 1]] * [1, 1, -1])
    assert index["objects"][0]["up"] == "z, turned to y"


# Names, splits, determinism


def test_categories_ids_and_splits_from_folders(tmp_path: Path) -> None:
    source = tmp_path / "collection"
    for name in [
        "loose.xyz",
        "chair/a b.xyz",
        "chair/deep/er.xyz",
        "chair/test/c.xyz",
        "chair/.hidden.xyz",
        ".git/d.xyz",
        "__MACOSX/chair/e.xyz",
        "v2/03001627/1a2b/models/model_normalized.xyz",
        "lamp/val/modern/scene.xyz",
        "lamp/readme.md",
    ]:
        write(source / name, "1 2 3\n")
    zipped(source / "sofas.zip", {"sofas/f.xyz": "1 2 3\n", "__MACOSX/._f.xyz": "x", "g/h.xyz": "1 2 3\n"})
    _, index = run(source, tmp_path / "out", val=0, test=0)
    assert {row["path"]: (row["category"], row["split"], row["id"]) for row in index["objects"]} == {
        "loose.xyz": ("collection", "train", "loose"),
        "chair/a b.xyz": ("chair", "train", "a-b"),
        "chair/deep/er.xyz": ("chair", "train", "deep-er"),
        "chair/test/c.xyz": ("chair", "test", "c"),
        "v2/03001627/1a2b/models/model_normalized.xyz": ("03001627", "train", "1a2b"),
        "lamp/val/modern/scene.xyz": ("lamp", "val", "modern"),
        "sofas.zip/sofas/f.xyz": ("sofas", "train", "f"),
        "sofas.zip/g/h.xyz": ("sofas", "train", "g-h"),
    }
    for category in ("chair", "sofas"):
        assert {folder.name for folder in (tmp_path / "out" / category).iterdir()} == {"train", "val", "test"}


def test_zip_and_folder_give_the_same(tmp_path: Path) -> None:
    files = {f"{kind}/{i}.obj": obj_bytes(box()) for kind in ("a", "b") for i in range(3)}
    for name, data in files.items():
        write(tmp_path / "set" / name, data)
    zipped(tmp_path / "set.zip", {f"set/{name}": data for name, data in files.items()})
    run(tmp_path / "set", tmp_path / "out1")
    run(tmp_path / "set.zip", tmp_path / "out2")
    saved = sorted(p.relative_to(tmp_path / "out1") for p in (tmp_path / "out1").rglob("*.npy"))
    assert len(saved) == 6
    for path in saved:
        assert (tmp_path / "out1" / path).read_bytes() == (tmp_path / "out2" / path).read_bytes()


def test_order_and_company_do_not_matter(tmp_path: Path) -> None:
    names = [f"kind/{i}.obj" for i in range(40)]  # enough for worker processes
    assert len(names) >= prepare_module.SERIAL_BELOW
    for name in names:
        write(tmp_path / "many" / name, obj_bytes(box()))
    for name in names[::-3]:
        write(tmp_path / "few" / name, obj_bytes(box()))
    _, many = run(tmp_path / "many", tmp_path / "out1", points=50)
    _, few = run(tmp_path / "few", tmp_path / "out2", points=50)
    by_path = {row["path"]: row for row in many["objects"]}
    assert len(by_path) == 40
    for row in few["objects"]:
        assert row == by_path[row["path"]]
        np.testing.assert_array_equal(load(tmp_path / "out1", row), load(tmp_path / "out2", row))
    clouds = {load(tmp_path / "out1", row).tobytes() for row in many["objects"]}
    assert len(clouds) == 40  # equal meshes, each with its own points
    assert {row["split"] for row in many["objects"]} == {"train", "val", "test"}
    _, again = run(tmp_path / "few", tmp_path / "out3", points=50, seed=1)
    assert [row["split"] for row in again["objects"]] == [row["split"] for row in few["objects"]]
    clouds = {load(tmp_path / out, few["objects"][0]).tobytes() for out in ("out2", "out3")}
    assert len(clouds) == 2


def test_split_fractions() -> None:
    config = PrepareConfig(Path("in"), Path("out"), val=0.1, test=0.3)
    splits = [prepare_module.split_of(f"chair/{i}", config) for i in range(5000)]
    for split, share in (("train", 0.6), ("val", 0.1), ("test", 0.3)):
        assert splits.count(split) / 5000 == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 5000))


def test_equal_ids_are_reported_not_overwritten(tmp_path: Path) -> None:
    for name in ("k/a-b.xyz", "k/a/b.xyz", "k/A-B.txt"):
        write(tmp_path / "in" / name, "1 2 3\n")
    write(tmp_path / "in" / "k" / "a-b.npy", "broken: it claims no id")
    summary, index = run(tmp_path / "in", tmp_path / "out")
    assert [row["path"] for row in index["objects"]] == ["k/A-B.txt"]
    assert reasons(summary) == {
        "k/a-b.xyz": "its id a-b is already that of k/A-B.txt",
        "k/a/b.xyz": "its id a-b is already that of k/A-B.txt",
        "k/a-b.npy": "is not in NumPy's array format (pickles are not read)",
    }


@pytest.mark.parametrize(
    ("text", "name"),
    [("Living room", "Living-room"), ("../../x", "x"), (".hidden", "hidden"), ("///", "unnamed"), ("椅子", "椅子")],
)
def test_safe_name(text: str, name: str) -> None:
    assert safe_name(text) == name


def test_long_names_stay_apart() -> None:
    names = [safe_name("椅" * 300 + end) for end in "ab"]
    assert names[0] != names[1]
    assert max(len(name.encode()) for name in names) <= 200


SPLIT_FOLDERS = {
    "train": ("train", "Train", "training"),
    "val": ("val", "valid", "Validation"),
    "test": ("test", "TEST"),
}


@pytest.mark.parametrize(
    ("layout", "category"),
    [
        ("{kind}/{split}/{i}.xyz", "{kind}"),
        ("{split}/{kind}/{i}.xyz", "{kind}"),
        ("{split}/complete/{kind}/{i}.xyz", "{kind}"),
        ("data/{kind}/{split}/deep/{i}.xyz", "{kind}"),
        ("PCN/{split}/{kind}/{i}/mesh.xyz", "{kind}"),
        ("{split}/{i}.xyz", "in"),
        ("{split}/chair/{i}.xyz", "chair"),
        ("{split}/chair/{i}/{i}.xyz", "chair"),
        ("chair/{split}/deep/{i}.xyz", "chair"),
        ("{split}/complete/02691156/{i}.xyz", "02691156"),
        ("02691156/{split}/{i}/models/model_normalized.xyz", "02691156"),
        ("set.zip/{split}/{kind}/{i}.xyz", "{kind}"),
    ],
)
def test_the_split_is_that_of_the_folders(tmp_path: Path, layout: str, category: str) -> None:
    expected, zips = {}, {}
    for split, names in SPLIT_FOLDERS.items():
        for i, name in enumerate(names * 2):
            kind = "table" if i % 2 else "chair"
            path = layout.format(split=name, kind=kind, i=f"{split}{i}")
            expected[path] = split, category.format(kind=kind)
            if path.startswith("set.zip/"):
                zips[path.removeprefix("set.zip/")] = "1 2 3\n"
            else:
                write(tmp_path / "in" / path, "1 2 3\n")
    if zips:
        (tmp_path / "in").mkdir()
        zipped(tmp_path / "in" / "set.zip", zips)
    summary, index = run(tmp_path / "in", tmp_path / "out")
    assert not summary.failures
    assert {row["path"]: (row["split"], row["category"]) for row in index["objects"]} == expected


def test_trains_beside_other_vehicles_are_no_split(tmp_path: Path) -> None:
    for kind in ("bus", "car", "train"):
        for i in range(30):
            write(tmp_path / "in" / kind / f"{i}.xyz", "1 2 3\n")
    _, index = run(tmp_path / "in", tmp_path / "out")
    assert {row["category"] for row in index["objects"]} == {"bus", "car", "train"}
    assert {row["split"] for row in index["objects"] if row["category"] == "train"} == {"train", "val", "test"}


def test_equal_names_in_two_splits_are_two_shapes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / "in" / split / "chair" / "0.xyz", f"{len(split)} 2 3\n")
    summary, index = run(tmp_path / "in", tmp_path / "out")
    assert not summary.failures
    assert sorted(load(tmp_path / "out", row)[0, 0] for row in index["objects"]) == [4, 5]


def test_what_was_decided_is_said_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (
        "train/chair/a.xyz",
        "test/table/b.xyz",
        "test/table/c.xyz",
        "photo.JPG",
        "x/y.fbx",
        "z.fbx",
        "LICENSE",
    ):
        write(tmp_path / "in" / name, "1 2 3\n")
    _, index = run(tmp_path / "in", tmp_path / "out")
    assert capsys.readouterr().err.splitlines()[:3] == [
        "found 3 files; categories: chair 1, table 2",
        "split: folders say it of 3 files (train 1, test 2)",
        "in formats that are not read: .fbx 2, .jpg 1, without suffix 1",
    ]
    assert index["unread"] == {".fbx": 2, ".jpg": 1, "without suffix": 1}


def test_sets_become_shapes(tmp_path: Path) -> None:
    clouds = np.random.default_rng(0).normal(size=(12, 40, 3)).astype(np.float32)
    clouds[7, 3, 1] = np.nan
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "set.npy", clouds)
    for split, share in (("train", slice(0, 6)), ("test", slice(8, 12))):
        with h5py.File(tmp_path / "in" / f"ply_data_{split}0.h5", "w") as file:
            file["data"], file["label"] = clouds[share], np.arange(12)[share, None] % 2
    write(tmp_path / "in" / "shape_names.txt", "night stand\ntv_stand\n")
    summary, index = run(tmp_path / "in", tmp_path / "out", points=50)
    assert reasons(summary) == {"set.npy[7]": "point 3 is not finite"}
    rows = {row["path"]: row for row in index["objects"]}
    for i in set(range(12)) - {7}:
        np.testing.assert_array_equal(load(tmp_path / "out", rows[f"set.npy[{i}]"]), clouds[i])
        assert rows[f"set.npy[{i}]"]["category"] == "in"
    for i in range(12):
        split, number = ("train", i) if i < 6 else ("test", i - 8)
        if number >= 0:
            row = rows[f"ply_data_{split}0.h5[{number}]"]
            assert (row["split"], row["category"]) == (split, ("night-stand", "tv_stand")[i % 2])
            np.testing.assert_array_equal(load(tmp_path / "out", row), clouds[i])


@pytest.mark.parametrize("offset", [(0, 0, 0), (30, -50, 10), (5e5, 4.65e6, 120), (-4.2e6, 1.7e5, 4.8e6)])
def test_shapes_far_from_the_origin_keep_their_precision(tmp_path: Path, offset: tuple[float, ...]) -> None:
    far = box()
    far.apply_translation(offset)
    rows = "".join("v {:.6f} {:.6f} {:.6f}\n".format(*vertex) for vertex in far.vertices)
    write(tmp_path / "in" / "a.obj", rows + "".join(f"f {a + 1} {b + 1} {c + 1}\n" for a, b, c in far.faces))
    summary, index = run(tmp_path / "in", tmp_path / "out", points=2000)
    (row,) = index["objects"]
    points = load(tmp_path / "out", row)
    assert ("origin" in row) == (np.abs(offset).max() > 1000) == ("too far out" in str(summary))
    back = points.astype(np.float64) + row.get("origin", 0) - offset
    assert np.isclose(np.abs(back), EXTENTS / 2, atol=1e-5).any(axis=1).all()
    assert (np.abs(back) < EXTENTS / 2 + 1e-5).all()


def test_faces_that_cross_themselves_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.obj", CORNERS + "f 1 3 2 4\nf 1 2 3\n")
    summary, index = run(tmp_path / "in", tmp_path / "out")
    assert index["objects"][0]["crossing_faces"] == 1
    assert "faces that cross themselves, of which the triangles are a guess: 1, in 1 objects" in str(summary)


# Archives


def with_names(path: Path, files: dict[bytes, bytes]) -> Path:
    """A zip archive whose names are just these bytes, said to be in no encoding."""
    stand_ins = {bytes([ord("A") + i]) * len(name): name for i, name in enumerate(files)}
    zipped(path, {stand_in.decode(): files[name] for stand_in, name in stand_ins.items()})
    data = path.read_bytes()
    for stand_in, name in stand_ins.items():
        data = data.replace(stand_in, name)
    return write(path, data)


def test_archive_names_as_people_see_them(tmp_path: Path) -> None:
    """Backslashes of old Windows programs, UTF-8 of macOS, code page 437, and what macOS adds."""
    rows, triangle = b"1 2 3\n", np.eye(3, dtype="<f4").tobytes()
    files = {
        "stühle\\train\\a.xyz".encode(): rows,
        "stühle/test/bé.xyz".encode(): rows,
        "café\\c.xyz".encode("cp437"): rows,
        b"lamp\\tall\\scene.gltf": json.dumps(SCENE).encode(),
        b"lamp\\tall\\parts\\scene.bin": triangle,
        b"__MACOSX\\lamp\\x.xyz": rows,
        b"lamp/._a.obj": rows,
    }
    summary, index = run(with_names(tmp_path / "set.zip", files), tmp_path / "out", val=0, test=0)
    assert not summary.failures
    assert {(row["category"], row["split"], row["id"]) for row in index["objects"]} == {
        ("stühle", "train", "a"),
        ("stühle", "test", "bé"),
        ("café", "train", "c"),
        ("lamp", "train", "tall"),
    }


def test_archive_entries_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    link = zipfile.ZipInfo("link.xyz")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("locked.xyz", "1 2 3\n")
        archive.writestr(link, "/etc/passwd")
        archive.writestr("zeros.xyz", b"1 2 3\n" * 2**18)
        archive.writestr("small.xyz", b"1 2 3\n" * 2**12)  # also grows a hundredfold, to next to nothing
    data = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + flags] |= 1
    write(path, bytes(data))
    summary, index = run(path, tmp_path / "out")
    assert [row["path"] for row in index["objects"]] == ["small.xyz"]
    assert reasons(summary) == {
        "locked.xyz": "locked.xyz is locked with a password",
        "link.xyz": "link.xyz is a link",
        "zeros.xyz": "zeros.xyz would grow to more than 100 times its size",
    }


# Sweet Home 3D


CATALOGUE = r"""# a comment \
id = Test#Library
license=CC-BY \u00a9 Someone
! another
id#1=Test#chair
name#1=Caf\u00e9 chair\
    \ \uD83E\uDE91
category#1=Living room
model#1=/test/chair/chair.obj
width#1=100.0
depth#1=50
height#1=200
modelRotation#1=1 0 0 0 0 1 0 -1 0
creator#1=Carpenter
id#2=Test#lamp
name#2=Lamp
category#2=Lights
model#2=/lamp.zip
license#2=CC0
id#3=Test#gone
name#3=Gone
category#3=Lights
model#3=/gone.obj
id#10=Test#askew
category#10=Lights
model#10=/test/chair/chair.obj
modelRotation#10=1 0 0
"""


def test_sweet_home_library(tmp_path: Path) -> None:
    # Stands along z, as far as its author is concerned; its foot, at z = 0, is the wide end.
    cone = trimesh.creation.cone(radius=1, height=3)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("lamp.obj", obj_bytes(box()))
    (tmp_path / "in").mkdir()
    files: dict[str, bytes | str] = {
        "PluginFurnitureCatalog.properties": CATALOGUE.encode("latin-1"),
        "PluginFurnitureCatalog_fr.properties": "name#1=Chaise",
        "test/chair/chair.obj": obj_bytes(cone),
        "test/unlisted.obj": obj_bytes(cone),
        "lamp.zip": buffer.getvalue(),
        "LICENSE.TXT": "prose",
    }
    zipped(tmp_path / "in" / "library.sh3f", files)
    summary, index = run(tmp_path / "in", tmp_path / "out", points=5000, up="z")
    rows = {row["id"]: row for row in index["objects"]}
    assert set(rows) == {"Test-chair", "Test-lamp"}
    chair, lamp = rows["Test-chair"], rows["Test-lamp"]
    assert chair["name"] == "Café chair \N{CHAIR}"
    assert (chair["category"], chair["category_name"]) == ("living-room", "Living room")
    assert (chair["creator"], chair["licence"]) == ("Carpenter", "CC-BY © Someone")
    assert (chair["path"], chair["up"]) == ("library.sh3f/test/chair/chair.obj", "y, by the catalogue")
    assert (lamp["licence"], lamp["path"]) == ("CC0", "library.sh3f/lamp.zip")
    assert "creator" not in lamp
    assert len(reasons(summary)) == 2  # the models that are missing and askew
    assert "9 numbers" in reasons(summary)["library.sh3f/test/chair/chair.obj"]
    assert "library.sh3f/gone.obj" in reasons(summary)

    points = load(tmp_path / "out", chair)
    np.testing.assert_allclose(np.ptp(points, axis=0), [1.0, 2.0, 0.5], rtol=0.03)  # width, height, depth in metres
    np.testing.assert_allclose(points.max(axis=0), -points.min(axis=0), atol=0.03)
    radius = np.abs(points[:, 0])
    assert radius[points[:, 1] < -0.9].max() > 0.45  # upright: wide at the foot,
    assert radius[points[:, 1] > 0.9].max() < 0.05  # narrow at the top
    np.testing.assert_allclose(np.ptp(load(tmp_path / "out", lamp), axis=0), EXTENTS, rtol=1e-3)


def test_a_catalogue_that_repeats_an_id(tmp_path: Path) -> None:
    catalogue = "id#1=a\nmodel#1=/a.obj\nid#2=a\nmodel#2=/a.obj\nid#3=b\nmodel#3=/a.obj\n"
    files: dict[str, bytes | str] = {"PluginFurnitureCatalog.properties": catalogue, "a.obj": obj_bytes(box())}
    summary, index = run(zipped(tmp_path / "a.sh3f", files), tmp_path / "out")
    assert [row["id"] for row in index["objects"]] == ["a", "b"]
    assert reasons(summary) == {"a.obj": "its id a is already that of a.obj"}


def test_sampling_follows_the_stretched_surface(tmp_path: Path) -> None:
    # A cube of side 1 stretched to a plate: nearly all of its area is then on the two large faces.
    catalogue = "model#1=/a.obj\nwidth#1=100\ndepth#1=100\nheight#1=1\n"
    files: dict[str, bytes | str] = {
        "PluginFurnitureCatalog.properties": catalogue,
        "a.obj": obj_bytes(trimesh.creation.box()),
    }
    _, index = run(zipped(tmp_path / "a.sh3f", files), tmp_path / "out", points=4000)
    points = load(tmp_path / "out", index["objects"][0])
    assert (np.abs(points[:, 1]) > 0.005 - 1e-6).mean() == pytest.approx(2 / 2.04, abs=0.01)


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("a=1\nb:2\nc 3\n  d  =  4 \n", {"a": "1", "b": "2", "c": "3", "d": "4 "}),
        ("a=x=y:z\r\nb\r\r\n", {"a": "x=y:z", "b": ""}),
        ("a\\ key\\==1\\\n   2\\\\\nb=\\u0041\\t\\q", {"a key=": "12\\", "b": "A\tq"}),
        ("#x\\\na=1\n!b=2\na=3\\", {"a": "3"}),
        ("a=\\ud800 \\uzz", {"a": "\ufffd uzz"}),
    ],
    ids=["separators", "line-ends", "escapes", "comments", "broken-escapes"],
)
def test_properties(text: str, entries: dict[str, str]) -> None:
    assert parse_properties(text) == entries


# Hostile and broken files


class Bomb:
    """Unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_one_bad_file_stops_nothing(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    crumb = tmp_path / "unpickled"
    bad: dict[str, bytes | str] = {
        "broken.glb": b"glTF not really",
        "broken.zip": b"PK not really",
        "broken.stl": b"\x00" * 30,
        "prose.txt": "Read me first.\nThen go.",
        "empty.obj": "",
        "lines.obj": CORNERS + "l 1 2 3 4\n",
        "zero.obj": CORNERS + "f 0 1 2\n",
        "before.obj": CORNERS + "f -5 -1 -2\n",
        "beyond.obj": CORNERS + "f 1 2 5\n",
        "flat.obj": "v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n",
        "index.off": "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 9\n",
        "negative.off": "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 -1\n",
        "nan.obj": "v 0 0 0\nv 1 0 0\nv nan 0 0\nf 1 2 3\n",
        "outside.gltf": json.dumps(SCENE | {"buffers": [{"uri": "../secret.bin", "byteLength": 36}]}),
        "squeezed.gltf": json.dumps({"extensionsRequired": ["KHR_draco_mesh_compression"]}),
        "pickle.npy": pickle.dumps(Bomb(crumb)),
    }
    for name, data in bad.items():
        write(source / name, data)
    cloud = np.zeros((30, 3))
    cloud[17, 1] = np.nan
    np.save(source / "nan.npy", cloud)
    np.savetxt(source / "inf.xyz", np.where(np.isnan(cloud), np.inf, cloud))
    np.save(source / "none.npy", cloud[:0])
    np.save(source / "transposed.npy", cloud.T)
    np.save(source / "objects.npy", np.array([Bomb(crumb)]), allow_pickle=True)
    np.savez(source / "objects.npz", points=np.array([Bomb(crumb)]))
    (source / "gone.npy").symlink_to(tmp_path / "nowhere")
    names = {path.name for path in source.iterdir()}
    box().export(source / "good.ply")

    summary, index = run(source, tmp_path / "out")
    assert [row["id"] for row in index["objects"]] == ["good"]
    why = reasons(summary)
    assert set(why) == names
    assert index["failures"] == [{"path": path, "reason": why[path]} for path in sorted(why)]
    assert all(reason and "\n" not in reason for reason in why.values())
    assert why["nan.npy"] == why["inf.xyz"] == "point 17 is not finite"
    assert why["nan.obj"] == "face 0 is not finite"
    assert why["flat.obj"] == "the surface has no area"
    assert why["empty.obj"] == "no faces"
    assert why["lines.obj"] == "holds lines, no faces"
    assert why["zero.obj"] == why["before.obj"] == "face 0 refers to a vertex before the first"
    assert why["beyond.obj"] == "a face refers to vertex 5 of 4"
    assert why["none.npy"] == "no points"
    assert "(3, 30)" in why["transposed.npy"]
    assert "Object arrays" in why["objects.npy"]
    assert "Object arrays" in why["objects.npz"]
    assert "outside its folder" in why["outside.gltf"]
    assert "KHR_draco_mesh_compression" in why["squeezed.gltf"]
    assert not crumb.exists()
    assert "good" not in str(summary)
    assert "  nan.npy: point 17 is not finite" in str(summary).splitlines()


def test_the_pickles_would_have_gone_off(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "unpickled")))
    assert (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("name", ["../evil.obj", "/evil.obj", "a/../../evil.obj", "..\\evil.obj", "C:\\evil.obj"])
def test_archive_entries_that_lead_out(tmp_path: Path, name: str) -> None:
    source = tmp_path / "deep" / "in"
    source.mkdir(parents=True)
    zipped(source / "a.zip", {name: obj_bytes(box()), "fine.obj": obj_bytes(box())})
    before = set(tmp_path.rglob("*"))
    summary, index = run(source, tmp_path / "out")
    assert [row["id"] for row in index["objects"]] == ["fine"]
    seen = name.replace("\\", "/")
    assert reasons(summary) == {f"a.zip/{seen}": "refused, its name leads out of the archive"}
    made = set(tmp_path.rglob("*")) - before
    assert {path.name for path in made if path.is_file()} == {"fine.npy", "index.json"}
    assert all(path.is_relative_to(tmp_path / "out") for path in made)


def test_archive_bombs(tmp_path: Path) -> None:
    """Entries that declare 3 GiB, one a shape, one an archive, one inside a .npz; and archives four deep."""

    def inflate(data: bytes, name: str) -> bytes:
        at = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02"))
        while data[at + 46 : at + 46 + len(name)] != name.encode():
            at = data.index(b"PK\x01\x02", at + 1)
        return data[: at + 24] + struct.pack("<I", 3 * 2**30) + data[at + 28 :]

    def nest(depth: int) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(f"fine{depth}.xyz", "1 2 3")
            if depth:
                archive.writestr("next.zip", nest(depth - 1))
        return buffer.getvalue()

    source = tmp_path / "in"
    zipped(tmp_path / "a.zip", {"big.xyz": "1 2 3", "big.zip": b"PK", "small.xyz": "1 2 3"})
    write(source / "a.zip", inflate(inflate((tmp_path / "a.zip").read_bytes(), "big.xyz"), "big.zip"))
    zipped(tmp_path / "c.npz", {"points.npy": b"x"})
    write(source / "a" / "c.npz", inflate((tmp_path / "c.npz").read_bytes(), "points.npy"))
    write(source / "b.zip", nest(3))
    summary, index = run(source, tmp_path / "out")
    assert {row["id"] for row in index["objects"]} == {"small", "fine3", "next-fine2"}
    why = reasons(summary)
    assert set(why) == {"a.zip/big.xyz", "a.zip/big.zip", "a/c.npz", "b.zip/next.zip/next.zip"}
    for path in ("a.zip/big.xyz", "a.zip/big.zip", "a/c.npz"):
        assert "declares 3.0 GiB" in why[path]
    assert "2 deep" in why["b.zip/next.zip/next.zip"]


def test_links_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path / "in" / "k" / "a.xyz", "1 2 3\n")
    (tmp_path / "in" / "k" / "back").symlink_to(tmp_path / "in")
    _, index = run(tmp_path / "in", tmp_path / "out")
    assert [row["path"] for row in index["objects"]] == ["k/a.xyz"]


# What is left on disk


def message(source: Path, out: Path) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        run(source, out)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_refusals(tmp_path: Path) -> None:
    good = write(tmp_path / "good" / "a.xyz", "1 2 3\n").parent
    (tmp_path / "empty").mkdir()
    write(tmp_path / "bad" / "a.xyz", "nan 0 0\n")
    write(tmp_path / "broken.zip", "x")
    write(tmp_path / "full" / "file", "")
    assert message(tmp_path / "none", tmp_path / "out") == f"source: {tmp_path / 'none'} does not exist"
    assert "no shapes in" in message(tmp_path / "empty", tmp_path / "out")
    assert "expected a folder" in message(good / "a.xyz", tmp_path / "out")
    assert "a.xyz: point 0 is not finite" in message(tmp_path / "bad", tmp_path / "out")
    assert "broken.zip: archive cannot be read" in message(tmp_path / "broken.zip", tmp_path / "out")
    assert "exists and is not an empty folder" in message(good, tmp_path / "full")
    assert "exists and is not an empty folder" in message(good, tmp_path / "full" / "file")
    assert {path.name for path in tmp_path.iterdir()} == {"good", "empty", "bad", "broken.zip", "full"}
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


def test_an_empty_folder_may_exist(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.xyz", "1 2 3\n")
    (tmp_path / "out").mkdir()
    run(tmp_path / "in", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


@pytest.mark.parametrize("count", [4, 40], ids=["serial", "workers"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    for i in range(count):
        write(tmp_path / "in" / f"{i}.xyz", "1 2 3\n")
    (tmp_path / "disk").mkdir()
    plain, written = Path.write_bytes, []

    def write_bytes(path: Path, data: Any) -> int:
        written.append(path)
        if len(written) == 3:
            plain(path, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return plain(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    text = message(tmp_path / "in", tmp_path / "disk" / "out")
    assert text == f"out: no space left on disk for {tmp_path / 'disk' / 'out'}; nothing was kept"
    assert written[0].exists() is False
    assert f"out.partial-{os.getpid()}" in written[0].parts
    assert not list((tmp_path / "disk").iterdir())


def test_workers_leave_ctrl_c_to_the_main_process() -> None:
    with prepare_module._workers() as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN


@pytest.mark.parametrize("options", [{"points": 0}, {"val": 0.6, "test": 0.5}, {"val": -0.1}, {"test": np.nan}])
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}.*: expected"):
        PrepareConfig(Path("in"), Path("out"), **options)


def test_command_line(tmp_path: Path) -> None:
    write(tmp_path / "in" / "boxes" / "a.obj", obj_bytes(box()))
    command = ["-m", "lion_triton.prepare", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    done = fresh.python(*command, "--points", "7", "--test", "0")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["category", "train", "val", "test", "total"]
    assert lines[1].split() == ["boxes", "1", "0", "0", "1"]
    assert f"in {tmp_path / 'out'}: objects 1, failures 0" in lines
    assert np.load(tmp_path / "out" / "boxes" / "train" / "a.npy").shape == (7, 3)
    again = fresh.python(*command)
    assert again.returncode == 2
    assert again.stderr == f"error: out: {tmp_path / 'out'} exists and is not an empty folder\n"
