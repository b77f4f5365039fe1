"""The parts of ``python -m lion_triton.evaluate``; the figures themselves are in ``lion_triton.metrics``."""
