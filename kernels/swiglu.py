"""The gate of a SwiGLU feed-forward network as a PyTorch operator: silu(gate) * up, and its gradient.

It stands between two matrix products and moves more bytes than any other step of a layer. torch.compile
writes the gradient as a concatenation of two halves that each read all inputs: twice the bytes that these
kernels move.
"""

import torch
from torch import Tensor

from .operators import register, register_gradient


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020, arXiv:2002.05202): [..., F], in the dtype of `gate_up`.

    On CUDA computed in float32 and rounded once.

    Args:
        gate_up: [..., 2 F], the gate first.

    Raises:
        ValueError: an odd number of channels, or float64 on CUDA.
        RuntimeError: in the backward, with create_graph.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate and up must have as many channels, got {gate_up.shape[-1]} of both")
    if gate_up.is_cuda and gate_up.dtype == torch.float64:
        raise ValueError("swiglu computes in float32 on CUDA: float64 would not be what it says")
    return torch.ops.meloformer.swiglu(gate_up)


def _cpu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.contiguous().chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _cpu_backward(gate_up: Tensor, gradient: Tensor) -> Tensor:
    gate, up = gate_up.contiguous().chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([gradient * up * slope, gradient * gate * sigmoid], dim=-1)


def _cuda(gate_up: Tensor) -> Tensor:
    from .swiglu_kernels import forward  # imports triton

    return forward(gate_up.contiguous())


def _cuda_backward(gate_up: Tensor, gradient: Tensor) -> Tensor:
    from .swiglu_kernels import backward

    return backward(gate_up.contiguous(), gradient.contiguous())


def _fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _fake_backward(gate_up: Tensor, gradient: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient):
    return torch.ops.meloformer.swiglu_backward(*ctx.saved_tensors, gradient)


register("swiglu(Tensor gate_up) -> Tensor", _fake, _cpu, _cuda)
register(
    "swiglu_backward(Tensor gate_up, Tensor gradient) -> Tensor",
    *(_fake_backward, _cpu_backward, _cuda_backward),
)
register_gradient("swiglu", _backward, _setup_context)
