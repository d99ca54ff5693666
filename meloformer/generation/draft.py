"""One song while it is being written: what may come next, and where it may end. It knows no model."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..tokens import vocab
from ..tokens.grammar import GrammarState, check
from .constraints import Constraints
from .outline import Outline
from .sampling import Sampling
from .steering import Steering

DEFAULT_MAX_TOKENS = 24576  # few songs are longer
PLAIN_SAMPLING = Sampling()
UNCONSTRAINED = Constraints()


OPEN = -1  # in a queue of tokens that are given: here tokens are drawn, until a bar ends


class GivenState(NamedTuple):
    """Of a song of which something is given, and the model writes in some bars.

    queue: ids of the tokens that are given from here on, and `OPEN` after those of a bar in which the model
        writes; it ends with the last of these.
    within: bool [VOCAB_SIZE], what may follow in such bars.
    beside: whether nothing is written yet in the current one: no note may follow, then.
    """

    queue: Sequence[int]
    within: np.ndarray
    beside: bool


class DraftState(NamedTuple):
    """What decides how a draft goes on. Numbers are -1 for what there is not.

    Attributes:
        bars, max_tokens, constraints, sampling, seed: as for `Draft`.
        instrument, notes: as of `Steering`.
        has_note: whether there is one in the song.
        ids: all tokens so far.
        given: of a song of which something is given: then `new_tokens` and `max_tokens` count what is given
            so far, too, and neither ends are asked for, nor time signature, tempo and band.
    """

    grammar: GrammarState
    bars: int
    max_tokens: int
    new_bars: int
    new_tokens: int
    has_note: bool
    instrument: int
    notes: int
    constraints: Constraints
    sampling: Sampling
    seed: int
    ids: Sequence[int]
    given: GivenState | None = None

    @property
    def most_tokens(self) -> int:
        """How many tokens the song can have at its end."""
        queue = () if self.given is None else self.given.queue
        return len(self.ids) + self.max_tokens - self.new_tokens + len(queue)


class Draft:
    """A song from its prompt on. Take turns: `append_required` until it returns False, then `draw`.

    Args:
        prompt: ids of a song; an EOS is removed. None begins a new song.
        bars: number of new bars; None lets the model decide where to end.
        max_tokens: maximum number of new tokens: it cuts the song after its last complete note.
        sampling: how tokens are drawn.
        constraints: what the new bars must keep to.
        seed: of the random draws.

    Raises:
        ValueError: `bars` is below 1, the prompt breaks the grammar, or none of the instruments that
            `constraints` allows is in its band list (`attributes.with_instruments` adds them).

    Attributes:
        ids: all tokens so far, the prompt's and then the new ones.
        begin: how many of them are the prompt's, or the BOS of a new song.
        new_bars: how many new bars are begun.
        bar_line: the first `bar_line` tokens end with a complete bar, or with the prompt.
        complete: the first `complete` tokens are a song that may end there.
    """

    def __init__(
        self,
        prompt: np.ndarray | None = None,
        *,
        bars: int | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: Sampling = PLAIN_SAMPLING,
        constraints: Constraints = UNCONSTRAINED,
        seed: int = 0,
    ):
        if bars is not None and bars < 1:
            raise ValueError(f"bars must be positive, got {bars}")
        self.ids = [vocab.BOS] if prompt is None else [int(i) for i in prompt if i != vocab.EOS]
        self._grammar = check(np.array(self.ids))
        constraints.check_band(self._grammar)
        self._bars, self._max_tokens, self._sampling = bars, max_tokens, sampling
        self._constraints, self._within_constraints = constraints, constraints.allowed_ids()
        self._steering = Steering(constraints, self.ids)
        self._random = torch.Generator().manual_seed(seed)
        self._has_note = any(token in vocab.P for token in self.ids)
        self.begin = self.bar_line = len(self.ids)
        self.complete = self.begin
        self._ended = False
        self._allowed = self._within_constraints
        self.new_bars = 0

    @property
    def new_tokens(self) -> int:
        return len(self.ids) - self.begin

    @property
    def finished(self) -> bool:
        return self._ended or self.new_tokens >= self._max_tokens

    def append_required(self) -> bool:
        """Append the token that must come next, if there is only one choice by the constraints."""
        if self.finished:
            return False
        self._allowed = self._grammar.allowed() & self._within_constraints
        self._steering.forbid(self._allowed, self._grammar.bar_ends)
        if not self.new_bars and not self._grammar.lists_band:
            return False
        token = self._constraints.required_id(self._grammar, self._allowed)
        if token is None:
            return False
        self._append(token)
        return True

    def append_given(self) -> None:
        """Append what comes whatever is drawn: of new songs nothing is given."""

    def draw(self, logits: Tensor) -> bool:
        """Append a token that is drawn, or end the song.

        Args:
            logits: [VOCAB_SIZE] of the next token, float32 on CPU.

        Returns:
            Whether a token was appended.
        """
        grammar, allowed = self._grammar, self._allowed
        last_bar = self.new_bars == self._bars and grammar.bar_ends
        if not self.new_tokens and not grammar.lists_band:
            # A new bar begins here, whatever the prompt ends with.
            allowed[: vocab.CHORD.start] = allowed[vocab.CHORD.stop :] = False
        if grammar.inside_bar:  # no new time signature between the parts of a long bar
            allowed[vocab.TS.start : vocab.TS.stop] = False
        if self.new_bars == 0 or not self._has_note or (self._bars is not None and not last_bar):
            allowed[vocab.EOS] = False
        if last_bar and not self._has_note:
            allowed[vocab.CHORD.start : vocab.CHORD.stop] = False
        return self.take(self._drawn_from(logits))

    def take(self, token: int) -> bool:
        """Append a token that was drawn or required, or end the song: by EOS, or the bar after the last one.

        Returns:
            Whether it was appended.

        Raises:
            ValueError: the grammar does not allow it here.
        """
        ends = token in vocab.CHORD and self.new_bars == self._bars and self._grammar.bar_ends
        if token == vocab.EOS or ends:
            self.complete = self.bar_line = len(self.ids)
            self._ended = True
            return False
        self._append(token)
        return True

    def state(self) -> DraftState:
        """For whoever carries on in its place, and lets it `take` the tokens."""
        instrument = self._steering.instrument
        return DraftState(
            grammar=self._grammar.state(),
            bars=-1 if self._bars is None else self._bars,
            max_tokens=self._max_tokens,
            new_bars=self.new_bars,
            new_tokens=self.new_tokens,
            has_note=self._has_note,
            instrument=-1 if instrument is None else instrument,
            notes=self._steering.notes,
            constraints=self._constraints,
            sampling=self._sampling,
            seed=self._random.initial_seed(),
            ids=self.ids,
        )

    def _drawn_from(self, logits: Tensor) -> int:
        bias = self._steering.bias()
        if bias is not None:
            logits = logits + torch.from_numpy(bias)
        return self._sampling.draw(
            logits.masked_fill(~torch.from_numpy(self._allowed), -torch.inf), self._random
        )

    def end(self) -> None:
        """End the song after its last complete note."""
        self._ended = True

    def stop(self) -> None:
        """End the song after its last complete bar."""
        self.complete, self._ended = self.bar_line, True

    def song(self) -> np.ndarray:
        """Token ids (uint16 [n]) up to where the song may end, and EOS."""
        return np.array([*self.ids[: self.complete], vocab.EOS], dtype=np.uint16)

    def _append(self, token: int) -> None:
        begins_bar = token in vocab.CHORD and self._grammar.bar_ends
        self._steering.push(token, begins_bar)
        if begins_bar:
            self.new_bars += 1
            if self.new_bars > 1:
                self.bar_line = len(self.ids)
        self.ids.append(token)
        self._grammar.push(token)
        self._has_note = self._has_note or token in vocab.P
        if self._grammar.bar_complete:
            self.complete = len(self.ids)


class OutlinedDraft(Draft):
    """A song that is given but for some instruments in some bars.

    What stays is appended as it is. Where the model would begin the next bar or end the song, the given song
    goes on. `max_tokens` counts the tokens that are drawn.

    Args:
        outline: what stays.
        others: as for `Draft`, but for `prompt` and `bars`. Of the constraints those on chords, time
            signature, tempo and instruments are not asked: the outline has them.
    """

    def __init__(self, outline: Outline, **others):
        super().__init__(np.array(outline.header), **others)
        self._left = deque(outline.bars)
        self._given: deque[int] = deque()  # of the current bar
        self._given_end = self.begin  # how many tokens there were when they were used up
        self._open = False  # whether the model may go on with the current bar
        self._drawn = 0
        # What may follow in an open bar: before the first group that is written, and inside such groups.
        self._beside = np.zeros(vocab.VOCAB_SIZE, dtype=bool)
        self._beside[vocab.INST.start + vocab.INSTRUMENT_RANK[list(outline.written)]] = True
        self._beside[[vocab.EOS, *range(vocab.CHORD.start, vocab.CHORD.stop)]] = True
        self._within = self._beside.copy()
        for family in (vocab.T, vocab.P, vocab.L, vocab.V):
            self._within[family.start : family.stop] = True

    @property
    def new_tokens(self) -> int:
        return self._drawn

    def append_required(self) -> bool:
        if self.finished:
            return False
        if not self._given and not self._open:
            if not self._left:
                self._ended = True
                return False
            bar = self._left.popleft()
            self._given.extend(bar.tokens)
            self._open = bar.is_open
        if self._given:
            self._append(self._given.popleft())
            self._given_end = len(self.ids)
            return True
        may_follow = self._beside if len(self.ids) == self._given_end else self._within
        self._allowed = self._grammar.allowed() & may_follow
        self._steering.forbid(self._allowed, self._grammar.bar_ends)
        return False

    def append_given(self) -> None:
        while self.append_required():
            pass

    def draw(self, logits: Tensor) -> bool:
        token = self._drawn_from(logits)
        if token == vocab.EOS or token in vocab.CHORD:
            self._open = False
            return False
        self._drawn += 1
        self._append(token)
        return True

    def take(self, token: int) -> bool:
        """Append the next token that is given, or one that was drawn.

        Where the model writes, an EOS ends the bar, or a CHORD, which is that of the next one. If nothing is
        to be written after it, the rest of the given song is appended instead.

        Raises:
            ValueError: another token is given here, or the grammar does not allow it.
        """
        if self._open and not self._given and (token == vocab.EOS or token in vocab.CHORD):
            self._open = False
            if not any(bar.is_open for bar in self._left):
                self.append_given()
                return False
        if self.append_required():
            if self.ids[-1] != token:
                raise ValueError(f"token {token} where {self.ids[-1]} is given")
        else:
            self._drawn += 1
            self._append(token)
        return True

    def state(self) -> DraftState:
        queue = [*self._given, *([OPEN] if self._open else ())]
        for bar in self._left:
            queue += [*bar.tokens, *([OPEN] if bar.is_open else ())]
        while queue and queue[-1] != OPEN:
            queue.pop()
        appended = len(self.ids) - self.begin
        return (
            super()
            .state()
            ._replace(
                max_tokens=self._max_tokens + appended - self._drawn,
                new_tokens=appended,
                has_note=True,
                constraints=replace(self._constraints, signature=None, bpm=None, instruments=None),
                given=GivenState(queue, self._within, len(self.ids) == self._given_end),
            )
        )

    def stop(self) -> None:
        """Keep of the current bar what is given, and the rest of the song."""
        self.complete, self._ended = self._given_end, True

    def song(self) -> np.ndarray:
        """As of `Draft`, with the rest of the given song, to which nothing was added."""
        written = self.ids[: max(self.complete, self._given_end)]
        rest = [*self._given, *(token for bar in self._left for token in bar.tokens)]
        return np.array([*written, *rest, vocab.EOS], dtype=np.uint16)
