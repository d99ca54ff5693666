"""The summarize phase: each summary attends to the summaries before it and to the tokens of its bar.

Both are contiguous in a row, so that four numbers per summary say all: no plan, no masks. And every
regular token is seen by exactly one summary, so that its gradients need no sum. There is one query
where the matrix units want sixteen at least, and little to compute: these kernels move bytes, with
one program per summary and head, and compute in float32. Names are those of `forward.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .structure import Structure

_BLOCK = 128

_LOWEST = tl.constexpr(-1e30)


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
def _attend(acc, top, total, q, k_ptr, v_ptr, k_n, v_n, first, end, scale, offs_n, offs_d):
    """Takes keys `first` to `end` into acc [D], top and total."""
    for start in range(first, end, offs_n.shape[0]):
        key = start + offs_n
        there = key < end
        k = tl.load(k_ptr + key[:, None] * k_n + offs_d[None, :], mask=there[:, None], other=0)  # [BN, D]
        v = tl.load(v_ptr + key[:, None] * v_n + offs_d[None, :], mask=there[:, None], other=0)  # [BN, D]
        scores = tl.where(there, tl.sum(k.to(tl.float32) * q[None, :], 1) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 0))
        p = tl.exp2(scores - new_top)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 0)
        acc = acc * shrink + tl.sum(p[:, None] * v.to(tl.float32), 0)
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["heads", "summaries"])
def summarize_kernel(
    q_ptr, k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr, o_ptr, lse_ptr, bars_ptr,
    q_b, q_h, q_n, k_s_b, k_s_h, k_s_n, v_s_b, v_s_h, v_s_n, k_r_b, k_r_h, k_r_n, v_r_b, v_r_h, v_r_n,
    o_b, o_h, o_n, scale, heads, summaries, BN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One summary of one head: o [B, H, M, D] and lse, float32 [B, H, M] in base 2; 0 and -inf if blind."""
    head, summary, row = tl.program_id(0) % heads, tl.program_id(0) // heads, tl.program_id(1)
    bars = bars_ptr + (row * summaries + summary) * 4
    first_s, first_r, end_r = tl.load(bars), tl.load(bars + 2), tl.load(bars + 3)
    end_s = tl.where(end_r > first_r, summary + 1, first_s)  # a summary that is none sees nothing
    b, h = row.to(tl.int64), head.to(tl.int64)
    offs_n, offs_d = tl.arange(0, BN), tl.arange(0, D)
    q = tl.load(q_ptr + b * q_b + h * q_h + summary * q_n + offs_d).to(tl.float32)
    acc, top, total = tl.zeros([D], tl.float32), tl.full([], _LOWEST, tl.float32), tl.full([], 0, tl.float32)
    acc, top, total = _attend(
        acc, top, total, q, k_s_ptr + b * k_s_b + h * k_s_h, v_s_ptr + b * v_s_b + h * v_s_h,
        k_s_n, v_s_n, first_s, end_s, scale, offs_n, offs_d,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, q, k_r_ptr + b * k_r_b + h * k_r_h, v_r_ptr + b * v_r_b + h * v_r_h,
        k_r_n, v_r_n, first_r, end_r, scale, offs_n, offs_d,
    )  # fmt: skip
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    o = acc / total
    tl.store(o_ptr + b * o_b + h * o_h + summary * o_n + offs_d, o.to(o_ptr.dtype.element_ty))
    tl.store(
        lse_ptr + (b * heads + h) * summaries + summary, tl.where(blind, float("-inf"), top + tl.log2(total))
    )


@triton.jit
def _query_gradient(dq, q, do, lse, delta, k_ptr, v_ptr, k_n, v_n, first, end, scale, offs_n, offs_d):
    """Adds keys `first` to `end` to dq [D], not yet scaled."""
    for start in range(first, end, offs_n.shape[0]):
        key = start + offs_n
        there = key < end
        k = tl.load(k_ptr + key[:, None] * k_n + offs_d[None, :], mask=there[:, None], other=0)  # [BN, D]
        v = tl.load(v_ptr + key[:, None] * v_n + offs_d[None, :], mask=there[:, None], other=0)  # [BN, D]
        k = k.to(tl.float32)
        p = tl.where(there, tl.exp2(tl.sum(k * q[None, :], 1) * scale - lse), 0.0)
        ds = p * (tl.sum(v.to(tl.float32) * do[None, :], 1) - delta)
        dq += tl.sum(ds[:, None] * k, 0)
    return dq


@triton.jit(do_not_specialize=["heads", "summaries"])
def summary_gradient_kernel(
    q_ptr, k_s_ptr, v_s_ptr, k_r_ptr, v_r_ptr, o_ptr, lse_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr, bars_ptr,
    q_b, q_h, q_n, k_s_b, k_s_h, k_s_n, v_s_b, v_s_h, v_s_n, k_r_b, k_r_h, k_r_n, v_r_b, v_r_h, v_r_n,
    do_b, do_h, do_n, d_b, d_h, d_n, scale, softmax_scale, heads, summaries,
    BN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Of one summary of one head: dq, and what the summaries after it give to its dk and dv.

    o, dq, dk and dv have the same strides.
    """
    head, summary, row = tl.program_id(0) % heads, tl.program_id(0) // heads, tl.program_id(1)
    bars = bars_ptr + (row * summaries + summary) * 4
    first_s, last_s, first_r, end_r = tl.load(bars), tl.load(bars + 1), tl.load(bars + 2), tl.load(bars + 3)
    there = end_r > first_r
    b, h = row.to(tl.int64), head.to(tl.int64)
    offs_n, offs_d = tl.arange(0, BN), tl.arange(0, D)
    q_ptr += b * q_b + h * q_h
    do_ptr += b * do_b + h * do_h
    o_ptr += b * d_b + h * d_h
    k_s_ptr += b * k_s_b + h * k_s_h
    v_s_ptr += b * v_s_b + h * v_s_h
    lse_ptr += (b * heads + h) * summaries
    out = b * d_b + h * d_h + summary * d_n + offs_d

    q = tl.load(q_ptr + summary * q_n + offs_d).to(tl.float32)
    do = tl.load(do_ptr + summary * do_n + offs_d).to(tl.float32)
    lse = tl.load(lse_ptr + summary)
    delta = tl.sum(tl.load(o_ptr + summary * d_n + offs_d).to(tl.float32) * do, 0)
    dq = tl.zeros([D], tl.float32)
    end_s = tl.where(there, summary + 1, first_s)
    dq = _query_gradient(
        dq, q, do, lse, delta, k_s_ptr, v_s_ptr, k_s_n, v_s_n, first_s, end_s, scale, offs_n, offs_d
    )
    dq = _query_gradient(
        dq, q, do, lse, delta, k_r_ptr + b * k_r_b + h * k_r_h, v_r_ptr + b * v_r_b + h * v_r_h,
        k_r_n, v_r_n, first_r, end_r, scale, offs_n, offs_d,
    )  # fmt: skip
    tl.store(dq_ptr + out, (dq * softmax_scale).to(dq_ptr.dtype.element_ty))

    k = tl.load(k_s_ptr + summary * k_s_n + offs_d).to(tl.float32)
    v = tl.load(v_s_ptr + summary * v_s_n + offs_d).to(tl.float32)
    dk = tl.zeros([D], tl.float32)
    dv = tl.zeros([D], tl.float32)
    for start in range(summary, tl.where(there, last_s, summary), BN):
        query = start + offs_n
        real = query < last_s
        qs, dos, p, ds = _probabilities(
            q_ptr, do_ptr, o_ptr, lse_ptr, q_n, do_n, d_n, query, real, k[None, :], v[None, :], scale, offs_d
        )
        dv += tl.sum(p[:, None] * dos, 0)
        dk += tl.sum(ds[:, None] * qs, 0)
    tl.store(dk_ptr + out, (dk * softmax_scale).to(dk_ptr.dtype.element_ty))
    tl.store(dv_ptr + out, dv.to(dv_ptr.dtype.element_ty))


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
