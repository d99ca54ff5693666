"""A run that was interrupted goes on as if nothing had happened."""

import dataclasses
import itertools
import json
import shutil
from typing import ClassVar

import pytest
import torch

from meloformer import export, train
from meloformer.checkpoint.store import latest_checkpoint, load_checkpoint
from meloformer.errors import UserError
from meloformer.model.transformer import MeloFormer
from meloformer.stop import STOPPED
from meloformer.training import resume, trainer
from meloformer.training.config import parse_args
from meloformer.training.distributed import start_job
from meloformer.training.schedule import learning_rate
from meloformer.training.stepper import Stepper
from meloformer.training.trainer import Trainer

from helpers.tiny_train import TINY
from helpers.training import (
    arguments,
    assert_same_run,
    config,
    fault,
    forked,
    losses,
    records,
    run,
    spec,
    tiny,
)


@pytest.mark.faults
@pytest.mark.parametrize("world, kills", [(1, 6), (2, 4)], ids=["one process", "two processes"])
def test_a_run_killed_at_random_moments_equals_one_left_alone(data, tmp_path, world, kills):
    settings = arguments(
        data, epochs=6, save_every=2, validate_every=5, gradient_accumulation_steps=2 // world
    )
    told = forked("kills", tmp_path, world, kills, *settings)
    assert told["during_save"] >= 1
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.gpu
def test_a_deterministic_run_on_a_gpu_is_resumed_bit_for_bit(data, tmp_path):
    args = [*arguments(data, device="cuda", epochs=4), "--deterministic"]
    whole = run(tiny(*args, "--output_dir", tmp_path / "whole"))
    stopped = run(tiny(*args, "--output_dir", tmp_path / "parts"), [fault("SIGTERM", 9)])
    resumed = run(tiny(*args, "--output_dir", tmp_path / "parts", "--resume"))
    assert (whole.returncode, stopped.returncode, resumed.returncode) == (0, STOPPED, 0), whole.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_another_number_of_processes_keeps_the_order_of_the_data(data, tmp_path):
    def part(world, output, *more, faults=()):
        args = arguments(data, gradient_accumulation_steps=4 // world, epochs=4)
        return spec(world, *args, "--output_dir", tmp_path / output, *more, faults=faults)

    told = forked(
        "runs",
        part(1, "whole"),
        part(2, "parts", faults=[fault("SIGTERM", 4)]),
        part(1, "parts", "--resume"),
    )
    assert [run["codes"] for run in told] == [[0], [STOPPED] * 2, [0]]
    whole, parts = records(tmp_path / "whole"), records(tmp_path / "parts")
    assert [r["tokens"] for r in parts] == [r["tokens"] for r in whole]
    assert len({r["tokens"] for r in whole}) > len(whole) / 2, "other rows would have as many tokens"
    assert [r["loss"] for r in parts] == pytest.approx([r["loss"] for r in whole], rel=1e-4)


def test_what_draws_random_numbers_goes_on_drawing(data, tmp_path, monkeypatch):
    """The model has nothing such yet: so a dropout of its logits."""
    forward = MeloFormer.forward
    monkeypatch.setattr(
        MeloFormer, "forward", lambda self, *args: torch.dropout(forward(self, *args), 0.1, self.training)
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.train(config(data, whole), TINY)
    settings = config(data, parts, save_every=1)
    _run_some(Trainer(settings, TINY, start_job("cpu")), 4)
    torch.rand(7)
    train.train(dataclasses.replace(settings, resume="auto"), TINY)
    assert_same_run(whole, parts)


def test_a_damaged_checkpoint_is_passed_over_and_named(data, tmp_path, capsys):
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    settings = config(data, damaged, save_every=2)
    train.train(config(data, whole), TINY)
    train.train(settings, TINY)
    of_last, steps = latest_checkpoint(damaged / "checkpoints"), len(losses(damaged))
    assert of_last.name == f"step-{steps:08d}" and steps % 2 == 0
    newest = of_last / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    capsys.readouterr()
    train.train(dataclasses.replace(settings, resume="auto"), TINY)
    told = capsys.readouterr()
    assert f"passing over a checkpoint: {newest} is damaged: its SHA-256" in told.err
    assert f"resuming after step {steps - 2}" in told.out
    assert_same_run(whole, damaged)


@pytest.mark.parametrize("stop", [1, 4], ids=["inside an epoch", "later"])
def test_a_resumed_run_equals_one_that_was_never_stopped(data, tmp_path, stop):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.train(config(data, whole), TINY)
    settings = config(data, parts, save_every=1)
    trainer = Trainer(settings, TINY, start_job("cpu"))
    _run_some(trainer, stop)
    # What a killed run logged after its last checkpoint must be forgotten.
    with (parts / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": stop + 1, "loss": 1e9}) + '\n{"step": 99, "lo')
    train.train(dataclasses.replace(settings, resume="auto"), TINY)
    assert losses(parts) == losses(whole)
    assert [r["val_loss"] for r in records(parts, "val_loss")] == [
        r["val_loss"] for r in records(whole, "val_loss")
    ]
    first, second = (load_checkpoint(latest_checkpoint(run / "checkpoints")) for run in (whole, parts))
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


def _run_some(trainer, steps):
    """Run a trainer and break it off, as by a kill, right after the checkpoint of step `steps`."""

    class Killed(Exception):
        pass

    save = trainer.save

    def save_then_die(*args):
        save(*args)
        if trainer.step == steps:
            raise Killed

    trainer.save = save_then_die
    with pytest.raises(Killed):
        trainer.run()


@pytest.mark.parametrize("logged", [False, True], ids=["inside it", "after it was logged"])
def test_a_run_killed_in_its_validation_has_lost_no_step(data, tmp_path, monkeypatch, logged):
    """A validation takes minutes: it may be longer than a run lives. It is logged once."""
    settings = config(data, tmp_path / "whole", max_steps=3, save_every=2, validate_every=2)
    train.train(settings, TINY)
    killed = dataclasses.replace(settings, output_dir=str(tmp_path / "killed"))

    class Killed(Exception):
        pass

    log_validation = Trainer._log_validation

    def kill(self, *args):
        if logged:
            log_validation(self, *args)
        raise Killed

    with monkeypatch.context() as patch:
        if logged:
            patch.setattr(Trainer, "_log_validation", kill)
        else:
            patch.setattr(trainer, "validate", kill)
        with pytest.raises(Killed):
            train.train(killed, TINY)
    assert latest_checkpoint(tmp_path / "killed" / "checkpoints").name == "step-00000002"
    train.train(dataclasses.replace(killed, resume="auto"), TINY)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_run_is_not_begun_over_another(data, tmp_path):
    train.train(config(data, tmp_path, max_steps=1), TINY)
    with pytest.raises(UserError, match="holds a run already: add --resume"):
        train.train(config(data, tmp_path), TINY)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"seed": 1}, "seed was 0 there and is 1 now"),
        ({"weight_decay": 0.5}, "weight_decay was"),
        ({"batch_size": 2}, r"rows_per_step was 2 there and is 4 now \(processes"),
        ({"max_steps": 0}, "it is a run of 1 steps, of which --epochs and --max_steps leave 0"),
        ({"augment_tempo": 5}, "augment_tempo was 10 there and is 5 now"),
        ({"augment": False}, "augment_transpose was 6 there and is 0 now"),
        ({"kind_rule": "next"}, "model was {'kind_rule': 'any'} there and is {'kind_rule': 'next'} now"),
    ],
    ids=str,
)
def test_a_run_is_not_resumed_as_another(data, tmp_path, change, says):
    train.train(config(data, tmp_path, max_steps=1), TINY)
    with pytest.raises(UserError, match=f"cannot resume from .*: {says}"):
        train.train(config(data, tmp_path, **{"max_steps": 1, "resume": "auto", **change}), TINY)


def test_a_run_whose_rows_were_packed_otherwise_does_not_go_on(data, tmp_path, monkeypatch):
    settings = config(data, tmp_path, max_steps=1)
    train.train(settings, TINY)
    monkeypatch.setattr(resume, "PACKING", resume.PACKING + 1)
    with pytest.raises(UserError, match=r"packing was .* there and is .* now: it was begun by a version"):
        train.train(dataclasses.replace(settings, resume="auto"), TINY)


class _Ahead(Stepper):
    """Behaves as on a GPU: what `update` returns is asked for later. Notes how many batches later."""

    late: ClassVar[list[int]] = []
    _updating, _batches = False, 0
    runs_ahead = property(lambda self: not self._updating, lambda self, value: None)

    def accumulate(self, *args):
        self._batches += 1
        super().accumulate(*args)

    def update(self, *args):
        self._updating, at = True, self._batches
        told = super().update(*args)
        self._updating = False
        return lambda: (self.late.append(self._batches - at), told())[1]


def test_books_that_are_done_while_the_device_works_on_are_the_same(data, tmp_path, monkeypatch):
    """Left alone, and stopped and resumed; with validations and checkpoints in between."""
    settings = config(data, tmp_path / "plain", validate_every=3, save_every=4)
    train.train(settings, TINY)
    monkeypatch.setattr(trainer, "Stepper", _Ahead)
    train.train(dataclasses.replace(settings, output_dir=str(tmp_path / "ahead")), TINY)
    assert set(_Ahead.late) == {0, 1}
    assert_same_run(tmp_path / "ahead", tmp_path / "plain")

    asked = itertools.count()
    stopped = dataclasses.replace(settings, output_dir=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        patch.setattr(
            train.StopRequest, "reason", property(lambda self: "a test" * (next(asked) >= 5) or None)
        )
        assert train.train(stopped, TINY) == "a test"
    assert 0 < len(losses(tmp_path / "stopped")) < len(losses(tmp_path / "plain"))
    train.train(dataclasses.replace(stopped, resume="auto"), TINY)
    assert_same_run(tmp_path / "stopped", tmp_path / "plain")


def test_a_damaged_run_is_not_begun_anew(data, tmp_path):
    train.train(config(data, tmp_path, max_steps=1), TINY)
    (latest_checkpoint(tmp_path / "checkpoints") / "config.json").unlink()
    log = (tmp_path / "log.jsonl").read_text()
    for flag, says in (("auto", r"no whole checkpoint .*config.json"), (None, "holds a run already")):
        with pytest.raises(UserError, match=says):
            train.train(config(data, tmp_path, max_steps=1, resume=flag), TINY)
    assert (tmp_path / "log.jsonl").read_text() == log


def test_an_older_checkpoint_is_not_resumed_beside_a_newer_one(data, tmp_path):
    settings = config(data, tmp_path, max_steps=2, save_every=1)
    train.train(settings, TINY)
    older = tmp_path / "checkpoints" / "step-00000001"
    with pytest.raises(UserError, match="holds another checkpoint, step-00000002"):
        train.train(dataclasses.replace(settings, resume=str(older)), TINY)
    elsewhere = dataclasses.replace(settings, resume=str(older), output_dir=str(tmp_path / "branch"))
    train.train(elsewhere, TINY)
    assert losses(tmp_path / "branch") == losses(tmp_path)[1:]


def test_a_resume_without_a_name_begins_no_new_run(data, tmp_path):
    """`--resume "$CHECKPOINT"`, of a variable that is not set."""
    with pytest.raises(UserError, match="--resume: names no checkpoint"):
        train.train(config(data, tmp_path, resume=""), TINY)
    assert not (tmp_path / "log.jsonl").exists()


def test_a_finished_run_is_resumed_to_nothing(data, tmp_path):
    train.train(config(data, tmp_path), TINY)
    before = losses(tmp_path)
    train.train(config(data, tmp_path, resume="auto"), TINY)
    assert losses(tmp_path) == before


def test_a_finished_run_is_extended(data, tmp_path, capsys, monkeypatch):
    """By steps, then by epochs; it takes the rows that a longer run would have taken, and says what the
    learning rate does."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.train(config(data, whole, epochs=3), TINY)
    first = config(data, parts, max_steps=4)
    train.train(first, TINY)
    second = dataclasses.replace(first, max_steps=9, resume="auto")
    capsys.readouterr()
    train.train(second, TINY)
    assert (
        "the run is extended from 4 to 9 steps: the learning rate follows the schedule of 9 steps from here "
        "on, so it is 0.00722 in the next step, after 0.00325 in the last\n"
    ) in capsys.readouterr().out
    third = dataclasses.replace(second, epochs=3, max_steps=None)
    with monkeypatch.context() as patch:  # killed before it has saved anything
        patch.setattr(Trainer, "_loop", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.train(third, TINY)
    train.train(third, TINY)
    assert [r["tokens"] for r in records(parts)] == [r["tokens"] for r in records(whole)]
    schedule = [(0, 4, first, 4), (4, 9, second, 9), (9, len(losses(whole)), third, len(losses(whole)))]
    expected = [
        learning_rate(step, total, settings)
        for begin, end, settings, total in schedule
        for step in range(begin, end)
    ]
    assert [record["lr"] for record in records(parts)] == expected
    told = [(r["step"], r["extended_from"], r["total_steps"]) for r in records(parts, "extended_from")]
    assert told == [(4, 4, 9), (9, 9, len(expected))]
    assert parse_args(["--config", str(parts / "config.yaml")]).epochs == 3
    capsys.readouterr()
    train.train(third, TINY)
    assert "extended" not in capsys.readouterr().out and len(losses(parts)) == len(expected)


def test_a_new_run_begins_with_the_weights_of_a_run_or_an_export(data, tmp_path, capsys):
    train.train(config(data, tmp_path / "old", max_steps=5), TINY)
    export.main(["--checkpoint", str(tmp_path / "old"), "--output", str(tmp_path / "model")])
    old = load_checkpoint(latest_checkpoint(tmp_path / "old" / "checkpoints"))
    for source, output in (("old", "tuned"), ("model", "tuned from the export")):
        settings = config(
            data, tmp_path / output, max_steps=2, seed=5, learning_rate=1e-9, init_from=str(tmp_path / source)
        )
        capsys.readouterr()
        train.train(settings, TINY)
        assert "beginning with the weights of" in capsys.readouterr().out
        assert losses(tmp_path / output)[0] < records(tmp_path / "old")[0]["loss"] - 0.5
        new = load_checkpoint(latest_checkpoint(tmp_path / output / "checkpoints"))
        assert new.step == 2
        for name, weight in old.weights.items():
            assert torch.allclose(new.weights[name], weight, atol=1e-6), name
    assert losses(tmp_path / "tuned") == losses(tmp_path / "tuned from the export")
    used = parse_args(["--config", str(tmp_path / "tuned" / "config.yaml")]).init_from
    assert used == str(old.path)


def test_a_fine_tuned_run_goes_on_with_its_own_weights(data, tmp_path, capsys):
    train.train(config(data, tmp_path / "old", max_steps=1), TINY)
    settings = config(data, tmp_path / "whole", init_from=str(tmp_path / "old"), resume="auto")
    train.train(settings, TINY)  # there is nothing to resume
    settings = dataclasses.replace(settings, output_dir=str(tmp_path / "parts"), save_every=1)
    _run_some(Trainer(settings, TINY, start_job("cpu")), 4)
    shutil.rmtree(tmp_path / "old")  # no longer needed
    capsys.readouterr()
    train.train(settings, TINY)
    assert f"--init_from {tmp_path / 'old'}: not used, since the run goes on from" in capsys.readouterr().out
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    train.train(dataclasses.replace(settings, init_from=None), TINY)
    recorded = parse_args(["--config", str(tmp_path / "parts" / "config.yaml")]).init_from
    assert recorded == str(tmp_path / "old" / "checkpoints" / "step-00000001")


def test_a_new_run_does_not_begin_with_what_does_not_fit(data, tmp_path):
    train.train(config(data, tmp_path / "old", max_steps=1), TINY)
    old = str(tmp_path / "old")
    for change, says in (
        ({"init_from": str(tmp_path)}, f"no whole checkpoint in {tmp_path}"),
        ({"init_from": old, "kind_rule": "next"}, "its model has kind_rule any, and this run's next"),
        ({"init_from": old, "model": dataclasses.replace(TINY, dim=64)}, "its model has dim 32, .* 64"),
        ({"init_from": old, "resume": old}, "--resume .* and --init_from .*: a run begins with one of them"),
    ):
        model = change.pop("model", TINY)
        with pytest.raises(UserError, match=says) as error:
            train.train(config(data, tmp_path / "new", **change), model)
        assert "\n" not in str(error.value)
    export.main(["--checkpoint", old, "--output", str(tmp_path / "model")])
    with pytest.raises(UserError, match=r"holds no optimizer state.*--init_from begins a new run"):
        train.train(config(data, tmp_path / "new", resume=str(tmp_path / "model")), TINY)
