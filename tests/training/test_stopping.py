"""How a signal ends a run."""

import contextlib
import os
import signal

import pytest

from lion_triton.training.stopping import Stop


def fail_after(number: int, message: str) -> None:
    """As PyTorch's argument parsers do: they call Python to look at a type, and take whatever that raises for "no"."""
    with contextlib.suppress(SystemExit, KeyboardInterrupt):
        os.kill(os.getpid(), number)
    raise ValueError(message)


@pytest.mark.parametrize(("number", "end"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_an_end_that_got_lost_is_no_error(number: int, end: type[BaseException]) -> None:
    with pytest.raises(end), Stop().listening():
        fail_after(number, "could not determine the shape of object type")


def test_an_error_after_a_signal_that_may_wait_is_an_error() -> None:
    stop = Stop()
    with pytest.raises(ValueError, match="not finite"), stop.listening(), stop.deferred():
        fail_after(signal.SIGTERM, "loss: not finite")
    assert stop.signal == signal.SIGTERM
