"""The page of an evaluation: one HTML file with its pictures inside, which loads nothing and runs no script.

``render`` takes what ``evaluation.json`` says and the clouds; at most SHOWN clouds are drawn in a section, and the
distances of all are in a table at the end.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Float32
from tqdm import tqdm

from lion_triton.pictures import CELL, thumbnails

SHOWN, EXTREMES = 24, 8  # clouds in a section, and in those of the best and worst
NAMES = {
    "1nna": "1-NNA",
    "cov": "COV",
    "mmd": "MMD",
    "jsd": "JSD",
    "reconstruction_cd": "reconstruction, CD",
    "reconstruction_emd": "reconstruction, EMD",
    "reconstruction_f_score": "reconstruction, F-score",
    "bound_shape": "bound of the shape prior",
    "bound_point": "bound of the point prior",
    "bound_joint": "bound of both priors",
}
_BEST = {"1nna": "0.5 is best", "cov": "higher is better", "mmd": "lower is better", "jsd": "lower is better"}
_MEANING = {
    "1nna": "How often a cloud's nearest neighbour among all others, samples and references together, is of its own "
    "set. At 0.5 nobody can tell the two sets apart, at 1 everybody can; far below 0.5 samples copy references.",
    "cov": "The part of the references that are the nearest reference of some sample: do the samples cover all kinds?",
    "mmd": "From each reference to its nearest sample, the mean distance: is something like every reference there?",
    "jsd": "Jensen-Shannon divergence, in bits, of where the points of both sets lie on a grid of 28 points a side "
    "within the sphere of radius 0.5.",
    "reconstruction_cd": "References encoded and decoded: Chamfer distance to the original.",
    "reconstruction_emd": "The same by EMD.",
    "reconstruction_f_score": "The same by F-score: how much of either cloud has a point of the other one near.",
    "bound_shape": "Upper bound of minus the log density of the references' shape latents under their prior, in nats "
    "per dimension. It depends on the VAE.",
    "bound_point": "The same for the latent points, given the shape latents.",
    "bound_joint": "The same for both together.",
}
_REPEAT = ("lion_triton", "commit", "python", "torch", "numpy", "scipy", "device", "seed", "split", "normalization")
_LABELS = {
    "lion_triton": "lion-triton",
    "normalization": "units",
    "numpy": "NumPy",
    "scipy": "SciPy",
    "torch": "PyTorch",
}

_STYLE = """
:root { color-scheme: light; --ink: #262b38; --soft: #667085; --line: #e4e7ec; --wash: #f6f7fb; --accent: #5b59c9; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 28px 20px 60px; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem; padding-top: 1.1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
p { margin: .4rem 0 .8rem; max-width: 75ch; }
.soft, figcaption, .tile small { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; margin: 1.2rem 0; }
.tile { background: var(--wash); border-radius: 10px; padding: 12px 14px; }
.tile b { display: block; font-size: 1.5rem; color: var(--accent); font-variant-numeric: tabular-nums; }
.tile small { display: block; font-size: .8rem; line-height: 1.35; }
.notes { background: #fff8e6; border-left: 4px solid #e8b339; border-radius: 4px; padding: 8px 14px 8px 30px; }
.wide { overflow-x: auto; margin-bottom: .9rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: 7px 10px; border-bottom: 1px solid var(--line); }
th { font-weight: 600; white-space: nowrap; }
thead th { color: var(--soft); font-size: .82rem; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
th small { display: block; color: var(--soft); font-weight: 400; }
.meaning { color: var(--soft); }
.mine { background: var(--wash); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 14px; }
.card { display: flex; gap: 4px; border: 1px solid var(--line); border-radius: 10px; padding: 8px; min-width: 0; }
figure { flex: 1 1 0; min-width: 0; margin: 0; text-align: center; }
img { display: block; width: 100%; height: auto; max-width: 180px; margin: 0 auto; }
figcaption { font-size: .74rem; line-height: 1.35; overflow-wrap: anywhere; }
figcaption b, figcaption i { display: block; font-style: normal; }
figcaption b { color: var(--ink); font-weight: 600; }
dl { display: grid; grid-template-columns: minmax(90px, max-content) minmax(0, 1fr); gap: 4px 16px; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: .86em/1.5 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
details { margin-top: 1.6rem; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 600px) {
  body { padding: 18px 14px 40px; }
  th, td { padding: 6px; }
  .explained, .explained thead, .explained tbody { display: block; }
  .explained tr { display: grid; grid-template-columns: minmax(0, 1fr) 84px 84px; }
  .explained tr { border-bottom: 1px solid var(--line); }
  .explained th, .explained td { border: 0; white-space: normal; }
  .explained .meaning { grid-column: 1 / -1; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 8px; }
}
"""


def render(
    record: Mapping[str, Any],
    samples: Float32[np.ndarray, "S N 3"],
    references: Float32[np.ndarray, "R M 3"],
    training: Float32[np.ndarray, "S L 3"] | None,
) -> str:
    """The whole page.

    record: what ``evaluation.json`` says. samples and references: the clouds as they were compared; training: the
    nearest training shape of each sample, if there is a training set.
    """
    page = _Pictures(record, samples, references, training)
    sets = record["samples"], record["references"]
    title = f"{sets[0]['clouds']} generated shapes against {sets[1]['clouds']} references"
    parts = [
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        '<p class="soft">Samples: ' + " &middot; ".join(map(_set, ("", "references: "), sets)) + "</p>",
        _tiles(record),
        _notes(record["notes"]),
        "<h2>Figures</h2>",
        _figures(record),
        _published(record),
        *page.sections(),
        "<h2>To repeat this</h2>",
        _repeat(record),
        _distances(record),
        "</body></html>\n",
    ]
    page.bar.close()
    return "\n".join(part for part in parts if part)


def _set(prefix: str, clouds: Mapping[str, Any]) -> str:
    return escape(f"{prefix}{clouds['source']}, {clouds['points']} points each")


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _tiles(record: Mapping[str, Any]) -> str:
    figures, tiles = record["figures"], []
    for name in ("1nna_cd", "1nna_emd", "cov_cd", "mmd_cd", "jsd"):
        if name in figures:
            kind, _, distance = name.partition("_")
            label = NAMES[kind] + (f", {_distance(distance, record)}" if distance else "")
            value, best = _number(figures[name]), _best(kind, record)
            tiles.append(f'<div class="tile">{escape(label)}<b>{value}</b><small>{best}</small></div>')
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _best(kind: str, record: Mapping[str, Any]) -> str:
    chance = record["chance_1nna"]
    if kind == "1nna" and abs(chance - 0.5) > 0.01:
        return f"{chance:.3f} is best, for sets of these sizes"
    return _BEST.get(kind, "higher is better" if kind.endswith("f_score") else "lower is better")


def _distance(name: str, record: Mapping[str, Any]) -> str:
    return "CD" if name == "cd" else f"{record['emd']} EMD"


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="notes">{items}</ul>' if notes else ""


def _figures(record: Mapping[str, Any]) -> str:
    figures, rows = record["figures"], []
    emd = "1nna_emd" in figures
    for kind in ("1nna", "cov", "mmd"):
        values = [figures[f"{kind}_{d}"] for d in (("cd", "emd") if emd else ("cd",))]
        rows.append((kind, values))
    rows += [(kind, [figures[kind]]) for kind in NAMES if kind in figures]
    body = "".join(
        f"<tr><th>{NAMES[kind]}<small>{_best(kind, record)}</small></th>"
        + "".join(f'<td class="number">{_number(v)}</td>' for v in values)
        + "<td></td>" * (1 + emd - len(values))
        + f'<td class="meaning">{escape(_MEANING[kind])}</td></tr>'
        for kind, values in rows
    )
    head = '<th class="number">CD</th>' + (f'<th class="number">EMD, {escape(record["emd"])}</th>' if emd else "")
    explained = (
        "<p>CD is the Chamfer distance: the mean over the points of one cloud of the squared distance to the nearest "
        "point of the other, plus the same the other way round."
    )
    if record["emd"] == "approx":
        explained += (
            " EMD is the approximate matching of Fan et al. 2017, as published: the cost of a soft matching with "
            "squared distances, divided by the number of points. It is not symmetric, references come first."
        )
    elif record["emd"] == "exact":
        explained += " EMD is the mean squared distance under the best assignment of points, found exactly."
    explained += (
        " Figures of another way to normalise, another split or another EMD do not compare with these. The threshold of"
        f" the F-score is {record['f_score_threshold']:g} on squared distances.</p>"
    )
    return (
        f'<div class="wide"><table class="explained"><thead><tr><th></th>{head}<th></th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>{explained}"
    )


def _published(record: Mapping[str, Any]) -> str:
    if not record["published"]:
        return ""
    figures = record["figures"]
    same = ("cd", "emd") if record["emd"] == "approx" else ("cd",)  # published EMD is approximate
    mine = {d: 100 * figures[f"1nna_{d}"] if d in same else None for d in ("cd", "emd")}
    rows = [{"method": "these samples", **mine, "split": record["split"]}, *record["published"]]
    body = "".join(
        f'<tr class="{"mine" if i == 0 else "theirs"}"><th>{escape(row["method"])}</th>'
        + "".join(f'<td class="number">{"&ndash;" if v is None else f"{v:.2f}"}</td>' for v in (row["cd"], row["emd"]))
        + f"<td>{escape(row['split'])}</td></tr>"
        for i, row in enumerate(rows)
    )
    return (
        f"<h2>Beside published figures: {escape(record['category'])}</h2><p>1-NNA in per cent, 50 is best. "
        f"{escape(record['published_source'])}. The split says which points of the references were compared.</p>"
        '<div class="wide"><table><thead><tr><th></th><th class="number">CD</th><th class="number">EMD</th>'
        f"<th>split</th></tr></thead><tbody>{body}</tbody></table></div>"
    )


@dataclass(frozen=True)
class _Drawn:
    """A cloud in a card: of which set, its name, and its distance to the card's first cloud."""

    kind: str
    name: str
    distance: float | None
    cloud: np.ndarray


class _Pictures:
    """The sections with pictures; the clouds of a card are drawn at one scale."""

    def __init__(
        self, record: Mapping[str, Any], samples: np.ndarray, references: np.ndarray, training: np.ndarray | None
    ) -> None:
        self.samples, self.references, self.training = samples, references, training
        self.record, self.rows = record, record["per_sample"]
        self.bar = tqdm(desc="drawing", unit="picture", leave=False, disable=None)

    def sections(self) -> Iterable[str]:
        S = len(self.samples)
        beside = "references and training shapes" if self.training is not None else "references"
        yield f"<h2>Samples beside their nearest {beside}</h2>"
        yield self._memorising()
        yield _count("samples, in the order they were generated", min(SHOWN, S), S)
        yield self._cards(map(self._sample, range(min(SHOWN, S))))
        if self.training is not None:
            order = np.argsort([row["training_distance"] for row in self.rows], kind="stable")[:EXTREMES]
            yield "<h3>Nearest to a training shape</h3>"
            yield _count("samples, the nearest first", len(order), S)
            yield self._cards(map(self._sample, order))
        order = np.argsort([row["reference_distance"] for row in self.rows], kind="stable")
        yield "<h2>The most and the least typical samples</h2>"
        yield "<p>By the distance to the nearest reference.</p><h3>Most typical</h3>"
        yield self._cards(map(self._sample, order[:EXTREMES]))
        yield "<h3>Least typical</h3>"
        yield self._cards(map(self._sample, order[::-1][:EXTREMES]))
        rows = self.record["per_reference"]
        missed = [j for j, row in enumerate(rows) if not row["covered"]]
        missed.sort(key=lambda j: -rows[j]["sample_distance"])
        yield "<h2>References that no sample covers</h2>"
        if not missed:
            yield "<p>None: every reference is the nearest one of some sample.</p>"
            return
        yield "<p>They are the nearest reference of no sample; beside each its nearest sample.</p>"
        yield _count("references, the furthest from any sample first", min(SHOWN, len(missed)), len(missed))
        yield self._cards(map(self._reference, missed[:SHOWN]))

    def _memorising(self) -> str:
        memory = self.record["memorising"]
        if memory is None:
            return (
                "<p>No training shapes were given, so that this says nothing about what was memorised; "
                "distances are to references.</p>"
            )
        text = (
            f"The check against memorising: samples lie {_number(memory['samples_median'])} from their nearest "
            "training shape (the median); the references, which the model should never have seen, "
            f"{_number(memory['references_median'])}. "
        )
        floor = memory["one_shape_drawn_twice"]
        if floor is not None:
            text += f"Two draws of points of one and the same training shape lie {_number(floor)} from each other. "
            copies = memory["samples_as_near_as_two_draws"]
            text += f"{copies} of {len(self.samples)} samples are as near to a training shape as two such draws are: "
            text += "those may be copies. " if copies else "none looks like a copy. "
        nearer = memory["samples_nearer_than_any_reference"]
        text += f"{nearer} of {len(self.samples)} samples are nearer to a training shape than any reference is."
        return f"<p>{escape(text)} Distances are Chamfer distances.</p>"

    def _sample(self, i: int) -> list[_Drawn]:
        row = self.rows[i]
        near = self.references[row["reference_index"]]
        group = [
            _Drawn("sample", row["sample"], None, self.samples[i]),
            _Drawn("reference", row["reference"], row["reference_distance"], near),
        ]
        if self.training is not None:
            group.append(_Drawn("training", row["training"], row["training_distance"], self.training[i]))
        return group

    def _reference(self, j: int) -> list[_Drawn]:
        row = self.record["per_reference"][j]
        return [
            _Drawn("reference", row["reference"], None, self.references[j]),
            _Drawn("sample", row["sample"], row["sample_distance"], self.samples[row["sample_index"]]),
        ]

    def _cards(self, groups: Iterable[Sequence[_Drawn]]) -> str:
        cards = []
        for group in groups:
            pictures = thumbnails([drawn.cloud for drawn in group])
            cards.append(f'<div class="card">{"".join(map(_figure, group, pictures))}</div>')
            self.bar.update(len(group))
        return f'<div class="cards">{"".join(cards)}</div>'


def _figure(drawn: _Drawn, png: bytes) -> str:
    distance = "" if drawn.distance is None else f"<i>CD {_number(drawn.distance)}</i>"
    return (
        f'<figure><img width="{CELL}" height="{CELL}" alt="{drawn.kind} {escape(drawn.name)}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption><b>{drawn.kind}</b>{escape(drawn.name)}{distance}</figcaption></figure>"
    )


def _count(what: str, shown: int, total: int) -> str:
    return f'<p class="soft">{shown} of {total} {what}.</p>'


def _repeat(record: Mapping[str, Any]) -> str:
    rows = [("command", f"<code>{escape(record['command'])}</code>")]
    rows += [(_LABELS.get(key, key), escape(str(record[key]))) for key in _REPEAT]
    rows.append(("EMD", escape(record["emd"])))
    for name in ("samples", "references"):
        clouds = record[name]
        text = f"{clouds['clouds']} clouds of {clouds['points']} points: {clouds['source']}"
        rows.append((name, f"{escape(text)}<br><code>SHA-256 {escape(clouds['sha256'])}</code>"))
    training = record["training"]
    if training is not None:
        rows.append(("training", escape(f"{training['clouds']} clouds: {training['source']}")))
    sampling = record["samples"]["sampling"] or {}
    for key, value in sampling.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value
        rows.append((key.replace("_", " "), f"<code>{escape(str(shown))}</code>"))
    items = "".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in rows)
    return f"<dl>{items}</dl>"


def _distances(record: Mapping[str, Any]) -> str:
    rows = record["per_sample"]
    kinds = [kind for kind in ("reference", "training") if kind in rows[0]]
    head = "".join(f'<th>nearest {kind}</th><th class="number">CD</th>' for kind in kinds)
    body = "".join(
        f"<tr><td>{escape(row['sample'])}</td>"
        + "".join(f'<td>{escape(row[k])}</td><td class="number">{_number(row[f"{k}_distance"])}</td>' for k in kinds)
        + "</tr>"
        for row in rows
    )
    return (
        f"<details><summary>Distances of all {len(rows)} samples</summary>"
        '<div class="wide"><table><thead><tr>'
        f"<th>sample</th>{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )
