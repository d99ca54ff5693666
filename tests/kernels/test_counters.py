"""Counters that are kept for a stream, with streams that are numbers; on a GPU see `test_overlap.py`."""

import pytest
import torch

pytest.importorskip("triton")

from meloformer.kernels import counters

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def streams(monkeypatch):
    """`now` is the current stream; None is one that is captured."""
    found = {"now": 1}
    monkeypatch.setattr(counters, "_kept", {})
    monkeypatch.setattr(counters, "_may_keep", lambda device: found["now"] is not None)
    monkeypatch.setattr(counters, "current_stream", lambda index: found["now"])
    return found


def test_what_is_kept_is_found_again_on_its_stream_alone(streams):
    assert counters.zeros(3, CPU) is not counters.zeros(3, CPU) and len(counters.zeros(3, CPU)) == 3
    counters.keep(CPU)
    mine = counters.zeros(3, CPU)
    counters.keep(CPU)
    assert counters.zeros(5, CPU) is mine and not mine.any() and mine.dtype == torch.int32
    streams["now"] = 2
    assert len(counters.zeros(3, CPU)) == 3
    counters.keep(CPU)
    assert counters.zeros(3, CPU).data_ptr() != mine.data_ptr()
    streams["now"] = 1
    assert counters.zeros(3, CPU) is mine


def test_a_captured_stream_has_its_own(streams):
    counters.keep(CPU)
    streams["now"] = None
    counters.keep(CPU)
    assert len(counters._kept) == 1
    assert len(counters.zeros(3, CPU)) == 3 and counters.zeros(3, CPU) is not counters.zeros(3, CPU)


def test_more_than_there_is_room_for(streams):
    counters.keep(CPU)
    many = len(counters.zeros(1, CPU)) + 1
    assert len(counters.zeros(many, CPU)) == many


def test_a_cpu_has_none(monkeypatch):
    monkeypatch.undo()
    counters.keep(CPU)
    assert counters.zeros(3, CPU).tolist() == [0, 0, 0] and CPU not in {
        device for device, _ in counters._kept
    }
