"""How every command line program of the project ends: quietly, or with one clear line and exit code 2."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import Any


def run_cli(command: Callable[[], Any]) -> None:
    """Run ``command``; a ``ValueError`` or ``OSError`` becomes ``error: <line>`` on stderr and exit code 2."""
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
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def fail(message: str) -> None:
    """Print one line and exit with code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
