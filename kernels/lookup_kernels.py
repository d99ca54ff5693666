"""The Triton kernels of `sum_of_rows`: sums in float32, always in the same order.

The gradient of a row is the sum over its readers, of which there are none or a hundred thousand. So it is cut
into parts, which one kernel adds up each, and another one together.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_cache import Launcher

_TOKENS, _CHANNELS, _WARPS = 16, 256, 4  # of a tile, and of a program


@triton.jit
def _tile(width, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's channels, [1, CHANNELS], which of them there are, and places along a tile, [TOKENS]."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    return channel, channel < width, tl.arange(0, TOKENS)


@triton.jit
def lookup_kernel(
    table_ptr, rows_ptr, out_ptr, tokens, width,
    READS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out [T, E] of table [R, E] and rows [READS, T]."""
    channel, there, place = _tile(width, TOKENS, CHANNELS)
    token = tl.program_id(0).to(tl.int64) * TOKENS + place
    exists = token < tokens
    mask = exists[:, None] & there
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for read in tl.static_range(READS):
        row = tl.load(rows_ptr + read * tokens + token, mask=exists, other=0)
        total += tl.load(table_ptr + row[:, None] * width + channel, mask=mask, other=0).to(tl.float32)
    tl.store(out_ptr + token[:, None] * width + channel, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def lookup_parts_kernel(
    gradient_ptr, reader_ptr, first_ptr, part_ptr, row_ptr, parts_ptr, width, number,
    PART: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """parts [parts, E], each the sum of the gradients [T, E] of PART readers of one row, or of those left."""
    channel, there, place = _tile(width, TOKENS, CHANNELS)
    part = tl.program_id(0).to(tl.int64)
    row = tl.load(row_ptr + part)
    if row < number:
        begin = tl.load(first_ptr + row) + (part - tl.load(part_ptr + row)) * PART
        end = tl.minimum(begin + PART, tl.load(first_ptr + row + 1))
        total = tl.zeros((TOKENS, CHANNELS), tl.float32)
        token = tl.load(reader_ptr + begin + place, mask=begin + place < end, other=0)
        for at in range(begin, end, TOKENS):
            mask = (at + place < end)[:, None] & there
            gradient = tl.load(gradient_ptr + token[:, None] * width + channel, mask=mask, other=0)
            then = at + TOKENS + place  # asked for while the gradients are on their way
            token = tl.load(reader_ptr + then, mask=then < end, other=0)
            total += gradient.to(tl.float32)
        tl.store(parts_ptr + part * width + channel, tl.sum(total, axis=0, keep_dims=True), mask=there)


@triton.jit
def lookup_gradient_kernel(out_ptr, parts_ptr, part_ptr, width, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """out [R, E], the sum of the parts of each row; zeros where it has none."""
    channel, there, place = _tile(width, TOKENS, CHANNELS)
    row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(part_ptr + row), tl.load(part_ptr + row + 1)
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for at in range(begin, end, TOKENS):
        part = at + place[:, None]
        total += tl.load(parts_ptr + part * width + channel, mask=(part < end) & there, other=0)
    out = tl.sum(total, axis=0, keep_dims=True)
    tl.store(out_ptr + row * width + channel, out.to(out_ptr.dtype.element_ty), mask=there)


_forward, _parts, _gradient = map(Launcher, (lookup_kernel, lookup_parts_kernel, lookup_gradient_kernel))


def forward(table: Tensor, rows: Tensor) -> Tensor:
    reads, width = len(rows), table.shape[-1]
    out = table.new_empty(*rows.shape[1:], width)
    if out.numel():
        tokens = out.numel() // width
        programs = triton.cdiv(tokens, _TOKENS)
        _launch(_forward, programs, width, (table, rows, out), (tokens, width), READS=reads)
    return out


def backward(
    gradient: Tensor, readers: Sequence[Tensor], size: int, number: int, dtype: torch.dtype
) -> Tensor:
    """`readers`: a `lookup.Readers`, of parts of `size`."""
    width = gradient.shape[-1]
    *_, part, row = readers
    most = len(row)
    parts = gradient.new_empty(most, width, dtype=torch.float32)
    out = gradient.new_empty(number, width, dtype=dtype)
    if gradient.numel():
        _launch(_parts, most, width, (gradient, *readers, parts), (width, number), PART=size)
    _launch(_gradient, number, width, (out, parts, part), (width,))
    return out


def _launch(kernel: Launcher, programs: int, width: int, tensors: tuple, numbers: tuple, **constants) -> None:
    grid = programs, triton.cdiv(width, _CHANNELS)
    kernel(grid, tensors, numbers, **constants, TOKENS=_TOKENS, CHANNELS=_CHANNELS, num_warps=_WARPS)
