"""`read_context` one token after the other, as generation needs it: the same numbers, from a small state."""

from typing import NamedTuple

from ..kernels.structure import NO_INSTRUMENT
from ..tokens import vocab
from ..tokens.attributes import KIND_OF_ID, STRUCTURAL
from .inputs import BAR_ENDS, ChordGuesses, InputFeatures

_KIND = KIND_OF_ID.tolist()
_INSTRUMENTS = vocab.INSTRUMENTS.tolist()
_SPECIAL = (vocab.PAD, vocab.BOS, vocab.EOS)


class TokenFacts(NamedTuple):
    """Of one token: what `attributes.scan`, `Structure` and `read_context` say of it in its document."""

    token: int
    position: int
    bar: int
    inst: int
    kind: int
    onset: int
    features: InputFeatures  # of ints
    guesses: ChordGuesses  # of ints


class TokenReader:
    """Reads one document; `push` takes its tokens in order.

    Each method below keeps and returns one feature. A document must begin as `attributes.scan` says.
    """

    def __init__(self):
        self._position = -1
        self._chords: list[int] = []  # labels of the bars so far, as ids
        self._inst, self._onsets = NO_INSTRUMENT, 0
        self._force: dict[str, int] = {}  # by name of the family; emptied where a group begins or ends
        self._last: dict[str, int] = {}  # the last token of each family, as far back as `previous` looks
        self._followed: dict[tuple[int, int, int], int] = {}
        self._place: tuple[int, int, int] | None = None  # of the previous token, a key of `_followed`
        self._next_instrument: dict[int, int] = {}
        self._head: int | None = None  # a key of `_next_instrument`
        self._after_one: dict[int, int] = {}
        self._after_two: dict[tuple[int, int], int] = {}
        self._guesses = ChordGuesses(*(0 for _ in ChordGuesses._fields))

    def push(self, token: int) -> TokenFacts:
        """What the model knows of the next token of the document.

        Args:
            token: its id, 0 <= token < VOCAB_SIZE.
        """
        family, kind = vocab.family_of(token), _KIND[token]
        self._position += 1
        if family is vocab.CHORD:
            self._guesses = self._chord_guesses(token)
        if kind == STRUCTURAL:
            self._force.clear()
            if family is vocab.INST:
                self._inst = _INSTRUMENTS[token - family.start]
            elif family is vocab.CHORD or family is vocab.BAND or token in _SPECIAL:
                self._inst = NO_INSTRUMENT
        elif family is not vocab.P:
            self._force[family.name] = token - family.start + 1
            self._onsets += family is vocab.T
        onset = self._force.get("T", 0)
        features = InputFeatures(
            onset=onset,
            length=self._force.get("L", 0),
            velocity=self._force.get("V", 0),
            chord=self._chords[-1] - vocab.CHORD.start + 1 if self._chords else 0,
            previous=self._previous(token, family, kind),
            repeat=self._repeat(token, onset),
            next_instrument=self._instrument_after(token, family),
        )
        return TokenFacts(
            token=token,
            position=self._position,
            bar=max(len(self._chords) - 1, 0),
            inst=self._inst,
            kind=kind,
            onset=-1 if kind == STRUCTURAL else self._onsets - 1,
            features=features,
            guesses=self._guesses,
        )

    def _previous(self, token: int, family: vocab.Family, kind: int) -> int:
        last = self._last
        if kind == STRUCTURAL:
            for name in ("T", "P", "L", "V"):
                last.pop(name, None)
            if family is vocab.CHORD:
                last.pop("INST", None)
            if token in _SPECIAL:
                return 0
        previous = last.get(family.name, 0)
        last[family.name] = token
        return previous

    def _repeat(self, token: int, onset: int) -> int:
        if self._place is not None:
            self._followed[self._place] = token
        self._place = (self._inst, onset, token)
        return self._followed.get(self._place, 0)

    def _instrument_after(self, token: int, family: vocab.Family) -> int:
        if family is vocab.INST or family is vocab.CHORD:
            rank = token - vocab.INST.start + 1 if family is vocab.INST else 0
            if self._head is not None:
                self._next_instrument[self._head] = rank or BAR_ENDS
            self._head = rank
        return self._next_instrument.get(self._head, 0)

    def _chord_guesses(self, label: int) -> ChordGuesses:
        """Of the tokens of a new bar with this label."""
        chords = self._chords
        before = chords[-1] if chords else 0
        if chords:
            two_before = chords[-2] if len(chords) > 1 else 0
            self._after_one[before] = self._after_two[two_before, before] = label
        chords.append(label)
        ago = (chords[-bars] if len(chords) >= bars else 0 for bars in (1, 2, 4, 8))
        after_two = self._after_two.get((before, label), 0)
        return ChordGuesses(*ago, self._after_one.get(label, 0), after_two)
