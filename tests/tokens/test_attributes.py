import numpy as np
import pytest

from meloformer.composer.compose import compose
from meloformer.tokens import attributes, grammar, vocab
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.songs import example, song

TOKENIZER = HIDTokenizer()


def naive_facts(ids):
    """Token by token, as the design words it."""
    bar, inst, onset_count, rows = -1, 129, 0, []
    for token in ids:
        name = vocab.names()[token]
        family = name.split("_")[0]
        if family == "CHORD":
            bar, inst = bar + 1, 129
        elif family == "EOS":
            inst = 129
        elif family == "INST":
            inst = 128 if name == "INST_drums" else int(name.split("_")[1])
        elif family == "T":
            onset_count += 1
        kind = {"T": 1, "P": 2, "L": 3, "V": 4}.get(family, 0)
        rows.append((max(bar, 0), inst, kind, onset_count - 1 if kind else -1))
    return np.array(rows, dtype=np.int32).T


@pytest.mark.parametrize("seed", range(4))
def test_the_scan_agrees_with_reading_token_by_token(seed):
    ids = TOKENIZER.encode(compose(seed, bars=12))
    scanned = attributes.scan(ids)
    for name, expected in zip(("bar", "inst", "kind", "onset"), naive_facts(ids)):
        found = getattr(scanned, name)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, expected, err_msg=name)


def test_a_packed_row_has_the_facts_of_its_songs():
    songs = [TOKENIZER.encode(compose(seed, bars=3 + seed)) for seed in range(3)]
    songs.append(np.array([vocab.BOS], dtype=np.uint16))
    starts = np.cumsum([0] + [len(s) for s in songs[:-1]])
    packed = attributes.scan(np.concatenate(songs), starts)
    for name in ("bar", "inst", "kind", "onset"):
        apart = np.concatenate([getattr(attributes.scan(s), name) for s in songs])
        np.testing.assert_array_equal(getattr(packed, name), apart, err_msg=name)


def test_an_empty_row_has_no_facts():
    assert len(attributes.scan(np.zeros(0, dtype=np.uint16)).bar) == 0


@pytest.mark.parametrize("make", [example, lambda: compose(3), lambda: compose(8)], ids=["real", "a", "b"])
def test_a_song_cut_at_any_bar_line_goes_on_the_same(make):
    ids = TOKENIZER.encode(make())
    whole = attributes.scan_bars(ids)
    points = attributes.cut_points(ids)
    for point in points[:: max(1, len(points) // 9)]:
        header, skip = attributes.restated(ids, int(point))
        piece = np.concatenate((header, ids[point + skip :]))
        grammar.check(piece)
        rest = attributes.scan_bars(piece)
        for name in ("chord", "signature", "part", "steps", "bpm"):
            np.testing.assert_array_equal(getattr(rest, name), getattr(whole, name)[-len(rest.token) :])


def test_a_bar_of_many_quarters_is_cut_only_at_its_bar_line():
    ids = TOKENIZER.encode(song([(0, 60, 0, 24), (0, 62, 24 * 40, 24 * 41)], signatures=[(20, 4, 0)]))
    bars = attributes.scan_bars(ids)
    assert bars.steps.tolist() == [192, 192, 96, 192, 192, 96, 192]
    assert bars.part.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert attributes.cut_points(ids).tolist() == bars.token[[0, 3, 6]].tolist()
