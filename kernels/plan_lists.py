"""Kernels of a plan's lists: which tokens each block gathers in each pass, as full and masked tiles.

There are four groups of lists: local pass by queries, same-instrument pass by queries, local by keys,
same-instrument by keys. A group has a list for each block of its own side; lists are numbered group by group,
batch row by batch row. A candidate is a pair of a list and a block of the other side that it may gather from.
Kernels run in the order of this file. None writes out of bounds if a buffer is too small: `needs` (see
`plan_work`) then tells what would have been needed.
"""

import triton
import triton.language as tl

from .plan_layout import load_laid, load_properties
from .plan_visibility import ABSENT, load_ranges, may_see, sees
from .tiles import BLOCK


@triton.jit
def _decode(list_id, batch, q_blocks, k_blocks):
    """What a list is of.

    Returns:
        by_keys: whether its block holds keys.
        same_inst: whether it belongs to the same-instrument pass.
        b, block: its batch row and its block.
        first, others: the first block of the other side in that row, and how many there are.
    """
    local_k, same_inst_k = 2 * batch * q_blocks, batch * (2 * q_blocks + k_blocks)
    by_keys = list_id >= local_k
    same_inst = ((list_id >= batch * q_blocks) & (list_id < local_k)) | (list_id >= same_inst_k)
    first_k, first_q = tl.where(same_inst, same_inst_k, local_k), tl.where(same_inst, batch * q_blocks, 0)
    within = tl.where(by_keys, list_id - first_k, list_id - first_q)
    same_inst_first = batch * (q_blocks + k_blocks)
    own = tl.where(by_keys & (same_inst == 0), k_blocks, q_blocks)
    b = within // own
    block = within + tl.where(same_inst, same_inst_first, tl.where(by_keys, batch * q_blocks, 0))
    others = tl.where(same_inst | by_keys, q_blocks, k_blocks)
    first = tl.where(same_inst, same_inst_first, tl.where(by_keys, 0, batch * q_blocks)) + b * others
    return by_keys, same_inst, b, block, first, others


@triton.jit(do_not_specialize=["capacity", "batch", "q_blocks", "k_blocks", "blocks"])
def candidates_kernel(
    ranges_ptr, count_ptr, end_ptr, list_ptr, other_ptr, capacity, batch, q_blocks, k_blocks, blocks,
    FILL: tl.constexpr, NEAR_BARS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Counts the blocks that a list may gather from or, given the ends of all lists, stores them (FILL)."""
    list_id = tl.program_id(0)
    by_keys, same_inst, _, block, first, others = _decode(list_id, batch, q_blocks, k_blocks)
    count = 0
    begin = 0
    if FILL:
        begin = tl.load(end_ptr + list_id) - tl.load(count_ptr + list_id)
    for start in range(0, others, CHUNK):
        nth = start + tl.arange(0, CHUNK)
        mask = nth < others
        other = first + tl.minimum(nth, others - 1)
        mine = block + nth * 0
        t = load_ranges(ranges_ptr, blocks, tl.where(by_keys, other, mine), mask)
        u = load_ranges(ranges_ptr, blocks, tl.where(by_keys, mine, other), mask)
        may = may_see(t, u, same_inst, NEAR_BARS) & mask
        if FILL:
            at = begin + count + tl.cumsum(may.to(tl.int32), 0) - 1
            keep = may & (at < capacity)
            tl.store(list_ptr + at, list_id + nth * 0, mask=keep)
            tl.store(other_ptr + at, other, mask=keep)
        count += tl.sum(may.to(tl.int32), 0)
    if FILL == 0:
        tl.store(count_ptr + list_id, count)


@triton.jit
def _seen_by(
    laid_ptr, blocks, at, y, same_inst, NEAR_BARS: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr
):
    """Which of the 32 tokens in the slots from `at` on see each key y: int32 [BY], one bit each; and which of
    these slots hold a token: int32."""
    seen_by, real = y[0] * 0, at * 0
    for start in range(0, 32, STEP):  # a few queries against all keys
        bit = start + tl.arange(0, STEP)
        x = load_laid(laid_ptr, blocks, at + bit)
        seen = sees(x, y, True, same_inst, NEAR_BARS, BITS).to(tl.int32)
        seen_by |= tl.sum(seen << bit[:, None], 0)
        real |= tl.sum((x[0] != ABSENT).to(tl.int32) << bit, 0)
    return seen_by, real


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _store_bits(ptr, low, high, keep):
    """64 bits from two words; returns how many are set."""
    tl.store(ptr, (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32), mask=keep)
    bit = tl.arange(0, 32)
    return tl.sum(((low >> bit) & 1) + ((high >> bit) & 1), 0)


@triton.jit(do_not_specialize=["capacity", "batch", "q_blocks", "k_blocks", "blocks"])
def look_kernel(
    laid_ptr, list_ptr, other_ptr, end_ptr, any_ptr, all_ptr, number_ptr,
    capacity, batch, q_blocks, k_blocks, blocks,
    NEAR_BARS: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Which tokens of a candidate's other block are seen by any and by all tokens of its own: 64 bits each,
    and how many.

    Slots without a token do not count against `all`. Every pair of blocks is a candidate twice, by queries
    and by keys: a program takes the one by queries, and writes the result of the other as well.
    """
    candidate = tl.program_id(0)
    if candidate < min(tl.load(end_ptr + 2 * batch * q_blocks - 1), capacity):
        list_id, other = tl.load(list_ptr + candidate), tl.load(other_ptr + candidate)
        _, same_inst, _, block, _, _ = _decode(list_id, batch, q_blocks, k_blocks)
        offs = tl.arange(0, BLOCK)
        y = load_laid(laid_ptr, blocks, other * BLOCK + offs)
        low, low_real = _seen_by(laid_ptr, blocks, block * BLOCK, y, same_inst, NEAR_BARS, BITS, STEP)
        high, high_real = _seen_by(laid_ptr, blocks, block * BLOCK + 32, y, same_inst, NEAR_BARS, BITS, STEP)
        some = (low | high) != 0
        every = some & (low == low_real) & (high == high_real)
        some, every = some.to(tl.int32), every.to(tl.int32)
        tl.store(any_ptr + candidate, tl.sum(some.to(tl.int64) << offs.to(tl.int64), 0))
        tl.store(all_ptr + candidate, tl.sum(every.to(tl.int64) << offs.to(tl.int64), 0))
        tl.store(number_ptr + candidate, tl.sum(some, 0) + (tl.sum(every, 0) << 16))

        # By keys, `other` is the block and this one is in its list, which ascends: find it there.
        key_list = other + batch * q_blocks
        at, end = tl.load(end_ptr + key_list - 1), min(tl.load(end_ptr + key_list), capacity)
        for start in range(at, end, CHUNK):
            index = start + tl.arange(0, CHUNK)
            earlier = tl.load(other_ptr + index, mask=index < end, other=block) < block
            at += tl.sum(earlier.to(tl.int32), 0)
        keep = at < end
        real = y[0] != ABSENT
        some_low, some_high = tl.reduce(low, 0, _either), tl.reduce(high, 0, _either)
        every_low = ~tl.reduce(tl.where(real, ~low, 0), 0, _either) & some_low
        every_high = ~tl.reduce(tl.where(real, ~high, 0), 0, _either) & some_high
        number = _store_bits(any_ptr + at, some_low, some_high, keep)
        number += _store_bits(all_ptr + at, every_low, every_high, keep) << 16
        tl.store(number_ptr + at, number, mask=keep)


@triton.jit(do_not_specialize=["lists", "capacity"])
def count_kernel(number_ptr, count_ptr, end_ptr, tiles_ptr, lists, capacity, CHUNK: tl.constexpr):
    """Of a list, int32 [3, lists]: its tiles, its masked tiles, and the gathered tokens in these."""
    list_id = tl.program_id(0)
    end = tl.load(end_ptr + list_id)
    some, every = 0, 0
    for start in range(end - tl.load(count_ptr + list_id), min(end, capacity), CHUNK):
        candidate = start + tl.arange(0, CHUNK)
        number = tl.load(number_ptr + candidate, mask=candidate < min(end, capacity), other=0)
        some += tl.sum(number & 0xFFFF, 0)
        every += tl.sum(number >> 16, 0)
    full = every // BLOCK * BLOCK
    masked = (some - full + BLOCK - 1) // BLOCK
    tl.store(tiles_ptr + list_id, masked + full // BLOCK)
    tl.store(tiles_ptr + lists + list_id, masked)
    tl.store(tiles_ptr + 2 * lists + list_id, some - full)


@triton.jit(
    do_not_specialize=[
        "lists",
        "candidates",
        "tiles",
        "masked_tiles",
        "batch",
        "summaries",
        "q_blocks",
        "k_blocks",
    ]
)
def fill_kernel(
    order_ptr, other_ptr, any_ptr, all_ptr, count_ptr, end_ptr, tiles_ptr, ends_ptr,
    table_ptr, gathered_ptr, tile_list_ptr, lists, candidates, tiles, masked_tiles, batch, summaries,
    q_blocks, k_blocks, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gathers the tokens of a list: those that need a mask first, those that all tokens see after them.

    Writes its row of `table`, int32 [lists, 4]: first tile, first tile among the masked ones of all lists,
    number of masked tiles, number of tiles. A gathered query is counted within the regular stream.
    """
    list_id = tl.program_id(0)
    total, masked = tl.load(tiles_ptr + list_id), tl.load(tiles_ptr + lists + list_id)
    first, first_masked = tl.load(ends_ptr + list_id) - total, tl.load(ends_ptr + lists + list_id) - masked
    table = table_ptr + list_id * 4
    tl.store(table, first)
    tl.store(table + 1, first_masked)
    tl.store(table + 2, masked)
    tl.store(table + 3, total)
    full = (total - masked) * BLOCK
    shift = tl.where(list_id >= 2 * batch * q_blocks, summaries, 0)
    limit = tiles * BLOCK
    offs = tl.arange(0, CHUNK * BLOCK)
    end = min(tl.load(end_ptr + list_id), candidates)
    full_count, masked_count = 0, 0
    for start in range(tl.load(end_ptr + list_id) - tl.load(count_ptr + list_id), end, CHUNK):
        candidate = start + offs // BLOCK
        mask = candidate < end
        slot = tl.load(other_ptr + candidate, mask=mask, other=0) * BLOCK + offs % BLOCK
        bit = (offs % BLOCK).to(tl.int64)
        some = ((tl.load(any_ptr + candidate, mask=mask, other=0) >> bit) & 1).to(tl.int32)
        every = ((tl.load(all_ptr + candidate, mask=mask, other=0) >> bit) & 1).to(tl.int32)
        full_rank = full_count + tl.cumsum(every, 0) - 1
        in_full = (every != 0) & (full_rank < full)
        in_masked = (some != 0) & (in_full == 0)
        masked_rank = masked_count + tl.cumsum(in_masked.to(tl.int32), 0) - 1
        at = first * BLOCK + tl.where(in_full, masked * BLOCK + full_rank, masked_rank)
        token = tl.load(order_ptr + slot, mask=in_full | in_masked, other=0) - shift
        tl.store(gathered_ptr + at, token, mask=(in_full | in_masked) & (at < limit))
        full_count += tl.sum(every, 0)
        masked_count += tl.sum(in_masked.to(tl.int32), 0)
    rest = masked_count + tl.arange(0, BLOCK)
    at = first * BLOCK + rest
    nobody = summaries - shift  # the first regular token, where a tile has none: its bits are 0
    tl.store(gathered_ptr + at, rest * 0 + nobody, mask=(rest < masked * BLOCK) & (at < limit))
    for start in range(0, masked, BLOCK):
        at = start + tl.arange(0, BLOCK)
        keep = (at < masked) & (first_masked + at < masked_tiles)
        tl.store(tile_list_ptr + first_masked + at, list_id + at * 0, mask=keep)


@triton.jit(
    do_not_specialize=["lists", "tiles", "batch", "summaries", "regular", "q_blocks", "k_blocks", "blocks"]
)
def bits_kernel(
    props_ptr, laid_ptr, gathered_ptr, tile_list_ptr, tiles_ptr, ends_ptr, table_ptr, bits_ptr,
    lists, tiles, batch, summaries, regular, q_blocks, k_blocks, blocks,
    NEAR_BARS: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The bits of one masked tile, int32 [2, 64]; see `tiles.tile_mask`."""
    tile = tl.program_id(0)
    if tile < tl.load(ends_ptr + 2 * lists - 1):
        list_id = tl.load(tile_list_ptr + tile)
        by_keys, same_inst, b, block, _, _ = _decode(list_id, batch, q_blocks, k_blocks)
        nth = tile - tl.load(table_ptr + list_id * 4 + 1)
        first = (tl.load(table_ptr + list_id * 4) + nth) * BLOCK
        num_gathered = tl.load(tiles_ptr + 2 * lists + list_id) - nth * BLOCK
        shift = tl.where(by_keys, summaries, 0)
        offs = tl.arange(0, BLOCK)
        y = load_laid(laid_ptr, blocks, block * BLOCK + offs)
        for word in range(2):
            bits = tl.zeros([BLOCK], tl.int32)
            for start in range(0, 32, STEP):  # a few gathered tokens against the block
                nth_token = start + tl.arange(0, STEP)
                at = first + word * 32 + nth_token
                real = (word * 32 + nth_token < num_gathered) & (at < tiles * BLOCK)
                token = tl.where(real, tl.load(gathered_ptr + at, mask=real, other=0) + shift, -1)
                x = load_properties(props_ptr, batch, summaries + regular, b, token)
                seen = sees(x, y, by_keys, same_inst, NEAR_BARS, BITS).to(tl.int32)
                bits |= tl.sum(seen << (4 * (nth_token % 8) + nth_token // 8)[:, None], 0)
            tl.store(bits_ptr + (tile * 2 + word) * BLOCK + offs, bits)
