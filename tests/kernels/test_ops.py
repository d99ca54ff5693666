"""The operators as PyTorch sees them: schemas, shapes, gradients, and models that are compiled."""

from random import Random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from meloformer.kernels import make_attention
from meloformer.kernels.triton_backend import Backend
from meloformer.model.transformer import MeloFormer, ModelConfig

from helpers.attention_cases import ORIGINAL, PHASES, case, random_inputs, song, structure
from helpers.plan_cases import DEVICE


@pytest.mark.parametrize("phase", PHASES)
def test_operators_keep_the_rules_of_pytorch(phase):
    packed = case("documents").structure.to(DEVICE)
    backend = Backend(packed)
    *arguments, _ = random_inputs(phase, packed, torch.float32, dim=32)
    arguments = [x.requires_grad_() for x in arguments]
    if phase == "update":  # the operator takes the summaries' keys first
        arguments = [arguments[i] for i in (0, 3, 4, 1, 2)]
    extra = backend.bars if phase == "summarize" else backend.plan.finalize().tensors
    torch.library.opcheck(getattr(torch.ops.meloformer, phase).default, (*arguments, *extra))


def test_gradients_of_unused_results_are_not_computed():
    packed = case("one_bar").structure.to(DEVICE)
    *arguments, _ = random_inputs("update", packed, torch.float32, dim=32)
    q, k, v, k2, v2 = (x.requires_grad_() for x in arguments)
    plan = Backend(packed).plan.finalize().tensors
    o, lse = torch.ops.meloformer.update(q, k2, v2, k, v, *plan)
    assert o.requires_grad and not lse.requires_grad


@pytest.mark.parametrize("few", [True, False])
def test_the_order_of_gradients(few, monkeypatch):
    """The gradient of queries by the local pass stores what all others read, and of each kind the
    same-instrument pass adds to what the local one stored. Which comes second was measured."""
    packed = case("one_bar").structure.to(DEVICE)
    *arguments, _ = random_inputs("update", packed, torch.float32, dim=32)
    q, k, v, k2, v2 = (x.requires_grad_() for x in arguments)
    plan = Backend(packed).plan.finalize().tensors
    o, _ = torch.ops.meloformer.update(q, k2, v2, k, v, *plan)
    from meloformer.kernels import ops  # imports triton

    launched = []
    for name in ("query_gradient", "key_gradients"):
        launch = getattr(ops.Update, name)

        def seen(run, *arguments, name=name, launch=launch):
            launched.append((name, arguments[-1]))
            launch(run, *arguments)

        monkeypatch.setattr(ops.Update, name, seen)
    monkeypatch.setattr(ops, "are_few", lambda *_: few)
    o.sum().backward()
    middle = [("query_gradient", True), ("key_gradients", False)]
    middle = middle if few else middle[::-1]
    assert launched == [("query_gradient", False), *middle, ("key_gradients", True)]


def batch(seed):
    """Songs of other bars, instruments and lengths, in tensors of the same shapes."""
    r = Random(seed)
    songs = [song(r, 2 + seed % 3, (128, 33, seed % 5)), song(r, 1 + seed % 2)]
    packed = structure([songs], length=400, num_summaries=16).to(DEVICE)
    attention = make_attention(packed, "triton")
    attention.finalize()
    return torch.randint(400, packed.doc.shape, device=DEVICE), packed, attention


@pytest.mark.slow
def test_a_compiled_model_is_one_graph_for_all_batches():
    torch.manual_seed(0)
    model = MeloFormer(ModelConfig(layers=2, dim=64, heads=2, ffn=64, **ORIGINAL)).to(DEVICE)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    for seed in range(3):
        inputs = batch(seed)
        got, expected = compiled(*inputs), model(*inputs)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        parameters = [p for p in model.parameters()]
        for a, b in zip(*(torch.autograd.grad(x.square().mean(), parameters) for x in (got, expected))):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("wrong", ["length", "heads", "dtype"])
def test_inputs_that_do_not_belong_together_are_refused(wrong):
    packed = case("one_bar").structure.to(DEVICE)
    *arguments, _ = random_inputs("update", packed, torch.float32, dim=32)
    q, k, v, k2, v2 = arguments
    k = {"length": k[:, :, :-1], "heads": k[:, :1], "dtype": k.half()}[wrong]
    plan = Backend(packed).plan.finalize().tensors
    with pytest.raises(ValueError, match="queries, keys and values"):
        torch.ops.meloformer.update(q, k2, v2, k, v, *plan)
