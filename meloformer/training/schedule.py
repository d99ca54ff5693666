"""The learning-rate schedule."""

import math

from .config import TrainConfig

MIN_LR_RATIO = 0.1  # the cosine ends at this fraction of the peak learning rate
MAX_WARMUP_FRACTION = 0.1  # a short run warms up for at most this fraction of its steps


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine from the peak to MIN_LR_RATIO of it. `step` counts from 0."""
    warmup = max(1, min(config.warmup_steps, int(MAX_WARMUP_FRACTION * total)))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    factor = MIN_LR_RATIO + (1 - MIN_LR_RATIO) * 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * factor
