"""The layers of the model, and what they are made of.

Shape suffixes: B rows, N regular tokens, M summary tokens, H heads, D = E / H channels of a head,
E model width. `s_` and `r_` are the summary and the regular stream.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .kernels.attention import Attention
from .kernels.dense import CausalAttention
from .kernels.swiglu import swiglu


class Rotary:
    """RoPE (Su et al., 2021, arXiv:2104.09864) at given positions, channel i paired with i + D / 2.

    Angles are float32 whatever the model computes in, since bfloat16 cannot tell distant positions apart;
    the tables are rounded to `dtype`, once for all layers.
    """

    def __init__(self, position_BN: Tensor, head_dim: int, theta: float, dtype: torch.dtype):
        channel = torch.arange(0, head_dim, 2, device=position_BN.device, dtype=torch.float32)
        frequency = theta ** (-channel / head_dim)
        angle_BND = position_BN[..., None].float() * frequency
        angle_BND = torch.cat([angle_BND, angle_BND], dim=-1)
        self.cos_BN11D = angle_BND.cos().to(dtype)[:, :, None, None]
        self.sin_BN11D = angle_BND.sin().to(dtype)[:, :, None, None]


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Vectors x [..., D] turned by the angles of these cosines and sines (`Rotary`), which broadcast to x."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * gain (Zhang and Sennrich, 2019, arXiv:1910.07467), in the dtype of x.

    It is computed in the dtype of the gain, with one eps for every dtype, which PyTorch's own has not.
    """

    def __init__(self, dim: int):
        super().__init__(dim, eps=torch.finfo(torch.float32).eps)

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.eps)
        return normed.to(x.dtype)


class SwiGLU(nn.Module):
    """(silu(x W1) * x W2) W3 (Shazeer, 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


class _FeedsForward(nn.Module):
    """A layer that ends in `ffn` of the stream normed by `norm_ffn`.

    With `recompute_ffn` that part keeps its input alone for the backward, which computes the rest again.
    """

    norm_ffn: RMSNorm
    ffn: SwiGLU
    recompute_ffn = False

    def _feed_forward(self, x: Tensor) -> Tensor:
        if self.recompute_ffn and torch.is_grad_enabled():
            return recomputed(lambda y: self.ffn(self.norm_ffn(y)), x)
        return self.ffn(self.norm_ffn(x))


def recomputed(function: Callable, *args):
    """function(*args), of which nothing but the arguments is kept for the backward."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # nothing is random


class Layer(_FeedsForward):
    """Summarize, update, and one feed-forward network for both streams; pre-norm, residual.

    What the last layer would add to the summary stream nobody reads, so it has no output projection
    for it: a parameter without a gradient would stall distributed training.
    """

    def __init__(self, dim: int, heads: int, ffn: int, last: bool):
        super().__init__()
        self.heads = heads
        self.norm_s, self.norm_r = RMSNorm(dim), RMSNorm(dim)
        self.qkv_s = nn.Linear(dim, 3 * dim, bias=False)
        self.qkv_r = nn.Linear(dim, 3 * dim, bias=False)
        self.kv2 = nn.Linear(dim, 2 * dim, bias=False)
        self.out_s = None if last else nn.Linear(dim, dim, bias=False)
        self.out_r = nn.Linear(dim, dim, bias=False)
        self.norm_ffn = RMSNorm(dim)
        self.ffn = SwiGLU(dim, ffn)

    def forward(
        self, s_BME: Tensor, r_BNE: Tensor, attention: Attention, rotary_s: Rotary, rotary_r: Rotary
    ) -> tuple[Tensor, Tensor]:
        q_s, k_s, v_s = _split(self.qkv_s(self.norm_s(s_BME)), 3, self.heads, rotary_s)  # [B, H, M, D]
        q_r, k_r, v_r = _split(self.qkv_r(self.norm_r(r_BNE)), 3, self.heads, rotary_r)  # [B, H, N, D]
        o_s = _join(attention.summarize(q_s, k_s, v_s, k_r, v_r))
        k2_s, v2_s = _split(self.kv2(o_s), 2, self.heads, rotary_s)
        o_r = _join(attention.update(q_r, k_r, v_r, k2_s, v2_s))

        r_BNE = r_BNE + self.out_r(o_r)
        r_BNE = r_BNE + self._feed_forward(r_BNE)
        if self.out_s is not None:
            s_BME = s_BME + self.out_s(o_s)
            s_BME = s_BME + self._feed_forward(s_BME)
        return s_BME, r_BNE

    @property
    def residual_projections(self) -> list[nn.Linear]:
        """Those whose results are added to a stream."""
        return [p for p in (self.out_s, self.out_r, self.ffn.down) if p is not None]


class DenseLayer(_FeedsForward):
    """A layer without summaries: causal attention and a feed-forward network; pre-norm, residual."""

    def __init__(self, dim: int, heads: int, ffn: int):
        super().__init__()
        self.heads = heads
        self.norm_r, self.norm_ffn = RMSNorm(dim), RMSNorm(dim)
        self.qkv_r = nn.Linear(dim, 3 * dim, bias=False)
        self.out_r = nn.Linear(dim, dim, bias=False)
        self.ffn = SwiGLU(dim, ffn)

    def forward(self, r_BNE: Tensor, attention: CausalAttention, rotary_r: Rotary) -> Tensor:
        q_r, k_r, v_r = _split(self.qkv_r(self.norm_r(r_BNE)), 3, self.heads, rotary_r)  # [B, H, N, D]
        o_r = _join(attention(q_r, k_r, v_r))
        r_BNE = r_BNE + self.out_r(o_r)
        return r_BNE + self._feed_forward(r_BNE)

    @property
    def residual_projections(self) -> list[nn.Linear]:
        """Those whose results are added to the stream."""
        return [self.out_r, self.ffn.down]


def _split(x: Tensor, parts: int, heads: int, rotary: Rotary) -> tuple[Tensor, ...]:
    """[B, length, parts x E] -> parts of [B, H, length, D]; all but the last, the values, are turned."""
    rows, length, _ = x.shape
    return _Split.apply(x.view(rows, length, parts, heads, -1), rotary.cos_BN11D, rotary.sin_BN11D)


class _Split(torch.autograd.Function):
    """Each of P vectors of tokens and heads, [B, N, P, H, D], as [B, H, N, D]; all but the last are turned.

    Left to itself, torch.compile writes the gradients of what was turned twice: before and after they are
    laid beside those of the values.
    """

    @staticmethod
    def forward(ctx, x_BNPHD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        # Turned at once, queries and keys are one kernel when compiled.
        turned = turn(x_BNPHD[:, :, :-1], cos, sin).permute(2, 0, 3, 1, 4).unbind(0)
        return (*turned, x_BNPHD[:, :, -1].transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = (table[:, :, 0] for table in ctx.saved_tensors)  # [B, N, 1, D]
        *turned, of_values = (gradient.transpose(1, 2) for gradient in gradients)
        return torch.stack([*(turn(part, cos, -sin) for part in turned), of_values], dim=2), None, None


def _join(x: Tensor) -> Tensor:
    """[B, H, length, D] -> [B, length, E]."""
    return x.transpose(1, 2).flatten(2)
