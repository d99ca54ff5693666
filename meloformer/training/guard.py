"""What watches the numbers of a run: steps that must be skipped, and gradients that leap."""

import math
from collections import deque
from statistics import median

SPIKE_RATIO = 5.0  # a gradient norm this many times the median of the last ones is a spike
WINDOW = 128
MIN_WINDOW = 16  # fewer norms tell nothing


def is_finite_step(loss: float, norm: float) -> bool:
    """Whether a step with this loss and gradient norm changes the weights."""
    return math.isfinite(loss) and math.isfinite(norm)


class Guard:
    """Judges every step by its loss and gradient norm, which are the same in all processes.

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
        """How many times the median of the last norms this (finite) one is, if that is a spike."""
        usual = median(self._norms) if len(self._norms) >= MIN_WINDOW else math.inf
        self._norms.append(norm)
        return norm / usual if norm > SPIKE_RATIO * usual else None

    def state(self) -> dict:
        """JSON values from which `restore` makes an equal guard."""
        return {"skipped": self.skipped, "norms": list(self._norms)}

    def restore(self, state: dict) -> None:
        """Go on where another guard was. A row of skipped steps begins anew."""
        self.skipped = state["skipped"]
        self._norms = deque(state["norms"], maxlen=WINDOW)
