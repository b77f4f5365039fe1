"""A run in several processes is that of one; and one that dies ends it."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lion_triton.kernels.noise import new_key
from lion_triton.models import sampling
from lion_triton.models.lion import LION, DiffusionConfig, keys_per_batch
from lion_triton.processes import Processes
from tests.several import STEPS, launch, sample_small, train_small, train_until_one_dies
from tests.tiny import tiny_config, tiny_run

LOGGED = ("loss", "reconstruction", "kl_z", "shape", "point", "grad_norm")


def trained(folder: Path, *parts: tuple[int, int | None]) -> list[dict[str, Any]]:
    """What a run logged that went on, part after part, in so many processes until it was stopped at such a step."""
    folder.mkdir()
    records: list[dict[str, Any]] = []
    for processes, stop_at in parts:
        codes, said = launch(processes, folder, train_small, folder / "run", stop_at)
        assert codes == [0] * processes, said
        of_others = [line for text in said[1:] for line in text.splitlines()]
        assert all(line.startswith("[Gloo]") for line in of_others)  # only the main process speaks, and older Gloos
        records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        steps = [record["total_step"] for record in records if "loss" in record]
        assert steps == list(range(1, (stop_at or 2 * STEPS) + 1))
    return records


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return trained(tmp_path_factory.mktemp("processes") / "alone", (1, None))


# A whole stage in two and in four processes, and checkpoints of two that go on in one, and of one in four.
@pytest.mark.parametrize("parts", [[(2, STEPS + 10), (1, None)], [(1, 10), (4, None)]], ids=["2-then-1", "1-then-4"])
def test_any_number_of_processes_trains_the_same(
    alone: list[dict[str, Any]], tmp_path: Path, parts: list[tuple[int, int | None]]
) -> None:
    together = trained(tmp_path / "together", *parts)
    measured = {name for record in alone for name in record if name.startswith("validation/")}
    assert {"validation/chamfer_perturbed", "validation/point_4", "validation/thickness"} < measured
    for ours, expected in zip(together, alone, strict=True):
        assert ours.keys() == expected.keys()
        # 1-NNA counts nearest shapes, of which some are nearly as near as others.
        for name in expected.keys() & {*LOGGED, *measured} - {"validation/1nna_cd"}:
            assert ours[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), (ours["stage"], ours["step"], name)
    # The noise of other samples, or a mask of dropout, would show: losses of neighbouring steps differ by far more.
    assert np.abs(np.diff([r["loss"] for r in alone if "loss" in r])).min() > 1e-4


def test_a_process_that_dies_ends_the_run(tmp_path: Path) -> None:
    (main, dead), (said, _) = launch(2, tmp_path, train_until_one_dies, tmp_path / "run")
    assert (tmp_path / "log-0").stat().st_mtime - (tmp_path / "died").stat().st_mtime < 60
    assert (main, dead) == (2, -9)
    assert "error: another process of this run has ended" in said


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_never_comes_is_not_waited_for(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("lion_triton.processes.MEETING_SECONDS", 1)
    with pytest.raises(ValueError, match="processes: expected 2 to meet, but not all came within 1 s"):
        Processes.join()


def test_sampling_in_several_processes_gives_the_very_same_files(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run")
    contents = []
    for processes in (1, 2):
        codes, said = launch(processes, tmp_path, sample_small, run.folder, tmp_path / "out")
        assert codes == [0] * processes, said
        files = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
        contents.append({path.relative_to(tmp_path): path.read_bytes() for path in files})
        shutil.rmtree(tmp_path / "out")
    assert contents[0] == contents[1]
    assert len(contents[0]) == 7 + 3


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "ode"])
def test_how_many_keys_a_batch_takes(sampler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process skips of the batches that are another's."""
    monkeypatch.setattr(sampling, "probability_flow", lambda eps_model, noise, schedule: noise)
    lion = LION(tiny_config(diffusion=DiffusionConfig()).model).eval()
    drawn, skipped = (torch.Generator().manual_seed(0) for _ in range(2))
    labels = torch.zeros(1, dtype=torch.int64)
    steps = None if sampler == "ode" else 1
    lion.sample(1, sampler=sampler, steps=steps, num_points=16, generator=drawn, labels=labels)
    for _ in range(keys_per_batch(sampler)):
        new_key(torch.device("cpu"), skipped)
    assert torch.equal(drawn.get_state(), skipped.get_state())


def test_pieces_take_turns() -> None:
    of_each = [[n for n in range(7) if Processes(i, 3).mine(n)] for i in range(3)]
    assert of_each == [[0, 3, 6], [1, 4], [2, 5]]
    assert Processes().gathered([1, 2]) == [1, 2]
    assert Processes().agreed("step") == "step"
