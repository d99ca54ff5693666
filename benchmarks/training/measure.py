"""One row of `benchmarks.train`: the steps of the training loop, timed as a whole and part by part."""

import dataclasses
import itertools
import time
import traceback
from collections.abc import Iterator

import torch

from benchmarks.common.compile_counts import count_compilations
from benchmarks.common.failures import free_memory, one_line
from benchmarks.training import inputs
from benchmarks.training.kernel_times import kernel_times
from meloformer.data.batches import Batch, PackedSongs, State
from meloformer.data.shards import ShardSet
from meloformer.errors import UserError
from meloformer.model.transformer import SIZES
from meloformer.training.config import TrainConfig, chosen_model
from meloformer.training.distributed import Job
from meloformer.training.estimate import is_out_of_memory, out_of_memory
from meloformer.training.flops import peak_flops
from meloformer.training.metrics import Meter, StepFigures
from meloformer.training.prefetch import Prefetcher
from meloformer.training.stepper import Stepper

PARTS = ("data", "prepare", "forward", "backward", "optimizer")
MOST_WARMUPS = 10  # times `warmup`
STEPS_IN_PARTS = 5  # at most: waiting for the device after each part is slow
PROFILED_STEPS = 2


class Run:
    """One combination of settings and its training steps, over an endless stream of batches."""

    def __init__(self, config: TrainConfig, shards: ShardSet, job: Job, read: str = inputs.ALL):
        self.config, self.job = config, job
        model = inputs.read_by(chosen_model(config, SIZES[config.model_size]), read)
        limits = {"max_seq_len": config.max_seq_len, "max_bars": config.max_bars}
        limits |= {"kind_rule": model.kind_rule, "near_bars": model.near_bars}
        limits |= {"fixed_num_summaries": config.fixed_num_summaries}
        self.data = PackedSongs(shards, "train", **limits)
        self.data.require_samples()
        self.stepper = Stepper(config, model, job)
        peak = peak_flops(job.device)
        self.meter = Meter(peak and job.world * peak)
        batches = full_batches(self.data, config.batch_size, job)
        self.fed = Prefetcher(batches, self.stepper.prepare, job.device, self.meter)

    def _taken(self, number: int) -> Iterator[StepFigures]:
        """Runs `number` steps; the figures of each come after the next has been launched, as in training."""
        told = None
        for i in range(1, number * self.config.gradient_accumulation_steps + 1):
            last = i % self.config.gradient_accumulation_steps == 0
            self.stepper.accumulate(next(self.fed)[0], last)
            self.fed.look_ahead()
            if told is not None:
                yield told()[0]
                told = None
            if last:  # with flags, as in training
                told = self.stepper.update(self.config.learning_rate, False, False)
        yield told()[0]

    def steps(self, number: int) -> dict:
        """Runs `number` steps; what the meter records of them, as if they were one."""
        self.meter.restart()
        figures = list(self._taken(number))
        whole = StepFigures(
            loss=figures[-1].loss,
            grad_norm=figures[-1].grad_norm,
            tokens=sum(f.tokens for f in figures),
            flops=sum(f.flops for f in figures),
            taken=all(f.taken for f in figures),
            spike=None,
        )
        return self.meter.step_record(number, 0, self.config.learning_rate, whole)

    def breakdown(self, number: int) -> dict[str, float]:
        """Milliseconds per step of each of `PARTS`, the device waited for after each, over `number` steps."""
        spent = dict.fromkeys(PARTS, 0.0)
        since = self._now()

        def done(part: str) -> None:
            nonlocal since
            now = self._now()
            spent[part] += (now - since) * 1e3 / number
            since = now

        batches = full_batches(self.data, self.config.batch_size, self.job)
        for _ in range(number):
            for i in range(1, self.config.gradient_accumulation_steps + 1):
                batch, _ = next(batches)  # not prefetched: this is all the work of the loader
                done("data")
                ready = self.stepper.prepare(batch)
                ready.attention.finalize()
                done("prepare")
                self.stepper.accumulate(ready, i == self.config.gradient_accumulation_steps, done)
            self.stepper.update(self.config.learning_rate)()
            done("optimizer")
        return spent

    def _now(self) -> float:
        if self.job.device.type == "cuda":
            torch.cuda.synchronize(self.job.device)
        return time.perf_counter()


def full_batches(data: PackedSongs, rows: int, job: Job) -> Iterator[tuple[Batch, State]]:
    """Batches of `rows` rows for this process, from the rows of the first epoch in a cycle.

    In training the last step of an epoch is filled up with padding, which with few songs, and with several
    processes, would be a large share of all.
    """
    of_epoch = data.rows_per_epoch(0)
    for first in itertools.count(0, job.world * rows):
        group = [row % of_epoch for row in range(first, first + job.world * rows)]
        yield data.batch(0, data.rows_by_rank(0, group, job.world)[job.rank]), State()


def measure(
    config: TrainConfig, shards: ShardSet, job: Job, warmup: int, steps: int, read: str = inputs.ALL
) -> dict:
    """The figures of one row, as JSON values.

    Args:
        warmup: the number of consecutive steps that must compile nothing before `steps` are measured.
        read: what the model reads of a token, see `inputs`.
    """
    torch._dynamo.reset()  # rows share code, and PyTorch limits its compiled versions
    free_memory()
    cuda = job.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(job.device)
    begun = time.perf_counter()
    with count_compilations() as compiled:
        run = Run(config, shards, job, read)
        try:
            run.steps(1)
            first = time.perf_counter() - begun
            in_warmup, warmed = _sum(job, compiled()), 1
            quiet = 0
            while quiet < warmup and warmed <= MOST_WARMUPS * warmup:
                run.steps(1)
                warmed += 1
                new = _sum(job, compiled())
                quiet = 0 if any(new.values()) else quiet + 1
                in_warmup = {what: count + new[what] for what, count in in_warmup.items()}
            found = run.steps(steps)
            if found.get("skipped"):
                raise RuntimeError("a step was skipped because its loss or gradient is not finite")
            later = _sum(job, compiled())
            gpu_time = kernel_times(run.steps, PROFILED_STEPS, job.device) if cuda else None
        finally:
            run.fed.close()
    peak = torch.cuda.max_memory_allocated(job.device) / 1e9 if cuda else None
    return {
        "parameters": run.stepper.model.num_parameters(),
        "attention_used": run.stepper.attention,
        "dense_way": run.stepper.dense_way,
        "precision": run.stepper.precision,
        "first_step_s": first,
        "warmup_steps": warmed,
        "compiled_in_warmup": in_warmup,
        "compiled_later": later,
        "tokens_per_s": found["tokens_per_s"],
        "mfu": found.get("mfu"),
        "data_wait": found["data_wait"],
        "step_ms": 1e3 * found["tokens"] / found["tokens_per_s"] / steps,
        "tokens_per_step": found["tokens"] / steps,
        "peak_gb": peak,
        "gpu_time": gpu_time,
        "breakdown_ms": run.breakdown(min(steps, STEPS_IN_PARTS)),
        "loss": found["loss"],
    }


def _sum(job: Job, counts: dict[str, int]) -> dict[str, int]:
    """Over all processes."""
    total = job.sum(torch.tensor([*counts.values()], device=job.device)).tolist()
    return dict(zip(counts, total))


def attempt(
    config: TrainConfig, shards: ShardSet, job: Job, warmup: int, steps: int, read: str = inputs.ALL
) -> dict:
    """The figures of `measure`, or the reason why it failed: the other rows go on.

    When out of memory, it is tried again with half the rows per batch, down to one.

    Raises:
        Exception: the row failed and there are other processes, which would wait for this one forever: the
            job must end.
    """
    while True:
        rows = {"rows_per_batch": config.batch_size}
        try:
            return rows | measure(config, shards, job, warmup, steps, read)
        except Exception as error:
            no_memory = is_out_of_memory(error)
            if job.world > 1 and no_memory:
                raise out_of_memory(config, job.device, job.world) from error
            if job.world > 1:
                raise
            reason = "out of memory" if no_memory else one_line(error)
            if not no_memory and not isinstance(error, UserError):
                traceback.print_exc()  # an unexpected error: one line does not locate it
        free_memory()
        if not no_memory or config.batch_size == 1:
            return rows | {"failed": reason}
        config = dataclasses.replace(config, batch_size=config.batch_size // 2)
