"""How every command line program of the project ends: quietly, or with one clear line and exit code 2."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable
from typing import Any

from lion_triton.devices import keep_freed_memory
from lion_triton.processes import Processes, lost_another, quiet


def run_cli(command: Callable[[], Any]) -> None:
    """Run ``command``; a ``ValueError`` or ``OSError`` becomes ``error: <line>`` on stderr and exit code 2.

    Of several processes only the main one says more than errors.
    """
    processes = Processes.launched()
    if not processes.main:
        quiet()
    keep_freed_memory()
    try:
        command()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            fail(f"no space left on the disk{f' for {error.filename}' if error.filename else ''}")
        fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except ValueError as error:
        # An error from a worker process comes with its traceback; its own line is the last.
        message = str(error)
        fail(message.strip().splitlines()[-1].removeprefix("ValueError: ") if "Traceback" in message else message)
    except RuntimeError as error:
        if processes.count == 1 or not lost_another(error):
            raise
        fail("another process of this run has ended; its own error, above or below, says why")
    except KeyboardInterrupt:
        if processes.main:
            print("interrupted", file=sys.stderr)
        sys.exit(130)


def fail(message: str) -> None:
    """Print one line and exit with code 2."""
    processes = Processes.launched()
    if not processes.main:
        time.sleep(1)  # if the main process fails alike, the launcher ends this one meanwhile: one line is enough
        message = f"process {processes.index} of {processes.count}: {message}"
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
