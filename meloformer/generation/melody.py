"""Which instrument of a song plays its melody."""

import miditoolkit
import numpy as np

from ..tokens import vocab
from ..tokens.score import Score, from_midi

# Chosen on 120 songs, and tried on others, as docs/generation.md says.
ALONE = 0.8  # share of the time in which it sounds that it plays one note: legato notes overlap
LOWEST = 55  # mean pitch, G3: a bass plays one note at a time, too
STEPWISE = 0.4  # share of its intervals that are a whole tone at most; those of arpeggios and riffs are wider


def melody_of(song: miditoolkit.MidiFile) -> int | None:
    """The program that plays the melody: of those that mostly play one note at a time, are no bass and often
    move by step, the one that sounds for the longest time. None if there is none.

    Raises:
        MidiError: the song has no notes, or is too long.
    """
    score = from_midi(song)
    sounding = {}
    for program in np.unique(score.inst[score.inst != vocab.DRUMS]).tolist():
        mine = np.flatnonzero(score.inst == program)
        count = _count(score, mine)
        time = np.count_nonzero(count)
        if (
            np.count_nonzero(count == 1) >= ALONE * time
            and score.pitch[mine].mean() >= LOWEST
            and _stepwise(score, mine) >= STEPWISE
        ):
            sounding[program] = time
    return max(sounding, key=sounding.get, default=None)


def _count(score: Score, notes: np.ndarray) -> np.ndarray:
    """How many of these notes sound at each step, int64."""
    begin, end = score.start[notes], score.start[notes] + score.length[notes]
    return np.cumsum(np.bincount(begin, minlength=end.max() + 1) - np.bincount(end))[:-1]


def _stepwise(score: Score, notes: np.ndarray) -> float:
    """The share of steps of at most a whole tone, of those from the highest note of an onset to the next."""
    notes = notes[np.lexsort((score.pitch[notes], score.start[notes]))]
    line = score.pitch[notes][np.append(np.diff(score.start[notes]) > 0, True)]
    return float((np.abs(np.diff(line)) <= 2).mean()) if len(line) > 1 else 0.0
