"""Launches that overlap, on a GPU: what a kernel reads is there, whatever runs beside it."""

from random import Random

import pytest
import torch

pytest.importorskip("triton")

from meloformer.kernels import ops, overlap
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


def test_counters_of_split_blocks_belong_to_a_stream_and_are_left_as_zeros():
    attention, inputs = songs(50, 1, "update")
    attention.plan = Plan(attention.structure, split=3)
    device = inputs[0].device
    mine = ops._zeros(64, device)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert ops._zeros(64, device).data_ptr() != mine.data_ptr()
    assert ops._zeros(32, device) is mine and len(ops._zeros(10**6, device)) >= 10**6
    outputs_and_gradients(attention.update, inputs)
    assert attention.plan.needs[SLOTS.value] > 0
    assert not any(kept.any() for kept in ops._kept_zeros.values())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = ops._zeros(64, device)
    graph.replay()
    assert not recorded.any() and recorded.data_ptr() not in {x.data_ptr() for x in ops._kept_zeros.values()}
