"""The Triton kernels of `swiglu`: one row of tokens by a block of channels per program, in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_cache import Launcher

_BLOCK, _WARPS = 4096, 8


@triton.jit
def _load(pointer, there):
    return tl.load(pointer, mask=there, other=0).to(tl.float32)


@triton.jit
def swiglu_kernel(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """out [T, F] of gate_up [T, 2 F]; `width` is F."""
    row, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = channel < width
    gates = gate_up_ptr + row * 2 * width + channel
    gate, up = _load(gates, there), _load(gates + width, there)
    out = (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + channel, out, mask=there)


@triton.jit
def swiglu_gradient_kernel(gate_up_ptr, gradient_ptr, out_ptr, width, BLOCK: tl.constexpr):
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


_forward, _backward = Launcher(swiglu_kernel), Launcher(swiglu_gradient_kernel)


def forward(gate_up: Tensor) -> Tensor:
    out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    _launch(_forward, gate_up, out)
    return out


def backward(gate_up: Tensor, gradient: Tensor) -> Tensor:
    out = torch.empty_like(gate_up)
    _launch(_backward, gate_up, gradient, out)
    return out


def _launch(kernel: Launcher, gate_up: Tensor, *others: Tensor) -> None:
    width = gate_up.shape[-1] // 2
    if gate_up.numel():
        programs = gate_up.numel() // (2 * width), triton.cdiv(width, _BLOCK)
        kernel(programs, (gate_up, *others), (width,), BLOCK=_BLOCK, num_warps=_WARPS)
