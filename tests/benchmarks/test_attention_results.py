import json

import pytest

from benchmarks.attention.results import load, merge
from meloformer.errors import UserError

from helpers.report_cases import MACHINE, SETTINGS, entry, result, row, song, triton, written


class TestMerge:
    def test_columns_of_one_row_join_and_later_ones_count(self):
        newer = row("A | song", 20_000, False, {"triton": triton(0.1, 0.1, 1), "reference": entry(5, 5)})
        other = row("A | song", 19_999, False, {})
        merged = merge([result(song()), result(newer, other)], ["a", "b"])
        assert [r["tokens"] for r in merged["rows"]] == [20_000, 19_999]
        columns = merged["rows"][0]["columns"]
        assert columns["triton"]["update"]["forward"]["ms"] == 0.1
        assert columns["dense_cudnn"] == song()["columns"]["dense_cudnn"]
        assert "reference" in columns and len(merged["machines"]) == 2

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"settings": SETTINGS | {"heads": 4}}, "b and a differ in settings"),
            ({"machine": MACHINE | {"gpu": "Other GPU"}}, "b and a differ in GPU"),
        ],
        ids=["settings", "gpu"],
    )
    def test_what_does_not_belong_together_is_refused(self, change, said):
        with pytest.raises(UserError, match=said):
            merge([result(song()), result(song(), **change)], ["a", "b"])

    @pytest.mark.parametrize("content", ["", "[1]", '{"format": 0}'], ids=["empty", "list", "old"])
    def test_other_files_are_refused(self, tmp_path, content):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(UserError, match=r"x\.json: is not"):
            load(tmp_path / "x.json")
        with pytest.raises(UserError, match="cannot read"):
            load(tmp_path / "y.json")


def test_results_are_json(tmp_path):
    (path,) = written(tmp_path, result(song()))
    assert json.loads(path.read_text()) == result(song())
    assert [file.name for file in tmp_path.iterdir()] == ["0.json"]
