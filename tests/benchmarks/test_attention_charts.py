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

    def test_a_kind_rule_has_bars_of_its_own_and_no_part_in_the_lines(self, tmp_path, monkeypatch):
        alike = [
            row | {"name": f"{row['name']}, alike", "kind_rule": "alike", "near_bars": "0,1,2,4"}
            for row in (packed(2048), packed(8192))
        ]
        rows, drawn = [packed(2048), alike[0], packed(8192), alike[1]], []
        real = charts.by_length
        monkeypatch.setattr(charts, "by_length", lambda rows, text: drawn.extend(rows) or real(rows, text))
        charts.draw(merge([result(*rows)], ["a"]), tmp_path / "p.md")
        assert [row["name"] for row in drawn] == ["packed to 2,048", "packed to 8,192"]
        (axes,) = charts.by_row(rows, "").axes
        assert [label.get_text() for label in axes.get_yticklabels()][:2] == [
            "packed to 2,048\n2,048 tokens", "packed to 2,048\n2,048 tokens, alike",
        ]  # fmt: skip

    def test_bars_show_what_was_measured(self):
        (axes,) = charts.by_row([song()], "").axes
        assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.8, 4, 8, 40])
