"""One row of `benchmarks.train`, on a tiny model."""

import pytest
import torch

from benchmarks.training import measure as train_run
from meloformer.data.batches import PackedSongs
from meloformer.data.shards import ShardSet
from meloformer.errors import UserError
from meloformer.model.transformer import SIZES
from meloformer.training.distributed import Job

from helpers.tiny_train import TINY


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SIZES, "small", TINY)


def measured(monkeypatch, error, most_rows=0):
    """What `attempt` tells of 6 rows per batch if batches of more than `most_rows` raise `error`."""

    def measure(config, *_):
        if config.batch_size > most_rows:
            raise error
        return {"loss": 1.0}

    monkeypatch.setattr(train_run, "measure", measure)
    config = train_run.TrainConfig(data_dir="", batch_size=6, device="cpu")
    return lambda world=1: train_run.attempt(config, None, Job(0, world, torch.device("cpu")), 1, 1)


def test_a_row_without_memory_is_tried_with_half_the_rows(monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory.")
    assert measured(monkeypatch, error, most_rows=3)() == {"rows_per_batch": 3, "loss": 1.0}
    assert measured(monkeypatch, error)() == {"rows_per_batch": 1, "failed": "out of memory"}
    with pytest.raises(UserError, match=r"out of memory on cpu.*lower --batch_size \(now 6\)"):
        measured(monkeypatch, error)(world=2)


def test_any_other_error_costs_its_row_alone_but_ends_a_job_of_several(monkeypatch):
    told = measured(monkeypatch, KeyError("a | b"))()
    assert told == {"rows_per_batch": 6, "failed": "KeyError: 'a | b'"}
    with pytest.raises(KeyError):
        measured(monkeypatch, KeyError("a | b"))(world=2)


def test_batches_are_full_and_dealt_out_as_in_training(data):
    packed = PackedSongs(ShardSet(data), "train", max_seq_len=512, max_bars=100)
    of_epoch = packed.rows_per_epoch(0)
    expected = [packed.batch(0, [row]).ids for row in range(of_epoch)]
    both = [train_run.full_batches(packed, 2, Job(rank, 2, torch.device("cpu"))) for rank in (0, 1)]
    for step in range(of_epoch):
        group = [(4 * step + i) % of_epoch for i in range(4)]
        for batches, rows in zip(both, packed.rows_by_rank(0, group, 2)):
            assert torch.equal(next(batches)[0].ids, torch.cat([expected[row] for row in rows]))


def test_warm_up_lasts_until_nothing_is_compiled(data, monkeypatch):
    """Something new in the second and the fourth step; what comes later is told as such."""
    new = iter([2, 1, 0, 3, 0, 0])
    fed = []

    class Counting:
        def __enter__(self):
            return lambda: {"graphs": next(new, 5), "kernels": 0}

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(train_run, "count_compilations", Counting)
    steps = train_run.Run.steps
    monkeypatch.setattr(train_run.Run, "steps", lambda run, number: fed.append(number) or steps(run, number))
    config = train_run.TrainConfig(
        data_dir="", model_size="small", attention="reference", max_seq_len=512, batch_size=1,
        gradient_accumulation_steps=1, device="cpu",
    )  # fmt: skip
    found = train_run.measure(config, ShardSet(data), Job(0, 1, torch.device("cpu")), 2, 3)
    assert fed == [1] * 6 + [3] and found["warmup_steps"] == 6
    assert found["compiled_in_warmup"]["graphs"] == 6 and found["compiled_later"]["graphs"] == 5
