"""What a run says of itself: at the start in a few lines, at the end as `summary.json` and `loss.png`."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import numpy as np
import torch

from .. import __version__
from ..checkpoint.store import best_checkpoint
from ..data.batches import PackedSongs
from ..files import write_json
from ..plots.loss_curve import loss_curve
from .flops import peak_flops
from .run_log import LOG, read_log

if TYPE_CHECKING:
    from .trainer import Trainer

SUMMARY, PICTURE = "summary.json", "loss.png"


def describe(trainer: Trainer) -> None:
    """Print what is about to be trained on what."""
    samples, stepper = trainer.data.samples, trainer.stepper
    print(
        f"{stepper.model.config.size} model, {stepper.model.num_parameters() / 1e6:.1f}M parameters, "
        f"attention '{stepper.attention}' on {trainer.job.device}, {trainer.job.world} process(es)"
        f"{', which share the state' if stepper.sharded else ''}\n"
        f"{len(samples)} training samples in {trainer.data.rows_per_epoch(0)} rows of "
        f"{trainer.config.max_seq_len} tokens, {len(trainer.val_data.samples)} validation samples"
    )
    if samples.skipped_songs or samples.skipped_bars:
        print(
            f"left out: {samples.skipped_songs} songs of more than {trainer.config.max_bars} bars, "
            f"{samples.skipped_bars} bars longer than a row"
        )
    if not len(trainer.val_data.samples):
        print("no song fell into the validation split: there will be no validation loss")
    if trainer.job.device.type == "cuda" and peak_flops(trainer.job.device) is None:
        print(f"no MFU: what {_device_name(trainer.job.device)} could do at most is not known")
    if trainer.step:
        print(f"resuming after step {trainer.step}")


def write_summary(trainer: Trainer, stopped: str | None) -> None:
    """Write and print how the run ended; `stopped` is what asked for a stop, if the run is not through."""
    records = read_log(trainer.output / LOG)
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    validations = [record for record in records if "val_loss" in record]
    best = best_checkpoint(trainer.checkpoints)
    write_json(
        trainer.output / SUMMARY,
        {
            "finished": stopped is None,
            "stopped_by": stopped,
            "steps": trainer.step,
            "epochs": trainer.state.epoch,
            "tokens": trainer.tokens,
            "skipped_steps": trainer.stepper.guard.skipped,
            "loss": losses[-1] if losses else None,
            "validation": validations[-1] if validations else None,
            "best": trainer.best,
            "best_checkpoint": best and best.name,
            "parameters": trainer.stepper.model.num_parameters(),
            "attention": trainer.stepper.attention,
            "precision": trainer.stepper.precision,
            "processes": trainer.job.world,
            "data": {
                "sha256": trainer.identity["data"],
                "val_split": trainer.identity["val_split"],
                "training": _amount(trainer.data),
                "validation": _amount(trainer.val_data),
            },
            "device": _device_name(trainer.job.device),
            "versions": {
                "meloformer": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        },
    )
    if losses:
        loss_curve(records, trainer.output / PICTURE)
    how = "finished" if stopped is None else f"stopped by {stopped}; --resume goes on with it"
    print(f"{how}: {trainer.step} steps, {trainer.tokens:,} tokens; see {trainer.output / SUMMARY}")


def _amount(data: PackedSongs) -> dict[str, int]:
    """How much a run reads of a split in an epoch."""
    samples = data.samples
    return {"songs": len(np.unique(samples.song)), "tokens": int(samples.length.sum())}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
