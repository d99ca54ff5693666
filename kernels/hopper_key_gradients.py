"""The gradients of keys and values for Hopper, in Gluon: warps that fetch, and warps that multiply.

The twin of `update_backward.key_gradient_kernel`: the same work items, lists, masks and sums. Its registers
hold two accumulators and two products, so that only two programs run on a multiprocessor, and nothing hides
what each fetches. Here one warp group copies the gathered queries, their output gradients and their
statistics into a ring of buffers, with few registers, and the other multiplies what is there.
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
from .tiles import (
    BLOCK,
    GEOMETRY,
    head_ptr,
    last_to_arrive,
    load_item,
    load_split,
    start_program,
    wait_at_last,
)


@gluon.jit
def _produce(
    pointers, strides, heads, queries, geometry, rings, ready, free,
    D: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr,
):  # fmt: skip
    """Copies the queries of the item, with all that belongs to them, into the ring."""
    q_ptr, do_ptr, stats_ptr, gathered_ptr, items_ptr, needs_ptr = pointers
    q_strides, do_strides = strides
    blocks, group, items = geometry
    head, _, there, _, block, begin, end, _, first, _, _, _ = load_item(
        items_ptr, needs_ptr, heads, group, items, 1
    )
    if there:
        b, h = (block // blocks).to(gl.int64), head.to(gl.int64)
        q_ptr, do_ptr = head_ptr(q_ptr, q_strides, b, h), head_ptr(do_ptr, do_strides, b, h)
        stats_ptr += (b * heads + h) * queries * 2
        rows = q_ptr, do_ptr, q_ptr, do_ptr
        steps = q_strides[2], do_strides[2], q_strides[2], do_strides[2]
        copy_tiles(
            gathered_ptr + (first + begin) * BLOCK, end - begin, rows, steps, 0, stats_ptr, rings, ready,
            free, False, True, D, STAGES, LAG,
        )  # fmt: skip


@gluon.jit
def _add_key_gradients(
    dk, dv, kq, k_tile, v_tile, q_ring, do_ring, lse_ring, delta_ring, ready, free, bits_ptr, scale,
    begin, end, last, offs_m,
    MASKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Adds the queries of the tiles [begin, end) of the item to dk (not yet scaled) and dv, [64, D].

    kq [64, 64] is of tile `begin`, and then of `end`: that of the next tile is multiplied beside the rest of
    this one. After tile `last` it is made again, and not used.
    """
    KEYS: gl.constexpr = kq.type.layout
    COLUMNS: gl.constexpr = gl.SliceLayout(0, KEYS)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    zeros = gl.zeros([BLOCK, BLOCK], gl.float32, KEYS)
    if MASKED:
        low, high = load_words(bits_ptr, begin, end, offs_m)  # [64], a tile ahead
    for nth in range(begin, end):
        slot = ring_slot(nth, STAGES)[0]
        dp = warpgroup_mma(
            v_tile, do_ring.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True
        )  # fmt: skip
        p = gl.exp2(kq * scale - lse_ring.index(slot).load(COLUMNS)[None, :])
        if MASKED:
            p = gl.where(seen(low, high, KEYS), p, 0.0)
            low, high = load_words(bits_ptr, nth + 1, end, offs_m)
        p_operand = gl.convert_layout(p.to(q_ring.dtype), OPERAND)
        following, phase = ring_slot(gl.minimum(nth + 1, last), STAGES)
        mbarrier.wait(ready.index(following), phase)
        kq_next = warpgroup_mma(
            k_tile, q_ring.index(following).permute((1, 0)), zeros, use_acc=False, is_async=True
        )  # fmt: skip
        dv = warpgroup_mma(p_operand, do_ring.index(slot), dv, is_async=True)
        delta = delta_ring.index(slot).load(COLUMNS)  # [64]
        dp = warpgroup_mma_wait(2, deps=[dp])  # [64, 64]
        ds = gl.convert_layout((p * (dp - delta[None, :])).to(q_ring.dtype), OPERAND)
        dk = warpgroup_mma(ds, q_ring.index(slot), dk, is_async=True)
        dk, dv, kq = warpgroup_mma_wait(0, deps=[dk, dv, kq_next])
        mbarrier.arrive(free.index(slot))
    return dk, dv, kq


@gluon.jit
def _consume(
    pointers, key_pointers, strides, scale, softmax_scale, heads, geometry,
    q_ring, do_ring, lse_ring, delta_ring, k_tile, v_tile, ready, free,
    FIRST: gl.constexpr, OVERLAPS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The keys of the item and their gradients."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    KEYS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 64, 16])
    CHANNELS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    OF_CHANNELS: gl.constexpr = gl.SliceLayout(1, CHANNELS)
    partials_ptr, counters_ptr, order_ptr, bits_ptr, items_ptr, needs_ptr = pointers
    k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr, dk_s_ptr, dv_s_ptr, dk_r_ptr, dv_r_ptr = key_pointers
    k_s_strides, v_s_strides, k_r_strides, v_r_strides, dk_s_strides, dk_r_strides = strides
    summaries, blocks, first_block, group, items = geometry
    head, _, there, item_ptr, block, begin, end, slot, _, first_masked, num_masked, num_tiles = load_item(
        items_ptr, needs_ptr, heads, group, items, 1
    )
    if there & ((num_tiles > 0) | FIRST):
        b, h = (block // blocks).to(gl.int64), head.to(gl.int64)
        order_ptr += (first_block + block) * BLOCK
        row_offs = gl.arange(0, BLOCK, gl.SliceLayout(1, ROWS))
        row_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))[None, :]
        k_ptr, v_ptr = head_ptr(k_r_ptr, k_r_strides, b, h), head_ptr(v_r_ptr, v_r_strides, b, h)
        dk_ptr, dv_ptr = head_ptr(dk_r_ptr, dk_r_strides, b, h), head_ptr(dv_r_ptr, dk_r_strides, b, h)
        k_n, v_n, dk_n, others = k_r_strides[2], v_r_strides[2], dk_r_strides[2], summaries
        if FIRST:  # a block is of one stream
            is_summary = gl.load(order_ptr) < summaries
            k_ptr = gl.where(is_summary, head_ptr(k_s_ptr, k_s_strides, b, h), k_ptr)
            v_ptr = gl.where(is_summary, head_ptr(v_s_ptr, v_s_strides, b, h), v_ptr)
            dk_ptr = gl.where(is_summary, head_ptr(dk_s_ptr, dk_s_strides, b, h), dk_ptr)
            dv_ptr = gl.where(is_summary, head_ptr(dv_s_ptr, dk_s_strides, b, h), dv_ptr)
            k_n, v_n = gl.where(is_summary, k_s_strides[2], k_n), gl.where(is_summary, v_s_strides[2], v_n)
            dk_n, others = gl.where(is_summary, dk_s_strides[2], dk_n), gl.where(is_summary, 0, summaries)
        row = gl.maximum(gl.load(order_ptr + row_offs) - others, 0)[:, None]  # [64, 1]
        k_tile.store(gl.load(k_ptr + row * k_n + row_d))
        v_tile.store(gl.load(v_ptr + row * v_n + row_d))
        fence_async_shared()
        tl.debug_barrier()

        dk = gl.zeros([BLOCK, D], gl.float32, CHANNELS)
        dv = gl.zeros([BLOCK, D], gl.float32, CHANNELS)
        border = gl.minimum(gl.maximum(num_masked, begin), end) - begin  # masked tiles come first
        bits_ptr += (first_masked + begin) * (2 * BLOCK)
        offs_m = gl.arange(0, BLOCK, gl.SliceLayout(1, KEYS))
        last = end - begin - 1
        if last >= 0:
            mbarrier.wait(ready.index(0), 0)
            kq = warpgroup_mma(
                k_tile, q_ring.index(0).permute((1, 0)), gl.zeros([BLOCK, BLOCK], gl.float32, KEYS),
                use_acc=False, is_async=True,
            )  # fmt: skip
            kq = warpgroup_mma_wait(0, deps=[kq])
            dk, dv, kq = _add_key_gradients(
                dk, dv, kq, k_tile, v_tile, q_ring, do_ring, lse_ring, delta_ring, ready, free, bits_ptr,
                scale, 0, border, last, offs_m, True, STAGES,
            )  # fmt: skip
            dk, dv, kq = _add_key_gradients(
                dk, dv, kq, k_tile, v_tile, q_ring, do_ring, lse_ring, delta_ring, ready, free, bits_ptr,
                scale, border, end - begin, last, offs_m, False, STAGES,
            )  # fmt: skip
        dk *= softmax_scale

        offs_m = gl.arange(0, BLOCK, OF_CHANNELS)
        offs_d = gl.arange(0, D, gl.SliceLayout(0, CHANNELS))[None, :]
        wait_at_last(False, OVERLAPS)
        complete = slot < 0
        if slot >= 0:
            partial_ptr = partials_ptr + (slot.to(gl.int64) * heads + h) * (2 * BLOCK * D)
            offs_md = offs_m[:, None] * D + offs_d  # [64, D]
            gl.store(partial_ptr + offs_md, dk)
            gl.store(partial_ptr + BLOCK * D + offs_md, dv)
            first_slot, splits = load_split(item_ptr)
            complete = last_to_arrive(counters_ptr, first_slot, splits, heads, head, 0, 1)
            if complete:
                dk = gl.zeros([BLOCK, D], gl.float32, CHANNELS)
                dv = gl.zeros([BLOCK, D], gl.float32, CHANNELS)
                partial_ptr = partials_ptr + (first_slot.to(gl.int64) * heads + h) * (2 * BLOCK * D)
                for _part in range(0, splits):
                    dk += gl.load(partial_ptr + offs_md, cache_modifier=".cg")
                    dv += gl.load(partial_ptr + BLOCK * D + offs_md, cache_modifier=".cg")
                    partial_ptr += heads * (2 * BLOCK * D)
        if complete:
            if not FIRST:  # add to what the first pass stored
                key = gl.load(order_ptr + offs_m)[:, None]  # [64, 1]
                offs = gl.maximum(key - others, 0) * dk_n + offs_d
                dk += gl.load(dk_ptr + offs, mask=key >= 0, other=0).to(gl.float32)
                dv += gl.load(dv_ptr + offs, mask=key >= 0, other=0).to(gl.float32)
            k_tile.store(dk.to(k_tile.dtype))  # so that a thread stores 16 bytes
            v_tile.store(dv.to(v_tile.dtype))
            row = gl.load(order_ptr + row_offs)[:, None]  # [64, 1]
            offs = gl.maximum(row - others, 0) * dk_n + row_d
            gl.store(dk_ptr + offs, k_tile.load(ROWS), mask=row >= 0)
            gl.store(dv_ptr + offs, v_tile.load(ROWS), mask=row >= 0)


@gluon.jit(do_not_specialize=GEOMETRY)
def hopper_key_gradient_kernel(
    q_ptr, k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr, do_ptr, stats_ptr,
    dk_s_ptr, dv_s_ptr, dk_r_ptr, dv_r_ptr, partials_ptr, counters_ptr,
    order_ptr, gathered_ptr, bits_ptr, items_ptr, needs_ptr,
    q_strides, k_s_strides, v_s_strides, k_r_strides, v_r_strides, do_strides, dk_s_strides, dk_r_strides,
    scale, softmax_scale, heads, queries, summaries, blocks, first_block, group, items,
    FIRST: gl.constexpr, OVERLAPS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    LAG: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dk and dv of the 64 keys of one work item of one head: see `update_backward.key_gradient_kernel`."""
    start_program(False, OVERLAPS)
    DTYPE: gl.constexpr = q_ptr.dtype.element_ty
    RING: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, D], DTYPE)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK, D], RING)
    do_ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK, D], RING)
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], PLAIN)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], PLAIN)
    k_tile = gl.allocate_shared_memory(DTYPE, [BLOCK, D], RING)
    v_tile = gl.allocate_shared_memory(DTYPE, [BLOCK, D], RING)
    ready, free = ring_barriers(1, STAGES)
    # Each reads its item itself: what is passed to warps is passed byte by byte.
    gl.warp_specialize(
        [
            (_consume, (
                (partials_ptr, counters_ptr, order_ptr, bits_ptr, items_ptr, needs_ptr),
                (k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr, dk_s_ptr, dv_s_ptr, dk_r_ptr, dv_r_ptr),
                (k_s_strides, v_s_strides, k_r_strides, v_r_strides, dk_s_strides, dk_r_strides),
                scale, softmax_scale, heads,
                (summaries, blocks, first_block, group, items),
                q_ring, do_ring, lse_ring, delta_ring, k_tile, v_tile, ready, free, FIRST, OVERLAPS, D,
                STAGES,
            )),
            (_produce, (
                (q_ptr, do_ptr, stats_ptr, gathered_ptr, items_ptr, needs_ptr),
                (q_strides, do_strides), heads, queries, (blocks, group, items),
                (q_ring, do_ring, lse_ring, delta_ring), ready, free, D, STAGES, LAG,
            )),
        ],
        [WARPS],
        [PRODUCER_REGISTERS],
    )  # fmt: skip
    wait_at_last(False, OVERLAPS)
