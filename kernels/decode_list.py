"""The Triton kernel by which a decoding step finds the places that a song's next token sees.

A song's tokens and summaries lie along one axis of places: `room` tokens, the summaries of `bars` bars as
other summaries see them, the same as tokens see them, and one that no song has. Which are visible changes
little from token to token: all tokens of an instrument in a bar see the same, and one another. So each song
has a list of places: it is made anew where such a group begins, and otherwise gets one place more.
"""

import triton
import triton.language as tl

from .decode_products import READS, SUMMARIZES, begin
from .structure import NO_INSTRUMENT, Kind

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
    s = tl.program_id(0)
    # Of the step before, which has ended: its `draw` has waited before it let `read` start.
    group_of_list, count_of_list = tl.load(group_ptr + s), tl.load(count_ptr + s).to(tl.int32)
    begin(OVERLAPS)
    mode = tl.load(mode_ptr + s)
    places = room + 2 * bars + 1
    list_ptr += s.to(tl.int64) * places
    history = s.to(tl.int64) * (room + 1)
    position, bar, inst = tl.load(position_ptr + s), tl.load(own_bar_ptr + s), tl.load(own_inst_ptr + s)
    if mode == _READS:
        group = bar * 0 if ALL else bar * (_NO_INSTRUMENT + 1) + inst
        if group_of_list == group:
            tl.store(list_ptr + count_of_list, position.to(tl.int32))
            tl.store(count_ptr + s, (count_of_list + 1).to(tl.int64))
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
