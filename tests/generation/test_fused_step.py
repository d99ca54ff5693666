"""The step of Triton kernels beside the plain one: all state after every step."""

import miditoolkit
import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from meloformer.composer.compose import compose
from meloformer.generation.constraints import Constraints
from meloformer.generation.device import copies_kernel, draw_kernel, read_kernel
from meloformer.generation.device.fused_step import FusedStep
from meloformer.generation.device.step import BLOCK, Step
from meloformer.generation.draft import Draft, OutlinedDraft
from meloformer.generation.outline import Outline
from meloformer.generation.sampling import Sampling
from meloformer.kernels import decode
from meloformer.model.transformer import ModelConfig
from meloformer.tokens import vocab
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.model_cases import tiny_model
from helpers.plan_cases import DEVICE
from helpers.riffs import begun, notes, riffs

CONFIG = ModelConfig(layers=1, dim=32, heads=1, ffn=40)
ROOM, BARS = 200, 40


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter is slow; tiles as large do not fit into the shared memory of a GPU."""
    if DEVICE != "cpu":
        return
    for name, value in (("_HEAD_COLUMNS", 2048), ("_PROGRAMS", 4), ("_PAIRS", 16), ("_COLUMNS", 64)):
        monkeypatch.setattr(decode, name, value)
    for name, value in (("_DOWN_COLUMNS", 32), ("_ROW_HEAD_COLUMNS", 2048), ("_ROW_PAIRS", 16)):
        monkeypatch.setattr(decode, name, value)
    for name in ("_ROW_COLUMNS", "_ROW_DOWN_COLUMNS"):
        monkeypatch.setattr(decode, name, 32)


@pytest.fixture(scope="module")
def model():
    model = tiny_model(CONFIG, torch.float32)
    for parameter in model.parameters():
        parameter.data /= 2
    return model


def numbers(step: Step) -> dict[str, torch.Tensor]:
    """What must be the same, by name; without the columns that no song has."""
    reader, draft, grammar = step.reader, step.draft, step.draft.grammar
    found = {"step": step.all, "reader": reader.all, "draft": draft.all, "grammar": grammar.all}
    found |= {"copies": draft.copies.all, "starts": draft.copies.starts}
    found |= {"log": draft.copies.log[:, :-1], "more": draft.copies.more[:, :-1]}
    for name in ("tokens", "places", "bar_of", "inst_of", "kind_of", "onset_of", "labels", "followers"):
        found[name] = getattr(reader, name)[:, :-1]
    found |= {"drawn": step.drawn, "column": step.column}
    return found | {"last": reader.last, "place": grammar.place[:, :-1]}


def run(model, songs: list, steps: int, replaced: dict | None = None) -> list[list[int]]:
    """Both steps side by side; returns the tokens of each slot.

    Args:
        songs: by slot what `Step.begin` is called with, or None for an empty slot.
        replaced: by number of the step the slot and the song that begins then.
    """
    both = [one(model, len(songs), ROOM, BARS, queue=ROOM, song=ROOM) for one in (Step, FusedStep)]
    drawn = [[] for _ in songs]
    for number in range(steps):
        beginning = dict(enumerate(songs)) if number == 0 else dict([(replaced or {}).get(number, (0, None))])
        for slot, song in beginning.items():
            if song is not None:
                for step in both:
                    step.begin(slot, *song)
        for step in both:
            step()
        plain, fused = map(numbers, both)
        for name, want in plain.items():
            assert torch.equal(fused[name], want), (number, name)
        for slot, token in enumerate(both[0].drawn[:, number % BLOCK].tolist()):
            drawn[slot] += [token] if token >= 0 else []
    return drawn


def composed(seed: int, prompt: int, tokens: int) -> tuple:
    ids = HIDTokenizer().encode(compose(seed, bars=6))[:tokens].astype(np.int64)
    state = Draft(ids[:prompt], max_tokens=tokens - prompt).state()
    return state, ids[:prompt], ids[prompt:].tolist()


def test_songs_that_are_full(model):
    """Of tokens, and of bars, before the slot is."""
    tokens, bars = composed(7, 58, 75), composed(7, 58, 75)
    drawn = run(model, [(*tokens, 62), (*bars, None, 2)], 10)
    assert len(drawn[0]) == 5 and vocab.family_of(drawn[1][-1]).name == "CHORD" and len(drawn[1]) < 9


def drafted(seed: int, prompt: np.ndarray | None = None, **wishes) -> tuple:
    draft = Draft(prompt, seed=seed, **wishes)
    return draft.state(), np.array(draft.ids)


def test_the_fields_are_in_the_order_of_the_kernels(model):
    step = Step(model, 1, ROOM, BARS)
    assert step.names == read_kernel.STEP == draw_kernel.STEP
    assert step.reader.names == read_kernel.READER
    assert step.draft.names == draw_kernel.DRAFT and step.draft.grammar.names == draw_kernel.GRAMMAR
    assert step.sampling.names == draw_kernel.SAMPLING
    assert step.draft.copies.names == copies_kernel.COPIES


def test_composed_songs(model):
    songs = [composed(7, 58, 75), None, composed(1, 146, 160), composed(6, 122, 130)]
    drawn = run(model, songs, 14, {9: (3, composed(7, 30, 40))})
    assert drawn[0] == songs[0][2][:13] and not drawn[1]  # a step more for the summary


def test_a_dense_model():
    model = tiny_model(CONFIG.as_dense(), torch.float32)
    songs = [composed(7, 58, 75), composed(1, 146, 160)]
    drawn = run(model, songs, 8)
    assert drawn == [songs[0][2][:8], songs[1][2][:8]]


# Drawn at random by a model that knows nothing, songs meet every rule.
WILD = {"temperature": 2.0, "kind_temperatures": {"chord": 1.5, "rhythm": 0.5}}
CASES = [
    {"sampling": Sampling(**WILD)},
    {"sampling": Sampling(top_p=0.9, **WILD), "bars": 2},
    {
        "sampling": Sampling(top_k=5, temperature=1.5),
        "constraints": Constraints(scale=(0, 2, 4, 5, 7, 9, 11)),
    },
    {"sampling": Sampling(temperature=0), "bars": 1},
    {
        "sampling": Sampling(min_p=0.01, kind_temperatures={"pitch": 0, "velocity": 3}),
        "constraints": Constraints(
            signature=20, bpm=99, instruments=(0, 33, 128), chords=(vocab.CHORD.start + 9,)
        ),
    },
    {
        "sampling": Sampling(top_k=300, top_p=0.99, **WILD),
        "constraints": Constraints(
            scale=(0, 4, 7),
            strict_scale=True,
            registers={i: (40, 70) for i in range(0, 128, 3)},
            densities={i: 2.5 for i in range(129)},
        ),
    },
    {"sampling": Sampling(**WILD), "max_tokens": 9},
]


def test_songs_that_are_drawn(model):
    ids = HIDTokenizer().encode(compose(7, bars=6))
    prompts = [None] * 5 + [ids[: np.flatnonzero(vocab.CHORD.mask(ids))[2]]] + [None]
    songs = [drafted(seed, prompt, **one) for seed, (prompt, one) in enumerate(zip(prompts, CASES))]
    drawn = run(model, songs, 34, {20: (6, drafted(9, sampling=Sampling(**WILD)))})
    met = {vocab.family_of(token).name for tokens in drawn for token in tokens}
    assert {"BAND", "CHORD", "TS", "BPM", "INST", "T", "P", "L", "V"} <= met, met


def test_copies_that_are_asked_for(model):
    """By penalties below 0, so strong that nothing else is drawn: bars are played on as they began."""
    wishes = Constraints(repetition_penalties={0: -60.0, vocab.DRUMS: -60.0})
    songs = [
        (*drafted(0, np.array(riffs(5)), max_tokens=40, constraints=wishes), begun(tokens))
        for tokens in (2, 3, 6)
    ]
    again = Draft(np.array(riffs(5)), max_tokens=40, constraints=wishes)
    for token in begun(5):  # as a song begins anew, which has outgrown its room
        again.take(token)
    songs.append((again.state(), np.array(again.ids)))
    drawn = run(model, songs, 17)
    drawn[3] = begun(5) + drawn[3]
    want = notes(begun(9))
    for tokens in drawn:
        assert notes(tokens)[: len(want)] == want, tokens


def outlined(seed: int, song: miditoolkit.MidiFile, begun: bool = False, **options) -> tuple:
    """A song in whose given bars a flute is to play, up to where it may, or has `begun` to."""
    wishes = Constraints(scale=(0, 4, 7), strict_scale=True, registers={73: (60, 80)}, densities={73: 1.0})
    outline = Outline.of(song, (73,), options.pop("bars"))
    draft = OutlinedDraft(outline, seed=seed, constraints=wishes, sampling=Sampling(**WILD), **options)
    draft.append_given()
    if begun:
        draft.take(vocab.INST.start + int(vocab.INSTRUMENT_RANK[73]))
    return draft.state(), np.array(draft.ids), draft.state().given.queue


def test_songs_of_which_something_is_given(model):
    """Several bars, one alone, few tokens that may be drawn, and one in which some are."""
    song = HIDTokenizer().decode(np.array([*riffs(5), vocab.EOS]))
    song.instruments = [track for track in song.instruments if track.is_drum]
    songs = [
        outlined(0, song, bars=(2, 5)),
        outlined(1, song, bars=(3, 3)),
        outlined(2, song, bars=(1, 2), max_tokens=2),
        outlined(3, song, bars=(1, 5), begun=True),
    ]
    drawn = run(model, songs, 34)
    bars = [sum(token in vocab.CHORD for token in tokens) for tokens in drawn]
    assert bars[0] >= 2 and bars[1] <= 1 and len(drawn[2]) < 20 and bars[3] >= 1
    assert drawn[1][-1] == vocab.EOS or drawn[1][-1] in vocab.CHORD
    assert any(token in vocab.P for token in drawn[3][:3])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        test_composed_songs,
        test_songs_that_are_full,
        test_songs_that_are_drawn,
        test_copies_that_are_asked_for,
        test_songs_of_which_something_is_given,
    ],
)
def test_compiled(model, case):
    case(model.to("cuda"))
