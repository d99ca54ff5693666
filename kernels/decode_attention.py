"""The Triton kernels by which a decoding step attends to the places that are listed for each song.

Lists of some songs are many times as long as those of others. For few songs each list is cut into as many
parts as fill a GPU (`attend_kernel`). For many, programs that run at once take equal shares of all lists, as
they lie end to end (`attend_evenly_kernel`): otherwise most of the GPU waits for the longest lists.

Tiles: B places of a list, L lines of which each keeps a softmax of its own, G heads, D channels of a head.
Line l takes the places l, l + L, ... of a tile. For few songs a place is a line: in the first block always,
in others if registers suffice. Else L is what the threads of a program load at once, so that what is summed
over the places of a line lies in one warp, and nothing in the loop waits for other warps. (In one thread if
Triton spreads the places over threads last, as 3.7 does.) Keys of 8 bits would take too long so: tensor cores
attend to them (`_attend_listed_by_dots`).
"""

import triton
import triton.language as tl

from .decode_products import EARLY, LATE, begin, near_end
from .overlap import let_next_start, wait_for_previous
from .tiles import LOWEST, merge

_EARLY, _LATE = tl.constexpr(EARLY), tl.constexpr(LATE)
_DOT_COLUMNS = tl.constexpr(8)  # of a product: any more, and wgmma would compute it, see `decode`


@triton.jit
def _attend_listed(
    q, keys_ptr, list_ptr, offs_hd, apart, count, first, last, step,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What q [G, D] finds at every `step`-th place of a list from `first`, before `last`, a tile each.

    keys: of the song, [places, STRIDE]; its values are `apart` further. offs_hd: [G, D] within a place.
    Returns the sums of the weights exp2(score - peak) times the values [G, D], and peak and sums of weights
    [G].
    """
    GROUP: tl.constexpr = q.shape[0]
    line = tl.arange(0, BLOCK // LINES)[:, None] * LINES + tl.arange(0, LINES)[None, :]  # [B / L, L]
    peak = tl.full([LINES, GROUP], LOWEST, tl.float32)
    total = tl.zeros([LINES, GROUP], tl.float32)
    o = tl.zeros([LINES, GROUP, q.shape[1]], tl.float32)
    for start in tl.range(first, last, step, num_stages=STAGES):
        at = start + line
        mask = at < count
        place = tl.load(list_ptr + at, mask=mask, other=0).to(tl.int64)
        # [B / L, L, G, D], as k and v are
        offs = (place * STRIDE)[:, :, None, None] + offs_hd[None, None, :, :]
        k = tl.load(keys_ptr + offs, mask=mask[:, :, None, None], other=0.0).to(tl.float32)
        v = tl.load(keys_ptr + apart + offs, mask=mask[:, :, None, None], other=0.0).to(tl.float32)
        score = tl.where(mask[:, :, None], tl.sum(k * q[None, None, :, :], 3), float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 0))  # [L, G]
        weight, kept = tl.exp2(score - new_peak[None, :, :]), tl.exp2(peak - new_peak)
        total = total * kept + tl.sum(weight, 0)
        o = o * kept[:, :, None] + tl.sum(v * weight[:, :, :, None], 0)
        peak = new_peak
    highest = tl.max(peak, 0)  # [G]
    weight = tl.exp2(peak - highest[None, :])
    return tl.sum(o * weight[:, :, None], 0), highest, tl.sum(total * weight, 0)


_COMPILED = tl.constexpr(isinstance(_attend_listed, triton.JITFunction))


@triton.jit
def _attend_listed_by_dots(
    q, keys_ptr, list_ptr, apart, count, first, last, scale,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`_attend_listed` by tensor cores, for keys of 8 bits: every tile, of q [G, D] as it lies in memory.

    keys_ptr: at the first of the heads. Each of W warps has places of its own of every tile, B / W, and its
    own peaks and sums: in the loop no warp needs what another has computed. One product has the scores of all
    heads: q is spread over as many columns of R, zeros but in the channels of its own head. So the product
    with the values has for each head the channels of all, of which its own are taken in the end: most of what
    is computed is not needed, but takes less time than what else converts and adds numbers.

    Keys and values are read as pairs of channels, of 16 bits: so they come from shared memory as tensor cores
    want them, values transposed, which is not possible with bytes. The first channels of all pairs are one
    operand, the second ones another. The columns have every head twice: for the sums of values with the first
    channels, and with the second.

    Keys, values, and q below 65,504 are float16 without loss; weights are rounded to it, by 2 ** -12 of
    themselves at most.
    """
    GROUP: tl.constexpr = q.shape[0]
    DIM: tl.constexpr = q.shape[1]
    PAIRS: tl.constexpr = GROUP * DIM // 2
    HALF: tl.constexpr = _DOT_COLUMNS // 2
    EACH: tl.constexpr = BLOCK // WARPS
    tl.static_assert(GROUP <= HALF)
    column, pair = tl.arange(0, _DOT_COLUMNS), tl.arange(0, PAIRS)
    of_head = (column % GROUP)[:, None] == tl.arange(0, GROUP)[None, :]  # [R, G]
    spread = tl.where(of_head[:, :, None], q.to(tl.float16)[None, :, :], 0.0)
    q_first, q_second = tl.split(tl.reshape(spread, [_DOT_COLUMNS, PAIRS, 2]))
    q_first, q_second = tl.trans(q_first), tl.trans(q_second)  # [G * D / 2, R]
    keys_ptr = keys_ptr.to(tl.pointer_type(tl.int16))
    values_ptr = keys_ptr + apart // 2
    of_first = (column < HALF)[None, None, :]
    peak = tl.full([WARPS, _DOT_COLUMNS], LOWEST, tl.float32)
    total = tl.zeros([WARPS, EACH, _DOT_COLUMNS], tl.float32)  # of each place, to be summed in the end
    o = tl.zeros([WARPS, PAIRS, _DOT_COLUMNS], tl.float32)
    for start in tl.range(first, tl.minimum(last, count), BLOCK, num_stages=STAGES):
        at = start + tl.arange(0, BLOCK)
        # Behind the last place it is read again, which takes no masks. Every place is loaded twice: other
        # threads need it for keys than for values, and of so few numbers as there are places Triton would
        # have each thread load all that it needs. Multiplied last: only so are addresses known to be aligned.
        twice = tl.minimum(at, count - 1)[:, None] + tl.zeros([1, 2], tl.int32)
        place, again = tl.split(tl.load(list_ptr + twice).to(tl.int64))
        place, again = place * (STRIDE // 2), tl.reshape(again, [WARPS, EACH]) * (STRIDE // 2)
        k = tl.load(keys_ptr + place[:, None] + pair[None, :])  # [B, G * D / 2]
        v = tl.load(values_ptr + again[:, None, :] + pair[None, :, None])  # [W, G * D / 2, B / W]
        k_first, k_second = _float16_of_pairs(k)
        score = tl.dot(k_second, q_second, tl.dot(k_first, q_first)) * scale  # [B, R]
        score = tl.where((at < count)[:, None], score, float("-inf"))
        score = tl.reshape(score, [WARPS, EACH, _DOT_COLUMNS])
        new_peak = tl.maximum(peak, tl.max(score, 1))  # [W, R]
        weight, kept = tl.exp2(score - new_peak[:, None, :]), tl.exp2(peak - new_peak)
        total = total * kept[:, None, :] + weight
        weight = weight.to(tl.float16)
        v_first, v_second = _float16_of_pairs(v)
        o = tl.dot(v_first, tl.where(of_first, weight, 0.0), o * kept[:, None, :])
        o = tl.dot(v_second, tl.where(of_first, 0.0, weight), o)
        peak = new_peak
    highest = tl.max(peak, 0)  # [R]
    kept = tl.exp2(peak - highest[None, :])
    total = tl.sum(tl.sum(total, 1) * kept, 0)
    o = tl.reshape(o * kept[:, None, :], [WARPS, PAIRS, 2, HALF])
    own = (pair // (DIM // 2))[:, None] == tl.arange(0, HALF)[None, :]
    o = tl.sum(tl.sum(tl.where(own[None, :, None, :], o, 0.0), 3), 0)  # [G * D / 2, 2]
    # Columns of the same head have the same.
    highest = tl.max(tl.reshape(highest, [_DOT_COLUMNS // GROUP, GROUP]), 0)
    total = tl.max(tl.reshape(total, [_DOT_COLUMNS // GROUP, GROUP]), 0)
    return tl.reshape(o, [GROUP, DIM]), highest, total


@triton.jit
def _float16_of_pairs(pairs):
    """The first and the second numbers of pairs of float8_e4m3fn that are int16, as float16."""
    if _COMPILED:  # Triton would take apart and join every byte
        first, second = tl.inline_asm_elementwise(
            """{
            .reg .b32 bytes;
            .reg .b16 first, second;
            prmt.b32 bytes, $2, 0, 0x3120;
            mov.b32 {first, second}, bytes;
            cvt.rn.f16x2.e4m3x2 $0, first;
            cvt.rn.f16x2.e4m3x2 $1, second;
            }""",
            "=r,=r,r", [pairs], (tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        first = (pairs & 255).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        second = (pairs >> 8).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return first, second


@triton.jit
def _store_part(o_ptr, peak_ptr, sum_ptr, part, channel, o, peak, total):
    """The results of `_attend_listed` to part [G] of o [parts, D], peak and sum [parts]."""
    tl.store(o_ptr + part[:, None] * channel.shape[0] + channel[None, :], o)
    tl.store(peak_ptr + part, peak)
    tl.store(sum_ptr + part, total)
    tl.debug_barrier()  # all threads have stored before one of them says so


@triton.jit
def _add_parts(o, peak, total, o_ptr, peak_ptr, sum_ptr, part, mask, channel):
    """o [G, D], peak and total [G] with those of part [N, G] that are in the mask [N] added."""
    peaks = tl.load(peak_ptr + part, mask=mask[:, None], other=LOWEST, cache_modifier=".cg")
    totals = tl.load(sum_ptr + part, mask=mask[:, None], other=0, cache_modifier=".cg")
    offs = part[:, :, None] * channel.shape[0] + channel[None, None, :]
    values = tl.load(o_ptr + offs, mask=mask[:, None, None], other=0, cache_modifier=".cg")
    new_peak = tl.maximum(peak, tl.max(peaks, 0))
    weights, kept = tl.exp2(peaks - new_peak[None, :]), tl.exp2(peak - new_peak)
    total = total * kept + tl.sum(totals * weights, 0)
    return o * kept[:, None] + tl.sum(values * weights[:, :, None], 0), new_peak, total


@triton.jit
def _store_out(out_ptr, row, channel, o, total):
    """o / total to rows [G] of out [.., D]; 0 where nothing was seen."""
    o = o / tl.where(total > 0, total, 1)[:, None]
    offs = row[:, None] * channel.shape[0] + channel[None, :]
    tl.store(out_ptr + offs, o.to(out_ptr.dtype.element_ty))


@triton.jit
def attend_kernel(
    q_ptr, keys_ptr, list_ptr, count_ptr, place_ptr, out_ptr, o_ptr, peak_ptr, sum_ptr, done_ptr, slots,
    places, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    LINES: tl.constexpr, STAGES: tl.constexpr, KEYS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """out [S, HEADS, DIM]: attention of q, of the same shape, to the places of each song's list; or 0.

    keys: [2, slots, places, HEADS, DIM] of a layer. A program takes GROUP heads, whose keys lie side by side,
    and every SPLITS-th block of the list. If there are parts, each leaves its best score in peak, and the
    sums of exp2(score - peak), alone and times the values, in sum and o: [S, HEADS, SPLITS(, DIM)], float32.
    The program that is the last of its song and heads to be done joins them, in the order of the parts. done:
    int32 [S, HEADS], zeros before and after. scale makes scores of base 2. KEYS: bytes of a number of keys,
    which has no part in the computation but tells launches apart.

    The first block, which of most lists is all, is loaded before q is there, except for what the kernel
    before writes: the keys and values at place [S].
    """
    let_next_start(OVERLAPS == _EARLY)
    s, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    channel, head = tl.arange(0, DIM), tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    row = s * HEADS + head  # [GROUP]
    offs_hd = head[:, None] * DIM + channel[None, :]  # [GROUP, DIM]
    apart = tl.full([], 1, tl.int64) * slots * places * HEADS * DIM
    keys_ptr += s * places * HEADS * DIM
    list_ptr += s * places
    count, own = tl.load(count_ptr + s).to(tl.int32), tl.load(place_ptr + s)
    at = split * BLOCK + tl.arange(0, BLOCK)
    listed = tl.load(list_ptr + at, mask=at < count, other=-1).to(tl.int64)
    there, new = (listed >= 0)[:, None, None], (listed == own)[:, None, None]
    offs = (listed * (HEADS * DIM))[:, None, None] + offs_hd[None, :, :]  # [BLOCK, GROUP, DIM]
    k = tl.load(keys_ptr + offs, mask=there & ~new, other=0.0)
    v = tl.load(keys_ptr + apart + offs, mask=there & ~new, other=0.0)
    wait_for_previous(OVERLAPS != 0)
    q = tl.load(q_ptr + row[:, None] * DIM + channel[None, :]).to(tl.float32) * scale  # [GROUP, DIM]
    k = tl.load(keys_ptr + offs, mask=there & new, other=k).to(tl.float32)
    v = tl.load(keys_ptr + apart + offs, mask=there & new, other=v).to(tl.float32)
    score = tl.where((listed >= 0)[:, None], tl.sum(k * q[None, :, :], 2), float("-inf"))
    peak = tl.maximum(tl.max(score, 0), LOWEST)  # [GROUP]
    weight = tl.exp2(score - peak[None, :])
    o, total = tl.sum(v * weight[:, :, None], 0), tl.sum(weight, 0)
    if (split + SPLITS) * BLOCK < count:
        more_o, more_peak, more_total = _attend_listed(
            q, keys_ptr, list_ptr, offs_hd, apart, count, (split + SPLITS) * BLOCK, count, SPLITS * BLOCK,
            HEADS * DIM, BLOCK, LINES, STAGES,
        )  # fmt: skip
        o, peak, total = merge(o, peak, total, more_o, more_peak, more_total)
    if SPLITS == 1:
        _store_out(out_ptr, row, channel, o, total)
    else:
        _store_part(o_ptr, peak_ptr, sum_ptr, row * SPLITS + split, channel, o, peak, total)
        done_ptr += s * HEADS + tl.program_id(1) * GROUP
        if tl.atomic_add(done_ptr, 1, sem="acq_rel") == SPLITS - 1:
            number = tl.arange(0, SPLITS)
            part = row[None, :] * SPLITS + number[:, None]  # [SPLITS, GROUP]
            o, peak, total = tl.zeros_like(o), tl.full([GROUP], LOWEST, tl.float32), tl.zeros_like(total)
            o, peak, total = _add_parts(
                o, peak, total, o_ptr, peak_ptr, sum_ptr, part, number < SPLITS, channel
            )
            _store_out(out_ptr, row, channel, o, total)
            tl.store(done_ptr, 0)


@triton.jit
def attend_evenly_kernel(
    q_ptr, keys_ptr, list_ptr, count_ptr, out_ptr, o_ptr, peak_ptr, sum_ptr, done_ptr, slots, places, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, LINES: tl.constexpr, STAGES: tl.constexpr, KEYS: tl.constexpr,
    DOTS: tl.constexpr, BEGINS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """`attend_kernel`, but the lists of all songs lie end to end, in tiles of BLOCK places, of which programs
    take equal shares, of GROUP heads each.

    A song that one program has wholly is done then. Of others the part with the beginning is left in o, peak
    and sum [2 programs, HEADS(, DIM)] at 2 program + 1, the next ones at 2 program, and they are joined in
    their order, PARTS at once, by the program that is the last to be done. SLOTS: a power of two, slots or
    more. DOTS: 0, or with how many warps tensor cores attend (`_attend_listed_by_dots`). BEGINS: how many
    tiles the beginning of a song is as much work as, and is counted as before its own.
    """
    if OVERLAPS != _LATE:
        begin(OVERLAPS)
    channel, head = tl.arange(0, DIM), tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    offs_hd = head[:, None] * DIM + channel[None, :]  # [GROUP, DIM]
    apart = tl.full([], 1, tl.int64) * slots * places * HEADS * DIM
    song = tl.arange(0, SLOTS)
    counts = tl.load(count_ptr + song, mask=song < slots, other=0).to(tl.int32)
    # An empty list has a tile too: somebody must write zeros.
    tiles = tl.where(song < slots, tl.maximum((counts + BLOCK - 1) // BLOCK, 1) + BEGINS, 0)
    ends, tiles_of_all = tl.cumsum(tiles, 0), tl.sum(tiles, 0)
    program, programs = tl.program_id(0), tl.minimum(tl.num_programs(0), tiles_of_all)
    share = program * tiles_of_all // programs
    share_end = tl.minimum((program + 1) * tiles_of_all // programs, tiles_of_all)
    first_song = tl.sum((ends <= share).to(tl.int32), 0)
    last_song = tl.sum((ends < share_end).to(tl.int32), 0)
    start = tl.sum(tl.where(ends <= share, tiles, 0), 0)  # the tile with which the song begins
    if program >= programs:
        last_song = first_song - 1
    if OVERLAPS == _LATE:  # whoever lets this kernel be launched has itself waited for who wrote the lists
        begin(OVERLAPS)
    for s in range(first_song, last_song + 1):
        wide = tl.full([], 0, tl.int64) + s
        row = wide * HEADS + head  # [GROUP]
        count = tl.load(count_ptr + s).to(tl.int32)
        end = start + tl.maximum((count + BLOCK - 1) // BLOCK, 1) + BEGINS
        first, last = tl.maximum(share, start), tl.minimum(share_end, end)
        q = tl.load(q_ptr + row[:, None] * DIM + channel[None, :])  # [GROUP, DIM]
        song_ptr, song_list_ptr = keys_ptr + wide * places * HEADS * DIM, list_ptr + wide * places
        first_place = tl.maximum(first - start - BEGINS, 0) * BLOCK
        last_place = tl.maximum(last - start - BEGINS, 0) * BLOCK
        if DOTS:
            o, peak, total = _attend_listed_by_dots(
                q, song_ptr + tl.program_id(1) * GROUP * DIM, song_list_ptr, apart, count, first_place,
                last_place, scale, HEADS * DIM, BLOCK, DOTS, STAGES,
            )  # fmt: skip
        else:
            o, peak, total = _attend_listed(
                q.to(tl.float32) * scale, song_ptr, song_list_ptr, offs_hd, apart, count, first_place,
                last_place, BLOCK, HEADS * DIM, BLOCK, LINES, STAGES,
            )  # fmt: skip
        if s == last_song:
            near_end(OVERLAPS)
        if last - first == end - start:
            _store_out(out_ptr, row, channel, o, total)
        else:
            begins = (first == start).to(tl.int32)
            _store_part(
                o_ptr, peak_ptr, sum_ptr, (2 * program + begins) * HEADS + head, channel, o, peak, total
            )
            # Tile t is of the last program whose share begins at t or before.
            owner = ((start + 1) * programs - 1) // tiles_of_all
            parts = (end * programs - 1) // tiles_of_all - owner + 1
            song_done_ptr = done_ptr + s * HEADS + tl.program_id(1) * GROUP
            if tl.atomic_add(song_done_ptr, 1, sem="acq_rel") == parts - 1:
                o, peak, total = tl.zeros_like(o), tl.full([GROUP], LOWEST, tl.float32), tl.zeros_like(total)
                for next_part in range(0, parts, PARTS):
                    number = next_part + tl.arange(0, PARTS)
                    part = 2 * (owner + number) + (number == 0).to(tl.int32)
                    part = part[:, None] * HEADS + head[None, :]  # [PARTS, GROUP]
                    o, peak, total = _add_parts(
                        o, peak, total, o_ptr, peak_ptr, sum_ptr, part, number < parts, channel
                    )
                _store_out(out_ptr, row, channel, o, total)
                tl.store(song_done_ptr, 0)
        start = end
