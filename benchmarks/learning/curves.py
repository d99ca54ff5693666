"""Arithmetic on curves: a loss by tokens or by seconds, straight between the points where it is known.

A curve is a pair of sequences, x rising and y, of equal length. Lines are read as they are drawn.
"""

from collections.abc import Sequence

import numpy as np

Curve = tuple[Sequence[float], Sequence[float]]


def lowest_until(curve: Curve, end: float) -> float:
    """The lowest value up to and at `end`, which must not lie before the first point."""
    x, y = map(np.asarray, curve)
    return float(min(y[x <= end].min(), np.interp(end, x, y)))


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


def shared_stretch(curves: Sequence[Curve]) -> tuple[float, float]:
    """The first and the last x that lie on all curves; the first is beyond the last if there are none."""
    return max(float(x[0]) for x, _ in curves), min(float(x[-1]) for x, _ in curves)


def stretches(one: Sequence[Curve], other: Sequence[Curve]) -> list[tuple[int, float, float]]:
    """Where the mean of the curves `one` is below that of `other`, and where it is not.

    They are compared at every point of any of them that lies on all.

    Returns:
        (which, first x, last x) of each stretch from left to right; which is 0 if `one` is below, 1 if
        `other` is. Points of equal means belong to the stretch before.
    """
    first, last = shared_stretch([*one, *other])
    points = np.unique(np.concatenate([x for x, _ in [*one, *other]]))
    points = points[(points >= first) & (points <= last)]
    means = [np.mean([np.interp(points, *curve) for curve in curves], axis=0) for curves in (one, other)]
    found: list[tuple[int, float, float]] = []
    for point, difference in zip(points.tolist(), means[1] - means[0]):
        which = found[-1][0] if found and difference == 0 else int(difference < 0)
        if found and found[-1][0] == which:
            found[-1] = (which, found[-1][1], point)
        else:
            found.append((which, point, point))
    return found
