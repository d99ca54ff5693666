"""Logits of labels that a song brought up before, raised by gates.

Which labels come next depends on the song more than on music at large, and a label that a song brought up
cannot pass through the stream as well as the one index that names it (pointer networks, Vinyals et al. 2015,
arXiv:1506.03134).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Copies(NamedTuple):
    """Which labels can be copied, and by which gates.

    Attributes:
        labels: int64 [..., G], ids; 0 for none.
        gates: bool [..., G, G], which gates are added up for each label. Of guesses that name one label the
            first has the gates of all, and the others none: added at once, in any order, they make one sum.
    """

    labels: Tensor
    gates: Tensor


@torch.no_grad()
def copies_of(guesses: Sequence[Tensor]) -> Copies:
    """Of G guesses int64 [...], ids of labels; 0 for none."""
    labels = torch.stack([*guesses], dim=-1)
    alike = labels[..., :, None] == labels[..., None, :]
    counts = ~alike.tril(-1).any(-1) & (labels != 0)
    return Copies(labels, alike & counts[..., None])


def raise_copied(logits: Tensor, gates: Tensor, copies: Copies) -> Tensor:
    """The logits [..., V], each label's gates [..., G] added to it; in place."""
    total = torch.where(copies.gates, gates[..., None, :], 0).sum(-1, dtype=gates.dtype)
    return logits.scatter_add_(-1, copies.labels, total)
