"""The page of `benchmarks.train`, from made-up results."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import train
from benchmarks.common.readme_section import marked
from benchmarks.common.results_file import load
from benchmarks.training import measure as train_run
from benchmarks.training.page import page, readme_body
from meloformer.errors import UserError

from helpers.report_cases import MACHINE, table_rows
from helpers.training import ROOT

NAMED = (
    *("size", "attention", "kind_rule", "tokens_per_row", "checkpoint_activations", "gpus"),
    "rows_per_batch",
)


def gpu_time(busy, kinds):
    return {"wall_ms": busy + 3, "busy_ms": busy, "kinds": kinds, "kernels": []}


def row(size, attention, length, speed, memory=20.0, again="none", gpus=1, rows=4, rule="alike"):
    return {
        "size": size, "attention": attention, "attention_used": attention, "kind_rule": rule,
        "tokens_per_row": length,
        "checkpoint_activations": again, "gpus": gpus, "rows_per_batch": rows, "tokens_per_s": speed,
        "parameters": 85e6, "precision": "bf16", "mfu": 0.4, "peak_gb": memory, "data_wait": 0.001,
        "step_ms": 160.0, "first_step_s": 9.0, "warmup_steps": 6,
        "compiled_in_warmup": {"graphs": 2, "kernels": 31}, "compiled_later": {"graphs": 0, "kernels": 7},
        "breakdown_ms": dict.fromkeys(train_run.PARTS, 1.0),
        "gpu_time": gpu_time(158.0, {"SwiGLU": 13.0, "others": 2.5}),
    }  # fmt: skip


def of(*rows, **settings):
    settings = {
        "gradient_accumulation_steps": 1,
        "precision": "auto",
        "compile": None,
        "data": "48 composed songs, abc",
        "warmup": 5,
        "steps": 20,
    } | settings
    return {"settings": settings, "machine": MACHINE, "rows": list(rows)}


def test_gpu_time_by_kinds_of_kernels():
    dense = row("base", "dense", 24576, 300_000.0)
    dense["gpu_time"] = gpu_time(236.0, {"attention, dense": 120.0})
    text = page([of(row("base", "triton", 24576, 600_000.0), dense)], ["a.json"])
    sparse, dense = (line.split(" | ")[-5:] for line in table_rows(text, "GPU time of a step, ms"))
    assert sparse == ["-", "13.0", "2.5", "158.0", "15.5 |"]
    assert dense == ["120.0", "-", "-", "236.0", "0.0 |"]
    unknown = row("base", "triton", 24576, 1.0) | {"gpu_time": None}
    assert "GPU time of a step" not in page([of(unknown)], ["a.json"]).split("## How to read the tables")[0]


def test_a_later_row_of_the_same_replaces_a_failure():
    failed = {key: value for key, value in row("base", "triton", 24576, 1.0, rows=1).items() if key in NAMED}
    failed |= {"failed": "out of memory"}
    measured = row("base", "triton", 24576, 600_000.0, rows=4)
    assert "out of memory" not in page([of(failed), of(measured)], ["a.json", "b.json"])
    assert "out of memory" in page([of(measured), of(failed)], ["a.json", "b.json"])


def test_speed_is_set_beside_dense_and_flex_of_the_same_kind():
    first = of(row("base", "triton", 24576, 600e3), row("base", "dense", 24576, 300e3))
    second = of(
        row("base", "flex", 24576, 50e3),
        row("base", "flex", 24576, 60e3, rows=2),
        row("base", "triton", 512, 1e6),
        row("base", "triton", 24576, 1.1e6, gpus=2),
    )
    triton, _, flex, _, short, two = table_rows(page([first, second], ["a.json", "b.json"]), "Speed")
    assert "| 600,000 | 2.00 | 10.00 | 40.0% | 20.0 | 0.10% |" in triton
    assert "| 50,000 | 0.17 | 0.83 |" in flex
    assert "| 1,000,000 | - | - |" in short and "| 1,100,000 | - | - |" in two


def test_a_kind_rule_is_set_beside_dense_and_flex_by_the_same_rule():
    old = row("base", "flex", 24576, 50e3)
    del old["kind_rule"]  # as in files of before it was a choice
    rows = [row("base", "triton", 24576, 600e3), row("base", "triton", 24576, 400e3, rule="next"), old]
    rows += [row("base", "flex", 24576, 20e3, rule="next"), row("base", "dense", 24576, 200e3)]
    alike, following, *_ = table_rows(page([of(*rows)], ["a.json"]), "Speed")
    assert alike.startswith("| base | triton | ") and "| 600,000 | 3.00 | 12.00 |" in alike
    assert following.startswith("| base | triton, next | ") and "| 400,000 | 2.00 | 20.00 |" in following


def test_several_gpus_are_set_beside_one():
    rows = [row("base", "triton", 24576, 600e3), row("base", "triton", 24576, 1.17e6, gpus=2)]
    odd = row("base", "triton", 24576, 1e6, gpus=2, rows=2)
    scaled, alone = table_rows(page([of(*rows, odd)], ["a.json"]), "Scaling")
    assert scaled == "| base | triton | 24,576 | none | 2 | 4 | 1,170,000 | 600,000 | 1.95 |"
    assert alone.endswith("| 1,000,000 | - | - |")
    assert "## Scaling" not in page([of(rows[0])], ["a.json"])


def test_recomputation_is_set_beside_none():
    base = [
        row("base", "triton", 24576, 600e3, 80.0),
        row("base", "triton", 24576, 450e3, 20.0, again="layer"),
    ]
    large = [
        row("large", "triton", 24576, 300e3, 90.0, rows=2),
        row("large", "triton", 24576, 200e3, 60.0, "ffn"),
    ]
    text = page([of(*base, *large, row("small", "triton", 24576, 1e6))], ["a.json"])
    plain, layer, _, ffn = table_rows(text, "Memory and speed by recomputation")
    assert plain.endswith("| 80.0 | 100% | 600,000 | 100% |")
    assert layer.endswith("| layer | 1 | 4 | 20.0 | 25% | 450,000 | 75% |")
    assert ffn.endswith("| ffn | 1 | 4 | 60.0 | - | 200,000 | 67% |")


def test_what_was_compiled_is_told():
    (line,) = table_rows(page([of(row("base", "triton", 24576, 600e3))], ["a.json"]), "Compilation")
    assert line.endswith("| 9.0 | 6 | 2 | 31 | 0 | 7 |")


def test_the_table_of_a_readme_is_between_its_markers(tmp_path):
    readme, source = tmp_path / "README.md", tmp_path / "r" / "a.json"
    readme.write_text("before\n<!-- training: old.json -->\nold\n<!-- end of training -->\nafter\n")
    rows = [row("small", "triton", 512, 800.0), row("small", "dense", 512, 400.0)]
    rows += [row("small", "triton", 512, 700.0, again="layer"), row("small", "triton", 512, 1500.0, gpus=2)]
    rows += [row("small", "triton", 512, 750.0, rule="any"), row("small", "triton", 1024, 500.0)]
    rows += [row("base", "flex", 512, 10.0), row("base", "triton", 512, 300.0)]
    source.parent.mkdir()
    source.write_text(json.dumps({"format": train.FORMAT, **of(*rows)}))
    train.main(["--from", str(source), "--output", str(tmp_path / "r" / "p.md"), "--readme", str(readme)])
    text = readme.read_text()
    assert text.startswith("before\n<!-- training: r/a.json -->\n| size | ") and text.endswith("after\n")
    assert "(r/p.md)" in text and "old" not in text
    told = [line.split(" | ")[2:5] for line in text.splitlines() if line.startswith(("| small", "| base"))]
    assert told == [["triton", "800", "2.00"], ["triton", "300", "-"]]


def test_the_projects_own_table_is_made_of_its_results():
    text = (ROOT / "README.md").read_text()
    (names,) = re.findall(r"<!-- training: (.*) -->", text)
    part = text[text.index("<!-- training:") :]
    (page_path,) = re.findall(r"\[all figures and what they mean\]\((.*training.*)\)", part)
    paths = [ROOT / name for name in names.split()]
    results = [load(path, train.FORMAT, "benchmarks.train") for path in paths]
    body = readme_body(results, [path.name for path in paths], page_path)
    assert marked("training", names.split(), body) in text
    assert (ROOT / page_path).read_text() == page(
        results, [path.name for path in paths], f"{Path(page_path).stem}_speed.png"
    )


def test_of_equal_rows_the_last_counts():
    failed = {name: row("base", "dense", 512, 1.0)[name] for name in NAMED} | {"failed": "a | b"}
    text = page([of(failed), of(row("base", "dense", 512, 5e5))], ["a.json", "b.json"])
    assert len(table_rows(text, "Speed")) == 1 and "Not measured" not in text
    text = page([of(row("base", "dense", 512, 5e5)), of(failed)], ["a.json", "b.json"])
    assert "Nothing was measured." in text and table_rows(text, "Not measured")[0].endswith("| a \\| b |")


def of_songs(name, median, *speeds):
    """Results of one collection, as they were measured since songs have names."""
    triton, dense = (row("base", which, 24576, v) for which, v in zip(("triton", "dense"), speeds))
    lengths = {"median": median, "mean": median + 1000}
    named = {"data": f"160 songs, {name[:3]}", "songs_name": name, "song_tokens": lengths}
    return of(triton, dense | {"dense_way": "cudnn"}, **named)


def test_collections_of_songs_make_one_page(tmp_path):
    readme, page_path = tmp_path / "README.md", tmp_path / "p.md"
    readme.write_text("<!-- training: x -->\n<!-- end of training -->\n")
    three = [of_songs("pop | rock", 12_000, 6e5, 3e5), of_songs("POP909", 6_000, 5e5, 4e5)]
    three += [of_songs("composed songs", 9_000, 4e5, 5e5)]
    paths = [tmp_path / f"{number}.json" for number in range(3)]
    for path, result in zip(paths, three):
        path.write_text(json.dumps({"format": train.FORMAT} | result))
    words = ["--output", str(page_path), "--readme", str(readme)]
    train.main(["--from", *map(str, paths), *words])
    text, body = page_path.read_text(), readme.read_text()
    speed = [line.split(" | ") for line in table_rows(text, "Speed")]
    songs = ["| pop \\| rock, 12,000 tokens", "| POP909, 6,000 tokens", "| composed songs, 9,000 tokens"]
    assert [line[0] for line in speed] == [name for name in songs for _ in range(2)]
    assert [line[10] for line in speed] == ["2.00", "1.00", "1.25", "1.00", "0.80", "1.00"]
    assert "POP909 (160 songs, POP; median 6,000 and mean 7,000 tokens)" in text
    assert "- **Songs**: the collection" in text
    for part in text.split("\n\n"):
        if part.startswith("|"):
            assert len({len(re.split(r"(?<!\\)\|", line)) for line in part.splitlines()}) == 1, part
    rows = [line.split(" | ") for line in body.splitlines() if line.startswith("| ")][2:]
    assert rows[0] == ["| pop \\| rock", "12,000", "triton", "600,000", "2.00", "40.0%", "20.0 |"]
    assert rows[3][:5] == ["| POP909", "6,000", "dense, cudnn", "400,000", "1.00"]
    assert len(rows) == 6 and "the base model of 85M parameters, rows of 24,576 tokens" in body


def test_songs_that_only_some_files_name_are_not_set_side_by_side():
    named, old = of_songs("POP909", 6_000, 5e5, 4e5), of(row("base", "triton", 512, 1e6))
    with pytest.raises(UserError, match="b and a differ in data"):
        page([named, old], ["a", "b"])
    old["settings"]["data"] = named["settings"]["data"]  # the same songs, so their name is known
    assert table_rows(page([old, named], ["a", "b"]), "Speed")[0].startswith("| POP909, 6,000 tokens | base ")


@pytest.mark.parametrize("change", [{"data": "others"}, {"compile": True}, {"precision": "fp32"}], ids=str)
def test_results_that_cannot_be_compared_make_no_page(change):
    with pytest.raises(UserError, match=r"b and a differ in \w+ .*: no page of both"):
        page([of(), of(**change)], ["a", "b"])
    with pytest.raises(UserError, match="b and a differ in GPU"):
        page([of(), of() | {"machine": MACHINE | {"gpu": "Other GPU"}}], ["a", "b"])
