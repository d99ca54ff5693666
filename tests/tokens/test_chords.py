import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meloformer.composer.compose import compose
from meloformer.tokens import attributes, vocab
from meloformer.tokens.chords import label_bars, pitch_class_weights
from meloformer.tokens.tokenizer import HIDTokenizer


def label(pitches, length=24):
    pitches = np.array(pitches, dtype=np.int64)
    zeros = np.zeros(len(pitches), dtype=np.int64)
    return vocab.CHORD.labels[label_bars(zeros, zeros + length, pitches, np.array([0]))[0]]


@pytest.mark.parametrize("root", range(12))
@pytest.mark.parametrize("quality", vocab.QUALITIES)
def test_every_chord_in_root_position_is_found(root, quality):
    pitches = [48 + root + tone for tone in vocab.QUALITIES[quality]]
    assert label(pitches) == f"{vocab.PITCH_NAMES[root]}:{quality}"


@pytest.mark.parametrize(
    "pitches, expected",
    [([], "N"), ([60], "N"), ([60, 72], "N"), ([52, 60, 67], "C:maj"), ([55, 60, 64], "C:maj")],
    ids=["silence", "one note", "octave", "first inversion", "second inversion"],
)
def test_special_bars(pitches, expected):
    assert label(pitches) == expected


def test_a_note_counts_in_every_bar_by_its_time_there_its_place_and_its_height():
    weights, bass = pitch_class_weights(
        np.array([0, 90, 120, 0, 6]),
        np.array([24, 110, 10, 24, 12]),
        np.array([60, 50, 41, 83, 87]),
        np.array([0, 96, 192, 288]),
    )
    assert weights[:, 0].tolist() == [2 * 3 * 24, 0, 0, 0]  # on a quarter
    assert weights[:, 2].tolist() == [2 * 2 * 6, 2 * 3 * 96, 2 * 3 * 8, 0]  # off the beat, then sounding on
    assert weights[:, 5].tolist() == [0, 2 * 3 * 10, 0, 0]
    assert weights[:, 11].tolist() == [2 * 3 * 24, 0, 0, 0]  # less than two octaves over the bass
    assert weights[:, 3].tolist() == [2 * 12, 0, 0, 0]  # more
    assert bass.tolist() == [0, 2, 2, 0]  # the F comes after the first quarter, the bar at 288 is silent


def bars_of(*bars):
    """Notes of bars of four quarters, each the pitches of one chord that sounds through."""
    notes = [(96 * at, 96, pitch) for at, pitches in enumerate(bars) for pitch in pitches]
    return (*np.array(notes, dtype=np.int64).reshape(-1, 3).T, 96 * np.arange(len(bars)))


def labels(*bars):
    return [vocab.CHORD.labels[index] for index in label_bars(*bars_of(*bars))]


def test_a_bar_that_goes_on_keeps_its_label():
    chord, third_missing, root_alone = (48, 52, 55), (48, 55), (48,)
    assert labels(chord, third_missing, chord) == ["C:maj"] * 3
    assert labels(chord, root_alone, chord) == ["C:maj"] * 3
    assert labels(chord, (), chord) == ["C:maj", "N", "C:maj"]
    assert labels(chord, (45, 48, 52), chord) == ["C:maj", "A:min", "C:maj"]
    assert labels(root_alone) == ["N"] and labels(third_missing) == ["C:5"]


def test_the_bass_decides_between_chords_of_the_same_notes():
    assert labels((48, 52, 55, 57)) == ["C:6"]
    assert labels((45, 48, 52, 55)) == ["A:min7"]


bar_of_notes = st.lists(st.tuples(st.integers(0, 95), st.integers(1, 200), st.integers(30, 80)), max_size=8)


@given(st.lists(bar_of_notes, min_size=1, max_size=12), st.integers(-11, 11))
@settings(deadline=None, max_examples=300)
def test_transposing_a_song_transposes_every_label_and_nothing_else(bars, semitones):
    notes = [(96 * at + onset, *rest) for at, notes in enumerate(bars) for onset, *rest in notes]
    start, length, pitch = np.array(notes, dtype=np.int64).reshape(-1, 3).T
    bar_start = 96 * np.arange(len(bars))
    before = label_bars(start, length, pitch, bar_start)
    root, quality = np.divmod(before - 1, len(vocab.QUALITIES))
    expected = np.where(before == 0, 0, 1 + (root + semitones) % 12 * len(vocab.QUALITIES) + quality)
    np.testing.assert_array_equal(label_bars(start, length, pitch + semitones, bar_start), expected)


@pytest.mark.parametrize("semitones", [*range(-5, 0), *range(1, 7)])
def test_transposed_songs_have_the_same_tokens_but_pitches_and_labels(semitones):
    midi = compose(2, bars=16)
    ids = HIDTokenizer().encode(midi).astype(np.int64)
    for track in midi.instruments:
        for note in track.notes:
            note.pitch += 0 if track.is_drum else semitones
    assert all(0 <= note.pitch <= 127 for track in midi.instruments for note in track.notes)
    moved = HIDTokenizer().encode(midi).astype(np.int64)
    pitched = vocab.P.mask(ids) & (attributes.scan(ids).inst != vocab.DRUMS)
    chord = vocab.CHORD.mask(ids) & (ids != vocab.CHORD.start)
    expected = ids + np.where(pitched, semitones, 0)
    shifted = ids - vocab.CHORD.start - 1 + semitones * len(vocab.QUALITIES)
    expected = np.where(chord, vocab.CHORD.start + 1 + shifted % (len(vocab.CHORD) - 1), expected)
    np.testing.assert_array_equal(moved, expected)


def test_a_passing_note_does_not_change_the_chord():
    start, length = np.array([0, 0, 0, 0]), np.array([96, 96, 96, 4])
    assert label_bars(start, length, np.array([48, 52, 55, 62]), np.array([0]))[
        0
    ] == vocab.CHORD.labels.index("C:maj")
