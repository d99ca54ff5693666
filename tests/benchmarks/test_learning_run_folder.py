import json

import pytest

from benchmarks.learning.run_folder import read_run
from meloformer.errors import UserError

from helpers.learning_runs import write_run


def test_time_is_that_of_the_steps_and_slow_ones_are_apart(tmp_path):
    run = read_run(write_run(tmp_path / "a", {2: 3.0, 4: 2.0, 10: 1.0}, slow={1: 30.0, 3: 8.0, 4: 5.0}))
    validation = run["validation"]
    assert validation["step"] == [2, 4, 10] and validation["tokens"] == [200_000, 400_000, 1_000_000]
    # The first step and the third, of more than ten times half a second; the fourth takes just ten times.
    assert validation["seconds"] == pytest.approx([0.5, 5.5, 8.5])
    assert validation["all_seconds"] == pytest.approx([30.5, 43.5, 46.5])
    assert (run["slow_steps"], run["slow_seconds"]) == (2, pytest.approx(38.0))
    assert run["tokens_per_s"] == pytest.approx(800_000 / 8.5)


def test_the_first_step_is_apart_even_if_it_is_quick(tmp_path):
    run = read_run(write_run(tmp_path / "a", {2: 3.0, 4: 2.0}, slow={1: 0.5}))
    assert run["validation"]["seconds"] == pytest.approx([0.5, 1.5])
    assert (run["slow_steps"], run["slow_seconds"]) == (1, pytest.approx(0.5))


def test_losses_stand_in_the_order_of_the_log_and_paths_are_left_out(tmp_path):
    run = read_run(write_run(tmp_path / "a", {2: 3.0, 4: 2.0}, kinds={"V": 1.0}, seed=7))
    figures = [key for key in run["validation"] if key.startswith("val_")]
    by_family = [f"val_loss_{kind}" for kind in ("CHORD", "INST", "T", "P", "L", "V")]
    assert figures == ["val_loss", "val_nats_per_note", *by_family, "val_within_P"]
    assert run["validation"]["val_loss_V"] == [4.0, 3.0]
    assert (run["name"], run["attention"], run["seed"]) == ("a", "triton", 7)
    own = {"data_dir", "output_dir", "attention", "kind_rule", "seed", "keep_last"}
    assert not own & run["settings"].keys()
    assert run["settings"]["learning_rate"] == 1e-3 and run["origin"]["device"] == "Test GPU"


def test_the_kind_rule_is_the_original_one_where_the_folder_does_not_tell(tmp_path):
    first = read_run(write_run(tmp_path / "a", {2: 3.0, 4: 2.0}))
    second = read_run(write_run(tmp_path / "b", {2: 3.0, 4: 2.0}, kind_rule="next"))
    assert (first["kind_rule"], second["kind_rule"]) == ("alike", "next")
    assert first["settings"] == second["settings"]


def test_of_a_step_that_was_logged_twice_the_last_record_counts(tmp_path):
    folder = write_run(tmp_path / "a", {2: 3.0, 4: 2.0})
    again = (folder / "log.jsonl").read_text().splitlines()[-1].replace('"val_loss": 2.0', '"val_loss": 1.5')
    with (folder / "log.jsonl").open("a") as log:
        log.write(again + '\n{"step": 5, "lo')
    assert read_run(folder)["validation"]["val_loss"] == [3.0, 1.5]


@pytest.mark.parametrize(
    "losses, summary, says",
    [
        ({2: 3.0, 4: 2.0}, {"finished": False}, "has not finished"),
        ({2: 3.0, 4: None}, {}, "step 4 is not finite"),
        ({4: 3.0}, {}, "two validations"),
        ({2: 3.0, 4: 2.0}, {"steps": 5}, "lacks some of the steps 1 to 5"),
    ],
)
def test_a_run_that_cannot_be_compared_is_refused(tmp_path, losses, summary, says):
    known = {step: 1.0 if loss is None else loss for step, loss in losses.items()}
    folder = write_run(tmp_path / "a", known, summary=summary)
    log = (folder / "log.jsonl").read_text()
    if None in losses.values():
        log = log.replace('"val_loss": 1.0', '"val_loss": null')
    (folder / "log.jsonl").write_text(log)
    with pytest.raises(UserError, match=says):
        read_run(folder)


def test_a_run_that_did_not_note_its_data_is_refused(tmp_path):
    folder = write_run(tmp_path / "a", {2: 3.0, 4: 2.0})
    summary = json.loads((folder / "summary.json").read_text())
    del summary["data"]
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match="train it again"):
        read_run(folder)


@pytest.mark.parametrize("name", ["summary.json", "config.yaml", "log.jsonl"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = write_run(tmp_path / "a", {2: 3.0, 4: 2.0})
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"cannot read .*{name}"):
        read_run(folder)


@pytest.mark.parametrize("name", ["summary.json", "config.yaml"])
def test_a_damaged_file_is_named(tmp_path, name):
    folder = write_run(tmp_path / "a", {2: 3.0, 4: 2.0})
    (folder / name).write_text("[1")
    with pytest.raises(UserError, match=f"{name}: is damaged"):
        read_run(folder)
