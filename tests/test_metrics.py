"""The metrics against the authors' figures, and on sets whose answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lion_triton import metrics

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(DATA / "lion_metrics.npz") as file:
        return {name: file[name] for name in file}


def stored(fraction: np.ndarray) -> object:
    """A fraction of 14 or 28 clouds, which the file holds rounded to float32: one cloud more would be 0.03 off."""
    return pytest.approx(float(fraction), abs=1e-7)


def test_golden_figures(golden: dict[str, np.ndarray]) -> None:
    samples, references = torch.from_numpy(golden["samples"]), torch.from_numpy(golden["refs"])
    got = metrics.evaluate(samples, references)
    assert got["mmd_cd"] == pytest.approx(float(golden["cd_mmd"]), rel=1e-5)
    assert got["cov_cd"] == stored(golden["cd_cov"])
    assert got["1nna_cd"] == stored(golden["cd_1nna"])
    assert got["jsd"] == pytest.approx(float(golden["jsd"]), rel=1e-4)
    assert got["mmd_emd"] == pytest.approx(float(golden["emd_approx_mmd"]), rel=1e-4)
    assert got["cov_emd"] == stored(golden["emd_approx_cov"])
    assert got["1nna_emd"] == stored(golden["emd_approx_1nna"])


def test_golden_emd_figures_from_the_golden_matrices(golden: dict[str, np.ndarray]) -> None:
    """The authors' matrices have the references first; the approximate EMD is not symmetric."""
    cross = torch.from_numpy(golden["emd_approx_ref_sample"]).T
    within = [torch.from_numpy(golden[f"emd_approx_{name}"]) for name in ("sample_sample", "ref_ref")]
    assert metrics.minimum_matching_distance(cross) == pytest.approx(float(golden["emd_approx_mmd"]), rel=1e-6)
    assert metrics.coverage(cross) == stored(golden["emd_approx_cov"])
    accuracy = metrics.nearest_neighbor_accuracy(within[0], cross, within[1])
    assert accuracy == stored(golden["emd_approx_1nna"])


def test_identical_and_distant_sets() -> None:
    a = torch.randn(6, 40, 3, generator=torch.Generator().manual_seed(0)) * 0.1
    same = metrics.evaluate(a, a.clone(), emd=None)
    assert same["mmd_cd"] == 0
    assert same["cov_cd"] == 1
    assert same["1nna_cd"] == 0  # every cloud's nearest is its copy in the other set
    assert same["jsd"] == pytest.approx(0, abs=1e-9)
    assert "mmd_emd" not in same
    far = metrics.evaluate(a, a + 0.3, emd=None)
    assert far["1nna_cd"] == 1
    assert far["jsd"] > 0.5
