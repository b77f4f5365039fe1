"""LION's networks: the hierarchical VAE, the two priors, and the whole."""

from lion_triton.models.lion import LION, DiffusionConfig, Latents, LIONConfig
from lion_triton.models.published import load_published

__all__ = ["LION", "DiffusionConfig", "LIONConfig", "Latents", "load_published"]
