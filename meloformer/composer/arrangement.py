"""The material of composed songs: metres, chords, and a pattern generator for each role of the band.

A pattern is one to four bars of hits that name tones of the chord or the scale, not pitches; the
chord of each bar turns them into notes. All times are steps of `vocab.STEPS_PER_QUARTER`.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

from ..tokens.vocab import QUALITIES

_Item = TypeVar("_Item")


class Dice:
    """Random choices by `Random.random` alone, whose sequence Python guarantees not to change."""

    def __init__(self, *seed: object):
        self.random = random.Random("/".join(map(str, seed))).random

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def integer(self, low: int, high: int) -> int:
        """A number from low to high, both included."""
        return low + int(self.random() * (high - low + 1))

    def choice(self, options: Sequence[_Item]) -> _Item:
        return options[int(self.random() * len(options))]


@dataclass(frozen=True)
class Metre:
    """A time signature and the length of each beat of a bar in steps."""

    signature: tuple[int, int]
    beats: tuple[int, ...]

    @property
    def steps(self) -> int:
        return sum(self.beats)

    @cached_property
    def onsets(self) -> tuple[int, ...]:
        """Where each beat starts."""
        return tuple(sum(self.beats[:i]) for i in range(len(self.beats)))

    @cached_property
    def backbeats(self) -> tuple[int, ...]:
        """Where the snare falls: every second beat, and the last one of an odd bar."""
        last = len(self.beats) - 1
        return tuple(on for i, on in enumerate(self.onsets) if i % 2 or (i == last and i > 0))

    def slots(self, fine: bool, swing: bool) -> tuple[int, ...]:
        """Onsets that divide every beat into eighths (`fine`: into sixteenths); swung, by triplets."""
        slots = []
        for onset, length in zip(self.onsets, self.beats):
            if length == 36:
                offsets = range(0, 36, 6 if fine else 12)
            elif swing:
                offsets = (0, 8, 16) if fine else (0, 16)
            else:
                offsets = range(0, length, 6 if fine else 12)
            slots += [onset + offset for offset in offsets]
        return tuple(slots)


METRES = {
    metre.signature: metre
    for metre in (
        Metre((4, 4), (24, 24, 24, 24)),
        Metre((3, 4), (24, 24, 24)),
        Metre((6, 8), (36, 36)),
        Metre((2, 4), (24, 24)),
        Metre((5, 4), (24, 24, 24, 24, 24)),
        Metre((7, 8), (24, 24, 36)),
        Metre((12, 8), (36, 36, 36, 36)),
    )
}
# Drawn uniformly: a signature listed twice is twice as likely.
COMMON_SIGNATURES = ((4, 4),) * 6 + ((3, 4),) * 2 + ((6, 8),) * 2 + ((2, 4), (5, 4), (7, 8), (12, 8))

SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
_NUMERALS = {"i": 0, "ii": 2, "iii": 4, "iv": 5, "v": 7, "vi": 9, "vii": 11}
PROGRESSIONS = {
    "major": (
        "I V vi IV", "I vi ii V", "I vi IV V", "vi IV I V", "IV V iii vi", "I IV V IV", "I iii IV iv",
        "I bVII IV I", "Imaj7 vi7 ii7 V7", "ii7 V7 Imaj7 Imaj7", "I V vi iii IV I IV V",
        "I I7 IV iv I VI7 ii7 V7", "IV I V vi IV I Vsus4 V",
    ),
    "minor": (
        "i bVI bIII bVII", "i bVII bVI V7", "i iv v i", "i iv bVII bIII", "i bVI iv V", "i v bVI bVII",
        "i7 iv7 bVII7 bIIImaj7", "iihdim7 V7 i6 i6", "i bVII i v bIII bVII i7 V7",
        "i iv i V7 bVI bIII iihdim7 V7",
    ),
}  # fmt: skip


_INTERVALS = {**QUALITIES, "min6": (0, 3, 7, 9)}  # which the labels of bars do without


class Chord(NamedTuple):
    root: int  # pitch class
    intervals: tuple[int, ...]  # semitones above the root

    @classmethod
    def from_numeral(cls, text: str, tonic: int) -> "Chord":
        """`bVII`, `ii7`, `Imaj7`: a root relative to the major scale; lower case is minor."""
        degree = text.lstrip("b")
        numeral = next(n for n in sorted(_NUMERALS, key=len, reverse=True) if degree.lower().startswith(n))
        suffix = degree[len(numeral) :]
        if degree[0].islower():
            suffix = {"": "min", "7": "min7", "6": "min6"}.get(suffix, suffix)
        root = (tonic + _NUMERALS[numeral] - text.count("b", 0, len(text) - len(degree))) % 12
        return cls(root, _INTERVALS[suffix or "maj"])


class Hit(NamedTuple):
    """A note of a pattern: `tone` counts chord tones or scale steps; accent runs from 0 to 1."""

    step: int
    length: int
    tone: int
    accent: float


Pattern = list[list[Hit]]  # the hits of each bar


@dataclass(frozen=True)
class Harmony:
    """What turns the tones of a bar's hits into pitches."""

    chord: Chord
    following: Chord
    scale: frozenset[int]


def _bass_pitch(hit: Hit, low: int, harmony: Harmony) -> int:
    """Chord tones upward from the root; tone -1 leads to the next bar's root."""
    if hit.tone < 0:
        return low + (harmony.following.root - low) % 12 - 1
    octave, index = divmod(hit.tone, len(harmony.chord.intervals))
    return low + (harmony.chord.root - low) % 12 + harmony.chord.intervals[index] + 12 * octave


def voiced_pitch(hit: Hit, low: int, harmony: Harmony) -> int:
    """Chord tones upward from `low`, whatever the inversion: neighbouring chords stay close."""
    voicing = sorted(low + (harmony.chord.root + interval - low) % 12 for interval in harmony.chord.intervals)
    octave, index = divmod(hit.tone, len(voicing))
    return voicing[index] + 12 * octave


def _scale_pitch(hit: Hit, low: int, harmony: Harmony) -> int:
    """Steps of the scale upward from `low`; a stressed hit moves to the nearest tone of the chord."""
    ladder = [pitch for pitch in range(low, low + 12) if pitch % 12 in harmony.scale]
    octave, index = divmod(hit.tone, len(ladder))
    pitch = ladder[index] + 12 * octave
    if hit.accent < 0.5:
        return pitch
    chord = {(harmony.chord.root + interval) % 12 for interval in harmony.chord.intervals}
    return next((pitch + shift for shift in (0, -1, 1, -2, 2) if (pitch + shift) % 12 in chord), pitch)


def _accent(metre: Metre, step: int) -> float:
    if step == 0:
        return 1.0
    return 0.6 if step in metre.onsets else 0.2


def _until_next(onsets: Sequence[int], metre: Metre) -> list[int]:
    """The gap from each onset to the next one or the bar line."""
    return [after - on for on, after in zip(onsets, [*onsets[1:], metre.steps])]


def _bass(dice: Dice, metre: Metre, swing: bool) -> Pattern:
    style = dice.choice(("roots", "eighths", "walking", "syncopated"))
    eighths = metre.slots(False, swing)
    if style == "roots":
        onsets = [0, *(on for on in metre.onsets[1:] if dice.chance(0.5))]
    elif style == "walking":
        onsets = list(metre.onsets)
    elif style == "eighths":
        onsets = list(eighths)
    else:
        onsets = [0, *(step for step in eighths[1:] if dice.chance(0.45))]
    bars = []
    for _ in range(2):
        tones = [0] + [dice.choice((0, 0, 2, 3) if style != "walking" else (1, 2, 3)) for _ in onsets[1:]]
        if len(tones) > 2 and dice.chance(0.6):
            tones[-1] = -1
        gaps = _until_next(onsets, metre)
        bars.append([Hit(on, gap, tone, _accent(metre, on)) for on, gap, tone in zip(onsets, gaps, tones)])
    return bars


def _comp(dice: Dice, metre: Metre, swing: bool) -> Pattern:
    """Struck chords: on the beats, off the beats, or a rhythm of their own."""
    voices = dice.choice((3, 3, 4))
    eighths = metre.slots(False, swing)
    density = dice.choice((0.3, 0.5, 0.8))
    chosen = dice.choice((metre.onsets, [s for s in eighths if s not in metre.onsets], None))
    onsets = chosen or sorted({0, *(s for s in eighths if dice.chance(density))})
    short = dice.chance(0.3)
    return [
        [
            Hit(on, min(gap, 8) if short else gap, tone, _accent(metre, on))
            for on, gap in zip(onsets, _until_next(onsets, metre))
            for tone in range(voices)
        ]
    ]


def _pad(dice: Dice, metre: Metre, swing: bool) -> Pattern:
    return [[Hit(0, metre.steps, tone, 0.5) for tone in range(dice.choice((3, 4)))]]


def _arpeggio(dice: Dice, metre: Metre, swing: bool) -> Pattern:
    """Broken chords up, up and down, or in a fixed random order."""
    slots = metre.slots(dice.chance(0.4), swing)
    order = dice.choice(((0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3, 2, 1), (0, 2, 1, 2), (3, 2, 1, 0, 1, 2)))
    gaps = _until_next(slots, metre)
    tones = [order[i % len(order)] for i in range(len(slots))]
    return [[Hit(on, gap, tone, _accent(metre, on)) for on, gap, tone in zip(slots, gaps, tones)]]


def _melody(dice: Dice, metre: Metre, swing: bool) -> Pattern:
    """A four-bar phrase: motif, its variation, the motif again, a cadence on a long note."""
    fine = dice.chance(0.25)
    slots = metre.slots(fine, swing)
    eighths = metre.slots(False, swing)
    density = dice.choice((0.3, 0.45, 0.6))

    def rhythm() -> list[int]:
        chances = [0.8 if s in metre.onsets else density if s in eighths else density / 2 for s in slots]
        return [s for s, chance in zip(slots, chances) if dice.chance(chance)] or [0]

    def bar(onsets: list[int], tones: list[int]) -> list[Hit]:
        gaps = _until_next(onsets, metre)
        return [Hit(on, gap, tone, _accent(metre, on)) for on, gap, tone in zip(onsets, gaps, tones)]

    def contour(length: int) -> list[int]:
        tones, tone = [], dice.integer(2, 6)
        for _ in range(length):
            tones.append(tone)
            tone = min(max(tone + dice.choice((-3, -2, -1, -1, 1, 1, 2, 3)), 0), 10)
        return tones

    onsets = rhythm()
    tones = contour(len(onsets))
    ending = contour(len(onsets))
    half = len(onsets) // 2
    cadence = [on for on in rhythm() if on < metre.onsets[-1]] or [0]
    return [
        bar(onsets, tones),
        bar(onsets, tones[:half] + ending[half:]),
        bar(onsets, tones),
        bar(cadence, contour(len(cadence))),
    ]


def _riff(dice: Dice, metre: Metre, swing: bool) -> Pattern:
    """A short figure on the scale, the same in every bar."""
    slots = [s for s in metre.slots(dice.chance(0.3), swing) if dice.chance(0.55)] or [0]
    tones = [dice.integer(0, 5) for _ in slots]
    gaps = [min(gap, 12) for gap in _until_next(slots, metre)]
    return [[Hit(on, gap, tone, _accent(metre, on)) for on, gap, tone in zip(slots, gaps, tones)]]


@dataclass(frozen=True)
class Role:
    """A part of the band: who may play it, its lowest pitch, what it plays and how often."""

    programs: tuple[int, ...]
    low: int
    pattern: Callable[[Dice, Metre, bool], Pattern]
    pitch: Callable[[Hit, int, Harmony], int]
    presence: dict[str, float]  # section -> chance to play in it; 1 where not named


# The programs of two roles are disjoint, so each part is the only one of its program.
ROLES = {
    "bass": Role((*range(32, 40), 43), 29, _bass, _bass_pitch, {"intro": 0.5, "bridge": 0.8}),
    "comp": Role((0, 1, 2, 4, 5, 16, 17, 21, 24, 25, 26, 27), 55, _comp, voiced_pitch, {"intro": 0.8}),
    "lead": Role(
        (40, 56, 60, 64, 65, 66, 68, 71, 73, 75, 80, 81), 67, _melody, _scale_pitch,
        {"intro": 0.2, "bridge": 0.7, "outro": 0.6},
    ),
    "pad": Role((19, 48, 49, 50, 52, 89, 90, 91, 94), 53, _pad, voiced_pitch, {"intro": 0.7, "verse": 0.5}),
    "arpeggio": Role((6, 8, 10, 11, 12, 45, 46, 88, 107), 60, _arpeggio, voiced_pitch, {"verse": 0.6}),
    "harmony": Role(
        (41, 42, 57, 61, 69, 70, 72, 74, 82, 85), 60, _melody, _scale_pitch,
        {"intro": 0.0, "verse": 0.3, "bridge": 0.4},
    ),
    "riff": Role((7, 28, 29, 30, 62, 63, 83, 87), 48, _riff, _scale_pitch, {"verse": 0.5, "outro": 0.5}),
}  # fmt: skip
LOUDNESS = {"intro": 58, "verse": 70, "chorus": 88, "bridge": 76, "outro": 62}

KICK, _SNARE, _STICK, _CLOSED, _OPEN, CRASH, _RIDE = 36, 38, 37, 42, 46, 49, 51
_TOMS = (50, 48, 45, 43)


def drum_groove(dice: Dice, metre: Metre, swing: bool, section: str) -> list[Hit]:
    """One bar of groove; `tone` is the drum's pitch."""
    eighths = metre.slots(False, swing)
    cymbal = _RIDE if section in ("chorus", "bridge") and dice.chance(0.5) else _CLOSED
    pulse = metre.onsets if dice.chance(0.3) else metre.slots(section == "chorus" and dice.chance(0.3), swing)
    kicks = [0, *(s for s in eighths[1:] if s not in metre.backbeats and dice.chance(0.3))]
    snare = _STICK if section == "verse" and dice.chance(0.3) else _SNARE
    hits = [Hit(on, 6, cymbal, 0.7 * _accent(metre, on)) for on in pulse]
    hits += [Hit(on, 6, KICK, 0.9) for on in kicks]
    hits += [Hit(on, 6, snare, 1.0) for on in metre.backbeats]
    if dice.chance(0.4):
        hits.append(Hit(eighths[-1], 6, _OPEN, 0.5))
    if dice.chance(0.3):
        hits.append(Hit(dice.choice(metre.slots(True, swing)), 4, 40, 0.0))
    return hits


def drum_fill(dice: Dice, metre: Metre, swing: bool, groove: list[Hit]) -> list[Hit]:
    """The groove with a run down the toms in its last beat or two."""
    beats = min(dice.choice((1, 1, 2)), len(metre.beats))
    begin = metre.onsets[-beats]
    run = [s for s in metre.slots(True, swing) if s >= begin and dice.chance(0.85)]
    drums = [(_SNARE, *_TOMS)[i * 5 // len(run)] for i in range(len(run))]
    return [hit for hit in groove if hit.step < begin] + [
        Hit(on, 4, drum, 0.5 + 0.5 * i / len(run)) for i, (on, drum) in enumerate(zip(run, drums))
    ]
