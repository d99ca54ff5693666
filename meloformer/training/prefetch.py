"""Batches on their way to the device, ahead of time, so that it never waits for one.

A loader thread builds batches in pinned memory. While the GPU computes on a batch, the next one is copied and
its attention planned, so that reading the size of the plan back does not stall the step.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import torch

from ..data.batches import Batch, State
from .metrics import Meter

_Item = TypeVar("_Item")
_Prepared = TypeVar("_Prepared")


def prefetch(items: Iterable[_Item], depth: int = 2) -> Iterator[_Item]:
    """The same items, produced up to `depth` ahead by a thread, whose exceptions are raised here.

    Closing the generator ends the thread.
    """
    ready: queue.Queue = queue.Queue(depth)
    closed = threading.Event()
    end = object()

    def put(entry) -> bool:
        while not closed.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((end, None))
        except BaseException as error:
            put((end, error))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        closed.set()
        thread.join()


class Prefetcher(Generic[_Prepared]):
    """An iterator over (prepared batch, data position after it).

    Call `look_ahead` when the work on a batch is queued on the device and before the host waits for it: the
    next batch is then prepared meanwhile. Otherwise a batch is prepared when it is asked for.

    Close it when done, which ends the loader thread.

    Args:
        batches: of the loader, each with the data position after it.
        prepare: moves a batch to the device.
        device: where batches go; for CUDA they are pinned.
        meter: measures the time spent waiting for the loader.
    """

    def __init__(
        self,
        batches: Iterable[tuple[Batch, State]],
        prepare: Callable[[Batch], _Prepared],
        device: torch.device,
        meter: Meter,
    ):
        self._prepare = prepare
        self._loaded = prefetch(_staged(batches, device))
        self._timed = meter.waiting(self._loaded)
        self._ahead: tuple[_Prepared, State] | None = None

    def __iter__(self) -> "Prefetcher[_Prepared]":
        return self

    def __next__(self) -> tuple[_Prepared, State]:
        self.look_ahead()
        if self._ahead is None:
            raise StopIteration
        ready, self._ahead = self._ahead, None
        return ready

    def look_ahead(self) -> None:
        """Prepare the batch that comes next, if there is one and it is not prepared yet."""
        if self._ahead is None:
            for batch, after in self._timed:
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
