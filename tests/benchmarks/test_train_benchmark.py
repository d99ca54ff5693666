"""`benchmarks.train` and its page, on a tiny model."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks import train
from benchmarks.common.compile_counts import count_compilations
from benchmarks.common.readme_section import marked
from benchmarks.common.results_file import load
from benchmarks.training import measure as train_run
from benchmarks.training.page import page, readme_body
from meloformer.composer import compose
from meloformer.data.batches import PackedSongs
from meloformer.data.shards import ShardSet
from meloformer.errors import UserError
from meloformer.model.transformer import SIZES
from meloformer.training import stepper
from meloformer.training.distributed import Job

from helpers.report_cases import MACHINE
from helpers.tiny_train import TINY
from helpers.training import ROOT, forked

QUICK = [
    *("--sizes", "small", "--lengths", "512", "--batch_size", "1", "--warmup", "1", "--steps", "2"),
    *("--device", "cpu", "--attention", "reference"),
]
NAMED = (
    *("size", "attention", "kind_rule", "tokens_per_row", "checkpoint_activations", "gpus"),
    "rows_per_batch",
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SIZES, "small", TINY)


def test_every_row_is_measured_or_says_why_not(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_run, "peak_flops", lambda device: 1e12)
    target = tmp_path / "new" / "page.md"
    args = ["--attention", "reference,dense,triton", "--data_dir", str(data), "--output", str(target)]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    train.main([*QUICK, *args])
    result = json.loads(target.with_suffix(".json").read_text())
    reference, dense, triton = result["rows"]
    for row in (reference, dense):
        assert row["tokens_per_s"] > 0 and 0 < row["mfu"] < 1 and 0 <= row["data_wait"] < 1
        assert row["gpu_time"] is None
        assert row["step_ms"] == pytest.approx(1e3 * row["tokens_per_step"] / row["tokens_per_s"])
        assert list(row["breakdown_ms"]) == list(train_run.PARTS)
        assert all(ms > 0 for ms in row["breakdown_ms"].values())
        assert row["tokens_per_step"] <= 512 and row["warmup_steps"] == 2 and row["gpus"] == 1
        assert set(row["compiled_later"].values()) == {0}
    assert dense["attention_used"] == "dense" and dense["parameters"] != reference["parameters"]
    assert set(triton) == {*NAMED, "failed"} and triton["failed"].startswith("--attention triton:")
    text = target.read_text()
    assert f"| {reference['tokens_per_s']:,.0f} |" in text and "| 1.00 |" in text
    assert "## Not measured" in text and "triton" in text

    again = tmp_path / "again.md"
    train.main(["--from", str(target.with_suffix(".json")), "--output", str(again)])
    assert again.read_text() == text.replace("page_speed.png", "again_speed.png")
    assert (tmp_path / "again_speed.png").read_bytes().startswith(b"\x89PNG")


def test_without_data_songs_are_composed(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "COMPOSED_BARS", [4])
    target = tmp_path / "page.md"
    again = ["--checkpoint_activations", "none,layer"]
    kept = ["--keep_songs", str(tmp_path / "kept")]
    train.main([*QUICK, *again, "--attention", "dense", "--songs", "2", "--output", str(target), *kept])
    rows = json.loads(target.with_suffix(".json").read_text())["rows"]
    assert [row["checkpoint_activations"] for row in rows] == ["none", "layer"]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"])
    text = target.read_text()
    assert "2 composed songs" in text and "## Memory and speed by what is computed again" in text

    monkeypatch.setattr(compose, "compose", None)  # nothing is composed any more
    assert train.compose_shards(2, tmp_path / "kept") == tmp_path / "kept" / "shards"
    with pytest.raises(UserError, match="has 2 composed songs"):
        train.compose_shards(3, tmp_path / "kept")


def measured(monkeypatch, error, most_rows=0):
    """What `attempt` tells of 6 rows per batch if batches of more than `most_rows` raise `error`."""

    def measure(config, *_):
        if config.batch_size > most_rows:
            raise error
        return {"loss": 1.0}

    monkeypatch.setattr(train_run, "measure", measure)
    config = train_run.TrainConfig(data_dir="", batch_size=6, device="cpu")
    return lambda world=1: train_run.attempt(config, None, Job(0, world, torch.device("cpu")), 1, 1)


def test_a_row_without_memory_is_tried_with_half_the_rows(monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory.")
    assert measured(monkeypatch, error, most_rows=3)() == {"rows_per_batch": 3, "loss": 1.0}
    assert measured(monkeypatch, error)() == {"rows_per_batch": 1, "failed": "out of memory"}
    with pytest.raises(UserError, match=r"out of memory on cpu.*lower --batch_size \(now 6\)"):
        measured(monkeypatch, error)(world=2)


def test_any_other_error_costs_its_row_alone_but_ends_a_job_of_several(monkeypatch):
    told = measured(monkeypatch, KeyError("a | b"))()
    assert told == {"rows_per_batch": 6, "failed": "KeyError: 'a | b'"}
    with pytest.raises(KeyError):
        measured(monkeypatch, KeyError("a | b"))(world=2)


def test_batches_are_full_and_dealt_out_as_in_training(data):
    packed = PackedSongs(ShardSet(data), "train", max_seq_len=512, max_bars=100)
    of_epoch = packed.rows_per_epoch(0)
    expected = [packed.batch(0, [row]).ids for row in range(of_epoch)]
    both = [train_run.full_batches(packed, 2, Job(rank, 2, torch.device("cpu"))) for rank in (0, 1)]
    for step in range(of_epoch):
        group = [(4 * step + i) % of_epoch for i in range(4)]
        for batches, rows in zip(both, packed.rows_by_rank(0, group, 2)):
            assert torch.equal(next(batches)[0].ids, torch.cat([expected[row] for row in rows]))


def test_warm_up_lasts_until_nothing_is_compiled(data, monkeypatch):
    """Something new in the second and the fourth step; what comes later is told as such."""
    new = iter([2, 1, 0, 3, 0, 0])
    fed = []

    class Counting:
        def __enter__(self):
            return lambda: {"graphs": next(new, 5), "kernels": 0}

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(train_run, "count_compilations", Counting)
    steps = train_run.Run.steps
    monkeypatch.setattr(train_run.Run, "steps", lambda run, number: fed.append(number) or steps(run, number))
    config = train_run.TrainConfig(
        data_dir="", model_size="small", attention="reference", max_seq_len=512, batch_size=1,
        gradient_accumulation_steps=1, device="cpu",
    )  # fmt: skip
    found = train_run.measure(config, ShardSet(data), Job(0, 1, torch.device("cpu")), 2, 3)
    assert fed == [1] * 6 + [3] and found["warmup_steps"] == 6
    assert found["compiled_in_warmup"]["graphs"] == 6 and found["compiled_later"]["graphs"] == 5


def test_graphs_are_counted():
    torch._dynamo.reset()
    twice = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
    with count_compilations() as compiled:
        twice(torch.ones(2))
        twice(torch.ones(2))
        assert compiled() == {"graphs": 1, "kernels": 0}
        twice(torch.ones(2))
        assert compiled() == {"graphs": 0, "kernels": 0}
        twice(torch.ones(3))
        assert compiled() == {"graphs": 1, "kernels": 0}


@pytest.mark.slow
def test_two_processes(data, tmp_path):
    one, two, both = (tmp_path / f"{name}.md" for name in ("one", "two", "both"))
    words = [*QUICK, "--data_dir", str(data), "--steps", "8"]
    train.main([*words, "--output", str(one)])
    told = forked("benchmark", "2", "none", *words, "--output", str(two))
    assert told["codes"] == [0, 0], told["output"]
    (alone,), (row,) = (json.loads(p.with_suffix(".json").read_text())["rows"] for p in (one, two))
    assert (alone["gpus"], row["gpus"]) == (1, 2)
    assert 1.5 < row["tokens_per_step"] / alone["tokens_per_step"] < 2.5
    assert math.isfinite(row["loss"])
    sources = [str(path.with_suffix(".json")) for path in (one, two)]
    train.main(["--from", *sources, "--output", str(both)])
    times = row["tokens_per_s"] / alone["tokens_per_s"]
    assert f"| {row['tokens_per_s']:,.0f} | {alone['tokens_per_s']:,.0f} | {times:.2f} |" in both.read_text()


@pytest.mark.slow
def test_a_process_that_fails_ends_all_of_them_with_its_error(data, tmp_path):
    told = forked(
        "benchmark", "2", "1", *QUICK, "--data_dir", str(data), "--output", str(tmp_path / "page.md")
    )
    assert told["codes"] == [1, 1] and "ZeroDivisionError" in told["output"]


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
    sparse, dense = (line.split(" | ")[-5:] for line in lines(text, "GPU time of a step, ms"))
    assert sparse == ["-", "13.0", "2.5", "158.0", "15.5 |"]
    assert dense == ["120.0", "-", "-", "236.0", "0.0 |"]
    unknown = row("base", "triton", 24576, 1.0) | {"gpu_time": None}
    assert "GPU time of a step" not in page([of(unknown)], ["a.json"]).split("## What is what")[0]


def test_a_later_row_of_the_same_replaces_a_failure():
    failed = {key: value for key, value in row("base", "triton", 24576, 1.0, rows=1).items() if key in NAMED}
    failed |= {"failed": "out of memory"}
    measured = row("base", "triton", 24576, 600_000.0, rows=4)
    assert "out of memory" not in page([of(failed), of(measured)], ["a.json", "b.json"])
    assert "out of memory" in page([of(measured), of(failed)], ["a.json", "b.json"])


def test_skipped_steps_are_no_figures(data, tmp_path, monkeypatch):
    loss = stepper.next_token_loss
    monkeypatch.setattr(stepper, "next_token_loss", lambda *a: (loss(*a)[0] * math.nan, loss(*a)[1]))
    target = tmp_path / "page.md"
    train.main([*QUICK, "--data_dir", str(data), "--output", str(target)])
    (found,) = json.loads(target.with_suffix(".json").read_text())["rows"]
    assert "a step was skipped" in found["failed"]


def lines(text, title):
    """The lines of the table under a title."""
    section = text.split(f"## {title}\n")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("|")][2:]


def test_speed_is_set_beside_dense_and_flex_of_the_same_kind():
    first = of(row("base", "triton", 24576, 600e3), row("base", "dense", 24576, 300e3))
    second = of(
        row("base", "flex", 24576, 50e3),
        row("base", "flex", 24576, 60e3, rows=2),
        row("base", "triton", 512, 1e6),
        row("base", "triton", 24576, 1.1e6, gpus=2),
    )
    triton, _, flex, _, short, two = lines(page([first, second], ["a.json", "b.json"]), "Speed")
    assert "| 600,000 | 2.00 | 10.00 | 40.0% | 20.0 | 0.10% |" in triton
    assert "| 50,000 | 0.17 | 0.83 |" in flex
    assert "| 1,000,000 | - | - |" in short and "| 1,100,000 | - | - |" in two


def test_kind_rules_have_rows_of_their_own_beside_one_dense_one(data, tmp_path):
    target = tmp_path / "page.md"
    args = ["--attention", "reference,dense", "--kind_rules", "alike,next", "--data_dir", str(data)]
    train.main([*QUICK, *args, "--output", str(target)])
    alike, following, dense = json.loads(target.with_suffix(".json").read_text())["rows"]
    assert [r["kind_rule"] for r in (alike, following, dense)] == ["alike", "next", "alike"]
    assert alike["loss"] != following["loss"]
    assert [line.split(" | ")[1] for line in lines(target.read_text(), "Speed")] == [
        "reference", "reference, next", "dense",
    ]  # fmt: skip


def test_a_kind_rule_is_set_beside_dense_and_flex_by_the_same_rule():
    old = row("base", "flex", 24576, 50e3)
    del old["kind_rule"]  # as in files of before it was a choice
    rows = [row("base", "triton", 24576, 600e3), row("base", "triton", 24576, 400e3, rule="next"), old]
    rows += [row("base", "flex", 24576, 20e3, rule="next"), row("base", "dense", 24576, 200e3)]
    alike, following, *_ = lines(page([of(*rows)], ["a.json"]), "Speed")
    assert alike.startswith("| base | triton | ") and "| 600,000 | 3.00 | 12.00 |" in alike
    assert following.startswith("| base | triton, next | ") and "| 400,000 | 2.00 | 20.00 |" in following


def test_several_gpus_are_set_beside_one():
    rows = [row("base", "triton", 24576, 600e3), row("base", "triton", 24576, 1.17e6, gpus=2)]
    odd = row("base", "triton", 24576, 1e6, gpus=2, rows=2)
    scaled, alone = lines(page([of(*rows, odd)], ["a.json"]), "Scaling")
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
    plain, layer, _, ffn = lines(text, "Memory and speed by what is computed again")
    assert plain.endswith("| 80.0 | 100% | 600,000 | 100% |")
    assert layer.endswith("| layer | 1 | 4 | 20.0 | 25% | 450,000 | 75% |")
    assert ffn.endswith("| ffn | 1 | 4 | 60.0 | - | 200,000 | 67% |")


def test_what_was_compiled_is_told():
    (line,) = lines(page([of(row("base", "triton", 24576, 600e3))], ["a.json"]), "Compilation")
    assert line.endswith("| 9.0 | 6 | 2 | 31 | 0 | 7 |")


def test_the_table_of_a_readme_is_between_its_markers(tmp_path):
    readme, source = tmp_path / "README.md", tmp_path / "r" / "a.json"
    readme.write_text("before\n<!-- training: old.json -->\nold\n<!-- end of training -->\nafter\n")
    rows = [row("small", "triton", 512, 800.0), row("small", "dense", 512, 400.0)]
    rows += [row("small", "triton", 512, 700.0, again="layer"), row("small", "triton", 512, 1500.0, gpus=2)]
    source.parent.mkdir()
    source.write_text(json.dumps({"format": train.FORMAT, **of(*rows)}))
    train.main(["--from", str(source), "--output", str(tmp_path / "r" / "p.md"), "--readme", str(readme)])
    text = readme.read_text()
    assert text.startswith("before\n<!-- training: r/a.json -->\n![Training") and text.endswith("after\n")
    assert "(r/p_speed.png)" in text and "(r/p.md)" in text and "old" not in text
    told = [line.split(" | ")[3:7] for line in text.splitlines() if line.startswith("| small | ")]
    assert told == [["1", "4", "800", "2.00"], ["2", "4", "1,500", "-"]]


def test_the_projects_own_table_is_made_of_its_results():
    text = (ROOT / "README.md").read_text()
    (names,) = re.findall(r"<!-- training: (.*) -->", text)
    part = text[text.index("<!-- training:") :]
    (page_path,) = re.findall(r"\[all figures and what they mean\]\((.*training.*)\)", part)
    (picture,) = re.findall(r"!\[Training.*?\]\((.*)\)", part)
    paths = [ROOT / name for name in names.split()]
    results = [load(path, train.FORMAT, "benchmarks.train") for path in paths]
    body = readme_body(results, [path.name for path in paths], page_path, picture)
    assert marked("training", names.split(), body) in text
    assert (ROOT / page_path).read_text() == page(results, [path.name for path in paths], Path(picture).name)


def test_of_equal_rows_the_last_counts():
    failed = {name: row("base", "dense", 512, 1.0)[name] for name in NAMED} | {"failed": "a | b"}
    text = page([of(failed), of(row("base", "dense", 512, 5e5))], ["a.json", "b.json"])
    assert len(lines(text, "Speed")) == 1 and "Not measured" not in text
    text = page([of(row("base", "dense", 512, 5e5)), of(failed)], ["a.json", "b.json"])
    assert "Nothing was measured." in text and lines(text, "Not measured")[0].endswith("| a \\| b |")


@pytest.mark.parametrize("change", [{"data": "others"}, {"compile": True}, {"precision": "fp32"}], ids=str)
def test_results_that_cannot_be_compared_make_no_page(change):
    with pytest.raises(UserError, match=r"b and a differ in \w+ .*: no page of both"):
        page([of(), of(**change)], ["a", "b"])
    with pytest.raises(UserError, match="b and a differ in GPU"):
        page([of(), of() | {"machine": MACHINE | {"gpu": "Other GPU"}}], ["a", "b"])


@pytest.mark.parametrize(
    "args, says", [(["--output", "page.html"], "must end in .md"), (["--from", "no.json"], "No such file")]
)
def test_mistakes_are_told(args, says):
    with pytest.raises(UserError, match=says):
        train.main(args)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match=r"is not a result of benchmarks\.train"):
        train.main(["--from", str(tmp_path / "a.json"), "--output", str(tmp_path / "a.md")])
