"""What a run does when it is told to stop, when its numbers go wild, and when a process fails."""

import json
import signal
import subprocess
import time

import pytest
import torch

from meloformer import train
from meloformer.checkpoint.store import latest_checkpoint, load_checkpoint
from meloformer.errors import UserError
from meloformer.stop import STOPPED
from meloformer.training.distributed import Job

from helpers.tiny_train import TINY
from helpers.training import (
    arguments,
    assert_same_run,
    config,
    environment,
    fault,
    forked,
    losses,
    records,
    run,
    spec,
    torchrun,
)


def checkpoint(output):
    return load_checkpoint(latest_checkpoint(output / "checkpoints"))


def settings(data, world, **changes):
    return arguments(data, gradient_accumulation_steps=2 // world, **changes)


STOPS = {
    "SIGTERM": fault("SIGTERM", step=3),
    "validation": fault("SIGTERM validation", step=5),
    "first step": fault("SIGINT", step=0),
    "last step": fault("SIGINT", step=5),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "world, names",
    [(1, list(STOPS)), pytest.param(2, ["SIGTERM", "validation"], marks=pytest.mark.faults)],
    ids=str,
)
def test_a_signal_ends_a_run_after_its_step_and_nothing_is_lost(data, tmp_path, world, names):
    """Of two processes, one is told: both stop, after the same step."""
    args = settings(data, world, epochs=1)
    specs = [spec(world, *args, "--output_dir", tmp_path / "whole")]
    for name in names:
        stop = {**STOPS[name], "rank": world - 1}
        specs.append(spec(world, *args, "--output_dir", tmp_path / name, faults=[stop]))
        specs.append(spec(world, *args, "--output_dir", tmp_path / name, "--resume"))
    whole, *told = forked("runs", *specs)
    assert whole["codes"] == [0] * world, whole["output"]
    for name, stopped, resumed in zip(names, told[::2], told[1::2]):
        stop = STOPS[name]
        assert stopped["codes"] == [STOPPED] * world, (name, stopped["output"])
        assert (
            f"stopped by {stop['what'].split()[0] if world == 1 else 'another process'}" in stopped["output"]
        )
        assert resumed["codes"] == [0] * world, (name, resumed["output"])
        assert f"resuming after step {stop['step'] + 1}" in resumed["output"], name
        assert_same_run(tmp_path / "whole", tmp_path / name)


@pytest.fixture(scope="module")
def faulty(data, tmp_path_factory):
    """Runs with one fault each, by name: their folder, exit codes and output."""
    folder = tmp_path_factory.mktemp("faulty")
    every_step = {"save_every": 1, "keep_last": 9, "max_steps": 6}
    in_a_row = [fault("nan loss", step) for step in (1, 3, 4, 5)]
    asked = {
        "SIGINT twice": (1, {}, [fault("SIGINT twice", 3)]),
        "nan loss": (2, every_step, [fault("nan loss", 3, rank=1)]),
        "inf gradient": (2, every_step, [fault("inf gradient", 3, rank=1)]),
        "in a row": (1, {"max_skipped_steps": 3}, in_a_row),
        "no memory": (1, {"batch_size": 2}, [fault("no memory", 1)]),
        "no memory for a row": (1, {}, [fault("no memory", 1)]),
    }
    specs = [
        spec(world, *settings(data, world, **changes), "--output_dir", folder / name, faults=faults)
        for name, (world, changes, faults) in asked.items()
    ]
    resumed = spec(
        1, *settings(data, 1, max_skipped_steps=3), "--output_dir", folder / "in a row", "--resume"
    )
    told = forked("runs", *specs, resumed)
    return {name: {**run, "folder": folder / name} for name, run in zip([*asked, "resumed"], told)}


@pytest.mark.faults
def test_a_second_sigint_stops_at_once(faulty):
    assert faulty["SIGINT twice"]["codes"] == [-signal.SIGINT]
    assert not (faulty["SIGINT twice"]["folder"] / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["nan loss", "inf gradient"])
def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_all(faulty, what):
    told, folder = faulty[what], faulty[what]["folder"]
    assert told["codes"] == [0, 0], told["output"]
    found = records(folder)
    assert [record.get("skipped", False) for record in found] == [False] * 3 + [True] + [False] * 2
    assert (found[3]["loss"] is None) == (what == "nan loss") and found[3]["grad_norm"] is None
    weights = {s: load_checkpoint(folder / "checkpoints" / f"step-{s:08d}").weights for s in (3, 4, 5)}
    assert all(torch.equal(weights[3][name], weights[4][name]) for name in weights[3])
    assert not all(torch.equal(weights[4][name], weights[5][name]) for name in weights[3])
    assert json.loads((folder / "summary.json").read_text())["skipped_steps"] == 1
    assert "step 4: loss or gradient is not finite, the step is skipped" in told["output"]


@pytest.mark.slow
def test_too_many_skipped_steps_in_a_row_end_the_run_with_their_songs(faulty):
    told, folder = faulty["in a row"], faulty["in a row"]["folder"]
    assert told["codes"] == [3], told["output"]
    last = told["output"].splitlines()[-1]
    assert last.startswith("error: 3 steps in a row were skipped") and "skipped.json" in last
    steps = json.loads((folder / "skipped.json").read_text())["steps"]
    assert [step["step"] for step in steps] == [4, 5, 6] and steps[0]["rows"] == [6, 8]
    assert len(steps[0]["samples"]) == 2 and {"song", "start", "stop"} == set(steps[0]["samples"][0][0])
    assert faulty["resumed"]["codes"] == [0] and "resuming after step 6" in faulty["resumed"]["output"]
    assert json.loads((folder / "summary.json").read_text())["skipped_steps"] == 4


@pytest.mark.slow
def test_no_memory_names_the_flags_to_turn(faulty):
    for name, flag in (
        ("no memory", "--batch_size (now 2)"),
        ("no memory for a row", "--max_seq_len (now 512)"),
    ):
        assert faulty[name]["codes"] == [2]
        last = faulty[name]["output"].splitlines()[-1]
        assert last.startswith("error: out of memory on cpu") and flag in last


@pytest.mark.faults
def test_a_process_that_hangs_ends_the_run_of_the_others(data, tmp_path):
    args = settings(data, 2)
    (told,) = forked(
        "runs",
        spec(2, *args, "--output_dir", tmp_path, faults=[fault("hang", 2, rank=1)]),
        TIMEOUT_S="10",
    )
    assert told["codes"] == [1, None] and "Traceback" in told["output"]


@pytest.mark.faults
def test_torchrun_restarts_a_failed_run_where_it_was(data, tmp_path):
    """Without --resume in the command."""
    args = settings(data, 2, save_every=1, epochs=1)
    command = [*torchrun(2, *args, restarts=1), "--output_dir", tmp_path / "failing"]
    done = run(command, [fault("kill", 3, rank=1)])
    assert done.returncode == 0, done.stderr
    assert "resuming after step 3" in done.stdout
    train.train(config(data, tmp_path / "whole", epochs=1), TINY)
    assert losses(tmp_path / "failing") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


@pytest.mark.faults
@pytest.mark.parametrize("what", ["raise", "kill"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_failing_process_takes_the_others_down_and_its_error_is_shown(data, tmp_path, device, what):
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    args = [*settings(data, 2, device=device), "--output_dir", tmp_path]
    done = run(torchrun(2, *args), [fault(what, 2, rank=1)])
    assert done.returncode == 1
    if what == "raise":
        assert "in process 1:" in done.stderr and "RuntimeError: the fault of step 2" in done.stderr
    else:
        assert "Signal 9 (SIGKILL) received" in done.stderr


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_the_workers_save_when_torchrun_is_ended(data, tmp_path, number):
    """Even if it is killed and cannot tell them."""
    args = settings(data, 2, epochs=200, save_every_minutes=1000)
    command = [str(word) for word in [*torchrun(2, *args), "--output_dir", tmp_path]]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    launcher = subprocess.Popen(command, env=environment(), **silent)
    log = tmp_path / "log.jsonl"
    _wait_for(lambda: log.exists() and log.read_bytes().count(b"\n") > 8)
    launcher.send_signal(number)
    launcher.wait()
    _wait_for((tmp_path / "summary.json").exists)
    told = json.loads((tmp_path / "summary.json").read_text())
    assert not told["finished"] and told["steps"] == checkpoint(tmp_path).step
    _wait_for(lambda: _lock_is_free(tmp_path))


def _wait_for(condition, seconds: float = 500) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _lock_is_free(folder) -> bool:
    try:
        with train._lock_output(folder, Job(0, 1, torch.device("cpu"))):
            return True
    except UserError:
        return False


def test_two_runs_in_one_folder_are_refused(data, tmp_path):
    with train._lock_output(tmp_path, Job(0, 1, torch.device("cpu"))):
        with pytest.raises(UserError, match="another training run is writing there"):
            train.train(config(data, tmp_path), TINY)
    train.train(config(data, tmp_path, max_steps=1), TINY)
