import itertools
import struct
import subprocess
import sys

import miditoolkit
import pytest
from miditoolkit import Instrument, Marker, Note, TempoChange, TimeSignature

from meloformer.composer.compose import compose
from meloformer.errors import UserError
from meloformer.midi.general_midi import PROGRAM_NAMES
from meloformer.plots import piano_roll as plot
from meloformer.plots import roll_axes
from meloformer.plots.piano_roll import piano_roll


def png_chunks(path) -> dict[bytes, bytes]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        chunks[data[at + 4 : at + 8]] = data[at + 8 : at + 8 + size]
        at += size + 12
    return chunks


def song(*instruments: Instrument, signatures=((4, 4, 0),), markers=()) -> miditoolkit.MidiFile:
    midi = miditoolkit.MidiFile(ticks_per_beat=480)
    midi.instruments = list(instruments)
    midi.time_signature_changes = [TimeSignature(*signature) for signature in signatures]
    midi.markers = [Marker(text, tick) for text, tick in markers]
    return midi


def part(program: int, *notes: tuple[int, int, int], drum: bool = False, velocity: int = 90) -> Instrument:
    return Instrument(program, drum, notes=[Note(velocity, pitch, start, end) for pitch, start, end in notes])


@pytest.fixture
def figure_of(monkeypatch, tmp_path):
    """The figure that a drawing function would have saved."""

    def draw(function, *arguments):
        figures = []
        monkeypatch.setattr(plot, "save_figure", lambda figure, path: figures.append(figure))
        function(*arguments, tmp_path / "unused.png")
        return figures[0]

    return draw


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize(
    "midi",
    [
        compose(3, bars=1),
        compose(4, bars=40),
        compose(2, bars=330),
        miditoolkit.MidiFile(),
        song(part(0, (60, 0, 480))),
        song(part(0, (36, 0, 20), drum=True)),
        song(part(0, (0, 0, 1), (127, 1_000_000, 1_000_001))),
        song(part(5, (60, 0, 96)), signatures=[(4, 4, 100), (1, 32, 500)]),
    ],
    ids=["one-bar", "40-bars", "330-bars", "empty", "one-note", "only-drums", "extremes", "late-signature"],
)
def test_piano_roll_of(midi, tmp_path):
    piano_roll(midi, tmp_path / "roll.png")
    width, height = struct.unpack(">II", png_chunks(tmp_path / "roll.png")[b"IHDR"][:8])
    assert width == 2400 and 200 < height < 3600


def test_pictures_are_reproducible_and_carry_no_dates(tmp_path):
    for name in ("a.png", "b.png"):
        piano_roll(compose(5, bars=8), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert set(png_chunks(tmp_path / "a.png")) == {b"IHDR", b"pHYs", b"IDAT", b"IEND"}


def test_each_program_has_a_colour_and_its_name(figure_of):
    midi = song(
        part(33, (36, 0, 480)),
        part(0, (60, 0, 480)),
        part(33, (40, 480, 960)),
        part(0, (38, 0, 9), drum=True),
    )
    figure = figure_of(piano_roll, midi)
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["Grand Piano", "Fingered Bass", "Drums"]
    assert len({patch.get_facecolor() for patch in legend.get_patches()}) == 3
    roll, lane = figure.axes
    drawn = [boxes for boxes in roll.collections if hasattr(boxes, "get_paths")][-2:]
    assert [len(boxes.get_paths()) for boxes in drawn] == [1, 2]
    assert [label.get_text() for label in lane.get_yticklabels()] == ["snare"]


def test_boxes_lie_at_their_ticks_and_pitches_and_loud_is_darker(figure_of):
    midi = song(part(0, (60, 480, 960)), part(1, (64, 0, 1920), velocity=20))
    boxes = figure_of(piano_roll, midi).axes[0].collections[-2:]
    quiet, loud = (collection.get_paths()[0].get_extents() for collection in boxes)
    assert (quiet.x0, loud.x0) == (0, 480)
    assert 900 < loud.x1 <= 960 and quiet.y0 < 64 < quiet.y1 and loud.y0 < 60 < loud.y1
    assert boxes[0].get_facecolor()[0, :3].mean() > 0.8 > boxes[1].get_facecolor()[0, :3].mean()


def test_bar_lines_follow_the_time_signatures():
    midi = song(signatures=[(3, 4, 0), (6, 8, 2880), (4, 4, 5000), (7, 8, 99_000)])
    assert roll_axes.bar_lines_of(midi, 8_000) == [0, 1440, 2880, 4320, 5000, 6920, 8840]
    assert roll_axes.bar_lines_of(midi, 0) == [0, 1440]
    assert roll_axes.bar_lines_of(song(signatures=[(2, 4, 960)]), 1000) == [0, 960, 1920]


def test_bars_are_numbered_from_one_and_drawn_to_scale(figure_of):
    midi = song(part(0, (60, 0, 5760)), signatures=[(4, 4, 0), (2, 4, 3840)])
    axes = figure_of(piano_roll, midi).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3", "4"]
    assert list(axes.get_xticks()) == [0, 1920, 3840, 4800]
    assert [text for text in texts(axes) if "/" in text] == ["4/4", "2/4"]


def test_a_drum_that_is_held_adds_no_empty_bar(figure_of):
    midi = song(part(0, (60, 0, 1920)), part(0, (42, 1800, 2280), drum=True))
    assert figure_of(piano_roll, midi).axes[0].get_xlim() == (0, 1920)


@pytest.mark.parametrize("bars", [1, 24, 25, 80, 81, 641, 5000])
def test_rows_hold_every_bar_once(bars):
    rows = plot._rows(range(bars + 1))
    assert rows[0][0] == 0 and rows[-1][1] == bars and len(rows) <= 5
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(rows))


def test_chord_labels_stand_over_their_bars_once_each(figure_of):
    markers = [("A:min7", 0), ("A:min7", 1920), ("F#:maj", 3840), ("N", 5760)]
    axes = figure_of(piano_roll, song(part(0, (60, 0, 7680)), markers=markers)).axes[0]
    labels = [(text.get_text(), text.get_position()[0]) for text in axes.texts if "/" not in text.get_text()]
    assert labels == [("Am7", 0), ("F♯", 3840), ("N.C.", 5760)]


def test_crowded_markers_are_left_out(figure_of):
    markers = [(f"marker {i}", i * 10) for i in range(200)]
    axes = figure_of(piano_roll, song(part(0, (60, 0, 7680)), markers=markers)).axes[0]
    assert texts(axes) == ["4/4"]


def test_summary_counts_bars_and_time():
    midi = song(part(0, (60, 0, 480 * 240)))
    midi.tempo_changes = [TempoChange(120, 0), TempoChange(60, 480 * 120)]
    lines = roll_axes.bar_lines_of(midi, 480 * 240)
    assert roll_axes.summary_of(midi, lines).split("   ·   ") == ["60 bars", "60 to 120 BPM", "3:00"]


def test_there_are_128_program_names():
    assert len(PROGRAM_NAMES) == len(set(PROGRAM_NAMES)) == 128
    assert [PROGRAM_NAMES[i] for i in (0, 32, 56, 127)] == [
        "Grand Piano",
        "Acoustic Bass",
        "Trumpet",
        "Gunshot",
    ]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot write the picture .*roll\.png"):
        piano_roll(compose(1, bars=2), tmp_path / "none" / "roll.png")


def test_pyplot_stays_out():
    code = (
        "import sys, meloformer.plots.piano_roll, meloformer.plots.loss_curve; "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
