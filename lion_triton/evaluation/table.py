"""The figures of an evaluation as text, beside published ones."""

from __future__ import annotations

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
    lines = ["", *(f"{n:<12}{s['clouds']} clouds of {s['points']} points: {s['source']}" for n, s in sets.items())]
    lines += [f"{'units':<12}{record['normalization']}", f"{'split':<12}{record['split']}"]
    lines += [f"{'warning':<12}{warning}" for warning in record["warnings"]]
    lines += [f"{'note':<12}{note}" for note in record["notes"]]
    emd = record["emd"]
    lines += ["", f"{'':26}{'CD':>10}" + (f"{f'EMD, {emd}':>14}" if emd != "none" else "")]
    for name, best in (("1nna", f"best {record['chance_1nna']:.3f}"), ("cov", "high"), ("mmd", "low")):
        line = f"{NAMES[name]:<14}{best:<12}{figures[f'{name}_cd']:>10.5g}"
        lines.append(line + (f"{figures[f'{name}_emd']:>14.5g}" if emd != "none" else ""))
    lines.append(f"{'JSD':<14}{'low':<12}{figures['jsd']:>10.5g}")
    for name, value in figures.items():
        if name.startswith(("reconstruction", "bound")):
            lines.append(f"{NAMES[name]:<26}{number(value):>10}" + (" nats/dim" if name.startswith("bound") else ""))
    others = [number(s["nearest_other"], "-") for s in sets.values()]
    lines += ["", "distance to the nearest other cloud of the set (median Chamfer)"]
    lines += [f"  {name:<24}{value:>10}" for name, value in zip(sets, others, strict=True)]
    return "\n".join(lines + _memorising(record) + _published(record))


def number(value: float | None, missing: str = "not finite") -> str:
    """Five digits."""
    return missing if value is None else f"{value:.5g}"


def _memorising(record: Mapping[str, Any]) -> list[str]:
    memory = record["memorising"]
    if memory is None:
        return []
    lines = ["", "distance to the nearest training shape (median Chamfer)"]
    lines += [f"  {name:<24}{number(memory[f'{name}_median']):>10}" for name in ("samples", "references")]
    if memory["one_shape_drawn_twice"] is not None:
        lines.append(f"  {'one shape drawn twice':<24}{number(memory['one_shape_drawn_twice']):>10}")
        text = " and ".join(
            f"{memory[f'{name}_as_near_as_two_draws']} of {record[name]['clouds']} {name}"
            for name in ("samples", "references")
        )
        lines.append(f"  {text} are as near to a training shape as two draws of its points are")
    return lines


def _published(record: Mapping[str, Any]) -> list[str]:
    if not record["published"]:
        return []
    lines = ["", f"in per cent, {record['category']} ({record['published_source']})"]
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
