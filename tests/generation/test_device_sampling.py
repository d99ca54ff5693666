"""Draws of all slots: the distribution is that of `Sampling`, and noise is fair and never 0."""

import numpy as np
import pytest
import torch

from meloformer.generation.device import sampling as module
from meloformer.generation.device.sampling import SlotSampling, uniform
from meloformer.generation.device.tables import Tables
from meloformer.generation.sampling import KINDS, Sampling
from meloformer.tokens import vocab

CPU = torch.device("cpu")
TABLES = Tables(CPU)
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.7, top_p=0.9),
    Sampling(top_k=7),
    Sampling(temperature=2.5, top_k=300, top_p=0.95, min_p=0.001),
    Sampling(min_p=0.2),
    Sampling(temperature=0),
    Sampling(temperature=1e-45),
    Sampling(kind_temperatures=dict.fromkeys(KINDS, 0.5)),
    Sampling(temperature=3, top_p=0.8, kind_temperatures={"pitch": 0, "rhythm": 5, "chord": 1e-9}),
]


def logits(seed: int, allowed: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = len(SAMPLINGS), vocab.VOCAB_SIZE
    values = 3 * torch.randn(shape, generator=generator)
    values[torch.rand(shape, generator=generator) > allowed] = -torch.inf
    values[:, vocab.P.start + 3] = 1.0
    return values


@pytest.mark.parametrize("allowed", [1.0, 0.1, 0.0])
def test_probabilities_are_those_of_the_host(allowed):
    slots = SlotSampling(len(SAMPLINGS), TABLES, CPU)
    for slot, one in enumerate(SAMPLINGS):
        slots.load(slot, one, slot)
    values = logits(1, allowed)
    found = slots.probabilities(values)
    for slot, one in enumerate(SAMPLINGS):
        ids, weights = one.distribution(values[slot].numpy())
        expected = np.zeros(vocab.VOCAB_SIZE)
        expected[ids] = weights / weights.sum()
        got = found[slot] / found[slot].sum()
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-9)
        token = slots.draw(values, torch.full((len(SAMPLINGS),), 5))[slot]
        assert int(token) in ids


def test_draws_follow_the_probabilities():
    """Of 48 songs, by their seeds and by how many tokens they have."""
    slots, chances = SlotSampling(48, TABLES, CPU), torch.tensor([0.05, 0.15, 0.3, 0.5])
    for slot in range(48):
        slots.load(slot, Sampling(), slot if slot % 2 else slot + 2**63)
    values = torch.full((48, vocab.VOCAB_SIZE), -torch.inf)
    values[:, 100:104] = chances.log()
    drawn = torch.stack([slots.draw(values, torch.full((48,), count)) for count in range(40)]) - 100
    for part in (drawn, drawn[:20], drawn[:, :24], drawn[:, ::2]):
        share = part.flatten().bincount(minlength=4) / part.numel()
        deviation = (chances * (1 - chances) / part.numel()).sqrt()
        assert ((share - chances).abs() < 4 * deviation).all(), share
    assert len({tuple(song.tolist()) for song in drawn.T}) == 48


@pytest.mark.parametrize("bits", [0, 0xFFFFFFFF])
def test_noise_is_never_nought(bits, monkeypatch):
    """Divided by it, what is impossible would be drawn."""
    monkeypatch.setattr(module, "mix", lambda x: torch.full_like(x, bits))
    seed = torch.tensor([3])
    even = uniform(seed, seed, 10)
    assert (0 < even).all() and (even < 1).all() and (even.log() < 0).all()
    slots = SlotSampling(1, TABLES, CPU)
    slots.load(0, Sampling(), 3)
    values = torch.full((1, vocab.VOCAB_SIZE), -torch.inf)
    values[0, 77], values[0, 900] = 0.0, -5.0
    assert slots.draw(values, seed) == 77
