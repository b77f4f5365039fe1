from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from matplotlib.figure import Figure
from matplotlib.image import imread

from lion_triton import pictures
from lion_triton.pictures import CELL, HIGH, LABEL, LOW, TITLE, TOWARDS, draw_grid, grid, mesh_grid


def sphere(num_clouds: int, num_points: int, radius: float = 0.5) -> np.ndarray:
    points = np.random.default_rng(0).standard_normal((num_clouds, num_points, 3))
    return radius * points / np.linalg.norm(points, axis=-1, keepdims=True)


def read(path: Path) -> np.ndarray:
    """The picture's colours (H, W, 3) in [0, 1], top row first."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return imread(path)[..., :3]


def painted(cells: np.ndarray) -> np.ndarray:
    """Where a picture shows a ball: coloured, not the grey of a shadow."""
    return np.ptp(cells, axis=-1) > 0.05


def test_every_cell_label_and_title_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "table.png"
    rows: list[tuple[str, np.ndarray | torch.Tensor]] = [
        ("held-out", sphere(3, 256)),
        ("generated $x", torch.from_numpy(sphere(2, 100))),
    ]
    draw_grid(rows, path, titles=("a", r"not maths: $\b$", "c"))
    image = read(path)
    assert image.shape == (TITLE + 2 * CELL, LABEL + 3 * CELL, 3)
    for r, count in enumerate((3, 2)):
        row = image[TITLE + r * CELL : TITLE + (r + 1) * CELL]
        assert (row[:, :LABEL] < 0.7).any()
        for c in range(3):
            cell = row[:, LABEL + c * CELL : LABEL + (c + 1) * CELL]
            if c < count:
                assert 0.1 < painted(cell).mean() < 0.8
                assert not painted(cell)[[0, -1]].any()  # a margin all round
                assert not painted(cell)[:, [0, -1]].any()
            else:
                assert (cell == 1).all()
    for c in range(3):
        assert (image[:TITLE, LABEL + c * CELL : LABEL + (c + 1) * CELL] < 0.7).any()


def test_grid_fills_rows(tmp_path: Path) -> None:
    grid(sphere(5, 64), tmp_path / "grid.png", columns=3)
    image = read(tmp_path / "grid.png")
    assert image.shape == (2 * CELL, 3 * CELL, 3)
    ink = painted(image).reshape(2, CELL, 3, CELL).any((1, 3))
    np.testing.assert_array_equal(ink, [[True] * 3, [True, True, False]])


def test_one_scale_per_row(tmp_path: Path) -> None:
    small, large = sphere(1, 2048, 0.25), sphere(1, 2048, 0.5)
    draw_grid([("", np.concatenate((small, large))), ("", small)], tmp_path / "scale.png")
    image = painted(read(tmp_path / "scale.png"))
    left, right = slice(LABEL, LABEL + CELL), slice(LABEL + CELL, LABEL + 2 * CELL)
    cells = (image[:CELL, left], image[:CELL, right], image[CELL:, left])
    first, second, alone = (np.ptp(np.flatnonzero(cell.any(0))) for cell in cells)
    assert first / second == pytest.approx(0.5, abs=0.04)
    assert alone == pytest.approx(second, rel=0.03)


@pytest.mark.parametrize("num_points", [512, 4096])
def test_balls_close_the_surface(num_points: int, tmp_path: Path) -> None:
    grid(sphere(1, num_points), tmp_path / "ball.png")
    cell = painted(read(tmp_path / "ball.png"))
    rows, columns = np.flatnonzero(cell.any(1)), np.flatnonzero(cell.any(0))
    assert np.ptp(rows) == pytest.approx(np.ptp(columns), abs=8)
    y, x = np.mgrid[:CELL, :CELL]
    disc = np.hypot(y - rows.mean(), x - columns.mean()) < 0.45 * np.ptp(columns)
    # The circle through a point's 5th neighbour holds 5 points; a ball has 0.57 of its radius; two layers.
    assert cell[disc].mean() == pytest.approx(1 - np.exp(-2 * 0.57**2 * 5), abs=0.03)


def test_nearer_and_higher(tmp_path: Path) -> None:
    """Of two balls on one line of sight the nearer shows; it is the higher, and has the colour of height."""
    line = np.stack((TOWARDS, -TOWARDS))
    for name, cloud in (("in order", line), ("in reverse", line[::-1])):
        grid(cloud[None], tmp_path / f"{name}.png")
        image = read(tmp_path / f"{name}.png")
        y, x = (np.rint(part.mean()).astype(int) for part in np.nonzero(painted(image)))
        colour = image[y, x] / np.linalg.norm(image[y, x])
        assert colour @ HIGH / np.linalg.norm(HIGH) > 0.99 > colour @ LOW / np.linalg.norm(LOW)


def test_y_is_up_and_x_is_right(tmp_path: Path) -> None:
    for axis, image_axis, sign in ((1, 0, -1), (0, 1, 1)):
        cloud = np.zeros((1, 100, 3))
        cloud[0, :, axis] = np.linspace(0, 1, 100) ** 4  # crowded at the lower end
        cloud[0, 99, axis] = 1
        grid(cloud, tmp_path / "axis.png")
        ink = painted(read(tmp_path / "axis.png"))
        middle = np.flatnonzero(ink.any(1 - image_axis))
        crowd = np.nonzero(ink)[image_axis].mean()
        assert sign * (crowd - (middle[0] + middle[-1]) / 2) < -1


@pytest.mark.parametrize(
    "cloud", [np.zeros((1, 1, 3)), np.ones((1, 7, 3)), np.eye(3)[None]], ids=("one", "same", "three")
)
def test_degenerate_clouds_are_drawn(cloud: np.ndarray, tmp_path: Path) -> None:
    grid(cloud, tmp_path / "few.png")
    assert painted(read(tmp_path / "few.png")).any()


def test_a_stray_point_far_away_is_drawn(tmp_path: Path) -> None:
    cloud = sphere(1, 100)
    cloud[0, 0] = 1e9 * TOWARDS
    grid(cloud, tmp_path / "stray.png")
    assert painted(read(tmp_path / "stray.png")).any()


def test_same_input_same_file(tmp_path: Path) -> None:
    cloud = sphere(2, 300).astype(np.float32)
    grid(cloud, tmp_path / "a.png")
    grid(torch.from_numpy(cloud).requires_grad_(), tmp_path / "new folder" / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "new folder" / "b.png").read_bytes()


def test_the_file_is_whole_or_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    path.write_text("before")

    def fail(self: Figure, target: Path, **_: object) -> None:
        Path(target).write_text("half a pict")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(pictures.Figure, "savefig", fail)
        with pytest.raises(OSError, match="disk full"):
            grid(sphere(1, 16), path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    with path.open() as reader:  # someone who looks at the old file while it is replaced
        grid(sphere(1, 16), path)
        assert reader.read() == "before"
    assert list(tmp_path.iterdir()) == [path]
    assert read(path).shape == (CELL, CELL, 3)


def broken(value: float) -> np.ndarray:
    clouds = sphere(4, 16)
    clouds[2, 3, 1] = value
    return clouds


def test_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "never.png"
    with pytest.raises(ValueError, match=r"^rows: expected at least one row, got none$"):
        draw_grid([], path)
    with pytest.raises(ValueError, match=r"^titles: expected one per column \(4\), got 2$"):
        draw_grid([("a", sphere(4, 16))], path, titles=("x", "y"))
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match=r"^rows\[1\] \('b'\): expected finite .* in cloud 2$"):
            draw_grid([("a", sphere(4, 16)), ("b", broken(value))], path)
    assert not path.exists()


def test_bad_clouds(tmp_path: Path) -> None:
    path = tmp_path / "never.png"
    with pytest.raises(ValueError, match=r"^clouds: expected shape \(K, N, 3\) with K, N >= 1, got \(16, 3\)$"):
        grid(sphere(1, 16)[0], path)
    with pytest.raises(ValueError, match=r"^clouds: expected shape \(K, N, 3\) with K, N >= 1, got \(0, 16, 3\)$"):
        grid(sphere(4, 16)[:0], path)
    with pytest.raises(ValueError, match=r"^clouds: expected finite coordinates, got NaN or infinity in cloud 2$"):
        grid(torch.from_numpy(broken(np.nan)), path)
    with pytest.raises(ValueError, match=r"^columns: expected an integer >= 1, got 0$"):
        grid(sphere(1, 16), path, columns=0)
    assert not path.exists()


def test_meshes_are_drawn_at_one_scale_and_balls_are_discs(tmp_path: Path) -> None:
    ball = trimesh.creation.icosphere(3, 0.5)
    small = trimesh.creation.icosphere(3, 0.25)
    mesh_grid([ball, small, ball], tmp_path / "meshes.png", columns=2)
    image = read(tmp_path / "meshes.png")
    assert image.shape == (2 * CELL, 2 * CELL, 3)
    cells = image.reshape(2, CELL, 2, CELL, 3).swapaxes(1, 2)
    ink = painted(cells).mean((2, 3))
    assert ink[1, 1] == 0
    assert ink[0, 1] == pytest.approx(ink[0, 0] / 4, rel=0.05)
    np.testing.assert_array_equal(cells[0, 0], cells[1, 0])
    disc = painted(cells[0, 0])
    wide, tall = disc.any(0).sum(), disc.any(1).sum()
    assert abs(int(wide) - int(tall)) <= 2
    assert disc.sum() == pytest.approx(np.pi / 4 * wide * tall, rel=0.02)
    rows = np.flatnonzero(disc.any(1))  # lit from above
    light = cells[0, 0].mean(-1)[:, CELL // 2]
    assert light[rows[len(rows) // 4]] > light[rows[3 * len(rows) // 4]]


def test_a_mesh_hides_what_is_behind_it(tmp_path: Path) -> None:
    front = trimesh.creation.icosphere(2, 0.5)
    behind = trimesh.creation.icosphere(2, 0.3)
    behind.apply_translation(-0.7 * TOWARDS)
    both = trimesh.util.concatenate([behind, front])
    mesh_grid([both], tmp_path / "both.png")
    mesh_grid([trimesh.util.concatenate([front, behind])], tmp_path / "other.png")
    a, b = read(tmp_path / "both.png"), read(tmp_path / "other.png")
    assert np.abs(a - b).max() < 0.02  # whatever the order of the faces


@pytest.mark.parametrize(
    ("meshes", "message"),
    [
        ([], "meshes: expected at least one, got none"),
        (
            [trimesh.Trimesh(np.zeros((3, 3)), np.zeros((0, 3), int), process=False)],
            "meshes: expected faces and finite",
        ),
        ([trimesh.Trimesh(np.full((3, 3), np.nan), [[0, 1, 2]], process=False)], "meshes: expected faces and finite"),
    ],
)
def test_bad_meshes(tmp_path: Path, meshes: list[trimesh.Trimesh], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mesh_grid(meshes, tmp_path / "meshes.png")
    assert list(tmp_path.iterdir()) == []
