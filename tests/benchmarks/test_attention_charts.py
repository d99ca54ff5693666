import pytest
from PIL import Image

from benchmarks.attention import charts, metrics
from benchmarks.attention.results import merge

from helpers.report_cases import packed, result, row, song


class TestPictures:
    @pytest.mark.parametrize(
        ("rows", "names"),
        [
            ([song(), packed(2048), packed(8192)], ["p_rows.png", "p_lengths.png"]),
            ([song()], ["p_rows.png"]),
            ([packed(2048)], ["p_rows.png"]),
            ([row("x", 10, False, {"triton": {"failed": "no"}})], []),
        ],
        ids=["both", "a song", "a length", "nothing measured"],
    )
    def test_files(self, tmp_path, rows, names):
        assert charts.draw(merge([result(*rows)], ["a"]), tmp_path / "p.md") == names
        for name in names:
            with Image.open(tmp_path / name) as picture:
                picture.verify()

    def test_lines_show_what_was_measured(self):
        rows = [packed(2048), packed(8192)]
        (axes,) = charts.by_length(rows, "").axes
        lines = {line.get_label(): line for line in axes.lines}
        drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in lines.values()]
        totals = [[metrics.total_ms(r, c) for r in rows] for c in ("triton", "dense_cudnn")]
        totals.append([metrics.limit_ms(r) for r in rows])
        assert drawn == [([2048, 8192], line) for line in totals]

    def test_bars_show_what_was_measured(self):
        (axes,) = charts.by_row([song()], "").axes
        assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.8, 4, 8, 40])
