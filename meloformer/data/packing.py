"""Packing: songs -> samples -> the rows of an epoch.

A sample is a song, or consecutive whole bars of a song that is too long for one row. A row is a sequence of
whole samples, at most `max_seq_len` tokens in all.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..tokens import attributes, vocab
from .shards import ShardSet

# Version of the packing: raise it when the rows of an epoch, or the random changes of its samples, become
# others, so that no run resumes with these.
PACKING = 4
_BIT_GENERATOR = np.random.PCG64  # explicit, since NumPy's default may change
_MAX_HEADER = 4  # CHORD, TS, CUT, BPM; the band list before them is read from the song
_OPEN_ROWS = 256
_WINDOW = 512  # samples sorted by length at a time: the rows they open stay open until they are full
_LENGTHS = 64  # classes of length that the sort distinguishes; within a class the order is random


@dataclass(frozen=True)
class Samples:
    """The samples of a split, as arrays of S entries.

    song: int64, number of the song in the ShardSet.
    start, stop: int64, its range of tokens.
    header: uint16 [S, 4], tokens put before the range (CHORD, TS, [CUT], BPM restated), then PAD.
    band: int64, how many BAND tokens of the song are put before the header; 0 if the sample begins the song.
    length: int64, tokens including band and header.
    bars: int64.
    skipped_songs: songs left out because they have more than `max_bars` bars.
    skipped_bars: bars left out because they are longer than a row.
    """

    song: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    header: np.ndarray
    band: np.ndarray
    length: np.ndarray
    bars: np.ndarray
    skipped_songs: int
    skipped_bars: int

    def __len__(self) -> int:
        return len(self.song)

    def read(self, shards: ShardSet, sample: int) -> np.ndarray:
        """Token ids of a sample, uint16 [length]."""
        header, song = self.header[sample], shards[int(self.song[sample])]
        band = song[1 : 1 + self.band[sample]]  # behind BOS
        body = song[self.start[sample] : self.stop[sample]]
        return np.concatenate((band, header[header != vocab.PAD], body))


class _Piece(NamedTuple):
    start: int
    stop: int
    header: np.ndarray  # without the band list
    band: int
    bars: int


def _cut(ids: np.ndarray, max_tokens: int) -> tuple[list[_Piece], int]:
    """Cut a song at bar lines, greedily, into pieces of at most `max_tokens` tokens with their header.

    Returns the pieces and the number of bars that are longer than `max_tokens`, which are left out.
    """
    bar_starts = attributes.cut_points(ids)
    bounds = np.concatenate(([0], bar_starts[1:], [len(ids)]))  # BOS goes with the first bar, EOS the last
    chords = np.concatenate(([0], np.cumsum(vocab.CHORD.mask(ids))))
    band = len(attributes.band_tokens(ids))
    pieces, skipped, first = [], 0, 0
    while first < len(bar_starts):
        header, skip = attributes.restated(ids, bounds[first]) if first else (np.empty(0, np.uint16), 0)
        start = int(bounds[first]) + skip
        last = int(np.searchsorted(bounds, start + max_tokens - len(header), side="right")) - 1
        if last <= first:
            skipped += 1
            first += 1
            continue
        stop = int(bounds[last])
        restated_band = band if first else 0
        bars = int(chords[stop] - chords[bounds[first]])
        pieces.append(_Piece(start, stop, header[restated_band:], restated_band, bars))
        first = last
    return pieces, skipped


def find_samples(
    shards: ShardSet,
    songs: np.ndarray,
    *,
    max_seq_len: int,
    max_bars: int,
    max_samples: int | None = None,
    seed: int = 0,
) -> Samples:
    """The samples of `songs` (int64, numbers in `shards`), ordered by song and position.

    With `max_samples`, a random subset of that size, drawn by `seed`.
    """
    fitting = songs[shards.bars[songs] <= max_bars]
    whole = shards.lengths[fitting] <= max_seq_len
    pieces, skipped_bars = [], 0
    for song in fitting[~whole].tolist():
        cut, skipped = _cut(shards[song], max_seq_len)
        pieces += [(song, piece) for piece in cut]
        skipped_bars += skipped

    header = np.full((len(pieces), _MAX_HEADER), vocab.PAD, np.uint16)
    for tokens, (_, piece) in zip(header, pieces):
        tokens[: len(piece.header)] = piece.header

    def join(whole_songs: np.ndarray, cut_songs: list) -> np.ndarray:
        return np.concatenate((whole_songs, np.array(cut_songs, np.int64)))

    fitting = fitting[whole]
    zeros = np.zeros(len(fitting), np.int64)
    song = join(fitting, [song for song, _ in pieces])
    start = join(zeros, [piece.start for _, piece in pieces])
    stop = join(shards.lengths[fitting], [piece.stop for _, piece in pieces])
    bars = join(shards.bars[fitting], [piece.bars for _, piece in pieces])
    band = join(zeros, [piece.band for _, piece in pieces])
    header = np.concatenate((np.full((len(fitting), _MAX_HEADER), vocab.PAD, np.uint16), header))

    kept = np.lexsort((start, song))
    if max_samples is not None:
        drawn = np.random.Generator(_BIT_GENERATOR(seed)).permutation(len(kept))[:max_samples]
        kept = kept[np.sort(drawn)]
    length = stop - start + band + np.count_nonzero(header != vocab.PAD, axis=1)
    return Samples(
        *(column[kept] for column in (song, start, stop, header, band, length, bars)),
        skipped_songs=len(songs) - int(np.count_nonzero(shards.bars[songs] <= max_bars)),
        skipped_bars=skipped_bars,
    )


def pack(lengths: np.ndarray, bars: np.ndarray, max_tokens: int, max_bars: int) -> np.ndarray:
    """Best-fit packing in the given order: the row number of each sample, int64 [S], from 0.

    Each row holds at most `max_tokens` tokens and `max_bars` bars. A sample goes to the fullest of 256 open
    rows that has room for it, else to a new row, for which the fullest is closed; so the time is linear in
    the number of samples. No sample may exceed either limit by itself.
    """
    tokens_left = np.zeros(_OPEN_ROWS, np.int64)
    bars_left = np.zeros(_OPEN_ROWS, np.int64)
    row = np.zeros(_OPEN_ROWS, np.int64)
    out = np.empty(len(lengths), np.int64)
    rows = 0
    for sample, (length, sample_bars) in enumerate(zip(lengths.tolist(), bars.tolist())):
        fits = (tokens_left >= length) & (bars_left >= sample_bars)
        slot = np.where(fits, tokens_left, max_tokens + 1).argmin()
        if not fits[slot]:
            slot = tokens_left.argmin()
            tokens_left[slot], bars_left[slot], row[slot] = max_tokens, max_bars, rows
            rows += 1
        tokens_left[slot] -= length
        bars_left[slot] -= sample_bars
        out[sample] = row[slot]
    return out


def rows_of_epoch(samples: Samples, seed: list[int], max_tokens: int, max_bars: int) -> list[np.ndarray]:
    """The rows of an epoch, in random order: for each the numbers of its samples (int64), in sequence.

    Samples are shuffled, then sorted by decreasing length within windows of `_WINDOW`, which fills rows
    better than the random order.
    """
    generator = np.random.Generator(_BIT_GENERATOR(seed))
    order = generator.permutation(len(samples))
    length_class = -(samples.length[order] * _LENGTHS // max_tokens)
    order = order[np.lexsort((length_class, np.arange(len(order)) // _WINDOW))]  # stable
    row = pack(samples.length[order], samples.bars[order], max_tokens, max_bars)
    if not len(row):
        return []
    ends = np.cumsum(np.bincount(row))[:-1]
    rows = np.split(order[np.argsort(row, kind="stable")], ends)
    return [rows[i] for i in generator.permutation(len(rows))]
