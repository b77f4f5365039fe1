"""Published figures of single-category generation on ShapeNet, to print beside one's own.

1-NNA in per cent (50 is best), 2048 points per cloud, from Table 1 of Zeng et al. 2022 (LION, arXiv 2210.06978): the
data of PointFlow (Yang et al. 2019), normalised by one mean and one scale for the whole set, compared in data units.
Read from transcriptions of the table, not from the paper itself; its table for clouds normalised one by one, and the
rows that no transcription had, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "Zeng et al. 2022 (LION), Table 1: ShapeNet of PointFlow, 2048 points, global normalisation, approximate EMD"
# Which points of the references the other methods were compared with, the table does not say per method.
SPLITS = {"LION": "first10k"}
OTHER_SPLIT = "mostly last5k"
POINTS = 2048  # of each cloud
REFERENCES = {"airplane": 405, "chair": 662, "car": 352}


@dataclass(frozen=True)
class Published:
    """One method's 1-NNA on one category, in per cent."""

    method: str
    cd: float
    emd: float

    @property
    def split(self) -> str:
        """The points of the references that it was compared with."""
        return SPLITS.get(self.method, OTHER_SPLIT)


_TABLE = {
    "airplane": {
        "r-GAN": (98.40, 96.79),
        "l-GAN (EMD)": (89.49, 76.91),
        "PointFlow": (75.68, 70.74),
        "SetVAE": (76.54, 67.65),
        "DPM": (76.42, 86.91),
        "PVD": (73.82, 64.81),
        "LION": (67.41, 61.23),
    },
    "chair": {
        "r-GAN": (83.69, 99.70),
        "l-GAN (EMD)": (71.90, 64.65),
        "PointFlow": (62.84, 60.57),
        "SetVAE": (58.84, 60.57),
        "DPM": (60.05, 74.77),
        "PVD": (56.26, 53.32),
        "LION": (53.70, 52.34),
    },
    "car": {
        "r-GAN": (94.46, 99.01),
        "l-GAN (EMD)": (71.16, 66.19),
        "PointFlow": (58.10, 56.25),
        "SetVAE": (59.94, 59.94),
        "DPM": (68.89, 79.97),
        "PVD": (54.55, 53.83),
        "LION": (53.41, 51.14),
    },
}


def published(category: str | None) -> list[Published]:
    """The rows of a category by its English name, in the table's order; none where none are known."""
    return [Published(method, *scores) for method, scores in _TABLE.get(category or "", {}).items()]
