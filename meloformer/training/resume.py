"""Which checkpoint a run resumes from, and the check that it is the same run."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.store import (
    Checkpoint,
    find_checkpoint,
    has_checkpoints,
    latest_checkpoint,
    load_checkpoint,
)
from ..data.packing import PACKING
from ..data.shards import ShardSet
from ..errors import UserError
from ..model.transformer import ModelConfig
from .config import TrainConfig
from .distributed import Job, restarted

# Settings that must not change on resume, besides those that `run_identity` adds.
FIXED = (
    *("seed", "max_seq_len", "max_bars", "max_samples", "epochs", "max_steps", "learning_rate"),
    *("warmup_steps", "weight_decay", "max_grad_norm"),
)

_HINTS = {
    "rows_per_step": " (processes x batch_size x gradient_accumulation_steps)",
    "packing": ": it was begun by a version that fills rows otherwise; finish it with that, or begin anew",
}


def run_identity(
    config: TrainConfig, model: ModelConfig, shards: ShardSet, precision: str, world: int
) -> dict[str, object]:
    """The values that must be equal for a checkpoint to be resumed, as JSON values."""
    return {
        "model": json.loads(json.dumps(dataclasses.asdict(model))),
        "data": shards.sha256(),
        "val_split": shards.val_split,
        **{name: getattr(config, name) for name in FIXED},
        **{f"augment_{name}": value for name, value in dataclasses.asdict(config.augmentation).items()},
        "precision": precision,
        "packing": PACKING,
        "rows_per_step": world * config.batch_size * config.gradient_accumulation_steps,
    }


def load_for_resume(config: TrainConfig, root: Path, identity: dict, job: Job) -> Checkpoint | None:
    """Collective: the checkpoint to resume from, on all ranks; None for a new run.

    After a restart by torchrun the run in `root` is resumed, whether --resume was given or not.

    Raises:
        UserError: `root` has checkpoints and --resume is not given, or they are of another run, or none is
            intact.
    """
    path = job.run_on_rank0(lambda: _choose(config, root))
    if path is None:
        return None
    checkpoint = load_checkpoint(path)
    for name, was, value in _differences(checkpoint.trainer["identity"], identity):
        hint = _HINTS.get(name, "")
        raise UserError(f"cannot resume from {path}: {name} was {was!r} there and is {value!r} now{hint}")
    return checkpoint


def _differences(saved: dict, identity: dict) -> Iterator[tuple[str, object, object]]:
    """Name, saved and present value of what differs; of the model configurations only those fields."""
    for name, value in identity.items():
        was = saved.get(name)
        if name == "model" and isinstance(was, dict):
            apart = [key for key in was.keys() | value.keys() if was.get(key) != value.get(key)]
            was, value = ({key: model.get(key) for key in sorted(apart)} for model in (was, value))
        if was != value:
            yield name, was, value


def _choose(config: TrainConfig, root: Path) -> str | None:
    resume = config.resume or ("auto" if restarted() else None)
    if resume is None:
        if has_checkpoints(root):
            raise UserError(
                f"{config.output_dir} holds a run already: add --resume to go on with it, or choose another "
                "--output_dir"
            )
        return None
    newest = latest_checkpoint(root)
    if resume == "auto":
        return newest and str(newest)
    found = find_checkpoint(Path(resume))
    if newest is not None and newest.resolve() != found.resolve():
        raise UserError(
            f"{config.output_dir} holds another checkpoint, {newest.name}: to go on from {found}, choose "
            "another --output_dir"
        )
    return str(found)
