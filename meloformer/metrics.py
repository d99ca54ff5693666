"""The records of a run, built in one place: what the log, the progress bar and the boards show."""

import math
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class StepFigures:
    """What an optimizer step found, over all processes.

    loss: mean in nats per target. grad_norm: before clipping. tokens: without padding.
    taken: False if the step was skipped because loss or gradient are not finite.
    spike: the gradient norm as a multiple of the usual one, if it is a spike.
    """

    loss: float
    grad_norm: float
    tokens: int
    taken: bool
    spike: float | None


class Meter:
    """Times steps. Time spent on validating, sampling and saving is not counted."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def restart(self) -> None:
        """Count from now on."""
        self._since = time.perf_counter()

    def step_record(self, step: int, epoch: int, lr: float, figures: StepFigures) -> dict:
        """The record of a step that ends now: JSON values; a number that is not finite is None."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        record = {
            "step": step,
            "epoch": epoch,
            "lr": lr,
            "loss": finite(figures.loss),
            "grad_norm": finite(figures.grad_norm),
            "tokens": figures.tokens,
            "tokens_per_s": figures.tokens / seconds,
        }
        if not figures.taken:
            record["skipped"] = True
        if figures.spike is not None:
            record["grad_norm_spike"] = figures.spike
        return record


def bar_fields(record: dict) -> dict[str, str]:
    """What the progress bar shows of a step's record besides steps and remaining time."""
    loss = record["loss"]
    return {
        "epoch": str(record["epoch"] + 1),
        "loss": "not finite" if loss is None else f"{loss:.3f}",
        "lr": f"{record['lr']:.1e}",
        "tok/s": f"{record['tokens_per_s']:,.0f}",
    }


def finite(value: float) -> float | None:
    """The value, or None, which JSON can hold, if it is not a finite number."""
    return value if math.isfinite(value) else None
