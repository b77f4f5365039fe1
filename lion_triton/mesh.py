"""Make watertight meshes: ``python -m lion_triton.mesh CLOUDS_OR_RUN [--out DIR]``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import trimesh
import tyro

from lion_triton import __version__
from lion_triton.cli import run_cli
from lion_triton.config import check_seed
from lion_triton.data.find import safe_name
from lion_triton.devices import best_device
from lion_triton.evaluation.sets import fingerprint
from lion_triton.generation.inputs import numbered, read_clouds
from lion_triton.generation.output import check_finite, check_out, whole_folder
from lion_triton.generation.prompts import PromptArguments, read_prompts
from lion_triton.models.hub import find_run, shipped_models
from lion_triton.pictures import mesh_grid
from lion_triton.progress import ProgressBar
from lion_triton.runs import commit, load_model, open_run
from lion_triton.sample import SampleArguments, class_labels, generate, resolved
from lion_triton.surface.meshing import RESOLUTION, Mesher
from lion_triton.surface.storage import load_surface

RECORD = "meshes.json"
SHOWN = 64  # meshes in the picture
STREAM = 10  # of random numbers: which points of a cloud are taken; 0 to 9 are taken elsewhere
DEFAULT_POINTS, DEFAULT_SIGMA = 8192, 0.01  # drawn of a mesh, and blur, without a network, which knows its own


@dataclass(frozen=True)
class MeshArguments(PromptArguments):
    """Make one watertight mesh of each cloud, by Poisson's equation and marching cubes.

    Writes OUT/ply/*.ply and OUT/glb/*.glb in the clouds' units, OUT/clouds.npz, OUT/grid.png and OUT/meshes.json.

    A run generates the clouds, and its surface network (``train PRESET --stage surface``) denoises them and tells their
    normals. Clouds from elsewhere need normals that are estimated, which takes dense clouds of solid shapes; or a run
    whose surface network knows clouds like these. Of a mesh points are drawn from the surface.

    Examples, of a run's own samples, and of clouds that it made before:
        python -m lion_triton.mesh runs/quickstart --num-samples 16
        python -m lion_triton.mesh runs/quickstart/samples/final --network runs/quickstart

    Attributes:
        clouds_or_run: a run folder or the name of a model that comes with the package; or clouds: a folder of clouds, a
            folder written by sample, a .npz or .npy of (S, P, 3), a file of one shape (obj, ply, off, stl, glb, gltf,
            npy, npz, h5, pcd, pts, xyz, csv, txt), FILE:3 for one of several, procedural:3 for one of the embedded
            shapes.
        num_samples: clouds to generate of a run, of each text, image and embedding if any is given; default 16.
        steps: network evaluations per prior of a run; default as its configuration. A run takes the priors that are
            distilled for so many, where it has such.
        label: class of every cloud of a run; default: classes in turn.
        checkpoint: of the run, which generates, as step-00001000, or best; default the newest.
        network: the run whose surface network is used; default of a run: itself.
        normals: of a network, or estimated from neighbours; default: of a network if there is a run.
        resolution: nodes per side of the grid.
        sigma: blur of the surface, as a share of the grid's side; default as the network was trained, else 0.01.
        seed: decides the clouds generated, and which points are taken of clouds that have more than the network takes.
        out: folder for the results; default RUN/meshes, the folder meshes in that of the clouds, or <file>-meshes.
    """

    clouds_or_run: tyro.conf.Positional[Path]
    num_samples: int | None = None
    steps: int | None = None
    label: Annotated[str | None, tyro.conf.arg(name="class")] = None
    checkpoint: str | None = None
    network: Path | None = None
    normals: Literal["network", "estimated"] | None = None
    resolution: int = RESOLUTION
    sigma: float | None = None
    seed: int = 0
    out: Path | None = None


def mesh(args: MeshArguments) -> list[trimesh.Trimesh]:
    """Run the command; see :class:`MeshArguments`. Returns the meshes in the order of the clouds.

    Raises:
        ValueError: no run or clouds, no surface network, a cloud of too few points or of which no solid can be made,
            options out of range.
    """
    target = find_run(args.clouds_or_run)
    is_run = (target / "config.json").is_file()
    _check(args, target, is_run)
    folder = open_run(target).results if is_run else target
    name = target.stem if target.is_file() else safe_name(target.name)  # of a file, or of one in it
    out = args.out or (folder / "meshes" if target.is_dir() else target.with_name(f"{name}-meshes"))
    check_out(out, RECORD)
    mesher, needed, record = _mesher(args, is_run)
    if is_run:
        clouds, args, generated = _generated(args)
        record |= generated
    else:
        given = read_clouds("clouds", str(target), needed or DEFAULT_POINTS, args.seed)
        clouds = [_points(cloud, i, needed, args.seed) for i, cloud in enumerate(given)]
    meshes = []
    for i, cloud in enumerate(ProgressBar(clouds, "meshes", unit="mesh")):
        try:
            meshes.append(mesher(cloud))
        except ValueError as error:
            raise ValueError(f"clouds: no mesh can be made of cloud {i} ({error})") from None
    options = json.loads(json.dumps(asdict(args), default=str))
    result = {
        "lion_triton": __version__,
        "commit": commit(),
        "options": options,
        **record,
        "clouds_sha256": [fingerprint(cloud).hex() for cloud in clouds],
        "meshes": [_described(m) for m in meshes],
    }
    _write(out, clouds, meshes, result)
    closed = sum(m.is_watertight for m in meshes)
    print(f"{len(meshes)} meshes, {closed} of them watertight: {out / 'ply'}, {out / 'glb'}")
    print(f"picture: {out / 'grid.png'}")
    far = [str(i) for i, (made, cloud) in enumerate(zip(meshes, clouds, strict=True)) if _reaches_far(made, cloud)]
    if far and record["normals"] == "estimated":
        which = ", ".join(far[:10]) + (", ..." if len(far) > 10 else "")
        print(
            f"warning: {len(far)} of {len(meshes)} meshes reach far beyond their clouds ({which}): the sides of their "
            "estimated normals disagree, as where parts are thinner than points are apart; --network RUN knows them",
            file=sys.stderr,
        )
    return meshes


def _reaches_far(made: trimesh.Trimesh, cloud: np.ndarray) -> bool:
    """By more than a twentieth of the cloud's longest side."""
    low, high = cloud.min(0), cloud.max(0)
    beyond = max((low - made.bounds[0]).max(), (made.bounds[1] - high).max())
    return bool(beyond > (high - low).max() / 20)


def _check(args: MeshArguments, target: Path, is_run: bool) -> None:
    if not target.exists() and numbered(str(target)) is None:
        wanted = f"a run folder, a shipped model ({shipped_models()}), or clouds"
        raise ValueError(f"clouds: {args.clouds_or_run} does not exist: expected {wanted}")
    check_seed(args.seed)
    if not 16 <= args.resolution <= 512:
        raise ValueError(f"resolution: expected 16 to 512, got {args.resolution}")
    if args.sigma is not None and not 0 <= args.sigma <= 0.1:
        raise ValueError(f"sigma: expected 0 to 0.1, got {args.sigma}")
    if args.num_samples is not None and args.num_samples < 1:
        raise ValueError(f"num-samples: expected at least 1, got {args.num_samples}")
    if not is_run:
        given = {
            "num-samples": args.num_samples,
            "steps": args.steps,
            "class": args.label,
            "checkpoint": args.checkpoint,
            **args.given,
        }
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name}: is for a run folder, {args.clouds_or_run} is not one")
        if args.normals == "network" and args.network is None:
            raise ValueError("normals: a network needs --network RUN, whose surface network is used")
    if args.normals == "estimated" and args.network is not None:
        raise ValueError("network: is not used with --normals estimated")


def _mesher(args: MeshArguments, is_run: bool) -> tuple[Mesher, int | None, dict[str, Any]]:
    """What makes the meshes, the points that it takes of each cloud (None: all), and the record of it."""
    device = best_device()
    folder = args.network or (args.clouds_or_run if is_run else None)
    if args.normals == "estimated" or folder is None:
        sigma = DEFAULT_SIGMA if args.sigma is None else args.sigma
        record = {"normals": "estimated", "network": None, "sigma": sigma}
        return Mesher(None, args.resolution, sigma, device), None, record
    option = "run" if args.network is None else "network"
    network, training, name = load_surface(open_run(folder, option), option)
    sigma = training.sigma if args.sigma is None else args.sigma
    record = {"normals": "network", "network": f"{folder}/surface/checkpoints/{name}", "sigma": sigma}
    return Mesher(network, args.resolution, sigma, device), network.config.num_points, record


def _generated(args: MeshArguments) -> tuple[list[np.ndarray], MeshArguments, dict[str, Any]]:
    """Clouds of the run in data units, the options with its checkpoint by name, and the record of how they were
    sampled."""
    run = open_run(args.clouds_or_run)
    newest = run.checkpoint(args.checkpoint)
    if newest is not None:  # a run that goes on has another newest one when these are done
        args = replace(args, checkpoint=newest.name)
    count = 16 if args.num_samples is None else args.num_samples
    asked = SampleArguments(
        run.folder, num_samples=count, steps=args.steps, label=args.label, seed=args.seed, checkpoint=args.checkpoint
    )
    labels, settings, prompts = class_labels(run, asked), resolved(run, asked), read_prompts(run, args)
    clip, record = None, dict[str, Any](sampling=asdict(settings))
    if prompts is not None:
        labels, clip = np.tile(labels, len(prompts)), prompts.embeddings.repeat(count, axis=0)
        record |= prompts.record
    lion = load_model(run, args.checkpoint).to(best_device())
    points = run.normalization.invert(generate(run, lion, asked, labels, clip))
    check_finite(points)
    return list(points), replace(args, num_samples=count), record


def _points(cloud: np.ndarray, i: int, needed: int | None, seed: int) -> np.ndarray:
    """The points that are meshed of a cloud: all, or as many random ones as the network takes."""
    if needed is None:
        if len(cloud) < 10:
            raise ValueError(f"clouds: expected at least 10 points, got {len(cloud)} in cloud {i}")
        return cloud
    if len(cloud) < needed:
        raise ValueError(f"clouds: this network takes {needed} points of each, got {len(cloud)} in cloud {i}")
    if len(cloud) == needed:
        return cloud
    return cloud[np.random.default_rng((seed, STREAM, i)).choice(len(cloud), needed, replace=False)]


def _described(made: trimesh.Trimesh) -> dict[str, Any]:
    return {
        "vertices": len(made.vertices),
        "faces": len(made.faces),
        "parts": int(made.body_count),
        "watertight": bool(made.is_watertight),
        "volume": float(made.volume),
        "area": float(made.area),
    }


def _write(out: Path, clouds: Sequence[np.ndarray], meshes: Sequence[trimesh.Trimesh], record: dict[str, Any]) -> None:
    with whole_folder(out) as partial:
        for kind in ("ply", "glb"):
            (partial / kind).mkdir()
            for i, made in enumerate(meshes):
                made.export(partial / kind / f"{i:04d}.{kind}")
        if len({cloud.shape for cloud in clouds}) == 1:
            np.savez(partial / "clouds.npz", points=np.stack(clouds))
        mesh_grid(meshes[:SHOWN], partial / "grid.png")
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def main(args: list[str] | None = None) -> None:
    """The command line."""
    args = sys.argv[1:] if args is None else args
    run_cli(lambda: mesh(tyro.cli(MeshArguments, args=args, prog="python -m lion_triton.mesh")))


if __name__ == "__main__":
    main()
