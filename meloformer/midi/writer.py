"""Writing a `miditoolkit.MidiFile` to disk so that any player plays the right instruments."""

import io
import os

import miditoolkit
import mido

from ..files import write_atomic

MELODIC_CHANNELS = 15  # 16 less the drum channel


def write_midi(midi: miditoolkit.MidiFile, path: str | os.PathLike) -> None:
    """Write `midi` to `path`, whole or not at all."""
    write_atomic(path, midi_bytes(midi))


def midi_bytes(midi: miditoolkit.MidiFile) -> bytes:
    """The MIDI file of `midi`.

    miditoolkit assigns the 15 melodic channels in turn, so with more than 15 melodic instruments some tracks
    share a channel. Then a program change is written before every note whose channel last played another
    program.
    """
    buffer = io.BytesIO()
    midi.dump(file=buffer)
    if sum(not track.is_drum for track in midi.instruments) > MELODIC_CHANNELS:
        buffer = _with_program_changes(buffer.getvalue())
    return buffer.getvalue()


def _with_program_changes(data: bytes) -> io.BytesIO:
    parsed = mido.MidiFile(file=io.BytesIO(data))
    events = []  # (tick, track, message), in the order in which a player plays them
    for index, track in enumerate(parsed.tracks):
        tick = 0
        for message in track:
            tick += message.time
            events.append((tick, index, message))
    events.sort(key=lambda event: event[:2])

    own_program = {i: m.program for _, i, m in events if m.type == "program_change"}
    playing: dict[int, int] = {}
    tracks: list[list] = [[] for _ in parsed.tracks]
    for tick, index, message in events:
        if message.type == "note_on" and playing.get(message.channel) != own_program[index]:
            playing[message.channel] = own_program[index]
            change = mido.Message("program_change", channel=message.channel, program=own_program[index])
            tracks[index].append((tick, change))
        if message.type != "program_change":
            tracks[index].append((tick, message))

    for track, timed in zip(parsed.tracks, tracks):
        now = 0
        track.clear()
        for tick, message in timed:
            track.append(message.copy(time=tick - now))
            now = tick
    buffer = io.BytesIO()
    parsed.save(file=buffer)
    return buffer
