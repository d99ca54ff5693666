"""Rotary positions: queries and keys of a joint projection split off and turned, and the gradient of that.

Shape suffixes: B rows, N tokens, P parts of a projection, H heads, D channels of a head.
"""

import torch
from torch import Tensor

from .gradients import refuse_second_gradients

_library = torch.library.Library("meloformer", "FRAGMENT")
_library.define("unsplit(Tensor[] gradients, Tensor[] more, Tensor cos, Tensor sin) -> Tensor")


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Vectors x [..., D] turned by the angles of these cosines and sines, [..., D], which broadcast to x.

    RoPE (Su et al., 2021, arXiv:2104.09864), channel i paired with i + D / 2.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def split(x_BNPHD: Tensor, cos_BND: Tensor, sin_BND: Tensor, twice: bool = False) -> tuple[Tensor, ...]:
    """P = 2 or 3 vectors of tokens and heads, each as [B, H, N, D]; all but the last, the values, are turned.

    Args:
        twice: append keys and values again, for another reader: gradients of both readers are then added up
            where they are turned back.

    The halves of each cosine and sine [D] must be equal, as those of RoPE are.

    Raises:
        ValueError: another number of parts, tables that do not belong to x, or float64 on CUDA.
    """
    rows, tokens, parts, _, dim = x_BNPHD.shape
    if parts not in (2, 3):
        raise ValueError(f"a projection has 2 or 3 parts, got {parts}")
    for table in (cos_BND, sin_BND):
        if table.shape != (rows, tokens, dim):
            raise ValueError(f"expected tables [B, N, D] = {[rows, tokens, dim]}, got {list(table.shape)}")
    if x_BNPHD.is_cuda and x_BNPHD.dtype == torch.float64:
        raise ValueError("split computes in float32 on CUDA: float64 would not be what it says")
    return _Split.apply(x_BNPHD, cos_BND, sin_BND, twice)


class _Split(torch.autograd.Function):
    """Left to itself, torch.compile writes the gradients of what was turned twice: before and after they are
    laid beside those of the values. Told to do it at once, it reads them three times."""

    @staticmethod
    def forward(ctx, x_BNPHD: Tensor, cos: Tensor, sin: Tensor, twice: bool) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.parts = x_BNPHD.shape[2]
        # Turned at once, queries and keys are one kernel when compiled.
        turned = turn(x_BNPHD[:, :, :-1], cos[:, :, None, None], sin[:, :, None, None])
        parts = *turned.permute(2, 0, 3, 1, 4).unbind(0), x_BNPHD[:, :, -1].transpose(1, 2)
        return *parts, *(part.view_as(part) for part in parts[-2:] if twice)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_second_gradients("split")
        own, more = gradients[: ctx.parts], gradients[ctx.parts :]
        return torch.ops.meloformer.unsplit(own, more, *ctx.saved_tensors), None, None, None


def _cpu(gradients: list[Tensor], more: list[Tensor], cos: Tensor, sin: Tensor) -> Tensor:
    """[B, N, P, H, D] of P gradients [B, H, N, D]: all but the last are turned back.

    `more` is to be added to the last two, or nothing.
    """
    for part, other in enumerate(more, len(gradients) - 2):
        gradients[part] = gradients[part] + other
    *turned, of_values = (gradient.transpose(1, 2) for gradient in gradients)
    turned = (turn(part, cos[:, :, None], -sin[:, :, None]) for part in turned)
    return torch.stack([*turned, of_values], dim=2)


def _cuda(gradients: list[Tensor], more: list[Tensor], cos: Tensor, sin: Tensor) -> Tensor:
    from .rope_kernels import unsplit  # imports triton

    return unsplit(gradients, more, cos, sin)


def _fake(gradients: list[Tensor], more: list[Tensor], cos: Tensor, sin: Tensor) -> Tensor:
    rows, heads, tokens, dim = gradients[0].shape
    return gradients[0].new_empty(rows, tokens, len(gradients), heads, dim)


_library.impl("unsplit", _cpu, "CPU")
_library.impl("unsplit", _cuda, "CUDA")
torch.library.register_fake("meloformer::unsplit", _fake, lib=_library)
