"""One step of all slots: each reads its last token and draws the next one, wholly on the model's device."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ...model.device import pick_attention
from ...model.transformer import MeloFormer
from ...tokens import vocab
from ..decoder import Recording, padded_batch
from ..draft import OPEN, DraftState
from . import tables as t
from .cache import SlotCache
from .draft import SlotDraft
from .forward import PlainForward
from .reader import SlotReader
from .sampling import SlotSampling
from .tables import SlotNumbers, Tables, advance, read

BLOCK = 32  # steps of which the tokens are kept until they are read
_NAMES = ("pending", "complete", "full", "queued", "next", "room", "bar_room")
_NOTHING = -1


class Step(SlotNumbers):
    """Songs of S slots. Calling it is a step: it never waits for the device, and shapes never change.

    A slot without a song, or whose song is finished or full, does nothing.

    Args:
        model: in eval mode. Its weights must not change meanwhile.
        slots: S.
        room: how many tokens of a song the model sees; a song that has more is *full*.
        bars: the same of bars.
        attention: the backend of the full passes over prompts.
        forward: makes the model's part of the step, see `PlainForward`.
        queue: how many tokens can be laid down that come next, whatever is drawn.
        song: how many tokens the songs have at most in which repetition is held back.
        cache_dtype: of keys and values; None: the model's.

    Raises:
        UserError: the backend cannot be used, see `pick_attention`.

    Attributes:
        recorded: how many steps a CUDA graph has, of which `BLOCK` is a multiple.
        pending: the last token of each song, which the model has not read.
        complete: bars whose summary is in the cache.
        full: 1 for songs that must begin anew with fewer tokens.
        room, bar_room: how many tokens and bars of each song the model sees.
        drawn: int64 [S, BLOCK], the tokens of the last steps, -1 where there was none; a step writes to the
            column after the one before, the first one after the last.
    """

    recorded = 1

    def __init__(
        self,
        model: MeloFormer,
        slots: int,
        room: int,
        bars: int,
        attention: str = "auto",
        forward: Callable = PlainForward,
        queue: int = 0,
        song: int = 0,
        cache_dtype: torch.dtype | None = None,
    ):
        device, config = model.device, model.config
        super().__init__(_NAMES, slots, device)
        self._model, self._attention = model, pick_attention(attention, device, config)
        self.tables = Tables(device)
        self.reader = SlotReader(slots, self.tables, room, bars, device)
        self.draft = SlotDraft(slots, self.tables, device, song)
        self.sampling = SlotSampling(slots, self.tables, device)
        dtype = model.token_embedding.weight.dtype if cache_dtype is None else cache_dtype
        self.cache = SlotCache(config, slots, room, bars, dtype, device)
        self._forward = forward(model, self.cache, self.reader)
        self.queue = torch.zeros((slots, queue + 1), dtype=torch.int64, device=device)
        self.drawn = torch.full((slots, BLOCK), _NOTHING, dtype=torch.int64, device=device)
        self.column = torch.zeros((slots,), dtype=torch.int64, device=device)  # where the next token goes
        self.all.zero_()

    @torch.inference_mode()
    def begin(
        self,
        slot: int,
        state: DraftState,
        ids: np.ndarray,
        queue: Sequence[int] = (),
        room: int | None = None,
        bars: int | None = None,
    ) -> None:
        """Put a song into a slot.

        Args:
            state: how it goes on.
            ids: [n], 0 < n <= room, of at most as many bars as there is room for: the tokens of it that the
                model sees, the beginning of a document.
            queue: the tokens that come next, and `OPEN` where some are drawn first, up to a CHORD or EOS; in
                place of that comes what lies behind.
            room, bars: of how many tokens and bars the song is full; None: of those that there is room for.
        """
        ids = np.asarray(ids, dtype=np.int64)
        seen = ids[:-1]
        self.reader.load(slot, seen)
        complete = 0
        if len(seen):
            complete = max(int(vocab.CHORD.mask(seen).sum()) - 1, 0)
            batch, structure = padded_batch(self._model, seen)
            attention = self._model.attention_for(structure, self._attention)
            self._model(batch, structure, Recording(attention, self.cache, [slot], len(seen), complete))
        self._forward.begin(slot)
        self.draft.load(slot, state)
        self.sampling.load(slot, state.sampling, state.seed)
        self.queue[slot, : len(queue)] = torch.tensor(
            list(queue), dtype=torch.int64, device=self.queue.device
        )
        self.put(
            slot,
            **{"pending": ids[-1], "complete": complete, "full": 0, "queued": len(queue), "next": 0},
            room=self.reader.room if room is None else room,
            bar_room=self.reader.bar_room if bars is None else bars,
        )

    def clear(self) -> None:
        """Take the songs out of all slots, and let the next step write to the first column of `drawn`."""
        self.draft.active.zero_()
        self.column.zero_()

    def end(self, slot: int) -> None:
        """Take the song out of a slot."""
        self.draft.active[slot] = 0

    @torch.inference_mode()
    def __call__(self) -> None:
        draft, reader, token = self.draft, self.reader, self.pending
        ready = (draft.active > 0) & (self.full == 0)
        summarizes = torch.zeros_like(ready)
        if not self._model.config.dense:
            begins_bar = self.tables.family[token] == t.CHORD
            summarizes = ready & begins_bar & (self.complete < reader.bars)
        reads = ready & ~summarizes
        facts = reader.push(token, reads)
        bar = torch.where(summarizes, self.complete, facts.bar)
        self._take(self._draw(self._forward(facts, reads, summarizes, bar)), reads)
        advance(self.complete, summarizes, self.complete + 1)

    def _draw(self, logits: Tensor) -> Tensor:
        logits = logits.float() + self.draft.bias()
        allowed = self.draft.allowed() | self._laid()[:, None]  # where nothing would be
        return self.sampling.draw(logits.masked_fill(~allowed, -torch.inf), self.draft.new_tokens)

    def _laid(self) -> Tensor:
        """Where the next token lies in the queue: bool [S]."""
        return (self.next < self.queued) & (read(self.queue, self.next) != OPEN)

    def _take(self, drawn: Tensor, reads: Tensor) -> None:
        reader, family = self.reader, self.tables.family[drawn]
        queued, laid = self.next < self.queued, self._laid()
        ends = queued & ~laid & ((family == t.CHORD) | (family == t.EOS))  # what was open
        follows = ends & (self.next + 1 < self.queued)
        laid |= follows
        drawn = torch.where(laid, read(self.queue, self.next + follows), drawn)
        advance(self.next, reads & (laid | ends), self.next + 1 + follows)
        appended = self.draft.take(drawn, reads, laid, ends & ~follows)
        advance(self.pending, appended, drawn)
        begins_bar = self.tables.family[drawn] == t.CHORD
        full = (reader.position + 1 >= self.room) | begins_bar & (reader.bars >= self.bar_room)
        advance(self.full, appended & full, 1)
        self.drawn.scatter_(1, self.column[:, None], torch.where(reads, drawn, _NOTHING)[:, None])
        self.column.copy_((self.column + 1) % BLOCK)
