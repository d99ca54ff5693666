"""Backward tiles. Names and offsets are those of `forward.py`.

With P = exp2(S - lse) and delta = rowsum(dO * O): dV = P^T dO, dS = P * (dO V^T - delta),
dQ = dS K / sqrt(D), dK = dS^T Q / sqrt(D). Both passes of a phase use the lse of the whole row, so
that their gradients simply add up. Nothing is added by atomics: a query block and a key block each
belong to one program, except the longest lists of keys, whose parts a further kernel sums in order.

Tiles of the key side are computed transposed from the start, [BN, BM]: `tl.dot(tl.trans(x), ...)`
with x made from an accumulator was miscompiled by Triton 3.4 to 3.7.0 on Hopper.
"""

import triton
import triton.language as tl

from .forward import key_pointers, tile_mask


@triton.jit(do_not_specialize=["heads", "queries"])
def stats_kernel(
    o_ptr, do_ptr, lse_ptr, stats_ptr, o_b, o_h, o_n, do_b, do_h, do_n, heads, queries,
    BLOCK: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """lse and delta side by side, float32 [B, H, N, 2].

    As a pair they are loaded by tiles of twice the rows, which Triton (3.6) copies once per program;
    a vector shorter than the program's threads it would load once in every thread that needs it.
    """
    row, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, D)
    there = query < queries
    o = tl.load(
        o_ptr + row * o_b + h * o_h + query[:, None] * o_n + offs_d[None, :], mask=there[:, None], other=0
    )
    do = tl.load(
        do_ptr + row * do_b + h * do_h + query[:, None] * do_n + offs_d[None, :], mask=there[:, None], other=0
    )
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    at = (row * heads + h) * queries + query
    tl.store(stats_ptr + at * 2, tl.load(lse_ptr + at, mask=there), mask=there)
    tl.store(stats_ptr + at * 2 + 1, delta, mask=there)


@triton.jit
def _query_gradient(
    dq, q, do, lse, delta, k_s, v_s, k_r, v_r, k_s_n, v_s_n, k_r_n, v_r_n,
    list_ptr, order_ptr, bits_ptr, tile, first, end, summaries, scale, offs_m, offs_n, offs_d,
    MASKED: tl.constexpr, SUMMARIES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds entries `first` to `end` of a list to dq [BM, D], not yet scaled; see `forward._attend`."""
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
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [BM, BN]
        p = tl.exp2(scores * scale - lse[:, None])
        if MASKED:
            p = tl.where(tile_mask(bits_ptr, tile + i, offs_m, offs_n, BM, BN), p, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["heads", "queries", "q_blocks", "k_blocks", "summaries"])
def query_gradient_kernel(
    q_ptr, k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr, do_ptr, stats_ptr, dq_ptr,
    q_b, q_h, q_n, k_s_b, k_s_h, k_s_n, v_s_b, v_s_h, v_s_n, k_r_b, k_r_h, k_r_n, v_r_b, v_r_h, v_r_n,
    do_b, do_h, do_n, dq_b, dq_h, dq_n,
    q_order_ptr, k_order_ptr, list_ptr, partial_ptr, total_ptr, bits_ptr, start_ptr, work_ptr,
    scale, softmax_scale, heads, queries, q_blocks, k_blocks, summaries,
    FIRST: tl.constexpr, SUMMARIES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq [B, H, N, D] of one query block of one head: written by the first pass, added to by others."""
    head = tl.program_id(0) % heads
    line = tl.load(work_ptr + tl.program_id(0) // heads)
    row, h = (line // q_blocks).to(tl.int64), head.to(tl.int64)
    offs_m, offs_n, offs_d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    query = tl.load(q_order_ptr + line.to(tl.int64) * BM + offs_m)  # [BM]
    there = query >= 0
    query = tl.maximum(query, 0)
    q = tl.load(q_ptr + row * q_b + h * q_h + query[:, None] * q_n + offs_d[None, :])  # [BM, D]
    do = tl.load(do_ptr + row * do_b + h * do_h + query[:, None] * do_n + offs_d[None, :])  # [BM, D]
    stats = stats_ptr + ((row * heads + h) * queries + query[:, None]) * 2 + tl.arange(0, 2)[None, :]
    lse, delta = tl.split(tl.load(stats))  # [BM]

    k_s, v_s = k_s_ptr + row * k_s_b + h * k_s_h, v_s_ptr + row * v_s_b + h * v_s_h
    k_r, v_r = k_r_ptr + row * k_r_b + h * k_r_h, v_r_ptr + row * v_r_b + h * v_r_h
    blocks, order = list_ptr + line.to(tl.int64) * k_blocks, k_order_ptr + row * k_blocks * BN
    partial, length, tile = tl.load(partial_ptr + line), tl.load(total_ptr + line), tl.load(start_ptr + line)
    dq = tl.zeros([BM, D], tl.float32)
    dq = _query_gradient(
        dq, q, do, lse, delta, k_s, v_s, k_r, v_r, k_s_n, v_s_n, k_r_n, v_r_n,
        blocks, order, bits_ptr, tile, 0, partial, summaries, scale, offs_m, offs_n, offs_d,
        True, SUMMARIES, BM, BN, PRECISION, STAGES,
    )  # fmt: skip
    dq = _query_gradient(
        dq, q, do, lse, delta, k_s, v_s, k_r, v_r, k_s_n, v_s_n, k_r_n, v_r_n,
        blocks, order, bits_ptr, tile, partial, length, summaries, scale, offs_m, offs_n, offs_d,
        False, SUMMARIES, BM, BN, PRECISION, STAGES,
    )  # fmt: skip
    dq *= softmax_scale
    dq_ptrs = dq_ptr + row * dq_b + h * dq_h + query[:, None] * dq_n + offs_d[None, :]
    if not FIRST:
        dq += tl.load(dq_ptrs).to(tl.float32)
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=there[:, None])


@triton.jit
def _key_gradient(
    dk, dv, k, v, q_ptr, do_ptr, q_n, do_n, stats_ptr,
    list_ptr, order_ptr, bits_ptr, tile, first, end, scale, offs_m, offs_n, offs_d,
    MASKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds entries `first` to `end` of a list of query blocks to dk (not yet scaled) and dv, [BN, D]."""
    block = tl.load(list_ptr + first)
    query = tl.load(order_ptr + block * BM + offs_m)  # [BM]
    next_block = tl.load(list_ptr + tl.minimum(first + 1, end))
    for i in tl.range(first, end, num_stages=STAGES):
        row = tl.maximum(query, 0)
        q = tl.load(q_ptr + row[:, None] * q_n + offs_d[None, :])  # [BM, D]
        do = tl.load(do_ptr + row[:, None] * do_n + offs_d[None, :])  # [BM, D]
        lse, delta = tl.split(tl.load(stats_ptr + row[:, None] * 2 + tl.arange(0, 2)[None, :]))  # [BM]
        block = next_block
        query = tl.load(order_ptr + block * BM + offs_m)
        next_block = tl.load(list_ptr + tl.minimum(i + 2, end))

        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BN, BM]
        p = tl.exp2(scores * scale - lse[None, :])
        if MASKED:
            p = tl.where(tile_mask(bits_ptr, tile + i, offs_n, offs_m, BN, BM), p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # [BN, BM]
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _store_key_gradients(
    dk, dv, dk_ptr, dv_ptr, at, token, offs_d, FIRST: tl.constexpr
):  # fmt: skip
    """dk and dv [BN, D], float32, to rows at offsets [BN, 1]: written, or added to what is there."""
    at += offs_d[None, :]
    there = (token >= 0)[:, None]
    if not FIRST:
        dk += tl.load(dk_ptr + at, mask=there, other=0).to(tl.float32)
        dv += tl.load(dv_ptr + at, mask=there, other=0).to(tl.float32)
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=there)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["heads", "queries", "q_blocks", "k_blocks", "summaries"])
def key_gradient_kernel(
    q_ptr, k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr, do_ptr, stats_ptr,
    dk_s_ptr, dv_s_ptr, dk_r_ptr, dv_r_ptr, parts_ptr,
    q_b, q_h, q_n, k_s_b, k_s_h, k_s_n, v_s_b, v_s_h, v_s_n, k_r_b, k_r_h, k_r_n, v_r_b, v_r_h, v_r_n,
    do_b, do_h, do_n, d_s_b, d_s_h, d_s_n, d_r_b, d_r_h, d_r_n,
    q_order_ptr, k_order_ptr, list_ptr, partial_ptr, bits_ptr, start_ptr, work_ptr,
    scale, softmax_scale, heads, queries, q_blocks, k_blocks, summaries,
    FIRST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of one key block of one head, or a part of them to its slot in `parts`.

    `parts` is float32 [slots, H, 2, BN, D]: dk, then dv.
    """
    head = tl.program_id(0) % heads
    work = work_ptr + tl.program_id(0) // heads * 4
    line, first, end, slot = tl.load(work), tl.load(work + 1), tl.load(work + 2), tl.load(work + 3)
    row, h = (line // k_blocks).to(tl.int64), head.to(tl.int64)
    offs_m, offs_n, offs_d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    token = tl.load(k_order_ptr + line.to(tl.int64) * BN + offs_n)  # [BN]
    in_s = tl.load(k_order_ptr + line.to(tl.int64) * BN) < summaries  # a block is of one stream
    at = tl.maximum(tl.where(in_s, token, token - summaries), 0)[:, None]
    if in_s:
        k = tl.load(k_s_ptr + row * k_s_b + h * k_s_h + at * k_s_n + offs_d[None, :])  # [BN, D]
        v = tl.load(v_s_ptr + row * v_s_b + h * v_s_h + at * v_s_n + offs_d[None, :])  # [BN, D]
    else:
        k = tl.load(k_r_ptr + row * k_r_b + h * k_r_h + at * k_r_n + offs_d[None, :])
        v = tl.load(v_r_ptr + row * v_r_b + h * v_r_h + at * v_r_n + offs_d[None, :])

    q, do = q_ptr + row * q_b + h * q_h, do_ptr + row * do_b + h * do_h
    stats = stats_ptr + (row * heads + h) * queries * 2
    blocks, order = list_ptr + line.to(tl.int64) * q_blocks, q_order_ptr + row * q_blocks * BM
    tile = tl.load(start_ptr + line)
    border = tl.minimum(tl.maximum(tl.load(partial_ptr + line), first), end)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    dk, dv = _key_gradient(
        dk, dv, k, v, q, do, q_n, do_n, stats,
        blocks, order, bits_ptr, tile, first, border, scale, offs_m, offs_n, offs_d,
        True, BM, BN, PRECISION, STAGES,
    )  # fmt: skip
    dk, dv = _key_gradient(
        dk, dv, k, v, q, do, q_n, do_n, stats,
        blocks, order, bits_ptr, tile, border, end, scale, offs_m, offs_n, offs_d,
        False, BM, BN, PRECISION, STAGES,
    )  # fmt: skip
    dk *= softmax_scale
    if slot >= 0:
        part = parts_ptr + (slot.to(tl.int64) * heads + h) * (2 * BN * D)
        part += offs_n[:, None] * D + offs_d[None, :]
        tl.store(part, dk)
        tl.store(part + BN * D, dv)
    elif in_s:
        base = row * d_s_b + h * d_s_h
        _store_key_gradients(dk, dv, dk_s_ptr, dv_s_ptr, base + at * d_s_n, token, offs_d, FIRST)
    else:
        base = row * d_r_b + h * d_r_h
        _store_key_gradients(dk, dv, dk_r_ptr, dv_r_ptr, base + at * d_r_n, token, offs_d, FIRST)


@triton.jit(do_not_specialize=["heads", "k_blocks", "summaries"])
def sum_parts_kernel(
    parts_ptr, dk_s_ptr, dv_s_ptr, dk_r_ptr, dv_r_ptr, d_s_b, d_s_h, d_s_n, d_r_b, d_r_h, d_r_n,
    k_order_ptr, split_ptr, heads, k_blocks, summaries,
    FIRST: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Sums the parts of one key block of one head, in order."""
    head = tl.program_id(0) % heads
    split = split_ptr + tl.program_id(0) // heads * 3
    line, first, end = tl.load(split), tl.load(split + 1), tl.load(split + 2)
    row, h = (line // k_blocks).to(tl.int64), head.to(tl.int64)
    offs_n, offs_d = tl.arange(0, BN), tl.arange(0, D)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    part = parts_ptr + (first.to(tl.int64) * heads + h) * (2 * BN * D) + offs_n[:, None] * D + offs_d[None, :]
    for _ in range(first, end):
        dk += tl.load(part)
        dv += tl.load(part + BN * D)
        part += heads * (2 * BN * D)
    token = tl.load(k_order_ptr + line.to(tl.int64) * BN + offs_n)  # [BN]
    in_s = tl.load(k_order_ptr + line.to(tl.int64) * BN) < summaries
    at = tl.maximum(tl.where(in_s, token, token - summaries), 0)[:, None]
    if in_s:
        base = row * d_s_b + h * d_s_h
        _store_key_gradients(dk, dv, dk_s_ptr, dv_s_ptr, base + at * d_s_n, token, offs_d, FIRST)
    else:
        base = row * d_r_b + h * d_r_h
        _store_key_gradients(dk, dv, dk_r_ptr, dv_r_ptr, base + at * d_r_n, token, offs_d, FIRST)
