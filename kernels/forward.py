"""Forward tiles: softmax(Q K^T / sqrt(D)) V over the tiles of a pass, in base 2 and float32.

Names in all tiles: BM queries x BN keys, D channels; s is the summary and r the regular stream of
keys. Strides are those of [B, H, length, D], the last one being 1. Offsets within one head fit 32
bits (the wrapper sees to that), between heads and rows they may not.

A pass that is not the first goes on where the earlier ones stopped: from their output, as the
accumulator of a softmax whose maximum is their log-sum-exp and whose denominator is 1.
"""

import triton
import triton.language as tl

# A maximum that is below any other, but finite: inf - inf would be NaN.
_LOWEST = tl.constexpr(-1e30)


@triton.jit
def tile_mask(bits_ptr, tile, offs_row, offs_col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The bits of a partial tile as bool [ROWS, COLS]."""
    base = bits_ptr + tile.to(tl.int64) * (ROWS * ((COLS + 31) // 32)) + offs_row
    word = tl.load(base)[:, None]
    for w in tl.static_range(1, (COLS + 31) // 32):
        word = tl.where((offs_col < 32 * w)[None, :], word, tl.load(base + w * ROWS)[:, None])
    return (word & (1 << (offs_col % 32))[None, :]) != 0


@triton.jit
def key_pointers(
    token, k_s, v_s, k_r, v_r, k_s_n, v_s_n, k_r_n, v_r_n, summaries, SUMMARIES: tl.constexpr
):  # fmt: skip
    """The rows [BN, 1] of keys and values of some tokens, some row for those that are not there.

    The stream is told by the token and not by its block: a scalar that a loop has loaded would keep
    Triton (3.7) from pipelining the loads of keys and values.
    """
    regular = tl.maximum(token - summaries, 0)[:, None]
    k_ptrs, v_ptrs = k_r + regular * k_r_n, v_r + regular * v_r_n
    if SUMMARIES:
        in_s = (token < summaries)[:, None]
        summary = tl.maximum(token, 0)[:, None]
        k_ptrs = tl.where(in_s, k_s + summary * k_s_n, k_ptrs)
        v_ptrs = tl.where(in_s, v_s + summary * v_s_n, v_ptrs)
    return k_ptrs, v_ptrs


@triton.jit
def _attend(
    acc, top, total, q, k_s, v_s, k_r, v_r, k_s_n, v_s_n, k_r_n, v_r_n,
    list_ptr, order_ptr, bits_ptr, tile, first, end, summaries, scale, offs_m, offs_n, offs_d,
    MASKED: tl.constexpr, SUMMARIES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Takes entries `first` to `end` of a list into acc [BM, D], top and total [BM].

    The next blocks and their tokens are fetched an iteration ahead, so that the loads of keys and
    values depend on nothing that is still under way.
    """
    block = tl.load(list_ptr + first)
    token = tl.load(order_ptr + block * BN + offs_n)  # [BN]
    next_block = tl.load(list_ptr + tl.minimum(first + 1, end))
    for i in tl.range(first, end, num_stages=STAGES):
        k_ptrs, v_ptrs = key_pointers(
            token, k_s, v_s, k_r, v_r, k_s_n, v_s_n, k_r_n, v_r_n, summaries, SUMMARIES
        )
        k = tl.load(k_ptrs + offs_d[None, :])  # [BN, D]
        v = tl.load(v_ptrs + offs_d[None, :])  # [BN, D]
        block = next_block
        token = tl.load(order_ptr + block * BN + offs_n)
        next_block = tl.load(list_ptr + tl.minimum(i + 2, end))

        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
        if MASKED:
            scores = tl.where(tile_mask(bits_ptr, tile + i, offs_m, offs_n, BM, BN), scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["heads", "queries", "q_blocks", "k_blocks", "summaries"])
def forward_kernel(
    q_ptr, k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr, o_ptr, lse_ptr,
    q_b, q_h, q_n, k_s_b, k_s_h, k_s_n, v_s_b, v_s_h, v_s_n, k_r_b, k_r_h, k_r_n, v_r_b, v_r_h, v_r_n,
    o_b, o_h, o_n,
    q_order_ptr, k_order_ptr, list_ptr, partial_ptr, total_ptr, bits_ptr, start_ptr, work_ptr,
    scale, heads, queries, q_blocks, k_blocks, summaries,
    FIRST: tl.constexpr, SUMMARIES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One query block of one head: o [B, H, N, D] and lse, float32 [B, H, N] in base 2.

    A query that sees nothing gets 0 and -inf.
    """
    head = tl.program_id(0) % heads  # heads go first: those of one block share its lists and bits
    line = tl.load(work_ptr + tl.program_id(0) // heads)
    row, h = (line // q_blocks).to(tl.int64), head.to(tl.int64)
    offs_m, offs_n, offs_d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    query = tl.load(q_order_ptr + line.to(tl.int64) * BM + offs_m)  # [BM]
    there = query >= 0
    query = tl.maximum(query, 0)
    q = tl.load(q_ptr + row * q_b + h * q_h + query[:, None] * q_n + offs_d[None, :])  # [BM, D]
    o_ptrs = o_ptr + row * o_b + h * o_h + query[:, None] * o_n + offs_d[None, :]
    lse_ptrs = lse_ptr + (row * heads + h) * queries + query
    if FIRST:
        acc = tl.zeros([BM, D], tl.float32)
        top = tl.full([BM], _LOWEST, tl.float32)
        total = tl.zeros([BM], tl.float32)
    else:
        acc = tl.load(o_ptrs).to(tl.float32)
        lse = tl.load(lse_ptrs)
        top = tl.maximum(lse, _LOWEST)
        total = tl.where(lse == float("-inf"), 0.0, 1.0)

    k_s, v_s = k_s_ptr + row * k_s_b + h * k_s_h, v_s_ptr + row * v_s_b + h * v_s_h
    k_r, v_r = k_r_ptr + row * k_r_b + h * k_r_h, v_r_ptr + row * v_r_b + h * v_r_h
    blocks, order = list_ptr + line.to(tl.int64) * k_blocks, k_order_ptr + row * k_blocks * BN
    partial, length, tile = tl.load(partial_ptr + line), tl.load(total_ptr + line), tl.load(start_ptr + line)
    acc, top, total = _attend(
        acc, top, total, q, k_s, v_s, k_r, v_r, k_s_n, v_s_n, k_r_n, v_r_n,
        blocks, order, bits_ptr, tile, 0, partial, summaries, scale, offs_m, offs_n, offs_d,
        True, SUMMARIES, BM, BN, PRECISION, STAGES,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, q, k_s, v_s, k_r, v_r, k_s_n, v_s_n, k_r_n, v_r_n,
        blocks, order, bits_ptr, tile, partial, length, summaries, scale, offs_m, offs_n, offs_d,
        False, SUMMARIES, BM, BN, PRECISION, STAGES,
    )  # fmt: skip
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    o = acc / total[:, None]
    tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=there[:, None])
    tl.store(lse_ptrs, tl.where(blind, float("-inf"), top + tl.log2(total)), mask=there)
