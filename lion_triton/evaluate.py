"""Score generated shapes: ``python -m lion_triton.evaluate RUN_OR_SAMPLES [--reference DATA] [--norm-box] ...``

Prints the figures beside published ones and writes OUT/evaluation.json, which says all that is needed to repeat
them, and OUT/evaluation.html, a page with pictures that needs nothing else.
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from jaxtyping import Float32, Float64
from torch import Tensor

from lion_triton import metrics
from lion_triton.cli import run_cli
from lion_triton.config import check_seed, fewest_points
from lion_triton.data.clouds import in_turn
from lion_triton.data.sources import DataConfig, load_sources
from lion_triton.devices import best_device
from lion_triton.evaluation import floors, folder, intervals, page, record, table
from lion_triton.evaluation.memorising import Training, nearest_training, summary
from lion_triton.evaluation.model import ScoredRun
from lion_triton.evaluation.phases import Phases
from lion_triton.evaluation.record import Remarks
from lion_triton.evaluation.sets import (
    FRESH,
    OTHER_SPLIT,
    REFERENCES,
    SAMPLES,
    SHAPES,
    SPLIT_POINTS,
    CloudSet,
    Preparation,
    Split,
    fingerprint,
    fit_box,
    in_memory,
    in_units_of,
    open_clouds,
)
from lion_triton.models.hub import find_run, shipped_models
from lion_triton.processes import ALONE, Processes
from lion_triton.runs import BEST, note_best, open_run
from lion_triton.sample import SampleArguments, resolved


@dataclass(frozen=True)
class EvaluateArguments:
    """Compare generated clouds with held-out ones: MMD, COV, 1-NNA by Chamfer distance and EMD, JSD, thickness,
    unevenness. For a run, also reconstruction and the bound of its priors. Each with its interval, and beside it its
    floor: what shapes as good as the references get.

    DATA is a folder <category>/{train,val,test}/<id>.npy, a folder of clouds, a .npz or .npy of (S, P, 3), or the
    word procedural, for as many embedded shapes as there are samples.
    Writes OUT/evaluation.json and OUT/evaluation.html, for a run also OUT/samples.npz.

    Examples, of a run and its own held-out shapes, and of a file of clouds and the test chairs of a data set:
        python -m lion_triton.evaluate runs/quickstart --emd none
        python -m lion_triton.evaluate samples.npz --reference ShapeNetCore.v2.PC15k --categories chair

    Attributes:
        run_or_samples: a run folder, a folder of save_pretrained or the name of a shipped model, which is sampled; or
            DATA.
        reference: DATA to compare with; default of a run: its own held-out shapes.
        training: DATA that the model was trained on, to see what it memorised; default of a run: its own.
        subset: which part of folders with train, val and test to take, of references and samples.
        categories: categories to take of such folders, also of training shapes; default all.
        split: which points of clouds of 15000 (ShapeNetCore.v2.PC15k): LION draws from the first 10000, most others
            compare with the last 5000; both: the first, and beside it the last.
        norm_box: fit each cloud's bounding box to [-0.5, 0.5] first.
        emd: approximate matching as published, exact assignment (on the CPU, seconds per pair of clouds of 2048 points:
            for small sets), or none; on a CPU either takes most of the time.
        num_points: points per cloud, drawn at random where there are more; default those of the samples.
        num_samples: clouds to generate of a run; default as many as there are references. With fewer, as many of the
            run's own held-out shapes are compared with, classes in turn.
        sampler: how to sample a run; default the run's own.
        steps: network evaluations per prior; default the run's own.
        eta: DDIM's stochasticity, 0 to 1.
        guidance: w of classifier-free guidance by class; default as the run's configuration.
        checkpoint: one of the run's, as step-00001000, or best, on its validation shapes; default the newest.
        seed: decides the samples and the points drawn.
        batch_size: clouds generated at a time; another one gives other samples.
        out: folder for the results; default RUN/evaluation; for samples the folder evaluation in theirs, or beside
            their file <file>-evaluation.
    """

    run_or_samples: tyro.conf.Positional[Path]
    reference: str | None = None
    training: str | None = None
    subset: Literal["train", "val", "test"] = "test"
    categories: tuple[str, ...] = ()
    split: Split | Literal["both"] = "first10k"
    norm_box: bool = False
    emd: Literal["approx", "exact", "none"] = "approx"
    num_points: int | None = None
    num_samples: int | None = None
    sampler: Literal["ddpm", "ddim", "ode"] | None = None
    steps: int | None = None
    eta: float | None = None
    guidance: float | None = None
    checkpoint: str | None = None
    seed: int = 0
    batch_size: int = 64
    out: Path | None = None

    @property
    def matching(self) -> metrics.EMD | None:
        """``emd`` as ``lion_triton.metrics`` takes it."""
        return None if self.emd == "none" else self.emd

    @property
    def first(self) -> Split:
        """The split that the figures are of."""
        return "first10k" if self.split == "both" else self.split


def check(args: EvaluateArguments, is_run: bool) -> None:
    """Raise ``ValueError`` for options out of range, or of a run where there is none."""
    check_seed(args.seed)
    for name in ("num_points", "num_samples", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name.replace('_', '-')}: expected at least 1, got {value}")
    if is_run and args.reference is None and (args.categories or args.subset != "test"):
        name = "categories" if args.categories else "subset"
        raise ValueError(f"{name}: needs --reference DATA, from which it chooses")
    if not is_run:
        for name in ("num_samples", "sampler", "steps", "eta", "guidance", "checkpoint"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name.replace('_', '-')}: is for a run folder, {args.run_or_samples} is not one")
        if args.reference is None:
            what = f"expected the clouds to compare {args.run_or_samples} with, which is no run, as --reference DATA"
            raise ValueError(f"reference: {what}")


@dataclass(frozen=True)
class Inputs:
    """All that is compared: checked, and read once so that nothing bad comes up later."""

    run: ScoredRun | None  # makes the samples
    given: CloudSet | None  # the samples, where no run makes them
    references: CloudSet
    training: Training | None
    num_samples: int
    points: tuple[int, int]  # of each sample and each reference
    plain: Float32[np.ndarray, "R M 3"]  # the references in the units of the run, or as they are
    boxed: Float32[np.ndarray, "R M 3"]  # as they are compared
    again: Float32[np.ndarray, "R M 3"] | None  # as ``boxed``, with other points, where each has as many more
    fresh: Float32[np.ndarray, "S M 3"] | None  # others of the references' generator, as they are compared
    other: Float32[np.ndarray, "R M 3"] | None  # as ``boxed``, of the other split, where both are asked for
    fingerprints: list[bytes]  # of the whole references
    split: str  # which of the references' points were drawn from
    own_units: bool  # the run's, which gives each cloud its own
    out: Path


def evaluate(
    args: EvaluateArguments, command: Sequence[str] = (), processes: Processes = ALONE
) -> dict[str, Any] | None:
    """Run the command; see :class:`EvaluateArguments`. Returns what ``evaluation.json`` says.

    Several ``processes`` sample a run together; then the main one goes on alone, and the others return None.

    Raises:
        ValueError: no run, samples or references, clouds that are not finite, options out of range.
    """
    device, remarks = best_device(), Remarks()
    inputs = _inputs(args, device, remarks, processes)
    run, references, training = inputs.run, inputs.references, inputs.training
    if run is None and not processes.main:
        return None
    # A run that goes on has another newest one tomorrow, and perhaps another best one.
    if run is not None and args.checkpoint in (None, BEST) and not run.run.pretrained:
        note_best(run.run, args.checkpoint)
        args = replace(args, checkpoint=run.checkpoint.name)
        command = [*command, "--checkpoint", run.checkpoint.name] if command else []
    subsets = intervals.num_subsets(inputs.num_samples, len(references))
    phases = Phases(
        [
            *(["sampling", "reconstructions"] if run else []),
            *(["bound of the priors"] if run and run.bounded(references.clouds) else []),
            "Chamfer distances",
            *([f"EMD, {args.emd}"] if args.matching else []),
            *(["fresh shapes"] if inputs.fresh is not None else []),
            *(["the other split"] if inputs.other is not None else []),
            *(["intervals"] if subsets else []),
            *(["nearest training shapes"] if training else []),
            "pictures",
        ]
    )

    made, sampling, scores, given = None, None, dict[str, Float64[np.ndarray, " R"]](), inputs.given
    if run is not None:
        options = _sampling(args, inputs.num_samples, inputs.points[0])
        made, sampling = run.sample(options, references.clouds, phases.title("sampling"), processes)
        clouds = in_memory("samples", list(made), [str(i) for i in range(len(made))])
        given = CloudSet("samples", f"{args.run_or_samples}, generated", clouds)
        if not processes.main:
            return None
        scores = run.scores(references.clouds, inputs.plain, args.matching, args.seed, phases)
        record.remark_on_scores(_means(scores), run.bounded(references.clouds), remarks)
    assert given is not None
    samples = Preparation(None, args.seed, norm_box=args.norm_box)(given, inputs.points[0], SAMPLES)

    a, b = (torch.from_numpy(x).to(device) for x in (samples, inputs.boxed))
    kinds, titles = metrics.kinds(args.matching), {"cd": "Chamfer distances", "emd": f"EMD, {args.emd}"}
    comparison = metrics.Comparison(
        {name: _distances(a, b, titles[name], kind, phases) for name, kind in kinds.items()},
        metrics.Measures.of(a),
        metrics.Measures.of(b),
    )
    figures, distances = comparison.figures() | _means(scores), comparison.distances["cd"]
    floor = _floors(inputs, comparison, args, device, phases)
    other = None if inputs.other is None else _other_split(a, inputs.other, comparison, kinds, phases)
    between = {name: found for name, of in scores.items() if (found := intervals.of_mean(of))}
    of_halves = dict[str, intervals.Interval]()
    if subsets:
        rng = Preparation(None, args.seed).rng(SHAPES, 0)
        with phases("intervals", subsets, "subset") as bar:
            between |= intervals.intervals(comparison, rng, bar.update)
            floor["halves"], of_halves = intervals.halves(comparison, rng, bar.update)
    sets, fewer = (len(samples), len(references)), min(len(samples), len(references))
    ours = record.described(given, samples, distances.samples, fewer)
    theirs = record.described(references, inputs.boxed, distances.references, fewer)
    record.remark_on_sets(ours, theirs, args.norm_box, remarks)
    record.remark_on_copies([fingerprint(c) for c in given], inputs.fingerprints, figures["1nna_cd"], remarks)

    near = base = memorising = None
    if training is not None:
        with phases("nearest training shapes", sum(sets) * len(training.source), "pair") as bar:
            near, base = (nearest_training(x, training, device, bar.update) for x in (samples, inputs.boxed))
        memorising = summary(near, base, training, device)
        record.remark_on_leaks(inputs.fingerprints, training, remarks)
        record.remark_on_memorising(memorising, *sets, remarks)
    data_units = not inputs.own_units and not args.norm_box
    published = record.published_rows(references.clouds, inputs.points, data_units, remarks)
    cross = distances.cross.cpu().numpy()
    result = record.environment(asdict(args), command, device) | {
        "samples": ours | {"sampling": sampling},
        "references": theirs,
        "run": record.trained_with(run),
        "training": record.training_set(training),
        "normalization": record.units(args.norm_box, run),
        "split": inputs.split,
        "figures": _finite(figures),
        "intervals": between,
        "floors": {name: _finite(of) for name, of in floor.items()},
        "halves_intervals": of_halves,
        "other_split": None if other is None else {"split": OTHER_SPLIT[args.first], "figures": _finite(other)},
        "chance_1nna": metrics.chance_accuracy(*sets),
        **published,
        "memorising": memorising,
        "warnings": remarks.warnings,
        "notes": remarks.notes,
        "per_sample": record.per_sample(given.clouds, references.clouds, cross, training, near),
        "per_reference": record.per_reference(given.clouds, references.clouds, cross, base),
    }
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    print(table.render(result))  # before anything is written: should the disk be full, the figures are not lost
    html = page.render(result, samples, inputs.boxed, near.points if near else None, phases)
    files = {folder.JSON: text.encode(), folder.PAGE: html.encode()}
    if made is not None:
        buffer = io.BytesIO()
        np.savez(buffer, points=made)
        files[folder.SAMPLES] = buffer.getvalue()
    folder.write(inputs.out, files)
    print(f"\nfigures: {inputs.out / folder.JSON}; pictures: {inputs.out / folder.PAGE}")
    return result


def _inputs(args: EvaluateArguments, device: torch.device, remarks: Remarks, processes: Processes) -> Inputs:
    """Check and read everything; what keeps it from being as asked for is pointed out."""
    target = find_run(args.run_or_samples)
    if not target.exists():
        wanted = f"a run folder, a shipped model ({shipped_models()}), or a folder or file of clouds"
        raise ValueError(f"samples: {target} does not exist: expected {wanted}")
    is_run = (target / "config.json").is_file()
    check(args, is_run)
    beside = target.with_name(f"{target.stem}-evaluation") if target.is_file() else target / "evaluation"
    out = args.out or (open_run(target).results / "evaluation" if is_run else beside)
    folder.check(out, (folder.JSON, folder.PAGE, *([folder.SAMPLES] if is_run else [])))
    run = given = None
    if is_run:
        found = open_run(target)
        resolved(found, _sampling(args, 1, 1))  # before the weights are loaded
        run = ScoredRun.load(found, args.checkpoint, device, processes)
    else:
        given = open_clouds("samples", str(target), args.subset, args.categories)
    references, shapes = _data(args, run, given, remarks)
    if given is not None:
        given = in_units_of(given, references)
    own_units = run.run.normalization if run and run.run.normalization.kind != "global" else None
    prepare = Preparation(args.first, args.seed, own_units)
    counts = references.num_points()
    divided = max(counts) >= SPLIT_POINTS
    if not divided and args.split != EvaluateArguments.split:
        remarks.notes.append(f"The split {args.split} changes nothing: no reference has {SPLIT_POINTS} points.")
    splits = [prepare]
    if divided and args.split == "both":
        splits.append(replace(prepare, split=OTHER_SPLIT[args.first]))
    points = _points(args, run, given, min(split.available(count) for split in splits for count in counts), remarks)
    plain = prepare(references, points[1], REFERENCES)
    boxed = replace(prepare, norm_box=args.norm_box)
    num_samples = len(given) if given is not None else args.num_samples or len(references)
    fresh = other = again = None
    if references.generated:
        fresh = boxed(open_clouds("fresh", "procedural", "test", (), num_samples), points[1], FRESH)
    if len(splits) > 1:
        other = replace(splits[1], norm_box=args.norm_box)(references, points[1], REFERENCES)
    if min(map(prepare.available, counts)) >= 2 * points[1]:
        again = boxed(references, points[1], REFERENCES, again=True)
    return Inputs(
        run,
        given,
        references,
        None if shapes is None else Training.read(shapes, boxed, min(points)),
        num_samples,
        points,
        plain,
        np.stack([fit_box(cloud) for cloud in plain]) if args.norm_box else plain,
        again,
        fresh,
        other,
        [fingerprint(cloud) for cloud in references],
        args.first if divided else "all points",
        own_units is not None,
        out,
    )


def _sampling(args: EvaluateArguments, num_samples: int, num_points: int) -> SampleArguments:
    return SampleArguments(
        run=args.run_or_samples,
        num_samples=num_samples,
        num_points=num_points,
        sampler=args.sampler,
        steps=args.steps,
        eta=args.eta,
        guidance=args.guidance,
        seed=args.seed,
        batch_size=args.batch_size,
        checkpoint=args.checkpoint,
    )


def _data(
    args: EvaluateArguments, run: ScoredRun | None, given: CloudSet | None, remarks: Remarks
) -> tuple[CloudSet, CloudSet | None]:
    """The references, and the training shapes if they are known."""
    own, config = None, run.run.config if run else None
    if config is not None and (args.reference is None or args.training is None):
        try:
            own = load_sources(config.data, config.evaluate_shapes)
        except ValueError as error:
            if args.reference is None:
                raise ValueError(f"reference: the run's own data cannot be read ({error}): give --reference") from None
            remarks.warnings.append(f"The run's own training shapes cannot be read ({error}).")
    count = len(given) if given is not None else args.num_samples
    if args.reference is not None:
        default = 0 if config is None else config.evaluate_shapes
        references = open_clouds("reference", args.reference, args.subset, args.categories, count or default)
    else:
        assert own is not None and config is not None
        what = f"held-out shapes of the run's data ({config.data.source})"
        held_out = own.held_out
        if args.num_samples is not None and args.num_samples < len(held_out):
            text = f"Compared with {args.num_samples} of {len(held_out)} held-out shapes, as many as there are samples."
            remarks.notes.append(text)
            held_out = held_out.subset(in_turn(held_out.labels)[: args.num_samples])
        references = CloudSet("reference", what, held_out, generated=own.fresh is not None)
    if args.training is not None:
        count = DataConfig().num_shapes
        return references, open_clouds("training", args.training, "train", args.categories, count)
    if own is not None and config is not None:
        return references, CloudSet("training", f"training shapes of the run's data ({config.data.source})", own.train)
    if config is None:
        remarks.notes.append("No training shapes were given (--training), so nothing says what was memorised.")
    return references, None


def _points(
    args: EvaluateArguments, run: ScoredRun | None, given: CloudSet | None, available: int, remarks: Remarks
) -> tuple[int, int]:
    """Points per sample and per reference, of which each has so many; what keeps them from being as asked for is
    pointed out."""
    if run is not None:
        samples = run.run.config.data.num_points if args.num_points is None else args.num_points
    else:
        assert given is not None
        counts = given.num_points()
        samples = min(counts) if args.num_points is None else min(args.num_points, *counts)
        if args.num_points is not None and samples < args.num_points:
            remarks.warnings.append(f"Samples have only {samples} points, not the {args.num_points} asked for.")
        elif args.num_points is None and max(counts) > samples:
            remarks.notes.append(f"Samples have {samples} to {max(counts)} points: {samples} are drawn of each.")
    references = min(samples, available)
    if references < samples:
        text = f"References have only {references} points, fewer than the {samples} of the samples: thickness and "
        text += "unevenness then do not compare"
        if args.emd == "approx":
            text += ", nor does EMD within and between the sets, and 1-NNA by EMD says little"
        remarks.warnings.append(f"{text}. For both alike give --num-points {references}.")
        if args.emd == "exact":
            raise ValueError(
                f"emd: exact needs equally many points, got samples of {samples} and references of {references}: "
                f"give --num-points {references}"
            )
    if run is not None and references < (fewest := fewest_points(run.run.config.model)):
        raise ValueError(f"num-points: this model needs at least {fewest}, got references of {references}")
    return samples, references


def _distances(
    a: Float32[Tensor, "S N 3"], b: Float32[Tensor, "R M 3"], title: str, kind: metrics.Distance, phases: Phases
) -> metrics.Distances:
    with phases(title, metrics.num_pairs(len(a), len(b)), "pair") as bar:
        found = metrics.all_distances(a, b, kind, progress=bar.update)
    return metrics.Distances(found.samples.cpu(), found.cross.cpu(), found.references.cpu())


def _floors(
    inputs: Inputs, comparison: metrics.Comparison, args: EvaluateArguments, device: torch.device, phases: Phases
) -> dict[str, dict[str, float]]:
    """The floors that need more clouds than the references."""
    references = torch.from_numpy(inputs.boxed).to(device)
    found = dict[str, dict[str, float]]()
    if inputs.fresh is not None:
        fresh, known = torch.from_numpy(inputs.fresh).to(device), comparison.distances["cd"]
        # By Chamfer distance alone: with an EMD it would take as long again as all the rest.
        with phases("fresh shapes", len(fresh) * (len(fresh) + len(references)), "pair") as bar:
            sets = fresh, references
            within, cross = (metrics.pairwise_distances(x, fresh, progress=bar.update).cpu() for x in sets)
        distances = {"cd": metrics.Distances(within, cross.T, known.references)}
        found["fresh"] = metrics.Comparison(distances, metrics.Measures.of(fresh), comparison.references).figures()
    if inputs.again is not None:
        again = torch.from_numpy(inputs.again).to(device)
        found["redrawn"] = floors.redrawn(again, references, comparison.references, args.matching)
    return found


def _other_split(
    samples: Float32[Tensor, "S N 3"],
    other: Float32[np.ndarray, "R M 3"],
    comparison: metrics.Comparison,
    kinds: Mapping[str, metrics.Distance],
    phases: Phases,
) -> dict[str, float]:
    """The figures against the other points of the references; ``comparison`` is that against the first."""
    references, distances = torch.from_numpy(other).to(samples.device), dict[str, metrics.Distances]()
    pairs = len(references) * (len(samples) + len(references))
    with phases("the other split", pairs * len(kinds), "pair") as bar:
        for name, kind in kinds.items():
            sets = samples, references
            cross, within = (metrics.pairwise_distances(references, x, kind, progress=bar.update).cpu() for x in sets)
            distances[name] = metrics.Distances(comparison.distances[name].samples, cross.T, within)
    return metrics.Comparison(distances, comparison.samples, metrics.Measures.of(references)).figures()


def _means(scores: Mapping[str, Float64[np.ndarray, " R"]]) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in scores.items()}


def _finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """As JSON has them."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def main(args: list[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if args is None else args
    prog = "python -m lion_triton.evaluate"
    run_cli(lambda: evaluate(tyro.cli(EvaluateArguments, args=given, prog=prog), given, Processes.join()))


if __name__ == "__main__":
    main()
