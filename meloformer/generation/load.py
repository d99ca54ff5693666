"""A model to generate with, from a checkpoint."""

from pathlib import Path

import torch

from ..checkpoint.store import find_checkpoint, load_checkpoint
from ..model.transformer import MeloFormer


def load_model(folder: Path, device: torch.device) -> tuple[MeloFormer, int]:
    """The model of a checkpoint, in eval mode, and the length in tokens of the rows it was trained on.

    Args:
        folder: a checkpoint, or the output folder of a training run.

    Raises:
        UserError: there is no checkpoint, it is damaged, or it is of another version.
    """
    checkpoint = load_checkpoint(find_checkpoint(folder))
    with torch.device("meta"):  # no memory, and no random numbers, for what is replaced
        model = MeloFormer(checkpoint.config)
    # Copies: what was loaded may be memory-mapped, and the run may remove its checkpoint.
    weights = {name: weight.clone() for name, weight in checkpoint.weights.items()}
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval(), checkpoint.max_seq_len
