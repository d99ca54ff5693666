"""The Triton kernel of the first part of a step: each slot's last token becomes a row that the layers read.

One program a slot does what `Step`, `SlotReader.push` and `FusedForward` do for it until the first layer. It
loads the state before it stores any of it; what it has just written, it knows.
"""

import triton
import triton.language as tl

from ...kernels.decode_products import READS, SUMMARIZES, begin
from ...kernels.structure import NO_INSTRUMENT
from ...model.inputs import BAR_ENDS
from ...tokens import vocab
from ...tokens.attributes import STRUCTURAL
from . import tables as t

# Rows of the integers of `SlotReader` and `Step`, and of `tables.Tables.of_id`.
READER = ("position", "bars", "inst", "onsets", "head", "onset", "length", "velocity")
STEP = ("pending", "complete", "full", "queued", "next", "room", "bar_room")
_POSITION, _BARS, _INST, _ONSETS, _HEAD, _ONSET, _LENGTH, _VELOCITY = map(tl.constexpr, range(len(READER)))
_PENDING, _COMPLETE, _FULL = map(tl.constexpr, range(3))
_FAMILY, _VALUE, _KIND, _SWITCH = map(tl.constexpr, range(4))
_OF_CHORD, _OF_INST, _OF_T, _OF_L, _OF_V = map(tl.constexpr, (t.CHORD, t.INST, t.T, t.L, t.V))
_OF_BAND, _FAMILIES = tl.constexpr(t.BAND), tl.constexpr(t.FAMILIES)
_STRUCTURAL, _VOCABULARY = tl.constexpr(STRUCTURAL), tl.constexpr(vocab.VOCAB_SIZE)
_ONSET_VALUES, _CHORD_START = tl.constexpr(len(vocab.T) + 1), tl.constexpr(vocab.CHORD.start)
_BAR_ENDS, _HEADS = tl.constexpr(BAR_ENDS), tl.constexpr(BAR_ENDS + 1)
_MAX_BAR_STEPS = tl.constexpr(vocab.MAX_BAR_STEPS)
_READS, _SUMMARIZES = tl.constexpr(READS), tl.constexpr(SUMMARIZES)
FEATURES, GUESSES = 7, 6
_GUESSES = tl.constexpr(GUESSES)
assert NO_INSTRUMENT * (len(vocab.T) + 1) * vocab.VOCAB_SIZE < 2**31  # places are int32


@triton.jit
def _followed(earliest, history_ptr, end, key, BLOCK: tl.constexpr):
    """The last index below `end` at which the int32 history has `key`; -1 if there is none.

    earliest: the first BLOCK of the history.
    """
    at = tl.arange(0, BLOCK)
    found = tl.where((earliest == key) & (at < end), at, -1)
    for first in range(BLOCK, end.to(tl.int32), BLOCK):
        at = first + tl.arange(0, BLOCK)
        same = tl.load(history_ptr + at, mask=at < end, other=-1) == key
        found = tl.where(same & (at < end), at, found)
    return tl.max(found, 0).to(tl.int64)


@triton.jit
def _last_pair(labels_ptr, bars, label, before, BLOCK: tl.constexpr):
    """The last columns below `bars` that have `label`, and that behind one that has `before`; 0 for none."""
    one, two = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    for first in range(1, bars, BLOCK):
        at = first + tl.arange(0, BLOCK).to(tl.int64)
        mask = at < bars
        same = mask & (tl.load(labels_ptr + at, mask=mask, other=-1) == label)
        behind = same & (tl.load(labels_ptr + at - 1, mask=mask, other=-1) == before)
        one = tl.maximum(one, tl.max(tl.where(same, at, 0), 0))
        two = tl.maximum(two, tl.max(tl.where(behind, at, 0), 0))
    return one, two


@triton.jit
def _guesses(labels, bars, label):
    """Labels that the next one may be, of a song with `bars` bars of which the last has `label`: those of
    bars before; what followed when `label` stood there the last time, and when it stood behind the same."""
    two, four = tl.load(labels + tl.maximum(bars - 1, 0)), tl.load(labels + tl.maximum(bars - 3, 0))
    eight = tl.load(labels + tl.maximum(bars - 7, 0))
    at_one, at_two = _last_pair(labels, bars, label, two, 128)
    after_one, after_two = tl.load(labels + at_one + 1), tl.load(labels + at_two + 1)
    after_one = tl.where(at_one > 0, tl.where(at_one + 1 == bars, label, after_one), 0)
    after_two = tl.where(at_two > 0, tl.where(at_two + 1 == bars, label, after_two), 0)
    return two, four, eight, after_one, after_two


@triton.jit
def read_kernel(
    x_ptr, cos_ptr, sin_ptr, table_ptr, summary_ptr, frequency_ptr,
    step_ptr, active_ptr, reader_ptr, of_id_ptr, ends_ptr, last_ptr, follower_ptr, labels_ptr,
    mode_ptr, place_ptr, past_ptr, bar_ptr, guess_ptr, first_ptr,
    tokens_ptr, places_ptr, bar_of_ptr, inst_of_ptr, kind_of_ptr, onset_of_ptr,
    slots, room, bars_room, summaries,
    WIDTH: tl.constexpr, HALF: tl.constexpr, BY_INDEX: tl.constexpr, USES: tl.constexpr, DENSE: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Reads, or prepares a summary; fills the rows x [S, WIDTH], cos and sin [S, HALF], mode, place, past,
    bar, and guess [S, 6].

    table [rows, WIDTH]: embeddings of tokens, instruments and features below each other; first: at which
    rows they begin. Bits of USES say which features the model has. There is room for the labels of
    `bars_room` bars, and the keys of `summaries`.
    frequency: float32 [HALF], of the pairs of channels, of which BY_INDEX are rotated by the token's index.
    """
    s = tl.program_id(0).to(tl.int64)
    step_ptr += s
    reader_ptr += s
    # What is known before the token is drawn.
    position, bars = tl.load(reader_ptr + _POSITION * slots), tl.load(reader_ptr + _BARS * slots)
    inst, onsets = tl.load(reader_ptr + _INST * slots), tl.load(reader_ptr + _ONSETS * slots)
    head = tl.load(reader_ptr + _HEAD * slots)
    onset, length = tl.load(reader_ptr + _ONSET * slots), tl.load(reader_ptr + _LENGTH * slots)
    velocity = tl.load(reader_ptr + _VELOCITY * slots)
    old_head = head
    history = s * (room + 1)
    first = tl.arange(0, BLOCK)
    earliest = tl.load(places_ptr + history + first, mask=first <= position, other=-1)
    number = tl.arange(0, 16)
    of_family = number < _FAMILIES
    kept = tl.load(last_ptr + s * _FAMILIES + number, mask=of_family, other=0)
    labels = labels_ptr + s * (bars_room + 2)
    label = tl.load(labels + bars)
    two, four, eight, after_one, after_two = _guesses(labels, bars, label)
    begin(OVERLAPS)
    token = tl.load(step_ptr + _PENDING * slots)
    complete = tl.load(step_ptr + _COMPLETE * slots)
    ready = (tl.load(active_ptr + s) > 0) & (tl.load(step_ptr + _FULL * slots) == 0)
    family, value = (
        tl.load(of_id_ptr + _FAMILY * _VOCABULARY + token),
        tl.load(of_id_ptr + _VALUE * _VOCABULARY + token),
    )
    kind, switch = (
        tl.load(of_id_ptr + _KIND * _VOCABULARY + token),
        tl.load(of_id_ptr + _SWITCH * _VOCABULARY + token),
    )
    is_chord, is_inst = family == _OF_CHORD, family == _OF_INST
    summarizes = ready & is_chord & (complete < bars)
    if DENSE:
        summarizes = summarizes & (family < 0)  # never
    reads = ready & ~summarizes

    # What is in force with the token.
    structural = kind == _STRUCTURAL
    if reads:
        position += 1
        bars += is_chord.to(tl.int64)
        inst = tl.where(switch >= 0, switch, inst)
        onset = tl.where(family == _OF_T, value + 1, tl.where(structural, 0, onset))
        length = tl.where(family == _OF_L, value + 1, tl.where(structural, 0, length))
        velocity = tl.where(family == _OF_V, value + 1, tl.where(structural, 0, velocity))
        onsets += (family == _OF_T).to(tl.int64)
        head = tl.where(is_inst, value + 1, tl.where(is_chord, 0, head))
    bar = tl.maximum(bars - 1, 0)
    onset_group = tl.where(structural, -1, onsets - 1)

    # The last token of the family, and what followed when this token stood at this place.
    ended = tl.load(ends_ptr + family * _FAMILIES + number, mask=of_family, other=0)
    kept = tl.where(ended != 0, 0, kept)
    special = family < _OF_BAND
    previous = tl.where(special, 0, tl.sum(tl.where(number == family, kept, 0), 0))
    key = (inst * _ONSET_VALUES + onset) * _VOCABULARY + token
    earlier = _followed(earliest, places_ptr + history, position, key.to(tl.int32), BLOCK)
    repeat = tl.load(tokens_ptr + history + tl.maximum(earlier + 1, 0)).to(tl.int64)
    repeat = tl.where(earlier + 1 == position, token, repeat)
    repeat = tl.where(earlier >= 0, repeat, 0)

    # The instrument that followed.
    follows = tl.where(is_inst, value + 1, _BAR_ENDS)
    known = reads & (is_inst | is_chord) & (old_head >= 0)
    next_instrument = tl.load(follower_ptr + s * _HEADS + tl.maximum(head, 0))
    next_instrument = tl.where(known & (head == old_head), follows, next_instrument)
    next_instrument = tl.where(head >= 0, next_instrument, 0)

    # Labels of bars.
    if reads & is_chord:
        label = token
        two, four, eight, after_one, after_two = _guesses(labels, bars, label)
    guess = guess_ptr + s * _GUESSES
    tl.store(guess, label)
    tl.store(guess + 1, two)
    tl.store(guess + 2, four)
    tl.store(guess + 3, eight)
    tl.store(guess + 4, after_one)
    tl.store(guess + 5, after_two)

    # The row.
    nowhere = room + 2 * summaries
    of_bar = tl.where(summarizes, complete, bar)
    tl.store(bar_ptr + s, of_bar)
    tl.store(mode_ptr + s, tl.where(summarizes, _SUMMARIZES, tl.where(reads, _READS, 0)).to(tl.int64))
    place = tl.where(summarizes, room + of_bar, tl.where(reads, position, nowhere))
    tl.store(place_ptr + s, place)
    tl.store(past_ptr + s, tl.where(summarizes, room + summaries + of_bar, nowhere))
    channel = tl.arange(0, WIDTH_BLOCK)
    ok = channel < WIDTH
    if summarizes:
        tl.store(x_ptr + s * WIDTH + channel, tl.load(summary_ptr + channel, mask=ok, other=0), mask=ok)
    else:
        chord = tl.where(bars > 0, label - _CHORD_START + 1, 0)
        x = tl.load(table_ptr + token * WIDTH + channel, mask=ok, other=0).to(tl.float32)
        row = tl.load(first_ptr + 1) + inst
        x += tl.load(table_ptr + row * WIDTH + channel, mask=ok, other=0).to(tl.float32)
        for i in tl.static_range(7):
            if USES >> i & 1:
                if i == 0:
                    feature = onset
                elif i == 1:
                    feature = length
                elif i == 2:
                    feature = velocity
                elif i == 3:
                    feature = chord
                elif i == 4:
                    feature = previous
                elif i == 5:
                    feature = repeat
                else:
                    feature = next_instrument
                row = tl.load(first_ptr + 2 + i) + feature
                x += tl.load(table_ptr + row * WIDTH + channel, mask=ok, other=0).to(tl.float32)
        tl.store(x_ptr + s * WIDTH + channel, x.to(x_ptr.dtype.element_ty), mask=ok)
    pair = tl.arange(0, HALF_BLOCK)
    ok = pair < HALF
    time = tl.where(
        summarizes, (of_bar + 1) * _MAX_BAR_STEPS, of_bar * _MAX_BAR_STEPS + tl.maximum(onset - 1, 0)
    )
    clock = tl.where(pair < BY_INDEX, position.to(tl.float32), time.to(tl.float32))
    angle = clock * tl.load(frequency_ptr + pair, mask=ok, other=0)
    tl.store(cos_ptr + s * HALF + pair, tl.cos(angle).to(cos_ptr.dtype.element_ty), mask=ok)
    tl.store(sin_ptr + s * HALF + pair, tl.sin(angle).to(sin_ptr.dtype.element_ty), mask=ok)

    if reads:
        tl.debug_barrier()  # all has been loaded, by every warp
        tl.store(reader_ptr + _POSITION * slots, position)
        tl.store(reader_ptr + _BARS * slots, bars)
        tl.store(reader_ptr + _INST * slots, inst)
        tl.store(reader_ptr + _ONSETS * slots, onsets)
        tl.store(reader_ptr + _HEAD * slots, head)
        tl.store(reader_ptr + _ONSET * slots, onset)
        tl.store(reader_ptr + _LENGTH * slots, length)
        tl.store(reader_ptr + _VELOCITY * slots, velocity)
        now = tl.where((number == family) & ~special, token, kept)
        tl.store(last_ptr + s * _FAMILIES + number, now, mask=of_family)
        at = history + position
        tl.store(tokens_ptr + at, token.to(tl.int32))
        tl.store(places_ptr + at, key.to(tl.int32))
        tl.store(bar_of_ptr + at, bar.to(tl.int32))
        tl.store(inst_of_ptr + at, inst.to(tl.int32))
        tl.store(kind_of_ptr + at, kind.to(tl.int32))
        tl.store(onset_of_ptr + at, onset_group.to(tl.int32))
        if is_chord:
            tl.store(labels + bars, token)
        if known:
            tl.store(follower_ptr + s * _HEADS + old_head, follows)
