"""The visibility rule in Triton: on pairs of tokens, and on blocks, to skip most pairs of them.

`structure.py` states the rule; this is its copy for the plan, and the tests hold the two to be equal
pair by pair. The properties of a token are six int32: document (-1 is padding, -2 a slot without a token),
bar, instrument, code, onset and position. The code says in its low bits what a token is as a key and in
its high bits which kinds a regular token sees as a query: any kind rule is then one bitwise and.
"""

import triton
import triton.language as tl

from . import structure

ABSENT = tl.constexpr(-2)  # the document of a slot without a token

# What a token is, as a key: `1 << kind` if it is regular, and ...
_KIND_BITS = tl.constexpr(5)
_KINDS = tl.constexpr(31)
SUMMARY = tl.constexpr(32)
_GLOBAL = tl.constexpr(64)
_KEY_BITS = tl.constexpr(7)
# ... shifted by this, which kinds it sees as a query whatever the onset.
_SEES = tl.constexpr(8)

NO_INSTRUMENT = tl.constexpr(structure.NO_INSTRUMENT)
NO_ONSET = tl.constexpr(-2)  # of summaries: no token has it
_BIG = tl.constexpr(2**30)


@triton.jit
def by_kind(kind, TABLE: tl.constexpr):
    """The entry of TABLE, a tuple over `structure.Kind`, that is each token's."""
    entry = kind * 0
    for k in tl.static_range(len(TABLE)):
        entry = tl.where(kind == k, TABLE[k], entry)
    return entry


@triton.jit
def code_of(kind, inst, KINDS_SEEN: tl.constexpr):
    """The code of regular tokens from their kind, their instrument and `structure.kinds_seen`."""
    is_global = (kind == 0) & (inst == NO_INSTRUMENT)
    return (1 << kind) | tl.where(is_global, _GLOBAL, 0) | (by_kind(kind, KINDS_SEEN) << _SEES)


@triton.jit
def _is_near(distance, NEAR_BARS: tl.constexpr, BITS: tl.constexpr):
    if BITS is None:
        near = distance == NEAR_BARS[0]
        for i in tl.static_range(1, len(NEAR_BARS)):
            near |= distance == NEAR_BARS[i]
        return near
    else:  # one bit per distance; a negative one is very large as an unsigned number
        beyond = tl.minimum(distance.to(tl.uint32, bitcast=True), 31)
        return ((BITS >> beyond) & 1) != 0


@triton.jit
def sees(x, y, x_is_query, same_inst, NEAR_BARS: tl.constexpr, BITS: tl.constexpr):
    """bool [BX, BY]: whether a pair is visible and of the local or, if `same_inst`, of the other pass.

    Args:
        x, y: the six properties of BX and of BY tokens.
        x_is_query: scalar; x are the queries and y the keys, or the other way round.
    """
    x_doc, x_bar, x_inst, x_code, x_onset, x_position = x
    y_doc, y_bar, y_inst, y_code, y_onset, y_position = y
    sign = tl.where(x_is_query, 1, -1)
    x_kind = tl.where(x_is_query, x_code >> _SEES, x_code & _KINDS)
    y_kind = tl.where(x_is_query, y_code & _KINDS, y_code >> _SEES)
    x_key, y_key = tl.where(x_is_query, 0, x_code), tl.where(x_is_query, y_code, 0)
    distance = (x_bar * sign)[:, None] - (y_bar * sign)[None, :]
    causal = (x_position * sign)[:, None] >= (y_position * sign)[None, :]
    same_doc = (x_doc[:, None] == y_doc[None, :]) & (y_doc >= 0)[None, :]
    kind_rule = (x_kind[:, None] & y_kind[None, :]) != 0
    kind_rule |= x_onset[:, None] == y_onset[None, :]
    near = ((x_key & _GLOBAL) != 0)[:, None] | ((y_key & _GLOBAL) != 0)[None, :]
    near |= _is_near(distance, NEAR_BARS, BITS)
    own = tl.where(same_inst, (x_inst[:, None] == y_inst[None, :]) & (near == 0), near)
    rs = ((x_key == SUMMARY)[:, None] | (y_key == SUMMARY)[None, :]) & (distance > 0)
    return same_doc & ((own & kind_rule & causal) | rs)


@triton.jit
def load_ranges(ranges_ptr, blocks, block, mask):
    """The twelve bounds of some blocks; see `store_ranges`."""
    at = ranges_ptr + block
    return (
        tl.load(at, mask=mask, other=0), tl.load(at + blocks, mask=mask, other=0),
        tl.load(at + 2 * blocks, mask=mask, other=0), tl.load(at + 3 * blocks, mask=mask, other=0),
        tl.load(at + 4 * blocks, mask=mask, other=0), tl.load(at + 5 * blocks, mask=mask, other=0),
        tl.load(at + 6 * blocks, mask=mask, other=0), tl.load(at + 7 * blocks, mask=mask, other=0),
        tl.load(at + 8 * blocks, mask=mask, other=0), tl.load(at + 9 * blocks, mask=mask, other=0),
        tl.load(at + 10 * blocks, mask=mask, other=0), tl.load(at + 11 * blocks, mask=mask, other=0),
    )  # fmt: skip


@triton.jit
def store_ranges(ranges_ptr, blocks, block, doc, bar, inst, code, onset, position):
    """Stores the least and greatest of each property in one block, and of the codes the bitwise or."""
    real = doc >= 0
    note = real & (onset >= 0)
    at = ranges_ptr + block
    tl.store(at, _low(doc, real))
    tl.store(at + blocks, _high(doc, real))
    tl.store(at + 2 * blocks, _low(bar, real))
    tl.store(at + 3 * blocks, _high(bar, real))
    tl.store(at + 4 * blocks, _low(inst, real))
    tl.store(at + 5 * blocks, _high(inst, real))
    tl.store(at + 6 * blocks, _low(onset, note))
    tl.store(at + 7 * blocks, _high(onset, note))
    tl.store(at + 8 * blocks, _low(position, real))
    tl.store(at + 9 * blocks, _high(position, real))
    tl.store(at + 10 * blocks, _joined(code, real, 0, _KEY_BITS))
    tl.store(at + 11 * blocks, _joined(code, real, _SEES, _KIND_BITS))


@triton.jit
def may_see(t, u, same_inst, NEAR_BARS: tl.constexpr):
    """Ranges of blocks of queries and keys -> False only if `sees` is False for all their pairs."""
    t_doc0, t_doc1, t_bar0, t_bar1, t_inst0, t_inst1, t_onset0, t_onset1, _, t_last, _, t_sees = t
    u_doc0, u_doc1, u_bar0, u_bar1, u_inst0, u_inst1, u_onset0, u_onset1, u_first, _, u_keys, _ = u
    kind_rule = (t_sees & u_keys) != 0
    kind_rule |= (u_onset0 <= t_onset1) & (u_onset1 >= t_onset0)
    low, high = t_bar0 - u_bar1, t_bar1 - u_bar0
    near = low * 0
    for i in tl.static_range(len(NEAR_BARS)):
        near += ((low <= NEAR_BARS[i]) & (NEAR_BARS[i] <= high)).to(tl.int32)
    other_distance = high - tl.maximum(low, 0) + 1 > near  # some distance is another
    same_inst_range = (u_inst0 <= t_inst1) & (u_inst1 >= t_inst0) & other_distance
    own = tl.where(same_inst, same_inst_range, (near > 0) | ((u_keys & _GLOBAL) != 0))
    rs = ((u_keys & SUMMARY) != 0) & (high > 0)
    return (u_doc0 <= t_doc1) & (u_doc1 >= t_doc0) & ((own & kind_rule & (u_first <= t_last)) | rs)


@triton.jit
def _low(x, among):
    return tl.min(tl.where(among, x, _BIG), 0)


@triton.jit
def _high(x, among):
    return tl.max(tl.where(among, x, -_BIG), 0)


@triton.jit
def _joined(code, among, FIRST: tl.constexpr, BITS: tl.constexpr):
    """Bits FIRST to FIRST + BITS that any token among some has, moved down to 0."""
    joined = 0
    for i in tl.static_range(BITS):
        joined += tl.max(tl.where(among, (code >> (FIRST + i)) & 1, 0), 0) << i
    return joined
