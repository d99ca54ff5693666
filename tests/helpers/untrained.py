"""A tiny model with random weights, the same in every test."""

from dataclasses import asdict
from pathlib import Path

import torch

from meloformer.checkpoint.store import save_checkpoint
from meloformer.model.transformer import MeloFormer, ModelConfig
from meloformer.tokens import vocab

CONFIG = ModelConfig(layers=1, dim=32, heads=2, ffn=32)


def untrained() -> MeloFormer:
    """In eval mode."""
    torch.manual_seed(0)
    return MeloFormer(CONFIG).eval()


def save_untrained(folder: Path, max_seq_len: int, config: dict | None = None, **others) -> Path:
    """A checkpoint of it after step 1, without optimizer state.

    Args:
        folder: of the checkpoints.
        config: JSON values; None for those of its own.
        others: for `save_checkpoint`.
    """
    return save_checkpoint(
        folder,
        1,
        model_state=untrained().state_dict(),
        config=asdict(CONFIG) if config is None else config,
        tokenizer_json=vocab.to_json(),
        optimizer_state=None,
        trainer={"identity": {"max_seq_len": max_seq_len}},
        keep_last=1,
        **others,
    )
