"""The plain point prior of the benchmark is the same function as ours, and its table says what was measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bench import plain
from lion_triton.models.plan import SetAbstractionGeometry
from lion_triton.models.priors import PointPrior, PointPriorConfig
from lion_triton.models.unet import Convolutions, DownLevel, UNetConfig, UpLevel

CPU = torch.device("cpu")


def tiny(**changes: object) -> PointPrior:
    """Two levels, the coarse one without convolutions, and attention: whatever the published network has."""
    network = UNetConfig(
        down=(
            DownLevel(Convolutions(2, 16, 4, 2, 8), SetAbstractionGeometry(12, 0.3, 6), (16, 24)),
            DownLevel(Convolutions(1, 16, 3), SetAbstractionGeometry(8, 0.4, 5), (16,)),
            DownLevel(Convolutions(0), SetAbstractionGeometry(4, 0.8, 4), (24, 16)),
        ),
        up=(
            UpLevel((16, 16), Convolutions(0)),
            UpLevel((24,), Convolutions(1, 16, 3)),
            UpLevel((16, 8), Convolutions(2, 8, 4)),
        ),
        middle_heads=2,
        middle_head_dim=8,
        head_width=16,
        **changes,  # type: ignore[arg-type]
    )
    return PointPrior(PointPriorConfig(network, time_dim=8), 4, 128).eval()


def randomized(prior: PointPrior) -> PointPrior:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in prior.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / (parameter[0].numel() ** 0.5) if parameter.ndim > 1 else parameter + 0.3 * noise)
    return prior


def largest(x: list[Tensor], y: list[Tensor]) -> float:
    """Relative error of the worst result, over all clouds."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(x, y, strict=True))


def test_a_tiny_one_is_the_same_function_and_has_the_same_gradients() -> None:
    prior, args = randomized(tiny()), plain.inputs(3, 40, CPU)
    theirs = plain.PlainPointPrior(prior)
    with torch.no_grad():
        assert largest([theirs(*args)], [prior(*args)]) < 1e-5
    h_t, t, z = args
    exact = [
        plain.results(network.double(), "forward and backward", (h_t.double(), t, z.double()), "no")
        for network in (theirs, prior)
    ]
    assert largest(*exact) < 1e-10


def test_the_published_one_gives_the_same_output() -> None:
    prior, args = plain.published(), plain.inputs(2, plain.POINTS, CPU)  # one may take other paths through PyTorch
    with torch.no_grad():
        assert largest([plain.PlainPointPrior(prior)(*args)], [prior(*args)]) < 1e-5


def test_every_tensor_is_made_where_the_inputs_are() -> None:
    """As on a GPU: one on a CPU among those on the meta device is an error."""
    theirs = plain.PlainPointPrior(tiny()).to("meta")
    h_t, t, z = (x.to("meta").requires_grad_() for x in plain.inputs(2, 40, CPU))
    out = theirs(h_t, t, z)
    assert out.shape == h_t.shape and out.is_meta
    torch.autograd.grad(out, list(theirs.parameters()), torch.empty_like(out))


def test_options_that_were_not_published_are_refused() -> None:
    for prior in (tiny(residual=True), tiny(skip="convolved"), tiny(attention="softmax"), tiny(moments=0.5)):
        with pytest.raises(ValueError, match="prior: expected the published kind"):
            plain.PlainPointPrior(prior)


def test_ways_are_compared_and_a_wrong_one_gets_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "resolve_precision", lambda precision, device: "bf16")
    prior, args = randomized(tiny()), plain.inputs(2, 40, CPU)
    rows = plain.compare("forward and backward", prior, args, rounds=1)
    assert [(row["way"], len(row["errors"]), row["reason"]) for row in rows] == [
        ("plain, float32", 0, ""),
        ("ours, float32", 3, ""),
        ("ours, bf16", 3, ""),
    ]
    assert all(row["seconds"] > 0 and row["cpu"] > 0 for row in rows)

    class Wrong(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, h_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
            return self.network(h_t, t, z) + 0.1

    plainly = plain.PlainPointPrior
    monkeypatch.setattr(plain, "PlainPointPrior", lambda prior: Wrong(plainly(prior)))
    wrong = plain.compare("forward", prior, args, rounds=1)
    assert [row["reason"] for row in wrong] == ["", "wrong", "wrong"]
    assert "seconds" not in wrong[1]
    assert plain.markdown(wrong).splitlines()[3].startswith("| forward | 2 | ours, float32 | wrong | - |")


def test_table() -> None:
    def row(way: str, seconds: float, cpu: float, errors: list[float]) -> plain.Row:
        return {
            "pass": "forward", "way": way, "batch": 2, "errors": errors, "reason": "", "seconds": seconds, "cpu": cpu
        }  # fmt: skip

    table = plain.markdown([row("plain, float32", 0.4, 0.8, []), row("ours, float32", 0.1, 0.1, [1e-6])])
    assert table.splitlines()[2:] == [
        "| forward | 2 | plain, float32 | 200.0 | 400.0 | 1.00 | 1.00 | - |",
        "| forward | 2 | ours, float32 | 50.0 | 50.0 | 4.00 | 8.00 | 1e-06 |",
    ]
