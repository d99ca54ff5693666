"""What holds for each note and bar by what the user wishes: chords, key, registers, how many notes.

`constraints.Constraints` has the wishes; here is what they mean at one place of a song.
"""

import numpy as np

from ..tokens import vocab
from ..tokens.vocab import CHORD, INST, L, P, T, V
from .constraints import Constraints

# Nats: how much less likely a note outside the scale becomes, and a note too many, or an end too early, for
# each note by which a group differs from its density. A model that is sure of itself is not overruled.
OUTSIDE_SCALE = 4.0
PER_NOTE = 0.75
MOST = 6.0

_NOTES = (T, P)  # tokens that begin a note, or the onset of one
_WITHIN_NOTES = (T, P, L, V)


class Steering:
    """Follows the new bars of one song, token by token."""

    def __init__(self, constraints: Constraints):
        self._wishes = constraints
        self._bars = 0  # new bars begun
        self._instrument: int | None = None
        self._notes = 0  # of the group so far

    def push(self, token: int, begins_bar: bool) -> None:
        """`begins_bar`: whether the token begins a new bar, and not a further part of a long one."""
        self._bars += begins_bar
        if token in INST:
            self._instrument, self._notes = int(vocab.INSTRUMENTS[token - INST.start]), 0
        elif token in CHORD:
            self._instrument = None
        elif token in P:
            self._notes += 1

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
        if self._instrument is not None:
            allowed[P.start : P.stop] &= wishes.pitches(self._instrument)

    def bias(self) -> np.ndarray | None:
        """What to add to the logits of the next token, float32 [VOCAB_SIZE]; None for nothing."""
        wishes = self._wishes
        soft_scale = wishes.scale is not None and not wishes.strict_scale
        density = wishes.densities.get(self._instrument)
        if not soft_scale and density is None:
            return None
        bias = np.zeros(vocab.VOCAB_SIZE, dtype=np.float32)
        if soft_scale:
            if wishes.chords is None:
                bias[CHORD.start : CHORD.stop][~wishes.chords_in_scale()] -= OUTSIDE_SCALE
            if self._instrument not in (None, vocab.DRUMS):
                bias[P.start : P.stop][~wishes.in_scale()] -= OUTSIDE_SCALE
        if density is not None:
            missing = density - self._notes
            if missing > 0:
                leaving = np.ones(vocab.VOCAB_SIZE, dtype=bool)
                for family in _WITHIN_NOTES:
                    leaving[family.start : family.stop] = False
                bias[leaving] -= min(MOST, PER_NOTE * missing)
            else:
                for family in _NOTES:
                    bias[family.start : family.stop] -= min(MOST, PER_NOTE * (1 - missing))
        return bias
