"""What the kernels in Gluon share: a ring of buffers in shared memory that one warp group fills for others.

A buffer has two barriers: `ready`, where the producer announces it, and `free`, where whoever read it lets it
go. Both count rounds of the ring, and a wait names the phase of a round.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .tiles import BLOCK, key_pointers

WARPS = gl.constexpr(4)  # of a warp group


@gluon.jit
def ring_slot(nth, STAGES: gl.constexpr):
    """The buffer of the nth tile of a program, and the phase of its barriers."""
    nth = nth.to(gl.uint32)  # a division of what has a sign costs more
    return (nth % STAGES).to(gl.int32), ((nth // STAGES) & 1).to(gl.int32)


@gluon.jit
def ring_barriers(readers, STAGES: gl.constexpr):
    """`ready` and `free` of a ring that so many warp groups read."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=readers)
    return ready, free


@gluon.jit
def announce(ready, nth, STAGES: gl.constexpr, LAG: gl.constexpr):
    """Announces the tile that was copied `LAG` tiles before the nth, when it has arrived.

    Copies write as stores do and WGMMA reads through the asynchronous proxy: all threads of the producer pass
    a fence before one of them announces.
    """
    async_copy.commit_group()
    async_copy.wait_group(LAG)
    fence_async_shared()
    tl.debug_barrier()
    mbarrier.arrive(ready.index(ring_slot(nth + STAGES - LAG, STAGES)[0]), pred=nth >= LAG)


@gluon.jit
def copy_tiles(
    gathered_ptr, tiles, rows, strides, summaries, stats_ptr, rings, ready, free,
    HAS_SUMMARIES: gl.constexpr, STATS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    LAG: gl.constexpr,
):  # fmt: skip
    """Copies the gathered rows of all tiles of a work item into the ring.

    The list is read a tile ahead, so that no copy waits for it.

    Args:
        gathered_ptr: the first of the item's tokens.
        rows, strides, summaries: as `keys`, `key_strides` and `summaries` of `tiles.key_pointers`.
        stats_ptr: with STATS, float32 pairs of each token, whose halves go to rings of their own.
        rings: two of [STAGES, 64, D] for both kinds of rows; with STATS two more of [STAGES, 64].
    """
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    EACH: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    offs_n = gl.arange(0, BLOCK, gl.SliceLayout(1, COPY))
    offs_d = gl.arange(0, D, gl.SliceLayout(0, COPY))[None, :]
    offs = gl.arange(0, BLOCK, EACH)
    last = gl.maximum(tiles - 1, 0)
    token = gl.load(gathered_ptr + offs_n)  # [64]
    if STATS:
        own = gl.load(gathered_ptr + offs)  # [64]: the same, one for each thread
    for nth in range(0, tiles + LAG):
        if nth < tiles:
            ptrs_0, ptrs_1 = key_pointers(token, rows, strides, summaries, HAS_SUMMARIES)  # [64, 1]
            following = gathered_ptr + gl.minimum(nth + 1, last) * BLOCK
            token = gl.load(following + offs_n)
            if STATS:
                stats_ptrs = stats_ptr + own * 2
                own = gl.load(following + offs)
            slot, phase = ring_slot(nth, STAGES)
            mbarrier.wait(free.index(slot), phase ^ 1)  # the first round finds all of it free
            async_copy.async_copy_global_to_shared(rings[0].index(slot), ptrs_0 + offs_d)
            async_copy.async_copy_global_to_shared(rings[1].index(slot), ptrs_1 + offs_d)
            if STATS:
                async_copy.async_copy_global_to_shared(rings[2].index(slot), stats_ptrs)
                async_copy.async_copy_global_to_shared(rings[3].index(slot), stats_ptrs + 1)
        announce(ready, nth, STAGES, LAG)


@gluon.jit
def load_words(bits_ptr, tile, tiles, offs_m):
    """The two words of the mask of a tile, int32 [64] each, if it is below `tiles`; see `tiles.tile_mask`."""
    word_ptrs = bits_ptr + tile * (2 * BLOCK) + offs_m
    there = (offs_m >= 0) & (tile < tiles)
    return gl.load(word_ptrs, mask=there, other=0), gl.load(word_ptrs + BLOCK, mask=there, other=0)


@gluon.jit
def seen(low, high, LAYOUT: gl.constexpr):
    """bool [64, 64] from the words of a tile."""
    offs_n = gl.arange(0, BLOCK, gl.SliceLayout(0, LAYOUT))
    word = gl.where((offs_n < 32)[None, :], low[:, None], high[:, None])
    word = word >> (4 * (offs_n & 6))[None, :]
    return (word & (1 << (4 * (offs_n & 1) + ((offs_n & 31) >> 3)))[None, :]) != 0
