"""Coarse voxels, noise and cuts: what they keep of a shape, and what a grid in a file means."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial import cKDTree

from lion_triton.data.degraded import MOST_KEPT, VoxelGrid, add_noise, cut, holds_voxels
from lion_triton.data.procedural import furniture

CLOUD = furniture(1, 2048, seed=1)[0][0]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("resolution", [2, 7, 16])
def test_a_grid_holds_the_cloud_and_nothing_else(resolution: int) -> None:
    for seed in range(5):
        grid = VoxelGrid.around(CLOUD, resolution, rng(seed))
        assert grid.voxels.shape == (resolution,) * 3
        assert resolution - 1 <= grid.extent <= resolution
        assert grid.iou(CLOUD) == 1
        points = grid.sample(500, rng(seed))
        assert grid.voxels[tuple(grid.index(points).T)].all()
        held = np.unique(grid.index(points), axis=0, return_counts=True)[1]
        assert len(held) == min(500, grid.voxels.sum())
        assert held.max() - held.min() <= 1


def test_points_of_a_grid_lie_where_the_surface_goes_through() -> None:
    """Nearer to it than points anywhere in the same voxels."""
    for seed in range(3):
        grid = VoxelGrid.around(CLOUD, 16, rng(seed))
        corners = np.argwhere(grid.voxels)[np.arange(4000) % grid.voxels.sum()]
        anywhere = grid.offset + grid.scale * (corners + rng(seed).random((4000, 3)))
        ours, theirs = (
            np.square(cKDTree(CLOUD).query(points)[0]).mean() for points in (grid.sample(4000, rng(seed)), anywhere)
        )
        assert ours < 0.75 * theirs
    alone = VoxelGrid(np.ones((1, 1, 1), dtype=bool), np.zeros(3), 2.0)
    np.testing.assert_allclose(alone.sample(9, rng()), 1, atol=0.5)


def test_intersection_over_union_counts_what_lies_outside() -> None:
    grid = VoxelGrid(np.array([[[True, True, False]]]), np.array([10.0, 0.0, 0.0]), 2.0)
    points = np.array([[11, 1, 1], [11, 1.5, 0.5], [11, 1, 5], [9, 1, 1], [11, 1, 7]], dtype=float)
    assert grid.iou(points) == 1 / 5  # of voxels 0 and 1 the first; then the empty one, and two beside the grid
    shifted = grid.moved(np.array([1.0, 2.0, 3.0]), 4.0)
    assert shifted.iou((points - [1, 2, 3]) / 4) == 1 / 5


def test_noise_and_cuts_are_of_the_size_that_is_asked() -> None:
    side = np.ptp(CLOUD, axis=0).max()
    sizes = np.array([np.std(add_noise(CLOUD, 0.1, rng(seed)) - CLOUD) for seed in range(40)]) / side
    assert 0 < sizes.min() < 0.02
    assert 0.08 < sizes.max() < 0.102
    shares = []
    for seed in range(40):
        kept = cut(CLOUD, 0.3, rng(seed))
        shares.append(len(kept) / len(CLOUD))
        found = {row.tobytes() for row in kept}
        rows = np.array([row.tobytes() in found for row in CLOUD])
        assert rows.sum() == len(kept)
        # A plane parts what is kept from what is not: the difference of their means is nearly its normal.
        assert abs(CLOUD[rows].mean(0) - CLOUD[~rows].mean(0)).max() > 0.05 * side
    assert 0.3 <= min(shares) < 0.4
    assert 0.8 < max(shares) <= MOST_KEPT


def test_a_grid_in_a_file_has_its_place_or_a_typical_one(tmp_path: Path) -> None:
    grid = VoxelGrid.around(CLOUD, 12, rng())
    grid.save(tmp_path / "grid.npz")
    assert holds_voxels(tmp_path / "grid.npz")
    read = VoxelGrid.load(tmp_path / "grid.npz", np.zeros(3), 1.0)
    assert (read.scale, read.offset.tolist()) == (grid.scale, grid.offset.tolist())
    np.testing.assert_array_equal(read.voxels, grid.voxels)

    np.savez(tmp_path / "bare.npz", voxels=np.pad(grid.voxels, ((5, 0), (0, 3), (2, 2))))
    center, side = (CLOUD.min(0) + CLOUD.max(0)) / 2, float(np.ptp(CLOUD, axis=0).max())
    bare = VoxelGrid.load(tmp_path / "bare.npz", center, side)
    assert abs(bare.scale / grid.scale - 1) < 0.11  # 11 or 12 voxels tell of the longest side
    points = bare.sample(4000, rng())
    np.testing.assert_allclose((points.min(0) + points.max(0)) / 2, center, atol=0.01 * side)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"voxels": np.ones((2, 2, 2))}, "boolean array (X, Y, Z), got float64 (2, 2, 2)"),
        ({"voxels": np.ones((2, 2), dtype=bool)}, "got bool (2, 2)"),
        ({"voxels": np.zeros((2, 2, 2), dtype=bool)}, "expected occupied voxels, got none"),
        ({"voxels": np.ones((2, 2, 2), dtype=bool), "scale": 1.0}, "both offset and scale"),
        ({"voxels": np.ones((2, 2, 2), dtype=bool), "scale": 0.0, "offset": np.zeros(3)}, "scale above 0, got 0.0"),
        ({"voxels": np.ones((2, 2, 2), dtype=bool), "scale": 1.0, "offset": np.zeros(2)}, "offset of three"),
    ],
)
def test_grids_that_are_refused(tmp_path: Path, arrays: dict[str, Any], reason: str) -> None:
    np.savez(tmp_path / "grid.npz", **arrays)
    with pytest.raises(ValueError, match=re.escape(reason)):
        VoxelGrid.load(tmp_path / "grid.npz", np.zeros(3), 1.0)


def test_other_files_hold_no_voxels(tmp_path: Path) -> None:
    np.savez(tmp_path / "cloud.npz", points=CLOUD)
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 no more")
    for name in ("cloud.npz", "damaged.npz", "missing.npz", "cloud.npy"):
        assert not holds_voxels(tmp_path / name)


def test_the_documentation_makes_such_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "editing.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(code, {})
    assert VoxelGrid.load(tmp_path / "coarse.npz", np.zeros(3), 1.0).iou(CLOUD) == 1
    assert np.load("noisy.npy").shape == CLOUD.shape
    assert 500 < len(np.load("part.npy")) < 1900
