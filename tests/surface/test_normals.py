from __future__ import annotations

import numpy as np
import pytest
import torch

from lion_triton.data.procedural import box, sample_oriented
from lion_triton.surface import estimate_normals


def test_normals_of_a_sphere_point_outwards() -> None:
    points = torch.nn.functional.normalize(torch.randn(2, 400, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    normals = estimate_normals(3 * points + 5, 10)
    assert normals.dtype == torch.float32
    torch.testing.assert_close(normals.norm(dim=-1), torch.ones(2, 400))
    assert ((normals * points).sum(-1) > 0.95).all()


def test_normals_of_a_box_but_for_its_edges() -> None:
    points, truth = sample_oriented([box((0, 1), (0, 2), (0, 0.7))], 3000, np.random.default_rng(0))
    normals = estimate_normals(torch.from_numpy(points)[None], 8)[0].numpy()
    cosines = (normals * truth).sum(1)
    assert (cosines > 0.99).mean() > 0.75  # near an edge the plane is a bevel
    assert (cosines > 0).mean() > 0.99


def test_parts_far_apart_are_each_turned_outwards() -> None:
    sphere = torch.nn.functional.normalize(torch.randn(1, 300, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    normals = estimate_normals(torch.cat((sphere, sphere + torch.tensor([10.0, 3, 0])), 1), 8)
    assert ((normals * sphere.repeat(1, 2, 1)).sum(-1) > 0.9).all()


@pytest.mark.parametrize("seed", range(6))
def test_an_upright_pipe_whose_highest_point_tells_nothing_is_turned_outwards(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    angle, height = torch.rand(2, 1500, generator=generator, dtype=torch.float64)
    points = torch.stack(((2 * torch.pi * angle).cos(), 2 * height, (2 * torch.pi * angle).sin()), -1)
    normals = estimate_normals(points[None])[0]
    assert ((normals * points)[:, [0, 2]].sum(1) > 0.9).all()


def test_a_flat_patch_faces_up_whatever_its_order() -> None:
    points = torch.rand(1, 50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points[..., 1] = 0
    expected = torch.tensor([0.0, 1, 0], dtype=torch.float64).expand(1, 50, 3)
    torch.testing.assert_close(estimate_normals(points, 5), expected)
    torch.testing.assert_close(estimate_normals(points.flip(1), 5), expected)


@pytest.mark.parametrize(
    ("shape", "k", "message"),
    [
        ((1, 2, 3), 3, r"points: expected shape \(B, N, 3\) with N >= 3, got \(1, 2, 3\)"),
        ((5, 3), 3, r"points: expected shape \(B, N, 3\) with N >= 3, got \(5, 3\)"),
        ((1, 9, 3), 10, "k: expected 3 to 9, the number of points, got 10"),
        ((1, 9, 3), 2, "k: expected 3 to 9, the number of points, got 2"),
    ],
)
def test_bad_input(shape: tuple[int, ...], k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_normals(torch.zeros(shape), k)
