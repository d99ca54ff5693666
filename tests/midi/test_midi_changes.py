"""Tempi, time signatures and the length of a tick, as the reader gives them."""

import pytest

from meloformer.midi import reader as midi_reader
from meloformer.midi.reader import read_midi, read_midi_with_mends

from helpers import smf_bytes as smf
from helpers.midi_content import NOTE, notes, signatures, tempi
from helpers.smf_bytes import off, on, signature, song, tempo, track

# ---- time signatures ----


@pytest.mark.parametrize(
    ("events", "expected", "mends"),
    [
        pytest.param([], [], 0, id="none"),
        pytest.param([signature(480, 3, 2)], [(480, 3, 4)], 0, id="late"),
        pytest.param(
            [signature(0, 6, 3), signature(100, 4, 2)], [(0, 6, 8), (100, 4, 4)], 0, id="inside_a_bar"
        ),
        pytest.param([signature(0, 6, 3), signature(0, 4, 2)], [(0, 4, 4)], 0, id="last_on_a_tick_wins"),
        pytest.param([signature(0, 0, 2)], [], 1, id="0/4"),
        pytest.param([signature(0, 3, 2), signature(9, 0, 2)], [(0, 3, 4)], 1, id="0/4_keeps_the_one_before"),
        pytest.param([signature(0, 255, 0)], [(0, 255, 1)], 0, id="255/1"),
        pytest.param([signature(0, 5, 7)], [(0, 5, 128)], 0, id="5/128"),
        pytest.param([signature(0, 5, 8)], [], 1, id="5/256"),
        pytest.param([signature(0, 5, 255)], [], 1, id="5/2^255"),
        pytest.param([smf.meta(0, 0x58, b"\3\2")], [(0, 3, 4)], 1, id="two_bytes"),
        pytest.param([smf.meta(0, 0x58, b"\3")], [], 1, id="one_byte"),
        pytest.param([smf.meta(0, 0x58, b"\0\2")], [], 1, id="two_bytes_0/4"),
        pytest.param([smf.meta(0, 0x58, b"\3\2" + bytes(300))], [(0, 3, 4)], 0, id="302_bytes"),
    ],
)
def test_time_signatures(events, expected, mends):
    midi, found = read_midi_with_mends(song(track(*events, NOTE)))
    assert signatures(midi) == expected
    assert dict(found) == ({"bad_time_signature": mends} if mends else {})


def test_changes_of_all_tracks_are_in_time_order():
    data = song(
        track(signature(960, 3, 2), tempo(0, 400_000), NOTE),
        track(signature(0, 2, 2), tempo(480, 300_000), signature(480, 5, 2)),
    )
    midi = read_midi(data)
    assert signatures(midi) == [(0, 2, 4), (960, 5, 4)]
    assert tempi(midi) == [(0, 120.0), (480, 200.0), (960, 150.0)]


# ---- tempo and ticks ----


@pytest.mark.parametrize(
    ("events", "expected", "mends"),
    [
        pytest.param([], [(0, 120.0)], 0, id="none"),
        pytest.param([tempo(0, 400_000)], [(0, 150.0)], 0, id="one"),
        pytest.param([tempo(0, 400_000), tempo(0, 300_000)], [(0, 200.0)], 0, id="last_on_a_tick_wins"),
        pytest.param([tempo(0, 400_000), tempo(9, 400_000)], [(0, 150.0)], 0, id="restated"),
        pytest.param([tempo(0, 0)], [(0, 120.0)], 1, id="0"),
        pytest.param([tempo(0, 400_000), tempo(9, 0)], [(0, 150.0)], 1, id="0_keeps_the_one_before"),
        pytest.param([tempo(0, 59_999)], [(0, 1000.0)], 1, id="above_1000_bpm"),
        pytest.param([tempo(0, 60_000)], [(0, 1000.0)], 0, id="1000_bpm"),
        pytest.param([tempo(0, 2**24 - 1)], [(0, 3.576)], 0, id="slowest"),
        pytest.param([smf.meta(0, 0x51, b"\0\6\x1a\x80")], [(0, 150.0)], 1, id="32_bits"),
        pytest.param([smf.meta(0, 0x51, b"\6\x1a\x80\0")], [(0, 150.0)], 0, id="a_byte_behind"),
        pytest.param([smf.meta(0, 0x51, b"\7")], [(0, 120.0)], 1, id="one_byte"),
    ],
)
def test_tempi(events, expected, mends):
    midi, found = read_midi_with_mends(song(track(*events, NOTE)))
    assert tempi(midi) == expected
    assert dict(found) == ({"bad_tempo": mends} if mends else {})


@pytest.mark.parametrize("ticks_per_frame", [1, 2, 4, 40, 80, 100, 255])
@pytest.mark.parametrize(("frames", "rate"), [(24, 24), (25, 25), (29, 30 / 1.001), (30, 30)])
def test_smpte_ticks_keep_their_seconds(frames, rate, ticks_per_frame):
    division = (256 - frames) << 8 | ticks_per_frame
    data = song(track(tempo(0, 123_456), on(1000, 60), off(500, 60)), division=division)
    midi, mends = read_midi_with_mends(data)
    assert dict(mends) == {"smpte": 1}
    assert notes(midi) == [(0, False, 60, 1000, 1500, 64)]
    assert len(midi.tempo_changes) == 1
    seconds_per_tick = 60 / midi.tempo_changes[0].tempo / midi.ticks_per_beat
    assert seconds_per_tick * rate * ticks_per_frame == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("division", [1, 96, 480, 32767])
def test_division(division):
    assert read_midi(song(track(NOTE), division=division)).ticks_per_beat == division


def test_the_last_quarter_allowed():
    end = 480 * midi_reader.MAX_QUARTERS
    midi = read_midi(song(track(on(end, 60), off(2**28 - 1, 60))))
    assert notes(midi) == [(0, False, 60, end, end + 480, 64)]
