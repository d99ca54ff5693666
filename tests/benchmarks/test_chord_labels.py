import json
import math

import miditoolkit
import numpy as np
import pytest

from benchmarks import chords
from meloformer.errors import UserError
from meloformer.tokens import vocab

CHORDS = {"C": (48, 60, 64, 67), "A:min": (45, 60, 64, 69), "F": (41, 60, 65, 69), "G": (43, 62, 67, 71)}
SONG = ["C", "A:min", "F", "G", "C", "A:min", "F", "G"]
SECONDS = 1.6  # of a bar of four quarters


def song(names=SONG, late=0, signature=(4, 4)):
    """A chord a bar, at 150 BPM; the first begins `late` ticks after a bar line."""
    midi = miditoolkit.MidiFile(ticks_per_beat=480)
    midi.tempo_changes = [miditoolkit.TempoChange(150, 0)]
    midi.time_signature_changes = [miditoolkit.TimeSignature(*signature, 0)]
    track = miditoolkit.Instrument(0)
    track.notes = [
        miditoolkit.Note(80, pitch, 1920 * at + late, 1920 * (at + 1) + late)
        for at, name in enumerate(names)
        for pitch in CHORDS[name]
    ]
    midi.instruments = [track]
    return midi


def spans(names=SONG, late=0):
    begin = late / 480 * SECONDS / 4
    chord = [name if ":" in name or name == "N" else f"{name}:maj" for name in names]
    return [(begin + SECONDS * at, begin + SECONDS * (at + 1), name) for at, name in enumerate(chord)]


def annotate(folder, name, lines):
    (folder / name).mkdir(parents=True)
    (folder / name / "chord_midi.txt").write_text("".join(f"{a}\t{b}\t{c}\n" for a, b, c in lines))


def counts(tally):
    return tally.bars, tally.root, tally.triad


def test_right_labels_count_in_both_ways_of_barring():
    found = chords.measure(song(), spans())
    assert counts(found["file"]) == counts(found["annotated"]) == (8, 8, 8)


def test_errors_are_told_by_interval_and_by_triad():
    wrong = ["C", "A:maj", "F", "E:min", "N", "A:min", "Bb:maj7", "G:sus4"]
    tally = chords.measure(song(), spans(wrong))["file"]
    assert counts(tally) == (7, 5, 3)
    assert tally.roots == {"3": 1, "7": 1}
    assert tally.triads == {"maj > min": 1, "sus4 > maj": 1}


@pytest.mark.parametrize("late, signature", [(480, (4, 4)), (200, (4, 4)), (200, (1, 4)), (1100, (3, 4))])
def test_bars_as_annotated_begin_where_chords_begin_whatever_the_file_says(late, signature):
    found = chords.measure(song(late=late, signature=signature), spans(late=late))
    assert counts(found["annotated"]) == (8, 8, 8)
    quarters = {(4, 4): 0, (1, 4): 24, (3, 4): 3}[signature]  # whole bars of the file within one chord
    assert found["file"].bars == quarters


def test_a_bar_with_two_chords_does_not_count():
    first, *rest = spans()
    halves = [(0, first[1] / 2, "C:maj"), (first[1] / 2, first[1], "E:min")]
    assert counts(chords.measure(song(), halves + rest)["file"]) == (7, 7, 7)


def test_reading_joins_equal_neighbours_and_leaves_the_bass_out(tmp_path):
    annotate(tmp_path, "a", [(0, 1, "C:maj"), (1, 2, "C:maj/3"), (2, 3, "N"), (3, 4, "C:maj")])
    read = chords.read_annotation(tmp_path / "a" / "chord_midi.txt")
    assert read == [(0, 2, "C:maj"), (2, 3, "N"), (3, 4, "C:maj")]


@pytest.mark.parametrize("text", ["0 1", "0 1 H:maj", "0 1 C", "0 1 C:what", "a b C:maj", "0 1 C:maj x"])
def test_a_line_that_is_no_chord_is_refused(tmp_path, text):
    (tmp_path / "chord_midi.txt").write_text(f"0 1 C:maj\n{text}\n")
    with pytest.raises(UserError, match="line 2"):
        chords.read_annotation(tmp_path / "chord_midi.txt")


def test_every_quality_of_the_labels_has_a_triad():
    assert set(vocab.QUALITIES) <= set(chords.TRIAD_OF)


@pytest.mark.parametrize("name, expected", [("B#:7", (0, "maj")), ("Cb:hdim7/b3", (11, "dim")), ("N", None)])
def test_parse_chord(name, expected):
    assert chords.parse_chord(name) == expected


def test_quarters_follow_the_tempo():
    midi = song()
    midi.tempo_changes = [miditoolkit.TempoChange(120, 0), miditoolkit.TempoChange(60, 960)]
    np.testing.assert_allclose(chords.quarters_at(midi, np.array([0.5, 1.0, 2.0])), [1, 2, 3])


def test_the_toy_by_hand():
    nats = chords.toy_nats([np.array([1, 1, 1])], [np.array([1, 1])])
    base = 4 / (3 + len(vocab.CHORD))
    again = 0.1 * base + 0.25 + 0.15 + 0.5 * base
    assert nats == pytest.approx(-(math.log(base) + math.log(again)) / 2)
    assert chords.toy_nats([np.arange(10)], [np.tile([1, 2, 3, 4], 9)]) < 1.5


def test_the_command_writes_figures_and_a_page(tmp_path, capsys):
    songs, annotations = tmp_path / "songs", tmp_path / "annotations"
    songs.mkdir()
    for name in ("001", "002", "not_annotated"):
        song().dump(songs / f"{name}.mid")
    annotate(annotations, "001", spans())
    annotate(annotations, "002", spans(["C", "A:min", "F", "G", "C", "A:min", "F", "E:min"]))
    command = ["--songs", str(songs), "--annotations", str(annotations)]
    toy = ["--toy", str(songs), str(songs)]
    chords.main([*command, "--tuned_on", "001", *toy, "--json", str(tmp_path / "r.json")])
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["totals"]["kept back"]["file"] == {"bars": 8, "root": 7, "root_and_triad": 7}
    assert result["totals"]["all"]["annotated"] == {"bars": 16, "root": 15, "root_and_triad": 15}
    assert result["errors_of_kept_back"]["file"]["roots"] == {"3": 1}
    assert result["toy"]["songs"] == 3 and 0 < result["toy"]["nats"] < 5
    assert (tmp_path / "r.md").read_text() in capsys.readouterr().out
    chords.main(command)
    page = capsys.readouterr().out
    assert "kept back |" not in page and "| **all** | 16 | 93.8 %" in page
    with pytest.raises(UserError, match="007"):
        chords.main([*command, "--tuned_on", "007"])
    with pytest.raises(UserError, match="holds no NAME"):
        chords.main(["--songs", str(songs), "--annotations", str(tmp_path)])
