"""The optimizer."""

import torch

from ..model.transformer import MeloFormer
from .config import TrainConfig


def make_optimizer(model: MeloFormer, config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: the gains of norms and the summary embedding do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True if device.type == "cuda" else None
    )
