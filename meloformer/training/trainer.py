"""The training loop of one process: steps, and what is due after them.

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

from ..checkpoint.store import save_checkpoint
from ..data.batches import PackedSongs, State
from ..data.shards import ShardSet
from ..errors import DivergedError
from ..files import write_json
from ..model.transformer import MeloFormer, ModelConfig
from ..tokens import vocab
from .config import CONFIG, TrainConfig, save_config
from .distributed import Job
from .flops import peak_flops
from .metrics import Meter, StepFigures, bar_fields
from .optim import learning_rate
from .prefetch import Feed
from .resume import load_for_resume, run_identity
from .run_log import RunLog
from .samples import write_sample
from .stepper import Ready, Stepper
from .summary import describe, write_summary
from .validation import validate

SKIPPED = "skipped.json"


class _Taken(NamedTuple):
    """A step that the device was given: what `Stepper.update` returned, where the data stands after it, and
    whether an epoch or the run ends with it."""

    told: Callable[[], tuple[StepFigures, list[bool]]]
    lr: float
    after: State
    ends: bool


class Trainer:
    """Everything one process of a run holds. `run` trains to the end, or until it is asked to stop.

    Args:
        config, model_config: of the run.
        job: this process among the others.
        stop_reason: asked after every step for what wants the run to stop, if anything does.

    Attributes:
        step: optimizer steps so far, those that were skipped included.
        state: which rows come next.
        tokens: seen so far, without padding.
        due: what the last step calls for and is not done yet: "validate", "sample".
        best: step and val_loss of the best validation so far.
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
        shards = ShardSet(config.data_dir)
        limits = {"max_seq_len": config.max_seq_len, "max_bars": config.max_bars, "seed": config.seed}
        limits |= {"near_bars": model_config.near_bars, "kind_rule": model_config.kind_rule}
        limits["one_room"] = config.one_room
        self.data = PackedSongs(shards, "train", max_samples=config.max_samples, **limits)
        self.data.require_samples()
        self.val_data = PackedSongs(shards, "val", max_samples=config.max_samples, **limits)

        self.stepper = Stepper(config, model_config, job)
        self.identity = run_identity(config, model_config, shards, self.stepper.precision, job.world)
        self.state, self.step, self.tokens = State(), 0, 0
        self.due: list[str] = []
        self.best: dict | None = None
        peak = peak_flops(job.device)
        self.meter, self.log = Meter(peak and job.world * peak), None
        self._skipped: list[dict] = []  # the steps skipped in a row

        # For the schedule and the progress bar. Epochs are packed anew each, so one may take a step more
        # or less than the first; the run ends by the epochs themselves.
        self.steps_per_epoch = math.ceil(self.data.rows_per_epoch(0) / self.identity["rows_per_step"])
        self.total_steps = self.steps_per_epoch * config.epochs
        if config.max_steps is not None:
            self.total_steps = min(self.total_steps, config.max_steps)

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    @property
    def epoch(self) -> int:
        """The epoch of the last step, from 0."""
        return self.state.epoch - (self.step > 0 and self.state.index == 0)

    def restore(self) -> None:
        """Go on from the checkpoint that --resume means, if there is one; see `load_for_resume`."""
        checkpoint = load_for_resume(self.config, self.checkpoints, self.identity, self.job)
        if checkpoint is None:
            return
        saved = checkpoint.trainer
        self.stepper.restore(checkpoint)
        self.stepper.guard.restore(saved["guard"])
        self.state = State(*saved["state"])
        self.step, self.tokens = saved["step"], saved["tokens"]
        self.due, self.best = list(saved["due"]), saved["best"]

    def save(self, val_loss: float | None = None) -> None:
        """Write a checkpoint; the other processes wait until it is whole.

        Args:
            val_loss: of these weights, if known. That of the best so far is known anyway: it may have been
                found before a stop, and this replaces the checkpoint that says so.

        Raises:
            DivergedError: the weights are not finite.
            UserError: the disk is full, or cannot be written.
        """
        if self.best is not None and self.best["step"] == self.step:
            val_loss = self.best["val_loss"]
        weights, optimizer_state = self.stepper.state()
        self.job.lead_does(lambda: self._save(weights, optimizer_state, val_loss))

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
            trainer={
                "identity": self.identity,
                "state": list(self.state),
                "tokens": self.tokens,
                "due": self.due,
                "best": self.best,
                "guard": self.stepper.guard.state(),
                "config": dataclasses.asdict(self.config),
            },
            keep_last=self.config.keep_last,
            val_loss=val_loss,
        )

    def run(self) -> str | None:
        """Train to the end. Returns None, or what had asked for the stop that was obeyed.

        Raises:
            DivergedError: too many steps in a row were skipped.
            UserError: the run cannot go on from what is there, or cannot be saved.
        """
        self.restore()
        self.job.lead_does(self._open)
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            disable=not self.job.leads,
            mininterval=0.5 if sys.stderr.isatty() else 10,
        )
        try:
            stopped = self._loop(bar)
        finally:
            bar.close()
            if self.log is not None:
                self.log.close()
        self.job.lead_does(lambda: write_summary(self, stopped))
        return stopped

    def _open(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        self.log = RunLog(
            self.output,
            self.step,
            dataclasses.asdict(self.config),
            tensorboard=self.config.tensorboard,
            wandb=self.config.wandb,
        )
        save_config(self.config, self.output / CONFIG)
        describe(self)

    def _loop(self, bar: tqdm) -> str | None:
        """What asked for a stop, if anything did."""
        config, job, stepper = self.config, self.job, self.stepper
        if self.due:
            stops, val_loss = self._catch_up(bar)
            self.save(val_loss)
            if stops:
                return self._reason()
        batches = self.data.batches(
            self.state, config.batch_size, rank=job.rank, world=job.world, stop_epoch=config.epochs
        )
        finished = config.max_steps is not None and self.step >= config.max_steps
        self.meter.restart()
        with closing(Feed([] if finished else batches, stepper.prepare, job.device, self.meter)) as fed:
            return self._take_steps(fed, bar)

    def _take_steps(self, fed: Feed[Ready], bar: tqdm) -> str | None:
        """Where the device runs ahead, the books of a step are done when it has begun with the next, so that
        it never waits for them; unless more is due then, or this process alone is to stop."""
        config, job, stepper = self.config, self.job, self.stepper
        self._saved_at = time.monotonic()
        state, step, in_step = self.state, self.step, 0  # of what the device was given
        taken: _Taken | None = None
        for batch, after in fed:
            if in_step == 0:
                stepper.seed(step)
            in_step += 1
            epoch_ends = after.epoch != state.epoch
            last = epoch_ends or in_step == config.gradient_accumulation_steps
            stepper.accumulate(batch, last)
            fed.look_ahead()
            if taken is not None and self._conclude(taken, bar):
                return self._reason()
            taken = None
            if not last:
                continue
            lr = learning_rate(step, self.total_steps, config)
            # The lead's clock counts, and any process's signal: so they travel with the sums of the step.
            late = job.leads and time.monotonic() - self._saved_at >= 60 * config.save_every_minutes
            told = stepper.update(lr, self._wants_stop(), late)
            state, step, in_step = after, step + 1, 0
            finished = step == config.max_steps or after.epoch == config.epochs
            ends = epoch_ends or finished
            taken = _Taken(told, lr, after, ends)
            at_once = not stepper.runs_ahead or (job.world == 1 and self._wants_stop())
            if ends or at_once or any(_is_due(every, step) for every in self._intervals):
                if self._conclude(taken, bar):
                    return self._reason()
                taken = None
            if finished:
                break
        return None

    @property
    def _intervals(self) -> tuple[int | None, ...]:
        return self.config.validate_every, self.config.sample_every, self.config.save_every

    def _conclude(self, taken: _Taken, bar: tqdm) -> bool:
        """Log a step, and do what it calls for. Whether anything wants the run to stop.

        Raises:
            DivergedError: too many steps in a row were skipped.
        """
        config, stepper = self.config, self.stepper
        figures, (stops, saves) = taken.told()
        before, self.state, self.step = self.state, taken.after, self.step + 1
        self.tokens += figures.tokens
        record = self.meter.step_record(self.step, self.epoch, taken.lr, figures)
        self._note_step(bar, record, before)

        if len(self.val_data.samples) and (taken.ends or _is_due(config.validate_every, self.step)):
            self.due.append("validate")
        if _is_due(config.sample_every, self.step):
            self.due.append("sample")
        gives_up = stepper.guard.in_a_row >= config.max_skipped_steps
        saves = saves or stops or taken.ends or gives_up or _is_due(config.save_every, self.step)
        if self.due or saves:
            stepper.wait()  # what it works on is the next step
            with self.meter.paused():
                val_loss = None
                if self.due and not stops:
                    stops, val_loss = self._catch_up(bar)
                is_best = val_loss is not None and self.best["step"] == self.step
                if saves or stops or is_best:
                    self.save(val_loss)
                    self._saved_at = time.monotonic()
        if gives_up:
            raise self._diverged()
        return stops

    def _catch_up(self, bar: tqdm) -> tuple[bool, float | None]:
        """Do what is due; whether a stop broke it off, and the validation loss if it was found."""
        val_loss = None
        while self.due:
            if self.due[0] == "validate":
                figures = validate(
                    self.stepper, self.val_data, self.config.batch_size, self.job, self._wants_stop
                )
                if figures is None:
                    return True, val_loss
                val_loss = figures["val_loss"]
                self._note_validation(bar, figures)
            else:
                model = self.stepper.whole_model()
                if not self.job.lead_does(partial(self._sample, model)):
                    return True, val_loss
            self.due.pop(0)
        return self.job.any(self._wants_stop()), val_loss

    def _wants_stop(self) -> bool:
        return self.stop_reason() is not None

    def _sample(self, model: MeloFormer) -> bool:
        return write_sample(
            model,
            self.output / "samples",
            self.step,
            max_context=self.config.max_seq_len,
            attention=self.stepper.attention,
            stops=self._wants_stop,
        )

    def _note_validation(self, bar: tqdm, figures: dict[str, float | None]) -> None:
        loss = figures["val_loss"]
        if loss is not None and (self.best is None or loss <= self.best["val_loss"]):
            self.best = {"step": self.step, "val_loss": loss}
        if self.log is not None:
            self.log.write({"step": self.step, "epoch": self.epoch, **figures})
            told = "not finite" if loss is None else f"{loss:.4f} nats per token"
            bar.write(f"step {self.step}, epoch {self.epoch + 1}: validation loss {told}")

    def _note_step(self, bar: tqdm, record: dict, before: State) -> None:
        """Log a step over the rows from `before` on, and remember it if it was skipped."""
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
            times = record["grad_norm_spike"]
            bar.write(
                f"step {self.step}: the gradient norm is {times:.1f} times the median of the last steps"
            )

    def _diverged(self) -> DivergedError:
        """The error for too many skipped steps; the lead process writes down their batches."""
        first, last = self._skipped[0], self._skipped[-1]
        path = self.output / SKIPPED
        if self.job.leads:
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


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
