"""Pages, pictures and comparisons are made of fixed results; the command itself runs on `reference`."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import report
from benchmarks.attention import charts, measure, metrics
from benchmarks.attention.compare import compare
from benchmarks.attention.page import page, readme_body, update_readme
from benchmarks.attention.results import load, merge
from benchmarks.common.readme_section import marked
from benchmarks.common.results_file import save
from benchmarks.songs import loading
from meloformer.errors import UserError

from helpers.report_cases import MACHINE, SETTINGS, entry, packed, result, row, song, times, triton

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--heads", "2", "--dim", "8", "--dtype", "float32"]


def written(tmp_path, *results) -> list[Path]:
    paths = [tmp_path / f"{i}.json" for i in range(len(results))]
    for path, content in zip(paths, results):
        save(content, path)
    return paths


def cells(text: str, heading: str) -> list[list[str]]:
    """The lines of the table under a heading, without its head."""
    part = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in part.splitlines() if line.startswith("|")][2:]


class TestFigures:
    def test_limit_and_speedup(self):
        assert metrics.limit_ms(song()) == pytest.approx(0.4)
        assert metrics.times_limit(song()) == pytest.approx(2.0)
        assert metrics.speedup(song(), "dense_flash") == pytest.approx(10)
        assert metrics.speedup(song(), "flex") == pytest.approx(50)
        assert metrics.summarize_share(song()) == pytest.approx(0.1)

    def test_rates(self):
        # 2e6 visible pairs x 8 heads x 64 channels x 2 products x 2 operations in 0.25 ms
        rate = metrics.tflops(song(), "triton", "forward", "useful", SETTINGS)
        assert rate == pytest.approx(2e6 * 8 * 64 * 2 * 2 / 0.25e-3 / 1e12)
        computed = metrics.tflops(song(), "triton", "backward", "computed", SETTINGS)
        assert computed == pytest.approx(4e6 * 8 * 64 * 5 * 2 / 0.55e-3 / 1e12)

    def test_what_was_not_measured_is_none(self):
        assert metrics.measured(song(), "flex_sorted") is None
        assert metrics.speedup(song(), "flex_sorted") is None
        without = row("x", 10, False, {"triton": triton(1, 1, 1)})
        assert metrics.limit_ms(without) is None and metrics.times_limit(without) is None
        assert metrics.summarize_share(song(), "flex") is None
        assert metrics.tflops(row("x", 10, False, {"flex": entry(1, 1)}), "flex", "forward", "computed",
                              SETTINGS) is None  # fmt: skip


class TestPage:
    def text(self) -> str:
        merged = merge([result(song(), packed(16_384))], ["a.json"])
        return page(merged, ["a_rows.png"], ["a.json"])

    def test_tables(self):
        text = self.text()
        first = [cell.strip() for cell in cells(text, "Against the limit")[0]]
        expected = ["20,000", "1", "10.0%", "0.400", "0.80", "0.250 + 0.550", "2.00", "50%", "40", "10%"]
        assert first == ["A \\| song", *expected]
        speedups = [cell.strip() for cell in cells(text, "Times as long as Triton, forward and backward")[0]]
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


class TestCompare:
    def flags(self, old, new) -> dict[str, str]:
        lines = [line for line in compare(old, new).splitlines() if line.startswith("| A ")]
        table = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        return {(line[1], line[2]): line[-1] for line in table}

    def test_flags_are_for_what_is_beyond_noise(self):
        new = song()
        update = new["columns"]["triton"]["update"]
        update["forward"], update["backward"] = times(0.25 * 0.9), times(0.55 * 1.5)
        new["columns"]["dense_flash"]["update"]["forward"] = times(1.0)
        flags = self.flags(result(song()), result(new))
        assert flags["Triton", "update forward, ms"] == ""
        assert flags["Triton", "update backward, ms"] == "**slower**"
        assert flags["dense, flash", "update forward, ms"] == "faster"
        assert {f for key, f in flags.items() if key[0] == "dense, cuDNN"} == {""}

    def test_ratio(self):
        new = song()
        new["columns"]["triton"]["update"]["forward"] = times(0.5)
        text = compare(result(song()), result(new))
        assert "| A \\| song | Triton | update forward, ms | 0.25 | 0.5 | 2.000 | **slower** |" in text

    def test_a_column_that_came_or_went(self):
        new = song()
        new["columns"]["triton"] = {"failed": "WrongResult: bad"}
        new["columns"]["flex_sorted"] = entry(1, 1)
        text = compare(result(song()), result(new))
        assert "| Triton | all | measured | failed: WrongResult: bad |  | **changed** |" in text
        assert re.search(r"sorted \| all \| failed: OutOf.*\| measured \|  \| \*\*changed\*\*", text)
        assert "fp32" not in text

    def test_rows_of_one_side_only(self):
        text = compare(result(song(), packed(2048)), result(song(), packed(4096)))
        assert "Only in old: packed to 2,048" in text and "Only in new: packed to 4,096" in text

    @pytest.mark.parametrize(
        ("new", "said"),
        [
            (result(song(), settings=SETTINGS | {"dim": 128}), "settings differ"),
            (result(packed(2048)), "share no row"),
        ],
        ids=["settings", "rows"],
    )
    def test_nothing_to_compare(self, new, said):
        with pytest.raises(UserError, match=said):
            compare(result(song()), new)

    def test_other_gpus_are_told(self):
        other = result(song(), machine=MACHINE | {"gpu": "Other GPU"})
        assert "GPUs differ" in compare(result(song()), other)
        assert "GPUs differ" not in compare(result(song()), result(song()))


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

        def interrupted(name, documents, length, *rest):
            if length == 96:
                raise KeyboardInterrupt
            return real(name, documents, length, *rest)

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
            (["--from", "a.json", "--compare", "a.json", "b.json"], "not allowed with"),
        ],
        ids=["length", "zero", "column", "both"],
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


def test_results_are_json(tmp_path):
    (path,) = written(tmp_path, result(song()))
    assert json.loads(path.read_text()) == result(song())
    assert [file.name for file in tmp_path.iterdir()] == ["0.json"]
