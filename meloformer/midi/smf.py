"""Scans the bytes of a Standard MIDI File, damaged or not, into events.

The scan repairs syntax only; what the events mean together (which note ends where, which program sounds) is
decided by `meloformer.midi.reader` and what it calls. Time and memory are linear in the size of the file,
whatever its bytes.
"""

import struct
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from operator import itemgetter

from ..errors import MidiError

# The header should be at the start. Old Macintosh and archive tools put up to 512 bytes before it; a header
# further in is more likely to be part of a file that is not a song.
MAX_PREFIX_BYTES = 1024

NOTE_OFF, NOTE_ON, CONTROLLER, PROGRAM = 0x80, 0x90, 0xB0, 0xC0  # kinds of channel events
PORT, END_OF_TRACK, TEMPO, TIME_SIGNATURE = 0x21, 0x2F, 0x51, 0x58  # types of meta events
BANK, PEDAL, ALL_SOUND_OFF, RESET_CONTROLLERS, ALL_NOTES_OFF = 0, 64, 120, 121, 123  # controllers
SYSEX = -2  # the type that `_read_system` returns for a system-exclusive message; no meta event has it

# The controllers that are kept; 124 to 127 change the mode of a channel, and all of 123 to 127 end its notes.
_CONTROLLERS = frozenset({BANK, PEDAL, ALL_SOUND_OFF, RESET_CONTROLLERS, *range(ALL_NOTES_OFF, 128)})

_SYSTEM_DATA_BYTES = {0xF1: 1, 0xF2: 2, 0xF3: 1}  # other system messages have none
_UNDEFINED = frozenset({0xF4, 0xF5, 0xF9, 0xFD})  # system status bytes that MIDI does not define
_HEADER_BYTES = 14
_READ_AHEAD = bytes(16)  # lets the scan look past the end instead of checking before every byte
_LOW_28_BITS = (1 << 28) - 1  # the largest number a MIDI file can hold


@dataclass
class Track:
    """The channel events of one MTrk chunk that matter for notes.

    Attributes:
        events: (tick, status, first data byte, second data byte) in file order: note-on, note-off, program
            change and the controllers 0, 64, 120, 121 and 123 to 127. `status` is the status byte plus 256
            times the port, so `status & 0xF0` is the kind and `status & ~0xF0` the channel with its port.
            Data bytes are 0..127, and the second is 0 for a program change. Ticks ascend.
        end: tick at which the track ends.
    """

    events: list[tuple[int, int, int, int]] = field(default_factory=list)
    end: int = 0


@dataclass
class Scan:
    """The content of a file in file order, with its syntax repaired.

    Attributes:
        format: 0, 1 or 2; other values in the file become 1.
        division: 16 bits of the header: ticks per quarter, or an SMPTE division if the highest bit is set.
        tracks: every MTrk chunk that holds one of the events listed at `Track`.
        sysex: (tick, port, first 12 bytes after F0 and the length) of system-exclusive messages.
        metas: (tick, type, first 8 bytes of the payload) of tempi and time signatures of all tracks.
        mends: how often each repair was made, by the codes of `meloformer.midi.reader.MENDS`.
        damaged: how many events no program would write (see `_read_events`).
    """

    format: int
    division: int
    tracks: list[Track] = field(default_factory=list)
    metas: list[tuple[int, int, bytes]] = field(default_factory=list)
    sysex: list[tuple[int, int, bytes]] = field(default_factory=list)
    mends: Counter[str] = field(default_factory=Counter)
    damaged: int = 0


def scan(data: bytes) -> Scan:
    """Read a whole file; if it is a copy in text mode, the file that was copied.

    Such a copy has a byte 0D before every byte 0A. Other files may have that, too, for example in the line
    ends of a text. So the file is read with and without these 0D; it is a copy if less is repaired without.
    Removing one 0D before each 0A restores a file exactly, also where it held 0D 0A itself.

    Raises:
        MidiError: `not_midi`, if there is no complete header.
    """
    breaks = data.count(b"\r\n")
    if not breaks or breaks != data.count(b"\n"):
        return _scan(data)
    undone = _scan(data.replace(b"\r\n", b"\n"))
    with suppress(MidiError):  # the bytes before the header may be too many as they stand
        as_it_stands = _scan(data)
        if _repairs(as_it_stands) <= _repairs(undone):
            return as_it_stands
    undone.mends["text_mode"] += 1
    return undone


def _repairs(found: Scan) -> int:
    return found.mends.total() + found.damaged


def _scan(data: bytes) -> Scan:
    start = _find_header(data)
    size = len(data)
    header_bytes, file_format, track_count, division = struct.unpack_from(">LHHH", data, start + 4)
    found = Scan(file_format, division)
    mends = found.mends
    if start:
        mends["wrapped"] += 1
    if file_format > 2:
        mends["bad_format"] += 1
        found.format = 1
    pos = start + 8 + header_bytes
    if header_bytes != 6:
        mends["bad_header_length"] += 1
        if not _chunk_starts(data, pos, size):
            pos = _find(data, b"MTrk", start + 8, size)

    chunks = 0
    data += _READ_AHEAD
    while pos + 8 <= size:
        tag = data[pos : pos + 4]
        if tag == b"MTrk":
            chunks += 1
            pos = _read_chunk(data, pos, size, found)
        elif tag == b"MThd":
            mends["second_song"] += 1
            break
        elif _chunk_starts(data, pos, size):
            mends["foreign_chunk"] += 1
            pos = _chunk_end(data, pos)
        else:
            pos = _find(data, b"MTrk", pos + 1, size)
            if pos < size:  # bytes after the last track do no harm
                mends["junk"] += 1
    if chunks != track_count:
        mends["bad_track_count"] += 1
    return found


def _find_header(data: bytes) -> int:
    in_riff = data[:4] == b"RIFF" and data[8:12] == b"RMID"
    start = data.find(b"MThd", 0, len(data) if in_riff else MAX_PREFIX_BYTES)
    if start < 0:
        raise MidiError("not_midi", "no MThd header")
    if start + _HEADER_BYTES > len(data):
        raise MidiError("not_midi", "the header is cut off")
    return start


def _find(data: bytes, tag: bytes, start: int, stop: int) -> int:
    """Position of the next `tag` in data[start:stop], or `stop` if there is none."""
    pos = data.find(tag, start, stop)
    return stop if pos < 0 else pos


def _chunk_end(data: bytes, pos: int) -> int:
    return pos + 8 + int.from_bytes(data[pos + 4 : pos + 8], "big")


def _chunk_starts(data: bytes, pos: int, size: int) -> bool:
    """Whether a chunk can start at `pos`: an MTrk, even a truncated one, or any other that is complete."""
    tag = data[pos : pos + 4]
    if tag == b"MTrk":
        return True
    printable = len(tag) == 4 and all(0x20 <= byte < 0x7F for byte in tag)
    return printable and pos + 8 <= size and _chunk_end(data, pos) <= size


def _read_chunk(data: bytes, pos: int, size: int, found: Scan) -> int:
    """Read the MTrk chunk at `pos` into `found`; return where the next chunk should start."""
    start, stop = pos + 8, _chunk_end(data, pos)
    limit = stop
    end_from = start
    if stop != size and not _chunk_starts(data, stop, size):
        limit = _find(data, b"MTrk", start, size)
    elif _find(data, b"MTrk", start, stop) == stop:
        # The length is right, so an end-of-track mark with more than padding after it is not the end.
        end_from = start + len(data[start:stop].rstrip(b"\0")) + 1
    track = Track()
    pos, ended = _read_events(data, start, limit, end_from, track, found)
    if track.events:
        found.tracks.append(track)
    if not ended:
        found.mends["truncated" if pos > limit or stop > size else "no_end_of_track"] += 1
    elif pos != stop:
        found.mends["bad_track_length"] += 1
    if not ended:
        return limit
    # If the length of the chunk is right, this is its end; if it is too long, it may contain further tracks.
    return _find(data, b"MTrk", pos, limit) if limit == stop else pos


def _read_events(
    data: bytes, pos: int, limit: int, end_from: int, track: Track, found: Scan
) -> tuple[int, bool]:
    """Read events from `pos` until `limit` or an end-of-track mark whose end is at `end_from` or later.

    Returns the position after the last event and whether the mark was found. The position is beyond `limit`
    if the last event did not fit; that event is dropped.

    Counted as damaged are notes with a data byte above 127, data bytes without a status byte, delta times
    that do not fit into 4 bytes, and status bytes that MIDI does not define. What programs write by habit is
    not: a velocity of 128, controller values above 127, delta times that are negative or have leading zeros,
    system-exclusive messages without a length, and recorded clock, time code and active sensing.
    """
    add, metas, mends = track.events.append, found.metas, found.mends
    tick = status = port = 0
    ended = sort = False
    while pos < limit:
        delta = data[pos]
        pos += 1
        if delta >= 0x80:
            began = pos - 1
            delta, pos = _read_number(data, began, mends)
            if pos - began == 5 and data[began] & 0x08:
                # A negative number of 32 bits: the program wrote its events out of order.
                delta += (data[began] & 0x0F) - 16 << 28
                if tick + delta < 0:
                    delta = 0
                sort = True
            elif pos - began > 4 and data[began] & 0x7F:
                found.damaged += 1
        tick += delta

        byte = data[pos]
        if byte < 0x80 and not status:
            mends["stray_bytes"] += 1
            found.damaged += 1
            while byte < 0x80 and pos < limit:
                pos += 1
                byte = data[pos]
        if byte >= 0xF0:
            # Running status stays in force across meta and system events: the standard ends it there, but
            # some files rely on it, and a data byte that follows can mean nothing else.
            pos, kind, payload = _read_system(data, pos, limit, mends)
            if pos > limit:
                break
            if byte in _UNDEFINED:
                found.damaged += 1
            if kind == END_OF_TRACK and not payload:
                if pos >= end_from:
                    ended = True
                    break
                mends["early_end"] += 1
            if kind == TEMPO or kind == TIME_SIGNATURE:
                metas.append((tick, kind, payload))
            elif kind == SYSEX:
                found.sysex.append((tick, port, payload))
            elif kind == PORT and payload:
                port = (payload[0] & 0x7F) << 8
            continue
        if byte >= 0x80:
            status = byte
            pos += 1
        first = data[pos]
        if status & 0xE0 == 0xC0:  # program change and channel pressure have one data byte
            second = 0
            pos += 1
        else:
            second = data[pos + 1]
            pos += 2
        if pos > limit:
            break
        if (first | second) & 0x80:
            mends["clipped"] += 1
            found.damaged += status < 0xA0 and (first > 127 or second > 128)
            first, second = min(first, 127), min(second, 127)
        if status < 0xA0 or (
            first in _CONTROLLERS if status & 0xF0 == CONTROLLER else status & 0xF0 == PROGRAM
        ):
            add((tick, status | port, first, second))
    if sort:
        track.events.sort(key=itemgetter(0))
        tick = max(tick, track.events[-1][0] if track.events else 0)
    track.end = tick
    return pos, ended


def _read_system(data: bytes, pos: int, limit: int, mends: Counter) -> tuple[int, int, bytes]:
    """Read the meta or system event whose status byte is at `pos`.

    Returns the position after it (beyond `limit` if it does not fit), the type of a meta event (`SYSEX` for
    a system-exclusive message, -1 for others), and the first 8 bytes of a meta event or 12 of a message.
    """
    status = data[pos]
    if status == 0xFF:
        kind = data[pos + 1]
        length, pos = _read_number(data, pos + 2, mends)
        return pos + length, kind, data[pos : pos + min(length, 8)]
    if status in (0xF0, 0xF7):
        length, start = _read_number(data, pos + 1, mends)
        if start + length > limit:
            # Some programs leave the length out, as in a MIDI stream: then the message ends at its F7 byte.
            end = data.find(0xF7, pos + 1, limit)
            if end >= 0:
                mends["bad_sysex"] += 1
                return end + 1, SYSEX, data[pos + 1 : min(end, pos + 13)]
        return start + length, SYSEX if status == 0xF0 else -1, data[start : start + min(length, 12)]
    mends["system_status"] += 1
    return pos + 1 + _SYSTEM_DATA_BYTES.get(status, 0), -1, b""


def _read_number(data: bytes, pos: int, mends: Counter) -> tuple[int, int]:
    """Read the variable-length number at `pos`; return it and the position after it."""
    value, start = 0, pos
    while True:
        byte = data[pos]
        pos += 1
        value = (value << 7 | byte & 0x7F) & _LOW_28_BITS
        if byte < 0x80:
            break
    if pos - start > 4:
        mends["long_number"] += 1
    return value, pos
