"""One chord label per bar: chord templates on weighted pitch classes, smoothed over the bars of the song.

A song and its decoded tokens must get the same labels, so labels are computed from quantised notes and with
integers only. Transposing a song must transpose every label and change nothing else, so roots are
counted from the bass of the bar, and ties are broken in that order.
"""

import numpy as np

from . import vocab

_QUALITIES = tuple(vocab.QUALITIES.values())
_N_QUALITIES = len(_QUALITIES)
_TEMPLATES = np.zeros((12 * _N_QUALITIES, 12), dtype=np.int64)  # [labels, 12], roots counted from the bass
for _i in range(len(_TEMPLATES)):
    _root, _quality = divmod(_i, _N_QUALITIES)
    _TEMPLATES[_i, [(_root + tone) % 12 for tone in _QUALITIES[_quality]]] = 1

# Weight of a note by its onset: on a quarter note or in an earlier bar; elsewhere.
_ON_QUARTER, _OFF_BEAT = 3, 2
# Low notes carry the harmony; high ones are often melody, which may leave it. So the weight of notes less
# than _LOW_SEMITONES above the bass is multiplied by _LOW.
_LOW_SEMITONES, _LOW = 24, 2

# A pitch class counts as missing if its weight is below the bar's weight divided by this.
_MISSING_PART = 16
# All bonuses and costs are in 64ths of the bar's weight.
_UNIT = 64
_MISSING_COST = 10  # for each tone of the chord that is missing
_BASS_BONUS = 18  # the root is the bass
_BASS_TONE_BONUS = 4  # the bass is another tone of the chord
_CHANGE_COST = 12  # the label differs from that of the bar before
# The rarer a quality, the better it must fit. Chosen as docs/tokens.md says.
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
        start, length, pitch: notes [n] without drums, int64; start and length in steps, MIDI pitch.
        bar_start: first step of each bar [bars], ascending from 0; the last bar has no end.

    Returns:
        weights: int64 [bars, 12], the sum over notes of their sounding steps times the weights of their onset
            and of their height above the bass.
        bass: int64 [bars], pitch class of the lowest note that sounds in the first quarter of the bar, or in
            the whole bar if that quarter is silent; 0 for a silent bar.
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

    The score of a label says how well it fits the notes and the bass of its bar, less a cost for rare
    qualities. Of all sequences of labels the one with the highest sum of scores, less a cost for each change
    of label, is found by the Viterbi algorithm. A silent bar is N. A bar of a single pitch class is N, too,
    unless keeping the chord of its neighbours scores higher.

    Arguments as in `pitch_class_weights`.
    """
    weights, bass = pitch_class_weights(start, length, pitch, bar_start)
    weights = weights[np.arange(len(weights))[:, None], (bass[:, None] + np.arange(12)) % 12]
    return _best_path(_scores(weights), bass)


def _scores(weights: np.ndarray) -> np.ndarray:
    """Score of each label in each bar, int64 [bars, 1 + labels]: N, then roots counted from the bass.

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
    """The labels, int64 [bars], with the highest sum of scores less the costs of changes.

    Args:
        score: int64 [bars, 1 + labels], from `_scores`.
        bass: int64 [bars], pitch classes.

    Of equally good sequences one that keeps its label is preferred, then the lowest root above the bass.
    """
    bars, states = score.shape
    # The same chord has another index in the bar before, where roots are counted from another bass.
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
