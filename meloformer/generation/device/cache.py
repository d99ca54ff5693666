"""Keys and values of the songs in all slots, and which of them each slot's next token sees.

All that a song's tokens and summaries may see lies along one axis of *places*, so that what is visible is one
set of places, whoever asks:

    [0, N)            tokens, in the order of the song
    [N, N + M)        keys and values by which summaries attend to the summaries of bars 0, 1, ...
    [N + M, N + 2M)   what tokens see of these summaries (K2 and V2)
    N + 2M            what no song has: steps of empty slots write here

A token costs its own bytes here and nothing is copied afterwards: near bars are dense ranges, and the heads
of a place lie side by side, so that the tokens of an instrument are read in runs of E values each.

Shape suffixes: L layers, 2 for keys and values, S slots, P places, H heads, D channels of a head.
"""

import torch
from torch import Tensor

from ...kernels.structure import (
    NO_INSTRUMENT,
    SUMMARY,
    TokenProperties,
    regular_sees,
    summary_sees,
)
from ...model.transformer import ModelConfig
from ..cache import within
from .reader import Facts, SlotReader


class SlotCache:
    """A dense model has tokens alone.

    Args:
        room: N.
        bars: M.

    Attributes:
        keys: [L, 2, S, P, H, D]; values are zeros at first, since what is masked is still multiplied by 0.
        nowhere: the last place.
        tokens, bars_own, bars_past: views of it [L, 2, S, H, places, D], as `cache.KeyValueCache` has them.
    """

    def __init__(
        self, config: ModelConfig, slots: int, room: int, bars: int, dtype: torch.dtype, device: torch.device
    ):
        self.room, self.bars = room, 0 if config.dense else bars
        self.nowhere = room + 2 * self.bars
        shape = config.layers, 2, slots, self.nowhere + 1, config.heads, config.head_dim
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        by_head = self.keys.transpose(3, 4)
        ranges = by_head.split([room, self.bars, self.bars, 1], dim=4)
        self.tokens, self.bars_own, self.bars_past, _ = ranges

    def write(self, layer: int, place: Tensor, keys_values: Tensor) -> None:
        """`keys_values` [S, 2, H, D] to one place [S] of each slot."""
        slot = torch.arange(len(place), device=place.device)
        stored = within(keys_values, self.keys.dtype).to(self.keys.dtype)
        # As bytes if numbers have 8 bits, since PyTorch indexes these on some devices only.
        keys, stored = (x.view(torch.uint8) if x.itemsize == 1 else x for x in (self.keys, stored))
        keys[layer][:, slot, place] = stored.transpose(0, 1)


def bytes_of_a_slot(config: ModelConfig, room: int, bars: int, dtype: torch.dtype) -> int:
    """What `SlotCache.keys` takes for each slot."""
    places = room + 1 if config.dense else room + 2 * bars + 1
    return config.layers * 2 * places * config.dim * dtype.itemsize


class Sight:
    """The visibility rule of `kernels.structure` at places."""

    def __init__(self, cache: SlotCache, reader: SlotReader, config: ModelConfig):
        self._cache, self._reader, self._config = cache, reader, config
        device = cache.keys.device
        self._index = torch.arange(cache.room, dtype=torch.int32, device=device)
        self._bar = torch.arange(cache.bars, dtype=torch.int32, device=device)

    def places(self, facts: Facts, reads: Tensor, summarizes: Tensor, bar: Tensor) -> Tensor:
        """Which places are visible, bool [S, P].

        Args:
            facts: of the token that each slot reads.
            reads, summarizes: bool [S], which slots read a token, and which compute the summary of a bar.
            bar: of the token, or the one that is summarized.
        """
        room, reader, config = self._cache.room, self._reader, self._config

        def history(values: Tensor) -> Tensor:
            return values[:, :room]

        def column(values: Tensor) -> Tensor:
            return values[:, None]

        read = self._index <= column(facts.position)
        tokens = TokenProperties(
            doc=torch.where(read, 0, -1),
            bar=history(reader.bar_of),
            inst=history(reader.inst_of),
            kind=history(reader.kind_of),
            onset=history(reader.onset_of),
            position=self._index,
        )
        here = TokenProperties(
            doc=torch.zeros_like(column(bar)),
            bar=column(bar),
            inst=column(facts.inst),
            kind=column(facts.kind),
            onset=column(facts.onset),
            position=column(facts.position),
        )
        nowhere = column(~(reads | summarizes))
        if config.dense:
            return torch.cat((read & column(reads), nowhere), dim=1)
        none = torch.full_like(self._bar, NO_INSTRUMENT)
        kind = torch.full_like(self._bar, SUMMARY)
        bars = TokenProperties(torch.zeros_like(kind), self._bar, none, kind, -torch.ones_like(kind), kind)
        sees_tokens = regular_sees(here, tokens, config.near_bars, config.kind_rule) & column(reads)
        sees_past = regular_sees(here, bars, config.near_bars, config.kind_rule) & column(reads)
        of_bar = summary_sees(here, tokens) & column(summarizes)
        sees_own = summary_sees(here, bars) & column(summarizes)
        return torch.cat((sees_tokens | of_bar, sees_own, sees_past, nowhere), dim=1)
