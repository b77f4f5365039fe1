"""What training reads: clouds, their normalisation, and the stream of samples drawn from them.

Two sources make a :class:`Clouds`: ``procedural_clouds`` in memory and ``folder_clouds`` on disk, in the
layout ``root/<category>/<split>/<id>.npy`` of ShapeNetCore.v2.PC15k. Every random choice is keyed by the
number of the sample it is for, never by what was drawn before: a resumed run sees what an unbroken one saw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor
from torch.utils.data import Dataset

from lion_triton.data.procedural import CLASSES, furniture
from lion_triton.errors import one_line
from lion_triton.progress import ProgressBar

Split = Literal["train", "val", "test"]
Kind = Literal["global", "box", "sphere"]
T = TypeVar("T")
ArrayOrTensor = TypeVar("ArrayOrTensor", np.ndarray, Tensor)

# ShapeNetCore.v2's folders. Nothing is called plain "can": people have used it for either of the two kinds.
SYNSETS = {
    "02691156": "airplane",
    "02747177": "trash_bin",
    "02773838": "bag",
    "02801938": "basket",
    "02808440": "bathtub",
    "02818832": "bed",
    "02828884": "bench",
    "02843684": "birdhouse",
    "02871439": "bookshelf",
    "02876657": "bottle",
    "02880940": "bowl",
    "02924116": "bus",
    "02933112": "cabinet",
    "02942699": "camera",
    "02946921": "tin_can",
    "02954340": "cap",
    "02958343": "car",
    "02992529": "cellphone",
    "03001627": "chair",
    "03046257": "clock",
    "03085013": "keyboard",
    "03207941": "dishwasher",
    "03211117": "monitor",
    "03261776": "earphone",
    "03325088": "faucet",
    "03337140": "file",
    "03467517": "guitar",
    "03513137": "helmet",
    "03593526": "jar",
    "03624134": "knife",
    "03636649": "lamp",
    "03642806": "laptop",
    "03691459": "speaker",
    "03710193": "mailbox",
    "03759954": "microphone",
    "03761084": "microwave",
    "03790512": "motorcycle",
    "03797390": "mug",
    "03928116": "piano",
    "03938244": "pillow",
    "03948459": "pistol",
    "03991062": "pot",
    "04004475": "printer",
    "04074963": "remote_control",
    "04090263": "rifle",
    "04099429": "rocket",
    "04225987": "skateboard",
    "04256520": "sofa",
    "04330267": "stove",
    "04379243": "table",
    "04401088": "telephone",
    "04460130": "tower",
    "04468005": "train",
    "04530566": "vessel",
    "04554684": "washer",
}


@dataclass(frozen=True, eq=False)
class Clouds:
    """A labelled sequence of S point clouds, in data units.

    ``clouds[i]`` is float32 (P_i, 3) with P_i >= 1. Clouds on disk are read anew each time, and checked:
    anything but a .npy of finite floating-point numbers of that shape is a ``ValueError`` naming the file.
    Clouds in memory are views, not to be written to.

    Attributes:
        source: the clouds themselves, or one .npy file per cloud.
        labels: index into ``classes`` of each cloud.
        classes: names of the classes. A class may have no cloud in this split.
        names: one unique name per cloud, ``<class>/<id>``.
    """

    source: Float32[np.ndarray, "S P 3"] | tuple[Path, ...]
    labels: Int64[np.ndarray, " S"]
    classes: tuple[str, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Float32[np.ndarray, "P 3"]:
        item = self.source[i]
        return _read(item) if isinstance(item, Path) else item

    def __iter__(self) -> Iterator[Float32[np.ndarray, "P 3"]]:
        return (self[i] for i in range(len(self)))

    def subset(self, indices: Sequence[int]) -> Clouds:
        """The clouds at ``indices``, in that order, with the same classes."""
        chosen = list(indices)
        source = self.source[chosen] if isinstance(self.source, np.ndarray) else tuple(self.source[i] for i in chosen)
        return Clouds(source, self.labels[chosen], self.classes, tuple(self.names[i] for i in chosen))

    def num_points(self, i: int) -> int:
        """P_i. For a cloud on disk this reads the header of its file and nothing else."""
        item = self.source[i]
        return len(_open(item, header_only=True) if isinstance(item, Path) else item)


def in_turn(labels: np.ndarray) -> list[int]:
    """All indices, the classes in turn, each class in its own order: the first few show every class."""
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members))
    return [int(i) for i in np.lexsort((labels, rank))]


def procedural_clouds(num_shapes: int, num_points: int, seed: int) -> Clouds:
    """``num_shapes`` pieces of procedural furniture of ``num_points`` points each, in memory."""
    points, labels = furniture(num_shapes, num_points, seed)
    names = tuple(f"{CLASSES[label]}/{i:05d}" for i, label in enumerate(labels))
    return Clouds(points, labels, tuple(CLASSES), names)


def folder_clouds(root: Path, split: Split, categories: Sequence[str] | None = None, *, option: str = "root") -> Clouds:
    """The clouds ``root/<category>/<split>/<id>.npy``, in the order of the names of category and file.

    Only names are read here: see :func:`check_all`.

    Args:
        root: folder of categories, each a folder that holds at least one of train, val and test.
        split: which of them to list.
        categories: folder names, or the English names of ShapeNet's folders (``chair`` or ``03001627``), in
            any order. None takes all there are, and then a category without any cloud in this split still
            keeps its place in ``classes``, so that labels agree between splits.
        option: what errors call ``root``.

    Raises:
        ValueError: root missing or without categories, an unknown category, a category not divided into
            splits, or no cloud in the split (with ``categories``, in one of them).
    """
    root, splits = Path(root), get_args(Split)
    hint = "python -m lion_triton.prepare makes <category>/<split>/<id>.npy of meshes and clouds"
    if split not in splits:
        raise ValueError(f"split: expected one of {', '.join(splits)}, got {split!r}")
    if not root.is_dir():
        raise ValueError(f"{option}: {root} is not a folder: {hint}")
    inside = [f for f in root.iterdir() if f.is_dir() and not f.name.startswith(".")]
    divided = {f.name for f in inside if any((f / s).is_dir() for s in splits)}
    undivided = {f.name for f in inside if f.name not in divided and _list_npy(f)}
    if undivided and not divided and undivided <= set(splits):
        raise ValueError(f"{option}: {root} is a single category: give the folder above it")
    folders = sorted(divided | undivided)
    if not folders:
        raise ValueError(f"{option}: no <category>/{split}/<id>.npy in {root}: {hint}")
    # A folder may bear the English name of another one's synset: both then go by their folder names.
    titles = {f: f if SYNSETS.get(f) in folders else SYNSETS.get(f, f) for f in folders}
    if categories is not None:
        known = ", ".join(titles.values())
        if not categories:
            raise ValueError(f"categories: expected at least one of {known}")
        by_name = {title: f for f, title in titles.items()} | {f: f for f in folders}
        for category in categories:
            if category not in by_name:
                raise ValueError(f"categories: no {category!r} in {root}, which holds {known}")
        folders = sorted({by_name[category] for category in categories})

    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        if folder in undivided:
            raise ValueError(f"{option}: {root / folder} is not divided into {', '.join(splits)}: {hint}")
        files = _list_npy(root / folder / split)
        if not files and categories is not None:
            raise ValueError(f"{option}: no .npy file in {root / folder / split}")
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise ValueError(f"{option}: no <category>/{split}/<id>.npy in {root}: {hint}")
    classes = tuple(titles[f] for f in folders)
    names = tuple(f"{classes[label]}/{path.stem}" for label, path in zip(labels, paths, strict=True))
    return Clouds(tuple(paths), np.array(labels, dtype=np.int64), classes, names)


def check_all(clouds: Clouds, num_points: int, strict: bool = False, *, read: bool = False) -> int:
    """Look at every cloud once, before a run, and count those with fewer than ``num_points`` points.

    In memory every coordinate is checked. On disk, unless ``read``, only headers and file sizes are, which finds
    missing, foreign and truncated files; that the numbers are finite is checked whenever a cloud is read.

    Raises:
        ValueError: an unreadable cloud; with ``strict``, also a cloud of fewer than ``num_points`` points.
    """
    if isinstance(clouds.source, np.ndarray):
        for name, cloud in zip(clouds.names, clouds.source, strict=True):
            _check_finite(name, cloud)
        counts = [clouds.source.shape[1]] * len(clouds)
    else:
        count = (lambda i: len(clouds[i])) if read else clouds.num_points
        counts = list(map_clouds(count, len(clouds), "checking clouds"))
    short = [i for i, count in enumerate(counts) if count < num_points]
    if strict and short:
        raise ValueError(
            f"num_points: {len(short)} of {len(clouds)} clouds have fewer than {num_points} points, "
            f"the first is {clouds.names[short[0]]} with {counts[short[0]]}"
        )
    return len(short)


@dataclass(frozen=True)
class Normalization:
    """From data units to those of the networks: ``(points - mean) / scale``.

    - ``global``: one mean per axis and one scale for the whole data set, as fitted and stored here.
    - ``box``: each cloud's bounding box centred on the origin, its longest side stretched to [-1, 1].
    - ``sphere``: each cloud's mean point moved to the origin, its furthest point to distance 1.

    The last two take centre and scale from the cloud at hand; ``mean`` 0 and ``scale`` 1 are stored, and
    there is no way back to data units. A scale of zero (all points equal) counts as 1.
    """

    kind: Kind
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"normalization: expected one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if not all(map(math.isfinite, self.mean)):
            raise ValueError(f"normalization: expected a finite mean, got {self.mean}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"normalization: expected a finite scale > 0, got {self.scale}")

    @classmethod
    def fit(cls, clouds: Clouds, kind: Kind, max_points: int | None = None) -> Normalization:
        """The normalisation of a data set; only ``global`` reads it, once.

        As published for ``global``: the mean per axis over all points of all clouds, and the standard
        deviation of all coordinates pooled (about one mean for the three axes). Summed in float64 in the
        order of the clouds, hence the same in every run.

        Args:
            max_points: use only the first ``max_points`` points of each cloud.
        """
        if kind != "global":
            return cls(kind)
        if len(clouds) == 0:
            raise ValueError("clouds: expected at least one cloud")
        if max_points is not None and max_points < 1:
            raise ValueError(f"max_points: expected at least 1, got {max_points}")

        def moments(i: int) -> tuple[int, np.ndarray, np.ndarray]:
            axes = _axes(clouds[i][:max_points])
            mean = axes.mean(axis=1)
            return axes.shape[1], mean, np.square(axes - mean[:, None]).sum(axis=1)

        # Chan et al.: merging (count, mean, sum of squared deviations) stays exact far from the origin.
        n, mean, squares = 0, np.zeros(3), np.zeros(3)
        for count, cloud_mean, cloud_squares in map_clouds(moments, len(clouds), "normalising"):
            shift, merged = cloud_mean - mean, n + count
            squares += cloud_squares + np.square(shift) * (n * count / merged)
            mean += shift * (count / merged)
            n = merged
        scale = math.sqrt(squares.sum() / (3 * n) + mean.var())
        return cls(kind, (float(mean[0]), float(mean[1]), float(mean[2])), scale or 1.0)

    def center_and_scale(self, cloud: Float32[np.ndarray, "P 3"]) -> tuple[Float64[np.ndarray, " 3"], float]:
        """What :meth:`apply` subtracts from this cloud and what it then divides by."""
        if self.kind == "global":
            return np.array(self.mean), self.scale
        axes = _axes(cloud)
        if self.kind == "box":
            low, high = axes.min(axis=1), axes.max(axis=1)
            center, scale = (low + high) / 2, float((high - low).max()) / 2
        else:
            center = axes.mean(axis=1)
            scale = math.sqrt(np.square(axes - center[:, None]).sum(axis=0).max())
        return center, scale or 1.0

    def apply(self, cloud: Float32[np.ndarray, "P 3"]) -> Float32[np.ndarray, "P 3"]:
        """The cloud in the units of the networks."""
        center, scale = self.center_and_scale(cloud)
        return ((cloud - center) / scale).astype(np.float32)

    def invert(self, points: ArrayOrTensor) -> ArrayOrTensor:
        """Points (..., 3), array or tensor, back in data units; same dtype.

        For ``box`` and ``sphere`` this returns ``points``: a generated cloud has no box or sphere of its own
        to go back to.
        """
        if self.kind != "global":
            return points
        if isinstance(points, Tensor):
            return points * self.scale + points.new_tensor(self.mean)
        return (points * self.scale + np.array(self.mean)).astype(points.dtype)

    def to_json(self) -> dict[str, Any]:
        """A dict for ``json.dump``."""
        return asdict(self) | {"mean": list(self.mean)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Normalization:
        """The inverse of :meth:`to_json`."""
        try:
            x, y, z = map(float, data["mean"])
            return cls(data["kind"], (x, y, z), float(data["scale"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"normalization: expected kind, mean (3) and scale, got {data!r}") from error


class TrainingStream(Dataset[tuple[Tensor, int, int]]):
    """The samples of a whole training run, by their number i in [0, total).

    Sample i belongs to epoch e = i // S; its cloud is the one at i % S in that epoch's permutation, which
    depends on (seed, e); its points are a subset of that cloud, which depends on (seed, i). So each epoch
    visits each cloud once, and a run that goes on from sample k,
    ``DataLoader(stream, sampler=range(k, total), ...)``, reads what an unbroken one would have read, whatever
    its batch size and number of workers (with the same version of NumPy, whose random streams may change).

    ``stream[i]`` is (points float32 (N, 3) normalised, label, index of the cloud).

    Points are drawn without replacement, or with it from a cloud of fewer than N. The published recipe always
    draws with replacement: of 2048 points drawn from 10,000, about 196 then repeat another one.

    Args:
        clouds: at least one.
        normalization: applied with the centre and scale of the whole cloud, not of the points drawn.
        num_points: N.
        total: number of samples in the run.
        seed: >= 0.
        draw_from: draw from the first ``draw_from`` points of a cloud (LION: 10,000 of 15,000); None: of all.
    """

    def __init__(
        self,
        clouds: Clouds,
        normalization: Normalization,
        num_points: int,
        total: int,
        seed: int,
        draw_from: int | None = None,
    ) -> None:
        if len(clouds) == 0:
            raise ValueError("clouds: expected at least one cloud")
        for name, value, least in (("num_points", num_points, 1), ("total", total, 0), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if draw_from is not None and draw_from < num_points:
            raise ValueError(f"draw_from: expected at least num_points ({num_points}), got {draw_from}")
        self.clouds, self.normalization, self.num_points = clouds, normalization, num_points
        self.total, self.seed, self.draw_from = total, seed, draw_from
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, i: int) -> tuple[Float32[Tensor, "N 3"], int, int]:
        if not 0 <= i < self.total:
            raise IndexError(f"sample {i} of {self.total}")
        shape = self.shape(i)
        cloud = self.clouds[shape]
        center, scale = self.normalization.center_and_scale(cloud)
        drawn = draw(cloud[: self.draw_from], self.num_points, np.random.default_rng((self.seed, 1, i)))
        points = ((drawn - center) / scale).astype(np.float32)
        return torch.from_numpy(points), int(self.clouds.labels[shape]), shape

    def shape(self, i: int) -> int:
        """The index of the cloud that sample ``i`` is drawn from."""
        epoch, position = divmod(i, len(self.clouds))
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, 0, epoch))
            self._epoch, self._order = epoch, rng.permutation(len(self.clouds))
        return int(self._order[position])


def fixed_batch(
    clouds: Clouds, indices: Sequence[int], num_points: int, seed: int, normalization: Normalization
) -> Float32[Tensor, "K N 3"]:
    """The clouds ``indices`` at N = ``num_points`` points each, normalised, for pictures and evaluation.

    The points drawn from a cloud depend on the seed and its own index only, not on the other indices. They
    are drawn without replacement, or with it from a cloud of fewer than N.
    """
    batch = np.empty((len(indices), num_points, 3), dtype=np.float32)
    for row, i in zip(batch, indices, strict=True):
        cloud = clouds[i]
        center, scale = normalization.center_and_scale(cloud)
        row[:] = (draw(cloud, num_points, np.random.default_rng((seed, 2, i))) - center) / scale
    return torch.from_numpy(batch)


def draw(cloud: np.ndarray, num_points: int, rng: np.random.Generator) -> np.ndarray:
    """``num_points`` random rows, in random order; repeated only where there are not enough."""
    return cloud.take(rng.choice(len(cloud), num_points, replace=len(cloud) < num_points), axis=0)


def _axes(cloud: np.ndarray) -> np.ndarray:
    """The cloud as contiguous float64 (3, P), in which NumPy reduces over points some ten times faster.

    Sums of float32 are exact in float64: the mean of equal points is that point, and their spread exactly 0.
    """
    return np.ascontiguousarray(cloud.T, dtype=np.float64)


def map_clouds(function: Callable[[int], T], count: int, description: str) -> Iterator[T]:
    """``map(function, range(count))``, in order, with a progress bar. Threads, because reading waits."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        results = pool.map(function, range(count))
        yield from ProgressBar(results, description, count, unit="cloud", leave=False)


def _list_npy(folder: Path) -> list[Path]:
    """The .npy files of a folder by name; none if there is no such folder."""
    return sorted(path for path in folder.glob("*.npy") if not path.name.startswith("."))


def _open(path: Path, header_only: bool = False) -> np.ndarray:
    """The (P, 3) floating-point array in a .npy file; with ``header_only`` mapped, not read."""
    try:
        if header_only:
            array: np.ndarray = np.lib.format.open_memmap(path, mode="r")
        else:
            with path.open("rb") as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # A damaged header makes NumPy's parser raise nearly anything.
        raise ValueError(f"{path}: not a readable .npy of numbers ({one_line(error)})") from error
    if array.dtype.kind != "f" or array.ndim != 2 or array.shape[1] != 3 or len(array) == 0:
        raise ValueError(f"{path}: expected floating-point (P, 3) with P >= 1, got {array.dtype} {array.shape}")
    return array


def _read(path: Path) -> Float32[np.ndarray, "P 3"]:
    with np.errstate(over="ignore"):  # What float32 cannot hold becomes infinite, and is reported as such.
        cloud = np.ascontiguousarray(_open(path), dtype=np.float32)
    _check_finite(str(path), cloud)
    return cloud


def _check_finite(name: str, cloud: np.ndarray) -> None:
    finite = np.isfinite(cloud)
    if not finite.all():
        point = int(np.argmin(finite.all(axis=1)))
        raise ValueError(f"{name}: point {point} is not finite ({cloud[point][~finite[point]][0]})")
