"""A song as a piano roll: a PNG file."""

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from miditoolkit import Instrument, MidiFile

from ..midi.general_midi import DRUM_GROUPS, PROGRAM_NAMES
from ..tokens.vocab import QUALITIES
from .style import COLOURS, DPI, FAINT, GREY, INK, LINE, save_figure

_DRUM_COLOUR = "#4a4f5c"

# In inches.
_WIDTH, _LEFT, _RIGHT, _ROW_GAP = 16.0, 0.75, 0.3, 0.62
_MAX_ROWS = 5
_BARS_PER_ROW = (16, 24, 32, 48, 64, 96, 128)
_QUALITY_SIGNS = {
    "maj": "", "min": "m", "dim": "°", "aug": "+", "min6": "m6", "min7": "m7", "min9": "m9",
    "minmaj7": "m(maj7)", "hdim7": "ø7", "dim7": "°7",
}  # fmt: skip


@dataclass(frozen=True)
class _Part:
    name: str
    colour: str
    is_drum: bool
    notes: np.ndarray  # int64 [n, 4]: start, end (ticks), pitch, velocity


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
    parts = _parts(midi)
    bar_lines = _bar_lines(midi, max((int(part.notes[:, 1].max()) for part in parts), default=0))
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
            _bar_grid(axes, bar_lines[start : stop + 1])
            return axes

        axes = add_axes(top - roll, roll)
        _draw_melodic(axes, melodic, low, high, ticks_per_inch)
        _label_top(axes, midi, markers, roll)
        if drums:
            axes = add_axes(top - roll - lane, lane)
            _draw_drums(axes, drums, ticks_per_inch)
        _number_bars(axes, bar_lines, start, stop, ticks_per_inch)

    x = _LEFT / _WIDTH
    figure.text(x, 1 - 0.22 / height, title or "Piano roll", color=INK, size=13, weight="bold", va="top")
    figure.text(
        1 - _RIGHT / _WIDTH,
        1 - 0.25 / height,
        _summary(midi, bar_lines),
        color=GREY,
        size=9,
        ha="right",
        va="top",
    )
    if parts:
        figure.legend(
            handles=[Patch(color=part.colour, label=part.name) for part in parts],
            loc="upper left",
            bbox_to_anchor=(x, 1 - 0.45 / height),
            ncols=8,
            fontsize=8.5,
            labelcolor=INK,
            frameon=False,
            borderpad=0,
            borderaxespad=0,
            handlelength=0.9,
            handleheight=0.9,
            handletextpad=0.5,
            columnspacing=1.6,
        )
    save_figure(figure, path)


def _parts(midi: MidiFile) -> list[_Part]:
    """The notes of each program, tracks of one program together; drums last."""
    tracks: dict[tuple[bool, int], list[Instrument]] = {}
    for track in midi.instruments:
        if track.notes:
            tracks.setdefault((track.is_drum, 0 if track.is_drum else track.program), []).append(track)
    parts = []
    for (is_drum, program), group in sorted(tracks.items()):
        notes = [(n.start, n.end, n.pitch, n.velocity) for track in group for n in track.notes]
        name = "Drums" if is_drum else PROGRAM_NAMES[program]
        colour = _DRUM_COLOUR if is_drum else COLOURS[len(parts) % len(COLOURS)]
        parts.append(_Part(name, colour, is_drum, np.array(notes, dtype=np.int64)))
    return parts


def _bar_lines(midi: MidiFile, end: int) -> list[int]:
    """Ticks of the bar lines up to the first one at or after `end`; at least one bar.

    A time signature that changes inside a bar cuts it short.
    """
    changes = [
        (c.time, c.numerator, c.denominator)
        for c in sorted(midi.time_signature_changes, key=lambda c: c.time)
    ]
    if not changes or changes[0][0] > 0:
        changes.insert(0, (0, 4, 4))
    bar_lines, last_bar = [0], 4 * midi.ticks_per_beat
    for (tick, numerator, denominator), after in zip(changes, [*(c[0] for c in changes[1:]), end]):
        bar = max(numerator * 4 * midi.ticks_per_beat // denominator, 1)
        starts = range(tick, min(after, end), bar)
        if starts or tick == 0:
            bar_lines, last_bar = [*bar_lines[: None if tick else 0], *(starts or [0])], bar
    return [*bar_lines, bar_lines[-1] + last_bar]


def _rows(bar_lines: Sequence[int]) -> list[tuple[int, int]]:
    """First bar and end of each row of the picture."""
    bars = len(bar_lines) - 1
    if bars <= 24:
        return [(0, bars)]
    per_row = next((n for n in _BARS_PER_ROW if n * _MAX_ROWS >= bars), math.ceil(bars / _MAX_ROWS))
    return [(start, min(start + per_row, bars)) for start in range(0, bars, per_row)]


def _bar_grid(axes: Axes, bar_lines: Sequence[int]) -> None:
    axes.vlines(bar_lines, 0, 1, transform=axes.get_xaxis_transform(), color=LINE, linewidth=0.6, zorder=1)
    axes.tick_params(length=0, labelsize=7.5, labelcolor=GREY, pad=3)
    axes.set_xticks([])
    for spine in axes.spines.values():
        spine.set(color=LINE, linewidth=0.6)


def _draw_melodic(axes: Axes, parts: list[_Part], low: int, high: int, ticks_per_inch: float) -> None:
    axes.set_ylim(low - 0.5, high + 0.5)
    for pitch in range(low, high + 1):
        if pitch % 12 in (1, 3, 6, 8, 10):
            axes.axhspan(pitch - 0.5, pitch + 0.5, color=FAINT, linewidth=0, zorder=0)
    octaves = [pitch for pitch in range(low, high + 1) if pitch % 12 == 0]
    axes.hlines(
        [pitch - 0.5 for pitch in octaves],
        0,
        1,
        transform=axes.get_yaxis_transform(),
        color=LINE,
        linewidth=0.5,
    )
    axes.set_yticks(octaves, [f"C{pitch // 12 - 1}" for pitch in octaves])
    # Parts with long notes are drawn first and thicker: where two share a pitch, both remain visible.
    layers = sorted(parts, key=lambda part: -np.mean(part.notes[:, 1] - part.notes[:, 0]))
    for part, half in zip(layers, np.linspace(0.46, 0.3, len(layers))):
        start, end, pitch, velocity = part.notes.T
        end = np.maximum(end - 0.012 * ticks_per_inch, start + 0.012 * ticks_per_inch)
        _draw_boxes(axes, start, end, pitch - half, pitch + half, velocity, part.colour)


def _draw_drums(axes: Axes, parts: list[_Part], ticks_per_inch: float) -> None:
    """A lane for each part of the kit. A hit is a short stroke: drums have no length."""
    keys = np.unique(np.concatenate([part.notes[:, 2] for part in parts]))
    group_of = {
        key: next((g for g, own in DRUM_GROUPS.items() if key in own), "other") for key in keys.tolist()
    }
    shown = [group for group in DRUM_GROUPS if group in group_of.values()]
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_yticks(range(len(shown)), shown, fontsize=6.5)
    axes.set_facecolor("#fafbfc")
    for part in parts:
        start, end, pitch, velocity = part.notes.T
        lane = np.array([shown.index(group_of[key]) for key in pitch.tolist()])
        end = np.minimum(end, start + 0.035 * ticks_per_inch)
        end = np.maximum(end, start + 0.012 * ticks_per_inch)
        _draw_boxes(axes, start, end, lane - 0.36, lane + 0.36, velocity, part.colour)


def _draw_boxes(
    axes: Axes,
    left: np.ndarray,
    right: np.ndarray,
    bottom: np.ndarray,
    top: np.ndarray,
    velocity: np.ndarray,
    colour: str,
) -> None:
    """Draw the boxes that lie within the axes; the quieter a note, the closer to white."""
    low, high = axes.get_xlim()
    seen = (right > low) & (left < high)
    corners = np.stack([left, bottom, left, top, right, top, right, bottom], axis=1)[seen].reshape(-1, 4, 2)
    # Mixed with white, not transparent: overlapping notes would blend into colours not in the legend.
    strength = 0.3 + 0.7 * velocity[seen, None] / 127
    colours = 1 - strength * (1 - np.array(to_rgb(colour)))
    axes.add_collection(PolyCollection(corners, facecolors=colours, linewidths=0, zorder=2), autolim=False)


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


def _number_bars(axes: Axes, bar_lines: Sequence[int], start: int, stop: int, ticks_per_inch: float) -> None:
    """Number the bars below the row, from 1, leaving some out where they would be too close."""
    bar_width = (bar_lines[stop] - bar_lines[start]) / (stop - start) / ticks_per_inch
    step = next((n for n in (1, 2, 4, 8, 16, 32, 64) if n * bar_width >= 0.4), 128)
    numbered = range(start, stop, step)
    axes.set_xticks([bar_lines[bar] for bar in numbered], [str(bar + 1) for bar in numbered], ha="left")


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


def _summary(midi: MidiFile, bar_lines: Sequence[int]) -> str:
    """Bars, tempo range and playing time."""
    tempi = sorted((change.time, change.tempo) for change in midi.tempo_changes if change.tempo > 0)
    if not tempi or tempi[0][0] > 0:
        tempi.insert(0, (0, 120.0))
    seconds = sum(
        max(min(after, bar_lines[-1]) - tick, 0) / midi.ticks_per_beat * 60 / tempo
        for (tick, tempo), after in zip(tempi, [*(tick for tick, _ in tempi[1:]), bar_lines[-1]])
    )
    slow, fast = (round(choose(tempo for _, tempo in tempi)) for choose in (min, max))
    bpm = f"{slow} BPM" if slow == fast else f"{slow} to {fast} BPM"
    bars = len(bar_lines) - 1
    return f"{bars:,} bar{'s' * (bars > 1)}   ·   {bpm}   ·   {int(seconds) // 60}:{int(seconds) % 60:02d}"
