"""The sustain pedal: a note that ends while it is down sounds on until its release or it is struck again."""

from bisect import bisect_right
from collections import defaultdict

from . import smf
from .channels import DRUMS
from .pairing import Note

_DOWN = 64  # the pedal is down if the value of its controller (which is also number 64) is at least this


def sustain(scanned: list[smf.Track], tracks: list[list[Note]], limit: int) -> list[list[Note]]:
    """The notes of each track, lengthened by the pedal of their channel; drums stay as they are.

    Args:
        scanned: the tracks as they were read.
        tracks: the notes of each.
        limit: pedal events after this tick are ignored.
    """
    ups = {channel: _holds(changes) for channel, changes in _pedal_events(scanned, limit).items()}
    if not ups:
        return tracks
    onsets = defaultdict(list)
    last: dict[int, int] = defaultdict(int)  # last note end of each channel: releases a pedal left down
    for notes in tracks:
        for note in notes:
            onsets[note.key].append(note.start)
            last[note.key >> 7] = max(last[note.key >> 7], note.end)
    for starts in onsets.values():
        starts.sort()

    def held(note: Note) -> Note:
        channel = note.key >> 7
        if note.instrument >= DRUMS or channel not in ups:
            return note
        downs, releases = ups[channel]
        index = bisect_right(downs, note.end) - 1
        release = releases[index] if index >= 0 else 0
        if release is None:
            release = last[channel]
        if release <= note.end:
            return note
        starts = onsets[note.key]
        following = bisect_right(starts, note.start)
        if following < len(starts):
            release = min(release, starts[following])
        return note._replace(end=max(note.end, release))

    return [[held(note) for note in notes] for notes in tracks]


def _pedal_events(scanned: list[smf.Track], limit: int) -> dict[int, list[tuple[int, bool | None]]]:
    """(tick, whether the pedal is down; None for All Sound Off) by channel, in time order."""
    events = defaultdict(list)
    for track in scanned:
        for tick, status, number, value in track.events:
            if status & 0xF0 == smf.CONTROLLER and tick <= limit:
                if number == smf.PEDAL:
                    events[status & ~0xF0].append((tick, value >= _DOWN))
                elif number == smf.RESET_CONTROLLERS:
                    events[status & ~0xF0].append((tick, False))
                elif number == smf.ALL_SOUND_OFF:
                    events[status & ~0xF0].append((tick, None))
    for changes in events.values():
        changes.sort(key=lambda change: change[0])
    return events


def _holds(changes: list[tuple[int, bool | None]]) -> tuple[list[int], list[int | None]]:
    """Ticks from which the pedal holds notes, and when each hold ends (None: never)."""
    downs: list[int] = []
    releases: list[int | None] = []
    down = False
    for tick, is_down in changes:
        if is_down is None:
            if down:
                releases[-1] = tick
                downs.append(tick + 1)  # notes that end on this tick are not held
                releases.append(None)
            continue
        if is_down and not down:
            downs.append(tick)
            releases.append(None)
        elif down and not is_down:
            releases[-1] = tick
        down = is_down
    return downs, releases
