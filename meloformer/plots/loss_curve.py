"""The log of a training run as a loss curve: a PNG file."""

import math
import os
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..errors import UserError
from .style import COLOURS, DPI, GREY, INK, save_figure, style_axes


def loss_curve(records: Iterable[dict], path: str | os.PathLike) -> None:
    """Draw the course of a training run as a PNG file.

    Args:
        records: of a run's log. Training records have `step` and `loss` (nats per token) and may have `lr`,
            `tokens` (of the step) and `tokens_per_s`; validation records have `step` and `val_loss`. Of
            several records of one step and kind, as a resumed run may write them, the last counts.
        path: the file to write.

    Raises:
        UserError: there is no loss among them, or the picture cannot be written.
    """
    records = list(records)
    steps, losses = _series(records, "loss")
    val_steps, val_losses = _series(records, "val_loss")
    lr_steps, rates = _series(records, "lr")
    if not len(steps) and not len(val_steps):
        raise UserError("the training log holds no losses yet")

    figure = Figure(figsize=(9.0, 5.6), dpi=DPI, facecolor="white")
    grid = figure.add_gridspec(
        2, 1, height_ratios=(4.2, 1), hspace=0.12, left=0.095, right=0.97, top=0.9, bottom=0.09
    )
    upper = figure.add_subplot(grid[0])
    lower = figure.add_subplot(grid[1], sharex=upper)
    colour, accent = COLOURS[0], COLOURS[1]

    if len(steps):
        smooth = _smooth(losses)
        upper.plot(steps, losses, color=colour, alpha=0.22, linewidth=0.8)
        upper.plot(steps, smooth, color=colour, linewidth=1.8, label=f"training, smoothed   {smooth[-1]:.3f}")
    if len(val_steps):
        best = int(np.argmin(val_losses))
        label = (
            f"validation   {val_losses[-1]:.3f}   (best {val_losses[best]:.3f} at step {val_steps[best]:,})"
        )
        upper.plot(
            val_steps, val_losses, color=accent, linewidth=1.2, marker="o", markersize=4.5, label=label
        )
    upper.set_ylabel("loss, nats per token", color=GREY, fontsize=9)
    upper.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")
    upper.tick_params(labelbottom=False)

    lower.plot(lr_steps, rates, color=GREY, linewidth=1.2)
    if len(rates):
        lower.set_ylim(0, 1.08 * rates.max() or 1)
        lower.set_yticks([0, rates.max()] if rates.max() else [0])
    lower.set_ylabel("learning rate", color=GREY, fontsize=9)
    lower.set_xlabel("step", color=GREY, fontsize=9)
    lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    lower.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    lower.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    for axes in (upper, lower):
        style_axes(axes)
        axes.margins(x=0.01)

    figure.align_ylabels([upper, lower])
    figure.text(0.095, 0.95, "Training loss", color=INK, size=13, weight="bold", va="center")
    figure.text(0.97, 0.95, _progress(records), color=GREY, size=9, ha="right", va="center")
    save_figure(figure, path)


def _series(records: Iterable[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps in order and the finite values of `key` at them; the last record of a step counts."""
    values = {r["step"]: r[key] for r in records if _is_number(r.get("step")) and _is_number(r.get(key))}
    steps = sorted(values)
    return np.array(steps), np.array([values[step] for step in steps], dtype=np.float64)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Average over a bell-shaped window of about a fifteenth of the run, centred so that it does not lag."""
    half = len(values) // 30 + min(len(values) // 4, 3)
    window = np.hanning(2 * half + 3)[1:-1]
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _progress(records: Sequence[dict]) -> str:
    """Tokens seen and the usual speed, if the records tell."""
    texts = []
    tokens = _series(records, "tokens")[1]
    speeds = _series(records, "tokens_per_s")[1]
    if len(tokens):
        texts.append(f"{tokens.sum():,.0f} tokens")
    if len(speeds):
        texts.append(f"{np.median(speeds):,.0f} tokens/s")
    return "   ·   ".join(texts)
