"""The reference backend: masked dense attention, softmax(Q K^T / sqrt(D)) V, on any device and dtype.

The mask is held as booleans, made once per batch: B x N x (M + N) bytes at most, about half of it for
a causal row (0.3 GB for one row of 24,576 tokens). Queries go through in chunks, so that scores
exist for one chunk at a time: with H heads in float32 at most 4 x H x 256 x (M + N) bytes (0.2 GB at
24,576 tokens and 8 heads). PyTorch's fused attention, which float32 and narrower get everywhere and
float64 on CPU, does not hold even those, nor keep them for the backward; float64 on CUDA does.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .structure import Structure, regular_sees, summary_sees

QUERY_CHUNK = 256


def unavailable(device: torch.device) -> str | None:
    return None


class Chunk(NamedTuple):
    """Some consecutive queries, the `keys` first of the keys, and who of them sees whom."""

    queries: slice
    keys: int
    visible: Tensor  # bool [B, 1, queries, keys]; all True for queries that are fully masked
    fully_masked: Tensor  # bool [B, 1, queries, 1]: sees no key at all


def chunks(sees: Callable[[slice], Tensor], num_queries: int) -> list[Chunk]:
    """Cuts a mask into chunks without the keys after the last visible one.

    Args:
        sees: the mask of some queries, bool [B, queries, keys].
        num_queries: how many there are.
    """
    found = []
    for start in range(0, num_queries, QUERY_CHUNK):
        queries = slice(start, min(start + QUERY_CHUNK, num_queries))
        mask = sees(queries)
        seen = mask.flatten(0, 1).any(dim=0).nonzero()
        keys = int(seen[-1]) + 1 if len(seen) else 1
        visible = mask[:, None, :, :keys]
        # A softmax over nothing is NaN in some fused kernels: fully masked queries see all, then are zeroed.
        fully_masked = ~visible.any(dim=-1, keepdim=True)
        found.append(Chunk(queries, keys, visible | fully_masked, fully_masked))
    return found


def attend(q: Tensor, k: Tensor, v: Tensor, mask: list[Chunk]) -> Tensor:
    """q [B, H, Q, D], k and v [B, H, K, D] -> [B, H, Q, D]."""
    outputs = []
    for queries, keys, visible, fully_masked in mask:
        o = scaled_dot_product_attention(q[:, :, queries], k[:, :, :keys], v[:, :, :keys], attn_mask=visible)
        outputs.append(o.masked_fill(fully_masked, 0))
    return torch.cat(outputs, dim=2)


class Backend:
    """See `attention.Backend`."""

    def __init__(self, structure: Structure):
        summaries, tokens = structure.summaries, structure.tokens
        keys = structure.keys.at(slice(None), None)  # [B, 1, M + N]

        def summary_mask(queries: slice) -> Tensor:
            return summary_sees(summaries.at(slice(None), queries, None), keys)

        def regular_mask(queries: slice) -> Tensor:
            of_queries = tokens.at(slice(None), queries, None)
            return regular_sees(of_queries, keys, structure.near_bars, structure.kind_rule)

        self._summary_mask = chunks(summary_mask, summaries.doc.shape[1])
        self._regular_mask = chunks(regular_mask, tokens.doc.shape[1])

    def summarize(self, q_s: Tensor, k_s: Tensor, v_s: Tensor, k_r: Tensor, v_r: Tensor) -> Tensor:
        k, v = torch.cat([k_s, k_r], dim=2), torch.cat([v_s, v_r], dim=2)
        return attend(q_s, k, v, self._summary_mask)

    def update(self, q_r: Tensor, k_r: Tensor, v_r: Tensor, k_s: Tensor, v_s: Tensor) -> Tensor:
        k, v = torch.cat([k_s, k_r], dim=2), torch.cat([v_s, v_r], dim=2)
        return attend(q_r, k, v, self._regular_mask)
