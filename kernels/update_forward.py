"""The forward kernel of the update phase: softmax(Q K^T / sqrt(D)) V over gathered keys.

An online softmax (Milakov and Gimelshein, 2018, arXiv:1805.02867) in base 2 and float32, tile by tile as in
FlashAttention (Dao et al., 2022, arXiv:2205.14135): m_i is the running maximum of a query's logits, l_i its
denominator, alpha what rescales earlier sums. Names and shapes are those of `tiles`.

The second pass begins anew and takes in what the first one left at its end, as if it were a part of a split
block: an accumulator whose maximum is the log-sum-exp and whose denominator is 1. (Beginning with it, an
accumulator that comes from memory, made ptxas run the products of the loop one after the other.)
"""

import triton
import triton.language as tl

from .tiles import (
    BLOCK,
    GEOMETRY,
    LOWEST,
    head_ptr,
    key_pointers,
    keys_of_head,
    last_to_arrive,
    load_item,
    load_split,
    merge,
    start_program,
    tile_mask,
    wait_at_last,
)


@triton.jit
def _attend(
    acc, m_i, l_i, q, keys, key_strides, gathered_ptr, bits_ptr, tiles, summaries, scale, offs_m, offs_n,
    offs_d, MASKED: tl.constexpr, HAS_SUMMARIES: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Takes the keys of some tiles into acc [BM, D], m_i [BM] and l_i [BM].

    The list is read one iteration ahead, so that the loads of keys and values depend on nothing that is
    still in flight.
    """
    last = tl.maximum(tiles * BLOCK - 1, 0)
    token = tl.load(gathered_ptr + tl.minimum(offs_n, last))  # [BN]
    for i in tl.range(0, (tiles * BLOCK + BN - 1) // BN, num_stages=STAGES):
        k_ptrs, v_ptrs = key_pointers(token, keys, key_strides, summaries, HAS_SUMMARIES)  # [BN, 1]
        k = tl.load(k_ptrs + offs_d[None, :])  # [BN, D]
        v = tl.load(v_ptrs + offs_d[None, :])  # [BN, D]
        token = tl.load(gathered_ptr + tl.minimum((i + 1) * BN + offs_n, last))  # [BN]

        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
        if MASKED:
            mask = tile_mask(bits_ptr, i * (BN // 32), offs_m, offs_n, BN)  # [BM, BN]
            qk = tl.where(mask, qk, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1) * scale)  # [BM]
        p = tl.exp2(qk * scale - m_new[:, None])  # [BM, BN]
        alpha = tl.exp2(m_i - m_new)  # [BM]
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)  # [BM, D]
        m_i = m_new
    return acc, m_i, l_i


@triton.jit
def _left_by_the_first_pass(o_ptrs, lse_ptrs):
    """acc, m_i and l_i as if the keys of the first pass had just been taken."""
    lse = tl.load(lse_ptrs)  # [BM]
    fully_masked = lse == float("-inf")
    return tl.load(o_ptrs).to(tl.float32), tl.maximum(lse, LOWEST), tl.where(fully_masked, 0.0, 1.0)


@triton.jit(do_not_specialize=GEOMETRY)
def forward_kernel(
    q_ptr, k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr, o_ptr, lse_ptr, partials_ptr, counters_ptr,
    order_ptr, gathered_ptr, bits_ptr, items_ptr, needs_ptr,
    q_strides, k_s_strides, v_s_strides, k_r_strides, v_r_strides, o_strides,
    scale, heads, queries, summaries, blocks, first_block, group, items,
    FIRST: tl.constexpr, OVERLAPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BM queries of one work item of one head: o [B, H, N, D] and lse, float32 [B, H, N] in base 2.

    A query that sees no key gets 0 and -inf. FIRST: this pass is the first and the only one with summaries;
    otherwise it continues from o and lse. The blocks of a group begin at `first_block`. `partials` is float32
    [slots, H, 64 * (D + 2)]: of a split block acc, then m_i, then l_i. `counters` are zeros, and are left so.
    """
    SUBS: tl.constexpr = BLOCK // BM  # programs of a work item
    start_program(FIRST, OVERLAPS)
    (
        head, sub, there, item_ptr, block, begin, end, slot, first, first_masked, num_masked, num_tiles
    ) = load_item(items_ptr, needs_ptr, heads, group, items, SUBS)  # fmt: skip
    if there & ((num_tiles > 0) | FIRST):
        b, h = (block // blocks).to(tl.int64), head.to(tl.int64)
        offs_m, offs_n, offs_d = sub * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
        query = tl.load(order_ptr + (first_block + block) * BLOCK + offs_m)  # [BM]
        m_mask = query >= 0
        query = tl.maximum(query - summaries, 0)
        q_ptrs = head_ptr(q_ptr, q_strides, b, h) + query[:, None] * q_strides[2] + offs_d[None, :]
        q = tl.load(q_ptrs)  # [BM, D]
        o_ptrs = head_ptr(o_ptr, o_strides, b, h) + query[:, None] * o_strides[2] + offs_d[None, :]
        lse_ptrs = lse_ptr + (b * heads + h) * queries + query  # [BM]
        acc = tl.zeros([BM, D], tl.float32)
        m_i = tl.full([BM], LOWEST, tl.float32)
        l_i = tl.zeros([BM], tl.float32)
        keys, key_strides = keys_of_head(
            (k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr),
            (k_s_strides, v_s_strides, k_r_strides, v_r_strides), b, h,
        )  # fmt: skip
        border = tl.minimum(tl.maximum(num_masked, begin), end)  # masked tiles come first
        acc, m_i, l_i = _attend(
            acc, m_i, l_i, q, keys, key_strides,
            gathered_ptr + (first + begin) * BLOCK, bits_ptr + (first_masked + begin) * (2 * BLOCK),
            border - begin, summaries, scale, offs_m, offs_n, offs_d,
            True, FIRST, BN, PRECISION, STAGES,
        )  # fmt: skip
        acc, m_i, l_i = _attend(
            acc, m_i, l_i, q, keys, key_strides,
            gathered_ptr + (first + border) * BLOCK, bits_ptr,
            end - border, summaries, scale, offs_m, offs_n, offs_d,
            False, FIRST, BN, PRECISION, STAGES,
        )  # fmt: skip
        wait_at_last(FIRST, OVERLAPS)
        complete = slot < 0
        if slot >= 0:
            size = BLOCK * (D + 2)
            partial_ptr = partials_ptr + (slot.to(tl.int64) * heads + h) * size
            offs_md = offs_m[:, None] * D + offs_d[None, :]  # [BM, D]
            tl.store(partial_ptr + offs_md, acc)
            tl.store(partial_ptr + BLOCK * D + offs_m, m_i)
            tl.store(partial_ptr + BLOCK * D + BLOCK + offs_m, l_i)
            first_slot, splits = load_split(item_ptr)
            complete = last_to_arrive(counters_ptr, first_slot, splits, heads, head, sub, SUBS)
            if complete:
                acc = tl.zeros([BM, D], tl.float32)
                m_i = tl.full([BM], LOWEST, tl.float32)
                l_i = tl.zeros([BM], tl.float32)
                partial_ptr = partials_ptr + (first_slot.to(tl.int64) * heads + h) * size
                for _ in range(0, splits):
                    m_part = tl.load(partial_ptr + BLOCK * D + offs_m, cache_modifier=".cg")  # [BM]
                    l_part = tl.load(partial_ptr + BLOCK * D + BLOCK + offs_m, cache_modifier=".cg")
                    acc_part = tl.load(partial_ptr + offs_md, cache_modifier=".cg")  # [BM, D]
                    acc, m_i, l_i = merge(acc, m_i, l_i, acc_part, m_part, l_part)
                    partial_ptr += heads * size
        if complete:
            if not FIRST:
                acc_part, m_part, l_part = _left_by_the_first_pass(o_ptrs, lse_ptrs)
                acc, m_i, l_i = merge(acc, m_i, l_i, acc_part, m_part, l_part)
            fully_masked = l_i == 0
            l_i = tl.where(fully_masked, 1.0, l_i)
            o = acc / l_i[:, None]
            tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=m_mask[:, None])
            tl.store(lse_ptrs, tl.where(fully_masked, float("-inf"), m_i + tl.log2(l_i)), mask=m_mask)
    wait_at_last(FIRST, OVERLAPS)
