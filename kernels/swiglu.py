"""The gate of a SwiGLU feed-forward network as a PyTorch operator: silu(gate) * up, and its gradient.

Between two matrix products there is nothing to fuse it with, and it moves more bytes than any other step
of a layer. torch.compile writes the gradient of both halves as one concatenation, whose halves each read
everything: twice the bytes that these kernels move.
"""

import torch
from torch import Tensor

_library = torch.library.Library("meloformer", "FRAGMENT")
_library.define("swiglu(Tensor gate_up) -> Tensor")
_library.define("swiglu_backward(Tensor gate_up, Tensor gradient) -> Tensor")


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020, arXiv:2002.05202), [..., F], of `gate_up`, [..., 2 F], gate first.

    On CUDA computed in float32 and rounded once.

    Raises:
        ValueError: an odd number of channels, or float64 on CUDA.
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
    share = gate.sigmoid()
    slope = share * (1 + gate * (1 - share))
    return torch.cat([gradient * up * slope, gradient * gate * share], dim=-1)


def _cuda(gate_up: Tensor) -> Tensor:
    from .swiglu_kernels import forward  # imports triton

    return forward(gate_up.contiguous())


def _cuda_backward(gate_up: Tensor, gradient: Tensor) -> Tensor:
    from .swiglu_kernels import backward

    return backward(gate_up.contiguous(), gradient.contiguous())


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, gradient):
    return torch.ops.meloformer.swiglu_backward(*ctx.saved_tensors, gradient)


def _refuse(ctx, gradient):
    raise RuntimeError("swiglu can be differentiated once")


for _name, _on_cpu, _on_cuda in (("swiglu", _cpu, _cuda), ("swiglu_backward", _cpu_backward, _cuda_backward)):
    _library.impl(_name, _on_cpu, "CPU")
    _library.impl(_name, _on_cuda, "CUDA")
torch.library.register_fake(
    "meloformer::swiglu",
    lambda gate_up: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2),
    lib=_library,
)
torch.library.register_fake(
    "meloformer::swiglu_backward", lambda gate_up, _: gate_up.new_empty(gate_up.shape), lib=_library
)
torch.library.register_autograd("meloformer::swiglu", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("meloformer::swiglu_backward", _refuse, lib=_library)
