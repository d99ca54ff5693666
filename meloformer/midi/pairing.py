"""Which note ends where: note-ons and note-offs of all tracks -> notes.

An off ends the note of its channel and pitch that sounds; a note struck again ends the older one. So at most
one note of a pitch sounds on a channel, as a synthesiser plays it (docs/midi.md says why, and what other
programs do). Notes of one pitch that begin on the same tick end together.

Tracks are paired one by one. A pitch that lacks offs in one track, while another track has offs to spare for
it, is paired again with these tracks taken together.
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
        ended: `BY_OFF` (or by a controller that ends notes), `BY_STRIKE` or `BY_TRACK_END`.
    """

    start: int
    end: int
    key: int
    velocity: int
    instrument: int
    ended: int


@dataclass
class Paired:
    """What one track plays.

    Attributes:
        notes: in the order of their ends; `end` of those ended `BY_TRACK_END` is that of the track.
        spare: ticks of the offs that end nothing, by key.
        last: tick of the last event up to the limit.
        lacking: how many offs are missing, by key.
    """

    notes: list[Note] = field(default_factory=list)
    spare: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    lacking: Counter[int] = field(default_factory=Counter)
    last: int = 0


class Limits(NamedTuple):
    """Notes beyond `tick` are ignored, more than `notes` refused."""

    tick: int
    notes: int
    ticks_per_quarter: int


def pair(
    found: smf.Scan, limits: Limits, banks: frozenset[int], gs: dict[int, list[tuple[int, bool]]]
) -> list[list[Note]]:
    """The notes of each track; counts mends in `found.mends`.

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
    _borrow_offs(tracks, found.tracks, mends)
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
    """Pair one track alone; also how many notes lie beyond the limit, and the last of them."""
    paired = Paired()
    notes, spare = paired.notes, paired.spare
    sounding: dict[int, dict[int, list[tuple[int, int, int]]]] = defaultdict(dict)  # by channel, by key
    struck: dict[int, tuple[int, int]] = {}  # key -> when a strike ended notes of it, the first of them
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
                            notes.append(Note(start, tick, key, velocity, instrument, BY_OFF))
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
                spare[key].append(tick)
            elif open_notes[0][0] == tick and struck.get(key, _NEVER)[0] == tick:
                # Written behind the onset that has already ended its note.
                _, index = struck.pop(key)
                while index < len(notes) and notes[index].key == key and notes[index].ended == BY_STRIKE:
                    notes[index] = notes[index]._replace(ended=BY_OFF)
                    index += 1
                restruck[key] -= 1
            else:
                del on_channel[key]
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
            struck[key] = tick, len(notes)
            for start, velocity, older in open_notes:
                notes.append(Note(start, tick, key, velocity, older, BY_STRIKE))
            restruck[key] += 1
            on_channel[key] = [(tick, second, instrument)]
    for on_channel in sounding.values():
        for key, open_notes in on_channel.items():
            paired.lacking[key] += 1
            for start, velocity, instrument in open_notes:
                notes.append(Note(start, track.end, key, velocity, instrument, BY_TRACK_END))
    for key, times in restruck.items():
        missing = times - len(spare.get(key, ()))
        if missing > 0:
            paired.lacking[key] += missing
    paired.last = last
    return paired, far, farthest


def _borrow_offs(tracks: list[Paired], scanned: list[smf.Track], mends: Counter[str]) -> None:
    """Let tracks that lack offs of a key use those that other tracks have to spare."""
    lacking, spare = defaultdict(list), defaultdict(list)
    for index, paired in enumerate(tracks):
        for key in paired.lacking:
            lacking[key].append(index)
        for key, ticks in paired.spare.items():
            if key not in paired.lacking:
                spare[key] += [(tick, index) for tick in ticks]
    keys = {key for key, owners in lacking.items() if key in spare or len(owners) > 1}
    keys = {key for key in keys if key in spare or any(tracks[i].spare.get(key) for i in lacking[key])}
    if not keys:
        return
    own: dict[tuple[int, int], list[Note]] = defaultdict(list)
    for index, paired in enumerate(tracks):
        for note in paired.notes:
            if note.key in keys and note.key in paired.lacking:
                own[note.key, index].append(note)
    replaced = defaultdict(dict)  # track -> key -> its notes
    for key in keys:
        events = [(tick, 0, index, None) for tick, index in spare[key]]
        for index in lacking[key]:
            events += [(tick, 0, index, None) for tick in tracks[index].spare.get(key, ())]
            for note in own[key, index]:
                events.append((note.start, 1, index, note))
                if note.ended == BY_OFF:
                    events.append((note.end, 2 if note.start == note.end else 0, index, None))
        before = sum(tracks[index].lacking[key] for index in lacking[key])
        notes, missing, across = _pair_together(events, [track.end for track in scanned])
        if missing < before:
            if across:
                mends["other_track_off"] += across
            for index in lacking[key]:
                replaced[index][key] = [note for owner, note in notes if owner == index]
    for index, by_key in replaced.items():
        kept = [note for note in tracks[index].notes if note.key not in by_key]
        tracks[index].notes = kept + [note for notes in by_key.values() for note in notes]


def _pair_together(
    events: list[tuple[int, int, int, Note | None]], ends: list[int]
) -> tuple[list[tuple[int, Note]], int, int]:
    """Pair events of several tracks: (track, note), how many offs lack, how many came from elsewhere."""
    events.sort(key=lambda event: event[:2])
    notes: list[tuple[int, Note]] = []
    sounding: list[tuple[int, Note]] = []
    spare = restruck = across = 0
    for tick, _, index, note in events:
        if note is None:
            spare += not sounding
            across += sum(owner != index for owner, _ in sounding)
            notes += [(owner, open_note._replace(end=tick, ended=BY_OFF)) for owner, open_note in sounding]
            sounding = []
        else:
            if sounding and sounding[0][1].start != tick:
                restruck += 1
                notes += [(owner, older._replace(end=tick, ended=BY_STRIKE)) for owner, older in sounding]
                sounding = []
            sounding.append((index, note))
    unended = 1 if sounding else 0
    notes += [(owner, note._replace(end=ends[owner], ended=BY_TRACK_END)) for owner, note in sounding]
    return notes, unended + max(0, restruck - spare), across


def _finished(note: Note, paired: Paired, limits: Limits, mends: Counter[str]) -> Note:
    """`note` with an end behind its start, and counted if it was mended."""
    start, end, key, _, instrument, ended = note
    if ended == BY_OFF:
        mends["zero_length"] += 1
        return note._replace(end=start + 1)
    if instrument >= DRUMS and (ended == BY_TRACK_END or key in paired.lacking):
        mends["drum_without_off"] += 1
        short = start + max(1, limits.ticks_per_quarter // 4)
        return note._replace(end=max(start + 1, min(end, short) if ended == BY_STRIKE else short))
    if ended == BY_STRIKE:
        mends["struck_again"] += 1
        return note
    mends["unclosed"] += 1
    if end > limits.tick:  # an end mark with a damaged time says nothing about the note
        end = max(paired.last, start + limits.ticks_per_quarter)
    return note._replace(end=max(end, start + 1))
