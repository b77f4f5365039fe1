"""The page of an evaluation: one HTML file with its pictures inside, which loads nothing and runs no script.

``render`` takes what ``evaluation.json`` says and the clouds; at most SHOWN clouds are drawn in a section, and the
distances of all are in tables at the end.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Float32
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from lion_triton.evaluation.model import Bar
from lion_triton.evaluation.published import REFERENCES
from lion_triton.evaluation.table import NAMES, PUBLISHED, own_row
from lion_triton.metrics import chance_accuracy
from lion_triton.pictures import CELL, INK, thumbnails

SHOWN, EXTREMES = 24, 6  # clouds in a section, and in those of the best and worst: full rows of one, two or three
COLOURS = {"samples": "#5b59c9", "references": "#d9703f"}
_NEAREST = 1e-6  # part of the largest distance: where the histogram's axis begins at the latest

_BEST = {
    "1nna": "{chance_1nna:.3f} is best",
    "cov": "higher is better",
    "reconstruction_f_score": "higher is better",
}
_MEANING = {
    "1nna": "Can the two sets be told apart? How often a cloud's nearest neighbour among all others, samples and "
    "references together, is of its own set. Sets of these sizes drawn from one source give {chance_1nna:.3f}, sets "
    "that have nothing in common 1; far below, samples copy references.",
    "cov": "Do the samples cover all kinds? The part of the references that are the nearest reference of some sample.",
    "mmd": "Is there something like every reference? The mean distance from each reference to its nearest sample.",
    "jsd": "Do both sets fill the same space? Jensen-Shannon divergence, in bits, of where their points lie on a grid "
    "of 28 points a side within the sphere of radius 0.5.",
    "reconstruction_cd": "References encoded and decoded: Chamfer distance to the original.",
    "reconstruction_emd": "References encoded and decoded: EMD to the original.",
    "reconstruction_f_score": "References encoded and decoded: how much of either cloud has a point of the other near, "
    "at a squared distance below {f_score_threshold:g}.",
    "bound_shape": "Upper bound of minus the log density of the references' shape latents under their prior, in nats "
    "per dimension, estimated at {bound_timesteps} diffusion times. It depends on the VAE.",
    "bound_point": "The same for the latent points, given the shape latents.",
    "bound_joint": "The same for both together.",
}
_EMD = {
    "none": "",
    "approx": " EMD is the approximate matching of Fan et al. 2017, as published: the cost of a soft matching with "
    "squared distances, divided by the number of points. It is not symmetric, references come first.",
    "exact": " EMD is the mean squared distance under the best assignment of points, found exactly.",
}
_SOFTWARE = {
    "lion_triton": "lion-triton",
    "commit": "commit",
    "python": "Python",
    "torch": "PyTorch",
    "numpy": "NumPy",
    "scipy": "SciPy",
    "device": "device",
}

_STYLE = """
:root { color-scheme: light; --ink: #262b38; --soft: #5a6475; --line: #e0e4eb; --wash: #f5f6fb; --accent: #4e4cb8; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { margin: 0 auto; max-width: 1120px; padding: 28px 20px 60px; }
h1 { font-size: 1.8rem; line-height: 1.25; margin: 0 0 .5rem; text-wrap: balance; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.6rem 0 .5rem; padding-top: 1.2rem; }
h2 { border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
h1, h2, h3, p, li, th, td { overflow-wrap: anywhere; }
p { margin: .4rem 0 .9rem; max-width: 75ch; }
a { color: var(--accent); }
.soft, figcaption, .tile small { color: var(--soft); }
nav ul { display: flex; flex-wrap: wrap; gap: 8px; margin: 1.2rem 0 0; padding: 0; list-style: none; }
nav a { display: block; padding: 2px 12px; border: 1px solid var(--line); border-radius: 99px; text-decoration: none; }
nav a:hover { background: var(--wash); }
nav { font-size: .92rem; }
.tiles { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px; margin: 1.4rem 0 1rem; }
.tile { background: var(--wash); border-radius: 10px; padding: 12px 14px; font-size: .92rem; line-height: 1.35; }
.tile b { display: block; font-size: 1.55rem; color: var(--accent); font-variant-numeric: tabular-nums; }
.tile small { display: block; font-size: .82rem; }
.warnings { background: #fff6dd; border-left: 4px solid #d99a1c; border-radius: 4px; padding: 10px 16px; }
.warnings { margin: 1.2rem 0; }
.warnings ul { margin: .2rem 0 0; padding-left: 1.2rem; }
.notes { margin: .8rem 0; padding-left: 1.2rem; color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; margin-bottom: .9rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { text-align: left; vertical-align: top; padding: 7px 10px; border-bottom: 1px solid var(--line); }
th { font-weight: 600; min-width: 7em; }
thead th { color: var(--soft); font-size: .82rem; vertical-align: bottom; }
.number { text-align: right; min-width: 0; overflow-wrap: normal; font-variant-numeric: tabular-nums; }
td.number, thead span, .loose { white-space: nowrap; }
th small { display: block; color: var(--soft); font-weight: 400; white-space: nowrap; }
.meaning { color: var(--soft); }
.mine { background: var(--wash); color: var(--accent); font-weight: 600; }
.mine th { box-shadow: inset 4px 0 var(--accent); padding-left: 10px; }
.cards { display: grid; grid-template-columns: minmax(0, 1fr); gap: 14px; }
.card { display: flex; gap: 4px; border: 1px solid var(--line); border-radius: 10px; padding: 8px; min-width: 0; }
figure { flex: 1 1 0; min-width: 0; margin: 0; text-align: center; }
img { display: block; width: 100%; height: auto; }
.picture { position: relative; aspect-ratio: 1; max-width: 180px; margin: 0 auto; cursor: zoom-in; outline: 0; }
.picture:is(:hover, :focus) img { position: absolute; z-index: 1; width: 240px; height: 240px; top: calc(50% - 120px);
  left: calc(50% - 120px); pointer-events: none; background: #fff; border-radius: 8px;
  box-shadow: 0 0 0 1px var(--line), 0 6px 24px #262b3840; }
.card :first-child > .picture:is(:hover, :focus) img { left: 0; }
.card :last-child > .picture:is(:hover, :focus) img { left: auto; right: 0; }
.picture:hover img { z-index: 2; }
figcaption { font-size: .76rem; line-height: 1.35; overflow-wrap: anywhere; }
figcaption b { display: block; color: var(--ink); font-weight: 600; }
.name { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden; }
.chart { display: grid; gap: 8px 28px; align-items: center; }
.chart figure { max-width: 560px; }
.chart figcaption { font-size: .85rem; text-align: left; }
dl { display: grid; grid-template-columns: 150px minmax(0, 1fr); gap: 4px 16px; margin: .4rem 0; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--wash); border-radius: 6px; padding: 10px 14px; margin: .4rem 0; font-size: .84rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
pre { font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
details { margin-top: 1rem; }
summary { cursor: pointer; font-weight: 600; margin-bottom: .6rem; }
:is(a, summary, .scroll):focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
@media (min-width: 620px) {
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .tiles { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .tiles.four { grid-template-columns: repeat(4, minmax(0, 1fr)); }
}
@media (min-width: 1000px) {
  .cards { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .tiles { grid-template-columns: repeat(6, minmax(0, 1fr)); }
  .chart { grid-template-columns: minmax(0, 560px) minmax(0, 1fr); }
}
@media (max-width: 619px) {
  main { padding: 18px 14px 40px; }
  h1 { font-size: 1.5rem; }
  table { font-size: .86rem; }
  th, td { padding: 6px 4px; }
  th { min-width: 6.8em; }
  td.loose { white-space: normal; }
  .explained, .explained thead, .explained tbody { display: block; }
  .explained tr { display: grid; grid-template-columns: minmax(0, 1fr) 84px; border-bottom: 1px solid var(--line); }
  .explained.emd tr { grid-template-columns: minmax(0, 1fr) 84px 84px; }
  .explained th, .explained td { border: 0; }
  .explained .meaning { grid-column: 1 / -1; padding-top: 0; }
  .explained thead th:last-child { display: none; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dd { margin-bottom: 8px; }
}
@media print {
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 11pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  h2, h3 { break-after: avoid; }
  .card, .tile, .chart, .warnings, tr { break-inside: avoid; }
  .scroll { overflow: visible; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""


def render(
    record: Mapping[str, Any],
    samples: Float32[np.ndarray, "S N 3"],
    references: Float32[np.ndarray, "R M 3"],
    training: Float32[np.ndarray, "S L 3"] | None,
    bar: Bar,
) -> str:
    """The whole page.

    record: what ``evaluation.json`` says. samples and references: the clouds as they were compared; training: the
    nearest training shape of each sample, if there is a training set.
    """
    cards = _cards(_groups(record, samples, references, training), bar)
    sections = [
        ("figures", "Figures", _figures(record)),
        ("published", f"Beside published figures: {record['category']}", _published(record)),
        ("sets", "The two sets", _sets(record)),
        ("memorising", "Check against memorising", _memorising(record, cards)),
        ("samples", "Samples beside their nearest shapes", _samples(record, cards)),
        ("typical", "Most and least typical samples", _typical(cards)),
        ("uncovered", "References that no sample covers", _uncovered(record, cards)),
        ("repeat", "To repeat this", _repeat(record)),
        ("distances", "All distances", _distances(record)),
    ]
    sections = [section for section in sections if section[2]]
    sets = record["samples"], record["references"]
    title = f"{_many(sets[0]['clouds'], 'generated shape')} against {_many(sets[1]['clouds'], 'reference')}"
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>",
        f"<h1>{escape(title)}</h1>",
        "<p>Point clouds that a model generated, the samples, are compared with ones it should never have seen, the "
        "references: the better the model, the harder they are to tell apart.</p>",
        _listed({name: _set(clouds) for name, clouds in zip(("samples", "references"), sets, strict=True)}),
        _remarks("warnings", record["warnings"]),
        _tiles(record),
        _remarks("notes", record["notes"]),
        '<nav aria-label="Contents"><ul>',
        *(f'<li><a href="#{name}">{escape(heading)}</a></li>' for name, heading, _ in sections),
        "</ul></nav>",
        *(f'<section id="{name}"><h2>{escape(heading)}</h2>{body}</section>' for name, heading, body in sections),
        "</main></body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _number(value: float | None, digits: int = 4) -> str:
    if not value:
        return "not finite" if value is None else "0"
    return f"{value:#.{digits}g}".rstrip(".")


def _set(clouds: Mapping[str, Any]) -> str:
    return f"{clouds['clouds']} clouds of {clouds['points']} points: {clouds['source']}"


def _best(kind: str, record: Mapping[str, Any]) -> str:
    return _BEST.get(kind, "lower is better").format_map(record)


def _remarks(kind: str, remarks: Sequence[str]) -> str:
    if not remarks:
        return ""
    items = "".join(f"<li>{escape(remark)}</li>" for remark in remarks)
    if kind == "notes":
        return f'<ul class="notes" aria-label="Notes">{items}</ul>'
    return f'<div class="warnings" role="note"><strong>What makes these figures doubtful</strong><ul>{items}</ul></div>'


def _tiles(record: Mapping[str, Any]) -> str:
    """Four tiles, or six with EMD: they fill rows of two, three, four and six."""
    figures, tiles = record["figures"], []
    for name in ("1nna_cd", "1nna_emd", "cov_cd", "cov_emd", "mmd_cd", "jsd"):
        if name in figures:
            kind, _, distance = name.partition("_")
            label, best = NAMES[kind] + f", {distance.upper()}" * bool(distance), _best(kind, record)
            tiles.append(f'<div class="tile">{label}<b>{_number(figures[name])}</b><small>{best}</small></div>')
    return f'<div class="tiles{" four" if len(tiles) == 4 else ""}">{"".join(tiles)}</div>'


def _table(caption: str, head: Sequence[str], rows: Iterable[str], kind: str = "") -> str:
    """A table that scrolls by itself. ``head`` in words, those of numbers with a # in front; ``rows`` of cells."""
    words = "".join(
        f'<th scope="col" class="{"number" if text[0] == "#" else ""}">'
        + " ".join(f"<span>{escape(word)}</span>" for word in text.lstrip("#").split())
        + "</th>"
        for text in head
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="{kind}">'
        f"<caption>{escape(caption)}</caption><thead><tr>{words}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _figures(record: Mapping[str, Any]) -> str:
    figures, emd = record["figures"], record["emd"]
    columns = ["cd"] if emd == "none" else ["cd", "emd"]
    rows: list[tuple[str, list[float | None]]] = []
    rows += [(kind, [figures[f"{kind}_{column}"] for column in columns]) for kind in ("1nna", "cov", "mmd")]
    rows += [(kind, [figures[kind]]) for kind in NAMES if kind in figures]
    body = (
        f'<tr><th scope="row">{NAMES[kind]}<small>{_best(kind, record)}</small></th>'
        + "".join(f'<td class="number">{_number(value)}</td>' for value in values)
        + "<td></td>" * (len(columns) - len(values))
        + f'<td class="meaning">{escape(_MEANING[kind].format_map(record))}</td></tr>'
        for kind, values in rows
    )
    head = ["figure", "#CD", *([f"#EMD, {emd}"] if emd != "none" else []), "what it says"]
    others = "normalisation or split" if emd == "none" else "normalisation, split or EMD"
    return (
        _table("Figures", head, body, "explained" if emd == "none" else "explained emd")
        + "<p>CD is the Chamfer distance: the mean over the points of one cloud of the squared distance to the nearest "
        f"point of the other, plus the same the other way round.{_EMD[emd]} Figures with another "
        f"{others} do not compare with these.</p>"
    )


def _published(record: Mapping[str, Any]) -> str:
    if not record["published"]:
        return ""
    theirs = REFERENCES[record["category"]]
    rows = (
        f'<tr class="{"mine" if i == 0 else ""}"><th scope="row">{escape(row["method"])}</th>'
        + "".join(f'<td class="number">{"&ndash;" if row[n] is None else f"{row[n]:.2f}"}</td>' for n in PUBLISHED)
        + f'<td class="loose">{escape(row["split"])}</td></tr>'
        for i, row in enumerate([own_row(record), *record["published"]])
    )
    head = ["method", "#1-NNA, CD", "#1-NNA, EMD", "#COV, CD", "#COV, EMD", "split"]
    return (
        f"<p>In per cent. Of 1-NNA {100 * record['chance_1nna']:.1f} is best for these samples and "
        f"{100 * chance_accuracy(theirs, theirs):.1f} for the published sets; of COV higher is better. The split says "
        f"which points of the references were compared.</p>{_table('Published figures', head, rows)}"
        f'<p class="soft">{escape(record["published_source"])}.</p>'
    )


def _sets(record: Mapping[str, Any]) -> str:
    sets = {name: record[name] for name in ("samples", "references")}
    rows = (
        f'<tr><th scope="row">{name}</th><td class="number">{clouds["clouds"]}</td>'
        f'<td class="number">{clouds["points"]}</td>'
        f'<td class="number loose">{" &times; ".join(_number(x, 3) for x in clouds["size"])}</td><td class="number">'
        + ("&ndash;" if clouds["nearest_other"] is None else _number(clouds["nearest_other"]))
        + "</td></tr>"
        for name, clouds in sets.items()
    )
    head = ["set", "#clouds", "#points each", "#size: x × y × z", "#nearest other cloud, CD"]
    return (
        "<p>Sizes are medians of the clouds' boxes: if they differ, so do the units, or the model gets sizes wrong. "
        "The last column is the median distance from a cloud to the nearest other one of its set: far less among "
        "samples than among references means that samples are alike, far more that they are scattered or rough. In a "
        "larger set the nearest is nearer by chance.</p>" + _table("The two sets", head, rows)
    )


def histogram(samples: Sequence[float], references: Sequence[float], floor: float | None) -> Figure:
    """Per cent of either set by the distance to its nearest training shape, on a logarithmic axis.

    floor: the distance of one shape drawn twice, which gets a line. Distances too small for the axis, as 0 is, are in a
    first bin set apart from the others, "near 0".
    """
    known = np.array([*samples, *references, floor or 0.0])
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
    if floor is not None:
        axes.axvline(max(floor, edges[0]), color=INK, linestyle="--", zorder=4, label="one shape drawn twice")
    axes.set(xscale="log", xlabel="Chamfer distance to the nearest training shape", ylabel="% of the set")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if edges[-1] < 100 * edges[0] else (1,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, columnspacing=1.2)
    return figure


def _chart(record: Mapping[str, Any]) -> str:
    """The histogram with its caption, and what it shows in words instead of the picture."""
    floor = record["memorising"]["one_shape_drawn_twice"]
    sets = {kind: [row["training_distance"] for row in record[f"per_{kind}"]] for kind in ("sample", "reference")}
    figure, file = histogram(sets["sample"], sets["reference"], floor), io.BytesIO()
    figure.savefig(file, format="png")
    width, height = figure.canvas.get_width_height()
    words = "Histogram of Chamfer distances to the nearest training shape. " + " ".join(
        f"{name.capitalize()}s: {_number(min(of), 3)} to {_number(max(of), 3)}, median {_number(np.median(of), 3)}."
        for name, of in sets.items()
    )
    caption = "How far samples and references lie from their nearest training shape, in per cent of either set."
    if floor is not None:
        words += f" One shape drawn twice: {_number(floor, 3)}."
        caption += " A copy would lie about at the line."
    return (
        f'<figure><img width="{width}" height="{height}" alt="{words}" src="{_data(file.getvalue())}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _memorising(record: Mapping[str, Any], cards: Mapping[str, str]) -> str:
    memory, count = record["memorising"], len(record["per_sample"])
    if memory is None:
        return (
            "<p>There are no training shapes to compare with, so this page says nothing about what was memorised; all "
            "distances on it are to references.</p>"
        )
    text = [
        "A model that has learned its training shapes by heart makes samples that lie nearer to them than references "
        f"do. Half of the samples lie within {_number(memory['samples_median'])} of their nearest training shape, half "
        f"of the references within {_number(memory['references_median'])}."
    ]
    floor, copies = memory["one_shape_drawn_twice"], memory["samples_as_near_as_two_draws"]
    if floor is None:
        text.append("Training shapes have too few points to draw one twice and see how near a copy would lie.")
    else:
        text.append(
            f"Two draws of points of one training shape lie {_number(floor)} apart (the median). {copies} of "
            f"{_many(count, 'sample')} and {memory['references_as_near_as_two_draws']} of "
            f"{_many(len(record['per_reference']), 'reference')} are as near to a training shape as two draws of its "
            f"points are to each other: {'those may be copies' if copies else 'no sample looks like a copy'}."
        )
    nearer = memory["samples_nearer_than_any_reference"]
    text.append(f"{nearer} of {_many(count, 'sample')} are nearer to a training shape than any reference is.")
    return f'<div class="chart">{_chart(record)}<div>{"".join(f"<p>{part}</p>" for part in text)}</div></div>' + (
        f"<h3>Nearest to a training shape</h3>{cards['copies']}" if cards["copies"] else ""
    )


def _chosen(record: Mapping[str, Any]) -> dict[str, list[int]]:
    """The samples that each gallery shows, and the references of "uncovered", in that order.

    With too few samples the best and the worst would be the same ones again: then none of either.
    """
    samples, references = record["per_sample"], record["per_reference"]
    extremes = min(EXTREMES, len(samples) // 9 * 3)
    typical = sorted(range(len(samples)), key=lambda i: samples[i]["reference_distance"])
    copies = []
    if record["memorising"] is not None:
        copies = sorted(range(len(samples)), key=lambda i: samples[i]["training_distance"])
    uncovered = [j for j, row in enumerate(references) if not row["covered"]]
    return {
        "samples": list(range(min(SHOWN, len(samples)))),
        "copies": copies[:extremes],
        "typical": typical[:extremes],
        "untypical": typical[::-1][:extremes],
        "uncovered": sorted(uncovered, key=lambda j: -references[j]["sample_distance"])[:SHOWN],
    }


@dataclass(frozen=True)
class _Drawn:
    """A cloud in a card: of which set, its name, and its distance to the card's first cloud."""

    kind: str
    name: str
    distance: float | None
    cloud: np.ndarray


def _groups(
    record: Mapping[str, Any], samples: np.ndarray, references: np.ndarray, training: np.ndarray | None
) -> dict[str, list[list[_Drawn]]]:
    """The clouds of every card of every gallery."""

    def of_sample(i: int) -> list[_Drawn]:
        row = record["per_sample"][i]
        near = references[row["reference_index"]]
        group = [
            _Drawn("sample", row["sample"], None, samples[i]),
            _Drawn("reference", row["reference"], row["reference_distance"], near),
        ]
        if training is not None:
            group.append(_Drawn("training", row["training"], row["training_distance"], training[i]))
        return group

    def of_reference(j: int) -> list[_Drawn]:
        row = record["per_reference"][j]
        return [
            _Drawn("reference", row["reference"], None, references[j]),
            _Drawn("sample", row["sample"], row["sample_distance"], samples[row["sample_index"]]),
        ]

    return {
        gallery: [of_reference(i) if gallery == "uncovered" else of_sample(i) for i in indices]
        for gallery, indices in _chosen(record).items()
    }


def _cards(galleries: Mapping[str, Sequence[Sequence[_Drawn]]], bar: Bar) -> dict[str, str]:
    """Every gallery drawn, nothing of one without cards; the clouds of a card are drawn at one scale."""
    html = {}
    total = sum(len(group) for groups in galleries.values() for group in groups)
    with bar("pictures", total, "picture") as shown:
        for name, groups in galleries.items():
            cards = []
            for group in groups:
                pictures = thumbnails([drawn.cloud for drawn in group])
                cards.append(f'<div class="card">{"".join(map(_figure, group, pictures))}</div>')
                shown.update(len(group))
            html[name] = f'<div class="cards" id="{name}-cards">{"".join(cards)}</div>' if cards else ""
    return html


def _figure(drawn: _Drawn, png: bytes) -> str:
    """A picture with its caption; a tabindex lets a tap enlarge it, which the style does."""
    name = escape(drawn.name)
    distance = "" if drawn.distance is None else f"CD {_number(drawn.distance, 3)}"
    return (
        f'<figure><div class="picture" tabindex="-1"><img width="{CELL}" height="{CELL}" alt="{drawn.kind} {name}" '
        f'src="{_data(png)}"></div><figcaption><b>{drawn.kind}</b>{distance}<span class="name">{name}</span>'
        "</figcaption></figure>"
    )


def _samples(record: Mapping[str, Any], cards: Mapping[str, str]) -> str:
    count = len(record["per_sample"])
    return (
        f'<p class="soft">{min(SHOWN, count)} of {_many(count, "sample")}, as they come in the set. Pictures of a card '
        "have one scale; CD is the Chamfer distance to the sample. Point at a picture, or tap it, to enlarge it.</p>"
        + cards["samples"]
    )


def _typical(cards: Mapping[str, str]) -> str:
    if not cards["typical"]:
        return ""
    return (
        f"<p>By the distance to the nearest reference.</p><h3>Most typical</h3>{cards['typical']}"
        f"<h3>Least typical</h3>{cards['untypical']}"
    )


def _uncovered(record: Mapping[str, Any], cards: Mapping[str, str]) -> str:
    rows = record["per_reference"]
    missed = sum(not row["covered"] for row in rows)
    if not missed:
        return "<p>None: every reference is the nearest one of some sample.</p>"
    return (
        f"<p>{missed} of {_many(len(rows), 'reference')} are the nearest reference of no sample. Here are "
        f"{min(SHOWN, missed)}, the furthest from any sample first, each beside its nearest sample.</p>"
        + cards["uncovered"]
    )


def _listed(rows: Mapping[str, Any]) -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(_words(value))}</dd>" for name, value in rows.items())
    return f"<dl>{items}</dl>"


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(x)}" for key, x in value.items() if _given(x))
    return ", ".join(map(_words, value)) if isinstance(value, list | tuple) else str(value)


def _given(value: Any) -> bool:
    return value not in (None, (), [], "")


def _repeat(record: Mapping[str, Any]) -> str:
    clouds = {"samples": record["samples"], "references": record["references"], "training set": record["training"]}
    sets = {name: f"{of['clouds']} clouds: {of['source']}; SHA-256 {of['sha256']}" for name, of in clouds.items() if of}
    options = {**record["options"], **(record["samples"]["sampling"] or {})}  # as resolved, where a run decides
    run = record["run"] or {}
    trained = {"data": run.get("data"), "normalization": run.get("normalization"), "its classes": run.get("classes")}
    parts = {
        "Software": {label: record[key] for key, label in _SOFTWARE.items() if _given(record[key])},
        "Sets": {**sets, "units": record["normalization"]},
        "Options": {name.replace("_", "-"): value for name, value in options.items() if _given(value)},
        "The run that was sampled": {name: value for name, value in trained.items() if _given(value)},
    }
    return f"<pre>{escape(record['command'])}</pre>" + "".join(
        f"<h3>{title}</h3>{_listed(rows)}" for title, rows in parts.items() if rows
    )


def _distances(record: Mapping[str, Any]) -> str:
    """Of every sample and every reference, folded away."""
    parts = []
    for kind, others in (("sample", ("reference", "training")), ("reference", ("sample",))):
        rows = record[f"per_{kind}"]
        near = [other for other in others if other in rows[0]]
        head = [kind]
        for other in near:
            head += [f"nearest {other}", "#CD"]
        body = (
            f'<tr><th scope="row">{escape(row[kind])}</th>'
            + "".join(f'<td>{escape(row[k])}</td><td class="number">{_number(row[f"{k}_distance"])}</td>' for k in near)
            + "</tr>"
            for row in rows
        )
        caption = f"Distances of all {kind}s"
        parts.append(f"<details><summary>{caption}</summary>{_table(caption, head, body)}</details>")
    return "".join(parts)
