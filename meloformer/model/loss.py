"""The training loss, without copies of all logits in float32."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.operators import refuse_second_gradients
from ..tokens.vocab import IGNORE_INDEX

CHUNK = 4096  # tokens whose logits are held in float32 at a time


def next_token_loss(logits: Tensor, targets: Tensor, compiled: bool = False) -> tuple[Tensor, Tensor]:
    """Cross entropy in float32, as a sum, so that it adds up over batches and processes.

    Args:
        logits: [B, N, V] any floating dtype.
        targets: int64 [B, N], the token after each; IGNORE_INDEX (-100) where there is none to predict.
        compiled: let torch.compile fuse it, anew for each shape; otherwise it goes chunk by chunk, and can be
            differentiated only once (RuntimeError with create_graph).

    Returns:
        The sum in nats, and the count (int64) of targets that were not ignored; 0-d tensors.
    """
    total = _compiled() if compiled else _SummedCrossEntropy.apply
    nats = total(logits.flatten(0, 1), targets.flatten())
    return nats, (targets != IGNORE_INDEX).sum()


def _at_once(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")


@cache
def _compiled():
    return torch.compile(_at_once, fullgraph=True, dynamic=False)


class _SummedCrossEntropy(torch.autograd.Function):
    """Of logits [T, V] and targets [T], chunk by chunk; keeps the logits and a number per token."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        lse = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        nats = torch.zeros((), dtype=torch.float32, device=logits.device)
        for chunk, target, of_chunk in zip(logits.split(CHUNK), targets.split(CHUNK), lse.split(CHUNK)):
            values = chunk.float()
            torch.logsumexp(values, dim=-1, out=of_chunk)
            of_target = values.gather(1, target.clamp(min=0)[:, None])[:, 0]
            nats += (of_chunk - of_target).masked_fill(target == IGNORE_INDEX, 0).sum()
        ctx.save_for_backward(logits, targets, lse)
        return nats

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        refuse_second_gradients("next_token_loss")
        logits, targets, lse = ctx.saved_tensors
        out = torch.empty_like(logits)
        parts = (x.split(CHUNK) for x in (logits, targets, lse, out))
        for chunk, target, of_chunk, out_chunk in zip(*parts):
            d_logits = (chunk.float() - of_chunk[:, None]).exp_()  # softmax, minus 1 at the target
            d_logits.scatter_add_(1, target.clamp(min=0)[:, None], d_logits.new_full((len(target), 1), -1.0))
            d_logits *= gradient.expand(len(target)).masked_fill(target == IGNORE_INDEX, 0)[:, None]
            out_chunk.copy_(d_logits)
        return out, None
