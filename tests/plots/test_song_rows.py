import itertools

import pytest
from matplotlib.colors import to_hex
from miditoolkit import Instrument, MidiFile, Note

from meloformer.composer.compose import compose
from meloformer.errors import UserError
from meloformer.plots import song_rows as plot
from meloformer.plots.song_rows import song_rows


def song(*parts: tuple[int, bool, int]) -> MidiFile:
    """A song of parts (program, is_drum, pitch) that play a quarter on every beat of 40 bars."""
    midi = MidiFile(ticks_per_beat=480)
    midi.instruments = [
        Instrument(program, drum, notes=[Note(127, pitch, 480 * i, 480 * i + 480) for i in range(160)])
        for program, drum, pitch in parts
    ]
    return midi


@pytest.fixture
def figure_of(monkeypatch):
    """The figure that would have been saved."""

    def draw(*arguments):
        figures = []
        monkeypatch.setattr(plot, "save_figure", lambda figure, path: figures.append(figure))
        song_rows(*arguments)
        return figures[0]

    return draw


def colours(axes) -> set[str]:
    """Of the notes drawn last."""
    return set(map(to_hex, axes.collections[-1].get_facecolor()))


def test_the_picture_is_a_png_of_modest_size(tmp_path):
    path = tmp_path / "songs.png"
    song_rows([(f"song {seed}", compose(seed, bars=8)) for seed in range(2)], path, "Songs")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size < 200_000


def test_a_family_has_one_colour_in_every_row(figure_of):
    figure = figure_of([("a", song((33, False, 40))), ("b", song((0, False, 60), (38, False, 41)))], "x", "T")
    first, second = figure.axes
    piano, bass = plot._FAMILY_COLOURS[0], plot._FAMILY_COLOURS[4]
    assert colours(first) == {bass}
    assert {frozenset(map(to_hex, boxes.get_facecolor())) for boxes in second.collections[-2:]} == {
        frozenset({piano}),
        frozenset({bass}),
    }
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["Piano", "Bass"]
    assert len(set(plot._FAMILY_COLOURS)) == 16


def test_axes_show_the_bars_asked_for_and_drums_have_their_own(figure_of):
    drums, piano = (0, True, 36), (0, False, 60)
    figure = figure_of([("drums", song(drums)), ("both", song(piano, drums))], "x", "T", 32)
    assert [axes.get_xlim() for axes in figure.axes] == [(0, 32 * 1920)] * 3
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["kick"]
    texts = [text.get_text() for text in figure.texts]
    assert {"drums", "both", "Drums", "Grand Piano, Drums"} <= set(texts)
    # Rows stand below each other and do not overlap.
    boxes = [axes.get_position() for axes in figure.axes]
    assert all(below.y1 <= above.y0 + 1e-9 for above, below in itertools.pairwise(boxes)) and boxes[-1].y0 > 0


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot write the picture .*songs\.png"):
        song_rows([("a", compose(1, bars=2))], tmp_path / "none" / "songs.png", "T")
