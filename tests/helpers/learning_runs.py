"""Folders of training runs as if they had been trained, with round figures."""

import json
from pathlib import Path

import yaml

TOKENS = 100_000  # of each step
KINDS = ("T", "P", "L", "V", "structural")
VERSIONS = {"meloformer": "0.1.0", "torch": "2.11.0", "python": "3.11.0"}
DATA = {
    "sha256": "abc",
    "val_split": 0.1,
    "training": {"songs": 213, "tokens": 1_266_924},
    "validation": {"songs": 27, "tokens": 158_713},
}
CONFIG = {
    "data_dir": "songs", "output_dir": "somewhere", "model_size": "small", "max_seq_len": 24576,
    "batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "warmup_steps": 100,
    "attention": "auto", "device": "auto", "seed": 0, "keep_last": 3, "tensorboard": False, "wandb": None,
}  # fmt: skip


def write_run(
    folder: Path,
    losses: dict[int, float],
    *,
    attention: str = "triton",
    seed: int = 0,
    step_s: float = 0.5,
    tokens: int = TOKENS,
    slow: dict[int, float] | None = None,
    kinds: dict[str, float] | None = None,
    summary: dict | None = None,
    **config,
) -> Path:
    """A run that ends with its last validation.

    Args:
        losses: of the validations, by step.
        step_s, tokens: seconds and tokens of a step.
        slow: seconds of some steps; the first takes 20 if it is not among them.
        kinds: what the loss of a kind of token is besides the whole loss.
        summary, config: entries of the two files that differ.
    """
    folder.mkdir(parents=True)
    steps, seconds = max(losses), {1: 20.0} | (slow or {})
    records = []
    for step in range(1, steps + 1):
        rate = tokens / seconds.get(step, step_s)
        records.append(
            {"step": step, "epoch": step // 4, "loss": 5.0, "tokens": tokens, "tokens_per_s": rate}
        )
        if step in losses:
            by_kind = {f"val_loss_{kind}": losses[step] + (kinds or {}).get(kind, 0.0) for kind in KINDS}
            figures = {"val_loss": losses[step], "val_perplexity": 9.0, **by_kind, "val_perplexity_T": 9.0}
            records.append({"step": step, "epoch": step // 4, **figures})
    told = {
        "finished": True, "steps": steps, "epochs": steps // 4, "tokens": steps * tokens, "skipped_steps": 0,
        "parameters": 17_000_000, "attention": attention, "precision": "bf16", "processes": 1, "data": DATA,
        "device": "Test GPU", "versions": VERSIONS,
    }  # fmt: skip
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "summary.json").write_text(json.dumps(told | (summary or {})))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"seed": seed} | config))
    return folder
