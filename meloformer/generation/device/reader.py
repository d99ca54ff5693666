"""What the model knows of each token (`model.token_reader`), for the songs of all slots at once.

The tables of what followed what, which `TokenReader` keeps, are not kept here: the tokens of the song are,
and what followed is looked up among them, which for a GPU is less work than to keep a table of all places.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...kernels.structure import NO_INSTRUMENT
from ...model.inputs import BAR_ENDS, ChordGuesses, InputFeatures
from ...tokens import attributes, vocab
from ...tokens.attributes import STRUCTURAL
from . import tables as t
from .tables import SlotNumbers, Tables, advance, read, write

_FORCES = (t.T, t.L, t.V)
_NAMES = ("position", "bars", "inst", "onsets", "head", "onset", "length", "velocity")


class Facts(NamedTuple):
    """`TokenFacts` of a token of each slot, int64 [S] each."""

    token: Tensor
    position: Tensor
    bar: Tensor
    inst: Tensor
    kind: Tensor
    onset: Tensor
    features: InputFeatures
    guesses: ChordGuesses


class SlotReader(SlotNumbers):
    """`TokenReader`, with the tokens read so far.

    Args:
        room: N, how many tokens of a song there is room for.
        bars: M, how many bars.

    Attributes:
        position: of the last token; -1 before the first.
        bars: how many are begun.
        onset, length, velocity: 1 + the value of the T, L or V token in force, 0 for none.
        tokens: int32 [S, N + 1]. Here and below, the last column is for what no song has.
        bar_of, inst_of, kind_of, onset_of: int32 [S, N + 1], of each token, as in `Structure`.
        places: int32 [S, N + 1], of each token a number for itself, its instrument and its onset.
        labels: int64 [S, M + 2], ids of CHORD by bar, from column 1 on; 0 before.
        last: int64 [S, families], the last token of each, as far back as the feature `previous` looks.
        followers: int64 [S, BAR_ENDS + 1], by what a group or a bar began with, what began the next one.
        ends: bool [families, families], by family the entries of `last` that a token of it ends.
    """

    def __init__(self, slots: int, tables: Tables, room: int, bars: int, device: torch.device):
        super().__init__(_NAMES, slots, device)
        self._tables, self.room, self.bar_room = tables, room, bars
        # An empty slot takes part in every step: what it looks up must exist.
        for name in _NAMES:
            getattr(self, name).fill_(-1 if name in ("position", "head") else 0)

        def history() -> Tensor:
            return torch.zeros((slots, room + 1), dtype=torch.int32, device=device)

        self.tokens, self.places = history(), history()
        self.bar_of, self.inst_of, self.kind_of, self.onset_of = (history() for _ in range(4))
        self.labels = torch.zeros((slots, bars + 2), dtype=torch.int64, device=device)
        self.last = torch.zeros((slots, t.FAMILIES), dtype=torch.int64, device=device)
        self.followers = torch.zeros((slots, BAR_ENDS + 1), dtype=torch.int64, device=device)
        self._index = torch.arange(room + 1, dtype=torch.int32, device=device)
        self._column = torch.arange(bars + 2, device=device)
        ends = torch.zeros((t.FAMILIES, t.FAMILIES), dtype=torch.bool)
        ends[: t.T] = ends[t.RESERVED] = torch.zeros(t.FAMILIES, dtype=torch.bool).index_fill_(
            0, torch.tensor([t.T, t.P, t.L, t.V, t.PAD, t.BOS, t.EOS]), True
        )
        ends[t.CHORD, t.INST] = True
        self.ends = ends.to(device)

    def load(self, slot: int, ids: np.ndarray) -> None:
        """Begin a document with these tokens [n]; it may have none."""
        ids = np.asarray(ids, dtype=np.int64)
        scanned, n = attributes.scan(ids), len(ids)
        families = self._tables.family.cpu().numpy()[ids]
        structural = np.flatnonzero(scanned.kind == STRUCTURAL)
        chords = np.flatnonzero(families == t.CHORD)
        group = structural[-1] + 1 if len(structural) else 0  # where the notes begin
        bar = chords[-1] if len(chords) else 0
        last = np.zeros(t.FAMILIES, dtype=np.int64)
        for family in range(t.BAND, t.FAMILIES):
            at = np.flatnonzero(families == family)
            first = group if family in (t.T, t.P, t.L, t.V) else bar if family == t.INST else 0
            if len(at) and at[-1] >= first:
                last[family] = ids[at[-1]]
        heads = ids[(families == t.INST) | (families == t.CHORD)]
        ranks = np.where(heads >= vocab.INST.start, heads - vocab.INST.start + 1, 0)
        following = np.zeros(BAR_ENDS + 1, dtype=np.int64)
        following[ranks[:-1]] = np.where(ranks[1:] > 0, ranks[1:], BAR_ENDS)  # of several the last one counts
        in_force = [
            last[family] - vocab.FAMILIES[family].start + 1 if last[family] else 0 for family in _FORCES
        ]
        self.put(
            slot,
            position=n - 1,
            bars=len(chords),
            inst=scanned.inst[-1] if n else NO_INSTRUMENT,
            onsets=int((families == t.T).sum()),
            head=ranks[-1] if len(ranks) else -1,
            onset=in_force[0],
            length=in_force[1],
            velocity=in_force[2],
        )
        device = self.all.device
        # The T in force at each token: the last one, unless a group began since.
        onset = np.where(families == t.T, ids - vocab.T.start + 1, 0)
        begins = (scanned.kind == STRUCTURAL) | (families == t.T)
        onset = onset[attributes.last_index(begins)] if n else onset
        places = self._place(scanned.inst.astype(np.int64), onset, ids)
        for into, values in (
            (self.tokens, ids),
            (self.places, places),
            (self.bar_of, scanned.bar),
            (self.inst_of, scanned.inst),
            (self.kind_of, scanned.kind),
            (self.onset_of, scanned.onset),
        ):
            into[slot, :n] = torch.as_tensor(values.astype(np.int32), device=device)
        self.labels[slot, 1 : len(chords) + 1] = torch.as_tensor(ids[chords], device=device)
        self.last[slot] = torch.as_tensor(last, device=device)
        self.followers[slot] = torch.as_tensor(following, device=device)

    @staticmethod
    def _place(inst, onset, token):
        """One number, below 2^31, for an instrument, a feature `onset`, and a token."""
        return (inst * (len(vocab.T) + 1) + onset) * vocab.VOCAB_SIZE + token

    def push(self, token: Tensor, where: Tensor) -> Facts:
        """Append a token to the songs in `where` (bool [S]), which must have room for it.

        Returns:
            What the model knows of it; means nothing for other songs.
        """
        tables = self._tables
        family, value, kind = tables.family[token], tables.value[token], tables.kind[token]
        structural, chord = kind == STRUCTURAL, family == t.CHORD
        write(self.labels, where & chord, self.bars + 1, token)
        advance(self.position, where, self.position + 1)
        advance(self.bars, where & chord, self.bars + 1)
        switch = tables.switches_to[token]
        advance(self.inst, where & (switch >= 0), switch)
        for name, of in (("onset", t.T), ("length", t.L), ("velocity", t.V)):
            mine = family == of
            advance(getattr(self, name), where & (structural | mine), torch.where(mine, value + 1, 0))
        advance(self.onsets, where & (family == t.T), self.onsets + 1)
        bar = (self.bars - 1).clamp(min=0)
        onset = torch.where(structural, -1, self.onsets - 1)
        for into, fact in (
            (self.tokens, token),
            (self.bar_of, bar),
            (self.inst_of, self.inst),
            (self.kind_of, kind),
            (self.onset_of, onset),
        ):
            write(into, where, self.position, fact)
        features = InputFeatures(
            onset=self.onset,
            length=self.length,
            velocity=self.velocity,
            chord=torch.where(self.bars > 0, read(self.labels, self.bars) - vocab.CHORD.start + 1, 0),
            previous=self._previous(token, family, where),
            repeat=self._repeat(token, where),
            next_instrument=self._instrument_after(value, family, where),
        )
        return Facts(token, self.position, bar, self.inst, kind, onset, features, self._guesses())

    def _previous(self, token: Tensor, family: Tensor, where: Tensor) -> Tensor:
        kept = self.last.masked_fill(self.ends[family], 0)
        special = family < t.BAND
        previous = torch.where(special, 0, read(kept, family))
        now = kept.scatter(1, family[:, None], torch.where(special, 0, token)[:, None])
        advance(self.last, where[:, None], now)
        return previous

    def _repeat(self, token: Tensor, where: Tensor) -> Tensor:
        place = self._place(self.inst, self.onset, token)
        write(self.places, where, self.position, place)
        same = (self.places == place[:, None]) & (self._index < self.position[:, None])
        earlier = torch.where(same, self._index, -1).amax(dim=1).long()
        return torch.where(earlier >= 0, read(self.tokens, earlier + 1).long(), 0)

    def _instrument_after(self, value: Tensor, family: Tensor, where: Tensor) -> Tensor:
        inst = family == t.INST
        heads = where & (inst | (family == t.CHORD))
        rank = torch.where(inst, value + 1, 0)
        known = heads & (self.head >= 0)
        write(self.followers, known, self.head, torch.where(rank > 0, rank, BAR_ENDS))
        advance(self.head, heads, rank)
        return torch.where(self.head >= 0, read(self.followers, self.head.clamp(min=0)), 0)

    def _guesses(self) -> ChordGuesses:
        labels, bars = self.labels, self.bars
        ago = [read(labels, (bars + 1 - n).clamp(min=0)) for n in (1, 2, 4, 8)]
        before = read(labels, (bars - 1).clamp(min=0))
        earlier = (self._column >= 1) & (self._column < bars[:, None])
        same_one = earlier & (labels == ago[0][:, None])
        same_two = same_one & (labels.roll(1, dims=1) == before[:, None])
        followers = []
        for same in (same_one, same_two):
            at = torch.where(same, self._column, -1).amax(dim=1)
            followers.append(torch.where(at >= 0, read(labels, at + 1), 0))
        return ChordGuesses(*ago, *followers)
