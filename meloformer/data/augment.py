"""Augmentation: another key, velocity, tempo and order of the band for every sample, computed on token ids.

A change keeps the number of tokens, which packing reads from the index, and the canonical form: decoding and
encoding the changed ids gives the same ids. So for each change only values that fit the sample are drawn.

Documents lie back to back, as in `attributes.scan`, and those of a batch are changed in one call: NumPy calls
for every sample would double the time of the loader. For the same reason, which values fit is found once per
sample (`find_room`), and most work is on runs of tokens instead of tokens: what structural tokens become is
looked up in one table, and only notes are changed token by token, in small integer types.
"""

import functools
from dataclasses import dataclass

import numpy as np

from ..tokens import attributes, vocab
from ..tokens.attributes import KIND_P, KIND_V, Runs, TokenAttributes, lengths, starts_of
from ..tokens.vocab import BAND, BPM, CHORD, DRUMS, EOS, INST, MAX_BPM, MIN_BPM, VOCAB_SIZE, P, V
from .splitmix import splitmix64

MAX_SEMITONES = 6  # up; one less down, since -6 and +6 give the same key
MAX_BINS = vocab.VELOCITY_BINS - 1
MAX_PERCENT = 50

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
    scaled = _scaled(ids[at].astype(np.int64) - BPM.start + MIN_BPM, np.arange(-most, most + 1))
    wrong = (scaled < MIN_BPM) | (scaled > MAX_BPM)
    repeats = scaled[:, 1:] == scaled[:, :-1]
    repeats[:, first[1:] - 1] = False  # neighbours in two documents
    wrong[:, 1:] |= repeats
    return ~np.logical_or.reduceat(wrong, first, axis=1).T


@functools.cache
def _becomes(tempo: int) -> np.ndarray:
    """What each token becomes by a change of key and of tempo; uint16 [12, 2 * tempo + 1, VOCAB_SIZE].

    The key by semitones up, the tempo by percent from 0 on; a negative percent counts from the end. Tempi are
    rounded to whole BPM, halves up; those out of range are not used. Notes stay.
    """
    table = np.empty((12, 2 * tempo + 1, VOCAB_SIZE), np.uint16)
    table[:] = np.arange(VOCAB_SIZE)
    labels = np.arange(len(CHORD) - 1)  # without N
    turned = (labels + len(vocab.QUALITIES) * np.arange(12)[:, None]) % len(labels)
    table[:, :, CHORD.start + 1 : CHORD.stop] = (CHORD.start + 1 + turned)[:, None]
    percents = np.append(np.arange(tempo + 1), np.arange(-tempo, 0))
    table[:, :, BPM.start : BPM.stop] = (
        BPM.start - MIN_BPM + _scaled(np.arange(MIN_BPM, MAX_BPM + 1), percents)
    )
    return table


def _scaled(bpm: np.ndarray, percents: np.ndarray) -> np.ndarray:
    """Tempi (int64 [n]) faster by percents (int64 [m]), in whole BPM, halves rounded up; int64 [m, n]."""
    return (bpm * (100 + percents[:, None]) + 50) // 100


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
    percent = room["percents"][np.arange(len(starts)), drawn[:, 2]]

    # Structural tokens are few: a table says what each becomes in each document.
    runs = attributes.find_runs(ids, starts)
    cell = np.repeat(np.arange(0, len(starts) * VOCAB_SIZE, VOCAB_SIZE), lengths(runs.first, len(runs.token)))
    cell += runs.token
    token = _becomes(settings.tempo)[key % 12, percent].take(cell)
    if settings.band_order:
        order = _order_of_bands(runs, 1 + (random[:, _FOR_BAND:] >> np.uint64(17)), cell)
        old, length = runs.begin.take(order), runs.length.take(order)
        runs = runs._replace(token=token.take(order), begin=starts_of(length), length=length)
        out = _gather(ids, old, runs)
    else:
        out, runs = ids.copy(), runs._replace(token=token)
    out[runs.begin] = runs.token

    # Notes change by arithmetic, which takes less time than to look up every token.
    kind = attributes.kinds(out)
    scanned = attributes.scan(out, starts, runs, kind)
    shift = _by_document(kind == KIND_V, starts, velocity)
    if settings.transpose:
        shift += _by_document((kind == KIND_P) & (scanned.inst != DRUMS), starts, key)
    signed = out.view(np.int16)
    signed += shift
    return out, scanned


def _by_document(chosen: np.ndarray, starts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` (one for each document, from -128 to 127) where `chosen` (bool [n]), 0 elsewhere; int8 [n]."""
    out = np.empty(len(chosen), np.int8)
    bounds = [*starts.tolist(), len(chosen)]
    for start, stop, value in zip(bounds, bounds[1:], values.tolist()):
        out[start:stop] = value
    out *= chosen.view(np.int8)
    return out


def _order_of_bands(runs: Runs, at_random: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """In which order the runs stand if the band list and the groups of every bar take another; int64 [R].

    T, L and V reset in every group, so groups move unchanged.

    Args:
        at_random: by which instruments are sorted, from 1 to 2^15; uint64 [D, instruments]. Those with the
            same number stay in order.
        cell: number of the document times VOCAB_SIZE, plus the token, of every run; int64 [R].
    """
    place = np.zeros((len(at_random), VOCAB_SIZE), np.uint16)  # headers come first, EOS last
    place[:, BAND.start : BAND.stop] = place[:, INST.start : INST.stop] = at_random
    place[:, EOS] = 0xFFFF
    # By part, then by place. Parts are in order already, so a stable sort moves little.
    key = place.take(cell).astype(np.int64)
    key += np.repeat(np.arange(0, len(runs.part) << 16, 1 << 16), lengths(runs.part, len(key)))
    return key.argsort(kind="stable")


@functools.lru_cache(maxsize=1)
def _numbers(bits: int) -> np.ndarray:
    """The numbers below 2^bits, int64: kept, since making them takes as long as using them."""
    numbers = np.arange(1 << bits)
    numbers.flags.writeable = False
    return numbers


def _gather(ids: np.ndarray, old: np.ndarray, runs: Runs) -> np.ndarray:
    """The tokens of `runs`, each read from `old` (int64 [R]) on in `ids`; uint16 [n]."""
    back = old - runs.begin
    if not back.any():  # a piano alone, for one
        return ids.copy()
    index = np.repeat(back, runs.length)
    index += _numbers(len(ids).bit_length())[: len(ids)]
    return ids.take(index)
