"""Measurements of a run: all that the log, the progress bar and TensorBoard or W&B show is computed here."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class StepFigures:
    """Results of an optimizer step, over all processes.

    loss: mean in nats per target. grad_norm: before clipping. tokens: without padding.
    flops: useful floating-point operations, see `flops.training_flops`.
    taken: False if the step was skipped because the loss or the gradient is not finite.
    spike: the gradient norm as a multiple of the median of the last ones, if that is a spike.
    unread: some process could not read its songs, so no process has changed anything.
    """

    loss: float
    grad_norm: float
    tokens: int
    flops: float
    taken: bool
    spike: float | None
    unread: bool = False


class Meter:
    """Measures the time of steps, without validation, sampling and saving.

    Args:
        peak: peak floating-point operations per second of all devices together; None gives no MFU.
    """

    def __init__(self, peak: float | None = None) -> None:
        self._peak = peak
        self.restart()

    def restart(self) -> None:
        """Start the next step's time now."""
        self._since, self._waited = time.perf_counter(), 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time is not counted as part of a step."""
        begun = time.perf_counter()
        yield
        self._since += time.perf_counter() - begun

    def waiting(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """The same items; the time until each arrives counts as waiting for data."""
        items = iter(items)
        while True:
            begun = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            self._waited += time.perf_counter() - begun
            yield item

    def step_record(self, step: int, epoch: int, lr: float, figures: StepFigures) -> dict:
        """The log record of a step that ends now: JSON values; non-finite numbers become None."""
        now = time.perf_counter()
        seconds, waited = now - self._since, self._waited
        self._since, self._waited = now, 0.0
        record = {
            "step": step,
            "epoch": epoch,
            "lr": lr,
            "loss": finite(figures.loss),
            "grad_norm": finite(figures.grad_norm),
            "tokens": figures.tokens,
            "tokens_per_s": figures.tokens / seconds,
            "data_wait": waited / seconds,
        }
        if self._peak is not None:
            record["mfu"] = figures.flops / seconds / self._peak
        if not figures.taken:
            record["skipped"] = True
        if figures.spike is not None:
            record["grad_norm_spike"] = figures.spike
        return record


def bar_fields(record: dict) -> dict[str, str]:
    """The fields of a step's record that the progress bar shows, as text."""
    loss = record["loss"]
    fields = {
        "epoch": str(record["epoch"] + 1),
        "loss": "not finite" if loss is None else f"{loss:.3f}",
        "lr": f"{record['lr']:.1e}",
        "tok/s": f"{record['tokens_per_s']:,.0f}",
    }
    if "mfu" in record:
        fields["MFU"] = f"{record['mfu']:.1%}"
    return fields | {"wait": f"{record['data_wait']:.1%}"}


def finite(value: float) -> float | None:
    """The value, or None if it is not finite: JSON has no NaN or infinity."""
    return value if math.isfinite(value) else None
