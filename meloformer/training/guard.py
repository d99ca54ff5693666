"""Detection of steps to be skipped (loss or gradient not finite) and of spikes of the gradient norm."""

import math
from collections import deque
from statistics import median

from ..checkpoint.run_state import GuardState

SPIKE_RATIO = 5.0  # a gradient norm this many times the median of the last ones is a spike
WINDOW = 128
MIN_WINDOW = 16  # with fewer norms no spike is reported


def is_finite_step(loss: float, norm: float) -> bool:
    """Whether loss and gradient norm are finite, so that the step may change the weights."""
    return math.isfinite(loss) and math.isfinite(norm)


def spike_advice(record: dict, limit: float) -> str:
    """What to make of a step's record with a `grad_norm_spike`, where norms are clipped at `limit`."""
    harmless = f"was clipped to {limit:g}" if record["grad_norm"] > limit else f"is not above {limit:g}"
    return (
        f"the gradient norm is {record['grad_norm_spike']:.1f} times the median of the last steps; it "
        f"{harmless}, so nothing need be done, unless it comes often and the loss rises: then lower "
        "--learning_rate"
    )


class Guard:
    """Decides by loss and gradient norm, which are equal on all ranks, whether a step is taken or skipped.

    Attributes:
        skipped: steps skipped in the whole run.
        in_a_row: steps skipped since the last one that was taken.
    """

    def __init__(self) -> None:
        self.skipped = self.in_a_row = 0
        self._norms: deque[float] = deque(maxlen=WINDOW)

    def admits(self, loss: float, norm: float) -> bool:
        """Whether the step may be taken; counts it if not."""
        if is_finite_step(loss, norm):
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        return False

    def spike(self, norm: float) -> float | None:
        """The ratio of this (finite) norm to the median of the last ones, if it is a spike."""
        usual = median(self._norms) if len(self._norms) >= MIN_WINDOW else math.inf
        self._norms.append(norm)
        return norm / usual if norm > SPIKE_RATIO * usual else None

    def state(self) -> GuardState:
        """The state for `restore`."""
        return GuardState(self.skipped, tuple(self._norms))

    def restore(self, state: GuardState) -> None:
        """Take the state of another guard. The count of consecutive skipped steps starts at 0."""
        self.skipped = state.skipped
        self._norms = deque(state.norms, maxlen=WINDOW)
