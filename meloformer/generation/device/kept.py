"""Slots that are kept from one call to the next: to allocate them and to record their graph takes longer than
many a song."""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from ...model.transformer import MeloFormer
from .step import Step

SPARE = 4  # times as many slots as there are songs: more make every step slower than new slots are worth


class Shape(NamedTuple):
    """What the tensors of slots are made for.

    slots: how many songs are written side by side.
    room, bars: how many tokens and bars of each the model sees.
    queue: how many tokens can be laid down that come next.
    song: how many tokens there are at most in songs in which repetition is held back.
    """

    slots: int
    room: int
    bars: int
    queue: int
    song: int

    def serves(self, other: "Shape") -> bool:
        large_enough = all(mine >= its for mine, its in zip(self, other))
        return large_enough and self.slots <= SPARE * other.slots


class SlotSet(NamedTuple):
    """Slots that songs can be begun in.

    run: calls `step` `BLOCK` times, or launches as many steps as graphs.
    shape: that was asked for; there may have been memory for fewer slots.
    weights: as `weights_of` the model was when they were made.
    """

    step: Step
    run: Callable[[], None]
    shape: Shape
    weights: tuple


def weights_of(model: MeloFormer) -> tuple:
    """Differs if the model has other weights, or others were written into them: graphs and tables know those
    that there were."""

    def version(weight: torch.Tensor) -> int:
        return (
            0 if weight.is_inference() else weight._version
        )  # which nobody may write into, and which has none

    return tuple((weight.data_ptr(), weight.dtype, version(weight)) for weight in model.parameters())


class Kept:
    """At most one set of slots, which nobody uses."""

    def __init__(self):
        self._set: deque[SlotSet] = deque(maxlen=1)  # whose methods are atomic

    def take(self, shape: Shape, weights: tuple) -> SlotSet | None:
        """The set, without songs, for the caller alone; if it does not serve, its memory is released."""
        try:
            found = self._set.pop()
        except IndexError:
            return None
        if found.weights == weights and found.shape.serves(shape):
            found.step.clear()
            return found
        del found
        _release()
        return None

    def keep(self, used: SlotSet) -> None:
        """Keep a set whose songs nobody needs any more, instead of another one."""
        self._set.append(used)

    def release(self) -> None:
        """Give its memory back."""
        if self._set:
            self._set.clear()
            _release()


def _release() -> None:
    """What is free must be seen to be: the number of slots depends on it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
