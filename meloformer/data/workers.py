"""Worker processes for tasks that may hang, crash or exhaust memory: such a task fails alone, not the run.

This guards against accidents, not against attackers: a worker has all rights of its parent.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

if sys.platform == "linux":
    import resource

REASONS = {
    "timeout": "took longer than the time limit",
    "crashed": "killed the worker process",
    "memory": "needed more than the memory limit",
    "error": "raised an unexpected exception",
}

_WINDOW_PER_WORKER = 32  # items that may be ahead of the slowest one
_START_SECONDS = 120  # a fresh interpreter on a busy machine with a cold disk
_START_ATTEMPTS = 3
_DYING_SECONDS = 10  # from the end of its pipe to the end of a process that may be writing a core file


@dataclass(frozen=True)
class Failure:
    """Why an item has no value: a code from `REASONS` and one line of detail."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Result:
    """The result of one item: its `value`, or the `failure` in its place."""

    item: Any
    value: Any = None
    failure: Failure | None = None


def run_tasks(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    *,
    workers: int,
    timeout_s: float,
    memory_bytes: int,
) -> Iterator[Result]:
    """Yield `function(item)` of every item, in the order of `items`, computed by `workers` processes.

    A worker past `timeout_s` seconds on one item is killed; a dead worker is replaced. At most 32 items
    per worker are taken from `items` ahead of the one to be yielded next, so memory stays bounded.
    Closing the generator (or Ctrl-C in it) kills the workers; they also leave when this process dies.
    NumPy and torch in a worker use one thread, unless OMP_NUM_THREADS says otherwise.

    Args:
        function: importable by name; its values travel by pickle. The module that holds it, and the
            main module, are imported by each worker: keep both light.
        timeout_s: seconds per item, process start not counted.
        memory_bytes: address space a worker may take beyond what it has before its first item
            (RLIMIT_AS; enforced on Linux only).

    Raises:
        RuntimeError: worker processes cannot be started.
    """
    pool = _Pool(function, workers, timeout_s, memory_bytes)
    waiting: deque[tuple[int, Any]] = deque()  # handed back by workers that were already dead
    numbered = enumerate(items)
    done: dict[int, Result] = {}
    next_out = taken = 0
    exhausted = False
    try:
        while True:
            for worker in pool.idle():
                if not waiting and not exhausted and taken < next_out + workers * _WINDOW_PER_WORKER:
                    waiting.extend(itertools.islice(numbered, 1))
                    exhausted = not waiting
                    taken += len(waiting)
                if not waiting:
                    break
                if worker.begin(*waiting[0], timeout_s):
                    waiting.popleft()
                else:
                    pool.replace(worker)
            if next_out in done:
                while next_out in done:
                    yield done.pop(next_out)
                    next_out += 1
                continue  # the window has moved: idle workers may go on
            if exhausted and next_out == taken:
                return
            for index, result in pool.collect():
                done[index] = result
    finally:
        pool.kill()


@contextlib.contextmanager
def _single_threaded():
    """A context in which processes are started with one compute thread.

    It must be set in their environment: NumPy creates its threads before any of their own code runs.
    """
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


class _Worker:
    """One child process and the item it is busy with."""

    def __init__(self, context, function, memory_bytes: int):
        self.connection, child = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(child, function, memory_bytes), daemon=True, name="meloformer-worker"
        )
        # The child inherits the mask, so Ctrl-C, which reaches the whole group, is the parent's alone.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with _single_threaded():
                self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        child.close()  # so that the end of the child is an end of file here
        self.started = False
        self.task: tuple[int, Any] | None = None
        self.deadline = time.monotonic() + _START_SECONDS

    @property
    def idle(self) -> bool:
        return self.started and self.task is None

    def begin(self, index: int, item: Any, timeout_s: float) -> bool:
        """Send an item to the worker; False if the worker is dead."""
        try:
            self.connection.send(item)
        except OSError:
            return False
        self.task = index, item
        self.deadline = time.monotonic() + timeout_s
        return True

    def kill(self, grace_s: float = 0) -> int | None:
        """End the process; returns its exit code if it left by itself within `grace_s` seconds."""
        self.process.join(grace_s)
        code = self.process.exitcode
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.process.close()
        return code


class _Pool:
    def __init__(self, function, workers: int, timeout_s: float, memory_bytes: int):
        self._make = lambda: _Worker(multiprocessing.get_context("spawn"), function, memory_bytes)
        self._timeout_s, self._memory_bytes = timeout_s, memory_bytes
        self._failed_starts = 0
        resource_tracker.ensure_running()  # its start, inside that of the first worker, would unmask Ctrl-C
        self._workers: list[_Worker] = []
        try:
            self._workers.extend(self._make() for _ in range(workers))
        except BaseException:
            self.kill()
            raise

    def idle(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.idle]

    def replace(self, worker: _Worker, grace_s: float = 0) -> int | None:
        code = worker.kill(grace_s)
        self._workers[self._workers.index(worker)] = self._make()
        return code

    def kill(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def collect(self) -> Iterator[tuple[int, Result]]:
        """Wait until a worker has sent a message or exceeded its deadline; yields (index, result)."""
        unsettled = [worker for worker in self._workers if not worker.idle]
        seconds = max(0.0, min(worker.deadline for worker in unsettled) - time.monotonic())
        ready = set(wait([worker.connection for worker in self._workers], seconds))
        now = time.monotonic()
        for worker in list(self._workers):
            if worker.connection in ready:
                yield from self._receive(worker)
            elif not worker.idle and worker.deadline <= now:
                if not worker.started:
                    self._failed_start(worker, "did not start in time")
                    continue
                index, item = worker.task
                self.replace(worker)
                detail = f"no result after {self._timeout_s:g} s"
                yield index, Result(item, failure=Failure("timeout", detail))

    def _receive(self, worker: _Worker) -> Iterator[tuple[int, Result]]:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            if not worker.started:
                self._failed_start(worker, "died while starting")
                return
            task, code = worker.task, self.replace(worker, _DYING_SECONDS)
            if task is not None:
                index, item = task
                yield index, Result(item, failure=Failure("crashed", _exit_text(code)))
            return
        if not worker.started:
            worker.started = True
            self._failed_starts = 0
            return
        (index, item), worker.task = worker.task, None
        value, failure = message
        if failure is not None and failure.reason == "memory":
            self.replace(worker)  # its heap has grown, which would count against the next item
        yield index, Result(item, value, failure)

    def _failed_start(self, worker: _Worker, what: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= _START_ATTEMPTS:
            raise RuntimeError(f"a worker process {what}, {_START_ATTEMPTS} times in a row")
        self.replace(worker)


def _exit_text(code: int | None) -> str:
    if code is None:
        return "the worker closed its connection"
    if code < 0:
        try:
            return f"the worker died of {signal.Signals(-code).name}"
        except ValueError:
            return f"the worker died of signal {-code}"
    return f"the worker exited with code {code}"


# --- in the child ---------------------------------------------------------------------------------


def _serve(connection, function: Callable[[Any], Any], memory_bytes: int) -> None:
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _limit_memory(memory_bytes)
    try:
        connection.send(None)  # started
        while True:
            item = connection.recv()
            try:  # packing the value is part of the task: it may fail as well
                reply = ForkingPickler.dumps((function(item), None))
            except MemoryError:
                _lift_memory_limit()
                reply = _failure_reply("memory", f"more than {memory_bytes >> 20} MiB")
            except Exception as error:
                reply = _failure_reply("error", f"{type(error).__name__}: {error}")
            connection.send_bytes(reply)
    except (EOFError, ConnectionError):
        return


def _failure_reply(reason: str, detail: str):
    return ForkingPickler.dumps((None, Failure(reason, " ".join(detail.split())[:300])))


def _leave_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _limit_memory(memory_bytes: int) -> None:
    if sys.platform != "linux":
        return
    with open("/proc/self/statm") as file:
        in_use = int(file.read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = in_use + memory_bytes
    resource.setrlimit(
        resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )


def _lift_memory_limit() -> None:
    if sys.platform == "linux":
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
