"""What a program of the draw kernel does of `SlotCopies`, for its slot."""

import triton
import triton.language as tl

from ..steering import BARS_BACK
from . import tables as t

COPIES = ("holds", "size", "begin", *(f"alike_{number}" for number in range(BARS_BACK)))
_HOLDS, _SIZE, _BEGIN, _ALIKE = map(tl.constexpr, range(4))
_BARS_BACK = tl.constexpr(BARS_BACK)
_CHORD, _INST, _T, _P, _L, _V = map(tl.constexpr, (t.CHORD, t.INST, t.T, t.P, t.L, t.V))


@triton.jit
def held_back(logits, copies_ptr, log_ptr, more_ptr, penalty, slots, family, number):
    """`SlotCopies.held_back`, of logits [BLOCK] of the ids `number`; log, more: of the slot."""
    size, begin = tl.load(copies_ptr + _SIZE * slots), tl.load(copies_ptr + _BEGIN * slots)
    at = size - begin
    if (begin >= 0) & (at > 0):
        so_far = tl.load(more_ptr + size - 1)
        more = (family == _L) | (family == _V)
        leaves = ~(more | (family == _T) | (family == _P))
        for i in tl.static_range(_BARS_BACK):
            alike = tl.load(copies_ptr + (_ALIKE + i) * slots)
            if alike >= 0:
                token = tl.load(log_ptr + alike + at)
                states_more = tl.load(more_ptr + alike + at - 1) > so_far
                held = tl.where(token == 0, leaves, number == token) | (more & ~states_more)
                logits -= tl.where(held, penalty, 0.0)
    return logits


@triton.jit
def push(copies_ptr, log_ptr, more_ptr, starts_ptr, slots, family, value, token):
    """`SlotCopies.push` of a token of `family`."""
    if tl.load(copies_ptr + _HOLDS * slots) > 0:
        size, begin = tl.load(copies_ptr + _SIZE * slots), tl.load(copies_ptr + _BEGIN * slots)
        inst, note, more = family == _INST, (family == _T) | (family == _P), (family == _L) | (family == _V)
        i = tl.arange(0, _BARS_BACK)
        alike = tl.load(copies_ptr + (_ALIKE + i) * slots)
        goes_on = tl.load(log_ptr + alike + (size - begin), mask=(alike >= 0) & note, other=-1)
        row = starts_ptr + tl.where(inst, value, 0) * _BARS_BACK + i
        starts = tl.load(row)
        later = tl.where(i < _BARS_BACK - 1, tl.load(row + 1, mask=i < _BARS_BACK - 1, other=0), size + 1)
        last = more_ptr + tl.maximum(size - 1, 0)
        count = tl.load(last)
        tl.debug_barrier()  # all has been loaded, by every warp
        alike = tl.where(note & (goes_on != token), -1, alike)
        alike = tl.where(inst, starts, tl.where(family == _CHORD, -1, alike))
        tl.store(copies_ptr + (_ALIKE + i) * slots, alike)
        if inst:
            tl.store(row, later)
        if more:
            tl.store(last, count + 1)
        if inst | note:
            tl.store(log_ptr + size, tl.where(inst, 0, token).to(tl.int32))
            tl.store(more_ptr + size, tl.zeros([], tl.int32))
            tl.store(copies_ptr + _SIZE * slots, size + 1)
        if inst | (family == _CHORD):
            tl.store(copies_ptr + _BEGIN * slots, tl.where(inst, size + 1, -1))
