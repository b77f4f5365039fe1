"""A run as text: the Markdown table of a results file, and one line per row while it is made."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
_COLUMNS = (  # explained in README.md
    "op",
    "pass",
    "shape",
    "dtype",
    "ours, us (quartiles)",
    "call, us",
    "eager, us",
    "compile, us",
    "peers, us",
    "eager / ours",
    "GB/s (of copy)",
    "TFLOP/s (of peak)",
    "of floor",
    "peak memory, MB (eager)",
    "targets",
)


def key(row: Row) -> tuple[str, str, str, str, str]:
    """What a row is about: op, shape, dtype, pass, way."""
    return row["op"], shape(row), row["dtype"], row["pass"], row["way"]


def shape(row: Row) -> str:
    return " ".join(f"{name}={size}" for name, size in row["shape"].items())


def floor(row: Row, limits: dict[str, float | None]) -> float | None:
    """Seconds that the least memory traffic takes at the copy's rate, or the noise at its own: the longer."""
    copy, normals = limits["copy"], limits["normals"]
    if copy is None or (row["normals"] and normals is None):
        return None
    return max(row["bytes"] / copy, row["normals"] / normals if normals else 0.0)


def heading(about: dict[str, Any]) -> str:
    limits = about["limits"]
    measured = [f"copy {limits['copy'] / 1e9:.0f} GB/s", f"peak {limits['peak'] / 1e12:.2f} TFLOP/s"]
    if limits["normals"]:
        measured.append(f"{limits['normals'] / 1e9:.0f} G normals/s")
    measured.append(f"empty interval {1e6 * limits['empty']:.1f} us")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    return f"{about['device']}, commit {about['commit']}; {versions}. Measured: {', '.join(measured)}."


def line(row: Row) -> str:
    *case, way = key(row)
    return f"{' | '.join(case)} | {way}: {row['reason'] or f'{_us(row)} us'}"


def markdown(document: dict[str, Any]) -> str:
    """Heading and table: one line per op, shape, dtype and pass."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in document["rows"]:
        *case, way = key(row)
        cases.setdefault(tuple(case), {})[way] = row
    reasons = list(dict.fromkeys(row["reason"] for row in document["rows"] if row["reason"]))
    lines = [heading(document), "", _line(_COLUMNS), _line(("---",) * len(_COLUMNS))]
    lines += [_line(_cells(case, by_way, document["limits"], reasons)) for case, by_way in cases.items()]
    notes = [f"{i}. {reason}" for i, reason in enumerate(reasons, 1)]
    if notes:
        lines += ["", "No number:", "", *notes]
    return "\n".join(lines) + "\n"


def _cells(
    case: tuple[str, ...], by_way: dict[str, Row], limits: dict[str, float | None], reasons: list[str]
) -> list[str]:
    op, sizes, dtype, which = case
    ours, eager = by_way.get("ours", {}), by_way.get("eager", {})

    def time(row: Row) -> str:
        if "median" in row:
            return _us(row)
        return f"none ({1 + reasons.index(row['reason'])})" if row else "-"

    spread = " ({:.1f} to {:.1f})".format(*(1e6 * q for q in ours["quartiles"])) if "median" in ours else ""
    peers = [f"{way} {time(row)}" for way, row in by_way.items() if way not in ("ours", "eager", "compile")]
    return [
        op,
        which,
        sizes,
        dtype,
        time(ours) + spread,
        f"{1e6 * ours['call']:.1f}" if "call" in ours else "-",
        time(eager),
        time(by_way.get("compile", {})),
        ", ".join(peers) or "-",
        f"{eager['median'] / ours['median']:.2f}" if "median" in ours and "median" in eager else "-",
        _rate(ours, "bytes", limits["copy"], 1e9),
        _rate(ours, "operations", limits["peak"], 1e12),
        _percent(floor(ours, limits), ours["median"]) if "median" in ours else "-",
        f"{_megabytes(ours)} ({_megabytes(eager)})" if "peak_bytes" in ours else "-",
        "; ".join(f"{t['text']}: {_VERDICT[t['met']]}" for t in ours.get("targets", ())) or "-",
    ]


_VERDICT = {True: "met", False: "missed", None: "not measured"}


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def _us(row: Row) -> str:
    return f"{1e6 * row['median']:.1f}"


def _rate(row: Row, what: str, limit: float | None, unit: float) -> str:
    if "median" not in row or not row[what]:
        return "-"
    rate = row[what] / row["median"]
    return f"{rate / unit:.3g} ({_percent(rate, limit)})"


def _percent(part: float | None, whole: float | None) -> str:
    return "-" if part is None or not whole else f"{part / whole:.0%}"


def _megabytes(row: Row) -> str:
    return f"{row['peak_bytes'] / 1e6:.1f}" if "peak_bytes" in row else "-"
