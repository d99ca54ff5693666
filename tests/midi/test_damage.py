"""Damaged and hostile files: a song and its tokens, or a known reason, in bounded time and memory."""

import io
import multiprocessing
import re
import resource
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import miditoolkit
import mido
import numpy as np
import pytest
from miditoolkit.midi.utils import example_midi_file

from meloformer.errors import MidiError
from meloformer.midi.reader import (
    MAX_FILE_BYTES,
    MAX_NOTES,
    MAX_QUARTERS,
    MENDS,
    REASONS,
    read_midi_with_mends,
)
from meloformer.tokens.tokenizer import HIDTokenizer

from helpers import smf_bytes as smf
from helpers.midi_mutations import mutants

MAX_SECONDS = 10
MAX_MEMORY = 1 << 30
VARIANTS = 100  # per case


def outcome(data: bytes) -> str:
    """Read and encode `data`; return "song" or the reason why not. Fails if a promise is broken."""
    try:
        midi, mends = read_midi_with_mends(data)
        check_song(midi, mends)
        tokenizer = HIDTokenizer()
        ids = tokenizer.encode(midi)
    except MidiError as error:
        assert error.reason in REASONS, error
        assert len(str(error).splitlines()) == 1, error
        return error.reason
    assert np.array_equal(tokenizer.encode(tokenizer.decode(ids)), ids)
    return "song"


def check_song(midi: miditoolkit.MidiFile, mends: Counter[str]) -> None:
    """What `read_midi` promises of every song."""
    assert set(mends) <= set(MENDS) and all(mends.values()), mends
    notes = [note for instrument in midi.instruments for note in instrument.notes]
    assert 0 < len(notes) <= MAX_NOTES
    assert all(0 <= note.pitch < 128 and 0 < note.velocity < 128 for note in notes)
    assert all(0 <= note.start < note.end for note in notes)
    assert max(note.start for note in notes) <= MAX_QUARTERS * midi.ticks_per_beat
    assert all(0 <= instrument.program < 128 for instrument in midi.instruments)
    tempi, signatures = midi.tempo_changes, midi.time_signature_changes
    assert all(3.5 < tempo.tempo <= 1000 for tempo in tempi)
    assert all(s.numerator > 0 and s.denominator in (1, 2, 4, 8, 16, 32, 64, 128) for s in signatures)
    for events in (tempi, signatures):
        ticks = [event.time for event in events]
        assert ticks == sorted(set(ticks))


def outcomes_within_limits(files: list[tuple[str, bytes]]) -> tuple[list[str], float, int]:
    """Runs in a process of its own: the outcomes, the longest CPU time (s), the peak memory (bytes)."""
    found, slowest = [], 0.0
    for name, data in files:
        start = time.process_time()
        try:
            found.append(outcome(data))
        except Exception as error:
            error.args = (f"{name}, {len(data)} bytes: {error!r}",)
            raise
        slowest = max(slowest, time.process_time() - start)
    return found, slowest, peak_memory()


def peak_memory() -> int:
    """Bytes this process has held at most. Linux's ru_maxrss would include what the parent held."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def read_apart(files: list[tuple[str, bytes]]) -> list[str]:
    """The outcomes, once time and memory have been found within the limits."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found, slowest, memory = pool.submit(outcomes_within_limits, files).result()
    assert slowest < MAX_SECONDS
    assert memory < MAX_MEMORY
    return found


def saved(midi) -> bytes:
    buffer = io.BytesIO()
    midi.save(file=buffer) if isinstance(midi, mido.MidiFile) else midi.dump(file=buffer)
    return buffer.getvalue()


def installed_song() -> bytes:
    return Path(example_midi_file()).read_bytes()


def installed_song_start() -> bytes:
    """The first 16 bars, so that many variants can be read in little time."""
    midi = miditoolkit.MidiFile(example_midi_file())
    end = 16 * 4 * midi.ticks_per_beat
    for instrument in midi.instruments:
        instrument.notes = [note for note in instrument.notes if note.end <= end]
    midi.tempo_changes = [tempo for tempo in midi.tempo_changes if tempo.time < end]
    midi.markers = []
    return saved(midi)


def band() -> bytes:
    """Format 1: four instruments, drums, changes of metre and tempo, controllers, text."""
    midi = mido.MidiFile(type=1, ticks_per_beat=96)
    conductor = midi.add_track("conductor")
    conductor.append(mido.MetaMessage("time_signature", numerator=6, denominator=8))
    conductor.append(mido.MetaMessage("set_tempo", tempo=400_000))
    conductor.append(mido.MetaMessage("time_signature", numerator=4, denominator=4, time=96 * 12))
    conductor.append(mido.MetaMessage("set_tempo", tempo=600_000, time=48))
    for channel, program in ((0, 0), (1, 33), (2, 48), (9, 8)):
        track = midi.add_track(f"part {channel}")
        track.append(mido.Message("program_change", channel=channel, program=program))
        track.append(mido.Message("sysex", data=(0x7E, 0x7F, 9, 1)))
        for step in range(40):
            pitch = 40 + (step * 7 + channel * 5) % 36
            track.append(mido.Message("control_change", channel=channel, control=7, value=step))
            track.append(mido.Message("note_on", channel=channel, note=pitch, velocity=60 + step))
            track.append(mido.Message("note_off", channel=channel, note=pitch, time=24 + 130 * (step % 3)))
    return saved(midi)


def chords() -> bytes:
    """Format 0: two channels in one track, running status, overlapping notes of one pitch."""
    midi = mido.MidiFile(type=0, ticks_per_beat=480)
    track = midi.add_track()
    track.append(mido.MetaMessage("key_signature", key="Am"))
    for step in range(40):
        for pitch in (48, 52, 55, 60):
            track.append(mido.Message("note_on", channel=step % 2, note=pitch + step % 5, velocity=70))
        for pitch in (48, 52, 55, 60):
            time = 240 if pitch == 48 else 0
            track.append(
                mido.Message("note_on", channel=step % 2, note=pitch + step % 5, velocity=0, time=time)
            )
    return saved(midi)


BASES = {
    "installed": installed_song,
    "start": installed_song_start,
    "band": band,
    "chords": chords,
    "riff": lambda: smf.riff(band(), before=smf.chunk(b"info", tag=b"DISP")),
}


def _case(name: str, seed: int):
    """The first seed of each base belongs to the default suite; the others search for what is rarer."""
    return pytest.param(name, seed, id=f"{name}-{seed}", marks=[pytest.mark.mutations] * (seed > 0))


CASES = [
    *(_case("installed", seed) for seed in range(2)),
    *(_case("start", seed) for seed in range(8)),
    *(_case("band", seed) for seed in range(6)),
    *(_case("chords", seed) for seed in range(6)),
    *(_case("riff", seed) for seed in range(2)),
]


@pytest.mark.parametrize("name", BASES)
def test_undamaged(name):
    assert outcome(BASES[name]()) == "song"


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_mutants(name, seed):
    files = list(mutants(BASES[name](), VARIANTS, seed, donor=band() if name != "band" else chords()))
    found = Counter(read_apart(files))
    assert found.total() == VARIANTS
    # Most damage is local, so a reader that refuses at the first sight of it fails here.
    assert found["song"] >= 0.7 * VARIANTS, found


def test_mutants_are_damaged_and_deterministic():
    base = band()
    first, again = list(mutants(base, 240, 5)), list(mutants(base, 240, 5))
    assert first == again
    assert list(mutants(base, 240, 6)) != first
    assert sum(data == base for _, data in first) < 24  # damage can hit equal bytes
    assert len({name for name, _ in first if "+" not in name}) == 12


ROOM = MAX_FILE_BYTES - 100
NOTE = b"\0\x90\x3c\x40"


def repeated(*events: bytes) -> bytes:
    return smf.song(smf.track(*events))


def claim_the_rest() -> bytes:
    """Tracks of one note, each of which claims all the bytes behind it."""
    body = NOTE + smf.END
    count = ROOM // (len(body) + 8)
    return smf.header() + b"".join(
        smf.chunk(body, length=(count - i) * (len(body) + 8) - 8) for i in range(count)
    )


def tempo_of_each_tick(count: int) -> bytes:
    return repeated(*(smf.tempo(1, 500_000 + i % 2) for i in range(count)), NOTE)


def note_of_program(index: int) -> bytes:
    channel = index // 128 % 16
    note = smf.on(0, 60, 64, channel) + smf.off(1, 60, channel)
    return smf.program(0, index % 128, channel) + note


HOSTILE = {
    "most_notes_on_one_tick_and_pitch": (
        lambda: repeated(NOTE * MAX_NOTES, b"\1\x80\x3c\0" * MAX_NOTES),
        "song",
    ),
    "most_notes_never_closed": (lambda: repeated(NOTE * MAX_NOTES), "song"),
    "most_notes_closed_in_another_track": (
        lambda: smf.song(smf.track(NOTE * MAX_NOTES), smf.track(b"\1\x80\x3c\0" * MAX_NOTES)),
        "song",
    ),
    "most_notes_closed_late_for_want_of_offs": (
        lambda: smf.song(
            smf.track(NOTE * (MAX_NOTES // 2)),
            smf.track((NOTE + b"\1\x80\x3c\0") * (MAX_NOTES // 2)),
            smf.track(b"\1\x80\x3c\0" * MAX_NOTES),
        ),
        "song",
    ),
    "most_notes_waiting_for_the_offs_of_others": (
        lambda: smf.song(
            smf.track(NOTE * (MAX_NOTES // 2)),
            smf.track((b"\1" + NOTE[1:] + b"\0\x80\x3c\0") * (MAX_NOTES // 2 - 1), NOTE),
            smf.track(smf.off(2**20, 60)),
        ),
        "song",
    ),
    "one_note_too_many": (lambda: repeated(NOTE * (MAX_NOTES + 1)), "too_many_notes"),
    "note_ons_only": (lambda: repeated(b"\0\x90" + b"\x3c\x40\0" * (ROOM // 3)), "too_many_notes"),
    "note_offs_only": (lambda: repeated(b"\0\x80" + b"\x3c\x40\0" * (ROOM // 3)), "no_notes"),
    "programs_only": (lambda: repeated(b"\0\xc0" + b"\x3c\0" * (ROOM // 2)), "no_notes"),
    "sysex_only": (lambda: repeated(b"\0\xf0\1\xf7" * (ROOM // 4)), "no_notes"),
    "realtime_only": (lambda: repeated(b"\0\xf8" * (ROOM // 2)), "no_notes"),
    "end_marks_only": (lambda: repeated(smf.END * (ROOM // 4)), "no_notes"),
    "end_marks_around_notes": (lambda: repeated((smf.END + NOTE) * 99_999), "song"),
    "far_notes_only": (lambda: repeated(smf.on(2**28 - 1, 60), NOTE * (ROOM // 4)), "too_long"),
    "tempi_only": (lambda: tempo_of_each_tick(ROOM // 8), "too_many_changes"),
    "many_tempi": (lambda: tempo_of_each_tick(49_000), "song"),
    "empty_tracks": (lambda: smf.header() + b"MTrk\0\0\0\0" * (ROOM // 8), "no_notes"),
    "tiny_tracks": (lambda: smf.header() + smf.track(NOTE) * 50_000, "too_many_parts"),
    "most_tracks": (lambda: smf.header() + smf.track(NOTE * 20) * 4_096, "song"),
    "tracks_that_claim_the_rest": (claim_the_rest, "too_many_notes"),
    "tracks_that_claim_4_gb": (
        lambda: smf.header() + smf.chunk(NOTE + smf.END, length=0xFFFFFFFF) * 1_000,
        "song",
    ),
    "a_program_per_note": (lambda: repeated(*(note_of_program(i) for i in range(MAX_NOTES))), "song"),
    "a_search_for_each_program": (
        lambda: smf.song(smf.track(b"\0\xc0" + b"\x3c\0" * 10**6), smf.track(NOTE * MAX_NOTES)),
        "song",
    ),
    "foreign_chunks": (lambda: smf.header() + b"ABCD\0\0\0\0" * (ROOM // 8), "no_notes"),
    "endless_number": (lambda: repeated(b"\xff" * ROOM), "no_notes"),
    "number_of_zeros": (lambda: repeated(b"\x80" * ROOM, NOTE), "song"),
    "zeros": (lambda: repeated(bytes(ROOM)), "no_notes"),
    "zeros_only": (lambda: bytes(ROOM), "not_midi"),
}


@pytest.mark.mutations
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name):
    build, expected = HOSTILE[name]
    assert read_apart([(name, build())]) == [expected]
