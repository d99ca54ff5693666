"""Time and memory of calls, on a GPU with a cold L2 cache or on a CPU."""

import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

REPEATS = 30
FEWEST_REPEATS = 2
BUDGET_MS = 1000.0  # for the repetitions of one measurement; long calls are repeated less often
FLUSH_BYTES = 2**30  # more than any L2 cache
_PROBES = 5
_MOST_FLUSHES = 64

_Prepared = TypeVar("_Prepared")


class Timer:
    """Times calls on one device. On a GPU it occupies `FLUSH_BYTES` of memory."""

    def __init__(self, device: torch.device | str):
        self._cuda = torch.device(device).type == "cuda"
        self._flush_ms = 0.0
        if self._cuda:
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
            self._flush_ms = max(self._probe(self._flush.zero_)[1], 0.01)

    def __call__(self, run: Callable[[], object]) -> dict[str, float]:
        """`after` with nothing to prepare."""
        return self.after(lambda: None, lambda _: run())

    def after(self, prepare: Callable[[], _Prepared], run: Callable[[_Prepared], object]) -> dict[str, float]:
        """Times `run(prepare())`, `prepare` excluded.

        Returns:
            ms, p20, p80: median and percentiles over `repeats` calls. On a GPU between two events, with
            the L2 cache overwritten before each call and the host ahead of the GPU, so that launch
            overhead is included only where `run` itself synchronizes.
            host_ms: median time until `run` returns, starting with an idle device.
            wall_ms: median time until `run` has returned and the device is done.
            repeats: number of calls behind ms; fewer for long calls, see `BUDGET_MS`.
        """
        host, wall = self._probe(run, prepare)
        repeats = min(REPEATS, max(FEWEST_REPEATS, int(BUDGET_MS / max(wall, 1e-3))))
        ms = self._gpu(prepare, run, repeats, host) if self._cuda else self._cpu(prepare, run, repeats)
        p20, median, p80 = (float(np.percentile(ms, p)) for p in (20, 50, 80))
        return {"ms": median, "p20": p20, "p80": p80, "host_ms": host, "wall_ms": wall, "repeats": repeats}

    def _probe(self, run, prepare=None) -> tuple[float, float]:
        """Median milliseconds until `run` returns, and until the device is done."""
        host, wall = [], []
        while len(wall) < _PROBES and sum(wall) < BUDGET_MS / 10:
            prepared = (prepare(),) if prepare else ()
            self.synchronize()
            begun = time.perf_counter()
            run(*prepared)
            host.append((time.perf_counter() - begun) * 1e3)
            self.synchronize()
            wall.append((time.perf_counter() - begun) * 1e3)
        return float(np.median(host)), float(np.median(wall))

    def _gpu(self, prepare, run, repeats: int, host_ms: float) -> list[float]:
        flushes = min(1 + int(1.5 * host_ms / self._flush_ms), _MOST_FLUSHES)
        events = []
        for _ in range(repeats):
            prepared = prepare()
            for _ in range(flushes):
                self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(prepared)
            end.record()
            events.append((start, end))
            del prepared  # else two of them are alive at once
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    @staticmethod
    def _cpu(prepare, run, repeats: int) -> list[float]:
        ms = []
        for _ in range(repeats):
            prepared = prepare()
            begun = time.perf_counter()
            run(prepared)
            ms.append((time.perf_counter() - begun) * 1e3)
        return ms

    def synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object]) -> float:
        """Wall time of one call."""
        self.synchronize()
        begun = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - begun

    def extra_mb(self, run: Callable[[], list[torch.Tensor]]) -> float | None:
        """Peak GPU memory during `run` in MB, beyond what was allocated before and what it returns."""
        if not self._cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in run()}
        own = sum(storages.values())  # gradients may share a storage
        return (torch.cuda.max_memory_allocated() - before - own) / 1e6
