"""The stage that trains a run's surface network, on clouds that went through the run's own VAE."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from lion_triton.data.sources import load_sources
from lion_triton.devices import autocast
from lion_triton.kernels import normal_noise
from lion_triton.kernels.noise import later_key
from lion_triton.models.files import write_text
from lion_triton.models.lion import LION
from lion_triton.pictures import mesh_grid
from lion_triton.progress import ProgressBar
from lion_triton.runs import Run, load_checkpoint, load_state, set_damaged_aside, vae_trained
from lion_triton.surface.config import SurfaceTraining, surface_config
from lion_triton.surface.meshing import RESOLUTION, Frame, Mesher, to_cube
from lion_triton.surface.network import SurfaceNetwork
from lion_triton.surface.poisson import PoissonSolver, sample_grid
from lion_triton.surface.quality import MeshQuality, mesh_quality
from lion_triton.surface.shapes import OrientedShapes, held_out_shapes, training_shapes
from lion_triton.surface.storage import FOLDER, SurfaceRun
from lion_triton.training.batches import Batch
from lion_triton.training.context import Context
from lion_triton.training.loop import fit
from lion_triton.training.step import KEYS_PER_STEP

STREAM = 9  # of random numbers; those of ``data`` and ``evaluation`` are 0 to 8
JUDGED = 16  # held-out shapes in the figures at the end
SHOWN = 8  # of these in the picture
NEAR_SHARE = 4  # the grids are compared near every fourth of the dense points


class SurfaceObjective(nn.Module):
    """What the stage minimises, as one module.

    The indicator of the predicted points against that of the true surface: over the whole grid, and once more at random
    places near the surface, which give thin parts the weight of their area. Besides, the first point made of each
    against the place and the normal that it had before its noise. Grids are compared in units of the true one: the
    predicted one's own scale would be divided by something near 0 at the start.
    """

    def __init__(self, network: SurfaceNetwork, run: Run, lion: LION, training: SurfaceTraining) -> None:
        super().__init__()
        self.network, self.run, self.training_config = network, run, training
        self.solver = PoissonSolver(training.resolution, training.sigma)
        self._lion = [lion]  # in a list, so that it is no part of this module

    def forward(self, batch: Mapping[str, Tensor], key: Tensor, number: Tensor) -> dict[str, Tensor]:
        """``batch``: as :func:`surface_batch` makes it."""
        return self.losses(*self.inputs(batch, key))

    @torch.no_grad()
    def inputs(self, batch: Mapping[str, Tensor], key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What ``losses`` takes."""
        (lion,), points, normals = self._lion, batch["points"], batch["normals"]
        noisy = rebuild(self.run, lion, points[:, : self.run.config.data.num_points], key, batch["jitter"])
        frame = Frame.of(noisy)
        distances = normal_noise((len(points), points.shape[1] // NEAR_SHARE), later_key(key, 3))
        return frame.enter(noisy), frame.enter(points), normals, self.training_config.band * distances

    def losses(
        self,
        noisy: Float[Tensor, "B N 3"],
        points: Float[Tensor, "B P 3"],
        normals: Float[Tensor, "B P 3"],
        distances: Float[Tensor, "B M"],
    ) -> dict[str, Tensor]:
        """noisy: in the network's frame; points, normals: of the true surface in that frame, the first N those of which
        ``noisy`` was made; distances: from the last M of them, of places to compare, in shares of the cube."""
        weights, count = self.training_config, noisy.shape[1]
        with torch.no_grad():
            truth, height = self.solver.potential(to_cube(points), normals)
        unit = (0.5 / height).view(-1, 1, 1, 1)
        made, made_normals = self.network(noisy)
        with torch.autocast(noisy.device.type, enabled=False):
            potential, _ = self.solver.potential(to_cube(made.flatten(1, 2)), made_normals.flatten(1, 2))
            error = (potential - truth) * unit
            last = distances.shape[1]
            places = to_cube(points[:, -last:]) + distances[..., None] * normals[:, -last:]
            losses = {
                "indicator": error.square().mean(),
                "near": sample_grid(error, places).square().mean(),
                "normals": (made_normals[:, :, 0] - normals[:, :count]).square().sum(-1).mean(),
                "points": (made[:, :, 0] - points[:, :count]).square().sum(-1).mean(),
            }
        total = sum(getattr(weights, name) * value for name, value in losses.items())
        return {"loss": torch.as_tensor(total), **losses}


def train_surface(run: Run, training: SurfaceTraining, accelerator: Accelerator) -> SurfaceNetwork:
    """Train the surface network of a run whose VAE is trained, to the end; the same call continues a stopped one.

    Writes RUN/surface/: config.json, metrics.jsonl, tensorboard/, checkpoints/ as a run's own, and at the end
    figures.json and overview.png of held-out shapes. What is drawn depends on the run's seed and the step alone, so
    that a continued training equals an unbroken one. One process. Returns the network.

    Raises:
        ValueError: no trained VAE, shapes without normals, other settings than before, a damaged checkpoint, a loss
            that is not finite.
    """
    device, seed = accelerator.device, run.config.seed
    lion, vae_checkpoint = trained_vae(run, device)
    sources = load_sources(run.config.data, run.config.evaluate_shapes)
    shapes, held_out = training_shapes(run, sources), held_out_shapes(run, sources)
    surface = SurfaceRun.open(run, FOLDER)
    if surface is None:
        config = surface_config(run.config.data.num_points)
        surface = SurfaceRun.create(run, FOLDER, vae_checkpoint, training=training, config=config)
    surface.check_same_settings(training, "surface.")
    torch.manual_seed(seed)
    network = SurfaceNetwork(surface.config).to(device)
    checkpoint = set_damaged_aside(surface.run)
    if checkpoint is not None:
        load_state(network, checkpoint.model, surface.run)
    if surface.finished:
        print(f"{surface.folder} is trained to the end, in {training.steps} steps")
        return network
    if checkpoint is not None:
        print(f"continuing {surface.folder}: {checkpoint.step} steps are done")
    context = Context(surface.run, sources, accelerator, lion)

    def batches(start: int) -> Iterator[Batch]:
        return (surface_batch(run, shapes, training, step) for step in range(start, training.steps))

    def clouds(step: int) -> list[str]:
        return [sources.train.names[i] for i in _drawn(run, shapes, training, step)[0]]

    with context.stop.listening():
        fit(
            context,
            "surface",
            SurfaceObjective(network, run, lion, training).to(device),
            training,
            batches,
            clouds,
            checkpoint,
            title="stage 3, surface",
            key=torch.tensor([seed, 0], device=device),
            state=network.state_dict,
        )
    _finish(run, surface, network, lion, held_out, device)
    return network


def trained_vae(run: Run, device: torch.device) -> tuple[LION, str]:
    """The run's LION, frozen, of which the VAE is trained, and the name of its checkpoint."""
    newest = run.checkpoint()
    checkpoint = load_checkpoint(run, newest.name, with_optimizer=False) if newest is not None else None
    if newest is None or checkpoint is None or not vae_trained(checkpoint, run.config):
        raise ValueError(f"stage: {run.folder} has no trained VAE yet; run --stage vae first")
    lion = LION(run.config.model)
    load_state(lion, checkpoint.model, run)
    return lion.requires_grad_(False).eval().to(device), newest.name


def surface_batch(run: Run, shapes: OrientedShapes, training: SurfaceTraining, step: int) -> Batch:
    """What a step is given, which the run's seed and the step's number alone decide: points (B, P, 3) in the model's
    units, their normals (B, P, 3), and jitter (B,), the noise of each cloud's latents."""
    chosen, rng = _drawn(run, shapes, training, step)
    drawn = [shapes.draw(int(i), training.dense_points, int(rng.integers(2**31))) for i in chosen]
    return {
        "points": normalized(run, [points for points, _ in drawn]),
        "normals": torch.from_numpy(np.stack([normals for _, normals in drawn])),
        "jitter": torch.from_numpy(training.jitter * rng.random(training.batch_size)).float(),
    }


def _drawn(
    run: Run, shapes: OrientedShapes, training: SurfaceTraining, step: int
) -> tuple[np.ndarray, np.random.Generator]:
    """The shapes of a step, and the generator of all else in it."""
    rng = np.random.default_rng((run.config.seed, STREAM, step))
    return rng.integers(shapes.count, size=training.batch_size), rng


@torch.no_grad()
def rebuild(
    run: Run, lion: LION, points: Float[Tensor, "B N 3"], key: Tensor, jitter: Float[Tensor, " B"] | None = None
) -> Float[Tensor, "B N 3"]:
    """Clouds in the model's units through the VAE, point for point; latents sampled with ``key`` and the next one.

    jitter: standard deviation, in units of the latents', of noise added to the latent points of each cloud, of the key
    after these.
    """
    vae = lion.vae
    with autocast(run.config.mixed_precision, points.device):
        plan = vae.plan(points)
        mu, log_sigma = vae.encode_shape(points, plan)
        z = mu + log_sigma.exp() * normal_noise(mu.shape, key)
        mu, log_sigma = vae.encode_points(points, z, plan)
        h = mu + log_sigma.exp() * normal_noise(mu.shape, later_key(key, 1))
        if jitter is not None:
            h = h + jitter[:, None, None] * lion.h_std * normal_noise(mu.shape, later_key(key, 2))
        return vae.decode(h, z).float()


def normalized(run: Run, clouds: list[np.ndarray]) -> Float[Tensor, "B P 3"]:
    """Clouds of equally many points in the units of the run's model."""
    rows = []
    for cloud in clouds:
        center, scale = run.normalization.center_and_scale(cloud)
        rows.append(((cloud - center) / scale).astype(np.float32))
    return torch.from_numpy(np.stack(rows))


def _finish(
    run: Run, surface: SurfaceRun, network: SurfaceNetwork, lion: LION, held_out: OrientedShapes, device: torch.device
) -> None:
    """Judge the meshes of held-out shapes' reconstructions against their true surfaces, and draw some."""
    training, count = surface.training, min(JUDGED, held_out.count)
    mesher = Mesher(network, RESOLUTION, training.sigma, device)
    meshes, judged = [], []
    for i in ProgressBar(range(count), "meshes of held-out shapes", unit="mesh", leave=False):
        drawn, normals = held_out.draw(i, training.dense_points, run.config.seed)
        points = normalized(run, [drawn])
        key = torch.tensor([run.config.seed, -KEYS_PER_STEP * (i + 1)], device=device)
        noisy = rebuild(run, lion, points[:, : run.config.data.num_points].to(device), key)
        cloud, truth = (run.normalization.invert(x[0].cpu().numpy()) for x in (noisy, points))
        mesh = mesher(cloud)
        judged.append(mesh_quality(mesh, truth, normals))
        meshes.append(mesh)
    figures = MeshQuality.mean(judged)
    write_text(surface.folder / "figures.json", json.dumps({"held_out_shapes": count, **figures}, indent=2) + "\n")
    mesh_grid(meshes[:SHOWN], surface.folder / "overview.png")
    words = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())
    print(f"meshes of {count} held-out shapes: {words}")
    print(f"picture: {surface.folder / 'overview.png'}")
