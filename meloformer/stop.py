"""Requests to stop training or generation: a signal, or the end of the launcher. The loops poll them."""

import contextlib
import os
import signal
import stat
import threading

STOPPED = 75  # exit code of a command that saved and stopped on request: EX_TEMPFAIL, "try again"

# SIGHUP is not known on Windows.
_SIGNALS = [signal.Signals[name] for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


class StopRequest:
    """Records the first SIGTERM, SIGINT or SIGHUP (a closed terminal) between `__enter__` and `__exit__`.

    After it the default handler of SIGINT is restored: a second Ctrl-C ends the process at once, even inside
    a long call into a library.

    Args:
        promise: what is printed at the signal: what will be saved, and what a second Ctrl-C does.
    """

    def __init__(self, promise: str) -> None:
        self._promise = promise
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}
        # A launcher that is killed leaves its workers running: they would collide with the next run.
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def reason(self) -> str | None:
        """What requested the stop, or None."""
        if self._signal is not None:
            return self._signal.name
        if self._launcher is not None and os.getppid() != self._launcher:
            return "the death of torchrun"
        return None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # only this thread may set handlers
            for number in _SIGNALS:
                # `nohup` has SIGHUP ignored: such a run is to outlive its terminal.
                if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        number = signal.Signals(number)
        if number.name == "SIGHUP":
            _leave_terminal()
        if self._signal is None:
            self._signal = number
            with contextlib.suppress(OSError):  # stderr may be a file on a full disk, or closed
                # print is not reentrant: the signal may interrupt one
                os.write(2, f"\n{number.name}: {self._promise}\n".encode())
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _leave_terminal() -> None:
    """Send what went to a terminal, or through a pipe, nowhere: both may be gone, and a failed print would
    end the run unsaved. What goes into a file goes on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if not stat.S_ISREG(os.fstat(stream).st_mode):
            os.dup2(nowhere, stream)
    os.close(nowhere)
