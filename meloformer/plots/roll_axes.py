"""What piano rolls are drawn with: the parts of a song, its bar lines, and notes on axes."""

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
from .style import COLOURS, FAINT, GREY, LINE, draw_legend

_DRUM_COLOUR = "#4a4f5c"


@dataclass(frozen=True)
class Part:
    """The notes of one program."""

    program: int  # 0 for drums
    name: str
    colour: str
    is_drum: bool
    notes: np.ndarray  # int64 [n, 4]: start, end (ticks), pitch, velocity


def parts_of(midi: MidiFile) -> list[Part]:
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
        parts.append(Part(program, name, colour, is_drum, np.array(notes, dtype=np.int64)))
    return parts


def draw_part_legend(
    figure: Figure, entries: list[tuple[str, str]], x: float, columns: int, gap: float
) -> None:
    """A legend below the title of a piano roll.

    Args:
        entries: label and colour of each.
        x: of its left edge, fraction of the width.
        gap: between its columns, in font sizes.
    """
    handles = [Patch(color=colour, label=label) for label, colour in entries]
    squares = {"handlelength": 0.9, "handleheight": 0.9, "handletextpad": 0.5}
    draw_legend(figure, handles, x, 0.45, columns, **squares, columnspacing=gap)


def bar_lines_of(midi: MidiFile, end: int) -> list[int]:
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


def draw_bar_grid(axes: Axes, bar_lines: Sequence[int]) -> None:
    """Bar lines (ticks) behind the notes; no labels yet."""
    axes.vlines(bar_lines, 0, 1, transform=axes.get_xaxis_transform(), color=LINE, linewidth=0.6, zorder=1)
    axes.tick_params(length=0, labelsize=7.5, labelcolor=GREY, pad=3)
    axes.set_xticks([])
    for spine in axes.spines.values():
        spine.set(color=LINE, linewidth=0.6)


def draw_melodic(axes: Axes, parts: list[Part], low: int, high: int, ticks_per_inch: float) -> None:
    """The notes of melodic parts between the pitches `low` and `high`, with an octave grid."""
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


def drum_group(key: int) -> str:
    """The part of the drum kit, of `DRUM_GROUPS`, that a key belongs to."""
    return next((group for group, own in DRUM_GROUPS.items() if key in own), "other")


def draw_drums(axes: Axes, parts: list[Part], ticks_per_inch: float) -> None:
    """A lane for each part of the kit. A hit is a short stroke: drums have no length."""
    keys = np.unique(np.concatenate([part.notes[:, 2] for part in parts]))
    group_of = {key: drum_group(key) for key in keys.tolist()}
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


def number_bars(axes: Axes, bar_lines: Sequence[int], start: int, stop: int, ticks_per_inch: float) -> None:
    """Number the bars below the row, from 1, leaving some out where they would be too close."""
    bar_width = (bar_lines[stop] - bar_lines[start]) / (stop - start) / ticks_per_inch
    step = next((n for n in (1, 2, 4, 8, 16, 32, 64) if n * bar_width >= 0.4), 128)
    numbered = range(start, stop, step)
    axes.set_xticks([bar_lines[bar] for bar in numbered], [str(bar + 1) for bar in numbered], ha="left")


def summary_of(midi: MidiFile, bar_lines: Sequence[int]) -> str:
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
