from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lion_triton.surface import PoissonSolver, poisson_indicator
from lion_triton.surface.poisson import sample_grid


def sphere(count: int, radius: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points on a sphere in the middle of the cube, evenly on a spiral turned at random, and their normals; float64."""
    i = np.arange(count) + 0.5
    polar, around = np.arccos(1 - 2 * i / count), math.pi * (1 + math.sqrt(5)) * i
    normals = np.stack((np.sin(polar) * np.cos(around), np.sin(polar) * np.sin(around), np.cos(polar)), 1)
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    normals = torch.from_numpy(normals @ turn)[None]
    return 0.5 + radius * normals, normals


def distance_to_center(resolution: int) -> Tensor:
    axis = torch.arange(resolution, dtype=torch.float64) / resolution - 0.5
    return (axis[:, None, None].square() + axis[:, None].square() + axis.square()).sqrt()


def test_a_sphere_is_solid_and_nothing_else_is() -> None:
    """Against the exact solution: with normals that stand for their area chi steps by 1, here from -1/2 to +1/2."""
    chi = poisson_indicator(*sphere(8000, 0.3), 48, 0.01)[0]
    distance = distance_to_center(48)
    inside, outside = chi[distance < 0.25], chi[distance > 0.35]
    assert outside.mean().item() == pytest.approx(-0.5, abs=1e-3)
    assert inside.mean().item() == pytest.approx(0.5, abs=0.05)  # a curved surface, blurred, lies off the middle
    assert inside.std() < 0.01
    assert outside.std() < 0.01
    assert (chi[(distance - 0.3).abs() < 0.005].abs() < 0.25).all()


def test_the_potential_is_that_of_the_blurred_field_by_direct_summation() -> None:
    """At an odd resolution, where no frequency is left out: the formula, frequency by frequency."""
    R, sigma = 5, 0.07
    rng = np.random.default_rng(0)
    points, normals = torch.from_numpy(rng.random((1, 7, 3))), torch.from_numpy(rng.normal(size=(1, 7, 3)))
    potential, height = PoissonSolver(R, sigma)(points, normals), PoissonSolver(R, sigma).potential(points, normals)[1]

    field = np.zeros((R, R, R, 3))
    for p, n in zip(points[0].numpy() * R, normals[0].numpy(), strict=True):
        low = np.floor(p).astype(int)
        for corner in np.ndindex(2, 2, 2):
            weight = np.prod(np.where(corner, p - low, 1 - (p - low)))
            field[tuple((low + corner) % R)] += weight * n / 7
    nodes = np.stack(np.meshgrid(*[np.arange(R) / R] * 3, indexing="ij"), -1)
    chi = np.zeros((R, R, R), complex)
    for u in np.ndindex(R, R, R):
        u = (np.array(u) + R // 2) % R - R // 2
        if not u.any():
            continue
        wave = np.exp(2j * math.pi * (nodes @ u))
        v = (field * wave.conj()[..., None]).sum((0, 1, 2)) / R**3
        blur = math.exp(-2 * (math.pi * sigma) ** 2 * (u @ u))
        chi += blur * 1j * (u @ v) / (2 * math.pi * (u @ u)) * wave
    assert np.abs(chi.imag).max() < 1e-12
    exact = torch.from_numpy(chi.real)[None]
    exact = exact - sample_grid(exact, points).mean()
    faces = [exact[:, 0].mean(), exact[:, :, 0].mean(), exact[..., 0].mean()]
    depth = abs(sum(faces) / 3)
    torch.testing.assert_close(height[0], depth)
    torch.testing.assert_close(potential, exact * (0.5 / depth))


@pytest.mark.parametrize("resolution", [6, 7])
def test_gradients(resolution: int) -> None:
    points, normals = sphere(5, 0.3)
    normals = normals * torch.rand(1, 5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(
        lambda p, n: poisson_indicator(p, n, resolution, 0.1), (points.requires_grad_(), normals.requires_grad_())
    )


def test_a_sphere_grows_to_its_target_by_gradient_descent() -> None:
    """What the solver is differentiable for: the points follow a loss on the grid."""
    solver = PoissonSolver(24, 0.02)
    points, normals = (x.float() for x in sphere(500, 0.2))
    target = solver(*(x.float() for x in sphere(500, 0.3, seed=1)))
    points.requires_grad_()
    optimizer = torch.optim.Adam([points], lr=0.01)
    losses = []
    for _ in range(40):
        loss = (solver(points, normals) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert (points - 0.5).norm(dim=-1).mean().item() == pytest.approx(0.3, abs=0.01)


def test_clouds_of_a_batch_do_not_mix_and_two_runs_agree() -> None:
    (p, n), (q, m) = sphere(600, 0.3), sphere(600, 0.2, seed=1)
    solver = PoissonSolver(20, 0.01)
    both = solver(torch.cat((p, q)).float(), torch.cat((n, m)).float())
    assert torch.equal(both[0], solver(p.float(), n.float())[0])
    assert torch.equal(both[1], solver(q.float(), m.float())[0])
    assert torch.equal(both, solver(torch.cat((p, q)).float(), torch.cat((n, m)).float()))


def test_normals_length_does_not_matter_and_their_side_does() -> None:
    points, normals = sphere(2000, 0.3)
    chi = poisson_indicator(points, normals, 32, 0.01)
    torch.testing.assert_close(poisson_indicator(points, 7 * normals, 32, 0.01), chi)
    torch.testing.assert_close(poisson_indicator(points, -normals, 32, 0.01), -chi)


def test_the_cube_is_periodic() -> None:
    points, normals = sphere(2000, 0.3)
    chi, moved = (PoissonSolver(32, 0.01).potential(p, normals)[0] for p in (points, points + 0.5))
    torch.testing.assert_close(moved, chi.roll((16, 16, 16), (1, 2, 3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": torch.zeros(1, 0, 3)}, r"points: expected shape \(B, N, 3\) with N >= 1, got \(1, 0, 3\)"),
        ({"points": torch.zeros(4, 3)}, r"points: expected shape \(B, N, 3\) with N >= 1, got \(4, 3\)"),
        ({"normals": torch.zeros(1, 5, 3)}, r"normals: expected torch.float32 of shape \(1, 4, 3\) like points, got"),
        ({"points": torch.zeros(1, 4, 3, dtype=torch.half)}, "points: expected float32 or float64, got torch.float16"),
        ({"resolution": 3}, "resolution: expected at least 4, got 3"),
        ({"sigma": -1.0}, "sigma: expected a number >= 0, got -1.0"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    given = {"points": torch.zeros(1, 4, 3), "normals": torch.zeros(1, 4, 3), "resolution": 8, "sigma": 0.1} | change
    with pytest.raises(ValueError, match=message):
        poisson_indicator(**given)  # type: ignore[arg-type]
