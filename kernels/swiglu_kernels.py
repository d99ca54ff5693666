"""The Triton kernels of `swiglu`: one token by a block of channels per program, in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_cache import Launcher

_BLOCK, _WARPS = 4096, 8


@triton.jit
def _load(ptrs, mask):
    return tl.load(ptrs, mask=mask, other=0).to(tl.float32)


@triton.jit
def swiglu_kernel(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """out [T, F] of gate_up [T, 2 F]; `width` is F. All tiles are [BLOCK]."""
    row, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < width
    gate_ptrs = gate_up_ptr + row * 2 * width + channel
    gate, up = _load(gate_ptrs, mask), _load(gate_ptrs + width, mask)
    out = (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + channel, out, mask=mask)


@triton.jit
def swiglu_gradient_kernel(gate_up_ptr, gradient_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """out, the gradient [T, 2 F] of gate_up, from `gradient` [T, F], that of the result. All tiles are
    [BLOCK]."""
    row, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < width
    gate_ptrs = gate_up_ptr + row * 2 * width + channel
    gate, up = _load(gate_ptrs, mask), _load(gate_ptrs + width, mask)
    gradient = _load(gradient_ptr + row * width + channel, mask)
    sigmoid = tl.sigmoid(gate)
    d_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
    out_ptrs = out_ptr + row * 2 * width + channel
    tl.store(out_ptrs, d_gate.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptrs + width, (gradient * gate * sigmoid).to(out_ptr.dtype.element_ty), mask=mask)


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
