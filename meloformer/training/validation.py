"""Loss on the validation split: in total, per note, and by the family of the token to predict."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..data.batches import PackedSongs, State
from ..model.loss import CHUNK
from ..tokens import vocab
from .distributed import Job
from .family_weights import PREDICTED
from .metrics import finite
from .prefetch import prefetch
from .stepper import Stepper


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
        `val_loss` (nats per token), `val_perplexity`, `val_nats_per_note` (nats of all tokens over the number
        of notes, which compares across vocabularies), and for each family that occurs `val_loss_INST`, nats
        per token of that family, and `val_within_INST`, the same given that the family is right; non-finite
        numbers are None. The whole result is None if any process wanted to stop.
    """
    stepper.model.eval()
    try:
        sums = _add_up(stepper, data, batch_size, job, stops)
    finally:
        stepper.model.train()
    if sums is None:
        return None
    nats, within, count = job.sum(sums).tolist()
    loss = sum(nats) / sum(count)
    perplexity = math.exp(loss) if loss < 700 else math.inf  # exp(710) overflows
    figures = {"val_loss": loss, "val_perplexity": perplexity}
    if notes := count[PREDICTED.index(vocab.P)]:
        figures["val_nats_per_note"] = sum(nats) / notes
    for family, of_all, of_family, tokens in zip(PREDICTED, nats, within, count):
        if tokens:
            figures[f"val_loss_{family.name}"] = of_all / tokens
            figures[f"val_within_{family.name}"] = of_family / tokens
    return {name: finite(value) for name, value in figures.items()}


@torch.no_grad()
def _add_up(
    stepper: Stepper, data: PackedSongs, batch_size: int, job: Job, stops: Callable[[], bool]
) -> Tensor | None:
    """`family_sums` over the rows of this rank; None if any process stops."""
    sums = torch.zeros(3, len(PREDICTED), dtype=torch.float64, device=job.device)
    batches = data.batches(State(), batch_size, rank=job.rank, world=job.world, stop_epoch=1)
    for batch, _ in prefetch(batches):
        batch = batch.to(job.device)
        sums += family_sums(stepper.logits(batch).flatten(0, 1), batch.targets.flatten())
        if job.any(stops()):
            return None
    return sums


def family_sums(logits: Tensor, targets: Tensor) -> Tensor:
    """Sums by family of the target: float64 [3, PREDICTED].

    Args:
        logits: [T, V] any floating dtype. targets: int64 [T], negative where there is none.

    Returns:
        nats over all ids; nats over the ids of the family alone; the count of targets.
    """
    family_of = torch.full((logits.shape[1],), len(PREDICTED), device=logits.device)
    for index, family in enumerate(PREDICTED):
        family_of[family.start : family.stop] = index
    sums = torch.zeros(3, len(PREDICTED) + 1, dtype=torch.float64, device=logits.device)
    for chunk, target in zip(logits.split(CHUNK), targets.split(CHUNK)):
        values, real = chunk.float(), target >= 0
        target = target.clamp(min=0)
        family = family_of[target].where(real, len(PREDICTED))
        of_target = values.gather(1, target[:, None])[:, 0]
        of_each = [values[:, f.start : f.stop].logsumexp(1) for f in PREDICTED]
        of_family = torch.stack([*of_each, of_target], 1).gather(1, family[:, None])[:, 0]
        columns = torch.stack(
            [values.logsumexp(1) - of_target, of_family - of_target, torch.ones_like(of_target)]
        )
        sums.index_add_(1, family, columns.double())
    return sums[:, :-1]
