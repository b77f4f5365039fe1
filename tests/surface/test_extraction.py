from __future__ import annotations

import numpy as np
import pytest
import trimesh
from scipy.ndimage import gaussian_filter

from lion_triton.surface import indicator_to_mesh


def ball(resolution: int, radius: float, center: tuple[float, float, float] = (0.5, 0.5, 0.5)) -> np.ndarray:
    """About an indicator: +1/2 well inside, -1/2 well outside, the distance to the ball between."""
    nodes = np.stack(np.meshgrid(*[np.arange(resolution) / resolution] * 3, indexing="ij"), -1)
    return np.clip(radius - np.linalg.norm(nodes - center, axis=-1), -0.05, 0.05) * 10


def sound(mesh: trimesh.Trimesh) -> bool:
    return bool(mesh.is_watertight and mesh.is_winding_consistent and mesh.volume > 0)


def test_a_ball_of_the_right_size_at_the_right_place() -> None:
    mesh = indicator_to_mesh(ball(32, 0.25, (0.5, 0.4, 0.6)))
    assert sound(mesh)
    radius = np.linalg.norm(mesh.vertices - (0.5, 0.4, 0.6), axis=1)
    np.testing.assert_allclose(radius, 0.25, atol=0.002)
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * 0.25**3, rel=0.02)


@pytest.mark.parametrize("seed", range(6))
def test_any_grid_gives_a_watertight_mesh_that_stays_so_when_read_again(seed: int, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Noise has every ambiguous cell there is, reaches the border, and here also holds exact zeros."""
    field = gaussian_filter(np.random.default_rng(seed).normal(size=(24, 24, 24)), 0.7 + 0.3 * seed, mode="wrap")
    field *= 0.25 / field.std()
    field[np.abs(field) < 0.02] = 0
    mesh = indicator_to_mesh(field, least_share=0)
    assert sound(mesh)
    for kind in ("ply", "glb"):
        mesh.export(tmp_path / f"mesh.{kind}")
        assert trimesh.load_mesh(tmp_path / f"mesh.{kind}").is_watertight, kind


def test_a_solid_that_reaches_the_border_is_closed_there() -> None:
    assert sound(indicator_to_mesh(np.full((5, 5, 5), 0.5)))


def test_voids_and_crumbs_are_left_out_and_large_parts_kept() -> None:
    two = np.maximum(ball(40, 0.2, (0.3, 0.3, 0.3)), ball(40, 0.1, (0.75, 0.75, 0.75)))
    crumb = ball(40, 0.015, (0.75, 0.3, 0.3)) * 40
    void = -ball(40, 0.05, (0.3, 0.3, 0.3))
    field = np.minimum(np.maximum(two, crumb), np.where(void < 0, void, 0.5))
    every = indicator_to_mesh(np.maximum(two, crumb), least_share=0)
    assert every.body_count == 3
    mesh = indicator_to_mesh(field)
    assert sound(mesh)
    assert mesh.body_count == 2
    assert mesh.volume == pytest.approx(indicator_to_mesh(two).volume)
    assert indicator_to_mesh(field, least_share=0.3).body_count == 1


@pytest.mark.parametrize(
    ("indicator", "message"),
    [
        (np.zeros((4, 4, 5)), r"indicator: expected shape \(R, R, R\) with R >= 2, got \(4, 4, 5\)"),
        (np.full((4, 4, 4), np.nan), "indicator: expected finite values, got NaN or infinity"),
        (np.full((4, 4, 4), -1.0), "indicator: expected a value above 0, the inside of a solid, got none"),
    ],
)
def test_bad_input(indicator: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        indicator_to_mesh(indicator)
