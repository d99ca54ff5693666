"""Programs of channels, and which channels play drums by the rules of MIDI, XG, GS and GM2."""

from bisect import bisect_right
from collections import defaultdict
from operator import itemgetter

from . import smf

DRUMS = 128  # added to a program that plays a drum kit
_DRUM_CHANNEL = 9  # counted from 0, of every port

_XG_DRUM_BANKS = frozenset({126, 127})  # bank numbers (MSB)
_GM2_DRUM_BANKS = frozenset({120})
_GS_CHANNELS = (9, *range(9), *range(10, 16))  # channel of each part, in the order of GS part numbers


def drum_banks(sysex: list[tuple[int, int, bytes]]) -> frozenset[int]:
    """Bank numbers (MSB) of drum kits, by the modes (XG, GM2) that a file's messages switch on."""
    banks: frozenset[int] = frozenset()
    for _, _, message in sysex:
        if message[:1] == b"\x43" and message[2:7] == b"\x4c\0\0\x7e\0":
            banks |= _XG_DRUM_BANKS
        elif message[:1] == b"\x7e" and message[2:4] == b"\x09\x03":
            banks |= _GM2_DRUM_BANKS
    return banks


def gs_parts(sysex: list[tuple[int, int, bytes]]) -> dict[int, list[tuple[int, bool]]]:
    """(tick, whether drums) of each GS message "use for rhythm part", by channel; checksums are not read."""
    parts = defaultdict(list)
    for tick, port, message in sysex:
        rhythm = message[:1] == b"\x41" and message[2:5] == b"\x42\x12\x40" and message[6:7] == b"\x15"
        if rhythm and len(message) > 7 and message[5] & 0xF0 == 0x10:
            parts[port | _GS_CHANNELS[message[5] & 0x0F]].append((tick, message[7] > 0))
    return {channel: sorted(changes, key=itemgetter(0)) for channel, changes in parts.items()}


class SharedPrograms:
    """The program changes of all tracks by channel, for notes of tracks that have none of their own."""

    def __init__(self, tracks: list[smf.Track], banks: frozenset[int]):
        self._tracks, self._banks = tracks, banks
        self._changes: dict[int, tuple[list[int], list[int]]] | None = None

    def at(self, channel: int, tick: int) -> int | None:
        """The latest program of `channel` at `tick` (+ DRUMS), or None before the first."""
        if self._changes is None:
            self._changes = self._collect()
        if channel not in self._changes:
            return None
        ticks, programs = self._changes[channel]
        index = bisect_right(ticks, tick) - 1
        return programs[index] if index >= 0 else None

    def _collect(self) -> dict[int, tuple[list[int], list[int]]]:
        changes = defaultdict(list)
        for track in self._tracks:
            bank: dict[int, int] = {}
            for tick, status, first, second in track.events:
                kind, channel = status & 0xF0, status & ~0xF0
                if kind == smf.PROGRAM:
                    drums = DRUMS if bank.get(channel) in self._banks else 0
                    changes[channel].append((tick, first + drums))
                elif kind == smf.CONTROLLER and first == smf.BANK:
                    bank[channel] = second
        result = {}
        for channel, found in changes.items():
            found.sort(key=itemgetter(0))
            result[channel] = ([tick for tick, _ in found], [program for _, program in found])
        return result


def with_drums(program: int, channel: int, tick: int, gs: dict[int, list[tuple[int, bool]]]) -> int:
    """`program`, with DRUMS added or removed by whether the channel plays drums at `tick`."""
    drums = program >= DRUMS or channel & 0x0F == _DRUM_CHANNEL
    if channel in gs:
        before = bisect_right(gs[channel], (tick, True)) - 1
        if before >= 0:
            drums = gs[channel][before][1]
    return program % DRUMS + (DRUMS if drums else 0)
