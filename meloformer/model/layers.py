"""The layers of the model, and what they are made of.

Shape suffixes: B rows, N regular tokens, M summary tokens, H heads, D = E / H channels of a head,
E model width. `s_` and `r_` are the summary and the regular stream.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels.attention import Attention
from ..kernels.dense import CausalAttention
from ..kernels.norm import rms_norm, rms_norm_of_stream, rms_norm_of_streams
from ..kernels.rope import split_and_rotate
from ..kernels.swiglu import swiglu


class Rotary:
    """The tables of RoPE (`kernels.rope.apply_rope`) at given positions.

    Angles are float32 whatever the model computes in, since bfloat16 cannot tell distant positions apart;
    the tables are rounded to `dtype`, once for all layers.
    """

    def __init__(self, clocks: Sequence[tuple[Tensor, int, float]], dtype: torch.dtype):
        """`clocks`: (position [B, N], how many pairs of channels it rotates, base of their frequencies)."""
        angles = []
        for position_BN, pairs, theta in clocks:
            frequency = frequencies(pairs, theta, position_BN.device)
            angles.append(position_BN[..., None].float() * frequency)
        angle_BND = torch.cat([*angles, *angles], dim=-1)
        self.cos_BND, self.sin_BND = angle_BND.cos().to(dtype), angle_BND.sin().to(dtype)


def frequencies(pairs: int, theta: float, device: torch.device) -> Tensor:
    """By how much each of these pairs of channels turns at a position further: float32 [pairs], radians."""
    return theta ** (-torch.arange(pairs, device=device, dtype=torch.float32) / pairs)


class RMSNorm(nn.RMSNorm):
    """`kernels.norm.rms_norm`, its gain, and one eps for every dtype, which PyTorch's own has not."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=torch.finfo(torch.float32).eps)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def of_stream(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`kernels.norm.rms_norm_of_stream`: the stream to go on with, and its norm, [T, E]."""
        return rms_norm_of_stream(x, self.weight, self.eps, added)

    def of_streams(self, x: Tensor, added_to_x: Tensor, y: Tensor, added_to_y: Tensor) -> tuple[Tensor, ...]:
        """The same of two streams."""
        return rms_norm_of_streams(x, added_to_x, y, added_to_y, self.weight, self.eps)


class SwiGLU(nn.Module):
    """(silu(x W1) * x W2) W3 (Shazeer, 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


class _FeedsForward(nn.Module):
    """A layer that ends in `ffn` of its streams normed by `norm_ffn`, added to them.

    With `recompute_ffn` that part keeps its inputs alone for the backward, which computes the rest again.
    """

    norm_ffn: RMSNorm
    ffn: SwiGLU
    recompute_ffn = False

    def _feed_forward(self, x: Tensor, added: Tensor) -> Tensor:
        """The stream after the layer, if `added` is what its attention adds to the stream x."""
        return self._recomputing(self._fed, x, added)

    def _feed_forward_both(
        self, x: Tensor, added_to_x: Tensor, y: Tensor, added_to_y: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same of two streams at once, whose matrix products are joint ones."""
        return self._recomputing(self._fed_both, x, added_to_x, y, added_to_y)

    def _fed(self, x: Tensor, added: Tensor) -> Tensor:
        x, normed_TE = self.norm_ffn.of_stream(x, added)
        return x + self.ffn(normed_TE).view(x.shape)

    def _fed_both(
        self, x: Tensor, added_to_x: Tensor, y: Tensor, added_to_y: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, y, normed_TE = self.norm_ffn.of_streams(x, added_to_x, y, added_to_y)
        rows = x.shape[0] * x.shape[1]
        fed_TE = self.ffn(normed_TE)
        return x + fed_TE[:rows].view(x.shape), y + fed_TE[rows:].view(y.shape)

    def _recomputing(self, function: Callable, *args: Tensor):
        recomputes = self.recompute_ffn and torch.is_grad_enabled()
        return recomputed(function, *args) if recomputes else function(*args)


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
        s_BME, normed_s = self.norm_s.of_stream(s_BME)
        r_BNE, normed_r = self.norm_r.of_stream(r_BNE)
        q_s, k_s, v_s = _split(self.qkv_s(normed_s), s_BME, 3, self.heads, rotary_s)  # [B, H, M, D]
        # Keys and values have two readers: [B, H, N, D]
        q_r, k_r, v_r, k_r2, v_r2 = _split(
            self.qkv_r(normed_r), r_BNE, 3, self.heads, rotary_r, duplicate_kv=True
        )
        o_s = _join(attention.summarize(q_s, k_s, v_s, k_r, v_r))
        k2_s, v2_s = _split(self.kv2(o_s), s_BME, 2, self.heads, rotary_s)
        o_r = _join(attention.update(q_r, k_r2, v_r2, k2_s, v2_s))

        if self.out_s is None:
            return s_BME, self._feed_forward(r_BNE, self.out_r(o_r))
        r_BNE, s_BME = self._feed_forward_both(r_BNE, self.out_r(o_r), s_BME, self.out_s(o_s))
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
        r_BNE, normed_r = self.norm_r.of_stream(r_BNE)
        q_r, k_r, v_r = _split(self.qkv_r(normed_r), r_BNE, 3, self.heads, rotary_r)  # [B, H, N, D]
        o_r = _join(attention(q_r, k_r, v_r))
        return self._feed_forward(r_BNE, self.out_r(o_r))

    @property
    def residual_projections(self) -> list[nn.Linear]:
        """Those whose results are added to the stream."""
        return [self.out_r, self.ffn.down]


def _split(
    x: Tensor, stream: Tensor, parts: int, heads: int, rotary: Rotary, duplicate_kv: bool = False
) -> tuple[Tensor, ...]:
    """What is projected of a `stream` [B, length, E], P x E channels a token, as P of [B, H, length, D]; see
    `kernels.rope.split_and_rotate`."""
    x_BNPHD = x.view(*stream.shape[:2], parts, heads, -1)
    return split_and_rotate(x_BNPHD, rotary.cos_BND, rotary.sin_BND, duplicate_kv)


def _join(x: Tensor) -> Tensor:
    """[B, H, length, D] -> [B, length, E]."""
    return x.transpose(1, 2).flatten(2)
