"""Backward tiles of the update phase. Names and offsets are those of `forward.py`.

With P = exp2(S - lse) and delta = rowsum(dO * O): dV = P^T dO, dS = P * (dO V^T - delta),
dQ = dS K / sqrt(D), dK = dS^T Q / sqrt(D). Both passes use the lse of the whole row, so that their
gradients simply add up. No gradient is added by atomics: a line of queries or of keys belongs to one
program, or to several, the last of which sums their parts in the order of the line.

Tiles of the key side are computed transposed from the start, keys x queries: `tl.dot(tl.trans(x), ...)`
with x made from an accumulator was miscompiled by Triton 3.4 to 3.7.0 on Hopper.
"""

import triton
import triton.language as tl

from .update_forward import GEOMETRY, ITEMS, LINE, all_parts_done, key_pointers, tile_mask


@triton.jit
def _query_gradient(
    dq, q, do, lse, delta, k_s, v_s, k_r, v_r, k_s_n, v_s_n, k_r_n, v_r_n,
    tokens_ptr, bits_ptr, tiles, summaries, scale, offs_row, offs_n, offs_d,
    MASKED: tl.constexpr, SUMMARIES: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds the columns of some tiles to dq [BM, D], not yet scaled; see `forward._attend`."""
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
        p = tl.exp2(scores * scale - lse[:, None])
        if MASKED:
            p = tl.where(tile_mask(bits_ptr, i * (BN // 32), tiles * 2, offs_row, offs_n, BN), p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=GEOMETRY)
def query_gradient_kernel(
    q_ptr, k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr, o_ptr, lse_ptr, do_ptr, stats_ptr, dq_ptr,
    parts_ptr, counters_ptr, order_ptr, table_ptr, tokens_ptr, bits_ptr, items_ptr, needs_ptr,
    q_b, q_h, q_n, k_s_b, k_s_h, k_s_n, v_s_b, v_s_h, v_s_n, k_r_b, k_r_h, k_r_n, v_r_b, v_r_h, v_r_n,
    do_b, do_h, do_n, dq_b, dq_h, dq_n,
    scale, softmax_scale, heads, queries, summaries, blocks, first_block, first_line,
    group, items, first_counter, FIRST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq of BM queries of one line of one head; see `forward.forward_kernel`. o has the strides of dq.

    The near pass also writes down lse and delta = rowsum(dO * O) side by side, float32 [B, H, N, 2]. As a
    pair the other kernels load them by tiles of twice the rows, which Triton (3.6) copies once per
    program; a vector shorter than the program's threads it would load once in every thread that needs it.
    """
    SUBS: tl.constexpr = LINE // BM
    head = tl.program_id(0) % heads
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
            do = tl.load(do_ptr + row * do_b + h * do_h + query[:, None] * do_n + offs_d[None, :])  # [BM, D]
            dq_at = row * dq_b + h * dq_h + query[:, None] * dq_n + offs_d[None, :]
            stats = (row * heads + h) * queries + query
            if FIRST:
                lse = tl.load(lse_ptr + stats)
                delta = tl.sum(tl.load(o_ptr + dq_at).to(tl.float32) * do.to(tl.float32), 1)
                if begin == 0:
                    tl.store(stats_ptr + stats * 2, lse, mask=there)
                    tl.store(stats_ptr + stats * 2 + 1, delta, mask=there)
            else:
                lse, delta = tl.load(stats_ptr + stats * 2), tl.load(stats_ptr + stats * 2 + 1)

            k_s, v_s = k_s_ptr + row * k_s_b + h * k_s_h, v_s_ptr + row * v_s_b + h * v_s_h
            k_r, v_r = k_r_ptr + row * k_r_b + h * k_r_h, v_r_ptr + row * v_r_b + h * v_r_h
            border = tl.minimum(tl.maximum(masked, begin), end)
            dq = tl.zeros([BM, D], tl.float32)
            dq = _query_gradient(
                dq, q, do, lse, delta, k_s, v_s, k_r, v_r, k_s_n, v_s_n, k_r_n, v_r_n,
                tokens_ptr + (first + begin) * LINE, bits_ptr + (first_masked + begin) * (2 * LINE),
                border - begin, summaries, scale, offs_row, offs_n, offs_d,
                True, FIRST, BN, PRECISION, STAGES,
            )  # fmt: skip
            dq = _query_gradient(
                dq, q, do, lse, delta, k_s, v_s, k_r, v_r, k_s_n, v_s_n, k_r_n, v_r_n,
                tokens_ptr + (first + border) * LINE, bits_ptr,
                end - border, summaries, scale, offs_row, offs_n, offs_d,
                False, FIRST, BN, PRECISION, STAGES,
            )  # fmt: skip
            dq *= softmax_scale
            done = slot < 0
            if slot >= 0:
                part = parts_ptr + (slot.to(tl.int64) * heads + h) * (LINE * D)
                at = offs_row[:, None] * D + offs_d[None, :]
                tl.store(part + at, dq)
                first_slot, parts = tl.load(item + 4), tl.load(item + 5)
                done = all_parts_done(counters_ptr + first_counter, first_slot, parts, heads, head, sub, SUBS)
                if done:
                    dq = tl.zeros([BM, D], tl.float32)
                    part = parts_ptr + (first_slot.to(tl.int64) * heads + h) * (LINE * D)
                    for _ in range(0, parts):
                        dq += tl.load(part + at, cache_modifier=".cg")
                        part += heads * (LINE * D)
            if done:
                if not FIRST:
                    dq += tl.load(dq_ptr + dq_at).to(tl.float32)
                tl.store(dq_ptr + dq_at, dq.to(dq_ptr.dtype.element_ty), mask=there[:, None])


@triton.jit
def _key_gradient(
    dk, dv, k, v, q_ptr, do_ptr, q_n, do_n, stats_ptr,
    tokens_ptr, bits_ptr, tiles, scale, offs_row, offs_n, offs_d,
    MASKED: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds the columns, queries, of some tiles to dk (not yet scaled) and dv, [BM, D]."""
    last = tl.maximum(tiles * LINE - 1, 0)
    query = tl.load(tokens_ptr + tl.minimum(offs_n, last))  # [BN]
    for i in tl.range(0, (tiles * LINE + BN - 1) // BN, num_stages=STAGES):
        q = tl.load(q_ptr + query[:, None] * q_n + offs_d[None, :])  # [BN, D]
        do = tl.load(do_ptr + query[:, None] * do_n + offs_d[None, :])  # [BN, D]
        pair = tl.load(stats_ptr + query[:, None] * 2 + tl.arange(0, 2)[None, :])  # [BN, 2]
        query = tl.load(tokens_ptr + tl.minimum((i + 1) * BN + offs_n, last))
        lse, delta = tl.split(pair)

        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BM, BN]
        p = tl.exp2(scores * scale - lse[None, :])
        if MASKED:
            p = tl.where(tile_mask(bits_ptr, i * (BN // 32), tiles * 2, offs_row, offs_n, BN), p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # [BM, BN]
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _store_key_gradients(
    dk, dv, dk_ptr, dv_ptr, at, there, offs_d, FIRST: tl.constexpr
):  # fmt: skip
    """dk and dv [BM, D], float32, to rows at offsets [BM, 1]: written, or added to what is there."""
    at += offs_d[None, :]
    there = there[:, None]
    if not FIRST:
        dk += tl.load(dk_ptr + at, mask=there, other=0).to(tl.float32)
        dv += tl.load(dv_ptr + at, mask=there, other=0).to(tl.float32)
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=there)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=GEOMETRY)
def key_gradient_kernel(
    q_ptr, k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr, do_ptr, stats_ptr,
    dk_s_ptr, dv_s_ptr, dk_r_ptr, dv_r_ptr, parts_ptr, counters_ptr,
    order_ptr, table_ptr, tokens_ptr, bits_ptr, items_ptr, needs_ptr,
    q_b, q_h, q_n, k_s_b, k_s_h, k_s_n, v_s_b, v_s_h, v_s_n, k_r_b, k_r_h, k_r_n, v_r_b, v_r_h, v_r_n,
    do_b, do_h, do_n, d_s_b, d_s_h, d_s_n, d_r_b, d_r_h, d_r_n,
    scale, softmax_scale, heads, queries, summaries, blocks, first_block, first_line,
    group, items, first_counter, FIRST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of BM keys of one item of one head. `parts` is float32 [slots, H, 2, 64, D]: dk, then dv.

    `needs` says how many items there are.
    """
    SUBS: tl.constexpr = LINE // BM
    head = tl.program_id(0) % heads
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
            slots = order_ptr + (first_block + line) * LINE
            token = tl.load(slots + offs_row)  # [BM]
            in_s = tl.load(slots) < summaries  # a line is of one stream
            at = tl.maximum(tl.where(in_s, token, token - summaries), 0)[:, None]
            if in_s:
                k = tl.load(k_s_ptr + row * k_s_b + h * k_s_h + at * k_s_n + offs_d[None, :])  # [BM, D]
                v = tl.load(v_s_ptr + row * v_s_b + h * v_s_h + at * v_s_n + offs_d[None, :])  # [BM, D]
            else:
                k = tl.load(k_r_ptr + row * k_r_b + h * k_r_h + at * k_r_n + offs_d[None, :])
                v = tl.load(v_r_ptr + row * v_r_b + h * v_r_h + at * v_r_n + offs_d[None, :])

            q, do = q_ptr + row * q_b + h * q_h, do_ptr + row * do_b + h * do_h
            stats = stats_ptr + (row * heads + h) * queries * 2
            border = tl.minimum(tl.maximum(masked, begin), end)
            dk = tl.zeros([BM, D], tl.float32)
            dv = tl.zeros([BM, D], tl.float32)
            dk, dv = _key_gradient(
                dk, dv, k, v, q, do, q_n, do_n, stats,
                tokens_ptr + (first + begin) * LINE, bits_ptr + (first_masked + begin) * (2 * LINE),
                border - begin, scale, offs_row, offs_n, offs_d, True, BN, PRECISION, STAGES,
            )  # fmt: skip
            dk, dv = _key_gradient(
                dk, dv, k, v, q, do, q_n, do_n, stats,
                tokens_ptr + (first + border) * LINE, bits_ptr,
                end - border, scale, offs_row, offs_n, offs_d, False, BN, PRECISION, STAGES,
            )  # fmt: skip
            dk *= softmax_scale
            there = token >= 0
            done = slot < 0
            if slot >= 0:
                part = parts_ptr + (slot.to(tl.int64) * heads + h) * (2 * LINE * D)
                offs = offs_row[:, None] * D + offs_d[None, :]
                tl.store(part + offs, dk)
                tl.store(part + LINE * D + offs, dv)
                first_slot, parts = tl.load(item + 4), tl.load(item + 5)
                done = all_parts_done(counters_ptr + first_counter, first_slot, parts, heads, head, sub, SUBS)
                if done:
                    dk = tl.zeros([BM, D], tl.float32)
                    dv = tl.zeros([BM, D], tl.float32)
                    part = parts_ptr + (first_slot.to(tl.int64) * heads + h) * (2 * LINE * D)
                    for _ in range(0, parts):
                        dk += tl.load(part + offs, cache_modifier=".cg")
                        dv += tl.load(part + LINE * D + offs, cache_modifier=".cg")
                        part += heads * (2 * LINE * D)
            if done:
                if in_s:
                    base = row * d_s_b + h * d_s_h
                    _store_key_gradients(dk, dv, dk_s_ptr, dv_s_ptr, base + at * d_s_n, there, offs_d, FIRST)
                else:
                    base = row * d_r_b + h * d_r_h
                    _store_key_gradients(dk, dv, dk_r_ptr, dv_r_ptr, base + at * d_r_n, there, offs_d, FIRST)
