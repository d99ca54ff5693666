import re
from pathlib import Path

import pytest

from benchmarks.attention import charts, measure, metrics
from benchmarks.attention.page import page, readme_body, update_readme
from benchmarks.attention.results import load, merge
from benchmarks.common.readme_section import marked
from meloformer.errors import UserError

from helpers.report_cases import packed, result, row, song, table_cells, written

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
        assert speedups == ["A \\| song", "5.0x", "10.0x", "50.0x", "-", "-"]
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


class TestReadme:
    MARKED = "before\n<!-- attention: old.json -->\nold\n<!-- end of attention -->\nafter\n"

    def test_table_between_the_markers(self, tmp_path):
        (tmp_path / "r").mkdir()
        (source,) = written(tmp_path / "r", result(song(), packed(2048)))
        readme = tmp_path / "README.md"
        readme.write_text(self.MARKED)
        merged = merge([load(source)], ["0.json"])
        for _ in range(2):  # the second time it finds its own markers
            update_readme(readme, merged, [source], tmp_path / "r" / "p.md", tmp_path / "r" / "p_rows.png")
            text = readme.read_text()
            assert text.startswith("before\n<!-- attention: r/0.json -->\n![Attention")
            assert text.endswith("<!-- end of attention -->\nafter\n") and "old" not in text
        assert "(r/p_rows.png)" in text and "(r/p.md)" in text
        assert "| A \\| song | 20,000 | 10.0% | 0.250 + 0.550 | 2.00 | 5.0x | 10.0x | 50.0x | - |" in text

    def test_without_markers(self, tmp_path):
        (tmp_path / "README.md").write_text("no place\n")
        with pytest.raises(UserError, match="must have one part between"):
            update_readme(tmp_path / "README.md", merge([result(song())], ["a"]), [], tmp_path, None)

    def test_the_projects_own_is_made_of_its_results(self):
        text = (ROOT / "README.md").read_text()
        text = text[text.index("<!-- attention:") : text.index("<!-- end of attention -->") + 30]
        (names,) = re.findall(r"<!-- attention:(.*?)-->", text)
        if names.split():  # else nothing is measured yet: the place is empty
            merged = merge([load(ROOT / name) for name in names.split()], names.split())
            (page_path,) = re.findall(r"\[all figures and what they mean\]\((.*)\)", text)
            picture = re.search(r"!\[Attention.*?\]\((.*)\)", text)
            body = readme_body(merged, page_path, picture and picture[1])
            assert marked("attention", names.split(), body) in text
