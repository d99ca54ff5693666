"""The summarize phase: each summary attends to the summaries before it and to the tokens of its bar.

Both are contiguous in a row, so that four numbers per summary say all: no plan, and masks by comparison.
A program takes 16 summaries, the fewest that matrix units multiply; what the first of them sees and the
last does not, or the other way round, costs little beside. Every regular token is seen by exactly one
summary: its gradients need no sum, and no matrix unit. Names are those of `forward.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .structure import Structure

_BLOCK = 128

_LOWEST = tl.constexpr(-1e30)
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
    """From the first to the last of what several ranges hold, some of which may be empty."""
    some = upper > lower
    return tl.min(tl.where(some, lower, _BEHIND_ALL), 0), tl.max(tl.where(some, upper, 0), 0)


@triton.jit
def _attend(
    acc, top, total, q, k_ptr, v_ptr, k_n, v_n, lower, upper, scale, offs_n, offs_d, PRECISION: tl.constexpr
):  # fmt: skip
    """Takes into acc [BM, D], top and total [BM] the keys from `lower` up to `upper` of each query."""
    first, end = _span(lower, upper)
    for start in tl.range(first, end, offs_n.shape[0], num_stages=2):
        key = start + offs_n
        there = (key < end)[:, None]
        k = tl.load(k_ptr + key[:, None] * k_n + offs_d[None, :], mask=there, other=0)  # [BN, D]
        v = tl.load(v_ptr + key[:, None] * v_n + offs_d[None, :], mask=there, other=0)  # [BN, D]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [BM, BN]
        seen = (key[None, :] >= lower[:, None]) & (key[None, :] < upper[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit
def _ranges(bars_ptr, summary, there):
    """Of some summaries [BM]: the summaries and the tokens that each sees, as first and end; see `bars`."""
    bars = bars_ptr + summary * 4
    first_s, first_r = tl.load(bars, mask=there, other=0), tl.load(bars + 2, mask=there, other=0)
    end_r = tl.load(bars + 3, mask=there, other=0)
    end_s = tl.where(end_r > first_r, summary + 1, first_s)  # a summary that is none sees nothing
    return first_s, end_s, first_r, end_r


@triton.jit(do_not_specialize=["heads", "summaries"])
def summarize_kernel(
    q_ptr, k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr, o_ptr, lse_ptr, bars_ptr,
    q_b, q_h, q_n, k_s_b, k_s_h, k_s_n, v_s_b, v_s_h, v_s_n, k_r_b, k_r_h, k_r_n, v_r_b, v_r_h, v_r_n,
    o_b, o_h, o_n, scale, heads, summaries, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BM summaries of one head: o [B, H, M, D] and lse, float32 [B, H, M] in base 2; 0 and -inf if blind."""
    head, row = tl.program_id(0) % heads, tl.program_id(1)
    summary = tl.program_id(0) // heads * BM + tl.arange(0, BM)
    there = summary < summaries
    first_s, end_s, first_r, end_r = _ranges(bars_ptr + row * summaries * 4, summary, there)
    b, h = row.to(tl.int64), head.to(tl.int64)
    offs_n, offs_d = tl.arange(0, BN), tl.arange(0, D)
    q_ptrs = q_ptr + b * q_b + h * q_h + summary[:, None] * q_n + offs_d[None, :]
    q = tl.load(q_ptrs, mask=there[:, None], other=0)  # [BM, D]
    acc = tl.zeros([BM, D], tl.float32)
    top, total = tl.full([BM], _LOWEST, tl.float32), tl.zeros([BM], tl.float32)
    acc, top, total = _attend(
        acc, top, total, q, k_s_ptr + b * k_s_b + h * k_s_h, v_s_ptr + b * v_s_b + h * v_s_h,
        k_s_n, v_s_n, first_s, end_s, scale, offs_n, offs_d, PRECISION,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, q, k_r_ptr + b * k_r_b + h * k_r_h, v_r_ptr + b * v_r_b + h * v_r_h,
        k_r_n, v_r_n, first_r, end_r, scale, offs_n, offs_d, PRECISION,
    )  # fmt: skip
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    o = (acc / total[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + b * o_b + h * o_h + summary[:, None] * o_n + offs_d[None, :], o, mask=there[:, None])
    lse = tl.where(blind, float("-inf"), top + tl.log2(total))
    tl.store(lse_ptr + (b * heads + h) * summaries + summary, lse, mask=there)


@triton.jit
def _query_gradient(
    dq, q, do, lse, delta, k_ptr, v_ptr, k_n, v_n, lower, upper, scale, offs_n, offs_d,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the keys from `lower` up to `upper` of each query to dq [BM, D], not yet scaled."""
    first, end = _span(lower, upper)
    for start in tl.range(first, end, offs_n.shape[0], num_stages=2):
        key = start + offs_n
        there = (key < end)[:, None]
        k = tl.load(k_ptr + key[:, None] * k_n + offs_d[None, :], mask=there, other=0)  # [BN, D]
        v = tl.load(v_ptr + key[:, None] * v_n + offs_d[None, :], mask=there, other=0)  # [BN, D]
        seen = (key[None, :] >= lower[:, None]) & (key[None, :] < upper[:, None])
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
        p = tl.where(seen, tl.exp2(scores * scale - lse[:, None]), 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["heads", "summaries"])
def summary_gradient_kernel(
    q_ptr, k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr, o_ptr, lse_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr, bars_ptr,
    q_b, q_h, q_n, k_s_b, k_s_h, k_s_n, v_s_b, v_s_h, v_s_n, k_r_b, k_r_h, k_r_n, v_r_b, v_r_h, v_r_n,
    do_b, do_h, do_n, d_b, d_h, d_n, scale, softmax_scale, heads, summaries,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of BM summaries of one head: dq in programs of even number; in the others dk and dv, as keys.

    o, dq, dk and dv have the same strides.
    """
    head, work, row = tl.program_id(0) // 2 % heads, tl.program_id(0) // 2 // heads, tl.program_id(1)
    b, h = row.to(tl.int64), head.to(tl.int64)
    summary, offs_n, offs_d = work * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    there = summary < summaries
    q_ptr += b * q_b + h * q_h
    do_ptr += b * do_b + h * do_h
    o_ptr += b * d_b + h * d_h
    k_s_ptr += b * k_s_b + h * k_s_h
    v_s_ptr += b * v_s_b + h * v_s_h
    lse_ptr += (b * heads + h) * summaries
    bars_ptr += row * summaries * 4
    own = summary[:, None] * d_n + offs_d[None, :]
    out = b * d_b + h * d_h + own

    if tl.program_id(0) % 2 == 0:
        first_s, end_s, first_r, end_r = _ranges(bars_ptr, summary, there)
        q = tl.load(q_ptr + summary[:, None] * q_n + offs_d[None, :], mask=there[:, None], other=0)
        do = tl.load(do_ptr + summary[:, None] * do_n + offs_d[None, :], mask=there[:, None], other=0)
        o = tl.load(o_ptr + own, mask=there[:, None], other=0)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        lse = tl.load(lse_ptr + summary, mask=there, other=0)
        dq = tl.zeros([BM, D], tl.float32)
        dq = _query_gradient(
            dq, q, do, lse, delta, k_s_ptr, v_s_ptr, k_s_n, v_s_n,
            first_s, end_s, scale, offs_n, offs_d, PRECISION,
        )  # fmt: skip
        dq = _query_gradient(
            dq, q, do, lse, delta, k_r_ptr + b * k_r_b + h * k_r_h, v_r_ptr + b * v_r_b + h * v_r_h,
            k_r_n, v_r_n, first_r, end_r, scale, offs_n, offs_d, PRECISION,
        )  # fmt: skip
        tl.store(dq_ptr + out, (dq * softmax_scale).to(dq_ptr.dtype.element_ty), mask=there[:, None])
    else:
        last_s = tl.load(bars_ptr + summary * 4 + 1, mask=there, other=0)
        k = tl.load(k_s_ptr + summary[:, None] * k_s_n + offs_d[None, :], mask=there[:, None], other=0)
        v = tl.load(v_s_ptr + summary[:, None] * v_s_n + offs_d[None, :], mask=there[:, None], other=0)
        dk = tl.zeros([BM, D], tl.float32)
        dv = tl.zeros([BM, D], tl.float32)
        for start in tl.range(work * BM, tl.max(last_s, 0), BN, num_stages=2):
            query = start + offs_n
            real = query < summaries
            at, mask = query[:, None], real[:, None]
            q = tl.load(q_ptr + at * q_n + offs_d[None, :], mask=mask, other=0)  # [BN, D]
            do = tl.load(do_ptr + at * do_n + offs_d[None, :], mask=mask, other=0)  # [BN, D]
            o = tl.load(o_ptr + at * d_n + offs_d[None, :], mask=mask, other=0)  # [BN, D]
            delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
            lse = tl.load(lse_ptr + query, mask=real, other=float("-inf"))
            seen = (query[None, :] >= summary[:, None]) & (query[None, :] < last_s[:, None])
            seen &= (lse != float("-inf"))[None, :]  # a query that is none sees nothing
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BM, BN]
            p = tl.where(seen, tl.exp2(scores * scale - lse[None, :]), 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        tl.store(dk_ptr + out, (dk * softmax_scale).to(dk_ptr.dtype.element_ty), mask=there[:, None])
        tl.store(dv_ptr + out, dv.to(dv_ptr.dtype.element_ty), mask=there[:, None])


@triton.jit
def _probabilities(q_ptr, do_ptr, o_ptr, lse_ptr, q_n, do_n, o_n, query, real, k, v, scale, offs_d):
    """q and dO of some queries [BN, D], and P and dS of each with its key, k and v [1 or BN, D]: [BN]."""
    at, mask = query[:, None], real[:, None]
    q = tl.load(q_ptr + at * q_n + offs_d[None, :], mask=mask, other=0).to(tl.float32)
    do = tl.load(do_ptr + at * do_n + offs_d[None, :], mask=mask, other=0).to(tl.float32)
    o = tl.load(o_ptr + at * o_n + offs_d[None, :], mask=mask, other=0).to(tl.float32)
    lse = tl.load(lse_ptr + query, mask=real, other=0)
    p = tl.where(real, tl.exp2(tl.sum(q * k, 1) * scale - lse), 0.0)
    ds = p * (tl.sum(do * v, 1) - tl.sum(do * o, 1))
    return q, do, p, ds


@triton.jit(do_not_specialize=["heads", "summaries", "regular"])
def token_gradient_kernel(
    q_ptr, k_r_ptr, v_r_ptr, o_ptr, lse_ptr, do_ptr, dk_ptr, dv_ptr, slot_ptr,
    q_b, q_h, q_n, k_r_b, k_r_h, k_r_n, v_r_b, v_r_h, v_r_n, o_b, o_h, o_n, do_b, do_h, do_n, d_b, d_h, d_n,
    scale, softmax_scale, heads, summaries, regular, BN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN regular tokens of one head, each from the summary of its bar alone."""
    head, row = tl.program_id(0) % heads, tl.program_id(1)
    b, h = row.to(tl.int64), head.to(tl.int64)
    token, offs_d = tl.program_id(0) // heads * BN + tl.arange(0, BN), tl.arange(0, D)
    there = token < regular
    slot = tl.load(slot_ptr + row * regular + token, mask=there, other=-1)
    at, there, real = token[:, None], there[:, None], (slot >= 0)[:, None]
    k = tl.load(k_r_ptr + b * k_r_b + h * k_r_h + at * k_r_n + offs_d[None, :], mask=real, other=0)
    v = tl.load(v_r_ptr + b * v_r_b + h * v_r_h + at * v_r_n + offs_d[None, :], mask=real, other=0)
    q, do, p, ds = _probabilities(
        q_ptr + b * q_b + h * q_h, do_ptr + b * do_b + h * do_h, o_ptr + b * o_b + h * o_h,
        lse_ptr + (b * heads + h) * summaries, q_n, do_n, o_n, slot, slot >= 0,
        k.to(tl.float32), v.to(tl.float32), scale, offs_d,
    )  # fmt: skip
    out = b * d_b + h * d_h + at * d_n + offs_d[None, :]
    tl.store(dk_ptr + out, ((ds * softmax_scale)[:, None] * q).to(dk_ptr.dtype.element_ty), mask=there)
    tl.store(dv_ptr + out, (p[:, None] * do).to(dv_ptr.dtype.element_ty), mask=there)


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
