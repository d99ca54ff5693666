"""Attributes that follow from token ids alone: bar, instrument, kind and onset group of every token.

Only token ids are stored on disk. What attention and the decoder need to know of each token is computed here,
by scans over whole arrays.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from . import vocab

STRUCTURAL, KIND_T, KIND_P, KIND_L, KIND_V = range(5)  # the values of meloformer.kernels.structure.Kind

KIND_OF_ID = np.zeros(vocab.VOCAB_SIZE, dtype=np.int32)  # the kind of every id
for _kind, _family in ((KIND_T, vocab.T), (KIND_P, vocab.P), (KIND_L, vocab.L), (KIND_V, vocab.V)):
    KIND_OF_ID[_family.start : _family.stop] = _kind

# The instrument that a token switches to; -1 leaves the current one in force.
_SWITCH = np.full(vocab.VOCAB_SIZE, -1, dtype=np.int32)
_SWITCH[[vocab.PAD, vocab.BOS, vocab.EOS]] = vocab.NO_INSTRUMENT
# BAND tokens have no instrument either, so they are global keys: every later token attends to them.
_SWITCH[vocab.BAND.start : vocab.CHORD.stop] = vocab.NO_INSTRUMENT
_SWITCH[vocab.INST.start : vocab.INST.stop] = vocab.INSTRUMENTS


@dataclass(frozen=True)
class TokenAttributes:
    """What attention needs to know of each token, int32 [n] each.

    bar: index of the bar in its document, from 0; BOS and BAND count to bar 0, EOS to the last bar.
    inst: 0..127 General MIDI program, 128 drums, 129 none (PAD, BOS, BAND, CHORD, TS, CUT, BPM, EOS).
    kind: STRUCTURAL, KIND_T, KIND_P, KIND_L or KIND_V.
    onset: number of the onset group in the document, -1 for structural tokens.
    """

    bar: np.ndarray
    inst: np.ndarray
    kind: np.ndarray
    onset: np.ndarray


def last_index(marks: np.ndarray) -> np.ndarray:
    """The last index, at or before each position, at which `marks` (bool [n]) is true; 0 before the first."""
    return np.maximum.accumulate(np.where(marks, np.arange(len(marks)), 0))


def scan(ids: np.ndarray, starts: np.ndarray | None = None) -> TokenAttributes:
    """The attributes of every token of one song, or of a row of songs back to back.

    Args:
        ids: token ids [n], any integer dtype.
        starts: ascending indices at which documents begin (the first is 0); None for one document.
            Each document begins with BOS or BAND.
    """
    ids = np.asarray(ids)
    if len(ids) == 0:
        empty = np.zeros(0, dtype=np.int32)
        return TokenAttributes(empty, empty, empty, empty)
    if starts is None:
        starts = np.zeros(1, dtype=np.int64)
    kind = KIND_OF_ID.take(ids)
    structural = kind == STRUCTURAL
    # Bar and instrument are those of the last structural token, and only a few tokens are structural.
    begins = structural.copy()
    begins[starts] = True
    run = np.flatnonzero(begins)
    of_run = ids[run]
    run_lengths = np.diff(run, append=len(ids))
    switch = _SWITCH[of_run]
    chords = _count_from(np.cumsum(vocab.CHORD.mask(of_run), dtype=np.int32), np.searchsorted(run, starts))
    note_begins = np.flatnonzero(kind == KIND_T)
    onsets = _count_from(np.arange(1, len(note_begins) + 1), np.searchsorted(note_begins, starts))
    onset = np.repeat(
        np.append(-1, onsets - 1).astype(np.int32), np.diff(note_begins, prepend=0, append=len(ids))
    )
    onset[structural] = -1
    return TokenAttributes(
        bar=np.repeat(np.maximum(chords - 1, 0), run_lengths),
        inst=np.repeat(switch[last_index(switch >= 0)], run_lengths),
        kind=kind,
        onset=onset,
    )


def _count_from(total: np.ndarray, first: np.ndarray) -> np.ndarray:
    """`total`, a running count, restarted at each of the ascending indices `first` (up to the length)."""
    before = np.append(0, total).astype(total.dtype)[first]
    return total - np.repeat(before, np.diff(first, append=len(total)))


@dataclass(frozen=True)
class Bars:
    """The bars of one document, int64 [bars] each.

    token: index of the CHORD token.
    chord: index of the chord label.
    signature: index into `vocab.SIGNATURES` of the time signature in force.
    part: 0 at a bar line; 1, 2, ... for the further parts of a bar longer than 8 quarters.
    steps: length of the bar, or of this part of it, in steps.
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
        """First step of every bar, from the start of the document; int64 [bars]."""
        return np.cumsum(self.steps) - self.steps

    @property
    def seconds(self) -> np.ndarray:
        """Playing time of every bar; float64 [bars]."""
        return self.steps * 60 / vocab.STEPS_PER_QUARTER / self.bpm


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


def band_tokens(ids: np.ndarray) -> np.ndarray:
    """The BAND tokens of a document's band list, in its order; uint16 [listed]."""
    ids = np.asarray(ids)
    begin = int(len(ids) > 0 and ids[0] == vocab.BOS)
    end = begin
    while end < len(ids) and ids[end] in vocab.BAND:
        end += 1
    return ids[begin:end].astype(np.uint16)


def band(ids: np.ndarray) -> np.ndarray:
    """The instruments (programs, `vocab.DRUMS`) of a document's band list, in its order; int64 [listed]."""
    return vocab.INSTRUMENTS[band_tokens(ids).astype(np.int64) - vocab.BAND.start]


def with_instruments(ids: np.ndarray, instruments: Iterable[int]) -> np.ndarray:
    """The document with these instruments (programs, `vocab.DRUMS`) added to its band list; uint16 [n].

    Each new one is inserted before the first listed instrument that follows it in the canonical order, so a
    list in canonical order remains in it. The groups of notes stay as they are.
    """
    ids = np.asarray(ids).astype(np.uint16)
    old = band_tokens(ids)
    begin = int(len(ids) > 0 and ids[0] == vocab.BOS)
    listed = old.tolist()
    for token in sorted(vocab.BAND.start + int(vocab.INSTRUMENT_RANK[inst]) for inst in instruments):
        if token not in listed:
            place = next((i for i, other in enumerate(listed) if other > token), len(listed))
            listed.insert(place, token)
    return np.concatenate((ids[:begin], listed, ids[begin + len(old) :])).astype(np.uint16)


def cut_points(ids: np.ndarray) -> np.ndarray:
    """Token indices (int64) of the CHORD tokens at which a sample may begin: those at bar lines (part 0)."""
    bars = scan_bars(ids)
    return bars.token[bars.part == 0]


def restated(ids: np.ndarray, point: int) -> tuple[np.ndarray, int]:
    """The header of a sample that begins at the bar line `point`, a token index from `cut_points`.

    Returns:
        header: the band list, then CHORD, TS, [CUT], BPM, as uint16; TS and BPM are stated even where the
            song omits them. There is no BOS, which stands only where a song really begins.
        skip: how many of the song's own tokens the header replaces, so that the sample is
            `header` followed by `ids[point + skip:]`.
    """
    bars = scan_bars(ids)
    bar = int(np.searchsorted(bars.token, point))
    header = [
        *band_tokens(ids),
        ids[point],
        vocab.TS.start + bars.signature[bar],
        *([vocab.CUT.start + bars.steps[bar] - 1] if bars.cut[bar] else []),
        vocab.BPM.start + bars.bpm[bar] - vocab.MIN_BPM,
    ]
    skip = 1
    while point + skip < len(ids) and vocab.TS.start <= ids[point + skip] < vocab.BPM.stop:
        skip += 1
    return np.array(header, dtype=np.uint16), skip
