"""Which note ends where, and what plays it: every odd case has one exact outcome."""

import pytest

from meloformer.midi.reader import read_midi

from helpers import smf_bytes as smf
from helpers.midi_content import C4, NOTE, assert_reads_as
from helpers.smf_bytes import control, gs_rhythm, off, on, program, song, sysex, track

XG = sysex(b"\x43\x10\x4c\0\0\x7e\0")

# id -> bytes, expected notes, expected mends
FILES = {
    # notes
    "a_strike_ends_the_older_note": (
        song(track(on(0, 60, 10), on(10, 60, 20), off(10, 60), off(20, 60))),
        [(0, False, 60, 0, 10, 10), (0, False, 60, 10, 20, 20)],
        {"struck_again": 1},
    ),
    "struck_twice_one_off": (
        song(track(on(0, 60), on(480, 60), off(480, 60), end=6720)),
        [(0, False, 60, 0, 480, 64), (0, False, 60, 480, 960, 64)],
        {"struck_again": 1},
    ),
    "a_lost_off_stretches_no_later_note": (
        song(track(on(0, 60), on(960, 60), *[off(240, 60) + on(720, 60)] * 3, off(240, 60))),
        [(0, False, 60, 0, 960, 64), *((0, False, 60, t, t + 240, 64) for t in (960, 1920, 2880, 3840))],
        {"struck_again": 1},
    ),
    "overlap_on_one_tick": (
        song(track(on(0, 60, 20), on(0, 60, 10), off(10, 60), off(10, 60))),
        [(0, False, 60, 0, 10, 10), (0, False, 60, 0, 10, 20)],
        {},
    ),
    "repeat_on_the_tick_of_the_off": (
        song(track(on(0, 60), on(10, 60, 65), off(0, 60), off(10, 60))),
        [(0, False, 60, 0, 10, 64), (0, False, 60, 10, 20, 65)],
        {},
    ),
    "nested_in_two_tracks": (
        song(track(on(0, 60), off(100, 60)), track(on(10, 60, 65), off(10, 60))),
        [(0, False, 60, 0, 100, 64), (0, False, 60, 10, 20, 65)],
        {},
    ),
    "zero_length": (song(track(on(5, 60), off(0, 60))), [(0, False, 60, 5, 6, 64)], {"zero_length": 1}),
    "unclosed": (song(track(on(5, 60), end=30)), [(0, False, 60, 5, 35, 64)], {"unclosed": 1}),
    "unclosed_at_the_end_mark": (song(track(on(5, 60))), [(0, False, 60, 5, 6, 64)], {"unclosed": 1}),
    "struck_again_and_closed": (
        song(track(on(0, 60), on(10, 60, 65), off(10, 60), end=10)),
        [(0, False, 60, 0, 10, 64), (0, False, 60, 10, 20, 65)],
        {"struck_again": 1},
    ),
    "stray_off": (song(track(off(0, 60), NOTE, off(0, 61))), [C4], {}),
    "off_in_another_track": (
        song(track(on(0, 60), end=5), track(off(480, 60))),
        [C4],
        {"other_track_off": 1},
    ),
    "off_in_an_earlier_track": (
        song(track(off(480, 60)), track(on(0, 60), end=5)),
        [C4],
        {"other_track_off": 1},
    ),
    "off_of_another_channel": (
        song(track(on(0, 60), end=5), track(off(480, 60, 1))),
        [(0, False, 60, 0, 5, 64)],
        {"unclosed": 1},
    ),
    "off_on_the_tick_of_an_onset_elsewhere": (
        song(track(on(9, 60), end=5), track(off(9, 60))),
        [(0, False, 60, 9, 14, 64)],
        {"unclosed": 1},
    ),
    "off_in_another_track_ends_the_newest": (
        song(track(on(10, 60), end=5), track(on(0, 60), end=5), track(off(20, 60))),
        [(0, False, 60, 0, 5, 64), (0, False, 60, 10, 20, 64)],
        {"other_track_off": 1, "unclosed": 1},
    ),
    "offs_in_two_other_tracks": (
        song(track(on(0, 60), on(40, 60, 65)), track(off(50, 60)), track(off(30, 60))),
        [(0, False, 60, 0, 30, 64), (0, False, 60, 40, 50, 65)],
        {"other_track_off": 2},
    ),
    "offs_in_another_track_cross": (
        song(track(on(0, 60), on(10, 60, 65), off(90, 60)), track(off(50, 60))),
        [(0, False, 60, 0, 10, 64), (0, False, 60, 10, 100, 65)],
        {"struck_again": 1},
    ),
    "off_in_another_track_before_an_own_one": (
        song(track(on(0, 60), on(96, 60, 65), off(96, 60)), track(off(48, 60))),
        [(0, False, 60, 0, 48, 64), (0, False, 60, 96, 192, 65)],
        {"other_track_off": 1},
    ),
    "spare_off_elsewhere_ends_no_more_notes": (
        song(track(on(0, 60), off(100, 60), on(100, 60, 65), end=9), track(off(50, 60))),
        [(0, False, 60, 0, 100, 64), (0, False, 60, 200, 209, 65)],
        {"unclosed": 1},
    ),
    "complete_tracks_lend_only_spare_offs": (
        song(track(on(0, 60, 65), end=5), track(on(10, 60), off(100, 60), off(100, 60))),
        [(0, False, 60, 0, 210, 65), (0, False, 60, 10, 110, 64)],
        {"other_track_off": 1},
    ),
    "a_spare_off_elsewhere_ends_no_good_note": (
        song(
            track(on(0, 60), off(40, 60), on(40, 60), end=10),
            track(on(10, 60, 65), off(10, 60), off(0, 60), on(200, 60, 65), end=10),
        ),
        [
            *((0, False, 60, start, end, 64) for start, end in ((0, 40), (80, 90))),
            *((0, False, 60, start, end, 65) for start, end in ((10, 20), (220, 230))),
        ],
        {"unclosed": 2},
    ),
    "unisons_that_end_together_take_one_off": (
        song(track(on(0, 60, 10), on(0, 60, 20)), track(off(50, 60))),
        [(0, False, 60, 0, 50, 10), (0, False, 60, 0, 50, 20)],
        {"other_track_off": 2},
    ),
    "unisons_struck_again_before_their_offs": (
        song(
            track(*[on(0, 60)] * 2, on(10, 60, 9), on(0, 60, 9), *[off(0, 60)] * 2, off(10, 60), off(0, 60))
        ),
        [*[(0, False, 60, 0, 10, 64)] * 2, *[(0, False, 60, 10, 20, 9)] * 2],
        {},
    ),
    "an_old_strike_is_not_taken_for_one_of_this_tick": (
        song(
            track(
                *(on(0, 60), on(10, 60), on(0, 60), off(10, 60), on(0, 60, 9), off(0, 60)),
                off(10, 60),
            )
        ),
        [(0, False, 60, 0, 10, 64), *[(0, False, 60, 10, 20, 64)] * 2, (0, False, 60, 20, 30, 9)],
        {"struck_again": 1},
    ),
    "unison_of_which_one_is_struck_again": (
        song(track(on(0, 60), on(0, 60), off(10, 60), on(0, 60, 9), off(0, 60), off(10, 60))),
        [*[(0, False, 60, 0, 10, 64)] * 2, (0, False, 60, 10, 20, 9)],
        {},
    ),
    **{
        f"drums_that_controller_{number}_ends": (
            song(track(on(0, 36, 64, 9), on(480, 38, 64, 9), control(9000, number, channel=9))),
            [(0, True, 36, 0, 120, 64), (0, True, 38, 480, 600, 64)],
            {"drum_without_off": 2},
        )
        for number in (120, 123)
    },
    "drums_without_offs": (
        song(track(on(0, 36, 64, 9), on(480, 36, 64, 9), on(60, 36, 64, 9), end=30_000)),
        [(0, True, 36, 0, 120, 64), (0, True, 36, 480, 540, 64), (0, True, 36, 540, 660, 64)],
        {"drum_without_off": 3},
    ),
    **{
        f"controller_{number}_ends_notes": (
            song(track(on(0, 60), on(0, 64, 64, 1), control(480, number), off(480, 64, 1), end=960)),
            [(0, False, 60, 0, 480, 64), (0, False, 64, 0, 960, 64)],
            {},
        )
        for number in (120, 123, 124, 125, 126, 127)
    },
    "controller_121_ends_none": (song(track(on(0, 60), control(240, 121), off(240, 60))), [C4], {}),
    # programs
    "program_in_another_track": (
        song(track(program(0, 40)), track(NOTE)),
        [(40, *C4[1:])],
        {"channel_program": 1},
    ),
    "program_in_another_track_is_later": (song(track(program(1, 40)), track(NOTE)), [C4], {}),
    "program_of_the_track_first": (
        song(track(program(0, 40)), track(program(0, 41), NOTE)),
        [(41, *C4[1:])],
        {},
    ),
    "program_after_the_onset_on_its_tick": (
        song(track(on(0, 60), program(0, 9), off(480, 60))),
        [(9, *C4[1:])],
        {"channel_program": 1},
    ),
    "program_between_notes": (
        song(track(program(0, 1), NOTE, program(0, 2), NOTE)),
        [(1, *C4[1:]), (2, False, 60, 480, 960, 64)],
        {},
    ),
    "program_inside_a_note": (
        song(track(program(0, 1), on(0, 60), program(240, 2), off(240, 60))),
        [(1, *C4[1:])],
        {},
    ),
    "program_127": (song(track(program(0, 127), NOTE)), [(127, *C4[1:])], {}),
    "two_ports": (
        song(
            track(smf.meta(0, 0x21, b"\0"), program(0, 33), on(0, 60), off(480, 60)),
            track(smf.meta(0, 0x21, b"\1"), on(0, 60), off(240, 60)),
        ),
        [(0, False, 60, 0, 240, 64), (33, *C4[1:])],
        {},
    ),
    "off_on_another_port": (
        song(track(smf.meta(0, 0x21, b"\1"), on(0, 60), end=480), track(off(240, 60))),
        [C4],
        {"unclosed": 1},
    ),
    "drums_on_channel_10_of_port_2": (
        song(track(smf.meta(0, 0x21, b"\1"), on(0, 36, 64, 9), off(480, 36, 9))),
        [(0, True, 36, 0, 480, 64)],
        {},
    ),
    "xg_drums": (song(track(XG, control(0, 0, 127), program(0, 1), NOTE)), [(1, True, *C4[2:])], {}),
    "bank_127_without_xg": (song(track(control(0, 0, 127), program(0, 1), NOTE)), [(1, *C4[1:])], {}),
    "gm2_drums": (
        song(track(sysex(b"\x7e\x7f\x09\x03"), control(0, 0, 120), program(0, 1), NOTE)),
        [(1, True, *C4[2:])],
        {},
    ),
    "gs_drums_on_channel_11": (
        song(track(gs_rhythm(0x1A, 1), on(0, 60, 64, 10), off(480, 60, 10))),
        [(0, True, *C4[2:])],
        {},
    ),
    "gs_drums_with_a_wrong_checksum": (
        song(track(gs_rhythm(0x11, 2, checksum=0), NOTE)),
        [(0, True, *C4[2:])],
        {},
    ),
    "gs_melody_on_channel_10": (
        song(track(gs_rhythm(0x10, 0), on(0, 60, 64, 9), off(480, 60, 9))),
        [C4],
        {},
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_outcome(name):
    assert_reads_as(*FILES[name])


def test_programs_are_plain_integers():
    midi = read_midi(song(track(program(0, 127), NOTE)))
    assert [type(instrument.program) for instrument in midi.instruments] == [int]
