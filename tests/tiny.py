"""A run as small as can be, with weights that nobody trained: for commands whose results need not look like much."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from lion_triton.config import SamplingConfig, TrainConfig, quickstart
from lion_triton.data.clouds import Normalization
from lion_triton.data.procedural import CLASSES
from lion_triton.models.lion import LION, DiffusionConfig, LIONConfig
from lion_triton.models.plan import SetAbstractionGeometry
from lion_triton.models.priors import PointPriorConfig, ShapePriorConfig
from lion_triton.models.unet import Convolutions, DownLevel, UNetConfig, UpLevel
from lion_triton.models.vae import VAEConfig
from lion_triton.runs import Checkpoint, Run, create_run, save_checkpoint

POINTS = 48


def tiny_config(classes: int = len(CLASSES), diffusion: DiffusionConfig | None = None) -> TrainConfig:
    level = SetAbstractionGeometry(centers=16, radius=0.8, neighbors=4)
    down = DownLevel(Convolutions(1, 8, 4), level, (8,))
    up = UpLevel((8, 8), Convolutions(1, 8, 4))
    unet = UNetConfig((down,), (up,), middle_heads=2, head_width=8, dropout=0.0, skip="convolved", residual=True)
    model = LIONConfig(
        VAEConfig((down,), unet, unet, shape_dim=8),
        ShapePriorConfig(width=32, blocks=1, dropout=0.0, time_dim=16, num_classes=classes),
        PointPriorConfig(unet, time_dim=16, num_classes=classes, class_dim=8),
        diffusion or DiffusionConfig(schedule="cosine", prediction="v"),
    )
    base = quickstart()
    return replace(
        base,
        data=replace(base.data, num_points=POINTS, num_shapes=10),
        model=model,
        sampling=SamplingConfig("ddim", 8, clip_x0=5.0),
        mixed_precision="no",
        validate_every=0,
        evaluate_shapes=5,
    )


def tiny_lion(config: TrainConfig) -> LION:
    """Its priors predict little and are nearly smooth, so that steps of DDIM can be undone, as a trained one's can."""
    torch.manual_seed(0)
    lion = LION(config.model).eval()
    with torch.no_grad():
        for layer in (lion.shape_prior.output, lion.point_prior.network.out):
            layer.weight.mul_(0.1)  # type: ignore[operator, union-attr]
        generator = torch.Generator().manual_seed(1)
        clouds = torch.randn(16, POINTS, 3, generator=generator)
        lion.set_latent_statistics(*lion.encode(clouds, generator=generator))
    return lion


def tiny_run(folder: Path, config: TrainConfig | None = None, stage: str = "priors") -> Run:
    config = config or tiny_config()
    lion = tiny_lion(config)
    averaged = {name: value + 0.01 for name, value in lion.state_dict().items() if "prior" in name}
    classes = tuple(CLASSES) if config.model.shape_prior.num_classes else ("",)
    run = create_run(folder, config, classes, Normalization("global", (0.0, 0.01, -0.01), 0.25))
    ema = averaged if stage == "priors" else {}
    save_checkpoint(run, 8, Checkpoint(stage, 4, lion.state_dict(), ema, {}))  # type: ignore[arg-type]
    return run
