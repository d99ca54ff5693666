"""Incremental decoding: the logits of the next token from caches, equal to those of a full forward pass.

A token costs the products with the weights and attention to the keys it sees; the summary of a bar is
computed once, when the next bar begins. A prompt goes through the model's own forward pass, which fills the
caches. Tokens that are known several at a time are a block: rows of the same products.

Shape suffixes: R rows (songs that take a step, or tokens of a block), H heads, D channels of a head, E model
width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import Structure
from ..kernels.attention import Attention
from ..kernels.dense import CausalAttention
from ..model.device import pick_attention
from ..model.token_reader import TokenFacts, TokenReader
from ..model.transformer import MeloFormer
from ..tokens import attributes, vocab
from .cache import KeyValueCache, indices, within
from .rows import RowModel
from .threads import ALONE_BELOW, alone
from .visible import VisibleKeys


class _Place(NamedTuple):
    """The list of the only song of a step, in each layer."""

    own: Tensor  # [L, 2, H, D], where its new token's keys and values go
    own_of_layer: tuple[Tensor, ...]  # [2, H, D] each
    keys: tuple[Tensor, ...]  # [1, H, keys, D] each
    values: tuple[Tensor, ...]


class _Places(NamedTuple):
    """The lists of the songs of a step."""

    rows: Tensor  # of the cache
    places: Tensor  # where the new tokens' keys go
    pick: slice | Tensor  # the same rows, to read
    length: int  # keys of the row that sees most
    mask: Tensor | None  # bool [R, 1, 1, length]: which keys each row sees; None: all


class _Block(NamedTuple):
    """What the tokens of a block see, and where their own keys go: in the order of the song."""

    song: int
    own: slice  # positions
    bars: int  # summaries, which all of them see
    positions: Tensor  # int64 [keys], of the tokens that any of them sees
    mask: Tensor  # bool [R, bars + keys]: who sees which


Attend = Callable[[int, Tensor], Tensor]


class Decoder:
    """Caches of B songs of one model, each at a place of its own.

    Args:
        model: in eval mode. Its weights must not change meanwhile.
        songs: B, how many songs there is room for.
        attention: the backend of the full passes over prompts.
        int8: read all but prompts with weights that are rounded to 8 bits: for a model on the CPU.

    Raises:
        UserError: the backend cannot be used, see `pick_attention`, or there are no such products.
    """

    def __init__(self, model: MeloFormer, songs: int = 1, attention: str = "auto", int8: bool = False):
        self._model, self._dense = model, model.config.dense
        self._attention = pick_attention(attention, model.device, model.config)
        self._device, dtype = model.device, model.token_embedding.weight.dtype
        self._readers: list[TokenReader | None] = [None] * songs
        self._visible = [self._no_keys() for _ in range(songs)]
        self._complete = [0] * songs  # bars whose summary is in the cache
        self._rows = RowModel(model, int8)
        read = sum(weight.numel() * (1 if int8 else weight.element_size()) for weight in model.parameters())
        self._small = model.device.type == "cpu" and read < ALONE_BELOW
        self._lists = self._visible[0].lists
        self.cache = KeyValueCache(model.config, songs, self._lists, dtype, self._device)

    def _no_keys(self) -> VisibleKeys:
        return VisibleKeys(self._model.config.near_bars, self._model.config.kind_rule)

    @torch.inference_mode()
    def prefill(self, songs: Sequence[int], ids: np.ndarray) -> Tensor:
        """Begin songs anew with these tokens, in one pass over them.

        Args:
            songs: numbers below B.
            ids: [n], n > 0, the beginning of a document.

        Returns:
            Logits [VOCAB_SIZE] of the token that follows, in the model's dtype, on its device.
        """
        facts: list[TokenFacts] = []
        for song in songs:
            reader, visible = TokenReader(), self._no_keys()
            facts = [reader.push(token) for token in np.asarray(ids).tolist()]
            for token in facts:
                visible.push(token)
            self._readers[song], self._visible[song], self._complete[song] = reader, visible, facts[-1].bar
        self.cache.make_room(tokens=len(ids), bars=0 if self._dense else facts[-1].bar + 1)
        batch, structure = padded_batch(self._model, ids)
        attention = self._model.attention_for(structure, self._attention)
        recording = Recording(attention, self.cache, songs, len(ids), facts[-1].bar)
        logits = self._model(batch, structure, recording)
        return logits[0, len(ids) - 1, : vocab.VOCAB_SIZE]

    @torch.inference_mode()
    def step(self, songs: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Append one token to each of these songs.

        Args:
            songs: R different numbers below B, each of a song that `prefill` began.
            tokens: their ids.

        Returns:
            Logits [R, VOCAB_SIZE] of the tokens that follow, in the model's dtype, on its device.
        """
        with alone(self._small and len(songs) == 1):
            return self._step(songs, tokens)

    def _step(self, songs: Sequence[int], tokens: Sequence[int]) -> Tensor:
        facts = [self._readers[song].push(token) for song, token in zip(songs, tokens)]
        for song, token in zip(songs, facts):
            self._begin_bar(song, token)
        self.cache.make_room(tokens=1 + max(token.position for token in facts))
        rows, places = self._lists_of(songs, facts)
        if len(songs) == 1:
            place = self._place(rows[0], places[0])
            x_RE, guesses = self._through_layers(facts, partial(self._attend_list, place))
            if not self._dense:  # a copy in the order of the song
                self.cache.tokens[:, :, songs[0], :, facts[0].position] = place.own
        else:
            placed = self._places(rows, places)
            x_RE, guesses = self._through_layers(facts, partial(self._attend_lists, placed))
            if not self._dense:
                song, position = indices([songs, [token.position for token in facts]], self._device)
                own = self.cache.seen[:, :, placed.rows, :, placed.places]
                self.cache.tokens[:, :, song, :, position] = own
        return self._rows.logits(x_RE, guesses)

    @torch.inference_mode()
    def extend(self, song: int, tokens: Sequence[int]) -> Tensor:
        """Append tokens to a song: what as many calls of `step` do, in one pass for each bar they belong to.

        Args:
            song: a number below B, of a song that `prefill` began.
            tokens: their ids, at least one.

        Returns:
            Logits [VOCAB_SIZE] of the token that follows the last, in the model's dtype, on its device.
        """
        facts = [self._readers[song].push(token) for token in tokens]
        for _, together in groupby(facts, key=lambda token: 0 if self._dense else token.bar):
            of_bar = list(together)
            self._begin_bar(song, of_bar[0])
            self.cache.make_room(tokens=of_bar[-1].position + 1)
            attend = partial(self._attend_block, self._block(song, of_bar))
            x_RE, guesses = self._through_layers(of_bar, attend)
        return self._rows.logits(x_RE[-1:], guesses[-1:])[0]

    def _begin_bar(self, song: int, token: TokenFacts) -> None:
        if not self._dense and token.bar > self._complete[song]:
            self._summarize(song)

    def _through_layers(self, facts: list[TokenFacts], attend: Attend) -> tuple[Tensor, Tensor]:
        """The stream [R, E] after the last layer, and what the output may copy, [R, 6].

        Args:
            attend: makes of the number of a layer, and the rows' own queries, keys and values [R, 3, H, D],
                of which none are in the cache yet, what attention returns, [R, E].
        """
        x_RE, turn, guesses = self._rows.rows(facts)
        for number, layer in enumerate(self._rows.layers):
            x_RE = layer.finish(x_RE, attend(number, layer.project(x_RE, turn)))
        return x_RE, guesses

    def _lists_of(self, songs: Sequence[int], facts: list[TokenFacts]) -> tuple[list[int], list[int]]:
        """Rows of the cache, and places of the tokens' own keys there; completes the lists but for these."""
        if self._dense:
            return list(songs), [token.position for token in facts]
        lists = [self._visible[song].keys_of(token) for song, token in zip(songs, facts)]
        self.cache.make_room(seen=1 + max(keys.place for keys in lists))
        cache, rows = self.cache, []
        for song, token, keys in zip(songs, facts, lists):
            row = song * self._lists + keys.number
            rows.append(row)
            if keys.begins:
                cache.seen[:, :, row, :, : token.bar] = cache.bars_past[:, :, song, :, : token.bar]
            if count := len(keys.tokens):
                copied = cache.tokens[:, :, song].index_select(3, indices(keys.tokens, self._device))
                cache.seen[:, :, row, :, keys.start : keys.start + count] = copied
        return rows, [keys.place for keys in lists]

    def _place(self, row: int, place: int) -> _Place:
        keys = self.cache.tokens if self._dense else self.cache.seen
        seen = keys[:, :, row, :, : place + 1]  # [L, 2, H, keys, D]
        own = seen[:, :, :, place]
        return _Place(own, own.unbind(0), seen[:, :1].unbind(0), seen[:, 1:].unbind(0))

    def _attend_list(self, place: _Place, number: int, qkv_1PHD: Tensor) -> Tensor:
        """One row to the list of its song."""
        place.own_of_layer[number].copy_(qkv_1PHD[0, 1:])
        q = qkv_1PHD[:, :1].transpose(1, 2)  # [1, H, 1, D]
        return F.scaled_dot_product_attention(q, place.keys[number], place.values[number]).flatten(1)

    def _places(self, rows: list[int], places: list[int]) -> _Places:
        length = max(places) + 1
        on_device = indices([rows, places], self._device)
        adjacent = rows == list(range(rows[0], rows[0] + len(rows)))
        pick = slice(rows[0], rows[-1] + 1) if adjacent else on_device[0]
        mask = None
        if min(places) + 1 < length:
            mask = torch.arange(length, device=self._device) <= on_device[1, :, None]
            mask = mask[:, None, None]
        return _Places(on_device[0], on_device[1], pick, length, mask)

    def _attend_lists(self, placed: _Places, number: int, qkv_RPHD: Tensor) -> Tensor:
        """Each row to the list of its song."""
        keys = (self.cache.tokens if self._dense else self.cache.seen)[number]  # [2, rows, H, keys, D]
        keys[:, placed.rows, :, placed.places] = qkv_RPHD[:, 1:]
        k, v = (part[:, :, : placed.length][placed.pick] for part in keys)
        return F.scaled_dot_product_attention(qkv_RPHD[:, 0, :, None], k, v, attn_mask=placed.mask).flatten(1)

    def _block(self, song: int, facts: list[TokenFacts]) -> _Block:
        """Of tokens of one bar, if there are bars."""
        if self._dense:
            bars, seen = 0, [np.arange(token.position + 1) for token in facts]
        else:
            bars, seen = facts[0].bar, [self._visible[song].seen_by(token) for token in facts]
        positions = np.unique(np.concatenate(seen))
        mask = np.zeros((len(facts), bars + len(positions)), dtype=bool)
        mask[:, :bars] = True
        for row, mine in zip(mask, seen):
            row[bars + np.searchsorted(positions, mine)] = True
        own = slice(facts[0].position, facts[-1].position + 1)
        mask = torch.from_numpy(mask).to(self._device)
        return _Block(song, own, bars, indices(positions, self._device), mask)

    def _attend_block(self, block: _Block, number: int, qkv_RPHD: Tensor) -> Tensor:
        """All rows to the keys that one of them sees, masked."""
        q, *own = qkv_RPHD.permute(1, 2, 0, 3)  # [H, R, D] each
        keys = self.cache.tokens[number, :, block.song]  # [2, H, tokens, D]
        for part, rows in zip(keys, own):
            part[:, block.own] = rows
        k_v = keys.index_select(2, block.positions)
        if block.bars:
            k_v = torch.cat([self.cache.bars_past[number, :, block.song, :, : block.bars], k_v], dim=2)
        k, v = k_v[:, None]  # [1, H, keys, D] each
        o = F.scaled_dot_product_attention(q[None], k, v, attn_mask=block.mask)
        return o[0].transpose(0, 1).flatten(1)

    def _summarize(self, song: int) -> None:
        """Compute the summary of a song's last complete bar: the summary stream of `Layer.forward`."""
        cache, bar = self.cache, self._complete[song]
        tokens = self._visible[song].bar_of(bar)
        cache.make_room(bars=bar + 1)
        x_1E, turn = self._rows.summary(tokens.stop - 1, bar)
        for number, layer in enumerate(self._rows.summary_layers):
            qkv_PHD = layer.project(x_1E, turn)[0]
            own = cache.bars_own[number, :, song]  # [2, H, bars, D]
            own[:, :, bar] = qkv_PHD[1:]
            of_tokens = cache.tokens[number, :, song, :, tokens]
            k, v = torch.cat([own[:, :, : bar + 1], of_tokens], dim=2)[:, None]
            o_1E = F.scaled_dot_product_attention(qkv_PHD[None, 0, :, None], k, v).flatten(1)
            cache.bars_past[number, :, song, :, bar] = layer.project_again(o_1E, turn)[0]
            x_1E = layer.finish(x_1E, o_1E)
        self._complete[song] = bar + 1


def padded_batch(model: MeloFormer, ids: np.ndarray) -> tuple[Tensor, Structure]:
    """One song as a batch: ids int64 [1, N] and their structure, on the model's device; N >= n."""
    ids = np.asarray(ids)
    scanned = attributes.scan(ids)
    length, bars = len(ids), int(scanned.bar[-1]) + 1
    if model.device.type == "cuda":  # kernels are compiled for each new shape: round up to a few
        length, bars = (max(256, 1 << (n - 1).bit_length()) for n in (length, bars))

    def padded(values: np.ndarray | int, padding: int) -> Tensor:
        batch = np.full((1, length), padding, dtype=np.int64)
        batch[0, : len(ids)] = values
        return torch.from_numpy(batch)

    structure = Structure.build(
        padded(0, -1),
        *(padded(values, 0) for values in (scanned.bar, scanned.inst, scanned.kind, scanned.onset)),
        num_summaries=bars,
        near_bars=model.config.near_bars,
        kind_rule=model.config.kind_rule,
    )
    return padded(ids, vocab.PAD).to(model.device), structure.to(model.device)


class Recording:
    """An attention that also writes the keys and values of a single song into the cache."""

    def __init__(
        self,
        attention: Attention | CausalAttention,
        cache: KeyValueCache,
        songs: Sequence[int],
        tokens: int,
        bars: int,
    ):
        self._attention, self._cache = attention, cache
        self._songs, self._tokens, self._bars = songs, tokens, bars
        self._layer = 0

    def summarize(self, q_s: Tensor, k_s: Tensor, v_s: Tensor, k_r: Tensor, v_r: Tensor) -> Tensor:
        self._record(self._cache.tokens, self._tokens, k_r, v_r)
        self._record(self._cache.bars_own, self._bars, k_s, v_s)
        return self._attention.summarize(q_s, k_s, v_s, k_r, v_r)

    def update(self, q_r: Tensor, k_r: Tensor, v_r: Tensor, k_s: Tensor, v_s: Tensor) -> Tensor:
        self._record(self._cache.bars_past, self._bars, k_s, v_s)
        self._layer += 1
        return self._attention.update(q_r, k_r, v_r, k_s, v_s)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._record(self._cache.tokens, self._tokens, k, v)
        self._layer += 1
        return self._attention(q, k, v)

    def _record(self, into: Tensor, length: int, k: Tensor, v: Tensor) -> None:
        for song in self._songs:
            for part, values in zip(into[self._layer], (k, v)):
                part[song, :, :length] = within(values[0, :, :length], part.dtype)
