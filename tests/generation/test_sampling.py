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
