"""LION point-cloud generation with Triton kernels."""

__version__ = "0.1.0"
