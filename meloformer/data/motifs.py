"""What a song is recognised by, whatever its key, tempo, dynamics and instruments.

A motif is what one instrument plays in one bar, and also what all but the drums play there together: onsets
to the nearest 1/32 note, and pitches above the lowest. Lengths, velocities and drums play no part.
Near-duplicates are found by the motifs that two songs share (`near_duplicates`).
"""

import numpy as np

from ..tokens import vocab
from ..tokens.attributes import last_index

MOTIF_DTYPE = np.dtype("<u8")
GRID = vocab.STEPS_PER_QUARTER // 8  # steps: so a file that was saved on a coarser clock keeps its motifs
MIN_NOTES, MIN_PITCHES = 4, 3  # a motif with fewer is played in too many songs: one note on every beat
_PITCHES = 128


def motifs(ids: np.ndarray) -> np.ndarray:
    """64-bit hashes of the distinct motifs of a song, ascending (uint64 [m], m may be 0).

    Args:
        ids: token ids [n] of one song of the grammar, any integer dtype.
    """
    ids = np.asarray(ids)
    at = np.flatnonzero(vocab.P.mask(ids))
    instruments = vocab.INST.mask(ids)
    drums = vocab.INST.start + int(vocab.INSTRUMENT_RANK[vocab.DRUMS])
    at = at[ids[last_index(instruments)[at]] != drums]
    onset = ids[last_index(vocab.T.mask(ids))[at]].astype(np.int64) - vocab.T.start
    slot = (onset + GRID // 2) // GRID
    pitch = ids[at].astype(np.int64) - vocab.P.start
    together = (
        _of_groups(slot, pitch, np.cumsum(marks)[at]) for marks in (instruments, vocab.CHORD.mask(ids))
    )
    return np.unique(np.concatenate(list(together)))


def _of_groups(slot: np.ndarray, pitch: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Hashes of the groups of notes that tell something; int64 [notes] each, `group` ascending."""
    if not len(group):
        return np.zeros(0, MOTIF_DTYPE)
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    notes = np.diff(starts, append=len(group))
    low, high = np.minimum.reduceat(pitch, starts), np.maximum.reduceat(pitch, starts)
    between = (pitch > np.repeat(low, notes)) & (pitch < np.repeat(high, notes))  # some: at least 3 pitches
    tells = (notes >= MIN_NOTES) & np.logical_or.reduceat(between, starts)
    # A sum, so that the order of the notes in the song does not matter. It wraps around, as a hash may.
    sums = np.add.reduceat(_mix(slot * _PITCHES + pitch - np.repeat(low, notes)), starts)
    return _mix(sums[tells])


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): 64-bit numbers to others that look random."""
    x = values.astype(MOTIF_DTYPE) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
