"""How a signal ends a run."""

import os
import signal

import pytest

from lion_triton.training.stopping import Stop


@pytest.mark.parametrize(("number", "end"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_an_end_that_got_lost_is_no_error(number: int, end: type[BaseException]) -> None:
    """PyTorch's argument parsers call Python to look at a type, and take what that raises for "no": then a signal's end
    is lost, and the call fails."""
    stop = Stop()
    with pytest.raises(end), stop.listening():
        try:
            os.kill(os.getpid(), number)
        except end:
            pass
        raise ValueError("could not determine the shape of object type")


def test_an_error_after_a_signal_that_may_wait_is_an_error() -> None:
    stop = Stop()
    with pytest.raises(ValueError, match="not finite"), stop.listening(), stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("loss: not finite")
    assert stop.signal == signal.SIGTERM
