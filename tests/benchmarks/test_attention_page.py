import re
from pathlib import Path

from benchmarks.attention import charts, measure, metrics
from benchmarks.attention.page import page
from benchmarks.attention.results import load, merge

from helpers.report_cases import packed, result, row, song, table_cells

ROOT = Path(__file__).resolve().parents[2]


class TestPage:
    def text(self) -> str:
        merged = merge([result(song(), packed(16_384))], ["a.json"])
        return page(merged, ["a_rows.png"], ["a.json"])

    def test_tables(self):
        text = self.text()
        first = [cell.strip() for cell in table_cells(text, "Against the limit")[0]]
        expected = ["20,000", "1", "10.0%", "0.400", "0.80", "0.250 + 0.550", "2.00", "50%", "40", "10%"]
        assert first == ["A \\| song", *expected]
        speedups = [
            cell.strip() for cell in table_cells(text, "Time relative to Triton, forward and backward")[0]
        ]
        assert speedups == ["A \\| song", "5.00x", "4.55x", "5.0x", "10.0x", "50.0x", "-", "-"]
        times = [cell.strip() for cell in table_cells(text, "Time in ms, forward + backward")[0]]
        assert times[-2:] == ["1.00 + 3.00", "dense, cuDNN"]
        assert "![a_rows](a_rows.png)" in text
        assert "a.json`: 2026-01-02, commit abc, Test GPU" in text

    def test_every_table_is_even(self):
        for part in self.text().split("\n\n"):
            if part.startswith("|"):
                assert len({len(re.split(r"(?<!\\)\|", line)) for line in part.splitlines()}) == 1, part

    def test_failures_are_told(self):
        text = self.text().split("## Not measured\n")[1]
        assert "- A \\| song, FlexAttention, sorted: failed: OutOfMemoryError: CUDA \\| out of memory" in text
        assert "- A \\| song, FlexAttention, fp32: skipped: slow" in text

    def test_every_column_has_a_label_and_a_meaning(self):
        assert set(metrics.LABELS) == set(measure.COLUMNS) == set(charts._STYLES)

    def test_a_page_of_nothing_measured(self):
        text = page(merge([result(row("x", 10, False, {"triton": {"failed": "no"}}))], ["a"]), [], ["a"])
        assert "Triton: failed: no" in text and "Nothing was measured." in text


def test_the_projects_own_page_is_made_of_its_results():
    folder = ROOT / "benchmarks" / "results"
    names = ["songs.json", "packed.json", "batches.json", "flexattention.json"]
    pictures = ["attention_h200_rows.png", "attention_h200_lengths.png"]
    merged = merge([load(folder / "attention_h200" / name) for name in names], names)
    assert (folder / "attention_h200.md").read_text() == page(merged, pictures, names)
