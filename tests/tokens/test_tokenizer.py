import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fidelity import measure
from meloformer.composer.compose import compose
from meloformer.errors import MidiError
from meloformer.tokens import attributes, grammar, vocab
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.songs import EXAMPLE, example, song, through_file

TOKENIZER = HIDTokenizer()


def names(midi):
    return [TOKENIZER.token_name(token) for token in TOKENIZER.encode(midi)]


def test_a_small_song_token_by_token():
    midi = song(
        [
            (0, 60, 0, 24, 80),
            (0, 64, 0, 24, 80),
            (0, 67, 24, 36, 80),
            (128, 36, 0, 6, 100),
            (0, 60, 2 * 96, 3 * 96, 40),
        ],
        signatures=[(4, 4, 0), (3, 4, 2 * 96)],
        tempi=[(120, 0), (90, 96)],
    )
    assert (
        names(midi)
        == (
            "BOS BAND_drums BAND_0 CHORD_C:maj TS_4/4 BPM_120 INST_drums T_0 P_36 L_6 V_25 "
            "INST_0 T_0 P_60 L_24 V_20 P_64 T_24 P_67 L_12 "
            "CHORD_N BPM_90 "
            "CHORD_N TS_3/4 INST_0 T_0 P_60 L_96 V_10 CHORD_N EOS"
        ).split()
    )


def test_a_short_bar_says_its_length_and_the_next_states_its_signature():
    midi = song([(0, 60, 0, 24), (0, 60, 200, 220)], signatures=[(4, 4, 0), (4, 4, 50)])
    assert names(midi)[2:5] == ["CHORD_N", "TS_4/4", "CUT_50"]
    again = names(midi).index("CHORD_N", 3)
    assert names(midi)[again + 1] == "TS_4/4"
    assert [ts.time for ts in TOKENIZER.decode(TOKENIZER.encode(midi)).time_signature_changes] == [0, 1000]


def test_decode_gives_each_program_a_track_and_chords_as_markers():
    midi = TOKENIZER.decode(TOKENIZER.encode(song([(40, 60, 0, 9), (128, 36, 0, 9), (0, 64, 0, 9)])))
    assert [(t.program, t.is_drum) for t in midi.instruments] == [(0, True), (0, False), (40, False)]
    assert [m.text for m in midi.markers] == ["C:maj"]


def test_empty_bars_are_kept_and_marked():
    midi = TOKENIZER.decode(TOKENIZER.encode(song([(0, 60, 96 * 3, 96 * 3 + 9), (0, 60, 96 * 6, 96 * 7)])))
    assert [m.time for m in midi.markers] == [480 * 4 * bar for bar in range(7)]


@pytest.mark.parametrize("seed", range(3))
def test_every_listed_instrument_plays_and_every_other_one_is_silent(seed):
    ids = TOKENIZER.encode(compose(seed))
    band = attributes.band(ids)
    playing = set(attributes.scan(ids).inst[vocab.P.mask(ids)].tolist())
    assert set(band.tolist()) == playing and len(band) == len(playing) > 1
    assert (np.diff(vocab.INSTRUMENT_RANK[band]) > 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_band_in_another_order_is_kept_in_tokens_and_tracks(seed):
    midi = compose(seed, bars=8)
    ids = TOKENIZER.encode(midi)
    order = np.random.default_rng(seed).permutation(attributes.band(ids))
    turned = TOKENIZER.encode(midi, band=order)
    grammar.check(turned)
    np.testing.assert_array_equal(attributes.band(turned), order)
    np.testing.assert_array_equal(np.sort(turned), np.sort(ids))
    decoded = TOKENIZER.decode(turned)
    assert [128 if track.is_drum else track.program for track in decoded.instruments] == order.tolist()
    np.testing.assert_array_equal(TOKENIZER.encode(decoded, band=order), turned)
    np.testing.assert_array_equal(TOKENIZER.encode(decoded), ids)


@pytest.mark.parametrize("band", [[0], [0, 128, 128], [0, 128, 129], [-1, 0, 128]])
def test_a_band_that_cannot_be_is_refused(band):
    with pytest.raises(ValueError, match="band"):
        TOKENIZER.encode(song([(0, 60, 0, 9), (128, 36, 0, 9)]), band=band)


def test_a_band_may_list_who_never_plays():
    ids = TOKENIZER.encode(song([(0, 60, 0, 9)]), band=[73, 0])
    grammar.check(ids)
    assert attributes.band(ids).tolist() == [73, 0]
    assert len(TOKENIZER.decode(ids).instruments) == 1


def assert_idempotent(midi):
    ids = TOKENIZER.encode(midi)
    assert ids.dtype == np.uint16
    grammar.check(ids)
    decoded = TOKENIZER.decode(ids)
    np.testing.assert_array_equal(TOKENIZER.encode(decoded), ids)
    np.testing.assert_array_equal(TOKENIZER.encode(through_file(decoded)), ids)


@pytest.mark.parametrize("seed", range(30))
def test_encoding_a_decoded_composed_song_changes_nothing(seed):
    assert_idempotent(compose(seed))


def test_encoding_the_decoded_real_song_changes_nothing():
    assert_idempotent(example())


quarter = 24
signature = st.tuples(
    st.integers(1, 30), st.sampled_from([1, 2, 3, 4, 8, 16, 32, 64]), st.integers(0, 40 * quarter)
)
note = st.tuples(
    st.sampled_from([0, 0, 33, 127, 128]),
    st.integers(58, 62),
    st.integers(0, 40 * quarter),
    st.integers(0, 80 * quarter),
    st.integers(1, 127),
).map(lambda n: (n[0], n[1], n[2], n[2] + n[3], n[4]))
tempo = st.tuples(st.floats(0.5, 1500), st.integers(0, 40 * quarter))


@given(
    st.lists(note, min_size=1, max_size=40),
    st.lists(signature, max_size=4),
    st.lists(tempo, max_size=4),
    st.sampled_from([24, 7, 480]),
)
@settings(max_examples=300, deadline=None)
def test_encoding_any_decoded_song_changes_nothing(notes, signatures, tempi, tpq):
    midi = song(notes, signatures, tempi, tpq)
    assert_idempotent(midi)
    ids = TOKENIZER.encode(midi)
    onsets = np.array([n[2] for n in notes]) * 24 / tpq
    decoded = TOKENIZER.decode(ids)
    found = np.array([n.start for track in decoded.instruments for n in track.notes]) / 20
    assert np.abs(found[:, None] - onsets).min(axis=0).max() <= 0.5


def assert_faithful(midi):
    """The figures that every readable file must keep; as in the design."""
    figures = measure(midi)
    assert figures["onset_f1"] >= 0.96
    assert figures["offset_f1"] >= 0.99
    assert figures["same_bar_lines_and_signatures"]
    assert figures["max_tempo_error_bpm"] <= 1


def test_the_real_song_is_kept():
    assert_faithful(example())


@pytest.mark.parametrize("seed", range(12))
def test_composed_songs_are_kept(seed):
    assert_faithful(compose(seed))


def test_a_long_song_encodes_fast():
    midi = compose(1, bars=400)
    ids = TOKENIZER.encode(midi)
    best = min(_seconds(lambda: TOKENIZER.encode(midi)) for _ in range(3))
    assert best * 20_000 / len(ids) < 0.1


def _seconds(run):
    start = time.process_time()
    run()
    return time.process_time() - start


def test_a_path_and_its_parsed_song_encode_alike(tmp_path):
    compose(5).dump(tmp_path / "song.mid")
    np.testing.assert_array_equal(TOKENIZER.encode(tmp_path / "song.mid"), TOKENIZER.encode(compose(5)))


def test_what_was_mended_in_a_file_is_told():
    assert TOKENIZER.encode_with_mends(EXAMPLE)[1] == {"note_struck_on", "struck_again", "unclosed"}
    assert TOKENIZER.encode_with_mends(example())[1] == frozenset()


def test_a_file_that_is_no_song_gives_its_reason(tmp_path):
    (tmp_path / "x.mid").write_bytes(b"hello")
    with pytest.raises(MidiError) as caught:
        TOKENIZER.encode(tmp_path / "x.mid")
    assert caught.value.reason == "not_midi"


def test_ids_that_are_no_song_are_refused():
    with pytest.raises(ValueError, match="token 1: P_60 may not follow BOS"):
        TOKENIZER.decode([vocab.BOS, vocab.ids_by_name()["P_60"]])


def test_every_beginning_of_a_song_is_decoded_or_refused():
    ids = TOKENIZER.encode(compose(4, bars=3))
    decoded = 0
    for length in range(len(ids) + 1):
        try:
            midi = TOKENIZER.decode(ids[:length])
        except ValueError as error:
            assert "end inside" in str(error)
        else:
            decoded += 1
            assert len(midi.markers) == vocab.CHORD.mask(ids[:length]).sum()
    assert decoded > len(ids) / 4


@pytest.mark.parametrize("ids", [[1.5], [[1, 2]], ["BOS"]], ids=["floats", "two dimensions", "names"])
def test_ids_of_a_wrong_kind_are_refused(ids):
    with pytest.raises(ValueError, match="must be integers"):
        TOKENIZER.decode(ids)


def test_what_is_written_beside_data_fixes_every_id():
    written = json.loads(json.dumps(TOKENIZER.to_json()))
    assert written["fingerprint"] == TOKENIZER.fingerprint == vocab.fingerprint()
    assert written["tokens"] == [TOKENIZER.token_name(i) for i in range(TOKENIZER.vocab_size)]
