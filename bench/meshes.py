"""Meshes of a run's reconstructions and samples, beside those that Open3D makes of the same clouds.

    python -m bench.meshes RUN [--count 50]

The run needs a trained surface network; Open3D (``pip install open3d-cpu``) is left out where it is not installed.
Prints one row per method and set of clouds:

    watertight           share of the meshes in which every edge has exactly two faces
    Chamfer distance     to the true surface (samples: to the cloud), mean squared distance there plus back, x 1000
    normal consistency   with the true surface; reconstructions only, as nobody knows the surface of a sample
    seconds              per mesh, on this machine
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import trimesh
import tyro
from tqdm import tqdm

from lion_triton.cli import run_cli
from lion_triton.data.sources import load_sources
from lion_triton.runs import load_model, open_run
from lion_triton.sample import SampleArguments, class_labels, generate
from lion_triton.surface import Mesher
from lion_triton.surface.meshing import RESOLUTION
from lion_triton.surface.quality import mesh_quality
from lion_triton.surface.shapes import held_out_shapes
from lion_triton.surface.storage import load_surface
from lion_triton.training.surface import normalized, rebuild

NEIGHBORS = 10
Make = Callable[[np.ndarray], trimesh.Trimesh]


@dataclass(frozen=True)
class Case:
    """A cloud, and points with normals of its surface; of a sample the cloud itself, without normals."""

    cloud: np.ndarray
    points: np.ndarray
    normals: np.ndarray | None


def reconstructions(folder: Path, count: int) -> list[Case]:
    """Held-out shapes through the run's VAE, in data units where the normalisation can be inverted."""
    run = open_run(folder)
    lion = load_model(run)
    shapes = held_out_shapes(run, load_sources(run.config.data, run.config.evaluate_shapes))
    cases = []
    for i in range(count):
        drawn, normals = shapes.draw(i, 8192, 0)
        points = normalized(run, [drawn])
        noisy = rebuild(run, lion, points[:, : run.config.data.num_points], torch.tensor([1, 2 * i]))
        cloud, truth = (run.normalization.invert(x[0].numpy()) for x in (noisy, points))
        cases.append(Case(cloud, truth, normals))
    return cases


def samples(folder: Path, count: int) -> list[Case]:
    """What the run generates with seed 0, as ``lion_triton.sample`` does."""
    run, args = open_run(folder), SampleArguments(folder, num_samples=count)
    clouds = run.normalization.invert(generate(run, load_model(run), args, class_labels(run, args)))
    return [Case(cloud, cloud, None) for cloud in clouds]


def poisson(cloud: np.ndarray) -> trimesh.Trimesh:
    """Screened Poisson reconstruction (Kazhdan and Hoppe 2013) on normals estimated and oriented by Open3D."""
    import open3d

    oriented = _oriented(cloud)
    mesh, _ = open3d.geometry.TriangleMesh.create_from_point_cloud_poisson(oriented, depth=7, n_threads=1)
    return trimesh.Trimesh(np.asarray(mesh.vertices), np.asarray(mesh.triangles), process=False)


def ball_pivoting(cloud: np.ndarray) -> trimesh.Trimesh:
    """Ball pivoting (Bernardini et al. 1999) with balls of 1, 2 and 4 times the mean distance of nearest points."""
    import open3d

    oriented = _oriented(cloud)
    spacing = float(np.mean(oriented.compute_nearest_neighbor_distance()))
    radii = open3d.utility.DoubleVector([spacing, 2 * spacing, 4 * spacing])
    mesh = open3d.geometry.TriangleMesh.create_from_point_cloud_ball_pivoting(oriented, radii)
    return trimesh.Trimesh(np.asarray(mesh.vertices), np.asarray(mesh.triangles), process=False)


def _oriented(cloud: np.ndarray):  # type: ignore[no-untyped-def]  # an Open3D cloud, a package that may be missing
    import open3d

    points = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(cloud.astype(np.float64)))
    points.estimate_normals(open3d.geometry.KDTreeSearchParamKNN(NEIGHBORS))
    points.orient_normals_consistent_tangent_plane(NEIGHBORS)
    return points


def row(name: str, what: str, make: Make, cases: list[Case]) -> str:
    """One line of the table."""
    start = time.perf_counter()
    meshes = [make(case.cloud) for case in tqdm(cases, f"{name}, {what}", unit="mesh", leave=False, disable=None)]
    seconds = (time.perf_counter() - start) / len(cases)
    figures = []
    for case, mesh in zip(cases, meshes, strict=True):
        normals = np.zeros_like(case.points) if case.normals is None else case.normals
        figures.append(mesh_quality(mesh, case.points, normals))
    watertight, chamfer = (np.array([getattr(f, x) for f in figures]) for x in ("watertight", "chamfer"))
    consistency = np.mean([f.normal_consistency for f in figures])
    words = "-" if cases[0].normals is None else f"{consistency:.3f}"
    figure = f"{1000 * chamfer.mean():.2f} ({1000 * np.median(chamfer):.2f})"
    return f"| {name} | {what} | {watertight.mean():.0%} | {figure} | {words} | {seconds:.2f} |"


def main(run: tyro.conf.Positional[Path], count: int = 50, resolution: int = RESOLUTION) -> None:
    """Print the table for ``count`` reconstructions and as many samples of a run."""
    network, training, _ = load_surface(open_run(run))
    methods: dict[str, Make] = {"lion_triton.mesh": Mesher(network, resolution, training.sigma)}
    if find_spec("open3d") is not None:
        methods |= {"Open3D, screened Poisson": poisson, "Open3D, ball pivoting": ball_pivoting}
    sets = {"reconstructions": reconstructions(run, count), "samples": samples(run, count)}
    print("| method | clouds | watertight | Chamfer distance x 1000, mean (median) | normal consistency | seconds |")
    print("|---|---|---|---|---|---|")
    for what, cases in sets.items():
        for name, make in methods.items():
            print(row(name, f"{count} {what}", make, cases))


if __name__ == "__main__":
    run_cli(lambda: tyro.cli(main))
