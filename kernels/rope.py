"""RoPE: splits a joint projection into queries, keys and values and rotates queries and keys; its gradient.

Shape suffixes: B batch rows, N tokens, P parts of a projection, H heads, D channels of a head.
"""

import torch
from torch import Tensor

from .operators import refuse_second_gradients, register


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (Su et al., 2021, arXiv:2104.09864) with channel i paired with i + D / 2: [..., D].

    Args:
        x: [..., D].
        cos, sin: of the angles, broadcastable to x.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def split_and_rotate(
    x_BNPHD: Tensor, cos_BND: Tensor, sin_BND: Tensor, duplicate_kv: bool = False
) -> tuple[Tensor, ...]:
    """The P = 2 or 3 parts of a projection, each [B, H, N, D]: (queries,) keys and values.

    All but the values are rotated by `apply_rope`.

    Args:
        x_BNPHD: the projection, any floating dtype (on CUDA not float64).
        cos_BND, sin_BND: tables of RoPE; the halves of each [D] must be equal, as they are in RoPE.
        duplicate_kv: return keys and values a second time, as views for another reader: the backward then
            adds the gradients of both readers in the kernel.

    Raises:
        ValueError: another number of parts, tables of another shape, or float64 on CUDA.
        RuntimeError: in the backward, with create_graph.
    """
    batch, tokens, parts, _, dim = x_BNPHD.shape
    if parts not in (2, 3):
        raise ValueError(f"a projection has 2 or 3 parts, got {parts}")
    for table in (cos_BND, sin_BND):
        if table.shape != (batch, tokens, dim):
            raise ValueError(f"expected tables [B, N, D] = {[batch, tokens, dim]}, got {list(table.shape)}")
    if x_BNPHD.is_cuda and x_BNPHD.dtype == torch.float64:
        raise ValueError("split_and_rotate computes in float32 on CUDA: float64 would not be what it says")
    return _Split.apply(x_BNPHD, cos_BND, sin_BND, duplicate_kv)


class _Split(torch.autograd.Function):
    """A function of its own since torch.compile would write the gradients of what was rotated twice, before
    and after joining them with those of the values, or, told to do it at once, read them three times."""

    @staticmethod
    def forward(ctx, x_BNPHD: Tensor, cos: Tensor, sin: Tensor, duplicate_kv: bool) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.parts = x_BNPHD.shape[2]
        # Rotated at once, queries and keys are one kernel when compiled.
        rotated = apply_rope(x_BNPHD[:, :, :-1], cos[:, :, None, None], sin[:, :, None, None])
        parts = *rotated.permute(2, 0, 3, 1, 4).unbind(0), x_BNPHD[:, :, -1].transpose(1, 2)
        return *parts, *(part.view_as(part) for part in parts[-2:] if duplicate_kv)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_second_gradients("split_and_rotate")
        own, duplicates = gradients[: ctx.parts], gradients[ctx.parts :]
        return torch.ops.meloformer.split_backward(own, duplicates, *ctx.saved_tensors), None, None, None


def _cpu_backward(gradients: list[Tensor], duplicates: list[Tensor], cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient [B, N, P, H, D] from those of P parts, [B, H, N, D].

    `duplicates` are those of the second keys and values, or none; they are added to the first.
    """
    for part, other in enumerate(duplicates, len(gradients) - 2):
        gradients[part] = gradients[part] + other
    *rotated, d_values = (gradient.transpose(1, 2) for gradient in gradients)
    rotated = (apply_rope(part, cos[:, :, None], -sin[:, :, None]) for part in rotated)
    return torch.stack([*rotated, d_values], dim=2)


def _cuda_backward(gradients: list[Tensor], duplicates: list[Tensor], cos: Tensor, sin: Tensor) -> Tensor:
    from .rope_kernels import split_backward  # imports triton

    return split_backward(gradients, duplicates, cos, sin)


def _fake_backward(gradients: list[Tensor], duplicates: list[Tensor], cos: Tensor, sin: Tensor) -> Tensor:
    batch, heads, tokens, dim = gradients[0].shape
    return gradients[0].new_empty(batch, tokens, len(gradients), heads, dim)


register(
    "split_backward(Tensor[] gradients, Tensor[] duplicates, Tensor cos, Tensor sin) -> Tensor",
    *(_fake_backward, _cpu_backward, _cuda_backward),
)
