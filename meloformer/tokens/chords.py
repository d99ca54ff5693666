"""One chord label per bar, by matching duration-weighted pitch classes against templates.

The label must be the same for a song and for its decoded tokens, so it is found on quantised notes
and in integers only.
"""

import numpy as np

from . import vocab

_QUALITIES = tuple(vocab.QUALITIES.values())
_ROOTS = np.repeat(np.arange(12), len(_QUALITIES))
_TEMPLATES = np.zeros((12 * len(_QUALITIES), 12), dtype=np.int64)  # [216, 12] in the order of the ids
for _i, _root in enumerate(_ROOTS):
    _TEMPLATES[_i, [(_root + tone) % 12 for tone in _QUALITIES[_i % len(_QUALITIES)]]] = 1

# A pitch class that sounds for less than this share of the bar's note time counts as missing.
_MISSING_SHARE = 16
# Weights of the score, in sixteenths of the bar's note time: each chord tone that is missing, each
# tone the template has beyond three, and a root that is also the lowest note.
_MISSING_COST, _SIZE_COST, _BASS_BONUS = 3, 1, 4


def pitch_class_weights(
    start: np.ndarray, length: np.ndarray, pitch: np.ndarray, bar_start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sounding time of each pitch class in each bar, and the bar's lowest pitch.

    Args:
        start, length, pitch: notes [n], steps and MIDI pitch; drums left out.
        bar_start: first step of each bar [bars], ascending from 0; the last bar has no end.

    Returns:
        weights: steps [bars, 12].
        lowest: lowest sounding pitch [bars]; 128 in a silent bar.
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
    weights = np.zeros(bars * 12, dtype=np.int64)
    np.add.at(weights, bar * 12 + pitch[note] % 12, sounding)
    lowest = np.full(bars, 128, dtype=np.int64)
    np.minimum.at(lowest, bar, pitch[note])
    return weights.reshape(bars, 12), lowest


def label_bars(start: np.ndarray, length: np.ndarray, pitch: np.ndarray, bar_start: np.ndarray) -> np.ndarray:
    """Index of the CHORD label of each bar, int64 [bars]: 0 is N (fewer than two pitch classes).

    Arguments as in `pitch_class_weights`.
    """
    weights, lowest = pitch_class_weights(start, length, pitch, bar_start)
    total = weights.sum(axis=1, keepdims=True)  # [bars, 1]
    inside = weights @ _TEMPLATES.T  # [bars, 216]
    missing = (weights * _MISSING_SHARE < total).astype(np.int64) @ _TEMPLATES.T
    size = _TEMPLATES.sum(axis=1)
    rooted = (lowest % 12)[:, None] == _ROOTS
    score = 16 * (2 * inside - total) + total * (
        _BASS_BONUS * rooted - _MISSING_COST * missing - _SIZE_COST * (size - 3)
    )
    return np.where((weights > 0).sum(axis=1) < 2, 0, 1 + score.argmax(axis=1))
