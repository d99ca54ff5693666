"""Plain causal attention inside each document: for a Transformer without summaries, as a baseline.

A baseline is honest if it is the fastest there is. Which that is depends on the GPU, on what is installed and
on the documents: `WAYS` are what PyTorch has, and `dense_choice` measures them.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .structure import Structure

_HALF = (torch.float16, torch.bfloat16)
_CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
WAYS = {
    "flash": "all documents of all rows in one call of FlashAttention-2, of any length each",
    "fa3": "the same with FlashAttention-3, which the package flash_attn_interface holds",
    "cudnn": "document by document with cuDNN, or with FlashAttention-2 those of a length it does not take",
    "each": "document by document, with what PyTorch takes by itself",
}


class CausalAttention:
    """The attention of one batch of B rows of N tokens, for all layers of a model.

    The padding of a row attends as if it were a document: its outputs are not used.

    Args:
        structure: where the documents are. If it is on CUDA, this synchronizes.
        device: where to compute, if not where the structure is.
        way: one of `WAYS`. By default "flash" on CUDA in half precision, and "each" elsewhere, which takes
            any dtype and runs anywhere.

    Attributes:
        lengths: of the documents of all rows, in tokens.
    """

    def __init__(
        self, structure: Structure, device: torch.device | str | None = None, way: str | None = None
    ):
        doc = structure.doc
        begins = torch.ones_like(doc, dtype=torch.bool)
        begins[:, 1:] = doc[:, 1:] != doc[:, :-1]
        bounds = [*begins.flatten().nonzero()[:, 0].tolist(), doc.numel()]
        self.lengths = [stop - start for start, stop in pairwise(bounds)]
        self._way, self._longest = way, doc.shape[1]
        device = doc.device if device is None else torch.device(device)
        ends = torch.tensor(bounds, dtype=torch.int32)
        if device.type == "cuda":  # into memory that it copies from without the host
            ends = ends.pin_memory()
        self._bounds = ends.to(device, non_blocking=True)
        self._varlen = _causal_varlen()
        self._document_by_document = _document_by_document

    def finalize(self) -> "CausalAttention":
        """Call it before a compiled model takes this: its graphs then serve any number of documents."""
        torch._dynamo.maybe_mark_dynamic(self._bounds, 0)
        self._document_by_document = _outside_graphs()
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(Q K^T / sqrt(D)) V over what is not later in the document, [B, H, N, D] as q, k and v."""
        rows, heads, length, dim = q.shape
        q, k, v = (x.transpose(1, 2).reshape(rows * length, heads, dim) for x in (q, k, v))
        in_half = q.device.type == "cuda" and q.dtype in _HALF
        way = self._way or ("flash" if in_half else "each")
        attend = self._in_one_call if way in ("flash", "fa3") else self._document_by_document
        return attend(q, k, v, self).reshape(rows, length, heads, dim).transpose(1, 2)

    def _in_one_call(self, q: Tensor, k: Tensor, v: Tensor, _) -> Tensor:
        """The row length is passed as the longest document, so that a run has one shape. (Blocks beyond the
        end of a document return at once.)"""
        bounds, longest = self._bounds, self._longest
        return self._varlen(q, k, v, bounds, bounds, longest, longest)


def _document_by_document(q: Tensor, k: Tensor, v: Tensor, attention: CausalAttention) -> Tensor:
    """[tokens of all rows, H, D] as q, k and v."""
    documents = zip(*(x.transpose(0, 1)[None].split(attention.lengths, dim=2) for x in (q, k, v)))
    with sdpa_kernel(_CUDNN_FIRST, set_priority=True) if attention._way == "cudnn" else nullcontext():
        outputs = [scaled_dot_product_attention(*qkv, is_causal=True) for qkv in documents]
    return torch.cat([o.transpose(1, 2) for o in outputs], dim=1)[0]  # laid out as heads are joined


@cache
def _outside_graphs() -> Callable[..., Tensor]:
    """For compiled layers: a graph would hold the lengths of the documents of one batch."""
    return torch.compiler.disable(_document_by_document)


@cache
def _causal_varlen() -> Callable[..., Tensor]:
    from torch.nn.attention.varlen import varlen_attn  # registers operators: only where they are used

    # PyTorch 2.10 has a flag for what is a window since.
    flag = "is_causal" in inspect.signature(varlen_attn).parameters
    return partial(varlen_attn, **({"is_causal": True} if flag else {"window_size": (-1, 0)}))
