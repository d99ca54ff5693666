import numpy as np
import pytest

from meloformer.composer.compose import compose
from meloformer.generation.constraints import Constraints
from meloformer.generation.sampling import Sampling
from meloformer.tokens import attributes, vocab
from meloformer.tokens.grammar import check
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.generated import generate
from helpers.untrained import untrained

TOKENIZER = HIDTokenizer()


@pytest.fixture(scope="module")
def model():
    return untrained()


@pytest.mark.parametrize("prompt_seed", [None, 1, 2])
def test_constraints_hold_from_the_first_new_bar(model, prompt_seed):
    prompt = None if prompt_seed is None else TOKENIZER.encode(compose(prompt_seed, bars=3))
    constraints = Constraints(signature=vocab.SIGNATURE_INDEX[5, 8], bpm=77, instruments=(33, vocab.DRUMS))
    ids = generate(
        model, prompt, bars=3, max_tokens=500, constraints=constraints, sampling=Sampling(temperature=2.0)
    )
    new = ids[0 if prompt is None else len(prompt) - 1 :]
    names = [vocab.names()[token] for token in new]
    start = names.index("TS_5/8")
    assert names[start - 1].startswith("CHORD") and "BPM_77" in names[start : start + 2]
    assert [name for name in names if name.startswith(("TS", "CUT"))] == ["TS_5/8"]
    assert [name for name in names if name.startswith("BPM")] == ["BPM_77"]
    assert {name for name in names if name.startswith("INST")} <= {"INST_33", "INST_drums"}


@pytest.mark.parametrize("seed", range(3))
def test_a_new_song_lists_exactly_the_instruments_asked_for(model, seed):
    constraints = Constraints(instruments=(73, 33, vocab.DRUMS))
    ids = generate(model, bars=2, max_tokens=200, constraints=constraints, seed=seed)
    assert attributes.band(ids).tolist() == [vocab.DRUMS, 33, 73]


def test_a_band_that_has_none_of_the_instruments_is_refused(model):
    prompt = TOKENIZER.encode(compose(1, bars=2))
    stranger = next(i for i in range(128) if i not in attributes.band(prompt))
    constraints = Constraints(instruments=(stranger,))
    with pytest.raises(ValueError, match="none of the instruments"):
        generate(model, prompt, bars=1, constraints=constraints)
    joined = attributes.with_instruments(prompt, [stranger])
    ids = generate(model, joined, bars=1, max_tokens=60, constraints=constraints)
    np.testing.assert_array_equal(ids[: len(joined) - 1], joined[:-1])


def test_bars_in_parts_are_counted_whole_and_not_broken_by_a_constraint(model):
    constraints = Constraints(signature=vocab.SIGNATURE_INDEX[20, 4])
    ids = generate(
        model, bars=2, max_tokens=5000, constraints=constraints, sampling=Sampling(temperature=3.0)
    )
    assert vocab.TS.mask(ids).sum() == 1
    assert int(vocab.CHORD.mask(ids).sum()) == 2 * 3 and len(attributes.cut_points(ids)) == 2


def test_only_what_violates_a_constraint_is_ruled_out():
    assert Constraints().allowed_ids().all()
    waltz = Constraints(signature=vocab.SIGNATURE_INDEX[3, 4], bpm=90, instruments=(0, 33))
    names = {name for name, out in zip(vocab.names(), ~waltz.allowed_ids()) if out}
    assert {name.split("_")[0] for name in names} == {"TS", "CUT", "BPM", "BAND", "INST"}
    assert not names & {"TS_3/4", "BPM_90", "BAND_0", "BAND_33", "INST_0", "INST_33"}


def test_what_is_in_force_is_not_required_again():
    constraints = Constraints(signature=vocab.SIGNATURE_INDEX[4, 4], bpm=100)
    bar, anything = vocab.CHORD.start, np.ones(vocab.VOCAB_SIZE, dtype=bool)
    ids = [vocab.BOS, vocab.BAND.start, bar, vocab.TS.start + vocab.SIGNATURE_INDEX[4, 4]]
    assert constraints.required_id(check(np.array(ids[:3])), anything) == ids[3]
    tempo = vocab.BPM.start + 100 - vocab.MIN_BPM
    assert constraints.required_id(check(np.array(ids)), anything) == tempo
    assert constraints.required_id(check(np.array(ids)), ~anything) is None
    assert constraints.required_id(check(np.array([*ids, tempo])), anything) is None
