"""What ``evaluation.json`` says, part by part, and what is pointed out about it."""

from __future__ import annotations

import hashlib
import math
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from jaxtyping import Float32
from torch import Tensor

from lion_triton import __version__, metrics, runs
from lion_triton.data.clouds import SYNSETS, Clouds
from lion_triton.evaluation.memorising import Nearest, Training
from lion_triton.evaluation.model import ScoredRun
from lion_triton.evaluation.published import POINTS, REFERENCES, SOURCE, published
from lion_triton.evaluation.sets import Array, CloudSet, spread
from lion_triton.evaluation.table import NAMES, many

# When something is pointed out.
SMALLEST, BIGGEST = 0.1, 20.0  # shapes whose approximate EMD and JSD are as those of unit size
UNLIKE_SIZE, UNLIKE_PLACE = 0.25, 0.15  # difference of the sets' sizes and places, in units of the references' size
ERRORS, MEASURED = 4, 4  # and by so many standard errors, which fewer clouds do not have
ALIKE, ALIKE_CLOUDS = 0.5, 10  # distance to the nearest other sample, in units of the references'; of so many at least
OUTSIDE = 0.1  # of the points, outside the JSD's sphere
COPIES = 0.1  # of the samples, beyond the references' part; of 1-NNA, below its best value


@dataclass
class Remarks:
    """What is pointed out: ``warnings`` make figures doubtful, ``notes`` say what they are figures of."""

    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def environment(options: Mapping[str, Any], command: Sequence[str], device: torch.device) -> dict[str, Any]:
    """What computed the figures, with which options, and the command that repeats them; none for a call from Python."""
    cpu = f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
    return {
        "lion_triton": __version__,
        "commit": runs.commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else None,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "command": shlex.join(["python", "-m", "lion_triton.evaluate", *command]) if command else None,
        "directory": str(Path.cwd()),
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in options.items()},
        "seed": options["seed"],
        "emd": options["emd"],
        "f_score_threshold": metrics.F_SCORE_THRESHOLD,
        "bound_timesteps": metrics.BOUND_TIMESTEPS,
    }


def described(
    clouds: CloudSet, points: Float32[Array, "S N 3"], within: Float32[Tensor, "S S"], among: int
) -> dict[str, Any]:
    """A set as it was compared; ``within`` are its own distances.

    The SHA-256 is of the coordinates as little-endian float32, cloud after cloud. ``size`` and ``center`` are medians
    over clouds of the boxes' sides and centres, x, y, z, with their standard errors; ``nearest_other`` of the distance
    to the nearest other one of ``among`` of the clouds, spread over the set: the more they are, the nearer it is.
    ``repeated`` counts clouds that equal an earlier one; ``outside_sphere`` is the fraction of points outside the
    sphere that JSD is taken in.
    """
    low, high = points.min(axis=1), points.max(axis=1)
    size, size_error = _median(high - low)
    center, center_error = _median((high + low) / 2)
    rows = torch.from_numpy(spread(among, len(points)))
    others = within.cpu()[rows][:, rows].fill_diagonal_(torch.inf).min(dim=0).values
    return {
        "source": clouds.what,
        "clouds": len(points),
        "points": points.shape[1],
        "sha256": hashlib.sha256(points.astype("<f4").tobytes()).hexdigest(),
        "size": size,
        "size_error": size_error,
        "center": center,
        "center_error": center_error,
        "nearest_other": float(np.median(others.numpy())) if among > 1 else None,
        "repeated": len(points) - len({cloud.tobytes() for cloud in points}),
        "outside_sphere": float((np.square(points).sum(-1) > 0.25).mean()),
    }


def _median(values: Float32[Array, "S 3"]) -> tuple[list[float], list[float]]:
    """Medians, and their standard errors by the interquartile range, as of a normal distribution."""
    low, median, high = np.quantile(values.astype(np.float64), (0.25, 0.5, 0.75), axis=0)
    return median.tolist(), (math.sqrt(math.pi / 2 / len(values)) * (high - low) / 1.349).tolist()


def remark_on_sets(samples: Mapping[str, Any], references: Mapping[str, Any], norm_box: bool, remarks: Remarks) -> None:
    """Point out sets that are unlike each other in what no model should get wrong: they may be in other units."""
    count = samples["clouds"], references["clouds"]
    if count[0] != count[1]:
        best = metrics.chance_accuracy(*count)
        text = f"{many(count[0], 'sample')} against {many(count[1], 'reference')}: all are compared"
        text += f"; the best 1-NNA is {best:.3f} at these sizes, not 0.5" if abs(best - 0.5) > 0.02 else ""
        text += f"; COV is at most {count[0] / count[1]:.3f}" if count[0] < count[1] else ""
        remarks.notes.append(f"{text}.")
    unit = max(references["size"])
    if min(count) >= MEASURED and any(
        abs(a - b) > max(limit * unit, ERRORS * math.hypot(*errors))
        for key, limit in (("size", UNLIKE_SIZE), ("center", UNLIKE_PLACE))
        for a, b, *errors in zip(*(s[k] for k in (key, f"{key}_error") for s in (samples, references)), strict=True)
    ):
        ours, theirs = (
            f"{' x '.join(f'{x:.2g}' for x in s['size'])} around ({', '.join(f'{x:.2g}' for x in s['center'])})"
            for s in (samples, references)
        )
        question = "are units, axes and origin the same? --norm-box takes away place and size."
        remarks.warnings.append(
            f"Samples measure {ours}, references {theirs} (x, y, z; medians of their boxes): "
            + ("are axes and proportions the same?" if norm_box else question)
        )
    side = max(references["size"])
    if not SMALLEST <= side <= BIGGEST:
        remarks.warnings.append(
            f"References are {side:.2g} long (the longest side of the median box): the approximate EMD and JSD are "
            f"made for shapes of about 1, and change outside {SMALLEST:g} to {BIGGEST:g}. --norm-box brings them there."
        )
    for name, s in (("samples", samples), ("references", references)):
        if s["repeated"]:
            remarks.warnings.append(f"{s['repeated']} of {s['clouds']} {name} equal an earlier one.")
    outside = [s["outside_sphere"] for s in (samples, references)]
    if max(outside) > OUTSIDE:
        remarks.notes.append(
            f"{outside[0]:.0%} of the points of samples and {outside[1]:.0%} of references lie outside the sphere of "
            "radius 0.5 that JSD is taken in, and count at its surface: --norm-box fits all in."
        )
    ours, theirs = samples["nearest_other"], references["nearest_other"]
    if min(count) >= ALIKE_CLOUDS and ours < ALIKE * theirs:
        remarks.warnings.append(
            f"Samples resemble each other: their median distance to the nearest other sample is {ours:.3g}, that of "
            f"references to the nearest other reference {theirs:.3g}. Does the model generate few kinds of shapes?"
        )


def remark_on_copies(samples: Sequence[bytes], references: Sequence[bytes], accuracy: float, remarks: Remarks) -> None:
    """Point out samples that are references, by their fingerprints; ``accuracy`` is 1-NNA by Chamfer distance."""
    known = set(references)
    equal = sum(sample in known for sample in samples)
    if equal:
        remarks.warnings.append(f"{equal} of {many(len(samples), 'sample')} equal a reference.")
    best = metrics.chance_accuracy(len(samples), len(references))
    # Four standard errors of as many throws of a coin.
    if accuracy < best - max(COPIES, 2 / math.sqrt(len(samples) + len(references))):
        remarks.warnings.append(
            f"1-NNA of {accuracy:.3f} is far below its best value, {best:.3f}: samples lie nearer to references than "
            "references to each other. Are they copies?"
        )


def remark_on_scores(scores: Mapping[str, float], bounded: bool, remarks: Remarks) -> None:
    """Point out scores of a model that are not numbers or missing."""
    bad = [name for name, value in scores.items() if not math.isfinite(value)]
    if bad:
        remarks.warnings.append(f"Not finite: {', '.join(NAMES[name] for name in bad)}. Does the model work?")
    if not bounded:
        remarks.notes.append(
            "No bound of the priors: the references have no classes or CLIP embeddings, or others than the run."
        )


def remark_on_memorising(memory: dict[str, Any], samples: int, references: int, remarks: Remarks) -> None:
    """Point out copies of training shapes, where samples hold more of them than the references do."""
    copies = memory["samples_as_near_as_two_draws"]
    if copies / samples > memory["references_as_near_as_two_draws"] / references + COPIES:
        remarks.warnings.append(
            f"{copies} of {many(samples, 'sample')} are as near to a training shape as two draws of its points are, "
            f"and {memory['references_as_near_as_two_draws']} of {many(references, 'reference')}: were training shapes "
            "memorised?"
        )


def remark_on_leaks(references: Sequence[bytes], training: Training, remarks: Remarks) -> None:
    """Point out references that the model was trained on, by their fingerprints."""
    known = sum(reference in training.fingerprints for reference in references)
    if known:
        remarks.warnings.append(
            f"{known} of {many(len(references), 'reference')} are training shapes: the figures reward copies."
        )


def training_set(training: Training | None) -> dict[str, Any] | None:
    """The training shapes, whole as they were read."""
    if training is None:
        return None
    return {"source": training.source.what, "clouds": len(training.source), "sha256": training.sha256}


def trained_with(model: ScoredRun | None) -> dict[str, Any] | None:
    """The run that was sampled: its data and their normalisation."""
    if model is None:
        return None
    run = model.run
    return {
        "folder": str(run.folder),
        "data": asdict(run.config.data),
        "classes": list(run.classes),
        "normalization": run.normalization.to_json(),
    }


def units(norm_box: bool, model: ScoredRun | None) -> str:
    """The units that clouds were compared in, in words."""
    if norm_box:
        return "each cloud's bounding box fitted to [-0.5, 0.5]"
    if model is None:
        return "none: samples and references as given"
    kind = model.run.normalization.kind
    if kind == "global":
        return "data units: the run's mean and scale taken back"
    return f"each cloud's {kind} fitted to the unit {kind}, as the run was trained"


def published_rows(references: Clouds, points: tuple[int, int], data_units: bool, remarks: Remarks) -> dict[str, Any]:
    """Published rows, if the references are one category of ShapeNet by its folder and the units fit.

    points: of each sample and of each reference; what makes figures hard to compare is noted.
    """
    folders = {p.parent if isinstance(p, Path) else Path() for p in references.source}
    folder = folders.pop() if len(folders) == 1 else Path()
    category = SYNSETS.get(folder.parent.name)
    rows = published(category) if data_units else ()
    if category and not rows:
        remarks.notes.append(f"No published figures are known here for {category} in these units.")
    if rows and category and len(references) != REFERENCES[category]:
        remarks.notes.append(f"Published figures are of {REFERENCES[category]} references, these of {len(references)}.")
    if rows and points != (POINTS, POINTS):
        remarks.notes.append(
            f"Published figures are of clouds of {POINTS} points, these of {points[0]} and {points[1]}."
        )
    if rows and folder.name != "test":  # a run's own held-out shapes are those in val, where there is no test
        remarks.notes.append(f"Published figures are of the test shapes, these of {folder.name}.")
    return {
        "category": category,
        "published": [row.to_json() for row in rows],
        "published_source": SOURCE if rows else None,
    }


def per_sample(
    samples: Clouds, references: Clouds, cross: Float32[Array, "S R"], training: Training | None, near: Nearest | None
) -> list[dict[str, Any]]:
    """The nearest reference of each sample, and its nearest training shape."""
    rows = []
    for i, j in enumerate(cross.argmin(1).tolist()):
        row = {"sample": samples.names[i], "reference": references.names[j], "reference_index": j}
        row["reference_distance"] = float(cross[i, j])
        if training is not None and near is not None:
            k = int(near.index[i])
            row |= {"training": training.source.clouds.names[k], "training_index": k}
            row["training_distance"] = float(near.distance[i])
        rows.append(row)
    return rows


def per_reference(
    samples: Clouds, references: Clouds, cross: Float32[Array, "S R"], near: Nearest | None
) -> list[dict[str, Any]]:
    """The nearest sample of each reference, whether any sample covers it, and how near a training shape is."""
    covered = set(cross.argmin(1).tolist())
    rows = []
    for j, i in enumerate(cross.argmin(0).tolist()):
        row = {"reference": references.names[j], "sample": samples.names[i], "sample_index": i}
        row |= {"sample_distance": float(cross[i, j]), "covered": j in covered}
        if near is not None:
            row["training_distance"] = float(near.distance[j])
        rows.append(row)
    return rows
