"""The folder of results: what is refused before anything is computed, and that nothing is left half-written."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path

import pytest

from lion_triton.evaluation import folder
from lion_triton.evaluation.folder import JSON, PAGE, SAMPLES
from tests.evaluation import refusal

OF_CLOUDS, OF_A_RUN = (JSON, PAGE), (JSON, PAGE, SAMPLES)


def make(out: Path, *names: str) -> Path:
    """A folder with files of these names; with folders where a name ends in a slash."""
    out.mkdir()
    for name in names:
        (out / name).mkdir() if name.endswith("/") else (out / name).write_text('{"lion_triton": "0.0"}')
    return out


def content(root: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.mark.parametrize(
    ("names", "present"),
    [
        (OF_CLOUDS, ()),
        (OF_CLOUDS, ("notes.txt",)),
        (OF_CLOUDS, OF_CLOUDS),
        (OF_A_RUN, OF_CLOUDS),
        (OF_A_RUN, OF_A_RUN),
    ],
)
def test_an_empty_folder_and_that_of_an_earlier_evaluation_are_taken(
    tmp_path: Path, names: tuple[str, ...], present: tuple[str, ...]
) -> None:
    out = make(tmp_path / "out", *present)
    before = content(tmp_path)
    folder.check(out, names)
    assert content(tmp_path) == before


def test_a_folder_that_is_not_there_yet_is_not_made_by_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.check(tmp_path / "a" / "b" / "c", OF_A_RUN)
    monkeypatch.chdir(tmp_path)
    folder.check(Path("a/b"), OF_A_RUN)
    assert not content(tmp_path)


@pytest.mark.parametrize(
    ("names", "present", "message"),
    [
        (OF_CLOUDS, (PAGE,), f"{{out}}/{PAGE} exists and is no evaluation"),
        (OF_A_RUN, (SAMPLES,), f"{{out}}/{SAMPLES} exists and is no evaluation"),
        (OF_CLOUDS, (SAMPLES,), "{out} holds the samples of another evaluation"),
        (OF_CLOUDS, OF_A_RUN, "{out} holds the samples of another evaluation"),
        (OF_CLOUDS, (JSON, f"{PAGE}/"), f"{{out}} cannot hold {JSON}, {PAGE}"),
        (OF_CLOUDS, (f"{JSON}/",), f"{{out}} cannot hold {JSON}, {PAGE}"),
        (OF_A_RUN, (JSON, f"{SAMPLES}/"), f"{{out}} cannot hold {JSON}, {PAGE}, {SAMPLES}"),
    ],
)
def test_a_folder_of_something_else_is_refused(
    tmp_path: Path, names: tuple[str, ...], present: tuple[str, ...], message: str
) -> None:
    out = make(tmp_path / "out", *present)
    before = content(tmp_path)
    assert refusal(folder.check, out, names) == f"out: {message.format(out=out)}: give another --out"
    assert content(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"commit": "mine"}'])
def test_the_evaluation_of_another_program_is_not_replaced(tmp_path: Path, text: str) -> None:
    out = make(tmp_path / "out", PAGE)
    (out / JSON).write_text(text)
    assert "exists and is no evaluation" in refusal(folder.check, out, OF_CLOUDS)


def test_a_link_to_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    for out in ("out", "out/deeper"):
        assert "cannot hold" in refusal(folder.check, tmp_path / out, OF_CLOUDS)


@pytest.mark.parametrize(
    ("inside", "reason"), [("", "hold"), ("deeper", "be written to"), ("deeper/still", "be written to")]
)
def test_a_file_in_the_way_is_refused(tmp_path: Path, inside: str, reason: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=rf"^out: .*/file cannot {reason} .*: give another --out$"):
        folder.check(tmp_path / "file" / inside, OF_CLOUDS)
    assert (tmp_path / "file").read_text() == "mine"


class Full(io.BytesIO):
    """A disk with room for something, but not for a page with its pictures."""

    def write(self, data: object) -> int:
        if len(data) > 1 << 20:  # type: ignore[arg-type]
            raise OSError(28, os.strerror(28))
        return len(data)  # type: ignore[arg-type]


@pytest.mark.parametrize("disk", ["read-only", "full"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_disk_that_cannot_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: str, existing: bool
) -> None:
    """Where the folder is not there yet, it is the one above it that counts."""
    out = make(tmp_path / "out") if existing else tmp_path / "out"
    tried = []

    def open_file(dir: Path) -> Full:
        tried.append(Path(dir))
        if disk == "read-only":
            raise OSError(30, os.strerror(30))
        return Full()

    monkeypatch.setattr(tempfile, "TemporaryFile", open_file)
    line = refusal(folder.check, out, OF_CLOUDS)
    assert tried == [out if existing else tmp_path]
    reason = "Read-only file system" if disk == "read-only" else "No space left on device"
    assert line == f"out: {tried[0]} cannot be written to ({reason}): give another --out"


def test_files_replace_those_of_an_earlier_evaluation_and_no_others(tmp_path: Path) -> None:
    out = make(tmp_path / "out", *OF_CLOUDS, "notes.txt")
    folder.write(out, {JSON: b"new", PAGE: b"newer"})
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        JSON: b"new",
        PAGE: b"newer",
        "notes.txt": b'{"lion_triton": "0.0"}',
    }
    folder.write(tmp_path / "a" / "b", {JSON: b"1"})
    assert (tmp_path / "a" / "b" / JSON).read_bytes() == b"1"


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("present", [None, (), (JSON, PAGE)])
def test_all_files_are_written_or_none(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    present: tuple[str, ...] | None,
    number: int,
    failure: BaseException,
) -> None:
    out = tmp_path / "out" if present is None else make(tmp_path / "out", *present)
    before, written, real = content(tmp_path), list[Path](), Path.write_bytes

    def write(path: Path, content: bytes) -> int:
        written.append(path)
        if len(written) == number:
            real(path, content[:1])
            raise failure
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(type(failure)):
        folder.write(out, {JSON: b"new", PAGE: b"newer"})
    assert len(written) == number
    monkeypatch.undo()
    assert content(tmp_path) == before
