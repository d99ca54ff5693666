"""The summarize phase: each summary attends to the summaries up to itself and to the tokens of its bar.

Both are contiguous in a row, so that four numbers per summary define the mask: it needs no plan. A program
takes OWN summaries, at most the BM rows of its tile, and the keys that any of them sees; few of these pairs
are masked. The fewer its summaries, the fewer bars it reads one after the other; the more, the fewer times
earlier summaries are read. Every regular token is seen by exactly one summary, that of its bar: whoever
computes the gradient of the summary's query has all that those of the token need. Names and shapes are those
of `tiles`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .structure import Structure
from .tiles import LOWEST, head_ptr, start_program

_BLOCK = 128

_BEHIND_ALL = tl.constexpr(2**31 - 1)


@triton.jit
def _first_at_least(doc_ptr, bar_ptr, doc, bar, summaries, steps):
    """The first summary of a row that is not before (doc, bar), by bisection; padding is behind all."""
    low, high = doc * 0, doc * 0 + summaries
    for _ in range(steps):
        middle = (low + high) // 2
        inside = low < high
        other = tl.load(doc_ptr + middle, mask=inside, other=-1)
        before = (other >= 0) & (other <= doc)
        before &= (other < doc) | (tl.load(bar_ptr + middle, mask=inside, other=0) < bar)
        low = tl.where(inside & before, middle + 1, low)
        high = tl.where(inside & (before == 0), middle, high)
    return low


@triton.jit(do_not_specialize=["summaries", "regular", "steps"])
def bars_kernel(
    doc_ptr, bar_ptr, s_doc_ptr, s_bar_ptr, bars_ptr, slot_ptr, summaries, regular, steps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What the other kernels need, of a row: `bars`, int32 [B, M, 4], the first summary of a summary's
    document and the one after its last, the first token of its bar and the one after its last (all 0
    for padding); and `slot`, int32 [B, N], the summary of each token's bar, -1 for padding. `steps` halve
    the number of summaries to nothing."""
    row, index = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s_doc, s_bar = s_doc_ptr + row * summaries, s_bar_ptr + row * summaries
    out = bars_ptr + row * summaries * 4

    there = index < regular
    docs, bars = doc_ptr + row * regular + index, bar_ptr + row * regular + index
    doc, bar = tl.load(docs, mask=there, other=-1), tl.load(bars, mask=there, other=0)
    real = doc >= 0
    slot = tl.where(real, _first_at_least(s_doc, s_bar, doc, bar, summaries, steps), -1)
    tl.store(slot_ptr + row * regular + index, slot, mask=there)
    earlier, later = there & (index > 0), index + 1 < regular
    starts = (tl.load(docs - 1, mask=earlier, other=-1) != doc) | (
        tl.load(bars - 1, mask=earlier, other=-1) != bar
    )
    ends = (tl.load(docs + 1, mask=later, other=-1) != doc) | (tl.load(bars + 1, mask=later, other=-1) != bar)
    tl.store(out + slot * 4 + 2, index, mask=real & starts)
    tl.store(out + slot * 4 + 3, index + 1, mask=real & ends)

    there = index < summaries
    doc = tl.load(s_doc + index, mask=there, other=-1)
    first = _first_at_least(s_doc, s_bar, doc, doc * 0 - 1, summaries, steps)
    last = _first_at_least(s_doc, s_bar, doc + 1, doc * 0 - 1, summaries, steps)
    tl.store(out + index * 4, tl.where(doc >= 0, first, 0), mask=there)
    tl.store(out + index * 4 + 1, tl.where(doc >= 0, last, 0), mask=there)
    tl.store(out + index * 4 + 2, 0, mask=there & (doc < 0))
    tl.store(out + index * 4 + 3, 0, mask=there & (doc < 0))


@triton.jit
def _span(lower, upper):
    """The smallest range around several ranges [BM], some of which may be empty."""
    nonempty = upper > lower
    return tl.min(tl.where(nonempty, lower, _BEHIND_ALL), 0), tl.max(tl.where(nonempty, upper, 0), 0)


@triton.jit
def _attend(
    q, k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr, k_s_n, v_s_n, k_r_n, v_r_n, first_s, end_s, first_r, end_r, scale,
    offs_n, offs_d, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What q [BM, D] finds at the summaries and then at the tokens of each query: acc [BM, D], m_i and l_i
    [BM]. One loop, so that the first tokens are on their way while summaries are multiplied."""
    BN: tl.constexpr = offs_n.shape[0]
    acc = tl.zeros(q.shape, tl.float32)
    m_i, l_i = tl.full([q.shape[0]], LOWEST, tl.float32), tl.zeros([q.shape[0]], tl.float32)
    from_s, to_s = _span(first_s, end_s)
    from_r, to_r = _span(first_r, end_r)
    tiles_s = (tl.maximum(to_s - from_s, 0) + BN - 1) // BN
    tiles = tiles_s + (tl.maximum(to_r - from_r, 0) + BN - 1) // BN
    for tile in tl.range(0, tiles, num_stages=STAGES):
        of_s = tile < tiles_s
        key = tl.where(of_s, from_s + tile * BN, from_r + (tile - tiles_s) * BN) + offs_n  # [BN]
        n_mask = (key < tl.where(of_s, to_s, to_r))[:, None]  # [BN, 1]
        k_ptr, v_ptr = tl.where(of_s, k_s_ptr, k_r_ptr), tl.where(of_s, v_s_ptr, v_r_ptr)
        k_n, v_n = tl.where(of_s, k_s_n, k_r_n), tl.where(of_s, v_s_n, v_r_n)
        k = tl.load(k_ptr + key[:, None] * k_n + offs_d[None, :], mask=n_mask, other=0)  # [BN, D]
        v = tl.load(v_ptr + key[:, None] * v_n + offs_d[None, :], mask=n_mask, other=0)  # [BN, D]
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [BM, BN]
        lower, upper = tl.where(of_s, first_s, first_r), tl.where(of_s, end_s, end_r)  # [BM]
        mask = (key[None, :] >= lower[:, None]) & (key[None, :] < upper[:, None])  # [BM, BN]
        qk = tl.where(mask, qk, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1))  # [BM]
        p = tl.exp2(qk - m_new[:, None])  # [BM, BN]
        alpha = tl.exp2(m_i - m_new)  # [BM]
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)  # [BM, D]
        m_i = m_new
    return acc, m_i, l_i


@triton.jit
def _own(program, summaries, OWN: tl.constexpr, BM: tl.constexpr):
    """The summaries [BM] of a program, of which OWN at most are there, and which are, [BM]."""
    index = tl.arange(0, BM)
    summary = program * OWN + index
    return summary, (index < OWN) & (summary < summaries)


@triton.jit
def _load_ranges(bars_ptr, summary, m_mask):
    """The summaries and the regular tokens that some summaries [BM] see, as first and end; see
    `bars_kernel`."""
    bar_ptrs = bars_ptr + summary * 4  # [BM]
    first_s, first_r = tl.load(bar_ptrs, mask=m_mask, other=0), tl.load(bar_ptrs + 2, mask=m_mask, other=0)
    end_r = tl.load(bar_ptrs + 3, mask=m_mask, other=0)
    end_s = tl.where(end_r > first_r, summary + 1, first_s)  # padding sees nothing
    return first_s, end_s, first_r, end_r


@triton.jit(do_not_specialize=["heads", "summaries"])
def summarize_kernel(
    q_ptr, k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr, o_ptr, lse_ptr, bars_ptr,
    q_strides, k_s_strides, v_s_strides, k_r_strides, v_r_strides, o_strides,
    scale, heads, summaries,
    OVERLAPS: tl.constexpr, OWN: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OWN summaries of one head: o [B, H, M, D] and lse, float32 [B, H, M] in base 2; padding gets 0 and
    -inf."""
    start_program(True, OVERLAPS)
    head, row = tl.program_id(0) % heads, tl.program_id(1)
    summary, m_mask = _own(tl.program_id(0) // heads, summaries, OWN, BM)
    first_s, end_s, first_r, end_r = _load_ranges(bars_ptr + row * summaries * 4, summary, m_mask)
    b, h = row.to(tl.int64), head.to(tl.int64)
    offs_n, offs_d = tl.arange(0, BN), tl.arange(0, D)
    q_ptrs = head_ptr(q_ptr, q_strides, b, h) + summary[:, None] * q_strides[2] + offs_d[None, :]
    q = tl.load(q_ptrs, mask=m_mask[:, None], other=0)  # [BM, D]
    acc, m_i, l_i = _attend(
        q, head_ptr(k_s_ptr, k_s_strides, b, h), head_ptr(v_s_ptr, v_s_strides, b, h),
        head_ptr(k_r_ptr, k_r_strides, b, h), head_ptr(v_r_ptr, v_r_strides, b, h), k_s_strides[2],
        v_s_strides[2], k_r_strides[2], v_r_strides[2], first_s, end_s, first_r, end_r, scale, offs_n, offs_d,
        STAGES, PRECISION,
    )  # fmt: skip
    fully_masked = l_i == 0
    l_i = tl.where(fully_masked, 1.0, l_i)
    o = (acc / l_i[:, None]).to(o_ptr.dtype.element_ty)  # [BM, D]
    o_ptrs = head_ptr(o_ptr, o_strides, b, h) + summary[:, None] * o_strides[2] + offs_d[None, :]
    tl.store(o_ptrs, o, mask=m_mask[:, None])
    lse = tl.where(fully_masked, float("-inf"), m_i + tl.log2(l_i))
    tl.store(lse_ptr + (b * heads + h) * summaries + summary, lse, mask=m_mask)


@triton.jit
def _add_gradients(
    dq, q, do, lse, delta, k_ptr, v_ptr, dk_ptr, dv_ptr, k_n, v_n, dk_n, lower, upper, scale, softmax_scale,
    offs_n, offs_d, OF_KEYS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the keys from `lower` up to `upper` of each query to dq, not yet scaled and transposed: [D, BM].

    With OF_KEYS no other query sees these keys, and their dk and dv are stored. Everything is computed
    transposed, keys x queries: see `update_backward`.
    """
    first, end = _span(lower, upper)
    for start in tl.range(first, end, offs_n.shape[0], num_stages=STAGES):
        key = (start + offs_n)[:, None]  # [BN, 1]
        n_mask = key < end
        k = tl.load(k_ptr + key * k_n + offs_d[None, :], mask=n_mask, other=0)  # [BN, D]
        v = tl.load(v_ptr + key * v_n + offs_d[None, :], mask=n_mask, other=0)  # [BN, D]
        mask = (key >= lower[None, :]) & (key < upper[None, :])  # [BN, BM]
        kq = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BN, BM]
        p = tl.where(mask, tl.exp2(kq * scale - lse[None, :]), 0.0)  # [BN, BM]
        ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])  # [BN, BM]
        ds = ds.to(k.dtype)
        dq = tl.dot(tl.trans(k), ds, dq, input_precision=PRECISION)  # [D, BM]
        if OF_KEYS:
            dk = tl.dot(ds, q, input_precision=PRECISION) * softmax_scale  # [BN, D]
            dv = tl.dot(p.to(do.dtype), do, input_precision=PRECISION)  # [BN, D]
            offs = key * dk_n + offs_d[None, :]
            tl.store(dk_ptr + offs, dk.to(dk_ptr.dtype.element_ty), mask=n_mask)
            tl.store(dv_ptr + offs, dv.to(dv_ptr.dtype.element_ty), mask=n_mask)
    return dq


@triton.jit
def _of_queries(
    q_ptr, k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr, o_ptr, lse_ptr, do_ptr, dq_ptr, dk_r_ptr, dv_r_ptr, bars_ptr,
    q_n, k_s_n, v_s_n, k_r_n, v_r_n, do_n, o_n, dk_r_n, scale, softmax_scale, summary, m_mask, offs_n, offs_d,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of the summaries [BM], and dk and dv of the tokens of their bars."""
    first_s, end_s, first_r, end_r = _load_ranges(bars_ptr, summary, m_mask)
    offs_m, mask = summary[:, None], m_mask[:, None]
    q = tl.load(q_ptr + offs_m * q_n + offs_d[None, :], mask=mask, other=0)  # [BM, D]
    do = tl.load(do_ptr + offs_m * do_n + offs_d[None, :], mask=mask, other=0)  # [BM, D]
    o = tl.load(o_ptr + offs_m * o_n + offs_d[None, :], mask=mask, other=0)  # [BM, D]
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # [BM]
    lse = tl.load(lse_ptr + summary, mask=m_mask, other=0)  # [BM]
    dq = tl.zeros([offs_d.shape[0], summary.shape[0]], tl.float32)  # [D, BM]
    dq = _add_gradients(
        dq, q, do, lse, delta, k_r_ptr, v_r_ptr, dk_r_ptr, dv_r_ptr, k_r_n, v_r_n, dk_r_n, first_r, end_r,
        scale, softmax_scale, offs_n, offs_d, True, STAGES, PRECISION,
    )  # fmt: skip
    dq = _add_gradients(
        dq, q, do, lse, delta, k_s_ptr, v_s_ptr, dk_r_ptr, dv_r_ptr, k_s_n, v_s_n, dk_r_n, first_s, end_s,
        scale, softmax_scale, offs_n, offs_d, False, STAGES, PRECISION,
    )  # fmt: skip
    dq_ptrs = dq_ptr + summary[None, :] * o_n + offs_d[:, None]
    tl.store(dq_ptrs, (dq * softmax_scale).to(dq_ptr.dtype.element_ty), mask=m_mask[None, :])


@triton.jit
def _of_keys(
    q_ptr, k_s_ptr, v_s_ptr, o_ptr, lse_ptr, do_ptr, dk_ptr, dv_ptr, bars_ptr, q_n, k_s_n, v_s_n, do_n, o_n,
    scale, softmax_scale, first, summary, m_mask, summaries, offs_n, offs_d, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of the summaries [BM] from `first` on, from those that see them."""
    last_s = tl.load(bars_ptr + summary * 4 + 1, mask=m_mask, other=0)  # [BM]
    offs_m, mask = summary[:, None], m_mask[:, None]
    k = tl.load(k_s_ptr + offs_m * k_s_n + offs_d[None, :], mask=mask, other=0)  # [BM, D]
    v = tl.load(v_s_ptr + offs_m * v_s_n + offs_d[None, :], mask=mask, other=0)  # [BM, D]
    dk = tl.zeros(k.shape, tl.float32)
    dv = tl.zeros(k.shape, tl.float32)
    for start in tl.range(first, tl.max(last_s, 0), offs_n.shape[0], num_stages=2):
        query = start + offs_n  # [BN]
        n_mask = query < summaries
        at, at_mask = query[:, None], n_mask[:, None]  # [BN, 1]
        q = tl.load(q_ptr + at * q_n + offs_d[None, :], mask=at_mask, other=0)  # [BN, D]
        do = tl.load(do_ptr + at * do_n + offs_d[None, :], mask=at_mask, other=0)  # [BN, D]
        o = tl.load(o_ptr + at * o_n + offs_d[None, :], mask=at_mask, other=0)  # [BN, D]
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # [BN]
        lse = tl.load(lse_ptr + query, mask=n_mask, other=float("-inf"))  # [BN]
        seen = (query[None, :] >= summary[:, None]) & (query[None, :] < last_s[:, None])  # [BM, BN]
        seen &= (lse != float("-inf"))[None, :]  # padding sees nothing
        kq = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BM, BN]
        p = tl.where(seen, tl.exp2(kq * scale - lse[None, :]), 0.0)  # [BM, BN]
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)  # [BM, D]
        ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])  # [BM, BN]
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)  # [BM, D]
    offs = offs_m * o_n + offs_d[None, :]
    tl.store(dk_ptr + offs, (dk * softmax_scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + offs, dv.to(dv_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["heads", "summaries", "regular"])
def summarize_gradient_kernel(
    q_ptr, k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr, o_ptr, lse_ptr, do_ptr,
    dq_ptr, dk_s_ptr, dv_s_ptr, dk_r_ptr, dv_r_ptr, bars_ptr, slot_ptr,
    q_strides, k_s_strides, v_s_strides, k_r_strides, v_r_strides, do_strides, dq_strides, dk_r_strides,
    scale, softmax_scale, heads, summaries, regular,
    OVERLAPS: tl.constexpr, OWN: tl.constexpr, PADDING: tl.constexpr, BM: tl.constexpr, D: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients. A program is of one of three kinds: for BM summaries of one head it computes dk and dv,
    as keys; for OWN summaries of one head dq, and dk and dv of the tokens of their bars; or of PADDING tokens
    and all heads zeros for those that are padding.

    o, dk_s and dv_s have the strides of dq, dv_r those of dk_r.
    """
    start_program(True, OVERLAPS)
    head, program, row = tl.program_id(0) % heads, tl.program_id(0) // heads, tl.program_id(1)
    b, h = row.to(tl.int64), head.to(tl.int64)
    offs_d = tl.arange(0, D)
    of_keys = (summaries + BM - 1) // BM
    of_both = of_keys + (summaries + OWN - 1) // OWN
    if program < of_both:
        offs_n = tl.arange(0, BN)
        q_ptr, do_ptr = head_ptr(q_ptr, q_strides, b, h), head_ptr(do_ptr, do_strides, b, h)
        k_s_ptr, v_s_ptr = head_ptr(k_s_ptr, k_s_strides, b, h), head_ptr(v_s_ptr, v_s_strides, b, h)
        o_ptr = head_ptr(o_ptr, dq_strides, b, h)
        lse_ptr += (b * heads + h) * summaries
        bars_ptr += row * summaries * 4
        if program < of_keys:
            summary, m_mask = _own(program, summaries, BM, BM)
            _of_keys(
                q_ptr, k_s_ptr, v_s_ptr, o_ptr, lse_ptr, do_ptr, head_ptr(dk_s_ptr, dq_strides, b, h),
                head_ptr(dv_s_ptr, dq_strides, b, h), bars_ptr, q_strides[2], k_s_strides[2], v_s_strides[2],
                do_strides[2], dq_strides[2], scale, softmax_scale, program * BM, summary, m_mask, summaries,
                offs_n, offs_d, PRECISION,
            )  # fmt: skip
        else:
            summary, m_mask = _own(program - of_keys, summaries, OWN, BM)
            _of_queries(
                q_ptr, k_s_ptr, v_s_ptr, head_ptr(k_r_ptr, k_r_strides, b, h),
                head_ptr(v_r_ptr, v_r_strides, b, h), o_ptr, lse_ptr, do_ptr,
                head_ptr(dq_ptr, dq_strides, b, h), head_ptr(dk_r_ptr, dk_r_strides, b, h),
                head_ptr(dv_r_ptr, dk_r_strides, b, h), bars_ptr, q_strides[2], k_s_strides[2],
                v_s_strides[2], k_r_strides[2], v_r_strides[2], do_strides[2], dq_strides[2], dk_r_strides[2],
                scale, softmax_scale, summary, m_mask, offs_n, offs_d, STAGES, PRECISION,
            )  # fmt: skip
    else:
        token = (tl.program_id(0) - of_both * heads) * PADDING + tl.arange(0, PADDING)  # [PADDING]
        padding = tl.load(slot_ptr + row * regular + token, mask=token < regular, other=0) < 0
        if tl.max(padding.to(tl.int32), 0) > 0:
            offs = b * dk_r_strides[0] + token[:, None] * dk_r_strides[2] + offs_d[None, :]  # [PADDING, D]
            zeros = tl.zeros([PADDING, D], dk_r_ptr.dtype.element_ty)
            for _ in range(0, heads):
                tl.store(dk_r_ptr + offs, zeros, mask=padding[:, None])
                tl.store(dv_r_ptr + offs, zeros, mask=padding[:, None])
                offs += dk_r_strides[1]


def find_bars(structure: Structure) -> tuple[Tensor, Tensor]:
    """`bars` and `slot` of a structure, see `bars_kernel`."""
    rows, regular = structure.doc.shape
    summaries = structure.summary_doc.shape[1]
    bars = torch.empty(rows, summaries, 4, dtype=torch.int32, device=structure.device)
    slot = torch.empty(rows, regular, dtype=torch.int32, device=structure.device)
    bars_kernel[triton.cdiv(max(summaries, regular), _BLOCK), rows](
        structure.doc, structure.bar, structure.summary_doc, structure.summary_bar, bars, slot,
        summaries, regular, summaries.bit_length() + 1, BLOCK=_BLOCK,
    )  # fmt: skip
    return bars, slot
