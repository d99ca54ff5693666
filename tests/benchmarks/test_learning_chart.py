import pytest

from benchmarks.learning import chart
from benchmarks.learning.__main__ import gather

from helpers.learning_runs import DENSE, SPARSE, two_seeds_of_each, write_run


def test_the_chart_draws_every_run_by_tokens_and_by_time(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(chart, "save_figure", lambda figure, path: figures.append(figure))
    chart.draw(gather(two_seeds_of_each(tmp_path)), tmp_path / "a.png")
    by_tokens, by_time = figures[0].axes
    curves = [line for line in by_time.lines if len(line.get_xdata()) > 1]
    assert [list(line.get_xdata()) for line in curves[::2]] == [[0.25, 0.75, 1.75], [0.5, 1.5, 3.5]]
    assert [list(line.get_ydata()) for line in curves[::2]] == [list(SPARSE.values()), list(DENSE.values())]
    assert [line.get_color() for line in curves] == [*["#0072B2"] * 2, *["#E69F00"] * 2]
    assert list(by_tokens.lines[0].get_xdata()) == [0.2, 0.4, 0.8]
    assert by_time.get_xlabel().startswith("seconds")
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["triton", "dense"]


def test_long_runs_are_drawn_in_minutes(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(chart, "save_figure", lambda figure, path: figures.append(figure))
    runs = [write_run(tmp_path / name, SPARSE, attention=name, step_s=60.0) for name in ("triton", "dense")]
    chart.draw(gather(runs), tmp_path / "a.png")
    by_time = figures[0].axes[1]
    assert by_time.get_xlabel().startswith("minutes") and list(by_time.lines[0].get_xdata()) == pytest.approx(
        [1, 3, 7]
    )


def test_every_attention_and_kind_rule_has_a_style_of_its_own(tmp_path, monkeypatch):
    entries = []
    monkeypatch.setattr(chart, "draw_legend", lambda figure, handles: entries.extend(handles))
    runs = [write_run(tmp_path / rule, SPARSE, kind_rule=rule) for rule in ("alike", "next")]
    runs.append(write_run(tmp_path / "dense", DENSE, attention="dense"))
    chart.draw(gather(runs), tmp_path / "a.png")
    assert [name for name, _ in entries] == ["triton", "triton, next", "dense"]
    assert len({(style["color"], style["linestyle"]) for _, style in entries}) == 3
