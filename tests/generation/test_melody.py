"""Which instrument plays the melody of a song."""

import pytest
from miditoolkit import Instrument, MidiFile, Note

from meloformer.generation.melody import melody_of

BEAT = 480


def song(**parts: list[tuple[float, float, int]]) -> MidiFile:
    """Parts `p<program>` or `drums` of notes (start, end, pitch), in beats."""
    midi = MidiFile()
    for name, notes in parts.items():
        drums = name == "drums"
        track = Instrument(0 if drums else int(name[1:]), drums)
        track.notes = [Note(80, pitch, int(start * BEAT), int(end * BEAT)) for start, end, pitch in notes]
        midi.instruments.append(track)
    return midi


LINE = [(beat, beat + 1, 72 + beat % 5) for beat in range(16)]
BASS = [(beat, beat + 1, 40) for beat in range(16)]
CHORDS = [(bar, bar + 4, pitch) for bar in range(0, 16, 4) for pitch in (60, 64, 67)]
ARPEGGIO = [(half / 2, half / 2 + 0.5, 84 + 4 * (half % 3)) for half in range(40)]
DRUMS = [(beat, beat + 1, 90) for beat in range(16)]


@pytest.mark.parametrize(
    "parts, program",
    [
        ({"p33": BASS, "p0": CHORDS, "p73": LINE, "drums": DRUMS}, 73),
        ({"p73": LINE[:3] + LINE[9:], "p0": ARPEGGIO, "p33": BASS}, 73),
        # Legato, and a second voice at times.
        ({"p0": CHORDS, "p73": [(start, end + 0.1, pitch) for start, end, pitch in LINE]}, 73),
        ({"p0": CHORDS, "p73": [*LINE, (4, 6, 60)]}, 73),
        # An answer by another instrument does not carry it.
        ({"p0": CHORDS, "p73": LINE, "p9": [(3, 3.5, 96), (11, 11.5, 96)]}, 73),
        ({"p0": CHORDS, "p9": LINE[:4], "p73": LINE[4:]}, 73),
        ({"p73": LINE}, 73),
        # Nobody: chords over a bass; a piano that plays all; a single note; drums alone.
        ({"p0": CHORDS, "p33": BASS}, None),
        ({"p0": CHORDS + LINE}, None),
        ({"p73": LINE[:1]}, None),
        ({"drums": DRUMS}, None),
    ],
)
def test_the_melody_is_the_longest_line_of_single_notes(parts, program):
    assert melody_of(song(**parts)) == program
