"""The Triton kernels of `rms_norm`: some rows of the stream at a time, whole, in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_cache import Launcher

_TILE = 2048  # elements that a program holds at a time, or one row
_PROGRAMS = 528  # at most, of the backward: each has a sum of the gain's gradient to write


@triton.jit
def rms_norm_kernel(
    x_ptr, added_ptr, gain_ptr, stream_ptr, normed_ptr, rows, width, eps,
    ADDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """normed [T, E] of x, or if ADDS of x + added, which is rounded first and goes to `stream`."""
    row, channel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    there = (row < rows)[:, None] & (channel < width)[None, :]
    at = row[:, None] * width + channel[None, :]
    x = tl.load(x_ptr + at, mask=there, other=0)
    if ADDS:
        x = (x.to(tl.float32) + tl.load(added_ptr + at, mask=there, other=0).to(tl.float32)).to(x.dtype)
        tl.store(stream_ptr + at, x, mask=there)
    x = x.to(tl.float32)
    gain = tl.load(gain_ptr + channel, mask=channel < width, other=0)
    share = 1 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
    normed = x * share[:, None] * gain[None, :]
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=there)


@triton.jit
def _load_rows(
    of_normed_ptr, of_x_ptr, x_ptr, tile, rows, width,
    ADDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the gradient needs of a tile, and where it is."""
    row, channel = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    there = (row < rows)[:, None] & (channel < width)[None, :]
    at = row[:, None] * width + channel[None, :]
    x = tl.load(x_ptr + at, mask=there, other=0)
    of_normed = tl.load(of_normed_ptr + at, mask=there, other=0)
    of_x = tl.load(of_x_ptr + at, mask=there, other=0) if ADDS else x
    return x, of_normed, of_x, at, there


@triton.jit
def rms_norm_gradient_kernel(
    of_normed_ptr, of_x_ptr, x_ptr, gain_ptr, out_ptr, sums_ptr, rows, width, eps, steps,
    ADDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient [T, E] of x, `of_x` added if ADDS; and of the gain the sums [programs, E] over the rows
    that a program takes in `steps` steps. The rows of a step are loaded while the one before is computed."""
    channel = tl.arange(0, BLOCK)
    gain = tl.load(gain_ptr + channel, mask=channel < width, other=0)[None, :]
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    tile = tl.program_id(0)
    next_x, next_of_normed, next_of_x, next_at, next_there = _load_rows(
        of_normed_ptr, of_x_ptr, x_ptr, tile, rows, width, ADDS, ROWS, BLOCK
    )
    for _ in range(steps):
        x, of_normed, at, there = next_x.to(tl.float32), next_of_normed.to(tl.float32), next_at, next_there
        of_x = next_of_x.to(tl.float32)
        tile += tl.num_programs(0)
        next_x, next_of_normed, next_of_x, next_at, next_there = _load_rows(
            of_normed_ptr, of_x_ptr, x_ptr, tile, rows, width, ADDS, ROWS, BLOCK
        )
        share = 1 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
        unit = x * share[:, None]
        sums += of_normed * unit
        of_unit = of_normed * gain
        out = (of_unit - unit * (tl.sum(of_unit * unit, 1) / width)[:, None]) * share[:, None]
        if ADDS:
            out += of_x
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=there)
    tl.store(sums_ptr + tl.program_id(0) * width + channel, tl.sum(sums, 0), mask=channel < width)


@triton.jit
def sum_rows_kernel(sums_ptr, out_ptr, rows, width, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """out [E], float32, the sums over the rows of [rows, E]."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & (channel < width)[None, :]
        total += tl.load(sums_ptr + row[:, None] * width + channel[None, :], mask=there, other=0)
    tl.store(out_ptr + channel, tl.sum(total, 0), mask=channel < width)


_forward, _backward = Launcher(rms_norm_kernel), Launcher(rms_norm_gradient_kernel)
_sum_rows = Launcher(sum_rows_kernel)


def forward(streams: list[Tensor], added: list[Tensor], gain: Tensor, eps: float) -> list[Tensor]:
    """The sums, if anything is added, and the norm of all."""
    gain, width = gain.float(), gain.shape[0]
    streams = [x.contiguous() for x in streams]
    sums = [x.new_empty(x.shape) for x in streams] if added else streams
    normed = streams[0].new_empty(sum(x.numel() for x in streams) // width, width)
    first, constants = 0, _constants(width)
    for x, more, total in zip(streams, added or streams, sums):
        rows = x.numel() // width
        if rows:
            tensors = (x, _like(more, x), gain, total, normed[first:])
            programs = (triton.cdiv(rows, constants["ROWS"]),)
            _forward(programs, tensors, (rows, width, eps), ADDS=bool(added), **constants)
        first += rows
    return [*(sums if added else ()), normed]


def backward(
    of_normed: Tensor, of_streams: list[Tensor], streams: list[Tensor], gain: Tensor, eps: float
) -> list[Tensor]:
    """The gradients of the streams, with those that they had, if any; and of the gain.

    As many programs on every GPU: so are the sums.
    """
    wide_gain, width = gain.float(), gain.shape[0]
    streams = [x.contiguous() for x in streams]
    of_normed = _like(of_normed, streams[0])
    constants = _constants(width)
    tiles = [triton.cdiv(x.numel() // width, constants["ROWS"]) for x in streams]
    steps = [triton.cdiv(number, _PROGRAMS) for number in tiles]
    programs = [triton.cdiv(number, of_each) if number else 0 for number, of_each in zip(tiles, steps)]
    sums = gain.new_empty(sum(programs), width, dtype=torch.float32)
    outs, first, first_sum = [], 0, 0
    for x, of_x, number, of_each in zip(streams, of_streams or streams, programs, steps):
        outs.append(x.new_empty(x.shape))
        rows = x.numel() // width
        if rows:
            tensors = (of_normed[first:], _like(of_x, x), x, wide_gain, outs[-1], sums[first_sum:])
            _backward((number,), tensors, (rows, width, eps, of_each), ADDS=bool(of_streams), **constants)
        first, first_sum = first + rows, first_sum + number
    of_gain = sums.new_empty(width)
    _sum_rows((triton.cdiv(width, 16),), (sums, of_gain), (len(sums), width), ROWS=128, CHANNELS=16)
    return [*outs, of_gain.to(gain.dtype)]


def _like(tensor: Tensor, x: Tensor) -> Tensor:
    """In the dtype of x, which launches are told apart by, and contiguous."""
    return tensor.to(x.dtype).contiguous()


def _constants(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    warps = 2 if block <= 512 else min(16, block // 256)  # by trial
    return {"ROWS": max(1, _TILE // block), "BLOCK": block, "num_warps": warps}
