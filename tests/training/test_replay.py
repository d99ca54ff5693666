"""When kernels are recorded and replayed: with a graph that is not one. tests/training/test_gpu_training.py
has the real ones."""

import pytest
import torch

from meloformer.training import replay
from meloformer.training.replay import Replayed

from helpers.random_batches import varied


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were recorded, of `double` below."""
    made = []

    class FakeGraph:
        def capture_begin(self, pool, capture_error_mode):
            self.pool, self.mode, self.replays = pool, capture_error_mode, 0
            made.append(self)

        def capture_end(self):
            self.ids, self.out = double.last

        def replay(self):
            self.replays += 1
            self.out.copy_(2 * self.ids)

    handles = iter(range(100))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    return made


def double(ids, structure):
    double.calls += 1
    if double.fails and double.calls > 1:
        raise torch.OutOfMemoryError("no memory\nfor it")
    double.last = ids, 2 * ids
    return double.last[1], None


@pytest.fixture(autouse=True)
def never_called():
    double.calls, double.fails = 0, False


def test_the_second_call_of_a_kind_is_recorded_and_results_stay(graphs):
    batches, replayed = varied(4), Replayed()
    shape = batches[0].structure.summary_doc.shape
    alike = [batch for batch in batches if batch.structure.summary_doc.shape == shape]
    assert 1 < len(alike) < len(batches)
    ids = [torch.full_like(alike[0].ids, i) for i in range(5)]
    found = [replayed(double, each, alike[i % 2].structure, True) for i, each in enumerate(ids)]
    assert double.calls == 2 and [graph.replays for graph in graphs] == [4]
    assert all(torch.equal(got, 2 * each) and nothing is None for (got, nothing), each in zip(found, ids))
    assert graphs[0].mode == "thread_local"

    other = next(batch for batch in batches if batch.structure.summary_doc.shape != shape)
    for structure, kind in ((other.structure, True), (alike[0].structure, False)):
        for _ in range(2):
            replayed(double, ids[1], structure, kind)
    assert len(graphs) == 3 and len({graph.pool for graph in graphs}) == 1


def test_what_memory_does_not_suffice_for_runs_as_it_is(graphs):
    batches, replayed, ids = varied(2), Replayed(), varied(2)[0].ids
    first, second = (batch.structure for batch in batches)
    assert first.summary_doc.shape != second.summary_doc.shape
    replayed(double, ids, first, None)
    double.fails, double.last = True, (ids, ids)
    with pytest.warns(UserWarning, match="recording them failed: no memory$"), pytest.raises(RuntimeError):
        replayed(double, ids, first, None)  # as it is, it does not fit either
    double.fails = False
    for _ in range(3):
        got, _ = replayed(double, ids, first, None)
        assert torch.equal(got, 2 * ids)
    assert len(graphs) == 1 and graphs[0].replays == 0
    for _ in range(2):
        replayed(double, ids, second, None)
    assert len(graphs) == 2 and graphs[0].pool != graphs[1].pool and graphs[1].replays == 1


def test_few_kinds_are_recorded(graphs, monkeypatch):
    monkeypatch.setattr(replay, "_MOST", 2)
    replayed, batch = Replayed(), varied(2)[0]
    for kind in range(4):
        for _ in range(3):
            replayed(double, batch.ids, batch.structure, kind)
    assert len(graphs) == 2 and double.calls == 2 * 2 + 2 * 3


def test_nothing_is_recorded_under_deterministic_algorithms(graphs):
    replayed, batch = Replayed(), varied(2)[0]
    torch.use_deterministic_algorithms(True)
    try:
        found = [replayed(double, batch.ids, batch.structure, None) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert not graphs and double.calls == 3
    assert all(torch.equal(got, 2 * batch.ids) for got, _ in found)
