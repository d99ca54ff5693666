"""Several songs on one page, a piano roll each: a PNG file."""

import dataclasses
import os
from collections.abc import Sequence

from matplotlib.figure import Figure
from miditoolkit import MidiFile

from ..midi.general_midi import FAMILY_NAMES
from .roll_axes import (
    Part,
    bar_lines_of,
    draw_bar_grid,
    draw_drums,
    draw_melodic,
    draw_part_legend,
    drum_group,
    number_bars,
    parts_of,
    summary_of,
)
from .style import COLOURS, GREY, INK, save_figure

# In inches.
_WIDTH, _LEFT, _RIGHT = 13.0, 0.75, 0.25
_HEAD, _TITLE, _ROLL, _GAP = 0.95, 0.22, 1.5, 0.36
_LANE = 0.11  # of one part of the drum kit
# Of each General MIDI family: the colours that differ most for the families that play most.
_FAMILY_COLOURS = tuple(COLOURS[i] for i in (0, 11, 8, 1, 2, 3, 6, 4, 7, 9, 5, 14, 10, 12, 13, 15))


def song_rows(
    songs: Sequence[tuple[str, MidiFile]], path: str | os.PathLike, title: str, most_bars: int = 32
) -> None:
    """Draw songs below each other as one PNG file.

    A row has the first `most_bars` bars of a song, over the whole width. Notes have the colour of their
    General MIDI family, the same in every row, and are darker where they are louder; drums are a strip below.
    Programs are named above each row.

    Args:
        songs: name and song of each row, at least one; every song has a note.
        path: the file to write.
        title: text above the page.
        most_bars: how many bars of a song are drawn, at least 1.

    Raises:
        UserError: the file cannot be written.
    """
    rows = [(name, midi, _coloured(parts_of(midi))) for name, midi in songs]
    height = _HEAD + sum(_TITLE + _height(parts) + _GAP for _, _, parts in rows)
    figure = Figure(figsize=(_WIDTH, height), facecolor="white")
    _draw_head(figure, title, [part for _, _, parts in rows for part in parts])
    top = height - _HEAD
    for name, midi, parts in rows:
        _draw_row(figure, top, name, midi, parts, most_bars)
        top -= _TITLE + _height(parts) + _GAP
    save_figure(figure, path)


def _coloured(parts: list[Part]) -> list[Part]:
    return [
        part if part.is_drum else dataclasses.replace(part, colour=_FAMILY_COLOURS[part.program // 8])
        for part in parts
    ]


def _height(parts: list[Part]) -> float:
    """Of the axes of a row."""
    return _ROLL * any(not part.is_drum for part in parts) + _drums_height(parts)


def _drums_height(parts: list[Part]) -> float:
    keys = {key for part in parts if part.is_drum for key in part.notes[:, 2].tolist()}
    return _LANE * len({drum_group(key) for key in keys})


def _draw_head(figure: Figure, title: str, parts: list[Part]) -> None:
    height = figure.get_figheight()
    x = _LEFT / _WIDTH
    figure.text(x, 1 - 0.15 / height, title, color=INK, size=13, weight="bold", va="top")
    colours = {part.program // 8: part.colour for part in parts if not part.is_drum}
    families = [(FAMILY_NAMES[family], colours[family]) for family in sorted(colours)]
    families += [("Drums", part.colour) for part in parts if part.is_drum][:1]
    draw_part_legend(figure, families, x, 9, 1.4)


def _draw_row(
    figure: Figure, top: float, name: str, midi: MidiFile, parts: list[Part], most_bars: int
) -> None:
    """Draw a song into the figure from `top` (inches from its lower edge) down."""
    height = figure.get_figheight()
    # Up to the last onset: a note that sounds on makes no bar.
    bar_lines = bar_lines_of(midi, max(int(part.notes[:, 0].max()) for part in parts) + 1)
    summary = summary_of(midi, bar_lines)
    bar_lines = bar_lines[: most_bars + 1]
    ticks_per_inch = (bar_lines[-1] - bar_lines[0]) / (_WIDTH - _LEFT - _RIGHT)
    left, right, above = _LEFT / _WIDTH, 1 - _RIGHT / _WIDTH, (top - 0.05) / height
    programs = ", ".join(part.name for part in parts)
    signatures = list(dict.fromkeys(f"{c.numerator}/{c.denominator}" for c in midi.time_signature_changes))
    figure.text(left, above, name, color=INK, size=9, weight="bold", va="top")
    indent = left + (0.1 + 0.085 * len(name)) / _WIDTH
    figure.text(indent, above, programs, color=INK, size=8.5, va="top")
    figure.text(
        right,
        above,
        "   ·   ".join([", ".join(signatures) or "4/4", summary]),
        color=GREY,
        size=8,
        ha="right",
        va="top",
    )

    def add_axes(bottom: float, tall: float):
        box = (left, bottom / height, right - left, tall / height)
        axes = figure.add_axes(box, xlim=(bar_lines[0], bar_lines[-1]))
        draw_bar_grid(axes, bar_lines)
        return axes

    top -= _TITLE
    melodic = [part for part in parts if not part.is_drum]
    if melodic:
        pitches = [pitch for part in melodic for pitch in part.notes[:, 2].tolist()]
        top -= _ROLL
        axes = add_axes(top, _ROLL)
        draw_melodic(axes, melodic, min(pitches) - 2, max(pitches) + 2, ticks_per_inch)
    if drums := [part for part in parts if part.is_drum]:
        tall = _drums_height(drums)
        top -= tall
        axes = add_axes(top, tall)
        draw_drums(axes, drums, ticks_per_inch)
        axes.tick_params(axis="y", labelsize=5.5)
    number_bars(axes, bar_lines, 0, len(bar_lines) - 1, ticks_per_inch)
