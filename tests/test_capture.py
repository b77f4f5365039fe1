"""Captured steps and sampling: the same bits as uncaptured, and never without a word when something refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lion_triton import runs, train
from lion_triton.capture import WARM_UPS, Captured, why_uncaptured
from lion_triton.config import TrainConfig, quickstart
from lion_triton.models import LION, sampling
from lion_triton.models.priors import PointPriorConfig
from lion_triton.training import loop
from lion_triton.training.batches import prefetch
from tests.cuda_graphs import Graph, pretend
from tests.models.test_networks_on_triton import tiny

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; the stand-in's twin runs without one")


@pytest.fixture
def pretending(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, loop, sampling)


# What capture promises


class Counter:
    """x, 2 more in every call; ``read`` is what a step may not do."""

    def __init__(self, read: Callable[[Tensor], Any] = lambda x: None) -> None:
        self.x, self.read, self.calls = torch.zeros(3), read, 0

    def __call__(self) -> Tensor:
        self.calls += 1
        self.read(self.x)
        self.x += 2
        return self.x * 10


@pytest.mark.usefixtures("pretending")
def test_every_call_does_its_work_once() -> None:
    counter = Counter()
    step = Captured(counter, "counting", enabled=True)
    for i in range(1, 7):
        assert step().tolist() == [20.0 * i] * 3
        assert counter.x.tolist() == [2.0 * i] * 3
    assert counter.calls == WARM_UPS + 1  # and no more Python since
    assert (Graph.captured, Graph.replayed) == (1, 6 - WARM_UPS)
    counter.x.fill_(100.0)  # what a replay reads may be changed in place
    assert step().tolist() == [1020.0] * 3


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda x: x[0].item(), id="item"),
        pytest.param(lambda x: float(x[0]), id="float"),
        pytest.param(lambda x: bool(x[0] > 0), id="bool"),
        pytest.param(lambda x: x.tolist(), id="tolist"),
        pytest.param(lambda x: x.cpu(), id="cpu"),
        pytest.param(lambda x: x.numpy(), id="numpy"),
        pytest.param(lambda x: x.nonzero(), id="nonzero"),
        pytest.param(lambda x: x[x > 0], id="mask"),
        pytest.param(lambda x: x[[0, 1]], id="list"),
        pytest.param(lambda x: x.unique(), id="unique"),
        pytest.param(lambda x: torch.equal(x, x), id="equal"),
        pytest.param(lambda x: torch.tensor([1.0, 2.0]), id="from-the-host"),
        pytest.param(lambda x: torch.manual_seed(0), id="seed"),
    ],
)
@pytest.mark.usefixtures("pretending")
def test_what_refuses_capture_runs_uncaptured_and_says_so(
    read: Callable[[Tensor], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    counter = Counter(read)
    step = Captured(counter, "counting", enabled=True)
    for i in range(1, 6):
        assert step().tolist() == [20.0 * i] * 3
    assert Graph.captured == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("counting runs launch by launch, not as a CUDA graph: ")
    assert "not permitted" in line


@pytest.mark.usefixtures("pretending")
def test_a_tensor_that_a_replay_reads_must_stay() -> None:
    """The stand-in's own check: or the tests below could not see it."""
    counter = Counter()
    step = Captured(counter, "counting", enabled=True)
    for _ in range(WARM_UPS + 1):
        step()
    counter.x = counter.x.clone()
    with pytest.raises(AssertionError, match="a tensor that the graph reads is gone"):
        step()


def test_where_nothing_is_captured() -> None:
    assert why_uncaptured(torch.device("cpu")) == "there are none on a CPU"
    assert why_uncaptured(torch.device("cuda"), 4) == "4 processes take part"
    assert why_uncaptured(torch.device("cuda")) == ""
    counter = Counter()
    step = Captured(counter, "counting", enabled=False)
    for _ in range(5):
        step()
    assert counter.calls == 5


# Training


def run_config(cached_draws: int) -> TrainConfig:
    """Dropout, clipping, annealing, averages: all that changes from step to step, in a model as small as it goes."""
    config, model = quickstart(), tiny()
    vae, prior = model.vae, model.point_prior
    vae = replace(vae, point_encoder=replace(vae.point_encoder, dropout=0.1), decoder=replace(vae.decoder, dropout=0.1))
    point_prior: PointPriorConfig = replace(prior, network=replace(prior.network, dropout=0.1))
    return replace(
        config,
        # Not the quickstart: its picture shows the shipped model, whose convolutions on a CPU wait for the device.
        preset="captured",
        data=replace(config.data, num_shapes=6, num_points=24),
        model=replace(model, vae=vae, point_prior=point_prior, shape_prior=replace(model.shape_prior, dropout=0.3)),
        vae=replace(config.vae, steps=5, batch_size=3),
        priors=replace(config.priors, steps=5, batch_size=3, cached_draws=cached_draws),
        sampling=replace(config.sampling, steps=4),
        log_every=1,
        checkpoint_every=4,
        validate_every=0,
        evaluate_shapes=4,
    )


def results(folder: Path) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    checkpoint = runs.open_run(folder).checkpoints()[-1]
    averaged = {f"averaged {k}": v for k, v in load_file(checkpoint / "ema.safetensors").items()}
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in logged:
        line.pop("shapes_per_second")
    return load_file(checkpoint / "model.safetensors") | averaged, logged


@pytest.mark.parametrize("cached_draws", [0, 1])
def test_a_captured_run_has_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cached_draws: int
) -> None:
    """A whole run: both stages, pictures, final samples. The stand-in refuses what a GPU would."""
    train.train(train.Arguments(run_config(cached_draws), out=tmp_path / "plain"))
    assert "not as CUDA graphs" in capsys.readouterr().out
    pretend(monkeypatch, loop, sampling, train)
    train.train(train.Arguments(run_config(cached_draws), out=tmp_path / "captured"))
    printed = capsys.readouterr()
    assert "CUDA graph" not in printed.out + printed.err
    # A step of each stage; of each prior for the pictures' batch of 8, and for that of the final samples.
    assert Graph.captured == 2 + 2 * 2
    assert Graph.replayed == (2 * 5 + 2 * 2 * 4) - Graph.captured * WARM_UPS
    (weights, logged), (expected, expected_log) = results(tmp_path / "captured"), results(tmp_path / "plain")
    assert logged == expected_log
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


@pytest.mark.usefixtures("pretending")
def test_a_captured_run_continues_as_if_unbroken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(1)
    config = replace(config, vae=replace(config.vae, steps=6))
    train.train(train.Arguments(config, out=tmp_path / "whole", stage="vae"))
    save = loop.save_checkpoint

    def save_and_stop(run: runs.Run, total_step: int, checkpoint: runs.Checkpoint) -> Path:
        save(run, total_step, checkpoint)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train.train(train.Arguments(config, out=tmp_path / "broken", stage="vae"))
    monkeypatch.setattr(loop, "save_checkpoint", save)
    train.train(train.Arguments(config, out=tmp_path / "broken", stage="vae"))
    expected, got = (runs.open_run(tmp_path / name).checkpoints()[-1] for name in ("whole", "broken"))
    assert expected.name == got.name == "step-00000006"
    for name, value in load_file(expected / "model.safetensors").items():
        assert torch.equal(load_file(got / "model.safetensors")[name], value), name


def test_the_next_batch_is_copied_while_a_step_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the calls: a batch is read and copied right after the step before it was enqueued."""
    pretend(monkeypatch)
    log: list[str] = []
    for name, value in {
        "pin_memory": lambda x: log.append(f"pin {x.item():.0f}") or x,
        "to": lambda x, *_, non_blocking: x,
        "record_stream": lambda x, stream: None,
    }.items():
        monkeypatch.setattr(Tensor, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: torch.cuda.Stream())

    def batches() -> Any:
        for i in range(3):
            log.append(f"read {i}")
            yield {"points": torch.tensor(float(i))}

    for i, batch in enumerate(prefetch(batches(), torch.device("cuda"))):
        log.append(f"step {i}")
        assert batch["points"].item() == i
    assert log == "read 0,pin 0,step 0,read 1,pin 1,step 1,read 2,pin 2,step 2".split(",")
    assert list(prefetch(iter(()), torch.device("cuda"))) == []


# Sampling


@pytest.fixture(scope="module")
def lion() -> LION:
    torch.manual_seed(0)
    return LION(run_config(0).model).eval()


def clouds(lion: LION, count: int = 2, seed: int = 0, label: int = 1, **options: Any) -> Tensor:
    labels = torch.full((count,), label, device=lion.z_mean.device)
    generator = torch.Generator().manual_seed(seed)
    return lion.sample(count, num_points=20, generator=generator, labels=labels, **options)


CASES: list[dict[str, Any]] = [
    {"sampler": "ddim", "steps": 5},
    {"sampler": "ddim", "steps": 4, "seed": 1, "label": 3},  # the same graphs
    {"sampler": "ddim", "steps": 3, "eta": 0.5},
    {"sampler": "ddpm", "steps": 4},
    {"sampler": "ddim", "steps": 4, "count": 3},  # others from here on
    {"sampler": "ddim", "steps": 4, "clip_x0": 0.5},
    {"sampler": "ddim", "steps": 4},  # the first ones again
]


def test_captured_sampling_has_the_same_bits(lion: LION, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [clouds(lion, **case) for case in CASES]
    pretend(monkeypatch, sampling)
    for case, right in zip(CASES, expected, strict=True):
        assert torch.equal(clouds(lion, **case), right), case
    # Two priors for three kinds of batch, and the decoder for the kind that was there more than WARM_UPS times.
    assert Graph.captured == 2 * 3 + 1
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(clouds(lion, **CASES[0]), expected[0])  # and not by the graph of another precision


def test_captured_sampling_follows_the_weights(lion: LION, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, sampling)
    other = LION(lion.config).eval()
    options: dict[str, Any] = {"sampler": "ddim", "steps": 4}
    clouds(lion, **options)
    before = {k: v.clone() for k, v in lion.state_dict().items()}
    lion.load_state_dict(other.state_dict())  # in place: the same graphs
    captured = Graph.captured
    with monkeypatch.context() as plain:
        plain.setattr(sampling, "why_uncaptured", lambda *_: "no")
        expected = clouds(other, **options)
    assert torch.equal(clouds(lion, **options), expected)
    assert Graph.captured == captured
    lion.load_state_dict(before, assign=True)  # elsewhere: new ones
    with monkeypatch.context() as plain:
        plain.setattr(sampling, "why_uncaptured", lambda *_: "no")
        expected = clouds(lion, **options)
    assert torch.equal(clouds(lion, **options), expected)
    assert Graph.captured > captured


def test_few_samplings_are_kept_and_copies_start_with_none(lion: LION, monkeypatch: pytest.MonkeyPatch) -> None:
    from copy import deepcopy

    pretend(monkeypatch, sampling)
    for count in range(1, sampling.Samplings.KEPT + 3):
        clouds(lion, count, sampler="ddim", steps=1)
    assert len(lion._samplings._kept) == sampling.Samplings.KEPT
    assert not deepcopy(lion)._samplings._kept


@GPU
def test_sampling_on_a_gpu_has_the_same_bits(lion: LION, monkeypatch: pytest.MonkeyPatch) -> None:
    lion = LION(lion.config).eval().cuda()
    captured = [clouds(lion, **case) for case in CASES]
    monkeypatch.setattr(sampling, "why_uncaptured", lambda *_: "no")
    for case, got in zip(CASES, captured, strict=True):
        assert torch.equal(clouds(lion, **case), got), case


@GPU
def test_a_run_on_a_gpu_has_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train.train(train.Arguments(run_config(0), out=tmp_path / "captured"))
    printed = capsys.readouterr()
    assert "CUDA graph" not in printed.out + printed.err
    for module in (loop, sampling):
        monkeypatch.setattr(module, "why_uncaptured", lambda *_: "no")
    train.train(train.Arguments(run_config(0), out=tmp_path / "plain"))
    (weights, logged), (expected, expected_log) = results(tmp_path / "captured"), results(tmp_path / "plain")
    assert logged == expected_log
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
