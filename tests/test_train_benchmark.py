"""`benchmarks.train` and its page, on a tiny model."""

import json

import pytest

from benchmarks import train
from benchmarks.train_page import page
from meloformer.errors import UserError
from meloformer.model import SIZES

from report_cases import MACHINE
from tiny_train import TINY

QUICK = [
    "--sizes",
    "small",
    "--lengths",
    "512",
    "--batch_size",
    "1",
    "--warmup",
    "1",
    "--steps",
    "2",
    "--device",
    "cpu",
]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SIZES, "small", TINY)


def test_every_row_is_measured_or_says_why_not(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "peak_flops", lambda device: 1e12)
    target = tmp_path / "new" / "page.md"
    args = ["--attention", "reference,dense,triton", "--data_dir", str(data), "--output", str(target)]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    train.main([*QUICK, *args])
    result = json.loads(target.with_suffix(".json").read_text())
    reference, dense, triton = result["rows"]
    for row in (reference, dense):
        assert row["tokens_per_s"] > 0 and 0 < row["mfu"] < 1 and 0 <= row["data_wait"] < 1
        assert row["step_ms"] == pytest.approx(1e3 * row["tokens_per_step"] / row["tokens_per_s"])
        assert list(row["breakdown_ms"]) == list(train.PARTS)
        assert all(ms > 0 for ms in row["breakdown_ms"].values())
        assert row["tokens_per_step"] <= 512
    assert dense["attention_used"] == "dense" and dense["parameters"] != reference["parameters"]
    assert set(triton) == {"size", "attention", "tokens_per_row", "failed"}
    text = target.read_text()
    assert f"| {reference['tokens_per_s']:,.0f} |" in text and "| 1.00 |" in text
    assert "Not measured:" in text and "triton" in text

    again = tmp_path / "again.md"
    train.main(["--from", str(target.with_suffix(".json")), "--output", str(again)])
    assert again.read_text() == text


def test_without_data_songs_are_composed(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "COMPOSED_BARS", 4)
    target = tmp_path / "page.md"
    train.main(
        [
            *QUICK,
            "--attention",
            "dense",
            "--songs",
            "2",
            "--checkpoint_activations",
            "layer",
            "--output",
            str(target),
        ]
    )
    text = target.read_text()
    assert "on composed songs" in text and "activations computed again: layer" in text


def test_speed_beside_dense_is_of_the_same_size_and_length():
    def row(size, attention, length, speed):
        return {
            "size": size, "attention": attention, "tokens_per_row": length, "tokens_per_s": speed,
            "parameters": 85e6, "precision": "bf16", "mfu": 0.4, "peak_gb": 20.0, "data_wait": 0.001,
            "step_ms": 160.0, "first_step_s": 9.0, "breakdown_ms": dict.fromkeys(train.PARTS, 1.0),
        }  # fmt: skip

    rows = [
        row("base", "triton", 24576, 600e3),
        row("base", "dense", 24576, 300e3),
        row("base", "triton", 512, 1e6),
    ]
    settings = {
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "steps": 20,
        "data": "composed songs",
        "compile": None,
        "checkpoint_activations": "none",
    }
    text = page([{"settings": settings, "machine": MACHINE, "rows": rows}], ["a.json"])
    lines = [line for line in text.splitlines() if "600,000" in line or "1,000,000" in line]
    assert "| 600,000 | 2.00 | 40.0% | 20.0 | 0.10% |" in lines[0] and "| 1,000,000 | - |" in lines[1]


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
