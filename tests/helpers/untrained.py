"""A tiny model with random weights, the same in every test."""

import torch

from meloformer.model.transformer import MeloFormer, ModelConfig

CONFIG = ModelConfig(layers=1, dim=32, heads=2, ffn=32)


def untrained() -> MeloFormer:
    """In eval mode."""
    torch.manual_seed(0)
    return MeloFormer(CONFIG).eval()
