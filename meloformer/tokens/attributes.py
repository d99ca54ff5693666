"""Attributes that follow from token ids alone: bar, instrument, kind and onset group of every token.

Only token ids are stored on disk. What attention and the decoder need to know of each token is computed here,
by scans over whole arrays.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from . import vocab

STRUCTURAL, KIND_T, KIND_P, KIND_L, KIND_V = range(5)  # the values of meloformer.kernels.structure.Kind

KIND_OF_ID = np.zeros(vocab.VOCAB_SIZE, dtype=np.int32)  # the kind of every id
for _kind, _family in ((KIND_T, vocab.T), (KIND_P, vocab.P), (KIND_L, vocab.L), (KIND_V, vocab.V)):
    KIND_OF_ID[_family.start : _family.stop] = _kind

# The instrument of every structural token. BAND tokens have none either, so they are global keys: every later
# token attends to them.
_INSTRUMENT = np.full(vocab.VOCAB_SIZE, vocab.NO_INSTRUMENT, dtype=np.int32)
_INSTRUMENT[vocab.INST.start : vocab.INST.stop] = vocab.INSTRUMENTS


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


class Runs(NamedTuple):
    """Documents back to back as R runs: each a structural token and the tokens of notes that follow it.

    token: ids of the structural tokens, uint16 [R].
    begin: their indices, int64 [R].
    length: tokens of every run, int64 [R].
    first: the first run of every document, int64 [D].
    part: the first run of every part, int64 [D + bars]: the head of a document (BOS, BAND), or a bar.
    """

    token: np.ndarray
    begin: np.ndarray
    length: np.ndarray
    first: np.ndarray
    part: np.ndarray


def find_runs(ids: np.ndarray, starts: np.ndarray) -> Runs:
    """The runs of documents that begin at `starts`, as for `scan`; ids is uint16 [n], not empty."""
    begin = np.flatnonzero(ids - np.uint16(vocab.T.start) >= vocab.V.stop - vocab.T.start)  # modulo 2^16
    token, first = ids[begin], np.searchsorted(begin, starts)
    begins_part = vocab.CHORD.mask(token)
    begins_part[first] = True
    return Runs(token, begin, lengths(begin, len(ids)), first, np.flatnonzero(begins_part))


def lengths(begin: np.ndarray, stop: int) -> np.ndarray:
    """How long stretches are that begin at `begin`, each up to the next and the last up to `stop`; int64.

    As `np.diff(begin, append=stop)`, which takes longer when there are only a few thousand.
    """
    out = np.empty(len(begin), np.int64)
    np.subtract(begin[1:], begin[:-1], out=out[:-1])
    out[-1:] = stop - begin[-1:]
    return out


def starts_of(length: np.ndarray) -> np.ndarray:
    """Where stretches of these lengths (int64) begin if they lie back to back from 0 on; int64."""
    begin = np.empty_like(length)
    begin[:1] = 0
    np.cumsum(length[:-1], out=begin[1:])
    return begin


def scan(
    ids: np.ndarray,
    starts: np.ndarray | None = None,
    runs: Runs | None = None,
    kind: np.ndarray | None = None,
) -> TokenAttributes:
    """The attributes of every token of one song, or of a row of songs back to back.

    Args:
        ids: token ids [n], any integer dtype.
        starts: ascending indices at which documents begin (the first is 0); None for one document.
            Each document begins with BOS or BAND.
        runs, kind: `find_runs` and `kinds` of these, for a caller that knows them.
    """
    ids = np.asarray(ids).astype(np.uint16, copy=False)
    if len(ids) == 0:
        empty = np.zeros(0, dtype=np.int32)
        return TokenAttributes(empty, empty, empty, empty)
    if starts is None:
        starts = np.zeros(1, dtype=np.int64)
    if runs is None:
        runs = find_runs(ids, starts)
    part = _restarted(len(runs.part), np.searchsorted(runs.part, runs.first))  # 0 for the head
    if kind is None:
        kind = kinds(ids)
    note = np.flatnonzero(kind == KIND_T)
    onset = np.repeat(
        np.append(np.int32(-1), _restarted(len(note), np.searchsorted(note, starts))),
        np.diff(note, prepend=0, append=len(ids)),
    )
    onset[runs.begin] = -1
    return TokenAttributes(
        bar=np.repeat(np.maximum(part - 1, 0), lengths(runs.begin[runs.part], len(ids))),
        inst=np.repeat(_INSTRUMENT.take(runs.token), runs.length),
        kind=kind.astype(np.int32),
        onset=onset,
    )


def _restarted(count: int, first: np.ndarray) -> np.ndarray:
    """The numbers of `count` things, from 0 again at each of the ascending indices `first`; int32 [count]."""
    before = np.repeat(first.astype(np.int32), lengths(first, count))
    return np.arange(count, dtype=np.int32) - before


def kinds(ids: np.ndarray) -> np.ndarray:
    """`KIND_OF_ID` of ids, uint16 [n], as int8; by comparisons, which are faster than looking up every id."""
    kind = (ids >= vocab.T.start).view(np.int8)
    for family in (vocab.P, vocab.L, vocab.V):  # in the order of their ids and of the kinds
        kind += (ids >= family.start).view(np.int8)
    kind *= (ids < vocab.V.stop).view(np.int8)
    return kind


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
