"""Checkpoints of a tiny model for tests."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from meloformer.checkpoint.files import seal
from meloformer.checkpoint.store import save_checkpoint
from meloformer.model.transformer import MeloFormer, ModelConfig
from meloformer.tokens import vocab

CONFIG = ModelConfig(layers=1, dim=8, heads=1, ffn=8)


def make_model(dim: int = 8) -> MeloFormer:
    torch.manual_seed(0)
    return MeloFormer(replace(CONFIG, dim=dim))


def make_optimizer(model: torch.nn.Module, **options) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), **{"fused": False, **options})


def train(model, optimizer, steps: range) -> list[float]:
    """Pulls all weights somewhere else in each step."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        loss = sum(
            (p - torch.randn(p.shape, generator=generator)).square().mean() for p in model.parameters()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def save(root: Path, step: int, model=None, optimizer=None, keep_last: int = 3, **replaced) -> Path:
    model = model or make_model()
    arguments = {
        "model_state": model.state_dict(),
        "config": asdict(CONFIG),
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


def rewrite(path: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint, with the right hash."""
    (path / name).write_bytes(content)
    edit_manifest(path, lambda manifest: manifest["files"].update({name: seal(path / name)}))
