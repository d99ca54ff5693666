import numpy as np
import pytest

from meloformer.tokens import vocab
from meloformer.tokens.chords import label_bars, pitch_class_weights


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


def test_a_note_counts_in_every_bar_it_sounds_in_by_its_time_there():
    weights, lowest = pitch_class_weights(
        np.array([0, 90]), np.array([24, 110]), np.array([60, 50]), np.array([0, 96, 192])
    )
    assert weights[:, 0].tolist() == [24, 0, 0]
    assert weights[:, 2].tolist() == [6, 96, 8]
    assert lowest.tolist() == [50, 50, 50]


def test_a_passing_note_does_not_change_the_chord():
    start, length = np.array([0, 0, 0, 0]), np.array([96, 96, 96, 4])
    assert label_bars(start, length, np.array([48, 52, 55, 62]), np.array([0]))[
        0
    ] == vocab.CHORD.labels.index("C:maj")
