"""Augmentation: another key, velocity, tempo and order of the band for every sample, computed on token ids.

A change keeps the number of tokens, which packing reads from the index, and the canonical form: decoding and
encoding the changed ids gives the same ids. So for each change only values that fit the sample are drawn.

Documents lie back to back, as in `attributes.scan`, and those of a batch are changed in one call: NumPy calls
for every sample would double the time of the loader. For the same reason, which values fit is found once per
sample (`find_room`), most work is on runs of tokens instead of tokens, and the rest in small integer types.
"""

from dataclasses import dataclass

import numpy as np

from ..tokens import attributes, vocab
from ..tokens.attributes import KIND_P, KIND_V, Runs, TokenAttributes, lengths
from ..tokens.vocab import BAND, BPM, CHORD, DRUMS, EOS, INST, MAX_BPM, MIN_BPM, VOCAB_SIZE, P, V
from .splitmix import splitmix64

MAX_SEMITONES = 6  # up; one less down, since -6 and +6 give the same key
MAX_BINS = vocab.VELOCITY_BINS - 1
MAX_PERCENT = 50

_IDS = np.arange(VOCAB_SIZE, dtype=np.uint16)
_LABELS = len(CHORD) - 1  # chord labels without N
# The CHORD tokens but N by semitones up, 0 to 11; a negative number, which counts from the end, turns down.
_TURNED = np.arange(_LABELS) + len(vocab.QUALITIES) * np.arange(12)[:, None]
_TURNED = (CHORD.start + 1 + _TURNED % _LABELS).astype(np.uint16)
# All tempi in BPM by percent (again from the end, if slower), halves rounded up, and their tokens.
_PERCENTS = np.append(np.arange(MAX_PERCENT + 1), np.arange(-MAX_PERCENT, 0))[:, None]
_SCALED = (np.arange(MIN_BPM, MAX_BPM + 1) * (100 + _PERCENTS) + 50) // 100
_TEMPI = (BPM.start - MIN_BPM + _SCALED).astype(np.uint16)

_FOR_BAND = 3  # index in a sample's random numbers; those before are for key, velocity and tempo
# The random numbers of a sample are the upper halves of its seed times these: a lattice, evenly spread.
_MULTIPLIERS = splitmix64(np.arange(_FOR_BAND + len(BAND), dtype=np.uint64)) | np.uint64(1)
_HALF = np.uint64(32)


@dataclass(frozen=True)
class Augmentation:
    """How far samples may be changed; 0 and False leave them as they are.

    transpose: semitones up or down, 0 to `MAX_SEMITONES`; 6 reaches every key, by -5 to +6.
    velocity: velocity bins up or down, 0 to `MAX_BINS`.
    tempo: percent faster or slower, 0 to `MAX_PERCENT`.
    band_order: whether to list the band, and order the groups of every bar, at random.
    """

    transpose: int
    velocity: int
    tempo: int
    band_order: bool

    def __post_init__(self):
        limits = {"transpose": MAX_SEMITONES, "velocity": MAX_BINS, "tempo": MAX_PERCENT}
        for name, limit in limits.items():
            if not 0 <= getattr(self, name) <= limit:
                raise ValueError(f"{name} must be from 0 to {limit}, got {getattr(self, name)}")


OFF = Augmentation(transpose=0, velocity=0, tempo=0, band_order=False)


def seeds_of_epoch(seed: int, epoch: int, samples: int) -> np.ndarray:
    """A random seed for each sample, uint64 [samples], for its changes in this epoch."""
    # With the third number the stream differs from that of `packing.rows_of_epoch`.
    return np.random.PCG64([seed, epoch, 1]).random_raw(samples)


def room_dtype(settings: Augmentation) -> np.dtype:
    """What is kept of a sample to know which changes fit it: 5 bytes, and one for each percent of tempo.

    low: int8 [2], the least shift of key and of velocity.
    count: uint8 [3], the number of shifts of key and of velocity from there on, and of percents.
    percents: int8 [2 * tempo + 1], first the `count` percents that fit.
    """
    percents = 2 * settings.tempo + 1
    return np.dtype([("low", np.int8, (2,)), ("count", np.uint8, (3,)), ("percents", np.int8, (percents,))])


def find_room(
    ids: np.ndarray, starts: np.ndarray, scanned: TokenAttributes, settings: Augmentation
) -> np.ndarray:
    """Which changes fit each of the documents; `room_dtype` [D].

    Args:
        ids, starts, settings: as for `augment`.
        scanned: `attributes.scan` of the documents.
    """
    melodic = (scanned.kind == KIND_P) & (scanned.inst != DRUMS)
    up = settings.transpose
    key = _shifts(ids, starts, P, melodic, min(up, MAX_SEMITONES - 1), up)
    up = settings.velocity
    velocity = _shifts(ids, starts, V, scanned.kind == KIND_V, up, up)
    fits = _percents_that_fit(ids, starts, settings.tempo)
    room = np.empty(len(starts), room_dtype(settings))
    room["low"] = np.stack((key[0], velocity[0]), axis=1)
    room["count"] = np.stack((key[1], velocity[1], fits.sum(axis=1)), axis=1)
    room["percents"] = np.argsort(~fits, axis=1, kind="stable") - settings.tempo
    return room


def _shifts(
    ids: np.ndarray, starts: np.ndarray, family: vocab.Family, chosen: np.ndarray, down: int, up: int
) -> tuple[np.ndarray, np.ndarray]:
    """The shifts, from `-down` to `up`, that keep a family's values in range: the least, and how many.

    Args:
        chosen: which tokens, all of the family, are to be shifted; bool [n].

    Returns:
        For each document, int64 [D] both; all of `-down` to `up` if none of its tokens are chosen.
    """
    top = len(family) - 1
    value = (ids - np.uint16(family.start)).astype(np.uint8)
    highest = np.maximum.reduceat(value * chosen.view(np.uint8), starts).astype(np.int64)
    below_top = np.maximum.reduceat((top - value) * chosen.view(np.uint8), starts).astype(np.int64)
    low = np.maximum(below_top - top, -down)
    return low, np.minimum(top - highest, up) - low + 1


def _percents_that_fit(ids: np.ndarray, starts: np.ndarray, most: int) -> np.ndarray:
    """Which of the percents from `-most` to `most` fit the tempi of each document; bool [D, percents].

    A tempo is written only where it changes. So a percentage fits if it keeps neighbouring tempi different
    and all tempi in range.
    """
    at = np.flatnonzero(BPM.mask(ids))
    first = np.searchsorted(at, starts)  # every document states its tempo
    scaled = _SCALED[np.arange(-most, most + 1)[:, None], ids[at] - BPM.start]  # [percents, tempi]
    wrong = (scaled < MIN_BPM) | (scaled > MAX_BPM)
    repeats = scaled[:, 1:] == scaled[:, :-1]
    repeats[:, first[1:] - 1] = False  # neighbours in two documents
    wrong[:, 1:] |= repeats
    return ~np.logical_or.reduceat(wrong, first, axis=1).T


def augment(
    ids: np.ndarray, starts: np.ndarray, seeds: np.ndarray, room: np.ndarray, settings: Augmentation
) -> tuple[np.ndarray, TokenAttributes]:
    """Documents with random changes, and the attributes of their tokens.

    Args:
        ids: token ids, uint16 [n], of whole songs or of samples as `Samples.read` gives them, back to back.
        starts: ascending indices at which the documents begin, int64 [D]; the first is 0.
        seeds: one for each document, uint64 [D], from `seeds_of_epoch`. The changes of a document depend only
            on its seed and ids.
        room: `find_room` of the documents, [D].
        settings: how far documents may be changed; those that `room` was found for.

    Returns:
        ids: uint16 [n]; documents begin at the same indices as before.
        scanned: `attributes.scan` of them.
    """
    random = seeds[:, None] * _MULTIPLIERS >> _HALF
    drawn = (random[:, :_FOR_BAND] * room["count"] >> _HALF).astype(np.int64)  # below the count
    key, velocity = (drawn[:, :2] + room["low"]).T

    # Structural tokens are few: a table says what each becomes in each document. Notes follow below.
    runs = attributes.find_runs(ids, starts)
    cell = np.repeat(np.arange(0, len(starts) * VOCAB_SIZE, VOCAB_SIZE), lengths(runs.first, len(runs.token)))
    cell += runs.token
    becomes = np.empty((len(starts), VOCAB_SIZE), np.uint16)
    becomes[:] = _IDS
    if settings.transpose:
        becomes[:, CHORD.start + 1 : CHORD.stop] = _TURNED[key]
    if settings.tempo:
        becomes[:, BPM.start : BPM.stop] = _TEMPI[room["percents"][np.arange(len(starts)), drawn[:, 2]]]
    runs = runs._replace(token=becomes.take(cell))
    if settings.band_order:
        place = np.zeros(becomes.shape, np.uint16)
        # From 1 on, since headers have 0; EOS comes after all.
        at_random = 1 + (random[:, _FOR_BAND:] >> np.uint64(17))
        place[:, BAND.start : BAND.stop] = place[:, INST.start : INST.stop] = at_random
        place[:, EOS] = 0xFFFF
        ids, runs = _reorder_bands(ids, runs, place.take(cell))
    else:
        ids = ids.copy()
    ids[runs.begin] = runs.token

    scanned = attributes.scan(ids, starts, runs)
    shift = np.zeros(len(ids), np.int8)
    if settings.transpose:
        shift += _by_document((scanned.kind == KIND_P) & (scanned.inst != DRUMS), starts, key)
    if settings.velocity:
        shift += _by_document(scanned.kind == KIND_V, starts, velocity)
    signed = ids.view(np.int16)
    signed += shift
    return ids, scanned


def _by_document(chosen: np.ndarray, starts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` (one for each document, from -128 to 127) where `chosen` (bool [n]), 0 elsewhere; int8 [n]."""
    out = np.empty(len(chosen), np.int8)
    bounds = [*starts.tolist(), len(chosen)]
    for start, stop, value in zip(bounds, bounds[1:], values.tolist()):
        out[start:stop] = value
    out *= chosen.view(np.int8)
    return out


def _reorder_bands(ids: np.ndarray, runs: Runs, place: np.ndarray) -> tuple[np.ndarray, Runs]:
    """The documents with the band list, and the groups of every bar, in another order.

    T, L and V reset in every group, so groups move unchanged.

    Args:
        place: uint16 [R], by which the runs of every part are sorted: 0 of headers, the most of EOS, between
            these that of the instrument. Runs with the same place stay in order.

    Returns:
        ids: uint16 [n].
        runs: of these.
    """
    # Each key is different, for it ends in the number of the run; sorting is much faster than `argsort`.
    key = np.repeat(np.arange(len(runs.part)), lengths(runs.part, len(runs.token))) << 40
    key |= place.astype(np.int64) << 24
    key |= np.arange(len(key))
    key.sort()
    order = key & 0xFFFFFF
    if (order[1:] > order[:-1]).all():  # a piano alone, for one
        return ids.copy(), runs
    old, length = runs.begin[order], runs.length[order]
    begin = np.cumsum(length) - length
    index = np.repeat(old - begin, length)
    index += np.arange(len(ids))
    return ids.take(index), runs._replace(token=runs.token[order], begin=begin, length=length)
