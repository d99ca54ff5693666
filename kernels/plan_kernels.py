"""The Triton kernels that make a plan; `plan.py` calls them in the order of this file.

Tokens are counted over summaries and regular tokens of a row together, summaries first. Blocks and
lines have 64 tokens, tiles have 64 columns. There are three layouts (`plan.py` says which): blocks
are numbered layout by layout, row by row. There are four groups of lines, numbered the same way:
near pass by queries, far by queries, near by keys, far by keys. A line is a block of its own side and
what it sees of the blocks of the other side, its columns.

No kernel writes beyond what is allocated. `needs` says afterwards what would have been needed.
"""

import triton
import triton.language as tl

from .tiles import BLOCK, ITEM_COUNTS
from .visibility import (
    _NO_INSTRUMENT,
    _NO_ONSET,
    _SUMMARY,
    ABSENT,
    by_kind,
    code_of,
    load_ranges,
    may_see,
    sees,
    store_ranges,
)

FULL_UNIT = tl.constexpr(128)  # full columns are taken by so many, the most that a kernel takes at once

# Entries of `needs`.
CANDIDATES, TILES, MASKED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SLOTS = tl.constexpr(3)  # of the first group, and three others after it, as those of ITEM_COUNTS
NEEDS = 11

LEAST_SPLIT = tl.constexpr(16)  # tiles: parts of fewer would cost more than the balance of work gains


@triton.jit(do_not_specialize=["rows", "summaries", "regular"])
def encode_kernel(
    doc_ptr, bar_ptr, inst_ptr, kind_ptr, onset_ptr, position_ptr, s_doc_ptr, s_bar_ptr, s_position_ptr,
    facts_ptr, keys_ptr, rows, summaries, regular, KINDS_SEEN: tl.constexpr,
    QUERY_CLASS: tl.constexpr, KEY_CLASS: tl.constexpr, FAR_CLASS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """TokenProperties of all tokens, int32 [6, B, M + N], and of regular ones their sort keys, int64 [3, B,
    N].

    The keys order tokens by layout, row, document, and by what the layout groups them by: by the
    layout's class of each kind, 1 to 5, among others; equal keys stay in the order of the row. See
    `plan.py`.
    """
    row = tl.program_id(1)
    token = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    there = token < summaries + regular
    in_s = token < summaries
    of_s = row * summaries + token
    of_r = row * regular + token - summaries
    is_s, is_r = there & in_s, there & (token >= summaries)
    doc = tl.load(doc_ptr + of_r, mask=is_r, other=-1)
    inst = tl.load(inst_ptr + of_r, mask=is_r, other=_NO_INSTRUMENT)
    kind = tl.load(kind_ptr + of_r, mask=is_r, other=0)
    bar = tl.load(bar_ptr + of_r, mask=is_r, other=0)
    onset = tl.load(onset_ptr + of_r, mask=is_r, other=_NO_ONSET)
    position = tl.load(position_ptr + of_r, mask=is_r, other=0)
    code = tl.where(in_s, _SUMMARY, code_of(kind, inst, KINDS_SEEN))
    all_doc = tl.where(in_s, tl.load(s_doc_ptr + of_s, mask=is_s, other=-1), doc)
    bar = tl.where(in_s, tl.load(s_bar_ptr + of_s, mask=is_s, other=0), bar)
    position = tl.where(in_s, tl.load(s_position_ptr + of_s, mask=is_s, other=0), position)
    plane = rows.to(tl.int64) * (summaries + regular)
    at = facts_ptr + row.to(tl.int64) * (summaries + regular) + token
    tl.store(at, all_doc, mask=there)
    tl.store(at + plane, bar, mask=there)
    tl.store(at + 2 * plane, inst, mask=there)
    tl.store(at + 3 * plane, code, mask=there)
    tl.store(at + 4 * plane, onset, mask=there)
    tl.store(at + 5 * plane, position, mask=there)

    is_global = (kind == 0) & (inst == _NO_INSTRUMENT)
    key_class = tl.where(is_global, 0, by_kind(kind, KEY_CLASS))
    far_class = tl.where(is_global, 0, by_kind(kind, FAR_CLASS))
    rank = row.to(tl.int64) * 2**31 + tl.where(doc >= 0, doc, 2**31 - 1)  # padding is last
    rank *= 1024
    keys = keys_ptr + of_r
    plane = rows.to(tl.int64) * regular
    layout = rows.to(tl.int64) * (2**31 * 1024)
    tl.store(keys, rank + by_kind(kind, QUERY_CLASS), mask=is_r)
    tl.store(keys + plane, layout + rank + key_class, mask=is_r)
    tl.store(keys + 2 * plane, 2 * layout + rank + inst * 6 + far_class, mask=is_r)


@triton.jit
def load_facts(facts_ptr, rows, tokens, row, token):
    """Six facts of some tokens of one row; those of a negative token are `ABSENT`."""
    plane = rows.to(tl.int64) * tokens
    at = facts_ptr + row.to(tl.int64) * tokens + tl.maximum(token, 0)
    return (
        tl.where(token >= 0, tl.load(at), ABSENT),
        tl.load(at + plane),
        tl.load(at + 2 * plane),
        tl.load(at + 3 * plane),
        tl.load(at + 4 * plane),
        tl.load(at + 5 * plane),
    )


@triton.jit(do_not_specialize=["rows", "summaries", "regular", "q_blocks", "s_blocks", "blocks"])
def layout_kernel(
    sorted_ptr, facts_ptr, order_ptr, laid_ptr, ranges_ptr,
    rows, summaries, regular, q_blocks, s_blocks, blocks,
):  # fmt: skip
    """The token in each slot of every layout, int32 [blocks * 64], -1 for none; its facts, int32
    [6, blocks * 64]; and the blocks' ranges.

    `sorted` is what the sort of `encode_kernel`'s keys gave, int64 [3 * B * N].
    """
    block = tl.program_id(0)
    k_blocks = s_blocks + q_blocks
    layout = (block >= rows * q_blocks).to(tl.int32) + (block >= rows * (q_blocks + k_blocks)).to(tl.int32)
    first = tl.where(layout == 0, 0, tl.where(layout == 1, rows * q_blocks, rows * (q_blocks + k_blocks)))
    per_row = tl.where(layout == 1, k_blocks, q_blocks)
    row, at = (block - first) // per_row, (block - first) % per_row
    slot = at * BLOCK + tl.arange(0, BLOCK)
    in_s = (layout == 1) & (at < s_blocks)
    slot = tl.where((layout == 1) & (at >= s_blocks), slot - s_blocks * BLOCK, slot)
    place = (layout * rows + row).to(tl.int64) * regular
    index = tl.load(sorted_ptr + place + slot, mask=(slot < regular) & (in_s == 0), other=0) - place
    token = tl.where(slot < regular, index.to(tl.int32) + summaries, -1)
    token = tl.where(in_s, tl.where(slot < summaries, slot, -1), token)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(order_ptr + offs, token)
    doc, bar, inst, code, onset, position = load_facts(facts_ptr, rows, summaries + regular, row, token)
    plane = blocks.to(tl.int64) * BLOCK
    tl.store(laid_ptr + offs, doc)
    tl.store(laid_ptr + plane + offs, bar)
    tl.store(laid_ptr + 2 * plane + offs, inst)
    tl.store(laid_ptr + 3 * plane + offs, code)
    tl.store(laid_ptr + 4 * plane + offs, onset)
    tl.store(laid_ptr + 5 * plane + offs, position)
    store_ranges(ranges_ptr, blocks, block, doc, bar, inst, code, onset, position)


@triton.jit
def _load_laid(laid_ptr, blocks, slot):
    """The facts of the tokens in some slots."""
    plane, at = blocks.to(tl.int64) * BLOCK, laid_ptr + slot
    return (
        tl.load(at),
        tl.load(at + plane),
        tl.load(at + 2 * plane),
        tl.load(at + 3 * plane),
        tl.load(at + 4 * plane),
        tl.load(at + 5 * plane),
    )


@triton.jit
def _decode(line, rows, q_blocks, k_blocks):
    """A line -> (whether its rows are keys, whether the pass is far, row, its block, first column block,
    number of column blocks)."""
    near_k, far_k = 2 * rows * q_blocks, rows * (2 * q_blocks + k_blocks)
    by_keys = line >= near_k
    far = ((line >= rows * q_blocks) & (line < near_k)) | (line >= far_k)
    within = tl.where(by_keys, line - tl.where(far, far_k, near_k), line - tl.where(far, rows * q_blocks, 0))
    far_first = rows * (q_blocks + k_blocks)
    own = tl.where(by_keys & (far == 0), k_blocks, q_blocks)
    row = within // own
    block = within + tl.where(far, far_first, tl.where(by_keys, rows * q_blocks, 0))
    columns = tl.where(far | by_keys, q_blocks, k_blocks)
    first = tl.where(far, far_first, tl.where(by_keys, 0, rows * q_blocks)) + row * columns
    return by_keys, far, row, block, first, columns


@triton.jit(do_not_specialize=["capacity", "rows", "q_blocks", "k_blocks", "blocks"])
def candidates_kernel(
    ranges_ptr, count_ptr, end_ptr, line_ptr, column_ptr, capacity, rows, q_blocks, k_blocks, blocks,
    FILL: tl.constexpr, NEAR_BARS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Counts the column blocks that a line may see, or (FILL) writes them down, given the ends of lines."""
    line = tl.program_id(0)
    by_keys, far, _, block, first, columns = _decode(line, rows, q_blocks, k_blocks)
    count = 0
    begin = 0
    if FILL:
        begin = tl.load(end_ptr + line) - tl.load(count_ptr + line)
    for start in range(0, columns, CHUNK):
        column = start + tl.arange(0, CHUNK)
        there = column < columns
        other = first + tl.minimum(column, columns - 1)
        mine = block + column * 0
        t = load_ranges(ranges_ptr, blocks, tl.where(by_keys, other, mine), there)
        u = load_ranges(ranges_ptr, blocks, tl.where(by_keys, mine, other), there)
        may = may_see(t, u, far, NEAR_BARS) & there
        if FILL:
            at = begin + count + tl.cumsum(may.to(tl.int32), 0) - 1
            keep = may & (at < capacity)
            tl.store(line_ptr + at, line + column * 0, mask=keep)
            tl.store(column_ptr + at, other, mask=keep)
        count += tl.sum(may.to(tl.int32), 0)
    if FILL == 0:
        tl.store(count_ptr + line, count)


@triton.jit
def _seen_by(laid_ptr, blocks, at, y, far, NEAR_BARS: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr):
    """For each token y, as a key, which of the 32 tokens in the slots from `at` on see it, int32 [BY]; and
    which of these slots have a token, int32."""
    seen_by, real = y[0] * 0, at * 0
    for start in range(0, 32, STEP):  # a few queries against all keys
        bit = start + tl.arange(0, STEP)
        x = _load_laid(laid_ptr, blocks, at + bit)
        seen = sees(x, y, True, far, NEAR_BARS, BITS).to(tl.int32)
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


@triton.jit(do_not_specialize=["capacity", "rows", "q_blocks", "k_blocks", "blocks"])
def look_kernel(
    laid_ptr, line_ptr, column_ptr, end_ptr, any_ptr, all_ptr, number_ptr,
    capacity, rows, q_blocks, k_blocks, blocks,
    NEAR_BARS: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Which columns of a candidate any, and which all tokens of its line see: 64 bits each, and numbers.

    Slots without a token do not count against `all`. Every pair of blocks is a candidate twice, by queries
    and by keys: a program looks at the pairs of one by queries, and finds out about the other as well.
    """
    candidate = tl.program_id(0)
    if candidate < min(tl.load(end_ptr + 2 * rows * q_blocks - 1), capacity):
        line, column = tl.load(line_ptr + candidate), tl.load(column_ptr + candidate)
        _, far, _, block, _, _ = _decode(line, rows, q_blocks, k_blocks)
        offs = tl.arange(0, BLOCK)
        y = _load_laid(laid_ptr, blocks, column * BLOCK + offs)
        low, low_real = _seen_by(laid_ptr, blocks, block * BLOCK, y, far, NEAR_BARS, BITS, STEP)
        high, high_real = _seen_by(laid_ptr, blocks, block * BLOCK + 32, y, far, NEAR_BARS, BITS, STEP)
        some = (low | high) != 0
        every = some & (low == low_real) & (high == high_real)
        some, every = some.to(tl.int32), every.to(tl.int32)
        tl.store(any_ptr + candidate, tl.sum(some.to(tl.int64) << offs.to(tl.int64), 0))
        tl.store(all_ptr + candidate, tl.sum(every.to(tl.int64) << offs.to(tl.int64), 0))
        tl.store(number_ptr + candidate, tl.sum(some, 0) + (tl.sum(every, 0) << 16))

        # By keys, the line is that of the column's block: this one among its columns, which ascend.
        other = column + rows * q_blocks
        at, end = tl.load(end_ptr + other - 1), min(tl.load(end_ptr + other), capacity)
        for start in range(at, end, CHUNK):
            index = start + tl.arange(0, CHUNK)
            earlier = tl.load(column_ptr + index, mask=index < end, other=block) < block
            at += tl.sum(earlier.to(tl.int32), 0)
        keep = at < end
        real = y[0] != ABSENT
        some_low, some_high = tl.reduce(low, 0, _either), tl.reduce(high, 0, _either)
        every_low = ~tl.reduce(tl.where(real, ~low, 0), 0, _either) & some_low
        every_high = ~tl.reduce(tl.where(real, ~high, 0), 0, _either) & some_high
        number = _store_bits(any_ptr + at, some_low, some_high, keep)
        number += _store_bits(all_ptr + at, every_low, every_high, keep) << 16
        tl.store(number_ptr + at, number, mask=keep)


@triton.jit(do_not_specialize=["lines", "capacity"])
def count_kernel(number_ptr, count_ptr, end_ptr, tiles_ptr, lines, capacity, CHUNK: tl.constexpr):
    """Tiles of a line, int32 [3, lines]: all, those with a mask, and the columns of these."""
    line = tl.program_id(0)
    end = tl.load(end_ptr + line)
    some, every = 0, 0
    for start in range(end - tl.load(count_ptr + line), min(end, capacity), CHUNK):
        candidate = start + tl.arange(0, CHUNK)
        number = tl.load(number_ptr + candidate, mask=candidate < min(end, capacity), other=0)
        some += tl.sum(number & 0xFFFF, 0)
        every += tl.sum(number >> 16, 0)
    full = every // FULL_UNIT * FULL_UNIT
    masked = (some - full + BLOCK - 1) // BLOCK
    tl.store(tiles_ptr + line, masked + full // BLOCK)
    tl.store(tiles_ptr + lines + line, masked)
    tl.store(tiles_ptr + 2 * lines + line, some - full)


@triton.jit(
    do_not_specialize=[
        "lines",
        "candidates",
        "tiles",
        "masked_tiles",
        "rows",
        "summaries",
        "q_blocks",
        "k_blocks",
    ]
)
def fill_kernel(
    order_ptr, column_ptr, any_ptr, all_ptr, count_ptr, end_ptr, tiles_ptr, ends_ptr,
    table_ptr, tokens_ptr, tile_line_ptr, lines, candidates, tiles, masked_tiles, rows, summaries,
    q_blocks, k_blocks, CHUNK: tl.constexpr,
):  # fmt: skip
    """The columns of a line: those with a mask first, the full ones after them.

    Writes `table`, int32 [lines, 4]: first tile, first tile among those with a mask, number of these,
    number of tiles. A column is a token, counted within its stream if it is a query.
    """
    line = tl.program_id(0)
    total, masked = tl.load(tiles_ptr + line), tl.load(tiles_ptr + lines + line)
    first, first_masked = tl.load(ends_ptr + line) - total, tl.load(ends_ptr + lines + line) - masked
    table = table_ptr + line * 4
    tl.store(table, first)
    tl.store(table + 1, first_masked)
    tl.store(table + 2, masked)
    tl.store(table + 3, total)
    full = (total - masked) * BLOCK
    shift = tl.where(line >= 2 * rows * q_blocks, summaries, 0)
    limit = tiles * BLOCK
    offs = tl.arange(0, CHUNK * BLOCK)
    end = min(tl.load(end_ptr + line), candidates)
    full_count, masked_count = 0, 0
    for start in range(tl.load(end_ptr + line) - tl.load(count_ptr + line), end, CHUNK):
        candidate = start + offs // BLOCK
        there = candidate < end
        slot = tl.load(column_ptr + candidate, mask=there, other=0) * BLOCK + offs % BLOCK
        bit = (offs % BLOCK).to(tl.int64)
        some = ((tl.load(any_ptr + candidate, mask=there, other=0) >> bit) & 1).to(tl.int32)
        every = ((tl.load(all_ptr + candidate, mask=there, other=0) >> bit) & 1).to(tl.int32)
        full_rank = full_count + tl.cumsum(every, 0) - 1
        in_full = (every != 0) & (full_rank < full)
        in_masked = (some != 0) & (in_full == 0)
        masked_rank = masked_count + tl.cumsum(in_masked.to(tl.int32), 0) - 1
        at = first * BLOCK + tl.where(in_full, masked * BLOCK + full_rank, masked_rank)
        token = tl.load(order_ptr + slot, mask=in_full | in_masked, other=0) - shift
        tl.store(tokens_ptr + at, token, mask=(in_full | in_masked) & (at < limit))
        full_count += tl.sum(every, 0)
        masked_count += tl.sum(in_masked.to(tl.int32), 0)
    rest = masked_count + tl.arange(0, BLOCK)
    at = first * BLOCK + rest
    nobody = summaries - shift  # the first regular token, for columns without one: its bits are 0
    tl.store(tokens_ptr + at, rest * 0 + nobody, mask=(rest < masked * BLOCK) & (at < limit))
    for start in range(0, masked, BLOCK):
        at = start + tl.arange(0, BLOCK)
        keep = (at < masked) & (first_masked + at < masked_tiles)
        tl.store(tile_line_ptr + first_masked + at, line + at * 0, mask=keep)


@triton.jit(
    do_not_specialize=["lines", "tiles", "rows", "summaries", "regular", "q_blocks", "k_blocks", "blocks"]
)
def bits_kernel(
    facts_ptr, laid_ptr, tokens_ptr, tile_line_ptr, tiles_ptr, ends_ptr, table_ptr, bits_ptr,
    lines, tiles, rows, summaries, regular, q_blocks, k_blocks, blocks,
    NEAR_BARS: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The bits of one tile with a mask, int32 [2, 64]; see `forward.tile_mask`."""
    tile = tl.program_id(0)
    if tile < tl.load(ends_ptr + 2 * lines - 1):
        line = tl.load(tile_line_ptr + tile)
        by_keys, far, row, block, _, _ = _decode(line, rows, q_blocks, k_blocks)
        nth = tile - tl.load(table_ptr + line * 4 + 1)
        first = (tl.load(table_ptr + line * 4) + nth) * BLOCK
        real_columns = tl.load(tiles_ptr + 2 * lines + line) - nth * BLOCK
        shift = tl.where(by_keys, summaries, 0)
        offs = tl.arange(0, BLOCK)
        y = _load_laid(laid_ptr, blocks, block * BLOCK + offs)
        for word in range(2):
            bits = tl.zeros([BLOCK], tl.int32)
            for start in range(0, 32, STEP):  # a few columns against all tokens of the line
                column = start + tl.arange(0, STEP)
                at = first + word * 32 + column
                real = (word * 32 + column < real_columns) & (at < tiles * BLOCK)
                token = tl.where(real, tl.load(tokens_ptr + at, mask=real, other=0) + shift, -1)
                x = load_facts(facts_ptr, rows, summaries + regular, row, token)
                seen = sees(x, y, by_keys, far, NEAR_BARS, BITS).to(tl.int32)
                bits |= tl.sum(seen << (4 * (column % 8) + column // 8)[:, None], 0)
            tl.store(bits_ptr + (tile * 2 + word) * BLOCK + offs, bits)


@triton.jit
def _cut(tile, masked):
    """Where a line is cut near `tile`: full tiles stay in pairs, the most that a kernel takes at once."""
    return tl.where(tile > masked, masked + (tile - masked) // 2 * 2, tile)


@triton.jit
def _work_key(line, tiles, parts, rows, blocks):
    """Lines of a higher key are worked on earlier: those that are split; then row after row, whose keys and
    values stay in the cache meanwhile, and of a row the longest first."""
    return tl.where(parts > 1, (1 << 30) + tiles, ((rows - 1 - line // blocks) << 16) + tiles)


@triton.jit(do_not_specialize=["lines", "items", "rows", "q_blocks", "k_blocks", "split"])
def work_kernel(
    tiles_ptr, ends_ptr, end_ptr, items_ptr, needs_ptr,
    lines, items, rows, q_blocks, k_blocks, split, CHUNK: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """The order of work in one group, int32 [4, items, 8]: lines, or parts of them; see `_work_key`.

    An item is (line, first tile, end tile, slot, first slot of the line, parts of the line, ...), with
    lines counted within the group and tiles within the line; the slot is -1 if the line has one part.
    Lines are split that would take longer than all others of a row together take on a GPU: those with more
    tiles than `split`, or, if that is 0, than a share of what a row has on average.
    """
    group, chunk = tl.program_id(1), tl.program_id(0)
    q_lines, k_lines = rows * q_blocks, rows * k_blocks
    first = tl.where(group < 2, group * q_lines, tl.where(group == 2, 2 * q_lines, 2 * q_lines + k_lines))
    number = tl.where(group == 2, k_lines, q_lines)
    before_all = tl.load(ends_ptr + first) - tl.load(tiles_ptr + first)
    share = (tl.load(ends_ptr + first + number - 1) - before_all) // (tl.where(group < 2, 64, 40) * rows)
    most = tl.where(split > 0, split, tl.maximum(share, LEAST_SPLIT))
    mine = chunk * CHUNK + tl.arange(0, CHUNK)
    total = tl.load(tiles_ptr + first + mine, mask=mine < number, other=0)
    masked = tl.load(tiles_ptr + lines + first + mine, mask=mine < number, other=0)
    parts = tl.maximum((total + most - 1) // most, 1)
    blocks = tl.where(group == 2, k_blocks, q_blocks)
    key = _work_key(mine, total, parts, rows, blocks)
    item = tl.zeros([CHUNK], tl.int32)
    all_items, all_slots = 0, 0
    for start in range(0, number, ACROSS):
        other = start + tl.arange(0, ACROSS)
        there = other < number
        other_total = tl.load(tiles_ptr + first + other, mask=there, other=-1)
        other_parts = tl.where(there, tl.maximum((other_total + most - 1) // most, 1), 0)
        other_key = _work_key(other, other_total, other_parts, rows, blocks)
        before = other_key[None, :] > key[:, None]
        before |= (other_key[None, :] == key[:, None]) & (other[None, :] < mine[:, None])
        before &= there[None, :]
        item += tl.sum(tl.where(before, other_parts[None, :], 0), 1)
        all_items += tl.sum(other_parts, 0)
        all_slots += tl.sum(tl.where(other_parts > 1, other_parts, 0), 0)
    # Lines in several parts come first: their items are the slots.
    out = items_ptr + (group * items + item) * 8
    for part in range(0, tl.max(parts, 0)):
        keep = (mine < number) & (part < parts) & (item + part < items)
        at = out + part * 8
        tl.store(at, mine, mask=keep)
        tl.store(at + 1, _cut(part * total // parts, masked), mask=keep)
        tl.store(at + 2, _cut((part + 1) * total // parts, masked), mask=keep)
        tl.store(at + 3, tl.where(parts > 1, item + part, -1), mask=keep)
        tl.store(at + 4, item, mask=keep)
        tl.store(at + 5, parts, mask=keep)
    if chunk == 0:
        tl.store(needs_ptr + SLOTS + group, all_slots)
        tl.store(needs_ptr + ITEM_COUNTS + group, all_items)
        if group == 0:
            tl.store(needs_ptr + CANDIDATES, tl.load(end_ptr + lines - 1))
            tl.store(needs_ptr + TILES, tl.load(ends_ptr + lines - 1))
            tl.store(needs_ptr + MASKED, tl.load(ends_ptr + 2 * lines - 1))
