"""Score generated shapes: ``python -m lion_triton.evaluate RUN_OR_SAMPLES [--reference DATA] [--norm-box] ...``

Prints the figures beside published ones and writes OUT/evaluation.json, which says all that is needed to repeat
them, and OUT/evaluation.html, a page with pictures that needs nothing else.
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from jaxtyping import Float32
from torch import Tensor
from tqdm import tqdm

from lion_triton import metrics
from lion_triton.cli import run_cli
from lion_triton.config import DataConfig, fewest_points
from lion_triton.data.sources import load_sources
from lion_triton.devices import best_device
from lion_triton.evaluation import folder, page, record, table
from lion_triton.evaluation.memorising import Training, nearest_training, summary
from lion_triton.evaluation.model import Model
from lion_triton.evaluation.record import Remarks
from lion_triton.evaluation.sets import SPLIT_POINTS, Preparation, Source, Split, in_memory, open_clouds
from lion_triton.runs import load_model, open_run
from lion_triton.sample import SampleArguments, resolved

SAMPLES, REFERENCE = 3, 4  # streams of random numbers; the data have 0 to 2, evaluation.memorising from 5


@dataclass(frozen=True)
class EvaluateArguments:
    """Compare generated clouds with held-out ones: MMD, COV, 1-NNA by Chamfer distance and EMD, JSD. For a run, also
    reconstruction and the bound of its priors.

    DATA is a folder <category>/{train,val,test}/<id>.npy, a folder of clouds, a .npz or .npy of (S, P, 3), or the
    word procedural. Writes OUT/evaluation.json and OUT/evaluation.html, for a run also OUT/samples.npz.

    Examples, of a run and its own held-out shapes, and of a file of clouds and the test chairs of a data set:
        python -m lion_triton.evaluate runs/quickstart --emd none
        python -m lion_triton.evaluate samples.npz --reference ShapeNetCore.v2.PC15k --categories chair

    Attributes:
        run_or_samples: a run folder, which is sampled; or DATA.
        reference: DATA to compare with; default of a run: its own held-out shapes.
        training: DATA that the model was trained on, to see what it memorised; default of a run: its own.
        subset: which part of folders with train, val and test to take, of references and samples.
        categories: categories to take of such a folder of references; default all.
        split: which points of clouds of 15000 (ShapeNetCore.v2.PC15k): LION draws from the first 10000, most others
            compare with the last 5000.
        norm_box: fit each cloud's bounding box to [-0.5, 0.5] first.
        emd: approximate matching as published, exact assignment, or none; on a CPU either takes most of the time.
        num_points: points per cloud, drawn at random where there are more; default those of the samples.
        num_samples: clouds to generate of a run; default as many as there are references.
        sampler: of a run; default as its configuration.
        steps: of a run's sampler; default as its configuration.
        eta: DDIM's stochasticity, 0 to 1.
        checkpoint: of a run, as step-00001000; default the newest.
        seed: decides the samples and the points drawn.
        batch_size: clouds generated at a time.
        out: folder for the results; default RUN/evaluation; for samples the folder evaluation in theirs, or beside
            their file <file>-evaluation.
    """

    run_or_samples: tyro.conf.Positional[Path]
    reference: str | None = None
    training: str | None = None
    subset: Literal["train", "val", "test"] = "test"
    categories: tuple[str, ...] = ()
    split: Split = "first10k"
    norm_box: bool = False
    emd: Literal["approx", "exact", "none"] = "approx"
    num_points: int | None = None
    num_samples: int | None = None
    sampler: Literal["ddpm", "ddim", "ode"] | None = None
    steps: int | None = None
    eta: float | None = None
    checkpoint: str | None = None
    seed: int = 0
    batch_size: int = 64
    out: Path | None = None

    @property
    def matching(self) -> metrics.EMD | None:
        """``emd`` as ``lion_triton.metrics`` takes it."""
        return None if self.emd == "none" else self.emd


def check(args: EvaluateArguments, is_run: bool) -> None:
    """Raise ``ValueError`` for options out of range, or of a run where there is none."""
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"seed: expected 0 to 2^31 - 1, got {args.seed}")
    for name in ("num_points", "num_samples", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name.replace('_', '-')}: expected at least 1, got {value}")
    if is_run and args.reference is None and (args.categories or args.subset != "test"):
        name = "categories" if args.categories else "subset"
        raise ValueError(f"{name}: is of the folder given by --reference, which is not given")
    if not is_run:
        for name in ("num_samples", "sampler", "steps", "eta", "checkpoint"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name.replace('_', '-')}: is for a run folder, {args.run_or_samples} is none")
        if args.reference is None:
            raise ValueError("reference: expected the clouds to compare with, as --reference DATA")


class Phases:
    """Progress bars that say which part of the whole each is, as "3/7 Chamfer distances"."""

    def __init__(self, titles: Sequence[str]) -> None:
        self.titles = list(titles)

    def title(self, name: str) -> str:
        return f"{self.titles.index(name) + 1}/{len(self.titles)} {name}"

    def bar(self, name: str, total: int, unit: str) -> "tqdm[Any]":
        return tqdm(total=total, desc=self.title(name), unit=unit, disable=None)


def evaluate(args: EvaluateArguments, command: Sequence[str] = ()) -> dict[str, Any]:
    """Run the command; see :class:`EvaluateArguments`. Returns what ``evaluation.json`` says.

    Raises:
        ValueError: no run, samples or references, clouds that are not finite, options out of range.
    """
    target, device, remarks = args.run_or_samples, best_device(), Remarks()
    if not target.exists():
        raise ValueError(f"samples: {target} does not exist: expected a run folder, or a folder or file of clouds")
    is_run = (target / "config.json").is_file()
    check(args, is_run)
    out = args.out or (target.with_name(f"{target.stem}-evaluation") if target.is_file() else target / "evaluation")
    folder.check(out, (folder.JSON, folder.PAGE, *([folder.SAMPLES] if is_run else [])))
    model, given = None, None
    if is_run:
        run = open_run(target)
        newest = run.checkpoint(args.checkpoint)
        resolved(run, _sampling(args, 1, 1))  # before the weights are loaded
        model = Model(run, load_model(run, args.checkpoint).to(device), newest.name if newest else "")
        if args.checkpoint is None:  # a run that goes on has another newest one tomorrow
            command = [*command, "--checkpoint", model.checkpoint]
    else:
        given = open_clouds("samples", str(target), args.subset)
    reference, own_training = _data(args, model, given, remarks)

    # Everything that can be wrong with the data is found before anything takes long.
    own_units = model.run.normalization if model and model.run.normalization.kind != "global" else None
    prepare = Preparation(args.split, args.seed, own_units)
    num_points, reference_points = _points(args, model, given, reference, prepare, remarks)
    plain = prepare(reference, reference_points, REFERENCE)
    boxed = replace(prepare, norm_box=args.norm_box)
    references = boxed(reference, reference_points, REFERENCE) if args.norm_box else plain
    training = None
    if own_training is not None:
        training = Training.read(own_training, boxed, min(num_points, reference_points))
    count = len(given) if given is not None else args.num_samples or len(reference)

    phases = Phases(
        [
            *(["sampling", "reconstructions"] if model else []),
            *(["bound of the priors"] if model and model.bounded(reference.clouds) else []),
            "Chamfer distances",
            *([f"EMD, {args.emd}"] if args.matching else []),
            *(["nearest training shapes"] if training else []),
            "pictures",
        ]
    )
    made, sampling, scores = None, None, dict[str, float]()
    if model is not None:
        options = _sampling(args, count, num_points)
        made, sampling = model.sample(options, reference.clouds, phases.title("sampling"))
        clouds = in_memory("samples", list(made), [str(i) for i in range(len(made))])
        given = Source("samples", f"{target}, generated", clouds)
        scores = model.scores(reference.clouds, plain, args.matching, args.seed, phases.bar)
        if not model.bounded(reference.clouds):
            remarks.notes.append("No bound of the priors: the run's classes are not those of the references.")
    assert given is not None
    samples = Preparation(None, args.seed, norm_box=args.norm_box)(given, num_points, SAMPLES)

    a, b = (torch.from_numpy(x).to(device) for x in (samples, references))
    figures = dict[str, float | None]()
    distances = _distances(a, b, "Chamfer distances", "cd", phases)
    figures |= metrics.figures(distances, "cd")
    cross = distances.cross.cpu().numpy()
    if args.matching is not None:
        figures |= metrics.figures(_distances(a, b, f"EMD, {args.emd}", args.matching, phases), "emd")
    figures["jsd"] = metrics.jensen_shannon_divergence(a, b)
    figures |= {name: value if math.isfinite(value) else None for name, value in scores.items()}

    nearest = base = memorising = None
    if training is not None:
        with phases.bar("nearest training shapes", (len(a) + len(b)) * len(training.source), "pair") as bar:
            nearest, base = (nearest_training(x, training, device, bar.update) for x in (samples, references))
        memorising = summary(nearest, base, training, device)
        record.remark_on_memorising(memorising, len(samples), len(references), remarks)
    fewer = min(len(samples), len(references))
    sets = {
        "samples": record.described(given, samples, distances.samples[:fewer, :fewer]),
        "references": record.described(reference, references, distances.references[:fewer, :fewer]),
    }
    record.remark_on_sets(sets["samples"], sets["references"], remarks)
    points, data_units = (samples.shape[1], references.shape[1]), own_units is None and not args.norm_box
    published = record.published_rows(reference.clouds, points, data_units, remarks)
    result = record.environment(asdict(args), command, device) | {
        "samples": sets["samples"] | {"sampling": sampling},
        "references": sets["references"],
        "run": record.trained_with(model),
        "training": record.training_set(training),
        "normalization": record.units(args.norm_box, model),
        "figures": figures,
        "chance_1nna": metrics.chance_accuracy(len(samples), len(references)),
        **published,
        "memorising": memorising,
        "warnings": remarks.warnings,
        "notes": remarks.notes,
        "per_sample": record.per_sample(given.clouds, reference.clouds, cross, training, nearest),
        "per_reference": record.per_reference(given.clouds, reference.clouds, cross, base),
    }
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    print(table.render(result))  # before anything is written: should the disk be full, the figures are not lost
    html = page.render(result, samples, references, nearest.points if nearest else None, phases.bar)
    files = {folder.JSON: text.encode(), folder.PAGE: html.encode()}
    if made is not None:
        buffer = io.BytesIO()
        np.savez(buffer, points=made)
        files[folder.SAMPLES] = buffer.getvalue()
    folder.write(out, files)
    print(f"\nfigures: {out / folder.JSON}; pictures: {out / folder.PAGE}")
    return result


def _sampling(args: EvaluateArguments, num_samples: int, num_points: int) -> SampleArguments:
    return SampleArguments(
        run=args.run_or_samples,
        num_samples=num_samples,
        num_points=num_points,
        sampler=args.sampler,
        steps=args.steps,
        eta=args.eta,
        seed=args.seed,
        batch_size=args.batch_size,
        checkpoint=args.checkpoint,
    )


def _data(
    args: EvaluateArguments, model: Model | None, given: Source | None, remarks: Remarks
) -> tuple[Source, Source | None]:
    """The references, and the training shapes if they are known."""
    own, config = None, model.run.config if model else None
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
        reference = open_clouds("reference", args.reference, args.subset, args.categories, count or default)
    else:
        assert own is not None and config is not None
        reference = Source("reference", f"held-out shapes of the run's data ({config.data.source})", own.held_out)
    if args.training is not None:
        return reference, open_clouds("training", args.training, "train", count=DataConfig().num_shapes)
    if own is not None and config is not None:
        return reference, Source("training", f"training shapes of the run's data ({config.data.source})", own.train)
    if config is None:
        remarks.notes.append("No training shapes were given (--training), so nothing says what was memorised.")
    return reference, None


def _points(
    args: EvaluateArguments,
    model: Model | None,
    given: Source | None,
    reference: Source,
    prepare: Preparation,
    remarks: Remarks,
) -> tuple[int, int]:
    """Points per sample and per reference; what keeps them from being as asked for is pointed out."""
    if model is not None:
        samples = model.run.config.data.num_points if args.num_points is None else args.num_points
    else:
        assert given is not None
        counts = given.num_points()
        samples = min(counts) if args.num_points is None else min(args.num_points, *counts)
        if args.num_points is not None and samples < args.num_points:
            remarks.warnings.append(f"Samples have only {samples} points, not the {args.num_points} asked for.")
        elif args.num_points is None and max(counts) > samples:
            remarks.notes.append(f"Samples have {samples} to {max(counts)} points: {samples} are drawn of each.")
    counts = reference.num_points()
    references = min(samples, *(prepare.available(count) for count in counts))
    if references < samples:
        text = f"References have only {references} points, fewer than the {samples} of the samples"
        if args.emd == "approx":
            text += ": EMD within and between the sets then does not compare, and 1-NNA by EMD says little"
        remarks.warnings.append(f"{text}. For both alike give --num-points {references}.")
        if args.emd == "exact":
            raise ValueError(
                f"emd: exact needs equally many points, got samples of {samples} and references of {references}: "
                f"give --num-points {references}"
            )
    if model is not None and references < (fewest := fewest_points(model.run.config.model)):
        raise ValueError(f"num-points: this model needs at least {fewest}, got references of {references}")
    if max(counts) < SPLIT_POINTS:
        remarks.notes.append(f"The split {args.split} changes nothing: no reference has {SPLIT_POINTS} points.")
    return samples, references


def _distances(
    a: Float32[Tensor, "S N 3"], b: Float32[Tensor, "R M 3"], title: str, kind: metrics.Distance, phases: Phases
) -> metrics.Distances:
    with phases.bar(title, metrics.num_pairs(len(a), len(b)), "pair") as bar:
        return metrics.all_distances(a, b, kind, progress=bar.update)


def main(args: list[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if args is None else args
    prog = "python -m lion_triton.evaluate"
    run_cli(lambda: evaluate(tyro.cli(EvaluateArguments, args=given, prog=prog), given))


if __name__ == "__main__":
    main()
