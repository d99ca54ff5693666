import json

import numpy as np
import pytest

from meloformer.errors import UserError
from meloformer.plots import loss_curve as loss_plot
from meloformer.plots.loss_curve import loss_curve
from meloformer.training.run_log import read_log


@pytest.fixture
def figure_of(monkeypatch, tmp_path):
    """The figure that would have been saved."""

    def draw(log):
        figures = []
        monkeypatch.setattr(loss_plot, "save_figure", lambda figure, path: figures.append(figure))
        loss_curve(log, tmp_path / "unused.png")
        return figures[0]

    return draw


def records(steps: int = 100) -> list[dict]:
    training = [
        {
            "step": i,
            "loss": 6 - i / 50,
            "lr": 1e-3 * i / steps,
            "tokens": 10,
            "tokens_per_s": 500.0,
            "epoch": 0,
        }
        for i in range(1, steps + 1)
    ]
    return training + [{"step": i, "val_loss": 6.5 - i / 50} for i in range(50, steps + 1, 50)]


def write_log(path, rows: list[dict], tail: str = ""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def line_named(axes, start: str):
    return next(line for line in axes.lines if str(line.get_label()).startswith(start))


def test_loss_curve_draws_what_the_records_say(figure_of):
    upper, lower = figure_of(records()).axes
    raw, smooth, validation = upper.lines
    np.testing.assert_allclose(raw.get_ydata(), [6 - i / 50 for i in range(1, 101)])
    np.testing.assert_allclose(smooth.get_ydata()[10:-10], raw.get_ydata()[10:-10])  # a line, so no lag
    assert list(validation.get_xdata()) == [50, 100]
    assert "best 4.500 at step 100" in validation.get_label()
    assert len(lower.lines[0].get_xdata()) == 100


def test_loss_curve_says_how_much_was_trained(figure_of):
    figure = figure_of(records())
    assert "1,000 tokens   ·   500 tokens/s" in [text.get_text() for text in figure.texts]


def test_loss_curve_from_a_file_equals_that_from_records(tmp_path):
    loss_curve(records(), tmp_path / "records.png")
    log = write_log(tmp_path / "log.jsonl", records(), tail='{"step": 101, "lo')
    loss_curve(read_log(log), tmp_path / "file.png")
    assert (tmp_path / "file.png").read_bytes() == (tmp_path / "records.png").read_bytes()


def test_a_resumed_run_counts_its_last_records(figure_of):
    rows = [*records(10), {"step": 10, "loss": 1.0}, {"step": 9, "loss": 2.0}, {"step": 11, "loss": 0.5}]
    raw = figure_of(rows).axes[0].lines[0]
    assert list(raw.get_xdata()) == list(range(1, 12))
    assert list(raw.get_ydata()[-3:]) == [2.0, 1.0, 0.5]


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1, "loss": 3.0}],
        [{"step": 1, "val_loss": 3.0}],
        [{"step": i, "loss": float("nan") if i == 3 else 1.0, "lr": 0.0} for i in range(6)],
        [{"step": 1, "loss": 3.0}, {"event": "resumed"}, {"step": "x", "loss": 1}, {"step": 2, "loss": None}],
    ],
    ids=["one-step", "only-validation", "nan", "strange-records"],
)
def test_loss_curve_of(rows, tmp_path):
    loss_curve(read_log(write_log(tmp_path / "log.jsonl", rows, tail="[1]\n\xff\n")), tmp_path / "loss.png")
    assert b"IDAT" in (tmp_path / "loss.png").read_bytes()


@pytest.mark.parametrize("content", ["", '{"step": 1, "lo', "[]\n"], ids=["empty", "cut", "no-records"])
def test_a_log_without_losses_is_refused(tmp_path, content):
    (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(UserError, match="no losses"):
        loss_curve(read_log(tmp_path / "log.jsonl"), tmp_path / "loss.png")


def test_a_missing_log_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the training log .*log\.jsonl"):
        loss_curve(read_log(tmp_path / "log.jsonl"), tmp_path / "loss.png")
