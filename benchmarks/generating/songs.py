"""Composed songs, whose tokens follow whatever a model draws, so that bars are as long as in songs."""

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch

from meloformer.composer.compose import compose
from meloformer.generation.device.loop import Slots
from meloformer.generation.draft import Draft
from meloformer.generation.loop import MAX_CONTEXT, write
from meloformer.generation.sampling import Sampling
from meloformer.model.transformer import MeloFormer
from meloformer.tokens import vocab
from meloformer.tokens.tokenizer import HIDTokenizer

SONGS = 8  # different ones in a batch: they take long to compose


class Replayed:
    """In place of `Sampling`: draws, and then takes the next token of a song."""

    def __init__(self, ids: np.ndarray):
        self._sampling, self._ids = Sampling(top_p=0.95), iter(ids.tolist())

    def draw(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        self._sampling.draw(logits, generator)
        return next(self._ids)


@cache
def song(seed: int, context: int, tokens: int) -> tuple[np.ndarray, int]:
    """Ids of a composed song that are more than `context + tokens`, and where its last bar line is before
    `context`."""
    bars = 8
    while len(ids := HIDTokenizer().encode(compose(seed, bars=bars))) < context + tokens:
        bars *= 2
    lines = np.flatnonzero(vocab.CHORD.mask(ids))
    return ids, int(lines[np.searchsorted(lines, context, side="right") - 1])


def draft_of(seed: int, context: int, tokens: int) -> Draft:
    """A composed song, of which about `context` tokens, up to a bar line, are the prompt."""
    ids, begin = song(seed % SONGS, context, tokens)
    return Draft(ids[:begin], max_tokens=tokens, sampling=Replayed(ids[begin:-1]))


def by_graphs(
    model: MeloFormer, batch: int, context: int, tokens: int, cache_dtype: torch.dtype | None = None
) -> tuple[list[Draft], Slots]:
    """The same songs, which the device draws and then takes from a queue; `cache_dtype`: see `Slots`."""
    songs = [song(seed % SONGS, context, tokens) for seed in range(batch)]
    drafts = [Draft(ids[:begin], max_tokens=tokens, sampling=Sampling(top_p=0.95)) for ids, begin in songs]
    queues = [ids[begin : begin + tokens].tolist() for ids, begin in songs]
    settings = {"slots": batch, "queues": queues, "cache_dtype": cache_dtype}
    return drafts, Slots(model, drafts, MAX_CONTEXT, **settings)


@cache
def whole_song(bars: int) -> np.ndarray:
    """Ids of a composed song, from BOS to EOS."""
    return HIDTokenizer().encode(compose(0, bars=bars))


def write_whole(model: MeloFormer, bars: int, graphs: bool) -> Iterator[int]:
    """Write `whole_song` from nothing, with the room that `generate` gives a song; yields as `write` does."""
    ids = whole_song(bars)
    if graphs:
        drafts = [Draft(sampling=Sampling(top_p=0.95))]
        return Slots(model, drafts, MAX_CONTEXT, queues=[ids[1:].tolist()]).write()
    return write(model, [Draft(sampling=Replayed(ids[1:]))], MAX_CONTEXT, "auto")
