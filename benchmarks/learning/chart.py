"""The chart of `benchmarks.learning`: validation loss of several runs by tokens and by time."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.common.attention_label import attention_label, label_colours
from benchmarks.common.charts import draw_heading, draw_legend
from meloformer.plots.style import DPI, GREY, save_figure, style_axes

# Lines can be told apart without colour.
_DASHES = (
    "-",
    "--",
    ":",
    "-.",
    (0, (6, 1, 1, 1, 1, 1)),
    (0, (1, 3)),
)


def draw(result: dict, path: Path) -> None:
    """Writes a PNG file. Raises UserError if it cannot be written."""
    runs = result["runs"]
    longest = max(run["validation"]["seconds"][-1] for run in runs)
    seconds, unit = (60, "minutes") if longest > 300 else (1, "seconds")
    figure = Figure(figsize=(10.0, 4.9), dpi=DPI, facecolor="white")
    by_tokens, by_time = figure.subplots(
        1,
        2,
        sharey=True,
        gridspec_kw={"left": 0.065, "right": 0.985, "bottom": 0.11, "top": 0.8, "wspace": 0.06},
    )
    _panel(by_tokens, runs, "tokens", 1e6, "million tokens seen")
    _panel(by_time, runs, "seconds", seconds, f"{unit} of training, slow steps apart")
    by_tokens.set_ylabel("validation loss, nats per token", color=GREY, fontsize=9)
    origin, settings = result["origin"], result["settings"]
    subtitle = (
        f"{settings['model_size']} model · {origin['data']['training']['songs']:,} songs · "
        f"{origin['precision']} on {origin['device']} · a line per seed, a dot at its lowest point"
    )
    draw_heading(figure, "Validation loss by tokens and by time", subtitle)
    draw_legend(figure, [(name, {"color": c, "linestyle": d}) for name, (c, d) in _styles(runs).items()])
    save_figure(figure, path)


def _styles(runs: list[dict]) -> dict[str, tuple]:
    colour_of = label_colours(dict.fromkeys(map(attention_label, runs)))
    return {name: (colour, dashes) for (name, colour), dashes in zip(colour_of.items(), _DASHES)}


def _panel(axes: Axes, runs: list[dict], axis: str, unit: float, label: str) -> None:
    styles = _styles(runs)
    for run in runs:
        colour, dashes = styles[attention_label(run)]
        x = [value / unit for value in run["validation"][axis]]
        y = run["validation"]["val_loss"]
        axes.plot(x, y, color=colour, linestyle=dashes, linewidth=1.1)
        best = y.index(min(y))
        axes.plot(x[best], y[best], color=colour, marker="o", markersize=5)
    axes.set_xlabel(label, color=GREY, fontsize=9)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlim(left=0)
    style_axes(axes)
