"""A model to generate with, from a checkpoint."""

from pathlib import Path

import torch

from ..checkpoint.store import find_checkpoint, load_checkpoint
from ..errors import UserError
from ..model.transformer import MeloFormer, ModelConfig


def load_model(folder: Path, device: torch.device) -> tuple[MeloFormer, int]:
    """The model of a checkpoint, in eval mode, and the length in tokens of the rows it was trained on.

    Args:
        folder: a checkpoint, or the output folder of a training run.

    Raises:
        UserError: there is no checkpoint, it is damaged, or it is of an older model.
    """
    checkpoint = load_checkpoint(find_checkpoint(folder))
    if "features" not in checkpoint.config:
        raise UserError(
            f"{checkpoint.path}: its model is of an older version, without input features: train it again, "
            "or use the version that wrote it"
        )
    model = MeloFormer(ModelConfig(**checkpoint.config))
    model.load_state_dict(checkpoint.weights)
    return model.to(device).eval(), checkpoint.max_seq_len
