"""The backward kernels of the update phase. Names and shapes are those of `tiles`.

With P = exp2(S - lse) and delta = rowsum(dO * O): dV = P^T dO, dS = P * (dO V^T - delta), dQ = dS K /
sqrt(D), dK = dS^T Q / sqrt(D) (FlashAttention, Dao et al., 2022, arXiv:2205.14135, appendix B). Both passes
use the final lse of a query, so that their gradients add up. No gradient is added by atomics: a block of
queries or of keys belongs to one program, or to several, of which the last to arrive adds up all partial sums
in the order of the list.

Tiles of the key side are computed transposed from the start, keys x queries: `tl.dot(tl.trans(x), ...)` with
x made from an accumulator was miscompiled by Triton 3.4 to 3.7.0 on Hopper.
"""

import triton
import triton.language as tl

from .overlap import let_next_read
from .tiles import (
    BLOCK,
    GEOMETRY,
    head_ptr,
    key_pointers,
    keys_of_head,
    last_to_arrive,
    load_item,
    load_split,
    start_program,
    start_query_gradient,
    tile_mask,
    wait_at_last,
)


@triton.jit
def _add_query_gradient(
    dq, q, do, lse, delta, keys, key_strides,
    gathered_ptr, bits_ptr, tiles, summaries, scale, offs_m, offs_n, offs_d,
    MASKED: tl.constexpr, HAS_SUMMARIES: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds the keys of some tiles to dq [BM, D], not yet scaled; see `update_forward._attend`."""
    last = tl.maximum(tiles * BLOCK - 1, 0)
    token = tl.load(gathered_ptr + tl.minimum(offs_n, last))  # [BN]
    for i in tl.range(0, (tiles * BLOCK + BN - 1) // BN, num_stages=STAGES):
        k_ptrs, v_ptrs = key_pointers(token, keys, key_strides, summaries, HAS_SUMMARIES)  # [BN, 1]
        k = tl.load(k_ptrs + offs_d[None, :])  # [BN, D]
        v = tl.load(v_ptrs + offs_d[None, :])  # [BN, D]
        token = tl.load(gathered_ptr + tl.minimum((i + 1) * BN + offs_n, last))  # [BN]

        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
        p = tl.exp2(qk * scale - lse[:, None])  # [BM, BN]
        if MASKED:
            mask = tile_mask(bits_ptr, i * (BN // 32), offs_m, offs_n, BN)  # [BM, BN]
            p = tl.where(mask, p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [BM, BN]
        ds = p * (dp - delta[:, None])  # [BM, BN]
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)  # [BM, D]
    return dq


@triton.jit(do_not_specialize=GEOMETRY)
def query_gradient_kernel(
    q_ptr, k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr, o_ptr, lse_ptr, do_ptr, stats_ptr, dq_ptr,
    partials_ptr, counters_ptr, order_ptr, gathered_ptr, bits_ptr, items_ptr, needs_ptr,
    q_strides, k_s_strides, v_s_strides, k_r_strides, v_r_strides, do_strides, dq_strides,
    scale, softmax_scale, heads, queries, summaries, blocks, first_block, group, items,
    FIRST: tl.constexpr, OVERLAPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq of BM queries of one work item of one head; see `update_forward.forward_kernel`. o has dq's strides.

    The first pass also stores lse and delta side by side, float32 [B, H, N, 2]. As a pair
    `key_gradient_kernel` loads them by tiles of twice the rows, which Triton (3.6) copies once per program; a
    vector shorter than the program's threads it would load once in every thread that needs it. `partials` is
    float32 [slots, H, 64, D].
    """
    SUBS: tl.constexpr = BLOCK // BM  # programs of a work item
    start_query_gradient(FIRST, OVERLAPS)
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
        do_ptrs = head_ptr(do_ptr, do_strides, b, h) + query[:, None] * do_strides[2] + offs_d[None, :]
        do = tl.load(do_ptrs)  # [BM, D]
        dq_offs = b * dq_strides[0] + h * dq_strides[1] + query[:, None] * dq_strides[2] + offs_d[None, :]
        stats_offs = (b * heads + h) * queries + query  # [BM]
        lse = tl.load(lse_ptr + stats_offs)  # [BM]
        delta = tl.sum(tl.load(o_ptr + dq_offs).to(tl.float32) * do.to(tl.float32), 1)  # [BM]
        if FIRST:
            if begin == 0:
                tl.store(stats_ptr + stats_offs * 2, lse, mask=m_mask)
                tl.store(stats_ptr + stats_offs * 2 + 1, delta, mask=m_mask)
            let_next_read(OVERLAPS)

        keys, key_strides = keys_of_head(
            (k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr),
            (k_s_strides, v_s_strides, k_r_strides, v_r_strides), b, h,
        )  # fmt: skip
        border = tl.minimum(tl.maximum(num_masked, begin), end)  # masked tiles come first
        dq = tl.zeros([BM, D], tl.float32)
        dq = _add_query_gradient(
            dq, q, do, lse, delta, keys, key_strides,
            gathered_ptr + (first + begin) * BLOCK, bits_ptr + (first_masked + begin) * (2 * BLOCK),
            border - begin, summaries, scale, offs_m, offs_n, offs_d,
            True, FIRST, BN, PRECISION, STAGES,
        )  # fmt: skip
        dq = _add_query_gradient(
            dq, q, do, lse, delta, keys, key_strides,
            gathered_ptr + (first + border) * BLOCK, bits_ptr,
            end - border, summaries, scale, offs_m, offs_n, offs_d,
            False, FIRST, BN, PRECISION, STAGES,
        )  # fmt: skip
        dq *= softmax_scale
        wait_at_last(FIRST, OVERLAPS)
        complete = slot < 0
        if slot >= 0:
            partial_ptr = partials_ptr + (slot.to(tl.int64) * heads + h) * (BLOCK * D)
            offs_md = offs_m[:, None] * D + offs_d[None, :]  # [BM, D]
            tl.store(partial_ptr + offs_md, dq)
            first_slot, splits = load_split(item_ptr)
            complete = last_to_arrive(counters_ptr, first_slot, splits, heads, head, sub, SUBS)
            if complete:
                dq = tl.zeros([BM, D], tl.float32)
                partial_ptr = partials_ptr + (first_slot.to(tl.int64) * heads + h) * (BLOCK * D)
                for _ in range(0, splits):
                    dq += tl.load(partial_ptr + offs_md, cache_modifier=".cg")
                    partial_ptr += heads * (BLOCK * D)
        if complete:
            if not FIRST:
                dq += tl.load(dq_ptr + dq_offs).to(tl.float32)
            tl.store(dq_ptr + dq_offs, dq.to(dq_ptr.dtype.element_ty), mask=m_mask[:, None])
    wait_at_last(FIRST, OVERLAPS)


@triton.jit
def _add_key_gradients(
    dk, dv, k, v, q_ptr, do_ptr, q_n, do_n, stats_ptr,
    gathered_ptr, bits_ptr, tiles, scale, offs_m, offs_n, offs_d,
    MASKED: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds the queries of some tiles to dk (not yet scaled) and dv, [BM, D]; q_n and do_n are token
    strides."""
    last = tl.maximum(tiles * BLOCK - 1, 0)
    query = tl.load(gathered_ptr + tl.minimum(offs_n, last))  # [BN]
    for i in tl.range(0, (tiles * BLOCK + BN - 1) // BN, num_stages=STAGES):
        q = tl.load(q_ptr + query[:, None] * q_n + offs_d[None, :])  # [BN, D]
        do = tl.load(do_ptr + query[:, None] * do_n + offs_d[None, :])  # [BN, D]
        stats = tl.load(stats_ptr + query[:, None] * 2 + tl.arange(0, 2)[None, :])  # [BN, 2]
        query = tl.load(gathered_ptr + tl.minimum((i + 1) * BN + offs_n, last))  # [BN]
        lse, delta = tl.split(stats)  # [BN] each

        # Both before the exponentials, which then run beside the second product.
        kq = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BM, BN]
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # [BM, BN]
        p = tl.exp2(kq * scale - lse[None, :])  # [BM, BN]
        if MASKED:
            mask = tile_mask(bits_ptr, i * (BN // 32), offs_m, offs_n, BN)  # [BM, BN]
            p = tl.where(mask, p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)  # [BM, D]
        ds = p * (dp - delta[None, :])  # [BM, BN]
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)  # [BM, D]
    return dk, dv


@triton.jit
def _store_key_gradients(dk, dv, dk_ptr, dv_ptr, offs, m_mask, FIRST: tl.constexpr):
    """Stores dk and dv [BM, D], or adds them to what the first pass stored, at the offsets [BM, D]."""
    if not FIRST:
        dk += tl.load(dk_ptr + offs, mask=m_mask, other=0).to(tl.float32)
        dv += tl.load(dv_ptr + offs, mask=m_mask, other=0).to(tl.float32)
    tl.store(dk_ptr + offs, dk.to(dk_ptr.dtype.element_ty), mask=m_mask)
    tl.store(dv_ptr + offs, dv.to(dv_ptr.dtype.element_ty), mask=m_mask)


@triton.jit(do_not_specialize=GEOMETRY)
def key_gradient_kernel(
    q_ptr, k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr, do_ptr, stats_ptr,
    dk_s_ptr, dv_s_ptr, dk_r_ptr, dv_r_ptr, partials_ptr, counters_ptr,
    order_ptr, gathered_ptr, bits_ptr, items_ptr, needs_ptr,
    q_strides, k_s_strides, v_s_strides, k_r_strides, v_r_strides, do_strides, dk_s_strides, dk_r_strides,
    scale, softmax_scale, heads, queries, summaries, blocks, first_block, group, items,
    FIRST: tl.constexpr, OVERLAPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of BM keys of one work item of one head; dv has the strides of dk.

    See `update_forward.forward_kernel`. `partials` is float32 [slots, H, 2, 64, D]: dk, then dv. With
    OVERLAPS both passes start when all `stats` are stored, see `tiles.start_query_gradient`.
    """
    SUBS: tl.constexpr = BLOCK // BM  # programs of a work item
    start_program(False, OVERLAPS)
    (
        head, sub, there, item_ptr, block, begin, end, slot, first, first_masked, num_masked, num_tiles
    ) = load_item(items_ptr, needs_ptr, heads, group, items, SUBS)  # fmt: skip
    if there & ((num_tiles > 0) | FIRST):
        b, h = (block // blocks).to(tl.int64), head.to(tl.int64)
        offs_m, offs_n, offs_d = sub * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
        slots_ptr = order_ptr + (first_block + block) * BLOCK
        token = tl.load(slots_ptr + offs_m)  # [BM]
        is_summary = tl.load(slots_ptr) < summaries  # a block is of one stream
        key = tl.maximum(tl.where(is_summary, token, token - summaries), 0)[:, None]  # [BM, 1]
        if is_summary:
            k_ptrs = head_ptr(k_s_ptr, k_s_strides, b, h) + key * k_s_strides[2] + offs_d[None, :]
            v_ptrs = head_ptr(v_s_ptr, v_s_strides, b, h) + key * v_s_strides[2] + offs_d[None, :]
            k, v = tl.load(k_ptrs), tl.load(v_ptrs)  # [BM, D]
        else:
            k_ptrs = head_ptr(k_r_ptr, k_r_strides, b, h) + key * k_r_strides[2] + offs_d[None, :]
            v_ptrs = head_ptr(v_r_ptr, v_r_strides, b, h) + key * v_r_strides[2] + offs_d[None, :]
            k, v = tl.load(k_ptrs), tl.load(v_ptrs)  # [BM, D]

        q_head_ptr, do_head_ptr = head_ptr(q_ptr, q_strides, b, h), head_ptr(do_ptr, do_strides, b, h)
        stats_head_ptr = stats_ptr + (b * heads + h) * queries * 2
        border = tl.minimum(tl.maximum(num_masked, begin), end)  # masked tiles come first
        dk = tl.zeros([BM, D], tl.float32)
        dv = tl.zeros([BM, D], tl.float32)
        dk, dv = _add_key_gradients(
            dk, dv, k, v, q_head_ptr, do_head_ptr, q_strides[2], do_strides[2], stats_head_ptr,
            gathered_ptr + (first + begin) * BLOCK, bits_ptr + (first_masked + begin) * (2 * BLOCK),
            border - begin, scale, offs_m, offs_n, offs_d, True, BN, PRECISION, STAGES,
        )  # fmt: skip
        dk, dv = _add_key_gradients(
            dk, dv, k, v, q_head_ptr, do_head_ptr, q_strides[2], do_strides[2], stats_head_ptr,
            gathered_ptr + (first + border) * BLOCK, bits_ptr,
            end - border, scale, offs_m, offs_n, offs_d, False, BN, PRECISION, STAGES,
        )  # fmt: skip
        dk *= softmax_scale
        m_mask = (token >= 0)[:, None]
        wait_at_last(False, OVERLAPS)
        complete = slot < 0
        if slot >= 0:
            partial_ptr = partials_ptr + (slot.to(tl.int64) * heads + h) * (2 * BLOCK * D)
            offs_md = offs_m[:, None] * D + offs_d[None, :]  # [BM, D]
            tl.store(partial_ptr + offs_md, dk)
            tl.store(partial_ptr + BLOCK * D + offs_md, dv)
            first_slot, splits = load_split(item_ptr)
            complete = last_to_arrive(counters_ptr, first_slot, splits, heads, head, sub, SUBS)
            if complete:
                dk = tl.zeros([BM, D], tl.float32)
                dv = tl.zeros([BM, D], tl.float32)
                partial_ptr = partials_ptr + (first_slot.to(tl.int64) * heads + h) * (2 * BLOCK * D)
                for _ in range(0, splits):
                    dk += tl.load(partial_ptr + offs_md, cache_modifier=".cg")
                    dv += tl.load(partial_ptr + BLOCK * D + offs_md, cache_modifier=".cg")
                    partial_ptr += heads * (2 * BLOCK * D)
        if complete:
            if is_summary:
                offs = b * dk_s_strides[0] + h * dk_s_strides[1] + key * dk_s_strides[2] + offs_d[None, :]
                _store_key_gradients(dk, dv, dk_s_ptr, dv_s_ptr, offs, m_mask, FIRST)
            else:
                offs = b * dk_r_strides[0] + h * dk_r_strides[1] + key * dk_r_strides[2] + offs_d[None, :]
                _store_key_gradients(dk, dv, dk_r_ptr, dv_r_ptr, offs, m_mask, FIRST)
    wait_at_last(False, OVERLAPS)
