"""Songs that are written in slots: the same as by the loop of the host, whoever else is written."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from meloformer.composer.compose import compose
from meloformer.errors import UserError
from meloformer.generation.constraints import Constraints
from meloformer.generation.device import loop
from meloformer.generation.device.loop import Slots, cannot_write, why_not
from meloformer.generation.device.sampling import SlotSampling
from meloformer.generation.device.step import Step
from meloformer.generation.device.tables import Tables
from meloformer.generation.draft import Draft, OutlinedDraft
from meloformer.generation.generator import Generator
from meloformer.generation.loop import write
from meloformer.generation.outline import Outline
from meloformer.generation.sampling import Sampling
from meloformer.kernels import overlap
from meloformer.model.transformer import MeloFormer, ModelConfig
from meloformer.tokens import attributes, vocab
from meloformer.tokens.grammar import check
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.riffs import riffs
from helpers.untrained import untrained

TINY, LARGE = (
    ModelConfig(layers=2, dim=64, heads=2, ffn=96),
    ModelConfig(layers=6, dim=512, heads=8, ffn=2752),
)
GREEDY = Sampling(temperature=0)
WILD = Sampling(temperature=3.0, top_k=400, kind_temperatures={"instrument": 0.5})


@pytest.fixture(scope="module")
def model():
    return untrained()


def in_slots(model, drafts: list[Draft], max_context: int = 512, **options) -> list[int]:
    """Writes the drafts; returns the number of the draft after every token."""
    return list(Slots(model, drafts, max_context, graphs=False, **options).write())


def by_host(model, drafts: list[Draft], max_context: int = 512) -> None:
    for _ in write(model, drafts, max_context, "auto"):
        pass


class SameDraws:
    """In place of `Sampling`, for the loop of the host: what slots draw, from the logits that it has."""

    def __init__(self, sampling: Sampling, seed: int):
        self._sampling = SlotSampling(1, Tables(torch.device("cpu")), torch.device("cpu"))
        self._sampling.load(0, sampling, seed)
        self.draft: Draft | None = None

    def draw(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        count = len(self.draft.ids) - self.draft.begin
        return int(self._sampling.draw(logits[None], torch.tensor([count])))


def twins(make, *args, sampling: Sampling, seed: int, **others) -> tuple[Draft, Draft]:
    """The same draft for slots and for the loop of the host, which draws with the same noise."""
    draws = SameDraws(sampling, seed)
    mine, its = (make(*args, sampling=one, seed=seed, **others) for one in (sampling, draws))
    draws.draft = its
    return mine, its


def wishes() -> list[dict]:
    return [
        {"max_tokens": 20},
        {"bars": 1, "max_tokens": 50, "constraints": Constraints(signature=74, bpm=93, instruments=(33,))},
        {"max_tokens": 45, "constraints": Constraints(chords=(vocab.CHORD.start + 3, vocab.CHORD.start + 9))},
        {"max_tokens": 30, "constraints": Constraints(scale=(0, 2, 4, 5, 7, 9, 11))},
    ]


def test_songs_are_those_of_the_host(model):
    """The likeliest tokens; more songs than slots, of which one ends while others go on."""
    mine, its = ([Draft(sampling=GREEDY, **one) for one in wishes()] for _ in range(2))
    turns = in_slots(model, mine, slots=3)
    by_host(model, its)
    for number, (one, other) in enumerate(zip(mine, its)):
        assert one.ids == other.ids and one.complete == other.complete
        assert np.array_equal(one.song(), other.song())
        assert turns.count(number) == one.new_tokens


def test_repetition_is_held_back_as_by_the_host(model):
    """In short bars of few notes, of which some are played again; in windows, too."""
    constraints = Constraints(
        signature=vocab.SIGNATURE_INDEX[1, 16],
        chords=(vocab.CHORD.start,),
        registers={0: (60, 60), vocab.DRUMS: (36, 37)},
        densities={0: 3, vocab.DRUMS: 3},
        instruments=(0, vocab.DRUMS),
    )
    options = {"bars": 40, "max_tokens": 90, "sampling": Sampling(temperature=1.5, top_k=200)}
    pairs = []
    for penalty, prompt in ((0.0, riffs(13)), (2.0, riffs(13)), (-8.0, riffs(13)), (-8.0, None)):
        held = replace(constraints, repetition_penalties={0: penalty, vocab.DRUMS: penalty})
        prompt = None if prompt is None else np.array(prompt)
        pairs.append(twins(Draft, prompt, seed=0, constraints=held, **options))
    mine, its = zip(*pairs)
    in_slots(model, mine, 256)
    by_host(model, its, 256)
    assert [one.ids for one in mine] == [one.ids for one in its]
    assert len({tuple(one.ids) for one in mine}) == 4


ADDED = (48, 73)


def outlines() -> list[tuple[Outline, dict]]:
    """What stays of a song that is longer than a window, and how the rest is written."""
    song = compose(5, bars=6)
    steered = Constraints(densities=dict.fromkeys(range(129), 4.0), chords=(vocab.CHORD.start + 3,))
    copied = replace(
        steered, scale=(0, 4, 7), strict_scale=True, repetition_penalties=dict.fromkeys(ADDED, -4.0)
    )
    played = attributes.band(HIDTokenizer().encode(song)).tolist()
    return [
        (Outline.of(song, ADDED), {"constraints": steered}),
        (Outline.of(song, ADDED[:1], bars=(2, 5)), {"constraints": copied}),
        (Outline.of(song, played[:1], bars=(3, 4), chords=(vocab.CHORD.start,)), {}),
        (Outline.of(song, played, bars=(6, 6)), {"constraints": steered}),
        (Outline.of(song, ADDED), {"constraints": steered, "max_tokens": 9}),
    ]


def test_what_is_given_stays_and_the_rest_is_as_by_the_host(model):
    """Beside songs of which nothing is given, in windows, and in fewer slots than songs."""
    pairs = []
    for seed, (outline, options) in enumerate(outlines()):
        options = {"max_tokens": 60, "sampling": WILD} | options
        pairs.append(twins(OutlinedDraft, outline, seed=seed, **options))
    pairs.insert(1, twins(Draft, seed=9, max_tokens=40, sampling=WILD))
    mine, its = zip(*pairs)
    in_slots(model, mine, 256, slots=4)
    by_host(model, its, 256)
    for number, (one, other) in enumerate(zip(mine, its)):
        assert one.ids == other.ids and one.finished, number
        assert np.array_equal(one.song(), other.song())
        check(one.song())
    new = []
    for draft, (outline, _) in zip([mine[0], *mine[2:]], outlines()):
        ids = draft.song()
        scanned, is_open = attributes.scan(ids), np.array([bar.is_open for bar in outline.bars])
        written = np.isin(scanned.inst, outline.written) & is_open[scanned.bar]
        given = [*outline.header, *(token for bar in outline.bars for token in bar.tokens), vocab.EOS]
        assert ids[~written].tolist() == given
        new.append(vocab.P.mask(ids[written]).sum())
    assert min(new[:2]) > 0


def test_what_is_drawn_depends_on_the_seed_alone(model):
    def drafts(seeds) -> list[Draft]:
        return [Draft(seed=seed, max_tokens=28, bars=4, sampling=WILD) for seed in seeds]

    together, alone = drafts((5, 6, 5)), drafts((6,))
    in_slots(model, together, slots=2)
    in_slots(model, alone)
    assert together[0].ids == together[2].ids != together[1].ids == alone[0].ids
    for draft in together:
        check(draft.song())


def test_as_many_bars_as_asked_for(model):
    drafts = [Draft(bars=bars, max_tokens=3000, seed=bars, sampling=WILD) for bars in (1, 2)]
    in_slots(model, drafts)
    for draft, bars in zip(drafts, (1, 2)):
        check(draft.song())
        assert draft.finished and len(attributes.cut_points(draft.song())) == bars


def test_a_song_longer_than_its_window_goes_on(model):
    """By the windows that the loop of the host has, too."""
    ids = HIDTokenizer().encode(compose(1, bars=6))
    prompt = ids[: np.flatnonzero(vocab.CHORD.mask(ids))[3]]

    def draft() -> Draft:
        return Draft(prompt, max_tokens=60, sampling=GREEDY)

    assert 220 < len(prompt) < 256 < len(prompt) + 60
    mine, its = draft(), draft()
    slots = Slots(model, [mine], 256, graphs=False)
    windows, begin = [], slots.step.begin
    slots.step.begin = lambda slot, state, ids, *more: (
        windows.append(len(ids)) or begin(slot, state, ids, *more)
    )
    list(slots.write())
    by_host(model, [its], 256)
    assert mine.ids == its.ids
    assert windows[0] == len(prompt) and len(windows) == 2 and windows[1] <= 192


def test_whoever_is_stopped_costs_nothing_more(model):
    drafts = [Draft(seed=seed, max_tokens=300, sampling=WILD) for seed in range(2)]
    counts = [0, 0]
    for number in Slots(model, drafts, 512, graphs=False, slots=1).write():
        counts[number] += 1
        if counts[number] == 20:
            drafts[number].stop()
    assert counts == [20, 20]
    assert all(draft.finished for draft in drafts)


def test_why_a_draft_is_left_to_the_host():
    assert why_not(Draft()) is None
    many = Constraints(chords=(vocab.CHORD.start,) * 1000)
    assert "chords" in why_not(Draft(constraints=many))
    assert "draws" in why_not(Draft(sampling=object()))
    chords = Draft(constraints=many)
    assert cannot_write([Draft()], torch.float8_e4m3fn) is None
    assert cannot_write([Draft(), chords]).endswith("chords")
    assert cannot_write([chords], torch.float8_e4m3fn).endswith("with caches of the model's dtype")


def test_a_generator_writes_in_slots_if_asked(model, monkeypatch):
    with pytest.raises(UserError, match="needs a GPU"):
        Generator(model, graphs=True)
    monkeypatch.setattr(loop, "require_gpu", lambda device: None)
    graphs = Generator(model, 512, graphs=True)
    (song,) = graphs.generate(seed=5, max_tokens=20, sampling=WILD)
    draft = Draft(seed=5, max_tokens=20, sampling=WILD)
    in_slots(model, [draft])
    assert np.array_equal(song.ids, draft.song())
    with pytest.warns(UserWarning, match="without CUDA graphs, which cannot yet write progressions of more"):
        graphs.generate(Constraints(chords=(vocab.CHORD.start,) * 300), max_tokens=20)


@pytest.mark.gpu
class TestGraphs:
    """Steps recorded as a CUDA graph against the same steps launched kernel by kernel."""

    def songs(self, model, graphs: bool, slots: int, **options) -> list[list[int]]:
        sampling = Sampling(top_p=0.95, kind_temperatures={"instrument": 0.5})
        drafts = [Draft(seed=seed, max_tokens=200 + 40 * seed, sampling=sampling) for seed in range(5)]
        drafts += [OutlinedDraft(one, max_tokens=200, sampling=WILD, **more) for one, more in outlines()[:2]]
        list(Slots(model, drafts, 512, graphs=graphs, slots=slots, **options).write())
        for draft in drafts:
            check(draft.song())
        return [draft.ids for draft in drafts]

    @pytest.mark.parametrize(("step", "slots"), [(Step, 3), (None, 3), (None, 1)], ids=["plain", "3", "1"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_songs_are_those_of_eager_steps(self, dtype, step, slots):
        torch.manual_seed(0)
        model = MeloFormer(TINY).eval().to("cuda", dtype)
        by_graphs, eager, again = (
            self.songs(model, graphs, slots, step=step) for graphs in (True, False, True)
        )
        assert by_graphs == eager == again

    @pytest.mark.parametrize(
        ("slots", "shape"), [(1, LARGE), (7, LARGE), (64, LARGE), (1, TINY)], ids=["1", "7", "64", "tiny"]
    )
    def test_songs_are_those_of_launches_that_wait(self, slots, shape, monkeypatch):
        """With layers of the base model's shape, so that kernels take as long as there, and with small ones,
        which leave most of the GPU to others: 2,000 steps."""
        torch.manual_seed(0)
        model = MeloFormer(shape).eval().to("cuda", torch.bfloat16)

        def written() -> list[list[int]]:
            sampling = Sampling(temperature=1.5, top_p=0.95)
            wishes = {"bars": 400, "max_tokens": 2000, "sampling": sampling}
            drafts = [Draft(seed=seed, **wishes) for seed in range(slots)]
            list(Slots(model, drafts, 2560, graphs=True).write())
            return [draft.ids for draft in drafts]

        overlapping, again = written(), written()
        monkeypatch.setattr(overlap, "can_overlap", lambda device: False)
        assert overlapping == again == written()
