"""What all pictures share: colours, the style of axes, writing PNG files.

Figures are built without pyplot: no global state, and no display needed.
"""

import os

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import UserError
from ..files import atomic_writer

DPI = 150
INK, GREY, LINE, FAINT = "#1f2430", "#5b6270", "#c9cdd6", "#edeff3"
COLOURS = (
    "#2f6fde", "#e8743b", "#19a979", "#c2419b", "#d9a400", "#6c4fd0", "#13a4b4", "#d8344a", "#7da026",
    "#8a5a3c", "#5b8ff9", "#f2a27e", "#6fcfac", "#e08cc7", "#a08fe6", "#9aa3b5",
)  # fmt: skip


def style_axes(axes: Axes) -> None:
    """A faint grid behind the data, spines at the left and bottom only, grey labels without tick marks."""
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=8.5, labelcolor=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)


def draw_legend(
    figure: Figure, handles: list[Artist], x: float, below: float, columns: int, **spacing: float
) -> None:
    """A legend without a frame.

    Args:
        x, below: its upper left corner: fraction of the width, and inches below the upper edge.
        spacing: of `Figure.legend`, in font sizes.
    """
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(x, 1 - below / figure.get_figheight()),
        ncols=columns,
        fontsize=8.5,
        labelcolor=INK,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        **spacing,
    )


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write a PNG file, whole or not at all, and reproducible to the byte.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with atomic_writer(path) as file:  # the default metadata contains the version of matplotlib
            figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    except OSError as error:
        raise UserError(f"cannot write the picture {path}: {error.strerror or error}") from None
