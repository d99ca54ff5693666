"""The Python API: songs, bars as they come, and the examples of the documentation."""

import doctest
from pathlib import Path

import numpy as np
import pytest

from meloformer.composer.compose import compose
from meloformer.errors import UserError
from meloformer.generation.constraints import Constraints
from meloformer.generation.decoder import Decoder
from meloformer.generation.generator import Generator
from meloformer.generation.sampling import DEFAULT_SAMPLING, Sampling
from meloformer.tokens import attributes, grammar, vocab
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.generated import generate
from helpers.untrained import save_untrained, untrained

PAGE = Path(__file__).resolve().parents[2] / "docs" / "generation.md"
SHAKEN = Sampling(temperature=3.0)  # an untrained model must be shaken to end its bars


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with a checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    save_untrained(folder / "checkpoints", 1500)
    return folder


@pytest.fixture(scope="module")
def generator(run):
    return Generator.load(run, "cpu")


def test_a_song_of_a_batch_is_the_song_of_its_seed(generator):
    assert generator.max_context == 1500
    songs = generator.generate(num=3, seed=5, bars=2, max_tokens=150)
    assert [song.seed for song in songs] == [5, 6, 7]
    for song in songs:
        alone = generate(untrained(), bars=2, max_tokens=150, seed=song.seed, sampling=DEFAULT_SAMPLING)
        np.testing.assert_array_equal(song.ids, alone)


@pytest.mark.parametrize("with_prompt", [False, True], ids=["new", "continued"])
def test_the_bars_of_a_stream_are_those_of_the_songs(generator, with_prompt):
    prompt = HIDTokenizer().encode(compose(1, bars=2)) if with_prompt else None
    wishes = {"prompt": prompt, "num": 2, "seed": 1, "bars": 3, "max_tokens": 2000, "sampling": SHAKEN}
    songs = generator.generate(**wishes)
    bars = list(generator.stream(**wishes))
    for number, song in enumerate(songs):
        mine = [bar for bar in bars if bar.song == number]
        assert [bar.number for bar in mine] == [0, 1, 2]
        new = np.concatenate([bar.ids for bar in mine])
        np.testing.assert_array_equal(new, song.ids[-len(new) - 1 : -1])
        for bar in mine:
            grammar.check(bar.so_far)
            assert bar.ids[0] in vocab.CHORD
            np.testing.assert_array_equal(bar.so_far[:-1], song.ids[: len(bar.so_far) - 1])
        np.testing.assert_array_equal(mine[-1].so_far, song.ids)


def test_a_stream_that_is_closed_computes_no_more(generator, monkeypatch):
    steps, step = [], Decoder.step
    monkeypatch.setattr(
        Decoder, "step", lambda self, songs, tokens: (steps.append(tokens), step(self, songs, tokens))[1]
    )
    bars = generator.stream(bars=50, max_tokens=100_000, sampling=SHAKEN)
    first = next(bars)
    done = len(steps)
    assert 0 < done <= len(first.so_far)  # the first bar came when it was complete
    bars.close()
    assert len(steps) == done and list(bars) == []


def test_instruments_that_a_prompt_lacks_join_its_band(generator, tmp_path):
    compose(1, bars=2).dump(tmp_path / "prompt.mid")
    prompt = HIDTokenizer().encode(tmp_path / "prompt.mid")
    stranger = next(i for i in range(128) if i not in attributes.band(prompt))
    (song,) = generator.generate(
        Constraints(instruments=(stranger,)), tmp_path / "prompt.mid", bars=1, max_tokens=60
    )
    joined = attributes.with_instruments(prompt, [stranger])
    np.testing.assert_array_equal(song.ids[: len(joined) - 1], joined[:-1])
    song.save(tmp_path / "song.mid")
    written, decoded = (HIDTokenizer().encode(midi) for midi in (tmp_path / "song.mid", song.midi()))
    np.testing.assert_array_equal(written, decoded)


def test_wrong_wishes_are_refused_at_once(generator, tmp_path):
    for call in (generator.generate, generator.stream):
        with pytest.raises(ValueError, match="num must be positive"):
            call(num=0)
        with pytest.raises(ValueError, match="bars must be positive"):
            call(bars=0)
    with pytest.raises(UserError):
        Generator.load(tmp_path)


def test_the_examples_of_the_page_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(run)
    compose(1, bars=4).dump("prompt.mid")
    text = PAGE.read_text(encoding="utf-8")
    examples = doctest.DocTestParser().get_doctest(text, {}, PAGE.name, str(PAGE), 0)
    assert text.count("```python") == 5 and len(examples.examples) > 12
    assert doctest.DocTestRunner().run(examples).failed == 0
    assert (tmp_path / "song.mid").exists()
