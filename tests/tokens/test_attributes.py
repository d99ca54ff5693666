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


def test_band_tokens_are_global_and_of_bar_0():
    ids = TOKENIZER.encode(compose(0, bars=2))
    scanned, at = attributes.scan(ids), vocab.BAND.mask(ids)
    assert at.sum() > 2
    for name, value in (
        ("bar", 0),
        ("inst", vocab.NO_INSTRUMENT),
        ("kind", attributes.STRUCTURAL),
        ("onset", -1),
    ):
        assert (getattr(scanned, name)[at] == value).all()


def test_instruments_join_a_band_in_its_order():
    ids = TOKENIZER.encode(compose(0, bars=2))
    band = attributes.band(ids).tolist()
    added = attributes.with_instruments(ids, [127, band[0], 41])
    grammar.check(added)
    wanted = sorted({*band, 127, 41}, key=lambda inst: vocab.INSTRUMENT_RANK[inst])
    assert attributes.band(added).tolist() == wanted
    np.testing.assert_array_equal(added[len(wanted) + 1 :], ids[len(band) + 1 :])
    np.testing.assert_array_equal(attributes.with_instruments(ids, band), ids)
    turned = np.concatenate((ids[:1], ids[1 : 1 + len(band)][::-1], ids[1 + len(band) :]))
    assert sorted(attributes.band(attributes.with_instruments(turned, [127])).tolist()) == sorted(
        [*band, 127]
    )


def test_what_follows_a_token_changes_none_of_its_attributes():
    ids = TOKENIZER.encode(compose(1, bars=4))
    whole = vars(attributes.scan(ids))
    for end in range(1, len(ids), 7):
        for name, values in vars(attributes.scan(ids[:end])).items():
            np.testing.assert_array_equal(values, whole[name][:end], err_msg=name)


def test_an_empty_row_has_no_facts():
    assert len(attributes.scan(np.zeros(0, dtype=np.uint16)).bar) == 0


@pytest.mark.parametrize("dtype", [np.uint16, np.int64])
def test_every_id_has_its_kind(dtype):
    ids = np.arange(vocab.VOCAB_SIZE, dtype=dtype)
    np.testing.assert_array_equal(attributes.scan(ids).kind, attributes.KIND_OF_ID)


@pytest.mark.parametrize("make", [example, lambda: compose(3), lambda: compose(8)], ids=["real", "a", "b"])
def test_a_song_cut_at_any_bar_line_goes_on_the_same(make):
    ids = TOKENIZER.encode(make())
    whole = attributes.scan_bars(ids)
    points = attributes.cut_points(ids)
    for point in points[:: max(1, len(points) // 9)]:
        header, skip = attributes.restated(ids, int(point))
        piece = np.concatenate((header, ids[point + skip :]))
        grammar.check(piece)
        assert vocab.BOS not in piece
        np.testing.assert_array_equal(attributes.band(piece), attributes.band(ids))
        rest = attributes.scan_bars(piece)
        for name in ("chord", "signature", "part", "steps", "bpm"):
            np.testing.assert_array_equal(getattr(rest, name), getattr(whole, name)[-len(rest.token) :])


def test_a_bar_of_many_quarters_is_cut_only_at_its_bar_line():
    ids = TOKENIZER.encode(song([(0, 60, 0, 24), (0, 62, 24 * 40, 24 * 41)], signatures=[(20, 4, 0)]))
    bars = attributes.scan_bars(ids)
    assert bars.steps.tolist() == [192, 192, 96, 192, 192, 96, 192]
    assert bars.part.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert attributes.cut_points(ids).tolist() == bars.token[[0, 3, 6]].tolist()
