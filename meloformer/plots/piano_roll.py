"""A song as a piano roll: a PNG file."""

import itertools
import math
import os
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from miditoolkit import MidiFile

from ..tokens.vocab import QUALITIES
from .roll_axes import (
    bar_lines_of,
    draw_bar_grid,
    draw_drums,
    draw_melodic,
    draw_part_legend,
    number_bars,
    parts_of,
    summary_of,
)
from .style import DPI, GREY, INK, save_figure

# In inches.
_WIDTH, _LEFT, _RIGHT, _ROW_GAP = 16.0, 0.75, 0.3, 0.62
_MAX_ROWS = 5
_BARS_PER_ROW = (16, 24, 32, 48, 64, 96, 128)
_QUALITY_SIGNS = {
    "maj": "", "min": "m", "dim": "°", "aug": "+", "min6": "m6", "min7": "m7", "min9": "m9",
    "minmaj7": "m(maj7)", "hdim7": "ø7", "dim7": "°7",
}  # fmt: skip


def piano_roll(midi: MidiFile, path: str | os.PathLike, title: str = "") -> None:
    """Draw a song as a PNG file.

    Bars run from left to right, wrapped into at most five rows; bar lines follow the time signatures.
    Each program has a colour, louder notes are darker, and drums are drawn below the pitches. Markers, such
    as chord labels, are written above the notes if they fit.

    Args:
        midi: the song; it may be empty.
        path: the file to write.
        title: text above the picture; "Piano roll" if empty.

    Raises:
        UserError: the file cannot be written.
    """
    parts = parts_of(midi)
    # A drum that is struck last may be held over a bar line: that bar would be empty.
    ends = [
        int(part.notes[:, 0].max()) + 1 if part.is_drum else int(part.notes[:, 1].max()) for part in parts
    ]
    bar_lines = bar_lines_of(midi, max(ends, default=0))
    rows = _rows(bar_lines)
    melodic = [part for part in parts if not part.is_drum]
    drums = [part for part in parts if part.is_drum]
    pitches = np.concatenate([part.notes[:, 2] for part in melodic]) if melodic else np.array([60, 72])
    low, high = int(pitches.min()) - 2, int(pitches.max()) + 2
    roll = min(max((high - low) * 0.085, 1.5), 5.5 if len(rows) == 1 else 2.6)
    lane = 0.62 if drums else 0.0

    legend_rows = math.ceil(max(len(parts), 1) / 8)
    head = 0.75 + 0.24 * legend_rows
    height = head + len(rows) * (roll + lane + _ROW_GAP)
    figure = Figure(figsize=(_WIDTH, height), dpi=DPI, facecolor="white")
    longest = max(bar_lines[stop] - bar_lines[start] for start, stop in rows)
    ticks_per_inch = longest / (_WIDTH - _LEFT - _RIGHT)
    markers = _fitting_markers(midi, bar_lines, rows, ticks_per_inch)

    for index, (start, stop) in enumerate(rows):
        top = height - head - index * (roll + lane + _ROW_GAP)
        width = (bar_lines[stop] - bar_lines[start]) / ticks_per_inch

        def add_axes(bottom: float, tall: float, width: float = width, start=start, stop=stop) -> Axes:
            box = (_LEFT / _WIDTH, bottom / height, width / _WIDTH, tall / height)
            axes = figure.add_axes(box, xlim=(bar_lines[start], bar_lines[stop]))
            draw_bar_grid(axes, bar_lines[start : stop + 1])
            return axes

        axes = add_axes(top - roll, roll)
        draw_melodic(axes, melodic, low, high, ticks_per_inch)
        _label_top(axes, midi, markers, roll)
        if drums:
            axes = add_axes(top - roll - lane, lane)
            draw_drums(axes, drums, ticks_per_inch)
        number_bars(axes, bar_lines, start, stop, ticks_per_inch)

    x = _LEFT / _WIDTH
    figure.text(x, 1 - 0.22 / height, title or "Piano roll", color=INK, size=13, weight="bold", va="top")
    figure.text(
        1 - _RIGHT / _WIDTH,
        1 - 0.25 / height,
        summary_of(midi, bar_lines),
        color=GREY,
        size=9,
        ha="right",
        va="top",
    )
    if parts:
        draw_part_legend(figure, [(part.name, part.colour) for part in parts], x, 8, 1.6)
    save_figure(figure, path)


def _rows(bar_lines: Sequence[int]) -> list[tuple[int, int]]:
    """First bar and end of each row of the picture."""
    bars = len(bar_lines) - 1
    if bars <= 24:
        return [(0, bars)]
    per_row = next((n for n in _BARS_PER_ROW if n * _MAX_ROWS >= bars), math.ceil(bars / _MAX_ROWS))
    return [(start, min(start + per_row, bars)) for start in range(0, bars, per_row)]


def _label_top(axes: Axes, midi: MidiFile, markers: list[tuple[int, str]], roll: float) -> None:
    """Time signatures and markers above the notes."""
    low, high = axes.get_xlim()
    above = 1 + 0.05 / roll
    place = {"transform": axes.get_xaxis_transform(), "va": "bottom", "ha": "left", "clip_on": False}
    for tick, text in markers:
        if low <= tick < high:
            axes.text(tick, above, text, color=INK, size=7.5, **place)
    for change in midi.time_signature_changes:
        if low <= change.time < high:
            text = f"{change.numerator}/{change.denominator}"
            axes.text(change.time, above + 0.15 / roll, text, color=GREY, size=8, weight="bold", **place)
            axes.axvline(change.time, color=GREY, linewidth=1.0, zorder=1)


def _fitting_markers(
    midi: MidiFile, bar_lines: Sequence[int], rows: list[tuple[int, int]], ticks_per_inch: float
) -> list[tuple[int, str]]:
    """Markers as (tick, text), consecutive equal ones once; none at all if many would overlap."""
    markers: list[tuple[int, str]] = []
    starts = {bar_lines[start] for start, _ in rows}
    for marker in sorted(midi.markers, key=lambda marker: marker.time):
        text = _short_chord(" ".join(marker.text.split()))
        if text and (not markers or markers[-1][1] != text) and marker.time < bar_lines[-1]:
            markers.append((marker.time, text[:24]))
    crowded = sum(
        len(text) * 0.068 + 0.06 > (after - tick) / ticks_per_inch
        for (tick, text), (after, _) in itertools.pairwise(markers)
        if after not in starts
    )
    return [] if crowded > len(markers) // 20 else markers


def _short_chord(text: str) -> str:
    """A chord label in lead-sheet notation: `A:min7` -> `Am7`, `N` -> `N.C.`; other text unchanged."""
    if text == "N":
        return "N.C."
    root, colon, quality = text.partition(":")
    if not colon or quality not in QUALITIES:
        return text
    return root.replace("#", "♯") + _QUALITY_SIGNS.get(quality, quality)
