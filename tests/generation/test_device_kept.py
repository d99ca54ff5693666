"""Slots that a generator keeps: songs are those of fresh slots, whatever was written in these before."""

import gc
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from threading import Event, Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from meloformer.generation import generator
from meloformer.generation.constraints import Constraints
from meloformer.generation.device import loop
from meloformer.generation.device.kept import SPARE, Kept, Shape, SlotSet, weights_of
from meloformer.generation.draft import Draft
from meloformer.generation.generator import Generator
from meloformer.generation.sampling import Sampling
from meloformer.model.transformer import MeloFormer, ModelConfig
from meloformer.tokens import vocab

from helpers.untrained import untrained

WILD = Sampling(temperature=3.0, top_k=400, kind_temperatures={"instrument": 0.5})


@pytest.fixture
def made(monkeypatch) -> list[weakref.ref]:
    """The steps that are made, on the CPU, as if it could record them."""
    found, step_for = [], loop.step_for

    def noting(model):
        def make(*args, **options):
            step = step_for(model)(*args, **options)
            found.append(weakref.ref(step))
            return step

        return make

    monkeypatch.setattr(loop, "step_for", noting)
    monkeypatch.setattr(loop, "require_gpu", lambda device: None)
    return found


def fresh(**options) -> list[np.ndarray]:
    """Songs of a generator that has written nothing before."""
    return [song.ids for song in Generator(untrained(), 256, graphs=True).generate(**options)]


def same(one: list, other: list) -> bool:
    return len(one) == len(other) and all(map(np.array_equal, one, other))


THREE = {"num": 3, "seed": 5, "max_tokens": 25, "sampling": WILD}


def test_a_second_call_writes_what_a_fresh_generator_does(made):
    kept = Generator(untrained(), 256, graphs=True)
    chords = Constraints(chords=(vocab.CHORD.start + 3,), signature=74, bpm=93, instruments=(33,))
    kept.generate(chords, num=3, seed=1, max_tokens=30, sampling=Sampling(temperature=0))
    songs = [song.ids for song in kept.generate(**THREE)]
    assert len(made) == 1
    again = kept.generate(prompt=songs[1], num=2, seed=8, max_tokens=25, sampling=WILD)
    assert len(made) == 1
    assert same(songs, fresh(**THREE))
    assert same(
        [song.ids for song in again], fresh(prompt=songs[1], num=2, seed=8, max_tokens=25, sampling=WILD)
    )


def test_after_a_call_that_was_left_or_failed(made, monkeypatch):
    kept = Generator(untrained(), 256, graphs=True)
    for _ in kept.stream(num=3, bars=3, max_tokens=200, sampling=WILD):
        break  # all of them are in the middle, a block is on its way
    unused = kept.stream(num=3, bars=3, max_tokens=200)
    del unused

    def failing(draft, token, take=generator.Draft.take):
        if draft.new_tokens > 50:
            raise RuntimeError("in the middle")
        return take(draft, token)

    with monkeypatch.context() as patch:
        patch.setattr(generator.Draft, "take", failing)
        with pytest.raises(RuntimeError, match="in the middle"):
            kept.generate(num=3, max_tokens=150, sampling=WILD)
    songs = [song.ids for song in kept.generate(**THREE)]
    assert len(made) == 1 and same(songs, fresh(**THREE))


def test_two_calls_at_once_have_slots_of_their_own(made):
    kept, long = Generator(untrained(), 256, graphs=True), {"bars": 2, "max_tokens": 60, "sampling": WILD}
    bars = kept.stream(**long)
    next(bars)
    songs = [song.ids for song in kept.generate(**THREE)]
    assert len(made) == 2 and same(songs, fresh(**THREE))
    *_, last = bars
    assert np.array_equal(last.so_far, *fresh(**long))
    del bars, last
    gc.collect()
    assert [step() is not None for step in made[:2]] == [True, False]


def test_a_set_that_does_not_serve_is_released_first(made):
    model, kept = untrained(), Kept()

    def begin(num: int, max_tokens: int) -> None:
        drafts = [Draft(max_tokens=max_tokens) for _ in range(num)]
        kept.keep(loop.Slots(model, drafts, 512, graphs=False, kept=kept).set)

    begin(1, 20)
    begin(3, 20)  # more slots
    assert len(made) == 2 and made[0]() is None
    begin(3, 300)  # more room
    assert len(made) == 3 and made[1]() is None
    begin(3, 20)
    assert len(made) == 3
    with torch.no_grad():
        model.token_embedding.weight.mul_(1.0)
    begin(3, 20)  # tables of the weights that were
    assert len(made) == 4 and made[2]() is None
    kept.release()
    assert made[3]() is None


def test_what_is_kept_makes_room_for_the_other_loop(made):
    kept = Generator(untrained(), 256, graphs=True)
    kept.generate(max_tokens=5)
    with pytest.warns(UserWarning, match="without CUDA graphs"):
        kept.generate(Constraints(chords=(vocab.CHORD.start,) * 300), max_tokens=5)
    assert len(made) == 1 and made[0]() is None


def test_which_slots_serve():
    large = Shape(8, 512, 128, 64, 256)
    assert large.serves(large) and large.serves(Shape(8 // SPARE, 256, 16, 0, 0))
    assert not large.serves(Shape(8 // SPARE - 1, 256, 16, 0, 0))
    for field in range(5):
        more = [size + (number == field) for number, size in enumerate(large)]
        assert not large.serves(Shape(*more))


def test_at_most_one_set_is_kept():
    model, kept = untrained(), Kept()

    class Nothing:
        clear = staticmethod(lambda: None)

    sets = [SlotSet(Nothing(), None, Shape(1, 256, 128, 0, 0), weights_of(model)) for _ in range(2)]
    for one in sets:
        kept.keep(one)
    assert kept.take(*sets[0][2:]) is sets[1] and kept.take(*sets[0][2:]) is None


@pytest.mark.gpu
def test_a_graph_is_launched_again():
    """By Triton kernels, for which heads must be larger than those of the tests above."""
    torch.manual_seed(0)
    model = MeloFormer(ModelConfig(layers=2, dim=64, heads=2, ffn=96)).eval().to("cuda", torch.bfloat16)
    kept = Generator(model, 256, graphs=True)
    for _ in kept.stream(num=3, bars=3, max_tokens=200, sampling=WILD):
        break
    songs, again = ([song.ids for song in kept.generate(**THREE)] for _ in range(2))
    alone = [song.ids for song in Generator(model, 256, graphs=True).generate(**THREE)]
    assert same(songs, alone) and same(again, alone)


def test_graphs_are_recorded_one_at_a_time_and_others_may_allocate_meanwhile(monkeypatch):
    modes, recording, inside, go_on = [], [], Event(), Event()

    @contextmanager
    def record(graph, capture_error_mode="global"):
        modes.append(capture_error_mode)
        recording.append(len(recording))
        inside.set()
        assert go_on.wait(60)
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    replays = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: replays.append(1)))
    monkeypatch.setattr(torch.cuda, "graph", record)
    warm = [Event(), Event()]

    def step(number: int):
        def run():
            warm[number].set()

        run.all, run.clear, run.recorded = torch.zeros(1), lambda: None, 8
        return run

    graphs, steps = [], [step(number) for number in range(2)]
    threads = [Thread(target=lambda of=of: graphs.append(loop.Graph(of))) for of in steps]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    assert warm[1].wait(60)
    threads[1].join(0.2)  # long enough to begin to record, if nothing held it
    while_one_records = len(recording)
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert while_one_records == 1
    assert modes == ["thread_local"] * 2
    for graph in graphs:
        graph()
    assert len(replays) * 8 == 2 * loop.BLOCK


def test_where_triton_cannot_run_the_plain_step_is_taken(monkeypatch):
    config = replace(untrained().config, heads=1)  # of 32 channels, for which there are kernels
    model = SimpleNamespace(device=torch.device("cuda", 0), config=config)
    monkeypatch.setattr(loop, "unavailable", lambda device: "the GPU has compute capability 7.5")
    assert loop.step_for(model) is loop.Step
    monkeypatch.setattr(loop, "unavailable", lambda device: None)
    assert loop.step_for(model) is not loop.Step
