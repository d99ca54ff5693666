import math

import numpy as np
import pytest

from benchmarks.learning import toy
from benchmarks.learning.toy import (
    CHORDS,
    FIXED_CHORD,
    FIXED_INST,
    INSTRUMENTS,
    SHARES,
    Counts,
    Song,
    chances,
    chord_steps,
    count,
    fit,
    inst_steps,
    nats,
    read_song,
)  # fmt: skip
from meloformer.data.shards import ShardSet
from meloformer.errors import UserError
from meloformer.tokens import vocab

BAND = [0, 1, 40, 60]
REPEATING = Song([3, 9, 20, 3] * 40, [[0, 1, 60]] * 160, BAND)
SONGS = [REPEATING, Song([1, 2, 1, 0, 5], [[1, 40], [], [0, 60], [40], [0, 1, 40, 60]], BAND)]
CASES = {"CHORD": (chord_steps, CHORDS), "INST": (inst_steps, INSTRUMENTS)}
each = pytest.mark.parametrize("name", CASES)


def test_a_song_is_read_from_its_ids():
    ids = [
        vocab.BOS, vocab.BAND.start + 1, vocab.BAND.start + 40, vocab.CHORD.start + 3, vocab.TS.start,
        vocab.INST.start + 1, vocab.T.start, vocab.P.start, vocab.INST.start + 40, vocab.P.start,
        vocab.CHORD.start, vocab.CHORD.start + 7, vocab.INST.start + 40, vocab.P.start, vocab.EOS,
    ]  # fmt: skip
    assert read_song(np.array(ids, dtype=np.uint16)) == Song([3, 0, 7], [[1, 40], [], [40]], [1, 40])


@each
@pytest.mark.parametrize("fitted", [False, True])
def test_every_guess_sums_to_one_and_some_guess_is_never_surprised(name, fitted):
    steps, labels = CASES[name]
    trained = count(SONGS)[name]
    weights = np.ones(9 if name == "CHORD" else 5)
    if not fitted:
        weights = {"CHORD": FIXED_CHORD, "INST": FIXED_INST}[name]
    number = 0
    for song in SONGS:
        for step in steps(song, trained, fitted):
            number += 1
            assert len(step.guesses) == len(weights)
            of_label, there = chances(step)
            assert (toy.mixed(weights, there) * of_label).sum() > 0
            for guess in step.guesses:
                if guess is not None:
                    assert guess.sum() == pytest.approx(1) and guess.min() >= 0 and len(guess) <= labels
    expected = sum(len(song.chords) if name == "CHORD" else sum(map(len, song.bars)) for song in SONGS)
    assert number == expected


@each
def test_a_song_that_repeats_itself_costs_next_to_nothing(name):
    steps, _ = CASES[name]
    nothing = count([SONGS[1]])[name]
    weights = np.full(9 if name == "CHORD" else 5, 1.0)
    found = nats(steps(REPEATING, nothing, True), weights / weights.sum(), SHARES[0])
    settled = found[len(found) // 2 :]
    assert sum(settled) / len(settled) < 0.05 < found[0]
    by_hand = nats(steps(REPEATING, nothing, False), {"CHORD": FIXED_CHORD, "INST": FIXED_INST}[name])
    assert sum(by_hand) > sum(found)


def test_only_the_band_that_stands_later_is_guessed_if_fitted():
    song = Song([0], [[0, 40, 60]], BAND)
    sizes = [len(step.guesses[0]) for step in inst_steps(song, count(SONGS)["INST"], True)]
    assert sizes == [4, 3, 1]
    assert [len(s.guesses[0]) for s in inst_steps(song, count(SONGS)["INST"], False)] == [INSTRUMENTS] * 3


def test_copies_are_the_labels_some_bars_ago():
    song = Song([1, 2, 3, 4, 5, 6, 7, 8, 9], [], BAND)
    *_, last = chord_steps(song, count(SONGS)["CHORD"], False)
    assert [guess.argmax() for guess in last.guesses[2:]] == [8, 7, 5, 1]
    first = next(chord_steps(song, count(SONGS)["CHORD"], False))
    assert first.guesses[1:] == [None] * 5


def test_counts_are_mixed_by_the_rule_of_witten_and_bell():
    counts = Counts(4, 1)
    for before, label in (((0,), 1), ((0,), 1), ((0,), 2), ((3,), 2)):
        counts.add(before, label)
    one = (np.array([0, 2, 2, 0]) + 2 * np.full(4, 0.25)) / (4 + 2)
    np.testing.assert_allclose(counts.after(()), one)
    np.testing.assert_allclose(counts.after((9, 0)), (np.array([0, 2, 1, 0]) + 2 * one) / (3 + 2))
    np.testing.assert_allclose(counts.after((2,)), one)


def test_the_guess_that_is_right_gets_the_weight():
    right, wrong = np.array([0.9, 0.1, 0.0]), np.array([0.1, 0.9, 0.0])
    weights = fit([(np.array([right[0], wrong[0], 0.0]), np.array([True, True, False]))] * 20, rounds=200)
    assert weights[0] > 0.99
    assert math.isclose(weights.sum(), 1)


def test_both_toys_are_measured_on_the_validation_songs(data):
    shards = ShardSet(data)
    found = toy.measure(shards)
    songs = [read_song(shards[n]) for n in shards.split("val")]
    assert found["songs"] == len(songs)
    assert found["targets"] == {
        "CHORD": int(shards.bars[shards.split("val")].sum()),
        "INST": sum(len(bar) for song in songs for bar in song.bars),
    }
    for name, (_, labels) in CASES.items():
        assert all(0 < found[toy_name][name] < math.log(labels) for toy_name in ("fixed", "fitted"))


def test_too_few_songs_are_refused(data):
    with pytest.raises(UserError, match="needs two training songs and a validation song"):
        toy.measure(ShardSet(data), max_bars=1)
