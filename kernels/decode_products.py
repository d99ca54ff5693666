"""The Triton kernels of a decoding step that read weights: one row for each song, in float32 inside.

A row either goes on with a song (mode READS) or computes a summary (mode SUMMARIZES), by weights of its own
where the two streams have such; rows of other modes are computed as if they read, and written where nothing
is kept. A program takes a few columns of the result for ROWS rows, so that each weight is read once for them;
weights of a stream that none of its rows belongs to are not read.

A single row is a vector: matrix instructions would compute 16. Its weights, those of the stream that reads,
are on their way to the registers before what is multiplied with them is there; BLOCK is then a whole row of
them.

Tiles: R rows, C columns of the result, K channels of the input. PAIRS pairs of channels are rotated by RoPE.
"""

import triton
import triton.language as tl

READS, SUMMARIZES = 1, 2
_READS, _SUMMARIZES = tl.constexpr(READS), tl.constexpr(SUMMARIZES)


@triton.jit
def begin(OVERLAPS: tl.constexpr):
    """First of all in a kernel: lets the next one be launched, and waits for the one before.

    If OVERLAPS, launches of a graph overlap: a program is there when what it reads is. What was written by
    any kernel before must not be read earlier than here.
    """
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _rows_of(w_ptr, column, ok, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """[C, BLOCK] of the rows `column` of w [columns, WIDTH] that are `ok`."""
    k = tl.arange(0, BLOCK)
    mask = ok[:, None] & (k < WIDTH)[None, :]
    return tl.load(w_ptr + column.to(tl.int64)[:, None] * WIDTH + k[None, :], mask=mask, other=0)


@triton.jit
def _row(x_ptr, gain_ptr, eps, BLOCK: tl.constexpr, WIDTH: tl.constexpr, NORMS: tl.constexpr):
    """x [BLOCK], float32, of the only row; if NORMS with the gains on it, and what else norms it, or 1."""
    k = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + k, mask=k < WIDTH, other=0).to(tl.float32)
    if NORMS:
        gain = tl.load(gain_ptr + k, mask=k < WIDTH, other=0).to(tl.float32)
        return x * gain, 1 / tl.sqrt(tl.sum(x * x, 0) / WIDTH + eps)
    else:
        return x, tl.full([], 1, tl.float32)


@triton.jit
def _row_product(x, w):
    """[1, C]: x [K], float32, times the transpose of w [C, K]."""
    return tl.sum(w.to(tl.float32) * x[None, :], 1)[None, :]


@triton.jit
def _two_row_products(
    x_ptr, gain_ptr, eps, first_w, second_w, BLOCK: tl.constexpr, WIDTH: tl.constexpr, NORMS: tl.constexpr
):
    """[1, C] twice: the only row of x [1, WIDTH], normed if NORMS, times the transposes of [C, BLOCK]."""
    x, rstd = _row(x_ptr, gain_ptr, eps, BLOCK, WIDTH, NORMS)
    return _row_product(x, first_w) * rstd, _row_product(x, second_w) * rstd


@triton.jit
def _tile(x_ptr, gain_ptr, row, row_mask, k, WIDTH: tl.constexpr, NORMS: tl.constexpr):
    """[R, K] of x [rows, WIDTH], in x's dtype, and what to multiply; if NORMS this has the gains on it."""
    mask = row_mask[:, None] & (k < WIDTH)[None, :]
    x = tl.load(x_ptr + row[:, None] * WIDTH + k[None, :], mask=mask, other=0)
    scaled = x
    if NORMS:
        gain = tl.load(gain_ptr + k, mask=k < WIDTH, other=0).to(tl.float32)
        scaled = (x.to(tl.float32) * gain[None, :]).to(x.dtype)
    return x, scaled


@triton.jit
def _add_squares(squares, x):
    """squares [R] + those of x [R, K]."""
    x = x.to(tl.float32)
    return squares + tl.sum(x * x, 1)


@triton.jit
def _rstd(squares, eps, WIDTH: tl.constexpr):
    """[R, 1], what rows are multiplied with to be normed, by the sums of their squares [R]."""
    return (1 / tl.sqrt(squares / WIDTH + eps))[:, None]


@triton.jit
def _add_product(total, x, w_ptr, column, column_mask, k, WIDTH: tl.constexpr):
    """total [R, C] + x [R, K] times the transpose of rows `column` of w [columns, WIDTH]."""
    mask = column_mask[:, None] & (k < WIDTH)[None, :]
    w = tl.load(w_ptr + column.to(tl.int64)[:, None] * WIDTH + k[None, :], mask=mask, other=0)
    return tl.dot(x, tl.trans(w), total, input_precision="ieee")


@triton.jit
def _modes(mode_ptr, row, rows):
    """Modes [R] of the rows, and whether any reads, and any summarizes."""
    mode = tl.load(mode_ptr + row, mask=row < rows, other=0)
    some_summarize = tl.max((mode == _SUMMARIZES).to(tl.int32), 0) > 0
    some_read = tl.max((mode != _SUMMARIZES).to(tl.int32), 0) > 0
    return mode, some_read, some_summarize


@triton.jit
def _two_products(
    x_ptr, gain_ptr, eps, w_ptr, row, row_mask, column, APART: tl.constexpr, ok, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """[R, C] twice: x [rows, WIDTH], normed if NORMS, times the transpose of rows `column` of w, and of those
    APART further. Nothing else reads `gain_ptr` and `eps`.

    The norm's root is taken of the products, since a pass before them would wait for memory once more."""
    if row.shape[0] == 1:
        first_w = _rows_of(w_ptr, column, ok, BLOCK, WIDTH)
        second_w = _rows_of(w_ptr, column + APART, ok, BLOCK, WIDTH)
        return _two_row_products(x_ptr, gain_ptr, eps, first_w, second_w, BLOCK, WIDTH, NORMS)
    first = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    second = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    squares = tl.zeros([row.shape[0]], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x, scaled = _tile(x_ptr, gain_ptr, row, row_mask, k, WIDTH, NORMS)
        first = _add_product(first, scaled, w_ptr, column, ok, k, WIDTH)
        second = _add_product(second, scaled, w_ptr, column + APART, ok, k, WIDTH)
        if NORMS:
            squares = _add_squares(squares, x)
    if NORMS:
        rstd = _rstd(squares, eps, WIDTH)
        first, second = first * rstd, second * rstd
    return first, second


@triton.jit
def _rotate(first, second, cos_ptr, sin_ptr, row, row_mask, pair, HALF: tl.constexpr):
    """Both halves of the channels, [R, PAIRS] each, rotated by the angles of the rows [rows, HALF]."""
    offs = row[:, None] * HALF + pair[None, :]
    mask = row_mask[:, None] & (pair < HALF)[None, :]
    cos = tl.load(cos_ptr + offs, mask=mask, other=0).to(tl.float32)
    sin = tl.load(sin_ptr + offs, mask=mask, other=0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _store_key(keys_ptr, part, row, place, head, channel, mask, value, slots, places, HEADS, DIM):
    """value [R, C] to the keys (part 0) or values (part 1) of a layer, [2, slots, places, HEADS, DIM]."""
    at = ((part * slots + row).to(tl.int64) * places + place) * HEADS + head  # [R]
    tl.store(keys_ptr + at[:, None] * DIM + channel[None, :], value.to(keys_ptr.dtype.element_ty), mask=mask)


@triton.jit
def project_kernel(
    x_ptr, gain_r_ptr, gain_s_ptr, w_r_ptr, w_s_ptr, cos_ptr, sin_ptr, mode_ptr, place_ptr, q_ptr, keys_ptr,
    rows, places, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Norm, QKV and RoPE of x [rows, E]: queries to q [rows, HEADS, D], keys and values to place [rows]."""
    DIM: tl.constexpr = 2 * HALF
    WIDTH: tl.constexpr = HEADS * DIM
    BLOCKS: tl.constexpr = HALF // PAIRS
    head, part = tl.program_id(0) // BLOCKS % HEADS, tl.program_id(0) // BLOCKS // HEADS
    pair = tl.program_id(0) % BLOCKS * PAIRS + tl.arange(0, PAIRS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    column = part * WIDTH + head * DIM + pair
    ok = pair < HALF
    if ROWS == 1:
        first_w = _rows_of(w_r_ptr, column, ok, BLOCK, WIDTH)
        second_w = _rows_of(w_r_ptr, column + HALF, ok, BLOCK, WIDTH)
    begin(OVERLAPS)
    mode, some_read, some_summarize = _modes(mode_ptr, row, rows)
    first, second = tl.zeros([ROWS, PAIRS], tl.float32), tl.zeros([ROWS, PAIRS], tl.float32)
    if ROWS == 1:  # does not wait for the mode
        first, second = _two_row_products(x_ptr, gain_r_ptr, eps, first_w, second_w, BLOCK, WIDTH, True)
    elif some_read:
        first, second = _two_products(
            x_ptr, gain_r_ptr, eps, w_r_ptr, row, row_mask, column, HALF, ok, WIDTH, BLOCK, True
        )
    if some_summarize:
        first_s, second_s = _two_products(
            x_ptr, gain_s_ptr, eps, w_s_ptr, row, row_mask, column, HALF, ok, WIDTH, BLOCK, True
        )
        summarizes = (mode == _SUMMARIZES)[:, None]
        first, second = tl.where(summarizes, first_s, first), tl.where(summarizes, second_s, second)
    if part < 2:
        first, second = _rotate(first, second, cos_ptr, sin_ptr, row, row_mask, pair, HALF)
    mask = row_mask[:, None] & ok[None, :]
    if part == 0:
        offs = (row * HEADS + head)[:, None] * DIM + pair[None, :]
        tl.store(q_ptr + offs, first.to(q_ptr.dtype.element_ty), mask=mask)
        tl.store(q_ptr + offs + HALF, second.to(q_ptr.dtype.element_ty), mask=mask)
    else:
        place = tl.load(place_ptr + row, mask=row_mask, other=0)
        _store_key(keys_ptr, part - 1, row, place, head, pair, mask, first, rows, places, HEADS, DIM)
        _store_key(keys_ptr, part - 1, row, place, head, pair + HALF, mask, second, rows, places, HEADS, DIM)


@triton.jit
def attended_kernel(
    o_ptr, w_r_ptr, w_s_ptr, w_kv_ptr, cos_ptr, sin_ptr, mode_ptr, place_ptr, x_ptr, keys_ptr,
    rows, places,
    HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Adds the output projection of o [rows, E] to x [rows, E], and writes what tokens see of summaries.

    The first third of the programs takes the projection, the others keys and values of summaries, which go to
    place [rows]; these end at once where no row summarizes.
    """
    DIM: tl.constexpr = 2 * HALF
    WIDTH: tl.constexpr = HEADS * DIM
    BLOCKS: tl.constexpr = HALF // PAIRS
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    block, part = tl.program_id(0) % (HEADS * BLOCKS), tl.program_id(0) // (HEADS * BLOCKS)
    head = block // BLOCKS
    pair = block % BLOCKS * PAIRS + tl.arange(0, PAIRS)
    column = head * DIM + pair
    ok = pair < HALF
    mask = row_mask[:, None] & ok[None, :]
    if ROWS == 1:
        projects = ok & (part == 0)
        first_w = _rows_of(w_r_ptr, column, projects, BLOCK, WIDTH)
        second_w = _rows_of(w_r_ptr, column + HALF, projects, BLOCK, WIDTH)
    begin(OVERLAPS)
    mode, some_read, some_summarize = _modes(mode_ptr, row, rows)
    summarizes = (mode == _SUMMARIZES)[:, None]
    first, second = tl.zeros([ROWS, PAIRS], tl.float32), tl.zeros([ROWS, PAIRS], tl.float32)
    if part == 0:
        if ROWS == 1:
            first, second = _two_row_products(o_ptr, o_ptr, 0.0, first_w, second_w, BLOCK, WIDTH, False)
        elif some_read:
            first, second = _two_products(
                o_ptr, o_ptr, 0.0, w_r_ptr, row, row_mask, column, HALF, ok, WIDTH, BLOCK, False
            )
        if some_summarize:
            first_s, second_s = _two_products(
                o_ptr, o_ptr, 0.0, w_s_ptr, row, row_mask, column, HALF, ok, WIDTH, BLOCK, False
            )
            first, second = tl.where(summarizes, first_s, first), tl.where(summarizes, second_s, second)
        ptrs = x_ptr + row[:, None] * WIDTH + column[None, :]
        first += tl.load(ptrs, mask=mask, other=0).to(tl.float32)
        second += tl.load(ptrs + HALF, mask=mask, other=0).to(tl.float32)
        tl.store(ptrs, first.to(x_ptr.dtype.element_ty), mask=mask)
        tl.store(ptrs + HALF, second.to(x_ptr.dtype.element_ty), mask=mask)
    elif some_summarize:
        column += (part - 1) * WIDTH
        first, second = _two_products(
            o_ptr, o_ptr, 0.0, w_kv_ptr, row, row_mask, column, HALF, ok, WIDTH, BLOCK, False
        )
        if part == 1:
            first, second = _rotate(first, second, cos_ptr, sin_ptr, row, row_mask, pair, HALF)
        place = tl.load(place_ptr + row, mask=row_mask, other=0)
        mask = mask & summarizes
        _store_key(keys_ptr, part - 1, row, place, head, pair, mask, first, rows, places, HEADS, DIM)
        _store_key(keys_ptr, part - 1, row, place, head, pair + HALF, mask, second, rows, places, HEADS, DIM)


@triton.jit
def gate_kernel(
    x_ptr, gain_ptr, w_ptr, out_ptr, rows, eps,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """out [rows, HIDDEN]: silu of the gate times the rest, of the norm of x [rows, WIDTH]."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_mask, ok = row < rows, column < HIDDEN
    if ROWS == 1:
        gate_w = _rows_of(w_ptr, column, ok, BLOCK, WIDTH)
        up_w = _rows_of(w_ptr, column + HIDDEN, ok, BLOCK, WIDTH)
    begin(OVERLAPS)
    if ROWS == 1:
        gate, up = _two_row_products(x_ptr, gain_ptr, eps, gate_w, up_w, BLOCK, WIDTH, True)
    else:
        gate, up = _two_products(
            x_ptr, gain_ptr, eps, w_ptr, row, row_mask, column, HIDDEN, ok, WIDTH, BLOCK, True
        )
    out = gate * tl.sigmoid(gate) * up
    mask = row_mask[:, None] & ok[None, :]
    tl.store(out_ptr + row[:, None] * HIDDEN + column[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def down_kernel(
    hidden_ptr, w_ptr, x_ptr, parts_ptr, done_ptr, rows,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Adds hidden [rows, HIDDEN] times the transpose of w [WIDTH, HIDDEN] to x [rows, WIDTH].

    The products are summed in SPLITS parts, float32 [SPLITS, rows, WIDTH], which the program that is the last
    of its tile to be done joins in their order. done: int32 [WIDTH / COLUMNS, rows / ROWS], each rounded up,
    zeros before and after.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_mask, ok = row < rows, column < WIDTH
    if ROWS == 1:
        w = _rows_of(w_ptr, column, ok, BLOCK, HIDDEN)
    begin(OVERLAPS)
    split = tl.program_id(2)
    PART: tl.constexpr = (HIDDEN + SPLITS * BLOCK - 1) // (SPLITS * BLOCK) * BLOCK
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if ROWS == 1:
        hidden, _ = _row(hidden_ptr, hidden_ptr, 0.0, BLOCK, HIDDEN, False)
        total = _row_product(hidden, w)
    else:
        for start in range(0, PART, BLOCK):
            k = split * PART + start + tl.arange(0, BLOCK)
            hidden, _ = _tile(hidden_ptr, w_ptr, row, row_mask, k, HIDDEN, False)
            total = _add_product(total, hidden, w_ptr, column, ok, k, HIDDEN)
    mask = row_mask[:, None] & ok[None, :]
    offs = row[:, None] * WIDTH + column[None, :]
    if SPLITS == 1:
        total += tl.load(x_ptr + offs, mask=mask, other=0).to(tl.float32)
        tl.store(x_ptr + offs, total.to(x_ptr.dtype.element_ty), mask=mask)
    else:
        size = rows * WIDTH
        tl.store(parts_ptr + split * size + offs, total, mask=mask)
        tl.debug_barrier()  # all threads have stored before one of them says so
        done_ptr += tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        if tl.atomic_add(done_ptr, 1, sem="acq_rel") == SPLITS - 1:
            total = tl.load(x_ptr + offs, mask=mask, other=0).to(tl.float32)
            for part in tl.static_range(SPLITS):
                total += tl.load(parts_ptr + part * size + offs, mask=mask, other=0, cache_modifier=".cg")
            tl.store(x_ptr + offs, total.to(x_ptr.dtype.element_ty), mask=mask)
            tl.store(done_ptr, 0)


@triton.jit
def head_kernel(
    x_ptr, gain_ptr, w_ptr, gates_ptr, guess_ptr, out_ptr, rows, columns, eps,
    WIDTH: tl.constexpr, GUESSES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Logits, float32 [rows, columns], of the norm of x [rows, WIDTH]. Those of the columns guess
    [rows, GUESSES], where these are above 0, get the product with gates [GUESSES, WIDTH] added."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_mask, ok = row < rows, column < columns
    number = tl.arange(0, 16)
    if ROWS == 1:
        w = _rows_of(w_ptr, column, ok, BLOCK, WIDTH)
        gates_w = _rows_of(gates_ptr, number, number < GUESSES, BLOCK, WIDTH)
    begin(OVERLAPS)
    total, gates = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, 16], tl.float32)
    if ROWS == 1:
        total, gates = _two_row_products(x_ptr, gain_ptr, eps, w, gates_w, BLOCK, WIDTH, True)
    else:
        squares = tl.zeros([ROWS], tl.float32)
        for start in range(0, WIDTH, BLOCK):
            k = start + tl.arange(0, BLOCK)
            x, scaled = _tile(x_ptr, gain_ptr, row, row_mask, k, WIDTH, True)
            total = _add_product(total, scaled, w_ptr, column, ok, k, WIDTH)
            if GUESSES:
                gates = _add_product(gates, scaled, gates_ptr, number, number < GUESSES, k, WIDTH)
            squares = _add_squares(squares, x)
        rstd = _rstd(squares, eps, WIDTH)
        total, gates = total * rstd, gates * rstd
    for i in tl.static_range(GUESSES):
        guess = tl.load(guess_ptr + row * GUESSES + i, mask=row_mask, other=0)
        gate = tl.sum(tl.where((number == i)[None, :], gates, 0), 1)
        here = (guess[:, None] == column[None, :]) & (guess > 0)[:, None]
        total += tl.where(here, gate[:, None], 0)
    mask = row_mask[:, None] & ok[None, :]
    tl.store(out_ptr + row[:, None] * columns + column[None, :], total, mask=mask)
