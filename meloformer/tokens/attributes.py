"""What follows from the token ids alone: bar, instrument, kind and onset group of every token.

Only tokens are stored on disk; everything that attention and decoder need to know of them is computed here,
by scans over whole arrays.
"""

from dataclasses import dataclass

import numpy as np

from . import vocab

STRUCTURAL, KIND_T, KIND_P, KIND_L, KIND_V = range(5)  # as meloformer.kernels.structure.Kind

KIND_OF_ID = np.zeros(vocab.VOCAB_SIZE, dtype=np.int32)  # the kind of every id
for _kind, _family in ((KIND_T, vocab.T), (KIND_P, vocab.P), (KIND_L, vocab.L), (KIND_V, vocab.V)):
    KIND_OF_ID[_family.start : _family.stop] = _kind

# The instrument that a token switches to; -1 leaves the current one in force.
_SWITCH = np.full(vocab.VOCAB_SIZE, -1, dtype=np.int32)
_SWITCH[[vocab.PAD, vocab.BOS, vocab.EOS]] = vocab.NO_INSTRUMENT
_SWITCH[vocab.CHORD.start : vocab.CHORD.stop] = vocab.NO_INSTRUMENT
_SWITCH[vocab.INST.start : vocab.INST.stop] = vocab.INSTRUMENTS


@dataclass(frozen=True)
class TokenAttributes:
    """What attention needs to know of each token, int32 [n] each.

    bar: index of the bar in its document, from 0; BOS counts to bar 0 and EOS to the last bar.
    inst: 0..127 General MIDI program, 128 drums, 129 none (CHORD, TS, CUT, BPM, BOS, EOS).
    kind: STRUCTURAL, KIND_T, KIND_P, KIND_L or KIND_V.
    onset: number of the onset group in the document, -1 for structural tokens.
    """

    bar: np.ndarray
    inst: np.ndarray
    kind: np.ndarray
    onset: np.ndarray


def last_index(marks: np.ndarray) -> np.ndarray:
    """For every position the last index at or before it where `marks` holds; 0 before the first."""
    return np.maximum.accumulate(np.where(marks, np.arange(len(marks)), 0))


def scan(ids: np.ndarray, starts: np.ndarray | None = None) -> TokenAttributes:
    """The attributes of every token of one song, or of a row of songs back to back.

    Args:
        ids: token ids [n], any integer dtype.
        starts: ascending indices at which documents begin (the first is 0); None for one document.
            Each document begins with BOS or CHORD.
    """
    ids = np.asarray(ids)
    if len(ids) == 0:
        empty = np.zeros(0, dtype=np.int32)
        return TokenAttributes(empty, empty, empty, empty)
    kind = KIND_OF_ID[ids]
    switch = _SWITCH[ids]
    inst = switch[last_index(switch >= 0)]
    chords = np.cumsum(vocab.CHORD.mask(ids), dtype=np.int32)
    onsets = np.cumsum(kind == KIND_T, dtype=np.int32)
    if starts is not None:
        lengths = np.diff(starts, append=len(ids))
        chords -= np.repeat(np.concatenate(([0], chords))[starts], lengths)
        onsets -= np.repeat(np.concatenate(([0], onsets))[starts], lengths)
    return TokenAttributes(
        bar=np.maximum(chords - 1, 0).astype(np.int32),
        inst=inst,
        kind=kind,
        onset=np.where(kind == STRUCTURAL, -1, onsets - 1).astype(np.int32),
    )


@dataclass(frozen=True)
class Bars:
    """The bars of one document, int64 [bars] each.

    token: index of the CHORD token.
    chord: index of the chord label.
    signature: index into `vocab.SIGNATURES` of the time signature in force.
    part: 0 for a bar line; 1, 2, ... for the further parts of a bar longer than 8 quarters.
    steps: length of the bar (of the part) in steps.
    cut: whether a CUT token sets that length.
    bpm: tempo in force, in quarter notes a minute.
    """

    token: np.ndarray
    chord: np.ndarray
    signature: np.ndarray
    part: np.ndarray
    steps: np.ndarray
    cut: np.ndarray
    bpm: np.ndarray

    @property
    def start(self) -> np.ndarray:
        """First step of every bar, counted from the start of the document."""
        return np.cumsum(self.steps) - self.steps


def scan_bars(ids: np.ndarray) -> Bars:
    """The bars of one document that follows the grammar (its first bar states TS and BPM)."""
    ids = np.asarray(ids).astype(np.int64)
    token = np.flatnonzero(vocab.CHORD.mask(ids))

    def header(family: vocab.Family) -> tuple[np.ndarray, np.ndarray]:
        """Value of the family's token in each bar's header, and whether there is one."""
        value, present = np.zeros(len(token), dtype=np.int64), np.zeros(len(token), dtype=bool)
        at = np.flatnonzero(family.mask(ids))
        bar = np.searchsorted(token, at, side="right") - 1
        value[bar], present[bar] = ids[at] - family.start, True
        return value, present

    signature, has_signature = header(vocab.TS)
    stated = last_index(has_signature)
    signature = signature[stated]
    bpm, has_bpm = header(vocab.BPM)
    cut_index, cut = header(vocab.CUT)
    nominal = vocab.SIGNATURE_STEPS[signature]
    part = (np.arange(len(token)) - stated) % -(-nominal // vocab.MAX_BAR_STEPS)
    whole = np.minimum(nominal - part * vocab.MAX_BAR_STEPS, vocab.MAX_BAR_STEPS)
    return Bars(
        token=token,
        chord=ids[token] - vocab.CHORD.start,
        signature=signature,
        part=part,
        steps=np.where(cut, cut_index + 1, whole),
        cut=cut,
        bpm=bpm[last_index(has_bpm)] + vocab.MIN_BPM,
    )


def cut_points(ids: np.ndarray) -> np.ndarray:
    """Token indices (int64) of the CHORD tokens at which a sample may begin: all true bar lines."""
    bars = scan_bars(ids)
    return bars.token[bars.part == 0]


def restated(ids: np.ndarray, point: int) -> tuple[np.ndarray, int]:
    """What a sample that begins at the bar line `point` must say first.

    Returns:
        header: CHORD, TS, [CUT], BPM as uint16; TS and BPM are stated even where the song omits them.
        skip: how many of the song's own tokens the header replaces, so that the sample is
            `header` followed by `ids[point + skip:]`.
    """
    bars = scan_bars(ids)
    bar = int(np.searchsorted(bars.token, point))
    header = [
        ids[point],
        vocab.TS.start + bars.signature[bar],
        *([vocab.CUT.start + bars.steps[bar] - 1] if bars.cut[bar] else []),
        vocab.BPM.start + bars.bpm[bar] - vocab.MIN_BPM,
    ]
    skip = 1
    while point + skip < len(ids) and vocab.TS.start <= ids[point + skip] < vocab.BPM.stop:
        skip += 1
    return np.array(header, dtype=np.uint16), skip
