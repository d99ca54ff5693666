"""The plan of a batch: for each block of tokens the keys it gathers, as tiles with and without a mask.

Regular tokens attend in two passes. The *local* pass holds summaries, global keys and the keys at the bar
distances `near_bars`; the *same-instrument* pass holds the keys of the same instrument at other distances.
Each visible pair is in exactly one. A pass sorts its tokens so that those with similar masks are neighbours,
cuts the queries into blocks of 64, and gathers for each block a list of the keys that any of the 64 sees, in
tiles of 64. Keys that all 64 see make full tiles, which need no mask; the others have one bit per pair. The
same is done by keys, for their gradients. Because keys are gathered one by one, a key costs nothing in a
block that does not see it, wherever it stands.

The three layouts, all stable sorts, by document first:
    local queries: structural tokens, then the others by classes of what they see;
    local keys: the summaries as blocks of their own, then globals, INST, the others by who sees them;
    same-instrument: by instrument, then INST, the others by both.
With the kind rule "alike" the classes of the others are {T, P}, V, L in each; with "any" there are none, and
of what is said to come first only the globals do.

Everything is computed on the structure's device, in a fixed order: two plans of one structure are equal.
Nothing synchronizes but `Plan.finalize`, to be called before the first use; it finds its answer ready if the
plan was built ahead of time.

Memory in bytes: 768 per masked tile and 256 per full one, by queries and by keys; the capacity follows what
earlier plans of the same shape needed. While a plan is built, 28 more per candidate pair of blocks. The
partial results of split blocks take 512 x (D + 2) for each of H heads and each slot while a phase runs.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from . import counters
from .plan_layout import encode_kernel, layout_kernel
from .plan_lists import bits_kernel, candidates_kernel, count_kernel, fill_kernel, look_kernel
from .plan_pairs import pair_kernel, share_kernel
from .plan_work import CANDIDATES, GROUPS, MASKED, NEEDS, SLOTS, TILES, work_kernel
from .structure import Kind, Structure, kinds_seen
from .tiles import BLOCK as _BLOCK
from .tiles import ITEM_SIZE, PAIRS

BLOCK = _BLOCK.value  # tokens of a block, and gathered tokens of a tile

_NEVER = 2**30  # a distance between bars that does not occur
_FIRST_GUESS = 4  # tiles per list, before anything is known: the first plan is made again anyway
_SLACK = 1.25
_ROUND = 32

# What plans of one (device, B, M, N, split) have needed, with slack: of candidates, tiles, tiles with a
# mask, and slots.
_capacities: dict[tuple, "tuple[int, ...]"] = {}


def on_device(device: torch.device) -> AbstractContextManager:
    """`device` as the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


MAX_BATCH = 1 << 14  # what the keys of `plan_work.work_kernel` can tell apart


def layout_classes(kind_rule: str) -> "tuple[tuple[int, ...], ...]":
    """The class of each `Kind` in the layouts of local queries, local keys and the same-instrument pass.

    Kinds share one if the kind rule treats them alike: as queries, as keys, as both. By "any" all do:
    the tokens of an instrument stand in the order of the song, and their lists begin alike.
    """
    sees = kinds_seen(kind_rule)
    seen_by = tuple(sum((sees[query] >> key & 1) << query for query in Kind) for key in Kind)
    return _classes(sees), _classes(seen_by), _classes(tuple(zip(sees, seen_by)))


def _classes(treatment: tuple) -> "tuple[int, ...]":
    """1 for structural tokens and for kinds that are treated as they are; one number more for each other
    treatment. By `any` a layout is in the order of the song."""
    kinds = Kind.STRUCTURAL, Kind.T, Kind.P, Kind.V, Kind.L
    different = list(dict.fromkeys(treatment[kind] for kind in kinds))
    return tuple(1 + different.index(treatment[kind]) for kind in Kind)


class Plan:
    """The plan of one structure, for all heads, layers, forward and backward.

    Lists come in groups: local by queries, same-instrument by queries, local by keys, same-instrument by
    keys; within a group by batch row, then block. All tensors are int32.

    Attributes:
        order: [blocks * 64], the token in each slot of the three layouts, layout by layout and batch row by
            batch row; counted over summaries and regular tokens of a row together, summaries first; -1 for
            none.
        table: [lists, 4], of each list its first tile, its first tile among the masked ones of all lists, its
            number of masked tiles and of all tiles. Masked tiles come first.
        gathered: [tiles * 64], the gathered tokens: keys counted as in `order`, queries in the regular
            stream.
        bits: [masked tiles, 2, 64], see `tiles.tile_mask`.
        items: [5, items, 16], the work items of each group, see `plan_work.work_kernel`; then those of pairs,
            see `plan_pairs`.
        needs: [13], the capacities that were needed, and the number of items of each group, see `plan_work`.
    """

    def __init__(self, structure: Structure, split: int = 0):
        """
        Args:
            structure: of B rows, M summary and N regular tokens.
            split: most tiles of a work item; 0 chooses by the number of all tiles.

        Raises:
            ValueError: B is more than `MAX_BATCH`.
        """
        self.structure, self.split = structure, split
        self.batch, self.regular = structure.doc.shape
        if self.batch > MAX_BATCH:
            raise ValueError(f"attention 'triton' takes at most {MAX_BATCH:,} rows, got {self.batch:,}")
        self.summaries = structure.summary_doc.shape[1]
        self.q_blocks = triton.cdiv(self.regular, BLOCK)
        self.s_blocks = triton.cdiv(self.summaries, BLOCK)
        self.k_blocks = self.q_blocks + self.s_blocks
        self.lists = self.batch * (3 * self.q_blocks + self.k_blocks)
        self._key = (structure.device, self.batch, self.summaries, self.regular, split)
        guess = self.lists * _FIRST_GUESS
        with on_device(structure.device):
            self._make(_capacities.get(self._key, (2 * guess, guess, guess, self.lists)))

    def _make(self, capacity: "tuple[int, ...]") -> None:
        structure, device = self.structure, self.structure.device
        batch, regular, summaries = self.batch, self.regular, self.summaries
        q_blocks, k_blocks, lists = self.q_blocks, self.k_blocks, self.lists
        tokens, blocks = summaries + regular, batch * (2 * q_blocks + k_blocks)
        near_bars = tuple(sorted(set(structure.near_bars))) or (_NEVER,)
        query_class, key_class, same_inst_class = layout_classes(structure.kind_rule)
        candidates, tiles, masked, slots = self.capacity = capacity

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        properties, keys = empty(6, batch, tokens), empty(3 * batch * regular, dtype=torch.int64)
        encode_kernel[triton.cdiv(tokens, 256), batch](
            structure.doc, structure.bar, structure.inst, structure.kind, structure.onset, structure.position,
            structure.summary_doc, structure.summary_bar, structure.summary_position,
            properties, keys, batch, summaries, regular, KINDS_SEEN=kinds_seen(structure.kind_rule),
            QUERY_CLASS=query_class, KEY_CLASS=key_class, SAME_INST_CLASS=same_inst_class, SPAN=256,
        )  # fmt: skip
        self.order, laid, ranges = empty(blocks * BLOCK), empty(6, blocks * BLOCK), empty(12, blocks)
        layout_kernel[(blocks,)](
            keys.sort(stable=True).indices, properties, self.order, laid, ranges,
            batch, summaries, regular, q_blocks, self.s_blocks, blocks, num_warps=1,
        )  # fmt: skip

        count, list_ids, others = empty(lists), empty(candidates), empty(candidates)
        geometry = (batch, q_blocks, k_blocks, blocks)
        find = dict(CHUNK=128, num_warps=1, NEAR_BARS=near_bars)
        bits = sum(1 << distance for distance in near_bars) if near_bars[-1] < 31 else None
        compiled = isinstance(look_kernel, triton.JITFunction)
        step = 8 if compiled else BLOCK // 2  # registers are few, interpreted steps are slow
        look = dict(NEAR_BARS=near_bars, BITS=bits, STEP=step, num_warps=1)
        candidates_kernel[(lists,)](
            ranges, count, count, list_ids, others, candidates, *geometry, FILL=False, **find
        )
        end = count.cumsum(0, dtype=torch.int32)
        candidates_kernel[(lists,)](
            ranges, count, end, list_ids, others, candidates, *geometry, FILL=True, **find
        )
        some, every = empty(2, candidates, dtype=torch.int64)
        number = empty(candidates)
        look_kernel[(candidates,)](
            laid, list_ids, others, end, some, every, number,
            candidates, batch, q_blocks, k_blocks, blocks, CHUNK=64, **look,
        )  # fmt: skip

        sizes = empty(3, lists)
        count_kernel[(lists,)](number, count, end, sizes, lists, candidates, CHUNK=256, num_warps=1)
        ends = sizes[:2].cumsum(1, dtype=torch.int32)
        # One tile more than can be used: kernels may load the list one tile ahead.
        self.table, self.gathered, tile_list = empty(lists, 4), empty((tiles + 1) * BLOCK), empty(masked)
        fill_kernel[(lists,)](
            self.order, others, some, every, count, end, sizes, ends, self.table, self.gathered, tile_list,
            lists, candidates, tiles, masked, batch, summaries, q_blocks, k_blocks, CHUNK=16,
        )  # fmt: skip
        self.bits = empty(masked, 2, BLOCK)
        bits_kernel[(masked,)](
            properties, laid, self.gathered, tile_list, sizes, ends, self.table, self.bits,
            lists, tiles, batch, summaries, regular, q_blocks, k_blocks, blocks, **look,
        )  # fmt: skip

        # A block that is split has an item for every slot.
        self.needs, self.items = empty(NEEDS), empty(GROUPS, batch * k_blocks + slots, ITEM_SIZE.value)
        work_kernel[triton.cdiv(batch * k_blocks, 32), 4](
            sizes, ends, end, self.table, self.items, self.needs,
            lists, self.items.shape[1], batch, q_blocks, k_blocks, self.split, CHUNK=32, ACROSS=128,
        )  # fmt: skip
        pairs = triton.cdiv(q_blocks, 2)
        shared, places = empty(batch * pairs), empty(batch * pairs)
        share_kernel[(batch * pairs,)](
            self.table, self.gathered, shared, places, tiles, batch, q_blocks, pairs, CHUNK=8, num_warps=1
        )
        pair_kernel[(triton.cdiv(batch * pairs, 32),)](
            shared, places, ends, self.table, self.items[PAIRS.value], self.needs,
            self.items.shape[1], batch, q_blocks, pairs, self.split, CHUNK=32, ACROSS=128,
        )  # fmt: skip
        self._request_needs()

    def _request_needs(self) -> None:
        """Starts to copy `needs` to the host, without synchronizing."""
        if self.needs.device.type == "cuda":
            self._host_needs = torch.empty(NEEDS, dtype=torch.int32, pin_memory=True)
            self._host_needs.copy_(self.needs, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._host_needs, self._copied = self.needs, None

    def finalize(self) -> "Plan":
        """Makes sure that all buffers were large enough; if not, builds the plan again with more capacity.

        The first call may synchronize unless the plan was built ahead. Call it before a compiled model
        takes the plan: a graph cannot synchronize.
        """
        if self._host_needs is not None:
            self._await_needs()
        return self

    @torch.compiler.disable
    def _await_needs(self) -> None:
        while self._host_needs is not None:
            if self._copied is not None:
                self._copied.synchronize()
            needs = self._host_needs.tolist()
            self._host_needs = self._copied = None
            slots = max(needs[SLOTS : SLOTS + GROUPS])
            needed = (needs[CANDIDATES], needs[TILES], needs[MASKED], slots)
            known = _capacities.get(self._key)
            if known is None or any(n > c for n, c in zip(needed, self.capacity)):
                # After a first guess too: every kernel has a program for all that might be there.
                _capacities[self._key] = tuple(
                    k if n <= k else triton.cdiv(int(n * _SLACK) + 1, _ROUND) * _ROUND
                    for n, k in zip(needed, known or (-1,) * len(needed))
                )
                with on_device(self.structure.device):
                    self._make(_capacities[self._key])
        with on_device(self.structure.device):
            counters.keep(self.gathered.device)
        # Capacities grow now and then, and the number of summaries varies: no reason to compile anew.
        sizes = (self.gathered, 0), (self.bits, 0), (self.items, 1), (self.order, 0)
        for tensor, dimension in sizes:
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What `torch.ops.meloformer.update` takes of a plan."""
        return self.order, self.gathered, self.bits, self.items, self.needs

    def statistics(self) -> dict[str, int]:
        """Pairs of the update phase over all rows: `visible`, `computed`, those in `full` tiles; `tiles`
        by queries, and the `bytes` of the plan. Waits for the device."""
        self.finalize()
        by_queries = self.table[: 2 * self.batch * self.q_blocks].long()
        masked, tiles = by_queries[:, 2].sum(), by_queries[:, 3].sum()
        area, last = BLOCK * BLOCK, int(masked)
        bits = self.bits[:last]  # tiles by queries come first
        ones = sum(int(((bits >> i) & 1).sum()) for i in range(32))
        full = int(tiles - masked) * area - self._absent_in_full(by_queries)
        return {
            "visible": ones + full,
            "computed": int(tiles) * area,
            "full": int(tiles - masked) * area,
            "tiles": int(tiles),
            "bytes": sum(x.nbytes for x in (*self.tensors, self.table)),
        }

    def _absent_in_full(self, by_queries: Tensor) -> int:
        """Pairs of full tiles whose query is no token."""
        local, same_inst = self.order.view(-1, BLOCK).split(
            [self.batch * self.q_blocks, len(self.order) // BLOCK - self.batch * self.q_blocks]
        )
        blocks = torch.cat([local, same_inst[self.batch * self.k_blocks :]])
        absent = (blocks < 0).sum(1)
        return int((absent * (by_queries[:, 3] - by_queries[:, 2]) * BLOCK).sum())
