"""What all pictures share: colours, plain axes, PNG files.

Figures are built without pyplot, so that drawing touches no global state and needs no display.
"""

import os

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import UserError

DPI = 150
INK, GREY, LINE, FAINT = "#1f2430", "#5b6270", "#c9cdd6", "#edeff3"
COLOURS = (
    "#2f6fde", "#e8743b", "#19a979", "#c2419b", "#d9a400", "#6c4fd0", "#13a4b4", "#d8344a", "#7da026",
    "#8a5a3c", "#5b8ff9", "#f2a27e", "#6fcfac", "#e08cc7", "#a08fe6", "#9aa3b5",
)  # fmt: skip


def style_axes(axes: Axes) -> None:
    """A faint grid behind the curves, lines at the left and below, grey figures without ticks."""
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=8.5, labelcolor=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write a PNG file, the same bytes for the same figure. Raises UserError if it cannot be written."""
    try:  # the default metadata names the version of matplotlib
        figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})
    except OSError as error:
        raise UserError(f"cannot write the picture {path}: {error.strerror or error}") from None
