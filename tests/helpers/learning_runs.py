"""Made-up folders of finished training runs, with round figures."""

import json
from pathlib import Path

import yaml

TOKENS = 100_000  # per step
SPARSE, DENSE = {2: 4.0, 4: 3.0, 8: 2.0}, {2: 4.5, 4: 3.2, 8: 2.5}  # losses by step
KINDS = ("CHORD", "INST", "T", "P", "L", "V")
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
    """Write the folder of a run that ends with its last validation.

    Args:
        losses: validation loss by step.
        step_s, tokens: seconds and tokens of every step that `slow` does not list.
        slow: seconds of single steps; the first takes 20 unless listed.
        kinds: difference from the total loss, by kind of token.
        summary, config: entries of `summary.json` and `config.yaml` to replace.
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
            figures = {"val_loss": losses[step], "val_perplexity": 9.0, "val_nats_per_note": 3 * losses[step]}
            figures |= by_kind | {"val_within_P": 0.5 * losses[step]}
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


def two_seeds_of_each(folder: Path) -> list[Path]:
    """Two runs each of triton and dense; the loss of the second seed is higher by 0.05."""
    return [
        write_run(
            folder / f"{attention}-{seed}",
            {step: loss + 0.05 * seed for step, loss in losses.items()},
            attention=attention,
            seed=seed,
            step_s=step_s,
        )
        for attention, losses, step_s in (("triton", SPARSE, 0.25), ("dense", DENSE, 0.5))
        for seed in (0, 1)
    ]
