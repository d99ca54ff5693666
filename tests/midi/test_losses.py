"""What tokens cannot say of a file, or say at great length, is counted."""

import numpy as np
import pytest

from meloformer.midi.reader import read_midi, read_midi_with_mends, read_notes
from meloformer.tokens import score, vocab
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers.smf_bytes import control, off, on, song, tempo, track

QUARTER, BAR = 480, 4 * 480
NOTE = on(0, 60) + off(QUARTER, 60)
LONGEST = int(vocab.MAX_NOTE_STEPS) * QUARTER // vocab.STEPS_PER_QUARTER


def too_fast() -> int:
    return int(60e6 / (vocab.MAX_BPM + 5))


@pytest.mark.parametrize(
    ("data", "codes"),
    [
        pytest.param(song(track(NOTE)), set(), id="nothing"),
        pytest.param(song(track(tempo(0, too_fast()), NOTE)), {"tempo_clipped"}, id="fast"),
        pytest.param(song(track(on(0, 60), off(LONGEST, 60))), set(), id="longest_note"),
        pytest.param(song(track(on(0, 60), off(LONGEST + 1, 60))), {"note_struck_on"}, id="note_too_long"),
        pytest.param(song(track(NOTE, on(9 * BAR - QUARTER, 60), off(9, 60))), set(), id="8_empty_bars"),
        pytest.param(
            song(track(NOTE, on(10 * BAR - QUARTER, 60), off(9, 60))), {"long_silence"}, id="9_empty_bars"
        ),
        pytest.param(song(track(on(9 * BAR, 60), off(9, 60))), {"long_silence"}, id="9_empty_bars_in_front"),
    ],
)
def test_codes(data, codes):
    assert HIDTokenizer().encode_with_mends(data)[1] == codes


PEDALLED = song(
    track(
        control(0, 64, 127),
        *(on(QUARTER // 4 * (k > 0), 60 + 4 * k) + off(QUARTER // 4, 60 + 4 * k) for k in range(3)),
        control(2 * QUARTER, 64, 0),
        on(0, 60),
        off(QUARTER, 60),
    )
)


def test_pedal_holds_notes_until_it_is_up():
    up = 3 * QUARTER + QUARTER // 4

    def ends(midi):
        return sorted((n.start, n.end) for i in midi.instruments for n in i.notes)

    plain, held = ends(read_midi(PEDALLED)), ends(read_midi(PEDALLED, sustain=True))
    assert [end - start for start, end in plain] == [120, 120, 120, 480]
    assert [end for _, end in held] == [up, up, up, up + QUARTER]


def test_pedal_holds_a_note_no_longer_than_to_its_next_strike():
    data = song(track(control(0, 64, 64), NOTE, on(QUARTER, 60), off(QUARTER, 60), control(QUARTER, 64, 63)))
    (instrument,) = read_midi(data, sustain=True).instruments
    assert [(n.start, n.end) for n in instrument.notes] == [(0, 960), (960, 1920)]


def test_all_sound_off_ends_what_is_held_and_leaves_the_pedal_down():
    half = QUARTER // 2
    first, second = on(0, 60) + off(half, 60), on(half, 62) + off(half, 62)
    data = song(track(control(0, 64, 127), first, control(0, 120), second, control(QUARTER, 64, 0)))
    (instrument,) = read_midi(data, sustain=True).instruments
    assert [(n.start, n.end) for n in instrument.notes] == [(0, half), (QUARTER, QUARTER + half + QUARTER)]


@pytest.mark.parametrize("sustain", [False, True])
def test_objects_and_arrays_say_the_same(sustain):
    midi, mends = read_midi_with_mends(PEDALLED, sustain=sustain)
    _, notes, found = read_notes(PEDALLED, sustain=sustain)
    assert found == mends
    assert np.array_equal(score.notes_of(midi), notes)
    assert (
        HIDTokenizer().encode(midi).tobytes()
        == HIDTokenizer().encode_with_mends(PEDALLED, sustain=sustain)[0].tobytes()
    )
