"""``python -m lion_triton.kernels.compat PROJECT``: which lines of a project to change, and to what.

    python -m lion_triton.kernels.compat PROJECT            the imports, the lines to put, what has no replacement
    python -m lion_triton.kernels.compat PROJECT --diff     the changes as a diff
    python -m lion_triton.kernels.compat PROJECT --write    makes them, in a git tree without other changes

The project is read, never run. Exit code 2 with one line where that cannot be done.
"""

from __future__ import annotations

import argparse
import difflib
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from lion_triton.kernels.compat._advice import COMPAT, Advice, advise


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _fail(message)


def main(arguments: list[str] | None = None) -> None:
    parser = _Parser(prog=f"python -m {COMPAT}", description="Which imports of a project the drop-in modules replace.")
    parser.add_argument("project", type=Path, metavar="PROJECT", help="folder of the project; it is read, never run")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--diff", action="store_true", help="show the changes as a diff")
    how.add_argument("--write", action="store_true", help="make the changes; expects a clean git tree")
    options = parser.parse_args(arguments)
    root: Path = options.project
    try:
        if not root.is_dir():
            _fail(f"PROJECT: expected a folder, got {root}")
        if options.write:
            _check_clean(root)
        advice = advise(root, lambda files: tqdm(files, unit="file", leave=False, disable=None))
        if options.diff:
            _print_diff(advice)
        else:
            _print(advice)
        if options.write:
            for name, (_, new) in advice.texts.items():
                _write(root / name, new)
            print(f"written: {len(advice.texts)} files")
    except OSError as error:
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _check_clean(root: Path) -> None:
    command = ["git", "-C", str(root), "status", "--porcelain", "--", "."]
    status = subprocess.run(command, capture_output=True, text=True)
    if status.returncode:
        _fail(f"--write: expected a git tree, got {root}")
    if changes := status.stdout.splitlines():
        _fail(f"--write: expected a clean git tree, got {len(changes)} changes, of {changes[0][3:]} the first")


def _write(path: Path, text: str) -> None:
    """Whole at any time, in the file's own encoding and line ends."""
    with path.open("rb") as file:
        encoding, _ = tokenize.detect_encoding(file.readline)
    part = path.with_name(path.name + ".part")
    part.write_bytes(text.encode(encoding))
    part.chmod(path.stat().st_mode)
    part.replace(path)


def _print_diff(advice: Advice) -> None:
    for name, (old, new) in advice.texts.items():
        before, after = old.splitlines(keepends=True), new.splitlines(keepends=True)
        for line in difflib.unified_diff(before, after, f"a/{name}", f"b/{name}"):
            sys.stdout.write(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n")


def _print(advice: Advice) -> None:
    for finding in advice.findings:
        print(f"{finding.file}:{finding.line}: {finding.old}")
        if finding.new:
            print(f"    write: {finding.new}")
        for note in finding.notes:
            print(f"    note:  {note}")
    for copy in advice.functional:
        print(f"{copy}: or, for all of PVCNN's, only this one line as that file's whole text")
        print(f"    write: from {COMPAT}.pvcnn import *")
    for name, lines in advice.cuda.items():
        print(f"{name}:{lines[0]}: keeps the project from a CPU: lines {', '.join(map(str, lines))} ask for CUDA")
    for line in advice.unread:
        print(line)
    changes = sum(finding.new is not None for finding in advice.findings)
    missing = sum(note.find("has no replacement") >= 0 for finding in advice.findings for note in finding.notes)
    calls = sum(map(len, advice.cuda.values()))
    print(f"{changes} lines to change, {missing} names without a replacement, {calls} lines that ask for CUDA")


if __name__ == "__main__":
    main()
