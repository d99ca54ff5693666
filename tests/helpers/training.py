"""Runs of a tiny model for tests: their settings, their logs, and commands that train."""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from meloformer.checkpoint.store import latest_checkpoint, load_checkpoint
from meloformer.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
TINY_TRAIN = ROOT / "tests" / "helpers" / "tiny_train.py"
FORKED_TRAIN = ROOT / "tests" / "helpers" / "forked_train.py"
TIMES = ("tokens_per_s", "data_wait", "mfu")  # entries of a record that depend on time
SETTINGS = {
    "model_size": "small",
    "max_seq_len": 512,
    "batch_size": 1,
    "gradient_accumulation_steps": 2,
    "epochs": 2,
    "learning_rate": 1e-2,
    "device": "cpu",
    "attention": "reference",
}


def config(data, output, **changes) -> TrainConfig:
    return TrainConfig(data_dir=str(data), output_dir=str(output), **(SETTINGS | changes))


def arguments(data, **changes) -> list[str]:
    """The settings of `config` as command-line flags, without --output_dir."""
    settings = {"data_dir": data, **SETTINGS, **changes}
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def records(output, key="loss") -> list[dict]:
    """The records of a run that have `key`, without entries that depend on time."""
    lines = [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines if key in line]


def losses(output) -> list[float]:
    return [record["loss"] for record in records(output)]


def assert_same_run(one, other):
    """Assert that logs (times apart) and final weights are bitwise equal."""
    assert records(one) == records(other)
    assert records(one, "val_loss") == records(other, "val_loss")
    first, second = (load_checkpoint(latest_checkpoint(output / "checkpoints")) for output in (one, other))
    assert first.step == second.step
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


def environment(faults=(), **more) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "FAULTS": json.dumps(list(faults))}
    return {**os.environ, **own, **more}


def fault(what: str, step: int, rank: int = 0, attempt: int = 0) -> dict:
    return {"what": what, "step": step, "rank": rank, "attempt": attempt}


def run(command: list, faults=(), timeout: int = 1500, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment(faults, **more),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def tiny(*args) -> list:
    return [sys.executable, TINY_TRAIN, *args]


def torchrun(processes: int, *args, restarts: int = 0, script: Path = TINY_TRAIN) -> list:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--max-restarts={restarts}"]
    return [*launcher, f"--nproc_per_node={processes}", script, *args]


def spec(world: int, *args, faults=()) -> str:
    """The specification of a run for the scenario "runs" of `forked_train`."""
    words = [str(arg) for arg in args]
    return json.dumps({"world": world, "args": words, "faults": list(faults)})


@cache
def _server() -> subprocess.Popen:
    """A process that has imported everything, for all scenarios of this test process; it ends with it."""
    command = [sys.executable, str(FORKED_TRAIN), "serve"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **pipes)
    atexit.register(server.communicate)
    return server


def forked(scenario: str, *args, **more: str):
    """Run a scenario of `forked_train` with `more` in its environment; returns its JSON value."""
    with tempfile.TemporaryDirectory() as folder:
        words = [str(arg) for arg in args]
        request = {"scenario": scenario, "arguments": words, "environment": more, "folder": folder}
        server = _server()
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = server.stdout.readline()
        assert code == "0\n", (code, (Path(folder) / "output.txt").read_text())
        return json.loads((Path(folder) / "value.json").read_text())


def read_gradients(file: Path) -> tuple[dict[str, Tensor], list[int]]:
    """Gradients by name and the buckets exchanged, from a file that `forked_train` saved."""
    with safe_open(file, "pt") as opened:
        found = {name: opened.get_tensor(name) for name in opened.keys()}
        return found, json.loads(opened.metadata()["exchanged"])
