"""Score generated shapes: ``python -m lion_triton.evaluate RUN_OR_SAMPLES [--reference DATA] [--norm-box] ...``

Prints the figures beside published ones and writes OUT/evaluation.json, which says all that is needed to repeat
them, and OUT/evaluation.html, a page with pictures that needs nothing else.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import scipy
import torch
import tyro
from jaxtyping import Float32
from torch import Tensor
from tqdm import tqdm

from lion_triton import __version__, metrics, page, runs
from lion_triton.cli import run_cli
from lion_triton.config import DataConfig
from lion_triton.data.clouds import SYNSETS, Clouds, Normalization, folder_clouds, procedural_clouds
from lion_triton.data.containers import Container
from lion_triton.data.meshes import SHAPE_SUFFIXES, read_shape
from lion_triton.data.sources import PROCEDURAL_POINTS, PROCEDURAL_SEEDS, load_sources
from lion_triton.devices import best_device, resolve_precision
from lion_triton.kernels import chamfer_distance, pairwise_chamfer
from lion_triton.models.lion import LION
from lion_triton.objectives import Posterior, posterior
from lion_triton.published_scores import POINTS, REFERENCES, SOURCE, published
from lion_triton.report import reconstruct
from lion_triton.runs import Run, load_model, open_run
from lion_triton.sample import SampleArguments, class_labels, generate, resolved

SPLIT_POINTS, FIRST, LAST = 15_000, 10_000, 5_000  # of ShapeNetCore.v2.PC15k, and the splits of its points
SCREEN_POINTS, CANDIDATES = 256, 8  # how the nearest training shape is found
FLOOR_SHAPES = 64
SAMPLES, REFERENCE, TRAINING, FLOOR, SCREEN = range(3, 8)  # streams of random numbers; the data have 0 to 2

Array = np.ndarray
Split = Literal["first10k", "last5k"]


@dataclass(frozen=True)
class EvaluateArguments:
    """Compare generated clouds with held-out ones: MMD, COV, 1-NNA by Chamfer distance and EMD, JSD. For a run, also
    reconstruction and the bound of its priors.

    DATA is a folder <category>/{train,val,test}/<id>.npy, a folder of clouds, a .npz or .npy of (S, P, 3), or the
    word procedural. Writes OUT/evaluation.json and OUT/evaluation.html, for a run also OUT/samples.npz.

    Attributes:
        run_or_samples: a run folder, whose newest checkpoint is sampled; or a folder or file of clouds.
        reference: DATA to compare with; for a run, default its own held-out shapes.
        training: DATA that the model was trained on, to see what it memorised; for a run, default its own.
        subset: which part of a reference folder with train, val and test.
        categories: categories of a folder to use; default all.
        split: which points of clouds of 15,000 (ShapeNetCore.v2.PC15k): LION draws from the first 10,000, most others
            compare with the last 5,000.
        norm_box: fit each cloud's bounding box to [-0.5, 0.5] first.
        emd: approximate matching as published, exact assignment, or none; on a CPU either takes most of the time.
        num_points: points per cloud, drawn at random where there are more; default those of the samples.
        num_samples: clouds to generate of a run; default as many as there are references.
        sampler: of a run; default as its configuration.
        steps: of a run's sampler; default as its configuration.
        eta: DDIM's stochasticity, 0 to 1.
        seed: decides the samples and the points drawn.
        batch_size: clouds generated at a time.
        out: folder for the results; default RUN/evaluation, SAMPLES/evaluation, or beside a file of samples.
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
    seed: int = 0
    batch_size: int = 64
    out: Path | None = None


def check(args: EvaluateArguments, is_run: bool) -> None:
    """Raise ``ValueError`` for options out of range, or of a run where there is none."""
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"seed: expected 0 to 2^31 - 1, got {args.seed}")
    for name in ("num_points", "num_samples", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name.replace('_', '-')}: expected at least 1, got {value}")
    if not is_run:
        for name in ("num_samples", "sampler", "steps", "eta"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name.replace('_', '-')}: is for a run folder, {args.run_or_samples} is none")
        if args.reference is None:
            raise ValueError("reference: expected the clouds to compare with, as --reference DATA")


@dataclass(frozen=True)
class Source:
    """A set of clouds and where it came from."""

    what: str
    clouds: Clouds


def open_clouds(name: str, path: str, args: EvaluateArguments, count: int = 0) -> Source:
    """The clouds that the option ``name`` gives; ``count`` of them if they are procedural.

    Raises:
        ValueError: nothing there, or no set of clouds; a cloud that is not finite, by its index.
    """
    if path == "procedural":
        split = "train" if name == "training" else "held_out"
        clouds = procedural_clouds(count, PROCEDURAL_POINTS, PROCEDURAL_SEEDS[split])
        return Source(f"procedural shapes, {split.replace('_', '-')}", clouds)
    where = Path(path)
    if (where / "clouds.npz").is_file():  # of lion_triton.sample
        where = where / "clouds.npz"
    if where.is_file():
        return Source(str(where), _read_file(name, where))
    if not where.is_dir():
        raise ValueError(f"{name}: {where} does not exist")
    files = sorted(f.name for f in where.iterdir() if f.suffix.lower() in SHAPE_SUFFIXES and f.name[0] != ".")
    if files:
        return Source(str(where), _read_folder(name, where, files))
    subset = "train" if name == "training" else args.subset
    try:
        return Source(f"{where}, {subset}", folder_clouds(where, subset, args.categories or None))
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix('root: ')}") from None


def _read_file(name: str, path: Path) -> Clouds:
    """A .npy file, or a .npz file with an array ``points`` or a single one: (S, P, 3)."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, Array):
            array = loaded
        else:
            with loaded:
                array = loaded[loaded.files[0] if len(loaded.files) == 1 else "points"]
    except Exception as error:  # a damaged file makes NumPy's parsers raise nearly anything
        raise ValueError(f"{name}: {path} is not a readable .npy or .npz of clouds ({_reason(error)})") from None
    if array.dtype.kind not in "fiu" or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(f"{name}: expected numbers of shape (S, P, 3) in {path}, got {array.dtype} {array.shape}")
    return _in_memory(name, list(array), [str(i) for i in range(len(array))])


def _read_folder(name: str, folder: Path, files: Sequence[str]) -> Clouds:
    """A folder with one cloud per file."""
    clouds = []
    for i, file in enumerate(files):
        try:
            shape = read_shape(Container(folder), file)
        except Exception as error:  # whatever a parser makes of a bad file
            raise ValueError(f"{name}: cloud {i}, {folder / file}: {_reason(error)}") from None
        if shape.is_mesh:
            raise ValueError(f"{name}: {folder / file} is a mesh: python -m lion_triton.prepare makes clouds of meshes")
        clouds.append(shape.coordinates)
    return _in_memory(name, clouds, files)


def _in_memory(name: str, clouds: Sequence[Array], names: Sequence[str]) -> Clouds:
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is reported as such
        arrays = tuple(np.ascontiguousarray(cloud, dtype=np.float32) for cloud in clouds)
    bad = [i for i, cloud in enumerate(arrays) if not np.isfinite(cloud).all()]
    if bad:
        more = f" ({len(bad)} clouds in all)" if len(bad) > 1 else ""
        raise ValueError(f"{name}: expected finite coordinates, got NaN or infinity in cloud {bad[0]}{more}")
    labels = np.zeros(len(arrays), dtype=np.int64)
    return Clouds(cast(Any, arrays), labels, ("",), tuple(names))  # a tuple: the arrays may differ in length


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Preparation:
    """How clouds of any kind become comparable: which of their points, in which units."""

    split: Split | None
    seed: int
    normalization: Normalization | None  # the run's, where that gives each cloud its own units
    norm_box: bool

    def part(self, points: int) -> slice:
        """The points to draw from, of a cloud of so many."""
        if self.split is None or points < SPLIT_POINTS:
            return slice(None)
        return slice(FIRST) if self.split == "first10k" else slice(points - LAST, points)

    def available(self, points: int) -> int:
        return len(range(points)[self.part(points)])

    def draw(
        self, cloud: Float32[Array, "P 3"], num_points: int, rng: np.random.Generator
    ) -> Float32[Array, "num_points 3"]:
        """Points drawn without replacement, or with it where there are too few; all, as they are, if just so many."""
        part = cloud[self.part(len(cloud))]
        if len(part) != num_points:
            part = part.take(rng.choice(len(part), num_points, replace=len(part) < num_points), axis=0)
        if self.normalization is not None:
            center, scale = self.normalization.center_and_scale(cloud)
            part = ((part - center) / scale).astype(np.float32)
        # By the box of the points that are compared.
        return Normalization("box").apply(part) / np.float32(2) if self.norm_box else part

    def __call__(
        self, clouds: Clouds, num_points: int, stream: int, indices: Iterable[int] | None = None
    ) -> Float32[Array, "K num_points 3"]:
        """The clouds ``indices``, or all. What is drawn depends on the seed, the stream and the cloud's own index."""
        chosen = range(len(clouds)) if indices is None else indices
        return np.stack(
            [self.draw(clouds[i], num_points, np.random.default_rng((self.seed, stream, i))) for i in chosen]
        )


@dataclass(frozen=True)
class Model:
    """A run that is sampled here."""

    run: Run
    lion: LION

    @property
    def conditional(self) -> bool:
        return self.run.config.model.shape_prior.num_classes > 0

    def labels(self, clouds: Clouds) -> Array | None:
        """The run's class of each cloud, if it knows all of their names."""
        if not self.conditional or not set(clouds.classes) <= set(self.run.classes):
            return None
        index = np.array([self.run.classes.index(name) for name in clouds.classes])
        return index[clouds.labels]

    def network_units(self, points: Array) -> Tensor:
        """Points as ``Preparation`` makes them without a box, as the networks take them."""
        normalization = self.run.normalization  # per cloud: done already, with mean 0 and scale 1 stored
        return torch.from_numpy(((points - np.array(normalization.mean)) / normalization.scale).astype(np.float32))

    def sample(self, args: EvaluateArguments, references: Clouds, num_points: int) -> tuple[Array, dict[str, Any]]:
        """Clouds in the units of ``Preparation`` without a box, and how they were made; classes as the references'."""
        count = len(references) if args.num_samples is None else args.num_samples
        options = SampleArguments(
            run=self.run.folder,
            num_samples=count,
            num_points=num_points,
            sampler=args.sampler,
            steps=args.steps,
            eta=args.eta,
            seed=args.seed,
            batch_size=args.batch_size,
        )
        labels, known = class_labels(self.run, options), self.labels(references)
        if known is not None:
            labels = np.resize(known, count)
        settings = resolved(self.run, options)
        points = self.run.normalization.invert(generate(self.run, self.lion, options, labels))
        checkpoint = self.run.checkpoints()[-1]
        return points, {
            **asdict(settings),
            "seed": args.seed,
            "batch_size": args.batch_size,
            "classes": "none" if not self.conditional else "in turn" if known is None else "those of the references",
            "precision": resolve_precision(self.run.config.mixed_precision, self.lion.z_mean.device),
            "checkpoint": str(checkpoint),
            "weights_sha256": {
                name: file["sha256"]
                for name, file in json.loads((checkpoint / "state.json").read_text())["files"].items()
                if name.endswith(".safetensors")
            },
        }

    def scores(self, args: EvaluateArguments, references: Clouds, points: Array, notes: list[str]) -> dict[str, float]:
        """Reconstruction of the references, and the bound of the priors on their latents."""
        normalised, emd = self.network_units(points), None if args.emd == "none" else args.emd
        rebuilt = reconstruct(self.lion, normalised, self.run.normalization, self.run.config.mixed_precision)
        scores = metrics.reconstruction(torch.from_numpy(rebuilt.points), torch.from_numpy(points), emd)
        labels = self.labels(references)
        if self.conditional and labels is None:
            notes.append("No bound of the priors: the run's classes are not those of the references.")
            return scores
        device = self.lion.z_mean.device
        parts = []
        for i, batch in enumerate(tqdm(normalised.split(32), "encoding", unit="batch", leave=False, disable=None)):
            parts.append(posterior(self.lion.vae, batch.to(device), torch.tensor([args.seed, -1 - i], device=device)))
        latents = Posterior(*(torch.cat([getattr(p, f) for p in parts]) for f in ("z", "h_mu", "h_log_sigma")))
        bound = metrics.prior_bound(
            self.lion,
            latents,
            torch.tensor([args.seed, 0], device=device),
            None if labels is None else torch.from_numpy(labels).to(device),
        )
        return scores | {f"bound_{name}": value for name, value in asdict(bound).items()}


@dataclass(frozen=True)
class Nearest:
    """The nearest training shape of each of K clouds."""

    index: Array  # (K,)
    distance: Array  # (K,) Chamfer
    points: Array  # (K, N, 3)


def nearest_training(
    clouds: Float32[Array, "K N 3"], training: Clouds, prepare: Preparation, device: torch.device, what: str
) -> Nearest:
    """Find each cloud's nearest training shape by Chamfer distance.

    All are compared with SCREEN_POINTS random points, then the CANDIDATES nearest with all N; up to SCREEN_POINTS
    points the first comparison is the whole. A training shape of fewer points repeats some.
    """
    count, num_points = len(training), clouds.shape[1]
    coarse = min(SCREEN_POINTS, num_points)
    rough = replace(prepare, split=None, normalization=None, norm_box=False)
    a = np.stack(
        [rough.draw(c, coarse, np.random.default_rng((prepare.seed, SCREEN, i))) for i, c in enumerate(clouds)]
    )
    b = prepare(training, coarse, TRAINING)
    with tqdm(total=len(a) * count, desc=f"training shapes, {what}", unit="pair", disable=None) as bar:
        table = pairwise_chamfer(*(torch.from_numpy(x).to(device) for x in (a, b)), progress=bar.update).cpu()
    if coarse == num_points:
        distance, index = (x.numpy() for x in table.min(dim=1))
        return Nearest(index, distance, b[index])
    found = table.topk(min(CANDIDATES, count), largest=False).indices.sort(dim=1).values.numpy()
    used = np.unique(found)
    full = torch.from_numpy(prepare(training, num_points, TRAINING, used.tolist()))
    rows = np.searchsorted(used, found)
    index, distance = np.empty(len(clouds), dtype=np.int64), np.empty(len(clouds), dtype=np.float32)
    for i, candidates in enumerate(rows):
        some = pairwise_chamfer(torch.from_numpy(clouds[i : i + 1]).to(device), full[candidates].to(device))[0].cpu()
        best = int(some.argmin())
        index[i], distance[i] = candidates[best], some[best]
    return Nearest(used[index], distance, full[index].numpy())


def sampling_floor(training: Clouds, num_points: int, prepare: Preparation, device: torch.device) -> Array | None:
    """Chamfer distances of two draws of points of one training shape; None if they have too few points for two."""
    every = max(1, len(training) // FLOOR_SHAPES)
    pairs = []
    for i in range(0, len(training), every)[:FLOOR_SHAPES]:
        cloud = training[i]
        if prepare.available(len(cloud)) < 2 * num_points:
            return None
        rng = np.random.default_rng((prepare.seed, FLOOR, i))
        pairs.append(rng.permutation(prepare.draw(cloud, 2 * num_points, rng)))
    both = torch.from_numpy(np.stack(pairs)).to(device)
    return chamfer_distance(both[:, :num_points], both[:, num_points:]).cpu().numpy()


def evaluate(args: EvaluateArguments, command: Sequence[str] = ()) -> dict[str, Any]:
    """Run the command; see :class:`EvaluateArguments`. Returns what ``evaluation.json`` says.

    Raises:
        ValueError: no run, samples or references, clouds that are not finite, options out of range.
    """
    target, device, notes = args.run_or_samples, best_device(), list[str]()
    if not target.exists():
        raise ValueError(f"samples: {target} does not exist")
    is_run = (target / "config.json").is_file()
    check(args, is_run)
    out = _out(args, is_run)
    model, given = None, None
    if is_run:
        run = open_run(target)
        model = Model(run, load_model(run).to(device))
    else:
        given = open_clouds("samples", str(target), args)
    reference, training = _data(args, model, given, notes)

    own_units = model.run.normalization if model and model.run.normalization.kind != "global" else None
    prepare = Preparation(args.split, args.seed, own_units, False)
    num_points, reference_points = _points(args, model, given, reference, prepare, notes)
    references = prepare(reference.clouds, reference_points, REFERENCE)
    sampling, scores = None, dict[str, float]()
    if model is not None:
        made, sampling = model.sample(args, reference.clouds, num_points)
        given = Source(f"{target}, generated", _in_memory("samples", list(made), [str(i) for i in range(len(made))]))
        scores = model.scores(args, reference.clouds, references, notes)
    assert given is not None
    samples = Preparation(None, args.seed, None, args.norm_box)(given.clouds, num_points, SAMPLES)
    if args.norm_box:
        prepare = replace(prepare, norm_box=True)
        references = prepare(reference.clouds, reference_points, REFERENCE)
    if len(samples) != len(references):
        notes.append(_unequal(len(samples), len(references)))

    a, b = (torch.from_numpy(x).to(device) for x in (samples, references))
    figures = dict[str, float | None]()
    distances = _distances(a, b, "Chamfer distances", "cd")
    figures |= metrics.figures(distances, "cd")
    cross = distances.cross.cpu().numpy()
    if args.emd != "none":
        figures |= metrics.figures(_distances(a, b, f"EMD, {args.emd}", args.emd), "emd")
    figures["jsd"] = metrics.jensen_shannon_divergence(a, b)
    figures |= {name: value if math.isfinite(value) else None for name, value in scores.items()}

    nearest, memorising = None, None
    if training is not None:
        nearest = nearest_training(samples, training.clouds, prepare, device, "samples")
        base = nearest_training(references, training.clouds, prepare, device, "references")
        floor = sampling_floor(training.clouds, num_points, prepare, device)
        memorising = {
            "samples_median": float(np.median(nearest.distance)),
            "references_median": float(np.median(base.distance)),
            "samples_nearer_than_any_reference": int((nearest.distance < base.distance.min()).sum()),
            "one_shape_drawn_twice": None if floor is None else float(np.median(floor)),
            "samples_as_near_as_two_draws": None if floor is None else int((nearest.distance <= floor.max()).sum()),
        }
    record = _environment(args, command, device) | {
        "samples": _described(given, samples) | {"sampling": sampling},
        "references": _described(reference, references),
        "training": None if training is None else {"source": training.what, "clouds": len(training.clouds)},
        "normalization": _units(args, model),
        "figures": figures,
        "chance_1nna": metrics.chance_accuracy(len(samples), len(references)),
        **_published(args, reference.clouds, (samples.shape[1], references.shape[1]), own_units is None, notes),
        "memorising": memorising,
        "notes": notes,
        "per_sample": _per_sample(given.clouds, reference.clouds, cross, training, nearest),
        "per_reference": _per_reference(given.clouds, reference.clouds, cross),
    }
    html = page.render(record, samples, references, None if nearest is None else nearest.points)
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    files = {"evaluation.json": text.encode(), "evaluation.html": html.encode()}
    if model is not None:
        buffer = io.BytesIO()
        np.savez(buffer, points=made)
        files["samples.npz"] = buffer.getvalue()
    print(table(record))  # first: should the disk be full, the figures are not lost
    write_files(out, files)
    print(f"\nfigures: {out / 'evaluation.json'}; pictures: {out / 'evaluation.html'}")
    return record


def _out(args: EvaluateArguments, is_run: bool) -> Path:
    target = args.run_or_samples
    out = args.out or (target.with_name(f"{target.stem}-evaluation") if target.is_file() else target / "evaluation")
    names = ("evaluation.html", "samples.npz") if is_run else ("evaluation.html",)
    taken = [name for name in names if (out / name).exists()]
    if out.is_file() or (taken and not (out / "evaluation.json").exists()):
        raise ValueError(f"out: {out / taken[0] if taken else out} exists and is no evaluation: give another --out")
    return out


def _data(
    args: EvaluateArguments, model: Model | None, given: Source | None, notes: list[str]
) -> tuple[Source, Source | None]:
    """The references, and the training shapes if they are known."""
    own = None
    if model is not None and (args.reference is None or args.training is None):
        config = model.run.config
        try:
            own = load_sources(config.data, config.evaluate_shapes)
        except ValueError as error:
            if args.reference is None:
                raise ValueError(f"reference: the run's own data cannot be read ({error}): give --reference") from None
            notes.append(f"The run's own training shapes cannot be read ({error}).")
    count = len(given.clouds) if given is not None else args.num_samples
    if args.reference is not None:
        default = 0 if model is None else model.run.config.evaluate_shapes
        reference = open_clouds("reference", args.reference, args, count or default)
    else:
        assert own is not None and model is not None
        reference = Source(f"held-out shapes of the run's data ({model.run.config.data.source})", own.held_out)
    if args.training is not None:
        return reference, open_clouds("training", args.training, args, DataConfig().num_shapes)
    if own is not None and model is not None:
        return reference, Source(f"training shapes of the run's data ({model.run.config.data.source})", own.train)
    notes.append("No training shapes were given (--training): the nearest references take their place.")
    return reference, None


def _points(
    args: EvaluateArguments,
    model: Model | None,
    given: Source | None,
    reference: Source,
    prepare: Preparation,
    notes: list[str],
) -> tuple[int, int]:
    """Points per sample and per reference; what keeps them from being as asked for is noted."""
    if model is not None:
        samples = model.run.config.data.num_points if args.num_points is None else args.num_points
    else:
        assert given is not None
        counts = [given.clouds.num_points(i) for i in range(len(given.clouds))]
        samples = min(counts) if args.num_points is None else min(args.num_points, *counts)
        if args.num_points is not None and samples < args.num_points:
            notes.append(f"Samples have only {samples} points, not the {args.num_points} asked for.")
        elif args.num_points is None and max(counts) > samples:
            notes.append(f"Samples have {samples} to {max(counts)} points: {samples} are drawn of each.")
    counts = [reference.clouds.num_points(i) for i in range(len(reference.clouds))]
    references = min(samples, *(prepare.available(count) for count in counts))
    if references < samples:
        text = f"References have only {references} points, fewer than the {samples} of the samples"
        if args.emd == "approx":
            text += ": EMD within and between the sets then does not compare, and 1-NNA by EMD says little"
        notes.append(f"{text}. For both alike give --num-points {references}.")
        if args.emd == "exact":
            raise ValueError(
                f"emd: exact needs equally many points, got samples of {samples} and references of {references}: "
                f"give --num-points {references}"
            )
    if max(counts) < SPLIT_POINTS:
        notes.append(f"The split {args.split} changes nothing: no reference has {SPLIT_POINTS} points.")
    return samples, references


def _unequal(samples: int, references: int) -> str:
    text = f"{samples} samples against {references} references: all are compared; "
    best = metrics.chance_accuracy(samples, references)
    text += f"the best 1-NNA is {best:.3f} at these sizes, not 0.5"
    return text + (f", and COV is at most {samples / references:.3f}." if samples < references else ".")


def _distances(a: Tensor, b: Tensor, title: str, kind: metrics.Distance) -> metrics.Distances:
    with tqdm(total=metrics.num_pairs(len(a), len(b)), desc=title, unit="pair", disable=None) as bar:
        return metrics.all_distances(a, b, kind, progress=bar.update)


def _environment(args: EvaluateArguments, command: Sequence[str], device: torch.device) -> dict[str, Any]:
    """What computed the figures, with which options."""
    gpu = device.type == "cuda"
    return {
        "lion_triton": __version__,
        "commit": runs.commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "device": torch.cuda.get_device_name(device) if gpu else "CPU",
        "command": shlex.join(["python", "-m", "lion_triton.evaluate", *command]),
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()},
        "seed": args.seed,
        "split": args.split,
        "emd": args.emd,
        "f_score_threshold": metrics.F_SCORE_THRESHOLD,
        "bound_timesteps": metrics.BOUND_TIMESTEPS,
    }


def _described(source: Source, points: Array) -> dict[str, Any]:
    """A set as it was compared; the SHA-256 is of its coordinates as little-endian float32, cloud after cloud."""
    digest = hashlib.sha256(points.astype("<f4").tobytes()).hexdigest()
    return {"source": source.what, "clouds": len(points), "points": points.shape[1], "sha256": digest}


def _units(args: EvaluateArguments, model: Model | None) -> str:
    if args.norm_box:
        return "each cloud's bounding box fitted to [-0.5, 0.5]"
    if model is None:
        return "none: samples and references as given"
    kind = model.run.normalization.kind
    if kind == "global":
        return "data units: the run's mean and scale taken back"
    return f"each cloud's {kind} fitted to the unit {kind}, as the run was trained"


def _published(
    args: EvaluateArguments, references: Clouds, points: tuple[int, int], data_units: bool, notes: list[str]
) -> dict[str, Any]:
    """Published rows, if the references are one category of ShapeNet by its folder and the units fit.

    points: of each sample and of each reference; what makes figures hard to compare is noted.
    """
    folders = {p.parent.parent.name if isinstance(p, Path) else "" for p in references.source}
    category = SYNSETS.get(folders.pop()) if len(folders) == 1 else None
    rows = published(category) if data_units and not args.norm_box else []
    if category and not rows:
        notes.append(f"No published figures are known here for {category} in these units.")
    if rows and category and len(references) != REFERENCES[category]:
        notes.append(f"Published figures are of {REFERENCES[category]} references, these of {len(references)}.")
    if rows and points != (POINTS, POINTS):
        notes.append(f"Published figures are of clouds of {POINTS} points, these of {points[0]} and {points[1]}.")
    if rows and args.subset != "test":
        notes.append(f"Published figures are of the test shapes, these of {args.subset}.")
    return {
        "category": category,
        "published": [asdict(row) | {"split": row.split} for row in rows],
        "published_source": SOURCE if rows else None,
    }


def _per_sample(
    samples: Clouds, references: Clouds, cross: Array, training: Source | None, nearest: Nearest | None
) -> list[dict[str, Any]]:
    rows = []
    for i, j in enumerate(cross.argmin(1).tolist()):
        row = {"sample": samples.names[i], "reference": references.names[j], "reference_index": j}
        row["reference_distance"] = float(cross[i, j])
        if training is not None and nearest is not None:
            k = int(nearest.index[i])
            row |= {"training": training.clouds.names[k], "training_index": k}
            row["training_distance"] = float(nearest.distance[i])
        rows.append(row)
    return rows


def _per_reference(samples: Clouds, references: Clouds, cross: Array) -> list[dict[str, Any]]:
    covered = set(cross.argmin(1).tolist())
    return [
        {
            "reference": references.names[j],
            "sample": samples.names[i],
            "sample_index": i,
            "sample_distance": float(cross[i, j]),
            "covered": j in covered,
        }
        for j, i in enumerate(cross.argmin(0).tolist())
    ]


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all of the files or none: each replaces an old one only when all are on the disk."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    partial = {name: folder / f".{name}.partial-{os.getpid()}" for name in files}
    try:
        for name, content in files.items():
            partial[name].write_bytes(content)
        for name, path in partial.items():
            os.replace(path, folder / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
        if new and not any(folder.iterdir()):
            folder.rmdir()


def table(record: Mapping[str, Any]) -> str:
    """The figures for people, beside published ones."""
    figures, sets = record["figures"], [record[name] for name in ("samples", "references")]
    lines = [
        "",
        *(
            f"{name:<12}{s['clouds']} clouds of {s['points']} points: {s['source']}"
            for name, s in zip(("samples", "references"), sets, strict=True)
        ),
    ]
    lines += [f"{'units':<12}{record['normalization']}", f"{'split':<12}{record['split']}"]
    lines += [f"{'note':<12}{note}" for note in record["notes"]]
    emd = record["emd"] != "none"
    lines += ["", f"{'':26}{'CD':>10}" + (f"{'EMD, ' + record['emd']:>14}" if emd else "")]
    for name, best in (("1nna", f"best {record['chance_1nna']:.3f}"), ("cov", "high"), ("mmd", "low")):
        values = [f"{figures[f'{name}_cd']:>10.5g}"] + ([f"{figures[f'{name}_emd']:>14.5g}"] if emd else [])
        lines.append(f"{page.NAMES[name]:<14}{best:<12}" + "".join(values))
    lines.append(f"{'JSD':<14}{'low':<12}{figures['jsd']:>10.5g}")
    for name, value in figures.items():
        if name.startswith(("reconstruction", "bound")):
            shown = "not finite" if value is None else f"{value:.5g}"
            lines.append(f"{page.NAMES[name]:<36}{shown}")
    memory = record["memorising"]
    if memory is not None:
        lines += ["", "distance to the nearest training shape (median Chamfer)"]
        lines += [
            f"  {'samples':<24}{memory['samples_median']:.5g}",
            f"  {'references':<24}{memory['references_median']:.5g}",
        ]
        if memory["one_shape_drawn_twice"] is not None:
            lines.append(f"  {'one shape drawn twice':<24}{memory['one_shape_drawn_twice']:.5g}")
            copies = memory["samples_as_near_as_two_draws"]
            lines.append(
                f"  {copies} of {sets[0]['clouds']} samples are as near to a training shape as two draws of one are"
            )
    if record["published"]:
        lines += ["", f"1-NNA in per cent, {record['category']} ({record['published_source']})"]
        lines.append(f"  {'':<16}{'CD':>8}{'EMD':>8}  split")
        same = ("cd", "emd") if record["emd"] == "approx" else ("cd",)  # published EMD is approximate
        mine = [f"{100 * figures[f'1nna_{d}']:>8.2f}" if d in same else f"{'-':>8}" for d in ("cd", "emd")]
        lines.append(f"  {'these samples':<16}{''.join(mine)}  {record['split']}")
        lines += [f"  {r['method']:<16}{r['cd']:>8.2f}{r['emd']:>8.2f}  {r['split']}" for r in record["published"]]
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if args is None else args
    prog = "python -m lion_triton.evaluate"
    run_cli(lambda: evaluate(tyro.cli(EvaluateArguments, args=given, prog=prog), given))


if __name__ == "__main__":
    main()
