"""Songs being written (`generation.draft`), with what the user wishes, for all slots at once."""

import numpy as np
import torch
from torch import Tensor

from ...tokens import vocab
from ...tokens.vocab import BAND, BPM, CHORD, TS, P
from ..constraints import Constraints
from ..draft import DraftState
from ..steering import MOST, OUTSIDE_SCALE, PER_NOTE
from . import tables as t
from .copies import SlotCopies
from .grammar import SlotGrammar
from .tables import SlotNumbers, Tables, advance, read

MAX_CHORDS = 256  # of a progression that a slot can hold
_INSTRUMENTS = vocab.NO_INSTRUMENT  # rows by instrument; one more is for none
_NAMES = (
    *("bars", "max_tokens", "new_bars", "new_tokens", "has_note", "instrument", "notes"),  # of DraftState
    *("bpm", "signature", "lists", "chord_count", "scale", "given", "active"),
)


def fits(constraints: Constraints) -> bool:
    """Whether a slot can hold these wishes."""
    return constraints.chords is None or len(constraints.chords) <= MAX_CHORDS


class SlotDraft(SlotNumbers):
    """`Draft`, `Constraints` and `Steering`.

    Args:
        song: see `SlotCopies`.

    Attributes:
        active: 1 while the song is being written.
        bpm, signature: what is wished, as values of BPM and TS.
        lists: 1 if the instruments of the band are wished.
        chord_count: how many chords are wished, 0 for none.
        scale: 1 if notes outside a scale are discouraged.
        given: 0 in songs of which nothing is given. 2 where the last token was: no note may follow; else 1.
        within: bool [S, VOCAB_SIZE], ids that violate no wish, whatever comes before them.
        pitches: bool [S, instruments + 1, 128], which may be played; of no instrument in the last row.
        chords: int64 [S, MAX_CHORDS], ids.
        of_chords, of_pitches: float32 [S, VOCAB_SIZE], what a scale adds to logits; the second where an
            instrument other than the drums plays.
        density: float32 [S, instruments + 1], notes a bar; -1 where none is wished.
    """

    def __init__(self, slots: int, tables: Tables, device: torch.device, song: int = 0):
        super().__init__(_NAMES, slots, device)
        self._tables = tables
        self.grammar = SlotGrammar(slots, tables, device)
        self.copies = SlotCopies(slots, tables, device, song)

        def empty(*shape: int, dtype=torch.bool) -> Tensor:
            return torch.zeros((slots, *shape), dtype=dtype, device=device)

        self.within = empty(vocab.VOCAB_SIZE)
        self.pitches = empty(_INSTRUMENTS + 1, len(P))
        self.chords = empty(MAX_CHORDS, dtype=torch.int64)
        self.of_chords = empty(vocab.VOCAB_SIZE, dtype=torch.float32)
        self.of_pitches = empty(vocab.VOCAB_SIZE, dtype=torch.float32)
        self.density = empty(_INSTRUMENTS + 1, dtype=torch.float32)
        self._id = torch.arange(vocab.VOCAB_SIZE, device=device)
        self._slot = torch.arange(slots, device=device)
        family = tables.family
        self._begins_note = (family == t.T) | (family == t.P)
        self._leaves = ~(self._begins_note | (family == t.L) | (family == t.V))
        self.active.zero_()

    def load(self, slot: int, state: DraftState) -> None:
        """Go on with a draft in this slot.

        Raises:
            ValueError: its wishes do not fit, see `fits`, or the song does not, see `SlotCopies`.
        """
        wishes = state.constraints
        if not fits(wishes):
            raise ValueError(f"at most {MAX_CHORDS} chords, got {len(wishes.chords)}")
        within = wishes.allowed_ids() if state.given is None else state.given.within.copy()
        of_chords = np.zeros(vocab.VOCAB_SIZE, dtype=np.float32)
        of_pitches = of_chords.copy()
        if wishes.chords is None and wishes.scale is not None:
            outside = CHORD.start + np.flatnonzero(~wishes.chords_in_scale())
            if wishes.strict_scale:
                within[outside] = False
            else:
                of_chords[outside] = -OUTSIDE_SCALE
        if wishes.scale is not None and not wishes.strict_scale:
            of_pitches[P.start : P.stop][~wishes.in_scale()] = -OUTSIDE_SCALE
        chords = np.zeros(MAX_CHORDS, dtype=np.int64)
        chords[: len(wishes.chords or ())] = wishes.chords or ()
        density = np.full(_INSTRUMENTS + 1, -1, dtype=np.float32)
        density[list(wishes.densities)] = list(wishes.densities.values())
        pitches = np.ones((_INSTRUMENTS + 1, len(P)), dtype=bool)
        if wishes.strict_scale:
            pitches[: vocab.DRUMS] = wishes.in_scale()
        for instrument in wishes.registers:
            pitches[instrument] = wishes.pitches(instrument)
        for into, values in (
            (self.within, within),
            (self.pitches, pitches),
            (self.chords, chords),
            (self.of_chords, of_chords),
            (self.of_pitches, of_pitches),
            (self.density, density),
        ):
            into[slot] = torch.as_tensor(values, device=into.device)
        self.grammar.load(slot, state.grammar)
        self.copies.load(slot, state)
        self.put(
            slot,
            **{name: getattr(state, name) for name in _NAMES[:7]},
            bpm=-1 if wishes.bpm is None else wishes.bpm - vocab.MIN_BPM,
            signature=-1 if wishes.signature is None else wishes.signature,
            lists=wishes.instruments is not None,
            chord_count=len(wishes.chords or ()),
            scale=wishes.scale is not None and not wishes.strict_scale,
            given=0 if state.given is None else 1 + state.given.beside,
            active=1,
        )

    def _instrument_row(self) -> Tensor:
        return torch.where(self.instrument < 0, _INSTRUMENTS, self.instrument)

    def _last_bar(self) -> Tensor:
        return (self.new_bars == self.bars) & self.grammar.bar_ends()

    def allowed(self) -> Tensor:
        """The ids that may come next, bool [S, VOCAB_SIZE]: one alone where it is required."""
        grammar = self.grammar
        allowed = grammar.allowed() & self.within
        bar = self.new_bars - (~grammar.bar_ends()).long()
        only = read(self.chords, bar.remainder(self.chord_count.clamp(min=1)))
        free = (self.chord_count == 0)[:, None]
        allowed[:, CHORD.start : CHORD.stop] &= free | (self._id[CHORD.start : CHORD.stop] == only[:, None])
        allowed[:, P.start : P.stop] &= self.pitches[self._slot, self._instrument_row()]
        required = self._required(allowed)

        lists = grammar.lists_band()
        begins = ((self.new_tokens == 0) & ~lists)[:, None]  # a new bar, whatever a prompt ends with
        allowed[:, : CHORD.start] &= ~begins
        allowed[:, CHORD.stop :] &= ~begins
        allowed[:, TS.start : TS.stop] &= ~grammar.inside_bar()[:, None]
        last, no_note = self._last_bar(), self.has_note == 0
        allowed &= self._leaves | (self.given != 2)[:, None]
        no_end = (self.new_bars == 0) | no_note | (self.bars >= 0) & ~last
        allowed[:, vocab.EOS] &= ~no_end
        allowed[:, CHORD.start : CHORD.stop] &= ~(last & no_note)[:, None]
        return torch.where((required >= 0)[:, None], self._id == required[:, None], allowed)

    def _required(self, allowed: Tensor) -> Tensor:
        """As of `Constraints`: an id, or -1."""
        grammar = self.grammar
        lists = grammar.lists_band()

        def wished(wish: Tensor, family: vocab.Family, in_force: Tensor) -> Tensor:
            token = family.start + wish.clamp(min=0)
            return torch.where((wish >= 0) & (in_force != wish) & read(allowed, token), token, -1)

        bpm = wished(self.bpm, BPM, grammar.bpm)
        signature = wished(self.signature, TS, grammar.signature)
        required = torch.where(signature >= 0, signature, bpm)
        band = allowed[:, BAND.start : BAND.stop]
        listed = torch.where(band, self._id[BAND.start : BAND.stop], vocab.VOCAB_SIZE).amin(dim=1)
        required = torch.where((self.lists > 0) & lists & (listed < vocab.VOCAB_SIZE), listed, required)
        return torch.where((self.new_bars > 0) | lists, required, -1)

    def bias(self) -> Tensor:
        """What to add to the logits of the next token, float32 [S, VOCAB_SIZE]."""
        sings = (self.scale > 0) & (self.instrument >= 0) & (self.instrument != vocab.DRUMS)
        bias = self.of_chords + self.of_pitches * sings[:, None]
        density = read(self.density, self._instrument_row())
        missing = density - self.notes
        too_few = (PER_NOTE * missing).clamp(max=MOST)[:, None] * self._leaves
        too_many = (PER_NOTE * (1 - missing)).clamp(max=MOST)[:, None] * self._begins_note
        differs = torch.where((missing > 0)[:, None], too_few, too_many)
        bias = torch.where((density >= 0)[:, None], bias - differs, bias)
        return self.copies.held_back(bias, self._instrument_row())

    def take(
        self, token: Tensor, where: Tensor, laid: Tensor | bool = False, last: Tensor | bool = False
    ) -> Tensor:
        """`Draft.take` for the songs in `where` (bool [S]). Songs that are finished by it become inactive.

        Args:
            laid: bool [S], which tokens were not drawn.
            last: bool [S], which end the last bar in which something is drawn.

        Returns:
            Where the token was appended.
        """
        tables, grammar = self._tables, self.grammar
        family = tables.family[token]
        chord = family == t.CHORD
        begins = chord & grammar.bar_ends()
        ends = (family == t.EOS) | chord & self._last_bar() | last
        appended = where & ~ends

        inst = family == t.INST
        instrument = torch.where(inst, tables.switches_to[token], -1)
        advance(self.instrument, appended & (inst | chord), instrument)
        advance(self.notes, appended & inst, torch.zeros_like(self.notes))
        note = appended & (family == t.P)
        advance(self.notes, note, self.notes + 1)
        advance(self.has_note, note, 1)
        advance(self.new_bars, appended & begins, self.new_bars + 1)
        advance(self.new_tokens, appended, self.new_tokens + 1)
        given = appended & (self.given > 0)
        advance(self.max_tokens, given & laid, self.max_tokens + 1)  # which is of those that are drawn
        advance(self.given, given, torch.where(given & laid, 2, 1))
        grammar.push(token, appended)
        self.copies.push(token, appended)
        finished = where & (ends | (self.new_tokens >= self.max_tokens))
        advance(self.active, finished, 0)
        return appended
