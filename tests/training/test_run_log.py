import json
import sys
import types

import pytest

from meloformer.errors import UserError
from meloformer.training.metrics import Meter, StepFigures, bar_fields
from meloformer.training.run_log import RunLog


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_what_was_logged_after_the_checkpoint_is_forgotten(tmp_path):
    log = RunLog(tmp_path, 0, {})
    for step in range(1, 6):
        log.write({"step": step, "loss": 1.0})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    RunLog(tmp_path, 3, {}).close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    RunLog(tmp_path, 0, {}).close()
    assert lines(tmp_path) == []


def test_what_will_be_done_again_after_the_last_step_is_forgotten(tmp_path):
    log = RunLog(tmp_path, 0, {})
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1.0})
        log.write({"step": step, "val_loss": 2.0})
    log.close()
    RunLog(tmp_path, 2, {}, repeated=("val_loss", "extended_from")).close()
    assert lines(tmp_path) == [
        {"step": 1, "loss": 1.0},
        {"step": 1, "val_loss": 2.0},
        {"step": 2, "loss": 1.0},
    ]


DAMAGE = (
    b"{\x00\xff}",
    b"[" * 100_000,
    b'{"step": 2, "loss": ' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"loss": 1.0}',
    b'{"step": "2"}',
    b"[1]",
    b'{"step": 2, "loss": 1.0',
    b'{"step": 2, "loss": "low"}',
    b'{"step": 2, "loss": 1' + b"0" * 400 + b"}",
    b'{"step": -1' + b"0" * 400 + b"}",
)


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_damaged_lines_are_kept_aside_and_the_others_stay(tmp_path, capsys, damage):
    first, second = (json.dumps({"step": step, "loss": 1.0}).encode() for step in (1, 2))
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([first, damage, second, b""]))
    for _ in range(2):  # the second time there is nothing to say
        RunLog(tmp_path, 2, {}).close()
        assert [line["step"] for line in lines(tmp_path)] == [1, 2]
        assert (tmp_path / "log.jsonl.damaged").read_bytes() == damage + b"\n"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "log.jsonl: 1 damaged line(s) moved to" in said[0]


def test_a_last_line_is_kept_without_its_end_and_kept_aside_if_cut(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    RunLog(tmp_path, 2, {}).close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    path.write_bytes(b'{"step": 1}\n{"st')
    RunLog(tmp_path, 2, {}).close()
    assert [line["step"] for line in lines(tmp_path)] == [1]
    assert (tmp_path / "log.jsonl.damaged").read_bytes() == b'{"st\n'


@pytest.mark.parametrize("board, package", [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_board_that_is_not_installed_is_one_clear_line(tmp_path, monkeypatch, board, package):
    for name in ("torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    with pytest.raises(
        UserError, match=f"--{board} needs a package that is not installed: pip install {package}"
    ):
        RunLog(tmp_path, 0, {}, **{board: "project"})


@pytest.fixture
def shown(monkeypatch) -> list:
    """What TensorBoard is told."""
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, *scalar):
            written.append(scalar)

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    return written


def test_tensorboard_gets_the_numbers(tmp_path, shown):
    log = RunLog(tmp_path, 4, {}, tensorboard=True)
    log.write({"step": 5, "epoch": 0, "loss": None, "lr": 0.5})
    log.close()
    assert shown == [(tmp_path / "tensorboard", 5), ("lr", 0.5, 5), "closed"]


def test_tensorboard_forgets_what_will_be_done_again(tmp_path, shown):
    """It drops all that was shown from a step on, also of other records of the same step."""
    log = RunLog(tmp_path, 0, {})
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 0.5 * step})
        log.write({"step": step, "val_loss": 2.0})
    log.close()
    RunLog(tmp_path, 2, {}, repeated=("val_loss",), tensorboard=True).close()
    assert shown == [(tmp_path / "tensorboard", 2), ("loss", 1.0, 2), "closed"]


def test_a_resumed_run_goes_on_with_its_own_curves_on_wandb(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append("finish")
    )
    fake = types.SimpleNamespace(init=lambda **settings: calls.append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        log = RunLog(tmp_path, 0, {"seed": 3}, wandb="songs")
        log.write({"step": 1, "epoch": 0, "loss": 2.0})
        log.close()
    first, second = calls[0], calls[3]
    assert first == second
    assert (first["project"], first["config"], first["resume"]) == ("songs", {"seed": 3}, "allow")
    assert calls[1:3] == [({"loss": 2.0}, 1), "finish"]


def test_what_is_done_in_a_pause_is_no_part_of_a_step(monkeypatch):
    """But what is before and after it."""
    clock = iter([10.0, 11.0, 18.0, 19.5, 30.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    meter = Meter()
    with meter.paused():  # from 11 to 18
        pass
    figures = StepFigures(2.5, 0.5, 1000, 8e11, True, None)
    assert meter.step_record(1, 0, 1e-3, figures)["tokens_per_s"] == 1000 / 2.5
    assert meter.step_record(2, 0, 1e-3, figures)["tokens_per_s"] == 1000 / 10.5


def test_the_record_of_a_step(monkeypatch):
    clock = iter([10.0, 10.5, 11.0, 12.0, 20.0, 20.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    meter = Meter(peak=1e12)
    assert next(meter.waiting(["batch"])) == "batch"
    record = meter.step_record(1, 0, 1e-3, StepFigures(2.5, 0.5, 1000, 8e11, True, None))
    assert record == {
        "step": 1, "epoch": 0, "lr": 1e-3, "loss": 2.5, "grad_norm": 0.5, "tokens": 1000,
        "tokens_per_s": 500.0, "data_wait": 0.25, "mfu": 0.4,
    }  # fmt: skip
    assert bar_fields(record) == {
        "epoch": "1", "loss": "2.500", "lr": "1.0e-03", "tok/s": "500", "MFU": "40.0%", "wait": "25.0%",
    }  # fmt: skip
    meter.restart()  # what took eight seconds was not a step
    record = meter.step_record(2, 0, 1e-3, StepFigures(float("nan"), float("inf"), 1000, 8e11, False, None))
    assert record["tokens_per_s"] == 2000 and record["skipped"] and record["data_wait"] == 0
    assert record["loss"] is None and record["grad_norm"] is None
    assert bar_fields(record)["loss"] == "not finite"
