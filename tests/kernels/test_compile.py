"""Compiled layers: how often they are compiled, that they are whole graphs, and that they change nothing."""

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from meloformer.errors import UserError
from meloformer.kernels.dense import CausalAttention
from meloformer.model.loss import next_token_loss
from meloformer.model.transformer import RECOMPUTE, MeloFormer, ModelConfig
from meloformer.training.distributed import Job
from meloformer.training.stepper import Stepper

from helpers.attention_cases import ORIGINAL
from helpers.compiled_layers import (
    LENGTH,
    RECOMPUTING,
    SPARSE,
    SUMMARIES,
    AnySummaries,
    StaticAttention,
    batches,
    step,
)
from helpers.plan_cases import DEVICE
from helpers.tiny_train import TINY
from helpers.training import config


@pytest.mark.parametrize("recompute", RECOMPUTING)
def test_nothing_is_compiled_after_the_first_of_fifty_batches(recompute):
    """Two graphs for any number of layers, one for the last and one for the others."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MeloFormer(SPARSE, recompute)
    plain = MeloFormer(SPARSE)
    plain.load_state_dict(model.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_layers(backend=counter)
    for number, (packed, ids) in enumerate(batches(50)):
        attention = StaticAttention(packed)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            nats, gradients = step(model, packed, ids, attention)
        if number % 10 == 0:
            expected, others = step(plain, packed, ids, attention)
            torch.testing.assert_close(nats, expected)
            for got, want in zip(gradients, others):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 2


@torch._dynamo.config.patch(recompile_limit=8)  # as PyTorch has it
def test_every_number_of_summaries_is_compiled_once():
    torch._dynamo.reset()
    model = MeloFormer(SPARSE)
    counter = CompileCounterWithBackend("eager")
    model.compile_layers(backend=counter)
    for _ in range(2):
        for power in range(6, 12):
            packed, ids = next(batches(1, summaries=1 << power))
            attention = StaticAttention(packed)
            attention.mask = torch.ones(max(LENGTH, 1 << power), (1 << power) + LENGTH, dtype=torch.bool)
            attention.update = lambda q, k_r, v_r, k_s, v_s: q + k_s.mean(dim=2, keepdim=True)
            model(ids, packed, attention)
    assert counter.frame_count == 2 * 6


@pytest.mark.parametrize("recompute", RECOMPUTING)
def test_one_code_serves_any_number_of_summaries(recompute):
    torch._dynamo.reset()
    model = MeloFormer(SPARSE, recompute)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_layers(backend=counter)
    for summaries in (SUMMARIES, 64, 80, 128, SUMMARIES):
        packed, ids = next(batches(1, summaries=summaries))
        step(model, packed, ids, AnySummaries())
    assert counter.frame_count == 2


@pytest.mark.slow
def test_the_kernels_operators_in_compiled_layers():
    """Two graphs serve any number of summaries."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MeloFormer(ModelConfig(layers=2, dim=32, heads=1, ffn=48, **ORIGINAL)).to(DEVICE)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_layers(backend=counter)
    for number, summaries in enumerate((SUMMARIES, SUMMARIES, 2 * SUMMARIES, 128, 160)):
        packed, ids = (x.to(DEVICE) for x in [*batches(number + 1, rows=1, summaries=summaries)][-1])
        attention = model.attention_for(packed, "triton").finalize()
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            _, gradients = step(model, packed, ids, attention)
        assert all(gradient.isfinite().all() for gradient in gradients)
    assert counter.frame_count == 2


def test_distributed_training_compiles_the_same_graphs():
    torch._dynamo.reset()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = MeloFormer(dataclasses.replace(SPARSE, ffn=2000), "ffn")
        counter = CompileCounterWithBackend("aot_eager")
        model.compile_layers(backend=counter)
        parallel = DistributedDataParallel(model, bucket_cap_mb=1)  # less than a layer
        packed, ids = next(batches(1))
        nats, _ = next_token_loss(parallel(ids, packed, StaticAttention(packed)), ids)
        nats.backward()
        # Before the group: as its last owner it would end its threads while it holds Python's lock, for which
        # one that has just reduced a gradient waits (PyTorch 2.13).
        del parallel
    finally:
        torch.distributed.destroy_process_group()
    assert counter.frame_count == 2
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_dense_layers_are_one_graph_of_few_shapes():
    """With all documents in one call; what that computes is not of interest here."""
    torch._dynamo.reset()
    graphs = []

    def zeros(graph, inputs):
        graphs.append(graph)
        shapes = [
            x.meta["example_value"] for node in graph.graph.nodes if node.op == "output" for x in node.args[0]
        ]
        return lambda *_: [torch.zeros(shape.shape) for shape in shapes]

    model = MeloFormer(SPARSE.as_dense())
    model.compile_layers(backend=zeros)
    for packed, ids in batches(20):
        with torch.no_grad():
            model(ids, packed, CausalAttention(packed, way="flash").finalize())
    assert len(graphs) == 1
    assert any("varlen" in str(node.target) for node in graphs[0].graph.nodes)


def test_dense_layers_that_attend_document_by_document_compile_nothing_after_the_first_batch():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MeloFormer(SPARSE.as_dense())
    plain = MeloFormer(SPARSE.as_dense())
    plain.load_state_dict(model.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_layers(backend=counter)
    for number, (packed, ids) in enumerate(batches(12)):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            nats, gradients = step(model, packed, ids, CausalAttention(packed).finalize())
        if number % 5 == 0:
            expected, others = step(plain, packed, ids, CausalAttention(packed))
            torch.testing.assert_close(nats, expected)
            for got, want in zip(gradients, others):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert 2 <= counter.frame_count <= 4  # what comes before the attention of a layer, and after it


def test_other_modes_are_not_compiled():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = MeloFormer(SPARSE)
    model.compile_layers(backend=counter)
    model.eval()
    packed, ids = next(batches(1))
    model(ids, packed, StaticAttention(packed))
    assert counter.frame_count == 0


def test_what_is_compiled_follows_the_flag_and_the_device(data, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(MeloFormer, "compile_layers", lambda self: compiled.append(self))
    cpu = Job(0, 1, torch.device("cpu"))
    Stepper(config(data, tmp_path), TINY, cpu)
    Stepper(config(data, tmp_path, compile=False), TINY, cpu)
    assert not compiled
    with pytest.raises(UserError, match="--compile: needs a GPU"):
        Stepper(config(data, tmp_path, compile=True), TINY, cpu)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_recomputing_changes_no_gradient_and_keeps_less(recompute, dense):
    shape = ModelConfig(layers=4, dim=64, heads=2, ffn=256, **ORIGINAL)
    shape = shape.as_dense() if dense else shape
    packed, ids = next(batches(1))
    found = {}
    for what in ("none", recompute):
        torch.manual_seed(0)
        model = MeloFormer(shape, what)
        saved = {}

        def note(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        attention = model.attention_for(packed, "auto")
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            nats, _ = next_token_loss(model(ids, packed, attention), ids)
        nats.backward()
        found[what] = sum(saved.values()), nats.detach(), [p.grad for p in model.parameters()]
    size, nats, gradients = found[recompute]
    assert torch.equal(nats, found["none"][1])
    for got, want in zip(gradients, found["none"][2]):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    assert {"none": 0.99, "ffn": 0.4, "layer": 0.1}[recompute] < size / found["none"][0]
    assert size / found["none"][0] < {"none": 1.01, "ffn": 0.7, "layer": 0.4}[recompute]
