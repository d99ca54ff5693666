"""Forward tiles of the update phase: softmax(Q K^T / sqrt(D)) V over lines, in base 2 and float32.

Names in all tiles: BM rows of a line x BN columns of its list, D channels; s is the summary and r the
regular stream of keys. A program takes BM of a line's 64 rows, and BN columns at a time. Strides are
those of [B, H, length, D], the last one being 1. Offsets within one head fit 32 bits (the wrapper sees
to that), between heads and rows they may not.

A pass that is not the first goes on where the earlier one stopped: from its output, as the accumulator
of a softmax whose maximum is the log-sum-exp and whose denominator is 1.
"""

import triton
import triton.language as tl

LINE = tl.constexpr(64)  # rows of a line, columns of a tile: of a plan
ITEMS = tl.constexpr(7)  # where the numbers of items stand in `needs` of a plan

# Numbers that differ from batch to batch: to compile anew for some of them would gain nothing.
GEOMETRY = (
    *("heads", "queries", "summaries", "blocks"),
    *("first_block", "first_line", "group", "items", "first_counter"),
)

# A maximum that is below any other, but finite: inf - inf would be NaN.
_LOWEST = tl.constexpr(-1e30)


@triton.jit
def tile_mask(bits_ptr, half, halves, offs_row, offs_col, BN: tl.constexpr):
    """The bits of BN columns from half-tile `half` on, as bool [rows, BN]; none from `halves` on.

    A half-tile is one word of 32 columns for each of the line's rows. Column c is in bit
    4 * (c % 8) + c % 32 // 8: a thread of a tensor-core accumulator holds the columns c0 + {0, 1} + 8 j
    of a row, so that it shifts a word once, by 4 * c0, and tests bits that are known to the compiler.
    """
    base = bits_ptr + half * LINE + offs_row
    word = tl.load(base)[:, None]
    for w in tl.static_range(1, BN // 32):
        if w < 2:
            more = tl.load(base + w * LINE)
        else:  # the last tile may stand alone
            more = tl.load(base + w * LINE, mask=(offs_row >= 0) & (half + w < halves), other=0)
        word = tl.where((offs_col < 32 * w)[None, :], word, more[:, None])
    word = word >> (4 * (offs_col & 6))[None, :]
    return (word & (1 << (4 * (offs_col & 1) + ((offs_col & 31) >> 3)))[None, :]) != 0


@triton.jit
def key_pointers(
    token, k_s, v_s, k_r, v_r, k_s_n, v_s_n, k_r_n, v_r_n, summaries, SUMMARIES: tl.constexpr
):  # fmt: skip
    """The rows [BN, 1] of keys and values of some tokens.

    The stream is told by the token and not by its tile: a scalar that a loop has loaded would keep
    Triton (3.7) from pipelining the loads of keys and values.
    """
    regular = (token - summaries)[:, None]
    k_ptrs, v_ptrs = k_r + regular * k_r_n, v_r + regular * v_r_n
    if SUMMARIES:
        in_s = (token < summaries)[:, None]
        k_ptrs = tl.where(in_s, k_s + token[:, None] * k_s_n, k_ptrs)
        v_ptrs = tl.where(in_s, v_s + token[:, None] * v_s_n, v_ptrs)
    return k_ptrs, v_ptrs


@triton.jit
def _attend(
    acc, top, total, q, k_s, v_s, k_r, v_r, k_s_n, v_s_n, k_r_n, v_r_n,
    tokens_ptr, bits_ptr, tiles, summaries, scale, offs_row, offs_n, offs_d,
    MASKED: tl.constexpr, SUMMARIES: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Takes the columns of some tiles into acc [BM, D], top and total [BM].

    Columns are fetched an iteration ahead, so that the loads of keys and values depend on nothing that
    is still under way.
    """
    last = tl.maximum(tiles * LINE - 1, 0)
    token = tl.load(tokens_ptr + tl.minimum(offs_n, last))  # [BN]
    for i in tl.range(0, (tiles * LINE + BN - 1) // BN, num_stages=STAGES):
        k_ptrs, v_ptrs = key_pointers(
            token, k_s, v_s, k_r, v_r, k_s_n, v_s_n, k_r_n, v_r_n, summaries, SUMMARIES
        )
        k = tl.load(k_ptrs + offs_d[None, :])  # [BN, D]
        v = tl.load(v_ptrs + offs_d[None, :])  # [BN, D]
        token = tl.load(tokens_ptr + tl.minimum((i + 1) * BN + offs_n, last))

        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
        if MASKED:
            seen = tile_mask(bits_ptr, i * (BN // 32), tiles * 2, offs_row, offs_n, BN)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit
def all_parts_done(counters_ptr, first_slot, parts, heads, head, sub, SUBS: tl.constexpr):
    """Whether this is the last of a line's programs to come here; what they wrote before is visible then.

    Which one is last differs from run to run, but it adds up the parts of all in the order of the line.
    """
    tl.debug_barrier()  # all threads have written
    counter = counters_ptr + (first_slot * heads + head) * SUBS + sub
    return tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1


@triton.jit(do_not_specialize=GEOMETRY)
def forward_kernel(
    q_ptr, k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr, o_ptr, lse_ptr, parts_ptr, counters_ptr,
    order_ptr, table_ptr, tokens_ptr, bits_ptr, items_ptr, needs_ptr,
    q_b, q_h, q_n, k_s_b, k_s_h, k_s_n, v_s_b, v_s_h, v_s_n, k_r_b, k_r_h, k_r_n, v_r_b, v_r_h, v_r_n,
    o_b, o_h, o_n, scale, heads, queries, summaries, blocks, first_block, first_line,
    group, items, first_counter, FIRST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BM queries of one item of one head: o [B, H, N, D] and lse, float32 [B, H, N] in base 2.

    Lines are those of one group, from `first_line` on; their slots begin with block `first_block`. A
    query that sees nothing gets 0 and -inf. `parts` is float32 [slots, H, 64, D + 2]: of a part of a line
    the accumulator, unscaled, then the maxima and the denominators. `needs` says how many items there are.
    """
    SUBS: tl.constexpr = LINE // BM
    head = tl.program_id(0) % heads  # heads go first: those of one line share its columns and bits
    work = tl.program_id(0) // heads
    sub = work % SUBS
    if work // SUBS < tl.load(needs_ptr + ITEMS + group):
        item = items_ptr + (group * items + work // SUBS) * 8
        line, begin, end, slot = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
        table = table_ptr + (first_line + line) * 4
        first, first_masked, masked = tl.load(table), tl.load(table + 1), tl.load(table + 2)
        if FIRST or tl.load(table + 3) > 0:
            row, h = (line // blocks).to(tl.int64), head.to(tl.int64)
            offs_row, offs_n, offs_d = sub * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
            query = tl.load(order_ptr + (first_block + line) * LINE + offs_row)  # [BM]
            there = query >= 0
            query = tl.maximum(query - summaries, 0)
            q = tl.load(q_ptr + row * q_b + h * q_h + query[:, None] * q_n + offs_d[None, :])  # [BM, D]
            o_ptrs = o_ptr + row * o_b + h * o_h + query[:, None] * o_n + offs_d[None, :]
            lse_ptrs = lse_ptr + (row * heads + h) * queries + query
            acc = tl.zeros([BM, D], tl.float32)
            top = tl.full([BM], _LOWEST, tl.float32)
            total = tl.zeros([BM], tl.float32)
            if not FIRST:
                if begin == 0:
                    acc, top, total = _earlier_pass(o_ptrs, lse_ptrs)

            k_s, v_s = k_s_ptr + row * k_s_b + h * k_s_h, v_s_ptr + row * v_s_b + h * v_s_h
            k_r, v_r = k_r_ptr + row * k_r_b + h * k_r_h, v_r_ptr + row * v_r_b + h * v_r_h
            border = tl.minimum(tl.maximum(masked, begin), end)
            acc, top, total = _attend(
                acc, top, total, q, k_s, v_s, k_r, v_r, k_s_n, v_s_n, k_r_n, v_r_n,
                tokens_ptr + (first + begin) * LINE, bits_ptr + (first_masked + begin) * (2 * LINE),
                border - begin, summaries, scale, offs_row, offs_n, offs_d,
                True, FIRST, BN, PRECISION, STAGES,
            )  # fmt: skip
            acc, top, total = _attend(
                acc, top, total, q, k_s, v_s, k_r, v_r, k_s_n, v_s_n, k_r_n, v_r_n,
                tokens_ptr + (first + border) * LINE, bits_ptr,
                end - border, summaries, scale, offs_row, offs_n, offs_d,
                False, FIRST, BN, PRECISION, STAGES,
            )  # fmt: skip
            done = slot < 0
            if slot >= 0:
                size = LINE * (D + 2)
                part = parts_ptr + (slot.to(tl.int64) * heads + h) * size
                at = offs_row[:, None] * D + offs_d[None, :]
                tl.store(part + at, acc)
                tl.store(part + LINE * D + offs_row, top)
                tl.store(part + LINE * D + LINE + offs_row, total)
                first_slot, parts = tl.load(item + 4), tl.load(item + 5)
                done = all_parts_done(counters_ptr + first_counter, first_slot, parts, heads, head, sub, SUBS)
                if done:
                    acc = tl.zeros([BM, D], tl.float32)
                    top = tl.full([BM], _LOWEST, tl.float32)
                    total = tl.zeros([BM], tl.float32)
                    part = parts_ptr + (first_slot.to(tl.int64) * heads + h) * size
                    for _ in range(0, parts):
                        part_top = tl.load(part + LINE * D + offs_row, cache_modifier=".cg")
                        part_total = tl.load(part + LINE * D + LINE + offs_row, cache_modifier=".cg")
                        new_top = tl.maximum(top, part_top)
                        shrink, share = tl.exp2(top - new_top), tl.exp2(part_top - new_top)
                        part_acc = tl.load(part + at, cache_modifier=".cg")
                        acc = acc * shrink[:, None] + part_acc * share[:, None]
                        total = total * shrink + part_total * share
                        top = new_top
                        part += heads * size
            if done:
                blind = total == 0
                total = tl.where(blind, 1.0, total)
                o = acc / total[:, None]
                tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=there[:, None])
                tl.store(lse_ptrs, tl.where(blind, float("-inf"), top + tl.log2(total)), mask=there)


@triton.jit
def _earlier_pass(o_ptrs, lse_ptrs):
    """acc, top and total as if the keys of the earlier pass had just been taken."""
    lse = tl.load(lse_ptrs)
    blind = lse == float("-inf")
    return tl.load(o_ptrs).to(tl.float32), tl.maximum(lse, _LOWEST), tl.where(blind, 0.0, 1.0)
