"""Augmentation: another key, velocity, tempo and order of the band for every sample, computed on token ids.

A change keeps the number of tokens, which packing reads from the index, and the canonical form: decoding and
encoding the changed ids gives the same ids. So for each change only values that fit the sample are drawn.

Documents lie back to back, as in `attributes.scan`, and those of a batch are changed in one call: NumPy calls
for every sample would double the time of the loader. For the same reason, work on every token is in uint16.
"""

from dataclasses import dataclass

import numpy as np

from ..tokens import attributes, vocab
from ..tokens.attributes import TokenAttributes
from ..tokens.vocab import BAND, BPM, CHORD, DRUMS, INST, MAX_BPM, MIN_BPM, P, T, V
from .splitmix import random_numbers

MAX_SEMITONES = 6  # up; one less down, since -6 and +6 give the same key
MAX_BINS = vocab.VELOCITY_BINS - 1
MAX_PERCENT = 50

_LABELS = len(CHORD) - 1  # chord labels without N
_FOR_BAND = 3  # index in a sample's random stream; the numbers before are for key, velocity and tempo


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


def augment(
    ids: np.ndarray, starts: np.ndarray, seeds: np.ndarray, settings: Augmentation
) -> tuple[np.ndarray, TokenAttributes]:
    """Documents with random changes, and the attributes of their tokens.

    Args:
        ids: token ids, uint16 [n], of whole songs or of samples as `Samples.read` gives them, back to back.
        starts: ascending indices at which the documents begin, int64 [D]; the first is 0.
        seeds: one for each document, uint64 [D], from `seeds_of_epoch`. The changes of a document depend only
            on its seed and ids.
        settings: how far documents may be changed.

    Returns:
        ids: uint16 [n]; documents begin at the same indices as before.
        scanned: `attributes.scan` of them.
    """
    ids = reorder_bands(ids, starts, seeds) if settings.band_order else ids.copy()
    scanned = attributes.scan(ids, starts)
    heads = np.flatnonzero((ids - np.uint16(CHORD.start)) < BPM.stop - CHORD.start)  # CHORD, TS, CUT, BPM
    for_key, for_velocity, for_tempo = _uniform(seeds, np.arange(_FOR_BAND)[:, None])
    if settings.transpose:
        _transpose(ids, starts, scanned.inst != DRUMS, heads, for_key, settings.transpose)
    if settings.velocity:
        _shift(ids, starts, V, True, for_velocity, settings.velocity, settings.velocity)
    if settings.tempo:
        _scale_tempo(ids, starts, heads, for_tempo, settings.tempo)
    return ids, scanned


def reorder_bands(ids: np.ndarray, starts: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """The documents with their band lists, and the groups of every bar, in random order.

    T, L and V reset in every group, so groups move unchanged. Arguments are as for `augment`.

    Returns:
        ids: uint16 [n].
    """
    at = np.flatnonzero(ids < T.start)
    head = ids[at]
    begins = np.searchsorted(at, starts)  # every document begins with BOS or BAND
    doc = np.repeat(np.arange(len(starts)), np.diff(begins, append=len(at)))

    listed = np.flatnonzero(BAND.mask(head))
    band_doc = doc[listed]
    first = np.searchsorted(band_doc, np.arange(len(starts)))
    within = np.arange(len(listed)) - first[band_doc]
    order = np.lexsort((random_numbers(seeds[band_doc], _FOR_BAND + within), band_doc))
    band_at, band = at[listed], head[listed][order]
    place = np.zeros(len(starts) * len(BAND), dtype=np.int64)
    place[band_doc * len(BAND) + band - BAND.start] = 1 + within

    # A document consists of its band list, bar headers, groups and EOS. `whole` marks the parts that keep
    # their place; the groups between two of these are sorted.
    is_group = INST.mask(head)
    whole = CHORD.mask(head) | (head == vocab.EOS)
    whole[begins] = True
    part = np.flatnonzero(whole | is_group)
    key = np.cumsum(whole[part], dtype=np.int64) * (1 + len(BAND))
    group = np.flatnonzero(is_group[part])
    of_group = part[group]
    key[group] += place[doc[of_group] * len(BAND) + head[of_group] - INST.start]
    order = np.argsort(key, kind="stable")  # fast for nearly sorted keys

    begin = at[part]
    length = np.diff(begin, append=len(ids))[order]
    moved = begin[order] - (np.cumsum(length) - length)
    index = np.repeat(moved, length)
    index += np.arange(len(ids))
    out = ids.take(index)
    out[band_at] = band
    return out


def _transpose(
    ids: np.ndarray,
    starts: np.ndarray,
    melodic: np.ndarray,
    heads: np.ndarray,
    random: np.ndarray,
    semitones: int,
) -> None:
    """Transpose each document except its drums, in place, by a shift that keeps its pitches in range.

    Args:
        melodic: which tokens are not of drums, bool [n].
        heads: ascending indices that include all CHORD tokens.
        random: a number in [0, 1) for each document, float64 [D].
    """
    shift = _shift(ids, starts, P, melodic, random, min(semitones, MAX_SEMITONES - 1), semitones)
    chords = heads[(ids[heads] > CHORD.start) & (ids[heads] < CHORD.stop)]  # without N
    label = ids[chords].astype(np.int64) - CHORD.start - 1
    label += np.repeat(shift, _counts(chords, starts)) * len(vocab.QUALITIES)
    ids[chords] = CHORD.start + 1 + label % _LABELS


def _shift(
    ids: np.ndarray,
    starts: np.ndarray,
    family: vocab.Family,
    among: np.ndarray | bool,
    random: np.ndarray,
    down: int,
    up: int,
) -> np.ndarray:
    """Add to a family's values in each document, in place, one number from `-down` to `up` that fits all.

    Args:
        among: which tokens may be shifted, bool [n], or True for all.
        random: as for `_transpose`.

    Returns:
        The shift of each document, int64 [D].
    """
    value = ids - np.uint16(family.start)  # modulo 2^16, so ids below the family become large, too
    chosen = (value < len(family)) & among
    top = len(family) - 1
    value *= chosen
    high = np.maximum.reduceat(value, starts).astype(np.int64)
    below_top = np.maximum.reduceat((top - value) * chosen, starts).astype(np.int64)
    shift = _pick(random, np.maximum(below_top - top, -down), np.minimum(top - high, up))
    ids += chosen * np.repeat(shift.astype(np.uint16), np.diff(starts, append=len(ids)))
    return shift


def _scale_tempo(
    ids: np.ndarray, starts: np.ndarray, heads: np.ndarray, random: np.ndarray, percent: int
) -> None:
    """Change all tempi of each document, in place, by one percentage, rounded to whole BPM, halves up.

    A tempo is written only where it changes. So a percentage is drawn that keeps neighbouring tempi different
    and all tempi in range.
    """
    at = heads[BPM.mask(ids[heads])]
    tempi = ids[at].astype(np.int64) - BPM.start + MIN_BPM
    first = np.searchsorted(at, starts)  # every document states its tempo
    counts = np.diff(first, append=len(at))
    percents = np.arange(-percent, percent + 1)
    scaled = (tempi * (100 + percents[:, None]) + 50) // 100  # [percents, tempi]; exact, being integers
    wrong = (scaled < MIN_BPM) | (scaled > MAX_BPM)
    repeats = scaled[:, 1:] == scaled[:, :-1]
    repeats[:, first[1:] - 1] = False  # neighbours in two documents
    wrong[:, 1:] |= repeats
    fits = ~np.logical_or.reduceat(wrong, first, axis=1)  # [percents, D]
    wanted = _pick(random, 0, fits.sum(axis=0) - 1)  # 0 percent always fits
    row = (np.cumsum(fits, axis=0) > wanted).argmax(axis=0)
    ids[at] = scaled[np.repeat(row, counts), np.arange(len(at))] - MIN_BPM + BPM.start


def _counts(at: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """How many of the ascending indices `at` lie in each document, int64 [D]."""
    return np.diff(np.searchsorted(at, starts), append=len(at))


def _pick(random: np.ndarray, low: np.ndarray | int, high: np.ndarray) -> np.ndarray:
    """For each of `random`, in [0, 1), a whole number from low to high, both included; int64."""
    return low + (random * (high - low + 1)).astype(np.int64)


def _uniform(seeds: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The random numbers in [0, 1) at indices `place` of each seed's stream, float64; both broadcast."""
    return (random_numbers(seeds, place) >> np.uint64(11)) * 2.0**-53
