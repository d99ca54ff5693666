"""Steps of all slots at once: their logits against the model's full forward pass, at every position."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from meloformer.composer.compose import compose
from meloformer.generation.decoder import padded_batch
from meloformer.generation.device.cache import bytes_of_a_slot
from meloformer.generation.device.forward import PlainForward
from meloformer.generation.device.step import BLOCK, Step
from meloformer.generation.draft import Draft
from meloformer.generation.sampling import Sampling
from meloformer.kernels.structure import KIND_RULES
from meloformer.model.transformer import MeloFormer, ModelConfig
from meloformer.tokens import attributes, vocab
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.model_cases import tiny_model

CONFIG = ModelConfig(layers=2, dim=32, heads=2, ffn=48)
NEAR_BARS = {"any": (0, 1), "alike": (0, 2), "next": (0, 1)}
OF_RULES = [replace(CONFIG, kind_rule=rule, near_bars=NEAR_BARS[rule]) for rule in KIND_RULES]
DENSE = CONFIG.as_dense()
ids_of = {config: config.kind_rule for config in OF_RULES} | {DENSE: "dense"}
ROOM, BARS = 200, 16


class Noting:
    """A forward whose last logits can be read."""

    def __init__(self, *parts):
        self._forward = PlainForward(*parts)
        self.begin = self._forward.begin

    def __call__(self, facts, reads, summarizes, bar):
        self.logits = self._forward(facts, reads, summarizes, bar)
        self.reads, self.positions = reads, facts.position.clone()
        return self.logits


def song(seed: int, tokens: int, bars: int = 6) -> np.ndarray:
    return HIDTokenizer().encode(compose(seed, bars=bars))[:tokens].astype(np.int64)


def later_part(seed: int) -> np.ndarray:
    """A sample that begins at a bar line in a song."""
    ids = HIDTokenizer().encode(compose(seed, bars=9))
    point = int(attributes.cut_points(ids)[3])
    header, skip = attributes.restated(ids, point)
    return np.concatenate((header, ids[point + skip :])).astype(np.int64)[:180]


@torch.no_grad()
def full_forward(model: MeloFormer, ids: np.ndarray) -> torch.Tensor:
    """[n, VOCAB_SIZE]"""
    return model(*padded_batch(model, ids))[0, : len(ids), : vocab.VOCAB_SIZE]


def begin(step: Step, slot: int, ids: np.ndarray, prompt: int, **limits: int) -> None:
    """Let a slot write `ids`, of which `prompt` are the prompt."""
    draft = Draft(ids[:prompt], max_tokens=len(ids) - prompt)
    step.begin(slot, draft.state(), ids[:prompt], queue=ids[prompt:].tolist(), **limits)


@pytest.mark.parametrize("config", ids_of, ids=ids_of.get)
def test_logits_are_those_of_the_full_forward(config):
    """Songs of different lengths and prompts side by side; a slot is taken over by another song."""
    model = tiny_model(config)
    waiting = [
        (song(7, 66), 1),  # a new song
        (song(1, 170), 130),
        (later_part(5), 150),
        (song(6, 140), 110),
        (song(7, 70), 50),
    ]
    step = Step(model, 3, ROOM, BARS, queue=ROOM, forward=Noting)
    songs = {}
    for slot in range(3):
        songs[slot] = waiting.pop(0)
        begin(step, slot, *songs[slot])
    expected = {slot: full_forward(model, ids) for slot, (ids, _) in songs.items()}
    compared = set()
    while songs:
        step()
        noted = step._forward
        for slot in list(songs):
            ids, _ = songs[slot]
            position = int(noted.positions[slot])
            if noted.reads[slot]:
                compared.add((slot, len(waiting), position))
                want = expected[slot][position]
                # The tables of RoPE are float32 in both, all else is float64.
                allowed = 1e-10 * expected[slot].abs().max().item()
                torch.testing.assert_close(noted.logits[slot], want, rtol=0, atol=allowed)
            if position == len(ids) - 2:
                assert not step.draft.active[slot]
                del songs[slot]
                if waiting:
                    songs[slot] = waiting.pop(0)
                    begin(step, slot, *songs[slot])
                    expected[slot] = full_forward(model, songs[slot][0])
    assert len(compared) > 180 and not waiting


def test_a_bar_costs_a_step_more_and_a_dense_model_none():
    ids = song(7, 70)
    for config, more in ((CONFIG, int(vocab.CHORD.mask(ids[:-1]).sum()) - 1), (DENSE, 0)):
        step = Step(tiny_model(config), 1, ROOM, BARS, queue=ROOM)
        begin(step, 0, ids, 1)
        tokens, steps = [], 0
        while step.draft.active[0]:
            for _ in range(BLOCK):
                step()
            steps += BLOCK
            tokens += step.drawn[0].tolist()
        assert [token for token in tokens if token >= 0] == ids[1:].tolist()
        assert tokens[: len(ids) - 1 + more].count(-1) == more
        assert set(tokens[len(ids) - 1 + more :]) == {-1}


@pytest.mark.parametrize("config", [CONFIG, DENSE], ids=ids_of.get)
def test_the_memory_of_a_slot_is_known(config):
    keys = Step(tiny_model(config), 3, ROOM, BARS).cache.keys
    assert 3 * bytes_of_a_slot(config, ROOM, BARS, keys.dtype) == keys.nbytes


def test_a_song_that_is_full_waits():
    model = tiny_model(CONFIG)
    by_tokens, by_bars = Step(model, 1, 50, BARS, queue=ROOM), Step(model, 1, ROOM, 2, queue=ROOM)
    large = Step(model, 1, ROOM, BARS, queue=ROOM)
    limits = {"room": 50}, {"bars": 2}
    for step, room, limit in (
        (by_tokens, 50, {}),
        (by_bars, None, {}),
        (large, 50, limits[0]),
        (large, None, limits[1]),
    ):
        ids = song(7, 66)
        begin(step, 0, ids, 1, **limit)
        for _ in range(len(ids)):
            step()
        assert step.full[0] and step.draft.active[0]
        if room is None:
            room = int(np.flatnonzero(vocab.CHORD.mask(ids))[2])
            assert step.pending[0] == ids[room]
        assert step.reader.position[0] == room - 1
        full = step.reader.all.clone()
        step()
        assert torch.equal(step.reader.all, full) and step.drawn.eq(-1).any()


def test_steps_of_empty_slots_change_nothing_of_songs():
    """As when a graph is recorded; one of the slots stays empty."""
    model, ids = tiny_model(CONFIG), song(7, 20)
    before, fresh = Step(model, 2, ROOM, BARS, queue=ROOM), Step(model, 2, ROOM, BARS, queue=ROOM)
    for _ in range(3):
        before()
    before.clear()
    for step in (before, fresh):
        begin(step, 1, ids, 1)
        for _ in range(len(ids) - 1):
            step()
    assert torch.equal(before.drawn, fresh.drawn)
    assert before.drawn[1, : len(ids) - 1].tolist() == ids[1:].tolist()
    for part in ("reader", "draft", "sampling"):
        assert torch.equal(getattr(before, part).all, getattr(fresh, part).all)


def drawn(model, drafts: list[Draft], slots: list[int], steps: int) -> list[list[int]]:
    step = Step(model, max(slots) + 1, ROOM, BARS)
    for slot, draft in zip(slots, drafts):
        step.begin(slot, draft.state(), np.array(draft.ids))
    rows = []
    for _ in range(steps):
        step()
        rows.append(step.drawn[:, len(rows) % BLOCK].tolist())
    return [[row[slot] for row in rows if row[slot] >= 0] for slot in slots]


def test_neither_the_slot_nor_other_songs_change_what_is_drawn():
    model, sampling = tiny_model(CONFIG), Sampling(top_p=0.9, min_p=0.001, kind_temperatures={"pitch": 2})

    def draft(seed: int) -> Draft:
        return Draft(seed=seed, max_tokens=30, sampling=sampling)

    together = drawn(model, [draft(seed) for seed in (3, 4, 3)], [0, 2, 1], 30)
    (alone,) = drawn(model, [draft(4)], [0], 30)
    assert together[1] == alone != together[0] == together[2]


def test_half_precision_follows():
    """As on a GPU: weights, caches and streams in bfloat16."""
    model, ids = tiny_model(CONFIG), song(7, 90)
    low = tiny_model(CONFIG).to(torch.bfloat16)
    step = Step(low, 1, ROOM, BARS, queue=ROOM, forward=Noting)
    begin(step, 0, ids, 60)
    got = []
    for _ in range(25):
        step()
        if step._forward.reads[0]:
            got.append(step._forward.logits[0].double())
    want = full_forward(model, ids)[59 : 59 + len(got)]
    plain = full_forward(low, ids)[59 : 59 + len(got)].double()
    error, allowed = (torch.stack(got) - want).norm(), (plain - want).norm()
    assert 0 < error < 2 * allowed
