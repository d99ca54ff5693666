"""The Triton kernels of `swiglu`: one row of tokens by a block of channels per program, in float32."""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 4096, 8


@triton.jit
def _load(pointer, there):
    return tl.load(pointer, mask=there, other=0).to(tl.float32)


@triton.jit
def forward_kernel(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """out [T, F] of gate_up [T, 2 F]; `width` is F."""
    row, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = channel < width
    gates = gate_up_ptr + row * 2 * width + channel
    gate, up = _load(gates, there), _load(gates + width, there)
    out = (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + channel, out, mask=there)


@triton.jit
def backward_kernel(gate_up_ptr, gradient_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """The gradient [T, 2 F] of gate_up, by that of the result, [T, F]."""
    row, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = channel < width
    gates = gate_up_ptr + row * 2 * width + channel
    gate, up = _load(gates, there), _load(gates + width, there)
    gradient = _load(gradient_ptr + row * width + channel, there)
    share = tl.sigmoid(gate)
    of_gate = gradient * up * share * (1 + gate * (1 - share))
    outs = out_ptr + row * 2 * width + channel
    tl.store(outs, of_gate.to(out_ptr.dtype.element_ty), mask=there)
    tl.store(outs + width, (gradient * gate * share).to(out_ptr.dtype.element_ty), mask=there)


def forward(gate_up: Tensor) -> Tensor:
    out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    _launch(forward_kernel, out.shape[-1], gate_up, out)
    return out


def backward(gate_up: Tensor, gradient: Tensor) -> Tensor:
    out = torch.empty_like(gate_up)
    _launch(backward_kernel, gradient.shape[-1], gate_up, gradient, out)
    return out


def _launch(kernel, width: int, *tensors: Tensor) -> None:
    rows = tensors[-1].numel() // max(tensors[-1].shape[-1], 1)
    if not rows:
        return
    device = tensors[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # Triton launches on it
        kernel[rows, triton.cdiv(width, _BLOCK)](*tensors, width, BLOCK=_BLOCK, num_warps=_WARPS)
