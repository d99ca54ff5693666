"""The charts of `benchmarks.report`: PNG files, from result files alone."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.attention import metrics
from benchmarks.common.charts import BAR_HEIGHT, draw_bars, draw_heading, draw_legend
from meloformer.errors import UserError
from meloformer.plots.style import DPI, GREY, INK, save_figure, style_axes

# The palette of Okabe and Ito, safe for colour-blind readers; markers for print without colour.
_STYLES = {
    "triton": ("#0072B2", "o"),
    "dense_cudnn": ("#E69F00", "s"),
    "dense_flash": ("#56B4E9", "D"),
    "documents_cudnn": ("#B8860B", "p"),
    "documents_flash": ("#2F6DA3", "h"),
    "flex_sorted": ("#009E73", "v"),
    "flex": ("#CC79A7", "^"),
    "flex_fp32": ("#D55E00", "P"),
    "reference": ("#999999", "x"),
}
_MOST_ROWS = 16


def draw(result: dict, page: Path) -> list[str]:
    """Draws the charts that the rows allow, beside a page; returns the file names."""
    drawn = []
    rows = [row for row in result["rows"] if _totals(row)]
    songs = [row for row in rows if not row["packed"]] or rows
    packed = sorted(
        (row for row in rows if row["packed"] and row.get("rows", 1) == 1), key=lambda row: row["tokens"]
    )
    rule = next((row.get("kind_rule") for row in packed), None)  # two rules would make a zigzag of each line
    packed = [row for row in packed if row.get("kind_rule") == rule]
    if songs:
        drawn.append(_save(by_row(songs[:_MOST_ROWS], _subtitle(result)), page, "rows"))
    if len(packed) > 1:
        drawn.append(_save(by_length(packed, _subtitle(result)), page, "lengths"))
    return drawn


def _totals(row: dict) -> dict[str, float]:
    """Milliseconds, forward and backward together, of each measured column in the order of the legend."""
    found = {column: metrics.total_ms(row, column) for column in _STYLES}
    return {column: ms for column, ms in found.items() if ms is not None}


def _subtitle(result: dict) -> str:
    settings = result["settings"]
    return (
        f"{result['machines'][0]['gpu'] or 'CPU'} · one layer, {settings['heads']} heads of "
        f"{settings['dim']}, {settings['dtype']} · forward + backward"
    )


def by_row(rows: list[dict], subtitle: str) -> Figure:
    """Horizontal bars for each row on a logarithmic scale, with a dashed line at the limit."""
    columns = [column for column in _STYLES if any(column in _totals(row) for row in rows)]
    group = (len(columns) + 1.2) * BAR_HEIGHT
    height = 1.75 + group * len(rows)
    figure = Figure(figsize=(9.0, height), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0.2, 0.6 / height, 0.74, group * len(rows) / height))
    axes.set_xscale("log")
    for number, row in enumerate(rows):
        totals = _totals(row)
        places = {column: place for place, column in enumerate(columns) if column in totals}
        draw_bars(
            axes,
            [number * group + (place + 1.1) * BAR_HEIGHT for place in places.values()],
            [totals[column] for column in places],
            [_STYLES[column][0] for column in places],
            [metrics.milliseconds(totals[column]) for column in places],
        )
        limit = metrics.limit_ms(row)
        if limit is not None:
            low, high = (
                number * group + 0.5 * BAR_HEIGHT,
                number * group + (len(columns) + 0.7) * BAR_HEIGHT,
            )
            axes.vlines(limit, low, high, color=INK, linewidth=1.2, linestyle="--", zorder=3)
    smallest = min(min([*_totals(row).values(), metrics.limit_ms(row) or 1e9]) for row in rows)
    largest = max(max(_totals(row).values()) for row in rows)
    axes.set_xlim(smallest / 2, largest * 1.6)
    axes.set_ylim(group * len(rows), 0)
    names = [_label(row) for row in rows]
    axes.set_yticks([(i + 0.5) * group for i in range(len(rows))], names)
    _style_axes(axes, x="milliseconds")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", labelcolor=INK)
    draw_heading(figure, "Attention by song: time of one layer", subtitle)
    handles = [(metrics.LABELS[c], {"color": _STYLES[c][0], "linewidth": 6}) for c in columns]
    draw_legend(figure, [*handles, ("limit", {"color": INK, "linewidth": 1.2, "linestyle": "--"})])
    return figure


def by_length(rows: list[dict], subtitle: str) -> Figure:
    """Time over length, both logarithmic, with the limit as a dashed line."""
    height = 5.6
    figure = Figure(figsize=(9.0, height), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0.09, 0.1, 0.86, 0.68))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    handles = []
    for column, (colour, marker) in _STYLES.items():
        points = [(row["tokens"], ms) for row in rows if (ms := _totals(row).get(column)) is not None]
        if points:
            style = {"color": colour, "marker": marker, "linewidth": 1.8, "markersize": 5.5}
            axes.plot(*zip(*points), **style, markeredgecolor=GREY, markeredgewidth=0.5, zorder=3)
            handles.append((metrics.LABELS[column], style))
    limits = [(row["tokens"], ms) for row in rows if (ms := metrics.limit_ms(row)) is not None]
    if limits:
        style = {"color": INK, "linewidth": 1.2, "linestyle": "--"}
        axes.plot(*zip(*limits), **style, zorder=2)
        handles.append(("limit", style))
    lengths = [row["tokens"] for row in rows]
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_formatter(NullFormatter())
    _style_axes(axes, x="tokens", y="milliseconds")
    draw_heading(figure, "Attention by length of row: time of one layer", subtitle)
    draw_legend(figure, handles)
    return figure


def _label(row: dict) -> str:
    """The name of a row, which may be long, above its length, and its rule where it names one."""
    rule = f", {row['kind_rule']}" if "kind_rule" in row else ""
    name = row["name"].removesuffix(rule)
    return f"{name if len(name) <= 22 else name[:21] + '…'}\n{row['tokens']:,} tokens{rule}"


def _style_axes(axes: Axes, x: str, y: str | None = None) -> None:
    plain = FuncFormatter(lambda value, _: f"{value:,g}")
    (axes.yaxis if y else axes.xaxis).set_major_formatter(plain)
    axes.set_xlabel(x, color=GREY, fontsize=9)
    if y:
        axes.set_ylabel(y, color=GREY, fontsize=9)
    style_axes(axes)


def _save(figure: Figure, page: Path, what: str) -> str:
    path = page.with_name(f"{page.stem}_{what}.png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the picture {path}: {error.strerror or error}") from None
    save_figure(figure, path)
    return path.name
