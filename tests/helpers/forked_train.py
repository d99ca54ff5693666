"""Training processes forked from one that has imported everything, so that many short runs are cheap.

`python tests/helpers/forked_train.py SCENARIO ARGUMENT...` prints a JSON value. `... serve` does one scenario
after the other, each in a process of its own: see `serve`.
"""

import functools
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # otherwise the first optimizer imports it, in every fork again
from safetensors.torch import save_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from benchmarks import train as train_benchmark
from benchmarks.training import measure as train_run
from meloformer import cli
from meloformer.data.batches import State
from meloformer.training.config import parse_args
from meloformer.training.distributed import full_tensor, local_tensor, start_job
from meloformer.training.stepper import Stepper
from meloformer.training.trainer import Trainer

from helpers import tiny_train


def launch(world: int, work: Callable[[], int | None], log: Path, faults: list[dict] = ()) -> list[int]:
    """Start `work` in `world` processes, as torchrun would; returns their ids. Output goes to `log`."""
    os.environ["FAULTS"] = json.dumps(list(faults))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 70
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )  # fmt: skip
            torch.set_num_threads(1)
            cli.run(work)
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pids


def wait(
    pids: list[int], until: Callable[[], bool] = lambda: False, seconds: float = 1200
) -> list[int | None]:
    """Exit codes, or minus the signal; None for those still running once `until` holds or time is up."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(pids) and not until() and time.monotonic() < deadline:
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return [codes.get(pid) for pid in pids]


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass  # it has ended, and `wait` has collected its exit code


def kills(folder: str, world: str, count: str, *args: str) -> dict:
    """One uninterrupted run in `folder`/whole; one in `folder`/killed, killed and resumed `count` times."""
    folder, times = Path(folder), int(count)
    output = folder / "killed"

    def start(name: str, *more: str) -> list[int]:
        words = [*args, "--output_dir", str(folder / name), *more]
        return launch(int(world), lambda: _yielding(words), folder / f"{name}.txt")

    def finish(name: str, *more: str) -> None:
        assert wait(start(name, *more)) == [0] * int(world), (folder / f"{name}.txt").read_text()

    finish("whole")
    draw = random.Random(int(world))
    during_save = 0
    for number in range(times):
        steps, pause = draw.randint(1, 6), draw.uniform(0, 0.1)
        moment = _Moment(output / "log.jsonl", steps)
        pids = start("killed", "--resume", "auto")
        ended = wait(pids, moment.has_come)
        assert None in ended, f"it was over before kill {number + 1} of {times}"
        time.sleep(pause)
        if number % 2:  # wait for a checkpoint that is being written
            wait(pids, lambda: any((output / "checkpoints").glob(".incomplete-*")), seconds=5)
        kill(pids)
        during_save += any((output / "checkpoints").glob(".incomplete-*"))
    finish("killed", "--resume", "auto")
    return {"during_save": during_save}


def _yielding(words: list[str]) -> int:
    """Train slowly enough to be killed at the intended moment on a busy machine: with lower priority than the
    process that kills, and with saves that take longer."""
    os.nice(10)
    fsync = os.fsync
    os.fsync = lambda file: time.sleep(0.01) or fsync(file)
    return tiny_train.main(words)


class _Moment:
    """The moment at which a process started afterwards has written `lines` lines to a log."""

    def __init__(self, log: Path, lines: int):
        self._log, self._lines, self._base = log, lines, None
        self._old = log.stat().st_ino if log.exists() else None

    def has_come(self) -> bool:
        if not self._log.exists() or self._log.stat().st_ino == self._old:
            return False  # every start replaces the file
        lines = self._log.read_bytes().count(b"\n")
        if self._base is None:
            self._base = lines
        return lines >= self._base + self._lines


def runs(*specifications: str) -> list[dict]:
    """Do runs one after the other; returns the exit codes (None: had to be killed) and the output of each.

    A specification is a JSON object: world, args, faults. A process that is to hang is not waited for.
    """
    told = []
    for text in specifications:
        spec = json.loads(text)
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "output.txt"
            work = functools.partial(tiny_train.main, spec["args"])
            pids = launch(spec["world"], work, log, spec["faults"])
            hanging = {fault["rank"] for fault in spec["faults"] if fault["what"] == "hang"}
            awaited = [rank for rank in range(spec["world"]) if rank not in hanging]
            ended = wait([pids[rank] for rank in awaited])
            codes = [dict(zip(awaited, ended)).get(rank) for rank in range(spec["world"])]
            kill([pid for pid, code in zip(pids, codes) if code is None])
            told.append({"codes": codes, "output": log.read_text()})
    return told


def gradients(folder: str, shapes: str, *args: str) -> None:
    """Save the gradients of a first step, as the optimizer sees them, for `shapes` as "1x4x1 2x1x2".

    `processes`x`batches`x`rows`.safetensors also tells, in its header, the buckets that were exchanged; how
    many parameters had a gradient after each batch; and the bytes of the weights that the lead holds.
    """
    for shape in shapes.split():
        world, batches, rows = map(int, shape.split("x"))
        file = Path(folder) / f"{shape}.safetensors"
        numbers = ["--gradient_accumulation_steps", str(batches), "--batch_size", str(rows)]
        work = functools.partial(save_gradients, str(file), *args, *numbers)
        codes = wait(launch(world, work, file.with_suffix(".txt")))
        assert codes == [0] * world, file.with_suffix(".txt").read_text()


def save_gradients(file: str, *args: str) -> None:
    """Save the gradients of this process, one of those that torchrun or `launch` started."""
    config = parse_args([*args])
    model = {"small": tiny_train.TINY, "base": tiny_train.TINY_BASE}[config.model_size]
    trainer = Trainer(config, model, start_job(config.device))
    job, stepper, exchanged, present = trainer.job, trainer.stepper, [], []

    def hook(_, bucket):
        exchanged.append(bucket.index())
        return allreduce_hook(None, bucket)

    def keep() -> None:
        found = {name: full_tensor(weight.grad).clone() for name, weight in stepper.model.named_parameters()}
        held = sum(local_tensor(weight).nbytes for weight in stepper.model.parameters())
        if job.is_rank0:
            told = {"exchanged": exchanged, "present": present, "held": held}
            save_file(found, file, {name: json.dumps(value) for name, value in told.items()})

    if job.world > 1 and not stepper.sharded:
        stepper.parallel.register_comm_hook(None, hook)
    stepper.optimizer.step = keep
    batches = trainer.data.batches(State(), config.batch_size, rank=job.rank, world=job.world)
    for number in range(1, config.gradient_accumulation_steps + 1):
        stepper.accumulate(
            stepper.prepare(next(batches)[0]), last=number == config.gradient_accumulation_steps
        )
        present.append(sum(weight.grad is not None for weight in stepper.model.parameters()))
    stepper.update(1e-3)()
    job.leave()


def benchmark(world: str, failing: str, *args: str) -> dict:
    """`benchmarks.train` in `world` processes; the one with rank `failing` fails at the end of a step."""

    def work() -> None:
        train_run.SIZES["small"] = tiny_train.TINY
        if os.environ["RANK"] == failing:
            Stepper.update = lambda *_: 1 / 0
        train_benchmark.main([*args])

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "output.txt"
        pids = launch(int(world), work, log)
        codes = wait(pids)
        kill([pid for pid, code in zip(pids, codes) if code is None])
        return {"codes": codes, "output": log.read_text()}


SCENARIOS = {function.__name__: function for function in (kills, runs, gradients, save_gradients, benchmark)}


def serve() -> None:
    """Answer requests, lines of standard input: JSON objects with `scenario`, `arguments`, `folder` and
    `environment`, what to add to that of this process.

    An answer is a line, the exit code; the value is in value.json of that folder, the output in output.txt.
    """
    answers = os.dup(1)
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["folder"])
        pid = os.fork()
        if not pid:
            code = 1
            try:
                out = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT)
                os.dup2(out, 1)
                os.dup2(out, 2)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.close(answers)  # what outlives this process must not keep the caller waiting
                os.environ.update(request["environment"])
                value = SCENARIOS[request["scenario"]](*request["arguments"])
                (folder / "value.json").write_text(json.dumps(value))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        os.write(answers, f"{os.waitstatus_to_exitcode(status)}\n".encode())


if __name__ == "__main__":
    scenario, *arguments = sys.argv[1:]
    if scenario == "serve":
        serve()
    else:
        print(json.dumps(SCENARIOS[scenario](*arguments)))
