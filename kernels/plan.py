"""The plan of a batch: layouts, lists of columns and packed bits, all that the update kernels know.

Regular tokens attend in two passes. *Near* holds summaries, global keys and the keys at the distances
in `near_bars`; *far* holds the keys of the same instrument at other distances. Each visible pair lies
in exactly one. A pass orders its tokens so that those with alike masks stand together, cuts its
queries into lines of 64, and gathers for each line the keys that any of the 64 sees: its columns, in
tiles of 64. Columns that all 64 see make full tiles, which need no mask; the others have one bit per
pair. The same is done by keys, for their gradients. Because columns are gathered one by one, a key
costs nothing in a line that does not see it, wherever it stands.

The three layouts, all stable, by document first:
    near queries: structural, then the others by classes of what they see;
    near keys: the summaries as blocks of their own, then globals, INST, the others by who sees them;
    far: by instrument, then INST, the others by both.
With the kind rule "alike" the classes of the others are {T, P}, V, L in each.

Everything is computed on the structure's device, in a fixed order: two plans of one structure are
equal. Nothing waits for the device but `Plan.finalize`, which is called before the plan is first used
and finds its answer ready if the plan was made ahead of time.

Memory in bytes: 768 per tile with a mask and 256 per full one, by queries and by keys; the capacity
for them follows what earlier plans of the same shape needed. While a plan is made, 28 more for every
pair of blocks that might see each other. The parts of split lines take 512 x (D + 2) for each of H heads
and each slot while a phase runs.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from .plan_kernels import (
    BLOCK as _BLOCK,
)
from .plan_kernels import (
    CANDIDATES,
    MASKED,
    NEEDS,
    SLOTS,
    TILES,
    bits_kernel,
    candidates_kernel,
    count_kernel,
    encode_kernel,
    fill_kernel,
    layout_kernel,
    look_kernel,
    work_kernel,
)
from .structure import Kind, Structure, kinds_seen

BLOCK = _BLOCK.value  # tokens of a block, and gathered tokens of a tile

_NEVER = 2**30  # a distance between bars that does not occur
_FIRST_GUESS = 4  # tiles per line, before anything is known: the first plan is made again anyway
_SLACK = 1.25
_ROUND = 32

# What plans of one (device, B, M, N, split) have needed, with slack: of candidates, tiles, tiles with a
# mask, and slots.
_capacities: dict[tuple, "tuple[int, ...]"] = {}


def on_device(device: torch.device) -> AbstractContextManager:
    """`device` as the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


MOST_ROWS = 1 << 14  # what the keys of `plan_kernels.work_kernel` can tell apart


def layout_classes(kind_rule: str) -> "tuple[tuple[int, ...], ...]":
    """The class of each `Kind`, by which tokens stand together: of near queries, near keys, the far layout.

    Kinds share one if the kind rule treats them alike: as queries, as keys, as both.
    """
    sees = kinds_seen(kind_rule)
    seen_by = tuple(sum((sees[query] >> key & 1) << query for query in Kind) for key in Kind)
    return _classes(sees), _classes(seen_by), _classes(tuple(zip(sees, seen_by)))


def _classes(treatment: tuple) -> "tuple[int, ...]":
    """1 for structural tokens; one number more for each other treatment."""
    different = list(dict.fromkeys(treatment[kind] for kind in (Kind.T, Kind.P, Kind.V, Kind.L)))
    return tuple(1 if kind == Kind.STRUCTURAL else 2 + different.index(treatment[kind]) for kind in Kind)


class Plan:
    """The plan of one structure, for all heads, layers, forward and backward.

    Lines come in groups: near by queries, far by queries, near by keys, far by keys; within a group by
    row, then block. All tensors are int32.

    Attributes:
        order: [blocks * 64], the token in each slot of the three layouts, layout by layout and row by
            row; counted over summaries and regular tokens of a row together, summaries first; -1 for
            none.
        table: [lines, 4], of each line its first tile, its first tile among those with a mask, the
            number of these, and the number of all its tiles. Tiles with a mask come first.
        tokens: [tiles * 64], the columns: keys counted as in `order`, queries within their stream.
        bits: [tiles with a mask, 2, 64], see `forward.tile_mask`.
        items: [4, items, 8], of each group its lines, or parts of lines, in the order of work; see
            `plan_kernels.work_kernel`.
        needs: [11], what was needed of each capacity, and how many items each group has; see
            `plan_kernels`.
    """

    def __init__(self, structure: Structure, split: int = 0):
        """
        Args:
            split: most tiles of an item; 0 decides by the number of all tiles.
        """
        self.structure, self.split = structure, split
        self.rows, self.regular = structure.doc.shape
        if self.rows > MOST_ROWS:
            raise ValueError(f"attention 'triton' takes at most {MOST_ROWS:,} rows, got {self.rows:,}")
        self.summaries = structure.summary_doc.shape[1]
        self.q_blocks = triton.cdiv(self.regular, BLOCK)
        self.s_blocks = triton.cdiv(self.summaries, BLOCK)
        self.k_blocks = self.q_blocks + self.s_blocks
        self.lines = self.rows * (3 * self.q_blocks + self.k_blocks)
        self._key = (structure.device, self.rows, self.summaries, self.regular, split)
        guess = self.lines * _FIRST_GUESS
        with on_device(structure.device):
            self._make(_capacities.get(self._key, (2 * guess, guess, guess, self.lines)))

    def _make(self, capacity: "tuple[int, ...]") -> None:
        structure, device = self.structure, self.structure.device
        rows, regular, summaries = self.rows, self.regular, self.summaries
        q_blocks, k_blocks, lines = self.q_blocks, self.k_blocks, self.lines
        tokens, blocks = summaries + regular, rows * (2 * q_blocks + k_blocks)
        near_bars = tuple(sorted(set(structure.near_bars))) or (_NEVER,)
        query_class, key_class, far_class = layout_classes(structure.kind_rule)
        candidates, tiles, masked, slots = self.capacity = capacity

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        facts, keys = empty(6, rows, tokens), empty(3 * rows * regular, dtype=torch.int64)
        encode_kernel[triton.cdiv(tokens, 256), rows](
            structure.doc, structure.bar, structure.inst, structure.kind, structure.onset, structure.position,
            structure.summary_doc, structure.summary_bar, structure.summary_position,
            facts, keys, rows, summaries, regular, KINDS_SEEN=kinds_seen(structure.kind_rule),
            QUERY_CLASS=query_class, KEY_CLASS=key_class, FAR_CLASS=far_class, SPAN=256,
        )  # fmt: skip
        self.order, laid, ranges = empty(blocks * BLOCK), empty(6, blocks * BLOCK), empty(12, blocks)
        layout_kernel[(blocks,)](
            keys.sort(stable=True).indices, facts, self.order, laid, ranges,
            rows, summaries, regular, q_blocks, self.s_blocks, blocks, num_warps=1,
        )  # fmt: skip

        count, line, column = empty(lines), empty(candidates), empty(candidates)
        geometry = (rows, q_blocks, k_blocks, blocks)
        find = dict(CHUNK=128, num_warps=1, NEAR_BARS=near_bars)
        bits = sum(1 << distance for distance in near_bars) if near_bars[-1] < 31 else None
        step = 8 if device.type == "cuda" else BLOCK // 2  # registers are few, interpreted steps are slow
        look = dict(NEAR_BARS=near_bars, BITS=bits, STEP=step, num_warps=1)
        candidates_kernel[(lines,)](
            ranges, count, count, line, column, candidates, *geometry, FILL=False, **find
        )
        end = count.cumsum(0, dtype=torch.int32)
        candidates_kernel[(lines,)](
            ranges, count, end, line, column, candidates, *geometry, FILL=True, **find
        )
        some, every = empty(2, candidates, dtype=torch.int64)
        number = empty(candidates)
        look_kernel[(candidates,)](
            laid, line, column, end, some, every, number,
            candidates, rows, q_blocks, k_blocks, blocks, CHUNK=64, **look,
        )  # fmt: skip

        sizes = empty(3, lines)
        count_kernel[(lines,)](number, count, end, sizes, lines, candidates, CHUNK=256, num_warps=1)
        ends = sizes[:2].cumsum(1, dtype=torch.int32)
        # One tile more than can be used: kernels may look at the columns one tile ahead.
        self.table, self.tokens, tile_line = empty(lines, 4), empty((tiles + 1) * BLOCK), empty(masked)
        fill_kernel[(lines,)](
            self.order, column, some, every, count, end, sizes, ends, self.table, self.tokens, tile_line,
            lines, candidates, tiles, masked, rows, summaries, q_blocks, k_blocks, CHUNK=16,
        )  # fmt: skip
        self.bits = empty(masked, 2, BLOCK)
        bits_kernel[(masked,)](
            facts, laid, self.tokens, tile_line, sizes, ends, self.table, self.bits,
            lines, tiles, rows, summaries, regular, q_blocks, k_blocks, blocks, **look,
        )  # fmt: skip

        # A line that is split has an item for every slot.
        self.needs, self.items = empty(NEEDS), empty(4, rows * k_blocks + slots, 8)
        work_kernel[triton.cdiv(rows * k_blocks, 32), 4](
            sizes, ends, end, self.items, self.needs,
            lines, self.items.shape[1], rows, q_blocks, k_blocks, self.split, CHUNK=32, ACROSS=128,
        )  # fmt: skip
        self._ask()

    def _ask(self) -> None:
        """Send for what was needed, without waiting."""
        if self.needs.device.type == "cuda":
            self._answer = torch.empty(NEEDS, dtype=torch.int32, pin_memory=True)
            self._answer.copy_(self.needs, non_blocking=True)
            self._answered = torch.cuda.Event()
            self._answered.record()
        else:
            self._answer, self._answered = self.needs, None

    def finalize(self) -> "Plan":
        """Make sure that everything fitted; if not, make the plan again with enough room.

        The first call waits until the device has made the plan. Call it before a compiled model gets the
        plan: waiting is nothing that a graph can hold.
        """
        if self._answer is not None:
            self._grow()
        return self

    @torch.compiler.disable
    def _grow(self) -> None:
        while self._answer is not None:
            if self._answered is not None:
                self._answered.synchronize()
            needs = self._answer.tolist()
            self._answer = self._answered = None
            needed = (needs[CANDIDATES], needs[TILES], needs[MASKED], max(needs[SLOTS : SLOTS + 4]))
            known = _capacities.get(self._key)
            if known is None or any(n > c for n, c in zip(needed, self.capacity)):
                # After a first guess too: every kernel has a program for all that might be there.
                _capacities[self._key] = tuple(
                    k if n <= k else triton.cdiv(int(n * _SLACK) + 1, _ROUND) * _ROUND
                    for n, k in zip(needed, known or (-1,) * len(needed))
                )
                with on_device(self.structure.device):
                    self._make(_capacities[self._key])
        # Capacities grow now and then, and the number of summaries varies: no reason to compile anew.
        sizes = (self.tokens, 0), (self.bits, 0), (self.items, 1), (self.order, 0), (self.table, 0)
        for tensor, dimension in sizes:
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What `torch.ops.meloformer.update` takes of a plan."""
        return (
            self.order,
            self.table,
            self.tokens,
            self.bits,
            self.items,
            self.needs,
        )

    def statistics(self) -> dict[str, int]:
        """Pairs of the update phase over all rows: `visible`, `computed`, those in `full` tiles; `tiles`
        by queries, and the `bytes` of the plan. Waits for the device."""
        self.finalize()
        by_queries = self.table[: 2 * self.rows * self.q_blocks].long()
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
            "bytes": sum(x.nbytes for x in self.tensors),
        }

    def _absent_in_full(self, by_queries: Tensor) -> int:
        """Pairs of full tiles whose query is no token."""
        near, far = self.order.view(-1, BLOCK).split(
            [self.rows * self.q_blocks, len(self.order) // BLOCK - self.rows * self.q_blocks]
        )
        blocks = torch.cat([near, far[self.rows * self.k_blocks :]])
        absent = (blocks < 0).sum(1)
        return int((absent * (by_queries[:, 3] - by_queries[:, 2]) * BLOCK).sum())
