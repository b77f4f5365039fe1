"""The floor of every figure: what samples would get that are as good as the references themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lion_triton import metrics
from lion_triton.metrics import Comparison, Measures

# In the order in which one of them is chosen for a figure.
KINDS = {
    "fresh": "other shapes of the references' generator, as many as there are samples",
    "halves": "one half of the references against the other, {half} each: means over halves drawn by lot",
    "redrawn": "the same references with other points",
}


def redrawn(
    again: Float[Tensor, "R N 3"], references: Float[Tensor, "R N 3"], measures: Measures, emd: metrics.EMD | None
) -> dict[str, float]:
    """What the references, whose ``measures`` these are, get as samples with other points: MMD, JSD,
    thickness and unevenness.

    Only the noise of drawing points is in it, and each cloud is the nearest to its own shape. So MMD is taken between
    the two of a shape, and 1-NNA and COV, 0 and 1, are left out.
    """
    between = metrics.reconstruction(references, again, emd)
    mmd = {name.replace("reconstruction", "mmd"): value for name, value in between.items() if "score" not in name}
    return mmd | Comparison({}, Measures.of(again), measures).figures()


def floor(record: Mapping[str, Any], name: str) -> tuple[str, float] | None:
    """Of which kind the floor of a figure is that stands beside it, and how much."""
    for kind in KINDS:
        value = record["floors"].get(kind, {}).get(name)
        if value is not None:
            return kind, value
    return None
