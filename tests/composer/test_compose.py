import hashlib
import itertools
import json
import os
import subprocess
import sys

import miditoolkit
import pytest

from meloformer.compose import main as command
from meloformer.composer.arrangement import METRES, PROGRESSIONS, ROLES, Chord, Dice
from meloformer.composer.compose import MAX_BARS, compose, compose_corpus
from meloformer.errors import UserError

from helpers.full_disk import full_disk

SEEDS = range(60)


@pytest.fixture(scope="module")
def songs() -> list[miditoolkit.MidiFile]:
    return [compose(seed) for seed in SEEDS]


def signatures(song) -> list[tuple[int, int]]:
    return [(change.numerator, change.denominator) for change in song.time_signature_changes]


def notes(song) -> list[tuple]:
    return [
        (part.program, part.is_drum, note.start, note.end, note.pitch, note.velocity)
        for part in song.instruments
        for note in part.notes
    ]


def bar_starts(song) -> list[int]:
    """Ticks of all bar lines, the end of the song included."""
    changes = song.time_signature_changes
    starts = []
    for change, end in zip(changes, [*(c.time for c in changes[1:]), song.max_tick]):
        bar = change.numerator * 4 * song.ticks_per_beat // change.denominator
        assert (end - change.time) % bar == 0, "a time signature changes inside a bar"
        starts += range(change.time, end, bar)
    return [*starts, song.max_tick]


def test_same_seed_same_song():
    assert notes(compose(7)) == notes(compose(7))
    assert notes(compose(7)) != notes(compose(8))


def test_known_song_on_every_platform_and_version():
    """A change of this digest changes every corpus that was made from a seed: make it knowingly."""
    song = compose(3, bars=16)
    text = json.dumps([notes(song), signatures(song), [t.tempo for t in song.tempo_changes]])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "0ac11d79a39667af"


def test_dice_use_only_the_promised_generator():
    dice = Dice(1, "x")
    assert [dice.integer(0, 9) for _ in range(6)] == [6, 0, 8, 0, 1, 8]
    draws = [Dice(i).integer(2, 4) for i in range(200)]
    assert set(draws) == {2, 3, 4}


def test_every_metre_occurs_and_some_songs_change_it(songs):
    assert {signature for song in songs for signature in signatures(song)} == set(METRES)
    assert sum(len(set(signatures(song))) > 1 for song in songs) >= 5


def test_some_songs_change_tempo(songs):
    assert sum(len(song.tempo_changes) > 1 for song in songs) >= 5
    assert all(40 <= change.tempo <= 220 for song in songs for change in song.tempo_changes)


def test_lengths_run_from_a_few_bars_to_hundreds(songs):
    bars = [len(bar_starts(song)) - 1 for song in songs]
    assert min(bars) == 4
    assert 150 < max(bars) <= MAX_BARS
    assert 6_000 < max(len(notes(song)) for song in songs) < 12_000


def test_notes_are_on_the_grid_inside_the_song_and_in_range(songs):
    for song in songs:
        for _, _, start, end, pitch, velocity in notes(song):
            assert start % 20 == 0 and end % 20 == 0
            assert 0 <= start < end <= song.max_tick
            assert 21 <= pitch <= 108 and 1 <= velocity <= 127


def test_grid_holds_triplets_and_sixteenths(songs):
    places = {start % 480 for song in songs for _, _, start, *_ in notes(song)}
    assert {120, 160, 240, 320, 360} <= places


def test_three_to_eight_programs_each_with_notes(songs):
    for song in songs:
        assert 3 <= len(song.instruments) <= 8
        melodic = [part.program for part in song.instruments if not part.is_drum]
        assert len(set(melodic)) == len(melodic) and set(melodic) <= set(range(128))
        assert sum(part.is_drum for part in song.instruments) <= 1
        assert all(part.notes for part in song.instruments)
    assert any(not any(part.is_drum for part in song.instruments) for song in songs)


def test_programs_of_two_roles_are_disjoint():
    programs = [program for role in ROLES.values() for program in role.programs]
    assert len(programs) == len(set(programs))


def test_no_two_notes_of_one_part_and_pitch_overlap(songs):
    for song in songs:
        for part in song.instruments:
            sounding_until: dict[int, int] = {}
            for note in part.notes:
                assert note.start >= sounding_until.get(note.pitch, 0), (part.name, note)
                sounding_until[note.pitch] = note.end


def test_first_and_last_bar_sound_and_some_song_has_an_empty_one(songs):
    songs_with_a_gap = 0
    for song in songs:
        lines = bar_starts(song)
        onsets = {start for _, _, start, *_ in notes(song)}
        sounding = [any(low <= on < high for on in onsets) for low, high in itertools.pairwise(lines)]
        assert sounding[0] and sounding[-1]
        songs_with_a_gap += not all(sounding)
    assert 3 <= songs_with_a_gap <= 40


def test_sections_return_with_variation():
    def section(song, index: int, part: str) -> set[tuple]:
        begin, end = (song.markers[i].time for i in (index, index + 1))
        track = next(track for track in song.instruments if track.name == part)
        return {(n.start - begin, n.pitch) for n in track.notes if begin <= n.start < end}

    varied = 0
    for seed in (13, 14, 15, 16):  # songs without an empty bar
        song = compose(seed, bars=64)
        names = [marker.text for marker in song.markers]
        verses = [i for i, name in enumerate(names) if name == "verse"][:2]
        bass = [section(song, i, "bass") for i in verses]
        lead = [section(song, i, "lead") for i in verses]
        assert bass[0] == bass[1]
        assert len(lead[0] & lead[1]) > 0.5 * len(lead[0])
        varied += lead[0] != lead[1]
    assert varied >= 2


@pytest.mark.parametrize("bars", [1, 2, 4, 5, 8, 9, 33, 160, 300])
@pytest.mark.parametrize("seed", [0, 1])
def test_bars_is_honoured(bars, seed):
    song = compose(seed, bars=bars)
    lines = bar_starts(song)
    assert len(lines) == bars + 1
    assert any(start >= lines[-2] for _, _, start, *_ in notes(song))


@pytest.mark.parametrize("signature", METRES, ids=lambda s: f"{s[0]}-{s[1]}")
def test_signature_is_honoured(signature):
    song = compose(5, bars=20, signature=signature)
    assert signatures(song) == [signature]
    assert len(bar_starts(song)) == 21


def test_tempo_is_honoured():
    assert [(t.tempo, t.time) for t in compose(2, bars=100, tempo=97.5).tempo_changes] == [(97.5, 0)]


@pytest.mark.parametrize("arguments", [{"bars": 0}, {"bars": -3}, {"signature": (13, 16)}], ids=str)
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=r"1 bar|13, 16"):
        compose(0, **arguments)


@pytest.mark.parametrize("metre", METRES.values(), ids=lambda m: "{}-{}".format(*m.signature))
def test_metres_add_up(metre):
    numerator, denominator = metre.signature
    assert metre.steps == numerator * 96 // denominator
    for fine in (False, True):
        for swing in (False, True):
            slots = metre.slots(fine, swing)
            assert list(slots) == sorted(set(slots)) and set(metre.onsets) <= set(slots)
            assert slots[-1] < metre.steps
    assert 0 not in metre.backbeats and metre.backbeats


@pytest.mark.parametrize(
    ("numeral", "root", "intervals"),
    [
        ("I", 0, (0, 4, 7)),
        ("bVII", 10, (0, 4, 7)),
        ("vi7", 9, (0, 3, 7, 10)),
        ("V7", 7, (0, 4, 7, 10)),
        ("iihdim7", 2, (0, 3, 6, 10)),
        ("Vsus4", 7, (0, 5, 7)),
    ],
)
def test_numerals(numeral, root, intervals):
    assert Chord.from_numeral(numeral, 0) == (root, intervals)
    assert Chord.from_numeral(numeral, 5).root == (root + 5) % 12


def test_every_progression_parses():
    for progressions in PROGRESSIONS.values():
        for progression in progressions:
            assert [Chord.from_numeral(numeral, 0) for numeral in progression.split()]


def test_corpus_survives_dump_and_reload(tmp_path):
    paths = compose_corpus(tmp_path / "songs", 12, seed=4)
    assert [path.name for path in paths] == sorted(path.name for path in (tmp_path / "songs").iterdir())
    for i, path in enumerate(paths):
        song, loaded = compose(4 * 100_003 + i), miditoolkit.MidiFile(path)
        assert sorted(notes(loaded)) == sorted(notes(song))
        assert signatures(loaded) == signatures(song)
        tempi = [(round(t.tempo, 2), t.time) for t in loaded.tempo_changes]
        assert tempi == [(t.tempo, t.time) for t in song.tempo_changes]


def test_corpus_can_be_written_in_pieces(tmp_path):
    whole = compose_corpus(tmp_path / "whole", 3, seed=1)
    pieces = compose_corpus(tmp_path / "pieces", 1, seed=1) + compose_corpus(
        tmp_path / "pieces", 2, 1, first=1
    )
    assert [path.name for path in pieces] == [path.name for path in whole]
    assert [path.read_bytes() for path in pieces] == [path.read_bytes() for path in whole]


def run_command(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "meloformer.compose", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_command(tmp_path):
    done = run_command("--output", tmp_path / "out", "--count", 2, "--seed", 9)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.mid"))) == 2


def test_a_full_disk_leaves_no_half_song(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"^cannot write .*song-0000\.mid: No space left on device$"):
        command(["--output", str(tmp_path), "--count", "1"])
    assert not list(tmp_path.iterdir())


def test_command_fails_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = run_command("--output", tmp_path / "file", "--count", 1)
    assert done.returncode == 2
    assert (
        done.stderr.startswith(f"error: cannot write {tmp_path / 'file'}: ") and done.stderr.count("\n") == 1
    )
