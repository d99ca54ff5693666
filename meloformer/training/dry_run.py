"""`--dry_run`: print what a run needs (memory, steps, disk, time) and write nothing."""

import dataclasses
import math
import time

import torch

from ..data.batches import State
from .estimate import GB, device_bytes, estimate_memory
from .resume import load_initial
from .schedule import learning_rate
from .trainer import Trainer

# On a CPU, steps of more floating-point operations than this are not measured.
MAX_CPU_FLOPS = 2e12
CHECKPOINT_BYTES = 12  # per parameter: the weight and two moments


def dry_run(trainer: Trainer) -> None:
    """Collective: print parameters, memory by formula, steps, and the time of an epoch by one measured step.

    Collective; rank 0 prints. The trainer cannot be used afterwards.
    """
    config, job, stepper = trainer.config, trainer.job, trainer.stepper

    def say(label: str, text: str) -> None:
        if job.is_rank0:
            print(f"{label:<12}{text}", flush=True)

    load_initial(config, stepper.model.config)  # or a mistake in --init_from would show when it is too late
    parameters = stepper.model.num_parameters()
    memory = estimate_memory(
        config,
        stepper.model.config,
        parameters,
        stepper.compute_dtype.itemsize,
        job.world,
    )
    parts = {field.name: getattr(memory, field.name) / GB for field in dataclasses.fields(memory)}
    say("model", f"{stepper.model.config.size}, {parameters / 1e6:.1f}M parameters")
    say(
        "data",
        f"{trainer.data.rows_per_epoch(0):,} rows of {config.max_seq_len:,} tokens per epoch, "
        f"{len(trainer.val_data.samples):,} validation samples",
    )
    say(
        "steps",
        f"{trainer.steps_per_epoch:,} of {trainer.identity['rows_per_step']:,} rows per epoch, "
        f"{trainer.total_steps:,} in all",
    )
    say(
        "memory",
        f"{memory.total / GB:.2f} GB per process by formula, of {device_bytes(job.device) / GB:.0f} GB on "
        f"{job.device}: " + ", ".join(f"{name} {size:.2f}" for name, size in parts.items()),
    )
    say(
        "disk",
        f"{CHECKPOINT_BYTES * parameters / GB:.2f} GB per checkpoint, of which {config.keep_last} and the "
        "best one are kept, besides the one that is being written",
    )
    if job.device.type == "cpu":
        flops = 6 * parameters * config.batch_size * config.max_seq_len
        if flops > MAX_CPU_FLOPS:
            say("time", "not measured: a step would take long on a CPU")
            return
    seconds = _measure(trainer)
    minutes = seconds * trainer.steps_per_epoch / 60
    say("time", f"{seconds:.2f} s per step, measured on one; {minutes:.1f} minutes per epoch")
    if job.device.type == "cuda":
        say("peak", f"{torch.cuda.max_memory_allocated(job.device) / GB:.2f} GB allocated in that step")


def _measure(trainer: Trainer) -> float:
    """Seconds of an optimizer step, from the time of one batch and one update after others: the first
    compiles, and on a GPU the second records what is replayed."""
    config, job, stepper = trainer.config, trainer.job, trainer.stepper
    batches = trainer.data.batches(State(), config.batch_size, rank=job.rank, world=job.world)
    batch, _ = next(batches)
    for _ in range(3 if job.device.type == "cuda" else 2):
        started = _now(job.device)
        stepper.accumulate(stepper.prepare(batch), last=True)
        accumulated = _now(job.device)
        stepper.update(learning_rate(0, trainer.total_steps, config))()
        updated = _now(job.device)
    batches_per_epoch = math.ceil(trainer.data.rows_per_epoch(0) / (job.world * config.batch_size))
    batches_per_step = batches_per_epoch / trainer.steps_per_epoch
    return batches_per_step * (accumulated - started) + updated - accumulated


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
