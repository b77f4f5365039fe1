"""Commands in several processes, as torchrun would start them."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lion_triton import sample, train
from lion_triton.config import PRESETS, PriorTraining, TrainConfig, VAETraining
from lion_triton.models.unet import UNetConfig
from lion_triton.training import loop, step, validation
from tests import fresh
from tests.tiny import tiny_config

STEPS = 20  # of each stage


def small() -> TrainConfig:
    """As small as can be, with dropout."""
    config = tiny_config()
    vae, prior = config.model.vae, config.model.point_prior
    unet = replace(vae.decoder, dropout=0.2)
    assert isinstance(prior.network, UNetConfig)
    model = replace(
        config.model,
        vae=replace(vae, point_encoder=unet, decoder=unet),
        shape_prior=replace(config.model.shape_prior, dropout=0.3),
        point_prior=replace(prior, network=replace(prior.network, dropout=0.2)),
    )
    return replace(
        config,
        preset="small",
        model=model,
        # Adam makes whole steps of gradients that are rounding alone, and a maximum may pass to another
        # neighbour by as little: small steps keep what comes of it small.
        vae=VAETraining(steps=STEPS, batch_size=8, learning_rate=1e-4),
        priors=PriorTraining(
            steps=STEPS, batch_size=8, learning_rate=1e-4, shape_draws=3, standardize=True, max_grad_norm=1.0
        ),
        log_every=1,
        checkpoint_every=1000,
        picture_every=1000,
        validate_every=STEPS // 2,
    )


def train_small(out: Path, stop_at: int | None = None) -> None:
    """Without the figures at the end. stop_at: the last step, of both stages, as one process gets SIGTERM."""
    write = loop.Log.write

    def write_and_stop(self: loop.Log, *record: Any) -> None:
        write(self, *record)
        if stop_at is not None and record[2] == stop_at - 1:  # the next step sees it
            os.kill(os.getpid(), signal.SIGTERM)

    PRESETS["small"] = small
    train.finish = lambda context: None
    validation.SAMPLE_STEPS = 2
    loop.Log.write = write_and_stop  # type: ignore[method-assign]
    train.main(["small", "--out", str(out)])


def train_until_one_dies(out: Path) -> None:
    """The second process, at its third step."""
    load, loads = step.Step.load, []

    def load_or_die(self: step.Step, batch: Any) -> None:
        loads.append(batch)
        if len(loads) == 3 and os.environ["RANK"] == "1":
            (out.parent / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        load(self, batch)

    step.Step.load = load_or_die  # type: ignore[method-assign]
    train_small(out)


def sample_small(run: Path, out: Path) -> None:
    """Three batches, the last of them smaller."""
    sample.main([str(run), "--num-samples", "7", "--batch-size", "3", "--steps", "2", "--out", str(out)])


def launch(count: int, folder: Path, target: Callable[..., None], *args: Any) -> tuple[list[int | None], list[str]]:
    """Run ``target(*args)`` in ``count`` processes: their exit codes and what they said."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    logs = [folder / f"log-{rank}" for rank in range(count)]
    processes = [fresh.process(_work, rank, count, port, target, args, out=logs[rank]) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes, [log.read_text() for log in logs]


def _work(rank: int, count: int, port: int, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    if count > 1:
        numbers = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_PORT": port,
        }
        os.environ |= {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ["OMP_NUM_THREADS"] = "1"
    target(*args)
