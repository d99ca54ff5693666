"""Chords and keys as they are written, and what they stand for."""

import numpy as np
import pytest

from meloformer.errors import UserError
from meloformer.generation import harmony
from meloformer.generation.harmony import SPELLINGS, chord_pitches, parse_chords, parse_key
from meloformer.tokens import vocab

C, D, E, F, G, A, B = 0, 2, 4, 5, 7, 9, 11


@pytest.mark.parametrize(
    "text, pitches",
    [
        ("C", {C, E, G}),
        ("am", {A, C, E}),
        ("Bb7", {10, D, F, 8}),
        ("F#m7b5", {6, A, C, E}),
        ("Cb", {B, 3, 6}),
        ("Gsus", {G, C, D}),
        ("Dbmaj7", {1, F, 8, C}),
        ("E5", {E, B}),
        ("N.C.", set()),
    ],
)
def test_a_chord_has_the_notes_that_its_name_says(text, pitches):
    (label,) = parse_chords(text)
    assert chord_pitches(label) == pitches


def test_every_label_has_a_name_and_every_spelling_a_label():
    parts = (label.partition(":") for label in vocab.CHORD.labels)
    names = [root + (SPELLINGS[quality][0] if quality else "") for root, _, quality in parts]
    assert parse_chords(" ".join(names)) == tuple(range(vocab.CHORD.start, vocab.CHORD.stop))
    for quality, spellings in SPELLINGS.items():
        for spelling in spellings:
            (label,) = parse_chords("E" + spelling)
            assert vocab.CHORD.labels[label - vocab.CHORD.start] == f"E:{quality}"


def test_chords_are_parted_by_spaces_commas_or_bar_lines():
    assert parse_chords("| C  G, Am | F |") == parse_chords("C G Am F")


@pytest.mark.parametrize(
    "text, said", [("H", "'H'"), ("C G13", "'G13'"), ("C/E", "bass"), (" | ", "no chord")]
)
def test_what_is_no_chord_is_named(text, said):
    with pytest.raises(UserError, match=said):
        parse_chords(text)


@pytest.mark.parametrize(
    "text, pitches",
    [
        ("C major", (C, D, E, F, G, A, B)),
        ("g", (C, D, E, 6, G, A, B)),
        ("A minor", (C, D, E, F, G, 8, A, B)),
        ("Am", (C, D, E, F, G, 8, A, B)),
        ("AM", (1, D, E, 6, 8, A, B)),
        ("Bb Mixolydian", (C, D, 3, F, G, 8, 10)),
    ],
)
def test_a_key_has_the_notes_of_its_scale(text, pitches):
    assert parse_key(text) == pitches


@pytest.mark.parametrize("text", ["", "X minor", "A moll", "A minor 7"])
def test_what_is_no_key_is_named(text):
    with pytest.raises(UserError, match="--key"):
        parse_key(text)


def test_the_key_is_the_one_whose_profile_correlates_most():
    """Major and minor profiles spread differently: without their standard deviations the wider one would win
    too often."""
    generator = np.random.default_rng(0)
    profiles = {
        f"{tonic} {mode}": np.roll(profile, place)
        for mode, profile in harmony._PROFILES.items()
        for place, tonic in enumerate(harmony._TONICS[mode])
    }
    for weights in generator.random((100, 12)) ** 2:
        fits = {key: np.corrcoef(weights, profile)[0, 1] for key, profile in profiles.items()}
        assert harmony.key_of(weights) == max(fits, key=fits.get)
