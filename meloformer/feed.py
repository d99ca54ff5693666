"""Batches on their way to the device, ahead of time, so that it never waits for one.

The loader's thread puts a batch into memory that a GPU copies from by itself. While the GPU computes on a
batch, the next one's copies and the plan of its attention stand in its queue already, so that nobody has to
wait for what the plan turned out to need.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import TypeVar

import torch

from .data import Batch, State, prefetch
from .metrics import Meter

_Ready = TypeVar("_Ready")


def feed(
    batches: Iterable[tuple[Batch, State]],
    prepare: Callable[[Batch], _Ready],
    device: torch.device,
    meter: Meter,
) -> Iterator[tuple[_Ready, State]]:
    """What `prepare` makes of each batch, called when the one before it is handed out, and its state.

    The meter counts the time in which the loader is waited for.
    """
    last: tuple[_Ready, State] | None = None
    with closing(prefetch(_staged(batches, device))) as loaded:  # the thread ends with the feed, not later
        for batch, after in meter.waiting(loaded):
            ready = prepare(batch), after
            if last is not None:
                yield last
            last = ready
    if last is not None:
        yield last


def _staged(batches: Iterable[tuple[Batch, State]], device: torch.device) -> Iterator[tuple[Batch, State]]:
    for batch, after in batches:
        if device.type == "cuda":
            with torch.cuda.device(device):  # a thread begins on GPU 0, and pinning would take memory there
                batch = batch.pin_memory()
        yield batch, after
