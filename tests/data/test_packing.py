"""Samples of songs, and how rows are filled with them."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meloformer.data import packing
from meloformer.data.packing import pack
from meloformer.data.shards import ShardSet
from meloformer.tokens import attributes, grammar, vocab
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.folders import write_folder
from helpers.packed_songs import MAX_BARS, bars_of, packed

TOKENIZER = HIDTokenizer()


def body_start(ids: np.ndarray, bounds: list[int], bar: int) -> int:
    """Where the song's own tokens go on behind the header of a sample that begins at a bar."""
    return bounds[bar] + attributes.restated(ids, bounds[bar])[1] if bar else 0


@pytest.mark.parametrize("max_seq_len", [60, 150, 400, 1024, 3000, 100_000])
def test_samples_cover_the_songs(shards, max_seq_len):
    """Pieces are whole bars, as long as they can be, and leave out only bars that fit in no row."""
    chosen = np.arange(len(shards))
    samples = packing.find_samples(shards, chosen, max_seq_len=max_seq_len, max_bars=MAX_BARS)
    skipped_bars = 0
    for song in chosen:
        ids = shards[int(song)]
        mine = np.flatnonzero(samples.song == song)
        if bars_of(ids) > MAX_BARS:
            assert len(mine) == 0
            continue
        lines = attributes.cut_points(ids)
        bounds = [0, *lines[1:].tolist(), len(ids)]
        covered = np.zeros(len(lines), dtype=bool)
        at = 0
        for sample in mine:
            piece = samples.read(shards, sample)
            assert len(piece) == samples.length[sample] <= max_seq_len
            assert bars_of(piece) == samples.bars[sample]
            stop = int(samples.stop[sample])
            last = bounds.index(stop)  # raises if the piece does not end at a bar line
            first = next(
                bar for bar in range(at, last) if body_start(ids, bounds, bar) == samples.start[sample]
            )
            at = last
            covered[first:last] = True
            if last < len(lines):
                assert len(piece) + bounds[last + 1] - stop > max_seq_len, "could have been longer"
        for bar in np.flatnonzero(~covered):
            header = attributes.restated(ids, bounds[bar])[0] if bar else ()
            assert len(header) + bounds[bar + 1] - body_start(ids, bounds, bar) > max_seq_len
        skipped_bars += int((~covered).sum())
    assert samples.skipped_bars == skipped_bars
    assert samples.skipped_songs == sum(bars_of(shards[int(song)]) > MAX_BARS for song in chosen) > 0


def test_cut_samples_restate_what_is_in_force(shards):
    samples = packing.find_samples(shards, np.arange(len(shards)), max_seq_len=400, max_bars=MAX_BARS)
    cut = [sample for sample in range(len(samples)) if samples.start[sample] > 0]
    assert len(cut) > 20
    for sample in cut:
        piece = samples.read(shards, sample)
        band = attributes.band_tokens(shards[int(samples.song[sample])])
        np.testing.assert_array_equal(piece[: len(band)], band)
        chord, signature, *more = piece[len(band) : len(band) + 4]
        assert len(band) and chord in vocab.CHORD and signature in vocab.TS
        assert more[int(more[0] in vocab.CUT)] in vocab.BPM
        grammar.check(piece)
        assert (piece[-1] == vocab.EOS) == (samples.stop[sample] == shards.lengths[samples.song[sample]])


def test_pieces_decode_to_the_notes_of_the_song(shards):
    samples = packing.find_samples(shards, np.arange(len(shards)), max_seq_len=500, max_bars=MAX_BARS)
    song = int(np.bincount(samples.song).argmax())
    mine = np.flatnonzero(samples.song == song)
    assert len(mine) >= 3

    def notes(ids):
        return [
            (track.program, track.is_drum, note.pitch, note.start, note.velocity)
            for track in TOKENIZER.decode(ids).instruments
            for note in track.notes
        ]

    whole, shift, together = shards[song], 0, []
    for sample in mine:
        piece = samples.read(shards, sample)
        ticks_per_step = TOKENIZER.decode(piece).ticks_per_beat // vocab.STEPS_PER_QUARTER
        for program, is_drum, pitch, start, velocity in notes(piece):
            together.append((program, is_drum, pitch, start + shift * ticks_per_step, velocity))
        shift += int(attributes.scan_bars(piece).steps.sum())
    assert sorted(together) == sorted(notes(whole))


def test_max_samples_is_a_seeded_draw(shards):
    everything = packed(shards).samples

    def drawn(seed, count):
        samples = packed(shards, max_samples=count, seed=seed).samples
        return set(zip(samples.song.tolist(), samples.start.tolist()))

    assert drawn(0, 5) < drawn(0, 9) < set(zip(everything.song.tolist(), everything.start.tolist()))
    assert len(drawn(0, 5)) == 5
    assert drawn(0, 9) != drawn(1, 9)
    assert len(drawn(0, 10_000)) == len(everything)


def test_train_and_val_share_no_song(shards):
    train, val = packed(shards).samples, packed(shards, "val").samples
    assert len(train) and len(val)
    assert set(train.song).isdisjoint(val.song)


# --- packing --------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 9)), max_size=400),
    st.integers(50, 120),
    st.integers(9, 20),
)
@settings(deadline=None, max_examples=150)
def test_pack_keeps_the_limits(samples, max_tokens, max_bars):
    lengths, bars = np.array(samples, dtype=np.int64).reshape(-1, 2).T
    row = pack(lengths, bars, max_tokens, max_bars)
    assert len(row) == len(lengths)
    rows = int(row.max(initial=-1)) + 1
    tokens = np.bincount(row, lengths, rows)
    assert (np.bincount(row, minlength=rows) > 0).all()
    assert (tokens <= max_tokens).all()
    assert (np.bincount(row, bars, rows) <= max_bars).all()
    if rows <= 256:  # nothing was closed: the first sample of a row fitted in none before it
        for later in range(1, rows):
            opener = int(np.flatnonzero(row == later)[0])
            before = row[:opener]
            left_tokens = max_tokens - np.bincount(before, lengths[:opener], later)
            left_bars = max_bars - np.bincount(before, bars[:opener], later)
            assert not ((left_tokens >= lengths[opener]) & (left_bars >= bars[opener])).any()


def test_pack_takes_the_best_fit():
    lengths = np.array([60, 70, 35, 25])
    assert pack(lengths, np.ones(4, np.int64), 100, 100).tolist() == [0, 1, 0, 1]


def test_pack_is_tight_and_fast():
    generator = np.random.default_rng(0)
    lengths = generator.integers(500, 8000, 30_000)
    start = time.process_time()
    row = pack(lengths, lengths // 180, 8192, 400)
    assert time.process_time() - start < 6
    assert lengths.sum() / ((row.max() + 1) * 8192) > 0.93


def test_rows_are_fuller_than_in_random_order_and_mixed_anew_in_every_epoch(tmp_path):
    """Of songs of a quarter to three quarters of a row, as whole songs are."""
    generator = np.random.default_rng(0)
    bar = [vocab.CHORD.start, vocab.TS.start, vocab.BPM.start]
    lengths = generator.integers(80, 250, 600)
    songs = [np.array([vocab.BOS, *bar * length, vocab.EOS], np.uint16) for length in lengths]
    shards = ShardSet(write_folder(tmp_path / "data", songs, (len(songs),), val_split=0.0))
    packed_songs = packed(shards, max_seq_len=1000, max_bars=1000)
    at_random = int(pack(packed_songs.samples.length, packed_songs.samples.bars, 1000, 1000).max()) + 1
    together = []
    for epoch in range(2):
        rows = packed_songs.rows(epoch)
        assert len(rows) < 0.98 * at_random
        tokens = [int(packed_songs.samples.length[row].sum()) for row in rows]
        assert abs(np.corrcoef(np.arange(len(rows)), tokens)[0, 1]) < 0.2, "rows are in random order"
        together.append({tuple(sorted(row.tolist())) for row in rows})
    assert len(together[0] & together[1]) < 0.5 * len(together[0])
