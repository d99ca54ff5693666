"""The training loss, without copies of all logits in float32."""

from functools import cache
from typing import NamedTuple

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
    loss = weighted_loss(logits, targets, None, compiled)
    return loss.objective, loss.count


class WeightedLoss(NamedTuple):
    """Sums over the targets that were not ignored, 0-d tensors.

    Attributes:
        objective: of nats times weights, float32; what to differentiate.
        weight: of the weights, float32.
        nats: of plain nats, float32, without gradient.
        count: of targets, int64.
    """

    objective: Tensor
    weight: Tensor
    nats: Tensor
    count: Tensor


def weighted_loss(
    logits: Tensor, targets: Tensor, weights: Tensor | None, compiled: bool = False
) -> WeightedLoss:
    """As `next_token_loss`, with a weight for each target.

    Args:
        weights: float32 [V or fewer], by the id of the target; None weighs all alike.
    """
    flat = targets.flatten()
    real = flat != IGNORE_INDEX
    of_targets = real.float() if weights is None else weights[flat.clamp(min=0)].masked_fill(~real, 0)
    total = _compiled() if compiled else _SummedCrossEntropy.apply
    objective, nats = total(logits.flatten(0, 1), flat, of_targets)
    return WeightedLoss(objective, of_targets.sum(), nats.detach(), real.sum())


def _at_once(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    nats = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="none")
    return (nats * weights).sum(), nats.detach().sum()


@cache
def _compiled():
    return torch.compile(_at_once, fullgraph=True, dynamic=False)


class _SummedCrossEntropy(torch.autograd.Function):
    """Of logits [T, V], targets [T] and their weights [T] (0 where ignored), chunk by chunk: the weighted sum
    and the plain one. Keeps the logits and three numbers per token."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        lse = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        weighted, plain = torch.zeros(2, dtype=torch.float32, device=logits.device).unbind()
        for chunk, target, weight, of_chunk in zip(
            *(x.split(CHUNK) for x in (logits, targets, weights, lse))
        ):
            values = chunk.float()
            torch.logsumexp(values, dim=-1, out=of_chunk)
            of_target = values.gather(1, target.clamp(min=0)[:, None])[:, 0]
            nats = (of_chunk - of_target).masked_fill(target == IGNORE_INDEX, 0)
            weighted += (nats * weight).sum()
            plain += nats.sum()
        ctx.save_for_backward(logits, targets, weights, lse)
        ctx.mark_non_differentiable(plain)
        return weighted, plain

    @staticmethod
    def backward(ctx, gradient: Tensor, _) -> tuple[Tensor, None, None]:
        refuse_second_gradients("next_token_loss")
        logits, targets, weights, lse = ctx.saved_tensors
        out = torch.empty_like(logits)
        parts = (x.split(CHUNK) for x in (logits, targets, weights, lse, out))
        for chunk, target, weight, of_chunk, out_chunk in zip(*parts):
            d_logits = (chunk.float() - of_chunk[:, None]).exp_()  # softmax, minus 1 at the target
            d_logits.scatter_add_(1, target.clamp(min=0)[:, None], d_logits.new_full((len(target), 1), -1.0))
            d_logits *= (gradient * weight)[:, None]
            out_chunk.copy_(d_logits)
        return out, None, None
