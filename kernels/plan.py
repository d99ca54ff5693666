"""The plan of a batch: layouts, block lists and packed bits, all that the attention kernels know.

Attention runs in passes. A pass lays out its queries and its keys in an order that makes the mask
blocky, cuts it into tiles of BM queries x BN keys, and lists for every query block the key blocks
it sees, and for every key block the query blocks that see it. Full tiles need no mask; partial ones
have one bit per pair. *Summarize* is one pass; *update* is two: *near* (summaries, global keys, and
keys at the distances in `near_bars`; tokens sorted by document, kind and position) and *far* (the
same instrument at other distances; tokens sorted by instrument first). Each visible pair lies in
exactly one pass.

Everything is computed on the structure's device, in a fixed order: two plans of one structure are
equal. One plan waits for the device once, to learn how many tiles are partial (so that exactly as
many bits are allocated) and how many programs have work.

Memory, in bytes: BM * BN / 4 per partial tile, and 8 per pair of blocks of a row (13 while the pass
is made).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .structure import NO_INSTRUMENT, Facts, Kind, Structure
from .tiling import PassTiles, Tiles
from .visibility import (
    FACTS,
    FAR,
    NEAR,
    RANGES,
    SUMMARIZE,
    classify_kernel,
    compact_kernel,
    layout_kernel,
    pack_kernel,
)

_RUN = 16  # tiles that one program of classify_kernel looks at
_NEVER = 2**30  # a distance between bars that does not occur


@dataclass(frozen=True, eq=False)
class Lines:
    """The tiles of a pass by lines: query blocks (or, transposed, key blocks); int32 tensors.

    Attributes:
        blocks: [B * lines * length + 1], for each line the blocks of the other side that it sees:
            partial ones, then full ones. What follows them means nothing but is a valid block.
        length: blocks of the other side.
        partial, total: [B * lines], how many of them are partial, and how many there are.
        bits: [tiles, words, side], bit c % 32 of word c / 32 tells whether an element sees element c
            of the other block. The tiles of a line follow each other in the order of its list.
        start: [B * lines], the first of those tiles.
    """

    blocks: Tensor
    length: int
    partial: Tensor
    total: Tensor
    bits: Tensor
    start: Tensor


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass over the pairs of a batch of B rows.

    Attributes:
        query_order: int32 [B, q_blocks * BM], the token in each slot, counted within the stream of the
            queries; -1 where there is none.
        key_order: int32 [B, k_blocks * BN], the same for keys, counted over summaries and regular
            tokens together, summaries first. A block holds keys of one stream only.
        sees_summaries: whether any key is a summary.
        queries, keys: the tiles by query block and by key block.
        query_work: int32 [items], the query blocks (row * blocks + block) with work, longest first.
        key_work: int32 [items, 4], (key block, first, end, slot): the part of its list that one
            program takes, and where its partial gradient goes, -1 if it is the whole.
        split_keys: int32 [split, 3], (key block, first slot, end) of the lists in several parts.
        slots: how many partial gradients there are.
        first: whether this pass writes results, or continues those of an earlier pass.
        tiles: how it is cut.
    """

    query_order: Tensor
    key_order: Tensor
    sees_summaries: bool
    queries: Lines
    keys: Lines
    query_work: Tensor
    key_work: Tensor
    split_keys: Tensor
    slots: int
    first: bool
    tiles: PassTiles

    @property
    def q_blocks(self) -> int:
        """Query blocks of a row."""
        return self.keys.length

    @property
    def k_blocks(self) -> int:
        """Key blocks of a row."""
        return self.queries.length


@dataclass(frozen=True, eq=False)
class Plan:
    """The passes of both phases."""

    summarize: tuple[Pass, ...]
    update: tuple[Pass, ...]


def make_plan(structure: Structure, tiles: Tiles) -> Plan:
    tokens = structure.tokens
    facts = torch.stack(structure.keys, dim=1)  # [B, 6, M + N]
    rows, num_summaries = structure.summary_doc.shape
    natural = torch.arange(facts.shape[2], dtype=torch.int32, device=structure.device).expand(rows, -1)
    summaries, regular = natural[:, :num_summaries], natural[:, num_summaries:]
    near_bars = tuple(sorted(set(structure.near_bars))) or (_NEVER,)

    kind_class = _kind_class(tokens)
    near = _sorted_by(tokens.doc, kind_class, 5)
    far = _sorted_by(tokens.doc, tokens.inst * 5 + kind_class, 5 * (NO_INSTRUMENT + 1))
    near_keys, far_keys = near + num_summaries, far + num_summaries
    split = tiles.split
    drafts = [
        _Draft(SUMMARIZE, facts, near_bars, summaries, 0, (summaries, regular), tiles.summarize, split),
        _Draft(NEAR, facts, near_bars, near, num_summaries, (summaries, near_keys), tiles.near, split),
        _Draft(FAR, facts, near_bars, far, num_summaries, (far_keys,), tiles.far, split),
    ]
    counts = torch.stack([draft.counts for draft in drafts]).tolist()  # the one wait for the device
    summarize, *update = (draft.finish(*count) for draft, count in zip(drafts, counts))
    return Plan((summarize,), tuple(update))


def _kind_class(tokens: Facts) -> Tensor:
    """Global, other structural, {T, P}, V, L as 0 to 4: tokens whose masks resemble each other."""
    note = torch.where(tokens.kind == int(Kind.L), 4, torch.where(tokens.kind == int(Kind.V), 3, 2))
    structural = torch.where(tokens.inst == NO_INSTRUMENT, 0, 1)
    return torch.where(tokens.kind == int(Kind.STRUCTURAL), structural, note)


def _sorted_by(doc: Tensor, group: Tensor, groups: int) -> Tensor:
    """The order of tokens, int32 [B, N], by document, then group, then position; padding is last."""
    key = torch.where(doc >= 0, doc * groups + group, torch.iinfo(torch.int32).max)
    return torch.sort(key, dim=1, stable=True).indices.to(torch.int32)


def _slots(order: Tensor, block: int) -> Tensor:
    """An order [B, length], padded by -1 to whole blocks."""
    return F.pad(order, (0, -order.shape[1] % block), value=-1)


def _lay_out(facts: Tensor, order: Tensor, first: int, block: int) -> tuple[Tensor, Tensor]:
    """Facts in an order, and the ranges of its blocks; see `visibility`."""
    rows, slots = order.shape
    laid_out = facts.new_empty(rows, FACTS.value, slots)
    ranges = facts.new_empty(rows, slots // block, RANGES.value)
    layout_kernel[slots // block, rows](
        facts, order, laid_out, ranges, facts.shape[2], slots, first, BLOCK=block
    )
    return laid_out, ranges


class _Draft:
    """A pass but for what needs the number of its partial tiles: the bits, and the work."""

    def __init__(
        self,
        kind: int,
        facts: Tensor,
        near_bars: tuple[int, ...],
        queries: Tensor,
        first_query: int,
        keys: tuple[Tensor, ...],
        tiles: PassTiles,
        split: int,
    ):
        """Orders are of the tokens in `facts` [B, 6, M + N]: `queries` counts from `first_query` on, and
        each of `keys` begins a block."""
        self.rule = {"PASS": kind, "NEAR_BARS": near_bars, "BM": tiles.block_m, "BN": tiles.block_n}
        self.tiles, self.sees_summaries = tiles, kind != FAR
        self.query_order = _slots(queries, tiles.block_m)
        self.key_order = torch.cat([_slots(order, tiles.block_n) for order in keys], dim=1)
        self.query_facts, query_ranges = _lay_out(facts, self.query_order, first_query, tiles.block_m)
        self.key_facts, key_ranges = _lay_out(facts, self.key_order, 0, tiles.block_n)
        rows = len(facts)
        q_blocks, k_blocks = query_ranges.shape[1], key_ranges.shape[1]
        types = torch.zeros(rows, q_blocks, k_blocks, dtype=torch.int8, device=facts.device)
        classify_kernel[triton.cdiv(k_blocks, _RUN), q_blocks, rows](
            self.query_facts, self.key_facts, query_ranges, key_ranges, types, q_blocks, k_blocks,
            **self.rule, RUN=_RUN,
        )  # fmt: skip
        self.lists = Lists(types, split, first=kind != FAR)
        self.counts = self.lists.counts

    def finish(self, partial: int, *work: int) -> Pass:
        tiles, lists = self.tiles, self.lists
        bits, key_bits = lists.empty_bits(partial, tiles)
        if partial:
            index = torch.arange(partial, device=bits.device, dtype=torch.int32)
            line = torch.searchsorted(lists.start + lists.partial, index, right=True, out_int32=True)
            _, q_blocks, k_blocks = lists.types.shape
            pack_kernel[(partial,)](
                self.query_facts, self.key_facts, line, lists.start, lists.blocks, lists.rank,
                lists.key_start, bits, key_bits, q_blocks, k_blocks, **self.rule,
            )  # fmt: skip
        return lists.finish(
            self.query_order, self.key_order, self.sees_summaries, bits, key_bits, work, tiles
        )


class Lists:
    """Block lists and work of a pass, from its tile types, int8 [B, q_blocks, k_blocks].

    `counts` is int64 [5], on the device: partial tiles, query blocks with work, parts of key lists,
    key blocks in several parts, and their parts. All but the first go to `finish`.
    """

    def __init__(self, types: Tensor, split: int, first: bool):
        self.types, self.split, self.first = types, split, first
        rows, q_blocks, k_blocks = types.shape
        self.rank = torch.empty(types.shape, dtype=torch.int32, device=types.device)

        def compact(lines: int, items: int, line_stride: int, item_stride: int, rank: bool):
            blocks = torch.zeros(rows * lines * items + 1, dtype=torch.int32, device=types.device)
            counts = torch.empty(2, rows * lines, dtype=torch.int32, device=types.device)
            compact_kernel[lines, rows](
                types, blocks, counts[0], counts[1], self.rank, q_blocks * k_blocks,
                line_stride, item_stride, items, RANK=rank, BLOCK=256,
            )  # fmt: skip
            return blocks, *counts, counts[0].cumsum(0, dtype=torch.int32) - counts[0]

        self.blocks, self.partial, self.total, self.start = compact(q_blocks, k_blocks, k_blocks, 1, False)
        self.key_blocks, self.key_partial, self.key_total, self.key_start = compact(
            k_blocks, q_blocks, 1, k_blocks, True
        )
        self.query_order = self.total.sort(descending=True, stable=True).indices.to(torch.int32)
        longest = self.key_total.sort(descending=True, stable=True)
        self.longest, self.longest_keys = longest.values, longest.indices.to(torch.int32)
        self.parts = ((self.longest + split - 1) // split).clamp(min=int(first))
        several = self.parts > 1
        self.counts = torch.stack(
            [
                self.partial.sum(),
                (self.total >= int(not first)).sum(),
                self.parts.sum(),
                several.sum(),
                self.parts.where(several, 0).sum(),
            ]
        )

    def empty_bits(self, partial: int, tiles: PassTiles) -> tuple[Tensor, Tensor]:
        """Bits by queries and by keys, int32 [partial, words, side]."""
        m, n = tiles.block_m, tiles.block_n
        device = self.types.device
        bits = torch.empty(partial, -(-n // 32), m, dtype=torch.int32, device=device)
        return bits, torch.empty(partial, -(-m // 32), n, dtype=torch.int32, device=device)

    def finish(
        self,
        query_order: Tensor,
        key_order: Tensor,
        sees_summaries: bool,
        bits: Tensor,
        key_bits: Tensor,
        work: tuple[int, ...],
        tiles: PassTiles,
    ) -> Pass:
        query_items, key_items, split_keys, slots = work
        ends = self.parts.cumsum(0, dtype=torch.int32)
        starts = ends - self.parts
        # Lists in several parts come first, being the longest: their items are the slots.
        item = torch.arange(key_items, device=ends.device, dtype=torch.int32)
        line = torch.searchsorted(ends, item, right=True, out_int32=True)
        part, parts, length = item - starts[line], self.parts[line], self.longest[line]
        slot = item.where(parts > 1, -1)
        first, end = part * length // parts, (part + 1) * length // parts
        columns = (self.longest_keys[line], first, end, slot)
        key_work = torch.stack([column.to(torch.int32) for column in columns], dim=1)
        split = slice(0, split_keys)
        _, q_blocks, k_blocks = self.types.shape
        return Pass(
            query_order=query_order,
            key_order=key_order,
            sees_summaries=sees_summaries,
            queries=Lines(self.blocks, k_blocks, self.partial, self.total, bits, self.start),
            keys=Lines(self.key_blocks, q_blocks, self.key_partial, self.key_total, key_bits, self.key_start),
            query_work=self.query_order[:query_items],
            key_work=key_work,
            split_keys=torch.stack([self.longest_keys[split], starts[split], ends[split]], dim=1),
            slots=slots,
            first=self.first,
            tiles=tiles,
        )
