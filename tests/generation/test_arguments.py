"""What the flags of generate stand for, and what is said of those that cannot be read."""

import pytest

from meloformer import cli
from meloformer.errors import UserError
from meloformer.generation.arguments import (
    add_wishes,
    parse_instruments,
    read_constraints,
    read_sampling,
)
from meloformer.generation.constraints import Constraints
from meloformer.generation.sampling import DEFAULT_SAMPLING, Sampling
from meloformer.tokens import vocab


def parse(*argv):
    parser = cli.Parser()
    add_wishes(parser)
    parser.set_defaults(given=None)
    return parser.parse_args(argv)


def test_without_flags_nothing_is_wished():
    assert read_constraints(parse()) == Constraints() and read_sampling(parse()) == DEFAULT_SAMPLING


def test_every_wish_is_read():
    args = parse(
        *("--tempo", "96", "--time_signature", "3/4", "--instruments", "drums, bass, Grand Piano, 25"),
        *("--chords", "C Am", "--key", "C major", "--strict_key"),
        *("--register", "bass E1-G3, grand piano 48-84", "--density", "drums 16, 25 2.5"),
        *("--repetition_penalty", "bass 2, drums 0.5"),
    )
    am = vocab.CHORD.start + vocab.CHORD.labels.index("A:min")
    assert read_constraints(args) == Constraints(
        signature=vocab.SIGNATURE_INDEX[3, 4],
        bpm=96,
        instruments=(0, 25, 33, vocab.DRUMS),
        chords=(vocab.CHORD.start + vocab.CHORD.labels.index("C:maj"), am),
        scale=(0, 2, 4, 5, 7, 9, 11),
        strict_scale=True,
        registers={33: (28, 55), 0: (48, 84)},
        densities={vocab.DRUMS: 16.0, 25: 2.5},
        repetition_penalties={33: 2.0, vocab.DRUMS: 0.5},
    )


def test_every_way_to_draw_is_read():
    args = parse(
        *("--temperature", "0.9", "--top_k", "40", "--top_p", "0.95", "--min_p", "0.02"),
        *("--rhythm_temperature", "0.8", "--chord_temperature", "0"),
    )
    assert read_sampling(args) == Sampling(
        0.9, 40, 0.95, 0.02, {"rhythm": 0.8, "instrument": 0.5, "chord": 0.0}
    )


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--instruments", "drums, basoon"], "'basoon'.*bassoon"),
        (["--instruments", "128"], "'128'"),
        (["--time_signature", "4"], "N/D"),
        (["--chords", "C H"], "'H'"),
        (["--key", "A moll"], "--key"),
        (["--strict_key"], "needs --key"),
        (["--register", "bass"], "'bass' is no instrument, a space and a value"),
        (["--register", "bass G3-E1"], "'G3-E1'"),
        (["--register", "bass 20-200"], "'20-200'"),
        (["--register", "bass 1-2, 33 3-4"], "twice"),
        (["--register", "bass 61-61", "--key", "C", "--strict_key"], "in the scale"),
        (["--density", "drums many"], "'many'"),
        (["--density", "drums 0"], "'0'"),
        (["--instruments", "piano", "--density", "drums 4"], "drums is not one of"),
        (["--instruments", "piano", "--repetition_penalty", "drums 4"], "drums is not one of"),
        (["--repetition_penalty", "much"], "'much' is no number from 0"),
        (["--repetition_penalty", "piano -1"], "'-1' is no number from 0"),
        (["--repetition_penalty", "1,5"], "'1,5' has two numbers for all"),
    ],
)
def test_what_cannot_be_granted_is_told(argv, said):
    with pytest.raises(UserError, match=said):
        read_constraints(parse(*argv))


@pytest.mark.parametrize(
    "text, drums, others",
    [("1.5", None, 1.5), ("1.5, drums 1", 1.0, 1.5), ("drums 1", 1.0, None), ("0", None, None)],
)
def test_a_repetition_penalty_is_for_all_but_the_drums_unless_they_are_named(text, drums, others):
    penalties = read_constraints(
        parse("--repetition_penalty", text, "--instruments", "piano, drums")
    ).repetition_penalties
    assert penalties.get(vocab.DRUMS) == drums
    assert {penalties.get(program) for program in range(128)} == {others}


@pytest.mark.parametrize("text, pitches", [("C4-C4", (60, 60)), ("A0-C8", (21, 108)), ("Cb4-B#4", (59, 72))])
def test_names_of_pitches(text, pitches):
    assert read_constraints(parse("--register", f"piano {text}")).registers == {0: pitches}


@pytest.mark.parametrize(
    "text, expected",
    [("0, 33", (0, 33)), ("drums, Bass", (33, 128)), ("Flute,Grand Piano , flute", (0, 73))],
)
def test_instruments_by_number_and_name(text, expected):
    assert parse_instruments(text) == expected
