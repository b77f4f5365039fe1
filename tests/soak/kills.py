"""A run killed at random moments, again and again, against one that nobody disturbed: the same bits, or it is counted.

    python -m tests.soak.kills --count 500

trains a run as small as can be (both stages, pictures, final samples and figures) in one process, and in two. Half of
the kills (SIGKILL) come at any moment, half while a checkpoint is being written; of two processes both are killed, or
one, and then the other must end by itself. Every tenth time all get SIGTERM instead and must end with exit code 0. The
same command then goes on until the run is done. Then weights, averages, state of Adam, metrics, samples and figures are
compared with those of a run that nobody disturbed, and the next one begins. Prints how many kills there were, and ends
with exit code 1 if anything differed, hung or failed. The moments are random, so no two soaks are alike. Ctrl-C
ends it with the counts so far.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lion_triton.cli import run_cli
from lion_triton.config import TrainConfig
from lion_triton.runs import open_run
from lion_triton.train import Arguments, train
from tests.tiny import tiny_config

SECONDS = 60  # in which a process must end when another one died
STOP_SECONDS = 30  # the same after SIGTERM
FAILURES = ("differences", "hangs", "failures")


def soak_config() -> TrainConfig:
    base = tiny_config()
    return replace(
        base,
        preset="soak",  # not the quickstart, whose picture samples the shipped model
        vae=replace(base.vae, steps=6, batch_size=4),
        priors=replace(base.priors, steps=6, batch_size=4, cached_draws=1),
        sampling=replace(base.sampling, steps=3),
        log_every=1,
        picture_every=100,  # one ends each stage
        checkpoint_every=2,
        evaluate_shapes=4,
    )


class Processes:
    """A run's processes, forked: what they import is there already."""

    def __init__(self, config: TrainConfig, out: Path, count: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = out.with_suffix(".log")
        self.log.touch()
        self.logged = self.log.stat().st_size
        self.codes: dict[int, int] = {}
        self.checkpoints = out / "checkpoints"
        self.pids = [_fork(config, out, self.log, rank, count, port) for rank in range(count)]
        self.running = list(self.pids)

    @property
    def failed(self) -> bool:
        return any(self.codes.values())

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is half written; not one that an earlier process left so."""
        return any((self.checkpoints / f".partial-{pid}").exists() for pid in self.pids)

    @property
    def begun(self) -> bool:
        """Whether these processes know each other, and listen to signals. One that waits for the others to come waits
        for most of a minute."""
        return b"steps run launch by launch" in self.log.read_bytes()[self.logged :]

    def poll(self) -> bool:
        """Whether any runs still; notes the exit codes of those that do not, minus the signal's number if killed."""
        for pid in list(self.running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
                self.running.remove(pid)
        return bool(self.running)

    def wait(self, seconds: float) -> bool:
        """Whether all end within that time; whatever does not is killed."""
        end = time.monotonic() + seconds
        while self.poll() and time.monotonic() < end:
            time.sleep(0.002)
        hung = list(self.running)
        self.send(signal.SIGKILL, hung)
        while self.poll():
            time.sleep(0.002)
        return not hung

    def send(self, number: int, pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, number)


def _fork(config: TrainConfig, out: Path, log: Path, rank: int, count: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if count > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            place |= {"MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}  # type: ignore[dict-item]
            os.environ.update({name: str(value) for name, value in place.items()})
        run_cli(lambda: train(Arguments(config, out=out)))
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise AssertionError("not reached")


def results(out: Path) -> dict[str, str]:
    """What a finished run is, as digests and text."""
    run = open_run(out)
    newest = run.checkpoints()[-1]  # of those before, one may be of the step at which it was asked to stop
    found: dict[str, str] = {"checkpoint": newest.name}
    state = json.loads((newest / "state.json").read_text())
    found |= {name: file["sha256"] for name, file in state["files"].items() if name != "optimizer.pt"}
    found["optimizer"] = _digest(torch.load(newest / "optimizer.pt", weights_only=True))
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for line in lines:
        line.pop("shapes_per_second")
    found["metrics"] = json.dumps(lines)
    with np.load(run.samples / "final" / "clouds.npz") as arrays:
        found["samples"] = _digest({name: arrays[name].tobytes() for name in arrays.files})
    found["figures"] = (out / "figures.json").read_text()
    return found


def _digest(content: Any) -> str:
    def plain(x: Any) -> Any:
        if isinstance(x, Tensor):
            return hashlib.sha256(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        if isinstance(x, dict):
            return [[repr(key), plain(value)] for key, value in x.items()]
        return [plain(value) for value in x] if isinstance(x, (list, tuple)) else repr(x)

    return hashlib.sha256(json.dumps(plain(content)).encode()).hexdigest()


def disturb(processes: Processes, out: Path, seconds: float, rng: random.Random) -> str:
    """Send a signal at a random moment, or then wait until a checkpoint is being written; "done" if all ended before.

    seconds: that a whole run takes.
    """
    writing = rng.random() < 0.5
    moment = rng.uniform(0, seconds * (0.4 if writing else 0.9))
    number = signal.SIGTERM if rng.random() < 0.1 else signal.SIGKILL
    start = time.monotonic()

    def reached() -> bool:
        if number == signal.SIGTERM and not processes.begun:
            return False  # who has begun nothing, or gone on with nothing, may end as any program does
        late = time.monotonic() - start > moment
        return late and (not writing or processes.writing)

    while not reached():
        if not processes.poll():
            return "failures" if processes.failed else "done"
        time.sleep(0.0005)
    if writing:
        time.sleep(rng.uniform(0, 0.004))
    victims = list(processes.running)
    if number == signal.SIGKILL and len(victims) > 1 and processes.begun and rng.random() < 0.5:
        victims = [rng.choice(victims)]
    processes.send(number, victims)
    if not processes.wait(SECONDS if number == signal.SIGKILL else STOP_SECONDS):
        return "hangs"
    if number == signal.SIGTERM:
        return "failures" if processes.failed else "stops"
    return "kills"


def soak(count: int, processes: int, folder: Path, rng: random.Random) -> Iterator[str]:
    """What came of each disturbance, and of each finished run: "equal" or "differences"."""
    config = soak_config()
    runs = (folder / f"run-{processes}-{number}" for number in itertools.count())
    out = next(runs)
    begun = time.monotonic()
    undisturbed = Processes(config, out, processes)
    if not undisturbed.wait(600) or undisturbed.failed:
        raise RuntimeError(f"the undisturbed run failed: {undisturbed.log.read_text()[-2000:]}")
    seconds, expected = time.monotonic() - begun, results(out)
    print(
        f"processes: {processes}; a run that is not disturbed takes {seconds:.1f} s, so {count} kills take about "
        f"{count * seconds / 60:.0f} minutes",
        flush=True,
    )
    kills, out = 0, next(runs)
    while True:
        running = Processes(config, out, processes)
        if kills < count:
            outcome = disturb(running, out, seconds, rng)
        else:
            outcome = "hangs" if not running.wait(600) else "failures" if running.failed else "done"
        if outcome == "done":
            got = results(out)
            differing = [name for name in expected if got[name] != expected[name]]
            outcome = "differences" if differing else "equal"
            if differing:
                print(f"{out.name} differs in {', '.join(differing)}", file=sys.stderr, flush=True)
        elif outcome in FAILURES:
            log = running.log.read_text()[-3000:]
            print(f"{out.name}: {outcome}, exit codes {running.codes}: {log}", file=sys.stderr, flush=True)
        yield outcome
        if outcome == "kills":
            kills += 1
            if running.writing:
                yield "in a checkpoint"
        elif outcome != "stops":
            if kills >= count:
                return
            out = next(runs)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500, help="kills, half of them in one process, half in two")
    parser.add_argument("--seed", type=int, default=None, help="of the moments and kinds of kills")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # its thread would be forked with
    rng = random.Random(args.seed)
    head = ("kills", "in a checkpoint", "stops", "equal", *FAILURES)
    rows = {1: Counter[str](), 2: Counter[str]()}
    with tempfile.TemporaryDirectory() as name, contextlib.suppress(KeyboardInterrupt):  # then the counts so far
        for processes, count in ((1, args.count - args.count // 2), (2, args.count // 2)):
            with tqdm(total=count, desc="kills", unit="kill", disable=None) as bar:
                for outcome in soak(count, processes, Path(name), rng):
                    rows[processes][outcome] += 1
                    bar.update(outcome == "kills")
    print(f"{'processes':>12}" + "".join(f"{column:>17}" for column in head))
    for processes, counts in rows.items():
        print(f"{processes:>12}" + "".join(f"{counts[column]:17}" for column in head))
    return int(any(counts[failure] for counts in rows.values() for failure in FAILURES))


if __name__ == "__main__":
    sys.exit(main())
