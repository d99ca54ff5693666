"""What the update kernels of both directions share: work items, gathered tiles, masks, split work.

Names and shapes in every kernel of the attention:

    B rows of a batch, H heads, D channels of a head, N regular (r) and M summary (s) tokens;
    BM x BN the tile of a program: BM tokens of its own block, BN gathered tokens at a time;
    *_ptr a base address, *_ptrs a tile of addresses, *_strides (batch, head, token) of [B, H, length, D],
    whose last stride is 1; offs_m [BM], offs_n [BN] and offs_d [D] positions along a tile;
    b and h the batch index and head, int64, since offsets between heads may exceed 32 bits (offsets within
    a head do not: `ops` sees to that).

See `plan.Plan` for the tensors of a plan.
"""

from math import e, log2

import triton
import triton.language as tl

from .overlap import let_next_start, wait_for_previous

BLOCK = tl.constexpr(64)  # tokens of a block, and gathered tokens of a tile: of a plan
PAIRS = tl.constexpr(4)  # the group of work items of a plan that are pairs of blocks; four are of blocks
ITEM_COUNTS = tl.constexpr(8)  # where `needs` of a plan holds the number of items of each group
ITEM_SIZE = tl.constexpr(16)  # int32 of an item: what it is, and from ITEM_LISTS on a list or two
ITEM_LISTS = tl.constexpr(8)

# Arguments that differ from batch to batch: compiling anew for some of their values would gain nothing.
GEOMETRY = (
    *("heads", "queries", "summaries", "blocks"),
    *("first_block", "group", "items"),
)

LOG2_E = log2(e)  # on scores before a softmax in base 2, whose exponentials are the cheaper ones

# Below any logit, but finite: -inf - -inf would be NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def start_program(WAITS: tl.constexpr, OVERLAPS: tl.constexpr):
    """First of all in a kernel. With OVERLAPS those of an operator start while the one before them ends: they
    read what the operator was given, which is there because the first of them WAITS for it, and need what
    others left at their own end alone."""
    wait_for_previous(OVERLAPS and WAITS)
    let_next_start(OVERLAPS)


@triton.jit
def start_query_gradient(FIRST: tl.constexpr, OVERLAPS: tl.constexpr):
    """As `start_program`, in the gradient of queries. Those of keys need two numbers of each query that its
    first pass finds, and no more of it: it lets the next kernel start when these are stored."""
    wait_for_previous(OVERLAPS and FIRST)
    let_next_start(OVERLAPS and not FIRST)


@triton.jit
def wait_at_last(WAITED: tl.constexpr, OVERLAPS: tl.constexpr):
    """In a kernel that has not WAITED: before it reads or writes anything that those before it write, partial
    results and counters too; and at the end of each program, so that whoever waits for this kernel waits for
    those before it, too."""
    wait_for_previous(OVERLAPS and not WAITED)


@triton.jit
def head_ptr(base_ptr, strides, b, h):
    """Where head h of batch row b begins."""
    return base_ptr + b * strides[0] + h * strides[1]


@triton.jit
def keys_of_head(pointers, strides, b, h):
    """`keys` and `key_strides` of `key_pointers`, from the tensors (k_s, v_s, k_r, v_r) and their strides."""
    keys = (
        head_ptr(pointers[0], strides[0], b, h), head_ptr(pointers[1], strides[1], b, h),
        head_ptr(pointers[2], strides[2], b, h), head_ptr(pointers[3], strides[3], b, h),
    )  # fmt: skip
    return keys, (strides[0][2], strides[1][2], strides[2][2], strides[3][2])


@triton.jit
def load_item(items_ptr, needs_ptr, heads, group, items, SUBS: tl.constexpr):
    """The work item of a group that this program computes for one head, or a part of it, of SUBS. Heads come
    first: those of one item share its list and masks. See `plan_work.work_kernel`.

    All of it is read at once: what a program waits for before its first tile, it waits for in a row.

    Returns:
        head, sub: which head and which part.
        there: whether there is one; the rest means nothing otherwise.
        item_ptr: the item, for `load_split`.
        block: its block, counted within the group.
        begin, end: its tiles, counted within the list of the block.
        slot: where it leaves its partial result; -1 if it has the whole list.
        first, first_masked, num_masked: the first tile of the list, its first tile among the masked ones of
            all lists, and how many are masked.
        num_tiles: tiles of the list.
    """
    head, sub = tl.program_id(0) % heads, tl.program_id(0) // heads % SUBS
    index = tl.program_id(0) // heads // SUBS
    there = index < tl.load(needs_ptr + ITEM_COUNTS + group)
    item_ptr = items_ptr + (group * items + index) * ITEM_SIZE
    block, begin, end = tl.load(item_ptr), tl.load(item_ptr + 1), tl.load(item_ptr + 2)
    slot = tl.load(item_ptr + 3)
    list_ptr = item_ptr + ITEM_LISTS
    first, first_masked, num_masked = tl.load(list_ptr), tl.load(list_ptr + 1), tl.load(list_ptr + 2)
    num_tiles = tl.load(list_ptr + 3)
    return head, sub, there, item_ptr, block, begin, end, slot, first, first_masked, num_masked, num_tiles


@triton.jit
def load_split(item_ptr):
    """The first slot of the block that an item belongs to, and the number of its items."""
    return tl.load(item_ptr + 4), tl.load(item_ptr + 5)


@triton.jit
def last_to_arrive(counters_ptr, first_slot, splits, heads, head, sub, SUBS: tl.constexpr):
    """True for the last split of a block to arrive; the partial results of all are visible to it then. It
    leaves the counter as it was for the first one: zero.

    Which one is last differs from run to run, but it adds up all of them in the order of the list.
    """
    tl.debug_barrier()  # all threads have written
    counter_ptr = counters_ptr + (first_slot * heads + head) * SUBS + sub
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == splits - 1
    tl.store(counter_ptr, 0, mask=last)
    return last


@triton.jit
def merge(acc, m_i, l_i, acc_part, m_part, l_part):
    """acc [BM, D], m_i and l_i [BM] of the keys of both."""
    m_new = tl.maximum(m_i, m_part)
    alpha, beta = tl.exp2(m_i - m_new), tl.exp2(m_part - m_new)
    return acc * alpha[:, None] + acc_part * beta[:, None], m_new, l_i * alpha + l_part * beta


@triton.jit
def tile_mask(bits_ptr, half, offs_m, offs_n, BN: tl.constexpr):
    """The mask of BN gathered tokens, 32 or 64, from half tile `half` on: bool [BM, BN].

    A half tile is one word for each of the block's 64 tokens. Gathered token n is bit 4 * (n % 8) + n % 32
    // 8 of it: a thread of a tensor core's accumulator holds the columns n0 + {0, 1} + 8 j of a row, so
    that it shifts a word once, by 4 * n0, and tests bits that the compiler knows.
    """
    word_ptrs = bits_ptr + half * BLOCK + offs_m  # [BM]
    word = tl.load(word_ptrs)[:, None]  # [BM, 1]
    if BN == 64:
        word = tl.where((offs_n < 32)[None, :], word, tl.load(word_ptrs + BLOCK)[:, None])  # [BM, BN]
    word = word >> (4 * (offs_n & 6))[None, :]
    return (word & (1 << (4 * (offs_n & 1) + ((offs_n & 31) >> 3)))[None, :]) != 0


@triton.jit
def key_pointers(token, keys, key_strides, summaries, HAS_SUMMARIES: tl.constexpr):
    """Where the keys and the values of some tokens begin: two tiles of addresses [BN, 1].

    Args:
        token: [BN], counted over summaries and regular tokens together, summaries first.
        keys: (k_s, v_s, k_r, v_r), where the head begins in each.
        key_strides: from token to token in each.

    The stream is told by the token and not by its tile: a scalar that a loop has loaded would keep
    Triton (3.7) from pipelining the loads of keys and values.
    """
    k_s, v_s, k_r, v_r = keys
    k_s_n, v_s_n, k_r_n, v_r_n = key_strides
    regular = (token - summaries)[:, None]
    # Not all strides tell that rows begin at multiples of 16 bytes, to which `ops` sees, and Triton 3.8 and
    # 3.9 forget it where addresses are chosen: nothing would be copied by 16 bytes, nor asynchronously.
    k_ptrs = tl.multiple_of(k_r + regular * k_r_n, (16, 16))
    v_ptrs = tl.multiple_of(v_r + regular * v_r_n, (16, 16))
    if HAS_SUMMARIES:
        is_summary = (token < summaries)[:, None]
        k_ptrs = tl.multiple_of(tl.where(is_summary, k_s + token[:, None] * k_s_n, k_ptrs), (16, 16))
        v_ptrs = tl.multiple_of(tl.where(is_summary, v_s + token[:, None] * v_s_n, v_ptrs), (16, 16))
    return k_ptrs, v_ptrs
