"""The same-instrument forward for Hopper, in Gluon: warps that fetch, and warps that multiply.

It computes what `update_forward` does, its twin, from the same lists and masks. A program takes a pair of
neighbouring blocks of one head. One warp group, the producer, reads the lists and copies keys and values into
a ring of buffers in shared memory; two others, the consumers, take a block each and multiply by WGMMA.
Neighbouring blocks of the same-instrument pass see much the same keys: their lists of full tiles begin alike,
and the tiles that both have are fetched once for 128 queries.

A block takes its full tiles first, then its masked ones: its *turns*. The tiles of a pair make one sequence
of *places*: the `shared` turns that both blocks begin with, then those of either block alone, alternately,
until the longer is left. The ring is filled in the order of places, so that producer and consumers know
without asking which tile is where.

Of a place that one block has alone, the producer frees the buffer in the name of the other. A consumer skips
at most one place at a time, fewer than the ring holds, so that no phase of a barrier passes unseen.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_ring import WARPS, announce, load_words, ring_barriers, ring_slot, seen
from .tiles import (
    BLOCK,
    GEOMETRY,
    ITEM_COUNTS,
    ITEM_LISTS,
    ITEM_SIZE,
    LOWEST,
    head_ptr,
    key_pointers,
    keys_of_head,
    last_to_arrive,
    merge,
    start_program,
    wait_at_last,
)


@gluon.jit
def _place(turn, which, shared, alternating):
    """Where a turn of block `which` (0 or 1) stands; the blocks alternate in `alternating` turns of each."""
    alone = turn - shared
    after = gl.where(alone < alternating, 2 * alone + which, alone + alternating)
    return gl.where(alone < 0, turn, shared + after)


@gluon.jit
def _turns_before(place, which, shared, alternating, turns):
    """How many of its `turns` turns block `which` has before a place."""
    after = gl.maximum(place - shared, 0)
    alone = gl.where(after <= 2 * alternating, (after + 1 - which) // 2, after - alternating)
    return gl.minimum(gl.minimum(place, shared) + alone, turns)


@gluon.jit
def _load_pair(items_ptr, needs_ptr, group, items, index):
    """What the warps of a program have in common: pair `index`, if it is there, see `plan_pairs.pair_kernel`.

    turns_1 is 0 if the first block stands alone.
    """
    there = index < gl.load(needs_ptr + ITEM_COUNTS + group)
    pair_ptr = items_ptr + (group * items + index) * ITEM_SIZE
    block, begin, end = gl.load(pair_ptr), gl.load(pair_ptr + 1), gl.load(pair_ptr + 2)
    shared, list_0 = gl.load(pair_ptr + 6), pair_ptr + ITEM_LISTS
    list_1 = list_0 + 4
    turns_0, turns_1 = gl.load(list_0 + 3), gl.load(list_1 + 3)
    return there, pair_ptr, block, begin, end, shared, list_0, list_1, turns_0, turns_1


@gluon.jit
def _tile_at(place, shared, alternating, first_0, masked_0, turns_0, first_1, masked_1, turns_1):
    """The tile of `gathered` at a place."""
    after = place - shared
    second = gl.where(after < 2 * alternating, (after & 1) != 0, turns_1 > turns_0) & (after >= 0)
    alone = gl.where(after < 2 * alternating, after >> 1, after - alternating)
    turn = gl.where(after < 0, place, shared + alone)
    first, masked = gl.where(second, first_1, first_0), gl.where(second, masked_1, masked_0)
    full = gl.where(second, turns_1, turns_0) - masked
    return first + gl.where(turn < full, masked + turn, turn - full)


@gluon.jit
def _produce(
    keys, strides, gathered_ptr, items_ptr, needs_ptr, heads, geometry, k_ring, v_ring, ready, free,
    D: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr,
):  # fmt: skip
    """Copies keys and values of all places into the ring, a tile each.

    The list is read a place ahead, so that no copy waits for it.
    """
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    offs_n = gl.arange(0, BLOCK, gl.SliceLayout(1, COPY))
    offs_d = gl.arange(0, D, gl.SliceLayout(0, COPY))
    summaries, blocks, _, group, items = geometry
    there, _, block, begin, end, shared, list_0, list_1, turns_0, turns_1 = _load_pair(
        items_ptr, needs_ptr, group, items, gl.program_id(0) // heads
    )
    first_0, masked_0, first_1, masked_1 = (
        gl.load(list_0), gl.load(list_0 + 2), gl.load(list_1), gl.load(list_1 + 2)
    )  # fmt: skip
    if there:
        alternating = gl.minimum(turns_0, turns_1) - shared
        b, h = (block // blocks).to(gl.int64), (gl.program_id(0) % heads).to(gl.int64)
        keys, key_strides = keys_of_head(keys, strides, b, h)
        tile = _tile_at(begin, shared, alternating, first_0, masked_0, turns_0, first_1, masked_1, turns_1)
        token = gl.load(gathered_ptr + tile * BLOCK + offs_n)  # [64]
        for place in range(begin, end + LAG):
            nth = place - begin
            if place < end:
                k_ptrs, v_ptrs = key_pointers(token, keys, key_strides, summaries, False)  # [64, 1]
                following = gl.minimum(place + 1, end - 1)
                tile = _tile_at(
                    following, shared, alternating, first_0, masked_0, turns_0, first_1, masked_1, turns_1
                )
                token = gl.load(gathered_ptr + tile * BLOCK + offs_n)
                slot, phase = ring_slot(nth, STAGES)
                mbarrier.wait(free.index(slot), phase ^ 1)  # the first round finds all of it free
                async_copy.async_copy_global_to_shared(k_ring.index(slot), k_ptrs + offs_d[None, :])
                async_copy.async_copy_global_to_shared(v_ring.index(slot), v_ptrs + offs_d[None, :])
                mbarrier.arrive(free.index(slot), pred=place >= shared)
            announce(ready, nth, STAGES, LAG)


@gluon.jit
def _attend(
    acc, m_i, l_i, q_tile, k_ring, v_ring, ready, free, bits_ptr, scale, turns, end, which, begin,
    shared, alternating, offs_m,
    MASKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Takes the turns [turns, end) of a block into acc [64, D], m_i [64] and l_i [64]."""
    KEYS: gl.constexpr = m_i.type.layout.parent
    CHANNELS: gl.constexpr = acc.type.layout
    if MASKED:
        low, high = load_words(bits_ptr, 0, end - turns, offs_m)  # [64], a turn ahead
    for turn in range(turns, end):
        slot, phase = ring_slot(_place(turn, which, shared, alternating) - begin, STAGES)
        mbarrier.wait(ready.index(slot), phase)
        qk = warpgroup_mma(
            q_tile, k_ring.index(slot).permute((1, 0)), gl.zeros([BLOCK, BLOCK], gl.float32, KEYS),
            use_acc=False, is_async=True,
        )  # fmt: skip
        qk = warpgroup_mma_wait(0, deps=[qk])  # [64, 64]
        if MASKED:
            qk = gl.where(seen(low, high, KEYS), qk, float("-inf"))
            low, high = load_words(bits_ptr, turn - turns + 1, end - turns, offs_m)
        m_new = gl.maximum(m_i, gl.max(qk, 1) * scale)  # [64]
        p = gl.exp2(qk * scale - m_new[:, None])  # [64, 64]
        alpha = gl.exp2(m_i - m_new)
        l_i = l_i * alpha + gl.sum(p, 1)
        m_i = m_new
        acc *= gl.convert_layout(alpha, gl.SliceLayout(1, CHANNELS), assert_trivial=True)[:, None]
        p = gl.convert_layout(p.to(v_ring.dtype), gl.DotOperandLayout(0, CHANNELS, 2))
        acc = warpgroup_mma(p, v_ring.index(slot), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])  # [64, D]
        mbarrier.arrive(free.index(slot))
    return acc, m_i, l_i


@gluon.jit
def _consume(
    which, pointers, strides, scale, heads, queries, geometry, k_ring, v_ring, q_tile, ready, free,
    OVERLAPS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The part of block `which` of a pair: its queries, its turns among the places, its results."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    KEYS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 64, 16])
    CHANNELS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    OF_KEYS: gl.constexpr = gl.SliceLayout(1, KEYS)
    OF_CHANNELS: gl.constexpr = gl.SliceLayout(1, CHANNELS)
    q_ptr, o_ptr, lse_ptr, partials_ptr, counters_ptr, order_ptr, bits_ptr, items_ptr, needs_ptr = pointers
    q_strides, o_strides = strides
    summaries, blocks, first_block, group, items = geometry
    there, pair_ptr, block, begin, end, shared, list_0, list_1, turns_0, turns_1 = _load_pair(
        items_ptr, needs_ptr, group, items, gl.program_id(0) // heads
    )
    alternating = gl.minimum(turns_0, turns_1) - shared
    turns, list_ptr = gl.where(which == 0, turns_0, turns_1), gl.where(which == 0, list_0, list_1)
    if there & (turns > 0):
        b, h = (block // blocks).to(gl.int64), (gl.program_id(0) % heads).to(gl.int64)
        order_ptr += (first_block + block + which) * BLOCK
        row_offs = gl.arange(0, BLOCK, gl.SliceLayout(1, ROWS))
        row_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))[None, :]
        row = gl.maximum(gl.load(order_ptr + row_offs) - summaries, 0)[:, None]  # [64, 1]
        q_tile.store(gl.load(head_ptr(q_ptr, q_strides, b, h) + row * q_strides[2] + row_d))
        fence_async_shared()
        tl.debug_barrier()

        offs_m = gl.arange(0, BLOCK, OF_KEYS)
        acc = gl.zeros([BLOCK, D], gl.float32, CHANNELS)
        m_i = gl.full([BLOCK], LOWEST, gl.float32, OF_KEYS)
        l_i = gl.zeros([BLOCK], gl.float32, OF_KEYS)
        full = turns - gl.load(list_ptr + 2)
        first_turn = _turns_before(begin, which, shared, alternating, turns)
        last_turn = _turns_before(end, which, shared, alternating, turns)
        border = gl.minimum(gl.maximum(full, first_turn), last_turn)
        acc, m_i, l_i = _attend(
            acc, m_i, l_i, q_tile, k_ring, v_ring, ready, free, bits_ptr, scale,
            first_turn, border, which, begin, shared, alternating, offs_m, False, STAGES,
        )  # fmt: skip
        bits_ptr += (gl.load(list_ptr + 1) + border - full) * (2 * BLOCK)
        acc, m_i, l_i = _attend(
            acc, m_i, l_i, q_tile, k_ring, v_ring, ready, free, bits_ptr, scale,
            border, last_turn, which, begin, shared, alternating, offs_m, True, STAGES,
        )  # fmt: skip

        m_i = gl.convert_layout(m_i, OF_CHANNELS, assert_trivial=True)
        l_i = gl.convert_layout(l_i, OF_CHANNELS, assert_trivial=True)
        offs_m = gl.arange(0, BLOCK, OF_CHANNELS)
        offs_d = gl.arange(0, D, gl.SliceLayout(0, CHANNELS))
        wait_at_last(False, OVERLAPS)
        slot = gl.load(pair_ptr + 3)
        complete = slot < 0
        if slot >= 0:
            size = BLOCK * (D + 2)
            partial_ptr = partials_ptr + ((slot.to(gl.int64) * heads + h) * 2 + which) * size
            offs_md = offs_m[:, None] * D + offs_d[None, :]  # [64, D]
            gl.store(partial_ptr + offs_md, acc)
            gl.store(partial_ptr + BLOCK * D + offs_m, m_i)
            gl.store(partial_ptr + BLOCK * D + BLOCK + offs_m, l_i)
            first_slot, splits = gl.load(pair_ptr + 4), gl.load(pair_ptr + 5)
            head = gl.program_id(0) % heads
            complete = last_to_arrive(counters_ptr, first_slot, splits, heads, head, which, 2)
            if complete:
                acc = gl.zeros([BLOCK, D], gl.float32, CHANNELS)
                m_i = gl.full([BLOCK], LOWEST, gl.float32, OF_CHANNELS)
                l_i = gl.zeros([BLOCK], gl.float32, OF_CHANNELS)
                partial_ptr = partials_ptr + ((first_slot.to(gl.int64) * heads + h) * 2 + which) * size
                for _ in range(0, splits):
                    m_part = gl.load(partial_ptr + BLOCK * D + offs_m, cache_modifier=".cg")  # [64]
                    l_part = gl.load(partial_ptr + BLOCK * D + BLOCK + offs_m, cache_modifier=".cg")
                    acc_part = gl.load(partial_ptr + offs_md, cache_modifier=".cg")  # [64, D]
                    acc, m_i, l_i = merge(acc, m_i, l_i, acc_part, m_part, l_part)
                    partial_ptr += heads * (2 * size)
        if complete:
            o_ptr = head_ptr(o_ptr, o_strides, b, h)
            lse_ptr += (b * heads + h) * queries
            query = gl.load(order_ptr + offs_m)  # [64]
            m_mask = query >= 0
            query = gl.maximum(query - summaries, 0)
            # What the first pass left, as if its keys had just been taken.
            lse = gl.load(lse_ptr + query)
            acc_part = gl.load(o_ptr + query[:, None] * o_strides[2] + offs_d[None, :]).to(gl.float32)
            l_part = gl.where(lse == float("-inf"), 0.0, 1.0)
            acc, m_i, l_i = merge(acc, m_i, l_i, acc_part, gl.maximum(lse, LOWEST), l_part)
            fully_masked = l_i == 0
            l_i = gl.where(fully_masked, 1.0, l_i)
            q_tile.store((acc * (1 / l_i)[:, None]).to(q_tile.dtype))
            lse = gl.where(fully_masked, float("-inf"), m_i + gl.log2(l_i))
            gl.store(lse_ptr + query, lse, mask=m_mask)
            o = q_tile.load(ROWS)  # so that a thread stores 16 bytes
            row = gl.load(order_ptr + row_offs)[:, None]  # [64, 1]
            gl.store(o_ptr + gl.maximum(row - summaries, 0) * o_strides[2] + row_d, o, mask=row >= 0)


@gluon.jit(do_not_specialize=GEOMETRY)
def hopper_forward_kernel(
    q_ptr, k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr, o_ptr, lse_ptr, partials_ptr, counters_ptr,
    order_ptr, gathered_ptr, bits_ptr, items_ptr, needs_ptr,
    q_strides, k_s_strides, v_s_strides, k_r_strides, v_r_strides, o_strides,
    scale, heads, queries, summaries, blocks, first_block, group, items,
    OVERLAPS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Two blocks of 64 queries of one head, an item of `plan_pairs`; arguments and results are those of
    `update_forward.forward_kernel`. Of a pair that is split, `partials` holds both blocks in turn.
    """
    start_program(False, OVERLAPS)
    RING: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, D], q_ptr.dtype.element_ty)
    k_ring = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [STAGES, BLOCK, D], RING)
    v_ring = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [STAGES, BLOCK, D], RING)
    q_tiles = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [2, BLOCK, D], RING)
    ready, free = ring_barriers(2, STAGES)
    # Each reads what it needs of the pair itself: what is passed to warps is passed byte by byte.
    pointers = (
        q_ptr, o_ptr, lse_ptr, partials_ptr, counters_ptr, order_ptr, bits_ptr, items_ptr, needs_ptr
    )  # fmt: skip
    strides = q_strides, o_strides
    geometry = summaries, blocks, first_block, group, items
    key_strides = k_s_strides, v_s_strides, k_r_strides, v_r_strides
    gl.warp_specialize(
        [
            (_consume, (
                0, pointers, strides, scale, heads, queries, geometry,
                k_ring, v_ring, q_tiles.index(0), ready, free, OVERLAPS, D, STAGES,
            )),
            (_consume, (
                1, pointers, strides, scale, heads, queries, geometry,
                k_ring, v_ring, q_tiles.index(1), ready, free, OVERLAPS, D, STAGES,
            )),
            (_produce, (
                (k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr), key_strides, gathered_ptr, items_ptr, needs_ptr,
                heads, geometry, k_ring, v_ring, ready, free, D, STAGES, LAG,
            )),
        ],
        [WARPS, WARPS],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
    wait_at_last(False, OVERLAPS)
