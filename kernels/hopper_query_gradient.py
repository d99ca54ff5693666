"""The gradients of queries for Hopper, in Gluon: warps that fetch, and warps that multiply.

The twin of `update_backward.query_gradient_kernel`: the same work items, lists, masks and sums. See
`hopper_key_gradients`.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_ring import WARPS, copy_tiles, load_words, ring_barriers, ring_slot, seen
from .overlap import let_next_read
from .tiles import (
    BLOCK,
    GEOMETRY,
    head_ptr,
    keys_of_head,
    last_to_arrive,
    load_item,
    load_split,
    start_query_gradient,
    wait_at_last,
)


@gluon.jit
def _produce(
    pointers, keys, strides, heads, geometry, rings, ready, free,
    FIRST: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr,
):  # fmt: skip
    """Copies the keys and values of the item into the ring."""
    gathered_ptr, items_ptr, needs_ptr = pointers
    summaries, blocks, group, items = geometry
    head, _, there, _, block, begin, end, _, first, _, _, _ = load_item(
        items_ptr, needs_ptr, heads, group, items, 1
    )
    if there:
        b, h = (block // blocks).to(gl.int64), head.to(gl.int64)
        rows, steps = keys_of_head(keys, strides, b, h)
        gathered_ptr += (first + begin) * BLOCK
        copy_tiles(
            gathered_ptr, end - begin, rows, steps, summaries, gathered_ptr, rings, ready, free,
            FIRST, False, D, STAGES, LAG,
        )  # fmt: skip


@gluon.jit
def _add_query_gradient(
    dq, lse, delta, q_tile, do_tile, k_ring, v_ring, ready, free, bits_ptr, scale, begin, end, offs_m,
    MASKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Adds the keys of the tiles [begin, end) of the item to dq [64, D], not yet scaled."""
    KEYS: gl.constexpr = lse.type.layout.parent
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, dq.type.layout, 2)
    if MASKED:
        low, high = load_words(bits_ptr, begin, end, offs_m)  # [64], a tile ahead
    for nth in range(begin, end):
        slot, phase = ring_slot(nth, STAGES)
        mbarrier.wait(ready.index(slot), phase)
        zeros = gl.zeros([BLOCK, BLOCK], gl.float32, KEYS)
        qk = warpgroup_mma(
            q_tile, k_ring.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True
        )  # fmt: skip
        dp = warpgroup_mma(
            do_tile, v_ring.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True
        )  # fmt: skip
        qk = warpgroup_mma_wait(1, deps=[qk])  # [64, 64]
        p = gl.exp2(qk * scale - lse[:, None])
        if MASKED:
            p = gl.where(seen(low, high, KEYS), p, 0.0)
            low, high = load_words(bits_ptr, nth + 1, end, offs_m)
        dp = warpgroup_mma_wait(0, deps=[dp])  # [64, 64]
        ds = gl.convert_layout((p * (dp - delta[:, None])).to(k_ring.dtype), OPERAND)
        dq = warpgroup_mma(ds, k_ring.index(slot), dq, is_async=True)
        dq = warpgroup_mma_wait(0, deps=[dq])  # [64, D]
        mbarrier.arrive(free.index(slot))
    return dq


@gluon.jit
def _consume(
    pointers, tensors, strides, scale, softmax_scale, heads, queries, geometry,
    k_ring, v_ring, q_tile, do_tile, ready, free,
    FIRST: gl.constexpr, OVERLAPS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The queries of the item and their gradients."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    KEYS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 64, 16])
    CHANNELS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    OF_KEYS: gl.constexpr = gl.SliceLayout(1, KEYS)
    partials_ptr, counters_ptr, order_ptr, bits_ptr, items_ptr, needs_ptr = pointers
    q_ptr, o_ptr, lse_ptr, do_ptr, stats_ptr, dq_ptr = tensors
    q_strides, do_strides, dq_strides = strides
    summaries, blocks, first_block, group, items = geometry
    head, _, there, item_ptr, block, begin, end, slot, _, first_masked, num_masked, num_tiles = load_item(
        items_ptr, needs_ptr, heads, group, items, 1
    )
    if there & ((num_tiles > 0) | FIRST):
        b, h = (block // blocks).to(gl.int64), head.to(gl.int64)
        order_ptr += (first_block + block) * BLOCK
        dq_ptr = head_ptr(dq_ptr, dq_strides, b, h)
        row_offs = gl.arange(0, BLOCK, gl.SliceLayout(1, ROWS))
        row_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))[None, :]
        offs_m = gl.arange(0, BLOCK, OF_KEYS)
        row = gl.load(order_ptr + row_offs)  # [64]
        query = gl.maximum(row - summaries, 0)
        do = gl.load(head_ptr(do_ptr, do_strides, b, h) + query[:, None] * do_strides[2] + row_d)  # [64, D]
        q_tile.store(gl.load(head_ptr(q_ptr, q_strides, b, h) + query[:, None] * q_strides[2] + row_d))
        do_tile.store(do)
        fence_async_shared()
        tl.debug_barrier()
        stats_ptr += (b * heads + h) * queries * 2
        o = gl.load(head_ptr(o_ptr, dq_strides, b, h) + query[:, None] * dq_strides[2] + row_d)
        row_delta = gl.sum(o.to(gl.float32) * do.to(gl.float32), 1)  # [64]
        row_lse = gl.load(lse_ptr + (b * heads + h) * queries + query)
        if FIRST:
            keep = (row >= 0) & (begin == 0)
            gl.store(stats_ptr + query * 2, row_lse, mask=keep)
            gl.store(stats_ptr + query * 2 + 1, row_delta, mask=keep)
            let_next_read(OVERLAPS)
        lse, delta = gl.convert_layout(row_lse, OF_KEYS), gl.convert_layout(row_delta, OF_KEYS)

        dq = gl.zeros([BLOCK, D], gl.float32, CHANNELS)
        border = gl.minimum(gl.maximum(num_masked, begin), end) - begin  # masked tiles come first
        bits_ptr += (first_masked + begin) * (2 * BLOCK)
        dq = _add_query_gradient(
            dq, lse, delta, q_tile, do_tile, k_ring, v_ring, ready, free, bits_ptr, scale,
            0, border, offs_m, True, STAGES,
        )  # fmt: skip
        dq = _add_query_gradient(
            dq, lse, delta, q_tile, do_tile, k_ring, v_ring, ready, free, bits_ptr, scale,
            border, end - begin, offs_m, False, STAGES,
        )  # fmt: skip
        dq *= softmax_scale

        offs_c = gl.arange(0, BLOCK, gl.SliceLayout(1, CHANNELS))
        offs_d = gl.arange(0, D, gl.SliceLayout(0, CHANNELS))[None, :]
        wait_at_last(FIRST, OVERLAPS)
        complete = slot < 0
        if slot >= 0:
            partial_ptr = partials_ptr + (slot.to(gl.int64) * heads + h) * (BLOCK * D)
            offs_md = offs_c[:, None] * D + offs_d  # [64, D]
            gl.store(partial_ptr + offs_md, dq)
            first_slot, splits = load_split(item_ptr)
            complete = last_to_arrive(counters_ptr, first_slot, splits, heads, head, 0, 1)
            if complete:
                dq = gl.zeros([BLOCK, D], gl.float32, CHANNELS)
                partial_ptr = partials_ptr + (first_slot.to(gl.int64) * heads + h) * (BLOCK * D)
                for _part in range(0, splits):
                    dq += gl.load(partial_ptr + offs_md, cache_modifier=".cg")
                    partial_ptr += heads * (BLOCK * D)
        if complete:
            if not FIRST:  # add to what the first pass stored
                token = gl.load(order_ptr + offs_c)  # [64]
                dq_offs = gl.maximum(token - summaries, 0)[:, None] * dq_strides[2] + offs_d
                dq += gl.load(dq_ptr + dq_offs).to(gl.float32)
            q_tile.store(dq.to(q_tile.dtype))  # so that a thread stores 16 bytes
            row = gl.load(order_ptr + row_offs)  # [64]
            offs = gl.maximum(row - summaries, 0)[:, None] * dq_strides[2] + row_d
            gl.store(dq_ptr + offs, q_tile.load(ROWS), mask=(row >= 0)[:, None])


@gluon.jit(do_not_specialize=GEOMETRY)
def hopper_query_gradient_kernel(
    q_ptr, k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr, o_ptr, lse_ptr, do_ptr, stats_ptr, dq_ptr,
    partials_ptr, counters_ptr, order_ptr, gathered_ptr, bits_ptr, items_ptr, needs_ptr,
    q_strides, k_s_strides, v_s_strides, k_r_strides, v_r_strides, do_strides, dq_strides,
    scale, softmax_scale, heads, queries, summaries, blocks, first_block, group, items,
    FIRST: gl.constexpr, OVERLAPS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    LAG: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dq of the 64 queries of one work item of one head: see `update_backward.query_gradient_kernel`."""
    start_query_gradient(FIRST, OVERLAPS)
    DTYPE: gl.constexpr = q_ptr.dtype.element_ty
    RING: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, D], DTYPE)
    k_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK, D], RING)
    v_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK, D], RING)
    q_tile = gl.allocate_shared_memory(DTYPE, [BLOCK, D], RING)
    do_tile = gl.allocate_shared_memory(DTYPE, [BLOCK, D], RING)
    ready, free = ring_barriers(1, STAGES)
    # Each reads its item itself: what is passed to warps is passed byte by byte.
    gl.warp_specialize(
        [
            (_consume, (
                (partials_ptr, counters_ptr, order_ptr, bits_ptr, items_ptr, needs_ptr),
                (q_ptr, o_ptr, lse_ptr, do_ptr, stats_ptr, dq_ptr),
                (q_strides, do_strides, dq_strides), scale, softmax_scale, heads, queries,
                (summaries, blocks, first_block, group, items),
                k_ring, v_ring, q_tile, do_tile, ready, free, FIRST, OVERLAPS, D,
                STAGES,
            )),
            (_produce, (
                (gathered_ptr, items_ptr, needs_ptr), (k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr),
                (k_s_strides, v_s_strides, k_r_strides, v_r_strides), heads,
                (summaries, blocks, group, items),
                (k_ring, v_ring), ready, free, FIRST, D, STAGES, LAG,
            )),
        ],
        [WARPS],
        [PRODUCER_REGISTERS],
    )  # fmt: skip
    wait_at_last(FIRST, OVERLAPS)
