"""How tokens are drawn (`generation.sampling`), for all slots at once, with noise that is a function of the
song's seed and of how many tokens it has: neither its slot nor the songs beside it matter."""

import math

import torch
from torch import Tensor

from ...tokens import vocab
from ..sampling import KINDS, Sampling
from . import tables as t
from .tables import SlotNumbers, Tables

COLDEST = 1e-6  # a lower temperature always takes the most likely token
_LOW = 0xFFFFFFFF
_FAMILIES = {family: t.NUMBER[family.name] for families in KINDS.values() for family in families}


def mix(x: Tensor) -> Tensor:
    """A hash of 32-bit numbers, as int64 (C. Wellons, "Prospecting for hash functions", lowbias32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _LOW
    x = (x ^ (x >> 15)) * 0x846CA68B & _LOW
    return x ^ (x >> 16)


def uniform(seed: Tensor, count: Tensor, size: int) -> Tensor:
    """float32 [S, size] in (0, 1), from int64 [S] each: 23 random bits, so that none is rounded to 1."""
    song = mix(mix(seed & _LOW) ^ (seed >> 32 & _LOW))
    draw = mix((song + count) & _LOW)
    bits = mix(draw[:, None] ^ mix(torch.arange(1, size + 1, device=seed.device)))
    return ((bits >> 9).float() + 0.5) * 2.0**-23


class SlotSampling(SlotNumbers):
    """`Sampling` and the seed of each slot.

    Attributes:
        temperature, top_p, min_p: float64 [S].
        of_kind: float64 [S, families], temperatures of their own; -1 where there is none.
    """

    def __init__(self, slots: int, tables: Tables, device: torch.device):
        super().__init__(("seed", "top_k"), slots, device)
        self._family = tables.family

        def numbers(*shape: int) -> Tensor:
            return torch.ones((slots, *shape), dtype=torch.float64, device=device)

        self.temperature, self.top_p, self.min_p = numbers(), numbers(), numbers()
        self.of_kind = numbers(t.FAMILIES)

    def load(self, slot: int, sampling: Sampling, seed: int) -> None:
        top_k = vocab.VOCAB_SIZE if sampling.top_k is None else sampling.top_k
        self.put(slot, seed=seed if seed < 2**63 else seed - 2**64, top_k=top_k)
        self.temperature[slot] = _cold(sampling.temperature)
        self.top_p[slot], self.min_p[slot] = sampling.top_p, sampling.min_p
        of_kind = [-1.0] * t.FAMILIES
        for kind, temperature in sampling.kind_temperatures.items():
            for family in KINDS[kind]:
                of_kind[_FAMILIES[family]] = _cold(temperature)
        self.of_kind[slot] = torch.tensor(of_kind, dtype=torch.float64, device=self.of_kind.device)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What tokens are drawn with, float64 [S, VOCAB_SIZE], from logits of which some are -inf: not yet
        divided by their sum, 0 for those that are left out."""
        greedy = (self.temperature == 0)[:, None]
        logits = logits.double()
        logits = logits - logits.amax(dim=1, keepdim=True)
        scaled = logits / torch.where(greedy, 1, self.temperature[:, None])
        scaled = torch.where(greedy, scaled, self._redistributed(scaled, logits))
        probabilities, order = torch.softmax(scaled, dim=1).sort(dim=1, descending=True, stable=True)
        rank = torch.arange(logits.shape[1], device=logits.device)
        before = probabilities.cumsum(dim=1) - probabilities
        kept = (rank < self.top_k[:, None]) & (before < self.top_p[:, None])
        kept &= probabilities >= self.min_p[:, None] * probabilities[:, :1]
        kept = torch.where(greedy, rank == 0, kept)
        return torch.zeros_like(probabilities).scatter(1, order, torch.where(kept, probabilities, 0))

    def _redistributed(self, scaled: Tensor, logits: Tensor) -> Tensor:
        parts = list(scaled.split([len(family) for family in vocab.FAMILIES], dim=1))
        for family, number in _FAMILIES.items():
            of_kind = self.of_kind[:, number, None]
            own, base = parts[number], logits[:, family.start : family.stop]
            together = own.logsumexp(dim=1, keepdim=True)
            best = base.amax(dim=1, keepdim=True)
            divided = (base - best) / torch.where(of_kind > 0, of_kind, 1)
            first = torch.arange(base.shape[1], device=base.device) == base.argmax(dim=1, keepdim=True)
            alone = torch.where(first, 0.0, -math.inf)
            new = together + torch.where(of_kind == 0, alone, torch.log_softmax(divided, dim=1))
            parts[number] = torch.where((of_kind < 0) | (together == -math.inf), own, new)
        return torch.cat(parts, dim=1)

    def draw(self, logits: Tensor, count: Tensor) -> Tensor:
        """One token id for each slot.

        Args:
            logits: [S, VOCAB_SIZE], any floating dtype; -inf for ids that must not be drawn.
            count: how many tokens the song has drawn before.
        """
        probabilities = self.probabilities(logits)
        # The largest of log p + Gumbel noise is distributed as p is: -log u is exponential, and the smallest
        # of exponentials over p.
        even = uniform(self.seed, count, logits.shape[1])
        noise = torch.maximum(-even.log(), 1 - even)  # where a logarithm is inexact, it may be 0
        return (probabilities / noise).argmax(dim=1)


def _cold(temperature: float) -> float:
    return temperature if temperature >= COLDEST else 0.0
