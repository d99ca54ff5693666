"""The fast check of whole songs says what `grammar.check` says, token by token."""

import numpy as np
import pytest

from meloformer.tokens import vocab
from meloformer.tokens.grammar import Grammar, check
from meloformer.tokens.grammar_scan import broken_songs


def together(songs: list[np.ndarray]) -> np.ndarray:
    lengths = [len(ids) for ids in songs]
    return broken_songs(np.concatenate(songs), np.cumsum([0, *lengths[:-1]]))


def by_the_grammar(ids: np.ndarray) -> bool:
    try:
        check(ids)
    except ValueError:
        return True
    return ids[0] != vocab.BOS or ids[-1] != vocab.EOS


def walk(generator: np.random.Generator, length: int) -> np.ndarray:
    """A random song of the grammar of about that length, all of whose families are about as frequent."""
    grammar, ids = Grammar(), [vocab.BOS]
    grammar.push(vocab.BOS)
    while ids[-1] != vocab.EOS:
        ranges = [found for found in grammar.allowed_ranges() if found[0] < found[1]]
        may_end = any(low <= vocab.EOS < high for low, high in ranges)
        token = int(generator.integers(*ranges[generator.integers(len(ranges))]))
        if may_end and len(ids) >= length:
            token = vocab.EOS
        elif token == vocab.EOS:
            continue
        grammar.push(token)
        ids.append(token)
    return np.array(ids, np.uint16)


def put(ids, at, generator):
    ids[at] = generator.integers(vocab.VOCAB_SIZE + 5)
    return ids


def nudge(ids, at, generator):
    ids[at] = max(0, int(ids[at]) + int(generator.integers(-2, 3)))
    return ids


def insert_again(ids, at, generator):
    return np.insert(ids, at, ids[generator.integers(len(ids))])


def swap(ids, at, generator):
    other = generator.integers(len(ids))
    ids[at], ids[other] = ids[other], ids[at]
    return ids


def restate(ids, at, generator):
    """State the time signature in force at a bar at or after the place; it is wrong at a bar line."""
    bars = np.flatnonzero(vocab.CHORD.mask(ids))
    bar = bars[min(np.searchsorted(bars, at), len(bars) - 1)]
    signatures = np.flatnonzero(vocab.TS.mask(ids[: bar + 1]))
    return np.insert(ids, bar + 1, ids[signatures[-1]]) if len(signatures) else ids[:-1]


CHANGES = {
    "put": put,
    "nudge": nudge,
    "insert": insert_again,
    "swap": swap,
    "restate": restate,
    "delete": lambda ids, at, _: np.delete(ids, at),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_broken_song_is_found_and_its_neighbours_are_not(change):
    generator = np.random.default_rng(list(CHANGES).index(change))
    told = []
    for _ in range(250):
        songs = [walk(generator, int(generator.integers(5, 80))) for _ in range(4)]
        for i in (0, 2):
            songs[i] = CHANGES[change](songs[i], generator.integers(len(songs[i])), generator)
        expected = [by_the_grammar(ids) for ids in songs]
        assert together(songs).tolist() == expected
        told += [expected[0], expected[2]]
    assert 10 < sum(told) < len(told) - 10  # of both kinds there were enough


def test_songs_of_the_composer_pass(songs):
    assert not together(songs).any()


@pytest.mark.parametrize("ids", [[vocab.BOS], [vocab.EOS], [0], [65535]], ids=str)
def test_a_song_of_one_token_is_broken(ids, songs):
    assert together([songs[0], np.array(ids, np.uint16), songs[1]]).tolist() == [False, True, False]
