"""The Triton kernels by which a decoding step finds the places that a song's next token sees, and reads them.

A song's tokens and summaries lie along one axis of places: `room` tokens, the summaries of `bars` bars as
other summaries see them, the same as tokens see them, and one that no song has. Which are visible changes
little from token to token: all tokens of an instrument in a bar see the same, and one another. So each song
has a list of places: it is made anew where such a group begins, and otherwise gets one place more.
"""

import triton
import triton.language as tl

from .decode_products import READS, SUMMARIZES, begin
from .structure import NO_INSTRUMENT, Kind
from .tiles import LOWEST

_READS, _SUMMARIZES = tl.constexpr(READS), tl.constexpr(SUMMARIZES)
_NO_INSTRUMENT, _STRUCTURAL = tl.constexpr(NO_INSTRUMENT), tl.constexpr(int(Kind.STRUCTURAL))


@triton.jit
def _append(list_ptr, count, place, seen):
    """Stores those of `place` [BLOCK] that are `seen` behind `count` others; returns how many these are."""
    here = seen.to(tl.int32)
    tl.store(list_ptr + count + tl.cumsum(here, 0) - here, place, mask=seen)
    return count + tl.sum(here, 0)


@triton.jit
def list_kernel(
    bar_ptr, inst_ptr, kind_ptr, mode_ptr, position_ptr, own_bar_ptr, own_inst_ptr, group_ptr, list_ptr,
    count_ptr, room, bars, NEAR: tl.constexpr, ALL: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Brings list [S, places] and count [S] up to date for what each song reads or summarizes.

    bar, inst, kind: int32 [S, room + 1] of the tokens. mode, position, own_bar, own_inst: int64 [S], of the
    song's last token; own_bar is the bar that is summarized. group: int64 [S], what the list was made for.
    Bit d of NEAR: whether a token sees all of the bar d bars before. ALL: it sees all before it, and there
    are no summaries.
    """
    begin(OVERLAPS)
    s = tl.program_id(0)
    mode = tl.load(mode_ptr + s)
    places = room + 2 * bars + 1
    list_ptr += s.to(tl.int64) * places
    history = s.to(tl.int64) * (room + 1)
    position, bar, inst = tl.load(position_ptr + s), tl.load(own_bar_ptr + s), tl.load(own_inst_ptr + s)
    if mode == _READS:
        group = bar * 0 if ALL else bar * (_NO_INSTRUMENT + 1) + inst
        if tl.load(group_ptr + s) == group:
            count = tl.load(count_ptr + s).to(tl.int32)
            tl.store(list_ptr + count, position.to(tl.int32))
            tl.store(count_ptr + s, count + 1)
        else:
            count = tl.zeros([], tl.int32)
            if not ALL:
                for first in range(0, bar, BLOCK):
                    number = first + tl.arange(0, BLOCK)
                    count = _append(list_ptr, count, room + bars + number, number < bar)
            for first in range(0, position + 1, BLOCK):
                at = first + tl.arange(0, BLOCK)
                read = at <= position
                of_bar = tl.load(bar_ptr + history + at, mask=read, other=0)
                of_inst = tl.load(inst_ptr + history + at, mask=read, other=0)
                kind = tl.load(kind_ptr + history + at, mask=read, other=0)
                seen = (of_inst == inst) | (of_inst == _NO_INSTRUMENT) & (kind == _STRUCTURAL)
                distance = (bar - of_bar).to(tl.int32)
                near = (NEAR >> tl.minimum(distance, 31)) & 1
                seen = seen | (near == 1) & (distance < 31)
                if ALL:
                    seen = read
                count = _append(list_ptr, count, at, seen & read)
            tl.store(count_ptr + s, count)
            tl.store(group_ptr + s, group)
    elif mode == _SUMMARIZES:
        count = tl.zeros([], tl.int32)
        for first in range(0, bar + 1, BLOCK):
            number = first + tl.arange(0, BLOCK)
            count = _append(list_ptr, count, room + number, number <= bar)
        for first in range(0, position + 1, BLOCK):
            at = first + tl.arange(0, BLOCK)
            of_bar = tl.load(bar_ptr + history + at, mask=at <= position, other=-1)
            count = _append(list_ptr, count, at, of_bar == bar)
        tl.store(count_ptr + s, count)
        tl.store(group_ptr + s, tl.full([], -1, tl.int64))
    else:
        tl.store(count_ptr + s, tl.zeros([], tl.int32))
        tl.store(group_ptr + s, tl.full([], -1, tl.int64))


@triton.jit
def attend_kernel(
    q_ptr, keys_ptr, list_ptr, count_ptr, out_ptr, o_ptr, peak_ptr, sum_ptr, done_ptr, slots, places, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """out [S, HEADS, DIM]: attention of q, of the same shape, to the places of each song's list; or 0.

    keys: [2, slots, places, HEADS, DIM] of a layer. A program takes GROUP heads, whose keys lie side by side,
    and every SPLITS-th block of the list. Each line of its tile keeps a softmax of its own; they are joined
    behind the loop, so that nothing in it waits for other warps. If there are parts, each leaves its best
    score in peak, and the sums of exp2(score - peak), alone and times the values, in sum and o:
    [S, HEADS, SPLITS(, DIM)], float32. The program that is the last of its song and heads to be done joins
    them, in the order of the parts. done: int32 [S, HEADS], zeros before and after. scale makes scores of
    base 2.
    """
    begin(OVERLAPS)
    s, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    channel, head = tl.arange(0, DIM), tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    row = s * HEADS + head  # [GROUP]
    count = tl.load(count_ptr + s).to(tl.int32)
    q = tl.load(q_ptr + row[:, None] * DIM + channel[None, :]).to(tl.float32) * scale  # [GROUP, DIM]
    offs_hd = head[:, None] * DIM + channel[None, :]  # [GROUP, DIM]
    values_ptr = keys_ptr + tl.full([], 1, tl.int64) * slots * places * HEADS * DIM
    peak = tl.full([BLOCK, GROUP], LOWEST, tl.float32)
    total = tl.zeros([BLOCK, GROUP], tl.float32)
    o = tl.zeros([BLOCK, GROUP, DIM], tl.float32)
    for first in tl.range(split * BLOCK, count, SPLITS * BLOCK, num_stages=2):
        at = first + tl.arange(0, BLOCK)
        mask = at < count  # [BLOCK]
        place = tl.load(list_ptr + s * places + at, mask=mask, other=0)
        # [BLOCK, GROUP, DIM], as k, v and o are
        offs = ((s * places + place) * HEADS * DIM)[:, None, None] + offs_hd[None, :, :]
        k = tl.load(keys_ptr + offs, mask=mask[:, None, None], other=0).to(tl.float32)
        v = tl.load(values_ptr + offs, mask=mask[:, None, None], other=0).to(tl.float32)
        score = tl.where(mask[:, None], tl.sum(k * q[None, :, :], 2), float("-inf"))  # [BLOCK, GROUP]
        new_peak = tl.maximum(peak, score)
        weight, kept = tl.exp2(score - new_peak), tl.exp2(peak - new_peak)
        total = total * kept + weight
        o = o * kept[:, :, None] + v * weight[:, :, None]
        peak = new_peak
    highest = tl.max(peak, 0)  # [GROUP]
    weight = tl.exp2(peak - highest[None, :])
    total = tl.sum(total * weight, 0)
    o = tl.sum(o * weight[:, :, None], 0)  # [GROUP, DIM]
    out_ptrs = out_ptr + row[:, None] * DIM + channel[None, :]
    if SPLITS == 1:
        o = o / tl.where(total > 0, total, 1)[:, None]
        tl.store(out_ptrs, o.to(out_ptr.dtype.element_ty))
    else:
        part = row * SPLITS + split  # [GROUP]
        tl.store(o_ptr + part[:, None] * DIM + channel[None, :], o)
        tl.store(peak_ptr + part, highest)
        tl.store(sum_ptr + part, total)
        tl.debug_barrier()  # all threads have stored before one of them says so
        done_ptr += s * HEADS + tl.program_id(1) * GROUP
        if tl.atomic_add(done_ptr, 1, sem="acq_rel") == SPLITS - 1:
            parts = row[None, :] * SPLITS + tl.arange(0, SPLITS)[:, None]  # [SPLITS, GROUP]
            peaks = tl.load(peak_ptr + parts, cache_modifier=".cg")
            weights = tl.exp2(peaks - tl.max(peaks, 0)[None, :])
            totals = tl.sum(weights * tl.load(sum_ptr + parts, cache_modifier=".cg"), 0)  # [GROUP]
            values = tl.load(o_ptr + parts[:, :, None] * DIM + channel[None, None, :], cache_modifier=".cg")
            o = tl.sum(values * weights[:, :, None], 0) / tl.where(totals > 0, totals, 1)[:, None]
            tl.store(out_ptrs, o.to(out_ptr.dtype.element_ty))
            tl.store(done_ptr, 0)
