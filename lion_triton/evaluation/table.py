"""The figures of an evaluation as text, beside published ones."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from lion_triton.evaluation import floors
from lion_triton.evaluation.intervals import LEVEL
from lion_triton.evaluation.published import REFERENCES, deviation

NAMES = {
    "1nna": "1-NNA",
    "cov": "COV",
    "mmd": "MMD",
    "jsd": "JSD",
    "thickness": "thickness",
    "unevenness": "unevenness",
    "reconstruction_cd": "reconstruction, CD",
    "reconstruction_emd": "reconstruction, EMD",
    "reconstruction_f_score": "reconstruction, F-score",
    "bound_shape": "bound of the shape prior",
    "bound_point": "bound of the point prior",
    "bound_joint": "bound of both priors",
}
PUBLISHED = ("1nna_cd", "1nna_emd", "cov_cd", "cov_emd")


def render(record: Mapping[str, Any]) -> str:
    """All lines, without the distances of single clouds. ``record`` is what ``evaluation.json`` says."""
    figures, sets = record["figures"], {name: record[name] for name in ("samples", "references")}
    lines = [
        "",
        *(f"{n:<12}{many(s['clouds'], 'cloud')} of {s['points']} points: {s['source']}" for n, s in sets.items()),
    ]
    lines += [f"{'units':<12}{record['normalization']}", f"{'split':<12}{record['split']}"]
    for kind in ("warning", "note"):
        for text in record[f"{kind}s"]:
            lines += _wrapped(f"{kind:<12}{text}")
    lines += ["", f"{'':<26}{'best':>6}{'figure':>11}  {f'{LEVEL:.0%} interval':<22}floor"]
    for name in rows(figures):
        floor = floors.floor(record, name)
        beside = "" if floor is None else f"{number(floor[1])} {floor[0]}"
        line = f"{label(name, record):<26}{best(name, record):>6}{number(figures[name]):>11}  "
        ends = interval(record["intervals"].get(name)) + " nats/dim" * name.startswith("bound")
        lines.append(f"{line}{ends.strip():<22}{beside}".rstrip())
    lines += [line for words in floors_explained(record) for line in _wrapped(f"{'floor':<12}{words}")]
    lines += _other_split(record)
    lines += ["", "distance to the nearest other cloud of the set, of equally many of either (median Chamfer)"]
    others = {name: s["nearest_other"] for name, s in sets.items()}
    lines += [f"  {name:<24}{'-' if value is None else number(value):>10}" for name, value in others.items()]
    return "\n".join(lines + _memorising(record) + _published(record))


def rows(figures: Mapping[str, Any]) -> list[str]:
    """The figures in the order in which they are shown: as NAMES has them, by Chamfer distance first."""
    return sorted(figures, key=lambda name: (list(NAMES).index(kind_of(name)), name))


def kind_of(name: str) -> str:
    """Of "1nna_cd" and "1nna_emd" the former part; others are one of a kind."""
    return name if name in NAMES else name.partition("_")[0]


def label(name: str, record: Mapping[str, Any]) -> str:
    """What a figure is called."""
    distance = {"cd": ", CD", "emd": f", EMD {record['emd']}"}
    return NAMES[name] if name in NAMES else NAMES[kind_of(name)] + distance[name.partition("_")[2]]


def best(name: str, record: Mapping[str, Any]) -> str:
    """Which value of a figure is best, in a word."""
    words = {"1nna": f"{record['chance_1nna']:.3f}", "thickness": "1", "unevenness": "1"}
    words |= {"cov": "high", "reconstruction_f_score": "high"}
    return words.get(kind_of(name), "low")


def interval(ends: Sequence[float] | None) -> str:
    """The ends of an interval, if there is one."""
    return "" if ends is None else f"{number(ends[0], 3)} to {number(ends[1], 3)}"


def _other_split(record: Mapping[str, Any]) -> list[str]:
    other = record["other_split"]
    if other is None:
        return []
    return ["", *_wrapped(f"{other['split']:<12}{_in_a_line(other['figures'], record)}")]


def _in_a_line(figures: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    return "; ".join(f"{label(name, record)} {number(figures[name])}" for name in rows(figures))


def floors_explained(record: Mapping[str, Any]) -> list[str]:
    """What the floors are, of a kind each: of those that stand beside figures, and of all the last one's figures."""
    shown = {found[0] for name in record["figures"] if (found := floors.floor(record, name))}
    half, redrawn = record["references"]["clouds"] // 2, record["floors"].get("redrawn")
    words = [f"{kind}: {text.format(half=half)}" for kind, text in floors.KINDS.items() if kind in shown - {"redrawn"}]
    if redrawn:
        words.append(f"redrawn: {floors.KINDS['redrawn']}: {_in_a_line(redrawn, record)}")
    return words


def _wrapped(line: str) -> list[str]:
    """The line as wide as the terminal; as it is, where it does not go to one."""
    if not sys.stdout.isatty():
        return [line]
    width = max(40, shutil.get_terminal_size().columns)
    return textwrap.wrap(line, width, subsequent_indent=" " * 12, break_on_hyphens=False)


def many(count: int, what: str) -> str:
    """A count with its noun: "1 sample", "2 samples"."""
    return f"{count} {what}" + ("" if count == 1 else "s")


def number(value: float | None, digits: int = 4) -> str:
    """So many digits; None is what JSON has for NaN and infinity."""
    if not value:
        return "not finite" if value is None else "0"
    return f"{value:#.{digits}g}".rstrip(".")


def _memorising(record: Mapping[str, Any]) -> list[str]:
    memory = record["memorising"]
    if memory is None:
        return []
    lines = ["", "distance to the nearest training shape (median Chamfer)"]
    lines += [f"  {name:<24}{number(memory[f'{name}_median']):>10}" for name in ("samples", "references")]
    lines.append(f"  {'one shape drawn twice':<24}{number(memory['one_shape_drawn_twice']):>10}")
    copies = " and ".join(
        f"{memory[f'{name}s_as_near_as_two_draws']} of {many(record[f'{name}s']['clouds'], name)}"
        for name in ("sample", "reference")
    )
    return lines + _wrapped(f"  as near to a training shape as two draws of its points are: {copies}")


def _published(record: Mapping[str, Any]) -> list[str]:
    if not record["published"]:
        return []
    lines = ["", *_wrapped(f"{'published':<12}{record['category']}, in per cent; {record['published_source']}")]
    theirs = REFERENCES[record["category"]]
    words = f"a 1-NNA near 50 of {theirs} shapes against as many has a standard deviation of"
    lines += _wrapped(f"{'':12}{words} {100 * deviation(2 * theirs):.1f} or more")
    lines.append(f"  {'':<16}{'1-NNA, CD':>11}{'EMD':>8}{'COV, CD':>10}{'EMD':>8}  split")
    for row in (*own_rows(record), *record["published"]):
        cells = ("-" if row[name] is None else f"{row[name]:.2f}" for name in PUBLISHED)
        widths = (11, 8, 10, 8)
        values = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"  {row['method']:<16}{values}  {row['split']}")
    return lines


def own_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """These samples as published rows, one for each split; published EMD is approximate, any other is left out."""
    emd, found = record["emd"], []
    for of in ({"split": record["split"], "figures": record["figures"]}, record["other_split"]):
        if of is not None:
            own = {n: None if n.endswith("emd") and emd != "approx" else 100 * of["figures"][n] for n in PUBLISHED}
            found.append({"method": "these samples", **own, "split": of["split"]})
    return found
