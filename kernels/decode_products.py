"""The Triton kernels of a decoding step that read weights: one row for each song, in float32 inside.

A row either goes on with a song (mode READS) or computes a summary (mode SUMMARIZES), by weights of its own
where the two streams have such; rows of other modes are computed as if they read, and written where nothing
is kept. A program takes a few columns of the result for ROWS rows, so that each weight is read once for them;
weights of a stream that none of its rows belongs to are not read.

Weights behind a norm have its gains in them, so that what a product takes is x as it lies in memory: many
rows go from there to the tensor cores without passing through registers, and so do the sums of their squares,
the diagonal of x times its transpose. Rows that read and rows that summarize have programs of their own,
which run side by side.

A single row is a vector: matrix instructions would compute 16. Its weights, those of the stream that reads,
are on their way to the registers before what is multiplied with them is there; BLOCK is then a whole row of
them.

Tiles: R rows, C columns of the result, K channels of the input. PAIRS pairs of channels are rotated by RoPE.
"""

import triton
import triton.language as tl

from .overlap import let_next_start, wait_for_previous

READS, SUMMARIZES = 1, 2
_READS, _SUMMARIZES = tl.constexpr(READS), tl.constexpr(SUMMARIZES)
EARLY, LATE = 1, 2  # when a kernel lets the next one be launched
_EARLY, _LATE = tl.constexpr(EARLY), tl.constexpr(LATE)


@triton.jit
def begin(OVERLAPS: tl.constexpr):
    """Before a kernel reads what the one before wrote: if EARLY, lets the next one be launched; and waits.

    If OVERLAPS is not 0, launches of a graph overlap: a program is there when what it reads is. What was
    written by the kernel before must not be read earlier than here. What was written earlier may be, if some
    kernel between has waited before it let the next one start (`begin_before_reader`, or LATE): all that come
    after it start when all before it have ended.
    """
    let_next_start(OVERLAPS == _EARLY)
    wait_for_previous(OVERLAPS != 0)


@triton.jit
def begin_before_reader(OVERLAPS: tl.constexpr):
    """`begin` of a kernel before one that reads ahead what others wrote than this one: it waits first."""
    wait_for_previous(OVERLAPS != 0)
    let_next_start(OVERLAPS == _EARLY)


@triton.jit
def near_end(OVERLAPS: tl.constexpr):
    """Where a program has little left to do: if LATE, lets the next kernel be launched."""
    let_next_start(OVERLAPS == _LATE)


@triton.jit
def _rows_of(w_ptr, column, ok, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """[C, BLOCK] of the rows `column` of w [columns, WIDTH] that are `ok`."""
    k = tl.arange(0, BLOCK)
    mask = ok[:, None] & (k < WIDTH)[None, :]
    return tl.load(w_ptr + column.to(tl.int64)[:, None] * WIDTH + k[None, :], mask=mask, other=0)


@triton.jit
def _row(x_ptr, eps, BLOCK: tl.constexpr, WIDTH: tl.constexpr, NORMS: tl.constexpr):
    """x [BLOCK], float32, of the only row; and what norms it if NORMS, or 1."""
    k = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + k, mask=k < WIDTH, other=0).to(tl.float32)
    if NORMS:
        return x, 1 / tl.sqrt(tl.sum(x * x, 0) / WIDTH + eps)
    else:
        return x, tl.full([], 1, tl.float32)


@triton.jit
def _row_product(x, w):
    """[1, C]: x [K], float32, times the transpose of w [C, K]."""
    return tl.sum(w.to(tl.float32) * x[None, :], 1)[None, :]


@triton.jit
def _two_row_products(
    x_ptr, eps, first_w, second_w, BLOCK: tl.constexpr, WIDTH: tl.constexpr, NORMS: tl.constexpr
):
    """[1, C] twice: the only row of x [1, WIDTH], normed if NORMS, times the transposes of [C, BLOCK]."""
    x, rstd = _row(x_ptr, eps, BLOCK, WIDTH, NORMS)
    return _row_product(x, first_w) * rstd, _row_product(x, second_w) * rstd


@triton.jit
def _tile(x_ptr, row, row_mask, k, WIDTH: tl.constexpr):
    """[R, K] of x [rows, WIDTH]."""
    mask = row_mask[:, None] & (k < WIDTH)[None, :]
    return tl.load(x_ptr + row[:, None] * WIDTH + k[None, :], mask=mask, other=0)


@triton.jit
def _add_squares(squares, x):
    """squares [R, R], on the diagonal those of x [R, K] added; the rest means nothing."""
    return tl.dot(x, tl.trans(x), squares, input_precision="ieee")


@triton.jit
def _rstd(squares, eps, WIDTH: tl.constexpr):
    """[R, 1], what rows are multiplied with to be normed, by `_add_squares` of all their channels."""
    number = tl.arange(0, squares.shape[0])
    on_diagonal = number[:, None] == number[None, :]
    return (1 / tl.sqrt(tl.sum(tl.where(on_diagonal, squares, 0), 1) / WIDTH + eps))[:, None]


@triton.jit
def _add_product(total, x, w_ptr, column, column_mask, k, WIDTH: tl.constexpr):
    """total [R, C] + x [R, K] times the transpose of rows `column` of w [columns, WIDTH]."""
    mask = column_mask[:, None] & (k < WIDTH)[None, :]
    w = tl.load(w_ptr + column.to(tl.int64)[:, None] * WIDTH + k[None, :], mask=mask, other=0)
    return tl.dot(x, tl.trans(w), total, input_precision="ieee")


@triton.jit
def _two_products(
    x_ptr, eps, w_ptr, row, row_mask, column, APART: tl.constexpr, ok, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """[R, C] twice: x [rows, WIDTH], normed if NORMS, times the transpose of rows `column` of w, and of those
    APART further. Nothing else reads `eps`.

    The norm's root is taken of the products, since a pass before them would wait for memory once more."""
    if row.shape[0] == 1:
        first_w = _rows_of(w_ptr, column, ok, BLOCK, WIDTH)
        second_w = _rows_of(w_ptr, column + APART, ok, BLOCK, WIDTH)
        return _two_row_products(x_ptr, eps, first_w, second_w, BLOCK, WIDTH, NORMS)
    first = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    second = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    squares = tl.zeros([row.shape[0], row.shape[0]], tl.float32)
    for start in tl.range(0, WIDTH, BLOCK, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK)
        x = _tile(x_ptr, row, row_mask, k, WIDTH)
        first = _add_product(first, x, w_ptr, column, ok, k, WIDTH)
        second = _add_product(second, x, w_ptr, column + APART, ok, k, WIDTH)
        if NORMS:
            squares = _add_squares(squares, x)
    if NORMS:
        rstd = _rstd(squares, eps, WIDTH)
        first, second = first * rstd, second * rstd
    return first, second


@triton.jit
def _any(mask):
    return tl.max(mask.to(tl.int32), 0) > 0


@triton.jit
def _rotate(first, second, cos_ptr, sin_ptr, row, row_mask, pair, HALF: tl.constexpr):
    """Both halves of the channels, [R, PAIRS] each, rotated by the angles of the rows [rows, HALF]."""
    offs = row[:, None] * HALF + pair[None, :]
    mask = row_mask[:, None] & (pair < HALF)[None, :]
    cos = tl.load(cos_ptr + offs, mask=mask, other=0).to(tl.float32)
    sin = tl.load(sin_ptr + offs, mask=mask, other=0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _store_key(
    keys_ptr, row, place, head, channel, mask, value, places, HEADS: tl.constexpr, DIM: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """value [R, C] to place [R] of keys [.., places, HEADS, DIM].

    MOST: the largest number that these hold, if values may be beyond; or 0."""
    if MOST:
        value = tl.minimum(tl.maximum(value, -MOST), MOST)
    at = (row.to(tl.int64) * places + place) * HEADS + head  # [R]
    tl.store(keys_ptr + at[:, None] * DIM + channel[None, :], value.to(keys_ptr.dtype.element_ty), mask=mask)


@triton.jit
def project_kernel(
    x_ptr, w_r_ptr, w_s_ptr, cos_ptr, sin_ptr, mode_ptr, place_ptr, q_ptr, keys_ptr, rows, places, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Norm, QKV and RoPE of x [rows, E]: queries to q [rows, HEADS, D], keys and values to place [rows].

    Of the last axis of programs the first takes rows that read, the second those that summarize; if ROWS is
    1, the first takes both.
    """
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
    begin_before_reader(OVERLAPS)  # which has its keys on their way
    summarizes = tl.load(mode_ptr + row, mask=row_mask, other=0) == _SUMMARIZES
    first, second = tl.zeros([ROWS, PAIRS], tl.float32), tl.zeros([ROWS, PAIRS], tl.float32)
    if ROWS == 1:  # does not wait for the mode
        first, second = _two_row_products(x_ptr, eps, first_w, second_w, BLOCK, WIDTH, True)
        if _any(summarizes):
            first, second = _two_products(
                x_ptr, eps, w_s_ptr, row, row_mask, column, HALF, ok, WIDTH, BLOCK, STAGES, True
            )
    else:
        w_ptr = w_r_ptr
        if tl.program_id(2) == 1:
            w_ptr = w_s_ptr
        row_mask = row_mask & (summarizes == (tl.program_id(2) == 1))
        if _any(row_mask):
            first, second = _two_products(
                x_ptr, eps, w_ptr, row, row_mask, column, HALF, ok, WIDTH, BLOCK, STAGES, True
            )
    near_end(OVERLAPS)
    if part < 2:
        first, second = _rotate(first, second, cos_ptr, sin_ptr, row, row_mask, pair, HALF)
    mask = row_mask[:, None] & ok[None, :]
    if part == 0:
        offs = (row * HEADS + head)[:, None] * DIM + pair[None, :]
        tl.store(q_ptr + offs, first.to(q_ptr.dtype.element_ty), mask=mask)
        tl.store(q_ptr + offs + HALF, second.to(q_ptr.dtype.element_ty), mask=mask)
    else:
        place = tl.load(place_ptr + row, mask=row_mask, other=0)
        to = (part - 1) * rows + row
        _store_key(keys_ptr, to, place, head, pair, mask, first, places, HEADS, DIM, MOST)
        _store_key(keys_ptr, to, place, head, pair + HALF, mask, second, places, HEADS, DIM, MOST)


@triton.jit
def attended_kernel(
    o_ptr, w_r_ptr, w_s_ptr, w_kv_ptr, cos_ptr, sin_ptr, mode_ptr, place_ptr, x_ptr, keys_ptr, rows, places,
    HEADS: tl.constexpr, HALF: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Adds the output projection of o [rows, E] to x [rows, E], and writes what tokens see of summaries.

    Of the last axis of programs the first takes the projection of rows that read, the next two keys and
    values of summaries, which go to place [rows], and the last the projection of rows that summarize; if ROWS
    is 1, there is none of these, and the first takes both. Those that have no row end at once.
    """
    DIM: tl.constexpr = 2 * HALF
    WIDTH: tl.constexpr = HEADS * DIM
    BLOCKS: tl.constexpr = HALF // PAIRS
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    head, part = tl.program_id(0) // BLOCKS, tl.program_id(2)
    pair = tl.program_id(0) % BLOCKS * PAIRS + tl.arange(0, PAIRS)
    column = head * DIM + pair
    ok = pair < HALF
    projects = (part == 0) | (part == 3)
    w_column = column
    if not projects:
        w_column += (part - 1) * WIDTH
    if ROWS == 1:
        first_w = _rows_of(w_r_ptr, column, ok & projects, BLOCK, WIDTH)
        second_w = _rows_of(w_r_ptr, column + HALF, ok & projects, BLOCK, WIDTH)
    begin(OVERLAPS)
    summarizes = tl.load(mode_ptr + row, mask=row_mask, other=0) == _SUMMARIZES
    first, second = tl.zeros([ROWS, PAIRS], tl.float32), tl.zeros([ROWS, PAIRS], tl.float32)
    w_ptr = w_s_ptr
    if not projects:
        w_ptr = w_kv_ptr
    if ROWS == 1:
        if projects:
            first, second = _two_row_products(o_ptr, 0.0, first_w, second_w, BLOCK, WIDTH, False)
        else:
            row_mask = row_mask & summarizes
        takes = _any(summarizes)
    else:
        if part == 0:
            w_ptr = w_r_ptr
        row_mask = row_mask & (summarizes == (part > 0))
        takes = _any(row_mask)
    if takes:
        first, second = _two_products(
            o_ptr, 0.0, w_ptr, row, row_mask, w_column, HALF, ok, WIDTH, BLOCK, STAGES, False
        )
    near_end(OVERLAPS)
    mask = row_mask[:, None] & ok[None, :]
    if projects:
        ptrs = x_ptr + row[:, None] * WIDTH + column[None, :]
        first += tl.load(ptrs, mask=mask, other=0).to(tl.float32)
        second += tl.load(ptrs + HALF, mask=mask, other=0).to(tl.float32)
        tl.store(ptrs, first.to(x_ptr.dtype.element_ty), mask=mask)
        tl.store(ptrs + HALF, second.to(x_ptr.dtype.element_ty), mask=mask)
    else:
        if part == 1:
            first, second = _rotate(first, second, cos_ptr, sin_ptr, row, row_mask, pair, HALF)
        place = tl.load(place_ptr + row, mask=row_mask, other=0)
        to = (part - 1) * rows + row
        _store_key(keys_ptr, to, place, head, pair, mask, first, places, HEADS, DIM, MOST)
        _store_key(keys_ptr, to, place, head, pair + HALF, mask, second, places, HEADS, DIM, MOST)


@triton.jit
def gate_kernel(
    x_ptr, w_ptr, out_ptr, rows, eps,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
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
        gate, up = _two_row_products(x_ptr, eps, gate_w, up_w, BLOCK, WIDTH, True)
    else:
        gate, up = _two_products(
            x_ptr, eps, w_ptr, row, row_mask, column, HIDDEN, ok, WIDTH, BLOCK, STAGES, True
        )
    near_end(OVERLAPS)
    out = gate * tl.sigmoid(gate) * up
    mask = row_mask[:, None] & ok[None, :]
    tl.store(out_ptr + row[:, None] * HIDDEN + column[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def down_kernel(
    hidden_ptr, w_ptr, x_ptr, parts_ptr, done_ptr, rows,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
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
        hidden, _ = _row(hidden_ptr, 0.0, BLOCK, HIDDEN, False)
        total = _row_product(hidden, w)
    else:
        for start in tl.range(0, PART, BLOCK, num_stages=STAGES):
            k = split * PART + start + tl.arange(0, BLOCK)
            hidden = _tile(hidden_ptr, row, row_mask, k, HIDDEN)
            total = _add_product(total, hidden, w_ptr, column, ok, k, HIDDEN)
    near_end(OVERLAPS)
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
    x_ptr, w_ptr, gates_ptr, guess_ptr, out_ptr, rows, columns, eps,
    WIDTH: tl.constexpr, GUESSES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
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
    begin_before_reader(OVERLAPS)  # which has found what may follow
    total, gates = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, 16], tl.float32)
    if ROWS == 1:
        total, gates = _two_row_products(x_ptr, eps, w, gates_w, BLOCK, WIDTH, True)
    else:
        squares = tl.zeros([ROWS, ROWS], tl.float32)
        for start in tl.range(0, WIDTH, BLOCK, num_stages=STAGES):
            k = start + tl.arange(0, BLOCK)
            x = _tile(x_ptr, row, row_mask, k, WIDTH)
            total = _add_product(total, x, w_ptr, column, ok, k, WIDTH)
            if GUESSES:
                gates = _add_product(gates, x, gates_ptr, number, number < GUESSES, k, WIDTH)
            squares = _add_squares(squares, x)
        rstd = _rstd(squares, eps, WIDTH)
        total, gates = total * rstd, gates * rstd
    near_end(OVERLAPS)
    for i in tl.static_range(GUESSES):
        guess = tl.load(guess_ptr + row * GUESSES + i, mask=row_mask, other=0)
        gate = tl.sum(tl.where((number == i)[None, :], gates, 0), 1)
        here = (guess[:, None] == column[None, :]) & (guess > 0)[:, None]
        total += tl.where(here, gate[:, None], 0)
    mask = row_mask[:, None] & ok[None, :]
    tl.store(out_ptr + row[:, None] * columns + column[None, :], total, mask=mask)
