"""Chords and keys as musicians write them: 'C G Am F7', 'A minor'; and in which key notes are."""

import re

import numpy as np

from ..errors import UserError
from ..tokens import vocab

# What is written behind the root, for each of `vocab.QUALITIES`; the first spelling is the usual one.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "maj": ("", "maj", "M"),
    "min": ("m", "min", "-"),
    "dim": ("dim", "°", "o"),
    "aug": ("aug", "+"),
    "sus2": ("sus2",),
    "sus4": ("sus4", "sus"),
    "5": ("5",),
    "6": ("6", "maj6"),
    "7": ("7",),
    "maj7": ("maj7", "M7", "Δ"),
    "min7": ("m7", "min7", "-7"),
    "hdim7": ("m7b5", "hdim7", "ø", "ø7"),
    "dim7": ("dim7", "°7", "o7"),
}
_QUALITY = {spelling: quality for quality, spellings in SPELLINGS.items() for spelling in spellings}
_NO_CHORD = ("N", "NC", "N.C.")

# Semitones above the tonic. Minor has both sevenths: the raised one is in its dominant.
SCALES: dict[str, tuple[int, ...]] = {
    "major": (0, 2, 4, 5, 7, 9, 11),
    "minor": (0, 2, 3, 5, 7, 8, 10, 11),
    "dorian": (0, 2, 3, 5, 7, 9, 10),
    "phrygian": (0, 1, 3, 5, 7, 8, 10),
    "lydian": (0, 2, 4, 6, 7, 9, 11),
    "mixolydian": (0, 2, 4, 5, 7, 9, 10),
    "blues": (0, 3, 5, 6, 7, 10),
    "pentatonic": (0, 2, 4, 7, 9),
}
# How well each pitch class, counted from the tonic, fits a key (Krumhansl and Kessler 1982).
_PROFILES = {
    "major": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    "minor": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
}
_TONICS = {  # as they are mostly spelled
    "major": ("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"),
    "minor": ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "G#", "A", "Bb", "B"),
}
_SCALE_NAMES = {"": "major", "m": "minor", "min": "minor", "maj": "major"} | {name: name for name in SCALES}


def pitch_class(letter: str, accidentals: str) -> int:
    """'C', '#' -> 1: 0..11 above C. `accidentals`: any number of # and b."""
    return ("C D EF G A B".index(letter.upper()) + accidentals.count("#") - accidentals.count("b")) % 12


def parse_chords(text: str) -> tuple[int, ...]:
    """'C G Am F7' -> ids of CHORD tokens, one for each chord; N or NC is a bar without a chord.

    Raises:
        UserError: a word is no chord that HID has a label for.
    """
    chords = tuple(_parse_chord(word) for word in re.split(r"[\s,|]+", text.strip(" \t\n,|")) if word)
    if not chords:
        raise UserError("--chords: names no chord, e.g. --chords 'C G Am F'")
    return chords


def _parse_chord(word: str) -> int:
    if word.upper() in _NO_CHORD:
        return vocab.CHORD.start
    match = re.fullmatch(r"([A-Ga-g])([#b]*)(.*)", word)
    quality = _QUALITY.get(match[3]) if match else None
    if quality is None:
        if match and "/" in word:
            raise UserError(f"--chords: '{word}' names a bass note, which chords here have not: leave it out")
        known = ", ".join(f"C{spellings[0]}" for spellings in SPELLINGS.values())
        raise UserError(f"--chords: '{word}' is no chord of the kinds {known}, nor N for none")
    root = pitch_class(match[1], match[2])
    return vocab.CHORD.start + vocab.CHORD.labels.index(f"{vocab.PITCH_NAMES[root]}:{quality}")


def parse_key(text: str) -> tuple[int, ...]:
    """'A minor' -> the pitch classes (0..11 above C) of the scale, ascending.

    Raises:
        UserError: it names no key.
    """
    match = re.fullmatch(r"\s*([A-Ga-g])([#b]*)\s*([A-Za-z]*)\s*", text)
    name = _SCALE_NAMES.get(match[3] if match[3] in ("m", "M") else match[3].lower()) if match else None
    if match and match[3] == "M":
        name = "major"
    if name is None:
        raise UserError(f"--key: '{text}' is no note with one of {', '.join(SCALES)}, e.g. 'A minor'")
    tonic = pitch_class(match[1], match[2])
    return tuple(sorted((tonic + step) % 12 for step in SCALES[name]))


def key_of(weights: np.ndarray) -> str | None:
    """The major or minor key that fits music best, e.g. 'A minor'; None if it has less than a triad.

    It is the one whose profile correlates most with the music's (the method of Krumhansl and Schmuckler).

    Args:
        weights: how long each pitch class sounds, in any unit, [12] from C.
    """
    if np.count_nonzero(weights) < 3:
        return None
    fits = {}
    for mode, profile in _PROFILES.items():
        unit = (profile - np.mean(profile)) / np.std(
            profile
        )  # then the sum is the correlation, times a constant
        fits |= {f"{tonic} {mode}": weights @ np.roll(unit, i) for i, tonic in enumerate(_TONICS[mode])}
    return max(fits, key=fits.get)


def chord_pitches(label: int) -> frozenset[int]:
    """The pitch classes of a CHORD token's chord; empty for none."""
    if label == vocab.CHORD.start:
        return frozenset()
    root, quality = vocab.CHORD.labels[label - vocab.CHORD.start].split(":")
    base = vocab.PITCH_NAMES.index(root)
    return frozenset((base + step) % 12 for step in vocab.QUALITIES[quality])
