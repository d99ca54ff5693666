"""The parts of a song that tests of the reader compare, and the note that most of their files hold."""

from meloformer.midi.reader import read_midi_with_mends

from helpers.smf_bytes import off, on

NOTE = on(0, 60) + off(480, 60)
C4 = (0, False, 60, 0, 480, 64)  # NOTE as `notes` returns it: program, is_drum, pitch, start, end, velocity


def notes(midi) -> list[tuple]:
    """(program, is_drum, pitch, start, end, velocity), sorted."""
    return sorted(
        (int(i.program), i.is_drum, n.pitch, n.start, n.end, n.velocity)
        for i in midi.instruments
        for n in i.notes
    )


def signatures(midi) -> list[tuple[int, int, int]]:
    return [(s.time, s.numerator, s.denominator) for s in midi.time_signature_changes]


def tempi(midi) -> list[tuple[int, float]]:
    return [(t.time, round(t.tempo, 3)) for t in midi.tempo_changes]


def assert_reads_as(data: bytes, expected: list[tuple], mends: dict[str, int]) -> None:
    """A file has exactly these notes, as `notes` gives them in any order, and these mends."""
    midi, found = read_midi_with_mends(data)
    assert notes(midi) == sorted(expected)
    assert dict(found) == mends
