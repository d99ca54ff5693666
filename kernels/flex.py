"""The FlexAttention backend: one mask_mod per phase, compiled on CUDA.

What runs where:

- CUDA: `flex_attention` and `create_block_mask`, compiled for static shapes. Every new shape, dtype
  or gradient mode compiles once; a new batch of the same shapes does not, since the mask_mods of two
  batches share their code and differ only in the tensors they capture. Keep to few shapes: past
  `RECOMPILE_LIMIT` compiled variants PyTorch raises an error here (never a slow fallback).
- CPU without gradients: `flex_attention` uncompiled, which holds the whole score matrix.
- CPU with gradients, which FlexAttention does not have: the dense reference with the mask that the
  same mask_mod gives. Said once by a warning.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from warnings import warn

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from . import reference
from .structure import Structure, TokenProperties, regular_sees, summary_sees

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Two phases, with and without gradients, times the shapes of a run: more than the 8 of PyTorch.
RECOMPILE_LIMIT = 64
torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)

# fullgraph: an error instead of uncompiled attention when PyTorch gives up compiling.
_compiled_attention = torch.compile(flex_attention, dynamic=False, fullgraph=True)
_compiled_block_mask = torch.compile(create_block_mask, dynamic=False, fullgraph=True)


def unavailable(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return "it runs on cpu and cuda"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if find_spec("triton") is None:
        return "PyTorch compiles it with the package triton, which is not installed"
    return None


def summary_mask_mod(queries: TokenProperties, keys: TokenProperties) -> MaskMod:
    """Summaries [B, M] to all keys [B, M + N]."""

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return summary_sees(queries.at(b, i), keys.at(b, j))

    return mask_mod


def regular_mask_mod(
    queries: TokenProperties, keys: TokenProperties, near_bars: tuple[int, ...], kind_rule: str
) -> MaskMod:
    """Regular tokens [B, N] to all keys [B, M + N]."""

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return regular_sees(queries.at(b, i), keys.at(b, j), near_bars, kind_rule)

    return mask_mod


class _Phase:
    """Masked attention of one phase; the masks are made once per batch."""

    def __init__(self, mask_mod: MaskMod, queries: TokenProperties, keys: TokenProperties):
        self._mask_mod = mask_mod
        self._shape = (*queries.doc.shape, keys.doc.shape[1])  # B, Q, K
        self._device = queries.doc.device
        self._dense: list[reference.Chunk] | None = None
        make = _compiled_block_mask if self._device.type == "cuda" else create_block_mask
        rows, num_queries, num_keys = self._shape
        self._block_mask = make(mask_mod, rows, None, num_queries, num_keys, device=self._device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._device.type == "cuda":
            return _compiled_attention(q, k, v, block_mask=self._block_mask)
        if q.requires_grad or k.requires_grad or v.requires_grad:
            _say_dense()
            if self._dense is None:
                self._dense = reference.chunks(self._dense_mask, self._shape[1])
            return reference.attend(q, k, v, self._dense)
        return flex_attention(q, k, v, block_mask=self._block_mask)

    def _dense_mask(self, queries: slice) -> Tensor:
        """What the mask_mod gives for some queries: [B, queries, K]."""
        rows, num_queries, num_keys = self._shape
        b = torch.arange(rows, device=self._device)[:, None, None]
        i = torch.arange(num_queries, device=self._device)[queries][None, :, None]
        j = torch.arange(num_keys, device=self._device)[None, None, :]
        return self._mask_mod(b, torch.zeros_like(b), i, j)


class Backend:
    """See `attention.Backend`."""

    def __init__(self, structure: Structure):
        summaries, tokens, keys = structure.summaries, structure.tokens, structure.keys
        self._summarize = _Phase(summary_mask_mod(summaries, keys), summaries, keys)
        regular_mask = regular_mask_mod(tokens, keys, structure.near_bars, structure.kind_rule)
        self._update = _Phase(regular_mask, tokens, keys)

    def summarize(self, q_s: Tensor, k_s: Tensor, v_s: Tensor, k_r: Tensor, v_r: Tensor) -> Tensor:
        return self._summarize(q_s, torch.cat([k_s, k_r], dim=2), torch.cat([v_s, v_r], dim=2))

    def update(self, q_r: Tensor, k_r: Tensor, v_r: Tensor, k_s: Tensor, v_s: Tensor) -> Tensor:
        return self._update(q_r, torch.cat([k_s, k_r], dim=2), torch.cat([v_s, v_r], dim=2))


@cache
def _say_dense() -> None:
    warn(
        "FlexAttention has no backward on CPU: attention 'flex' computes densely there, "
        "like 'reference' but slower to set up",
        stacklevel=2,
    )
