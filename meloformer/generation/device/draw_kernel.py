"""The Triton kernel of the last part of a step: each slot that read a token draws the next one and takes it.

One program a slot does what `SlotDraft`, `SlotGrammar`, `SlotSampling` and `Step` do after the logits, but
for one thing: of tokens of equal probability all stay where `top_k` or `top_p` would leave some of them out.
It loads the state before it stores any of it.
"""

import triton
import triton.language as tl

from ...kernels.decode_products import READS, SUMMARIZES, begin_before_reader
from ...tokens import vocab
from ..steering import BARS_BACK, MOST, PER_NOTE
from . import tables as t
from .copies_kernel import held_back, push
from .draft import MAX_CHORDS

DRAFT = (
    *("bars", "max_tokens", "new_bars", "new_tokens", "has_note", "instrument", "notes"),
    *("bpm", "signature", "lists", "chord_count", "scale", "given", "active"),
)
GRAMMAR = (
    *("after", "first_bar", "signature", "part", "bar_steps", "cut", "after_cut", "bpm", "group"),
    *("onset", "pitch", "length", "velocity", "listed"),
)
SAMPLING = ("seed", "top_k")
STEP = ("pending", "complete", "full", "queued", "next", "room", "bar_room")

(_D_BARS, _D_MAX_TOKENS, _D_NEW_BARS, _D_NEW_TOKENS, _D_HAS_NOTE, _D_INSTRUMENT, _D_NOTES) = map(
    tl.constexpr, range(7)
)
(_D_BPM, _D_SIGNATURE, _D_LISTS, _D_CHORD_COUNT, _D_SCALE, _D_GIVEN, _D_ACTIVE) = map(
    tl.constexpr, range(7, 14)
)
(_G_AFTER, _G_FIRST_BAR, _G_SIGNATURE, _G_PART, _G_BAR_STEPS, _G_CUT, _G_AFTER_CUT) = map(
    tl.constexpr, range(7)
)
(_G_BPM, _G_GROUP, _G_ONSET, _G_PITCH, _G_LENGTH, _G_VELOCITY, _G_LISTED) = map(tl.constexpr, range(7, 14))
_PENDING, _COMPLETE, _FULL, _QUEUED, _NEXT, _ROOM, _BAR_ROOM = map(tl.constexpr, range(len(STEP)))
_FAMILY, _VALUE, _SWITCH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(3)
_BOS, _EOS, _BAND, _CHORD, _TS, _CUT, _BPM, _INST, _T, _P, _L, _V = map(
    tl.constexpr, (t.BOS, t.EOS, t.BAND, t.CHORD, t.TS, t.CUT, t.BPM, t.INST, t.T, t.P, t.L, t.V)
)
_FAMILIES, _VOCABULARY = tl.constexpr(t.FAMILIES), tl.constexpr(vocab.VOCAB_SIZE)
_EOS_ID, _TS_START, _BPM_START = (
    tl.constexpr(vocab.EOS),
    tl.constexpr(vocab.TS.start),
    tl.constexpr(vocab.BPM.start),
)
_PITCHES, _INSTRUMENTS = tl.constexpr(len(vocab.P)), tl.constexpr(vocab.NO_INSTRUMENT)
_PLACES, _DRUMS = tl.constexpr(len(vocab.BAND) + 1), tl.constexpr(vocab.DRUMS)
_MAX_BAR_STEPS, _MAX_CHORDS = tl.constexpr(vocab.MAX_BAR_STEPS), tl.constexpr(MAX_CHORDS)
_CHORD_START, _CHORD_STOP = tl.constexpr(vocab.CHORD.start), tl.constexpr(vocab.CHORD.stop)
_STARTS = tl.constexpr(len(vocab.INST) * BARS_BACK)
_MOST, _PER_NOTE = tl.constexpr(MOST), tl.constexpr(PER_NOTE)
_READS, _SUMMARIZES = tl.constexpr(READS), tl.constexpr(SUMMARIZES)
_LOW, _INFINITY = tl.constexpr(0xFFFFFFFF), tl.constexpr(float("inf"))


@triton.jit
def _mix(x):
    """`sampling.mix`, of int64."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _LOW
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _LOW
    return x ^ (x >> 16)


@triton.jit
def _noise(seed, count, number):
    """Exponential noise for each id, as `SlotSampling.draw` has it."""
    song = _mix(_mix(seed & _LOW) ^ ((seed >> 32) & _LOW))
    drawn = _mix((song + count) & _LOW)
    bits = _mix(drawn ^ _mix((number + 1).to(tl.int64)))
    even = ((bits >> 9).to(tl.float32) + 0.5) * (2.0**-23)
    return tl.maximum(-tl.log(even), 1 - even)


@triton.jit
def _redistributed(scaled, logits, among, temperature, number):
    """`SlotSampling._redistributed` for the ids `among`."""
    own = tl.where(among, scaled, -_INFINITY)
    highest = tl.max(own, 0)
    if highest > -_INFINITY:
        together = highest + tl.log(tl.sum(tl.exp(own - highest), 0))
        base = tl.where(among, logits, -_INFINITY)
        best = tl.max(base, 0)
        if temperature == 0:
            first = tl.min(tl.where(among & (base == best), number, _VOCABULARY), 0)
            new = tl.where(number == first, together, -_INFINITY)
        else:
            divided = (base - best) / temperature
            new = together + divided - tl.log(tl.sum(tl.exp(divided), 0))
        scaled = tl.where(among, new, scaled)
    return scaled


@triton.jit
def _both(count, mass, other_count, other_mass):
    return count + other_count, mass + other_mass


@triton.jit
def _above(probability, bits, bound, top_k, top_p):
    """How many are above a bound; and whether these are less than `top_k` and `top_p`."""
    above = bits > bound
    count, mass = tl.reduce((above.to(tl.int32), tl.where(above, probability, 0)), 0, _both)
    return count, (count < top_k) & (mass < top_p)


@triton.jit
def _kept(probability, top_k, top_p):
    """Which are among the `top_k` greatest, and before which less than `top_p` is: those from a bound on.

    The bound, which is one of the probabilities, is found bit by bit: positive float32 numbers are in the
    order of their bits as integers. The search ends where no other probability is left.
    """
    bits = probability.to(tl.int32, bitcast=True)
    low, high = tl.zeros([], tl.int32), tl.full([], 0x3F800001, tl.int32)  # the bound is in low..high
    from_low, above_high = low + bits.shape[0], tl.zeros([], tl.int32)  # how many
    while from_low - above_high > 1 and low < high:
        # Two bits at once: what is summed for one need not wait for the other.
        middle = low + (high - low) // 2
        below, above = low + (middle - low) // 2, middle + 1 + (high - middle - 1) // 2
        count, enough = _above(probability, bits, middle, top_k, top_p)
        count_below, enough_below = _above(probability, bits, below, top_k, top_p)
        count_above, enough_above = _above(probability, bits, above, top_k, top_p)
        new_low = tl.where(enough_above, middle + 1, above + 1)
        new_from_low = tl.where(enough_above, count, count_above)
        low_of_lower, from_low_of_lower = (
            tl.where(enough_below, low, below + 1),
            tl.where(enough_below, from_low, count_below),
        )
        high = tl.where(enough, tl.where(enough_below, below, middle), tl.where(enough_above, above, high))
        above_high = tl.where(
            enough,
            tl.where(enough_below, count_below, count),
            tl.where(enough_above, count_above, above_high),
        )
        low = tl.where(enough, low_of_lower, new_low)
        from_low = tl.where(enough, from_low_of_lower, new_from_low)
    return bits >= low


@triton.jit
def draw_kernel(
    logits_ptr, mode_ptr, step_ptr, draft_ptr, grammar_ptr, sampling_ptr, of_id_ptr, steps_ptr, parts_ptr,
    within_ptr, pitches_ptr, chords_ptr, of_chords_ptr, of_pitches_ptr, density_ptr, place_ptr,
    temperature_ptr, top_p_ptr, min_p_ptr, of_kind_ptr, queue_ptr, position_ptr, bars_ptr, drawn_ptr,
    column_ptr, copies_ptr, log_ptr, more_ptr, starts_ptr, penalty_ptr, slots, queue_room, log_room,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Draws from logits, float32 [S, VOCAB_SIZE], and brings all state up to date.

    What does not depend on the logits is done before they are there, of slots that read nothing in vain.
    """
    s = tl.program_id(0).to(tl.int64)
    mode, column = tl.load(mode_ptr + s), tl.load(column_ptr + s)
    step_ptr += s
    draft_ptr += s
    grammar_ptr += s
    copies_ptr += s
    log_ptr += s * log_room
    more_ptr += s * log_room
    # The grammar: what may follow.
    after, signature = (
        tl.load(grammar_ptr + _G_AFTER * slots),
        tl.load(grammar_ptr + _G_SIGNATURE * slots),
    )
    first_bar, part = tl.load(grammar_ptr + _G_FIRST_BAR * slots), tl.load(grammar_ptr + _G_PART * slots)
    bar_steps, cut = tl.load(grammar_ptr + _G_BAR_STEPS * slots), tl.load(grammar_ptr + _G_CUT * slots)
    after_cut, bpm = tl.load(grammar_ptr + _G_AFTER_CUT * slots), tl.load(grammar_ptr + _G_BPM * slots)
    group, onset = tl.load(grammar_ptr + _G_GROUP * slots), tl.load(grammar_ptr + _G_ONSET * slots)
    pitch, length = tl.load(grammar_ptr + _G_PITCH * slots), tl.load(grammar_ptr + _G_LENGTH * slots)
    velocity, listed = (
        tl.load(grammar_ptr + _G_VELOCITY * slots),
        tl.load(grammar_ptr + _G_LISTED * slots),
    )
    number = tl.arange(0, BLOCK)
    real = number < _VOCABULARY
    family = tl.load(of_id_ptr + _FAMILY * _VOCABULARY + number, mask=real, other=-1)
    value = tl.load(of_id_ptr + _VALUE * _VOCABULARY + number, mask=real, other=0)
    chord = (after == _CHORD) & (first_bar == 0) & (after_cut == 0)
    header = chord | (after == _TS) | (after == _CUT)
    note = ((after == _P) & (length >= 0)) | ((after == _L) & (velocity >= 0)) | (after == _V)
    ends = note | (after == _BPM) | (header & (bpm >= 0))
    starts, lists = after < 0, (after == _BOS) | (after == _BAND)
    is_note = family >= _T
    listing = place_ptr + s * _PLACES
    in_band = (family == _BAND) | (family == _INST)
    place = tl.load(listing + value, mask=in_band, other=-1)
    allowed = (family == _BOS) & starts
    allowed |= (family == _BAND) & (starts | lists) & (place < 0)
    allowed |= (family == _CHORD) & ((lists & (listed > 0)) | ends)
    allowed |= (family == _EOS) & ends
    allowed |= (family == _TS) & (after == _CHORD) & ~(chord & (part == 0) & (value == signature))
    allowed |= (family == _CUT) & (chord | (after == _TS)) & (value < bar_steps - 1)
    allowed |= (family == _BPM) & header & (value != bpm)
    allowed |= (family == _INST) & ends & (place > group)
    allowed |= (family == _T) & ((after == _INST) | note) & (value > onset) & (value < bar_steps)
    allowed |= (family == _P) & ((after == _T) | note) & (value > pitch)
    allowed |= (family == _L) & (after == _P) & (value != length)
    allowed |= (family == _V) & ((after == _L) | ((after == _P) & (length >= 0))) & (value != velocity)
    allowed &= real

    # The wishes, and what must come.
    new_bars, bars = tl.load(draft_ptr + _D_NEW_BARS * slots), tl.load(draft_ptr + _D_BARS * slots)
    new_tokens = tl.load(draft_ptr + _D_NEW_TOKENS * slots)
    has_note, notes = tl.load(draft_ptr + _D_HAS_NOTE * slots), tl.load(draft_ptr + _D_NOTES * slots)
    instrument = tl.load(draft_ptr + _D_INSTRUMENT * slots)
    count = tl.load(draft_ptr + _D_CHORD_COUNT * slots)
    wished_bpm, wished_ts = tl.load(draft_ptr + _D_BPM * slots), tl.load(draft_ptr + _D_SIGNATURE * slots)
    parts = tl.load(parts_ptr + tl.maximum(signature, 0))
    bar_ends = (signature < 0) | (cut > 0) | ((part + 1) % parts == 0)
    allowed &= tl.load(within_ptr + s * _VOCABULARY + number, mask=real, other=0) != 0
    bar = new_bars - tl.where(bar_ends, 0, 1)
    at = (bar + tl.maximum(count, 1)) % tl.maximum(count, 1)  # bar is -1 or more
    only = tl.load(chords_ptr + s * _MAX_CHORDS + at)
    allowed &= (family != _CHORD) | (count <= 0) | (number == only)
    row = tl.where(instrument < 0, _INSTRUMENTS, instrument)
    is_pitch = family == _P
    playable = tl.load(
        pitches_ptr + (s * (_INSTRUMENTS + 1) + row) * _PITCHES + value, mask=is_pitch, other=1
    )
    allowed &= playable != 0
    ts_id = _TS_START + tl.maximum(wished_ts, 0)
    bpm_id = _BPM_START + tl.maximum(wished_bpm, 0)
    may_ts = (
        (wished_ts >= 0)
        & (signature != wished_ts)
        & (tl.sum((allowed & (number == ts_id)).to(tl.int32), 0) > 0)
    )
    may_bpm = (
        (wished_bpm >= 0) & (bpm != wished_bpm) & (tl.sum((allowed & (number == bpm_id)).to(tl.int32), 0) > 0)
    )
    required = tl.where(may_ts, ts_id, tl.where(may_bpm, bpm_id, -1)).to(tl.int32)
    band = tl.min(tl.where(allowed & (family == _BAND), number, _VOCABULARY), 0)
    names_band = (tl.load(draft_ptr + _D_LISTS * slots) > 0) & lists & (band < _VOCABULARY)
    required = tl.where(names_band, band, required)
    required = tl.where((new_bars > 0) | lists, required, -1)

    last_bar = (new_bars == bars) & bar_ends
    allowed &= (family == _CHORD) | lists | (new_tokens != 0)
    allowed &= (family != _TS) | ~((part > 0) & (after_cut == 0))
    given = tl.load(draft_ptr + _D_GIVEN * slots)
    max_tokens = tl.load(draft_ptr + _D_MAX_TOKENS * slots)
    allowed &= (given != 2) | (family < _T) | (family > _V)
    no_end = (new_bars == 0) | (has_note == 0) | ((bars >= 0) & ~last_bar)
    allowed &= (number != _EOS_ID) | ~no_end
    allowed &= (family != _CHORD) | ~(last_bar & (has_note == 0))
    allowed = tl.where(required >= 0, number == required, allowed)
    next_queued, queued = tl.load(step_ptr + _NEXT * slots), tl.load(step_ptr + _QUEUED * slots)
    queue_ptr += s * queue_room + next_queued
    laid = (next_queued < queued) & (tl.load(queue_ptr) >= 0)
    allowed = (allowed | laid) & real  # where nothing would be

    # What is added to the logits, and how they are drawn from.
    sings = (tl.load(draft_ptr + _D_SCALE * slots) > 0) & (instrument >= 0) & (instrument != _DRUMS)
    bias = tl.load(of_chords_ptr + s * _VOCABULARY + number, mask=real, other=0)
    bias += tl.load(of_pitches_ptr + s * _VOCABULARY + number, mask=real & sings, other=0)
    density = tl.load(density_ptr + s * (_INSTRUMENTS + 1) + row)
    penalty = tl.load(penalty_ptr + s * (_INSTRUMENTS + 1) + row)
    temperature, seed = tl.load(temperature_ptr + s).to(tl.float32), tl.load(sampling_ptr + s)
    top_k, top_p = tl.load(sampling_ptr + slots + s), tl.load(top_p_ptr + s).to(tl.float32)
    min_p = tl.load(min_p_ptr + s).to(tl.float32)
    kind = tl.arange(0, 16)
    of_kinds = tl.load(of_kind_ptr + s * _FAMILIES + kind, mask=kind < _FAMILIES, other=-1).to(tl.float32)
    differ = tl.max(of_kinds, 0) >= 0
    noise = _noise(seed, new_tokens, number)

    begin_before_reader(OVERLAPS)
    tl.store(column_ptr + s, (column + 1) % COLUMNS)
    if mode == _SUMMARIZES:
        tl.store(step_ptr + _COMPLETE * slots, tl.load(step_ptr + _COMPLETE * slots) + 1)
    if mode != _READS:
        tl.store(drawn_ptr + s * COLUMNS + column, tl.full([], -1, tl.int64))
    else:
        # The draw.
        logits = tl.load(logits_ptr + s * _VOCABULARY + number, mask=real, other=0) + bias
        if density >= 0:
            missing = density - notes.to(tl.float32)
            if missing > 0:
                logits -= tl.where(is_note & (family <= _V), 0, tl.minimum(missing * _PER_NOTE, _MOST))
            else:
                begins_note = (family == _T) | is_pitch
                logits -= tl.where(begins_note, tl.minimum((1 - missing) * _PER_NOTE, _MOST), 0)
        if penalty != 0:
            logits = held_back(logits, copies_ptr, log_ptr, more_ptr, penalty, slots, family, number)
        logits = tl.where(allowed, logits, -_INFINITY)
        logits -= tl.max(logits, 0)
        if temperature == 0:
            token = tl.min(tl.where(logits == 0, number, _VOCABULARY), 0).to(tl.int64)
        else:
            scaled = logits / temperature
            if differ:
                for own in range(_BAND, _V + 1):
                    of_kind = tl.sum(tl.where(kind == own, of_kinds, 0), 0)
                    if of_kind >= 0:
                        scaled = _redistributed(scaled, logits, family == own, of_kind, number)
            probability = tl.exp(scaled - tl.max(scaled, 0))
            probability = probability / tl.sum(probability, 0)
            keep = probability >= min_p * tl.max(probability, 0)
            if (top_k < _VOCABULARY) | (top_p < 1):
                keep &= _kept(probability, top_k, top_p)
            chance = tl.where(keep & allowed, probability / noise, -1.0)
            token = tl.argmax(chance, 0).to(tl.int64)
        ends = ((token >= _CHORD_START) & (token < _CHORD_STOP)) | (token == _EOS_ID)
        ends = (next_queued < queued) & ~laid & ends  # what was open
        follows = ends & (next_queued + 1 < queued)
        if laid | follows:
            token = tl.load(queue_ptr + follows.to(tl.int64))
        next_queued += (laid | ends).to(tl.int64) + follows.to(tl.int64)
        laid |= follows

        # The song with it.
        tl.debug_barrier()  # all has been loaded, by every warp
        tl.store(step_ptr + _NEXT * slots, next_queued)
        mine, its = (
            tl.load(of_id_ptr + _FAMILY * _VOCABULARY + token),
            tl.load(of_id_ptr + _VALUE * _VOCABULARY + token),
        )
        tl.store(drawn_ptr + s * COLUMNS + column, token)
        finished = (mine == _EOS) | ((mine == _CHORD) & last_bar) | (ends & ~follows)
        if not finished:
            if mine == _CHORD:
                group, instrument = tl.full([], -1, tl.int64), tl.full([], -1, tl.int64)
                new_bars += bar_ends.to(tl.int64)
                first_bar = (signature < 0).to(tl.int64)
                after_cut, cut = cut, tl.zeros([], tl.int64)
                if signature >= 0:
                    part = (part + 1) % parts
                    rest = tl.load(steps_ptr + signature) - part * _MAX_BAR_STEPS
                    bar_steps = tl.minimum(rest, _MAX_BAR_STEPS)
                full = tl.load(bars_ptr + s) >= tl.load(step_ptr + _BAR_ROOM * slots)
            else:
                full = tl.load(bars_ptr + s) < 0
            if mine == _TS:
                signature, part = its, tl.zeros([], tl.int64)
                bar_steps = tl.minimum(tl.load(steps_ptr + its), _MAX_BAR_STEPS)
            if mine == _CUT:
                bar_steps, cut = its + 1, tl.full([], 1, tl.int64)
            if mine == _BPM:
                bpm = its
            if mine == _INST:
                group = tl.load(listing + its)
                instrument, notes = tl.load(of_id_ptr + _SWITCH * _VOCABULARY + token), tl.zeros([], tl.int64)
            if mine == _BAND:
                tl.store(listing + its, listed)
                listed += 1
            begins_group = mine == _INST
            onset = tl.where(begins_group, -1, tl.where(mine == _T, its, onset))
            pitch = tl.where(begins_group | (mine == _T), -1, tl.where(mine == _P, its, pitch))
            length = tl.where(begins_group, -1, tl.where(mine == _L, its, length))
            velocity = tl.where(begins_group, -1, tl.where(mine == _V, its, velocity))
            notes += (mine == _P).to(tl.int64)
            has_note = tl.where(mine == _P, 1, has_note)
            push(copies_ptr, log_ptr, more_ptr, starts_ptr + s * _STARTS, slots, mine, its, token)
            new_tokens += 1
            if given > 0:
                max_tokens += laid.to(tl.int64)
                tl.store(draft_ptr + _D_MAX_TOKENS * slots, max_tokens)
                tl.store(draft_ptr + _D_GIVEN * slots, 1 + laid.to(tl.int64))
            finished = new_tokens >= max_tokens
            full |= tl.load(position_ptr + s) + 1 >= tl.load(step_ptr + _ROOM * slots)
            tl.store(step_ptr + _PENDING * slots, token)
            if full:
                tl.store(step_ptr + _FULL * slots, tl.full([], 1, tl.int64))
            tl.store(grammar_ptr + _G_AFTER * slots, mine)
            tl.store(grammar_ptr + _G_FIRST_BAR * slots, first_bar)
            tl.store(grammar_ptr + _G_SIGNATURE * slots, signature)
            tl.store(grammar_ptr + _G_PART * slots, part)
            tl.store(grammar_ptr + _G_BAR_STEPS * slots, bar_steps)
            tl.store(grammar_ptr + _G_CUT * slots, cut)
            tl.store(grammar_ptr + _G_AFTER_CUT * slots, after_cut)
            tl.store(grammar_ptr + _G_BPM * slots, bpm)
            tl.store(grammar_ptr + _G_GROUP * slots, group)
            tl.store(grammar_ptr + _G_ONSET * slots, onset)
            tl.store(grammar_ptr + _G_PITCH * slots, pitch)
            tl.store(grammar_ptr + _G_LENGTH * slots, length)
            tl.store(grammar_ptr + _G_VELOCITY * slots, velocity)
            tl.store(grammar_ptr + _G_LISTED * slots, listed)
            tl.store(draft_ptr + _D_NEW_BARS * slots, new_bars)
            tl.store(draft_ptr + _D_NEW_TOKENS * slots, new_tokens)
            tl.store(draft_ptr + _D_HAS_NOTE * slots, has_note)
            tl.store(draft_ptr + _D_INSTRUMENT * slots, instrument)
            tl.store(draft_ptr + _D_NOTES * slots, notes)
        if finished:
            tl.store(draft_ptr + _D_ACTIVE * slots, tl.zeros([], tl.int64))
