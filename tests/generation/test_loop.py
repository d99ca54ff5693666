import numpy as np
import pytest

from benchmarks.fidelity import notes_by_key
from meloformer.composer.compose import compose
from meloformer.generation.loop import context
from meloformer.generation.sampling import Sampling
from meloformer.tokens import attributes, grammar, vocab
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.generated import generate
from helpers.untrained import untrained

TOKENIZER = HIDTokenizer()


@pytest.fixture(scope="module")
def model():
    return untrained()


def bars_of(ids):
    return int(vocab.CHORD.mask(ids).sum())


@pytest.mark.parametrize("seed", range(5))
def test_whatever_an_untrained_model_says_is_a_song(model, seed):
    ids = generate(model, bars=3, max_tokens=300, seed=seed)
    grammar.check(ids)
    assert ids[0] == vocab.BOS and ids[-1] == vocab.EOS
    assert notes_by_key(TOKENIZER.decode(ids))


def test_the_same_seed_gives_the_same_song(model):
    first, again, other = (generate(model, bars=2, max_tokens=120, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_as_many_bars_as_asked_for(model):
    sampling = Sampling(temperature=3.0)  # an untrained model must be shaken to end its bars
    for bars in (1, 2, 5):
        ids = generate(model, bars=bars, max_tokens=5000, sampling=sampling)
        assert len(attributes.cut_points(ids)) == bars


def test_the_last_token_allowed_ends_the_song_at_a_complete_note(model):
    for limit in range(20, 40):
        ids = generate(model, bars=50, max_tokens=limit)
        grammar.check(ids)
        assert len(ids) <= limit + 2 and ids[-1] == vocab.EOS


def stopped_after(model, tokens, prompt=None):
    """A song of the model, stopped after so many new tokens, and the bars begun by then."""
    seen = []
    ids = generate(
        model,
        prompt,
        bars=50,
        sampling=Sampling(temperature=3.0),
        on_token=lambda *counts: seen.append(counts),
        stop=lambda: len(seen) == tokens,
    )
    assert len(seen) == tokens and seen[-1][0] == tokens
    return ids, seen[-1][1]


def test_a_stopped_song_keeps_its_complete_bars(model):
    prompt = TOKENIZER.encode(compose(1, bars=3))
    whole = generate(model, prompt, bars=3, sampling=Sampling(temperature=3.0))
    lines = attributes.cut_points(whole)[3:]
    begin = len(prompt) - 1
    for cut, bars in ((lines[1] - begin, 0), (lines[1] - begin + 1, 1), (lines[2] - begin + 1, 2)):
        ids, begun = stopped_after(model, int(cut), prompt)
        grammar.check(ids)
        np.testing.assert_array_equal(ids[:-1], whole[: lines[bars]])
        assert len(attributes.cut_points(ids)) == 3 + bars and begun == bars + 1 and ids[-1] == vocab.EOS


def test_a_new_song_stopped_in_its_first_bar_has_none(model):
    ids, begun = stopped_after(model, 6)
    assert begun == 1
    np.testing.assert_array_equal(ids, [vocab.BOS, vocab.EOS])


def test_a_continued_song_keeps_its_beginning(model):
    prompt = TOKENIZER.encode(compose(1, bars=3))
    ids = generate(model, prompt, bars=2, max_tokens=400)
    np.testing.assert_array_equal(ids[: len(prompt) - 1], prompt[:-1])
    assert bars_of(ids) > bars_of(prompt) and ids[len(prompt) - 1] in vocab.CHORD
    grammar.check(ids)


def test_a_long_past_is_left_out_at_a_bar_line():
    ids = TOKENIZER.encode(compose(2, bars=60))[:-1]
    kept = context(ids, 600)
    longest_bar = np.diff(attributes.cut_points(ids)).max()
    band = attributes.band_tokens(ids)
    assert 600 - longest_bar - 4 - len(band) <= len(kept) <= 600
    grammar.check(kept)
    np.testing.assert_array_equal(kept[: len(band)], band)
    assert kept[len(band)] in vocab.CHORD and kept[len(band) + 1] in vocab.TS
    np.testing.assert_array_equal(kept[-90:], ids[-90:])
    assert context(ids, len(ids)) is ids


def test_a_song_longer_than_the_context_goes_on(model):
    prompt = TOKENIZER.encode(compose(2, bars=60))
    ids = generate(model, prompt, bars=2, max_tokens=60, max_context=600)
    grammar.check(ids)
    assert len(ids) > len(prompt)


def test_a_bar_that_outgrows_the_context_ends_the_song(model):
    prompt = TOKENIZER.encode(compose(1, bars=4))
    ids = generate(model, prompt, bars=50, max_tokens=500, max_context=10)
    grammar.check(ids)
    np.testing.assert_array_equal(ids[: len(prompt) - 1], prompt[:-1])
    assert len(ids) < len(prompt) + 60
