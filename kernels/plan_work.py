"""The kernel that cuts a plan's lists into work items and reports what the plan needed."""

import triton
import triton.language as tl

from .tiles import ITEM_COUNTS, ITEM_LISTS, ITEM_SIZE

# Entries of `needs`; those of each group from SLOTS and from ITEM_COUNTS on.
CANDIDATES, TILES, MASKED, SLOTS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
GROUPS = 5
NEEDS = ITEM_COUNTS.value + GROUPS

_FEW = tl.constexpr(16)  # tiles: splits of fewer cost more than the better balance gains
# Blocks that a GPU computes at once for 8 heads, with registers for gradients of queries or of keys.
_AT_ONCE, _AT_ONCE_BY_KEYS = tl.constexpr(64), tl.constexpr(40)


@triton.jit
def limits(tiles, batch, split, by_keys):
    """From how many tiles on a block is long, and the most that an item has.

    A block of more tiles than there are for each of the blocks that are computed at once takes longer than
    all others: it is split. One of more than there are for each in its batch row is long: that row may be the
    last, and the block must not begin as late.

    Args:
        tiles: of all blocks.
        split: the most tiles of an item, whatever they are; or 0.
        by_keys: whether the blocks are of keys.
    """
    at_once = tl.where(by_keys, _AT_ONCE_BY_KEYS, _AT_ONCE)
    most = tl.where(split > 0, split, tl.maximum(tiles // at_once, _FEW))
    return tl.maximum(tiles // (at_once * batch), _FEW), most


@triton.jit
def _work_key(list_id, tiles, splits, long, batch, blocks):
    """Blocks of a higher key come first: split ones, then long ones; then batch row after row, whose keys and
    values stay in the cache meanwhile, and in a row from the longest list to the shortest."""
    first = (splits > 1) | (tiles > long)  # of these, all that are split have more tiles than all others
    return tl.where(first, (1 << 30) + tiles, ((batch - 1 - list_id // blocks) << 16) + tiles)


@triton.jit
def order_items(total_ptr, own, number, long, most, batch, blocks, ACROSS: tl.constexpr):
    """The work items of the blocks `own` [C] among `number` blocks, see `_work_key`, of at most `most` tiles.

    Args:
        total_ptr: int32 [number], the tiles of each block.
        long, most: see `limits`.

    Returns:
        total, splits, item: of the blocks `own`, their tiles, their items and the first of these. Split
            blocks come first: their items are the slots.
        all_items, all_slots: of all blocks.
    """
    total = tl.load(total_ptr + own, mask=own < number, other=0)
    splits = tl.maximum((total + most - 1) // most, 1)
    key = _work_key(own, total, splits, long, batch, blocks)
    item = tl.zeros([own.shape[0]], tl.int32)
    all_items, all_slots = 0, 0
    for start in range(0, number, ACROSS):
        other = start + tl.arange(0, ACROSS)
        mask = other < number
        other_total = tl.load(total_ptr + other, mask=mask, other=-1)
        other_splits = tl.where(mask, tl.maximum((other_total + most - 1) // most, 1), 0)
        other_key = _work_key(other, other_total, other_splits, long, batch, blocks)
        before = other_key[None, :] > key[:, None]
        before |= (other_key[None, :] == key[:, None]) & (other[None, :] < own[:, None])
        before &= mask[None, :]
        item += tl.sum(tl.where(before, other_splits[None, :], 0), 1)
        all_items += tl.sum(other_splits, 0)
        all_slots += tl.sum(tl.where(other_splits > 1, other_splits, 0), 0)
    return total, splits, item, all_items, all_slots


@triton.jit
def store_item(at, block, total, splits, split_id, item, keep):
    """Item `split_id` of blocks [C], with `total`, `splits` and `item` as `order_items` has them."""
    tl.store(at, block, mask=keep)
    tl.store(at + 1, split_id * total // splits, mask=keep)
    tl.store(at + 2, (split_id + 1) * total // splits, mask=keep)
    tl.store(at + 3, tl.where(splits > 1, item + split_id, -1), mask=keep)
    tl.store(at + 4, item, mask=keep)
    tl.store(at + 5, splits, mask=keep)


@triton.jit
def store_lists(at, table_ptr, list_id, NUMBER: tl.constexpr, there, keep):
    """Rows `list_id` [C] of `table` and NUMBER - 1 after them, zeros unless `there`, to the items at [C]."""
    column = tl.arange(0, 4 * NUMBER)[None, :]
    mask = (keep & there)[:, None] | (keep[:, None] & (column < 4))
    entry = tl.load(table_ptr + list_id[:, None] * 4 + column, mask=mask, other=0)
    tl.store(at[:, None] + ITEM_LISTS + column, entry, mask=keep[:, None])


@triton.jit(do_not_specialize=["lists", "items", "batch", "q_blocks", "k_blocks", "split"])
def work_kernel(
    tiles_ptr, ends_ptr, end_ptr, table_ptr, items_ptr, needs_ptr,
    lists, items, batch, q_blocks, k_blocks, split, CHUNK: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Work items of one group in the order of work, int32 [4, items, 16]; see `order_items`.

    An item is (block, first tile, end tile, slot, first slot of the block, items of the block, ...), with
    blocks counted within the group and tiles within the list; the slot is -1 if the block has one item. From
    ITEM_LISTS on comes its list's row of `table`: whoever has read an item needs no more to find its tiles.
    `split`: see `limits`.
    """
    group, chunk = tl.program_id(1), tl.program_id(0)
    q_lists, k_lists = batch * q_blocks, batch * k_blocks
    first = tl.where(group < 2, group * q_lists, tl.where(group == 2, 2 * q_lists, 2 * q_lists + k_lists))
    number = tl.where(group == 2, k_lists, q_lists)
    before_all = tl.load(ends_ptr + first) - tl.load(tiles_ptr + first)
    long, most = limits(tl.load(ends_ptr + first + number - 1) - before_all, batch, split, group >= 2)
    own = chunk * CHUNK + tl.arange(0, CHUNK)
    blocks = tl.where(group == 2, k_blocks, q_blocks)
    total, splits, item, all_items, all_slots = order_items(
        tiles_ptr + first, own, number, long, most, batch, blocks, ACROSS
    )
    out = items_ptr + (group * items + item) * ITEM_SIZE
    for split_id in range(0, tl.max(splits, 0)):
        keep = (own < number) & (split_id < splits) & (item + split_id < items)
        at = out + split_id * ITEM_SIZE
        store_item(at, own, total, splits, split_id, item, keep)
        store_lists(at, table_ptr, first + own, 1, keep, keep)
    if chunk == 0:
        tl.store(needs_ptr + SLOTS + group, all_slots)
        tl.store(needs_ptr + ITEM_COUNTS + group, all_items)
        if group == 0:
            tl.store(needs_ptr + CANDIDATES, tl.load(end_ptr + lists - 1))
            tl.store(needs_ptr + TILES, tl.load(ends_ptr + lists - 1))
            tl.store(needs_ptr + MASKED, tl.load(ends_ptr + 2 * lists - 1))
