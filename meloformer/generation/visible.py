"""Which keys a new token attends to, kept so that finding them costs what is visible, not the whole song.

The tokens of a group (of one instrument in one bar) see the same summaries and the same earlier groups. So
the keys of a group are collected once, when it begins, into a *list* of keys side by side; each further token
adds its own key. Where kinds of tokens see different keys, by the kind rule, each has a list of its own.
"""

from array import array
from typing import NamedTuple

import numpy as np

from ..kernels.structure import NO_INSTRUMENT, kinds_seen
from ..model.token_reader import TokenFacts
from ..tokens.attributes import STRUCTURAL


class KeyList(NamedTuple):
    """What a token finds in its list of keys, and what must be done before it reads there.

    Attributes:
        number: which of the lists it is, below `VisibleKeys.lists`.
        begins: whether the list is made anew; it then starts with the summaries of all complete bars.
        start: where `tokens` go.
        tokens: positions of regular tokens whose keys are to be copied into the list.
        place: where the token's own key goes. It sees this one and those before.
    """

    number: int
    begins: bool
    start: int
    tokens: np.ndarray
    place: int


class VisibleKeys:
    """The visibility rule of `kernels.structure` for the tokens of one document, one after the other."""

    def __init__(self, near_bars: tuple[int, ...], kind_rule: str):
        seen = kinds_seen(kind_rule)  # by kind of the query: bits of the kinds of keys
        self._near_bars = near_bars
        self._masks = sorted(set(seen))
        self._list_of_kind = [self._masks.index(mask) for mask in seen]
        self._kinds = array("B")  # of all tokens so far
        self._bar_starts: list[int] = []
        self._of_instrument: dict[int, array] = {NO_INSTRUMENT: array("q")}  # positions
        self._group: tuple[int, int] | None = None
        self._onset, self._onset_start = -1, 0
        self._read = [0] * self.lists  # tokens that were considered for the list; 0: it is not begun
        self._length = [0] * self.lists

    @property
    def lists(self) -> int:
        return len(self._masks)

    def bar_of(self, bar: int) -> slice:
        """Positions of the tokens of a bar so far."""
        bounds = *self._bar_starts[bar : bar + 2], len(self._kinds)
        return slice(*bounds[:2])

    def push(self, token: TokenFacts) -> None:
        """Append a token whose keys nobody asks for."""
        self._begin(token)
        self._append(token)

    def keys_of(self, token: TokenFacts) -> KeyList:
        """Append a token, and say which keys it sees: earlier ones as the rule has it, and its own."""
        self._begin(token)
        number = self._list_of_kind[token.kind]
        mask, position = self._masks[number], token.position
        begins = self._read[number] == 0
        if begins:
            kept = self._earlier(token, mask)
            self._length[number] = token.bar  # summaries
        else:
            kept = self._of_kinds(np.arange(self._read[number], position), mask)
        # A note's token sees its whole onset. What of it is not for the list is read and then overwritten.
        onset = () if token.kind == STRUCTURAL else np.arange(self._onset_start, position)
        more = self._of_kinds(np.asarray(onset, dtype=np.int64), ~mask)
        start = self._length[number]
        self._length[number] += len(kept)
        self._read[number] = position
        place = self._length[number] + len(more)
        if not len(more) and mask >> token.kind & 1:  # its own key may stay where it is
            self._length[number] += 1
            self._read[number] = position + 1
        self._append(token)
        return KeyList(number, begins, start, np.concatenate((kept, more)), place)

    def seen_by(self, token: TokenFacts) -> np.ndarray:
        """Append a token, and say which tokens it sees, itself among them: positions [keys], rising."""
        self._begin(token)
        visible = self._earlier(token, self._masks[self._list_of_kind[token.kind]])
        if token.kind != STRUCTURAL:  # a note's token sees its whole onset
            visible = np.union1d(visible, np.arange(self._onset_start, token.position))
        self._append(token)
        return np.append(visible, token.position)

    def _begin(self, token: TokenFacts) -> None:
        if token.bar == len(self._bar_starts):
            self._bar_starts.append(token.position)
        if (token.bar, token.inst) != self._group:
            self._group = token.bar, token.inst
            self._read = [0] * self.lists
        if token.onset != self._onset:
            self._onset, self._onset_start = token.onset, token.position

    def _append(self, token: TokenFacts) -> None:
        self._kinds.append(token.kind)
        self._of_instrument.setdefault(token.inst, array("q")).append(token.position)

    def _earlier(self, token: TokenFacts, mask: int) -> np.ndarray:
        """Positions of the visible tokens of these kinds, but for the token itself."""
        bounds = [*self._bar_starts, token.position]
        visible = [np.asarray(self._of_instrument[NO_INSTRUMENT])]  # all of them are global
        if token.inst in self._of_instrument:
            visible.append(np.asarray(self._of_instrument[token.inst]))
        for bar in (token.bar - distance for distance in self._near_bars if distance <= token.bar):
            visible.append(np.arange(bounds[bar], bounds[bar + 1]))
        return self._of_kinds(np.unique(np.concatenate(visible)), mask)

    def _of_kinds(self, positions: np.ndarray, mask: int) -> np.ndarray:
        if not len(positions):
            return positions
        return positions[(mask >> np.asarray(self._kinds)[positions].astype(np.int64)) & 1 == 1]
