"""Gates that raise the logits of guessed labels: against a loop in float64."""

import pytest
import torch

from meloformer.model.copying import copies_of, raise_copied

from helpers.plan_cases import DEVICE


def inputs(dtype, seed=0):
    """Few labels, so that guesses often name the same one; id 0 is none."""
    generator = torch.Generator().manual_seed(seed)
    logits, gates = (torch.randn(2, 9, n, generator=generator).to(dtype).to(DEVICE) for n in (11, 6))
    return logits, gates, torch.randint(0, 5, (6, 2, 9), generator=generator).to(DEVICE)


def by_loop(logits, gates, guesses):
    """The definition; differentiable."""
    for label, gate in zip(guesses[..., None], gates.split(1, dim=-1)):
        logits = logits.scatter_add(2, label, torch.where(label > 0, gate, 0))
    return logits


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_and_gradients(dtype, seed):
    logits, gates, guesses = inputs(dtype, seed)
    leaves = logits.requires_grad_(), gates.requires_grad_()
    out = raise_copied(logits.clone(), gates, copies_of(guesses))
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = by_loop(*wide, guesses)
    eps = torch.finfo(dtype).eps
    assert out.dtype == dtype and torch.allclose(out.double(), exact, rtol=eps, atol=8 * eps)
    gradient = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, gradient)
    for got, want in zip(found, torch.autograd.grad(exact, wide, gradient.double())):
        assert torch.equal(got.double(), want)


def test_in_place_and_nothing_where_nothing_is_guessed():
    logits, gates, guesses = inputs(torch.float32)
    before = logits.clone()
    out = raise_copied(logits, gates, copies_of(torch.zeros_like(guesses)))
    assert out.data_ptr() == logits.data_ptr() and torch.equal(out, before)


def test_no_label_is_raised_from_two_places():
    """So that sums by atomics have no order that counts."""
    *_, guesses = inputs(torch.float32)
    labels, gates = copies_of(guesses)
    for named, of in zip(labels.flatten(0, 1).tolist(), gates.flatten(0, 1).any(-1).tolist()):
        raised = [label for label, gets in zip(named, of) if gets]
        assert sorted(raised) == sorted(set(named) - {0})
