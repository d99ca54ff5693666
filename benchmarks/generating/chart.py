"""The chart of `benchmarks.generate`: tokens per second by method, size, context and number of songs."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common.charts import BAR_HEIGHT, draw_bars, draw_heading, draw_legend
from meloformer.plots.style import COLOURS, DPI, GREY, INK, save_figure, style_axes

_COLOURS = dict(zip(("graphs", "dense_graphs", "cache", "dense", "int8", "recompute", "fp8_graphs"), COLOURS))


def draw(rows: list[dict], where: str, page: Path) -> str:
    """Writes the chart beside a page, a panel for each size and number of songs; returns its file name.

    Args:
        rows: of the result, at least one.
        where: what they were measured on.
    """
    sizes, batches = ({row[name]: None for row in rows} for name in ("size", "batch"))
    contexts = sorted({row["context"] for row in rows})
    methods = [name for name in _COLOURS if any(row["method"] == name for row in rows)]
    group = (len(methods) + 1.2) * BAR_HEIGHT
    tall = len(contexts) * group + 0.75  # of a panel with its title and axis
    height = 1.05 + len(sizes) * tall
    figure = Figure(figsize=(9.0, height), dpi=DPI, facecolor="white")
    across = 0.85 / len(batches)
    for down, size in enumerate(sizes):
        for right, batch in enumerate(sorted(batches)):
            bottom = (height - 1.05 - down * tall - len(contexts) * group - 0.15) / height
            box = (0.12 + right * across, bottom, across - 0.06, len(contexts) * group / height)
            axes = figure.add_axes(box)
            mine = [row for row in rows if (row["size"], row["batch"]) == (size, batch)]
            _panel(axes, mine, contexts, methods, labelled=right == 0)
            songs = "1 song" if batch == 1 else f"{batch} songs side by side"
            axes.set_title(f"{size}, {songs}", loc="left", fontsize=9, color=INK)
            if down == len(sizes) - 1:
                axes.set_xlabel("tokens per second, of all songs", color=GREY, fontsize=9)
    draw_heading(figure, "Generation: tokens per second", where)
    draw_legend(figure, [(name, {"color": _COLOURS[name], "linewidth": 6}) for name in methods])
    path = page.with_name(f"{page.stem}_speed.png")
    save_figure(figure, path)
    return path.name


def _panel(axes: Axes, rows: list[dict], contexts: list[int], methods: list[str], labelled: bool) -> None:
    group = (len(methods) + 1.2) * BAR_HEIGHT
    for number, context in enumerate(contexts):
        rates = {row["method"]: row["tokens_per_s"] for row in rows if row["context"] == context}
        present = [name for name in methods if name in rates]
        draw_bars(
            axes,
            [number * group + (place + 1.1) * BAR_HEIGHT for place in range(len(present))],
            [rates[name] for name in present],
            [_COLOURS[name] for name in present],
            [f"{rates[name]:,.0f}" if rates[name] >= 10 else f"{rates[name]:.1f}" for name in present],
        )
    axes.set_xlim(0, 1.2 * max((row["tokens_per_s"] for row in rows), default=1.0))
    axes.set_ylim(len(contexts) * group, 0)
    names = [f"context\n{context:,}" if labelled else "" for context in contexts]
    axes.set_yticks([(number + 0.5) * group for number in range(len(contexts))], names)
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    style_axes(axes)
    axes.grid(axis="y", visible=False)
