"""Kernels of a plan's layouts: properties and sort keys of the tokens, then blocks in sorted order.

Tokens are counted over summaries and regular tokens of a batch row together, summaries first. There are three
layouts (see `plan`); their blocks of 64 are numbered layout by layout, batch row by batch row.
"""

import triton
import triton.language as tl

from .plan_visibility import (
    ABSENT,
    NO_INSTRUMENT,
    NO_ONSET,
    SUMMARY,
    by_kind,
    code_of,
    store_ranges,
)
from .tiles import BLOCK


@triton.jit(do_not_specialize=["batch", "summaries", "regular"])
def encode_kernel(
    doc_ptr, bar_ptr, inst_ptr, kind_ptr, onset_ptr, position_ptr, s_doc_ptr, s_bar_ptr, s_position_ptr,
    props_ptr, keys_ptr, batch, summaries, regular, KINDS_SEEN: tl.constexpr,
    QUERY_CLASS: tl.constexpr, KEY_CLASS: tl.constexpr, SAME_INST_CLASS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Properties of all tokens, int32 [6, B, M + N], and sort keys of the regular ones, int64 [3, B, N].

    A key orders tokens by layout, batch row, document (padding last) and the layout's class of their kind, 1
    to 5, globals first; equal keys stay in the order of the row. See `plan.layout_classes`.
    """
    b = tl.program_id(1)
    token = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    mask = token < summaries + regular
    is_summary = token < summaries
    s_offs = b * summaries + token
    r_offs = b * regular + token - summaries
    s_mask, r_mask = mask & is_summary, mask & (token >= summaries)
    doc = tl.load(doc_ptr + r_offs, mask=r_mask, other=-1)
    inst = tl.load(inst_ptr + r_offs, mask=r_mask, other=NO_INSTRUMENT)
    kind = tl.load(kind_ptr + r_offs, mask=r_mask, other=0)
    bar = tl.load(bar_ptr + r_offs, mask=r_mask, other=0)
    onset = tl.load(onset_ptr + r_offs, mask=r_mask, other=NO_ONSET)
    position = tl.load(position_ptr + r_offs, mask=r_mask, other=0)
    code = tl.where(is_summary, SUMMARY, code_of(kind, inst, KINDS_SEEN))
    any_doc = tl.where(is_summary, tl.load(s_doc_ptr + s_offs, mask=s_mask, other=-1), doc)
    bar = tl.where(is_summary, tl.load(s_bar_ptr + s_offs, mask=s_mask, other=0), bar)
    position = tl.where(is_summary, tl.load(s_position_ptr + s_offs, mask=s_mask, other=0), position)
    plane = batch.to(tl.int64) * (summaries + regular)
    at = props_ptr + b.to(tl.int64) * (summaries + regular) + token
    tl.store(at, any_doc, mask=mask)
    tl.store(at + plane, bar, mask=mask)
    tl.store(at + 2 * plane, inst, mask=mask)
    tl.store(at + 3 * plane, code, mask=mask)
    tl.store(at + 4 * plane, onset, mask=mask)
    tl.store(at + 5 * plane, position, mask=mask)

    is_global = (kind == 0) & (inst == NO_INSTRUMENT)
    key_class = tl.where(is_global, 0, by_kind(kind, KEY_CLASS))
    same_inst_class = tl.where(is_global, 0, by_kind(kind, SAME_INST_CLASS))
    rank = b.to(tl.int64) * 2**31 + tl.where(doc >= 0, doc, 2**31 - 1)  # padding is last
    rank *= 1024
    keys = keys_ptr + r_offs
    plane = batch.to(tl.int64) * regular
    layout = batch.to(tl.int64) * (2**31 * 1024)
    tl.store(keys, rank + by_kind(kind, QUERY_CLASS), mask=r_mask)
    tl.store(keys + plane, layout + rank + key_class, mask=r_mask)
    tl.store(keys + 2 * plane, 2 * layout + rank + inst * 6 + same_inst_class, mask=r_mask)


@triton.jit
def load_properties(props_ptr, batch, tokens, b, token):
    """The six properties of some tokens of one batch row; the document of a negative token is `ABSENT`."""
    plane = batch.to(tl.int64) * tokens
    at = props_ptr + b.to(tl.int64) * tokens + tl.maximum(token, 0)
    return (
        tl.where(token >= 0, tl.load(at), ABSENT),
        tl.load(at + plane),
        tl.load(at + 2 * plane),
        tl.load(at + 3 * plane),
        tl.load(at + 4 * plane),
        tl.load(at + 5 * plane),
    )


@triton.jit(do_not_specialize=["batch", "summaries", "regular", "q_blocks", "s_blocks", "blocks"])
def layout_kernel(
    sorted_ptr, props_ptr, order_ptr, laid_ptr, ranges_ptr,
    batch, summaries, regular, q_blocks, s_blocks, blocks,
):  # fmt: skip
    """Of one block: its tokens, int32 [blocks * 64], -1 for none; their properties, int32 [6, blocks * 64];
    and its ranges.

    `sorted` is the argsort of `encode_kernel`'s keys, int64 [3 * B * N].
    """
    block = tl.program_id(0)
    k_blocks = s_blocks + q_blocks
    layout = (block >= batch * q_blocks).to(tl.int32) + (block >= batch * (q_blocks + k_blocks)).to(tl.int32)
    first = tl.where(layout == 0, 0, tl.where(layout == 1, batch * q_blocks, batch * (q_blocks + k_blocks)))
    per_row = tl.where(layout == 1, k_blocks, q_blocks)
    b, at = (block - first) // per_row, (block - first) % per_row
    slot = at * BLOCK + tl.arange(0, BLOCK)
    is_summary = (layout == 1) & (at < s_blocks)
    slot = tl.where((layout == 1) & (at >= s_blocks), slot - s_blocks * BLOCK, slot)
    place = (layout * batch + b).to(tl.int64) * regular
    index = tl.load(sorted_ptr + place + slot, mask=(slot < regular) & (is_summary == 0), other=0) - place
    token = tl.where(slot < regular, index.to(tl.int32) + summaries, -1)
    token = tl.where(is_summary, tl.where(slot < summaries, slot, -1), token)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(order_ptr + offs, token)
    doc, bar, inst, code, onset, position = load_properties(props_ptr, batch, summaries + regular, b, token)
    plane = blocks.to(tl.int64) * BLOCK
    tl.store(laid_ptr + offs, doc)
    tl.store(laid_ptr + plane + offs, bar)
    tl.store(laid_ptr + 2 * plane + offs, inst)
    tl.store(laid_ptr + 3 * plane + offs, code)
    tl.store(laid_ptr + 4 * plane + offs, onset)
    tl.store(laid_ptr + 5 * plane + offs, position)
    store_ranges(ranges_ptr, blocks, block, doc, bar, inst, code, onset, position)


@triton.jit
def load_laid(laid_ptr, blocks, slot):
    """The six properties of the tokens in some slots of the layouts."""
    plane, at = blocks.to(tl.int64) * BLOCK, laid_ptr + slot
    return (
        tl.load(at),
        tl.load(at + plane),
        tl.load(at + 2 * plane),
        tl.load(at + 3 * plane),
        tl.load(at + 4 * plane),
        tl.load(at + 5 * plane),
    )
