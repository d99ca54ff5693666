"""Any MIDI file -> a clean `miditoolkit.MidiFile`, or a `MidiError` that says why not.

Every file is read in the same way: `meloformer.midi.smf` scans the bytes and repairs their syntax,
`meloformer.midi.pairing` pairs note-ons with note-offs, `meloformer.midi.channels` finds the program or drum
kit of each note, and this module mends the rest and builds the song: notes, tempi and time signatures.
Lyrics, key signatures and controllers are dropped. Each combination of track, channel and program becomes an
instrument.
"""

import os
import stat
from collections import Counter, defaultdict

import miditoolkit
import numpy as np

from ..errors import MidiError
from . import channels, pairing, pedal, smf

# The limits bound the time (seconds) and memory (hundreds of MiB) that one file can cost. Each stands several
# times above what the largest song that can be trained on needs.
MAX_FILE_BYTES = 4 << 20
MAX_NOTES = 100_000
MAX_QUARTERS = 20_000  # two and three quarter hours at 120 BPM; a note after that has a damaged delta time
MAX_PARTS = 4_096  # (track, channel, program): each becomes an instrument of the song
MAX_CHANGES = 50_000  # tempi and time signatures; a tempo curve drawn every 10 ms for 8 minutes

# A song with at least MIN_DAMAGED_EVENTS damaged events (`smf.Scan.damaged`), and more than one per
# EVENTS_PER_DAMAGED_ONE events that are kept, is refused. docs/midi.md says how these were chosen.
MIN_DAMAGED_EVENTS = 8
EVENTS_PER_DAMAGED_ONE = 400

# 1000 BPM. Slow tempi need no limit: the three bytes of the event cannot hold a tempo below 3.6 BPM.
MIN_MICROSECONDS_PER_QUARTER = 60_000
MAX_DENOMINATOR_EXPONENT = 7  # a 128th note

REASONS = {
    "unreadable": "the file could not be opened or read, or is not a regular file",
    "empty": "the file has no bytes",
    "too_big": f"the file has more than {MAX_FILE_BYTES} bytes",
    "not_midi": "there is no complete MIDI header at the start of the file",
    "format_2": "several independent songs share the file (format 2)",
    "too_damaged": f"at least {MIN_DAMAGED_EVENTS} events, and more than one per {EVENTS_PER_DAMAGED_ONE}, "
    "are damaged",
    "bad_division": "the header gives no usable length of a tick",
    "no_notes": "no note could be found",
    "too_long": f"most notes start after {MAX_QUARTERS} quarter notes, or bars or long notes are too many",
    "too_many_notes": f"there are more than {MAX_NOTES} notes",
    "too_many_parts": f"there are more than {MAX_PARTS} combinations of track, channel and program",
    "too_many_changes": f"there are more than {MAX_CHANGES} changes of tempo or time signature",
}

MENDS = {
    "text_mode": "the file had been copied in text mode (0D 0A for every 0A), which was undone",
    "wrapped": "the song was inside a RIFF-RMID file, or there were foreign bytes before it",
    "bad_header_length": "the header gave a length other than 6",
    "bad_format": "the header gave a format other than 0, 1 and 2; read as 1",
    "bad_track_count": "the header gave another number of tracks than there are",
    "foreign_chunk": "a chunk that is neither header nor track was skipped",
    "junk": "bytes between tracks were skipped",
    "second_song": "another header followed; the file was read up to there",
    "bad_track_length": "the length of a track disagreed with its end-of-track mark; the mark was used",
    "early_end": "an end-of-track mark stood before the end of the track's data; the length was used",
    "no_end_of_track": "a track had no end-of-track mark",
    "truncated": "a track broke off before its end; all whole events were kept",
    "stray_bytes": "data bytes before the first status byte of a track were skipped",
    "clipped": "a data byte above 127 was read as 127",
    "system_status": "a system message that no file may contain was skipped",
    "bad_sysex": "a system-exclusive message without a valid length was read to its end byte",
    "long_number": "a number of more than 4 bytes was cut to its low 28 bits, or read as a negative one",
    "smpte": "ticks were fractions of a second; tempi were ignored, and a quarter note lasts about 0.5 s",
    "bad_tempo": "a tempo above 1000 BPM was lowered to 1000, a 4-byte one read, an impossible one ignored",
    "bad_time_signature": "an incomplete time signature was completed, or an impossible one ignored",
    "far_event": "a note, tempo, time signature or note-off beyond the longest song was ignored",
    "other_track_off": "a note was ended by a note-off in another track",
    "channel_program": "a note with no program change before it in its track took the program of its channel",
    "struck_again": "a note that still sounded was ended by the next note of its pitch and channel",
    "drum_without_off": "a drum note without a note-off got at most the length of a sixteenth",
    "unclosed": "a note without a note-off was ended with its track",
    "zero_length": "a note of zero length got one tick",
    "tempo_clipped": "a tempo outside the range of BPM tokens was moved to the nearest value in it",
    "note_struck_on": "a note longer than the longest length token was written as several notes",
    "long_silence": "more than 8 bars in a row are silent; they were kept",
}

# Frames per second in the header -> (frames in a quarter note, microseconds of a quarter note). The quarter
# note is chosen near 120 BPM and so that every tick keeps its exact time; 29 stands for 30 / 1.001 frames per
# second.
_SMPTE_QUARTERS = {24: (12, 500_000), 25: (12, 480_000), 29: (15, 500_500), 30: (15, 500_000)}


def read_midi(source: str | os.PathLike | bytes, *, sustain: bool = False) -> miditoolkit.MidiFile:
    """Read a MIDI file, mending what can be mended.

    Args:
        source: a path, or the bytes of a file.
        sustain: whether notes sound on while the sustain pedal (controller 64) is down.

    Returns:
        A song with at least one note. Every note has a velocity of 1..127, a length of at least one tick and
        the program that its channel had at its onset. Drums are channel 10 and the channels and banks that
        XG, GS or GM2 messages make drums. Tempi and time signatures are in time order, one per tick. The
        first tempo is at tick 0: 120 BPM if the file gives none there.

    Raises:
        MidiError: the file cannot become a song; `reason` is a key of `REASONS`.
    """
    return read_midi_with_mends(source, sustain=sustain)[0]


def read_midi_with_mends(
    source: str | os.PathLike | bytes, *, sustain: bool = False
) -> tuple[miditoolkit.MidiFile, Counter[str]]:
    """Like `read_midi`; also returns how often each mend (a key of `MENDS`) was made."""
    midi, parts, mends = _read(source, sustain)
    for (_, _, instrument), notes in parts:
        drums = instrument >= channels.DRUMS
        track = miditoolkit.Instrument(instrument % channels.DRUMS, drums)
        track.notes = [
            miditoolkit.Note(velocity, key & 0x7F, start, end) for start, end, key, velocity, _, _ in notes
        ]
        midi.instruments.append(track)
    return midi, mends


def read_notes(
    source: str | os.PathLike | bytes, *, sustain: bool = False
) -> tuple[miditoolkit.MidiFile, np.ndarray, Counter[str]]:
    """Like `read_midi_with_mends`, with the notes as one array: the tokenizer needs no note objects.

    Returns:
        midi: the song without its instruments.
        notes: int64 [n, 5]: start and end in ticks, pitch, velocity, instrument (program 0..127, or 128 for
            drums).
        mends: how often each mend was made.
    """
    midi, parts, mends = _read(source, sustain)
    rows = np.array([note for _, notes in parts for note in notes], dtype=np.int64)
    rows[:, 2] &= 0x7F
    return midi, np.column_stack((rows[:, :4], np.minimum(rows[:, 4], channels.DRUMS))), mends


_Parts = list[tuple[tuple[int, int, int], list[pairing.Note]]]


def _read(
    source: str | os.PathLike | bytes, sustain: bool
) -> tuple[miditoolkit.MidiFile, _Parts, Counter[str]]:
    """The song without its notes; the notes of each (track, channel, instrument); the mends."""
    found = smf.scan(source_bytes(source))
    mends = found.mends
    if found.format == 2:
        with_notes = sum(any(_is_onset(event) for event in track.events) for track in found.tracks)
        if with_notes > 1:
            raise MidiError("format_2", f"{with_notes} independent tracks with notes")
    events = sum(len(track.events) for track in found.tracks)
    if found.damaged >= MIN_DAMAGED_EVENTS and found.damaged * EVENTS_PER_DAMAGED_ONE > events:
        raise MidiError("too_damaged", f"{found.damaged} damaged events and {events} events kept")
    ticks_per_quarter, fixed_tempo = _division(found.division)
    limit = MAX_QUARTERS * ticks_per_quarter
    limits = pairing.Limits(limit, MAX_NOTES, ticks_per_quarter)
    banks, gs = channels.drum_banks(found.sysex), channels.gs_parts(found.sysex)
    tracks = pairing.pair(found, limits, banks, gs)
    if sustain:
        tracks = pedal.sustain(found.tracks, tracks, limit)
    if fixed_tempo:
        mends["smpte"] += 1
    midi = miditoolkit.MidiFile(ticks_per_beat=ticks_per_quarter)
    _set_changes(midi, found.metas, limit, fixed_tempo, mends)
    by_part = defaultdict(list)
    for index, notes in enumerate(tracks):
        for note in notes:
            by_part[index, note.key >> 7, note.instrument].append(note)
    if len(by_part) > MAX_PARTS:
        raise MidiError("too_many_parts", f"{len(by_part)} combinations of track, channel and program")
    changes = (*midi.tempo_changes, *midi.time_signature_changes)
    last = max((change.time for change in changes), default=0)
    midi.max_tick = max(last, *(note.end for notes in by_part.values() for note in notes)) + 1
    return midi, sorted(by_part.items()), mends


def _is_onset(event: tuple[int, int, int, int]) -> bool:
    _, status, _, velocity = event
    return status & 0xF0 == smf.NOTE_ON and velocity > 0


def source_bytes(source: str | os.PathLike | bytes) -> bytes:
    """The bytes of a regular file (or `source` itself), at least one and at most `MAX_FILE_BYTES`.

    Raises:
        MidiError: `unreadable`, `empty` or `too_big`.
    """
    if isinstance(source, bytes):
        data = source
    else:
        try:
            # Checked before opening: opening a pipe or a device may block or have effects.
            if not stat.S_ISREG(os.stat(source).st_mode):
                raise MidiError("unreadable", "not a regular file")
            with open(source, "rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except (OSError, ValueError) as error:  # ValueError: a path that no file can have
            raise MidiError("unreadable", getattr(error, "strerror", None) or str(error)) from error
    if not data:
        raise MidiError("empty", "no bytes")
    if len(data) > MAX_FILE_BYTES:
        raise MidiError("too_big", f"more than {MAX_FILE_BYTES} bytes")
    return data


def _division(division: int) -> tuple[int, int | None]:
    """Ticks per quarter; if ticks are fractions of a second, also the tempo (microseconds per quarter)."""
    if division < 0x8000:
        if not division:
            raise MidiError("bad_division", "0 ticks per quarter note")
        return division, None
    frames, ticks_per_frame = 256 - (division >> 8), division & 0xFF
    if frames not in _SMPTE_QUARTERS or not ticks_per_frame:
        raise MidiError("bad_division", f"{frames} frames per second of {ticks_per_frame} ticks")
    frames_per_quarter, tempo = _SMPTE_QUARTERS[frames]
    return frames_per_quarter * ticks_per_frame, tempo


def _set_changes(
    midi: miditoolkit.MidiFile,
    metas: list[tuple[int, int, bytes]],
    limit: int,
    fixed_tempo: int | None,
    mends: Counter[str],
) -> None:
    """Put tempi and time signatures into `midi`, in time order; on one tick, the last in the file holds."""
    tempi: dict[int, int] = {}
    signatures: dict[int, bytes] = {}
    for tick, kind, payload in metas:
        if tick > limit:
            mends["far_event"] += 1
        elif kind == smf.TIME_SIGNATURE:
            possible = len(payload) >= 2 and payload[0] and payload[1] <= MAX_DENOMINATOR_EXPONENT
            if possible:
                signatures[tick] = payload[:2]
            if not possible or len(payload) < 4:
                mends["bad_time_signature"] += 1
        elif fixed_tempo is None:
            padded = len(payload) == 4 and not payload[0]  # written as a number of 32 bits
            tempo = int.from_bytes(payload[1:] if padded else payload[:3], "big")
            possible = len(payload) >= 3 and tempo
            if possible:
                tempi[tick] = max(tempo, MIN_MICROSECONDS_PER_QUARTER)
            if not possible or padded or tempo < MIN_MICROSECONDS_PER_QUARTER:
                mends["bad_tempo"] += 1
    if fixed_tempo is not None:
        tempi[0] = fixed_tempo

    if len(tempi) + len(signatures) > MAX_CHANGES:
        raise MidiError("too_many_changes", f"{len(tempi)} tempi, {len(signatures)} time signatures")
    bpm = 120.0  # the default of MIDI until the first tempo event
    if 0 not in tempi:
        midi.tempo_changes.append(miditoolkit.TempoChange(bpm, 0))
    for tick, tempo in sorted(tempi.items()):
        if tick == 0 or 60e6 / tempo != bpm:
            bpm = 60e6 / tempo
            midi.tempo_changes.append(miditoolkit.TempoChange(bpm, tick))
    for tick, (numerator, exponent) in sorted(signatures.items()):
        midi.time_signature_changes.append(miditoolkit.TimeSignature(numerator, 1 << exponent, tick))
