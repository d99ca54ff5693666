"""Incremental decoding: the logits of the next token from caches, equal to those of a full forward pass.

A token costs the products with the weights and attention to the keys it sees; the summary of a bar is
computed once, when the next bar begins. A prompt goes through the model's own forward pass, which fills the
caches. Tokens that are known several at a time are a block: rows of the same products.

Shape suffixes: R rows (songs that take a step, or tokens of a block), H heads, D channels of a head, E model
width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import Structure
from ..kernels.attention import Attention
from ..kernels.dense import CausalAttention
from ..kernels.rope import apply_rope
from ..model.device import pick_attention
from ..model.inputs import ChordGuesses
from ..model.layers import DenseLayer, Layer, RMSNorm, Rotary
from ..model.token_reader import TokenFacts, TokenReader
from ..model.transformer import MeloFormer
from ..tokens import attributes, vocab
from .cache import KeyValueCache, indices
from .visible import VisibleKeys


class _Place(NamedTuple):
    """Where the keys of each row of a step are, and where its own key goes: Python ints if it is one row."""

    rows: int | Tensor
    places: int | Tensor
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


Attend = Callable[[int, Tensor, Tensor], Tensor]


class Decoder:
    """Caches of B songs of one model, each at a place of its own.

    Args:
        model: in eval mode. Its weights must not change meanwhile.
        songs: B, how many songs there is room for.
        attention: the backend of the full passes over prompts.

    Raises:
        UserError: the backend cannot be used, see `pick_attention`.
    """

    def __init__(self, model: MeloFormer, songs: int = 1, attention: str = "auto"):
        self._model, self._dense = model, model.config.dense
        self._attention = pick_attention(attention, model.device, model.config)
        self._device, dtype = model.device, model.token_embedding.weight.dtype
        self._readers: list[TokenReader | None] = [None] * songs
        self._visible = [self._no_keys() for _ in range(songs)]
        self._complete = [0] * songs  # bars whose summary is in the cache
        self._inputs = _Inputs(model)
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
        recording = _Recording(attention, self.cache, songs, len(ids), facts[-1].bar)
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
        facts = [self._readers[song].push(token) for song, token in zip(songs, tokens)]
        for song, token in zip(songs, facts):
            self._begin_bar(song, token)
        self.cache.make_room(tokens=1 + max(token.position for token in facts))
        place = self._place_dense(songs, facts) if self._dense else self._place(songs, facts)
        x_RE, guesses = self._through_layers(facts, partial(self._attend_lists, place))
        if not self._dense:
            self._keep(songs, facts, place)
        return self._logits(x_RE, guesses)

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
        return self._logits(x_RE[-1:], ChordGuesses(*(guess[-1:] for guess in guesses)))[0]

    def _begin_bar(self, song: int, token: TokenFacts) -> None:
        if not self._dense and token.bar > self._complete[song]:
            self._summarize(song)

    def _through_layers(self, facts: list[TokenFacts], attend: Attend) -> tuple[Tensor, ChordGuesses]:
        """The stream [R, E] after the last layer, and what the output may copy, [R, 1] each.

        Args:
            attend: of the number of a layer, queries [R, H, D], and the rows' own keys and values
                [R, 2, H, D], which are not in the cache yet, makes what attention returns, [R, E].
        """
        columns = [(f.position, f.bar, f.features.onset, *f.guesses, *self._inputs.rows(f)) for f in facts]
        on_device = indices(columns, self._device)
        first_input = 3 + len(ChordGuesses._fields)
        position, bar, onset, *guesses = on_device[:, None, :first_input].unbind(-1)  # [R, 1] each
        x_RE = self._inputs.sum_of(on_device[:, first_input:])
        rotary = self._model.rotary_of_tokens(position, bar, onset)
        for number, layer in enumerate(self._model.layers):
            q_RHD, kv_R2HD = self._project(layer.qkv_r, _norm(layer.norm_r, x_RE), rotary)
            x_RE = torch.addmm(x_RE, attend(number, q_RHD, kv_R2HD), layer.out_r.weight.t())
            x_RE = _feed_forward(layer, x_RE)
        return x_RE, ChordGuesses(*guesses)

    def _logits(self, x_RE: Tensor, guesses: ChordGuesses) -> Tensor:
        return self._model.logits(x_RE[:, None], guesses)[:, 0, : vocab.VOCAB_SIZE]

    def _place_dense(self, songs: Sequence[int], facts: list[TokenFacts]) -> _Place:
        return self._places(list(songs), [token.position for token in facts])

    def _place(self, songs: Sequence[int], facts: list[TokenFacts]) -> _Place:
        """Completes the lists of keys, but for the tokens' own."""
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
        return self._places(rows, [keys.place for keys in lists])

    def _places(self, rows: list[int], places: list[int]) -> _Place:
        length = max(places) + 1
        if len(rows) == 1:
            return _Place(rows[0], places[0], slice(rows[0], rows[0] + 1), length, None)
        on_device = indices([rows, places], self._device)
        adjacent = rows == list(range(rows[0], rows[0] + len(rows)))
        pick = slice(rows[0], rows[-1] + 1) if adjacent else on_device[0]
        mask = None
        if min(places) + 1 < length:
            mask = torch.arange(length, device=self._device) <= on_device[1, :, None]
            mask = mask[:, None, None]
        return _Place(on_device[0], on_device[1], pick, length, mask)

    def _attend_lists(self, place: _Place, number: int, q_RHD: Tensor, kv_R2HD: Tensor) -> Tensor:
        """Each row to the list of its song."""
        keys = (self.cache.tokens if self._dense else self.cache.seen)[number]  # [2, rows, H, keys, D]
        keys[:, place.rows, :, place.places] = kv_R2HD if isinstance(place.rows, Tensor) else kv_R2HD[0]
        k, v = (part[:, :, : place.length][place.pick] for part in keys)
        return F.scaled_dot_product_attention(q_RHD[:, :, None], k, v, attn_mask=place.mask).flatten(1)

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

    def _attend_block(self, block: _Block, number: int, q_RHD: Tensor, kv_R2HD: Tensor) -> Tensor:
        """All rows to the keys that one of them sees, masked."""
        keys = self.cache.tokens[number, :, block.song]  # [2, H, tokens, D]
        keys[:, :, block.own] = kv_R2HD.permute(1, 2, 0, 3)
        k_v = keys.index_select(2, block.positions)
        if block.bars:
            k_v = torch.cat([self.cache.bars_past[number, :, block.song, :, : block.bars], k_v], dim=2)
        k, v = k_v[:, None]  # [1, H, keys, D] each
        o = F.scaled_dot_product_attention(q_RHD.transpose(0, 1)[None], k, v, attn_mask=block.mask)
        return o[0].transpose(0, 1).flatten(1)

    def _project(self, projection: nn.Linear, x_RE: Tensor, rotary: Rotary) -> tuple[Tensor | None, Tensor]:
        """The rotated queries [R, H, D], if there are any, and keys and values [R, 2, H, D]."""
        heads, dim = self._model.config.heads, self._model.config.head_dim
        x_RPHD = F.linear(x_RE, projection.weight).view(len(x_RE), -1, heads, dim)
        x_RPHD[:, :-1] = apply_rope(x_RPHD[:, :-1], rotary.cos_BND[:, :, None], rotary.sin_BND[:, :, None])
        return (x_RPHD[:, 0] if x_RPHD.shape[1] == 3 else None), x_RPHD[:, -2:]

    def _keep(self, songs: Sequence[int], facts: list[TokenFacts], place: _Place) -> None:
        """Copy the tokens' own keys and values from the lists into the order of the song."""
        cache = self.cache
        own = cache.seen[:, :, place.rows, :, place.places]
        if len(songs) == 1:
            cache.tokens[:, :, songs[0], :, facts[0].position] = own
        else:
            song, position = indices([songs, [token.position for token in facts]], self._device)
            cache.tokens[:, :, song, :, position] = own

    def _summarize(self, song: int) -> None:
        """Compute the summary of a song's last complete bar: the summary stream of `Layer.forward`."""
        model, cache, bar = self._model, self.cache, self._complete[song]
        tokens = self._visible[song].bar_of(bar)
        cache.make_room(bars=bar + 1)
        last = indices([[tokens.stop - 1], [bar]], self._device)
        rotary = model.rotary_of_summaries(last[:1], last[1:])
        x_1E = model.summary_embedding[None]
        for number, layer in enumerate(model.layers):
            q_1HD, kv_12HD = self._project(layer.qkv_s, _norm(layer.norm_s, x_1E), rotary)
            own = cache.bars_own[number, :, song]  # [2, H, bars, D]
            own[:, :, bar] = kv_12HD[0]
            of_tokens = cache.tokens[number, :, song, :, tokens]
            k, v = torch.cat([own[:, :, : bar + 1], of_tokens], dim=2)[:, None]
            o_1E = F.scaled_dot_product_attention(q_1HD[:, :, None], k, v).flatten(1)
            cache.bars_past[number, :, song, :, bar] = self._project(layer.kv2, o_1E, rotary)[1][0]
            if layer.out_s is not None:
                x_1E = _feed_forward(layer, torch.addmm(x_1E, o_1E, layer.out_s.weight.t()))
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


class _Inputs:
    """`MeloFormer.embed` as one lookup: all tables below each other."""

    def __init__(self, model: MeloFormer):
        tables = [model.token_embedding, model.instrument_embedding, *model.feature_embeddings.values()]
        self._table = torch.cat([table.weight.detach() for table in tables])
        *self._first, _ = accumulate((len(table.weight) for table in tables), initial=0)
        self._features = tuple(model.feature_embeddings)

    def rows(self, token: TokenFacts) -> list[int]:
        """Those of the joint table that are added up for a token."""
        values = (token.token, token.inst, *(getattr(token.features, name) for name in self._features))
        return [first + value for first, value in zip(self._first, values)]

    def sum_of(self, rows: Tensor) -> Tensor:
        """[R, E], what the first layer reads, from such rows [R, tables]."""
        return F.embedding(rows, self._table).sum(dim=1)


class _Recording:
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
                part[song, :, :length] = values[0, :, :length]


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps)


def _feed_forward(layer: Layer | DenseLayer, x: Tensor) -> Tensor:
    gate, up = F.linear(_norm(layer.norm_ffn, x), layer.ffn.gate_up.weight).chunk(2, dim=-1)
    return torch.addmm(x, F.silu(gate).mul_(up), layer.ffn.down.weight.t())
