"""The grammar of songs: which tokens may come next, for validation and for the mask in generation.

    song  := BOS BAND+ bar+ EOS
    bar   := CHORD [TS] [CUT] [BPM] group*
    group := INST note+
    note  := [T] P [L] [V]

Beyond these rules it requires the canonical form: TS and BPM stand in the first bar and where
they change, TS stands after a bar that was cut short, BAND lists each instrument at most once, the groups of
a bar are of listed instruments and stand in the order of the list, onsets rise inside a group, pitches inside
an onset, onsets lie inside the bar, and T, L and V are left out when they repeat. The list may have any
order and include instruments that never play. By default `encode` lists exactly those that play, in the order
of the INST ids.

A fragment of a song may begin at any bar, with the band list but without BOS, and end after any token.
"""

from typing import NamedTuple

import numpy as np

from . import vocab
from .vocab import BAND, BPM, CHORD, CUT, INST, TS, L, P, T, V

Ranges = list[tuple[int, int]]  # half-open ranges of ids


def _all_but(family: vocab.Family, index: int | None) -> Ranges:
    """The family's ids without the one of value `index`."""
    if index is None:
        return [(family.start, family.stop)]
    return [(family.start, family.start + index), (family.start + index + 1, family.stop)]


class GrammarState(NamedTuple):
    """What decides which tokens may come next, as integers; -1 for what there is not.

    Attributes:
        after: index into `vocab.FAMILIES` of the previous token's family.
        first_bar: whether the current bar is the song's first.
        signature: index into `vocab.SIGNATURES`.
        part: which part of a long bar the current one is.
        bar_steps: its length.
        cut, after_cut: whether a CUT shortens the current bar, and whether one did the bar before.
        bpm: value of the BPM token in force.
        group: place of the group's instrument in the band list.
        onset, pitch, length, velocity: values of the last T, P, L and V of the group; no pitch after a T.
        band: ranks of the instruments listed so far.
    """

    after: int
    first_bar: int
    signature: int
    part: int
    bar_steps: int
    cut: int
    after_cut: int
    bpm: int
    group: int
    onset: int
    pitch: int
    length: int
    velocity: int
    band: tuple[int, ...]


_NUMBER = {family.name: number for number, family in enumerate(vocab.FAMILIES)}


class Grammar:
    """The state of the grammar after some tokens of a song; a new one is before the first token."""

    def __init__(self):
        self._after = ""  # family name of the previous token
        self._band: list[int] = []  # ranks of the listed instruments
        self._groups_after: list[Ranges] = []  # the INST ids that may follow, by place in the list
        self._first_bar = True
        self._signature: int | None = None
        self._part = -1
        self._bar_steps = 0
        self._cut = False  # the current bar is cut short
        self._after_cut = False  # the bar before it was
        self._bpm: int | None = None
        self._group = -1  # place of the group's instrument in the band list; -1 before a bar's first group
        self._onset = self._pitch = -1
        self._length: int | None = None
        self._velocity: int | None = None

    def allowed_ranges(self) -> Ranges:
        """The ids that may come next, as half-open ranges (some may be empty); [] after EOS."""
        after = self._after
        if after == "":
            return [(vocab.BOS, vocab.BOS + 1), (BAND.start, BAND.stop)]
        if after == "EOS":
            return []
        if after in ("BOS", "BAND"):
            listed = sorted(self._band)
            unlisted = zip([-1, *listed], [*listed, len(BAND)])
            ranges = [(BAND.start + low + 1, BAND.start + high) for low, high in unlisted]
            return [*ranges, (CHORD.start, CHORD.stop)] if listed else ranges
        if after == "INST":
            return [(T.start, T.start + self._bar_steps)]
        if after == "T":
            return [(P.start, P.stop)]
        if after == "P" and self._length is None:
            return [(L.start, L.stop)]
        if after == "L" and self._velocity is None:
            return [(V.start, V.stop)]

        ranges: Ranges = []
        if after == "CHORD":
            if self._first_bar or self._after_cut:
                return [(TS.start, TS.stop)]
            # Within a bar of several parts even the same signature has a meaning: a new bar line.
            ranges += _all_but(TS, self._signature if self._part == 0 else None)
        if after in ("CHORD", "TS"):
            ranges.append((CUT.start, CUT.start + self._bar_steps - 1))
        if after in ("CHORD", "TS", "CUT"):
            ranges += _all_but(BPM, self._bpm)
            if self._bpm is None:
                return ranges
        if after == "P":
            ranges += _all_but(L, self._length)
        if after in ("P", "L"):
            ranges += _all_but(V, self._velocity)
        if after in ("P", "L", "V"):
            ranges += [
                (T.start + self._onset + 1, T.start + self._bar_steps),
                (P.start + self._pitch + 1, P.stop),
            ]
        return [
            *ranges,
            *self._groups_after[self._group + 1],
            (CHORD.start, CHORD.stop),
            (vocab.EOS, vocab.EOS + 1),
        ]

    def allowed(self) -> np.ndarray:
        """The ids that may come next, as a mask: bool [VOCAB_SIZE]."""
        mask = np.zeros(vocab.VOCAB_SIZE, dtype=bool)
        for low, high in self.allowed_ranges():
            mask[low:high] = True
        return mask

    def push(self, token: int) -> None:
        """Append a token.

        Raises:
            ValueError: the token may not come next.
        """
        if not any(low <= token < high for low, high in self.allowed_ranges()):
            name = vocab.names()[token] if 0 <= token < vocab.VOCAB_SIZE else f"id {token}"
            raise ValueError(f"{name} may not follow {self._after or 'the start'} here")
        family = vocab.family_of(token)
        value = token - family.start
        self._after = family.name
        if family is BAND:
            self._band.append(value)
        elif family is CHORD:
            self._begin_bar()
        elif family is TS:
            self._signature, self._part = value, 0
            self._bar_steps = min(int(vocab.SIGNATURE_STEPS[value]), vocab.MAX_BAR_STEPS)
        elif family is CUT:
            self._bar_steps, self._cut = value + 1, True
        elif family is BPM:
            self._bpm = value
        elif family is INST:
            self._group, self._onset, self._pitch = self._band.index(value), -1, -1
            self._length = self._velocity = None
        elif family is T:
            self._onset, self._pitch = value, -1
        elif family is P:
            self._pitch = value
        elif family is L:
            self._length = value
        elif family is V:
            self._velocity = value

    def _begin_bar(self) -> None:
        if not self._groups_after:
            groups = [(INST.start + rank, INST.start + rank + 1) for rank in self._band]
            self._groups_after = [groups[place:] for place in range(len(groups) + 1)]
        self._first_bar = self._signature is None
        self._after_cut, self._cut = self._cut, False
        self._group = -1
        if not self._first_bar:
            nominal = int(vocab.SIGNATURE_STEPS[self._signature])
            self._part = (self._part + 1) % -(-nominal // vocab.MAX_BAR_STEPS)
            rest = nominal - self._part * vocab.MAX_BAR_STEPS
            self._bar_steps = min(rest, vocab.MAX_BAR_STEPS)

    def state(self) -> GrammarState:
        def known(value: int | None) -> int:
            return -1 if value is None else value

        return GrammarState(
            after=_NUMBER.get(self._after, -1),
            first_bar=int(self._first_bar),
            signature=known(self._signature),
            part=self._part,
            bar_steps=self._bar_steps,
            cut=int(self._cut),
            after_cut=int(self._after_cut),
            bpm=known(self._bpm),
            group=self._group,
            onset=self._onset,
            pitch=self._pitch,
            length=known(self._length),
            velocity=known(self._velocity),
            band=tuple(self._band),
        )

    @property
    def lists_band(self) -> bool:
        """Whether the band list is being written, so that BAND may follow (unless all are listed)."""
        return self._after in ("BOS", "BAND")

    @property
    def band(self) -> tuple[int, ...]:
        """The instruments listed so far: programs and `vocab.DRUMS`, in the order of the list."""
        return tuple(vocab.INSTRUMENTS[self._band].tolist())

    @property
    def signature(self) -> int | None:
        """Index into `vocab.SIGNATURES` of the time signature in force; None before the first."""
        return self._signature

    @property
    def bpm(self) -> int | None:
        """The tempo in force, in BPM; None before the first."""
        return None if self._bpm is None else self._bpm + vocab.MIN_BPM

    @property
    def inside_bar(self) -> bool:
        """Whether the last CHORD began a further part of a bar, where there is no bar line."""
        return self._part > 0 and not self._after_cut

    @property
    def bar_ends(self) -> bool:
        """Whether the next CHORD begins a new bar rather than a further part of this one."""
        if self._signature is None or self._cut:
            return True
        parts = -(-int(vocab.SIGNATURE_STEPS[self._signature]) // vocab.MAX_BAR_STEPS)
        return (self._part + 1) % parts == 0

    @property
    def bar_complete(self) -> bool:
        """Whether the current bar, or part of a bar, may end here, so that CHORD or EOS may follow."""
        return any(low <= vocab.EOS < high for low, high in self.allowed_ranges())


def check(ids: np.ndarray) -> Grammar:
    """Run the grammar over token ids [n] and return its state after them.

    Raises:
        ValueError: the ids break the grammar; the message gives the index of the first wrong token.
    """
    grammar = Grammar()
    ids = np.asarray(ids)
    if ids.ndim != 1 or (len(ids) and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"token ids must be integers [n], got {ids.dtype} {list(ids.shape)}")
    for index, token in enumerate(ids.tolist()):
        try:
            grammar.push(token)
        except ValueError as error:
            raise ValueError(f"token {index}: {error}") from None
    return grammar
