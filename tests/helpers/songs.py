"""Songs for tests."""

import io

import miditoolkit
from miditoolkit.midi.utils import example_midi_file

EXAMPLE = example_midi_file()  # the real song that comes with miditoolkit


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
    """The song written to bytes and parsed again."""
    buffer = io.BytesIO()
    midi.dump(file=buffer)
    buffer.seek(0)
    return miditoolkit.MidiFile(file=buffer)
