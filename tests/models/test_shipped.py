"""The model that comes with the package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import trimesh
from scipy.spatial import cKDTree

from lion_triton import mesh, sample
from lion_triton.data.procedural import CLASSES
from lion_triton.models import LION
from lion_triton.models.hub import SHIPPED
from lion_triton.runs import open_run


def test_all_shipped_models_are_small() -> None:
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8e6
    own = {"config.json", "model.safetensors", "picture.png", "README.md"}
    assert {path.name for path in files if path.parent.parent == SHIPPED} == own
    assert {path.name for path in files} == own | {"figures.json", "state.json"}  # of the surface network


def test_a_class_is_sampled_by_the_models_name(tmp_path: Path) -> None:
    run = open_run(Path("furniture"))
    assert run.classes == tuple(CLASSES)
    assert sorted(LION.from_pretrained("furniture").distilled_steps) == [4, 8]
    sample.main(["furniture", "--class", "sofa", "--num-samples", "2", "--steps", "4", "--out", str(tmp_path / "out")])
    clouds = np.load(tmp_path / "out" / "clouds.npz")
    assert clouds["points"].shape == (2, 1024, 3)
    assert [run.classes[label] for label in clouds["labels"]] == ["sofa", "sofa"]
    width, height, depth = np.ptp(clouds["points"], axis=1).T
    assert (width > height).all() and (width > 0.5).all()  # of sofas, the longest side of which is 1
    assert (depth < 1.2).all()


def test_a_chair_is_meshed_by_the_models_own_network(tmp_path: Path) -> None:
    clouds = "--class chair --num-samples 1 --resolution 64 --seed 3".split()
    mesh.main(["furniture", *clouds, "--out", str(tmp_path / "out")])
    (made,) = json.loads((tmp_path / "out" / "meshes.json").read_text())["meshes"]
    assert made["watertight"]
    solid = trimesh.load_mesh(tmp_path / "out" / "ply" / "0000.ply")
    (cloud,) = np.load(tmp_path / "out" / "clouds.npz")["points"]
    assert 0 < solid.volume < 0.3 * np.ptp(cloud, axis=0).prod()  # no block
    to_cloud = cKDTree(solid.sample(20_000, seed=0)).query(cloud)[0]
    assert np.quantile(to_cloud, 0.9) < 0.03  # the longest side is 1
