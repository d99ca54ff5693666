"""Standard output and error that a command outlives: a full disk under them, or a reader that has gone.

What a command is for goes into files. `train 2>&1 | tee log` loses its reader at Ctrl-C, before the run has
saved; a failed print would end it unsaved.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import TextIO


class Outlived:
    """A text stream whose failed writes are dropped.

    Args:
        stream: None, as Python has it, if its file was closed at the start.

    Attributes:
        stream: raises, as ever.
        failure: why a write failed first; None if none did.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = open(os.devnull, "w") if stream is None else stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except OSError as error:
            self.failure = self.failure or error
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self.failure = self.failure or error

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextlib.contextmanager
def outlived_streams() -> Iterator[None]:
    """Drop what cannot be written to stdout and stderr, also when the interpreter flushes them at its end."""
    before = sys.stdout, sys.stderr
    ours = sys.stdout, sys.stderr = Outlived(before[0]), Outlived(before[1])
    try:
        yield
    finally:
        sys.stdout.flush()
        failure = ours[0].failure
        if failure is not None and failure.errno != errno.EPIPE:  # a reader may have had enough
            print(f"standard output cannot be written: {failure.strerror or failure}", file=ours[1])
        ours[1].flush()
        sys.stdout, sys.stderr = before
        for stream in ours:
            if stream.failure is not None:
                _let_go(stream.stream)


def _let_go(stream: TextIO) -> None:
    """Send what a stream still holds, and could not write, nowhere."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()
