"""Work items of pairs of neighbouring blocks of the same-instrument pass, for `hopper_forward`.

Pair p of a batch row are its blocks 2p and 2p + 1, by queries; the last block of a row may stand alone. See
`hopper_forward` for the sequence of a pair's tiles.
"""

import triton
import triton.language as tl

from .plan_work import SLOTS, limits, order_items, store_item, store_lists
from .tiles import BLOCK, ITEM_COUNTS, ITEM_SIZE, PAIRS


@triton.jit(do_not_specialize=["tiles", "batch", "q_blocks", "pairs"])
def share_kernel(
    table_ptr, gathered_ptr, shared_ptr, places_ptr, tiles, batch, q_blocks, pairs, CHUNK: tl.constexpr
):
    """Of a pair: how many full tiles both lists begin with, and how many tiles the two have together."""
    pair = tl.program_id(0)
    block = pair // pairs * q_blocks + pair % pairs * 2
    list_0 = table_ptr + (batch * q_blocks + block) * 4
    has_second = block % q_blocks + 1 < q_blocks
    list_1 = list_0 + tl.where(has_second, 4, 0)
    masked_0, total_0 = tl.load(list_0 + 2), tl.load(list_0 + 3)
    masked_1, total_1 = tl.load(list_1 + 2), tl.load(list_1 + 3)
    full_0, full_1 = tl.load(list_0) + masked_0, tl.load(list_1) + masked_1
    most = tl.where(has_second, tl.minimum(total_0 - masked_0, total_1 - masked_1), 0)
    room = tiles - tl.maximum(full_0, full_1)  # of a buffer that may be too small
    most = tl.maximum(tl.minimum(most, room), 0)
    offs = tl.arange(0, CHUNK)
    shared = 0
    while shared < most:
        tile = shared + offs  # [CHUNK]
        token = tile[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = (tile < most)[:, None]
        token_0 = tl.load(gathered_ptr + full_0 * BLOCK + token, mask=mask, other=0)
        token_1 = tl.load(gathered_ptr + full_1 * BLOCK + token, mask=mask, other=0)
        differs = tl.max((token_0 != token_1).to(tl.int32), 1)
        same = tl.min(tl.where((differs != 0) | (tile >= most), offs, CHUNK), 0)
        shared += same
        most = tl.where(same < CHUNK, shared, most)
    tl.store(shared_ptr + pair, shared)
    tl.store(places_ptr + pair, total_0 + tl.where(has_second, total_1, 0) - shared)


@triton.jit(do_not_specialize=["items", "batch", "q_blocks", "pairs", "split"])
def pair_kernel(
    shared_ptr, places_ptr, ends_ptr, table_ptr, items_ptr, needs_ptr, items, batch, q_blocks, pairs, split,
    CHUNK: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Work items of pairs in the order of work, int32 [items, 16], as those of `plan_work.work_kernel`.

    An item is (first block of the pair, first place, end place, slot, first slot of the pair, items of the
    pair, shared tiles, ...), and the lists of both blocks, the second one empty if the first stands alone. A
    pair is split as a block is, by its places.
    """
    number = batch * pairs
    q_lists = batch * q_blocks
    tiles = tl.load(ends_ptr + 2 * q_lists - 1) - tl.load(ends_ptr + q_lists - 1)
    long, most = limits(tiles, batch, split, False)
    own = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    shared = tl.load(shared_ptr + own, mask=own < number, other=0)
    total, splits, item, all_items, all_slots = order_items(
        places_ptr, own, number, long, most, batch, pairs, ACROSS
    )
    block = own // pairs * q_blocks + own % pairs * 2
    for split_id in range(0, tl.max(splits, 0)):
        keep = (own < number) & (split_id < splits) & (item + split_id < items)
        at = items_ptr + (item + split_id) * ITEM_SIZE
        store_item(at, block, total, splits, split_id, item, keep)
        tl.store(at + 6, shared, mask=keep)
        store_lists(at, table_ptr, q_lists + block, 2, block % q_blocks + 1 < q_blocks, keep)
    if tl.program_id(0) == 0:
        tl.store(needs_ptr + SLOTS + PAIRS, all_slots)
        tl.store(needs_ptr + ITEM_COUNTS + PAIRS, all_items)
