"""Batches on their way to the device, ahead of time, so that it never waits for one.

The loader's thread puts a batch into memory that a GPU copies from by itself. While the GPU computes on a
batch, it copies the next one and plans its attention, so that nobody has to wait for what the plan turned out
to need.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import torch

from ..data.batches import Batch, State, prefetch
from .metrics import Meter

_Ready = TypeVar("_Ready")


class Feed(Generic[_Ready]):
    """An iterator over what `prepare` makes of each batch, and the state after it.

    Call `look_ahead` when the device has got its work on a batch, before the host waits for that: then the
    next batch is prepared meanwhile. Without it a batch is prepared when it is asked for.

    Close it in the end, which ends the loader's thread.

    Args:
        meter: which counts the time in which the loader is waited for.
    """

    def __init__(
        self,
        batches: Iterable[tuple[Batch, State]],
        prepare: Callable[[Batch], _Ready],
        device: torch.device,
        meter: Meter,
    ):
        self._prepare = prepare
        self._loaded = prefetch(_staged(batches, device))
        self._waited_for = meter.waiting(self._loaded)
        self._ahead: tuple[_Ready, State] | None = None

    def __iter__(self) -> "Feed[_Ready]":
        return self

    def __next__(self) -> tuple[_Ready, State]:
        self.look_ahead()
        if self._ahead is None:
            raise StopIteration
        ready, self._ahead = self._ahead, None
        return ready

    def look_ahead(self) -> None:
        """Prepare the batch that comes next, if there is one and it is not prepared yet."""
        if self._ahead is None:
            for batch, after in self._waited_for:
                self._ahead = self._prepare(batch), after
                return

    def close(self) -> None:
        self._loaded.close()


def _staged(batches: Iterable[tuple[Batch, State]], device: torch.device) -> Iterator[tuple[Batch, State]]:
    for batch, after in batches:
        if device.type == "cuda":
            with torch.cuda.device(device):  # a thread begins on GPU 0, and pinning would take memory there
                batch = batch.pin_memory()
        yield batch, after
