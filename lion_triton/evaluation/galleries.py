"""The pictures of the page: which clouds are shown side by side, drawn as cards."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Float32

from lion_triton.evaluation.phases import Bar
from lion_triton.evaluation.table import number
from lion_triton.pictures import CELL, thumbnails

SHOWN, EXTREMES = 24, 6  # clouds in a section, and in those of the best and worst: full rows of one, two or three


def galleries(
    record: Mapping[str, Any],
    samples: Float32[np.ndarray, "S N 3"],
    references: Float32[np.ndarray, "R M 3"],
    training: Float32[np.ndarray, "S L 3"] | None,
    bar: Bar,
) -> dict[str, str]:
    """HTML of "samples", "copies", "typical", "untypical" and "uncovered", each nothing if it has no cards.

    Arguments as of ``page.render``. The clouds of a card are drawn at one scale.
    """
    groups = _groups(record, samples, references, training)
    html = {}
    with bar("pictures", sum(len(card) for cards in groups.values() for card in cards), "picture") as shown:
        for name, cards in groups.items():
            drawn = []
            for card in cards:
                pictures = thumbnails([one.cloud for one in card])
                drawn.append(f'<div class="card">{"".join(map(_figure, card, pictures))}</div>')
                shown.update(len(card))
            html[name] = f'<div class="cards" id="{name}-cards">{"".join(drawn)}</div>' if drawn else ""
    return html


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
    cloud: Float32[np.ndarray, "N 3"]


def _groups(
    record: Mapping[str, Any],
    samples: Float32[np.ndarray, "S N 3"],
    references: Float32[np.ndarray, "R M 3"],
    training: Float32[np.ndarray, "S L 3"] | None,
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


def _figure(drawn: _Drawn, png: bytes) -> str:
    """A picture with its caption; a tabindex lets a tap enlarge it, which the style does."""
    name = escape(drawn.name)
    distance = "" if drawn.distance is None else f"CD {number(drawn.distance, 3)}"
    return (
        f'<figure><div class="picture" tabindex="-1"><img width="{CELL}" height="{CELL}" alt="{drawn.kind} {name}" '
        f'src="{data_uri(png)}"></div><figcaption><b>{drawn.kind}</b>{distance}<span class="name">{name}</span>'
        "</figcaption></figure>"
    )


def data_uri(png: bytes) -> str:
    """The picture as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
