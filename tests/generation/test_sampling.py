import numpy as np
import pytest
import torch

from meloformer.generation.sampling import KINDS, Sampling
from meloformer.tokens import vocab


def test_greedy_takes_the_likeliest_token():
    logits = torch.tensor([0.0, 3.0, 1.0])
    assert Sampling(temperature=0).draw(logits, torch.Generator()) == 1
    assert Sampling(temperature=1e-45).draw(logits, torch.Generator()) == 1


@pytest.mark.parametrize(
    "sampling, possible",
    [
        (Sampling(), {0, 1, 2, 3}),
        (Sampling(top_k=2), {2, 3}),
        (Sampling(top_p=0.6), {3}),
        (Sampling(top_p=0.7), {2, 3}),
        (Sampling(top_k=1, top_p=0.9), {3}),
        (Sampling(temperature=100.0), {0, 1, 2, 3}),
        (Sampling(min_p=0.2), {2, 3}),
        (Sampling(min_p=1.0), {3}),
        (Sampling(min_p=0.1, top_k=3), {1, 2, 3}),
    ],
    ids=[
        "all",
        "top-k",
        "top-p of one",
        "top-p of two",
        "both",
        "hot",
        "min-p",
        "min-p of one",
        "min-p and k",
    ],
)
def test_draws_come_from_the_tokens_that_stay(sampling, possible):
    logits = torch.log(torch.tensor([0.05, 0.1, 0.2, 0.65, 0.0]))
    generator = torch.Generator().manual_seed(0)
    assert {sampling.draw(logits.clone(), generator) for _ in range(400)} == possible


def test_draws_follow_the_probabilities():
    logits = torch.log(torch.tensor([0.1, 0.2, 0.7]))
    generator = torch.Generator().manual_seed(0)
    drawn = np.bincount([Sampling().draw(logits, generator) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(drawn, [0.1, 0.2, 0.7], atol=0.03)


def by_definition(sampling: Sampling, logits: torch.Tensor) -> torch.Tensor:
    """Probabilities [V], over the whole vocabulary and without `kind_temperatures`."""
    probabilities, order = torch.softmax(logits.double() / sampling.temperature, 0).sort(descending=True)
    left_out = probabilities < sampling.min_p * probabilities[0]
    if sampling.top_p < 1:
        left_out |= probabilities.cumsum(0) - probabilities >= sampling.top_p
    left_out[len(logits) if sampling.top_k is None else sampling.top_k :] = True
    probabilities[left_out] = 0
    return torch.zeros_like(probabilities).scatter(0, order, probabilities / probabilities.sum())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_what_may_not_come_changes_nothing_for_the_rest(temperature):
    generator = torch.Generator().manual_seed(1)
    for kept in (2, 30, vocab.VOCAB_SIZE):
        logits = 3 * torch.randn(vocab.VOCAB_SIZE, generator=generator)
        logits[torch.randperm(vocab.VOCAB_SIZE, generator=generator)[kept:]] = -torch.inf
        for limits in (
            {},
            {"top_k": 7},
            {"top_p": 0.8},
            {"min_p": 0.05},
            {"top_k": 9, "top_p": 0.9, "min_p": 0.02},
        ):
            sampling = Sampling(temperature, **limits)
            ids, weights = sampling.distribution(logits.numpy())
            got = np.zeros(vocab.VOCAB_SIZE)
            got[ids] = weights / weights.sum()
            np.testing.assert_allclose(got, by_definition(sampling, logits), rtol=1e-9, err_msg=str(sampling))


def two_families() -> torch.Tensor:
    """Logits that give pitches 60 and 64 0.1 and 0.3, lengths 0 and 1 0.4 and 0.2."""
    logits = torch.full((vocab.VOCAB_SIZE,), -torch.inf)
    pitch, length = vocab.P.start, vocab.L.start
    logits[[pitch + 60, pitch + 64, length, length + 1]] = torch.tensor([0.1, 0.3, 0.4, 0.2]).log()
    return logits


@pytest.mark.parametrize(
    "temperature, within", [(0.0, [0.0, 1.0]), (0.5, [0.1, 0.9]), (1.0, [0.25, 0.75]), (50.0, [0.5, 0.5])]
)
def test_a_kind_is_as_likely_as_before_and_its_tokens_as_its_temperature_says(temperature, within):
    sampling, generator = Sampling(kind_temperatures={"pitch": temperature}), torch.Generator().manual_seed(0)
    logits = two_families()
    drawn = np.bincount([sampling.draw(logits, generator) for _ in range(4000)], minlength=vocab.VOCAB_SIZE)
    pitches = drawn[[vocab.P.start + 60, vocab.P.start + 64]] / 4000
    np.testing.assert_allclose(pitches, 0.4 * np.array(within), atol=0.03)
    np.testing.assert_allclose(drawn[vocab.L.start : vocab.L.start + 2] / 4000, [0.4, 0.2], atol=0.03)


def test_a_kind_that_may_not_come_does_not():
    sampling = Sampling(kind_temperatures=dict.fromkeys(KINDS, 0.0))
    logits = two_families()
    found = {sampling.draw(logits, torch.Generator().manual_seed(seed)) for seed in range(40)}
    assert found == {vocab.P.start + 64, vocab.L.start}


def test_kinds_that_there_are_not_are_named():
    with pytest.raises(ValueError, match="loudness"):
        Sampling(kind_temperatures={"loudness": 1.0})
