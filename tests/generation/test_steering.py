"""Wishes about chords, key, registers, density and repetition, granted by a model that knows no music."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from meloformer.composer.compose import compose
from meloformer.generation.constraints import Constraints
from meloformer.generation.draft import Draft
from meloformer.generation.harmony import chord_pitches, parse_chords, parse_key
from meloformer.generation.sampling import Sampling
from meloformer.generation.steering import Steering
from meloformer.tokens import attributes, vocab
from meloformer.tokens.grammar import check
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.generated import generate
from helpers.untrained import untrained

C_MAJOR = parse_key("C major")
BAND = (vocab.DRUMS, 33, 0)
FEW = {instrument: 6.0 for instrument in BAND}  # the model without training ends no bar before it is full


@pytest.fixture(scope="module")
def model():
    return untrained()


def played(ids, instrument=None) -> np.ndarray:
    """MIDI pitches of the notes of an instrument, or of all but the drums."""
    inst = attributes.scan(ids).inst
    mine = inst != vocab.DRUMS if instrument is None else inst == instrument
    return ids[vocab.P.mask(ids) & mine].astype(int) - vocab.P.start


def labels(ids) -> list[int]:
    return ids[vocab.CHORD.mask(ids)].tolist()


def test_each_bar_has_the_chord_asked_for(model):
    chords = parse_chords("C Am N")
    constraints = Constraints(chords=chords, instruments=BAND, densities=FEW)
    ids = generate(model, bars=5, max_tokens=4000, constraints=constraints)
    assert labels(ids) == [*chords, *chords[:2]]


def test_the_parts_of_a_long_bar_have_its_chord(model):
    chords = parse_chords("C Am")
    constraints = Constraints(vocab.SIGNATURE_INDEX[16, 4], instruments=BAND, chords=chords, densities=FEW)
    ids = generate(model, bars=3, max_tokens=4000, constraints=constraints)
    assert labels(ids) == [chords[0]] * 2 + [chords[1]] * 2 + [chords[0]] * 2


def test_the_chords_begin_with_the_first_new_bar(model):
    prompt = HIDTokenizer().encode(compose(1, bars=3))
    ids = generate(
        model, prompt, bars=2, max_tokens=1000, constraints=Constraints(chords=parse_chords("E F"))
    )
    assert labels(ids)[3:] == list(parse_chords("E F")) and labels(ids)[:3] == labels(prompt)


def test_no_note_and_no_chord_is_outside_a_strict_key(model):
    constraints = Constraints(instruments=BAND, scale=C_MAJOR, strict_scale=True, densities=FEW)
    ids = generate(model, bars=200, max_tokens=8000, constraints=constraints)
    assert len(played(ids)) > 50 and set(played(ids) % 12) <= set(C_MAJOR)
    assert set(played(ids, vocab.DRUMS) % 12) - set(C_MAJOR)
    assert all(chord_pitches(label) <= set(C_MAJOR) for label in labels(ids))


def test_notes_outside_a_key_are_rare(model):
    def outside(constraints) -> float:
        pitches = played(generate(model, bars=4, max_tokens=2000, constraints=constraints, seed=3))
        return 1 - np.isin(pitches % 12, C_MAJOR).mean()

    piano = Constraints(instruments=(0,), densities=FEW)
    assert outside(piano) > 0.3
    assert 0 <= outside(replace(piano, scale=C_MAJOR)) < 0.1


def test_instruments_keep_to_their_registers(model):
    registers = {33: (28, 40), vocab.DRUMS: (36, 38)}
    chords = parse_chords("C")  # with few CHORD tokens to choose from a bar often goes on with an INST
    constraints = Constraints(instruments=BAND, chords=chords, registers=registers, densities=FEW)
    ids = generate(model, bars=20, max_tokens=8000, constraints=constraints, sampling=Sampling(3.0))
    for instrument, (low, high) in registers.items():
        pitches = played(ids, instrument)
        assert len(pitches) > 5 and low <= pitches.min() and pitches.max() <= high
    assert np.ptp(played(ids, 0)) > 60


@pytest.mark.parametrize("notes", [2, 12])
def test_bars_have_about_as_many_notes_as_asked_for(model, notes):
    constraints = Constraints(instruments=(0,), densities={0: notes})
    ids = generate(model, bars=20, max_tokens=8000, constraints=constraints)
    bars = np.cumsum(vocab.CHORD.mask(ids))[vocab.P.mask(ids)]
    found = np.bincount(bars)
    assert abs(np.median(found[found > 0]) - notes) <= 0.25 * notes + 1


def steered(bars: list[str], constraints: Constraints) -> np.ndarray:
    """What is added to the logits after these bars, each of names of tokens."""
    steering = Steering(constraints)
    for bar in bars:
        for number, name in enumerate(["CHORD_N", *bar.split()]):
            steering.push(vocab.ids_by_name()[name], number == 0)
    bias = steering.bias()
    return np.zeros(vocab.VOCAB_SIZE) if bias is None else bias


def lowered(bias: np.ndarray) -> dict[str, float]:
    """By name the T and P tokens that are held back; "more" for all L and V, "leave" for all others."""
    family = np.array([name.split("_")[0] for name in vocab.names()])
    more, notes = np.isin(family, ["L", "V"]), np.isin(family, ["T", "P"])
    found = {vocab.names()[token]: float(bias[token]) for token in np.flatnonzero(bias * notes)}
    for name, together in (("more", more), ("leave", ~more & ~notes)):
        (value,) = set(bias[together].tolist())
        found |= {name: value} if value else {}
    return found


RIFF = "INST_0 T_0 P_60 L_24 V_20 T_24 P_64 P_67"
PENALTY = Constraints(repetition_penalties={0: 1.5})


@pytest.mark.parametrize(
    "bars, expected",
    [
        ([RIFF, "INST_0"], {}),  # to begin as the bar before is no copy
        ([RIFF, "INST_0 T_0"], {"P_60": -1.5, "more": -1.5}),
        # Whatever lengths and loudness; but where the bar before stated them, T_24 was not to come yet.
        ([RIFF, "INST_0 T_0 P_60 L_12 V_9"], {"T_24": -1.5, "more": -1.5}),
        ([RIFF, "INST_0 T_0 P_60 L_12"], {"T_24": -1.5}),
        ([RIFF, "INST_0 T_0 P_60 L_24 V_20 T_24 P_64"], {"P_67": -1.5, "more": -1.5}),
        ([RIFF, "INST_0 T_0 P_60 L_24 V_20 T_24 P_64 P_67"], {"leave": -1.5, "more": -1.5}),
        ([RIFF, "INST_0 T_0 P_62"], {}),  # no copy any more
        ([RIFF, "INST_0 T_0 P_62 L_24 V_20 T_24 P_64"], {}),
        ([RIFF, f"{RIFF} P_72"], {}),
        ([RIFF, RIFF, RIFF, "INST_0 T_0"], {"P_60": -4.5, "more": -4.5}),
        ([RIFF, RIFF, "INST_0 T_0 P_61", "INST_0 T_0"], {"P_60": -3.0, "P_61": -1.5, "more": -4.5}),
        ([RIFF, "INST_0 T_0 P_60", "INST_0 T_0 P_60"], {"T_24": -1.5, "leave": -1.5, "more": -1.5}),
        ([RIFF, *["INST_0 T_6 P_61"] * 4, "INST_0 T_0"], {}),  # five bars ago
        (
            [RIFF, *["INST_33 T_6 P_61"] * 4, "INST_0 T_0"],
            {"P_60": -1.5, "more": -1.5},
        ),  # where it played last
        ([RIFF, f"{RIFF} INST_33 T_0"], {}),  # no wish about this one, nor about the end of the bar
        ([RIFF, RIFF, ""], {}),
    ],
)
def test_what_goes_on_with_a_copy_of_the_last_bars_is_less_likely(bars, expected):
    assert lowered(steered(bars, PENALTY)) == pytest.approx(expected)


def test_a_penalty_adds_to_other_wishes():
    wishes = Constraints(scale=C_MAJOR, repetition_penalties={0: 1.5})
    bars = ["INST_0 T_0 P_61", "INST_0 T_0"]
    plain, both = (steered(bars, each) for each in (Constraints(scale=C_MAJOR), wishes))
    difference = both - plain
    assert lowered(difference) == {"P_61": -1.5, "more": -1.5}
    assert plain[vocab.P.start + 61] == -4


def parroted(constraints: Constraints, prompt: np.ndarray | None = None) -> np.ndarray:
    """Token ids of a song of 12 new bars by a model that knows one bar and would always play it."""
    bar = [vocab.ids_by_name()[name] for name in f"INST_drums T_0 P_36 L_24 V_20 T_24 P_38 {RIFF}".split()]
    draft = Draft(prompt, bars=12, constraints=constraints)
    while not draft.finished:
        if draft.append_required():
            continue
        ids = np.array(draft.ids)
        played = ids[np.flatnonzero(vocab.CHORD.mask(ids))[-1] + 1 :] if draft.new_bars else ids[:0]
        played = played[~(vocab.TS.mask(played) | vocab.BPM.mask(played))].tolist()
        logits = torch.zeros(vocab.VOCAB_SIZE)
        logits[bar[len(played)] if played == bar[: len(played)] and played != bar else vocab.CHORD.start] = (
            14.0
        )
        draft.draw(logits)
    return draft.song()


def by_bar(ids: np.ndarray, instrument: int) -> list[tuple[int, ...]]:
    """The onsets and pitches that an instrument plays in each bar."""
    scanned = attributes.scan(ids)
    mine = (scanned.inst == instrument) & (vocab.T.mask(ids) | vocab.P.mask(ids))
    return [tuple(ids[mine & (scanned.bar == bar)]) for bar in range(scanned.bar.max() + 1)]


LOOP = Constraints(signature=vocab.SIGNATURE_INDEX[4, 4], bpm=120, instruments=(0, vocab.DRUMS))


def test_a_model_that_plays_the_same_bar_again_and_again_is_led_away():
    ids = parroted(LOOP)
    assert len(set(by_bar(ids, 0))) == 1  # without the wish
    less = replace(LOOP, repetition_penalties={0: 3.0})
    bars = by_bar(parroted(less), 0)
    runs = [len(set(bars[number : number + 6])) > 1 for number in range(7)]
    assert len(bars) == 12 and all(runs) and bars[0] == bars[1]  # once more is well liked
    assert len(set(by_bar(parroted(less), vocab.DRUMS))) == 1
    assert len(set(by_bar(parroted(replace(less, repetition_penalties={128: 3.0})), vocab.DRUMS))) > 1


def test_the_bars_of_a_prompt_count():
    prompt = parroted(LOOP)
    assert by_bar(parroted(LOOP, prompt), 0)[12] == by_bar(prompt, 0)[0]
    less = replace(LOOP, repetition_penalties={0: 3.0})
    assert by_bar(parroted(less, prompt), 0)[12] != by_bar(prompt, 0)[0]


def random_wishes(random: Random) -> Constraints:
    def perhaps(value, share=0.5):
        return value if random.random() < share else None

    band = tuple(sorted(random.sample(range(129), random.randint(1, 5))))
    scale = perhaps(tuple(sorted(random.sample(range(12), random.randint(1, 8)))))
    lows = {instrument: random.randint(0, 100) for instrument in band if random.random() < 0.5}
    return Constraints(
        signature=perhaps(random.randrange(len(vocab.SIGNATURES))),
        bpm=perhaps(random.randint(vocab.MIN_BPM, vocab.MAX_BPM)),
        instruments=perhaps(band, 0.7),
        chords=perhaps(tuple(random.choices(range(vocab.CHORD.start, vocab.CHORD.stop), k=3))),
        scale=scale,
        strict_scale=scale is not None and random.random() < 0.5,
        registers={instrument: (low, low + 12) for instrument, low in lows.items()},
        densities={instrument: random.uniform(0.5, 30) for instrument in band if random.random() < 0.5},
        repetition_penalties={
            instrument: random.uniform(0, 50) for instrument in band if random.random() < 0.5
        },
    )


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_wished_the_song_is_valid_and_ends_in_time(model, seed):
    random = Random(seed)
    constraints, bars = random_wishes(random), random.randint(1, 4)
    sampling = Sampling(temperature=random.choice([0.0, 0.7, 1.0, 3.0]), top_p=random.choice([0.5, 1.0]))
    ids = generate(model, bars=bars, max_tokens=600, constraints=constraints, sampling=sampling, seed=seed)
    check(ids)
    assert ids[-1] == vocab.EOS
    whole = attributes.scan_bars(ids)
    assert (whole.part == 0).sum() <= bars
    for instrument, (low, high) in constraints.registers.items():
        assert ((low <= played(ids, instrument)) & (played(ids, instrument) <= high)).all()


@pytest.mark.mutations
@pytest.mark.parametrize("seed", range(100, 112))
def test_no_song_of_fifty_bars_misses_one(model, seed):
    random = Random(seed)
    wishes = replace(random_wishes(random), bpm=120)
    band = wishes.instruments or tuple(range(129))
    # Without a few notes a bar the model without training would fill every bar to its end.
    wishes = replace(wishes, densities=dict.fromkeys(band, random.uniform(0.5, 4)))
    ids = generate(model, bars=50, max_tokens=50_000, constraints=wishes, seed=seed)
    check(ids)
    assert (attributes.scan_bars(ids).part == 0).sum() == 50 and ids[-1] == vocab.EOS
