"""The training loop of one process: optimizer steps, and validation, samples and checkpoints between them.

One optimizer step takes the next `world x batch_size x accumulation` rows of the epoch.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from tqdm import tqdm

from ..checkpoint.run_state import Best, RunState
from ..checkpoint.store import save_checkpoint
from ..data.batches import PackedSongs, State
from ..errors import DivergedError
from ..files import write_json
from ..model.transformer import MeloFormer, ModelConfig
from ..tokens import vocab
from .config import CONFIG, TrainConfig, save_config
from .distributed import Job
from .flops import peak_flops
from .guard import spike_advice
from .metrics import Meter, StepFigures, bar_fields
from .prefetch import Prefetcher
from .resume import load_for_resume, load_initial, run_identity
from .run_log import RunLog
from .samples import write_sample
from .schedule import count_steps, extension, is_due, learning_rate
from .songs import open_songs, raise_if_unread
from .stepper import PreparedBatch, Stepper
from .summary import Progress, describe, write_summary
from .validation import validate

SKIPPED = "skipped.json"


class _PendingStep(NamedTuple):
    """A step queued on the device: what `Stepper.update` returned, the data position after it, and whether an
    epoch or the run ends with it."""

    result: Callable[[], tuple[StepFigures, list[bool]]]
    lr: float
    after: State
    ends: bool


class Trainer:
    """One process's part of a training run. `run` trains to the end, or until a stop is requested.

    Args:
        config, model_config: of the run.
        job: this process among the others.
        stop_reason: called after every step; what requests a stop, or None.

    Attributes:
        step: optimizer steps so far, skipped ones included.
        state: which rows come next.
        tokens: trained on so far, without padding.
        due: tasks scheduled by the last step and not done yet: "validate", "sample".
        best: the lowest validation loss so far, and its step.
    """

    def __init__(
        self,
        config: TrainConfig,
        model_config: ModelConfig,
        job: Job,
        stop_reason: Callable[[], str | None] = lambda: None,
    ):
        self.config, self.job, self.stop_reason = config, job, stop_reason
        self.output = Path(config.output_dir)
        shards = open_songs(config.data_dir, job, strict=config.strict_data)
        limits = {"max_seq_len": config.max_seq_len, "max_bars": config.max_bars, "seed": config.seed}
        limits |= {"near_bars": model_config.near_bars, "kind_rule": model_config.kind_rule}
        limits["fixed_num_summaries"] = config.fixed_num_summaries
        self.data = PackedSongs(
            shards, "train", max_samples=config.max_samples, augmentation=config.augmentation, **limits
        )
        self.data.require_samples()
        self.val_data = PackedSongs(shards, "val", max_samples=config.max_samples, **limits)

        self.stepper = Stepper(config, model_config, job)
        self.identity = run_identity(config, model_config, shards, self.stepper.precision, job.world)
        self.state, self.step, self.tokens, self._saved_step = State(), 0, 0, 0
        self.due: list[str] = []
        self.best: Best | None = None
        peak = peak_flops(job.device)
        self.meter, self.log = Meter(peak and job.world * peak), None
        self._skipped: list[dict] = []  # the steps skipped in a row

        self.steps_per_epoch = math.ceil(self.data.rows_per_epoch(0) / self.identity["rows_per_step"])
        self.total_steps = count_steps(self.steps_per_epoch, config)
        self._steps_before = self.total_steps  # of the run that is resumed

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    @property
    def epoch(self) -> int:
        """The epoch of the last step, from 0."""
        return self.state.epoch - (self.step > 0 and self.state.index == 0)

    def restore(self) -> None:
        """Go on from the checkpoint that --resume means, or begin with the weights that --init_from names."""
        found = load_for_resume(
            self.config, self.checkpoints, self.identity, self.total_steps, self.data, self.job
        )
        if found is None:
            initial = load_initial(self.config, self.stepper.model.config)
            if initial is not None:
                self.stepper.load_weights(initial)
                self.config = dataclasses.replace(self.config, init_from=str(initial.path))
            return
        checkpoint, saved = found
        self.stepper.load_weights(checkpoint)
        self.stepper.load_optimizer(checkpoint, saved.step - saved.guard.skipped)
        self.stepper.guard.restore(saved.guard)
        self.state = State(*saved.state)
        self.step, self.tokens, self._saved_step = saved.step, saved.tokens, saved.step
        self.due, self.best = list(saved.due), saved.best
        self.config = dataclasses.replace(self.config, init_from=saved.config.get("init_from"))
        self._steps_before = saved.total_steps

    def save(self, val_loss: float | None = None) -> None:
        """Collective: write a checkpoint.

        Args:
            val_loss: of these weights, if known. If they are the best so far it is known anyway: it may have
                been found before a stop, and this checkpoint replaces the one that recorded it.

        Raises:
            DivergedError: the weights are not finite.
            UserError: the disk is full, or cannot be written.
        """
        if self.best is not None and self.best.step == self.step:
            val_loss = self.best.val_loss
        weights, optimizer_state = self.stepper.state()
        self.job.run_on_rank0(lambda: self._save(weights, optimizer_state, val_loss))
        self._saved_at, self._saved_step = time.monotonic(), self.step

    def _save(self, weights: dict[str, Tensor], optimizer_state: dict, val_loss: float | None) -> None:
        if not all(weight.isfinite().all() for weight in weights.values()):
            raise DivergedError(
                f"the weights are not finite after step {self.step} and will not be saved: lower "
                f"--learning_rate; the checkpoints in {self.checkpoints} are of earlier steps"
            )
        self.log.sync()  # no checkpoint may be ahead of the log
        save_checkpoint(
            self.checkpoints,
            self.step,
            model_state=weights,
            config=dataclasses.asdict(self.stepper.model.config),
            tokenizer_json=vocab.to_json(),
            optimizer_state=optimizer_state,
            trainer=dataclasses.asdict(
                RunState(
                    step=self.step,
                    total_steps=self.total_steps,
                    identity=self.identity,
                    state=tuple(self.state),
                    tokens=self.tokens,
                    due=tuple(self.due),
                    best=self.best,
                    guard=self.stepper.guard.state(),
                    config=dataclasses.asdict(self.config),
                )
            ),
            keep_last=self.config.keep_last,
            val_loss=val_loss,
        )

    def run(self) -> str | None:
        """Train to the end. Returns None, or what requested the stop.

        Raises:
            DivergedError: too many steps in a row were skipped.
            UserError: the run cannot go on from what is there, or cannot be saved.
        """
        self.restore()
        self.job.run_on_rank0(self._open)
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            disable=not self.job.is_rank0,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )
        try:
            stopped = self._loop(bar)
        finally:
            bar.close()
            if self.log is not None:
                self.log.close()
        if stopped is not None:
            raise_if_unread((self.data, self.val_data), self.checkpoints, self.job)
        progress = Progress(self.step, self.state.epoch, self.tokens, self.best)
        write = partial(
            write_summary, self.output, self.checkpoints, progress, stopped, self.stepper, self.job
        )
        self.job.run_on_rank0(lambda: write(self.data, self.val_data, self.identity["data"]))
        return stopped

    def _open(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        is_extended = self._steps_before < self.total_steps
        self.log = RunLog(
            self.output,
            self.step,
            dataclasses.asdict(self.config),
            repeated=("val_loss",) * ("validate" in self.due) + ("extended_from",) * is_extended,
            tensorboard=self.config.tensorboard,
            wandb=self.config.wandb,
        )
        save_config(self.config, self.output / CONFIG)
        describe(self.stepper, self.job, self.data, self.val_data, self.step, self.config.init_from)
        if is_extended:
            line, record = extension(self.step, self._steps_before, self.total_steps, self.config)
            print(line)
            self.log.write({"step": self.step, "epoch": self.epoch, **record})

    def _loop(self, bar: tqdm) -> str | None:
        """What requested a stop, or None if the run is finished."""
        config, job, stepper = self.config, self.job, self.stepper
        if self.due:
            stops, unsaved, val_loss = self._run_due(bar, saves=True)
            if unsaved:
                self.save(val_loss)
            if stops:
                return self._reason()
        batches = self.data.batches(
            self.state, config.batch_size, rank=job.rank, world=job.world, stop_epoch=config.epochs
        )
        finished = config.max_steps is not None and self.step >= config.max_steps
        self.meter.restart()
        with closing(Prefetcher([] if finished else batches, stepper.prepare, job.device, self.meter)) as fed:
            return self._take_steps(fed, bar)

    def _take_steps(self, fed: Prefetcher[PreparedBatch], bar: tqdm) -> str | None:
        """The step loop. Where the device runs ahead, a step is logged after the next one was queued, so that
        the device never waits for the host; at once if a task is due, or if a single process is to stop."""
        config, job, stepper = self.config, self.job, self.stepper
        self._saved_at = time.monotonic()
        state, step, in_step = self.state, self.step, 0  # of what is queued on the device
        pending: _PendingStep | None = None
        for batch, after in fed:
            if in_step == 0:
                stepper.seed(step)
            in_step += 1
            epoch_ends = after.epoch != state.epoch
            last = epoch_ends or in_step == config.gradient_accumulation_steps
            stepper.accumulate(batch, last)
            fed.look_ahead()
            if pending is not None and self._finish_step(pending, bar):
                return self._reason()
            pending = None
            if not last:
                continue
            lr = learning_rate(step, self.total_steps, config)
            # Rank 0's clock and any process's signal count: they travel with the sums of the step.
            late = job.is_rank0 and time.monotonic() - self._saved_at >= 60 * config.save_every_minutes
            result = stepper.update(lr, self._wants_stop(), late)
            state, step, in_step = after, step + 1, 0
            finished = step == config.max_steps or after.epoch == config.epochs
            ends = epoch_ends or finished
            pending = _PendingStep(result, lr, after, ends)
            at_once = not stepper.runs_ahead or (job.world == 1 and self._wants_stop())
            if ends or at_once or any(is_due(every, step) for every in self._intervals):
                if self._finish_step(pending, bar):
                    return self._reason()
                pending = None
            if finished:
                break
        return None

    @property
    def _intervals(self) -> tuple[int | None, ...]:
        return self.config.validate_every, self.config.sample_every, self.config.save_every

    def _finish_step(self, pending: _PendingStep, bar: tqdm) -> bool:
        """Log a step and run the tasks that are due after it. Returns whether a stop was requested.

        Raises:
            DivergedError: too many steps in a row were skipped.
        """
        config, stepper = self.config, self.stepper
        figures, (stops, saves) = pending.result()
        if figures.unread:
            self.save()  # as it was before this step
            return True
        before, self.state, self.step = self.state, pending.after, self.step + 1
        self.tokens += figures.tokens
        record = self.meter.step_record(self.step, self.epoch, pending.lr, figures)
        self._log_step(bar, record, before)

        if len(self.val_data.samples) and (pending.ends or is_due(config.validate_every, self.step)):
            self.due.append("validate")
        if is_due(config.sample_every, self.step):
            self.due.append("sample")
        gives_up = stepper.guard.in_a_row >= config.max_skipped_steps
        saves = saves or stops or pending.ends or gives_up or is_due(config.save_every, self.step)
        if self.due or saves:
            stepper.wait()  # the next step is queued already
            with self.meter.paused():
                val_loss = None
                if self.due and not stops:
                    stops, saves, val_loss = self._run_due(bar, saves)
                if saves or stops:
                    self.save(val_loss)
        if gives_up:
            raise self._diverged()
        return stops

    def _run_due(self, bar: tqdm, saves: bool) -> tuple[bool, bool, float | None]:
        """Run the tasks that are due.

        A checkpoint that is due is saved before each of them, since they take minutes: a run that is killed
        again and again loses no step, and a song at most.

        Args:
            saves: whether a checkpoint is due.

        Returns:
            whether a stop was requested, whether a checkpoint is still due, and the validation loss if known.
        """
        val_loss = None
        while self.due:
            if self.due[0] == "validate":
                if saves and self._saved_step != self.step:
                    self.save()  # and once more with the loss
                batch = self.config.batch_size
                figures = validate(self.stepper, self.val_data, batch, self.job, self._wants_stop)
                if figures is None:
                    return True, True, val_loss
                val_loss = figures["val_loss"]
                self._log_validation(bar, figures)
                saves = saves or (self.best is not None and self.best.step == self.step)
                self.due.pop(0)
            else:
                self.due.pop(0)
                if saves:
                    self.save(val_loss)  # as if the song were written
                    saves = False
                model = self.stepper.whole_model()
                if not self.job.run_on_rank0(partial(self._sample, model)):
                    self.due.insert(0, "sample")
                    return True, True, val_loss
        return self.job.any(self._wants_stop()), saves, val_loss

    def _wants_stop(self) -> bool:
        unread = self.data.failure or self.val_data.failure
        return self.stop_reason() is not None or unread is not None

    def _sample(self, model: MeloFormer) -> bool:
        return write_sample(
            model,
            self.output / "samples",
            self.step,
            max_context=self.config.max_seq_len,
            attention=self.stepper.attention,
            stops=self._wants_stop,
        )

    def _log_validation(self, bar: tqdm, figures: dict[str, float | None]) -> None:
        loss = figures["val_loss"]
        if loss is not None and (self.best is None or loss <= self.best.val_loss):
            self.best = Best(self.step, loss)
        if self.log is not None:
            self.log.write({"step": self.step, "epoch": self.epoch, **figures})
            text = "not finite" if loss is None else f"{loss:.4f} nats per token"
            bar.write(f"step {self.step}, epoch {self.epoch + 1}: validation loss {text}")

    def _log_step(self, bar: tqdm, record: dict, before: State) -> None:
        """Log a step whose rows began at `before`; keep its record if it was skipped."""
        if record.get("skipped"):
            stop = self.state.index or self.data.rows_per_epoch(before.epoch)
            self._skipped.append({**record, "rows": [before.index, stop]})
        else:
            self._skipped.clear()
        if self.log is None:
            return
        self.log.write(record)
        bar.set_postfix(bar_fields(record), refresh=False)
        bar.update()
        if record.get("skipped"):
            bar.write(f"step {self.step}: loss or gradient is not finite, the step is skipped")
        elif "grad_norm_spike" in record:
            bar.write(f"step {self.step}: {spike_advice(record, self.config.max_grad_norm)}")

    def _diverged(self) -> DivergedError:
        """The error for too many skipped steps; rank 0 writes down their rows."""
        first, last = self._skipped[0], self._skipped[-1]
        path = self.output / SKIPPED
        if self.job.is_rank0:
            for skipped in self._skipped:
                rows = self.data.rows(skipped["epoch"])[slice(*skipped["rows"])]
                skipped["samples"] = [[self._place(int(sample)) for sample in row] for row in rows]
            write_json(path, {"steps": self._skipped})
        return DivergedError(
            f"{len(self._skipped)} steps in a row were skipped, their loss or gradient is not finite: rows "
            f"{first['rows'][0]} of epoch {first['epoch']} to {last['rows'][1] - 1} of epoch {last['epoch']} "
            f"(their songs are in {path}); lower --learning_rate or try --precision fp32; the state is saved "
            f"in {self.checkpoints}"
        )

    def _place(self, sample: int) -> dict[str, int]:
        """Where a sample lies: number of the song in the ShardSet, and its tokens there."""
        samples = self.data.samples
        return {name: int(getattr(samples, name)[sample]) for name in ("song", "start", "stop")}

    def _reason(self) -> str:
        return self.stop_reason() or "another process"
