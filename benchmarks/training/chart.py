"""The chart of `benchmarks.train`: tokens per second by size, length and number of GPUs."""

import textwrap
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.common.attention_label import label_colours
from benchmarks.common.charts import BAR_HEIGHT, draw_bars, draw_heading, draw_legend
from benchmarks.training.page import songs_label
from meloformer.plots.style import DPI, GREY, save_figure, style_axes


def draw(rows: list[dict], gpu: str, page: Path) -> str | None:
    """Writes the chart beside a page; returns its file name, None if nothing can be drawn.

    Rows with recomputation are left out.

    Args:
        rows: as `page.measured_rows` returns them.
        gpu: what they were measured on.
    """
    groups: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row["checkpoint_activations"] == "none":
            songs = songs_label(row["songs"]) if row["songs"] else ""
            group = groups.setdefault((songs, row["size"], row["tokens_per_row"], row["gpus"]), {})
            group[row["attention"]] = max(row["tokens_per_s"], group.get(row["attention"], 0.0))
    if not groups:
        return None
    path = page.with_name(f"{page.stem}_speed.png")
    save_figure(_figure(groups, gpu), path)
    return path.name


def _figure(groups: dict[tuple, dict[str, float]], gpu: str) -> Figure:
    found = {name for group in groups.values() for name in group}
    colour = label_colours(
        sorted(found, key=lambda name: (name.startswith("dense"), name))
    )  # dense comes last
    labels = [_label(*key) for key in groups]
    heights = [
        max(len(group) + 1.2, label.count("\n") + 1.2 if songs else 0) * BAR_HEIGHT
        for ((songs, *_), group), label in zip(groups.items(), labels)
    ]
    height = 1.75 + sum(heights)
    figure = Figure(figsize=(9.0, height), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0.2, 0.6 / height, 0.72, sum(heights) / height))
    top, ticks = 0.0, []
    for group, room in zip(groups.values(), heights):
        present = [name for name in colour if name in group]
        draw_bars(
            axes,
            [top + (place + 1.1) * BAR_HEIGHT for place in range(len(present))],
            [group[name] for name in present],
            [colour[name] for name in present],
            [f"{group[name]:,.0f}" for name in present],
        )
        ticks.append(top + room / 2)
        top += room
    axes.set_xlim(0, 1.15 * max(value for group in groups.values() for value in group.values()))
    axes.set_ylim(top, 0)
    axes.set_yticks(ticks, labels)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("tokens per second", color=GREY, fontsize=9)
    style_axes(axes)
    axes.grid(axis="y", visible=False)
    draw_heading(figure, "Training: tokens per second", f"{gpu} · whole steps, padding not counted")
    draw_legend(figure, [(name, {"color": of, "linewidth": 6}) for name, of in colour.items()])
    return figure


def _label(songs: str, size: str, tokens: int, gpus: int) -> str:
    lines = "".join(f"{line}\n" for line in textwrap.wrap(songs, 24)).replace("$", r"\$")
    return f"{lines}{size}{f', {gpus} GPUs' if gpus > 1 else ''}\n{tokens:,} tokens per row"
