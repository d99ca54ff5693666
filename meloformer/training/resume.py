"""Which checkpoint a run resumes from, or begins with, and the check that it is the same run or model."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.files import TRAINER, damaged
from ..checkpoint.run_state import RunState
from ..checkpoint.schema import brief
from ..checkpoint.store import (
    Checkpoint,
    find_checkpoint,
    has_checkpoints,
    latest_checkpoint,
    load_checkpoint,
)
from ..data.batches import PackedSongs
from ..data.packing import PACKING
from ..data.shards import ShardSet
from ..errors import UserError
from ..model.transformer import ModelConfig
from .config import TrainConfig
from .distributed import Job, restarted

# Settings that must not change on resume, besides those that `run_identity` adds.
FIXED = (
    *("seed", "max_seq_len", "max_bars", "max_samples", "learning_rate"),
    *("warmup_steps", "weight_decay", "max_grad_norm"),
)

_HINTS = {
    "data": ": other songs, divided otherwise, or damaged since (restore them to go on)",
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


def load_for_resume(
    config: TrainConfig, root: Path, identity: dict, total_steps: int, data: PackedSongs, job: Job
) -> tuple[Checkpoint, RunState] | None:
    """Collective: the checkpoint to resume from and its state, on all ranks; None for a new run.

    After a restart by torchrun the run in `root` is resumed, whether --resume was given or not.

    Args:
        total_steps: of the run as it is configured now: more than before extend it.
        data: to train on.

    Raises:
        UserError: `root` has checkpoints and --resume is not given, or they are of another or of a longer
            run, or none is intact.
    """
    path = job.run_on_rank0(lambda: _choose(config, root))
    if path is None:
        return None
    checkpoint = load_checkpoint(path)
    run = checkpoint.run_state()
    for name, was, value in _differences(run.identity, identity):
        hint = _HINTS.get(name, "")
        raise UserError(
            f"cannot resume from {path}: {name} was {brief(was)} there and is {brief(value)} now{hint}"
        )
    if total_steps < run.total_steps:
        raise UserError(
            f"cannot resume from {path}: it is a run of {run.total_steps} steps, of which --epochs and "
            f"--max_steps leave {total_steps}; a run can be made longer, not shorter"
        )
    _check_position(checkpoint, run, data, config.epochs)
    if config.init_from is not None and job.is_rank0:
        print(f"--init_from {config.init_from}: not used, since the run goes on from {path}")
    return checkpoint, run


def load_initial(config: TrainConfig, model: ModelConfig) -> Checkpoint | None:
    """The checkpoint whose weights a new run begins with, by --init_from; None if it begins with random ones.

    Raises:
        UserError: it is not whole, or of another model.
    """
    if config.init_from is None:
        return None
    checkpoint = load_checkpoint(find_checkpoint(config.init_from))
    for field in dataclasses.fields(model):
        its, mine = (getattr(of, field.name) for of in (checkpoint.config, model))
        if its != mine and field.name != "size":
            raise UserError(
                f"--init_from {checkpoint.path}: its model has {field.name} {its}, and this run's {mine}; "
                "give the model options that it was trained with"
            )
    return checkpoint


def _check_position(checkpoint: Checkpoint, run: RunState, data: PackedSongs, epochs: int) -> None:
    """UserError if the data position of a checkpoint is none that a run of these epochs comes to."""
    epoch, row = run.state
    if epoch > epochs or row >= (data.rows_per_epoch(epoch) if 0 < row and epoch < epochs else 1):
        raise damaged(checkpoint.path / TRAINER, f"there is no row {row} in epoch {epoch}")


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
    resume = "auto" if config.resume is None and restarted() else config.resume
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
    if not resume:  # of a shell's variable that is not set: to begin anew then would lose the run
        raise UserError("--resume: names no checkpoint: give a folder, or leave the name out")
    found = find_checkpoint(Path(resume))
    if newest is None and config.init_from is not None:
        raise UserError(
            f"--resume {resume} and --init_from {config.init_from}: a run begins with one of them"
        )
    if newest is not None and newest.resolve() != found.resolve():
        raise UserError(
            f"{config.output_dir} holds another checkpoint, {newest.name}: to go on from {found}, choose "
            "another --output_dir"
        )
    return str(found)
