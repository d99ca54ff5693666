"""Songs for tests, and readings of them that share no code with the tokenizer."""

import io
from collections import defaultdict

import miditoolkit
from miditoolkit.midi.utils import example_midi_file

EXAMPLE = example_midi_file()  # the real song that miditoolkit installs


def example() -> miditoolkit.MidiFile:
    return miditoolkit.MidiFile(EXAMPLE)


def song(
    notes: list[tuple],
    signatures: list[tuple[int, int, int]] = (),
    tempi: list[tuple[float, int]] = (),
    tpq: int = 24,
) -> miditoolkit.MidiFile:
    """A song from (instrument, pitch, start, end[, velocity]) notes in ticks; instrument 128 is drums."""
    midi = miditoolkit.MidiFile(ticks_per_beat=tpq)
    midi.time_signature_changes = [miditoolkit.TimeSignature(n, d, t) for n, d, t in signatures]
    midi.tempo_changes = [miditoolkit.TempoChange(bpm, t) for bpm, t in tempi]
    tracks: dict[int, miditoolkit.Instrument] = {}
    for inst, pitch, start, end, *velocity in notes:
        track = tracks.setdefault(inst, miditoolkit.Instrument(inst % 128, is_drum=inst == 128))
        track.notes.append(miditoolkit.Note(velocity[0] if velocity else 80, pitch, start, end))
    midi.instruments = list(tracks.values())
    return midi


def through_file(midi: miditoolkit.MidiFile) -> miditoolkit.MidiFile:
    """The song after a trip through bytes."""
    buffer = io.BytesIO()
    midi.dump(file=buffer)
    buffer.seek(0)
    return miditoolkit.MidiFile(file=buffer)


def notes_by_key(midi: miditoolkit.MidiFile) -> dict[tuple[int, int], list[tuple[float, float]]]:
    """(onset, offset) in quarters of every note, by (instrument, pitch)."""
    notes = defaultdict(list)
    for track in midi.instruments:
        for note in track.notes:
            key = (128 if track.is_drum else track.program, note.pitch)
            notes[key].append((note.start / midi.ticks_per_beat, note.end / midi.ticks_per_beat))
    return {key: sorted(value) for key, value in notes.items()}


def as_one_player(notes: dict) -> dict:
    """What remains when all tracks of one program are played by one player.

    Notes of one pitch that begin on the same step (1/24 quarter) sound as one, the longest; a note
    that still sounds when its pitch is struck again ends there.
    """
    result = {}
    for key, struck in notes.items():
        by_step: dict[int, tuple[float, float]] = {}
        for onset, offset in struck:
            step = int(onset * 24 + 0.5)
            if step not in by_step or offset - onset > by_step[step][1] - by_step[step][0]:
                by_step[step] = (onset, offset)
        kept = [by_step[step] for step in sorted(by_step)]
        following = [onset for onset, _ in kept[1:]] + [float("inf")]
        result[key] = [(on, min(off, after)) for (on, off), after in zip(kept, following)]
    return result


def f1(expected: dict, found: dict, same) -> float:
    """F1 of notes matched one to one in time order within each key."""
    matched = 0
    for key, notes in expected.items():
        candidates = list(found.get(key, []))
        for note in notes:
            for i, candidate in enumerate(candidates):
                if same(note, candidate):
                    matched += 1
                    del candidates[i]
                    break
                if candidate[0] > note[0] + 1:
                    break
    total = sum(map(len, expected.values())) + sum(map(len, found.values()))
    return 2 * matched / total


def onset_f1(expected: dict, found: dict) -> float:
    """F1 with onsets within 1/48 quarter."""
    return f1(expected, found, lambda a, b: abs(a[0] - b[0]) <= 1 / 48 + 1e-9)


def offset_f1(expected: dict, found: dict) -> float:
    """F1 with onsets within 1/8 quarter and offsets within 1/8 quarter or 3 % of the length."""
    return f1(
        expected,
        found,
        lambda a, b: (
            abs(a[0] - b[0]) <= 1 / 8 and abs(a[1] - b[1]) <= max(1 / 8, 0.03 * (a[1] - a[0])) + 1e-9
        ),
    )


def bar_lines(midi: miditoolkit.MidiFile, end: float) -> list[tuple[float, int, int]]:
    """(position in quarters, numerator, denominator) of every bar that begins before `end` quarters."""
    tpq = midi.ticks_per_beat
    changes = {0: (4, 4)}
    for ts in midi.time_signature_changes:
        changes[ts.time] = (ts.numerator, ts.denominator)
    lines = []
    times = sorted(changes)
    for time, following in zip(times, [*times[1:], float("inf")]):
        n, d = changes[time]
        at, bar = time / tpq, 0
        while at < min(following / tpq, end) - 1e-9:
            lines.append((at, n, d))
            bar += 1
            at = time / tpq + bar * 4 * n / d
    return lines


def seconds_at(midi: miditoolkit.MidiFile, quarters: float) -> float:
    """Time at which a position is played."""
    changes = {0: 120.0}
    for change in midi.tempo_changes:
        changes[change.time] = change.tempo
    seconds, times = 0.0, sorted(changes)
    for time, following in zip(times, [*times[1:], float("inf")]):
        low, high = time / midi.ticks_per_beat, min(following / midi.ticks_per_beat, quarters)
        if high > low:
            seconds += (high - low) * 60.0 / changes[time]
    return seconds
