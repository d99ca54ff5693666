"""What the user fixes for the new bars: time signature, tempo, instruments."""

from dataclasses import dataclass

import numpy as np

from ..tokens import vocab
from ..tokens.grammar import Grammar


@dataclass(frozen=True)
class Constraints:
    """What holds from the first new bar to the end; None leaves it to the model.

    signature: index into `vocab.SIGNATURES`.
    bpm: quarter notes per minute, a whole number.
    instruments: the only ones that may play: programs 0..127, and `vocab.DRUMS`. The band list of a new song
        names exactly these; in the continuation of a song those of them may play that its list names.
    """

    signature: int | None = None
    bpm: int | None = None
    instruments: tuple[int, ...] | None = None

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
