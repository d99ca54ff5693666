"""Batches and their order."""

import itertools
import re

import numpy as np
import pytest
import torch

from meloformer.data import batches as data
from meloformer.data.batches import State
from meloformer.data.pairs import count_documents
from meloformer.data.shards import ShardSet
from meloformer.errors import UserError
from meloformer.kernels.structure import summary_room
from meloformer.tokens import attributes, vocab
from meloformer.tokens.vocab import IGNORE_INDEX

from helpers.attention_cases import count_pairs
from helpers.folders import write_folder
from helpers.packed_songs import MAX_BARS, bars_of, packed

# --- batches --------------------------------------------------------------------------------------


def documents(batch, b: int) -> list[np.ndarray]:
    doc, ids = batch.structure.doc[b].numpy(), batch.ids[b].numpy()
    return [ids[doc == d] for d in range(doc.max() + 1)]


def test_an_epoch_holds_every_sample_once(shards):
    songs = packed(shards)
    expected = sorted(songs.samples.read(shards, i).tolist() for i in range(len(songs.samples)))
    for epoch in (0, 1):
        rows = songs.rows_per_epoch(epoch)
        batch = songs.batch(epoch, range(rows))
        found = [document.tolist() for b in range(rows) for document in documents(batch, b)]
        assert sorted(found) == expected
        assert batch.tokens == sum(map(len, expected))


def test_a_batch_says_what_its_rows_hold(shards):
    songs = packed(shards)
    rows = songs.rows_per_epoch(0)
    batch = songs.batch(0, range(rows))
    assert batch.ids.shape == batch.targets.shape == (rows, 1024)
    assert batch.ids.dtype == batch.targets.dtype == torch.int64
    several = 0
    for b in range(rows):
        at = bars = 0
        pieces = documents(batch, b)
        several += len(pieces) > 1
        for number, ids in enumerate(pieces):
            span = slice(at, at + len(ids))
            assert (batch.structure.doc[b, span] == number).all()
            assert batch.targets[b, span].tolist() == [*ids[1:].tolist(), IGNORE_INDEX]
            alone = attributes.scan(ids)
            for name in ("bar", "inst", "kind", "onset"):
                np.testing.assert_array_equal(getattr(batch.structure, name)[b, span], getattr(alone, name))
            at += len(ids)
            bars += bars_of(ids)
        assert bars <= MAX_BARS
        assert (batch.structure.summary_doc[b] >= 0).sum() == bars
        assert (batch.structure.doc[b, at:] == -1).all()
        assert (batch.ids[b, at:] == vocab.PAD).all()
        assert (batch.targets[b, at:] == IGNORE_INDEX).all()
    assert several > 0
    assert batch.num_targets == (batch.targets != IGNORE_INDEX).sum()


def test_pairs_are_counted_in_every_epoch_but_found_once(shards, monkeypatch):
    songs = packed(shards)
    found = []

    def count(*args):
        each = count_documents(*args)
        found.extend(each)
        return each

    monkeypatch.setattr(data, "count_documents", count)
    for epoch in (0, 1):
        for row in range(songs.rows_per_epoch(epoch)):
            batch = songs.batch(epoch, [row])
            assert batch.counts == count_pairs(batch.structure)
        assert len(found) == len(songs.samples)


@pytest.mark.parametrize("kind_rule", ["alike", "next"])
def test_a_batch_has_the_kind_rule_asked_for(shards, kind_rule):
    batch = packed(shards, kind_rule=kind_rule).batch(0, range(2))
    assert batch.structure.kind_rule == kind_rule
    assert batch.counts == count_pairs(batch.structure) != packed(shards).batch(0, range(2)).counts


def test_rows_past_the_end_are_padding(shards):
    songs = packed(shards)
    rows = songs.rows_per_epoch(0)
    batch = songs.batch(0, [rows, rows + 7])
    assert (batch.tokens, batch.num_targets) == (0, 0)
    assert (batch.structure.doc == -1).all()
    assert (batch.structure.summary_doc == -1).all()
    assert (batch.ids == vocab.PAD).all()
    assert (batch.targets == IGNORE_INDEX).all()


def test_summaries_come_in_few_sizes(tmp_path):
    """M is at least 128, holds the fullest row, and exceeds it by less than a quarter."""
    bar = [vocab.CHORD.start, vocab.TS.start, vocab.BPM.start]
    counts = (1, 128, 129, 300)
    songs = [np.array([vocab.BOS, *bar * bars, vocab.EOS], np.uint16) for bars in counts]
    shards = ShardSet(write_folder(tmp_path / "data", songs, (len(songs),), val_split=0.0))
    packed_songs = packed(shards, max_seq_len=1000, max_bars=300)
    sizes = {}
    for number, row in enumerate(packed_songs.rows(0)):
        batch = packed_songs.batch(0, [number])
        sizes[int(packed_songs.samples.bars[row].sum())] = batch.structure.summary_doc.shape[1]
    assert set(sizes.values()) <= {128, 160, 192, 224, 256, 320}
    assert all(0.8 * size < bars <= size or size == 128 for bars, size in sizes.items())
    assert sum(sizes) == sum(counts)


@pytest.mark.parametrize("fixed_num_summaries", [False, True])
def test_room_is_that_of_the_fullest_row_of_a_batch_or_an_epoch(tmp_path, fixed_num_summaries):
    bar = [vocab.CHORD.start, vocab.TS.start, vocab.BPM.start]
    songs = [np.array([vocab.BOS, *bar * bars, vocab.EOS], np.uint16) for bars in (140, 200, 330)]
    shards = ShardSet(write_folder(tmp_path / "data", songs, (len(songs),), val_split=0.0))
    packed_songs = packed(shards, max_seq_len=1000, max_bars=400, fixed_num_summaries=fixed_num_summaries)
    rows = packed_songs.rows_per_epoch(0)
    rooms = {packed_songs.batch(0, [row]).structure.summary_doc.shape[1] for row in range(rows)}
    assert rooms == ({summary_room(330)} if fixed_num_summaries else set(map(summary_room, (140, 200, 330))))


# --- order ----------------------------------------------------------------------------------------


def fingerprint(batch) -> list[tuple]:
    return [tuple(row.tolist()) for row in batch.ids if row.any()]


def test_order_follows_from_seed_and_epoch(shards):
    def order(seed, epoch):
        return [row.tolist() for row in packed(shards, seed=seed).rows(epoch)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    songs = packed(shards)
    before = order(0, 3)
    songs.rows(5)
    assert [row.tolist() for row in songs.rows(3)] == before


@pytest.mark.parametrize("world", [2, 3, 4])
def test_order_is_free_of_the_number_of_processes(shards, world):
    """`world` processes with one row each see what one process with `world` rows sees."""
    songs = packed(shards)
    alone = list(songs.batches(State(), world, stop_epoch=2))
    ranks = [list(songs.batches(State(), 1, rank=r, world=world, stop_epoch=2)) for r in range(world)]
    assert len({len(steps) for steps in ranks} | {len(alone)}) == 1
    for step, (batch, state) in enumerate(alone):
        assert {steps[step][1] for steps in ranks} == {state}
        together = [row for steps in ranks for row in steps[step][0].ids.tolist()]
        assert sorted(batch.ids.tolist()) == sorted(together)
        assert batch.tokens == sum(steps[step][0].tokens for steps in ranks)


def test_processes_have_about_as_much_to_do(tmp_path):
    """Of rows of one song each, of very different lengths, and of padding."""
    generator = np.random.default_rng(0)
    bar = [vocab.CHORD.start, vocab.TS.start, vocab.BPM.start]
    songs = [np.array([vocab.BOS, *bar * n, vocab.EOS], np.uint16) for n in generator.integers(200, 330, 61)]
    shards = ShardSet(write_folder(tmp_path / "data", songs, (len(songs),), val_split=0.0))
    packed_songs = packed(shards, max_seq_len=1000, max_bars=1000)
    assert packed_songs.rows_per_epoch(0) == 61
    ranks = [list(packed_songs.batches(State(), 4, rank=r, world=4, stop_epoch=1)) for r in range(4)]
    for step in zip(*ranks):
        pairs = [batch.counts.causal_pairs for batch, _ in step]
        assert max(pairs) < 1.1 * np.mean(pairs)
    (rows_of_last,) = {len(fingerprint(batch)) for batch, _ in step[:-1]}
    assert rows_of_last == 3 and len(fingerprint(step[-1][0])) in (3, 4)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_resuming_equals_going_on(shards, batch_size):
    songs = packed(shards)
    steps = list(songs.batches(State(), batch_size, stop_epoch=3))
    assert steps[-1][1] == State(3, 0)
    states = [State(), *(state for _, state in steps)]
    for at, state in enumerate(states):
        rest = packed(shards).batches(state, batch_size, stop_epoch=3)
        for (expected, _), (batch, _) in itertools.zip_longest(steps[at : at + 2], itertools.islice(rest, 2)):
            assert torch.equal(batch.ids, expected.ids)


def test_resuming_with_another_batch_size_loses_no_row(shards):
    songs = packed(shards)
    _, state = next(songs.batches(State(), 5))
    seen = fingerprint(songs.batch(0, range(5)))
    for batch, _ in songs.batches(state, 2, stop_epoch=1):
        seen += fingerprint(batch)
    assert seen == fingerprint(songs.batch(0, range(songs.rows_per_epoch(0))))


def test_without_a_stop_epochs_go_on(shards):
    songs = packed(shards)
    count = songs.rows_per_epoch(0) + songs.rows_per_epoch(1) + 1
    states = [state for _, state in itertools.islice(songs.batches(State(), 1), count)]
    assert states[-1] == State(2, 1)


def test_nothing_to_train_on_is_told(shards):
    songs = packed(shards, max_bars=1)
    assert songs.rows_per_epoch(0) == 0
    total = len(shards.split("train"))
    says = rf"all songs are left out of the training split: {total} of {total} songs have more than 1 bars"
    with pytest.raises(UserError, match=says):
        next(songs.batches(State(), 1))


@pytest.mark.parametrize("split", ["train", "val"])
def test_songs_that_are_left_out_are_counted_with_a_limit_that_keeps_them(shards, split):
    assert packed(shards, split, max_bars=1000).left_out() is None
    line = packed(shards, split, max_bars=8).left_out()
    bars = shards.bars[shards.split(split)]
    assert f"{sum(bars > 8)} of {len(bars)} songs have more than 8 bars" in line
    assert "count a bar per beat" in line
    enough = int(re.search(r"--max_bars (\d+) keeps 95%", line)[1])
    assert np.mean(bars <= enough) >= 0.95 > np.mean(bars < enough)


def test_a_song_in_twenty_is_left_out_without_advice(songs, tmp_path):
    shards = ShardSet(write_folder(tmp_path / "data", songs, (24,), val_split=0))
    most = np.sort(shards.bars)[-2]
    assert packed(shards, max_bars=int(most)).left_out().endswith(f"1 of 24 songs have more than {most} bars")


def test_rows_too_short_for_bars_are_told(shards):
    songs = packed(shards, max_seq_len=4, max_bars=1000)
    assert songs.left_out().endswith(f"{songs.samples.skipped_bars} bars are longer than a row of 4 tokens")


def test_an_empty_validation_split_is_given_its_reason(songs, tmp_path):
    none = ShardSet(write_folder(tmp_path / "none", songs[:3], (3,), val_split=0))
    assert packed(none, "val").why_empty() == "no song fell into the validation split"
    some = ShardSet(write_folder(tmp_path / "some", songs, (24,)))
    assert "have more than 1 bars" in packed(some, "val", max_bars=1).why_empty()
    some.leave_out(some.split("val"))
    assert packed(some, "val").why_empty() == "no song that is not damaged fell into the validation split"
