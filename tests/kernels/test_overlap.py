"""Launches that overlap, on a GPU: what a kernel reads is there, whatever runs beside it."""

from random import Random

import pytest
import torch
import torch._inductor.config

pytest.importorskip("triton")

from meloformer.kernels import counters, ops, overlap
from meloformer.kernels.plan import Plan
from meloformer.kernels.plan_work import SLOTS
from meloformer.kernels.structure import KIND_RULE
from meloformer.kernels.triton_backend import Backend

from helpers.attention_cases import PHASES, outputs_and_gradients, random_inputs, song, structure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ROUNDS = 1000


@pytest.fixture(autouse=True)
def a_gpu_where_launches_can_overlap():
    if not overlap.can_overlap(torch.device("cuda")):
        pytest.skip("launches overlap from compute capability 9.0 on")


def songs(bars: int, rows: int, phase: str, dim: int = 64) -> tuple[Backend, list[torch.Tensor]]:
    """Of an attention and its inputs in bfloat16; a bar has some fifty tokens."""
    random = Random(bars)
    batch = [[song(random, bars, (128, 33, 0, 80, 25), resting=0.2)] for _ in range(rows)]
    packed = structure(batch, kind_rule=KIND_RULE).to("cuda")
    return Backend(packed), random_inputs(phase, packed, torch.bfloat16, dim=dim, heads=8)


# Rows of some 500 and 2,500 tokens take plain kernels, four of 8,000 those in Gluon.
ROWS = [(10, 1), (50, 1), (160, 4)]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("bars", "rows"), ROWS)
def test_results_are_those_of_launches_that_wait(bars, rows, phase, monkeypatch):
    attention, inputs = songs(bars, rows, phase)
    found = outputs_and_gradients(getattr(attention, phase), inputs)
    monkeypatch.setattr(overlap, "can_overlap", lambda device: False)
    alone = outputs_and_gradients(getattr(attention, phase), inputs)
    assert all(map(torch.equal, found, alone))


@pytest.mark.parametrize(("bars", "rows"), ROWS)
def test_nothing_is_read_before_it_is_written(bars, rows):
    """Other inputs in every round: who reads too early finds what the last round left in the same memory."""
    attention, inputs = songs(bars, rows, "update")
    # Three: results of one round are alive while the next one runs, so that memory alternates between two.
    sets = [inputs, *([x.roll(shift, 2) for x in inputs] for shift in (1, 2))]
    wanted = [outputs_and_gradients(attention.update, x) for x in sets]
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    rounds = ROUNDS if rows == 1 else ROUNDS // 5
    for number in range(rounds):  # none of which waits for the host
        found = outputs_and_gradients(attention.update, sets[number % 3])
        for one, want in zip(found, wanted[number % 3]):
            wrong += (one != want).any()
    assert wrong == 0


@pytest.mark.parametrize(("bars", "rows"), ROWS)
def test_a_recorded_update_beside_others(bars, rows):
    """A CUDA graph of forward and backward, replayed on another stream, beside calls with the same plan."""
    attention, inputs = songs(bars, rows, "update")
    sets = [inputs, [x.roll(1, 2) for x in inputs]]
    wanted = [outputs_and_gradients(attention.update, x) for x in sets]
    static = [x.clone() for x in inputs]
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        recorded = outputs_and_gradients(attention.update, static)
    wrong = torch.zeros(2, dtype=torch.int64, device="cuda")
    aside.wait_stream(torch.cuda.current_stream())
    for number in range(100):
        with torch.cuda.stream(aside):
            for mine, given in zip(static, sets[number % 2]):
                mine.copy_(given)
            graph.replay()
            for one, want in zip(recorded, wanted[number % 2]):
                wrong[0] += (one != want).any()
        for one, want in zip(outputs_and_gradients(attention.update, inputs), wanted[0]):
            wrong[1] += (one != want).any()
    torch.cuda.synchronize()
    assert wrong.tolist() == [0, 0]


@pytest.fixture
def split_songs(monkeypatch):
    """An attention whose blocks are split, its inputs, and the zeros kept for the default stream alone."""
    monkeypatch.setattr(counters, "_kept", {})
    attention, inputs = songs(50, 1, "update")
    attention.plan = Plan(attention.structure, split=3).finalize()
    assert attention.plan.needs[SLOTS.value] > 0
    return attention, inputs, counters.zeros(1, inputs[0].device)


def test_counters_of_split_blocks_belong_to_a_stream_and_are_left_as_zeros(split_songs):
    attention, inputs, mine = split_songs
    device = mine.device
    assert len(counters._kept) == 1 and counters.zeros(32, device) is mine
    wanted = outputs_and_gradients(attention.update, inputs)
    assert not mine.any()
    with torch.cuda.stream(torch.cuda.Stream()):
        assert len(counters.zeros(64, device)) == 64  # none kept
        counters.keep(device)
        assert counters.zeros(64, device) is counters.zeros(64, device) is not mine
        torch.cuda.synchronize()
        found = outputs_and_gradients(attention.update, inputs)
        assert not counters.zeros(64, device).any()
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, wanted))


def test_counters_of_a_stream_do_not_matter_to_a_graph(split_songs):
    attention, inputs, mine = split_songs
    wanted = outputs_and_gradients(attention.update, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = outputs_and_gradients(attention.update, inputs)
    mine.fill_(1)
    for _ in range(2):
        for x in recorded:
            x.zero_()
        graph.replay()
        assert all(map(torch.equal, recorded, wanted))


def test_updates_in_graphs_that_pytorch_records(split_songs, monkeypatch):
    """It warms up, records, and replays twice. It would refuse to if it found memory of the graph kept."""
    attention, inputs, _ = split_songs
    wanted = outputs_and_gradients(attention.update, inputs)
    torch._dynamo.reset()
    monkeypatch.setattr(torch._inductor.config.triton, "cudagraph_or_error", True)
    compiled = torch.compile(lambda *x: attention.update(*x).clone(), mode="reduce-overhead", dynamic=False)
    for _ in range(4):
        found = outputs_and_gradients(compiled, inputs)
        assert all(map(torch.equal, found, wanted))


def test_nothing_is_found_in_caches_that_was_read_where_statistics_are_stored_then(monkeypatch):
    """A kernel reads ones from all multiprocessors, just before a gradient gets that memory for what its
    first kernel stores and the next one reads without waiting."""
    attention, inputs = songs(10, 1, "update")
    *arguments, cotangent = [x.requires_grad_() for x in inputs]
    out = attention.update(*arguments)
    cotangent = cotangent.detach()
    wanted = torch.autograd.grad(out, arguments, cotangent, retain_graph=True)
    launch, places = ops.Update.query_gradient, []

    def seen(run, dq, o, lse, do, stats, same_inst):
        places.append(stats.data_ptr())
        launch(run, dq, o, lse, do, stats, same_inst)

    monkeypatch.setattr(ops.Update, "query_gradient", seen)
    batch, heads, queries, _ = arguments[0].shape
    wrong, hits = torch.zeros((), dtype=torch.int64, device="cuda"), 0
    for _ in range(ROUNDS):
        ones = torch.ones(batch, heads, queries, 2, device="cuda")
        ones.expand(512, -1, -1, -1, -1).sum()
        place = ones.data_ptr()
        del ones
        found = torch.autograd.grad(out, arguments, cotangent, retain_graph=True)
        hits += places[-1] == place
        for one, want in zip(found, wanted):
            wrong += (one != want).any()
    assert wrong == 0
    if hits < ROUNDS // 2:
        pytest.skip(f"statistics lay where ones had been in {hits} of {ROUNDS} rounds alone")
