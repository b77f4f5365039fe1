"""Every form that files of shapes have, read right or refused by name; made by hand, their surfaces known."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from lion_triton.data.containers import Container
from lion_triton.data.meshes import read_parts, read_shape
from lion_triton.data.shape import Shape
from tests.data_sets import samples
from tests.soak import hostile_files

ROWS = "0.5 1.25 2\n3.5 4.25 5\n6.5 7.25 8\n"
POINTS = np.array([[0.5, 1.25, 2], [3.5, 4.25, 5], [6.5, 7.25, 8]])


def read(tmp_path: Path, name: str, data: bytes | str) -> Shape:
    (tmp_path / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return read_shape(Container(tmp_path), name)


def refusal(tmp_path: Path, name: str, data: bytes | str) -> str:
    with pytest.raises(ValueError, match=r"\A[^\n]{1,300}\Z") as error:
        read(tmp_path, name, data)
    return str(error.value)


def check_samples(shape: Shape) -> None:
    """The shape is that of `samples`."""
    sides = shape.coordinates[:, 1:] - shape.coordinates[:, :1]
    areas = np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1) / 2
    part = np.digitize(shape.coordinates[..., 0].mean(axis=1), [1.5, 3.5])
    np.testing.assert_allclose(np.bincount(part, areas, minlength=3), samples.AREAS, rtol=1e-6)
    for number, face in enumerate(samples.FACES):
        found = np.unique(shape.coordinates[part == number].reshape(-1, 3), axis=0)
        np.testing.assert_allclose(found, np.unique(samples.VERTICES[face], axis=0), atol=1e-6)
    assert shape.crossing_faces == 0


# Polygons


def star(points: int) -> list[tuple[float, float]]:
    turns = np.arange(2 * points) * np.pi / points
    return [(r * np.cos(t), r * np.sin(t)) for r, t in zip([3.0, 1.1] * points, turns, strict=True)]


FAR_HOLE = [(5, 1), (5, 3), (7, 3), (7, 1), (5, 1)]
POLYGONS = {
    "arrow": [(0.0, 0.0), (4.0, 2.0), (0.0, 4.0), (1.0, 2.0)],
    "comb": [(0, 0), (9, 0), (9, 5), (8, 5), (8, 1), (5, 1), (5, 5), (4, 5), (4, 1), (1, 1), (1, 5), (0, 5)],
    "star": star(7),
    "spiral": [(0, 0), (6, 0), (6, 6), (1, 6), (1, 2), (4, 2), (4, 4), (3, 4), (3, 3), (2, 3), (2, 5), (5, 5), (5, 1)],
    "window": [(0, 0), (8, 0), (8, 8), (0, 8), (0, 0), (1, 1), (1, 7), (7, 7), (7, 1), (1, 1)],
    "two holes": [(0, 0), (9, 0), (9, 5), (0, 5), (0, 0), (1, 1), (1, 3), (3, 3), (3, 1), (1, 1), (0, 0), *FAR_HOLE],
    "slit between": [(0, 0), (5, 0), (5, 2), (3, 2), (3, 4), (7, 4), (7, 2), (5, 2), (5, 0), (9, 0), (9, 6), (0, 6)],
}


def winding(outline: np.ndarray, points: np.ndarray) -> np.ndarray:
    """How often the outline goes around each point: the sum of the angles that its edges are seen under."""
    one = outline[None] - points[:, None]
    other = np.roll(outline, -1, axis=0)[None] - points[:, None]
    turns = np.arctan2(one[..., 0] * other[..., 1] - one[..., 1] * other[..., 0], (one * other).sum(axis=-1))
    return np.rint(turns.sum(axis=1) / (2 * np.pi))


@pytest.mark.parametrize("name", POLYGONS)
@pytest.mark.parametrize("suffix", ["obj", "off", "ply"])
def test_points_lie_inside_the_polygon_whatever_corner_comes_first(tmp_path: Path, name: str, suffix: str) -> None:
    outline = np.array(POLYGONS[name], dtype=np.float64)
    turn = Rotation.from_euler("xyz", [0.3, -1.1, 2.0]).as_matrix()
    x, y = outline.T
    area = abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2
    for start in range(len(outline)):
        ring = np.roll(outline[:: 1 if start % 2 else -1], start, axis=0)
        corners = np.pad(ring, ((0, 0), (0, 1))) @ turn.T + [5, 6, 7]
        rows = "".join("{:.9f} {:.9f} {:.9f}\n".format(*corner) for corner in corners)
        n, order = len(ring), " ".join(map(str, range(len(ring))))
        data = {
            "obj": "".join(f"v {row}\n" for row in rows.splitlines())
            + "f"
            + "".join(f" {i - n}" for i in range(n))
            + "\n",
            "off": f"OFF\n{n} 1 0\n{rows}{n} {order}\n",
            "ply": f"ply\nformat ascii 1.0\nelement vertex {n}\nproperty float x\nproperty float y\nproperty float z\n"
            f"element face 1\nproperty list uchar int vertex_index\nend_header\n{rows}{n} {order}\n",
        }[suffix]
        shape = read(tmp_path, f"a.{suffix}", data)
        assert shape.crossing_faces == 0
        sides = shape.coordinates[:, 1:] - shape.coordinates[:, :1]
        assert np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1).sum() / 2 == pytest.approx(area, rel=1e-6)
        points = (shape.sample(1000, seed=start).astype(np.float64) - [5, 6, 7]) @ turn
        assert np.abs(points[:, 2]).max() < 1e-5
        # Points on the outline, to within float32, may fall on either side of it.
        near = [
            winding(outline, points[:, :2] + shift) for shift in np.array([(1, 1), (1, -1), (-1, 1), (-1, -1)]) * 1e-5
        ]
        assert (np.array(near) != 0).any(axis=0).all()


def test_a_face_that_crosses_itself_is_counted_and_stays_within_its_outline(tmp_path: Path) -> None:
    bow = "v 0 0 0\nv 1 1 0\nv 1 0 0\nv 0 1 0\nv 5 5 0\nv 6 5 0\nv 5 6 0\nf 1 2 3 4\nf 5 6 7\n"
    shape = read(tmp_path, "a.obj", bow)
    assert shape.crossing_faces == 1
    points = shape.sample(3000, seed=0)
    points = points[points[:, 0] < 2]
    x, y = points[:, 0] - 0.5, points[:, 1] - 0.5
    assert (np.abs(y) <= np.abs(x) + 1e-6).all()
    assert len(points) == pytest.approx(1500, abs=120)  # area 1/2, as the triangle's


def test_a_bent_quad_keeps_its_corners(tmp_path: Path) -> None:
    shape = read(tmp_path, "a.obj", "v 0 0 0\nv 1 0 0\nv 1 1 1\nv 0 1 0\nf 1 2 3 4\n")
    assert {tuple(corner) for corner in shape.coordinates.reshape(-1, 3)} == {
        (0, 0, 0),
        (1, 0, 0),
        (1, 1, 1),
        (0, 1, 0),
    }


# Formats of meshes


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_obj_text(tmp_path: Path, encoding: str, end: str) -> None:
    # A next-line character in a name, as Latin-1 has it in UTF-8's second bytes, ends no line.
    text = samples.obj().decode() + "o \u00c5\x0bf 1 1 2\np 1 2\nl 1 2 3\n"
    text = text.replace("f 5/1 6/1", "f 5/1 \\\n6/1")
    check_samples(read(tmp_path, "a.obj", text.replace("\n", end).encode(encoding)))


def test_obj_of_vertices_alone_is_a_cloud(tmp_path: Path) -> None:
    shape = read(tmp_path, "a.obj", "v 0 0 0 1 0 0\nv 1 2 3\np 1 2\n")
    np.testing.assert_array_equal(shape.coordinates, [[0, 0, 0], [1, 2, 3]])
    assert refusal(tmp_path, "a.obj", "v 0 0 0\nv 1 2 3\nl 1 2\n") == "holds lines, no faces"


def test_obj_that_is_not_made_of_polygons(tmp_path: Path) -> None:
    text = samples.obj().decode()
    assert "free-form surfaces" in refusal(tmp_path, "a.obj", text + "cstype bezier\nsurf 0 1 0 1 1 2 3 4\n")
    assert refusal(tmp_path, "a.obj", text + "f 1 2 x\n") == "a face's vertex: expected a whole number, got 'x'"
    assert refusal(tmp_path, "a.obj", "v 0 0\nf 1 1 1\n") == "vertex 0 has 2 coordinates, not 3"
    assert refusal(tmp_path, "a.obj", "v 0,5 0 0\n") == "a vertex: expected a number, got '0,5'"


@pytest.mark.parametrize("header", [b"OFF", b"COFF", b"OFF #", b"STOFF"])
def test_off_headers(tmp_path: Path, header: bytes) -> None:
    check_samples(read(tmp_path, "a.off", samples.off(header)))


def test_off_variants(tmp_path: Path) -> None:
    data = samples.off()
    check_samples(read(tmp_path, "a.off", data.replace(b"OFF\n# made by hand\n12", b"OFF12")))  # as in ModelNet
    check_samples(read(tmp_path, "a.off", data.replace(b"12 3 0", b"\n  12 3").replace(b"\n", b"\r\n")))
    assert "not read" in refusal(tmp_path, "a.off", data.replace(b"OFF", b"OFF BINARY"))
    assert "not read" in refusal(tmp_path, "a.off", data.replace(b"OFF", b"4OFF"))
    assert "promises 12 vertices and 99 faces" in refusal(tmp_path, "a.off", data.replace(b"12 3 0", b"12 99 0"))
    cloud = read(tmp_path, "a.off", f"OFF\n3 0 0\n{ROWS}")
    np.testing.assert_array_equal(cloud.coordinates, POINTS)


PLY_FORMS = ("ascii", "binary_little_endian", "binary_big_endian")


@pytest.mark.parametrize("form", PLY_FORMS)
@pytest.mark.parametrize("types", ["uchar int", "int uchar", "ushort uint", "char short", "uint8 float32"])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_ply_lists(tmp_path: Path, form: str, types: str, order: tuple[int, ...]) -> None:
    data = samples.ply(form, [samples.FACES[i] for i in order], *types.split())
    check_samples(read(tmp_path, "a.ply", data + b"\n\0 trailing"))


@pytest.mark.parametrize("form", PLY_FORMS)
@pytest.mark.parametrize("name", ["vertex_index", "vertex_indexes", "vertices", "corners"])
def test_ply_names_of_the_index_list(tmp_path: Path, form: str, name: str) -> None:
    check_samples(read(tmp_path, "a.ply", samples.ply(form, name=name)))


@pytest.mark.parametrize("form", PLY_FORMS)
def test_ply_that_is_cut_or_holds_other_faces(tmp_path: Path, form: str) -> None:
    data = samples.ply(form)
    for cut in (data[:-1], data[:-40]):
        if form != "ascii" or cut == data[:-40]:
            assert refusal(tmp_path, "a.ply", cut)
    quads = samples.ply(form, [[0, 1, 2, 3]])
    assert "quads" in refusal(tmp_path, "a.ply", quads.replace(b"element face", b"element quads"))
    assert "not clear" in refusal(tmp_path, "a.ply", samples.ply(form, index="float", name="corners"))
    assert "vertex" in refusal(tmp_path, "a.ply", quads.replace(b"element vertex 12", b"element vertex 2147483648"))
    assert "no element vertex" in refusal(tmp_path, "a.ply", quads.replace(b"property double z", b"property double w"))
    assert "not understood" in refusal(tmp_path, "a.ply", quads.replace(b"property double z", b"property half z"))
    head = quads[: quads.index(b"element note")].replace(b"vertex 12", b"vertex 0")
    assert refusal(tmp_path, "a.ply", head + b"end_header\n") == "no points"


def test_ply_strips_and_line_ends(tmp_path: Path) -> None:
    for form in PLY_FORMS[:2]:
        check_samples(read(tmp_path, "a.ply", samples.ply_strips(form)))
    check_samples(read(tmp_path, "a.ply", samples.ply("ascii").replace(b"\n", b"\r")))
    head, end, body = samples.ply("binary_big_endian").partition(b"end_header\n")
    for line_end in (b"\r\n", b"\r"):
        check_samples(read(tmp_path, "a.ply", (head + end).replace(b"\n", line_end) + body))


def test_ply_list_of_2_to_the_31_entries(tmp_path: Path) -> None:
    data = samples.ply("binary_little_endian", count="uint")
    at = data.index(struct.pack("<I4i", 4, 0, 1, 2, 3))
    assert "than it says" in refusal(tmp_path, "a.ply", data[:at] + struct.pack("<I", 2**31) + data[at + 4 :])


def test_stl_variants(tmp_path: Path) -> None:
    text, binary = samples.stl_text(), samples.stl_binary()
    for data in (
        text,
        text.upper(),
        b"\xef\xbb\xbf" + text.replace(b"\n", b"\r"),
        samples.stl_text("vertex 1 2 3 facet endsolid"),
        samples.stl_text(end="end solid"),
        text[: text.index(b"endsolid")],
        text.replace(b"endloop", b"end loop"),
        binary,
        samples.stl_binary(b"solid of a binary file"),
        samples.stl_binary(b"solid") + b"\r\n",
        binary + b"\0" * 120,
    ):
        check_samples(read(tmp_path, "a.stl", data))
    half = text.replace(b"solid by hand", b"solid two", 1)
    assert len(read(tmp_path, "a.stl", text + half).coordinates) == 2 * len(samples.TRIANGLES)


def test_stl_that_is_cut(tmp_path: Path) -> None:
    text, binary = samples.stl_text(), samples.stl_binary()
    assert refusal(tmp_path, "a.stl", binary[:-70]) == "is cut short: promises 6 triangles, holds 4"
    assert refusal(tmp_path, "a.stl", binary[:60]).startswith("is cut short")
    assert refusal(tmp_path, "a.stl", text[: text.rindex(b"vertex")]).startswith("is cut short: facet 5 has 2 corners")
    assert refusal(tmp_path, "a.stl", text[: text.rindex(b"vertex") + 9]).startswith("is cut short")
    nothing = binary[:80] + bytes(4) + binary[84:]
    assert "promises no triangles" in refusal(tmp_path, "a.stl", nothing)


# glTF


@pytest.mark.parametrize("suffix", ["gltf", "glb"])
def test_gltf_strips_skins_morphs_and_cameras(tmp_path: Path, suffix: str) -> None:
    check_samples(read(tmp_path, f"a.{suffix}", getattr(samples, suffix)()))


def triangles(made: samples.Gltf, position: int, node: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A scene of the sample's triangles, whose corners are the accessor `position`."""
    corners = made.accessor(np.array(samples.TRIANGLES, "<u2").reshape(-1))
    primitive = {"attributes": {"POSITION": position}, "indices": corners} | more.pop("primitive", {})
    return {"nodes": [{"mesh": 0} | (node or {})], "meshes": [{"primitives": [primitive]}]} | more


@pytest.mark.parametrize("form", ["i1", "u1", "<i2", "<u2"])
def test_gltf_normalised_integers(tmp_path: Path, form: str) -> None:
    made = samples.Gltf()
    largest = np.iinfo(form).max
    steps = 5 if largest < 1000 else 1000  # per unit; half a unit off, so that no corner is rounded
    quantised = np.zeros((12, 4), form)
    quantised[:, :3] = np.round(samples.VERTICES * 2 * steps)
    position = made.accessor(quantised, normalized=True, type="VEC3")
    made.content["bufferViews"][-1]["byteStride"] = quantised.itemsize * 4  # padded to four bytes, as it must be
    scene = triangles(made, position, extensionsRequired=["KHR_mesh_quantization"])
    scene["nodes"][0]["scale"] = [largest / 2 / steps] * 3
    check_samples(read(tmp_path, "a.gltf", made.text(**scene)))
    made.content["accessors"][position]["normalized"] = False
    scene["nodes"][0]["scale"] = [1 / 2 / steps] * 3
    check_samples(read(tmp_path, "a.gltf", made.text(**scene)))


def test_gltf_sparse_accessors(tmp_path: Path) -> None:
    for base in (samples.VERTICES + np.array([0, 0, 3]), None):
        made = samples.Gltf()
        position = made.accessor((samples.VERTICES if base is None else base).astype("<f4"))
        if base is None:
            del made.content["accessors"][position]["bufferView"]
        made.content["accessors"][position]["sparse"] = {
            "count": 11,
            "indices": {"bufferView": made.view(np.arange(1, 12).astype("u1")), "componentType": 5121},
            "values": {"bufferView": made.view(samples.VERTICES[1:].astype("<f4"))},
        }
        shape = read(tmp_path, "a.gltf", made.text(**triangles(made, position)))
        if base is None:
            check_samples(shape)
        else:
            assert {tuple(c) for c in shape.coordinates.reshape(-1, 3) if c[2]} == {(0, 0, 3)}


@pytest.mark.parametrize(
    ("mode", "order"), [(4, [0, 1, 2, 0, 2, 3]), (5, [0, 1, 3, 2]), (6, [0, 1, 2, 3])], ids=["list", "strip", "fan"]
)
@pytest.mark.parametrize("indexed", [True, False])
def test_gltf_modes(tmp_path: Path, mode: int, order: list[int], indexed: bool) -> None:
    made = samples.Gltf()
    corners = samples.VERTICES[:4] if indexed else samples.VERTICES[order]
    primitive: dict[str, Any] = {"attributes": {"POSITION": made.accessor(corners.astype("<f4"))}, "mode": mode}
    if indexed:
        primitive["indices"] = made.accessor(np.array(order, "<u4"))
    lines = {"attributes": {"POSITION": made.accessor((samples.VERTICES * 9).astype("<f4"))}, "mode": 1}
    shape = read(tmp_path, "a.gltf", made.text(nodes=[{"mesh": 0}], meshes=[{"primitives": [primitive, lines]}]))
    sides = shape.coordinates[:, 1:] - shape.coordinates[:, :1]
    assert np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1).sum() / 2 == pytest.approx(1)
    assert shape.box()[1].tolist() == [1, 1, 0]


def test_gltf_instances_and_hidden_nodes(tmp_path: Path) -> None:
    made = samples.Gltf()
    position = made.accessor(samples.VERTICES.astype("<f4"))
    moves = np.array([[0, 0, 0], [0, 0, 5]], "<f4")
    turns = np.array([[0, 0, 0, 1], [0, 0, 1, 0]], "<f4")
    attributes = {"TRANSLATION": made.accessor(moves), "ROTATION": made.accessor(turns)}
    node = {"extensions": {"EXT_mesh_gpu_instancing": {"attributes": attributes}}}
    scene = triangles(made, position, node, extensionsRequired=["EXT_mesh_gpu_instancing"])
    hidden = {"mesh": 0, "translation": [0, 0, 77], "extensions": {"KHR_node_visibility": {"visible": False}}}
    scene["nodes"].append(hidden)
    shape = read(tmp_path, "a.gltf", made.text(**scene))
    near, far = shape.coordinates[: len(samples.TRIANGLES)], shape.coordinates[len(samples.TRIANGLES) :]
    check_samples(Shape(near))
    check_samples(Shape(far * [-1, -1, 1] - [0, 0, 5]))  # half a turn around z, then up


def test_gltf_refusals(tmp_path: Path) -> None:
    made = samples.Gltf()
    scene = triangles(made, made.accessor(samples.VERTICES.astype("<f4")))
    good = made.text(**scene)
    check_samples(read(tmp_path, "a.gltf", good))
    for changes, reason in (
        ({"extensionsRequired": ["KHR_draco_mesh_compression"]}, "KHR_draco_mesh_compression is required"),
        ({"extensionsRequired": ["ACME_bends_space"]}, "ACME_bends_space is required"),
        ({"asset": {"version": "1.0"}}, "glTF 1.0 is not read"),
        ({"asset": {}}, "glTF 1.0 is not read"),
        ({"nodes": [{"mesh": 0, "children": [0]}], "scenes": [{"nodes": [0]}]}, "in more than one place"),
        ({"nodes": [{"children": [1, 2]}, {"children": [2]}, {"mesh": 0}]}, "in more than one place"),
        ({"nodes": [{"mesh": -1}]}, "refers to number -1 of 1 meshes"),
        ({"nodes": 7}, "not valid glTF"),
        ({"accessors": [{"componentType": 5126, "count": 2**31, "type": "VEC3"}] * 2}, "that no buffer holds"),
        ({"accessors": [made.content["accessors"][0] | {"count": 13}, made.content["accessors"][1]]}, "ends before"),
    ):
        assert reason in refusal(tmp_path, "a.gltf", made.text(**scene | changes)), changes
    assert "byte order mark" in refusal(tmp_path, "a.gltf", b"\xef\xbb\xbf" + good)
    assert "byte order mark" in refusal(tmp_path, "a.gltf", good.decode().encode("utf-16"))
    binary = made.binary(**scene)
    assert "glTF 1 is not read" in refusal(tmp_path, "a.glb", binary[:4] + struct.pack("<I", 1) + binary[8:])
    assert "is cut short" in refusal(tmp_path, "a.glb", binary[:-9])
    assert "is cut short" in refusal(tmp_path, "a.glb", binary[:8] + struct.pack("<I", 2**31) + binary[12:])
    harmless = {"extensionsRequired": ["KHR_materials_unlit", "KHR_texture_transform", "EXT_texture_webp"]}
    check_samples(read(tmp_path, "a.gltf", made.text(**scene | harmless)))


def test_gltf_compressed_beside_a_plain_copy(tmp_path: Path) -> None:
    made = samples.Gltf()
    position = made.accessor(samples.VERTICES.astype("<f4"))
    extension = {"extensions": {"KHR_draco_mesh_compression": {"bufferView": 0, "attributes": {"POSITION": 0}}}}
    scene = triangles(made, position, primitive=extension, extensionsUsed=["KHR_draco_mesh_compression"])
    check_samples(read(tmp_path, "a.gltf", made.text(**scene)))
    del made.content["accessors"][position]["bufferView"]
    assert "KHR_draco_mesh_compression" in refusal(tmp_path, "a.gltf", made.text(**scene))


def test_gltf_that_multiplies(tmp_path: Path) -> None:
    made = samples.Gltf()
    scene = triangles(made, made.accessor(samples.VERTICES.astype("<f4")))
    scene["meshes"][0]["primitives"] *= 1000
    scene["nodes"] *= 1000
    assert "50000 parts" in refusal(tmp_path, "a.gltf", made.text(**scene))


# Clouds


@pytest.mark.parametrize(
    "text",
    [
        ROWS,
        ROWS.replace(" ", "\t"),
        ROWS.replace(" ", ";"),
        ROWS.replace(" ", ","),
        ROWS.replace(" ", " , "),
        ROWS.replace("\n", " \r\n"),
        ROWS.replace(" ", ";").replace("\n", ";\n"),
        f"3\n{ROWS}",
        f"2\n{ROWS[:22]}1\n{ROWS[22:]}",
        f"//X Y Z\n{ROWS}",
        f"# made by hand, 3 points\n\n{ROWS}\n# end\n",
        f"Scan of a chair\nX Y Z\n{ROWS}",
        f"\ufeff{ROWS}",
        "x,y,z\n" + ROWS.replace(" ", ","),
        '"label","Z (m)","X (m)","Y (m)"\n"1","2","0.5","1.25"\n2,5,3.5,4.25\n3,8,6.5,7.25\n',
        "# nx ny nz x y z\n9 9 9 0.5 1.25 2\n9 9 9 3.5 4.25 5\n9 9 9 6.5 7.25 8\n",
        ",Points:0,Points:1,Points:2\n0,0.5,1.25,2\n1,3.5,4.25,5\n2,6.5,7.25,8\n",
        ROWS.replace("\n", " 255 0 0 # red\n"),
        ROWS.replace("\n", " 18\x005 0 0\n"),
    ],
)
@pytest.mark.parametrize("suffix", ["xyz", "csv"])
def test_text_clouds(tmp_path: Path, text: str, suffix: str) -> None:
    np.testing.assert_array_equal(read(tmp_path, f"a.{suffix}", text).coordinates, POINTS)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (ROWS.replace(".", ","), "decimal commas"),
        (ROWS.replace(".", ",").replace(" ", "\t"), "decimal commas"),
        (ROWS.replace(".", ",").replace(" ", ";"), "decimal commas"),
        ('"0,5","1,25","2"\n', "decimal commas"),
        ("1 2 3\n0,5 1 2\n", "expected a number, got '0,5'"),
        (f"4\n{ROWS}", "promises 4 rows and holds 3"),
        (f"{ROWS}1 2\n", "row 3 has 2 columns, row 0 has 3"),
        ("a,b,c\n1,2,3\n", "which of its columns are x, y and z is not clear: a, b, c"),
        ("3\nwater\nO 0 0 0\nH 0 0 1\nH 0 1 0\n", "holds no rows of numbers"),
        (f"{ROWS}end of scan\n", "row 3 is no row of numbers: 'end of scan'"),
        (ROWS.replace("4.25", "4.\x1625"), "expected a number, got '4.\\x1625'"),
        ("1 2\n3 4\n", "expected at least 3 columns, got 2"),
    ],
)
def test_text_clouds_that_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    assert reason in refusal(tmp_path, "a.txt", text)


PCD = "# .PCD v.7\nVERSION .7\nFIELDS normal_x z y x\nSIZE 4 8 4 4\nTYPE F F F F\nCOUNT 2 1 1 1\nWIDTH {0}\nHEIGHT 1\n"
PCD += "VIEWPOINT 0 0 0 1 0 0 0\nPOINTS {0}\nDATA {1}\n"


def test_pcd(tmp_path: Path) -> None:
    layout = np.dtype([("n", "<f4", 2), ("z", "<f8"), ("y", "<f4"), ("x", "<f4")])
    table = np.zeros(4, layout)
    for axis, column in zip("xyz", POINTS.T, strict=True):
        table[axis] = [*column, np.nan]
    rows = "".join(f"0 0 {z} {y} {x}\n" for x, y, z in POINTS) + "0 0 nan nan nan\n"
    for form, body in (("ascii", rows.encode()), ("binary", table.tobytes())):
        data = PCD.format(4, form).encode() + body
        np.testing.assert_array_equal(read(tmp_path, "a.pcd", data).coordinates, POINTS)
        assert refusal(tmp_path, "a.pcd", PCD.format(5, form).encode() + body) == "promises 5 points and holds 4"
        assert "promises 2147483648 points" in refusal(tmp_path, "a.pcd", PCD.format(2**31, form).encode() + body)
        assert "no fields x, y, z" in refusal(tmp_path, "a.pcd", data.replace(b" y x", b" v u"))
    assert "binary_compressed is not read" in refusal(tmp_path, "a.pcd", PCD.format(4, "binary_compressed"))


def npz(**arrays: Any) -> bytes:
    return hostile_files.npz(**arrays)


def test_npz(tmp_path: Path) -> None:
    for name in ("points", "pc", "pointcloud", "xyz"):
        shape = read(tmp_path, "a.npz", npz(**{name: POINTS, "normals": POINTS + 1, "label": 3}))
        np.testing.assert_array_equal(shape.coordinates, POINTS)
    assert refusal(tmp_path, "a.npz", npz(points=POINTS, occupancies=np.ones(3))).startswith("holds occupancies")
    assert refusal(tmp_path, "a.npz", npz(points=POINTS, sdf=np.ones(3))).startswith("holds sdf")
    assert refusal(tmp_path, "a.npz", npz(pos=POINTS, neg=POINTS)).endswith("got pos, neg")
    assert refusal(tmp_path, "a.npz", npz(points=POINTS, xyz=POINTS)).endswith("got points, xyz")
    bomb = npz(points=np.zeros((10**6, 3)))
    assert len(bomb) * 100 < 24 * 10**6
    assert "would grow to more than 100 times" in refusal(tmp_path, "a.npz", bomb)


def test_npy_that_promises_more_than_it_holds(tmp_path: Path) -> None:
    def changed(shape: str) -> bytes:
        return hostile_files.npy(POINTS).replace(b"(3, 3), }" + b" " * 20, f"{shape}, }}".encode().ljust(29))

    np.testing.assert_array_equal(read(tmp_path, "a.npy", changed("(2, 3)")).coordinates, POINTS[:2])
    for shape in ("(9, 3)", f"({2**31}, 3)", f"({2**62}, 3)", "(-1, 3)"):
        assert "promises" in refusal(tmp_path, "a.npy", changed(shape))
    columns = hostile_files.npy(np.asfortranarray(POINTS))
    np.testing.assert_array_equal(read(tmp_path, "a.npy", columns).coordinates, POINTS)
    assert "uint8" in refusal(tmp_path, "a.npy", hostile_files.npy(np.zeros((4, 5, 3), np.uint8)))  # an image
    assert "(16, 16, 16)" in refusal(tmp_path, "a.npy", hostile_files.npy(np.zeros((16, 16, 16))))  # a grid


def hdf5(path: Path, **arrays: Any) -> bytes:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path.read_bytes()


def test_hdf5_that_is_refused(tmp_path: Path) -> None:
    clouds = np.random.default_rng(0).normal(size=(4, 5, 3))
    path = tmp_path / "made.h5"
    assert refusal(tmp_path, "a.h5", hdf5(path, label=[1])).endswith("got label")
    assert "label: expected 4" in refusal(tmp_path, "a.h5", hdf5(path, data=clouds, label=[1]))
    assert "of shape (4, 5, 2)" in refusal(tmp_path, "a.h5", hdf5(path, data=clouds[..., :2]))
    assert "refers to other files" in refusal(tmp_path, "a.h5", hdf5(path, data=h5py.ExternalLink("/etc/passwd", "x")))
    with h5py.File(path, "w") as file:
        file.create_dataset("data", (2, 2, 3), "u1", external=[("/etc/passwd", 0, 12)])
    assert "another file" in refusal(tmp_path, "a.h5", path.read_bytes())
    with h5py.File(path, "w") as file:
        file.create_dataset("data", (2**20, 2**11, 3), "f4", chunks=(1, 2**11, 3))
    assert "times the file's size" in refusal(tmp_path, "a.h5", path.read_bytes())


def test_sets_are_read_shape_by_shape(tmp_path: Path) -> None:
    clouds = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    (tmp_path / "set.npy").write_bytes(hostile_files.npy(clouds))
    (tmp_path / "set.npz").write_bytes(npz(pc=clouds))
    hdf5(tmp_path / "set.h5", data=clouds, label=np.array([[1], [0], [1], [7]], np.uint8))
    for name in ("set.npy", "set.npz", "set.h5"):
        parts = list(read_parts(Container(tmp_path), name))
        np.testing.assert_array_equal([part.shape.coordinates for part in parts], clouds)
        assert [part.number for part in parts] == [0, 1, 2, 3]
        assert [part.category for part in parts] == (["1", "0", "1", "7"] if name == "set.h5" else [None] * 4)
    (tmp_path / "shape_names.txt").write_text("airplane\nbathtub\n")
    names = [part.category for part in read_parts(Container(tmp_path), "set.h5")]
    assert names == ["bathtub", "airplane", "bathtub", "7"]
    with pytest.raises(ValueError, match="holds a set of 4 shapes"):
        read_shape(Container(tmp_path), "set.npy")


# Hostile files


def test_damaged_files_are_read_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A small share of `make soak`, which says what the failures are."""
    assert hostile_files.main(["--count", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(hostile_files.good_files())
    for line in lines[1:]:
        tried, was_read, refused = map(int, line.split()[1:4])
        assert tried == was_read + refused == 20
        assert was_read > 0


def test_good_files_are_read_and_the_damage_is_the_same_every_time() -> None:
    for suffix, good in hostile_files.good_files().items():
        assert [hostile_files.damaged(suffix, i) for i in range(len(good))] == good
        again = [hostile_files.damaged(suffix, i) for i in range(20, 24)]
        assert again == [hostile_files.damaged(suffix, i) for i in range(20, 24)]
        assert len({*again}) > 1


def test_json_too_deep_or_numbers_too_long(tmp_path: Path) -> None:
    assert "JSON" in refusal(tmp_path, "a.gltf", b"[" * 10**6)
    assert refusal(tmp_path, "a.gltf", b'{"asset": {"version": "2.0"}, "scene": 1' + b"0" * 5000 + b"}")
