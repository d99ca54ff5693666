"""What the user wishes for the new bars: time signature, tempo, instruments, chords, key and more."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from ..tokens import vocab
from ..tokens.grammar import Grammar
from .harmony import chord_pitches


@dataclass(frozen=True)
class Constraints:
    """What holds from the first new bar to the end; None leaves it to the model.

    signature: index into `vocab.SIGNATURES`.
    bpm: quarter notes per minute, a whole number.
    instruments: the only ones that may play: programs 0..127, and `vocab.DRUMS`. The band list of a new song
        names exactly these; in the continuation of a song those of them may play that its list names.
    chords: ids of CHORD tokens, one a bar, again from the first one when they are used up.
    scale: pitch classes, 0..11 above C. Other notes, and chords with other notes, are discouraged; the drums
        have no key.
    strict_scale: they are forbidden.
    registers: by instrument the lowest and the highest MIDI pitch that it plays.
    densities: by instrument how many notes it should play in a bar in which it plays; a wish, not a bound.
    repetition_penalties: by instrument how many nats less likely a note becomes that goes on as in one of the
        instrument's last bars which began as this one; added up over those bars. A wish, too.
    """

    signature: int | None = None
    bpm: int | None = None
    instruments: tuple[int, ...] | None = None
    chords: tuple[int, ...] | None = None
    scale: tuple[int, ...] | None = None
    strict_scale: bool = False
    registers: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    densities: Mapping[int, float] = field(default_factory=dict)
    repetition_penalties: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self):
        for instrument, (low, high) in self.registers.items():
            if not self.pitches(instrument).any():
                raise ValueError(f"no note from {low} to {high} is in the scale {self.scale}")
        if self.chords is not None and not self.chords:
            raise ValueError("chords must not be empty")

    def in_scale(self) -> np.ndarray:
        """Which MIDI pitches are in the scale: bool [128]; all without one."""
        return np.isin(np.arange(len(vocab.P)) % 12, range(12) if self.scale is None else self.scale)

    def chords_in_scale(self) -> np.ndarray:
        """Which CHORD tokens have no note outside of the scale: bool, in the order of their ids."""
        return _chords_within(frozenset(range(12) if self.scale is None else self.scale))

    def pitches(self, instrument: int) -> np.ndarray:
        """The MIDI pitches that an instrument may play: bool [128]."""
        low, high = self.registers.get(instrument, (0, len(vocab.P) - 1))
        number = np.arange(len(vocab.P))
        allowed = (low <= number) & (number <= high)
        if self.strict_scale and instrument != vocab.DRUMS:
            allowed &= self.in_scale()
        return allowed

    def allowed_ids(self) -> np.ndarray:
        """The ids that do not violate a constraint, whatever comes before them: bool [VOCAB_SIZE]."""
        mask = np.ones(vocab.VOCAB_SIZE, dtype=bool)
        if self.signature is not None:
            mask[vocab.TS.start : vocab.TS.stop] = False
            mask[vocab.CUT.start : vocab.CUT.stop] = False
            mask[self._signature_id] = True
        if self.bpm is not None:
            mask[vocab.BPM.start : vocab.BPM.stop] = False
            mask[self._bpm_id] = True
        if self.instruments is not None:
            for family in (vocab.BAND, vocab.INST):
                mask[family.start : family.stop] = False
                mask[family.start + vocab.INSTRUMENT_RANK[list(self.instruments)]] = True
        return mask

    def required_id(self, grammar: Grammar, allowed: np.ndarray) -> int | None:
        """The id that must come next so that band, signature and tempo become the ones fixed here.

        Args:
            grammar: the state of the song so far.
            allowed: bool [VOCAB_SIZE], the ids that may come next; no other one is returned.

        Returns:
            None if all are in force, or cannot be stated at this place.
        """
        if self.instruments is not None and grammar.lists_band:
            for rank in sorted(vocab.INSTRUMENT_RANK[list(self.instruments)].tolist()):
                if allowed[vocab.BAND.start + rank]:
                    return vocab.BAND.start + rank
        if self.signature is not None and grammar.signature != self.signature and allowed[self._signature_id]:
            return self._signature_id
        if self.bpm is not None and grammar.bpm != self.bpm and allowed[self._bpm_id]:
            return self._bpm_id
        return None

    def check_band(self, grammar: Grammar) -> None:
        """Raises ValueError if the song goes on, and none of `instruments` is in its band list."""
        if self.instruments is None or not grammar.band or grammar.lists_band:
            return
        if not set(self.instruments) & set(grammar.band):
            raise ValueError(f"the song's band {grammar.band} has none of the instruments {self.instruments}")

    @property
    def _signature_id(self) -> int:
        return vocab.TS.start + self.signature

    @property
    def _bpm_id(self) -> int:
        return vocab.BPM.start + self.bpm - vocab.MIN_BPM


@cache
def _chords_within(scale: frozenset[int]) -> np.ndarray:
    return np.array([chord_pitches(label) <= scale for label in range(vocab.CHORD.start, vocab.CHORD.stop)])
