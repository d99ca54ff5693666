"""The Triton kernels of `rms_norm`: a few whole rows of the stream at a time, in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_cache import Launcher

_TILE = 2048  # elements that a program holds at a time; one row if that is more
_PROGRAMS = 528  # most programs of the backward: each writes a partial gradient of the gain


@triton.jit
def rms_norm_kernel(
    x_ptr, added_ptr, gain_ptr, stream_ptr, normed_ptr, rows, width, eps,
    ADDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """normed [T, E] of x, or if ADDS of x + added, which is rounded first and stored to `stream`."""
    row, channel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (channel < width)[None, :]
    offs = row[:, None] * width + channel[None, :]  # [ROWS, BLOCK]
    x = tl.load(x_ptr + offs, mask=mask, other=0)  # [ROWS, BLOCK]
    if ADDS:
        x = (x.to(tl.float32) + tl.load(added_ptr + offs, mask=mask, other=0).to(tl.float32)).to(x.dtype)
        tl.store(stream_ptr + offs, x, mask=mask)
    x = x.to(tl.float32)
    gain = tl.load(gain_ptr + channel, mask=channel < width, other=0)  # [BLOCK]
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / width + eps)  # [ROWS]
    normed = x * rstd[:, None] * gain[None, :]
    tl.store(normed_ptr + offs, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_tile(
    d_normed_ptr, d_stream_ptr, x_ptr, tile, rows, width,
    ADDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x, d_normed and (if ADDS) d_stream of tile number `tile`, [ROWS, BLOCK], its offsets and its mask."""
    row, channel = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (channel < width)[None, :]
    offs = row[:, None] * width + channel[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0)
    d_normed = tl.load(d_normed_ptr + offs, mask=mask, other=0)
    d_stream = tl.load(d_stream_ptr + offs, mask=mask, other=0) if ADDS else x
    return x, d_normed, d_stream, offs, mask


@triton.jit
def rms_norm_gradient_kernel(
    d_normed_ptr, d_stream_ptr, x_ptr, gain_ptr, dx_ptr, sums_ptr, rows, width, eps, steps,
    ADDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx [T, E], with `d_stream` added if ADDS; and for the gradient of the gain the sums [programs, E] over
    the rows of each program, which takes `steps` tiles. A tile is loaded while the one before is computed."""
    channel = tl.arange(0, BLOCK)
    gain = tl.load(gain_ptr + channel, mask=channel < width, other=0)[None, :]  # [1, BLOCK]
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    tile = tl.program_id(0)
    next_x, next_d_normed, next_d_stream, next_offs, next_mask = _load_tile(
        d_normed_ptr, d_stream_ptr, x_ptr, tile, rows, width, ADDS, ROWS, BLOCK
    )
    for _ in range(steps):
        x, d_normed = next_x.to(tl.float32), next_d_normed.to(tl.float32)  # [ROWS, BLOCK]
        offs, mask = next_offs, next_mask
        d_stream = next_d_stream.to(tl.float32)
        tile += tl.num_programs(0)
        next_x, next_d_normed, next_d_stream, next_offs, next_mask = _load_tile(
            d_normed_ptr, d_stream_ptr, x_ptr, tile, rows, width, ADDS, ROWS, BLOCK
        )
        rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / width + eps)  # [ROWS]
        unit = x * rstd[:, None]  # [ROWS, BLOCK]
        sums += d_normed * unit
        d_unit = d_normed * gain
        dx = (d_unit - unit * (tl.sum(d_unit * unit, 1) / width)[:, None]) * rstd[:, None]
        if ADDS:
            dx += d_stream
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(sums_ptr + tl.program_id(0) * width + channel, tl.sum(sums, 0), mask=channel < width)


@triton.jit
def sum_rows_kernel(x_ptr, out_ptr, rows, width, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """out [E], float32: the sum over the rows of x, float32 [rows, E]."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (channel < width)[None, :]
        total += tl.load(x_ptr + row[:, None] * width + channel[None, :], mask=mask, other=0)
    tl.store(out_ptr + channel, tl.sum(total, 0), mask=channel < width)


_forward, _backward = Launcher(rms_norm_kernel), Launcher(rms_norm_gradient_kernel)
_sum_rows = Launcher(sum_rows_kernel)


def forward(streams: list[Tensor], added: list[Tensor], gain: Tensor, eps: float) -> list[Tensor]:
    """See `norm._cpu`."""
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
    d_normed: Tensor, d_streams: list[Tensor], streams: list[Tensor], gain: Tensor, eps: float
) -> list[Tensor]:
    """See `norm._cpu_backward`. The grid is the same on every GPU, and so is the order of the sums."""
    wide_gain, width = gain.float(), gain.shape[0]
    streams = [x.contiguous() for x in streams]
    d_normed = _like(d_normed, streams[0])
    constants = _constants(width)
    tiles = [triton.cdiv(x.numel() // width, constants["ROWS"]) for x in streams]
    steps = [triton.cdiv(number, _PROGRAMS) for number in tiles]
    programs = [triton.cdiv(number, num_steps) if number else 0 for number, num_steps in zip(tiles, steps)]
    sums = gain.new_empty(sum(programs), width, dtype=torch.float32)
    outs, first, first_sum = [], 0, 0
    for x, d_stream, number, num_steps in zip(streams, d_streams or streams, programs, steps):
        outs.append(x.new_empty(x.shape))
        rows = x.numel() // width
        if rows:
            tensors = (d_normed[first:], _like(d_stream, x), x, wide_gain, outs[-1], sums[first_sum:])
            _backward((number,), tensors, (rows, width, eps, num_steps), ADDS=bool(d_streams), **constants)
        first, first_sum = first + rows, first_sum + number
    d_gain = sums.new_empty(width)
    _sum_rows((triton.cdiv(width, 16),), (sums, d_gain), (len(sums), width), ROWS=128, CHANNELS=16)
    return [*outs, d_gain.to(gain.dtype)]


def _like(tensor: Tensor, x: Tensor) -> Tensor:
    """Contiguous and in the dtype of x: the launcher's key holds one dtype for all."""
    return tensor.to(x.dtype).contiguous()


def _constants(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    warps = 2 if block <= 512 else min(16, block // 256)  # found by trial
    return {"ROWS": max(1, _TILE // block), "BLOCK": block, "num_warps": warps}
