"""What the charts of all benchmarks share: a heading, a legend, horizontal bars."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from meloformer.plots import style
from meloformer.plots.style import GREY, INK

BAR_HEIGHT = 0.16  # inches, the gap to the next bar included


def draw_heading(figure: Figure, title: str, subtitle: str) -> None:
    """Title and subtitle at the top left of a figure."""
    height = figure.get_figheight()
    figure.text(0.03, 1 - 0.15 / height, title, color=INK, size=13, weight="bold", va="top")
    figure.text(0.03, 1 - 0.42 / height, subtitle, color=GREY, size=9, va="top")


def draw_legend(figure: Figure, handles: list[tuple[str, dict]]) -> None:
    """A legend below the heading.

    Args:
        handles: (label, keyword arguments of its `Line2D`) of each entry.
    """
    lines = [Line2D([], [], label=label, **drawn) for label, drawn in handles]
    style.draw_legend(figure, lines, 0.03, 0.6, 4, handlelength=1.6, columnspacing=1.6)


def draw_bars(axes: Axes, at: list[float], values: list[float], colours: list[str], texts: list[str]) -> None:
    """Horizontal bars at the heights `at`, each with its text to the right of it."""
    axes.barh(at, values, 0.86 * BAR_HEIGHT, color=colours, zorder=2)
    for y, value, text in zip(at, values, texts):
        axes.annotate(
            text, (value, y), (3, 0), textcoords="offset points", va="center_baseline", size=7, color=INK
        )
