"""The summarize phase: each summary attends to the summaries up to itself and to the tokens of its bar.

Both are contiguous in a row, so that four numbers per summary define the mask: it needs no plan. A program
takes OWN summaries, at most the BM rows of its tile, and the keys that any of them sees; few of these pairs
are masked. The fewer its summaries, the fewer bars it reads one after the other; the more, the fewer times
earlier summaries are read. Every regular token is seen by exactly one summary: its gradients need no
reduction and no matrix instruction. Names and shapes are those of `tiles`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .structure import Structure
from .tiles import LOWEST, head_ptr

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
    acc, m_i, l_i, q, k_ptr, v_ptr, k_n, v_n, lower, upper, scale, offs_n, offs_d, PRECISION: tl.constexpr
):  # fmt: skip
    """Takes the keys from `lower` up to `upper` of each query into acc [BM, D], m_i and l_i [BM]."""
    first, end = _span(lower, upper)
    for start in tl.range(first, end, offs_n.shape[0], num_stages=2):
        key = start + offs_n  # [BN]
        n_mask = (key < end)[:, None]  # [BN, 1]
        k = tl.load(k_ptr + key[:, None] * k_n + offs_d[None, :], mask=n_mask, other=0)  # [BN, D]
        v = tl.load(v_ptr + key[:, None] * v_n + offs_d[None, :], mask=n_mask, other=0)  # [BN, D]
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [BM, BN]
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
    OWN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OWN summaries of one head: o [B, H, M, D] and lse, float32 [B, H, M] in base 2; padding gets 0 and
    -inf."""
    head, row = tl.program_id(0) % heads, tl.program_id(1)
    summary, m_mask = _own(tl.program_id(0) // heads, summaries, OWN, BM)
    first_s, end_s, first_r, end_r = _load_ranges(bars_ptr + row * summaries * 4, summary, m_mask)
    b, h = row.to(tl.int64), head.to(tl.int64)
    offs_n, offs_d = tl.arange(0, BN), tl.arange(0, D)
    q_ptrs = head_ptr(q_ptr, q_strides, b, h) + summary[:, None] * q_strides[2] + offs_d[None, :]
    q = tl.load(q_ptrs, mask=m_mask[:, None], other=0)  # [BM, D]
    acc = tl.zeros([BM, D], tl.float32)
    m_i, l_i = tl.full([BM], LOWEST, tl.float32), tl.zeros([BM], tl.float32)
    acc, m_i, l_i = _attend(
        acc, m_i, l_i, q, head_ptr(k_s_ptr, k_s_strides, b, h), head_ptr(v_s_ptr, v_s_strides, b, h),
        k_s_strides[2], v_s_strides[2], first_s, end_s, scale, offs_n, offs_d, PRECISION,
    )  # fmt: skip
    acc, m_i, l_i = _attend(
        acc, m_i, l_i, q, head_ptr(k_r_ptr, k_r_strides, b, h), head_ptr(v_r_ptr, v_r_strides, b, h),
        k_r_strides[2], v_r_strides[2], first_r, end_r, scale, offs_n, offs_d, PRECISION,
    )  # fmt: skip
    fully_masked = l_i == 0
    l_i = tl.where(fully_masked, 1.0, l_i)
    o = (acc / l_i[:, None]).to(o_ptr.dtype.element_ty)  # [BM, D]
    o_ptrs = head_ptr(o_ptr, o_strides, b, h) + summary[:, None] * o_strides[2] + offs_d[None, :]
    tl.store(o_ptrs, o, mask=m_mask[:, None])
    lse = tl.where(fully_masked, float("-inf"), m_i + tl.log2(l_i))
    tl.store(lse_ptr + (b * heads + h) * summaries + summary, lse, mask=m_mask)


@triton.jit
def _add_query_gradient(
    dq, q, do, lse, delta, k_ptr, v_ptr, k_n, v_n, lower, upper, scale, offs_n, offs_d,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the keys from `lower` up to `upper` of each query to dq [BM, D], not yet scaled."""
    first, end = _span(lower, upper)
    for start in tl.range(first, end, offs_n.shape[0], num_stages=2):
        key = start + offs_n  # [BN]
        n_mask = (key < end)[:, None]  # [BN, 1]
        k = tl.load(k_ptr + key[:, None] * k_n + offs_d[None, :], mask=n_mask, other=0)  # [BN, D]
        v = tl.load(v_ptr + key[:, None] * v_n + offs_d[None, :], mask=n_mask, other=0)  # [BN, D]
        mask = (key[None, :] >= lower[:, None]) & (key[None, :] < upper[:, None])  # [BM, BN]
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
        p = tl.where(mask, tl.exp2(qk * scale - lse[:, None]), 0.0)  # [BM, BN]
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])  # [BM, BN]
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)  # [BM, D]
    return dq


@triton.jit(do_not_specialize=["heads", "summaries"])
def summary_gradient_kernel(
    q_ptr, k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr, o_ptr, lse_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr, bars_ptr,
    q_strides, k_s_strides, v_s_strides, k_r_strides, v_r_strides, do_strides, dq_strides,
    scale, softmax_scale, heads, summaries,
    OWN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of OWN summaries of one head: dq in programs of even number; in the others dk and dv, as keys.

    o, dk and dv have the strides of dq.
    """
    head, work, row = tl.program_id(0) // 2 % heads, tl.program_id(0) // 2 // heads, tl.program_id(1)
    b, h = row.to(tl.int64), head.to(tl.int64)
    summary, m_mask = _own(work, summaries, OWN, BM)
    offs_n, offs_d = tl.arange(0, BN), tl.arange(0, D)
    q_ptr = head_ptr(q_ptr, q_strides, b, h)
    do_ptr = head_ptr(do_ptr, do_strides, b, h)
    o_ptr = head_ptr(o_ptr, dq_strides, b, h)
    k_s_ptr = head_ptr(k_s_ptr, k_s_strides, b, h)
    v_s_ptr = head_ptr(v_s_ptr, v_s_strides, b, h)
    lse_ptr += (b * heads + h) * summaries
    bars_ptr += row * summaries * 4
    o_offs = summary[:, None] * dq_strides[2] + offs_d[None, :]  # [BM, D], from o_ptr on
    out_offs = b * dq_strides[0] + h * dq_strides[1] + o_offs

    if tl.program_id(0) % 2 == 0:
        first_s, end_s, first_r, end_r = _load_ranges(bars_ptr, summary, m_mask)
        q = tl.load(q_ptr + summary[:, None] * q_strides[2] + offs_d[None, :], mask=m_mask[:, None], other=0)
        do = tl.load(
            do_ptr + summary[:, None] * do_strides[2] + offs_d[None, :], mask=m_mask[:, None], other=0
        )
        o = tl.load(o_ptr + o_offs, mask=m_mask[:, None], other=0)  # [BM, D], as q and do
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # [BM]
        lse = tl.load(lse_ptr + summary, mask=m_mask, other=0)  # [BM]
        dq = tl.zeros([BM, D], tl.float32)
        dq = _add_query_gradient(
            dq, q, do, lse, delta, k_s_ptr, v_s_ptr, k_s_strides[2], v_s_strides[2],
            first_s, end_s, scale, offs_n, offs_d, PRECISION,
        )  # fmt: skip
        dq = _add_query_gradient(
            dq, q, do, lse, delta, head_ptr(k_r_ptr, k_r_strides, b, h), head_ptr(v_r_ptr, v_r_strides, b, h),
            k_r_strides[2], v_r_strides[2], first_r, end_r, scale, offs_n, offs_d, PRECISION,
        )  # fmt: skip
        tl.store(dq_ptr + out_offs, (dq * softmax_scale).to(dq_ptr.dtype.element_ty), mask=m_mask[:, None])
    else:
        last_s = tl.load(bars_ptr + summary * 4 + 1, mask=m_mask, other=0)  # [BM]
        k = tl.load(
            k_s_ptr + summary[:, None] * k_s_strides[2] + offs_d[None, :], mask=m_mask[:, None], other=0
        )
        v = tl.load(
            v_s_ptr + summary[:, None] * v_s_strides[2] + offs_d[None, :], mask=m_mask[:, None], other=0
        )
        dk = tl.zeros([BM, D], tl.float32)
        dv = tl.zeros([BM, D], tl.float32)
        for start in tl.range(work * OWN, tl.max(last_s, 0), BN, num_stages=2):
            query = start + offs_n  # [BN]
            n_mask = query < summaries
            at, at_mask = query[:, None], n_mask[:, None]  # [BN, 1]
            q = tl.load(q_ptr + at * q_strides[2] + offs_d[None, :], mask=at_mask, other=0)  # [BN, D]
            do = tl.load(do_ptr + at * do_strides[2] + offs_d[None, :], mask=at_mask, other=0)  # [BN, D]
            o = tl.load(o_ptr + at * dq_strides[2] + offs_d[None, :], mask=at_mask, other=0)  # [BN, D]
            delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # [BN]
            lse = tl.load(lse_ptr + query, mask=n_mask, other=float("-inf"))  # [BN]
            mask = (query[None, :] >= summary[:, None]) & (query[None, :] < last_s[:, None])  # [BM, BN]
            mask &= (lse != float("-inf"))[None, :]  # padding sees nothing
            kq = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BM, BN]
            p = tl.where(mask, tl.exp2(kq * scale - lse[None, :]), 0.0)  # [BM, BN]
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)  # [BM, D]
            ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])  # [BM, BN]
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)  # [BM, D]
        tl.store(dk_ptr + out_offs, (dk * softmax_scale).to(dk_ptr.dtype.element_ty), mask=m_mask[:, None])
        tl.store(dv_ptr + out_offs, dv.to(dv_ptr.dtype.element_ty), mask=m_mask[:, None])


@triton.jit
def _probabilities(q_ptr, do_ptr, o_ptr, lse_ptr, q_n, do_n, o_n, query, n_mask, k, v, scale, offs_d):
    """Of pairs of a query [BN] and a key, k and v [BN, D]: q and dO [BN, D], P and dS [BN]."""
    at, at_mask = query[:, None], n_mask[:, None]  # [BN, 1]
    q = tl.load(q_ptr + at * q_n + offs_d[None, :], mask=at_mask, other=0).to(tl.float32)  # [BN, D]
    do = tl.load(do_ptr + at * do_n + offs_d[None, :], mask=at_mask, other=0).to(tl.float32)  # [BN, D]
    o = tl.load(o_ptr + at * o_n + offs_d[None, :], mask=at_mask, other=0).to(tl.float32)  # [BN, D]
    lse = tl.load(lse_ptr + query, mask=n_mask, other=0)  # [BN]
    p = tl.where(n_mask, tl.exp2(tl.sum(q * k, 1) * scale - lse), 0.0)  # [BN]
    ds = p * (tl.sum(do * v, 1) - tl.sum(do * o, 1))  # [BN]
    return q, do, p, ds


@triton.jit(do_not_specialize=["heads", "summaries", "regular"])
def token_gradient_kernel(
    q_ptr, k_r_ptr, v_r_ptr, o_ptr, lse_ptr, do_ptr, dk_ptr, dv_ptr, slot_ptr,
    q_strides, k_r_strides, v_r_strides, o_strides, do_strides, dk_strides,
    scale, softmax_scale, heads, summaries, regular, BN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN regular tokens of one head, each from the summary of its bar alone."""
    head, row = tl.program_id(0) % heads, tl.program_id(1)
    b, h = row.to(tl.int64), head.to(tl.int64)
    token, offs_d = tl.program_id(0) // heads * BN + tl.arange(0, BN), tl.arange(0, D)  # [BN], [D]
    n_mask = token < regular
    slot = tl.load(slot_ptr + row * regular + token, mask=n_mask, other=-1)  # [BN]
    at, n_mask, real = token[:, None], n_mask[:, None], (slot >= 0)[:, None]  # [BN, 1]
    k_ptrs = head_ptr(k_r_ptr, k_r_strides, b, h) + at * k_r_strides[2] + offs_d[None, :]
    v_ptrs = head_ptr(v_r_ptr, v_r_strides, b, h) + at * v_r_strides[2] + offs_d[None, :]
    k, v = tl.load(k_ptrs, mask=real, other=0), tl.load(v_ptrs, mask=real, other=0)  # [BN, D]
    q, do, p, ds = _probabilities(
        head_ptr(q_ptr, q_strides, b, h), head_ptr(do_ptr, do_strides, b, h), head_ptr(o_ptr, o_strides, b,
        h), lse_ptr + (b * heads + h) * summaries, q_strides[2], do_strides[2], o_strides[2], slot, slot >= 0,
        k.to(tl.float32), v.to(tl.float32), scale, offs_d,
    )  # fmt: skip
    offs = b * dk_strides[0] + h * dk_strides[1] + at * dk_strides[2] + offs_d[None, :]  # [BN, D]
    tl.store(dk_ptr + offs, ((ds * softmax_scale)[:, None] * q).to(dk_ptr.dtype.element_ty), mask=n_mask)
    tl.store(dv_ptr + offs, (p[:, None] * do).to(dv_ptr.dtype.element_ty), mask=n_mask)


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
