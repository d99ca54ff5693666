"""Pairs the note-ons and note-offs of all tracks into notes.

A note-off ends the sounding note of its channel and pitch. A note-on for a pitch that still sounds ends the
sounding note, too: the note is struck again. So at most one note of a pitch sounds on a channel, as a
synthesizer plays it (docs/midi.md gives the reasons, and what other programs do). Notes of one pitch that
begin on the same tick end together.

Each track is paired by itself. A note whose note-off is missing takes an unmatched one of another track.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import MidiError
from . import smf
from .channels import DRUMS, SharedPrograms, with_drums

BY_OFF, BY_STRIKE, BY_TRACK_END = range(3)
_NEVER = (-1, 0)


class Note(NamedTuple):
    """A note.

    Attributes:
        start, end: ticks.
        key: channel (with its port) << 7 | pitch.
        velocity: 1..127.
        instrument: program 0..127, plus `channels.DRUMS` for a drum kit.
        ended: what ended it: `BY_OFF` (a note-off or a controller), `BY_STRIKE` (it was struck again, or is a
            drum note ended by a controller) or `BY_TRACK_END`.
    """

    start: int
    end: int
    key: int
    velocity: int
    instrument: int
    ended: int


@dataclass
class Paired:
    """The notes of one track.

    Attributes:
        notes: in the order in which they end; a note ended `BY_TRACK_END` has the end of the track.
        unmatched: ticks of the note-offs that end no note, by key (as in `Note`).
        missing: how many note-offs are missing, by key.
        last: tick of the last note-on or note-off within the limit.
    """

    notes: list[Note] = field(default_factory=list)
    unmatched: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    missing: Counter[int] = field(default_factory=Counter)
    last: int = 0


class Limits(NamedTuple):
    """What a song may hold: events after `tick` are ignored, more than `notes` notes are refused."""

    tick: int
    notes: int
    ticks_per_quarter: int


def pair(
    found: smf.Scan, limits: Limits, banks: frozenset[int], gs: dict[int, list[tuple[int, bool]]]
) -> list[list[Note]]:
    """The notes of each track; counts mends in `found.mends`.

    Args:
        found: the scanned file.
        limits: what the song may hold.
        banks, gs: from `channels.drum_banks` and `channels.gs_parts`.

    Raises:
        MidiError: `no_notes`, `too_many_notes` or `too_long`.
    """
    mends = found.mends
    shared = SharedPrograms(found.tracks, banks)
    tracks, count, far, farthest = [], 0, 0, 0
    for track in found.tracks:
        paired, far_notes, far_tick = _pair_track(track, limits, banks, gs, shared, mends, count)
        tracks.append(paired)
        count += len(paired.notes)
        far += far_notes
        farthest = max(farthest, far_tick)
    if far > count:
        detail = (
            f"{far} of {far + count} notes, up to {farthest // limits.ticks_per_quarter} quarter notes in"
        )
        raise MidiError("too_long", detail)
    if not count:
        raise MidiError("no_notes", "no note-on in any track")
    _borrow_offs(tracks, mends)
    for paired in tracks:
        paired.notes = [
            note if note[5] == BY_OFF and note[1] > note[0] else _finished(note, paired, limits, mends)
            for note in paired.notes
        ]
    return [paired.notes for paired in tracks]


def _pair_track(
    track: smf.Track,
    limits: Limits,
    banks: frozenset[int],
    gs: dict[int, list[tuple[int, bool]]],
    shared: SharedPrograms,
    mends: Counter[str],
    count: int,
) -> tuple[Paired, int, int]:
    """Pair one track; also returns how many notes begin after the limit, and the tick of the last of these.

    `count` is the number of notes in the tracks before.
    """
    paired = Paired()
    notes, unmatched = paired.notes, paired.unmatched
    sounding: dict[int, dict[int, list[tuple[int, int, int]]]] = defaultdict(dict)  # by channel, by key
    # By key: if notes of it last ended because it was struck again, the first of them; when notes last ended,
    # and how many of their note-offs may still come on that tick.
    struck: dict[int, int] = {}
    awaited: dict[int, tuple[int, int]] = {}
    restruck: Counter[int] = Counter()
    programs: dict[int, int] = {}
    bank: dict[int, int] = {}
    limit, last = limits.tick, 0
    room = limits.notes - count
    far = farthest = onsets = 0
    for tick, status, first, second in track.events:
        kind, channel = status & 0xF0, status & ~0xF0
        if kind > smf.NOTE_ON:
            if kind == smf.PROGRAM:
                programs[channel] = first + (DRUMS if bank.get(channel) in banks else 0)
            elif first == smf.BANK:
                bank[channel] = second
            elif first == smf.ALL_SOUND_OFF or first >= smf.ALL_NOTES_OFF:
                if tick <= limit:
                    for key, open_notes in sounding.pop(channel, {}).items():
                        for start, velocity, instrument in open_notes:
                            ended = BY_OFF
                            if instrument >= DRUMS:  # it has no note-off, and may have ended long before
                                ended = BY_STRIKE
                                paired.missing[key] += 1
                            notes.append(Note(start, tick, key, velocity, instrument, ended))
            continue
        is_onset = kind == smf.NOTE_ON and second
        if tick > limit:
            mends["far_event"] += 1
            if is_onset:
                far += 1
                farthest = max(farthest, tick)
            continue
        last = tick
        key = channel << 7 | first
        on_channel = sounding[channel]
        if not is_onset:
            open_notes = on_channel.get(key)
            if open_notes is None:
                unmatched[key].append(tick)
            elif open_notes[0][0] == tick and awaited.get(key, _NEVER)[0] == tick and awaited[key][1]:
                # The note-off comes after the note-on that has already ended its note on this tick.
                awaited[key] = tick, awaited[key][1] - 1
                if key in struck:
                    index = struck.pop(key)
                    while index < len(notes) and notes[index].key == key and notes[index].ended == BY_STRIKE:
                        notes[index] = notes[index]._replace(ended=BY_OFF)
                        index += 1
                    restruck[key] -= 1
            else:
                del on_channel[key]
                struck.pop(key, None)
                awaited[key] = tick, len(open_notes) - 1
                for start, velocity, instrument in open_notes:
                    notes.append(Note(start, tick, key, velocity, instrument, BY_OFF))
            continue
        onsets += 1
        if onsets > room:
            raise MidiError("too_many_notes", f"more than {limits.notes} notes")
        instrument = programs.get(channel)
        if instrument is None:
            instrument = shared.at(channel, tick)
            if instrument is None:
                instrument = 0
            else:
                mends["channel_program"] += 1
        if gs or channel & 0x0F == 9 or instrument >= DRUMS:
            instrument = with_drums(instrument, channel, tick, gs)
        open_notes = on_channel.get(key)
        if open_notes is None:
            on_channel[key] = [(tick, second, instrument)]
        elif open_notes[0][0] == tick:
            open_notes.append((tick, second, instrument))
        else:
            struck[key], awaited[key] = len(notes), (tick, len(open_notes))
            for start, velocity, older in open_notes:
                notes.append(Note(start, tick, key, velocity, older, BY_STRIKE))
            restruck[key] += 1
            on_channel[key] = [(tick, second, instrument)]
    for on_channel in sounding.values():
        for key, open_notes in on_channel.items():
            paired.missing[key] += 1
            for start, velocity, instrument in open_notes:
                notes.append(Note(start, track.end, key, velocity, instrument, BY_TRACK_END))
    for key, times in restruck.items():
        without = times - len(unmatched.get(key, ()))
        if without > 0:
            paired.missing[key] += without
    paired.last = last
    return paired, far, farthest


def _borrow_offs(tracks: list[Paired], mends: Counter[str]) -> None:
    """Give notes whose note-offs are missing in their track the unmatched ones of other tracks.

    Each note takes the first after its start, unless it was struck again before; later notes choose first.
    """
    unmatched: dict[int, list[int]] = defaultdict(list)
    for paired in tracks:
        for key, ticks in paired.unmatched.items():
            if key not in paired.missing:
                unmatched[key] += ticks
    unended: dict[int, list[tuple[int, int, int]]] = defaultdict(list)  # start, track, index of a note
    for index, paired in enumerate(tracks):
        if not unmatched.keys().isdisjoint(paired.missing):
            for place, note in enumerate(paired.notes):
                if note.ended != BY_OFF and note.key in unmatched and note.key in paired.missing:
                    unended[note.key].append((note.start, index, place))
    for key, waiting in unended.items():
        offs, later = sorted(unmatched[key]), []  # `later`: those after the start, in descending order
        group, end = None, None
        for start, index, place in sorted(waiting, reverse=True):
            note = tracks[index].notes[place]
            if (start, index) != group:  # notes that begin together end together
                group, end = (start, index), None
                while offs and offs[-1] > start:
                    later.append(offs.pop())
                if later and (note.ended == BY_TRACK_END or later[-1] <= note.end):
                    end = later.pop()
            if end is not None:
                tracks[index].notes[place] = note._replace(end=end, ended=BY_OFF)
                mends["other_track_off"] += 1


def _finished(note: Note, paired: Paired, limits: Limits, mends: Counter[str]) -> Note:
    """`note` with an end after its start; a mend is counted if its end had to be found."""
    start, end, key, _, instrument, ended = note
    if ended == BY_OFF:
        mends["zero_length"] += 1
        return note._replace(end=start + 1)
    if instrument >= DRUMS and (ended == BY_TRACK_END or key in paired.missing):
        mends["drum_without_off"] += 1
        short = start + max(1, limits.ticks_per_quarter // 4)
        return note._replace(end=max(start + 1, min(end, short) if ended == BY_STRIKE else short))
    if ended == BY_STRIKE:
        mends["struck_again"] += 1
        return note
    mends["unclosed"] += 1
    if end > limits.tick:  # an end-of-track mark with a damaged time does not tell when the note ends
        end = max(paired.last, start + limits.ticks_per_quarter)
    return note._replace(end=max(end, start + 1))
