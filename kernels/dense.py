"""Plain causal attention inside each document: for a Transformer without summaries, as a baseline.

What runs where:

- CUDA in half precision: variable-length FlashAttention over all documents of all rows in one call. The
  boundaries are a tensor of any length, and the row length is passed as the longest document, so that a run
  has one shape. (Blocks beyond the end of a document return at once.)
- elsewhere: PyTorch's fused attention, document by document.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .structure import Structure

_HALF = (torch.float16, torch.bfloat16)


class CausalAttention:
    """The attention of one batch of B rows of N tokens, for all layers of a model.

    The padding of a row attends as if it were a document: its outputs are not used.

    Args:
        structure: where the documents are. If it is on CUDA, this synchronizes.
        device: where to compute, if not where the structure is.
    """

    def __init__(self, structure: Structure, device: torch.device | str | None = None):
        doc = structure.doc
        begins = torch.ones_like(doc, dtype=torch.bool)
        begins[:, 1:] = doc[:, 1:] != doc[:, :-1]
        bounds = [*begins.flatten().nonzero()[:, 0].tolist(), doc.numel()]
        self._lengths = [stop - start for start, stop in pairwise(bounds)]
        self._longest = doc.shape[1]
        device = doc.device if device is None else torch.device(device)
        ends = torch.tensor(bounds, dtype=torch.int32)
        if device.type == "cuda":  # into memory that it copies from without the host
            ends = ends.pin_memory()
        self._bounds = ends.to(device, non_blocking=True)
        self._varlen = _causal_varlen()

    def finalize(self) -> "CausalAttention":
        """Call it before a compiled model takes this: its graph then serves any number of documents."""
        torch._dynamo.maybe_mark_dynamic(self._bounds, 0)
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(Q K^T / sqrt(D)) V over what is not later in the document, [B, H, N, D] as q, k and v."""
        rows, heads, length, dim = q.shape
        q, k, v = (x.transpose(1, 2).reshape(rows * length, heads, dim) for x in (q, k, v))
        attend = self._flash if q.device.type == "cuda" and q.dtype in _HALF else self._each
        return attend(q, k, v).reshape(rows, length, heads, dim).transpose(1, 2)

    def _flash(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bounds, longest = self._bounds, self._longest
        return self._varlen(q, k, v, bounds, bounds, longest, longest)

    def _each(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        documents = zip(*(x.transpose(0, 1)[None].split(self._lengths, dim=2) for x in (q, k, v)))
        outputs = [scaled_dot_product_attention(*qkv, is_causal=True) for qkv in documents]
        return torch.cat(outputs, dim=2)[0].transpose(0, 1)


@cache
def _causal_varlen() -> Callable[..., Tensor]:
    from torch.nn.attention.varlen import varlen_attn  # registers operators: only where they are used

    # PyTorch 2.10 has a flag for what is a window since.
    flag = "is_causal" in inspect.signature(varlen_attn).parameters
    return partial(varlen_attn, **({"is_causal": True} if flag else {"window_size": (-1, 0)}))
