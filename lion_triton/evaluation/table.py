"""The figures of an evaluation as text, beside published ones."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Mapping
from typing import Any

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
    emd = record["emd"]
    lines += ["", f"{'':26}{'CD':>10}" + (f"{f'EMD, {emd}':>14}" if emd != "none" else "")]
    for name, best in (("1nna", f"best {record['chance_1nna']:.3f}"), ("cov", "high"), ("mmd", "low")):
        line = f"{NAMES[name]:<14}{best:<12}{number(figures[f'{name}_cd']):>10}"
        lines.append(line + (f"{number(figures[f'{name}_emd']):>14}" if emd != "none" else ""))
    lines.append(f"{'JSD':<14}{'low':<12}{number(figures['jsd']):>10}")
    for name, value in figures.items():
        if name.startswith(("reconstruction", "bound")):
            lines.append(f"{NAMES[name]:<26}{number(value):>10}" + (" nats/dim" if name.startswith("bound") else ""))
    lines += ["", "distance to the nearest other cloud of the set, of equally many of either (median Chamfer)"]
    others = {name: s["nearest_other"] for name, s in sets.items()}
    lines += [f"  {name:<24}{'-' if value is None else number(value):>10}" for name, value in others.items()]
    return "\n".join(lines + _memorising(record) + _published(record))


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
    lines.append(f"  {'':<16}{'1-NNA, CD':>11}{'EMD':>8}{'COV, CD':>10}{'EMD':>8}  split")
    for row in (own_row(record), *record["published"]):
        cells = ("-" if row[name] is None else f"{row[name]:.2f}" for name in PUBLISHED)
        widths = (11, 8, 10, 8)
        values = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"  {row['method']:<16}{values}  {row['split']}")
    return lines


def own_row(record: Mapping[str, Any]) -> dict[str, Any]:
    """These samples as a published row; published EMD is approximate, any other is left out."""
    emd = record["emd"]
    own = {n: None if n.endswith("emd") and emd != "approx" else 100 * record["figures"][n] for n in PUBLISHED}
    return {"method": "these samples", **own, "split": record["split"]}
