"""CLIP (Radford et al. 2021, arXiv 2103.00020), which embeds texts and pictures in one space, as loaded by
``transformers``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch import Tensor

from lion_triton.models.priors import CLIP_DIM

PUBLISHED = "openai/clip-vit-base-patch32"  # the one of the published LION

# Of the colours of the pictures that it was trained on.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class CLIP:
    """A CLIP of 512-dimensional embeddings, in evaluation mode on ``device``.

    Args:
        name: a folder that ``transformers`` saved one in, or its id on a hub; None: ``PUBLISHED``.

    Raises:
        ValueError: ``transformers`` is not installed, there is no CLIP of this name, or it has other embeddings.
    """

    def __init__(self, name: str | Path | None = None, device: torch.device | str = "cpu") -> None:
        name = PUBLISHED if name is None else name
        self.name = str(Path(name).resolve()) if Path(name).is_dir() else str(name)
        try:
            from transformers import CLIPModel, CLIPTokenizer
        except ImportError:
            raise ValueError(
                "clip: needs the package transformers (pip install 'lion-triton[clip]'), or give a file of embeddings"
            ) from None
        try:
            model: Any = CLIPModel.from_pretrained(self.name)
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(self.name)
        except Exception as error:  # whatever transformers and the hub make of a missing or foreign one
            raise ValueError(
                f"clip: no CLIP could be read from {self.name}: give a folder that holds one, as of {PUBLISHED}, or a "
                f"file of embeddings ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
            ) from None
        if model.config.projection_dim != CLIP_DIM:
            found = model.config.projection_dim
            raise ValueError(f"clip: expected embeddings of {CLIP_DIM} numbers, as {PUBLISHED} has, got {found}")
        self.model = model.eval().to(device)

    @torch.no_grad()
    def texts(self, texts: Sequence[str], *, normalize: bool = True) -> Float32[Tensor, "B 512"]:
        """Embeddings, on the CPU: of length 1, as our runs take them, or as CLIP returns them, as published models do.

        Raises:
            ValueError: a text of more tokens than it takes.
        """
        config, device = self.model.config.text_config, self.model.device
        rows = self.tokenizer(list(texts)).input_ids
        for text, row in zip(texts, rows, strict=True):
            if len(row) > config.max_position_embeddings:
                limit = config.max_position_embeddings
                raise ValueError(f"text: expected at most {limit} tokens, got {len(row)} in {text[:40]!r}")
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt").to(device)
        return _finished(self.model.text_projection(self.model.text_model(**tokens).pooler_output), normalize)

    @torch.no_grad()
    def images(
        self, images: Sequence[Image.Image | UInt8[np.ndarray, "H W 3"]], *, normalize: bool = True
    ) -> Float32[Tensor, "B 512"]:
        """Likewise, of the square in the middle of each picture, as CLIP was trained."""
        size = self.model.config.vision_config.image_size
        pixels = torch.stack([_pixels(image, size) for image in images]).to(self.model.device)
        features = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        return _finished(features, normalize)


def _pixels(image: Image.Image | UInt8[np.ndarray, "H W 3"], size: int) -> Float32[Tensor, "3 S S"]:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture = picture.convert("RGB")
    scale = size / min(picture.size)
    width, height = (max(size, int(scale * side)) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    picture = picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    colours = (np.asarray(picture, dtype=np.float32) / 255 - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(colours.astype(np.float32)).permute(2, 0, 1)


def _finished(embeddings: Tensor, normalize: bool) -> Float32[Tensor, "B 512"]:
    embeddings = embeddings.float().cpu()
    return torch.nn.functional.normalize(embeddings, dim=-1) if normalize else embeddings
