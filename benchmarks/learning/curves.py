"""Values read off a curve of losses: of a list of points, linear between them, as the chart draws it."""

from collections.abc import Sequence

import numpy as np

Curve = tuple[Sequence[float], Sequence[float]]  # x, ascending, and y, of equal length


def lowest_until(curve: Curve, end: float) -> float | None:
    """The lowest y at any x up to and at `end`; None if `end` lies before the first point."""
    x, y = map(np.asarray, curve)
    return None if end < x[0] else float(min(y[x <= end].min(), np.interp(end, x, y)))


def first_reached(curve: Curve, target: float) -> float | None:
    """The x at which the curve first is at or below `target`; None if it never is."""
    x, y = map(np.asarray, curve)
    below = np.flatnonzero(y <= target)
    if not len(below):
        return None
    i = below[0]
    if i == 0:
        return float(x[0])
    return float(x[i - 1] + (x[i] - x[i - 1]) * (y[i - 1] - target) / (y[i - 1] - y[i]))
