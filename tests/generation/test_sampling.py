import numpy as np
import pytest
import torch

from meloformer.generation.sampling import Sampling


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
    ],
    ids=["all", "top-k", "top-p of one", "top-p of two", "both", "hot"],
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
