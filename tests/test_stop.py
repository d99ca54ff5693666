"""Requests to stop a run."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from meloformer import stop
from meloformer.stop import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_is_recorded_and_the_handlers_come_back(number, monkeypatch):
    monkeypatch.setattr(stop, "_leave_terminal", lambda: None)  # it would silence the tests
    before = signal.signal(number, signal.SIG_DFL)  # SIGHUP is ignored where the tests run under nohup
    try:
        with StopRequest("will save") as request:
            assert request.reason is None
            os.kill(os.getpid(), number)
            assert request.reason == number.name
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_nohup_outlives_the_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest("will save") as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.reason is None
    finally:
        signal.signal(signal.SIGHUP, before)


CLOSED = """
import sys, time
from meloformer.stop import StopRequest
with StopRequest("will save") as request:
    print("ready", flush=True)
    while request.reason is None:
        time.sleep(0.01)
    print("still able to print", flush=True)
    print("and to stderr", file=sys.stderr, flush=True)
    open(sys.argv[1], "w").write(request.reason)
"""


def test_a_closed_terminal_stops_a_run_that_can_still_print(tmp_path):
    told = tmp_path / "told"
    lead, terminal = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", CLOSED, str(told)],
        stdin=terminal, stdout=terminal, stderr=terminal, env=environment, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # it is ignored under nohup
    )  # fmt: skip
    os.close(terminal)
    said = b""
    while b"\n" not in said:  # to the end of the line: the terminal may not go while it is being written
        said += os.read(lead, 100)
    os.close(lead)  # the terminal window is closed
    time.sleep(0.1)
    process.send_signal(signal.SIGHUP)  # what the shell sends to its jobs then
    assert process.wait(600) == 0
    assert told.read_text() == "SIGHUP"
