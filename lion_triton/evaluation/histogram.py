"""How far samples and references lie from their nearest training shapes, as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from lion_triton.pictures import INK

COLOURS = {"samples": "#5b59c9", "references": "#d9703f"}
_NEAREST = 1e-6  # part of the largest distance: where the axis begins at the latest


def histogram(samples: Sequence[float], references: Sequence[float], floor: float) -> Figure:
    """Per cent of either set by the distance to its nearest training shape, on a logarithmic axis.

    floor: the distance of one shape drawn twice, where a line is. Distances too small for the axis, as 0 is, are in a
    first bin set apart from the others, "near 0".
    """
    known = np.array([*samples, *references, floor])
    high = float(known.max()) or 1.0
    low = max(float(known.min(where=known > 0, initial=high)), _NEAREST * high)
    if high < 4 * low:
        low, high = low / 2, 2 * high
    count = max(len(samples), len(references))
    edges = np.geomspace(low, high, min(max(2 * round(count**0.5), 8), 30) + 1)
    beyond = min(*samples, *references) < low
    if beyond:
        edges = np.concatenate(((low**3, low**2 * edges[1]) / edges[1] ** 2, edges))
    figure = Figure(figsize=(5.1, 3.0), dpi=240, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, values in (("samples", np.array(samples)), ("references", np.array(references))):
        share = 100 * np.histogram(np.where(values < low, edges[0], values), edges)[0] / len(values)
        colour, above = COLOURS[name], 3 if name == "samples" else 2
        fill = to_rgba(colour, 0.35)
        axes.stairs(share, edges, fill=True, fc=fill, ec=colour, linewidth=1.6, zorder=above, label=name)
    if beyond:
        bar = (np.sqrt(edges[0] * edges[1]), 0.03)
        axes.annotate(
            "near 0", bar, xycoords=("data", "axes fraction"), rotation=90, ha="center", va="bottom", zorder=5
        )
    axes.axvline(max(floor, edges[0]), color=INK, linestyle="--", zorder=4, label="one shape drawn twice")
    axes.set(xscale="log", xlabel="Chamfer distance to the nearest training shape", ylabel="% of the set")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if edges[-1] < 100 * edges[0] else (1,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, columnspacing=1.2)
    return figure
