"""The run folder when the disk does not do as it should: what was whole stays whole."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from lion_triton.data.clouds import Normalization
from lion_triton.models.files import write_text
from lion_triton.runs import Checkpoint, Run, append_text, create_run, load_checkpoint, save_checkpoint
from tests.tiny import tiny_config


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """With checkpoints of steps 1 and 2."""
    made = create_run(tmp_path / "run", tiny_config(), ("",), Normalization("box"))
    for step in (1, 2):
        save_checkpoint(made, step, checkpoint(step))
    return made


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint("priors", step, {"x": torch.full((9,), step)}, {"x": torch.zeros(9)}, {"state": step})


@pytest.mark.parametrize(
    ("module", "name"),
    [(Path, "mkdir"), (Path, "write_bytes"), (torch, "save"), (Path, "write_text"), (os, "replace")],
    ids=lambda x: getattr(x, "__name__", x),
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
def test_a_checkpoint_that_cannot_be_written_costs_no_other(
    run: Run, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, number: int
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(module, name, broken)
        with pytest.raises(OSError, match=os.strerror(number)):
            save_checkpoint(run, 3, checkpoint(3))
    assert [p.name for p in sorted((run.folder / "checkpoints").iterdir())] == ["step-00000001", "step-00000002"]
    for step, folder in enumerate(run.checkpoints(), 1):
        loaded = load_checkpoint(run, folder.name)
        assert loaded is not None and (loaded.step, int(loaded.model["x"][0]), loaded.optimizer["state"]) == (step,) * 3
    save_checkpoint(run, 3, checkpoint(3))
    assert [folder.name for folder in run.checkpoints()] == ["step-00000002", "step-00000003"]


def test_a_checkpoint_is_gone_before_it_is_deleted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it deletes: nothing is left under the checkpoint's name, and the next one clears up."""

    def killed(path: Path, **_: Any) -> None:
        if "step" in path.name:
            (path / "model.safetensors").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(run, 3, checkpoint(3))
    assert [folder.name for folder in run.checkpoints()] == ["step-00000002", "step-00000003"]
    save_checkpoint(run, 4, checkpoint(4))
    assert [p.name for p in sorted((run.folder / "checkpoints").iterdir())] == ["step-00000003", "step-00000004"]


def test_a_line_is_added_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append_text(path, "one\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, before[1]))  # as of a disk with two bytes left
    try:
        with pytest.raises(OSError, match=f"{os.strerror(errno.ENOSPC)}.*{path}"):
            append_text(path, "another\n")
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            write_text(path, "a whole new file\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "one\n"
    append_text(path, "two\n")
    assert path.read_text() == "one\ntwo\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_a_killed_process_began_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".config.json.partial").write_text("{")
    create_run(folder, tiny_config(), ("",), Normalization("box"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").touch()
    with pytest.raises(ValueError, match="other exists and is not a run folder"):
        create_run(tmp_path / "other", tiny_config(), ("",), Normalization("box"))
