"""On a CPU in float32, nothing as large as a batch's features is copied only to change its dtype, layout or place."""

from __future__ import annotations

import math

import pytest
import torch
from torch.profiler import profile

from lion_triton.config import quickstart
from lion_triton.kernels import voxel_conv
from lion_triton.models import LION
from lion_triton.models.plan import plan_points
from lion_triton.models.unet import UNet


def test_no_features_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what ``addmm`` adds to, and grids that are put together of a few clouds' at a time."""
    monkeypatch.setattr(voxel_conv, "_pays", lambda *_: False)
    B, N = 2, 256
    torch.manual_seed(0)
    network = LION(quickstart().model).point_prior.network
    assert isinstance(network, UNet) and network.modulation.style is not None
    x, style, t = torch.rand(B, N, 4), torch.randn(B, network.modulation.style.in_features), torch.full((B,), 3.0)
    plan = plan_points(x[..., :3], network.config.geometry)
    with profile(record_shapes=True) as found:
        out = network(x, style, t, plan)
        out.backward(torch.ones_like(out))
    weights = {tuple(p.shape) for p in network.parameters()}
    copies = [event for event in found.events() if event.name == "aten::copy_"]
    assert copies  # they are seen
    shapes = [tuple(c.input_shapes[0]) for c in copies if c.cpu_parent is None or c.cpu_parent.name != "aten::addmm"]
    assert [s for s in shapes if math.prod(s) >= B * N * 32 and s not in weights] == []
