from types import SimpleNamespace

import pytest
import torch

from benchmarks.common import timing
from benchmarks.common.timing import Timer


class Clock:
    """Time passes only where a test lets it."""

    def __init__(self):
        self.ms = 0.0

    def sleep(self, ms: float) -> None:
        self.ms += ms

    def perf_counter(self) -> float:
        return self.ms / 1e3


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


class TestTimer:
    def test_only_run_is_timed(self, clock):
        found = Timer("cpu").after(lambda: clock.sleep(20.0), lambda _: clock.sleep(0.5))
        assert [found[key] for key in ("ms", "p20", "p80", "host_ms", "wall_ms")] == pytest.approx([0.5] * 5)
        assert found["repeats"] == timing.REPEATS

    def test_what_is_prepared_is_run_once(self):
        prepared, ran = [], []
        Timer("cpu").after(lambda: prepared.append(0) or len(prepared), ran.append)
        assert ran == list(range(1, len(prepared) + 1))

    def test_long_calls_are_repeated_less(self, clock, monkeypatch):
        monkeypatch.setattr(timing, "BUDGET_MS", 60.0)
        calls = []
        found = Timer("cpu")(lambda: calls.append(clock.sleep(20.0)))
        assert found["repeats"] == 3 and len(calls) == 3 + 1  # one of them to see how long it takes
        assert found["ms"] == pytest.approx(20)

    def test_on_a_gpu_the_flush_stands_before_the_events(self, monkeypatch):
        log = []
        event = SimpleNamespace(record=lambda: log.append("event"), elapsed_time=lambda end: 2.0)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        timer = Timer("cpu")
        timer._cuda, timer._flush_ms = True, 1.0
        timer._flush = SimpleNamespace(zero_=lambda: log.append("flush"))
        found = timer.after(lambda: log.append("prepare"), lambda _: log.append("run"))
        assert found["ms"] == 2.0
        assert log[-5:] == ["prepare", "flush", "event", "run", "event"]
        timer._flush_ms = 1e-9  # a host that is far behind
        timer(lambda: log.append("run"))
        assert log[-4:] == ["flush", "event", "run", "event"] and log[-67:].count("flush") == 64

    def test_memory_counts_each_storage_once(self, monkeypatch):
        timer = Timer("cpu")
        assert timer.extra_mb(list) is None
        timer._cuda = True
        found = {"memory_allocated": 1_000_000, "max_memory_allocated": 9_000_000}
        for name in ("synchronize", "reset_peak_memory_stats", *found):
            monkeypatch.setattr(torch.cuda, name, lambda name=name: found.get(name))
        x = torch.empty(500_000)
        assert timer.extra_mb(lambda: [x, x[1:]]) == 6.0
