"""What the vocabulary says of every id, as tensors; and how the state of songs is kept in tensors.

Everything in this folder works on S songs at once, each in a *slot*, by operations on tensors whose shapes
never change, and never asks the host: so that a step can be recorded as a CUDA graph. Integers are int64 [S]
unless a shape is given; -1 stands for what there is not.
"""

import numpy as np
import torch
from torch import Tensor

from ...tokens import vocab
from ...tokens.attributes import KIND_OF_ID, STRUCTURAL

FAMILIES = len(vocab.FAMILIES)
NUMBER = {family.name: number for number, family in enumerate(vocab.FAMILIES)}
PAD, BOS, EOS, BAND, CHORD, TS, CUT, BPM, INST, T, P, L, V, RESERVED = range(FAMILIES)


SWITCHES_TO = np.where(KIND_OF_ID == STRUCTURAL, vocab.NO_INSTRUMENT, -1)
SWITCHES_TO[vocab.INST.start : vocab.INST.stop] = vocab.INSTRUMENTS


class Tables:
    """By id, int64 [VOCAB_SIZE]: `family` (a number), `value`, `kind`, `switches_to` (an instrument, or -1);
    `of_id` has them below each other.

    By time signature, int64 [signatures]: its length in steps, and the number of parts of its bars.
    """

    def __init__(self, device: torch.device):
        def table(values) -> Tensor:
            return torch.as_tensor(np.asarray(values, dtype=np.int64), device=device)

        family = [number for number, family in enumerate(vocab.FAMILIES) for _ in family.labels]
        value = [value for family in vocab.FAMILIES for value in range(len(family))]
        self.of_id = table([family, value, KIND_OF_ID, SWITCHES_TO])
        self.family, self.value, self.kind, self.switches_to = self.of_id
        self.steps = table(vocab.SIGNATURE_STEPS)
        self.parts = table(-(-vocab.SIGNATURE_STEPS // vocab.MAX_BAR_STEPS))


class SlotNumbers:
    """Integers [S] by name, which are kept in one tensor, so that a song can be put into a slot at once."""

    def __init__(self, names: tuple[str, ...], slots: int, device: torch.device):
        self.names = names
        self.all = torch.full((len(names), slots), -1, dtype=torch.int64, device=device)
        for name, row in zip(names, self.all):
            setattr(self, name, row)

    def put(self, slot: int, **values: int) -> None:
        """Set all of them in one slot."""
        ordered = [int(values[name]) for name in self.names]
        self.all[:, slot] = torch.tensor(ordered, device=self.all.device)


def advance(value: Tensor, where: Tensor, new: Tensor | int) -> None:
    """Set what stands at `where`, in place."""
    value.copy_(torch.where(where, new, value))


def write(into: Tensor, where: Tensor, place: Tensor, value: Tensor) -> None:
    """into [S, n]: set the entry `place` of each slot in `where`. The last column takes what others have."""
    last = into.shape[1] - 1
    place = torch.where(where, place, last)[:, None]
    into.scatter_(1, place, value.to(into.dtype)[:, None])


def read(table: Tensor, place: Tensor) -> Tensor:
    """table [S, n]: the entry `place` [S] of each slot."""
    return table.gather(1, place[:, None])[:, 0]
