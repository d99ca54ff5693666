"""The loss: what it is, what its gradient is, and what it holds."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from meloformer.model import loss
from meloformer.model.loss import next_token_loss, weighted_loss
from meloformer.tokens.vocab import IGNORE_INDEX


def test_loss_is_a_sum_over_the_targets_that_count():
    logits = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    targets = torch.tensor([[1, IGNORE_INDEX, 5], [IGNORE_INDEX, 63, 0]])
    nats, count = next_token_loss(logits, targets)
    log_p = logits.double().log_softmax(-1)
    expected = -sum(log_p[b, n, targets[b, n]] for b, n in [(0, 0), (0, 2), (1, 1), (1, 2)])
    assert nats.dtype == torch.float32 and count.dtype == torch.int64 and count == 4
    torch.testing.assert_close(nats.double(), expected, rtol=1e-6, atol=0)
    nats, count = next_token_loss(logits, torch.full_like(targets, IGNORE_INDEX))
    assert nats == 0 and count == 0


@pytest.mark.parametrize("chunk", [3, 4096])
def test_weights_are_those_of_the_targets(chunk, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 10, 64, generator=generator).requires_grad_()
    targets = torch.randint(0, 60, (2, 10), generator=generator)
    targets[1, 4:] = IGNORE_INDEX
    weights = torch.rand(60, generator=generator)
    found = weighted_loss(logits, targets, weights)
    each = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORE_INDEX
    )
    of_targets = torch.tensor([0 if t < 0 else float(weights[t]) for t in targets.flatten()])
    torch.testing.assert_close(found.objective, (each * of_targets).sum())
    torch.testing.assert_close(found.nats, each.sum())
    torch.testing.assert_close(found.weight, of_targets.sum())
    assert found.count == 14 and not found.nats.requires_grad
    (got,), (want,) = (torch.autograd.grad(x, logits) for x in (found.objective, (each * of_targets).sum()))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 20, 4096])
def test_loss_and_gradient_are_those_of_pytorch_whatever_the_chunks(dtype, chunk, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(2, 10, 64, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, 64, (2, 10), generator=generator)
    targets[0, 3:5] = targets[1, 9] = IGNORE_INDEX
    nats, _ = next_token_loss(logits, targets)
    expected = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    torch.testing.assert_close(nats, expected)
    (got,), (want,) = (torch.autograd.grad(3 * x, logits) for x in (nats, expected))
    assert got.dtype == dtype and (got[targets == IGNORE_INDEX] == 0).all()
    torch.testing.assert_close(got, want)


def test_no_copy_of_all_logits_in_float32_is_made():
    logits = torch.randn(1, 5 * loss.CHUNK, 64).bfloat16().requires_grad_()
    targets = torch.zeros(1, 5 * loss.CHUNK, dtype=torch.int64)
    sizes = []

    class Note(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                sizes.append(out.numel())
            return out

    with Note():
        nats, _ = next_token_loss(logits, targets)
        nats.backward()
    assert max(sizes) == loss.CHUNK * 64


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles with g++ on a CPU")
def test_the_compiled_loss_is_the_same():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 40, 70, generator=generator, requires_grad=True)
    targets = torch.randint(0, 70, (2, 40), generator=generator)
    targets[0, 30:] = IGNORE_INDEX
    expected, _ = next_token_loss(logits, targets)
    found, _ = next_token_loss(logits, targets, compiled=True)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(nats, logits)[0] for nats in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_second_gradients_are_refused():
    """PyTorch's own refusal, at a sum in place, ends the process on a CPU."""
    logits = torch.randn(1, 3, 8, requires_grad=True)
    nats, _ = next_token_loss(logits, torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="next_token_loss can be differentiated only once"):
        torch.autograd.grad(nats, logits, create_graph=True)
