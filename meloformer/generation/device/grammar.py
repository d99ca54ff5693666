"""The grammar of songs (`tokens.grammar`) for the songs of all slots at once.

After any token the ids of a family that may come next are a range of values, but for one; and BAND and INST
ask the band list too.
"""

import torch
from torch import Tensor

from ...tokens import vocab
from ...tokens.grammar import GrammarState
from . import tables as t
from .tables import SlotNumbers, Tables, advance, write

_FIELDS = GrammarState._fields[:-1]


class SlotGrammar(SlotNumbers):
    """`Grammar`: its fields are those of `GrammarState`.

    Attributes:
        place: [S, instruments + 1], by rank of an instrument its place in the band list.
        listed: how many instruments are listed.
    """

    def __init__(self, slots: int, tables: Tables, device: torch.device):
        super().__init__((*_FIELDS, "listed"), slots, device)
        self._tables = tables
        self.place = torch.full((slots, len(vocab.BAND) + 1), -1, dtype=torch.int64, device=device)

    def load(self, slot: int, state: GrammarState) -> None:
        place = torch.full((len(vocab.BAND) + 1,), -1, dtype=torch.int64)
        place[list(state.band)] = torch.arange(len(state.band))
        self.place[slot] = place.to(self.place.device)
        self.put(slot, **dict(zip(_FIELDS, state)), listed=len(state.band))

    def _after(self, *families: int) -> Tensor:
        found = self.after == families[0]
        for family in families[1:]:
            found = found | (self.after == family)
        return found

    def _header_goes_on(self) -> tuple[Tensor, Tensor]:
        """After a CHORD that need not be followed by TS; and that, or after TS or CUT."""
        chord = self._after(t.CHORD) & (self.first_bar == 0) & (self.after_cut == 0)
        return chord, chord | self._after(t.TS, t.CUT)

    def _note_complete(self) -> Tensor:
        without = self._after(t.P) & (self.length < 0) | self._after(t.L) & (self.velocity < 0)
        return self._after(t.P, t.L, t.V) & ~without

    def bar_complete(self) -> Tensor:
        """As of `Grammar`, bool [S]."""
        _, header = self._header_goes_on()
        return self._note_complete() | self._after(t.BPM) | header & (self.bpm >= 0)

    def lists_band(self) -> Tensor:
        return self._after(t.BOS, t.BAND)

    def inside_bar(self) -> Tensor:
        return (self.part > 0) & (self.after_cut == 0)

    def bar_ends(self) -> Tensor:
        parts = self._tables.parts[self.signature.clamp(min=0)]
        return (self.signature < 0) | (self.cut > 0) | ((self.part + 1) % parts == 0)

    def allowed(self) -> Tensor:
        """The ids that may come next, bool [S, VOCAB_SIZE]."""
        chord, header = self._header_goes_on()
        note, ends, starts = self._note_complete(), self.bar_complete(), self.after < 0
        none = torch.zeros_like(self.after)
        # By family: the first value allowed, the first one beyond, and one between that is not.
        low, high, but = [none] * t.FAMILIES, [none] * t.FAMILIES, [none - 1] * t.FAMILIES

        def allow(family: int, where: Tensor, stop: Tensor | int) -> None:
            high[family] = torch.where(where, stop, 0)

        def whole(family: int, where: Tensor) -> None:
            allow(family, where, len(vocab.FAMILIES[family]))

        whole(t.BOS, starts)
        whole(t.BAND, starts | self.lists_band())
        whole(t.CHORD, self.lists_band() & (self.listed > 0) | ends)
        whole(t.EOS, ends)
        whole(t.TS, self._after(t.CHORD))
        but[t.TS] = torch.where(chord & (self.part == 0), self.signature, -1)
        allow(t.CUT, chord | self._after(t.TS), self.bar_steps - 1)
        whole(t.BPM, header)
        but[t.BPM] = self.bpm
        whole(t.INST, ends)
        allow(t.T, self._after(t.INST) | note, self.bar_steps)
        low[t.T], low[t.P] = self.onset + 1, self.pitch + 1
        whole(t.P, self._after(t.T) | note)
        whole(t.L, self._after(t.P))
        but[t.L] = self.length
        whole(t.V, self._after(t.L) | self._after(t.P) & (self.length >= 0))
        but[t.V] = self.velocity

        family, value = self._tables.family, self._tables.value
        low_SV, high_SV, but_SV = (torch.stack(x, dim=1)[:, family] for x in (low, high, but))
        allowed = (low_SV <= value) & (value < high_SV) & (value != but_SV)
        place = self.place[:, :-1]
        allowed[:, vocab.BAND.start : vocab.BAND.stop] &= place < 0
        allowed[:, vocab.INST.start : vocab.INST.stop] &= place > self.group[:, None]
        return allowed

    def push(self, token: Tensor, where: Tensor) -> None:
        """Append a token, which must be allowed, to the songs in `where` (bool [S])."""
        tables = self._tables
        family, value = tables.family[token], tables.value[token]

        def on(number: int) -> Tensor:
            return where & (family == number)

        chord, begins, ts, cut, inst = on(t.CHORD), self.signature >= 0, on(t.TS), on(t.CUT), on(t.INST)
        signature = self.signature.clamp(min=0)
        part = (self.part + 1) % tables.parts[signature]
        steps = (tables.steps[signature] - part * vocab.MAX_BAR_STEPS).clamp(max=vocab.MAX_BAR_STEPS)
        group = self.place.gather(1, value.clamp(max=len(vocab.INST))[:, None])[:, 0]

        advance(self.first_bar, chord, (~begins).long())
        advance(self.after_cut, chord, self.cut)
        advance(self.cut, chord | cut, cut.long())
        advance(self.part, chord & begins | ts, torch.where(ts, 0, part))
        advance(self.bar_steps, chord & begins, steps)
        of_value = tables.steps[value.clamp(max=len(tables.steps) - 1)]
        advance(self.bar_steps, ts, of_value.clamp(max=vocab.MAX_BAR_STEPS))
        advance(self.bar_steps, cut, value + 1)
        advance(self.signature, ts, value)
        advance(self.bpm, on(t.BPM), value)
        advance(self.group, chord | inst, torch.where(inst, group, -1))
        advance(self.onset, inst | on(t.T), torch.where(inst, -1, value))
        advance(self.pitch, inst | on(t.T) | on(t.P), torch.where(family == t.P, value, -1))
        advance(self.length, inst | on(t.L), torch.where(inst, -1, value))
        advance(self.velocity, inst | on(t.V), torch.where(inst, -1, value))
        write(self.place, on(t.BAND), value, self.listed)
        advance(self.listed, on(t.BAND), self.listed + 1)
        advance(self.after, where, family)
