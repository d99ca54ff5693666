"""The state of songs as tensors, beside `Grammar`, `TokenReader` and `Draft`, after every token."""

import numpy as np
import pytest
import torch

from meloformer.composer.compose import compose
from meloformer.generation.constraints import Constraints
from meloformer.generation.device.copies import SlotCopies
from meloformer.generation.device.draft import MAX_CHORDS, SlotDraft, fits
from meloformer.generation.device.reader import SlotReader
from meloformer.generation.device.tables import Tables
from meloformer.generation.draft import Draft
from meloformer.model.token_reader import TokenReader
from meloformer.tokens import vocab
from meloformer.tokens.grammar import Grammar, check
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.riffs import begun, riffs

CPU = torch.device("cpu")
TABLES = Tables(CPU)
ROOM, BARS = 400, 300
FAMILY = np.array([vocab.FAMILIES.index(vocab.family_of(i)) for i in range(vocab.VOCAB_SIZE)])


class Chooser:
    """In place of `Sampling`: the ids of a song, or ids at random, and what it was asked."""

    def __init__(self, seed: int, ids=()):
        self.random, self.ids = np.random.default_rng(seed), list(ids)
        self.mask = self.bias = None

    def draw(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        self.mask = logits.isfinite()
        self.bias = logits[self.mask]
        if self.ids:
            return self.ids.pop(0)
        return random_id(self.mask.numpy(), self.random)


def random_id(mask: np.ndarray, random: np.random.Generator) -> int:
    """Rare families come as often as others, so that every rule is met."""
    allowed = np.flatnonzero(mask)
    if len(allowed) > 1:
        allowed = allowed[allowed != vocab.EOS]
    families = FAMILY[allowed]
    return int(random.choice(allowed[families == random.choice(np.unique(families))]))


def song(seed: int, bars: int = 3) -> np.ndarray:
    return HIDTokenizer().encode(compose(seed, bars=bars))


def prompt(seed: int) -> np.ndarray:
    """A composed song of two bars."""
    ids = song(seed)
    return ids[: np.flatnonzero(vocab.CHORD.mask(ids))[2]]


WISHES = {
    "none": {},
    "two bars": {"bars": 2},
    "tempo, metre and band": {"constraints": Constraints(signature=74, bpm=93, instruments=(128, 33, 0))},
    "a metre of long bars": {"bars": 3, "constraints": Constraints(signature=20)},
    "chords": {"bars": 6, "constraints": Constraints(chords=(vocab.CHORD.start + 3, vocab.CHORD.start + 20))},
    "a scale": {"constraints": Constraints(scale=(0, 2, 4, 5, 7, 9, 11))},
    "chords and a scale": {"constraints": Constraints(scale=(0, 4, 7), chords=(vocab.CHORD.start + 9,))},
    "a strict scale": {"constraints": Constraints(scale=(0, 2, 4, 5, 7, 9, 11), strict_scale=True)},
    "registers, densities": {
        "constraints": Constraints(
            registers={i: (40, 60) for i in range(64)}, densities={i: 2.5 for i in range(0, 128, 2)}
        )
    },
    "few tokens": {"max_tokens": 37},
    "no repetition": {
        "prompt": np.array(riffs(5)),
        "constraints": Constraints(
            densities={0: 2.5},
            repetition_penalties={i: 1.5 for i in range(100)} | {vocab.DRUMS: 0.7},
        ),
    },
    "a prompt": {"prompt": prompt(1), "bars": 2},
    "a prompt and wishes": {
        "prompt": prompt(2),
        "constraints": Constraints(signature=100, bpm=140, chords=(vocab.CHORD.start,)),
    },
    "a prompt of long bars": {
        "prompt": np.array(
            [vocab.BOS, vocab.BAND.start, vocab.CHORD.start, vocab.TS.start + 20, vocab.BPM.start + 90]
        ),
        "bars": 2,
        "constraints": Constraints(signature=5),
    },
}


PENALIZED = [
    {"constraints": Constraints(repetition_penalties={0: 1.0})},
    {"constraints": Constraints(scale=(0, 2, 4), repetition_penalties={0: 0.5, vocab.DRUMS: 2.0})},
]


class Beside:
    """A draft on the host, and what it asks for next."""

    def __init__(self, seed: int, ids=(), **wishes):
        self.chooser = Chooser(seed, ids)
        self.draft = Draft(sampling=self.chooser, seed=seed, **wishes)

    def next(self) -> tuple[int, torch.Tensor, torch.Tensor | None]:
        """The next token, the mask, and the bias of what is allowed, if it was asked for."""
        if self.draft.append_required():
            token = self.draft.ids[-1]
            return token, torch.arange(vocab.VOCAB_SIZE) == token, None
        taken = []
        self.draft.take, take = lambda token: taken.append(token) or take(token), self.draft.take
        self.draft.draw(torch.zeros(vocab.VOCAB_SIZE))
        del self.draft.take
        return taken[0], self.chooser.mask, self.chooser.bias


def test_masks_and_ends_are_those_of_drafts():
    """Slots take turns at random; whoever is finished makes room for another song."""
    random = np.random.default_rng(0)
    songs = [Beside(seed, **wishes) for seed, wishes in enumerate(WISHES.values())]
    songs += [Beside(seed, song(seed)[1:], max_tokens=200) for seed in (3, 4)]
    songs += [Beside(7, riffs(6)[1:], max_tokens=150, **penalized) for penalized in PENALIZED]
    waiting = [Beside(50 + seed, **WISHES[name]) for seed, name in enumerate(("a scale", "two bars", "none"))]
    slots = SlotDraft(len(songs), TABLES, CPU, song=1 << 16)
    for slot, one in enumerate(songs):
        slots.load(slot, one.draft.state())
    compared = held_back = 0
    for _ in range(150):
        turn = torch.from_numpy(random.random(len(songs)) < 0.8)
        active = [slot for slot in range(len(songs)) if not songs[slot].draft.finished]
        masks, biases = slots.allowed(), slots.bias()
        tokens = torch.zeros(len(songs), dtype=torch.int64)
        appended = torch.zeros(len(songs), dtype=torch.bool)
        for slot in active:
            if turn[slot]:
                length = len(songs[slot].draft.ids)
                tokens[slot], mask, bias = songs[slot].next()
                appended[slot] = len(songs[slot].draft.ids) > length
                assert torch.equal(masks[slot], mask), (slot, songs[slot].draft.ids[-5:])
                if bias is not None:
                    torch.testing.assert_close(biases[slot][mask], bias)
                    held_back += slot >= len(songs) - len(PENALIZED) and bool(bias.any())
                compared += 1
            else:
                turn[slot] = False
        turn &= torch.tensor([slot in active for slot in range(len(songs))])
        assert torch.equal(slots.take(tokens, turn), appended)
        finished = torch.tensor([one.draft.finished for one in songs])
        assert torch.equal(slots.active == 0, finished)
        for slot in torch.nonzero(finished)[:, 0].tolist():
            if waiting:
                songs[slot] = waiting.pop()
                slots.load(slot, songs[slot].draft.state())
    assert compared > 1000 and held_back > 80 and not waiting
    for one in songs:
        check(one.draft.song())


def test_a_long_walk_meets_every_rule():
    """Some hundred bars of eight songs: every family, parts of long bars, cut bars."""
    slots, songs = SlotDraft(8, TABLES, CPU), [Beside(seed, max_tokens=10**6) for seed in range(8)]
    for slot, one in enumerate(songs):
        slots.load(slot, one.draft.state())
    everyone = torch.ones(8, dtype=torch.bool)
    for _ in range(350):
        masks = slots.allowed()
        steps = [one.next() for one in songs]
        assert torch.equal(masks, torch.stack([mask for _, mask, _ in steps]))
        slots.take(torch.tensor([token for token, _, _ in steps]), everyone)
        inside = torch.tensor([one.draft._grammar.inside_bar for one in songs])
        ends = torch.tensor([one.draft._grammar.bar_ends for one in songs])
        assert torch.equal(slots.grammar.inside_bar(), inside)
        assert torch.equal(slots.grammar.bar_ends(), ends)
        complete = torch.tensor([one.draft._grammar.bar_complete for one in songs])
        assert torch.equal(slots.grammar.bar_complete(), complete)
    met = {vocab.family_of(token).name for one in songs for token in one.draft.ids}
    assert {"BAND", "CHORD", "TS", "CUT", "BPM", "INST", "T", "P", "L", "V"} <= met
    assert inside.any() or any(
        one.draft.new_bars < vocab.CHORD.mask(np.array(one.draft.ids)).sum() for one in songs
    )


def test_the_grammar_may_be_taken_over_anywhere():
    ids = [int(token) for token in song(7)]
    grammar, slots = Grammar(), SlotDraft(1, TABLES, CPU).grammar
    for token in ids:
        slots.load(0, grammar.state())
        assert np.array_equal(slots.allowed()[0].numpy(), grammar.allowed())
        grammar.push(token)


def test_what_was_played_may_be_taken_over_anywhere():
    """As when a song has outgrown its window: in the middle of a bar, beside the same song from the first."""
    ids = np.array([*riffs(7), *begun(4)])
    wishes = Constraints(repetition_penalties={0: 1.0, vocab.DRUMS: 1.0})
    draft = Draft(constraints=wishes, max_tokens=250)
    slots = SlotCopies(2, TABLES, CPU, 256)
    slots.load(0, draft.state())
    for token in ids[1:].tolist():
        slots.push(torch.full((2,), token), torch.tensor([True, False]))
        draft.take(token)
        slots.load(1, draft.state())
        first, anew = slots.all.unbind(dim=1)
        assert torch.equal(first, anew) and torch.equal(*slots.starts)
        for log in (slots.log, slots.more):
            assert torch.equal(*log[:, : slots.size[0]])
    with pytest.raises(ValueError, match="room for 150"):
        SlotCopies(1, TABLES, CPU, 150).load(0, Draft(ids, max_tokens=20, constraints=wishes).state())


def test_too_many_chords_do_not_fit():
    chords = Constraints(chords=(vocab.CHORD.start,) * (MAX_CHORDS + 1))
    assert not fits(chords)
    with pytest.raises(ValueError, match="at most"):
        SlotDraft(1, TABLES, CPU).load(0, Draft(constraints=chords).state())


def as_tuples(facts, slots) -> list[tuple]:
    columns = [*facts[:6], *facts.features, *facts.guesses]
    return [tuple(int(column[slot]) for column in columns) for slot in slots]


def of_host(facts) -> tuple:
    return (*facts[:6], *facts.features, *facts.guesses)


def walked(seed: int, tokens: int) -> list[int]:
    """A random song, in which places and chords come again."""
    random, grammar, ids = np.random.default_rng(seed), Grammar(), []
    for _ in range(tokens):
        mask = grammar.allowed()
        for family, few in ((vocab.CHORD, 3), (vocab.P, 60), (vocab.T, 2), (vocab.BAND, 4)):
            if mask[family.start : family.start + few].any():
                mask[family.start + few : family.stop] = False
        if len(grammar.band) >= 3:
            mask[vocab.BAND.start : vocab.BAND.stop] = False
        token = random_id(mask, random)
        grammar.push(token)
        ids.append(token)
    return ids


def test_facts_are_those_of_the_reader():
    """Slots take turns at random, songs begin after prompts of any length, and are replaced."""
    random = np.random.default_rng(1)
    songs = [walked(seed, 330) for seed in range(5)] + [song(seed, 5).tolist()[:390] for seed in range(3)]
    more = [song(9, 2).tolist(), walked(99, 200)]
    slots = SlotReader(len(songs), TABLES, ROOM, BARS, CPU)
    readers = []

    def begin(slot: int, ids: list[int], read: int) -> TokenReader:
        reader = TokenReader()
        for token in ids[:read]:
            reader.push(token)
        slots.load(slot, np.array(ids[:read], dtype=np.int64))
        return reader

    at = [0, 1, 40, 150, 0, 7, 100, 200]
    readers = [begin(slot, songs[slot], at[slot]) for slot in range(len(songs))]
    compared = 0
    while any(at[slot] < len(songs[slot]) for slot in range(len(songs))):
        left = np.array([at[slot] < len(songs[slot]) for slot in range(len(songs))])
        turn = left & (random.random(len(songs)) < 0.85)
        tokens = torch.tensor([songs[s][at[s]] if turn[s] else 5 for s in range(len(songs))])
        facts = slots.push(tokens, torch.from_numpy(turn))
        chosen = np.flatnonzero(turn).tolist()
        assert as_tuples(facts, chosen) == [of_host(readers[s].push(songs[s][at[s]])) for s in chosen]
        compared += len(chosen)
        for slot in chosen:
            at[slot] += 1
            if at[slot] == len(songs[slot]) and more:
                songs[slot], at[slot] = more.pop(), 60
                readers[slot] = begin(slot, songs[slot], 60)
    assert compared > 1500 and not more


def test_what_is_looked_up_occurs():
    """The walks above would prove nothing if no place and no chord came again."""
    facts = []
    for seed in range(3):
        reader = TokenReader()
        facts += [reader.push(token) for token in walked(seed, 330)]
    for feature in ("previous", "repeat", "next_instrument"):
        assert len({getattr(token.features, feature) for token in facts}) > 5
    assert all(len({token.guesses[number] for token in facts}) > 2 for number in range(6))
