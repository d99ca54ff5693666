import re
from pathlib import Path

import pytest

from benchmarks.common.readme_section import marked
from benchmarks.common.results_file import load
from benchmarks.learning.__main__ import FORMAT, gather, main
from benchmarks.learning.page import page, readme_body, targets
from meloformer.errors import UserError

from helpers.learning_runs import DENSE, SPARSE, two_seeds_of_each, write_run
from helpers.training import ROOT


def by_model(folders) -> list[list[str]]:
    """The table of models: its heads, and the cells of each row."""
    text = page(gather(folders), "a.png", "a.json").split("## Models at equal")[1].split("\n## ")[0]
    head, _, *rows = (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|"))
    return [head, *rows]


def test_models_are_compared_where_the_shortest_run_ends(tmp_path):
    head, triton, dense = by_model(two_seeds_of_each(tmp_path))
    assert head == [
        "model", "seeds", "tokens/s", "loss within 0.80M tokens", "range", "loss within 1.8 s", "range",
        "loss within 21.8 s, slow steps included", "range",
    ]  # fmt: skip
    assert triton == ["triton", "2", "400,000", *["2.0250", "2.0000 to 2.0500"] * 3]
    # A step of dense takes 0.5 s: it has its second validation, 3.2, after 1.5 s and its third after 3.5 s.
    at_1_75_s = 3.2 - 0.7 * 0.25 / 2
    spread = f"{at_1_75_s:.4f} to {at_1_75_s + 0.05:.4f}"
    assert dense[3:7] == ["2.5250", "2.5000 to 2.5500", f"{at_1_75_s + 0.025:.4f}", spread]


def test_slow_steps_count_in_a_column_of_their_own(tmp_path):
    stalled = write_run(tmp_path / "a", SPARSE, step_s=0.1, slow={1: 0.1, 6: 3.0})
    dense = write_run(tmp_path / "b", {2: 3.9, 4: 2.9, 8: 1.9}, attention="dense", slow={1: 0.1})
    head, (*_, short, _, included, _), (*_, dense_short, _, dense_included, _) = by_model([stalled, dense])
    assert head[5] == "loss within 0.6 s" and head[7] == "loss within 3.6 s, slow steps included"
    assert float(short) < float(dense_short) and float(included) > float(dense_included) == 1.9


def test_the_lowest_loss_so_far_is_compared_and_one_seed_has_no_range(tmp_path):
    first = write_run(tmp_path / "a", {2: 4.0, 4: 1.0, 8: 3.0})
    _, triton, _ = by_model([first, write_run(tmp_path / "b", DENSE, attention="dense")])
    assert triton[1] == "1" and triton[3:5] == ["1.0000", "-"]


def test_a_run_validated_too_late_has_no_loss_at_equal_time(tmp_path):
    fast = write_run(tmp_path / "a", SPARSE, step_s=0.01)
    _, _, dense = by_model([fast, write_run(tmp_path / "b", DENSE, attention="dense")])
    assert dense[3] == "2.5000" and dense[5:7] == ["-", "-"]


def test_the_table_of_a_readme_is_between_its_markers(tmp_path):
    readme, paper = tmp_path / "README.md", tmp_path / "r" / "p.md"
    readme.write_text("before\n<!-- learning: old.json -->\nold\n<!-- end of learning -->\nafter\n")
    folders = [str(folder) for folder in two_seeds_of_each(tmp_path)]
    paper.parent.mkdir()
    main([*folders, "--output", str(paper), "--readme", str(readme)])
    text = readme.read_text()
    assert text.startswith("before\n<!-- learning: r/p.json -->\n| attention | ") and text.endswith("after\n")
    assert "| triton | 2 | 400,000 | 2.0250 (2.0000 to 2.0500) | 2.0250 (2.0000 to 2.0500) |" in text
    assert "(r/p.md)" in text and "old" not in text

    readme.write_text("no place\n")
    with pytest.raises(UserError, match="must have one part between"):
        main(["--from", str(paper.with_suffix(".json")), "--output", str(paper), "--readme", str(readme)])


def test_the_projects_own_table_is_made_of_its_results():
    text = (ROOT / "README.md").read_text()
    (name,) = re.findall(r"<!-- learning: (.*) -->", text)
    page_path = Path(name).with_suffix(".md").as_posix()
    result = load(ROOT / name, FORMAT, "benchmarks.learning")
    assert marked("learning", [name], readme_body(result, page_path)) in text
    picture = Path(name).with_suffix(".png").name
    assert (ROOT / page_path).read_text() == page(result, picture, Path(name).name)


def test_targets_are_reached_by_all():
    def run(*losses):
        return {"validation": {"val_loss": list(losses)}}

    assert targets([run(3.0, 1.25, 1.5), run(2.9, 1.1)]) == [1.25, 1.3, 1.4, 1.5]
    assert targets([run(3.0, 1.3), run(1.45, 1.2)]) == [1.3, 1.4]  # 1.5 is above the first of the second


def test_the_page_has_the_figures(tmp_path):
    text = page(gather(two_seeds_of_each(tmp_path)), "a.png", "a.json")
    heads = "run parameters tokens epochs steps skipped best at last tokens/s time slow their".split()
    (line,) = re.findall(r"^\| run \| parameters.*$", text, re.M)
    assert [cell.split()[0].rstrip(",") for cell in line.strip("| ").split(" | ")] == heads
    assert (
        "| dense, seed 1 | 17.00M | 800,000 | 2 | 8 | 0 | 2.5500 | 8 | 2.5500 | 200,000 | 3.5 | 1 | 20.0 |"
        in text
    )
    assert "| triton, seed 0 | 6.0000 " + 7 * "| 2.0000 " + "|" in text
    assert "| triton, seed 0, given the family | - | - | - | - | - | 1.0000 | - | - |" in text
    assert "| run | per note | all | CHORD | INST | T | P | L | V |" in text
    assert "| run | 2.5500: million tokens | 2.5500: s | 2.6000: million tokens | 2.6000: s |" in text
    assert "| triton, seed 0 | 0.58 | 1.2 | 0.56 |" in text
    assert "213 songs (1,266,924 tokens), validated on 27 songs (158,713 tokens)" in text
    assert "2 row(s) of 24,576 tokens per step" in text
    assert "bf16 by 1 process(es) on Test GPU, meloformer 0.1.0, torch 2.11.0" in text
    assert "somewhere" not in text and "](a.png)" in text and "`a.json`" in text


def test_the_table_tells_the_best_point_from_the_last(tmp_path):
    runs = [
        write_run(tmp_path / "a", {2: 4.0, 4: 1.0, 8: 3.0}, kinds={"P": 0.5}, summary={"skipped_steps": 3}),
        write_run(tmp_path / "b", DENSE, attention="dense"),
    ]
    text = page(gather(runs), "a.png", "a.json")
    assert "| triton, seed 0 | 17.00M | 800,000 | 2 | 8 | 3 | 1.0000 | 4 | 3.0000 |" in text
    assert "| triton, seed 0 | 3.0000 " + 4 * "| 1.0000 " + "| 1.5000 | 1.0000 | 1.0000 |" in text


def test_kind_rules_are_models_of_their_own(tmp_path):
    rules = {"old": {}, "alike": {"kind_rule": "alike", "seed": 1}, "next": {"kind_rule": "next"}}
    runs = [write_run(tmp_path / name, SPARSE, **more) for name, more in rules.items()]
    runs.append(write_run(tmp_path / "dense", DENSE, attention="dense", kind_rule="alike"))
    assert [row[:2] for row in by_model(runs)[1:]] == [["triton", "2"], ["triton, next", "1"], ["dense", "1"]]
    text = page(gather(runs), "a.png", "a.json")
    assert re.findall(r"^\| (\S.*seed \d) \| 17.00M", text, re.M) == [
        "triton, seed 0", "triton, seed 1", "triton, next, seed 0", "dense, seed 0",
    ]  # fmt: skip
    with pytest.raises(UserError, match="both triton, next of seed 0"):
        gather([runs[2], write_run(tmp_path / "again", DENSE, kind_rule="next")])
