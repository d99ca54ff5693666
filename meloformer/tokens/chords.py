"""One chord label per bar: chord templates on weighted pitch classes, smoothed over the bars of the song.

The label must be the same for a song and for its decoded tokens, so it is found on quantised notes and in
integers only. It must not depend on the key: transposing a song transposes every label. So roots are counted
from the bass of the bar, and ties broken in that order.
"""

import numpy as np

from . import vocab

_QUALITIES = tuple(vocab.QUALITIES.values())
_N_QUALITIES = len(_QUALITIES)
_TEMPLATES = np.zeros((12 * _N_QUALITIES, 12), dtype=np.int64)  # [labels, 12], roots counted from the bass
for _i in range(len(_TEMPLATES)):
    _root, _quality = divmod(_i, _N_QUALITIES)
    _TEMPLATES[_i, [(_root + tone) % 12 for tone in _QUALITIES[_quality]]] = 1

# How much a note counts by where it begins: on a quarter note or in a bar before, elsewhere.
_ON_QUARTER, _OFF_BEAT = 3, 2
# Low notes make the harmony, high ones the melody, which strays from it: notes of less than so many semitones
# over the bass count so many times.
_LOW_SEMITONES, _LOW = 24, 2

# A pitch class of less than this part of the bar's weight counts as missing.
_MISSING_PART = 16
# All of the following are in 64ths of the bar's weight.
_UNIT = 64
_MISSING_COST = 10  # for each tone of the chord that is missing
_BASS_BONUS = 18  # the root is the bass
_BASS_TONE_BONUS = 4  # the bass is another tone of the chord
_CHANGE_COST = 12  # the label differs from that of the bar before
# The rarer, the more a quality must explain; in the order of `vocab.QUALITIES`.
_QUALITY_COSTS = {
    "maj": 0,
    "min": 2,
    "dim": 8,
    "aug": 14,
    "sus2": 12,
    "sus4": 12,
    "5": 9,
    "6": 24,
    "7": 12,
    "maj7": 12,
    "min7": 14,
    "hdim7": 20,
    "dim7": 20,
}
_QUALITY_COST = np.array([_QUALITY_COSTS[name] for name in vocab.QUALITIES], dtype=np.int64)
_NEVER = -(10**6)


def pitch_class_weights(
    start: np.ndarray, length: np.ndarray, pitch: np.ndarray, bar_start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weight of each pitch class in each bar, and the pitch class of the bar's bass.

    Args:
        start, length, pitch: notes [n], steps and MIDI pitch; drums left out.
        bar_start: first step of each bar [bars], ascending from 0; the last bar has no end.

    Returns:
        weights: int64 [bars, 12], sounding steps times the weight of the place where the note begins and that
            of its height over the bass.
        bass: int64 [bars], pitch class of the lowest note that sounds in the first quarter of the bar, of the
            whole bar if that quarter is silent; 0 in a silent bar.
    """
    bars = len(bar_start)
    first = np.searchsorted(bar_start, start, side="right") - 1
    last = np.searchsorted(bar_start, start + length, side="left") - 1
    spans = last - first + 1
    note = np.repeat(np.arange(len(start)), spans)
    bar = first[note] + np.arange(len(note)) - np.repeat(np.cumsum(spans) - spans, spans)
    bar_end = np.append(bar_start[1:], np.iinfo(np.int64).max)
    end = start + length
    sounding = np.minimum(end[note], bar_end[bar]) - np.maximum(start[note], bar_start[bar])
    onset = start[note] - bar_start[bar]

    early = onset < vocab.STEPS_PER_QUARTER
    lowest = np.full(bars, 256, dtype=np.int64)
    np.minimum.at(lowest, bar, pitch[note] + np.where(early, 0, 128))
    bass = lowest % 128

    on_quarter = (onset < 0) | (onset % vocab.STEPS_PER_QUARTER == 0)
    weight = np.where(on_quarter, _ON_QUARTER, _OFF_BEAT)
    weight *= np.where(pitch[note] - bass[bar] < _LOW_SEMITONES, _LOW, 1)
    weights = np.zeros(bars * 12, dtype=np.int64)
    np.add.at(weights, bar * 12 + pitch[note] % 12, sounding * weight)
    return weights.reshape(bars, 12), np.where(lowest < 256, bass % 12, 0)


def label_bars(start: np.ndarray, length: np.ndarray, pitch: np.ndarray, bar_start: np.ndarray) -> np.ndarray:
    """Index of the CHORD label of each bar, int64 [bars]: 0 is N.

    A label scores by how it fits the notes and the bass of its bar, less a cost for rare qualities and one
    for each change of label: of all sequences of labels the best is taken (Viterbi).
    A silent bar is N. So is a bar of a single pitch class, unless it goes on with the chord around it.

    Arguments as in `pitch_class_weights`.
    """
    weights, bass = pitch_class_weights(start, length, pitch, bar_start)
    weights = weights[np.arange(len(weights))[:, None], (bass[:, None] + np.arange(12)) % 12]
    return _best_path(_scores(weights), bass)


def _scores(weights: np.ndarray) -> np.ndarray:
    """How well each label fits each bar, int64 [bars, 1 + labels]: N, then roots counted from the bass.

    Args:
        weights: int64 [bars, 12], counted from the bass.
    """
    total = weights.sum(axis=1, keepdims=True)  # [bars, 1]
    inside = weights @ _TEMPLATES.T  # [bars, labels]
    missing = (weights * _MISSING_PART < total).astype(np.int64) @ _TEMPLATES.T
    fit = _UNIT * (2 * inside - total) // np.maximum(total, 1) - _MISSING_COST * missing
    fit -= np.tile(_QUALITY_COST, 12)
    fit[:, :_N_QUALITIES] += _BASS_BONUS
    fit[:, _N_QUALITIES:] += _BASS_TONE_BONUS * _TEMPLATES[_N_QUALITIES:, 0]
    classes = (weights > 0).sum(axis=1)
    none = np.where(classes < 2, fit.max(axis=1) + 1, _NEVER)
    fit[classes == 0] = _NEVER
    return np.concatenate((none[:, None], fit), axis=1)


def _best_path(score: np.ndarray, bass: np.ndarray) -> np.ndarray:
    """The sequence of labels of the highest sum of scores and costs of change, int64 [bars].

    Args:
        score: int64 [bars, 1 + labels], as of `_scores`.
        bass: int64 [bars].

    Of equal ones a label that stays is taken, then the one of the lowest root above the bass.
    """
    bars, states = score.shape
    # Where the labels of a bar stand in the bar before: its roots are counted from another bass.
    shift = (np.diff(bass) % 12) * _N_QUALITIES
    come_from = np.zeros((bars, states), dtype=np.int64)
    total = score[0].copy()
    for bar in range(1, bars):
        best = int(total.argmax())
        stay = np.concatenate(([0], 1 + (np.arange(states - 1) + shift[bar - 1]) % (states - 1)))
        changed = total[best] - _CHANGE_COST
        stays = total[stay] >= changed
        come_from[bar] = np.where(stays, stay, best)
        total = np.where(stays, total[stay], changed) + score[bar]
    path = np.zeros(bars, dtype=np.int64)
    path[-1] = total.argmax()
    for bar in range(bars - 1, 0, -1):
        path[bar - 1] = come_from[bar, path[bar]]
    root, quality = np.divmod(path - 1, _N_QUALITIES)
    return np.where(path == 0, 0, 1 + (root + bass) % 12 * _N_QUALITIES + quality)
