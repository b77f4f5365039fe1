"""A whole LION whose every op runs as its Triton kernel: the loss of both stages and its gradients."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lion_triton import kernels
from lion_triton.config import ReconstructionWeights, quickstart
from lion_triton.kernels._checks import Impl
from lion_triton.models import LION, LIONConfig
from lion_triton.models.lion import posterior
from lion_triton.models.plan import SetAbstractionGeometry
from lion_triton.models.unet import Convolutions, DownLevel, UNetConfig, UpLevel
from lion_triton.training.objectives import prior_loss, vae_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tiny(resolution: int = 3) -> LIONConfig:
    """The quickstart's parts, as small as they go: the interpreter is slow."""
    model = quickstart().model
    level = SetAbstractionGeometry(centers=8, radius=0.8, neighbors=4)
    down = (DownLevel(Convolutions(1, 16, resolution), level, (16,)),)
    encoder = (replace(down[0], widths=(16, 16)),)  # two layers
    prior = model.point_prior
    assert isinstance(prior.network, UNetConfig)
    unet = replace(prior.network, down=down, up=(UpLevel((16,), Convolutions(1, 16, 3)),), head_width=16)
    vae = replace(model.vae, shape_encoder=encoder, point_encoder=unet, decoder=unet, occupancy_resolution=3)
    return replace(model, vae=vae, point_prior=replace(prior, network=unet))


def losses_and_gradients() -> dict[str, Tensor]:
    torch.manual_seed(0)
    lion = LION(tiny(4)).to(DEVICE).eval()  # whole cubes of 4^3 voxels; no dropout
    clouds = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    key = torch.tensor([3, 0], device=DEVICE)
    first = vae_loss(
        lion.vae,
        clouds,
        key,
        kl_coefficient=1.0,
        lambda_z=1.0,
        lambda_h=1.0,
        reconstruction=ReconstructionWeights(l1=1, l2=1, chamfer=1, emd=1),
        occupancy_weight=1.0,
    ).loss
    second = prior_loss(lion, posterior(lion.vae, clouds, key), key, torch.tensor([0, 1], device=DEVICE)).loss
    (first + second).backward()
    gradients = {name: p.grad for name, p in lion.named_parameters() if p.grad is not None}
    return {"vae_loss": first.detach(), "prior_loss": second.detach(), **gradients}


def test_a_training_step_is_that_of_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    asked = set()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # its 11 bits make much of a last bit's difference

    def use(triton: bool) -> dict[str, Tensor]:
        for module in modules:
            if not hasattr(module, "use_triton"):
                continue

            def choose(impl: Impl, x: Tensor, name: str = module.__name__) -> bool:
                asked.add(name.rpartition(".")[2])
                return triton

            monkeypatch.setattr(module, "use_triton", choose)
        return losses_and_gradients()

    reference, ours = use(False), use(True)
    families = {"adagn", "adagn_devoxelize", "adagn_max_neighbors", "diffusion", "emd", "losses", "nearest", "noise"}
    assert asked >= families | {
        "group_mlp",
        "linear_attention",
        "neighborhood",
        "query",
        "rows",
        "sampling",
        "voxel",
        "voxel_conv",
    }
    assert reference.keys() == ours.keys()
    assert len(reference) > 100
    for name, expected in reference.items():
        error = (ours[name] - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error < 1e-4, f"{name}: {error:.1e}"
