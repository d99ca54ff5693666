"""Which of its last bars an instrument is about to play again (`generation.steering`), for all slots at once.

The bars that are compared lie one behind the other in the song's *log*: of each group of notes a 0 and its T
and P tokens, so that a bar is known by where its notes begin, and ends where the next 0 is.
"""

import numpy as np
import torch
from torch import Tensor

from ...tokens import vocab
from ..draft import DraftState
from ..steering import BARS_BACK
from . import tables as t
from .tables import SlotNumbers, Tables, advance, read, write

_ALIKE = tuple(f"alike_{number}" for number in range(BARS_BACK))
_NAMES = ("holds", "size", "begin", *_ALIKE)
_LAST_RANK = len(vocab.INST) - 1


class SlotCopies(SlotNumbers):
    """`Steering` as far as repetition is held back.

    Args:
        song: N, how many tokens the songs have at most in which it is.

    Attributes:
        holds: 1 if it is held back in the song; in others nothing is logged.
        size: how long the log is.
        begin: where in the log the notes of the group begin that is written; -1 between groups.
        alike_0, ...: where those of the instrument's last bars begin that began as this one; or -1.
        log: int32 [S, N + 1], 0 for an INST token, and the T and P tokens; the last column is for no song.
        more: int32 [S, N + 1], how many L and V tokens follow each of them.
        starts: int64 [S, instruments, BARS_BACK], by the value of INST where its last bars begin, the latest
            one last; -1 where there is none.
        penalty: float32 [S, instruments + 1], by instrument; 0 for none in the last one.
    """

    def __init__(self, slots: int, tables: Tables, device: torch.device, song: int = 0):
        super().__init__(_NAMES, slots, device)
        self._tables = tables
        self.log = torch.zeros((slots, song + 1), dtype=torch.int32, device=device)
        self.more = torch.zeros_like(self.log)
        self.starts = torch.full((slots, len(vocab.INST), BARS_BACK), -1, dtype=torch.int64, device=device)
        self.penalty = torch.zeros((slots, vocab.NO_INSTRUMENT + 1), dtype=torch.float32, device=device)
        self._id, self._slot = (
            torch.arange(vocab.VOCAB_SIZE, device=device),
            torch.arange(slots, device=device),
        )
        family = tables.family
        self._states_more = (family == t.L) | (family == t.V)
        self._leaves = ~(self._states_more | (family == t.T) | (family == t.P))
        self.all.fill_(0)

    def _alike(self) -> list[Tensor]:
        return [getattr(self, name) for name in _ALIKE]

    def load(self, slot: int, state: DraftState) -> None:
        """Go on with a draft in this slot.

        Raises:
            ValueError: repetition is held back, and the song may become longer than there is room for.
        """
        penalties = state.constraints.repetition_penalties
        values = np.zeros(vocab.NO_INSTRUMENT + 1, dtype=np.float32)
        values[list(penalties)] = list(penalties.values())
        device = self.all.device
        self.penalty[slot] = torch.from_numpy(values).to(device)
        holds = bool(values.any())
        ids = np.array(state.ids if holds else (), dtype=np.int64)
        if holds and state.most_tokens >= self.log.shape[1]:
            room = self.log.shape[1] - 1
            raise ValueError(f"a song of {state.most_tokens} tokens, and there is room for {room}")
        family = self._tables.family.cpu().numpy()[ids]
        logged = np.isin(family, (t.INST, t.T, t.P))
        log = np.where(family == t.INST, 0, ids)[logged]
        entry = np.cumsum(logged) - 1  # of each token
        more = np.bincount(entry[np.isin(family, (t.L, t.V))], minlength=len(log))
        begins = np.flatnonzero(log == 0) + 1
        instruments = ids[family == t.INST] - vocab.INST.start
        starts = np.full((len(vocab.INST), BARS_BACK), -1)
        for instrument in np.unique(instruments):
            starts[instrument] = _last(begins[instruments == instrument])
        begin, alike = -1, _last(())
        heads = family[(family == t.INST) | (family == t.CHORD)]
        if len(heads) and heads[-1] == t.INST:
            begin = int(begins[-1])
            bar = log[begin:]
            before = _last(begins[:-1][instruments[:-1] == instruments[-1]])
            alike = [
                at if at >= 0 and np.array_equal(log[at : at + len(bar)], bar) else -1
                for at in before.tolist()
            ]
        for into, entries in ((self.log, log), (self.more, more)):
            into[slot, : len(entries)] = torch.from_numpy(entries).to(device, torch.int32)
        self.starts[slot] = torch.from_numpy(starts).to(device)
        self.put(slot, holds=holds, size=len(log), begin=begin, **dict(zip(_ALIKE, alike)))

    def held_back(self, bias: Tensor, instrument: Tensor) -> Tensor:
        """`bias` [S, VOCAB_SIZE] less what holds back what would go on with a copy.

        Args:
            instrument: [S], that plays; `NO_INSTRUMENT` for none.
        """
        penalty, at = read(self.penalty, instrument), self.size - self.begin
        copies = (self.holds > 0) & (self.begin >= 0) & (at > 0)
        so_far = read(self.more, (self.size - 1).clamp(min=0))
        for alike in self._alike():
            here = torch.where(copies & (alike >= 0), alike + at, 0)
            token, states_more = read(self.log, here), read(self.more, (here - 1).clamp(min=0)) > so_far
            held = torch.where((token == 0)[:, None], self._leaves, self._id == token[:, None])
            held |= ~states_more[:, None] & self._states_more
            bias = bias - torch.where(here > 0, penalty, 0)[:, None] * held
        return bias

    def push(self, token: Tensor, where: Tensor) -> None:
        """A token more of the songs in `where` (bool [S])."""
        tables, where = self._tables, where & (self.holds > 0)
        family, rank = tables.family[token], tables.value[token].clamp(max=_LAST_RANK)
        inst, chord = where & (family == t.INST), where & (family == t.CHORD)
        note, more = where & ((family == t.T) | (family == t.P)), where & self._states_more[token]
        starts = self.starts[self._slot, rank]
        for alike, start in zip(self._alike(), starts.unbind(dim=1)):
            goes_on = read(self.log, torch.where(note & (alike >= 0), alike + self.size - self.begin, 0))
            advance(alike, note & (goes_on != token), -1)
            advance(alike, inst | chord, torch.where(inst, start, -1))
        later = torch.cat((starts[:, 1:], self.size[:, None] + 1), dim=1)
        self.starts[self._slot, rank] = torch.where(inst[:, None], later, starts)
        last = (self.size - 1).clamp(min=0)
        write(self.more, more, last, read(self.more, last) + 1)
        write(self.log, inst | note, self.size, torch.where(inst, 0, token))
        write(self.more, inst | note, self.size, torch.zeros_like(token))
        advance(self.size, inst | note, self.size + 1)
        advance(self.begin, inst | chord, torch.where(inst, self.size, -1))


def _last(begins) -> np.ndarray:
    """The last `BARS_BACK` of them, behind -1 where there are fewer."""
    last = np.asarray(begins, dtype=np.int64)[-BARS_BACK:]
    return np.concatenate((np.full(BARS_BACK - len(last), -1), last))
