"""The visibility rule on tiles, in Triton: which tiles hold visible pairs, and their bits.

`structure.py` states the rule; this is its copy for the plan, and the tests hold the two to be equal
pair by pair. Facts are int32 [B, 6, slots] in the order of `structure.Facts`, sorted into a layout;
document -1 marks slots with nothing to see. Ranges are int32 [B, blocks, 11]: what a block holds at
least and at most, so that most pairs of blocks are dismissed without a look at their tokens.
"""

import triton
import triton.language as tl

SUMMARIZE, NEAR, FAR = 0, 1, 2  # the passes: who sees whom is partitioned between NEAR and FAR

EMPTY, PARTIAL, FULL = 0, 1, 2  # types of a tile

FACTS = tl.constexpr(6)
RANGES = tl.constexpr(11)

# Kinds of token in a block, as bits.
_STRUCTURAL = tl.constexpr(1)
_TP = tl.constexpr(2)
_V = tl.constexpr(4)
_SUMMARY = tl.constexpr(8)
_GLOBAL = tl.constexpr(16)

_NO_INSTRUMENT = tl.constexpr(129)
_BIG = tl.constexpr(2**30)


@triton.jit
def _load_facts(facts_ptr, row, slots, slot):
    """Six facts of the slots [BLOCK] of one row."""
    base = facts_ptr + row.to(tl.int64) * FACTS * slots + slot
    return (
        tl.load(base),
        tl.load(base + slots),
        tl.load(base + 2 * slots),
        tl.load(base + 3 * slots),
        tl.load(base + 4 * slots),
        tl.load(base + 5 * slots),
    )


@triton.jit
def _is_near(distance, NEAR_BARS: tl.constexpr):
    near = distance == NEAR_BARS[0]
    for i in tl.static_range(1, len(NEAR_BARS)):
        near |= distance == NEAR_BARS[i]
    return near


@triton.jit
def _sees(q, k, PASS: tl.constexpr, NEAR_BARS: tl.constexpr):
    """Facts of BM queries and BN keys -> bool [BM, BN]: visible, and this pass's to compute."""
    t_doc, t_bar, t_inst, t_kind, t_onset, t_position = q
    u_doc, u_bar, u_inst, u_kind, u_onset, u_position = k
    t_doc, u_doc = t_doc[:, None], u_doc[None, :]
    t_bar, u_bar = t_bar[:, None], u_bar[None, :]
    t_kind, u_kind = t_kind[:, None], u_kind[None, :]
    same_doc = (t_doc == u_doc) & (u_doc >= 0)
    u_is_summary = u_kind == -1
    if PASS == 0:
        return same_doc & ((u_bar == t_bar) | (u_is_summary & (u_bar < t_bar)))
    else:
        t_structural, u_structural = t_kind == 0, u_kind == 0
        t_tp, u_tp = (t_kind == 1) | (t_kind == 2), (u_kind == 1) | (u_kind == 2)
        kind_rule = t_structural | u_structural | (t_onset[:, None] == u_onset[None, :])
        kind_rule |= (t_tp & u_tp) | ((t_kind == 4) & (u_kind == 4))
        causal = u_position[None, :] <= t_position[:, None]
        everywhere = u_structural & (u_inst[None, :] == _NO_INSTRUMENT)
        near = everywhere | _is_near(t_bar - u_bar, NEAR_BARS)
        if PASS == 1:
            rr = causal & near & kind_rule & (u_kind >= 0)
            return same_doc & (rr | (u_is_summary & (u_bar < t_bar)))
        else:
            same_inst = t_inst[:, None] == u_inst[None, :]
            return same_doc & causal & same_inst & (u_kind >= 0) & kind_rule & (near == 0)


@triton.jit
def _may_see(q_ptr, k_ptr, PASS: tl.constexpr, NEAR_BARS: tl.constexpr):
    """Ranges of two blocks -> False only if `_sees` is False for all their pairs."""
    q_doc_min, q_doc_max = tl.load(q_ptr), tl.load(q_ptr + 1)
    k_doc_min, k_doc_max = tl.load(k_ptr), tl.load(k_ptr + 1)
    q_bar_min, q_bar_max = tl.load(q_ptr + 2), tl.load(q_ptr + 3)
    k_bar_min, k_bar_max = tl.load(k_ptr + 2), tl.load(k_ptr + 3)
    q_kinds, k_kinds = tl.load(q_ptr + 10), tl.load(k_ptr + 10)
    may = (k_doc_min <= q_doc_max) & (k_doc_max >= q_doc_min)
    k_summaries = (k_kinds & _SUMMARY) != 0
    if PASS == 0:
        overlap = (k_bar_min <= q_bar_max) & (k_bar_max >= q_bar_min)
        return may & (overlap | (k_summaries & (k_bar_min <= q_bar_max)))
    else:
        common = q_kinds & k_kinds & (_TP | _V)
        same_onset = (tl.load(k_ptr + 6) <= tl.load(q_ptr + 7)) & (tl.load(k_ptr + 7) >= tl.load(q_ptr + 6))
        kinds = (((q_kinds | k_kinds) & _STRUCTURAL) != 0) | (common != 0) | same_onset
        rr = kinds & (tl.load(k_ptr + 8) <= tl.load(q_ptr + 9))  # some key is not after some query
        low, high = q_bar_min - k_bar_max, q_bar_max - k_bar_min
        near = 0
        for i in tl.static_range(len(NEAR_BARS)):
            near += ((low <= NEAR_BARS[i]) & (NEAR_BARS[i] <= high)).to(tl.int32)
        if PASS == 1:
            rr &= (near > 0) | ((k_kinds & _GLOBAL) != 0)
            return may & (rr | (k_summaries & (k_bar_min < q_bar_max)))
        else:
            same_inst = (tl.load(k_ptr + 4) <= tl.load(q_ptr + 5)) & (
                tl.load(k_ptr + 5) >= tl.load(q_ptr + 4)
            )
            distances = high - tl.maximum(low, 0) + 1
            return may & rr & same_inst & (distances > near)


@triton.jit
def _low(x, among):
    return tl.min(tl.where(among, x, _BIG), 0)


@triton.jit
def _high(x, among):
    return tl.max(tl.where(among, x, -1), 0)


@triton.jit
def layout_kernel(facts_ptr, order_ptr, sorted_ptr, ranges_ptr, tokens, slots, first, BLOCK: tl.constexpr):
    """Facts [B, 6, tokens] by the order [B, slots] of a layout, and the ranges of its blocks.

    The order counts from token `first` on; -1 is no token.
    """
    block, row = tl.program_id(0), tl.program_id(1)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(order_ptr + row.to(tl.int64) * slots + slot)
    there = token >= 0
    token = tl.maximum(token, 0) + first
    doc, bar, inst, kind, onset, position = _load_facts(facts_ptr, row, tokens, token)
    doc = tl.where(there, doc, -1)
    out = sorted_ptr + row.to(tl.int64) * FACTS * slots + slot
    tl.store(out, doc)
    tl.store(out + slots, bar)
    tl.store(out + 2 * slots, inst)
    tl.store(out + 3 * slots, kind)
    tl.store(out + 4 * slots, onset)
    tl.store(out + 5 * slots, position)

    real = doc >= 0
    note = real & (kind > 0)
    structural = real & (kind == 0)
    kinds = tl.max(structural.to(tl.int32), 0) * _STRUCTURAL
    kinds += tl.max((note & (kind <= 2)).to(tl.int32), 0) * _TP
    kinds += tl.max((real & (kind == 4)).to(tl.int32), 0) * _V
    kinds += tl.max((real & (kind == -1)).to(tl.int32), 0) * _SUMMARY
    kinds += tl.max((structural & (inst == _NO_INSTRUMENT)).to(tl.int32), 0) * _GLOBAL
    ranges = ranges_ptr + (row.to(tl.int64) * tl.num_programs(0) + block) * RANGES
    tl.store(ranges, _low(doc, real))
    tl.store(ranges + 1, _high(doc, real))
    tl.store(ranges + 2, _low(bar, real))
    tl.store(ranges + 3, _high(bar, real))
    tl.store(ranges + 4, _low(inst, real))
    tl.store(ranges + 5, _high(inst, real))
    tl.store(ranges + 6, _low(onset, note))
    tl.store(ranges + 7, _high(onset, note))
    tl.store(ranges + 8, _low(position, real))
    tl.store(ranges + 9, _high(position, real))
    tl.store(ranges + 10, kinds)


@triton.jit
def classify_kernel(
    q_facts_ptr, k_facts_ptr, q_ranges_ptr, k_ranges_ptr, types_ptr, q_blocks, k_blocks,
    PASS: tl.constexpr, NEAR_BARS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The type of every tile, int8 [B, q_blocks, k_blocks] (zeros before): a run of RUN tiles a program."""
    q_block, row = tl.program_id(1), tl.program_id(2)
    line = row.to(tl.int64) * q_blocks + q_block
    q = _load_facts(q_facts_ptr, row, q_blocks * BM, q_block * BM + tl.arange(0, BM))
    first = tl.program_id(0) * RUN
    for k_block in range(first, min(first + RUN, k_blocks)):
        k_ranges = k_ranges_ptr + (row.to(tl.int64) * k_blocks + k_block) * RANGES
        if _may_see(q_ranges_ptr + line * RANGES, k_ranges, PASS, NEAR_BARS):
            k = _load_facts(k_facts_ptr, row, k_blocks * BN, k_block * BN + tl.arange(0, BN))
            visible = tl.sum(tl.sum(_sees(q, k, PASS, NEAR_BARS).to(tl.int32), 1), 0)
            kind = (visible > 0).to(tl.int32) + (visible == BM * BN).to(tl.int32)
            tl.store(types_ptr + line * k_blocks + k_block, kind.to(tl.int8))


@triton.jit
def compact_kernel(
    types_ptr, list_ptr, partial_ptr, total_ptr, rank_ptr, batch_stride, line_stride, item_stride, items,
    RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One line of tile types -> its list of blocks, partial ones first, each in ascending order.

    With RANK, also the number of each partial tile among those of its line, in the place of its type.
    """
    line, row = tl.program_id(0), tl.program_id(1)
    types = row.to(tl.int64) * batch_stride + line * line_stride
    out = row.to(tl.int64) * tl.num_programs(0) + line
    count = 0
    for wanted in tl.static_range(1, 3):
        for start in range(0, items, BLOCK):
            item = start + tl.arange(0, BLOCK)
            at = types + item.to(tl.int64) * item_stride
            chosen = tl.load(types_ptr + at, mask=item < items, other=0) == wanted
            rank = count + tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(list_ptr + out * items + rank, item, mask=chosen)
            if RANK and wanted == 1:
                tl.store(rank_ptr + at, rank, mask=chosen)
            count += tl.sum(chosen.to(tl.int32), 0)
        if wanted == 1:
            tl.store(partial_ptr + out, count)
    tl.store(total_ptr + out, count)


@triton.jit
def _pack(seen, offs_col, out_ptr, offs_row, ROWS: tl.constexpr, COLS: tl.constexpr):
    """bool [ROWS, COLS] -> int32 [COLS / 32, ROWS], column c in bit c % 32 of word c / 32."""
    bit = seen.to(tl.int32) << (offs_col % 32)[None, :]
    for word in tl.static_range((COLS + 31) // 32):
        of_word = tl.sum(tl.where((offs_col // 32 == word)[None, :], bit, 0), 1)
        tl.store(out_ptr + word * ROWS + offs_row, of_word)


@triton.jit
def pack_kernel(
    q_facts_ptr, k_facts_ptr, line_ptr, start_ptr, list_ptr, rank_ptr, key_start_ptr, bits_ptr, key_bits_ptr,
    q_blocks, k_blocks, PASS: tl.constexpr, NEAR_BARS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The bits of one partial tile, by queries and by keys, each where its list finds them."""
    tile = tl.program_id(0)
    line = tl.load(line_ptr + tile)
    row, q_block = line // q_blocks, line % q_blocks
    lists = line.to(tl.int64) * k_blocks
    k_block = tl.load(list_ptr + lists + tile - tl.load(start_ptr + line))
    key_tile = tl.load(key_start_ptr + row * k_blocks + k_block) + tl.load(rank_ptr + lists + k_block)
    offs_m, offs_n = tl.arange(0, BM), tl.arange(0, BN)
    q = _load_facts(q_facts_ptr, row, q_blocks * BM, q_block * BM + offs_m)
    k = _load_facts(k_facts_ptr, row, k_blocks * BN, k_block * BN + offs_n)
    seen = _sees(q, k, PASS, NEAR_BARS)
    bits = bits_ptr + tile.to(tl.int64) * (BM * ((BN + 31) // 32))
    _pack(seen, offs_n, bits, offs_m, BM, BN)
    key_bits = key_bits_ptr + key_tile.to(tl.int64) * (BN * ((BM + 31) // 32))
    _pack(tl.trans(seen.to(tl.int32)), offs_m, key_bits, offs_n, BN, BM)
