"""How far figures can be trusted: intervals for other shapes than these, and what the references themselves would get.

Resampled are the shapes, samples and references apart, and every figure is computed again of those drawn: 1-NNA, COV
and MMD of their part of the distance matrices. They are drawn without replacement, for a shape that is drawn twice
would be its own nearest neighbour: subsampling (Politis and Romano 1994, "Large sample confidence regions based on
subsamples under minimal assumptions", Annals of Statistics 22), which also serves where the usual bootstrap fails.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64

from lion_triton.metrics import Comparison, Progress

PART = 4  # one of so many shapes is drawn
SUBSETS = 400  # so often
FEWEST = 20  # shapes of either set; for fewer there is no interval
LEVEL = 0.95
BOUNDED = ("1nna", "cov", "jsd")  # by 0 and 1; the others are lengths, or ratios of them

Interval = tuple[float, float]


def num_subsets(samples: int, references: int) -> int:
    """How many are drawn for ``intervals`` and ``halves`` of sets of so many shapes."""
    return SUBSETS * ((min(samples, references) >= FEWEST) + (references // 2 >= FEWEST))


def intervals(comparison: Comparison, rng: np.random.Generator, progress: Progress) -> dict[str, Interval]:
    """Where 95% of other samples and references of the same sources would have each figure; none of too few shapes.

    The figures of quarters spread sqrt(3) times as much around their mean as those of the whole sets do: the variance
    of the mean of b of n values drawn without replacement is 1/b - 1/n times theirs, that of all n is 1/n. MMD of
    fewer shapes is larger and spreads more, so that of what BOUNDED leaves the spread is relative to the mean. Subsets
    share fewer nearest neighbours than shapes, which makes intervals rather wide: of 100 and 200 normal variates in 3,
    5 and 8 dimensions, alike and unlike, they were 0.8 to 1.3 times as wide as they should be and held what to expect
    of 1-NNA, COV and MMD in 88% to 99% of 120 trials each; by halves they would be 0.9 to 1.4 times as wide.
    """
    sizes = len(comparison.samples), len(comparison.references)
    drawn = []
    for _ in range(SUBSETS if min(sizes) >= FEWEST else 0):
        drawn.append(comparison.some(*(rng.permutation(size)[: size // PART] for size in sizes)).figures())
        progress(1)
    figures, found = comparison.figures(), dict[str, Interval]()
    for name, values in _columns(drawn).items():
        if math.isfinite(figures[name]):
            found[name] = _interval(figures[name], values, name.startswith(BOUNDED))
    return found


def _columns(drawn: Sequence[Mapping[str, float]]) -> dict[str, Float64[np.ndarray, " K"]]:
    """Each figure's values, if all of them are finite."""
    columns = {name: np.array([figures[name] for figures in drawn]) for name in (drawn[0] if drawn else ())}
    return {name: values for name, values in columns.items() if np.isfinite(values).all()}


def _quantiles(values: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, " 2"]:
    """Between which LEVEL of them are."""
    return np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))


def _interval(figure: float, values: Float64[np.ndarray, " K"], bounded: bool) -> Interval:
    mean = float(values.mean())
    scale = 1.0 if bounded or mean == 0 else figure / mean
    low, high = figure + scale * (_quantiles(values) - mean) / math.sqrt(PART - 1)
    return (max(float(low), 0.0), min(float(high), 1.0)) if bounded else (float(low), float(high))


def of_mean(values: Float64[np.ndarray, " K"]) -> Interval | None:
    """The same for a mean of values, one of each shape: by its standard error."""
    if len(values) < FEWEST or not np.isfinite(values).all():
        return None
    half = 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
    mean = float(values.mean())
    return mean - half, mean + half


def halves(
    comparison: Comparison, rng: np.random.Generator, progress: Progress
) -> tuple[dict[str, float], dict[str, Interval]]:
    """What one half of the references gets as samples against the other: means over halves drawn by lot, and where
    95% of them have each figure; nothing of too few references. The mean of 1-NNA is that of chance."""
    references, count = comparison.among_references(), len(comparison.references)
    half, drawn = count // 2, []
    for _ in range(SUBSETS if half >= FEWEST else 0):
        order = rng.permutation(count)
        drawn.append(references.some(order[:half], order[half : 2 * half]).figures())
        progress(1)
    columns = _columns(drawn)
    ends = {name: _quantiles(values) for name, values in columns.items()}
    means = {name: float(values.mean()) for name, values in columns.items()}
    return means, {name: (float(low), float(high)) for name, (low, high) in ends.items()}
