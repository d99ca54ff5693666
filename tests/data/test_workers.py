"""Workers: every way in which a task can go wrong costs that task, and nothing else."""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from meloformer.data.workers import Failure, run_tasks

MIB = 1 << 20


def act(item):
    """A task that does as it is told; `item` is a number to square, or (what, argument)."""
    if not isinstance(item, tuple):
        return item * item
    what, argument = item
    if what == "sleep":
        time.sleep(argument)
        return "slept"
    if what == "wait for":
        while not argument.exists():
            time.sleep(0.01)
        time.sleep(0.5)  # what is taken too much is taken now
        return "waited"
    if what == "spin":
        while True:
            pass
    if what == "exit":
        os._exit(argument)
    if what == "kill":
        os.kill(os.getpid(), argument)
        time.sleep(600)
    if what == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        return "unmoved"
    if what == "allocate":
        return len(bytearray(argument))
    if what == "numpy":
        return np.ones(argument, dtype=np.uint8).nbytes
    if what == "raise":
        raise argument
    if what == "unpicklable":
        return lambda: None
    if what == "big":
        return np.zeros(argument, dtype=np.uint8)
    if what == "environment":
        return os.environ.get(argument)
    if what == "pid":
        return os.getpid()
    raise AssertionError(what)


def results(items, workers=2, timeout_s=300.0, memory_bytes=512 * MIB):
    return list(run_tasks(act, items, workers=workers, timeout_s=timeout_s, memory_bytes=memory_bytes))


@pytest.mark.parametrize("workers", [1, 3])
def test_values_in_input_order(workers):
    items = [("sleep", 0.3), *range(200)]
    got = results(items, workers)
    assert [result.item for result in got] == items
    assert [result.value for result in got] == ["slept", *(i * i for i in range(200))]


def test_no_items():
    assert results([]) == []


TROUBLE = {
    "hangs in sleep": (("sleep", 600), "timeout", "no result after 3 s"),
    "hangs in a loop": (("spin", None), "timeout", "no result after 3 s"),
    "leaves": (("exit", 3), "crashed", "exited with code 3"),
    "leaves with code 0": (("exit", 0), "crashed", "exited with code 0"),
    "is killed": (("kill", signal.SIGKILL), "crashed", "died of SIGKILL"),
    "segfaults": (("kill", signal.SIGSEGV), "crashed", "died of SIGSEGV"),
    "raises": (("raise", ValueError("odd\n\tthing")), "error", "ValueError: odd thing"),
    "raises without words": (("raise", RecursionError()), "error", "RecursionError:"),
    "cannot be sent": (("unpicklable", None), "error", "pickle"),
}
if sys.platform == "linux":  # elsewhere no memory limit is enforced
    TROUBLE["eats memory"] = ("allocate", 1024 * MIB), "memory", "more than 512 MiB"
    TROUBLE["eats memory in numpy"] = ("numpy", 1024 * MIB), "memory", "more than 512 MiB"


@pytest.mark.parametrize("case", TROUBLE)
def test_trouble_costs_one_item(case):
    item, reason, detail = TROUBLE[case]
    # Only what hangs may meet the limit: anything else takes milliseconds, but they may be long in coming.
    got = results([1, item, 2, 3], workers=1, timeout_s=3.0 if reason == "timeout" else 300.0)
    assert [result.value for result in got] == [1, None, 4, 9]
    assert [result.failure is None for result in got] == [True, False, True, True]
    assert got[1].item == item or isinstance(item[1], Exception)
    assert got[1].failure.reason == reason
    assert detail in got[1].failure.detail
    assert "\n" not in got[1].failure.detail


def test_trouble_everywhere_keeps_the_order():
    items = []
    for i in range(4):
        items += [i, ("exit", i), ("raise", KeyError(i)), 10 + i]
    first, second = results(items, workers=3), results(items, workers=1)
    for a, b in zip(first, second):
        assert (a.value, a.failure) == (b.value, b.failure)
    assert first[1].failure == Failure("crashed", "the worker exited with code 0")


def test_memory_within_the_limit_is_given():
    got = results([("allocate", 200 * MIB), ("numpy", 200 * MIB)], workers=1)
    assert [result.value for result in got] == [200 * MIB] * 2


def test_memory_limit_does_not_wear_out():
    """An item after one that hit the limit finds a fresh worker."""
    got = results([("pid", 0), ("allocate", 1024 * MIB), ("pid", 0), ("allocate", 400 * MIB)], workers=1)
    assert got[0].value != got[2].value
    assert got[3].value == 400 * MIB


def test_big_values_pass():
    got = results([("big", 5 * MIB)] * 3, workers=2)
    assert [result.value.nbytes for result in got] == [5 * MIB] * 3


def test_a_slow_item_does_not_pile_up_results(tmp_path):
    taken, ahead = [], 2 * 32 - 1

    def items():
        yield "wait for", tmp_path / "go"
        for i in range(100_000):
            taken.append(i)
            if len(taken) == ahead:
                (tmp_path / "go").touch()
            yield i

    stream = run_tasks(act, items(), workers=2, timeout_s=300, memory_bytes=512 * MIB)
    assert next(stream).value == "waited"
    assert len(taken) == ahead
    assert [next(stream).value for _ in range(200)] == [i * i for i in range(200)]
    stream.close()


def test_ctrl_c_is_left_to_the_parent():
    """Every worker, the first one too, takes no notice of the SIGINT that a terminal sends to all."""
    assert [result.value for result in results([("interrupt", None)] * 4)] == ["unmoved"] * 4


@pytest.mark.parametrize("outside", [None, "3"])
def test_threads_are_limited_in_the_workers_only(outside, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if outside is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", outside)
    before = dict(os.environ)
    stream = run_tasks(
        act, [("environment", "OMP_NUM_THREADS")], workers=1, timeout_s=300, memory_bytes=512 * MIB
    )
    assert next(stream).value == (outside or "1")
    assert dict(os.environ) == before
    stream.close()


def test_closing_ends_the_workers():
    before = set(multiprocessing.active_children())
    stream = run_tasks(act, iter(int, 1), workers=2, timeout_s=300, memory_bytes=512 * MIB)
    next(stream)
    assert len(set(multiprocessing.active_children()) - before) == 2
    stream.close()
    assert set(multiprocessing.active_children()) == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("what", ["idle", "spinning"])
def test_workers_leave_when_the_parent_is_killed(what, tmp_path):
    """The pids of the workers are written down, then the parent gets SIGKILL."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import itertools, sys, time\n"
        "from test_workers import act\n"
        "from meloformer.data.workers import run_tasks\n"
        "if __name__ == '__main__':\n"
        f"    items = [('pid', 0)] + [{('spin', None) if what == 'spinning' else ('pid', 0)!r}]\n"
        "    stream = run_tasks(act, items, workers=1, timeout_s=600, memory_bytes=1 << 29)\n"
        "    print(next(stream).value, flush=True)\n"
        f"    {'next(stream)' if what == 'spinning' else 'time.sleep(600)'}\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment)
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)  # alive
    parent.kill()
    parent.wait()
    for _ in range(3000):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{worker}/stat") as file:  # a zombie that nobody waits for is dead as well
            if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent by five minutes")


def test_a_worker_that_cannot_start_is_an_error(tmp_path, monkeypatch):
    """A function that no worker can import must not make the pool start workers for ever."""
    (tmp_path / "only_in_the_parent.py").write_text(
        f"import os\nif os.getpid() != {os.getpid()}:\n    os._exit(7)\ndef task(item):\n    return item\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    task = importlib.import_module("only_in_the_parent").task
    with pytest.raises(RuntimeError, match="died while starting, 3 times in a row"):
        list(run_tasks(task, [1], workers=1, timeout_s=300, memory_bytes=512 * MIB))


def test_overhead_per_item():
    stream = run_tasks(act, range(1500), workers=1, timeout_s=300, memory_bytes=512 * MIB)
    next(stream)
    start = time.process_time()
    count = sum(1 for _ in stream)
    assert (time.process_time() - start) / count < 1e-3
