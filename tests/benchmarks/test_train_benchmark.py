"""The command `benchmarks.train`, on a tiny model."""

import json
import math

import pytest

from benchmarks import train
from benchmarks.training import measure as train_run
from meloformer.composer import compose
from meloformer.data.shards import ShardSet
from meloformer.errors import UserError
from meloformer.model import transformer
from meloformer.model.inputs import TABLE_SIZES, ChordGuesses
from meloformer.model.transformer import SIZES
from meloformer.training import stepper

from helpers.report_cases import table_rows
from helpers.tiny_train import TINY
from helpers.training import forked

QUICK = [
    *("--sizes", "small", "--lengths", "512", "--batch_size", "1", "--warmup", "1", "--steps", "2"),
    *("--device", "cpu", "--attention", "reference"),
]
NAMED = (
    *("size", "attention", "kind_rule", "near_bars", "tokens_per_row", "checkpoint_activations", "gpus"),
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


def test_the_fastest_turn_of_each_row_is_kept(data, tmp_path, monkeypatch):
    """A turn is all rows once; a failure is slower than anything."""
    speeds = iter([10.0, 7.0, None, 9.0, 12.0, 8.0])
    asked = []

    def attempt(config, *_):
        asked.append(config.attention)
        speed = next(speeds)
        return {"rows_per_batch": 1} | ({"failed": "why"} if speed is None else {"tokens_per_s": speed})

    monkeypatch.setattr(train, "attempt", attempt)
    monkeypatch.setattr(train, "_publish", lambda *_: None)
    target = tmp_path / "page.md"
    args = [
        "--attention",
        "reference,dense",
        "--data_dir",
        str(data),
        "--turns",
        "3",
        "--output",
        str(target),
    ]
    train.main([*QUICK, *args])
    result = json.loads(target.with_suffix(".json").read_text())
    assert asked == ["reference", "dense"] * 3 and result["settings"]["turns"] == 3
    assert [(row["attention"], row["tokens_per_s"]) for row in result["rows"]] == [
        ("reference", 12.0),
        ("dense", 9.0),
    ]


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
    songs = json.loads(target.with_suffix(".json").read_text())["settings"]
    lengths = ShardSet(tmp_path / "kept" / "shards").lengths
    mean = round(sum(lengths.tolist()) / 2)  # and the median, of two songs
    assert songs["songs_name"] == "composed songs" and songs["song_tokens"] == {"median": mean, "mean": mean}
    assert f"| composed songs, {mean:,} tokens | small |" in text
    assert "2 composed songs" in text and "## Memory and speed by recomputation" in text

    monkeypatch.setattr(compose, "compose", None)  # nothing is composed any more
    assert train.compose_shards(2, tmp_path / "kept") == tmp_path / "kept" / "shards"
    with pytest.raises(UserError, match="has 2 composed songs"):
        train.compose_shards(3, tmp_path / "kept")


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


@pytest.mark.faults
def test_a_process_that_fails_ends_all_of_them_with_its_error(data, tmp_path):
    told = forked(
        "benchmark", "2", "1", *QUICK, "--data_dir", str(data), "--output", str(tmp_path / "page.md")
    )
    assert told["codes"] == [1, 1] and "ZeroDivisionError" in told["output"]


def test_skipped_steps_are_no_figures(data, tmp_path, monkeypatch):
    loss = stepper.weighted_loss
    monkeypatch.setattr(stepper, "weighted_loss", lambda *a: loss(*a)._replace(nats=loss(*a).nats * math.nan))
    target = tmp_path / "page.md"
    train.main([*QUICK, "--data_dir", str(data), "--output", str(target)])
    (found,) = json.loads(target.with_suffix(".json").read_text())["rows"]
    assert "a step was skipped" in found["failed"]


def test_kind_rules_have_rows_of_their_own_beside_one_dense_one(data, tmp_path):
    target = tmp_path / "page.md"
    args = ["--attention", "reference,dense", "--kind_rules", "alike,next", "--data_dir", str(data)]
    train.main([*QUICK, *args, "--songs_name", "few songs", "--output", str(target)])
    result = json.loads(target.with_suffix(".json").read_text())
    assert result["settings"]["songs_name"] == "few songs"
    alike, following, dense = result["rows"]
    assert [r["kind_rule"] for r in (alike, following, dense)] == ["alike", "next", "any"]
    assert alike["loss"] != following["loss"]
    assert [line.split(" | ")[2] for line in table_rows(target.read_text(), "Speed")] == [
        "reference, near 0 1", "reference, next, near 0 1", "dense",
    ]  # fmt: skip


def test_a_model_that_reads_tokens_alone_computes_nothing_else_of_them(data, tmp_path, monkeypatch):
    read = []
    real = transformer.read_context
    monkeypatch.setattr(transformer, "read_context", lambda *x: read.append(1) or real(*x))
    found = {}
    for which in ("tokens", "all"):
        target = tmp_path / f"{which}.md"
        train.main([*QUICK, "--inputs", which, "--data_dir", str(data), "--output", str(target)])
        (row,) = json.loads(target.with_suffix(".json").read_text())["rows"]
        found[which] = row | {"reads": len(read)}
    alone, whole = found["tokens"], found["all"]
    assert alone["reads"] == 0 < whole["reads"]
    features = sum(TABLE_SIZES) * TINY.dim
    assert whole["parameters"] - alone["parameters"] == features + TINY.dim * len(ChordGuesses._fields)
    assert alone["loss"] != whole["loss"]
    (line,) = table_rows((tmp_path / "tokens.md").read_text(), "Speed")
    assert "reference, any, near 0 1, no musical inputs" in line


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
