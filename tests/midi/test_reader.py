"""The reader: every odd file has one exact outcome, and clean files read as miditoolkit reads them."""

import os
import pickle
import re
import struct
from collections import Counter
from pathlib import Path

import miditoolkit
import pytest
from miditoolkit.midi.utils import example_midi_file

from meloformer.errors import MidiError, UserError
from meloformer.midi import reader as midi_reader
from meloformer.midi.reader import MENDS, REASONS, read_midi, read_midi_with_mends

from helpers import smf_bytes as smf
from helpers.smf_bytes import (
    END,
    chunk,
    control,
    gs_rhythm,
    header,
    off,
    on,
    program,
    signature,
    song,
    sysex,
    tempo,
    track,
)

NOTE = on(0, 60) + off(480, 60)
XG = sysex(b"\x43\x10\x4c\0\0\x7e\0")
# Lengths, delta times and pitches of 10, the byte that a copy in text mode writes as two.
TEN_NOTES = song(*[track(*[on(10, 10), off(10, 10)] * 5)] * 10)
TEN = [(0, False, 10, t, t + 10, 64) for t in range(10, 110, 20)] * 10
C4 = (0, False, 60, 0, 480, 64)  # what NOTE is: program, is_drum, pitch, start, end, velocity


def notes(midi) -> list[tuple]:
    """(program, is_drum, pitch, start, end, velocity), sorted."""
    return sorted(
        (int(i.program), i.is_drum, n.pitch, n.start, n.end, n.velocity)
        for i in midi.instruments
        for n in i.notes
    )


def signatures(midi) -> list[tuple[int, int, int]]:
    return [(s.time, s.numerator, s.denominator) for s in midi.time_signature_changes]


def tempi(midi) -> list[tuple[int, float]]:
    return [(t.time, round(t.tempo, 3)) for t in midi.tempo_changes]


def lying(body: bytes, length: int) -> bytes:
    """A closed track whose chunk gives `length` as its own."""
    return chunk(body + END, length=length)


# id -> bytes, expected notes, expected mends
FILES = {
    "plain": (song(track(NOTE)), [C4], {}),
    "format_0_two_channels": (
        song(
            track(program(0, 5), program(0, 7, 3), on(0, 60), on(0, 62, 64, 3), off(10, 60), off(5, 62, 3)),
            file_format=0,
        ),
        [(5, False, 60, 0, 10, 64), (7, False, 62, 0, 15, 64)],
        {},
    ),
    "velocity_0_is_off": (song(track(on(0, 60), on(480, 60, 0))), [C4], {}),
    "drums_on_channel_10": (song(track(on(0, 36, 64, 9), off(480, 36, 9))), [(0, True, 36, 0, 480, 64)], {}),
    "running_status": (song(track(on(0, 60), b"\x0a\x3c\0")), [(0, False, 60, 0, 10, 64)], {}),
    "running_status_after_meta": (
        song(track(on(0, 60), smf.meta(0, 1, b"text"), b"\x0a\x3c\0")),
        [(0, False, 60, 0, 10, 64)],
        {},
    ),
    "running_status_after_sysex": (
        song(track(on(0, 60), b"\0\xf0\2\x7e\xf7", b"\x0a\x3c\0")),
        [(0, False, 60, 0, 10, 64)],
        {},
    ),
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
        [(0, False, 60, 0, 10, 64), (0, False, 60, 10, 20, 64)],
        {"other_track_off": 1, "struck_again": 1},
    ),
    "offs_in_two_other_tracks": (
        song(track(on(0, 60), on(40, 60, 65)), track(off(50, 60)), track(off(30, 60))),
        [(0, False, 60, 0, 30, 64), (0, False, 60, 40, 50, 65)],
        {"other_track_off": 2},
    ),
    "offs_in_another_track_cross": (
        song(track(on(0, 60), on(10, 60, 65), off(90, 60)), track(off(50, 60))),
        [(0, False, 60, 0, 10, 64), (0, False, 60, 10, 50, 65)],
        {"other_track_off": 1, "struck_again": 1},
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
    # the file around the events
    "riff": (smf.riff(song(track(NOTE))), [C4], {"wrapped": 1}),
    "riff_odd_padding_and_list": (
        smf.riff(song(track(NOTE, smf.meta(0, 1, b"odd"))), b"DISP\3\0\0\0abc\0", b"LIST\4\0\0\0INFO"),
        [C4],
        {"wrapped": 1},
    ),
    "riff_with_a_picture_first": (
        smf.riff(song(track(NOTE)), b"DISP" + struct.pack("<L", 3000) + bytes(3000)),
        [C4],
        {"wrapped": 1},
    ),
    "riff_in_riff": (smf.riff(smf.riff(song(track(NOTE)))), [C4], {"wrapped": 1}),
    "macbinary_header": (bytes(128) + song(track(NOTE)), [C4], {"wrapped": 1}),
    "header_of_8_bytes": (
        struct.pack(">4sLHHHH", b"MThd", 8, 1, 1, 480, 7) + track(NOTE),
        [C4],
        {"bad_header_length": 1},
    ),
    "header_length_damaged": (
        struct.pack(">4sLHHH", b"MThd", 0xFFFFFF06, 1, 1, 480) + track(NOTE),
        [C4],
        {"bad_header_length": 1},
    ),
    "format_7": (song(track(NOTE), file_format=7), [C4], {"bad_format": 1}),
    "format_2_with_one_track": (song(track(NOTE), file_format=2), [C4], {}),
    "format_2_with_one_track_of_notes": (
        song(track(tempo(0, 400_000)), track(program(0, 5), NOTE), track(program(0, 7)), file_format=2),
        [(5, *C4[1:])],
        {},
    ),
    "text_mode": (TEN_NOTES.replace(b"\n", b"\r\n"), TEN, {"text_mode": 1}),
    "text_mode_of_a_file_with_0d_0a": (
        song(track(on(13, 10), off(10, 10)), track(NOTE)).replace(b"\n", b"\r\n"),
        [(0, False, 10, 13, 23, 64), C4],
        {"text_mode": 1},
    ),
    "0d_0a_that_belongs_there": (
        song(track(on(13, 10), b"\x0d" + off(0, 13)[1:], b"\x0a" + off(0, 10)[1:])),
        [(0, False, 10, 13, 36, 64)],
        {},
    ),
    "too_few_tracks_announced": (header(1) + track(NOTE) * 2, [C4, C4], {"bad_track_count": 1}),
    "too_many_tracks_announced": (header(9) + track(NOTE), [C4], {"bad_track_count": 1}),
    "foreign_chunks": (
        header(1) + chunk(b"MTrk", tag=b"XFIH") + track(NOTE) + chunk(b"\0\0", tag=b"XFKM"),
        [C4],
        {"foreign_chunk": 2},
    ),
    "junk_between_tracks": (header(2) + track(NOTE) + b"\0\1\2\3" + track(NOTE), [C4, C4], {"junk": 1}),
    "junk_at_the_end": (song(track(NOTE)) + bytes(100), [C4], {}),
    "second_song": (song(track(NOTE)) + song(track(on(0, 1), off(1, 1))), [C4], {"second_song": 1}),
    "track_length_0": (header(2) + lying(NOTE, 0) + track(NOTE), [C4, C4], {"bad_track_length": 1}),
    "track_length_short": (header(2) + lying(NOTE, 6) + track(NOTE), [C4, C4], {"bad_track_length": 1}),
    "track_length_into_next": (header(2) + lying(NOTE, 20) + track(NOTE), [C4, C4], {"bad_track_length": 1}),
    "track_length_to_the_end": (
        header(2) + lying(NOTE, len(NOTE) + 4 + len(track(NOTE))) + track(NOTE),
        [C4, C4],
        {"bad_track_length": 1},
    ),
    "track_length_4_gb": (
        header(2) + lying(NOTE, 2**32 - 1) + track(NOTE),
        [C4, C4],
        {"bad_track_length": 1},
    ),
    "early_end_mark": (
        song(track(NOTE, END, NOTE, NOTE), track(NOTE)),
        [C4, C4, (0, False, 60, 480, 960, 64), (0, False, 60, 960, 1440, 64)],
        {"early_end": 1},
    ),
    "early_end_mark_in_the_last_track": (
        song(track(NOTE, END, END, NOTE)),
        [C4, (0, False, 60, 480, 960, 64)],
        {"early_end": 2},
    ),
    "early_end_mark_and_none_at_the_end": (
        song(chunk(NOTE + END + NOTE), track(NOTE)),
        [C4, C4, (0, False, 60, 480, 960, 64)],
        {"early_end": 1, "no_end_of_track": 1},
    ),
    "end_mark_twice": (song(track(NOTE, END)), [C4], {"early_end": 1}),
    "padding_behind_the_end_mark": (
        song(chunk(NOTE + END + bytes(9)), track(NOTE)),
        [C4, C4],
        {"bad_track_length": 1},
    ),
    "no_end_mark": (song(chunk(NOTE), track(NOTE)), [C4, C4], {"no_end_of_track": 1}),
    "cut_inside_an_event": (song(track(NOTE, on(0, 62)))[:-5], [C4], {"truncated": 1}),
    "cut_between_events": (song(track(NOTE, on(0, 62)))[:-8], [C4], {"truncated": 1}),
    "cut_inside_a_note": (
        song(track(NOTE, on(0, 62), off(100, 62)))[:-6],
        [C4, (0, False, 62, 480, 580, 64)],
        {"truncated": 1, "unclosed": 1},
    ),
    "cut_before_a_track": (song(track(NOTE), track(NOTE))[: -len(track(NOTE))], [C4], {"bad_track_count": 1}),
    "event_beyond_the_track": (song(chunk(NOTE + b"\0\x90\x3e"), track(NOTE)), [C4, C4], {"truncated": 1}),
    "meta_beyond_the_track": (song(track(NOTE, b"\0\xff\1\x7f"), track(NOTE)), [C4, C4], {"truncated": 1}),
    # the events
    "every_channel_message": (
        song(track(b"\0\xa0\x3c\1\0\xb0\7\1\0\xd0\1\0\xe0\1\1", NOTE)),
        [C4],
        {},
    ),
    "controller_of_168": (song(track(b"\0\xb0\x07\xa8", NOTE)), [C4], {"clipped": 1}),
    "pitch_of_200": (song(track(on(0, 200), off(480, 200))), [(0, False, 127, 0, 480, 64)], {"clipped": 2}),
    "velocity_of_200": (song(track(on(0, 60, 200), off(480, 60))), [(*C4[:5], 127)], {"clipped": 1}),
    "stray_data_bytes": (song(track(b"\0\x40\x40\x40", NOTE[1:])), [C4], {"stray_bytes": 1}),
    "realtime_and_undefined_status": (
        song(track(b"\0\xf8\0\xfe\0\xf4\0\xf1\1\0\xf2\1\1\0\xf3\1\0\xf6\0\xf9", NOTE)),
        [C4],
        {"system_status": 8},
    ),
    "sysex_without_length": (song(track(b"\0\xf0\x7e\x7f\x09\x01\xf7", NOTE)), [C4], {"bad_sysex": 1}),
    "escape_event": (song(track(b"\0\xf7\2\xf3\1", NOTE)), [C4], {}),
    "key_signature_of_9_flats": (song(track(smf.meta(0, 0x59, b"\xf7\0"), NOTE)), [C4], {}),
    "empty_metas": (
        song(track(*(smf.meta(0, kind, b"") for kind in range(128) if kind != 0x2F), NOTE)),
        [C4],
        {"bad_tempo": 1, "bad_time_signature": 1},
    ),
    "end_mark_with_payload": (song(track(smf.meta(0, 0x2F, b"x"), NOTE)), [C4], {}),
    "number_of_9_bytes": (song(track(b"\x80" * 8 + NOTE)), [C4], {"long_number": 1}),
    "number_of_5_bytes": (
        song(track(on(0, 60), b"\x81\x80\x80\x83\x60" + off(0, 60)[1:])),
        [C4],
        {"long_number": 1},
    ),
    "negative_number_of_5_bytes": (
        song(track(on(960, 60), b"\x8f\xff\xff\xfc\0" + on(0, 62)[1:], off(480, 60), off(480, 62))),
        [(0, False, 60, 960, 1408, 64), (0, False, 62, 448, 1408, 64)],
        {"long_number": 1, "unclosed": 1},
    ),
    "far_end_mark": (
        song(track(NOTE, on(0, 62), end=2**28 - 1)),
        [C4, (0, False, 62, 480, 960, 64)],
        {"unclosed": 1},
    ),
    "far_end_mark_after_an_overlap": (
        song(track(on(0, 60), on(10, 60, 65), off(5000, 61), end=2**28 - 1)),
        [(0, False, 60, 0, 10, 64), (0, False, 60, 10, 5010, 65)],
        {"struck_again": 1, "unclosed": 1},
    ),
    "far_off": (
        song(track(NOTE, on(0, 62), off(2**28 - 1, 62))),
        [C4, (0, False, 62, 480, 960, 64)],
        {"unclosed": 1, "far_event": 1},
    ),
    "far_note": (
        song(track(NOTE, on(480 * 20_000, 60), off(1, 60))),
        [C4],
        {"far_event": 2},
    ),
    "far_note_while_others_sound": (
        song(track(on(0, 60), off(480 * 20_001, 60), on(0, 60)), track(NOTE, NOTE)),
        [C4, C4, (0, False, 60, 480, 960, 64)],
        {"far_event": 2, "unclosed": 1},
    ),
    "far_tempo": (song(track(NOTE), track(tempo(2**28 - 1, 400_000))), [C4], {"far_event": 1}),
}


@pytest.mark.parametrize("name", FILES)
def test_outcome(name):
    data, expected, mends = FILES[name]
    midi, found = read_midi_with_mends(data)
    assert notes(midi) == sorted(expected)
    assert dict(found) == mends


REFUSED = {
    "no_bytes": (b"", "empty"),
    "zeros": (bytes(5000), "not_midi"),
    "text": (b"Once upon a time, there was a file without notes.\n" * 9, "not_midi"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0\0\3" + bytes(range(256)), "not_midi"),
    "hex_dump": (b"00000000: 4d54 6864 0000 0006  MThd....\n" * 9, "no_notes"),
    "header_after_a_kilobyte": (bytes(1024) + song(track(NOTE)), "not_midi"),
    "riff_without_song": (smf.riff(b"RIFF"), "not_midi"),
    "cut_header": (header()[:-1], "not_midi"),
    "header_only": (header(), "no_notes"),
    "no_tracks": (header(0), "no_notes"),
    "empty_track": (song(track()), "no_notes"),
    "only_programs": (song(track(program(0, 1))), "no_notes"),
    "only_offs": (song(track(off(0, 60))), "no_notes"),
    "cut_before_the_first_note": (song(track(NOTE))[:25], "no_notes"),
    "format_2": (song(track(NOTE), track(NOTE), file_format=2), "format_2"),
    "division_0": (song(track(NOTE), division=0), "bad_division"),
    "smpte_without_ticks": (song(track(NOTE), division=0xE700), "bad_division"),
    "smpte_of_23_frames": (song(track(NOTE), division=0xE928), "bad_division"),
    "smpte_of_128_frames": (song(track(NOTE), division=0x8028), "bad_division"),
    "only_far_notes": (song(track(on(480 * 20_001, 60))), "too_long"),
    "mostly_far_notes": (song(track(NOTE, on(480 * 20_000, 60), on(1, 60))), "too_long"),
    "too_big": (song(track(NOTE)) + bytes(midi_reader.MAX_FILE_BYTES), "too_big"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    data, reason = REFUSED[name]
    with pytest.raises(MidiError) as caught:
        read_midi(data)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


def test_every_mend_has_a_case():
    made = {code for _, _, mends in FILES.values() for code in mends}
    in_tokens = {"tempo_clipped", "note_cut", "long_silence"}  # tests/midi/test_losses.py
    assert made | {"smpte"} | in_tokens == set(MENDS)  # the cases of smpte are below


def test_every_reason_has_a_case():
    refused = {reason for _, reason in REFUSED.values()}
    elsewhere = {"unreadable", "too_many_notes", "too_many_parts", "too_many_changes"}
    assert refused | elsewhere == set(REASONS)


def test_error_survives_pickling():
    with pytest.raises(UserError) as caught:
        read_midi(b"")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.reason, str(copy)) == (caught.value.reason, str(caught.value))


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


# ---- limits that need no large file ----


def test_too_many_notes(monkeypatch):
    monkeypatch.setattr(midi_reader, "MAX_NOTES", 2)
    assert len(notes(read_midi(song(track(NOTE, NOTE))))) == 2
    with pytest.raises(MidiError, match=r"^too_many_notes"):
        read_midi(song(track(NOTE, NOTE), track(NOTE)))


def test_too_many_parts(monkeypatch):
    monkeypatch.setattr(midi_reader, "MAX_PARTS", 2)
    assert len(read_midi(song(track(NOTE), track(NOTE))).instruments) == 2
    with pytest.raises(MidiError, match=r"^too_many_parts"):
        read_midi(song(track(NOTE), track(NOTE, on(0, 60, 64, 1), off(1, 60, 1))))


def test_too_many_changes(monkeypatch):
    monkeypatch.setattr(midi_reader, "MAX_CHANGES", 2)
    read_midi(song(track(tempo(0, 400_000), signature(0, 3, 2), NOTE)))
    with pytest.raises(MidiError, match=r"^too_many_changes"):
        read_midi(song(track(tempo(0, 400_000), tempo(1, 300_000), signature(0, 3, 2), NOTE)))


# ---- files ----


def test_path_forms(tmp_path):
    path = tmp_path / "song ☃.mid"
    path.write_bytes(song(track(NOTE)))
    link = tmp_path / "link.mid"
    link.symlink_to(path)
    for source in (path, str(path), link):
        assert notes(read_midi(source)) == [C4]


@pytest.mark.parametrize(
    "kind", ["missing", "folder", "pipe", "device", "dangling_link", "nul_in_name", "too_long_name"]
)
def test_unreadable(tmp_path, kind):
    path = tmp_path / "x.mid"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = "/dev/zero"
    elif kind == "dangling_link":
        path.symlink_to(tmp_path / "gone.mid")
    elif kind == "nul_in_name":
        path = "a\0b"
    elif kind == "too_long_name":
        path = "a" * 5000
    with pytest.raises(MidiError) as caught:
        read_midi(path)
    assert caught.value.reason == "unreadable"
    assert caught.value.detail


def test_too_big_file_is_not_read_whole(tmp_path):
    path = tmp_path / "big.mid"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # sparse: takes no space
    with pytest.raises(MidiError, match=r"^too_big"):
        read_midi(path)


# ---- against miditoolkit ----


def test_installed_song_reads_as_in_miditoolkit():
    """The same song, but for notes struck again before they ended and those that nothing ends."""
    plain = miditoolkit.MidiFile(example_midi_file())
    midi, mends = read_midi_with_mends(example_midi_file())
    assert set(mends) == {"struck_again", "unclosed"}
    ours, theirs = Counter(notes(midi)), Counter(notes(plain))
    onsets, of_theirs = (Counter((*n[:4], n[5]) for n in found.elements()) for found in (ours, theirs))
    assert not of_theirs - onsets
    # Every lost off leaves one note without an end there; here, some of these are struck again.
    lost = (onsets - of_theirs).total()
    assert mends["unclosed"] <= lost <= mends["unclosed"] + mends["struck_again"]
    assert midi.ticks_per_beat == plain.ticks_per_beat
    assert midi.max_tick == plain.max_tick
    assert tempi(midi) == tempi(plain)
    assert signatures(midi) == signatures(plain)


def test_every_cut_of_the_installed_song_keeps_a_valid_prefix():
    """Notes that end well before the cut are those of the whole song."""
    data = Path(example_midi_file()).read_bytes()
    whole = Counter(notes(read_midi(data)))
    starts = [match.start() for match in re.finditer(b"MTrk", data)]
    kept = []
    for size in range(starts[-1] + 100, len(data), 331):
        midi, mends = read_midi_with_mends(data[:size])
        found = Counter(notes(midi))
        extra = (found - whole).total()
        assert mends["truncated"] == 1
        assert extra <= mends["unclosed"] + mends["other_track_off"] + mends["drum_without_off"]
        kept.append(found.total())
    assert kept == sorted(kept) and kept[0] < kept[-1]


def test_result_can_be_written_and_read_again(tmp_path):
    midi = read_midi(example_midi_file())
    midi.dump(str(tmp_path / "again.mid"))
    again, mends = read_midi_with_mends(tmp_path / "again.mid")
    assert not mends
    assert notes(again) == notes(midi)


def test_programs_are_plain_integers():
    midi = read_midi(song(track(program(0, 127), NOTE)))
    assert [type(instrument.program) for instrument in midi.instruments] == [int]
