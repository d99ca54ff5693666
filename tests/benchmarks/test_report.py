"""The command `benchmarks.report`, run on the backend `reference`."""

import re
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.attention import measure
from benchmarks.attention.compare import compare
from benchmarks.attention.results import load, merge
from benchmarks.songs import loading
from meloformer.errors import UserError

from helpers.report_cases import result, song, written

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--heads", "2", "--dim", "8", "--dtype", "float32"]


class TestCommand:
    def test_measures_and_writes_what_from_makes_again(self, tmp_path, capsys):
        target = tmp_path / "out" / "a.md"
        report.main(["--columns", "reference", "--lengths", "64,96", *TINY, "--output", str(target)])
        said = capsys.readouterr().out
        assert "[2/2] packed to 96: 96 tokens" in said and "row took" in said
        names = ["a.json", "a.md", "a_lengths.png", "a_rows.png"]
        assert sorted(file.name for file in target.parent.iterdir()) == names
        found = load(target.with_suffix(".json"))
        assert [r["tokens"] for r in found["rows"]] == [64, 96]
        assert found["machine"]["packages"]["torch"]
        again = tmp_path / "again" / "a.md"
        report.main(["--from", str(target.with_suffix(".json")), "--output", str(again)])
        assert again.read_text() == target.read_text()
        assert (again.parent / "a_rows.png").read_bytes() == (target.parent / "a_rows.png").read_bytes()

    def test_batches(self, tmp_path, monkeypatch):
        """Songs of 2 bars: several in a row of 300 tokens, one in each of 16."""
        monkeypatch.setattr(loading, "COMPOSED", 2)
        monkeypatch.setattr(loading, "COMPOSED_BARS", 2)
        args = ["--rows", "1,3", "--lengths", "16,300", *TINY, "--output", str(tmp_path / "a.md")]
        report.main(["--columns", "reference", *args])
        rows = load(tmp_path / "a.json")["rows"]
        names = ["packed to 16", "packed to 300", "3 rows packed to 16", "3 rows packed to 300"]
        assert [row["name"] for row in rows] == names
        assert [row["rows"] for row in rows] == [1, 1, 3, 3]
        assert [row["documents"] > row["rows"] for row in rows] == [False, True] * 2
        assert rows[3]["visible_pairs"] > 2 * rows[1]["visible_pairs"]

    def test_kind_rules(self, tmp_path, monkeypatch):
        monkeypatch.setattr(loading, "COMPOSED", 1)
        monkeypatch.setattr(loading, "COMPOSED_BARS", 4)
        made, real = [], report.pack
        monkeypatch.setattr(report, "pack", lambda *args: made.append(real(*args)) or made[-1])
        args = ["--whole", "--lengths", "300", "--kind_rules", "any,alike", *TINY]
        report.main(["--columns", "reference", *args, "--output", str(tmp_path / "a.md")])
        result = load(tmp_path / "a.json")
        names = ["composed 0", "composed 0, alike", "packed to 300", "packed to 300, alike"]
        assert [row["name"] for row in result["rows"]] == names
        assert [(s.kind_rule, s.near_bars) for s in made] == [("any", (0, 1)), ("alike", (0, 1, 2, 4))] * 2
        for plain, alike in zip(result["rows"][::2], result["rows"][1::2]):
            assert "kind_rule" not in plain and "near_bars" not in plain
            assert (alike["kind_rule"], alike["near_bars"]) == ("alike", "0,1,2,4")
            assert alike["visible_pairs"] != plain["visible_pairs"]
        text = (tmp_path / "a.md").read_text()
        assert "*alike* is" in text and "| composed 0, alike |" in text
        assert [row["name"] for row in merge([result, result], ["a", "a"])["rows"]] == names
        assert "| composed 0, alike | reference | update forward" in compare(result, result)

    def test_rows_of_one_song_are_not_measured_twice(self, monkeypatch):
        monkeypatch.setattr(report.measure, "measure", lambda column, *_: {"failed": column})
        args = report.parser().parse_args(["--columns", "dense_cudnn,documents_cudnn"])
        args.device, songs = "cpu", [*loading.compose_songs(2, bars=2).values()]
        for length, said in ((16, "skipped"), (300, "failed")):
            row = report.measure_row(report.Batch("a", songs, length), args, None)
            assert list(row["columns"]["documents_cudnn"]) == [said]
            assert list(row["columns"]["dense_cudnn"]) == ["failed"]

    def test_songs_alone(self, tmp_path, monkeypatch):
        monkeypatch.setattr(loading, "COMPOSED", 2)
        monkeypatch.setattr(loading, "COMPOSED_BARS", 2)
        args = ["--whole", "--columns", "reference", *TINY, "--output", str(tmp_path / "a.md")]
        report.main(args)
        rows = load(tmp_path / "a.json")["rows"]
        names = [(r["name"], r["packed"], r["documents"]) for r in rows]
        assert names == [("composed 0", False, 1), ("composed 1", False, 1)]

    def test_a_column_that_fails_is_an_entry(self, tmp_path, monkeypatch, capsys):
        def fail(*_):
            raise RuntimeError("\n  no room\nfor this | here\nat line 3")

        monkeypatch.setattr(report.measure, "measure", fail)
        report.main(["--columns", "reference", "--lengths", "64", *TINY, "--output", str(tmp_path / "a.md")])
        entry = load(tmp_path / "a.json")["rows"][0]["columns"]["reference"]
        assert entry == {"failed": "RuntimeError: no room for this | here"}
        assert "reference: failed: RuntimeError: no room for this" in (tmp_path / "a.md").read_text()

    def test_an_interrupted_run_keeps_its_rows(self, tmp_path, monkeypatch):
        real = report.measure_row

        def interrupted(batch, *rest):
            if batch.length == 96:
                raise KeyboardInterrupt
            return real(batch, *rest)

        monkeypatch.setattr(report, "measure_row", interrupted)
        with pytest.raises(KeyboardInterrupt):
            report.main(
                ["--columns", "reference", "--lengths", "64,96", *TINY, "--output", str(tmp_path / "a.md")]
            )
        assert [r["tokens"] for r in load(tmp_path / "a.json")["rows"]] == [64]

    def test_slow_columns_are_skipped_on_long_rows(self):
        args = report.parser().parse_args(["--flex-up-to", "100", "--flex-fp32-up-to", "50"])
        longest = {column: report.longest(column, args) for column in measure.COLUMNS}
        assert longest == dict.fromkeys(measure.COLUMNS) | {"flex": 100, "flex_sorted": 100, "flex_fp32": 50}

    def test_compare(self, tmp_path, capsys):
        old, new = written(tmp_path, result(song()), result(song()))
        report.main(["--compare", str(old), str(new), "--output", str(tmp_path / "c.md")])
        assert capsys.readouterr().out == (tmp_path / "c.md").read_text() != ""

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--lengths", "64,x"], "'x' is not a whole number"),
            (["--lengths", "0"], "0 is not at least 1"),
            (["--columns", "triton,cuda"], "'cuda' is none of triton"),
            (["--kind_rules", "any,unlike"], "'unlike' is none of alike, next, any"),
            (["--from", "a.json", "--compare", "a.json", "b.json"], "not allowed with"),
        ],
        ids=["length", "zero", "column", "rule", "both"],
    )
    def test_wrong_arguments(self, arguments, said, capsys):
        with pytest.raises(SystemExit, match="2"):
            report.main(arguments)
        assert said in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--output", "a.txt"], "must end in .md"),
            (["--from", "nowhere.json"], r"cannot read nowhere\.json"),
            (["--columns", "reference", "--midi", "nowhere.mid"], "nowhere"),
            (["--columns", "reference", "--midi", "nowhere.npy"], "nowhere"),
        ],
        ids=["output", "from", "midi", "npy"],
    )
    def test_errors_of_users(self, arguments, said, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=said):
            report.main(arguments)

    def test_without_a_gpu_it_says_what_runs(self, monkeypatch):
        monkeypatch.setattr(report.torch.cuda, "is_available", lambda: False)
        with pytest.raises(UserError, match=r"cannot measure triton, dense_cudnn.*--columns reference"):
            report.main([])


@pytest.mark.parametrize("name", ["docs/benchmarks.md", "CONTRIBUTING.md"])
def test_documents_use_flags_that_exist(name):
    lines = re.findall(r"-m benchmarks\.report (.*)", (ROOT / name).read_text())
    flags = {flag for line in lines for flag in re.findall(r"--\w[\w-]*", line)}
    assert flags and flags <= set(report.parser()._option_string_actions)
