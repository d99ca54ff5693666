"""What holds for each note and bar by what the user wishes: chords, key, registers, how many notes, how new.

`constraints.Constraints` has the wishes; here is what they mean at one place of a song.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator

import numpy as np

from ..tokens import vocab
from ..tokens.vocab import CHORD, INST, L, P, T, V
from .constraints import Constraints

# Nats: how much less likely a note outside the scale becomes, and a note too many, or an end too early, for
# each note by which a group differs from its density. A model that is sure of itself is not overruled.
OUTSIDE_SCALE = 4.0
PER_NOTE = 0.75
MOST = 6.0

BARS_BACK = 4  # those in which an instrument played last, against which repetition is held

_NOTES = (T, P)  # tokens that begin a note, or the onset of one
_WITHIN_NOTES = (T, P, L, V)


# Tokens that end the notes of a group.
_LEAVING = np.ones(vocab.VOCAB_SIZE, dtype=bool)
for _family in _WITHIN_NOTES:
    _LEAVING[_family.start : _family.stop] = False


class Steering:
    """Follows the new bars of one song, token by token.

    Args:
        heard: the tokens before the new bars.

    Attributes:
        instrument: of the group of notes that is written; None between groups, and before the first new one.
        notes: how many notes that group has so far.
    """

    def __init__(self, constraints: Constraints, heard: Iterable[int] = ()):
        self._wishes = constraints
        self._bars = 0  # new bars begun
        self.instrument: int | None = None
        self._pitches: np.ndarray | None = None  # those that the instrument may play
        self.notes = 0  # of the group so far
        # What a scale that is no bound adds to the logits of chords, and of pitches but for the drums.
        self._of_chords = np.zeros(vocab.VOCAB_SIZE, dtype=np.float32)
        self._of_pitches = self._of_chords.copy()
        if constraints.scale is not None and not constraints.strict_scale:
            if constraints.chords is None:
                self._of_chords[CHORD.start : CHORD.stop][~constraints.chords_in_scale()] = -OUTSIDE_SCALE
            self._of_pitches[P.start : P.stop][~constraints.in_scale()] = -OUTSIDE_SCALE
        self._copies = _Copies() if any(constraints.repetition_penalties.values()) else None
        if self._copies is not None:
            for token in heard:
                self._copies.push(token)

    def push(self, token: int, begins_bar: bool) -> None:
        """`begins_bar`: whether the token begins a new bar, and not a further part of a long one."""
        self._bars += begins_bar
        if token in INST:
            self.instrument, self.notes = int(vocab.INSTRUMENTS[token - INST.start]), 0
            self._pitches = self._wishes.pitches(self.instrument)
        elif token in CHORD:
            self.instrument = self._pitches = None
        elif token in P:
            self.notes += 1
        if self._copies is not None:
            self._copies.push(token)

    def forbid(self, allowed: np.ndarray, bar_ends: bool) -> None:
        """Take out of the mask `allowed` (bool [VOCAB_SIZE]) what may not come next.

        Args:
            bar_ends: a CHORD here would begin a bar, and not a further part of a long one.
        """
        wishes = self._wishes
        if wishes.chords is not None:
            bar = self._bars if bar_ends else self._bars - 1
            only = wishes.chords[bar % len(wishes.chords)]
            allowed[CHORD.start : only] = allowed[only + 1 : CHORD.stop] = False
        elif wishes.strict_scale:
            allowed[CHORD.start : CHORD.stop] &= wishes.chords_in_scale()
        if self._pitches is not None:
            allowed[P.start : P.stop] &= self._pitches

    def bias(self) -> np.ndarray | None:
        """What to add to the logits of the next token, float32 [VOCAB_SIZE]; None for nothing."""
        wishes = self._wishes
        density = wishes.densities.get(self.instrument)
        penalty = wishes.repetition_penalties.get(self.instrument, 0.0)
        if density is None and not penalty and (wishes.scale is None or wishes.strict_scale):
            return None
        bias = self._of_chords.copy()
        if self.instrument not in (None, vocab.DRUMS):
            bias += self._of_pitches
        if density is not None:
            missing = density - self.notes
            if missing > 0:
                bias[_LEAVING] -= min(MOST, PER_NOTE * missing)
            else:
                for family in _NOTES:
                    bias[family.start : family.stop] -= min(MOST, PER_NOTE * (1 - missing))
        if penalty and self._copies is not None:
            for token, states_more in self._copies.next():
                bias[_LEAVING if token is None else token] -= penalty
                if not states_more:  # or what is held back here would come as a length or a loudness
                    bias[L.start : V.stop] -= penalty
        return bias


class _Copies:
    """Which of its last bars an instrument is about to play again.

    Bars are compared by the onsets and pitches of their notes, not by lengths and loudness. A bar is the list
    of its T and P tokens, each with the number of L and V tokens that follow it.
    """

    def __init__(self):
        self._played: dict[int, deque[list[list[int]]]] = defaultdict(lambda: deque(maxlen=BARS_BACK))
        self._bar: list[list[int]] = []  # so far
        self._alike: list[list[list[int]]] = []  # those of the last ones that begin so

    def push(self, token: int) -> None:
        if token in INST:
            self._alike = list(self._played[token])
            self._bar = []
            self._played[token].append(self._bar)
        elif token in CHORD:
            self._alike, self._bar = [], []
        elif token in T or token in P:
            at = len(self._bar)
            self._alike = [other for other in self._alike if at < len(other) and other[at][0] == token]
            self._bar.append([token, 0])
        elif token in L or token in V:
            self._bar[-1][1] += 1

    def next(self) -> Iterator[tuple[int | None, bool]]:
        """For each of these bars, with which token it would be played on, None for no further note; and
        whether it states the length or loudness of a note before that.

        Nothing before the bar's first onset: that it begins as others makes no bar a copy.
        """
        at = len(self._bar)
        for other in self._alike if at else ():
            yield other[at][0] if at < len(other) else None, other[at - 1][1] > self._bar[-1][1]
