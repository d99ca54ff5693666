import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from meloformer import cli, export, preprocess, train
from meloformer.checkpoint.store import best_checkpoint, latest_checkpoint, load_checkpoint
from meloformer.data.batches import PackedSongs
from meloformer.data.shards import ShardSet
from meloformer.errors import DivergedError, UserError
from meloformer.generate import main as generate_command
from meloformer.generate import read_prompt
from meloformer.generation.load import load_model
from meloformer.generation.sampling import Sampling
from meloformer.model.transformer import ModelConfig
from meloformer.tokens import vocab
from meloformer.tokens.tokenizer import HIDTokenizer
from meloformer.training import trainer
from meloformer.training.config import TrainConfig, parse_args
from meloformer.training.distributed import start_job
from meloformer.training.metrics import Meter
from meloformer.training.schedule import learning_rate

from helpers.generated import generate
from helpers.songs import EXAMPLE
from helpers.tiny_train import TINY
from helpers.training import arguments, config, forked, losses, records, spec


def test_the_schedule_warms_up_then_falls_to_a_tenth():
    settings = TrainConfig(data_dir="", warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(step, 1000, settings) for step in range(1000)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert np.all(np.diff(rates[10:]) < 0) and rates[-1] == pytest.approx(0.1, abs=1e-3)
    short = [learning_rate(step, 20, settings) for step in range(20)]
    assert short[:2] == pytest.approx([0.5, 1.0])  # a tenth of the run, not ten steps


def test_training_lowers_the_loss_and_logs_it(data, tmp_path):
    train.train(config(data, tmp_path / "run"), TINY)
    found = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    found = [record for record in found if "loss" in record]
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    assert found[-1]["loss"] < found[0]["loss"] - 0.5
    assert {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_s"} <= set(found[0])
    validation = records(tmp_path / "run", "val_loss")
    assert [record["epoch"] for record in validation] == [0, 1]
    assert validation[1]["val_loss"] < validation[0]["val_loss"]


def test_accumulation_and_batches_of_the_same_rows_are_one_step(data, tmp_path):
    runs = {"2 x 2": (2, 2), "4 x 1": (4, 1), "1 x 4": (1, 4)}
    curves = []
    for name, (batch, accumulation) in runs.items():
        settings = config(data, tmp_path / name, batch_size=batch, gradient_accumulation_steps=accumulation)
        train.train(settings, TINY)
        curves.append(losses(tmp_path / name))
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)
    np.testing.assert_allclose(curves[2], curves[0], rtol=1e-4)


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_rows(data, tmp_path):
    same = {"max_seq_len": 256, "epochs": 1, "max_steps": 3}
    train.train(config(data, tmp_path / "one", **same, batch_size=2), TINY)
    two, wrong = forked(
        "runs",
        spec(2, *arguments(data, **same), "--output_dir", tmp_path / "two"),
        spec(2, "--data_dir", tmp_path / "none", "--device", "cpu"),
    )
    assert two["codes"] == [0, 0], two["output"]
    assert wrong["codes"] == [2, 2]
    says = sorted(line.partition(": ")[0] for line in wrong["output"].splitlines())
    assert says == ["error", "error in process 1"], wrong["output"]
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    assert [r["tokens"] for r in records(tmp_path / "two")] == [
        r["tokens"] for r in records(tmp_path / "one")
    ]
    np.testing.assert_allclose(
        [r["val_loss"] for r in records(tmp_path / "two", "val_loss")],
        [r["val_loss"] for r in records(tmp_path / "one", "val_loss")],
        rtol=1e-5,
    )


def test_a_run_that_diverges_stops_and_saves_no_weights_that_are_not_finite(data, tmp_path):
    with pytest.raises(DivergedError, match="lower --learning_rate"):
        train.train(config(data, tmp_path, learning_rate=1e30, epochs=20), TINY)
    for path in (tmp_path / "checkpoints").glob("step-*"):
        weights = load_checkpoint(path).weights
        assert all(weight.isfinite().all() for weight in weights.values())


def test_epochs_of_different_length_are_all_trained(data, tmp_path, monkeypatch):
    rows_of_epoch = PackedSongs.rows

    def fewer_at_first(self, epoch):
        return rows_of_epoch(self, epoch)[: 4 if epoch == 0 else None]

    monkeypatch.setattr(PackedSongs, "rows", fewer_at_first)
    settings = config(data, tmp_path, gradient_accumulation_steps=1, save_every=1)
    train.train(settings, TINY)
    assert [record["epoch"] for record in records(tmp_path, "val_loss")] == [0, 1]
    before = losses(tmp_path)
    assert len(before) > 2 * 4
    train.train(dataclasses.replace(settings, resume="auto"), TINY)
    assert losses(tmp_path) == before


def test_a_run_leaves_what_people_look_for(data, tmp_path):
    settings = config(data, tmp_path, validate_every=4, keep_last=1, deterministic=True)
    try:
        train.train(settings, TINY)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock", "checkpoints", "config.yaml", "log.jsonl", "loss.png", "summary.json",
    ]  # fmt: skip
    assert parse_args(["--config", str(tmp_path / "config.yaml")]) == settings
    validations = records(tmp_path, "val_loss")
    assert [record["step"] for record in validations] == [4, 6, 8, 12]
    best = min(validations, key=lambda record: record["val_loss"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["finished"] and summary["stopped_by"] is None
    assert (summary["steps"], summary["epochs"], summary["skipped_steps"]) == (12, 2, 0)
    assert summary["loss"] == losses(tmp_path)[-1]
    shards = ShardSet(data)
    told = summary["data"]
    assert told["sha256"] == shards.sha256() and told["val_split"] == 0.2
    songs = [told[name]["songs"] for name in ("training", "validation")]
    assert (
        songs == [len(shards.split("train")), len(shards.split("val"))]
        and min(songs) > 0
        and sum(songs) == 12
    )
    assert told["training"]["tokens"] == sum(r["tokens"] for r in records(tmp_path) if r["epoch"] == 0)
    assert summary["best"] == {"step": best["step"], "val_loss": best["val_loss"]}
    assert summary["best_checkpoint"] == f"step-{best['step']:08d}"
    assert best_checkpoint(tmp_path / "checkpoints").name == summary["best_checkpoint"]


def test_the_best_checkpoint_outlives_the_last_ones(data, tmp_path, monkeypatch):
    figures = iter([3.0, 1.0, 2.0, 1.5, None, 4.0])
    monkeypatch.setattr(trainer, "validate", lambda *_: {"val_loss": next(figures)})
    train.train(config(data, tmp_path, validate_every=2, keep_last=1), TINY)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000012"]
    assert json.loads((tmp_path / "summary.json").read_text())["best"] == {"step": 4, "val_loss": 1.0}


def test_the_best_stays_the_best_when_a_stop_came_after_its_validation(data, tmp_path, monkeypatch):
    """Its sample is still due then, and after that the same step is saved once more."""
    wishes, figures = [], iter([1.0, *[2.0] * 9])
    write = trainer.write_sample

    def write_sample(model, folder, step, **others):
        if not wishes:
            wishes.append("a test")
            return False
        return write(model, folder, step, **others)

    monkeypatch.setattr(trainer, "validate", lambda *_: {"val_loss": next(figures)})
    monkeypatch.setattr(trainer, "write_sample", write_sample)
    settings = config(data, tmp_path, validate_every=2, sample_every=2, keep_last=1, max_steps=4)
    first = trainer.Trainer(settings, TINY, start_job("cpu"), lambda: wishes[0] if wishes else None)
    assert first.run() == "a test" and (first.step, first.due) == (2, ["sample"])
    train.train(dataclasses.replace(settings, resume="auto"), TINY)
    assert best_checkpoint(tmp_path / "checkpoints").name == "step-00000002"


def test_a_run_that_is_killed_while_it_writes_a_song_gets_on(data, tmp_path, monkeypatch):
    """What is due is saved before, and the song is lost."""

    def killed(*_, **__):
        raise Killed

    class Killed(BaseException):
        pass

    settings = config(data, tmp_path, save_every=2, sample_every=2, max_steps=4, keep_last=9)
    monkeypatch.setattr(trainer, "write_sample", killed)
    for step in (2, 4):
        with pytest.raises(Killed):
            train.train(dataclasses.replace(settings, resume="auto"), TINY)
        assert latest_checkpoint(tmp_path / "checkpoints").name == f"step-{step:08d}"
    train.train(dataclasses.replace(settings, resume="auto"), TINY)
    assert json.loads((tmp_path / "summary.json").read_text())["finished"]


def test_checkpoints_by_minutes(data, tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 20))  # 20 seconds from look to look
    monkeypatch.setattr(trainer.time, "monotonic", lambda: next(clock))
    train.train(config(data, tmp_path, save_every_minutes=1, keep_last=99, epochs=1), TINY)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000006"]


def test_samples_come_when_asked(data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        trainer, "write_sample", lambda *a, **k: asked.append((a[1:], k["max_context"])) or True
    )
    train.train(config(data, tmp_path, sample_every=5), TINY)
    assert asked == [((tmp_path / "samples", 5), 512), ((tmp_path / "samples", 10), 512)]


def test_a_model_trains_validates_and_generates_by_its_own_kind_rule(data, tmp_path):
    for rule in ("alike", "next"):
        train.train(config(data, tmp_path / rule, kind_rule=rule, max_steps=2), TINY)
    assert losses(tmp_path / "alike") != losses(tmp_path / "next")
    assert records(tmp_path / "alike", "val_loss") != records(tmp_path / "next", "val_loss")
    model, _ = load_model(tmp_path / "next", torch.device("cpu"))
    assert model.config.kind_rule == "next"
    assert generate(model, max_tokens=20)[0] == vocab.BOS


def test_an_export_of_a_run_generates(data, tmp_path, capsys):
    train.train(config(data, tmp_path / "run", max_steps=2, augment=False), TINY)
    export.main(["--checkpoint", str(tmp_path / "run"), "--best", "--output", str(tmp_path / "model")])
    # What a model of two steps writes is chance, but with --bars no song ends before it has a note.
    args = ["--checkpoint", tmp_path / "model", "--output", tmp_path / "song.mid", "--bars", "1"]
    generate_command([*map(str, args), "--instruments", "piano", "--density", "piano 4"])
    assert (tmp_path / "song.mid").exists()
    with pytest.raises(UserError, match="leave out --best"):
        export.main(["--checkpoint", str(tmp_path), "--best", "--output", str(tmp_path / "other")])


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_thousand_steps_do_not_grow_the_memory(data, tmp_path, monkeypatch):
    """Of the process as a whole, after the allocator has settled in the first two hundred."""
    sizes = []
    tiny = ModelConfig(layers=1, dim=16, heads=1, ffn=16)
    settings = config(
        data, tmp_path, max_seq_len=64, gradient_accumulation_steps=1, epochs=10_000, max_steps=1000
    )

    def look() -> None:
        resident = int(Path("/proc/self/statm").read_text().split()[1])
        sizes.append(resident * os.sysconf("SC_PAGE_SIZE") / 2**20)

    step_record = Meter.step_record
    monkeypatch.setattr(Meter, "step_record", lambda *args: look() or step_record(*args))
    train.train(settings, tiny)
    early, late = np.median(sizes[200:300]), np.median(sizes[-100:])
    assert len(sizes) == 1000 and late - early < 4, (early, late)


@pytest.fixture
def mistakes(data, tmp_path):
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other"
    other.mkdir()
    for path in data.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["fingerprint"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    train.train(config(data, tmp_path / "run", max_steps=1), TINY)
    damaged = latest_checkpoint(tmp_path / "run" / "checkpoints") / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    return {
        "no such folder": (["--data_dir", tmp_path / "none"], "none"),
        "an empty folder": (["--data_dir", tmp_path / "empty"], "manifest.json"),
        "another tokenizer": (["--data_dir", other], "another tokenizer"),
        "a damaged checkpoint": (
            ["--data_dir", data, "--output_dir", tmp_path / "run", "--resume", "--max_seq_len", "512"],
            "SHA-256",
        ),
        "a bad number": (["--data_dir", data, "--batch_size", "0"], "--batch_size"),
        "an unknown flag": (["--data_dir", data, "--wings", "2"], "--wings"),
        "a file for a folder": (
            ["--data_dir", data, "--output_dir", data / "manifest.json"],
            "manifest.json",
        ),
        "a seed below 0": (["--data_dir", data, "--seed", "-1"], "--seed"),
        "an unknown device": (["--data_dir", data, "--device", "warp"], "--device warp"),
        "rows too short for a bar": (["--data_dir", data, "--max_seq_len", "4"], "longer than a row"),
    }


@pytest.mark.parametrize(
    "name",
    [
        "no such folder",
        "an empty folder",
        "another tokenizer",
        "a damaged checkpoint",
        "a bad number",
        "an unknown flag",
        "a file for a folder",
        "a seed below 0",
        "an unknown device",
        "rows too short for a bar",
    ],
)
def test_mistakes_end_in_one_line_and_code_two(mistakes, name, tmp_path, capsys, monkeypatch):
    args, says = mistakes[name]
    if "--output_dir" not in args:
        args = [*args, "--output_dir", tmp_path / "new"]
    monkeypatch.setitem(train.SIZES, "base", TINY)
    monkeypatch.setattr(sys, "argv", ["train", "--attention", "reference", *map(str, args)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(train.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in error and error.strip().count("\n") == 0, error


@pytest.mark.slow
def test_a_tiny_model_learns_a_real_song_by_heart(tmp_path):
    path = tmp_path / "midi" / "song.mid"
    path.parent.mkdir()
    HIDTokenizer().decode(read_prompt(EXAMPLE, 4)).dump(path)  # its first bars
    preprocess.main(["--input", str(path.parent), "--output", str(tmp_path / "data"), "--val-split", "0"])
    settings = config(
        tmp_path / "data",
        tmp_path / "run",
        max_seq_len=256,  # the song is one row of 227 tokens
        gradient_accumulation_steps=1,
        epochs=60,
        learning_rate=1e-2,
        warmup_steps=10,
        weight_decay=0.0,
        augment=False,
    )
    train.train(settings, ModelConfig(layers=2, dim=64, heads=2, ffn=128))
    assert losses(tmp_path / "run")[-1] < 0.05

    model, _ = load_model(tmp_path / "run", torch.device("cpu"))
    whole, start = read_prompt(path, 4), read_prompt(path, 2)
    written = generate(model, start, bars=2, sampling=Sampling(temperature=0))
    np.testing.assert_array_equal(written[:-1], whole)
