"""MIDI files byte by byte, for tests of files that no library would write."""

import struct

END = b"\0\xff\x2f\0"


def number(value: int) -> bytes:
    """A variable-length number."""
    digits = [value & 0x7F]
    while value := value >> 7:
        digits.append(value & 0x7F | 0x80)
    return bytes(reversed(digits))


def header(tracks: int = 1, file_format: int = 1, division: int = 480) -> bytes:
    return struct.pack(">4sLHHH", b"MThd", 6, file_format, tracks, division)


def chunk(body: bytes, tag: bytes = b"MTrk", length: int | None = None) -> bytes:
    return tag + struct.pack(">L", len(body) if length is None else length) + body


def track(*events: bytes, end: int = 0) -> bytes:
    """A track of complete events (each with its delta time) that ends `end` ticks after the last."""
    return chunk(b"".join(events) + number(end) + END[1:])


def song(*tracks: bytes, file_format: int = 1, division: int = 480) -> bytes:
    return header(len(tracks), file_format, division) + b"".join(tracks)


def on(delta: int, pitch: int, velocity: int = 64, channel: int = 0) -> bytes:
    return number(delta) + bytes((0x90 | channel, pitch, velocity))


def off(delta: int, pitch: int, channel: int = 0) -> bytes:
    return number(delta) + bytes((0x80 | channel, pitch, 0))


def program(delta: int, value: int, channel: int = 0) -> bytes:
    return number(delta) + bytes((0xC0 | channel, value))


def control(delta: int, number_: int, value: int = 0, channel: int = 0) -> bytes:
    return number(delta) + bytes((0xB0 | channel, number_, value))


def sysex(message: bytes, delta: int = 0) -> bytes:
    """A system-exclusive message, without its F0 and F7."""
    return number(delta) + b"\xf0" + number(len(message) + 1) + message + b"\xf7"


def gs_rhythm(part: int, value: int, checksum: int | None = None) -> bytes:
    """The GS message "use for rhythm part"; `part` is the middle byte of the address, 0x10 to 0x1F."""
    body = bytes((0x40, part, 0x15, value))
    return sysex(b"\x41\x10\x42\x12" + body + bytes((-sum(body) % 128 if checksum is None else checksum,)))


def meta(delta: int, kind: int, payload: bytes) -> bytes:
    return number(delta) + bytes((0xFF, kind)) + number(len(payload)) + payload


def tempo(delta: int, microseconds: int) -> bytes:
    return meta(delta, 0x51, microseconds.to_bytes(3, "big"))


def signature(delta: int, numerator: int, exponent: int) -> bytes:
    return meta(delta, 0x58, bytes((numerator, exponent, 24, 8)))


def riff(smf: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """A RIFF-RMID file around `smf`, with whole chunks before and after it."""
    data = b"data" + struct.pack("<L", len(smf)) + smf + bytes(len(smf) % 2)
    body = b"RMID" + before + data + after
    return b"RIFF" + struct.pack("<L", len(body)) + body
