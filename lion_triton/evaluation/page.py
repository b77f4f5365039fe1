"""The page of an evaluation: one HTML file with its pictures inside, which loads nothing and runs no script.

``render`` takes what ``evaluation.json`` says and the clouds; at most SHOWN clouds are drawn in a section, and the
distances of all are in tables at the end.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

import numpy as np
from jaxtyping import Float32

from lion_triton.evaluation import floors
from lion_triton.evaluation.galleries import SHOWN, data_uri, galleries
from lion_triton.evaluation.histogram import histogram
from lion_triton.evaluation.intervals import FEWEST, LEVEL
from lion_triton.evaluation.phases import Bar
from lion_triton.evaluation.published import REFERENCES, deviation
from lion_triton.evaluation.table import (
    PUBLISHED,
    floors_explained,
    interval,
    kind_of,
    label,
    many,
    number,
    own_rows,
    rows,
)
from lion_triton.metrics import chance_accuracy

_BEST = {
    "1nna": "{chance_1nna:.3f} is best",
    "cov": "higher is better",
    "thickness": "1 is best",
    "unevenness": "1 is best",
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
    "thickness": "Are surfaces crisp? How far the 12 nearest points of a point lie from their best plane: the median "
    "of samples over that of references. Above 1, surfaces are fuzzy.",
    "unevenness": "Do points lie evenly on surfaces? How much the distance to a point's 8th nearest other point varies "
    "over a cloud, its standard deviation over its mean: the median of samples over that of references. Above 1, "
    "points are clumped, which nearest neighbours hardly see.",
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
    "triton": "Triton",
    "device": "device",
    "directory": "run in",
}

_STYLE = resources.files("lion_triton.evaluation").joinpath("page.css").read_text(encoding="utf-8")


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
    cards = galleries(record, samples, references, training, bar)
    sections = [
        ("figures", "Figures", _figures(record)),
        ("split", "With the other points of the references", _other_split(record)),
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
    title = f"{many(sets[0]['clouds'], 'generated shape')} against {many(sets[1]['clouds'], 'reference')}"
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


def _set(clouds: Mapping[str, Any]) -> str:
    return f"{many(clouds['clouds'], 'cloud')} of {clouds['points']} points: {clouds['source']}"


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
    for name in ("1nna_cd", "1nna_emd", "cov_cd", "cov_emd", "mmd_cd", "thickness"):
        if name in figures:
            title, _, distance = label(name, record).partition(" EMD ")
            found = floors.floor(record, name)
            ends = record["intervals"].get(name)
            under = ["" if ends is None else f"{LEVEL:.0%}: {interval(ends)}"]
            under.append("" if found is None else f"floor {number(found[1], 3)}")
            lines = "".join(f"<small>{line}</small>" for line in (*under, _best(kind_of(name), record)) if line)
            title += " EMD" if distance else ""
            tiles.append(f'<div class="tile">{title}<b>{number(figures[name])}</b>{lines}</div>')
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
    figures, emd, body = record["figures"], record["emd"], []
    for name in rows(figures):
        kind, found = kind_of(name), floors.floor(record, name)
        floor = "" if found is None else f"{number(found[1])}<small>{found[0]}</small>"
        both = f"{kind}_emd" in figures
        meaning = escape(_MEANING[kind].format_map(record))
        body.append(
            f'<tr><th scope="row">{label(name, record)}<small>{_best(kind, record)}</small></th>'
            f'<td class="number">{number(figures[name])}</td>'
            f'<td class="number">{interval(record["intervals"].get(name))}</td><td class="number">{floor}</td>'
            + ("" if name == f"{kind}_emd" else f'<td class="meaning" rowspan="{1 + both}">{meaning}</td>')
            + "</tr>"
        )
    head = ["figure", "#value", f"#{LEVEL:.0%} interval", "#floor", "what it says"]
    others = "normalisation or split" if emd == "none" else "normalisation, split or EMD"
    sizes = [record[name]["clouds"] for name in ("samples", "references")]
    return (
        _table("Figures", head, body, "explained")
        + "<p>CD is the Chamfer distance: the mean over the points of one cloud of the squared distance to the nearest "
        f"point of the other, plus the same the other way round.{_EMD[emd]} Figures with another "
        f"{others} do not compare with these.</p><p>{escape(_intervals(record, *sizes))}</p>"
        + "".join(f"<p>Floor, {escape(words)}.</p>" for words in floors_explained(record))
    )


def _intervals(record: Mapping[str, Any], samples: int, references: int) -> str:
    if not record["intervals"]:
        return f"There are no intervals for sets of fewer than {FEWEST} shapes."
    return (
        "The interval is where other samples and references of the same sources would have the figure, "
        f"{LEVEL:.0%} of the time; it comes from comparing a quarter of either set many times. Were all clouds "
        f"independent, the standard deviation of a 1-NNA of 0.5 would be {deviation(samples + references):.3f} with "
        f"{samples} and {references} of them."
    )


def _other_split(record: Mapping[str, Any]) -> str:
    other = record["other_split"]
    if other is None:
        return ""
    body = (
        f'<tr><th scope="row">{label(name, record)}</th><td class="number">{number(record["figures"][name])}</td>'
        f'<td class="number">{number(other["figures"][name])}</td></tr>'
        for name in rows(other["figures"])
    )
    return _table("Both splits", ["figure", f"#{record['split']}", f"#{other['split']}"], body)


def _published(record: Mapping[str, Any]) -> str:
    if not record["published"]:
        return ""
    theirs, own = REFERENCES[record["category"]], own_rows(record)
    rows = (
        f'<tr class="{"mine" if row in own else ""}"><th scope="row">{escape(row["method"])}</th>'
        + "".join(f'<td class="number">{"&ndash;" if row[n] is None else f"{row[n]:.2f}"}</td>' for n in PUBLISHED)
        + f'<td class="loose">{escape(row["split"])}</td></tr>'
        for row in (*own, *record["published"])
    )
    head = ["method", "#1-NNA, CD", "#1-NNA, EMD", "#COV, CD", "#COV, EMD", "split"]
    return (
        f"<p>In per cent. Of 1-NNA {100 * record['chance_1nna']:.1f} is best for these samples and "
        f"{100 * chance_accuracy(theirs, theirs):.1f} for the published sets; of COV higher is better. The split says "
        f"which points of the references were compared. A 1-NNA near 50 of {theirs} shapes against as many has a "
        f"standard deviation of {100 * deviation(2 * theirs):.1f} or more.</p>{_table('Published figures', head, rows)}"
        f'<p class="soft">{escape(record["published_source"])}.</p>'
    )


def _sets(record: Mapping[str, Any]) -> str:
    sets = {name: record[name] for name in ("samples", "references")}
    rows = (
        f'<tr><th scope="row">{name}</th><td class="number">{clouds["clouds"]}</td>'
        f'<td class="number">{clouds["points"]}</td>'
        f'<td class="number loose">{" &times; ".join(number(x, 3) for x in clouds["size"])}</td><td class="number">'
        + ("&ndash;" if clouds["nearest_other"] is None else number(clouds["nearest_other"]))
        + "</td></tr>"
        for name, clouds in sets.items()
    )
    head = ["set", "#clouds", "#points each", "#size: x × y × z", "#nearest other cloud, CD"]
    return (
        "<p>Sizes are medians of the clouds' boxes: if they differ, so do the units, or the model gets sizes wrong. "
        "The last column is the median distance from a cloud to the nearest other one of its set, of equally many of "
        "either: far less among samples than among references means that samples are alike, far more that they are "
        "scattered or rough.</p>" + _table("The two sets", head, rows)
    )


def _chart(record: Mapping[str, Any]) -> str:
    """The histogram with its caption, and what it shows in words instead of the picture."""
    floor = record["memorising"]["one_shape_drawn_twice"]
    sets = {kind: [row["training_distance"] for row in record[f"per_{kind}"]] for kind in ("sample", "reference")}
    figure, file = histogram(sets["sample"], sets["reference"], floor), io.BytesIO()
    figure.savefig(file, format="png")
    width, height = figure.canvas.get_width_height()
    words = "Histogram of Chamfer distances to the nearest training shape. " + " ".join(
        f"{name.capitalize()}s: {number(min(of), 3)} to {number(max(of), 3)}, median {number(np.median(of), 3)}."
        for name, of in sets.items()
    )
    words += f" One shape drawn twice: {number(floor, 3)}."
    caption = "How far samples and references lie from their nearest training shape, in per cent of either set. A copy "
    caption += "would lie about at the line, an exact one at 0."
    return (
        f'<figure><img width="{width}" height="{height}" alt="{words}" src="{data_uri(file.getvalue())}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _memorising(record: Mapping[str, Any], cards: Mapping[str, str]) -> str:
    memory, count = record["memorising"], len(record["per_sample"])
    if memory is None:
        return (
            "<p>There are no training shapes to compare with, so this page says nothing about what was memorised; all "
            "distances on it are to references.</p>"
        )
    text = [
        "A model that has learned its training shapes by heart makes samples that lie nearer to them than references "
        f"do. Half of the samples lie within {number(memory['samples_median'])} of their nearest training shape, half "
        f"of the references within {number(memory['references_median'])}."
    ]
    floor, copies = memory["one_shape_drawn_twice"], memory["samples_as_near_as_two_draws"]
    theirs, references = memory["references_as_near_as_two_draws"], len(record["per_reference"])
    verdict = "those may be copies" if copies else "no sample looks like a copy"
    if 0 < copies * references <= theirs * count:
        verdict = "references are that near at least as often, so this does not tell"
    text.append(
        f"Two draws of points of one training shape lie {number(floor)} apart (the median; those of a thin shape less, "
        f"and each sample is compared with draws of its own nearest shape). {copies} of "
        f"{many(count, 'sample')} and {theirs} of {many(references, 'reference')} are as near to a training shape as "
        f"two draws of its points are to each other: {verdict}."
    )
    nearer = memory["samples_nearer_than_any_reference"]
    text.append(f"Nearer to a training shape than any reference is: {nearer} of {many(count, 'sample')}.")
    return f'<div class="chart">{_chart(record)}<div>{"".join(f"<p>{part}</p>" for part in text)}</div></div>' + (
        f"<h3>Nearest to a training shape</h3>{cards['copies']}" if cards["copies"] else ""
    )


def _samples(record: Mapping[str, Any], cards: Mapping[str, str]) -> str:
    count = len(record["per_sample"])
    return (
        f'<p class="soft">{min(SHOWN, count)} of {many(count, "sample")}, as they come in the set. Pictures of a card '
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
        f"<p>{missed} of {many(len(rows), 'reference')} are the nearest reference of no sample. Here are "
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
    sets = {
        name: f"{many(of['clouds'], 'cloud')}: {of['source']}; SHA-256 {of['sha256']}"
        for name, of in clouds.items()
        if of
    }
    options = {**record["options"], **(record["samples"]["sampling"] or {})}  # as resolved, where a run decides
    run = record["run"] or {}
    trained = {"data": run.get("data"), "normalization": run.get("normalization"), "its classes": run.get("classes")}
    parts = {
        "Software": {label: record[key] for key, label in _SOFTWARE.items() if _given(record[key])},
        "Sets": {**sets, "units": record["normalization"]},
        "Options": {name.replace("_", "-"): value for name, value in options.items() if _given(value)},
        "The run that was sampled": {name: value for name, value in trained.items() if _given(value)},
    }
    command = f"<pre>{escape(record['command'])}</pre>" if record["command"] else ""
    return command + "".join(f"<h3>{title}</h3>{_listed(rows)}" for title, rows in parts.items() if rows)


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
            + "".join(f'<td>{escape(row[k])}</td><td class="number">{number(row[f"{k}_distance"])}</td>' for k in near)
            + "</tr>"
            for row in rows
        )
        caption = f"Distances of all {kind}s"
        parts.append(f"<details><summary>{caption}</summary>{_table(caption, head, body)}</details>")
    return "".join(parts)
