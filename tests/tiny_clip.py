"""A CLIP as small as can be, with random weights: embeddings that mean nothing, of 512 numbers."""

from __future__ import annotations

import string
from pathlib import Path

import torch

IMAGE_SIZE, TOKENS = 32, 24


def tiny_clip(folder: Path, dim: int = 512) -> Path:
    """Save one with its tokenizer, which takes a token for every letter."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    words = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    end = vocabulary["<|endoftext|>"]
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": TOKENS, "bos_token_id": end - 1}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**sizes, **text, "eos_token_id": end, "pad_token_id": end},
        vision_config={**sizes, "image_size": IMAGE_SIZE, "patch_size": 16},
        projection_dim=dim,
    )
    model = CLIPModel(config)
    for parameter in model.parameters():  # its own start is so small that all embeddings are nearly alike
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    return folder
