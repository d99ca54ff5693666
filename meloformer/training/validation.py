"""Loss and perplexity on the validation split, overall and by the kind of the predicted token."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..data.batches import PackedSongs, State
from ..model.loss import next_token_loss
from ..tokens import attributes, vocab
from .distributed import Job
from .metrics import finite
from .prefetch import prefetch
from .stepper import Stepper

KINDS = {
    "T": attributes.KIND_T,
    "P": attributes.KIND_P,
    "L": attributes.KIND_L,
    "V": attributes.KIND_V,
    "structural": attributes.STRUCTURAL,
}


def validate(
    stepper: Stepper,
    data: PackedSongs,
    batch_size: int,
    job: Job,
    stops: Callable[[], bool],
) -> dict[str, float | None] | None:
    """Collective: loss and perplexity over the rows of epoch 0 of `data`, the same on all ranks.

    Args:
        stepper: holds the model, which is put in evaluation mode and back.
        data: with at least one sample.
        batch_size: rows per process at a time.
        stops: called after each batch; whether this process wants to stop.

    Returns:
        `val_loss` (nats per token) and `val_perplexity`, and the same for each of `KINDS` that occurs,
        as in `val_loss_T`; non-finite numbers are None. The whole result is None if any process wanted
        to stop.
    """
    stepper.model.eval()
    try:
        sums = _add_up(stepper, data, batch_size, job, stops)
    finally:
        stepper.model.train()
    if sums is None:
        return None
    nats, count = job.sum(sums).tolist()
    figures = _figures("", sum(nats), sum(count))
    for name, kind_nats, kind_count in zip(KINDS, nats, count):
        if kind_count:
            figures |= _figures(f"_{name}", kind_nats, kind_count)
    return figures


@torch.no_grad()
def _add_up(
    stepper: Stepper, data: PackedSongs, batch_size: int, job: Job, stops: Callable[[], bool]
) -> Tensor | None:
    """Sums of nats and of targets by kind on this rank, float64 [2, kinds]; None if any process stops."""
    kind_of = torch.from_numpy(attributes.KIND_OF_ID).to(job.device)
    sums = torch.zeros(2, len(KINDS), dtype=torch.float64, device=job.device)
    batches = data.batches(State(), batch_size, rank=job.rank, world=job.world, stop_epoch=1)
    for batch, _ in prefetch(batches):
        batch = batch.to(job.device)
        logits = stepper.logits(batch)
        kinds = kind_of[batch.targets.clamp(min=0)]
        for column, kind in enumerate(KINDS.values()):
            nats, count = next_token_loss(logits, batch.targets.where(kinds == kind, vocab.IGNORE_INDEX))
            sums[0, column] += nats
            sums[1, column] += count
        if job.any(stops()):
            return None
    return sums


def _figures(suffix: str, nats: float, count: float) -> dict[str, float | None]:
    loss = nats / count
    perplexity = math.exp(loss) if loss < 700 else math.inf  # exp(710) overflows
    return {f"val_loss{suffix}": finite(loss), f"val_perplexity{suffix}": finite(perplexity)}
