"""Training processes as forks of one that has imported everything: many short runs at the price of few.

`python tests/forked_train.py SCENARIO ARGUMENT...` prints a JSON value.
"""

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # the first optimizer would, in every fork anew

from meloformer import cli

import tiny_train


def launch(world: int, work: Callable[[], int | None], log: Path) -> list[int]:
    """Start `work` in `world` processes, as torchrun would; their ids."""
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
    pids: list[int], until: Callable[[], bool] = lambda: False, seconds: float = 120
) -> list[int] | None:
    """Exit codes (minus the signal if there was one) when all have ended; None if `until` came first."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if until() or time.monotonic() > deadline:
            return None
        time.sleep(0.002)
    return [codes[pid] for pid in pids]


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass  # it has ended, and `wait` has seen it


def kills(folder: str, world: str, count: str, *args: str) -> dict:
    """One run left alone in `folder`/whole, one killed `count` times and resumed in `folder`/killed."""
    folder, times = Path(folder), int(count)
    output = folder / "killed"

    def start(name: str, *more: str) -> list[int]:
        words = [*args, "--output_dir", str(folder / name), *more]
        return launch(int(world), lambda: tiny_train.main(words), folder / f"{name}.txt")

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
        assert ended is None, f"it was over before kill {number + 1} of {times}"
        time.sleep(pause)
        if number % 2:  # wait for a checkpoint that is being written
            wait(pids, lambda: any((output / "checkpoints").glob(".incomplete-*")), seconds=5)
        kill(pids)
        during_save += any((output / "checkpoints").glob(".incomplete-*"))
    finish("killed", "--resume", "auto")
    return {"during_save": during_save}


class _Moment:
    """Comes when a process that was started later has written `lines` lines to a log."""

    def __init__(self, log: Path, lines: int):
        self._log, self._lines, self._base = log, lines, None
        self._old = log.stat().st_ino if log.exists() else None

    def has_come(self) -> bool:
        if not self._log.exists() or self._log.stat().st_ino == self._old:
            return False  # every start puts a new file in its place
        lines = self._log.read_bytes().count(b"\n")
        if self._base is None:
            self._base = lines
        return lines >= self._base + self._lines


def codes(folder: str, world: str, *args: str) -> list[int] | None:
    """Exit codes of a run, None for one that had to be killed."""
    log = Path(folder) / "output.txt"
    pids = launch(int(world), lambda: tiny_train.main(list(args)), log)
    found = wait(pids, seconds=60)
    kill(pids)
    return found


if __name__ == "__main__":
    scenario, *arguments = sys.argv[1:]
    print(json.dumps({"kills": kills, "codes": codes}[scenario](*arguments)))
