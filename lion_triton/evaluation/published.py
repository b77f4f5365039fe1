"""Published figures of single-category generation on ShapeNet, to print beside one's own.

In per cent, 2048 points per cloud, of the data of PointFlow (Yang et al. 2019) normalised by one mean and one scale for
the whole set and compared in data units. As collected in Table 1 of Mo et al. 2023 (DiT-3D, arXiv 2307.01831); 1-NNA is
that of Table 1 of Zeng et al. 2022 (LION, arXiv 2210.06978), in transcriptions of it. They disagree on one method: for
PVD's chairs DiT-3D prints 57.09 and 60.87 (LION's are here) and a coverage that goes with them (left out). DiT-3D's own
rows, and those of methods that generate meshes, are left out too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SOURCE = "Zeng et al. 2022 (LION), Table 1, and Mo et al. 2023 (DiT-3D), Table 1: ShapeNet of PointFlow, 2048 points, "
SOURCE += "global normalisation, approximate EMD"
# Which points of the references the other methods were compared with, the tables do not say per method.
SPLITS = {"LION": "first10k"}
OTHER_SPLIT = "mostly last5k"
POINTS = 2048  # of each cloud
REFERENCES = {"airplane": 405, "chair": 662, "car": 352}


def deviation(clouds: int) -> float:
    """The standard deviation of a 1-NNA of 0.5 over so many clouds in all, were they independent: that of throws of a
    coin. 405 samples against 405 references have 0.018; nearest neighbours of each other make it more."""
    return 0.5 / math.sqrt(clouds)


@dataclass(frozen=True)
class Published:
    """One method's figures on one category, in per cent: 1-NNA, of which 50 is best, and COV, None where unknown."""

    method: str
    nna_cd: float
    nna_emd: float
    cov_cd: float | None = None
    cov_emd: float | None = None

    def to_json(self) -> dict[str, str | float | None]:
        """By the names that ``evaluation.json`` gives to figures, with the points compared with."""
        return {
            "method": self.method,
            "1nna_cd": self.nna_cd,
            "1nna_emd": self.nna_emd,
            "cov_cd": self.cov_cd,
            "cov_emd": self.cov_emd,
            "split": SPLITS.get(self.method, OTHER_SPLIT),
        }


_TABLE: dict[str, tuple[Published, ...]] = {
    "airplane": (
        Published("r-GAN", 98.40, 96.79, 30.12, 14.32),
        Published("l-GAN (CD)", 87.30, 93.95, 38.52, 21.23),
        Published("l-GAN (EMD)", 89.49, 76.91, 38.27, 38.52),
        Published("PointFlow", 75.68, 70.74, 47.90, 46.41),
        Published("SoftFlow", 76.05, 65.80, 46.91, 47.90),
        Published("SetVAE", 76.54, 67.65, 43.70, 48.40),
        Published("DPF-Net", 75.18, 65.55, 46.17, 48.89),
        Published("DPM", 76.42, 86.91, 48.64, 33.83),
        Published("PVD", 73.82, 64.81, 48.88, 52.09),
        Published("LION", 67.41, 61.23, 47.16, 49.63),
    ),
    "chair": (
        Published("r-GAN", 83.69, 99.70, 24.27, 15.13),
        Published("l-GAN (CD)", 68.58, 83.84, 41.99, 29.31),
        Published("l-GAN (EMD)", 71.90, 64.65, 38.07, 44.86),
        Published("PointFlow", 62.84, 60.57, 42.90, 50.00),
        Published("SoftFlow", 59.21, 60.05, 41.39, 47.43),
        Published("SetVAE", 58.84, 60.57, 46.83, 44.26),
        Published("DPF-Net", 62.00, 58.53, 44.71, 48.79),
        Published("DPM", 60.05, 74.77, 44.86, 35.50),
        Published("PVD", 56.26, 53.32),
        Published("LION", 53.70, 52.34, 48.94, 52.11),
    ),
    "car": (
        Published("r-GAN", 94.46, 99.01, 19.03, 6.54),
        Published("l-GAN (CD)", 66.49, 88.78, 38.92, 23.58),
        Published("l-GAN (EMD)", 71.16, 66.19, 37.78, 45.17),
        Published("PointFlow", 58.10, 56.25, 46.88, 50.00),
        Published("SoftFlow", 64.77, 60.09, 42.90, 44.60),
        Published("SetVAE", 59.94, 59.94, 49.15, 46.59),
        Published("DPF-Net", 62.35, 54.48, 45.74, 49.43),
        Published("DPM", 68.89, 79.97, 44.03, 34.94),
        Published("PVD", 54.55, 53.83, 41.19, 50.56),
        Published("LION", 53.41, 51.14, 50.00, 56.53),
    ),
}


def published(category: str | None) -> tuple[Published, ...]:
    """The rows of a category by its English name; none where none are known."""
    return _TABLE.get(category or "", ())
