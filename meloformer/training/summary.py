"""What a run says of itself: at the start in a few lines, at the end as `summary.json` and `loss.png`."""

import platform
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .. import __version__
from ..checkpoint.run_state import Best
from ..checkpoint.store import best_checkpoint
from ..data.batches import PackedSongs
from ..files import write_json
from ..plots.loss_curve import loss_curve
from .distributed import Job
from .flops import peak_flops
from .run_log import LOG, read_log
from .stepper import Stepper

SUMMARY, PICTURE = "summary.json", "loss.png"


class Progress(NamedTuple):
    """How far a run is: optimizer steps, epochs begun, tokens, the lowest validation loss so far."""

    step: int
    epoch: int
    tokens: int
    best: Best | None


def describe(
    stepper: Stepper, job: Job, data: PackedSongs, val_data: PackedSongs, step: int, init_from: str | None
) -> None:
    """Print what is about to be trained on what, after `step` steps of an earlier start.

    Args:
        init_from: the checkpoint whose weights the run began with, if any.
    """
    print(
        f"{stepper.model.config.size} model, {stepper.model.num_parameters() / 1e6:.1f}M parameters, "
        f"attention '{stepper.attention}' on {job.device}, {job.world} process(es)"
        f"{', state sharded' if stepper.sharded else ''}\n"
        f"{len(data.samples)} training samples in {data.rows_per_epoch(0)} rows of {data.max_seq_len} "
        f"tokens, {len(val_data.samples)} validation samples"
    )
    for songs in (data, val_data):
        if line := songs.left_out():
            print(line)
    if not len(val_data.samples):
        print(f"there will be no validation loss: {val_data.why_empty()}")
    if job.device.type == "cuda" and peak_flops(job.device) is None:
        print(f"no MFU: the peak speed of {_device_name(job.device)} is not known")
    if step:
        print(f"resuming after step {step}")
    elif init_from is not None:
        print(f"beginning with the weights of {init_from}, and a new optimizer")


def write_summary(
    output: Path,
    checkpoints: Path,
    progress: Progress,
    stopped: str | None,
    stepper: Stepper,
    job: Job,
    data: PackedSongs,
    val_data: PackedSongs,
    data_sha256: str,
) -> None:
    """Write `summary.json` and `loss.png` into `output`, and print how the run ended.

    Args:
        stopped: what asked for a stop, None if the run is finished.
        data_sha256: digest of the songs, as the run's identity has it.
    """
    records = read_log(output / LOG)
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    validations = [record for record in records if "val_loss" in record]
    best = best_checkpoint(checkpoints)
    write_json(
        output / SUMMARY,
        {
            "finished": stopped is None,
            "stopped_by": stopped,
            "steps": progress.step,
            "epochs": progress.epoch,
            "tokens": progress.tokens,
            "skipped_steps": stepper.guard.skipped,
            "loss": losses[-1] if losses else None,
            "validation": validations[-1] if validations else None,
            "best": progress.best and asdict(progress.best),
            "best_checkpoint": best and best.name,
            "parameters": stepper.model.num_parameters(),
            "attention": stepper.attention,
            "dense_way": stepper.dense_way,
            "precision": stepper.precision,
            "processes": job.world,
            "data": {
                "sha256": data_sha256,
                "val_split": data.shards.val_split,
                "training": _amount(data),
                "validation": _amount(val_data),
                "damaged_songs": len(data.shards.damaged),
            },
            "device": _device_name(job.device),
            "versions": {
                "meloformer": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        },
    )
    if losses:
        loss_curve(records, output / PICTURE)
    how = "finished" if stopped is None else f"stopped by {stopped}; --resume goes on with it"
    print(f"{how}: {progress.step} steps, {progress.tokens:,} tokens; see {output / SUMMARY}")


def _amount(data: PackedSongs) -> dict[str, int]:
    """How much a run reads of a split in an epoch."""
    samples = data.samples
    return {"songs": len(np.unique(samples.song)), "tokens": int(samples.length.sum())}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
