"""The learning-rate schedule, how many steps there are, and which of them have tasks."""

import math

from .config import TrainConfig

MIN_LR_RATIO = 0.1  # the cosine ends at this fraction of the peak learning rate
MAX_WARMUP_FRACTION = 0.1  # a short run warms up for at most this fraction of its steps


def is_due(every: int | None, step: int) -> bool:
    """Whether a task of so many steps, None for never, comes after this step."""
    return every is not None and step % every == 0


def count_steps(steps_per_epoch: int, config: TrainConfig) -> int:
    """The steps of a run, for the schedule and the progress bar.

    Epochs are packed anew each, so one may take a step more or less than the first; the run ends by the
    epochs themselves.
    """
    steps = steps_per_epoch * config.epochs
    return steps if config.max_steps is None else min(steps, config.max_steps)


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine from the peak to MIN_LR_RATIO of it. `step` counts from 0."""
    warmup = max(1, min(config.warmup_steps, int(MAX_WARMUP_FRACTION * total)))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    factor = MIN_LR_RATIO + (1 - MIN_LR_RATIO) * 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * factor


def extension(step: int, before: int, total: int, config: TrainConfig) -> tuple[str, dict]:
    """What happens to the learning rate when a run of `before` steps, of which it has taken `step`, is
    extended to `total`: in a line, and as a record for the log."""
    last, following = (learning_rate(*place, config) for place in ((step - 1, before), (step, total)))
    line = (
        f"the run is extended from {before} to {total} steps: the learning rate follows the schedule of "
        f"{total} steps from here on, so it is {following:.3g} in the next step, after {last:.3g} in the last"
    )
    return line, {"extended_from": before, "total_steps": total, "lr_before": last, "lr_after": following}
