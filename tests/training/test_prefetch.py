import itertools
import threading
import time

import pytest
import torch

from meloformer.data.batches import PackedSongs, State
from meloformer.data.shards import ShardSet
from meloformer.errors import UserError
from meloformer.training.metrics import Meter
from meloformer.training.prefetch import Prefetcher, prefetch


@pytest.fixture
def packed(data) -> PackedSongs:
    return PackedSongs(ShardSet(data), "train", max_seq_len=512, max_bars=100)


@pytest.mark.parametrize("looks_ahead", [True, False])
def test_a_batch_is_prepared_when_it_is_looked_for(packed, looks_ahead):
    made = []
    fed = Prefetcher(
        packed.batches(State(), 1, stop_epoch=1), lambda b: made.append(b) or b, torch.device("cpu"), Meter()
    )
    expected = list(packed.batches(State(), 1, stop_epoch=1))
    for number, ((batch, after), (same, state)) in enumerate(zip(fed, expected, strict=True), 1):
        assert torch.equal(batch.ids, same.ids) and after == state
        assert len(made) == number
        for _ in range(2 * looks_ahead):  # the second one finds it done
            fed.look_ahead()
            assert len(made) == min(number + 1, len(expected))


def test_errors_of_the_loader_and_of_preparing_come_through(packed):
    def broken():
        yield from packed.batches(State(), 1, stop_epoch=1)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(Prefetcher(broken(), lambda batch: batch, torch.device("cpu"), Meter()))
    with pytest.raises(ZeroDivisionError):
        list(Prefetcher(broken(), lambda batch: 1 / 0, torch.device("cpu"), Meter()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_are_pinned_for_a_gpu(packed):
    device = torch.device("cuda", 0)
    for batch, _ in Prefetcher(packed.batches(State(), 2, stop_epoch=1), lambda b: b, device, Meter()):
        assert batch.ids.is_pinned() and batch.targets.is_pinned() and batch.structure.doc.is_pinned()
        assert batch.to(device, non_blocking=True).structure.summary_doc.device == device


def test_the_loader_ends_with_the_feed(packed):
    """Even if somebody still holds what asked for batches: others may take from the same source then."""
    source = packed.batches(State(), 1)
    meter, waiting = Meter(), []

    def kept(items):
        waiting.append(Meter.waiting(meter, items))
        return waiting[0]

    meter.waiting = kept
    fed = Prefetcher(source, lambda batch: batch, torch.device("cpu"), meter)
    next(fed)
    fed.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
    next(source)


def test_prefetch_yields_the_same():
    assert list(prefetch(iter(range(100)), depth=3)) == list(range(100))
    assert list(prefetch([None, None])) == [None, None]


def test_prefetch_hands_on_exceptions():
    def items():
        yield 1
        raise UserError("no more")

    stream = prefetch(items())
    assert next(stream) == 1
    with pytest.raises(UserError, match="no more"):
        next(stream)


def test_prefetch_stays_ahead_by_its_depth_and_ends_when_closed():
    made = []

    def items():
        for i in itertools.count():
            made.append(i)
            yield i

    stream = prefetch(items(), depth=2)
    assert next(stream) == 0
    deadline = time.monotonic() + 60  # reached only if the thread makes too few
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)  # time in which a thread that knew no limit would make more
    assert len(made) == 4  # one given, two in the queue, one waiting for room
    stream.close()
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
