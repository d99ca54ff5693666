"""Checkpoints of a tiny model for tests."""

import json
from pathlib import Path

import pytest
import torch

from meloformer.checkpoint.store import (
    save_checkpoint,
)
from meloformer.tokens import vocab

CONFIG = {"dim": 8, "layers": 1}


def make_model(dim: int = 8) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(dim, 16), torch.nn.Tanh(), torch.nn.Linear(16, dim))


def make_optimizer(model: torch.nn.Module, **options) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), **{"fused": False, **options})


def train(model, optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, model[0].in_features, generator=generator)
        loss = (model(x) - x.roll(1, -1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def save(root: Path, step: int, model=None, optimizer=None, keep_last: int = 3, **replaced) -> Path:
    model = model or make_model()
    arguments = {
        "model_state": model.state_dict(),
        "config": CONFIG,
        "tokenizer_json": vocab.to_json(),
        "optimizer_state": optimizer.state_dict() if optimizer else None,
        "trainer": {"epoch": 1, "row": 17, "seed": 3},
        "keep_last": keep_last,
    }
    return save_checkpoint(root, step, **{**arguments, **replaced})


def steps_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def assert_one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in parts), text


def edit_manifest(path: Path, change) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    text = change(manifest)
    (path / "manifest.json").write_text(text if isinstance(text, str) else json.dumps(manifest))
