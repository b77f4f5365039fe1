"""Python in processes of its own, forked where all is imported, once: a start takes no time. Without the interpreter of
kernels, unlike the tests."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any


def process(target: Callable[..., None], *args: Any, out: Path, err: Path | None = None) -> ForkServerProcess:
    """One that runs ``target(*args)``, to be started; what it says goes to ``out``, and ``err``."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.several", "lion_triton.kernels.census", "bench.launches"])
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        forkserver.ensure_running()
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret
    return context.Process(target=_work, args=(out, err or out, target, args))


def _work(out: Path, err: Path, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    with out.open("a") as out_file, err.open("a") as err_file:
        os.dup2(out_file.fileno(), 1)
        os.dup2(err_file.fileno(), 2)
    target(*args)


def python(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What ``python *command`` gives, of "-c", "-m" or a script."""
    with tempfile.TemporaryDirectory() as name:
        out, err = (Path(name, stream) for stream in ("out", "err"))
        running = process(_python, command, cwd or Path.cwd(), out=out, err=err)
        running.start()
        running.join(600)
        code = running.exitcode
        running.kill()
        assert code is not None, f"python {' '.join(command)}: no end after 600 s"
        return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())


def _python(command: tuple[str, ...], cwd: Path) -> None:
    os.chdir(cwd)
    kind, *rest = command
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        runpy.run_path(kind, run_name="__main__")
