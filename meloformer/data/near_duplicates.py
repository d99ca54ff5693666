"""Clusters of songs that share most of their motifs, in time and memory linear in the number of songs.

A song is not compared with all others. All motifs are sorted, and under each motif a song is compared with
the next few songs that have it; the comparison itself is exact.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np

from .motifs import MOTIF_DTYPE

# Two songs are near-duplicates if they share at least the fraction SHARE of the motifs of the one with fewer,
# and MARGIN more. Among 3,034 real songs few pairs share between a fifth and a half. Of the pairs above,
# nine in ten also have drum bars in common, which are in no motif (of other pairs, 3 in 1,000). The margin
# asks for a larger fraction of short songs; songs of fewer than 6 motifs are never near-duplicates.
SHARE, MARGIN = 0.5, 3
MIN_MOTIFS = int(MARGIN / (1 - SHARE))
NEIGHBOURS = 2  # next songs compared; 1, or all of them, give those 3,034 songs the same clusters
# A motif in more songs than this, and in more than one in a thousand, is ignored: a scale, a repeated chord.
COMMON = 256

_AT_ONCE = 1 << 20  # motifs sorted at a time; sorting takes about 80 bytes for each
_MAX_PASSES = 256  # over the files; if these do not suffice, more motifs are sorted at a time


class Motifs:
    """The motifs of many songs: `motifs[song]` are those of one song, a view, uint64 [m], ascending.

    Args:
        parts: for each shard of n songs the hashes (uint64, song after song) and the offsets (int64 [n + 1]).

    Attributes:
        counts: int32 [songs], number of motifs of each song.
    """

    def __init__(self, parts: Sequence[tuple[np.ndarray, np.ndarray]]):
        self._parts = parts
        self._first = list(accumulate((len(offsets) - 1 for _, offsets in parts), initial=0))
        self.counts = np.concatenate([np.diff(offsets).astype(np.int32) for _, offsets in parts])

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, song: int) -> np.ndarray:
        part = bisect_right(self._first, song) - 1
        hashes, offsets = self._parts[part]
        i = song - self._first[part]
        return hashes[offsets[i] : offsets[i + 1]]

    def between(self, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """All motifs from `low` to `high` (uint64) and the song of each (int64), ordered by song."""
        found, songs = [], []
        for first, (hashes, offsets) in zip(self._first, self._parts):
            at = np.flatnonzero((hashes >= low) & (hashes <= high))
            found.append(hashes[at])
            songs.append(np.searchsorted(offsets, at, side="right") - 1 + first)
        return np.concatenate(found), np.concatenate(songs)

    def slices(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """`between` of consecutive ranges that cover all motifs, each with about _AT_ONCE motifs or fewer."""
        total = int(self.counts.sum(dtype=np.int64))
        passes = 1
        while passes < _MAX_PASSES and total > passes * _AT_ONCE:
            passes *= 2
        width = 2**64 // passes
        for i in range(passes):
            yield self.between(i * width, (i + 1) * width - 1)


def clusters(motifs: Motifs, digests: np.ndarray) -> np.ndarray:
    """For each song the lowest number of a song in its cluster (int64 [songs]).

    A cluster is a song with its near-duplicates, their near-duplicates, and so on. Which songs form a cluster
    depends on their content alone, not on their numbers.

    Args:
        motifs: the motifs of all songs.
        digests: content digests, uint8 [songs, 16], all different.
    """
    songs = len(motifs)
    common = _common(motifs)
    counts = motifs.counts.copy()
    for hashes, of in motifs.slices():
        np.subtract.at(counts, of[_in(hashes, common)], 1)
    order = _similar_first(motifs, digests)
    rank = np.empty(songs, np.int64)
    rank[order] = np.arange(songs)

    joined = _Sets(songs)
    for hashes, of in motifs.slices():
        tells = ~_in(hashes, common) & (counts[of] >= MIN_MOTIFS)
        hashes, place = hashes[tells], rank[of[tells]]
        at = np.lexsort((place, hashes))
        for one, other in _neighbours(hashes[at], place[at], songs):
            one, other = int(order[one]), int(order[other])
            if joined.find(one) == joined.find(other):
                continue
            needed = SHARE * min(counts[one], counts[other]) + MARGIN
            if shared(motifs[one], motifs[other], common) >= needed:
                joined.join(one, other)
    return np.fromiter((joined.find(song) for song in range(songs)), np.int64, songs)


def shared(one: np.ndarray, other: np.ndarray, common: np.ndarray) -> int:
    """How many motifs two songs share, without those in `common` (all uint64, ascending)."""
    if len(one) > len(other):
        one, other = other, one
    both = one[_in(one, other)]
    return int(np.count_nonzero(~_in(both, common))) if len(both) else 0


def _in(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Which of `values` are in the sorted array `ascending` (bool)."""
    if not len(ascending):
        return np.zeros(len(values), bool)
    return ascending.take(ascending.searchsorted(values), mode="clip") == values


def _common(motifs: Motifs) -> np.ndarray:
    """The motifs that are in too many songs to count, ascending."""
    limit = max(COMMON, len(motifs) // 1000)
    found = [np.zeros(0, MOTIF_DTYPE)]
    for hashes, _ in motifs.slices():
        hashes.sort()
        # A motif that is there again `limit` places later is in more than `limit` songs.
        found.append(np.unique(hashes[limit:][hashes[limit:] == hashes[: max(len(hashes) - limit, 0)]]))
    return np.concatenate(found)


def _similar_first(motifs: Motifs, digests: np.ndarray) -> np.ndarray:
    """The songs (int64) in an order, by content alone, that often puts similar songs side by side.

    They are sorted by their two lowest hashes. The probability that two sets have the same lowest hash is the
    size of their intersection over that of their union (MinHash, Broder 1997).
    """
    lowest = np.zeros((2, len(motifs)), MOTIF_DTYPE)
    for song in range(len(motifs)):
        first = motifs[song][:2]
        lowest[: len(first), song] = first
    digest = np.ascontiguousarray(digests).view(MOTIF_DTYPE)
    return np.lexsort((digest[:, 1], digest[:, 0], lowest[1], lowest[0]))


def _neighbours(hashes: np.ndarray, place: np.ndarray, songs: int) -> Iterator[tuple[int, int]]:
    """Pairs of places, each once and ascending, of songs that are close together under one motif.

    Args:
        hashes, place: motif and place of the song in the order, sorted by motif, then place.
        songs: number of all songs.
    """
    pairs = [np.zeros(0, np.int64)]
    for step in range(1, NEIGHBOURS + 1):
        same = hashes[step:] == hashes[: max(len(hashes) - step, 0)]
        pairs.append(place[: len(same)][same] * songs + place[step:][same])
    for pair in np.unique(np.concatenate(pairs)):
        yield divmod(int(pair), songs)


class _Sets:
    """Disjoint sets of the numbers 0 .. count - 1, each represented by its lowest; 8 bytes a number."""

    def __init__(self, count: int):
        self._parent = array("q", range(count))

    def find(self, number: int) -> int:
        parent = self._parent
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.find(one), self.find(other)))
        self._parent[high] = low
