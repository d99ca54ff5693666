"""Any MIDI file -> a clean `miditoolkit.MidiFile`, or a `MidiError` that says why not.

Every file takes one path: `meloformer.midi.smf` scans the bytes and repairs their syntax, this module mends
their meaning, and the notes, tempi and time signatures that remain are written as a clean file for
miditoolkit to parse. All other events (controllers, lyrics, key signatures, ...) are left behind. The notes
come out in one instrument per track, channel and program, as miditoolkit itself groups them.
"""

import io
import os
import stat
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from operator import itemgetter

import miditoolkit

from ..errors import MidiError
from . import smf

# The limits bound the time (seconds) and memory (hundreds of MiB) that one file can cost. Each stands several
# times above the largest song that can be trained on.
MAX_FILE_BYTES = 4 << 20
MAX_NOTES = 100_000
MAX_QUARTERS = 20_000  # two and three quarter hours at 120 BPM; a note beyond it has a damaged time
MAX_PARTS = 4_096  # (track, channel, program): each becomes a track of the clean file
MAX_STACK = 256  # open notes of one pitch in one part: miditoolkit copies all of them at every note-off
MAX_CHANGES = 50_000  # tempi and time signatures; a tempo curve drawn every 10 ms for 8 minutes

# 1000 BPM. Slower tempi need no limit: the three bytes of the event cannot hold less than 3.6 BPM.
MIN_MICROSECONDS_PER_QUARTER = 60_000
MAX_DENOMINATOR_EXPONENT = 7  # a 128th note

REASONS = {
    "unreadable": "the file could not be opened or read, or is not a regular file",
    "empty": "the file has no bytes",
    "too_big": f"the file has more than {MAX_FILE_BYTES} bytes",
    "not_midi": "there is no complete MIDI header at the start of the file",
    "format_2": "several independent songs share the file (format 2)",
    "bad_division": "the header gives no usable length of a tick",
    "no_notes": "no note could be found",
    "too_long": f"most notes start more than {MAX_QUARTERS} quarter notes in, or there are too many bars",
    "too_many_notes": f"there are more than {MAX_NOTES} notes",
    "too_many_parts": f"there are more than {MAX_PARTS} combinations of track, channel and program",
    "too_many_changes": f"there are more than {MAX_CHANGES} changes of tempo or time signature",
}

MENDS = {
    "wrapped": "the song was taken out of a RIFF-RMID file, or from behind foreign bytes",
    "bad_header_length": "the header gave a length other than 6",
    "bad_format": "the header gave a format other than 0, 1 and 2; read as 1",
    "bad_track_count": "the header gave another number of tracks than there are",
    "foreign_chunk": "a chunk that is neither header nor track was skipped",
    "junk": "bytes between tracks were skipped",
    "second_song": "another header followed; the file was read up to there",
    "bad_track_length": "the length of a track did not agree with its end mark, which was believed",
    "early_end": "a track went on behind an end mark; its length was believed",
    "no_end_of_track": "a track had no end mark",
    "truncated": "a track broke off inside an event; all before it was kept",
    "stray_bytes": "data bytes before the first status byte of a track were skipped",
    "clipped": "a data byte above 127 was read as 127",
    "system_status": "an event that no file may contain was skipped",
    "bad_sysex": "a system-exclusive message without a valid length was read to its end byte",
    "long_number": "a number of more than 4 bytes was cut to its low 28 bits",
    "smpte": "the ticks were fractions of a second; tempi were ignored, and quarter notes made up",
    "bad_tempo": "a tempo above 1000 BPM was lowered to it, a 4-byte one read, or an impossible one ignored",
    "bad_time_signature": "an incomplete time signature was completed, or an impossible one ignored",
    "far_event": "a note, tempo, time signature or note-off beyond the longest song was ignored",
    "other_track_off": "a note was ended by a note-off in another track",
    "channel_program": "a note with no program change before it in its track took the program of its channel",
    "unclosed": "a note without an end was ended with its track",
    "zero_length": "a note of no length was given one tick",
}

# Frames per second in the header -> (frames in a quarter note, its microseconds). Chosen so that ticks fall
# at exactly the time the file says, near 120 BPM; 29 stands for 30 / 1.001 frames per second.
_SMPTE_QUARTERS = {24: (12, 500_000), 25: (12, 480_000), 29: (15, 500_500), 30: (15, 500_000)}


def read_midi(source: str | os.PathLike | bytes) -> miditoolkit.MidiFile:
    """Read a MIDI file, mending what can be mended.

    Args:
        source: a path, or the bytes of a file.

    Returns:
        A song with at least one note. Every note has a velocity of 1..127 and a length of at least one tick;
        channel 10 is drums; each program holds from the note's onset. Tempi and time signatures are in time
        order, one per tick; without any, there is none in the list (miditoolkit puts a tempo of 120 BPM
        at tick 0).

    Raises:
        MidiError: the file cannot become a song; its reason is a key of `REASONS`.
    """
    return read_midi_with_mends(source)[0]


def read_midi_with_mends(source: str | os.PathLike | bytes) -> tuple[miditoolkit.MidiFile, Counter[str]]:
    """As `read_midi`, and how often each mend (a key of `MENDS`) was made."""
    found = smf.scan(source_bytes(source))
    mends = found.mends
    if found.format == 2 and len(found.tracks) > 1:
        raise MidiError("format_2", f"{len(found.tracks)} independent tracks")
    ticks_per_quarter, fixed_tempo = _division(found.division)
    limit = MAX_QUARTERS * ticks_per_quarter
    parts = _pair_notes(found, limit, ticks_per_quarter)
    if fixed_tempo:
        mends["smpte"] += 1
    changes = _changes(found.metas, limit, fixed_tempo, mends)
    tracks = [changes, *(_part_events(channel, program, notes) for (_, channel, program, *_), notes in parts)]
    midi = miditoolkit.MidiFile(file=io.BytesIO(smf.write(ticks_per_quarter, tracks)))
    for instrument in midi.instruments:
        instrument.program = int(instrument.program)  # np.int8 would overflow in a caller's arithmetic
    return midi, mends


def source_bytes(source: str | os.PathLike | bytes) -> bytes:
    """The bytes of a regular file (or `source` itself), at least one and at most `MAX_FILE_BYTES`.

    Raises:
        MidiError: `unreadable`, `empty` or `too_big`.
    """
    if isinstance(source, bytes):
        data = source
    else:
        try:
            # Asked before opening: to open a pipe or a device may block, or do something.
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
    """Ticks per quarter, and the only tempo (microseconds per quarter) if ticks are fractions of a second."""
    if division < 0x8000:
        if not division:
            raise MidiError("bad_division", "0 ticks per quarter note")
        return division, None
    frames, ticks_per_frame = 256 - (division >> 8), division & 0xFF
    if frames not in _SMPTE_QUARTERS or not ticks_per_frame:
        raise MidiError("bad_division", f"{frames} frames per second of {ticks_per_frame} ticks")
    frames_per_quarter, tempo = _SMPTE_QUARTERS[frames]
    return frames_per_quarter * ticks_per_frame, tempo


def _pair_notes(found: smf.Scan, limit: int, ticks_per_quarter: int) -> list[tuple[tuple, list]]:
    """The notes (start, end, pitch, velocity) of each part (track, channel, program, layer, across).

    Within a part, notes of one pitch are in order of both onset and end, so first-in-first-out pairing, which
    is miditoolkit's, finds exactly these notes again. Notes that another track ends break that order, so they
    are parts of their own (`across`). Layers keep the open notes of one pitch to `MAX_STACK`.
    """
    mends = found.mends
    parts = defaultdict(list)
    heard, last_ticks = _note_events(found, limit, ticks_per_quarter)
    for key, by_track in heard.items():
        channel, pitch = key >> 7, key & 0x7F
        for pairing in _pair_tracks(by_track):
            for (start, velocity, track, program), layer, (end, _, end_track, _) in pairing.ended:
                across = track != end_track
                if across:
                    mends["other_track_off"] += 1
                if start == end:
                    mends["zero_length"] += 1
                part = (track, channel, program, layer, across)
                parts[part].append((start, max(end, start + 1), pitch, velocity))
            for (start, velocity, track, program), layer in pairing.unended:
                end = found.tracks[track].end
                if end > limit:  # an end mark with a damaged time says nothing about the note
                    end = max(last_ticks[track], start + ticks_per_quarter)
                part = (track, channel, program, layer, False)
                parts[part].append((start, max(end, start + 1), pitch, velocity))
                mends["unclosed"] += 1
    if len(parts) > MAX_PARTS:
        raise MidiError("too_many_parts", f"{len(parts)} combinations of track, channel and program")
    return sorted(parts.items(), key=itemgetter(0))


# (tick, velocity, track, program) of a note-on; (tick, 0, track, 0) of a note-off.
_NoteEvent = tuple[int, int, int, int]


def _note_events(
    found: smf.Scan, limit: int, ticks_per_quarter: int
) -> tuple[dict[int, dict[int, list[_NoteEvent]]], list[int]]:
    """The events up to `limit` by channel << 7 | pitch and by track; the tick of each track's last one."""
    mends = found.mends
    heard = defaultdict(lambda: defaultdict(list))
    last_ticks = []
    shared_programs = _SharedPrograms(found.tracks)
    count = far = farthest = 0
    for index, track in enumerate(found.tracks):
        programs = {}
        last = 0
        for tick, status, first, second in track.events:
            channel = status & 0x0F
            if status >= smf.PROGRAM:
                programs[channel] = first
                continue
            is_onset = status >= smf.NOTE_ON and second
            if tick > limit:
                mends["far_event"] += 1
                if is_onset:
                    far += 1
                    farthest = max(farthest, tick)
                continue
            last = tick
            events = heard[channel << 7 | first][index]
            if not is_onset:
                events.append((tick, 0, index, 0))
                continue
            count += 1
            if count > MAX_NOTES:
                raise MidiError("too_many_notes", f"more than {MAX_NOTES} notes")
            program = programs.get(channel)
            if program is None:
                program = shared_programs.at(channel, tick)
                if program is None:
                    program = 0
                else:
                    mends["channel_program"] += 1
            events.append((tick, second, index, program))
        last_ticks.append(last)
    if far > count:
        detail = f"{far} of {far + count} notes, up to {farthest // ticks_per_quarter} quarter notes in"
        raise MidiError("too_long", detail)
    if not count:
        raise MidiError("no_notes", "no note-on in any track")
    return heard, last_ticks


class _Pairing:
    """The note-ons and note-offs of one channel and pitch in time order, paired first in, first out.

    Attributes:
        ended: (note-on, layer, note-off).
        unended: (note-on, layer).
        unused: the note-offs that end nothing.
    """

    def __init__(self, events: Iterable[_NoteEvent]):
        self.ended: list[tuple[_NoteEvent, int, _NoteEvent]] = []
        self.unended: deque[tuple[_NoteEvent, int]] = deque()
        self.unused: list[_NoteEvent] = []
        stacked = 0
        for event in events:
            tick, velocity, track, _ = event
            if velocity:
                layer = 0
                if len(self.unended) >= MAX_STACK:
                    stacked += 1
                    layer = 1 + stacked // MAX_STACK
                self.unended.append((event, layer))
                continue
            if self.unended:
                (start, _, start_track, _), _ = self.unended[0]
                # An off on the tick of an onset elsewhere is from before that onset.
                if start < tick or start_track == track:
                    self.ended.append((*self.unended.popleft(), event))
                    continue
            self.unused.append(event)


def _pair_tracks(by_track: dict[int, list[_NoteEvent]]) -> list[_Pairing]:
    """Pair each track alone; but those that lack offs together with the offs that others have to spare."""
    alone = {track: _Pairing(events) for track, events in by_track.items()}
    lacking = [track for track, pairing in alone.items() if pairing.unended]
    complete = [pairing for pairing in alone.values() if not pairing.unended]
    if lacking and any(pairing.unused for pairing in alone.values()):
        pooled = [event for track in lacking for event in by_track[track]]
        pooled += [event for pairing in complete for event in pairing.unused]
        together = _Pairing(sorted(pooled, key=itemgetter(0)))
        # A stray off that ends none of the unended notes must not cut short the others.
        if len(together.unended) < sum(len(alone[track].unended) for track in lacking):
            return [*complete, together]
    return list(alone.values())


class _SharedPrograms:
    """The program changes of all tracks together: what a track plays that has none of its own."""

    def __init__(self, tracks: list[smf.Track]):
        changes = defaultdict(list)
        for track in tracks:
            for tick, status, program, _ in track.events:
                if status >= smf.PROGRAM:
                    changes[status & 0x0F].append((tick, program))
        self._changes = {c: sorted(found, key=itemgetter(0)) for c, found in changes.items()}
        self._ticks = {c: [tick for tick, _ in found] for c, found in self._changes.items()}

    def at(self, channel: int, tick: int) -> int | None:
        """The latest program of `channel` at `tick`, or None before the first."""
        if channel not in self._ticks:
            return None
        index = bisect_right(self._ticks[channel], tick) - 1
        return self._changes[channel][index][1] if index >= 0 else None


def _part_events(
    channel: int, program: int, notes: list[tuple[int, int, int, int]]
) -> list[tuple[int, bytes]]:
    on, off = smf.NOTE_ON | channel, smf.NOTE_OFF | channel
    events = [(start, bytes((on, pitch, velocity))) for start, _, pitch, velocity in notes]
    events += [(end, bytes((off, pitch, 0))) for _, end, pitch, _ in notes]
    events.sort(key=itemgetter(0))  # stable: notes of one onset stay in the order in which they end
    return [(0, bytes((smf.PROGRAM | channel, program))), *events]


def _changes(
    metas: list[tuple[int, int, bytes]], limit: int, fixed_tempo: int | None, mends: Counter[str]
) -> list[tuple[int, bytes]]:
    """Tempi and time signatures as events in time order: on one tick, the last in the file wins."""
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
    events = [(t, smf.meta(smf.TEMPO, tempo.to_bytes(3, "big"))) for t, tempo in tempi.items()]
    # The last two bytes are about a metronome; these are the usual ones.
    events += [
        (t, smf.meta(smf.TIME_SIGNATURE, fraction + b"\x18\x08")) for t, fraction in signatures.items()
    ]
    return sorted(events, key=itemgetter(0))
