"""Motifs: hashes of a song's bars that do not depend on its key, tempo, velocities and instruments.

The notes of one instrument in one bar give a motif, and so do the notes of all instruments but drums in the
bar. A motif is a hash of their onsets, to the nearest 1/32 note, and of their pitches above the lowest.
Lengths, velocities and drums do not count. Two songs that share many motifs are near-duplicates: see
`near_duplicates`.
"""

import numpy as np

from ..tokens import vocab
from ..tokens.attributes import last_index
from .splitmix import splitmix64

MOTIF_DTYPE = np.dtype("<u8")
# In steps; coarse, so that a file saved with fewer ticks per quarter keeps its motifs.
GRID = vocab.STEPS_PER_QUARTER // 8
MIN_NOTES, MIN_PITCHES = 4, 3  # simpler motifs, such as one note on every beat, are in too many songs
_PITCHES = 128


def motifs(ids: np.ndarray) -> np.ndarray:
    """The distinct motifs of a song as 64-bit hashes, ascending: uint64 [m]; m may be 0.

    Args:
        ids: token ids [n] of one song that follows the grammar, any integer dtype.
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
    """Hashes of the groups with enough notes and pitches; int64 [notes] each, `group` ascending."""
    if not len(group):
        return np.zeros(0, MOTIF_DTYPE)
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    notes = np.diff(starts, append=len(group))
    low, high = np.minimum.reduceat(pitch, starts), np.maximum.reduceat(pitch, starts)
    between = (pitch > np.repeat(low, notes)) & (pitch < np.repeat(high, notes))  # any: at least 3 pitches
    tells = (notes >= MIN_NOTES) & np.logical_or.reduceat(between, starts)
    hashed = slot * _PITCHES + pitch - np.repeat(low, notes)
    # A sum, so that the order of the notes does not matter. It may overflow: it is a hash.
    sums = np.add.reduceat(splitmix64(hashed.astype(MOTIF_DTYPE)), starts)
    return splitmix64(sums[tells])
