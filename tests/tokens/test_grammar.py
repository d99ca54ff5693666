import numpy as np
import pytest

from meloformer.composer.compose import compose
from meloformer.tokens import vocab
from meloformer.tokens.grammar import Grammar, check
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.songs import example

BEGIN = "BOS CHORD_N TS_4/4 BPM_120"
NOTE = "INST_0 T_0 P_60 L_24 V_20"


def ids(text):
    return [vocab.ids_by_name()[name] for name in text.split()]


@pytest.mark.parametrize(
    "text",
    [
        f"{BEGIN} EOS",
        f"{BEGIN} {NOTE} EOS",
        f"{BEGIN} {NOTE} P_64 P_67 L_12 V_3 T_5 P_60 EOS",
        f"{BEGIN} CHORD_N CHORD_C:maj {NOTE} INST_73 T_191 P_0 L_1 V_0".replace("4/4", "8/4") + " EOS",
        "BOS CHORD_N TS_4/4 CUT_95 BPM_120 CHORD_N TS_4/4 CHORD_N EOS",
        "BOS CHORD_N TS_24/4 BPM_120 CHORD_N CHORD_N CHORD_N TS_4/4 EOS",
        "BOS CHORD_N TS_24/4 BPM_120 CHORD_N TS_24/4 EOS",  # a new bar line inside a bar of three parts
        "CHORD_N TS_3/4 BPM_20 INST_drums",  # a fragment
    ],
)
def test_songs_of_the_grammar_pass(text):
    check(ids(text))


@pytest.mark.parametrize(
    "text, index",
    [
        ("EOS", 0),
        ("BOS EOS", 1),
        ("BOS CHORD_N BPM_120", 2),
        ("BOS CHORD_N TS_4/4 EOS", 3),
        ("BOS CHORD_N TS_4/4 CUT_96", 3),
        (f"{BEGIN} P_60", 4),
        (f"{BEGIN} INST_0 P_60", 5),
        (f"{BEGIN} INST_0 T_96", 5),
        (f"{BEGIN} INST_0 T_0 P_60 V_3", 7),
        (f"{BEGIN} INST_0 T_0 P_60 L_3 EOS", 8),
        (f"{BEGIN} {NOTE} P_60", 9),
        (f"{BEGIN} {NOTE} T_0", 9),
        (f"{BEGIN} {NOTE} P_61 L_24", 10),
        (f"{BEGIN} {NOTE} P_61 V_20", 10),
        (f"{BEGIN} {NOTE} INST_0", 9),
        (f"{BEGIN} {NOTE} INST_drums", 9),
        (f"{BEGIN} CHORD_N TS_4/4", 5),
        (f"{BEGIN} CHORD_N BPM_120", 5),
        (f"{BEGIN} CHORD_N BPM_121 TS_3/4", 6),
        ("BOS CHORD_N TS_4/4 CUT_5 BPM_120 CHORD_N CHORD_N", 6),
        ("BOS CHORD_N TS_4/4 CUT_5 BPM_120 INST_0 T_5", 6),
        (f"{BEGIN} EOS CHORD_N", 5),
        ("PAD", 0),
    ],
)
def test_what_breaks_the_grammar_is_named(text, index):
    with pytest.raises(ValueError, match=rf"^token {index}: .* may not follow"):
        check(ids(text))


def test_an_id_outside_the_vocabulary_is_named():
    with pytest.raises(ValueError, match="id 60000 may not follow"):
        check([vocab.BOS, 60000])


def test_encoded_songs_pass():
    tokenizer = HIDTokenizer()
    check(tokenizer.encode(example()))
    for seed in range(10):
        check(tokenizer.encode(compose(seed, bars=24)))


@pytest.mark.parametrize("seed", range(20))
def test_any_walk_through_the_mask_is_a_song_that_decodes(seed):
    rng = np.random.default_rng(seed)
    state, walk = Grammar(), [vocab.BOS]
    state.push(vocab.BOS)
    while len(walk) < 400 or not state.bar_complete:
        mask = state.allowed()
        mask[vocab.EOS] = False
        # Rare families must be met often enough to count: draw the family first.
        families = [f for f in vocab.FAMILIES if mask[f.start : f.stop].any()]
        family = families[rng.integers(len(families))]
        token = family.start + int(rng.choice(np.flatnonzero(mask[family.start : family.stop])))
        state.push(token)
        walk.append(token)
    state.push(vocab.EOS)
    assert not state.allowed().any()
    midi = HIDTokenizer().decode([*walk, vocab.EOS])
    assert len(midi.markers) == sum(token in vocab.CHORD for token in walk)
