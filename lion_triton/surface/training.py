"""The stage that trains a run's surface network, on clouds that went through the run's own VAE."""

from __future__ import annotations

import json
import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from lion_triton.devices import autocast
from lion_triton.kernels import normal_noise
from lion_triton.models.lion import LION
from lion_triton.pictures import mesh_grid
from lion_triton.runs import (
    Checkpoint,
    Run,
    load_checkpoint,
    load_state,
    save_checkpoint,
    set_damaged_aside,
    vae_trained,
    write_text,
)
from lion_triton.surface.config import SurfaceTraining, surface_config
from lion_triton.surface.meshing import RESOLUTION, Frame, Mesher, to_cube
from lion_triton.surface.network import SurfaceNetwork
from lion_triton.surface.poisson import PoissonSolver, sample_grid
from lion_triton.surface.quality import MeshQuality, mesh_quality
from lion_triton.surface.shapes import OrientedShapes, held_out_shapes, training_shapes
from lion_triton.surface.storage import SurfaceRun, check_same_surface, create_surface, load_network, open_surface

STREAM = 9  # of random numbers; those of ``data`` and ``evaluation`` are 0 to 8
KEYS_PER_STEP = 4  # noise keys that one step may use
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

    def __init__(self, network: SurfaceNetwork, training: SurfaceTraining) -> None:
        super().__init__()
        self.network, self.training_config = network, training
        self.solver = PoissonSolver(training.resolution, training.sigma)

    def forward(
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


def train_surface(
    run: Run, training: SurfaceTraining | None = None, *, device: torch.device | str = "cpu"
) -> SurfaceNetwork:
    """Train the surface network of a run whose VAE is trained, to the end; the same call continues a stopped one.

    Writes RUN/surface/: config.json, metrics.jsonl, checkpoints/ as a run's own, and at the end figures.json and
    overview.png of held-out shapes. What is drawn depends on the run's seed and the step alone, so that a continued
    training equals an unbroken one. One process, one device. Returns the network.

    Raises:
        ValueError: no trained VAE, shapes without normals, other settings than before, a damaged checkpoint, a loss
            that is not finite.
    """
    training, device = training or SurfaceTraining(), torch.device(device)
    lion, vae_checkpoint = trained_vae(run, device)
    shapes, held_out = training_shapes(run), held_out_shapes(run)
    surface = open_surface(run)
    if surface is None:
        surface = create_surface(run, surface_config(run.config.data.num_points), training, vae_checkpoint)
    check_same_surface(surface, training)
    torch.manual_seed(run.config.seed)
    network = SurfaceNetwork(surface.config).to(device)
    objective = SurfaceObjective(network, training).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=training.learning_rate, betas=(0.9, 0.99))
    start = 0
    checkpoint = set_damaged_aside(surface.run)
    if checkpoint is not None:
        load_network(network, surface, dict(checkpoint.model))
        optimizer.load_state_dict(dict(checkpoint.optimizer))
        start = checkpoint.step
        print(f"continuing {surface.folder}: {start} steps are done")

    def save(done: int) -> None:
        state = Checkpoint("surface", done, network.state_dict(), {}, optimizer.state_dict())
        save_checkpoint(surface.run, done, state)

    log = _Log(surface, start)
    bar = tqdm(total=training.steps, initial=start, desc="stage 3, surface", unit="step", disable=None)
    with bar:
        for step in range(start, training.steps):
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate * 0.5 * (1 + math.cos(math.pi * step / training.steps))
            batch = surface_batch(run, lion, shapes, training, step, device)
            with autocast(run.config.mixed_precision, device):
                losses = objective(**batch)
            losses["loss"].backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            done = step + 1
            last = done == training.steps
            if done % training.log_every == 0 or done % training.checkpoint_every == 0 or last:
                values = {name: value.item() for name, value in losses.items()} | {"grad_norm": norm.item()}
                if not math.isfinite(values["loss"]):
                    raise ValueError(
                        f"loss: not finite at step {done} of stage surface; the last checkpoint is kept in "
                        f"{surface.folder}"
                    )
                bar.set_postfix_str(f"loss {values['loss']:.4g}")
                log.write(done, values)
            if done % training.checkpoint_every == 0 or last:
                save(done)
    if start < training.steps or not (surface.folder / "figures.json").is_file():
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


def surface_batch(
    run: Run, lion: LION, shapes: OrientedShapes, training: SurfaceTraining, step: int, device: torch.device
) -> dict[str, Tensor]:
    """The arguments of :class:`SurfaceObjective` in one step, which the run's seed and the step alone decide."""
    rng = np.random.default_rng((run.config.seed, STREAM, step))
    drawn = [
        shapes.draw(int(i), training.dense_points, int(rng.integers(2**31)))
        for i in rng.integers(shapes.count, size=training.batch_size)
    ]
    points, normals = normalized(run, [p for p, _ in drawn]), torch.from_numpy(np.stack([n for _, n in drawn]))
    jitter = torch.from_numpy(training.jitter * rng.random(training.batch_size)).to(device, torch.float32)
    key = torch.tensor([run.config.seed, KEYS_PER_STEP * step], device=device)
    noisy = rebuild(run, lion, points[:, : run.config.data.num_points].to(device), key, jitter)
    frame = Frame.of(noisy)
    distances = normal_noise((training.batch_size, training.dense_points // NEAR_SHARE), _next(key, 3))
    return {
        "noisy": frame.enter(noisy),
        "points": frame.enter(points.to(device)),
        "normals": normals.to(device),
        "distances": training.band * distances,
    }


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
        h = mu + log_sigma.exp() * normal_noise(mu.shape, _next(key, 1))
        if jitter is not None:
            h = h + jitter[:, None, None] * lion.h_std * normal_noise(mu.shape, _next(key, 2))
        return vae.decode(h, z).float()


def _next(key: Tensor, count: int) -> Tensor:
    return key + torch.tensor([0, count], device=key.device)


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
    for i in tqdm(range(count), "meshes of held-out shapes", unit="mesh", leave=False, disable=None):
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


class _Log:
    """metrics.jsonl; a continued training drops what it will write again."""

    def __init__(self, surface: SurfaceRun, start: int) -> None:
        self.path = surface.folder / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        write_text(self.path, "".join(f"{line}\n" for line in lines if _step(line) <= start))

    def write(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a line that a killed process left unfinished
        return math.inf
