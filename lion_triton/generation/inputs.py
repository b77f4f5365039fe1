"""What a command is given: a trained model by any of its names, and shapes as files, out of sets, or as seeds."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from lion_triton.config import SamplingConfig, check_seed, fewest_points
from lion_triton.data.clouds import draw
from lion_triton.data.containers import Container
from lion_triton.data.degraded import VoxelGrid
from lion_triton.data.meshes import SetOfShapes, read_shape
from lion_triton.data.procedural import CLASSES, oriented_furniture
from lion_triton.data.sources import PROCEDURAL_POINTS, PROCEDURAL_SEEDS
from lion_triton.devices import autocast, best_device
from lion_triton.errors import one_line
from lion_triton.evaluation.sets import TENSOR_SUFFIXES, open_clouds
from lion_triton.generation.encoders import EncoderRun
from lion_triton.generation.latents import Condition, decode, encode, likeliest
from lion_triton.generation.prompts import Prompt, own_prompts
from lion_triton.kernels import chamfer_distance
from lion_triton.models.lion import LION, Latents
from lion_triton.runs import Run, load_model, open_run

UNLIKE = 3.0  # times as large or small as the shapes trained on: taken for other units


@dataclass(frozen=True)
class Model:
    """A trained LION in evaluation mode on the best device, and what its run says of it: ``run.classes``,
    ``run.normalization``, ``run.config.sampling``. ``checkpoint``: its name; None of a folder of ``save_pretrained``.
    """

    run: Run
    lion: LION
    checkpoint: str | None

    @property
    def device(self) -> torch.device:
        return self.lion.z_mean.device

    @property
    def conditional(self) -> bool:
        """Whether its priors know classes."""
        return self.run.config.model.shape_prior.num_classes > 0

    @property
    def by_words(self) -> bool:
        """Whether its priors are conditioned on CLIP embeddings."""
        return self.run.config.model.shape_prior.clip

    def autocast(self) -> AbstractContextManager[object]:
        """The precision that the run computes in."""
        return autocast(self.run.config.mixed_precision, self.device)

    def labels(self, label: int | None, count: int = 1) -> Tensor | None:
        """``count`` times the label, as the priors take it; None where they know no classes."""
        return None if label is None else torch.full((count,), label, device=self.device)

    def condition(self, label: int | None, prompt: Prompt | None = None) -> Condition:
        """What the priors are told of one cloud."""
        clip = None if prompt is None else torch.from_numpy(prompt.embedding[None]).float().to(self.device)
        return Condition(self.labels(label), clip)

    def few_step(self, settings: SamplingConfig) -> Model:
        """The model with the priors that are distilled for sampling like this; itself where none are."""
        return replace(self, lion=self.lion.few_step(settings.steps, settings.sampler, settings.eta, settings.guidance))

    def called(self, label: int | None, prompt: Prompt | None = None) -> str:
        """What it is told of a cloud, in words."""
        if prompt is not None:
            return prompt.name
        return "no class" if label is None else self.run.classes[label]


def open_model(name_or_path: str | Path, checkpoint: str | None = None) -> Model:
    """The model of a run folder, of a folder of ``LION.save_pretrained``, or a shipped one by its name.

    checkpoint: one of a run's, as step-00001000; default the newest.

    Raises:
        ValueError: there is none, it is damaged, or has no trained priors yet.
    """
    run = open_run(Path(name_or_path))
    newest = run.checkpoint(checkpoint)
    # By its name: a run that goes on may have another newest one by now.
    name = None if newest is None else newest.name
    return Model(run, load_model(run, name).to(best_device()), name)


@dataclass(frozen=True)
class Given:
    """A shape as given: its points in the model's units, its class where that is known, and the prompt that describes
    it to a model of words. ``seed`` decided which of its points these are, and decides which of its latents are drawn.
    ``grid``, in these units: the voxels of which the points were drawn."""

    name: str
    points: Float32[np.ndarray, "N 3"]
    label: int | None
    seed: int = 0
    grid: VoxelGrid | None = None
    prompt: Prompt | None = None

    @property
    def record(self) -> dict[str, object]:
        """What a command's record says of it."""
        sha256 = hashlib.sha256(self.points.astype("<f4").tobytes()).hexdigest()
        return {"shape": self.name, "points": len(self.points), "sha256": sha256}

    def encode(self, model: Model) -> Latents:
        """Its (standardised) latents; the same each time."""
        return encode(model.lion, torch.from_numpy(self.points)[None].to(model.device), self.seed)


def read_given_or_seed(option: str, text: str, run: Run, num_points: int, seed: int) -> Given | int:
    """The seed that a whole number is, or the shape that anything else stands for; see :func:`read_given`."""
    if not re.fullmatch(r"\d+", text):
        return read_given(option, text, run, num_points, seed)
    check_seed(int(text), option)
    return int(text)


def read_given(option: str, text: str, run: Run, num_points: int, seed: int) -> Given:
    """The shape that ``text`` stands for, with ``num_points`` of its points.

    A file of any format that ``lion_triton.prepare`` reads (a mesh, or one cloud); FILE:3, cloud 3 of a file or folder
    of clouds; procedural:3, of the embedded shapes that are held out. A mesh's points are drawn from its surface, a
    cloud's from its own; those of a cloud that has just so many stay in their order.

    Raises:
        ValueError: naming ``option``: nothing there, nothing that can be read, no such cloud.
    """
    cloud, name = _read_cloud(option, text, num_points, seed)
    label = run.classes.index(name) if name in run.classes else None
    if len(cloud) < num_points:
        print(f"{option}: {text} has only {len(cloud)} points: some are taken twice")
    rng = np.random.default_rng(seed)
    points = cloud if len(cloud) == num_points else draw(cloud, num_points, rng)
    center, scale = run.normalization.center_and_scale(cloud)
    points = ((points - center) / scale).astype(np.float32)
    size = float(np.sqrt(np.square(points, dtype=np.float64).mean()))
    if run.normalization.kind == "global" and not 1 / UNLIKE < size < UNLIKE:
        print(f"{option}: {text} is {size:.2g} times as large as the shapes that the model knows: in other units?")
    return Given(text, points, label if run.config.model.shape_prior.num_classes else None, seed)


def read_clouds(option: str, text: str, num_points: int, seed: int) -> list[Float32[np.ndarray, "P 3"]]:
    """The clouds of a folder or file of several, in data units; else the one that ``text`` stands for, as of
    :func:`read_given`, of a mesh ``num_points`` points.

    Raises:
        ValueError: as :func:`read_given`.
    """
    path = Path(text)
    if not path.is_dir() and path.suffix.lower() not in TENSOR_SUFFIXES:
        try:
            return [_read_cloud(option, text, num_points, seed)[0]]
        except SetOfShapes:
            pass
    return list(open_clouds(option, text, "test"))


def numbered(text: str) -> tuple[str, int] | None:
    """What FILE:3 stands for; None of anything else, as a file of that name."""
    found = re.fullmatch(r"(.+):(\d+)", text)
    return None if found is None or Path(text).exists() else (found[1], int(found[2]))


def _read_cloud(option: str, text: str, num_points: int, seed: int) -> tuple[Float32[np.ndarray, "P 3"], str]:
    """The cloud that ``text`` stands for, and the name of its class, "" if unknown."""
    one = numbered(text)
    return (_of_file(option, Path(text), num_points, seed), "") if one is None else _of_set(option, *one)


def read_voxels(option: str, path: Path, encoders: EncoderRun, num_points: int, seed: int) -> Given:
    """The .npz of a voxel grid (see ``VoxelGrid.load``) as ``num_points`` points.

    Raises:
        ValueError: naming ``option``: no such file or no such grid.
    """
    run, place, resolution = encoders.run, encoders.place, encoders.training.resolution
    try:
        grid = VoxelGrid.load(path, np.array(place.center), place.longest_side)
    except Exception as error:  # whatever NumPy makes of a bad file
        raise ValueError(f"{option}: {path}: {one_line(error)}") from None
    if not 2 / 3 <= grid.extent / resolution <= 1.5:
        wanted = f"its longest side is {grid.extent} voxels, the encoders know shapes of {resolution}"
        print(f"{option}: {path}: {wanted}: --encoder.resolution trains others")
    points = grid.sample(num_points, np.random.default_rng(seed)).astype(np.float32)
    center, scale = run.normalization.center_and_scale(points)
    points = ((points - center) / scale).astype(np.float32)
    return Given(str(path), points, None, seed, grid.moved(center, scale))


def _of_set(option: str, path: str, index: int) -> tuple[Float32[np.ndarray, "P 3"], str]:
    """Cloud ``index`` of a set, and the name of its class, "" if unknown."""
    if path == "procedural":  # of which only this one is made
        points, _ = oriented_furniture(index, PROCEDURAL_POINTS, PROCEDURAL_SEEDS["held_out"])
        return points, CLASSES[index % len(CLASSES)]
    clouds = open_clouds(option, path, "test")
    if index >= len(clouds):
        raise ValueError(f"{option}: expected a cloud 0 to {len(clouds) - 1} of {path}, got {index}")
    name = clouds.clouds.classes[clouds.clouds.labels[index]]
    file = Path(path) / "clouds.npz" if Path(path).is_dir() else Path(path)
    if not name and file.suffix == ".npz" and file.is_file():
        with np.load(file, allow_pickle=False) as arrays:
            if {"labels", "classes"} <= set(arrays.files) and 0 <= arrays["labels"][index] < len(arrays["classes"]):
                name = str(arrays["classes"][arrays["labels"][index]])
    return clouds[index], name


def _of_file(option: str, path: Path, count: int, seed: int) -> Float32[np.ndarray, "P 3"]:
    """A mesh's surface, drawn from ``count`` times; a whole cloud."""
    if not path.is_file():
        what = "a file of a shape, FILE:3 or FOLDER:3 for one of several clouds, procedural:3"
        found = "a folder" if path.is_dir() else "which does not exist"
        raise ValueError(f"{option}: expected {what}, got {path}, {found}")
    try:
        shape = read_shape(Container(path.parent), path.name)
        return shape.sample(count, seed) if shape.is_mesh else shape.coordinates.astype(np.float32)
    except SetOfShapes as error:
        which = f": give one of them, as {path}:0" if path.suffix in (".npy", ".npz") else ""
        raise SetOfShapes(f"{option}: {path}: {error}{which}") from None
    except Exception as error:  # whatever a parser makes of a bad file
        raise ValueError(f"{option}: {path}: {one_line(error)}") from None


def described(model: Model, given: Given, label: int | None, prompt: Prompt | None = None) -> Given:
    """The shape as one of class ``label``, or else of its own, or the likeliest, which is said; of a model of words as
    ``prompt`` describes it, or the likeliest of the embeddings that the run keeps."""
    given = replace(given, label=given.label if label is None else label, prompt=prompt)
    if model.conditional and given.label is None:
        found = _likeliest(model, given, [model.condition(i) for i in range(len(model.run.classes))])
        given = replace(given, label=found)
        print(f"{given.name}: taken for class {model.called(found)}, the likeliest; --class gives another")
    if model.by_words and prompt is None:
        own = own_prompts(model.run)
        prompt = own[_likeliest(model, given, [model.condition(None, one) for one in own])]
        given = replace(given, prompt=prompt)
        print(f"{given.name}: described as {prompt.name} is, the likeliest training shape; --text gives words")
    return given


def _likeliest(model: Model, given: Given, conditions: Sequence[Condition]) -> int:
    with model.autocast():
        return int(likeliest(model.lion, given.encode(model).z, conditions))


def reconstruct(model: Model, given: Given) -> Float32[np.ndarray, "N 3"]:
    """What comes back of the shape through the VAE, in data units where the normalisation can be inverted."""
    with model.autocast():
        rebuilt = decode(model.lion, given.encode(model))
    return model.run.normalization.invert(rebuilt[0].cpu().numpy())


def distances(model: Model, given: Given, clouds: Float32[np.ndarray, "S N 3"]) -> list[float]:
    """Chamfer distances of clouds to the shape, in data units where the normalisation can be inverted, as they are."""
    target = torch.from_numpy(model.run.normalization.invert(given.points))
    x = torch.from_numpy(clouds)
    return chamfer_distance(x, target.expand(len(x), -1, -1)).tolist()


def known_label(run: Run, name: str | None) -> int | None:
    """The number of the class called ``name``; None for None.

    Raises:
        ValueError: the run has no classes, or none of this name.
    """
    if name is None:
        return None
    if not run.config.model.shape_prior.num_classes:
        raise ValueError(f"class: this run was trained without classes, got {name}")
    if name not in run.classes:
        raise ValueError(f"class: expected one of {', '.join(run.classes)}, got {name}")
    return run.classes.index(name)


def check_points(run: Run, num_points: int | None) -> int:
    """``num_points``, or what the run was trained on.

    Raises:
        ValueError: fewer than the networks need.
    """
    count, least = run.config.data.num_points if num_points is None else num_points, fewest_points(run.config.model)
    if count < least:
        raise ValueError(f"num-points: this model needs at least {least}, got {count}")
    return count
