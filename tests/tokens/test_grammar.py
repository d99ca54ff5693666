import numpy as np
import pytest

from meloformer.composer.compose import compose
from meloformer.tokens import vocab
from meloformer.tokens.grammar import Grammar, check
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.songs import example

BEGIN = "BOS BAND_0 BAND_73 CHORD_N TS_4/4 BPM_120"
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
        "BOS BAND_0 CHORD_N TS_4/4 CUT_95 BPM_120 CHORD_N TS_4/4 CHORD_N EOS",
        "BOS BAND_0 CHORD_N TS_24/4 BPM_120 CHORD_N CHORD_N CHORD_N TS_4/4 EOS",
        "BOS BAND_0 CHORD_N TS_24/4 BPM_120 CHORD_N TS_24/4 EOS",  # a bar line inside a bar of three parts
        f"BOS BAND_73 BAND_0 CHORD_N TS_4/4 BPM_120 {NOTE.replace('_0', '_73', 1)} {NOTE} EOS",  # any order
        "BAND_drums CHORD_N TS_3/4 BPM_20 INST_drums",  # a fragment
    ],
)
def test_songs_of_the_grammar_pass(text):
    check(ids(text))


@pytest.mark.parametrize(
    "text, index",
    [
        ("EOS", 0),
        ("BOS EOS", 1),
        ("BOS BAND_0 CHORD_N BPM_120", 3),
        ("BOS BAND_0 CHORD_N TS_4/4 EOS", 4),
        ("BOS BAND_0 CHORD_N TS_4/4 CUT_96", 4),
        (f"{BEGIN} P_60", 6),
        (f"{BEGIN} INST_0 P_60", 7),
        (f"{BEGIN} INST_0 T_96", 7),
        (f"{BEGIN} INST_0 T_0 P_60 V_3", 9),
        (f"{BEGIN} INST_0 T_0 P_60 L_3 EOS", 10),
        (f"{BEGIN} {NOTE} P_60", 11),
        (f"{BEGIN} {NOTE} T_0", 11),
        (f"{BEGIN} {NOTE} P_61 L_24", 12),
        (f"{BEGIN} {NOTE} P_61 V_20", 12),
        (f"{BEGIN} {NOTE} INST_0", 11),
        (f"{BEGIN} {NOTE} INST_drums", 11),
        (f"{BEGIN} CHORD_N TS_4/4", 7),
        (f"{BEGIN} CHORD_N BPM_120", 7),
        (f"{BEGIN} CHORD_N BPM_121 TS_3/4", 8),
        ("BOS BAND_0 CHORD_N TS_4/4 CUT_5 BPM_120 CHORD_N CHORD_N", 7),
        ("BOS BAND_0 CHORD_N TS_4/4 CUT_5 BPM_120 INST_0 T_5", 7),
        (f"{BEGIN} EOS CHORD_N", 7),
        ("PAD", 0),
        ("RESERVED_0", 0),
        ("CHORD_N", 0),
        ("BOS CHORD_N", 1),
        ("BOS BAND_0 BAND_0", 2),
        ("BOS BAND_0 INST_0", 2),
        (f"{BEGIN} INST_1", 6),
        (f"{BEGIN} BAND_1", 6),
        (f"{BEGIN} {NOTE.replace('INST_0', 'INST_73')} INST_0", 11),
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
